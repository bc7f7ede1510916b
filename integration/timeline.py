# SPDX-License-Identifier: BSD-2-Clause
"""What was attached to a tap when, by the kernel's word, looked at every few milliseconds."""

import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from qsteer import kernel
from tests.kernel import support

STEP_S = 0.003


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """From ``at`` (time.monotonic()) on this was attached to the tap."""

    at: float
    program: int
    attachment: int
    active: int


class Sampler:
    """The timeline of a tap of a process, as the kernel has it, looked at every STEP_S."""

    def __init__(self, pid: int, tap: str) -> None:
        self._pid, self._tap = pid, tap
        self.moments: list[Moment] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        support.wait_until("the tap is there", lambda: self.moments)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        last: tuple[int, int, int] | None = None
        while not self._ended.is_set():
            queues = [queue for queue in kernel.open_queues(self._pid) if queue.tap == self._tap]
            if queues:
                now = (queues[0].program_id, queues[0].attachment, queues[0].active)
                if now != last:
                    self.moments.append(Moment(at=time.monotonic(), program=now[0], attachment=now[1], active=now[2]))
                    last = now
            time.sleep(STEP_S)

    @property
    def now(self) -> Moment:
        return self.moments[-1]

    def since(self, began: float) -> list[Moment]:
        """What was attached at a time, and all that came after it."""
        before = [moment for moment in self.moments if moment.at <= began]
        return [*before[-1:], *(moment for moment in self.moments if moment.at > began)]

    def longest_gap_ms(self, began: float) -> float:
        """The longest time without a program, from ``began`` until now."""
        moments = [*self.since(began), Moment(at=time.monotonic(), program=-1, attachment=0, active=0)]
        gaps = [
            (next(later.at for later in moments[at:] if later.program) - max(moment.at, began)) * 1000
            for at, moment in enumerate(moments)
            if not moment.program
        ]
        return max(gaps, default=0.0)
