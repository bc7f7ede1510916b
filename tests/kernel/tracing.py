# SPDX-License-Identifier: BSD-2-Clause
"""A program's system calls, one after the other, and what the process is at each of them: on x86_64."""

import ctypes
import os
import signal
import struct
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

IOCTL, SETITIMER, SENDMSG, OPENAT = 16, 38, 46, 257

_TRACEME, _SETOPTIONS, _SYSCALL, _GET_SYSCALL_INFO = 0, 0x4200, 24, 0x420E
_EXITKILL, _TRACEEXEC, _TRACESYSGOOD = 1 << 20, 1 << 4, 1
_EVENT_EXEC = 4
_AT_ENTRY = 1

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The start of a system call; ``status`` are the fields of /proc/PID/status then."""

    pid: int
    number: int
    arguments: tuple[int, ...]
    status: dict[str, str]

    def text(self, argument: int) -> str:
        """What an argument points at."""
        with Path(f"/proc/{self.pid}/mem").open("rb", buffering=0) as memory:
            memory.seek(self.arguments[argument])
            return memory.read(256).partition(b"\0")[0].decode(errors="replace")


def calls(command: Sequence[str | Path], prepare: Callable[[], None]) -> Generator[Call, None, None]:
    """Run a command; its calls from its exec on, each before it happens.  It is killed when the caller stops looking.

    ``prepare`` runs in the child, which keeps all of its fds that are inheritable.
    """
    pid = os.fork()
    if pid == 0:
        try:
            _libc.ptrace(_TRACEME, 0, None, None)
            os.kill(os.getpid(), signal.SIGSTOP)
            prepare()
            os.execv(command[0], [str(word) for word in command])
        finally:
            os._exit(127)
    try:
        os.waitpid(pid, 0)
        _ptrace(_SETOPTIONS, pid, None, _EXITKILL | _TRACEEXEC | _TRACESYSGOOD)
        executed = False
        passed_on = 0
        while True:
            _ptrace(_SYSCALL, pid, None, passed_on)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSTOPPED(status):
                pid = 0
                return
            executed = executed or status >> 16 == _EVENT_EXEC
            stopped_by = os.WSTOPSIG(status)
            passed_on = 0 if stopped_by & 0x80 or stopped_by == signal.SIGTRAP else stopped_by
            if executed and stopped_by & 0x80 and (call := _entry(pid)):
                yield call
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _entry(pid: int) -> Call | None:
    buffer = ctypes.create_string_buffer(88)
    _ptrace(_GET_SYSCALL_INFO, pid, len(buffer), ctypes.addressof(buffer))
    if buffer.raw[0] != _AT_ENTRY:
        return None
    number, *arguments = struct.unpack_from("=7Q", buffer.raw, 24)
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return Call(pid=pid, number=number, arguments=tuple(arguments), status=status)


def _ptrace(request: int, pid: int, address: int | None, data: int | None) -> None:
    if _libc.ptrace(request, pid, address, data) < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
