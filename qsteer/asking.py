# SPDX-License-Identifier: BSD-2-Clause
"""Asks guests in threads of their own: one that does not answer holds nobody else up."""

import queue
import threading
import time
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

from qsteer.errors import QsteerError
from qsteer.model import Tap
from qsteer.plan import Wanted

Who = TypeVar("Who", bound=Hashable)

THREADS = 8
"""So many guests are asked at the same time."""


class Askers(Generic[Who]):
    """Runs ``ask`` for taps; the answers come in the order in which they are there.

    The threads end with the process, whatever they wait for.
    """

    def __init__(self, ask: Callable[[Tap, Wanted], Tap], *, threads: int = THREADS) -> None:
        self._ask, self._most = ask, threads
        self._questions: queue.SimpleQueue[tuple[Who, Tap, Wanted]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Who, Tap | QsteerError]] = queue.SimpleQueue()
        self._started = 0
        self._open: set[Who] = set()

    @property
    def busy(self) -> bool:
        """Whether an answer is to come."""
        return bool(self._open)

    def ask(self, who: Who, tap: Tap, wanted: Wanted) -> None:
        """Ask ``who``, who must not be asked already."""
        self._open.add(who)
        self._questions.put((who, tap, wanted))
        if self._started < min(self._most, len(self._open)):
            self._started += 1
            threading.Thread(target=self._work, daemon=True).start()

    def answers(self) -> Iterator[tuple[Who, Tap | QsteerError]]:
        """Those that are there."""
        while not self._answers.empty():
            who, answer = self._answers.get()
            self._open.discard(who)
            yield who, answer

    def close(self, timeout_s: float) -> None:
        """Ask nobody else; wait a while for those who are being asked."""
        while not self._questions.empty():
            self._open.discard(self._questions.get()[0])
        deadline = time.monotonic() + timeout_s
        while self._open and (left := deadline - time.monotonic()) > 0:
            try:
                self._open.discard(self._answers.get(timeout=left)[0])
            except queue.Empty:
                return

    def _work(self) -> None:
        while True:
            who, tap, wanted = self._questions.get()
            try:
                answer: Tap | QsteerError = self._ask(tap, wanted)
            except QsteerError as error:
                answer = error
            except Exception as error:  # a thread that dies would leave its guest unanswered for ever
                answer = QsteerError(f'tap "{tap.name}": asking failed: {error!r}')
            self._answers.put((who, answer))
