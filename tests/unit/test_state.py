# SPDX-License-Identifier: BSD-2-Clause
"""What status says of a tap."""

from dataclasses import replace

import pytest

from qsteer.model import Kind, Reading, Source, Tap
from qsteer.state import Agrees, agrees, broken, state
from tests.unit.taps import (
    CONFIG,
    FOREIGN,
    OWN_SHARED,
    OWN_STATIC,
    QEMUS,
    RSS_NIC,
    RSS_VHOST_NIC,
    content,
    held,
    program,
    tap,
)

FROM_AGENT = program(Kind.QSTEER, id=11, source=Source.GUEST_AGENT)
ASKED = Reading(source=Source.GUEST_AGENT, config=CONFIG)
NOTHING_ASKED = replace(ASKED, config=None)
OTHER = replace(CONFIG, table=(3, 2, 1, 0))


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (tap(), "not steered"),
        (tap(multi_queue=False, active=1), "single queue"),
        (tap(hold=True), "held off"),
        (tap(program=OWN_STATIC), "ok"),
        (tap(program=OWN_STATIC, hold=True), "ok, but on hold: keep leaves it alone"),
        (tap(program=OWN_STATIC, body_present=False), "broken: the shared body is gone"),
        (tap(program=OWN_STATIC, nic=RSS_NIC), "undone: QEMU steers in software"),
        (tap(program=QEMUS, nic=RSS_NIC, held=held(QEMUS)), "ok"),
        (tap(program=FROM_AGENT, nic=RSS_NIC), "ok"),
        (tap(unheld=True, queues=(), holder=None, active=0), "no process has it open"),
        (tap(queues=()), "what steers it cannot be seen"),
        (tap(program=FOREIGN), '"lb_steer", loaded by uid 0'),
        (tap(program=FOREIGN, program_holders=(910,)), '"lb_steer", loaded by uid 0, held by pid 910'),
        (tap(program_id=3), "steered, no right to see by whom"),
        (tap(nic=RSS_NIC), "guest is offered RSS, QEMU steers in software"),
        (tap(nic=RSS_VHOST_NIC), "guest is offered RSS, not steered"),
        (tap(nic=RSS_NIC, held=held(OWN_SHARED)), "ready, the guest has not asked for RSS"),
        (tap(nic=RSS_NIC, held=held(QEMUS)), "ready, the guest has not asked for RSS"),
        (tap(nic=RSS_NIC, held=held(OWN_SHARED, enabled=False)), "ready, the guest has not asked for RSS"),
    ],
)
def test_state(seen: Tap, wanted: str) -> None:
    assert state(seen) == wanted


def test_another_versions_program_is_ok_and_said() -> None:
    assert OWN_STATIC.ident
    old = replace(OWN_STATIC, ident=replace(OWN_STATIC.ident, outdated=True, version="0.0.9"))
    assert state(tap(program=old)) == "ok, of qsteer 0.0.9: apply --refresh"


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (tap(), Agrees.NOTHING_ASKED),
        (tap(program=OWN_STATIC), Agrees.NOTHING_ASKED),
        (tap(queues=()), Agrees.UNKNOWN),
        (tap(active=1, nic=RSS_VHOST_NIC), Agrees.NOTHING_ASKED),
        (tap(nic=None), Agrees.UNKNOWN),
        (tap(nic=RSS_NIC), Agrees.YES),
        (tap(nic=RSS_VHOST_NIC), Agrees.UNKNOWN),
        (tap(nic=RSS_VHOST_NIC, program=OWN_STATIC), Agrees.UNKNOWN),
        (tap(nic=RSS_NIC, program=OWN_SHARED, held=held(OWN_SHARED)), Agrees.YES),
        (tap(nic=RSS_NIC, program=OWN_SHARED, held=held(OWN_SHARED), body_present=False), Agrees.UNKNOWN),
        (tap(nic=RSS_NIC, program=QEMUS, held=held(QEMUS)), Agrees.YES),
        (tap(nic=RSS_NIC, held=held(QEMUS)), Agrees.UNKNOWN),
        (tap(nic=RSS_NIC, program=OWN_STATIC, content=content(config=OTHER), held=held(QEMUS)), Agrees.NO),
        (tap(nic=RSS_NIC, program=FOREIGN, held=held(QEMUS)), Agrees.UNKNOWN),
        (tap(nic=RSS_VHOST_NIC, program=FROM_AGENT), Agrees.UNKNOWN),
        (tap(nic=RSS_VHOST_NIC, program=FROM_AGENT, reading=ASKED), Agrees.YES),
        (tap(nic=RSS_VHOST_NIC, program=FROM_AGENT, reading=replace(ASKED, config=OTHER)), Agrees.NO),
        (tap(nic=RSS_VHOST_NIC, program=FROM_AGENT, content=content(enabled=False), reading=ASKED), Agrees.NO),
        (tap(nic=RSS_VHOST_NIC, program=FOREIGN, reading=ASKED), Agrees.UNKNOWN),
        (tap(nic=RSS_VHOST_NIC, reading=ASKED), Agrees.NO),
        (tap(nic=RSS_NIC, reading=ASKED), Agrees.YES),
        (tap(nic=RSS_NIC, program=FROM_AGENT), Agrees.UNKNOWN),
        (tap(nic=RSS_NIC, program=FROM_AGENT, reading=ASKED), Agrees.YES),
        (tap(nic=RSS_NIC, program=FROM_AGENT, reading=replace(ASKED, config=OTHER)), Agrees.NO),
        (tap(nic=RSS_VHOST_NIC, reading=NOTHING_ASKED), Agrees.YES),
        (tap(nic=RSS_VHOST_NIC, program=OWN_STATIC, reading=NOTHING_ASKED), Agrees.YES),
        (tap(nic=RSS_VHOST_NIC, program=FROM_AGENT, reading=NOTHING_ASKED), Agrees.NO),
    ],
)
def test_agrees(seen: Tap, wanted: Agrees) -> None:
    assert agrees(seen) is wanted


def test_hash_types_that_were_not_read_are_not_compared() -> None:
    other_types = content(config=replace(CONFIG, types=CONFIG.types & ~1))
    seen = tap(nic=RSS_VHOST_NIC, program=FROM_AGENT, content=other_types, reading=ASKED)
    assert agrees(seen) is Agrees.NO
    assert agrees(replace(seen, reading=replace(ASKED, exact_types=False))) is Agrees.YES


def test_broken() -> None:
    assert broken(tap(program=OWN_STATIC, body_present=False))
    assert broken(tap(program=OWN_STATIC, nic=RSS_NIC))
    assert not broken(tap(program=FROM_AGENT, nic=RSS_NIC))
    assert not broken(tap(program=FOREIGN)) and not broken(tap())
