# SPDX-License-Identifier: BSD-2-Clause
"""What was attached to a tap when, by the kernel's word, looked at every few milliseconds."""

import threading
import time
from collections.abc import Callable
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


class Looking:
    """A context manager that calls ``look`` every STEP_S, in a thread of its own."""

    def __init__(self, look: Callable[[], None]) -> None:
        self._look = look
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(STEP_S):
            self._look()


class Sampler(Looking):
    """The timeline of a tap of a process, as the kernel has it."""

    def __init__(self, pid: int, tap: str) -> None:
        super().__init__(self._sample)
        self._pid, self._tap = pid, tap
        self.moments: list[Moment] = []
        self._last: tuple[int, int, int] | None = None

    def __enter__(self) -> Self:
        super().__enter__()
        support.wait_until("the tap is there", lambda: self.moments)
        return self

    def _sample(self) -> None:
        queues = [queue for queue in kernel.open_queues(self._pid) if queue.tap == self._tap]
        if queues:
            now = (queues[0].program_id, queues[0].attachment, queues[0].active)
            if now != self._last:
                self.moments.append(Moment(at=time.monotonic(), program=now[0], attachment=now[1], active=now[2]))
                self._last = now

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
