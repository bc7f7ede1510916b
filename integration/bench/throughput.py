# SPDX-License-Identifier: BSD-2-Clause
"""(b) Packets per second into a tap of four queues, while somebody reads them and while nobody does.

Read, the packets go around the queueing discipline and none is lost: that is the cheapest way into a tap that there is,
so a program's cost is the largest part of it.  Unread, the queues are full and tun drops every packet; they go
through the queueing discipline, which does not tell the sender.
"""

import contextlib
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from integration.bench import shapes
from integration.bench.contenders import AUTOMQ, KERNEL, LABELS, QEMU, Contender
from integration.bench.rounds import turns
from integration.bench.taps import QUEUES, Tap
from integration.bench.traffic import Load, Sender, drained, sender
from qsteer import hashing, kernel
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, KEY_BYTES, TABLE_MAX, RssConfig
from tests.kernel.support import VNET_HEADER

FLOWS = 256
FAMILIES: Mapping[str, str] = {"v4": "v4_tcp", "v6": "v6_tcp"}
WAYS = ("drained", "undrained")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Nanoseconds per packet, round by round, by (contender, family, way).

    ``lost`` is the share of packets that were dropped although somebody read.  ``wrong`` has, for QEMU's program and
    for in-kernel RSS, the kinds of packets that came out of wrong queues, and how many.
    """

    rounds: Mapping[tuple[str, str, str], Sequence[float]]
    lost: float
    wrong: Mapping[str, Mapping[str, int]]


def measure(contenders: Sequence[Contender], tap: Tap, *, rounds: int, packets: int, drain_cpu: int) -> Rates:
    """``packets`` of them make one sample.  No program at all, automq, is one of those compared; so is in-kernel RSS,
    where there is any.

    Raises WrongQueueError unless qsteer's queues are right.
    """
    took: dict[tuple[str, str, str], list[float]] = {}
    others_wrong: dict[str, Mapping[str, int]] = {}
    lost = 0
    in_kernel = _InKernel(tap)
    with _loaded(contenders) as programs:
        for name, (prog_fd, config) in programs.items():
            kernel.attach(tap.queues[0], prog_fd)
            wrong = _wrong_queues(tap, config) if config else {}
            if name == QEMU:
                others_wrong[name] = wrong
            elif wrong:
                raise shapes.WrongQueueError(f"{LABELS[name]}: wrong queues for {', '.join(wrong)} on a tap")
        loads = {family: _load(kind, tap) for family, kind in FAMILIES.items()}
        names = (*programs, AUTOMQ)
        if in_kernel.generation:
            names = (*names, KERNEL)
            _attach(tap, None)
            in_kernel.steer(True)
            others_wrong[KERNEL] = _wrong_queues(tap, in_kernel.config)
        for way in WAYS:
            direct = way == "drained"
            with contextlib.ExitStack() as stack:
                if direct:
                    stack.enter_context(drained(tap, drain_cpu))
                out = stack.enter_context(sender(direct=direct))
                for _, name in turns(names, rounds):
                    in_kernel.steer(False)
                    _attach(tap, programs[name][0] if name in programs else None)
                    in_kernel.steer(name == KERNEL)
                    for family, load in loads.items():
                        out.send(load, len(load.order))
                        sent = out.send(load, packets)
                        took.setdefault((name, family, way), []).append(sent.ns_per_packet)
                        lost += sent.dropped
        in_kernel.steer(False)
        kernel.detach(tap.queues[0])
    total = len(names) * len(FAMILIES) * rounds * packets
    return Rates(rounds=took, lost=lost / total, wrong=others_wrong)


class _InKernel:
    """RSS of tun's own on a tap, by a table without order, as the static program has it; nothing where it has none."""

    def __init__(self, tap: Tap) -> None:
        self._queue = tap.queues[0]
        self.generation = hashing.hashing().generation
        draw = random.Random(3)
        self.config = RssConfig(
            types=BASE_TYPES, key=draw.randbytes(KEY_BYTES), table=tuple(draw.choices(range(QUEUES), k=TABLE_MAX))
        )

    def steer(self, on: bool) -> None:
        if self.generation and on:
            hashing.set_rss(self._queue, self.generation, self.config, report=False)
        elif self.generation:
            hashing.set_automq(self._queue, self.generation)


@contextlib.contextmanager
def _loaded(contenders: Sequence[Contender]) -> Iterator[Mapping[str, tuple[int, RssConfig | None]]]:
    """Program fds and configurations by name; the one that returns 0 has none."""
    draw = random.Random(2)
    with contextlib.ExitStack() as stack:
        programs: dict[str, tuple[int, RssConfig | None]] = {}
        for contender in contenders:
            config = contender.config(draw, range(QUEUES))
            prog_fd = contender.load("qsb-0", config).prog_fd
            stack.callback(os.close, prog_fd)
            programs[contender.name] = (prog_fd, config if contender.answers else None)
        yield programs


def _attach(tap: Tap, prog_fd: int | None) -> None:
    if prog_fd is None:
        kernel.detach(tap.queues[0])
    else:
        kernel.attach(tap.queues[0], prog_fd)


def _load(kind: str, tap: Tap) -> Load:
    return Load(packets=shapes.flows(kind, FLOWS), taps=(tap,), order=[(number, 0) for number in range(FLOWS)])


def _wrong_queues(tap: Tap, config: RssConfig) -> dict[str, int]:
    with sender(direct=True) as out:
        return shapes.wrong_queues(
            lambda packet: _through(out, tap, packet), lambda packet: queue_of(packet, config) % QUEUES
        )


def _through(out: Sender, tap: Tap, packet: bytes) -> int:
    """The queue that a packet comes out of: what is sent is in it when the system call returns."""
    out.send(Load(packets=(packet,), taps=(tap,), order=[(0, 0)]), 1)
    for queue, fd in enumerate(tap.queues):
        with contextlib.suppress(BlockingIOError):
            if os.read(fd, 2048)[VNET_HEADER:] == packet:
                return queue
    return -1
