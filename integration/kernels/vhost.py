# SPDX-License-Identifier: BSD-2-Clause
"""vhost-net: what a guest's RSS comes to with ``vhost=on``, without qsteer and with it, every flow checked.

``python -m integration.kernels.vhost FILE [QEMU...]`` under a kernel with vhost_net (``inside.py``) writes one JSON
object a line for each QEMU:

- QEMU 10.0 takes qsteer's program from ``qsteer run`` (``ebpf-rss-fds``), and writes the guest's table into its maps;
- QEMU 11.1 never uses a program where vhost is on: ``apply`` and ``keep`` ask, by ``device-state`` or ``guest-agent``.

Without a program QEMU 10.0 offers the guest no RSS where vhost is on; QEMU 11.1 offers it, and does not deliver it.
"""

import contextlib
import dataclasses
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration import provision
from integration.agent_guest import with_agent
from integration.guest import GuestError
from integration.kernels.guests import QEMUS
from integration.kernels.nested import PATIENTLY, Nic, Vm, unprivileged
from integration.kernels.nested import qsteer as run_qsteer
from integration.provision import Provisioned
from integration.traffic import FLOWS, frame
from qsteer import inventory
from qsteer.model import Tap
from qsteer.rss import RssConfig
from tests.kernel.support import PATIENCE, links_up

PASSED = Nic(tap="qskv0", vhost=True, rss=True, passed=True)
OFFERED = Nic(tap="qskv1", vhost=True, rss=True)
WAITING = dataclasses.replace(OFFERED, passed=True)
"""The same from ``qsteer run`` with ``rss=on``, where QEMU takes no program."""
ROUNDS = 7
ROUND_S = 2.0
KEPT_WITHIN_S = 20.0 * PATIENCE
_FIRST, _SECOND, _THIRD = "weight 1 2 3 2", "equal 3", "weight 0 1 0 1"


class DoesNotHoldError(Exception):
    """qsteer did not do what is shown here; ``str()`` is one line."""


class Show:
    """The phases of one QEMU, and what they came to."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self.phases: list[dict[str, Any]] = []
        self.throughput: dict[str, Any] = {}

    def passed(self) -> None:
        """QEMU got program and maps from ``qsteer run``, and does the rest."""
        for arguments in (_FIRST, _SECOND):
            wanted = self.vm.ethtool(PASSED, arguments)
            self.measure(f"qsteer run, shared-maps: {arguments}", PASSED, wanted)
        self.qsteer("off", "--dev", PASSED.tap)
        self.measure(f"qsteer off: {_SECOND}", PASSED, wanted, steered=False)
        self.qsteer("apply", "--dev", PASSED.tap)
        self.measure(f"qsteer apply, shared-maps: {_SECOND}", PASSED, wanted)
        if self.vm.is_offered_rss(OFFERED):
            raise DoesNotHoldError("QEMU 10.0 offers RSS with vhost=on and no program, which it did not")

    def offered(self) -> None:
        """The guest is offered RSS, nobody gives QEMU a program."""
        wanted = self.vm.ethtool(OFFERED, _FIRST)
        self.measure(f"without qsteer: {_FIRST}", OFFERED, wanted, steered=False)
        for source, options in (("device-state", ("--allow", "pause")), ("guest-agent", ())):
            wanted = self.vm.ethtool(OFFERED, _FIRST)
            self.qsteer("apply", "--dev", OFFERED.tap, "--source", source, *options, *PATIENTLY)
            self.measure(f"qsteer apply, {source}: {_FIRST}", OFFERED, wanted)
            with keep("--dev", OFFERED.tap, "--source", source, "--reread", "1", *options, *PATIENTLY):
                for arguments in (_SECOND, _THIRD):
                    began = time.monotonic()
                    wanted = self.vm.ethtool(OFFERED, arguments)
                    self.wait_for(OFFERED, wanted)
                    after_s = round(time.monotonic() - began, 1)
                    self.measure(f"qsteer keep, {source}: {arguments}", OFFERED, wanted, followed_after_s=after_s)
            self.qsteer("off", "--dev", OFFERED.tap)
        self.measure(f"qsteer off: {_THIRD}", OFFERED, wanted, steered=False)

    def with_and_without(self, nic: Nic, *options: str) -> None:
        """Packets that the guest gets a second while the host sends what it can, by turns with steering and without."""
        counts: dict[str, list[float]] = {"with": [], "without": []}
        self.vm.ethtool(nic, "equal 4")
        self.qsteer("off", "--dev", nic.tap)
        for _ in range(ROUNDS):
            counts["without"].append(self._rate(nic))
            self.qsteer("apply", "--dev", nic.tap, *options)
            counts["with"].append(self._rate(nic))
            self.qsteer("off", "--dev", nic.tap)
        ratios = sorted(got / bare for got, bare in zip(counts["with"], counts["without"], strict=True))
        quartiles = statistics.quantiles(ratios, n=4)
        self.throughput = {
            **{f"packets_per_s_{how}": round(statistics.median(rates)) for how, rates in counts.items()},
            "ratio": round(quartiles[1], 3),
            "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
            "rounds": ROUNDS,
        }
        print(json.dumps(self.throughput), flush=True)

    def measure(self, name: str, nic: Nic, wanted: RssConfig, *, steered: bool = True, **more: float) -> None:
        """Follow every flow, and note what came of it.  Raises DoesNotHoldError."""
        verdict = self.vm.verdict(nic, wanted, FLOWS)
        phase = {"name": name, "steered": steered} | dataclasses.asdict(verdict) | more
        self.phases.append(phase)
        print(json.dumps(phase), flush=True)
        off = verdict.mismatches + verdict.host_mismatches + verdict.lost
        if steered and off:
            raise DoesNotHoldError(f"{name}: {verdict.mismatches} mismatches, {verdict.lost} lost, of {verdict.flows}")
        if not steered and not verdict.mismatches:
            raise DoesNotHoldError(f"{name}: all flows are right without qsteer, so that nothing is shown")

    def _rate(self, nic: Nic) -> float:
        mac = self.vm.guest.mac(self.vm.device(nic))
        frames = [frame(number, mac) for number in range(FLOWS)]
        links_up(nic.tap)
        before, began = self._received(nic), time.monotonic()
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
            sender.bind((nic.tap, 0))
            while time.monotonic() < began + ROUND_S * PATIENCE / 2:
                for one in frames:
                    with contextlib.suppress(OSError):  # no room: what the guest cannot take is dropped
                        sender.send(one)
        took_s = time.monotonic() - began
        return (self._received(nic) - before) / took_s

    def _received(self, nic: Nic) -> int:
        return int(self.vm.guest.run(f"cat /sys/class/net/{self.vm.device(nic)}/statistics/rx_packets"))

    def wait_for(self, nic: Nic, wanted: RssConfig) -> None:
        """Until what steers a NIC is what its guest asks for.  Raises DoesNotHoldError."""
        deadline = time.monotonic() + KEPT_WITHIN_S
        while _steered_by(nic) != (wanted.key, wanted.table):
            if time.monotonic() > deadline:
                raise DoesNotHoldError(f"keep did not follow the guest within {KEPT_WITHIN_S:.0f} s")
            time.sleep(0.1)

    @staticmethod
    def qsteer(*arguments: str) -> None:
        """Run a command, which has to work.  Raises DoesNotHoldError."""
        said = run_qsteer(*arguments)
        print(f"$ qsteer {' '.join(arguments)}: {said.status} {said.out.strip()} {said.line}", flush=True)
        if said.status:
            raise DoesNotHoldError(f"qsteer {' '.join(arguments)}: {said.line}")


def tap_of(nic: Nic) -> Tap:
    """The tap behind a NIC, as qsteer sees it."""
    (tap,) = (tap for tap in inventory.fetch().taps if tap.name == nic.tap)
    return tap


def _steered_by(nic: Nic) -> tuple[bytes, tuple[int, ...]] | None:
    steering = tap_of(nic).steering
    return (steering.config.key, steering.config.table) if steering and steering.config else None


@contextlib.contextmanager
def keep(*options: str) -> Iterator[None]:
    """``qsteer keep``, meanwhile."""
    with subprocess.Popen([sys.executable, "-m", "qsteer", "keep", *options]) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            if process.wait(30 * PATIENCE):
                print(f"keep ended with {process.returncode}", flush=True)


def show(files: Provisioned, name: str) -> dict[str, Any]:
    """All phases with one QEMU.  Raises GuestError, ProvisionError, DoesNotHoldError."""
    takes_program = name == "10.0"
    nics = (PASSED, OFFERED) if takes_program else (WAITING,)
    files = provision.with_qemu(files, QEMUS[name]())
    with unprivileged(files, "qsk-vhost", nics) as vm:
        shown = Show(vm)
        if takes_program:
            shown.passed()
            shown.with_and_without(PASSED, "--source", "shared-maps")
        else:
            shown.offered()
            shown.with_and_without(OFFERED, "--source", "device-state", "--allow", "pause", *PATIENTLY)
    return {"qemu": name, "version": files.qemu_version, "phases": shown.phases, "throughput": shown.throughput}


def main(arguments: Sequence[str]) -> int:
    path, *names = arguments
    files = with_agent(provision.provision())
    failed = 0
    with Path(path).open("a") as rows:
        for name in names or ("10.0", "11.1"):
            try:
                rows.write(json.dumps(show(files, name)) + "\n")
            except (GuestError, DoesNotHoldError) as error:
                print(f"QEMU {name}: {error}", flush=True)
                failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
