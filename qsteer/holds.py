# SPDX-License-Identifier: BSD-2-Clause
"""Holds: ``qsteer off`` means off until the next ``apply`` or the VM's end.

A hold is intent, so it is stored: one small file per tap, which names the process that held the tap.  A hold whose
process is gone (or whose pid belongs to another process by now) counts for nothing.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from qsteer import procs
from qsteer.tapfiles import NEW, TapFile

RUNTIME = Path("/run/qsteer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """``tap`` is the name that the tap had; ``started`` (clock ticks after boot) makes the pid unique."""

    tap: str
    pid: int
    started: int

    def is_of(self, pid: int) -> bool:
        """Whether a process is the one, still running, that had the tap when the hold was made."""
        process = procs.read(pid) if pid == self.pid else None
        return bool(process and process.started == self.started)


def find(*, netns: int, ifindex: int) -> Hold | None:
    """The hold on a tap, if there is one; a file that does not make sense is none."""
    try:
        return Hold(**json.loads(file(netns=netns, ifindex=ifindex).path.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def places() -> frozenset[tuple[int, int]]:
    """The network namespaces and ifindexes of all taps that there is a hold for, be it of an ended process."""
    found = set()
    with contextlib.suppress(OSError):
        for path in (RUNTIME / "holds").iterdir():
            netns, _, ifindex = path.name.partition("-")
            if netns.isdecimal() and ifindex.isdecimal():
                found.add((int(netns), int(ifindex)))
    return frozenset(found)


def put(hold: Hold, *, netns: int, ifindex: int) -> None:
    """Store a hold, in one step.  Raises QsteerError."""
    file(netns=netns, ifindex=ifindex).restore((json.dumps(asdict(hold)) + "\n").encode())


def file(*, netns: int, ifindex: int) -> TapFile:
    """Where the hold on a tap is."""
    return TapFile(RUNTIME / "holds", "hold", netns, ifindex)


def remove(*, netns: int, ifindex: int) -> None:
    """Forget the hold on a tap.  Raises QsteerError."""
    file(netns=netns, ifindex=ifindex).remove()


def forget_ended() -> None:
    """Remove the holds whose processes are gone, and what a qsteer that was killed had half written.

    Only for who has execute's lock.  What cannot be read or removed stays.
    """
    with contextlib.suppress(OSError):
        for path in (RUNTIME / "holds").iterdir():
            with contextlib.suppress(OSError, ValueError, TypeError):
                if path.suffix == NEW or has_ended(path):
                    path.unlink()


def has_ended(path: Path) -> bool:
    """Whether the process that a hold's file names is gone.  Raises OSError, ValueError or TypeError on other files."""
    hold = Hold(**json.loads(path.read_text()))
    return not hold.is_of(hold.pid)
