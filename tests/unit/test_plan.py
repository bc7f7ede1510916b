# SPDX-License-Identifier: BSD-2-Clause
"""Every decision of apply and off, without a kernel."""

from dataclasses import replace

import pytest

from qsteer.errors import BusyError, ConflictError, UnsupportedError
from qsteer.model import Kind, ProgramInfo, Reading, Source
from qsteer.plan import (
    Attach,
    AttachHeld,
    Detach,
    PutHold,
    RefillBody,
    Refresh,
    RemoveHold,
    Static,
    Wanted,
    describe,
    plan_apply,
    plan_off,
    readings_wanted,
    revision,
)
from qsteer.rss import BASE_TYPES, HashType, RssConfig
from tests.unit.taps import (
    CONFIG,
    FOREIGN,
    KEY,
    OWN_SHARED,
    OWN_STATIC,
    QEMUS,
    RSS_NIC,
    RSS_VHOST_NIC,
    STATIC,
    content,
    held,
    program,
    tap,
)


def key(length: int) -> bytes:
    return b"k" * length


def test_apply_makes_a_key_and_a_table_that_follows_the_queues() -> None:
    made = plan_apply(tap(), Wanted(), random_key=key)
    (step,) = made.steps
    assert isinstance(step, Attach)
    assert step.config == RssConfig(types=BASE_TYPES, key=b"k" * 40, table=tuple(range(128)))
    assert (made.result, made.source) == ("attached", Source.STATIC)
    assert "QEMU may remove it" in made.notes[-1]


def test_apply_again_is_unchanged() -> None:
    made = plan_apply(tap(program=OWN_STATIC), Wanted())
    assert (made.result, made.steps, made.program_id) == ("unchanged", (), OWN_STATIC.id)
    assert plan_apply(tap(program=OWN_STATIC), STATIC).result == "unchanged"
    assert plan_apply(tap(program=OWN_SHARED), Wanted()).source is Source.SHARED_MAPS


def test_what_is_attached_stays_but_for_what_is_given() -> None:
    made = plan_apply(tap(program=OWN_STATIC), Wanted(static=Static(table=(0, 1))), random_key=key)
    (step,) = made.steps
    assert isinstance(step, Attach)
    assert (step.config.key, step.config.types, step.config.table) == (KEY, BASE_TYPES, (0, 1))
    assert made.result == "replaced"


def test_no_hash_type_at_all_can_be_asked_for() -> None:
    (step,) = plan_apply(tap(program=OWN_STATIC), Wanted(static=Static(types=HashType(0)))).steps
    assert isinstance(step, Attach) and step.config.types == HashType(0)


def test_a_table_beyond_the_queues_is_reported() -> None:
    made = plan_apply(tap(), Wanted(static=Static(table=(0, 7))))
    assert any("queue 7, the tap has 0 to 3" in note for note in made.notes)
    made = plan_apply(tap(), Wanted(static=Static(unclassified_queue=9)))
    assert any("unclassified queue 9" in note for note in made.notes)


@pytest.mark.parametrize(("attached", "wanted"), [(QEMUS, STATIC), (FOREIGN, Wanted()), (FOREIGN, STATIC)])
def test_what_is_not_ours_stays(attached: ProgramInfo, wanted: Wanted) -> None:
    with pytest.raises(ConflictError, match=f"program {attached.id}") as caught:
        plan_apply(tap(program=attached), wanted)
    assert "--replace" in caught.value.hint
    with pytest.raises(ConflictError):
        plan_off(tap(program=attached))


def test_a_program_that_cannot_be_looked_at_stays() -> None:
    with pytest.raises(ConflictError):
        plan_apply(tap(program_id=5), STATIC)


def test_replace_remembers_what_qemu_had() -> None:
    taken = tap(program=QEMUS, nic=RSS_NIC, held=held(QEMUS))
    (step,) = plan_apply(taken, Wanted(source=Source.STATIC, replace=True)).steps
    assert isinstance(step, Attach) and step.displaced == QEMUS.id
    assert step.config == CONFIG, "the guest's own configuration stays where none is given"
    (step,) = plan_apply(tap(program=FOREIGN), Wanted(source=Source.STATIC, replace=True)).steps
    assert isinstance(step, Attach) and step.displaced == 0


def test_a_second_apply_keeps_remembering() -> None:
    ours = program(Kind.QSTEER, displaced=QEMUS.id)
    (step,) = plan_apply(tap(program=ours, held=held(QEMUS)), Wanted(static=Static(table=(1,)))).steps
    assert isinstance(step, Attach) and step.displaced == QEMUS.id


def test_off_puts_back_what_was_displaced() -> None:
    ours = program(Kind.QSTEER, displaced=QEMUS.id)
    made = plan_off(tap(program=ours, held=held(QEMUS)))
    assert made.steps == (PutHold(), AttachHeld(program_id=QEMUS.id, fd=20))
    assert made.program_id == QEMUS.id
    gone = plan_off(tap(program=ours))
    assert gone.steps == (PutHold(), Detach())
    assert "is gone" in gone.notes[0]


def test_off_of_nothing_holds() -> None:
    assert plan_off(tap()).steps == (PutHold(),)
    again = plan_off(tap(hold=True))
    assert (again.steps, again.result) == ((), "unchanged")


def test_off_says_that_qemu_may_attach_it_again() -> None:
    made = plan_off(tap(program=OWN_SHARED, held=held(OWN_SHARED)))
    assert made.steps == (PutHold(), Detach())
    assert "may attach it again" in made.notes[-1]


def test_qemus_own_program_is_as_good_as_ours() -> None:
    made = plan_apply(tap(program=QEMUS, nic=RSS_NIC, held=held(QEMUS)), Wanted())
    assert (made.result, made.steps, made.source) == ("unchanged", (), Source.QEMU_MAPS)
    waiting = plan_apply(tap(nic=RSS_NIC, held=held(QEMUS)), Wanted())
    assert (waiting.result, waiting.steps, waiting.source) == ("ready", (), Source.QEMU_MAPS)


def test_apply_puts_back_what_qemu_was_given() -> None:
    made = plan_apply(tap(nic=RSS_NIC, held=held(OWN_SHARED), hold=True), Wanted())
    assert made.steps == (AttachHeld(program_id=OWN_SHARED.id, fd=20), RemoveHold())
    assert made.source is Source.SHARED_MAPS


def test_the_table_of_before_a_reset_comes_back_only_on_request() -> None:
    """QEMU takes its program off when the guest is reset, and the maps keep the old table."""
    reset = tap(nic=RSS_NIC, held=held(OWN_SHARED))
    assert (plan_apply(reset, Wanted()).steps, plan_apply(reset, Wanted()).result) == ((), "ready")
    asked = plan_apply(reset, Wanted(source=Source.SHARED_MAPS))
    assert asked.steps == (AttachHeld(program_id=OWN_SHARED.id, fd=20),)


def test_from_static_back_to_a_guest_that_has_not_asked() -> None:
    waiting = tap(nic=RSS_NIC, program=OWN_STATIC, held=held(OWN_SHARED, enabled=False))
    for wanted in (Wanted(), Wanted(source=Source.SHARED_MAPS)):
        made = plan_apply(waiting, wanted)
        assert (made.steps, made.result, made.source) == ((Detach(),), "ready", Source.SHARED_MAPS)
    foreign = tap(nic=RSS_NIC, program=FOREIGN, held=held(OWN_SHARED, enabled=False))
    assert plan_apply(foreign, Wanted(replace=True)).steps == (Detach(),)
    assert "in place of program 10" in plan_apply(foreign, Wanted(replace=True)).notes[0]


def test_a_body_that_is_gone_is_mended() -> None:
    (step,) = plan_apply(tap(program=OWN_STATIC, body_present=False), Wanted()).steps
    assert isinstance(step, Attach) and step.config == CONFIG
    broken = tap(program=OWN_SHARED, held=held(OWN_SHARED), body_present=False)
    made = plan_apply(broken, Wanted())
    assert (made.steps, made.result, made.program_id) == ((RefillBody(),), "mended", OWN_SHARED.id)


def test_a_body_of_another_version_is_mended_by_a_program_of_this_one() -> None:
    old = outdated(OWN_SHARED)
    made = plan_apply(tap(program=old, held=held(old), body_present=False), Wanted())
    assert (made.steps, made.result) == ((Refresh(source=Source.SHARED_MAPS, displaced=0),), "mended")


def test_apply_waits_for_the_guest() -> None:
    made = plan_apply(tap(nic=RSS_NIC, held=held(OWN_SHARED, enabled=False)), Wanted())
    assert (made.steps, made.result) == ((), "ready")


def test_apply_returns_from_static_to_the_guests_own() -> None:
    made = plan_apply(tap(nic=RSS_NIC, program=OWN_STATIC, held=held(OWN_SHARED)), Wanted())
    assert made.steps == (AttachHeld(program_id=OWN_SHARED.id, fd=20),)


@pytest.mark.parametrize("wanted", [Wanted(), STATIC, Wanted(static=Static(table=(0,)))])
def test_software_steering_is_refused(wanted: Wanted) -> None:
    with pytest.raises(UnsupportedError, match="in software"):
        plan_apply(tap(nic=RSS_NIC), wanted)
    forced = Wanted(source=Source.STATIC, static=wanted.static, force=True)
    assert plan_apply(tap(nic=RSS_NIC), forced).result == "attached"


def test_a_guest_whose_table_cannot_be_read_wants_static() -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_apply(tap(nic=RSS_VHOST_NIC), Wanted())
    assert "--source static" in caught.value.hint
    assert plan_apply(tap(nic=RSS_VHOST_NIC), STATIC).result == "attached"


def test_one_queue_is_nothing_to_steer() -> None:
    for alone in (tap(multi_queue=False), tap(active=1)):
        with pytest.raises(UnsupportedError, match="single queue"):
            plan_apply(alone, STATIC)
    assert plan_apply(tap(active=1, disabled=3), STATIC).result == "attached"


def test_shared_maps_that_are_not_there() -> None:
    with pytest.raises(UnsupportedError, match="shared-maps"):
        plan_apply(tap(), Wanted(source=Source.SHARED_MAPS))


def test_plans_can_be_read() -> None:
    assert str(Attach(config=CONFIG, source=Source.STATIC, displaced=9)).endswith("in place of program 9")
    assert all(str(step) for step in (AttachHeld(program_id=1, fd=2), Detach(), PutHold(), RemoveHold()))
    assert describe(FOREIGN) == 'program 10 ("lb_steer", tag 0011223344556677, loaded by uid 0)'


def outdated(info: ProgramInfo) -> ProgramInfo:
    assert info.ident
    return replace(info, ident=replace(info.ident, outdated=True, version="0.0.9"))


def test_refresh_swaps_only_what_is_of_another_version() -> None:
    refresh = Wanted(refresh=True)
    old = tap(program=outdated(program(Kind.QSTEER, displaced=9)), hold=True)
    assert plan_apply(old, refresh).steps == (Refresh(source=Source.STATIC, displaced=9), RemoveHold())
    assert plan_apply(old, Wanted()).result == "unchanged", "an upgrade is no drift"
    for nothing_to_refresh in (tap(program=OWN_STATIC), tap(), tap(program=FOREIGN), tap(program=QEMUS)):
        made = plan_apply(nothing_to_refresh, refresh)
        assert (made.result, made.steps) == ("unchanged", ())
        assert "nothing to refresh" in made.notes[0]
    followed = tap(program=outdated(OWN_SHARED), held=held(outdated(OWN_SHARED)))
    made = plan_apply(followed, refresh)
    assert made.steps == (Refresh(source=Source.SHARED_MAPS, displaced=0),)
    assert "QEMU holds the old program" in made.notes[0]


def test_if_absent_leaves_whatever_is_there() -> None:
    wanted = Wanted(source=Source.STATIC, if_absent=True)
    for attached in (FOREIGN, QEMUS, OWN_STATIC):
        made = plan_apply(tap(program=attached, hold=True), wanted)
        assert (made.steps, made.result, made.program_id) == ((), "unchanged", attached.id)
    assert plan_apply(tap(), wanted).result == "attached"


def test_expect_refuses_what_has_changed() -> None:
    seen = tap(program=OWN_STATIC)
    expecting = Wanted(source=Source.STATIC, static=Static(table=(1,)), expect=revision(seen))
    assert plan_apply(seen, expecting).result == "replaced"
    other = content(config=replace(CONFIG, table=(3,)))
    for changed in (tap(), tap(program=program(Kind.QSTEER, id=70)), replace(seen, content=other)):
        with pytest.raises(BusyError, match="revision"):
            plan_apply(changed, expecting)
        with pytest.raises(BusyError, match="revision"):
            plan_off(changed, expect=revision(seen))


READ = Reading(source=Source.DEVICE_STATE, config=replace(CONFIG, table=(2, 1)), paused_ms=2.25)
FROM_STATE = program(Kind.QSTEER, id=11, source=Source.DEVICE_STATE)


def test_what_the_guest_asks_for_is_read_only_where_nothing_else_tells() -> None:
    ask, pause = (Source.GUEST_AGENT,), (Source.DEVICE_STATE, Source.GUEST_AGENT)
    offered = tap(nic=RSS_VHOST_NIC)
    assert readings_wanted(offered, Wanted()) == ask
    assert readings_wanted(offered, Wanted(allow_pause=True)) == pause
    assert readings_wanted(tap(nic=RSS_NIC), Wanted(allow_pause=True)) == pause, "QEMU's software steering agrees then"
    for nothing_to_ask in (
        tap(),
        tap(nic=None),
        tap(active=1, nic=RSS_NIC),
        tap(nic=RSS_NIC, held=held(OWN_SHARED)),
        tap(nic=RSS_NIC, held=held(QEMUS, enabled=False)),
        tap(nic=RSS_VHOST_NIC, program=OWN_STATIC),
        tap(nic=RSS_VHOST_NIC, program=FOREIGN),
    ):
        assert readings_wanted(nothing_to_ask, Wanted(allow_pause=True)) == ()
    assert readings_wanted(offered, STATIC) == ()
    assert readings_wanted(offered, Wanted(static=Static(table=(0,)))) == ()
    assert readings_wanted(tap(), Wanted(source=Source.DEVICE_STATE)) == (Source.DEVICE_STATE,)
    assert readings_wanted(tap(nic=RSS_VHOST_NIC, program=FROM_STATE), Wanted()) == ask, "read again"
    assert readings_wanted(tap(program=FOREIGN, nic=RSS_NIC), Wanted(if_absent=True)) == ()


def test_with_vhost_maps_that_stay_empty_are_not_trusted() -> None:
    """QEMU 10.1 and later ignores the program that it was given where vhost is on."""
    given = tap(nic=RSS_VHOST_NIC, held=held(OWN_SHARED, enabled=False))
    assert readings_wanted(given, Wanted()) == (Source.GUEST_AGENT,)
    assert plan_apply(given, Wanted()).result == "ready"
    assert plan_apply(replace(given, reading=READ), Wanted()).source is Source.DEVICE_STATE
    nothing_asked = replace(given, reading=replace(READ, config=None))
    assert plan_apply(nothing_asked, Wanted()).source is Source.SHARED_MAPS
    used = tap(nic=RSS_VHOST_NIC, held=held(OWN_SHARED))
    assert readings_wanted(used, Wanted()) == ()


def test_steering_by_what_was_read() -> None:
    made = plan_apply(tap(nic=RSS_NIC, reading=READ, hold=True), Wanted())
    assert READ.config
    assert made.steps == (Attach(config=READ.config, source=Source.DEVICE_STATE, displaced=0), RemoveHold())
    assert (made.result, made.source) == ("attached", Source.DEVICE_STATE)
    assert "stood still for 2.2 ms" in made.notes[0]
    guessed = plan_apply(tap(nic=RSS_NIC, reading=replace(READ, exact_types=False)), Wanted())
    assert any("hash types could not be read" in note for note in guessed.notes)


def test_what_was_read_again_and_is_the_same() -> None:
    same = tap(nic=RSS_NIC, program=FROM_STATE, content=content(config=READ.config), reading=READ)
    assert (plan_apply(same, Wanted()).result, plan_apply(same, Wanted()).steps) == ("unchanged", ())
    other = replace(same, content=content())
    assert plan_apply(other, Wanted()).result == "replaced"
    broken = replace(same, body_present=False)
    assert plan_apply(broken, Wanted()).result == "replaced"
    by_hand = tap(nic=RSS_NIC, program=OWN_STATIC, content=content(config=READ.config), reading=READ)
    assert plan_apply(by_hand, Wanted(source=Source.DEVICE_STATE)).result == "replaced", (
        "it is to be named by its source"
    )


def test_a_guest_that_asks_for_nothing_any_more() -> None:
    silent = replace(READ, config=None)
    made = plan_apply(tap(nic=RSS_NIC, program=FROM_STATE, reading=silent), Wanted())
    assert (made.steps, made.result, made.program_id) == ((Detach(),), "ready", 0)
    assert plan_apply(tap(nic=RSS_NIC, reading=silent), Wanted()).steps == ()


def test_a_foreign_program_stays_whatever_was_read() -> None:
    with pytest.raises(ConflictError):
        plan_apply(tap(nic=RSS_NIC, program=FOREIGN, reading=READ), Wanted(source=Source.DEVICE_STATE))
    taken = plan_apply(
        tap(program=QEMUS, held=held(QEMUS), reading=READ), Wanted(source=Source.DEVICE_STATE, replace=True)
    )
    (step,) = taken.steps
    assert isinstance(step, Attach) and step.displaced == QEMUS.id


def test_a_table_that_qemu_undoes_gives_way_to_the_guests_own() -> None:
    undone = tap(nic=RSS_NIC, program=OWN_STATIC)
    assert readings_wanted(undone, Wanted()) == (Source.GUEST_AGENT,)
    made = plan_apply(replace(undone, reading=READ), Wanted())
    assert (made.result, made.source) == ("replaced", Source.DEVICE_STATE)
    made = plan_apply(undone, Wanted())
    assert made.result == "unchanged" and "undoes it" in made.notes[0]


def test_why_a_guest_could_not_be_asked() -> None:
    with pytest.raises(UnsupportedError, match="--allow pause; no agent") as caught:
        plan_apply(tap(nic=RSS_VHOST_NIC, unread=("no agent",)), Wanted())
    assert "--source static" in caught.value.hint


def test_qemus_own_maps_with_qsteers_program() -> None:
    """With --replace qsteer's program steers by the very maps that QEMU writes."""
    own = tap(program=QEMUS, nic=RSS_NIC, held=held(QEMUS))
    made = plan_apply(own, Wanted(replace=True))
    assert made.steps == (Refresh(source=Source.QEMU_MAPS, displaced=QEMUS.id),)
    ours = replace(program(Kind.QSTEER, id=12, source=Source.QEMU_MAPS), config_id=QEMUS.config_id)
    over = tap(program=ours, nic=RSS_NIC, held=held(QEMUS))
    assert plan_apply(over, Wanted()).result == "unchanged"
    assert plan_apply(replace(over, body_present=False), Wanted()).steps == (RefillBody(),)


def test_back_to_qemus_own_maps() -> None:
    asked = Wanted(source=Source.QEMU_MAPS)
    made = plan_apply(tap(program=OWN_STATIC, nic=RSS_NIC, held=held(QEMUS)), asked)
    assert (made.steps, made.source) == ((AttachHeld(program_id=QEMUS.id, fd=20),), Source.QEMU_MAPS)
    with pytest.raises(UnsupportedError, match="qemu-maps"):
        plan_apply(tap(), asked)
