# SPDX-License-Identifier: BSD-2-Clause
"""How often a VM may be stopped for a reading, whoever asks: a stamp for each VM, under RUNTIME/pauses.

A stamp names the process by its pid and its start, and holds the time of the last pause, in seconds since boot.  It is
locked from before a reading to its end, so that two readings never overlap.
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

INTERVAL_S = 10.0
"""Least time from one pause of a VM to the next."""


@contextlib.contextmanager
def turn(process: Process, *, interval_s: float = INTERVAL_S) -> Iterator[Callable[[], None]]:
    """The right to stop a VM once; what is yielded is called right before, and starts the next interval.

    Raises BusyError, with when to try again, if the VM was stopped less than ``interval_s`` ago, or is being read now;
    QsteerError where no stamp can be kept.
    """
    forget_ended()
    path = _folder() / f"{process.pid}-{process.started}"
    try:
        holds.RUNTIME.mkdir(mode=0o755, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        stamp = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot keep in {path} when the VM was stopped") from None
    try:
        try:
            fcntl.flock(stamp, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(f"the device state of process {process.pid} is being read already") from None
        wait_s = _last(stamp) + interval_s - _now()
        if wait_s > 0:
            raise BusyError(
                f"the VM of process {process.pid} was stopped for a reading {interval_s - wait_s:.1f} s ago",
                hint=f"try again in {math.ceil(wait_s)} s",
            )
        yield lambda: _write(stamp)
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


def _folder() -> Path:
    return holds.RUNTIME / "pauses"


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _last(stamp: int) -> float:
    """When the last pause was; long ago where that is not told, or is still to come."""
    try:
        last = float(os.pread(stamp, 64, 0))
    except ValueError:
        return -math.inf
    return last if last <= _now() else -math.inf


def _write(stamp: int) -> None:
    os.pwrite(stamp, f"{_now():<32.3f}".encode(), 0)
