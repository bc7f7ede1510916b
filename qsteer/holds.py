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
from qsteer.errors import from_errno

RUNTIME = Path("/run/qsteer")
NEW = ".new"
"""What a hold's file is called until it is whole."""


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


def _path(netns: int, ifindex: int) -> Path:
    return RUNTIME / "holds" / f"{netns}-{ifindex}"


def find(*, netns: int, ifindex: int) -> Hold | None:
    """The hold on a tap, if there is one; a file that does not make sense is none."""
    try:
        return Hold(**json.loads(_path(netns, ifindex).read_text()))
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
    restore((json.dumps(asdict(hold)) + "\n").encode(), netns=netns, ifindex=ifindex)


def stored(*, netns: int, ifindex: int) -> bytes | None:
    """A hold's file as it is, for ``restore``; None for none.  Raises QsteerError."""
    path = _path(netns, ifindex)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot read the hold {path}") from None


def restore(content: bytes | None, *, netns: int, ifindex: int) -> None:
    """Make a hold's file what it was when ``stored`` looked, in one step.  Raises QsteerError."""
    path = _path(netns, ifindex)
    if content is None:
        remove(netns=netns, ifindex=ifindex)
        return
    new = path.with_suffix(NEW)
    try:
        RUNTIME.mkdir(mode=0o755, exist_ok=True)
        path.parent.mkdir(mode=0o755, exist_ok=True)
        try:
            new.write_bytes(content)
            new.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot store the hold in {path}") from None


def remove(*, netns: int, ifindex: int) -> None:
    """Forget the hold on a tap.  Raises QsteerError."""
    try:
        _path(netns, ifindex).unlink(missing_ok=True)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot remove the hold {_path(netns, ifindex)}") from None


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
