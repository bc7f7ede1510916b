# SPDX-License-Identifier: BSD-2-Clause
"""(c) and half of (e): packets into many taps in random order, each tap with a program, a key and a table of its own.

This is where a program pays for the memory that it needs: hardly anything of a tap is still in a cache when its next
packet comes.  Nobody reads the taps.  The floor is one program for all of them, which nothing can be below.

Every table leads to queue 0, which is what the floor answers (its entries are multiples of the number of queues): four
queues of a tap are four times as much memory of the kernel's to touch, whoever spreads packets over them.  What that
costs is seen too: ``spread`` is the same program with tables of all queues.

Queued, the packets go through the queueing discipline of each tap, which has a share in the caches, too.  Direct, they
go around it, and each takes a system call, because a drop ends one: that is dearer, and so the ratios are kinder.
"""

import contextlib
import itertools
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from integration.bench import shapes
from integration.bench.contenders import FLOOR, SPREAD, STATIC, Contender
from integration.bench.fleet import Fleet, fleet
from integration.bench.rounds import turns
from integration.bench.taps import QUEUES, Tap
from integration.bench.throughput import FAMILIES
from integration.bench.traffic import Load, sender

FLOOR_EACH = "floor_each"
"""The program that returns 0, loaded once for each tap."""
ONE_QUEUE = range(0, 256, QUEUES)
"""All of them are folded to queue 0."""
FLOWS = 64
ORDER = 4096
"""Packets until the order is repeated; at least so many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Nanoseconds per packet, round by round, by (contender, family, number of taps, direct)."""

    rounds: Mapping[tuple[str, str, int, bool], Sequence[float]]


def measure(
    contenders: Sequence[Contender],
    taps: Sequence[Tap],
    *,
    counts: Mapping[int, int],
    direct: Collection[int],
    packets: int,
    programs: Mapping[str, int],
    reach: Mapping[str, int],
) -> Costs:
    """``counts`` has the numbers of taps to look at, and for how many rounds; for those in ``direct`` packets are
    sent in both ways.  ``packets`` of them make one sample.

    For contenders that take long to load: no more than ``programs`` of them are, which several taps may have in common,
    and with more taps than ``reach`` they are left out.
    """
    took: dict[tuple[str, str, int, bool], list[float]] = {}
    most = max(counts)
    with contextlib.ExitStack() as stack:
        senders = {way: stack.enter_context(sender(direct=way)) for way in (False, True)}
        fleets: dict[str, Fleet] = {}
        for contender in contenders:
            count = min(reach.get(contender.name, most), programs.get(contender.name, most))
            fleets[contender.name] = stack.enter_context(fleet(contender, taps[:count], ONE_QUEUE))
            if contender.name == STATIC:
                fleets[SPREAD] = stack.enter_context(fleet(contender, taps[:count]))
            if contender.name == FLOOR:
                fleets[FLOOR_EACH] = fleets[FLOOR]
                fleets[FLOOR] = stack.enter_context(fleet(contender, taps[:1]))
        for count, rounds in counts.items():
            some = taps[:count]
            loads = {family: _load(kind, some) for family, kind in FAMILIES.items()}
            names = [name for name in fleets if reach.get(name, count) >= count]
            for _, name in turns(names, rounds):
                fleets[name].attach(some)
                for family, way in itertools.product(loads, (False, True) if count in direct else (False,)):
                    senders[way].send(loads[family], len(loads[family].order))
                    sent = senders[way].send(loads[family], packets)
                    took.setdefault((name, family, count, way), []).append(sent.ns_per_packet)
    return Costs(rounds=took)


def _load(kind: str, taps: Sequence[Tap]) -> Load:
    """Every tap as often as any other, in an order that is the same for every contender."""
    draw = random.Random(4)
    turns_of_taps = -(-ORDER // len(taps))
    order = [(draw.randrange(FLOWS), tap) for tap in range(len(taps)) for _ in range(turns_of_taps)]
    draw.shuffle(order)
    return Load(packets=shapes.flows(kind, FLOWS), taps=taps, order=order)
