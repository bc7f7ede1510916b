# SPDX-License-Identifier: BSD-2-Clause
"""Fair turns and robust statistics.

Whatever is compared is measured in turns, a b c, b c a, c a b, ..., so that a machine that becomes slower is slower for
all.  Ratios and differences are taken within a round; a figure is the median over the rounds, and its spread the
distance between the quartiles.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The median over the rounds, and the distance between the quartiles; of one round that is 0."""

    median: float
    spread: float


def turns(items: Sequence[Item], rounds: int) -> Iterator[tuple[int, Item]]:
    """Every item once a round, each round beginning with the next one; the number of the round comes with it."""
    for number in range(rounds):
        start = number % len(items)
        for item in (*items[start:], *items[:start]):
            yield number, item


def summary(values: Sequence[float]) -> Summary:
    """Raises StatisticsError on no value at all."""
    if len(values) < 2:
        return Summary(median=statistics.median(values), spread=0.0)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(median=statistics.median(values), spread=third - first)


def by_round(formula: Callable[..., float], *series: Sequence[float]) -> Summary:
    """The summary of a formula of what several contenders had in the same round."""
    return summary([formula(*values) for values in zip(*series, strict=True)])
