# SPDX-License-Identifier: BSD-2-Clause
"""What the figures have to be; each is of one run, on whatever machine."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass

from integration.bench.figures import Figure, Figures


class Verdict(enum.Enum):
    STRETCH = "holds, stretch too"
    HOLDS = "holds"
    SHORT = "falls short"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A figure is to be at least ``target`` or, with ``at_most``, no more; ``stretch`` is what would be finer still."""

    figure: str
    target: float
    stretch: float | None = None
    at_most: bool = False

    def verdict(self, value: float) -> Verdict:
        if not self._reaches(value, self.target):
            return Verdict.SHORT
        if self.stretch is not None and self._reaches(value, self.stretch):
            return Verdict.STRETCH
        return Verdict.HOLDS

    def _reaches(self, value: float, wanted: float) -> bool:
        return value <= wanted if self.at_most else value >= wanted


def _targets() -> Iterator[Target]:
    yield Target(figure="testrun.v4_tcp.ratio", target=20)
    yield Target(figure="testrun.v4_udp.ratio", target=20)
    yield Target(figure="testrun.v6_tcp.ratio", target=12)
    yield Target(figure="testrun.v6_ext.ratio", target=5)
    yield Target(figure="testrun.v4_tcp.periodic.ratio", target=20, stretch=40)
    yield Target(figure="testrun.v6_tcp.periodic.ratio", target=12, stretch=25)
    yield Target(figure="testrun.v4_tcp.shared_maps.ratio", target=17, stretch=20)
    yield Target(figure="testrun.v4_udp.shared_maps.ratio", target=17, stretch=20)
    yield Target(figure="testrun.v6_tcp.shared_maps.ratio", target=9, stretch=12)
    yield Target(figure="testrun.non_ip.over_floor_ns", target=3, at_most=True)
    yield Target(figure="testrun.non_ip.shared_maps.over_floor_ns", target=3, at_most=True)
    yield Target(figure="capbpf.v4_tcp.ratio", target=7)
    yield Target(figure="capbpf.v6_tcp.ratio", target=6)
    for family in ("v4", "v6"):
        for whose in ("", ".shared_maps", ".drained", ".drained.shared_maps"):
            yield Target(figure=f"tap.{family}{whose}.of_floor", target=0.95)
            yield Target(figure=f"tap.{family}{whose}.of_automq", target=1)
        yield Target(figure=f"tap.{family}.capbpf.of_automq", target=1)
    for family in ("v4", "v6"):
        for whose in ("", ".periodic", ".shared_maps", ".spread"):
            yield Target(figure=f"taps300.{family}{whose}.of_floor", target=0.93)
    yield Target(figure="setup.verify_ms", target=2, at_most=True)
    for whose in ("", ".shared_maps"):
        yield Target(figure=f"setup{whose}.per_tap_ms", target=0.2, at_most=True)
        yield Target(figure=f"setup{whose}.per_tap_kib", target=32, at_most=True)
        yield Target(figure=f"setup{whose}.growth", target=1.25, at_most=True)


TARGETS: tuple[Target, ...] = tuple(_targets())


def judged(figures: Figures) -> Iterator[tuple[Target, Figure, Verdict]]:
    """The targets whose figures there are."""
    for target in TARGETS:
        figure = figures.get(target.figure)
        if figure:
            yield target, figure, target.verdict(figure.value)
