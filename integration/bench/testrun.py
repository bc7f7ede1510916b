# SPDX-License-Identifier: BSD-2-Clause
"""(a) What a program costs on one packet: BPF_PROG_TEST_RUN, a few hundred thousand times the same packet.

All of it stays in the processor's caches, so these are the lowest figures there are; ``throughput`` has the real path.
"""

import contextlib
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from integration.bench import shapes
from integration.bench.contenders import FLOOR, QEMU, Contender
from integration.bench.native import checked, ffi, lib
from integration.bench.rounds import turns
from qsteer.reference import queue_of
from qsteer.rss import RssConfig

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
        fds: dict[str, int] = {}
        qemu_wrong: dict[str, int] = {}
        for contender in contenders:
            config = contender.config(draw, QUEUES)
            fds[contender.name] = contender.load("qsb-testrun", config).prog_fd
            stack.callback(os.close, fds[contender.name])
            if contender.answers:
                wrong = _wrong_queues(fds[contender.name], config)
                if contender.name == QEMU:
                    qemu_wrong = wrong
                elif wrong:
                    raise shapes.WrongQueueError(
                        f"{contender.label}: wrong queues for {', '.join(wrong)} in a test run"
                    )
        packets = {kind: shapes.flows(kind, 1)[0] for kind in shapes.KINDS}
        pairs = [(name, kind) for kind in packets for name in fds]
        repeats = {(name, kind): _repeats(fds[name], packets[kind], sample_s) for name, kind in pairs}
        took: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
        for _, name in turns(tuple(fds), rounds):
            for kind, packet in packets.items():
                took[name, kind].append(cost_ns(fds[name], packet, repeats[name, kind]))
    return Costs(rounds=took, qemu_wrong=qemu_wrong)


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
