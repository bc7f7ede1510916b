# SPDX-License-Identifier: BSD-2-Clause
"""The /proc edge: who a process is, and which BPF programs it holds.

Everything read here was written by the process itself or can be: a name on a command line proves nothing.
"""

import contextlib
from pathlib import Path

from qsteer import qemuargs
from qsteer.model import Process

PROC = Path("/proc")


def read(pid: int) -> Process | None:
    """The process, or None once it is gone."""
    directory = PROC / str(pid)
    try:
        with (directory / "cmdline").open("rb") as file:
            argv = qemuargs.split_cmdline(file.read(qemuargs.CMDLINE_MAX))
        stat = (directory / "stat").read_bytes()
        # The name in it may hold any byte but a newline and a backslash, which the kernel escapes.
        status = (directory / "status").read_bytes().split(b"\n")
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
        args=qemuargs.parse(argv) if qemuargs.is_qemu(argv) else None,
    )


def held_programs(pid: int) -> dict[int, int]:
    """The BPF programs that a process has open: program id to one of its fds."""
    programs: dict[int, int] = {}
    with contextlib.suppress(OSError):
        for link in (PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                if str(link.readlink()) != "anon_inode:bpf-prog":
                    continue
                fdinfo = (PROC / str(pid) / "fdinfo" / link.name).read_text()
                numbers = [line.split()[1] for line in fdinfo.splitlines() if line.startswith("prog_id:")]
                programs.update((int(number), int(link.name)) for number in numbers)
    return programs


def holders_of_program(program_id: int) -> tuple[int, ...]:
    """The pids of all processes that have a program open; walks the whole of /proc."""
    pids = (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    return tuple(sorted(pid for pid in pids if program_id in held_programs(pid)))


def running_qemus() -> tuple[Process, ...]:
    """Every QEMU of the host, by pid."""
    pids = sorted(int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit())
    found = (read(pid) for pid in pids)
    return tuple(process for process in found if process and process.args)
