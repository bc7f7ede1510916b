# SPDX-License-Identifier: BSD-2-Clause
"""A program of its own for each of many taps, with a random key and table each."""

import contextlib
import os
import random
import time
from collections.abc import Iterator, Sequence

from integration.bench.contenders import Contender
from integration.bench.taps import QUEUES, Tap
from qsteer import kernel


class Fleet:
    """The programs of one contender, tap by tap; ``took_s`` is what loading and attaching each of them took."""

    def __init__(self) -> None:
        self.prog_fds: list[int] = []
        self.took_s: list[float] = []

    def attach(self, taps: Sequence[Tap]) -> None:
        """Steer taps by their programs; where there are fewer programs than taps, one of them has several."""
        for number, tap in enumerate(taps):
            kernel.attach(tap.queues[0], self.prog_fds[number % len(self.prog_fds)])

    def close(self) -> None:
        for fd in self.prog_fds:
            os.close(fd)


@contextlib.contextmanager
def fleet(contender: Contender, taps: Sequence[Tap], queues: Sequence[int] = range(QUEUES)) -> Iterator[Fleet]:
    """Load and attach a program for each of some taps, which keep it until another one is attached.

    Their tables are of ``queues``.  Raises QsteerError, ContenderError and NativeError.
    """
    draw = random.Random(3)
    made = Fleet()
    try:
        for tap in taps:
            config = contender.config(draw, queues)
            loaded = contender.load(tap.name, config)
            made.prog_fds.append(loaded.prog_fd)
            began = time.perf_counter()
            kernel.attach(tap.queues[0], loaded.prog_fd)
            made.took_s.append(loaded.took_s + time.perf_counter() - began)
        yield made
    finally:
        made.close()
