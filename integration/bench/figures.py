# SPDX-License-Identifier: BSD-2-Clause
"""Named figures out of what was measured; pure computing.

A name is a path: what was looked at, then whose program it is unless it is qsteer's static one (``shared_maps``,
``periodic``, ``spread``, ``capbpf``, ``automq``, ``floor``), then the quantity.  QEMU's own figures have the prefix
``qemu.`` instead; its ratios to itself are 1, and its nanoseconds are what the others' ratios are made of.

    testrun.KIND, capbpf.KIND   ratio: (QEMU's - floor) / (this one's - floor); over_floor_ns
    tap.FAMILY[.drained]        of_floor, of_automq: packets per second as a share of theirs; mpps
    tapsN.FAMILY[.direct]       the same with N taps in random order; over_floor_ns; of_floor_each
    setup                       verify_ms, load_ms once per host; per_tap_ms, per_tap_kib, accounted_kib; with_tap_ms
    setup.tapsN                 per_tap_ms for so many taps
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from integration.bench import random_order, setup, shapes, testrun, throughput
from integration.bench.contenders import AUTOMQ, CAPBPF, FLOOR, LABELS, PERIODIC, QEMU, SHARED_MAPS, STATIC
from integration.bench.random_order import FLOOR_EACH
from integration.bench.rounds import Summary, by_round, summary
from integration.bench.throughput import FAMILIES

HASHED = tuple(kind for kind in shapes.KINDS if kind != "non_ip")
_OVER_FLOOR = "return 0"
_VS_QEMU = "QEMU's program, both over return 0"

REQUIRED: tuple[str, ...] = (
    *(f"testrun.{kind}.ratio" for kind in HASHED),
    *(f"testrun.{kind}.shared_maps.ratio" for kind in HASHED),
    "testrun.non_ip.over_floor_ns",
    *(f"capbpf.{kind}.ratio" for kind in ("v4_tcp", "v6_tcp")),
    *(f"tap.{family}.{leaf}" for family in FAMILIES for leaf in ("of_floor", "of_automq")),
    *(f"taps300.{family}.of_floor" for family in FAMILIES),
    *(f"setup.{leaf}" for leaf in ("verify_ms", "per_tap_ms", "per_tap_kib")),
)
"""What every run has, and with the prefix ``qemu.`` once more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """``value`` is a median over rounds and ``spread`` the distance between the quartiles, both in ``unit``.

    ``comparator`` says what the value is a ratio or difference to.
    """

    value: float
    unit: str
    spread: float
    comparator: str


Figures = Mapping[str, Figure]
Named = Iterator[tuple[str, Figure]]


def path(section: str, contender: str, leaf: str) -> str:
    """The name of a figure."""
    if contender == QEMU:
        return f"qemu.{section}.{leaf}"
    return f"{section}.{leaf}" if contender == STATIC else f"{section}.{contender}.{leaf}"


def of_testrun(costs: testrun.Costs) -> Named:
    """Part (a).  The complete build has a section of its own."""
    for kind in shapes.KINDS:
        yield f"testrun.{kind}.floor.ns", _figure(summary(costs.rounds[FLOOR, kind]), "ns", "")
        qemu = testrun.over_floor(costs, QEMU, kind)
        for name in (QEMU, STATIC, PERIODIC, SHARED_MAPS, CAPBPF):
            if (name, kind) not in costs.rounds:
                continue
            section, whose = (f"capbpf.{kind}", STATIC) if name == CAPBPF else (f"testrun.{kind}", name)
            own = testrun.over_floor(costs, name, kind)
            yield path(section, whose, "over_floor_ns"), _figure(summary(own), "ns", _OVER_FLOOR)
            if kind in HASHED:
                ratio = _figure(by_round(_quotient, qemu, own), "ratio", _VS_QEMU)
                yield path(section, whose, "ratio"), ratio
                if name in (SHARED_MAPS, CAPBPF):  # the same program of QEMU's, loaded by root
                    yield (
                        f"qemu.{path(section, whose, 'ratio')}",
                        _figure(by_round(_quotient, qemu, qemu), "ratio", _VS_QEMU),
                    )


def of_throughput(rates: throughput.Rates) -> Named:
    """Part (b); the headline is the tap that nobody reads."""
    for name, family, way in rates.rounds:
        section = f"tap.{family}" if way == "undrained" else f"tap.{family}.{way}"
        own = rates.rounds[name, family, way]
        yield path(section, name, "mpps"), _figure(by_round(lambda ns: 1000 / ns, own), "million packets/s", "")
        for other, leaf in ((FLOOR, "of_floor"), (AUTOMQ, "of_automq")):
            if name != other:
                share = by_round(_quotient, rates.rounds[other, family, way], own)
                yield path(section, name, leaf), _figure(share, "ratio", LABELS[other])


def of_random_order(costs: random_order.Costs) -> Named:
    """Parts (c) and (e)."""
    for name, family, count, direct in costs.rounds:
        section = f"taps{count}.{family}{'.direct' if direct else ''}"
        own, floor = costs.rounds[name, family, count, direct], costs.rounds[FLOOR, family, count, direct]
        yield path(section, name, "ns"), _figure(summary(own), "ns", "")
        if name != FLOOR:
            share, over = by_round(_quotient, floor, own), by_round(_difference, own, floor)
            yield path(section, name, "of_floor"), _figure(share, "ratio", "one return 0 for all taps")
            yield path(section, name, "over_floor_ns"), _figure(over, "ns", "one return 0 for all taps")
        if name not in (FLOOR, FLOOR_EACH):
            share = by_round(_quotient, costs.rounds[FLOOR_EACH, family, count, direct], own)
            yield path(section, name, "of_floor_each"), _figure(share, "ratio", "return 0 once for each tap")


def of_setup(made: setup.SetUp) -> Named:
    """Parts (d) and (e)."""
    tap = _figure(summary(made.tap_ms), "ms", "")
    yield "setup.tap_ms", tap
    for name in made.taken_kib:
        counts = sorted(count for other, count in made.per_tap_ms if other == name)
        for count in counts:
            took = _figure(summary(made.per_tap_ms[name, count]), "ms", "")
            yield path(f"setup.taps{count}", name, "per_tap_ms"), took
        most = summary(made.per_tap_ms[name, counts[-1]])
        yield path("setup", name, "taps"), _figure(summary([counts[-1]]), "taps", "")
        yield path("setup", name, "per_tap_ms"), _figure(most, "ms", "")
        both = Summary(median=most.median + tap.value, spread=most.spread + tap.spread)
        yield path("setup", name, "with_tap_ms"), _figure(both, "ms", "")
        yield path("setup", name, "per_tap_kib"), _figure(summary(made.taken_kib[name]), "KiB", "")
        yield path("setup", name, "accounted_kib"), _figure(summary(made.accounted_kib[name]), "KiB", "")
        fewer = [count for count in counts if 1 < count < counts[-1]]
        if fewer:
            growth = made.per_tap_ms[name, counts[-1]], made.per_tap_ms[name, fewer[0]]
            value = summary(growth[0]).median / summary(growth[1]).median
            yield (
                path("setup", name, "growth"),
                Figure(value=value, unit="ratio", spread=0.0, comparator=f"per tap with {fewer[0]} taps"),
            )


def of_verification(bodies: Mapping[str, setup.Verification], qemu: setup.Verification) -> Named:
    """Part (d): what a host does once, and what QEMU does for every tap."""
    for name, each in ((STATIC, list(bodies.values())), (QEMU, [qemu])):
        verified = [sum(values) for values in zip(*(one.verify_ms for one in each), strict=True)]
        loaded = [sum(values) for values in zip(*(one.load_ms for one in each), strict=True)]
        yield path("setup", name, "verify_ms"), _figure(summary(verified), "ms", "")
        yield path("setup", name, "load_ms"), _figure(summary(loaded), "ms", "")


def _figure(of: Summary, unit: str, comparator: str) -> Figure:
    return Figure(value=of.median, unit=unit, spread=of.spread, comparator=comparator)


def _quotient(over: float, under: float) -> float:
    return over / under


def _difference(own: float, other: float) -> float:
    return own - other
