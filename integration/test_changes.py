# SPDX-License-Identifier: BSD-2-Clause
"""A few changes of key and table under traffic, and that what goes wrong with them is found."""

import pytest

from integration import windows
from integration.changes import SABOTAGES, change_by_command, change_directly
from integration.numbered import FLOWS, NOWHERE, Log, Mapping, judge
from integration.provision import Provisioned
from qsteer.model import Build
from tests.kernel import support

OLD = Mapping(since_ns=0, until_ns=110, queues=(1,) * FLOWS)
NEW = Mapping(since_ns=100, until_ns=210, queues=(2,) * (FLOWS - 1) + (1,))
LAST = Mapping(since_ns=200, until_ns=1000, queues=(3,) * FLOWS)


@pytest.mark.parametrize(
    ("began", "ended", "queue", "kind"),
    [
        (10, 20, 1, "alone"),
        (10, 20, 2, "outside"),
        (10, 99, 2, "outside"),
        (10, 100, 2, "new"),
        (10, 100, 1, "old"),
        (110, 120, 1, "old"),
        (111, 120, 1, "outside"),
        (111, 120, 2, "alone"),
        (150, 300, 2, "old"),
        (150, 300, 3, "new"),
        (150, 300, 1, "outside"),
        (211, 300, 2, "outside"),
        (90, 205, 3, "new"),
        (211, 300, NOWHERE, "lost"),
    ],
)
def test_what_was_in_force(began: int, ended: int, queue: int, kind: str) -> None:
    log = Log(began=[5, began], ended=[6, ended], queue=[1, queue])
    verdict = judge(log, (OLD, NEW, LAST))
    counts = {name: getattr(verdict, name) for name in ("old", "new", "either", "lost")}
    counts |= {"alone": verdict.alone - 1, "outside": len(verdict.outside)}
    assert counts == dict.fromkeys(counts, 0) | {kind: 1}
    assert verdict.packets == 2


def test_a_flow_that_stays() -> None:
    log = Log(began=[105] * FLOWS, ended=[106] * FLOWS, queue=[2] * (FLOWS - 1) + [1])
    verdict = judge(log, (OLD, NEW))
    assert (verdict.new, verdict.either, verdict.outside) == (FLOWS - 1, 1, ())


@pytest.mark.root
@pytest.mark.parametrize("build", support.BUILDS)
def test_no_packet_is_outside(build: Build) -> None:
    outcome = change_directly(300 if build is support.BUILDS[0] else 20, 11, build=build)
    assert outcome.holds, outcome
    assert outcome.verdict.packets > 10 * outcome.changes


@pytest.mark.root
@pytest.mark.parametrize("sabotage", SABOTAGES)
def test_what_is_wrong_is_found(sabotage: str) -> None:
    outcome = change_directly(60, 12, sabotage=sabotage)
    assert outcome.verdict.outside and not outcome.holds


@pytest.mark.root
def test_the_command() -> None:
    outcome = change_by_command(4, 13)
    assert outcome.holds, outcome


@pytest.mark.root
@pytest.mark.guest
def test_a_guest_changes_its_own(files: Provisioned, user: str) -> None:
    """QEMU takes the program off and puts it on; in between, and only then, a packet may be anywhere."""
    found = windows.change_in_a_guest(files, user, 6, 14)
    assert len(found.at_most_us) == 6 and not found.stray
    assert all(0 <= least <= most for least, most in zip(found.at_least_us, found.at_most_us, strict=True))
    assert found.verdict.alone > 1000
