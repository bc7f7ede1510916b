# SPDX-License-Identifier: BSD-2-Clause
"""What tests of ``qsteer plug`` share: a QEMU without a NIC, and what of it may not change.

``python -m integration.plugged --fuzz`` runs the whole of the fuzzing of QEMU's answers (tests/unit/test_plug.py).
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from integration.guest import as_user
from qsteer import qmp
from tests.kernel import support

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
"""What libvirt starts its QEMUs with."""
IDLE = ("-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-sandbox", SANDBOX)
ROOT_PORT = ("-machine", "q35", "-device", "pcie-root-port,id=rp0,chassis=1")


class Idle:
    """A QEMU that runs no guest, as an ordinary user."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.process = process
        self.pid = process.pid
        self.path = path

    def ask(self, command: str, **arguments: object) -> Any:
        return qmp.execute(str(self.path), command, arguments)

    def plug(self, tap: str, *options: str) -> subprocess.CompletedProcess[str]:
        return support.qsteer("plug", "--qmp", str(self.path), "--tap", tap, *options)

    def unplug(self, nic: str, *options: str) -> subprocess.CompletedProcess[str]:
        return support.qsteer("unplug", "--qmp", str(self.path), "--nic", nic, *options)

    def netdevs(self) -> str:
        return str(self.ask("human-monitor-command", **{"command-line": "info network"}))


@contextlib.contextmanager
def idle(qemu: Path, user: str, *arguments: str) -> Iterator[Idle]:
    with tempfile.TemporaryDirectory(prefix="qsteer-plug-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        monitor = ("-name", "qspl", "-qmp", f"unix:{folder}/qmp,server=on,wait=off")
        command = (*as_user(user), str(qemu), *IDLE, *monitor, *(arguments or ("-machine", "pc")))
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            path = folder / "qmp"
            support.wait_until("QEMU's QMP socket", lambda: path.exists() or process.poll() is not None)
            assert process.poll() is None, (folder / "log").read_text()
            yield Idle(process, path)
        finally:
            process.kill()
            process.wait()


def open_files(pid: int) -> Counter[str]:
    """How many fds of each kind a process has, but for its connections, which come and go."""
    found: Counter[str] = Counter()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(fd.readlink())
            found["" if target.startswith("socket:") else target] += 1
    del found[""]
    return found


def exists(tap: str) -> bool:
    return Path("/sys/class/net", tap).exists()


def main(arguments: Sequence[str] | None = None) -> int:
    from tests.unit.test_plug import fuzz

    parser = argparse.ArgumentParser(prog="python -m integration.plugged")
    parser.add_argument("--fuzz", action="store_true", required=True)
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args(arguments)
    began = time.monotonic()
    found = fuzz(given.rounds, given.seed)
    print(f"{found} in {time.monotonic() - began:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
