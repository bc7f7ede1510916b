# SPDX-License-Identifier: BSD-2-Clause
"""How often a VM may be stopped for a reading, whoever asks: a stamp for each VM, under RUNTIME/pauses.

A stamp names the process by its pid and its start, and holds the time of the last pause, in seconds since boot, and how
long it took.  It is locked from before a reading to its end, so that two readings never overlap.  A guest can make
``keep`` read as often as it likes to set RSS, so a VM runs at least SHARE times as long as it stood still.
"""

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from qsteer import holds, procs
from qsteer.errors import BusyError, from_errno
from qsteer.model import Process

INTERVAL_S = 1.0
"""Least time from one pause of a VM to the next."""
SHARE = 50
UNFINISHED_S = 0.2
"""A pause of which nobody has said how long it took."""

_POLL_S = 0.02


@contextlib.contextmanager
def turn(
    process: Process, *, interval_s: float = INTERVAL_S, patience_s: float = 0.0
) -> Iterator[Callable[[float], None]]:
    """The right to stop a VM once.  What is yielded is called with UNFINISHED_S before, and the seconds after.

    Raises BusyError, with when to try again, if the VM was stopped less than ``interval_s`` ago, or SHARE times as long
    as it took, or is being read now, and that does not end within ``patience_s``; QsteerError where no stamp can be
    kept.  An interval of 0 is no limit at all.
    """
    deadline = time.monotonic() + patience_s
    forget_ended()
    path = _folder() / f"{process.pid}-{process.started}"
    try:
        stamp = _open(path)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot keep in {path} when the VM was stopped") from None
    try:
        if not _lock(stamp, deadline):
            raise BusyError(f"the device state of process {process.pid} is being read already")
        last, took_s = _last(stamp)
        wait_s = last + max(interval_s, SHARE * took_s) - _now() if interval_s else 0.0
        if 0 < wait_s <= deadline - time.monotonic():
            time.sleep(wait_s)
        elif wait_s > 0:
            raise BusyError(
                f"the VM of process {process.pid} was stopped for a reading {_now() - last:.1f} s ago",
                hint=f"try again in {math.ceil(wait_s)} s",
            )
        yield lambda took_s: _write(stamp, took_s)
    finally:
        os.close(stamp)


def forget_ended() -> None:
    """Remove the stamps of processes that are gone; what cannot be read or removed stays."""
    with contextlib.suppress(OSError):
        for path in _folder().iterdir():
            pid, _, started = path.name.partition("-")
            process = procs.read(int(pid)) if pid.isdecimal() else None
            if not process or str(process.started) != started:
                with contextlib.suppress(OSError):
                    path.unlink()


def _open(path: Path) -> int:
    """Raises OSError."""
    try:
        return _make(path)
    except FileNotFoundError:
        return _make(path)  # ``qsteer clean`` removes a folder that is empty, as that was until now


def _make(path: Path) -> int:
    holds.RUNTIME.mkdir(mode=0o755, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _lock(stamp: int, deadline: float) -> bool:
    """Whether the stamp could be locked by then, in seconds of ``time.monotonic()``."""
    while True:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(left_s, _POLL_S))


def _folder() -> Path:
    return holds.RUNTIME / "pauses"


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _last(stamp: int) -> tuple[float, float]:
    """When the last pause was, and how long it took; long ago where that is not told, or is still to come."""
    try:
        last, took_s = map(float, os.pread(stamp, 64, 0).split())
    except ValueError:
        return -math.inf, 0.0
    return (last, took_s) if last <= _now() and 0 <= took_s < math.inf else (-math.inf, 0.0)


def _write(stamp: int, took_s: float) -> None:
    now = math.floor(_now() * 1000) / 1000  # rounded up it would be still to come
    os.pwrite(stamp, f"{now:<20.3f} {took_s:<20.6f}".encode(), 0)
