# SPDX-License-Identifier: BSD-2-Clause
"""keep and monitor as processes, on taps that stand-ins for VMs hold."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qsteer import kernel, programs
from qsteer.rss import RssConfig
from tests.kernel import private, standin, support

COMMAND = (sys.executable, "-m", "qsteer")


class Daemon:
    """A process that prints events, and tells a service manager how it is."""

    def __init__(self, process: subprocess.Popen[str], manager: socket.socket, stderr: Path) -> None:
        self.process = process
        self._manager = manager
        self._stderr = stderr
        self._pending = ""

    def events(self) -> list[dict[str, Any]]:
        """Those that are there."""
        assert self.process.stdout
        while select.select((self.process.stdout,), (), (), 0)[0]:
            read = os.read(self.process.stdout.fileno(), 1 << 16).decode()
            if not read:
                break
            self._pending += read
        *lines, self._pending = self._pending.split("\n")
        return [json.loads(line) for line in lines]

    def wait_for(self, what: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """The next event of a kind; what comes before it is passed over.

        Where a processor is emulated, a digest of the holders costs more than keep may spend, and comes minutes apart.
        """
        found: list[dict[str, Any]] = []

        def there() -> bool:
            assert self.process.poll() is None, self.said()
            found.extend(one for one in self.events() if one["event"] == what)
            return bool(found)

        support.wait_until(f"{what}; it said: {self.said()}", there, timeout_s)
        return found[0]

    def wait_told(self, prefix: str) -> None:
        """Until the service manager is told something."""
        self._manager.settimeout(support.patience(20))
        while not self._manager.recv(4096).decode().startswith(prefix):
            pass

    def said(self) -> str:
        return self._stderr.read_text()

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(support.patience(20))


@contextlib.contextmanager
def daemon(verb: str, *vms: str, options: Sequence[str] = (), prefix: Sequence[str] = ()) -> Iterator[Daemon]:
    """keep or monitor, which has looked once.  No traceback, and nothing of it is left afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=private.RUNTIME)))
        stderr = stack.enter_context((folder / "stderr").open("w"))
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(folder / "notify"))
        process = subprocess.Popen(
            [*prefix, *COMMAND, verb, "--json", *options, *(word for vm in vms for word in ("--vm", vm))],
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
        )
        running = Daemon(process, manager, folder / "stderr")
        try:
            running.wait_told("READY=1")
            yield running
        finally:
            process.kill()
            process.communicate()
            assert "Traceback" not in running.said(), running.said()


def program_of(vm: standin.Vm) -> int:
    """The kernel's word."""
    return kernel.open_queues(vm.pid)[0].program_id


def config_of(vm: standin.Vm) -> RssConfig:
    content = programs.read_maps(programs.program_info(program_of(vm)))
    assert content.config
    return content.config


def take_off(vm: standin.Vm) -> None:
    kernel.detach(vm.tap.open.fds[0])
