# SPDX-License-Identifier: BSD-2-Clause
"""QEMU's monitor protocol: ask a QEMU binary what it can do, and a running QEMU one thing.

Theory of operation
===================

qemu.qmp and asyncio stay in here and are imported when first needed; callers see functions that return or raise.

``probe`` starts the binary with no machine, no devices and none of its configuration, and talks to it over one end of a
socket pair; the other end is, but for the standard streams, the only thing that QEMU inherits.  It is a program of
the user's choice, so it runs as the user that the VM will run as, is given a time limit, and is always ended, together
with whatever it started (it leads a process group of its own).  Should qsteer be killed in the middle, the kernel ends
it: the last writer of a pipe gone is a signal to that group.

``converse`` is one exchange with a QEMU that runs: connect, a few commands, disconnect.  A monitor serves one client at
a time, so none is held longer than that.  Where its socket is, a QEMU says itself, so it may be a lie; ``peer`` sees to
it that the process itself listens there.  What it sends is bounded (``qmpclient``), and so is the time that all of it
takes.
"""

import contextlib
import fcntl
import json
import math
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from qsteer import peer
from qsteer.errors import BusyError, PermissionDeniedError, QsteerError, UnsupportedError, from_errno, printable
from qsteer.model import Process

if TYPE_CHECKING:
    from qemu.qmp import QMPClient
    from qemu.qmp.message import Message

    from qsteer.qmpclient import BoundedClient

PROBE_TIMEOUT_S = 20.0
"""Long enough for a cold start on a busy host; a QEMU without a machine is there in a tenth of a second."""

TIMEOUT_S = 5.0
"""For an exchange with a QEMU that runs; a VM's monitor answers in milliseconds unless somebody else holds it."""

_STDERR_MAX = 4096
_DISCONNECT_TIMEOUT_S = 1.0
_EVENTS_MAX = 64
_LAST_WORDS_S = 0.5
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuProbe:
    """What a QEMU binary can do.

    ``version`` is (major, minor, micro).  ``libbpf`` says whether QEMU was built with libbpf (``request-ebpf``
    answers); without it a steering program cannot be attached.  ``properties`` holds, per driver that this QEMU knows,
    the type of each property by its name, from ``device-list-properties``.
    """

    version: tuple[int, int, int]
    libbpf: bool
    properties: Mapping[str, Mapping[str, str]]

    @property
    def version_text(self) -> str:
        return ".".join(map(str, self.version))


def probe(binary: str, *, drivers: Iterable[str], become: Callable[[], None] | None = None) -> QemuProbe:
    """Start ``binary`` without a machine and ask what it can do; ``drivers`` are those whose properties to list.

    ``become`` is called in the child before QEMU runs, to take on the VM's user.  Raises UnsupportedError if the binary
    does not answer as QEMU, with the first line of what it printed.
    """
    ours, theirs = socket.socketpair()
    lifeline, writer = os.pipe()
    with contextlib.ExitStack() as stack:
        held = stack.enter_context(os.fdopen(writer, "wb"))
        stack.enter_context(ours)
        with theirs, contextlib.ExitStack() as child_only:
            child_only.callback(os.close, lifeline)
            child = _start(binary, theirs.fileno(), lifeline, become)
            stack.callback(_end, child, held)
        try:
            began = time.monotonic()
            return _run(
                ours,
                lambda client: _ask(client, _greeted_version(client), drivers),
                began,
                PROBE_TIMEOUT_S,
                PROBE_TIMEOUT_S,
            )
        except TimeoutError:
            raise UnsupportedError(f'"{binary}" does not answer as QEMU within {PROBE_TIMEOUT_S:g} s') from None
        except failures() as error:
            raise UnsupportedError(f'"{binary}" does not run as QEMU: {_first_line(child) or _reason(error)}') from None


def execute(
    address: str | socket.socket,
    command: str,
    arguments: Mapping[str, object] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> object:
    """One command on the QMP socket of a running VM: connect, negotiate, execute, disconnect.  Returns QEMU's answer.

    ``address`` is a path, or a stream socket that is connected already (and is closed).  Raises BusyError if QEMU does
    not answer in time (a monitor serves one client at a time), QsteerError if it refuses the command, and what the
    errno says if it cannot be reached.
    """
    where = address if isinstance(address, str) else "the given socket"
    began = time.monotonic()
    return _session(address, where, lambda monitor: monitor.ask(command, arguments), began, timeout_s, timeout_s)


class Monitor:
    """The monitor of a QEMU, for as long as one exchange lasts."""

    def __init__(self, client: "QMPClient", where: str) -> None:
        self._client = client
        self._where = where

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version.  Raises QsteerError where it gives none."""
        from qemu.qmp import QMPError

        try:
            return _greeted_version(self._client)
        except QMPError as error:
            raise QsteerError(f"QEMU at {self._where}: {_reason(error)}") from None

    async def ask(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """QEMU's answer to a command.  Raises UnsupportedError if it does not know it, QsteerError if it refuses."""
        from qemu.qmp import ExecuteError

        try:
            return await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as error:
            if error.error_class == "CommandNotFound":
                raise UnsupportedError(f"QEMU at {self._where} does not know {command}") from None
            raise QsteerError(f"QEMU at {self._where} did not do {command}: {_reason(error)}") from None

    async def probe(self, drivers: Iterable[str]) -> QemuProbe:
        """What this QEMU can do, as ``probe`` tells it of a binary.  Raises QsteerError where it gives no version."""
        return await _ask(self._client, self.version, drivers)

    def send_fd(self, fd: int) -> None:
        """Pass an fd to QEMU, for the next command that takes one."""
        self._client.send_fd_scm(fd)

    @contextlib.contextmanager
    def hearing(
        self, events: Iterable[str], meant: Callable[[Mapping[str, object]], bool]
    ) -> Iterator[Callable[[float], Awaitable[str | None]]]:
        """Listen from here on; gives what waits so many seconds for the first of ``events`` that is meant.

        ``meant`` is called with an event's data.  What waits gives the event's name, None where it has not come.
        """
        import asyncio

        first: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def hear(event: "Message") -> bool:
            data = event.get("data")
            if not first.done() and meant(data if isinstance(data, dict) else {}):
                first.set_result(str(event["event"]))
            return False  # qemu.qmp would keep it, too, however many there are

        async def wait(timeout_s: float) -> str | None:
            await asyncio.wait((first,), timeout=timeout_s)
            return first.result() if first.done() else None

        with self._client.listener(tuple(events), hear):
            yield wait

    async def ask_and_hear(
        self, command: str, arguments: Mapping[str, object], events: Iterable[str]
    ) -> tuple[object, tuple[tuple[str, float], ...]]:
        """QEMU's answer, and the first of ``events`` that came before it: their names and their times, in seconds."""
        heard: list[tuple[str, float]] = []

        def hear(event: "Message") -> bool:
            if len(heard) < _EVENTS_MAX:
                heard.append((str(event["event"]), _seconds(event.get("timestamp"))))
            return False  # qemu.qmp would keep it, too, however many there are

        with self._client.listener(tuple(events), hear):
            answer = await self.ask(command, arguments)
        return answer, tuple(heard)


def converse(
    path: str,
    process: Process,
    exchange: Callable[[Monitor], Awaitable[_Answer]],
    *,
    answer_s: float = 0.0,
    longer_s: float = 0.0,
) -> _Answer:
    """One exchange with a QEMU that runs, on the unix socket ``path`` that ``process`` sees and itself listens on.

    All of it, connecting included, may take ``answer_s``, at least TIMEOUT_S, and ``longer_s`` more where QEMU needs a
    while for what is asked.  Raises what ``peer.connect`` and ``exchange`` raise; BusyError if QEMU does not answer in
    time (a monitor serves one client at a time), QsteerError if it breaks off, or sends too much.
    """
    began = time.monotonic()
    timeout_s = max(TIMEOUT_S, answer_s)
    with peer.connect(path, process, timeout_s=timeout_s) as sock:
        return _session(sock, f'"{printable(path)}"', exchange, began, timeout_s, timeout_s + longer_s)


def member(answer: object, name: str) -> object:
    """A member of what QEMU answered; None where there is none."""
    return answer.get(name) if isinstance(answer, dict) else None


def _session(
    address: str | socket.socket,
    where: str,
    exchange: Callable[[Monitor], Awaitable[_Answer]],
    began: float,
    timeout_s: float,
    exchange_timeout_s: float,
) -> _Answer:
    from qsteer.qmpclient import TooMuchError

    try:
        return _run(address, lambda client: exchange(Monitor(client, where)), began, timeout_s, exchange_timeout_s)
    except TimeoutError:
        raise BusyError(
            f"QEMU at {where} does not answer within {timeout_s:g} s",
            hint="another client may hold that monitor, or it is no QMP socket (but a guest agent's)",
        ) from None
    except TooMuchError as error:
        raise QsteerError(f"QEMU at {where} sends {error}") from None
    except failures() as error:
        cause = getattr(error, "exc", error)
        if isinstance(cause, OSError) and cause.errno:
            raise from_errno(cause.errno, f"cannot reach QEMU at {where}") from None
        raise QsteerError(f"QEMU at {where} broke off: {_reason(error)}") from None


def _start(binary: str, qmp_fd: int, lifeline: int, become: Callable[[], None] | None) -> subprocess.Popen[bytes]:
    def prepare() -> None:
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpid())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, os.O_ASYNC)
        if become:
            become()

    plain = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S")
    monitor = ("-chardev", f"socket,id=qsteer,fd={qmp_fd}", "-mon", "chardev=qsteer,mode=control")
    try:
        return subprocess.Popen(
            (binary, *plain, *monitor),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(qmp_fd, lifeline),
            start_new_session=True,
            preexec_fn=prepare,
        )
    except OSError as error:
        raise from_errno(error.errno or 0, f'cannot run "{binary}"') from None
    except subprocess.SubprocessError:
        raise PermissionDeniedError(
            f'cannot become the VM\'s user to run "{binary}"', hint="it takes CAP_SETUID and CAP_SETGID; try sudo"
        ) from None


def _end(child: subprocess.Popen[bytes], held: BinaryIO) -> None:
    # Not yet waited for, so the group still is the child's own, whether it lives or not.
    held.close()
    # Another user's process takes CAP_KILL, but for the kernel, which has just ended it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stderr:
        child.stderr.close()


def _first_line(child: subprocess.Popen[bytes]) -> str:
    """The first line that the child has written to its stderr, if any."""
    if not child.stderr or not select.select((child.stderr,), (), (), _LAST_WORDS_S)[0]:
        return ""
    text = os.read(child.stderr.fileno(), _STDERR_MAX).decode("utf-8", "replace")
    return _line(text)


def _line(text: str) -> str:
    """The first line of what another process said, as one may print it."""
    lines = text.strip().splitlines()
    return "".join(character if character.isprintable() else "?" for character in lines[0][:300]) if lines else ""


def _reason(error: BaseException) -> str:
    from qsteer.qmpclient import TooMuchError

    cause = getattr(error, "exc", error)
    if isinstance(cause, EOFError):
        return "it closed the monitor"
    if isinstance(cause, TooMuchError):
        return f"it sends {cause}"
    return _line(str(cause)).rstrip(": ") or type(cause).__name__


def failures() -> tuple[type[Exception], ...]:
    """What qemu.qmp raises when the other side goes away, or does not speak QMP."""
    from qemu.qmp import QMPError

    return (QMPError, OSError, EOFError)


def _run(
    address: str | socket.socket,
    exchange: Callable[["QMPClient"], Awaitable[_Answer]],
    began: float,
    timeout_s: float,
    exchange_timeout_s: float,
) -> _Answer:
    """Both times count from ``began``, a time of ``time.monotonic()``: until QEMU has greeted, and until all is done.

    Raises TimeoutError.
    """
    import asyncio

    from qsteer.qmpclient import BoundedClient

    async def session() -> _Answer:
        # What ends a session is raised where it is waited for; it is not to be printed once more as nobody's.
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda *_: None)
        client = BoundedClient()
        start = loop.time() - (time.monotonic() - began)
        try:
            async with asyncio.timeout_at(start + exchange_timeout_s):
                async with asyncio.timeout_at(start + timeout_s):
                    await _connect(client, address)
                return await exchange(client)
        except failures():
            if client.too_much:
                raise client.too_much from None
            raise
        finally:
            # Why a session ended is in what was raised; to leave one must not take longer than that.
            with contextlib.suppress(Exception):
                await asyncio.wait_for(client.disconnect(), _DISCONNECT_TIMEOUT_S)
            client.abort()

    return asyncio.run(session())


async def _connect(client: "BoundedClient", address: str | socket.socket) -> None:
    try:
        await client.connect(address)
    except AssertionError:
        raise EOFError from None  # qemu.qmp 0.0.6: the other side has gone again already


async def _ask(client: "QMPClient", version: tuple[int, int, int], drivers: Iterable[str]) -> QemuProbe:
    from qemu.qmp import ExecuteError

    properties: dict[str, Mapping[str, str]] = {}
    for driver in dict.fromkeys(drivers):
        # A driver that this QEMU, or this architecture, does not have is refused.
        with contextlib.suppress(ExecuteError):
            properties[driver] = _types(await client.execute("device-list-properties", {"typename": driver}))
    libbpf = False
    with contextlib.suppress(ExecuteError):
        await client.execute("request-ebpf", {"id": "rss"})
        libbpf = True
    return QemuProbe(version=version, libbpf=libbpf, properties=properties)


def _seconds(timestamp: object) -> float:
    """When an event happened; NaN where it does not say."""
    match timestamp:
        case {"seconds": int(seconds), "microseconds": int(micro)} if 0 <= seconds < 1 << 48 and 0 <= micro < 10**6:
            return seconds + micro / 1e6
    return math.nan


def _types(reply: object) -> Mapping[str, str]:
    members = reply if isinstance(reply, list) else []
    return {
        member["name"]: member["type"]
        for member in members
        if isinstance(member, dict) and isinstance(member.get("name"), str) and isinstance(member.get("type"), str)
    }


def _greeted_version(client: "QMPClient") -> tuple[int, int, int]:
    """Raises QMPError if QEMU has not said, or not sensibly, which version it is."""
    from qemu.qmp import QMPError

    version: Mapping[str, object] = client.greeting.QMP.version if client.greeting else {}
    qemu = version.get("qemu")
    numbers = [qemu.get(part) for part in ("major", "minor", "micro")] if isinstance(qemu, dict) else []
    match numbers:
        case [int(major), int(minor), int(micro)]:
            return major, minor, micro
    raise QMPError(f"a version that is none: {json.dumps(version)}")
