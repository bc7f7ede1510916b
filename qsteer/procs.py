# SPDX-License-Identifier: BSD-2-Clause
"""The /proc edge: who a process is, which are QEMUs, and what they have open.

Everything read here was written by the process itself or can be: a name on a command line proves nothing.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from qsteer import qemuargs
from qsteer.model import Process

QEMUS_MAX = 10_000
"""QEMUs that are looked for: ten times the size of host that qsteer is made for."""

FDS_MAX = 65_536
"""Open files of one process that are looked at: far more than a QEMU with a thousand NICs has."""

_NAME_BYTES = 4096
_FILE_BYTES = 16384
_MACVTAP = re.compile(r"(.*/)?tap[0-9]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFiles:
    """What a QEMU has open, by fd: BPF programs (program id to fd), queues of taps, of macvtaps; and vhost-net or not.

    ``seen`` is False where it takes a right that is missing, or there are more than FDS_MAX: the rest is not looked at.
    """

    programs: dict[int, int]
    queues: frozenset[int]
    macvtaps: frozenset[int]
    vhost_net: bool
    seen: bool = True


_UNSEEN = OpenFiles(programs={}, queues=frozenset(), macvtaps=frozenset(), vhost_net=False, seen=False)


def read(pid: int) -> Process | None:
    """The process, or None once it is gone."""
    try:
        argv = qemuargs.split_cmdline(_read(pid, "cmdline", qemuargs.CMDLINE_MAX))
        stat = _read(pid, "stat", _FILE_BYTES)
        # The name in it may hold any byte but a newline and a backslash, which the kernel escapes.
        status = _read(pid, "status", _FILE_BYTES).split(b"\n")
        uid = next(line for line in status if line.startswith(b"Uid:")).split()[2]
    except (OSError, StopIteration):
        return None
    # The name may hold spaces and brackets; the fields behind its last bracket are numbers.
    name_end = stat.rindex(b")")
    return Process(
        pid=pid,
        started=int(stat[name_end + 2 :].split()[19]),
        uid=int(uid),
        comm=stat[stat.index(b"(") + 1 : name_end].decode(errors="replace"),
        args=qemuargs.parse(argv) if _is_qemu(pid, argv) else None,
    )


def running_qemus() -> tuple[Process, ...]:
    """Every QEMU of the host, by pid; QEMUS_MAX at most."""
    found: list[Process] = []
    for pid in _pids():
        with contextlib.suppress(OSError):
            # A kernel thread has no command line, and most programs are told by their first argument.
            start = _read(pid, "cmdline", _NAME_BYTES)
            if start and _is_qemu(pid, qemuargs.split_cmdline(start)) and (process := read(pid)) and process.args:
                found.append(process)
        if len(found) == QEMUS_MAX:
            break
    return tuple(found)


def open_files(pid: int) -> OpenFiles:
    """What of a process's open files has to do with steering."""
    programs: dict[int, int] = {}
    queues, macvtaps, vhost_net = set(), set(), False
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            names = [entry.name for entry in islice(entries, FDS_MAX + 1)]
    except PermissionError:
        return _UNSEEN
    except OSError:
        names = []
    for name in names[:FDS_MAX]:
        try:
            # The kernel's own name for the file: to look at the file itself could mean to wait for its owner (FUSE).
            target = os.readlink(f"/proc/{pid}/fd/{name}")  # noqa: PTH115
        except PermissionError:
            return _UNSEEN  # the directory alone takes less
        except OSError:
            continue
        with contextlib.suppress(OSError):
            if target == "anon_inode:bpf-prog":
                programs.update((number, int(name)) for number in _program_ids(pid, name))
            elif target.endswith("/net/tun"):
                queues.add(int(name))
            elif _MACVTAP.fullmatch(target):
                macvtaps.add(int(name))
            elif target.endswith("/vhost-net"):
                vhost_net = True
    return OpenFiles(
        programs=programs,
        queues=frozenset(queues),
        macvtaps=frozenset(macvtaps),
        vhost_net=vhost_net,
        seen=len(names) <= FDS_MAX,
    )


def held_programs(pid: int) -> dict[int, int]:
    """The BPF programs that a process has open: program id to one of its fds."""
    return open_files(pid).programs


def holders_of_programs() -> dict[int, tuple[int, ...]]:
    """The pids of all processes that have a BPF program open, by its id; walks the whole of /proc."""
    holders: dict[int, tuple[int, ...]] = {}
    for pid in _pids():
        for program_id in held_programs(pid):
            holders[program_id] = (*holders.get(program_id, ()), pid)
    return holders


def tap_of(pid: int, fd: int) -> str | None:
    """The name of the tap that a process's fd is a queue of; None if it is none, or this may not be seen."""
    with contextlib.suppress(OSError):
        for line in _read(pid, f"fdinfo/{fd}", _FILE_BYTES).decode(errors="replace").splitlines():
            if line.startswith("iff:"):
                return line.partition(":")[2].strip() or None
    return None


def _is_qemu(pid: int, argv: tuple[str, ...]) -> bool:
    """By the command line, or where that is called something else by the program that runs."""
    if qemuargs.is_qemu(argv):
        return True
    try:
        return qemuargs.is_qemu_name(os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)"))  # noqa: PTH115
    except OSError:
        return False


def _program_ids(pid: int, fd: str) -> Iterator[int]:
    for line in _read(pid, f"fdinfo/{fd}", _FILE_BYTES).splitlines():
        if line.startswith(b"prog_id:"):
            yield int(line.split()[1])


def _pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())  # noqa: PTH208


def _read(pid: int, name: str, most: int) -> bytes:
    """The start of one of a process's files, ``most`` bytes of it.  Raises OSError."""
    fd = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        parts, left = [], most
        while left and (part := os.read(fd, left)):
            parts.append(part)
            left -= len(part)
    finally:
        os.close(fd)
    return b"".join(parts)
