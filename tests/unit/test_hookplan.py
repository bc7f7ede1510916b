# SPDX-License-Identifier: BSD-2-Clause
"""What libvirt's hook does about a tap: which plan, what it says, and whether that is as wanted."""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qsteer import hookplan
from qsteer.hookplan import Decision, decide
from qsteer.model import Nic, Source, Tap
from qsteer.plan import Attach, Static, Wanted
from qsteer.rss import equal_table
from tests.unit import taps
from tests.unit.taps import FOREIGN, OWN_SHARED, OWN_STATIC, QEMUS, RSS_NIC, RSS_VHOST_NIC, STATIC, held


def tap(**what: Any) -> Tap:
    """The tap of a domain whose QEMU has a QMP socket besides libvirt's."""
    made = taps.tap(**what)
    assert made.holder and made.holder.args
    return replace(made, holder=replace(made.holder, args=replace(made.holder.args, qmp_paths=("/run/web1.qmp",))))


PLAIN = tap()
SOFTWARE = tap(nic=RSS_NIC)
"""QEMU has no program, and moves packets itself."""
VHOST = tap(nic=RSS_VHOST_NIC)
UNKNOWN = tap(nic=None)
CLOSED = taps.tap(nic=RSS_NIC)
"""Nobody but libvirt can ask QEMU."""
GIVEN = tap(nic=RSS_NIC, held=held(OWN_SHARED, enabled=False))
"""By qsteer-qemu."""
PRIVILEGED = tap(nic=RSS_NIC, held=held(QEMUS, enabled=False))
"""QEMU has loaded its own."""
ASKED = Wanted(source=Source.GUEST_AGENT)
AUTO = Wanted()
ABSENT = Wanted(if_absent=True)

KEEP = 4321
LEFT = f"left to qsteer keep (process {KEEP})"
ON_ARRIVAL = "QEMU takes any program off when the guest's state has come"
OLD = "QEMU 7.2 takes the program off when the guest's driver starts"
IN_SOFTWARE = "the guest is offered RSS, and QEMU, which has no program for it (see qsteer-qemu), steers in software"
BY_VHOST = "the guest is offered RSS, and this QEMU does not steer (vhost)"
TAKES_KEEP = "it takes qsteer keep, which asks the guest"
GAVE_NONE = "the domain's log has why qsteer-qemu gave none"
TAKES_MORE = "it takes a QMP socket of its own, and qsteer keep (see docs/libvirt.md)"
FOREIGNS = (
    'not steered: tap "vnet0" is steered by the foreign program 10 ("lb_steer", tag 0011223344556677, loaded by uid 0)'
    " (--replace takes it off)"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What there is, and what comes of it; ``result`` is that of the plan, "" is no plan."""

    tap: Tap = PLAIN
    wanted: Wanted = AUTO
    version: tuple[int, int] | None = (10, 0)
    keep_pid: int | None = None
    incoming: bool = False
    wrapped: bool = False

    result: str = ""
    told: str = ""
    fine: bool = True
    follow: bool = False


CASES = {
    "one queue": Case(tap=tap(active=1), told="one queue, there is nothing to steer"),
    "no multi-queue tap": Case(tap=tap(multi_queue=False), wanted=STATIC, told="one queue, there is nothing to steer"),
    "on hold": Case(tap=tap(hold=True), told="nothing changed: qsteer off holds it off, until qsteer apply"),
    "on hold, whatever is wanted": Case(
        tap=tap(hold=True, nic=RSS_NIC),
        wanted=ASKED,
        told="nothing changed: qsteer off holds it off, until qsteer apply",
    ),
    # The daemon has been restarted.
    "attached, and stays": Case(tap=tap(program_id=7, program=OWN_STATIC), wanted=ABSENT, result="unchanged"),
    "somebody else's, and stays": Case(tap=tap(program_id=10, program=FOREIGN), wanted=ABSENT, result="unchanged"),
    "attached, and its guest is not asked": Case(
        tap=tap(program_id=7, program=OWN_STATIC, nic=RSS_NIC),
        wanted=replace(ASKED, if_absent=True),
        result="unchanged",
    ),
    "nothing attached any more": Case(wanted=ABSENT, result="attached"),
    # A table of the host's.
    "static": Case(wanted=STATIC, result="attached"),
    "static, another's is in the way": Case(
        tap=tap(program_id=10, program=FOREIGN), wanted=STATIC, told=FOREIGNS, fine=False
    ),
    "static, in place of another's": Case(
        tap=tap(program_id=10, program=FOREIGN), wanted=replace(STATIC, replace=True), result="replaced"
    ),
    "static, QEMU steers in software": Case(
        tap=SOFTWARE, wanted=STATIC, told=f"{IN_SOFTWARE}: a table of the host's changes nothing there", fine=False
    ),
    "static, in software, and keep cannot help": Case(
        tap=SOFTWARE,
        wanted=STATIC,
        keep_pid=KEEP,
        told=f"{IN_SOFTWARE}: a table of the host's changes nothing there",
        fine=False,
    ),
    "static, RSS with vhost": Case(tap=VHOST, wanted=STATIC, result="attached"),
    # The guest's table.
    "auto": Case(result="attached"),
    "auto, an unknown NIC": Case(tap=UNKNOWN, result="attached"),
    "auto, another's is in the way": Case(tap=tap(program_id=10, program=FOREIGN), told=FOREIGNS, fine=False),
    "auto, QEMU steers in software": Case(tap=SOFTWARE, told=f"{IN_SOFTWARE}: {TAKES_KEEP}", fine=False),
    "auto, in software, and nobody can ask": Case(tap=CLOSED, told=f"{IN_SOFTWARE}: {TAKES_MORE}", fine=False),
    "auto, in software, and keep cannot ask": Case(
        tap=CLOSED, keep_pid=KEEP, told=f"{IN_SOFTWARE}: {TAKES_MORE}", fine=False
    ),
    "auto, in software, the wrapper gave none": Case(
        tap=SOFTWARE,
        keep_pid=KEEP,
        wrapped=True,
        told=f"{IN_SOFTWARE.replace('see qsteer-qemu', GAVE_NONE)}: {LEFT}",
    ),
    "auto, in software, with keep": Case(tap=SOFTWARE, keep_pid=KEEP, told=f"{IN_SOFTWARE}: {LEFT}"),
    "auto, RSS with vhost": Case(tap=VHOST, told=f"{BY_VHOST}: {TAKES_KEEP}", fine=False),
    "auto, RSS with vhost, with keep": Case(tap=VHOST, keep_pid=KEEP, told=f"{BY_VHOST}: {LEFT}"),
    "auto, QEMU was given a program": Case(tap=GIVEN, result="ready"),
    "auto, QEMU has loaded one": Case(tap=PRIVILEGED, result="ready"),
    "asked, no RSS": Case(wanted=ASKED, told=f"its guest has to be asked: {TAKES_KEEP}", fine=False),
    "asked, an unknown NIC": Case(
        tap=UNKNOWN, wanted=ASKED, told=f"its guest has to be asked: {TAKES_KEEP}", fine=False
    ),
    "asked, in software": Case(tap=SOFTWARE, wanted=ASKED, told=f"{IN_SOFTWARE}: {TAKES_KEEP}", fine=False),
    "asked, whatever is attached": Case(
        tap=tap(program=OWN_STATIC), wanted=ASKED, told=f"its guest has to be asked: {TAKES_KEEP}", fine=False
    ),
    "asked, with keep": Case(wanted=ASKED, keep_pid=KEEP, told=f"its guest has to be asked: {LEFT}"),
    "asked, though QEMU was given a program": Case(
        tap=GIVEN, wanted=ASKED, told=f"its guest has to be asked: {TAKES_KEEP}", fine=False
    ),
    "shared maps that there are": Case(tap=GIVEN, wanted=Wanted(source=Source.SHARED_MAPS), result="ready"),
    "shared maps that there are not": Case(
        wanted=Wanted(source=Source.SHARED_MAPS),
        told='not steered: the QEMU behind tap "vnet0" has no program of qsteer\'s to write into: no shared-maps'
        " (qsteer run starts a VM that has)",
        fine=False,
    ),
    # A guest whose state is yet to come.
    "incoming": Case(incoming=True, told="to be steered when the guest's state has come", follow=True),
    "incoming, static": Case(
        incoming=True, wanted=STATIC, told="to be steered when the guest's state has come", follow=True
    ),
    "incoming, given": Case(
        tap=GIVEN, incoming=True, told="to be steered when the guest's state has come", follow=True
    ),
    "incoming, with keep": Case(incoming=True, keep_pid=KEEP, told=f"{ON_ARRIVAL}: {LEFT}"),
    "incoming, to be asked": Case(tap=SOFTWARE, incoming=True, told=f"{IN_SOFTWARE}: {TAKES_KEEP}", fine=False),
    "incoming, on hold": Case(
        tap=tap(hold=True), incoming=True, told="nothing changed: qsteer off holds it off, until qsteer apply"
    ),
    # A QEMU whose guest takes the program off as it starts.
    "old": Case(version=(7, 2), result="attached", told=f"{OLD}: it takes qsteer keep", fine=False),
    "old, with keep": Case(version=(7, 2), keep_pid=KEEP, result="attached", told=f"{OLD}: {LEFT}"),
    "old, static": Case(
        version=(7, 2), wanted=STATIC, result="attached", told=f"{OLD}: it takes qsteer keep", fine=False
    ),
    "the last old one": Case(
        version=(9, 0), result="attached", told=f"{OLD.replace('7.2', '9.0')}: it takes qsteer keep", fine=False
    ),
    "the first new one": Case(version=(9, 1), result="attached"),
    "of an unknown version": Case(version=None, result="attached"),
    "old, and QEMU attaches it again": Case(tap=GIVEN, version=(7, 2), result="ready"),
    "old, and nothing can be attached": Case(
        tap=tap(program_id=10, program=FOREIGN), version=(7, 2), told=FOREIGNS, fine=False
    ),
    "old, and its state is yet to come": Case(
        version=(7, 2), incoming=True, told="to be steered when the guest's state has come", follow=True
    ),
}


def decided(case: Case) -> Decision:
    return decide(
        case.tap,
        case.wanted,
        version=case.version,
        keep_pid=case.keep_pid,
        incoming=case.incoming,
        wrapped=case.wrapped,
    )


@pytest.mark.parametrize("name", CASES)
def test_what_is_done(name: str) -> None:
    case = CASES[name]
    decision = decided(case)
    assert (decision.plan.result if decision.plan else "") == case.result
    assert (decision.fine, decision.follow) == (case.fine, case.follow)
    assert decision.told == case.told


def test_what_is_left_to_later_is_left_alone() -> None:
    """Either there is a plan, or somebody is told why there is none."""
    for case in CASES.values():
        decision = decided(case)
        assert decision.plan or decision.told
        assert "\n" not in decision.told
        assert not (decision.follow and decision.plan)
        assert not (decision.plan and decision.plan.tap is not case.tap)


def test_the_table_is_the_one_that_is_wanted() -> None:
    wanted = Wanted(source=Source.STATIC, static=Static(table=equal_table(3)))
    decision = decide(PLAIN, wanted, version=None, keep_pid=None, incoming=False)
    assert decision.plan
    (step,) = decision.plan.steps
    assert isinstance(step, Attach) and step.config.table == equal_table(3)


def test_nothing_decided_is_nothing_wrong() -> None:
    assert Decision() == Decision(plan=None, told="", fine=True, follow=False)


@pytest.mark.parametrize(
    ("one", "needed"),
    [
        (PLAIN, True),
        (UNKNOWN, True),
        (tap(nic=Nic(id=None, netdev="net0", mac=None, rss=False, vhost=True)), True),
        (SOFTWARE, False),
        (VHOST, False),
        (tap(active=1), False),
        (tap(multi_queue=False), False),
    ],
)
def test_for_which_taps_the_version_matters(one: Tap, needed: bool) -> None:
    decisions = [
        decide(one, wanted, version=version, keep_pid=None, incoming=False)
        for wanted in (AUTO, STATIC)
        for version in ((7, 2), (10, 0))
    ]
    assert needed == (decisions[0].told != decisions[1].told or decisions[2].told != decisions[3].told)


def test_what_decides_is_pure() -> None:
    source = Path(hookplan.__file__).read_text()
    assert not re.search(r"^(import|from) (os|subprocess|socket|qsteer\._shim|qsteer\.kernel)\b", source, re.MULTILINE)
