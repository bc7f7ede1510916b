# SPDX-License-Identifier: BSD-2-Clause
"""(a) What a program costs on one packet: BPF_PROG_TEST_RUN, a few hundred thousand times the same packet.

All of it stays in the processor's caches, so these are the lowest figures there are; ``throughput`` has the real path.

Where the kernel happens to put a program's machine code makes a nanosecond or two of difference.  So each program is
loaded several times, qsteer's with a shared body of its own each time, and they take turns.
"""

import contextlib
import itertools
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from integration.bench import shapes
from integration.bench.contenders import FLOOR, QEMU, Contender
from integration.bench.native import checked, ffi, lib
from integration.bench.rounds import turns
from qsteer import programs
from qsteer.reference import queue_of
from qsteer.rss import RssConfig

LOADED = 5
"""Times that each program is loaded."""
QUEUES = range(50, 250)
"""More than one needs for every entry of a table to differ, and none beyond what a tap can have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Nanoseconds per packet, round by round, by contender and kind of packet.

    ``qemu_wrong`` has the kinds for which QEMU's program gives another queue than the specification, and how many of
    the flows that were tried.
    """

    rounds: Mapping[tuple[str, str], Sequence[float]]
    qemu_wrong: Mapping[str, int]


def measure(contenders: Sequence[Contender], *, rounds: int, sample_s: float) -> Costs:
    """Every contender on every kind of packet.  Raises WrongQueueError unless qsteer's queues are right."""
    draw = random.Random(1)
    with contextlib.ExitStack() as stack:
        loaded: dict[str, list[tuple[int, RssConfig]]] = {contender.name: [] for contender in contenders}
        for contender, _ in itertools.product(contenders, range(LOADED)):
            config = contender.config(draw, QUEUES)
            fd = contender.load("qsb-testrun", config).prog_fd
            stack.callback(os.close, fd)
            loaded[contender.name].append((fd, config))
            stack.enter_context(_another_body_from_now_on())
        qemu_wrong = _checked(contenders, loaded)
        packets = {kind: shapes.flows(kind, 1)[0] for kind in shapes.KINDS}
        pairs = [(name, kind) for kind in packets for name in loaded]
        repeats = {(name, kind): _repeats(loaded[name][0][0], packets[kind], sample_s) for name, kind in pairs}
        took: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
        for number, name in turns(tuple(loaded), rounds):
            for kind, packet in packets.items():
                took[name, kind].append(cost_ns(loaded[name][number % LOADED][0], packet, repeats[name, kind]))
        _checked(contenders, loaded)  # what was timed is what was checked
    return Costs(rounds=took, qemu_wrong=qemu_wrong)


@contextlib.contextmanager
def _another_body_from_now_on() -> Iterator[None]:
    """The shared body stays, for the stubs that have it, and the next stub gets a new one.

    The pin is in the run's own BPF file system: nobody else misses it.
    """
    bodies = programs.shared_bodies()
    try:
        programs.bodies_pin().unlink(missing_ok=True)
        yield
    finally:
        os.close(bodies)


def _checked(
    contenders: Sequence[Contender], loaded: Mapping[str, Sequence[tuple[int, RssConfig]]]
) -> Mapping[str, int]:
    """The kinds for which QEMU's program is wrong.  Raises WrongQueueError if another one is."""
    qemu_wrong: Mapping[str, int] = {}
    for contender in contenders:
        for fd, config in loaded[contender.name] if contender.answers else ():
            wrong = _wrong_queues(fd, config)
            if contender.name == QEMU:
                qemu_wrong = wrong
            elif wrong:
                raise shapes.WrongQueueError(f"{contender.label}: wrong queues for {', '.join(wrong)} in a test run")
    return qemu_wrong


def over_floor(costs: Costs, name: str, kind: str) -> list[float]:
    """Nanoseconds over the program that returns 0, round by round."""
    floor = costs.rounds[FLOOR, kind]
    return [own - least for own, least in zip(costs.rounds[name, kind], floor, strict=True)]


def cost_ns(prog_fd: int, packet: bytes, repeat: int) -> float:
    answer, elapsed = ffi().new("uint32_t *"), ffi().new("uint64_t *")
    checked(lib().qb_test_run(prog_fd, packet, len(packet), repeat, answer, elapsed), "a test run fails")
    return float(elapsed[0] / repeat)


def _repeats(prog_fd: int, packet: bytes, sample_s: float) -> int:
    """How often to run for a sample to last about so long."""
    return max(1000, int(sample_s * 1e9 / cost_ns(prog_fd, packet, 20_000)))


def _wrong_queues(prog_fd: int, config: RssConfig) -> dict[str, int]:
    return shapes.wrong_queues(lambda packet: _answer(prog_fd, packet), lambda packet: queue_of(packet, config))


def _answer(prog_fd: int, packet: bytes) -> int:
    answer, elapsed = ffi().new("uint32_t *"), ffi().new("uint64_t *")
    checked(lib().qb_test_run(prog_fd, packet, len(packet), 1, answer, elapsed), "a test run fails")
    return int(answer[0])
