# SPDX-License-Identifier: BSD-2-Clause
"""When Signals looks: simulated time, no kernel."""

import itertools

import pytest

from qsteer.pace import Bucket, Pace

INTERVAL_S = 0.8


def looks(pace: Pace, until: float, *, changed: bool = False, cpu_s: float = 0.0, hints: bool = False) -> list[float]:
    """The times of all looks from 0 on, each of which has an outcome and a cost; with hints, one comes after each."""
    times: list[float] = []
    while (now := pace.look_at(times[-1] if times else 0.0)) < until:
        times.append(now)
        pace.looked(now, changed=changed)
        pace.charge(cpu_s, now)
        if hints:
            pace.hinted(now, early=True)
    return times


def gaps(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def test_one_look_per_interval_where_nothing_happens() -> None:
    times = looks(Pace(interval_s=INTERVAL_S, now=0.0), 10.0)
    assert times[0] == 0.0
    assert gaps(times) == pytest.approx([INTERVAL_S] * 12)


@pytest.mark.parametrize(("early", "extra"), [(False, []), (True, [0.112, 0.162, 0.412])])
def test_a_hint_leads_to_a_look_and_an_early_one_to_several(early: bool, extra: list[float]) -> None:
    pace = Pace(interval_s=INTERVAL_S, now=0.0)
    pace.looked(0.0, changed=False)
    pace.hinted(0.1, early=early)
    times = []
    for _ in range(len(extra) + 3):
        times.append(pace.look_at(0.1))
        pace.looked(times[-1], changed=True)
    *hinted, first, second = times
    assert hinted == pytest.approx([0.102, *extra])
    assert (first, second) == pytest.approx((hinted[-1] + INTERVAL_S, hinted[-1] + 2 * INTERVAL_S))


def test_a_hint_does_not_put_off_what_is_due_sooner() -> None:
    pace = Pace(interval_s=INTERVAL_S, now=0.0)
    pace.looked(0.0, changed=False)
    pace.hinted(0.1, early=False)
    pace.hinted(0.1015, early=False)
    assert pace.look_at(0.1015) == pytest.approx(0.102)


def test_a_short_interval_is_the_longest_time_all_the_same() -> None:
    pace = Pace(interval_s=0.02, now=0.0)
    pace.looked(0.0, changed=False)
    pace.hinted(0.0, early=True)
    assert max(gaps(looks(pace, 1.0))) == pytest.approx(0.02)


@pytest.mark.parametrize("cpu_s", [0.0001, 0.001, 0.01])
def test_a_flood_of_hints_costs_little(cpu_s: float) -> None:
    """Beyond what one look per interval costs anyway, and the first burst."""
    pace = Pace(interval_s=INTERVAL_S, now=0.0)
    seconds = 100.0
    times = looks(pace, seconds, cpu_s=cpu_s, hints=True)
    most = 0.03 + seconds * (0.005 + cpu_s / INTERVAL_S)
    assert seconds / INTERVAL_S * cpu_s <= len(times) * cpu_s <= most + cpu_s
    assert max(gaps(times)) <= INTERVAL_S + 1e-9


def test_nothing_left_means_no_hints_until_there_is() -> None:
    pace = Pace(interval_s=INTERVAL_S, now=0.0)
    pace.looked(0.0, changed=False)
    assert pace.affordable_at(0.0) == 0.0
    pace.charge(0.031, 0.0)
    assert pace.affordable_at(0.0) == pytest.approx(0.4)
    pace.hinted(0.0, early=False)
    assert pace.look_at(0.0) == pytest.approx(0.4)
    pace.charge(1.0, 0.0)
    assert pace.look_at(0.0) == pytest.approx(INTERVAL_S), "one look per interval is not for sale"


def test_to_wake_up_does_not_eat_up_what_comes_back() -> None:
    """Each time that it might look again it pays for having woken up."""
    pace = Pace(interval_s=INTERVAL_S, now=0.0)
    pace.looked(0.0, changed=False)
    pace.charge(0.03, 0.0)
    pace.hinted(0.0, early=False)
    now, wakes = 0.0, 0
    while pace.look_at(now) > now:
        now = pace.look_at(now)
        pace.charge(0.0001, now)
        wakes += 1
    assert now == pytest.approx(0.2, abs=0.03)
    assert wakes <= 2


def test_a_flood_of_changes_is_reported_now_and_then() -> None:
    """The first ones as they come."""
    times = looks(Pace(interval_s=INTERVAL_S, now=0.0), 100.0, changed=True, hints=True)
    assert len([time for time in times if time < 0.1]) == 30
    assert len(times) == pytest.approx(100 * 5 + 30, abs=2)
    assert max(gaps(times)) == pytest.approx(0.2, abs=0.01)


def test_a_bucket_fills_up_to_its_limit() -> None:
    bucket = Bucket(per_s=2.0, limit=4.0, now=10.0)
    assert bucket.ready_at(4.0, 10.0) == 10.0
    bucket.take(5.0, 10.0)
    assert bucket.ready_at(1.0, 10.0) == 11.0
    assert bucket.ready_at(1.0, 10.5) == 11.0
    assert bucket.ready_at(4.0, 100.0) == 100.0
    bucket.take(4.0, 100.0)
    assert bucket.ready_at(1.0, 100.0) == 100.5
