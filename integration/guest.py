# SPDX-License-Identifier: BSD-2-Clause
"""A real Linux guest under QEMU, and commands run in it.

Theory of operation
-------------------
The guest runs one shell loop on its second serial port (guest/init).  QEMU connects that port to a unix socket on which
we listen: the connection stands before the first instruction runs, so nothing is missed, and its end is QEMU's end.
Whatever starts QEMU (``qsteer run``, setpriv, nothing at all) replaces itself by it, so that the pid that we started is
QEMU's.

QEMU must not outlive us.  The kernel forgets a parent-death signal when a process changes its user, as ours does; so a
small watcher holds QEMU's pidfd and the reading end of a pipe, and kills when the pipe ends, however we did.
"""

import abc
import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from integration.provision import Provisioned
from qsteer import ethtool, qmp
from qsteer.rss import BASE_TYPES, HashType, RssConfig
from tests.kernel.support import PATIENCE

ACCEL = os.environ.get("QSTEER_ACCEL", "tcg")
"""QEMU's accelerator; tcg runs everywhere, and what is tested here does not depend on it."""
VCPUS = 4
KERNEL_ARGUMENTS = "console=ttyS0 quiet panic=-1 random.trust_cpu=on"
BOOT_TIMEOUT_S = 120.0 * PATIENCE
COMMAND_TIMEOUT_S = 30.0 * PATIENCE

_FLOWS = (
    ("tcp4", HashType.TCP4, HashType.IP4),
    ("udp4", HashType.UDP4, HashType.IP4),
    ("tcp6", HashType.TCP6, HashType.IP6),
    ("udp6", HashType.UDP6, HashType.IP6),
)
_WATCHER = "import signal, sys; sys.stdin.read(); signal.pidfd_send_signal(int(sys.argv[1]), signal.SIGKILL)"


class GuestError(Exception):
    """A guest did not start, ended, or a command in it failed."""


def ordinary_user() -> str:
    """Who QEMU runs as where it must not be root: the user behind sudo, else nobody."""
    user = os.environ.get("SUDO_USER", "root")
    return "nobody" if user == "root" else user


def as_user(user: str) -> tuple[str, ...]:
    """A command prefix that becomes ``user``, with no capability left, and is replaced by what follows it."""
    entry = pwd.getpwnam(user)
    return ("setpriv", f"--reuid={entry.pw_uid}", f"--regid={entry.pw_gid}", "--clear-groups", "--inh-caps=-all", "--")


class Console(abc.ABC):
    """The commands of a guest that was started somehow, over its second serial port, which connects to ``control``.

    Files of the guest, logs among them, are in ``folder``, which is the user's that QEMU runs as.
    """

    folder: Path

    def __init__(self, name: str) -> None:
        self.name = name
        self._number = 0
        self._pending = b""
        self._open = contextlib.ExitStack()

    @property
    def control(self) -> Path:
        """The unix socket that QEMU connects the second serial port to."""
        return self.folder / "control"

    def _listen(self, user: str, undo: contextlib.ExitStack) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"qsteer-{self.name}-"))
        owner = pwd.getpwnam(user)
        os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        undo.callback(shutil.rmtree, self.folder, ignore_errors=True)
        self._listener = undo.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(self.control))
        os.chown(self.control, owner.pw_uid, owner.pw_gid)
        self._listener.listen(1)

    def _close(self, error: BaseException | None) -> None:
        self._listener.close()
        self._open.close()
        if error is None:
            shutil.rmtree(self.folder)
        else:
            print(f"guest {self.name}: logs kept in {self.folder}", file=sys.stderr)

    @abc.abstractmethod
    def _ended(self) -> str:
        """How QEMU ended, "" while it runs."""

    def wait_ready(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """Until the guest takes commands."""
        deadline = time.monotonic() + timeout_s
        self._accept(deadline)
        self._collect(deadline - time.monotonic())

    def _accept(self, deadline: float) -> None:
        """Until QEMU has connected the port."""
        # QEMU may end without ever connecting: look at it now and then.
        self._listener.settimeout(0.2)
        while True:
            try:
                self._socket, _ = self._listener.accept()
                self._open.enter_context(self._socket)
                break
            except TimeoutError:
                if ended := self._ended():
                    raise GuestError(self._story(ended)) from None
                if time.monotonic() > deadline:
                    raise GuestError(self._story("QEMU did not start in time")) from None

    def run(self, command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """A shell command's output.  Raises GuestError unless its exit status is 0."""
        self.start(command)
        return self.finish(timeout_s)

    def start(self, command: str) -> None:
        """Start a command; ``expect`` reads what it prints as it prints it, ``finish`` the rest."""
        self._number += 1
        self._command = command
        self._socket.sendall(f"{self._number} {command}\n".encode())

    def expect(self, *prefixes: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """The next line that begins with one of ``prefixes``.  Raises GuestError when the command ends without it."""
        deadline = time.monotonic() + timeout_s
        told: list[str] = []
        while True:
            line = self._line(deadline)
            if line.startswith(prefixes):
                return line
            if line.startswith(f"@@{self._number} "):
                raise GuestError(f"guest {self.name}: {self._command}: ended early: {' '.join(told).strip()}")
            told.append(line)

    def finish(self, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """The output, from here on, of the command that was started."""
        output, status = self._collect(timeout_s)
        if status:
            raise GuestError(f"guest {self.name}: {self._command}: exit status {status}: {output.strip()}")
        return output

    def mac(self, device: str = "eth0") -> bytes:
        """The device's address as the guest knows it."""
        return bytes.fromhex(self.run(f"cat /sys/class/net/{device}/address").strip().replace(":", ""))

    def rss(self, device: str = "eth0", types: HashType = BASE_TYPES) -> RssConfig:
        """Key and table as the guest's own ethtool tells them; ``types`` are by default Linux's, all six."""
        told = ethtool.parse(self.run(f"ethtool -x {device}"))
        if told.key is None:
            raise GuestError(f"guest {self.name}: {device} has no RSS key")
        return RssConfig(types=types, key=told.key, table=told.table)

    def hash_types(self, device: str = "eth0") -> HashType:
        """The hash types as ethtool tells them, flow type by flow type."""
        types = HashType(0)
        for flow, over_ports, over_addresses in _FLOWS:
            told = self.run(f"ethtool -n {device} rx-flow-hash {flow}")
            if "L4 bytes" in told:
                types |= over_ports
            if "IP SA" in told:
                types |= over_addresses
        return types

    def _collect(self, timeout_s: float) -> tuple[str, int]:
        """What is printed before the end of the current command, and the command's exit status."""
        deadline = time.monotonic() + timeout_s
        lines: list[str] = []
        marker = f"@@{self._number} "
        while not (line := self._line(deadline)).startswith(marker):
            lines.append(line)
        return "\n".join(lines).removesuffix("\n"), int(line.removeprefix(marker))

    def _line(self, deadline: float) -> str:
        while b"\n" not in self._pending:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                raise GuestError(self._story("no answer in time")) from None
            if not received:
                raise GuestError(self._story("QEMU ended"))
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return line.decode(errors="replace")

    def _story(self, what: str) -> str:
        """``what`` happened, with the last words of QEMU, or of the guest's console."""
        for log in ("qemu.log", "console.log"):
            path = self.folder / log
            if path.exists() and (words := path.read_text(errors="replace").strip()):
                return f"guest {self.name}: {what}: {' / '.join(words.splitlines()[-3:])}"
        return f"guest {self.name}: {what}"


class Guest(Console):
    """One guest; a context manager that starts it, and ends it.

    ``prefix`` is what starts QEMU (``qsteer run ... --``, ``as_user(...)``), ``arguments`` are QEMU's, beyond those
    that every guest here has; ``user`` is whom QEMU runs as in the end.  Entering does not wait for the guest to boot:
    ``wait_ready`` does, so that several can boot at once.  Raises GuestError.
    """

    def __init__(
        self,
        files: Provisioned,
        *,
        name: str,
        arguments: Sequence[str] = (),
        prefix: Sequence[str] = (),
        user: str = "root",
        pass_fds: Sequence[int] = (),
        accel: str = ACCEL,
    ) -> None:
        super().__init__(name)
        self._files = files
        self._prefix = prefix
        self._arguments = arguments
        self._user = user
        self._pass_fds = pass_fds
        self._accel = accel

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._listen(self._user, undo)
            with (self.folder / "qemu.log").open("wb") as log:
                self._process = subprocess.Popen(
                    [*self._prefix, str(self._files.qemu), *self._standard(), *self._arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=self._pass_fds,
                    start_new_session=True,
                )
            undo.callback(self._end)
            pidfd = os.pidfd_open(self._process.pid)
            self._watcher = subprocess.Popen(
                [sys.executable, "-IS", "-c", _WATCHER, str(pidfd)],
                stdin=subprocess.PIPE,
                pass_fds=(pidfd,),
                start_new_session=True,
            )
            os.close(pidfd)
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watcher.kill()
        self._watcher.communicate()
        self._end()
        self._close(error)

    def _end(self) -> None:
        self._process.kill()
        self._process.wait()

    def _ended(self) -> str:
        return "" if self._process.poll() is None else f"exit status {self._process.returncode}"

    def _standard(self) -> tuple[str, ...]:
        return (
            *("-name", self.name, "-accel", self._accel, "-smp", str(VCPUS), "-m", "256"),
            *("-nodefaults", "-no-user-config"),
            *("-display", "none", "-kernel", str(self._files.kernel), "-initrd", str(self._files.initramfs)),
            *("-append", KERNEL_ARGUMENTS, "-no-reboot"),
            *("-global", "virtio-net-pci.romfile="),  # no network boot: it would cost a second
            *("-serial", f"file:{self.folder / 'console.log'}"),
            *("-chardev", f"socket,id=control,path={self.control}", "-serial", "chardev:control"),
            *("-chardev", f"socket,id=qmp,path={self.qmp},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
        )

    @property
    def qmp(self) -> Path:
        """QEMU's QMP socket, for one client at a time."""
        return self.folder / "qmp"

    @property
    def pid(self) -> int:
        """QEMU's process, once the guest is ready."""
        return self._process.pid

    def credentials(self) -> tuple[int, str]:
        """QEMU's effective uid and its effective capabilities (16 hexadecimal digits), from the kernel."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        return int(fields["Uid"].split()[1]), fields["CapEff"]

    def reset(self, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        """What the reset button does; until the guest takes commands again."""
        qmp.execute(str(self.qmp), "set-action", {"reboot": "reset"})
        qmp.execute(str(self.qmp), "system_reset")
        self._number = 0
        self._collect(timeout_s)
