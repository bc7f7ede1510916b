# SPDX-License-Identifier: BSD-2-Clause
"""What a daemon says: to systemd (sd_notify(3), a datagram), and in the journal, one line per change.

And what a program says whose stderr goes nowhere: to the journal itself, or to syslogd.
"""

import contextlib
import enum
import os
import select
import socket
import time
from collections.abc import MutableMapping

_DAEMON = 3 << 3
"""syslog(3)'s facility."""
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


class Priority(enum.IntEnum):
    """How much a journal line matters: syslog(3)'s numbers."""

    WARNING = 4
    NOTICE = 5
    INFO = 6


class Service:
    """The service manager, if one started this process; without one nothing is sent.

    Takes its variables out of the environment, so that no child speaks in this process's name.  A message that cannot
    be delivered is not worth stopping for, and is dropped.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._address = _address(environment.pop("NOTIFY_SOCKET", ""))
        self.alive_every_s = _half_of_watchdog(environment)

    def ready(self, status: str) -> None:
        """Everything has been looked at once, or once more after ``reloading``."""
        self._send("READY=1", f"STATUS={status}")

    def status(self, status: str) -> None:
        """What ``systemctl status`` shows."""
        self._send(f"STATUS={status}")

    def reloading(self) -> None:
        """SIGHUP came; ``ready`` ends it."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def alive(self) -> None:
        """The loop goes round; wanted every ``alive_every_s`` seconds."""
        if self.alive_every_s:
            self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """The process ends by itself."""
        self._send("STOPPING=1")

    def _send(self, *lines: str) -> None:
        if not self._address:
            return
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            sender.sendto("\n".join(lines).encode(), self._address)


def _address(value: str) -> str:
    """A path, or with a leading @ a name in the abstract namespace; other kinds (vsock) are not for us."""
    if value.startswith("@"):
        return f"\0{value[1:]}"
    return value if value.startswith("/") else ""


def _half_of_watchdog(environment: MutableMapping[str, str]) -> float | None:
    """Half of the time after which the service manager takes this process for stuck; None: it does not look."""
    period, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", "")
    if not period.isdecimal() or int(period) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(period) / 2e6


class Journal:
    """Lines on stderr.  Where that is systemd's journal each begins with its priority, ``<N>`` (sd-daemon(3))."""

    def __init__(self, name: str, *, least: Priority = Priority.INFO, fd: int = 2) -> None:
        self._name, self._least, self._fd = name, least, fd
        self._with_priority = _is_journal(fd)

    def say(self, text: str, priority: Priority = Priority.INFO) -> None:
        """One line."""
        if priority > self._least:
            return
        prefix = f"<{priority:d}>" if self._with_priority else ""
        write_line(f"{prefix}{self._name}: {text}", self._fd)


class SystemJournal:
    """The system's log: journald's own socket, where there is one, for the fields' sake, else syslogd's.

    ``fields`` go with each line (``journalctl FIELD=value``).  Nobody is waited for, as syslog(3) would: where nobody
    takes a line it is lost.
    """

    SOCKET = "/run/systemd/journal/socket"
    SYSLOG = "/dev/log"

    def __init__(self, name: str, **fields: str) -> None:
        self._name, self._fields = name, fields

    def say(self, text: str, priority: Priority = Priority.INFO) -> None:
        """One line of printable text, as are the fields."""
        entry = {"MESSAGE": text, "PRIORITY": f"{priority:d}", "SYSLOG_IDENTIFIER": self._name, **self._fields}
        line = f"<{_DAEMON | priority}>{_now()} {self._name}[{os.getpid()}]: {text}"
        try:
            _send("".join(f"{field}={value}\n" for field, value in entry.items()), self.SOCKET)
        except BlockingIOError:
            pass  # syslogd's socket would be journald's, too
        except OSError:
            with contextlib.suppress(OSError):
                _send(line, self.SYSLOG)


def _now() -> str:
    """As RFC 3164 wants it, in no language but that one."""
    now = time.localtime()
    return f"{_MONTHS[now.tm_mon - 1]} {now.tm_mday:2} {now.tm_hour:02}:{now.tm_min:02}:{now.tm_sec:02}"


def _send(text: str, path: str) -> None:
    """A datagram.  Raises OSError, BlockingIOError where there is no room for it."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        sender.sendto(text.encode(errors="backslashreplace"), path)


def write_line(line: str, fd: int) -> None:
    """Write it if somebody takes it: that nobody reads it any more, or is slow to, is no reason to stop or to wait."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    with contextlib.suppress(OSError):
        if any(event & select.POLLOUT for _, event in poll.poll(0)):
            os.write(fd, f"{line}\n".encode(errors="backslashreplace"))


def _is_journal(fd: int) -> bool:
    """Whether an fd is the stream that JOURNAL_STREAM names."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(fd)
    except OSError:
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))
