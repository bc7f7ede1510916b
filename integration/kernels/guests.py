# SPDX-License-Identifier: BSD-2-Clause
"""Every source with real guests: QEMU by QEMU, with vhost and without, each flow checked.

``python -m integration.kernels.guests FILE [QEMU...]`` under the kernel in question (``inside.py``) appends a JSON
object a line to FILE, a ``Cell`` each, as they are measured.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from integration import provision
from integration.agent_guest import with_agent
from integration.guest import GuestError
from integration.kernels.nested import PATIENTLY, Nic, Said, Vm, qsteer, rooted, run_options, unprivileged
from integration.provision import Provisioned
from integration.traffic import Verdict
from qsteer import ethtool
from qsteer.model import Source
from qsteer.rss import BASE_TYPES, RssConfig

FLOWS = 1024
QEMUS: dict[str, Callable[[], Path]] = {
    "7.2": provision.provision_old_qemu,
    "10.0": lambda: provision.provision().qemu,
    "11.1": provision.provision_new_qemu,
}
"""By the name that the support table has; what is unpacked may be of a later version."""

PASSED, PASSED_VHOST = (Nic(tap=f"qska{int(on)}", vhost=on, rss=True, passed=True) for on in (False, True))
OFFERED, OFFERED_VHOST = (Nic(tap=f"qskb{int(on)}", vhost=on, rss=True) for on in (False, True))
PLAIN, PLAIN_VHOST = (Nic(tap=f"qskc{int(on)}", vhost=on, rss=False) for on in (False, True))
ROOTS, ROOTS_VHOST = (Nic(tap=f"qskd{int(on)}", vhost=on, rss=True) for on in (False, True))
_NOT_OFFERED = "rss=on, but this QEMU does not offer the guest RSS"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One cell of the support table.

    ``result`` is ``steered`` (every flow on the queue that the configuration gives it, put there by the host's kernel),
    ``refused`` (with what qsteer ``says``), ``unsupported`` (QEMU does not do its part, ``says`` has what is seen), or
    ``wrong``.  ``without`` and ``with_qsteer`` count, of ``flows``, those that the guest got on another queue, those
    that the host's kernel put on another, and those that were lost; empty where there is nothing to measure.
    """

    qemu: str
    version: str
    vhost: bool
    source: str
    result: str
    says: str = ""
    flows: int = FLOWS
    without: tuple[int, ...] = ()
    with_qsteer: tuple[int, ...] = ()


def _counts(verdict: Verdict) -> tuple[int, ...]:
    return (verdict.mismatches, verdict.host_mismatches, verdict.lost)


class Matrix:
    """The cells of one QEMU, measured one after the other."""

    def __init__(self, files: Provisioned, qemu: str, report: Callable[[Cell], None]) -> None:
        self._files = files
        self._qemu = qemu
        self._report = report

    def measure(self) -> None:
        """Raises GuestError, ProvisionError."""
        passed = [nic for nic in (PASSED, PASSED_VHOST) if self._can_be_passed(nic)]
        offered, plain, roots = (OFFERED, OFFERED_VHOST), (PLAIN, PLAIN_VHOST), (ROOTS, ROOTS_VHOST)
        with unprivileged(self._files, "qsk-user", (*passed, *offered, *plain)) as vm:
            for nic in passed:
                self._passed(vm, nic)
            for nic in offered:
                self._offered(vm, nic)
            for nic in plain:
                self._static(vm, nic)
        with rooted(self._files, "qsk-root", roots) as vm:
            for nic in roots:
                self._qemus_own(vm, nic)

    def _cell(
        self,
        nic: Nic,
        source: Source,
        result: str,
        *,
        says: str = "",
        without: tuple[int, ...] = (),
        with_qsteer: tuple[int, ...] = (),
    ) -> None:
        self._report(
            Cell(
                qemu=self._qemu,
                version=self._files.qemu_version,
                vhost=nic.vhost,
                source=str(source),
                result=result,
                says=says,
                without=without,
                with_qsteer=with_qsteer,
            )
        )

    def _can_be_passed(self, nic: Nic) -> bool:
        """Ask ``qsteer run`` whether it passes a program; if not, that is the cell."""
        said = qsteer("run", "--dry-run", *run_options("qsk-user", (nic,)), str(self._files.qemu))
        if said.status:
            self._cell(nic, Source.SHARED_MAPS, "refused", says=said.line)
        elif "ebpf-rss-fds" not in said.out:
            self._cell(nic, Source.SHARED_MAPS, "unsupported", says=said.line or said.out.strip().splitlines()[-1])
        else:
            return True
        return False

    def _passed(self, vm: Vm, nic: Nic) -> None:
        """The guest sets its table; QEMU writes it into qsteer's maps."""
        wanted = vm.ethtool(nic, "weight 1 2 3 2")
        self._steered(vm, nic, Source.SHARED_MAPS, wanted, ())

    def _offered(self, vm: Vm, nic: Nic) -> None:
        """The guest is offered RSS, as far as it is, and nobody gives QEMU a program."""
        if not vm.is_offered_rss(nic):
            for source in (Source.DEVICE_STATE, Source.GUEST_AGENT):
                self._cell(nic, source, "unsupported", says=_NOT_OFFERED)
            return
        without = _counts(vm.verdict(nic, vm.ethtool(nic, "weight 1 2 3 2"), FLOWS))
        self._asked(vm, nic, Source.DEVICE_STATE, without, "--allow", "pause")
        vm.ethtool(nic, "equal 3")
        self._asked(vm, nic, Source.GUEST_AGENT, without)

    def _asked(self, vm: Vm, nic: Nic, source: Source, without: tuple[int, ...], *options: str) -> None:
        """qsteer asks what the guest has set."""
        said = qsteer("apply", "--dev", nic.tap, "--source", str(source), *options, *PATIENTLY)
        wanted = vm.guest.rss(vm.device(nic))
        self._applied(said, vm, nic, source, wanted, without)

    def _static(self, vm: Vm, nic: Nic) -> None:
        """An even spread of qsteer's own for a guest without RSS."""
        even = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=tuple(range(4)) * 32)
        without = _counts(vm.verdict(nic, even, FLOWS))
        said = qsteer("apply", "--dev", nic.tap, "--weight", "3,2,2,1", *PATIENTLY)
        shown = ethtool.parse(qsteer("show", "--dev", nic.tap).out) if not said.status else None
        wanted = RssConfig(types=BASE_TYPES, key=shown.key, table=shown.table) if shown and shown.key else even
        self._applied(said, vm, nic, Source.STATIC, wanted, without)

    def _qemus_own(self, vm: Vm, nic: Nic) -> None:
        """QEMU as root may load its own program; qsteer can put its own over the same maps."""
        if not vm.is_offered_rss(nic):
            self._cell(nic, Source.QEMU_MAPS, "unsupported", says=_NOT_OFFERED)
            return
        wanted = vm.ethtool(nic, "weight 1 2 3 2")
        without = _counts(vm.verdict(nic, wanted, FLOWS))
        source = self._tap(nic).get("source")
        if source != Source.QEMU_MAPS:
            state = self._tap(nic)["state"]
            self._cell(nic, Source.QEMU_MAPS, "unsupported", says=f"QEMU attaches none: {state}", without=without)
            return
        said = qsteer("apply", "--dev", nic.tap, "--replace", *PATIENTLY)
        self._applied(said, vm, nic, Source.QEMU_MAPS, wanted, without)

    def _applied(
        self, said: Said, vm: Vm, nic: Nic, source: Source, wanted: RssConfig, without: tuple[int, ...]
    ) -> None:
        if said.status:
            self._cell(nic, source, "refused", says=said.line, without=without)
        else:
            self._steered(vm, nic, source, wanted, without)

    def _steered(self, vm: Vm, nic: Nic, source: Source, wanted: RssConfig, without: tuple[int, ...]) -> None:
        counts = _counts(vm.verdict(nic, wanted, FLOWS))
        tap = self._tap(nic)
        program = tap["program"]["kind"] if tap["program"] else None
        right = not any(counts) and program == "qsteer" and tap["source"] == source
        says = "" if right else f"program {program}, source {tap['source']}, {tap['state']}"
        result = "steered" if right else "wrong"
        self._cell(nic, source, result, says=says, without=without, with_qsteer=counts)

    @staticmethod
    def _tap(nic: Nic) -> dict[str, Any]:
        (tap,) = json.loads(qsteer("status", "--dev", nic.tap, "--json").out)["taps"]
        assert isinstance(tap, dict)
        return tap


@contextlib.contextmanager
def _reporting(path: Path) -> Iterator[Callable[[Cell], None]]:
    with path.open("a") as file:

        def report(cell: Cell) -> None:
            line = json.dumps(dataclasses.asdict(cell))
            file.write(line + "\n")
            file.flush()
            print(line, flush=True)

        yield report


def main(arguments: Sequence[str]) -> int:
    path, *names = arguments
    files = with_agent(provision.provision())
    failed = 0
    with _reporting(Path(path)) as report:
        for name in names or QEMUS:
            try:
                Matrix(provision.with_qemu(files, QEMUS[name]()), name, report).measure()
            except GuestError as error:
                print(f"QEMU {name}: {error}", flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
