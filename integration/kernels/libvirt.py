# SPDX-License-Identifier: BSD-2-Clause
"""libvirt's domains with vhost: what the hook, ``keep`` and the emulator's wrapper make of a NIC, every flow checked.

``python -m integration.kernels.libvirt FILE [QEMU...]`` under a kernel with vhost_net (``inside.py``) writes one JSON
object a line, for each QEMU and set-up.  Where a processor is emulated nothing is as quick as the hook and the wrapper
have to be: here they have more time, and nothing else is changed about them.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration import provision
from integration.guest import GuestError
from integration.keeping import keep
from integration.kernels.guests import QEMUS
from integration.kernels.nested import PATIENTLY
from integration.libvirt_host import USER, Domain, Journal, Libvirtd, Nic, host, provision_libvirt
from integration.provision import BUILD, Provisioned
from integration.traffic import follow, verify
from qsteer import ethtool, hookfile, inventory, service
from qsteer.domainpolicy import NAMESPACE
from qsteer.model import Source
from qsteer.rss import RssConfig, equal_table
from tests.kernel import support

QUEUES = 4
TAP = "qskl0"
MAC = "52:54:00:71:6b:00"
FLOWS = 1024
WRAPPER = Path("/var/lib/libvirt/qsteer-qemu")
SECONDS = 60
_SETTINGS = ("weight 1 2 3 2", "equal 3")
_HOOK = f"""#!{sys.executable}
import sys
from qsteer import hookwork, libvirthook
libvirthook.DEADLINE_S = hookwork.LOCK_S = {SECONDS}
sys.exit(libvirthook.main())
"""
_QMP = (
    "<qemu:commandline><qemu:arg value='-qmp'/>"
    "<qemu:arg value='unix:/run/libvirt/qemu/qskl.qmp,server=on,wait=off'/></qemu:commandline>"
)
"""libvirt's own monitor, and its agent's channel, serve libvirt alone."""


EXPECTED = {
    ("10.0", "hook"): "yes",
    ("10.0", "wrapper"): "yes",
    ("10.0", "hook and keep"): "RSS is not offered",
    ("11.1", "hook"): "yes",
    ("11.1", "wrapper"): "no",
    ("11.1", "hook and keep"): "yes",
}
"""By QEMU and set-up.  QEMU 10.1 and later take no program where vhost is on."""


class Show:
    """The set-ups with one QEMU."""

    def __init__(self, libvirtd: Libvirtd, journal: Journal, files: Provisioned, name: str, qemu: Path) -> None:
        self._libvirtd, self._journal, self._files, self._name, self._qemu = libvirtd, journal, files, name, qemu

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each set-up.  Raises GuestError."""
        for what, run in (("hook", self._hook), ("wrapper", self._wrapper), ("hook and keep", self._keep)):
            row: dict[str, Any] = {"qemu": self._name, "set_up": what}
            try:
                row |= run()
            except (AssertionError, GuestError) as error:
                row |= {"result": "no", "why": str(error)}
            print(json.dumps(row), flush=True)
            yield row

    def _hook(self) -> dict[str, Any]:
        policy = f"<q:steering xmlns:q='{NAMESPACE}'><q:interface equal='3'/></q:steering>"
        nic = Nic(mac=MAC, tap=TAP, vhost=True, rss=False)
        with self._domain("hook", nic, metadata=policy) as domain:
            domain.boot()
            config = _attached()
            assert config and config.table == equal_table(3), self._journal.text(domain.name)
            return self._measured(domain, [config])

    def _wrapper(self) -> dict[str, Any]:
        nic = Nic(mac=MAC, tap=TAP, vhost=True, rss=True)
        with _serving(), self._domain("wrapper", nic, emulator=WRAPPER) as domain:
            domain.boot()
            said = [line for line in domain.log().splitlines() if line.startswith("qsteer-qemu:")]
            if ethtool.has_no_table(domain.run("ethtool -x eth0")):
                return {"result": "RSS is not offered", "said": said}
            return self._measured(domain, _SETTINGS) | {"said": said}

    def _keep(self) -> dict[str, Any]:
        nic = Nic(mac=MAC, tap=TAP, vhost=True, rss=True)
        with (
            keep(f"qskl-{self._name}-keep", "--allow", "pause", "--reread", "1", *PATIENTLY) as kept,
            self._domain("keep", nic, extra=_QMP) as domain,
        ):
            domain.boot()
            if ethtool.has_no_table(domain.run("ethtool -x eth0")):
                return {"result": "RSS is not offered"}
            row = self._measured(domain, _SETTINGS)
            said = [line for line in self._journal.text(domain.name).splitlines() if "left to" in line]
            return row | {"said": said, "events": len(kept.events)}

    def _domain(self, what: str, nic: Nic, **options: Any) -> Domain:
        name = f"qskl-{self._name}-{what}"
        return Domain(self._libvirtd, self._files, name=name, nics=[nic], **{"emulator": self._qemu, **options})

    def _measured(self, domain: Domain, wanted: Sequence[str | RssConfig]) -> dict[str, Any]:
        """Every flow for each configuration: the guest sets those that are in words, and gets what it asks for."""
        verdicts = []
        for one in wanted:
            if isinstance(one, str):
                domain.run(f"ethtool -X eth0 {one}")
                one = domain.rss()
                with contextlib.suppress(AssertionError):
                    _wait_attached(one)
            sighting = follow(domain, TAP, self._files.flowrx, queues=QUEUES, flows=FLOWS)
            verdicts.append(verify(sighting, one, queues=QUEUES))
        version = re.search(r"qemu version: ([0-9.]+)", domain.log())
        wrong = sum(one.mismatches + one.host_mismatches + one.lost for one in verdicts)
        return {
            "result": "no" if wrong else "yes",
            "verdicts": [dataclasses.asdict(one) for one in verdicts],
            "source": str(_source()),
            "version": version[1] if version else "unknown",
        }


def _attached() -> RssConfig | None:
    (tap,) = (tap for tap in inventory.fetch().taps if tap.name == TAP)
    return tap.content.config if tap.content and tap.content.enabled else None


def _wait_attached(asked: RssConfig) -> None:
    def is_attached() -> bool:
        config = _attached()
        return bool(config and (config.key, config.table) == (asked.key, asked.table))

    support.wait_until("it is followed", is_attached, 20)


def _source() -> Source | None:
    (tap,) = (tap for tap in inventory.fetch().taps if tap.name == TAP)
    return tap.program.ident.source if tap.program and tap.program.ident else None


@contextlib.contextmanager
def _serving() -> Iterator[None]:
    with subprocess.Popen((sys.executable, "-m", "qsteer", "serve")) as process:
        try:
            support.wait_until("the service", lambda: service.SOCKET.is_socket() or process.poll() is not None)
            yield
        finally:
            process.terminate()


def main(arguments: Sequence[str]) -> int:
    path, *names = arguments
    tempfile.tempdir = "/tmp"  # not below /run, which the host with libvirt has another one of
    files = provision.provision()
    qemus = {name: QEMUS[name]() for name in names or ("10.0", "11.1")}
    failed = 0
    with Path(path).open("a") as rows, host(provision_libvirt()) as journal, support.network_namespace():
        os.environ["QSTEER_CONFIG"] = "/etc/qsteer"
        shutil.rmtree("/etc/qsteer", ignore_errors=True)
        Path("/etc/qsteer/qemu").mkdir(parents=True)
        for folder in ("/etc/qsteer", "/etc/qsteer/qemu"):
            Path(folder).chmod(0o755)  # whatever the umask: what others may write is passed over
        Path("/etc/qsteer/qsteer.toml").write_text(f'[[serve.allow]]\nuser = "{USER}"\n')
        shutil.copy(BUILD / "qsteer-qemu", WRAPPER)
        hook = Path("/var/lib/libvirt/hook")
        hook.write_text(_HOOK)
        hook.chmod(0o755)
        hookfile.SCRIPT.parent.mkdir(parents=True, exist_ok=True)
        hookfile.SCRIPT.write_text(hookfile.text(hook))
        hookfile.SCRIPT.chmod(0o755)
        with Libvirtd() as libvirtd:
            for name, qemu in qemus.items():
                real = Path("/etc/qsteer/qemu/qemu-system-x86_64")
                real.unlink(missing_ok=True)
                real.symlink_to(qemu)
                for row in Show(libvirtd, journal, files, name, qemu).rows():
                    rows.write(json.dumps(row) + "\n")
                    rows.flush()
                    if row["result"] != EXPECTED[name, row["set_up"]]:
                        print(f"QEMU {name}, {row['set_up']}: {row['result']}: {row.get('why')}", flush=True)
                        failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
