# SPDX-License-Identifier: BSD-2-Clause
"""Every decision of apply and off, without a kernel."""

from dataclasses import replace
from typing import Any

import pytest

from qsteer import plan, qemuargs
from qsteer.errors import ConflictError, NotFoundError, QsteerError, UnsupportedError, UsageError
from qsteer.model import (
    Build,
    Held,
    Ident,
    Kind,
    MapsContent,
    Nic,
    OpenQueue,
    Process,
    ProgramInfo,
    Source,
    Tap,
)
from qsteer.plan import (
    Attach,
    AttachHeld,
    Detach,
    PutHold,
    RefillBody,
    RemoveHold,
    Static,
    Wanted,
    plan_apply,
    plan_off,
    state,
)
from qsteer.rss import BASE_TYPES, HashType, RssConfig
from qsteer.selection import Selection, select

KEY = bytes(range(40))
CONFIG = RssConfig(types=BASE_TYPES, key=KEY, table=tuple(range(128)))


def program(kind: Kind, *, id: int = 7, source: Source = Source.STATIC, displaced: int = 0) -> ProgramInfo:
    ident = None
    if kind is Kind.QSTEER:
        ident = Ident(
            abi=1,
            build=Build.SHARED_BODY,
            source=source,
            displaced=displaced,
            version="0.1.0",
            tap="vnet0",
            outdated=False,
        )
    maps = (0, 0, 0) if kind is Kind.FOREIGN else (1, 2, 3)
    return ProgramInfo(
        id=id,
        kind=kind,
        name={Kind.QSTEER: "qsteer_tap", Kind.QEMU: "tun_rss_steerin", Kind.FOREIGN: "lb_steer"}[kind],
        tag="0011223344556677",
        loaded_ns=0,
        uid=0,
        config_id=maps[0],
        key_id=maps[1],
        table_id=maps[2],
        bodies_id=0,
        verified_instructions=0,
        ident=ident,
    )


def content(*, enabled: bool = True) -> MapsContent:
    return MapsContent(enabled=enabled, config=CONFIG)


def process(pid: int = 100, name: str = "web1") -> Process:
    args = qemuargs.parse(("qemu-system-x86_64", "-name", name))
    return Process(pid=pid, started=1, uid=64055, comm="qemu-system-x86", args=args)


def queue(pid: int = 100, tap: str = "vnet0") -> OpenQueue:
    return OpenQueue(
        file=1,
        pid=pid,
        fd=9,
        comm="qemu-system-x86",
        tap=tap,
        ifindex=4,
        netns=1,
        index=0,
        detached=False,
        active=4,
        disabled=0,
        program_id=0,
        attachment=0,
        is_tap=True,
        multi_queue=True,
        persistent=False,
    )


def tap(**changed: Any) -> Tap:
    """A tap of a VM without RSS, with nothing attached."""
    attached = changed.get("program")
    values: dict[str, Any] = {
        "name": "vnet0",
        "ifindex": 4,
        "netns": 1,
        "active": 4,
        "disabled": 0,
        "multi_queue": True,
        "persistent": False,
        "queues": (queue(),),
        "program_id": attached.id if attached else 0,
        "program": None,
        "content": content() if attached and attached.kind is not Kind.FOREIGN else None,
        "body_present": True,
        "program_holders": (),
        "holder": process(),
        "domain": None,
        "nic": Nic(id=None, netdev="net0", mac=None, rss=False, vhost=False),
        "held": (),
        "hold": False,
    }
    return Tap(**values | changed)


RSS_NIC = Nic(id=None, netdev="net0", mac=None, rss=True, vhost=False)
RSS_VHOST_NIC = Nic(id=None, netdev="net0", mac=None, rss=True, vhost=True)
OWN_STATIC = program(Kind.QSTEER)
OWN_SHARED = program(Kind.QSTEER, id=8, source=Source.SHARED_MAPS)
QEMUS = program(Kind.QEMU, id=9)
FOREIGN = program(Kind.FOREIGN, id=10)
STATIC = Wanted(source=Source.STATIC)


def held(info: ProgramInfo, *, enabled: bool = True) -> tuple[Held, ...]:
    return (Held(fd=20, info=info, content=content(enabled=enabled)),)


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


def test_a_body_of_another_version_cannot_be_mended() -> None:
    assert OWN_SHARED.ident
    old = replace(OWN_SHARED, ident=replace(OWN_SHARED.ident, outdated=True))
    with pytest.raises(UnsupportedError, match="another version"):
        plan_apply(tap(program=old, held=held(old), body_present=False), Wanted())


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


@pytest.mark.parametrize(
    ("seen", "wanted"),
    [
        (tap(), "not steered"),
        (tap(multi_queue=False, active=1), "single queue"),
        (tap(hold=True), "held off"),
        (tap(program=OWN_STATIC), "ok"),
        (tap(program=OWN_STATIC, body_present=False), "broken: the shared body is gone"),
        (tap(program=OWN_STATIC, nic=RSS_NIC), "undone: QEMU steers in software"),
        (tap(program=QEMUS, nic=RSS_NIC, held=held(QEMUS)), "ok"),
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


def test_plans_can_be_read() -> None:
    assert str(Attach(config=CONFIG, displaced=9)).endswith("in place of program 9")
    assert all(str(step) for step in (AttachHeld(program_id=1, fd=2), Detach(), PutHold(), RemoveHold()))
    assert plan.describe(FOREIGN) == 'program 10 ("lb_steer", tag 0011223344556677, loaded by uid 0)'


def test_selectors() -> None:
    web = tap()
    db = tap(name="vnet1", holder=process(200, "db1"), queues=(queue(200, "vnet1"),))
    vpn = tap(name="tap9", holder=None, queues=(queue(300, "tap9"),))
    taps = (web, db, vpn)
    assert select(taps, Selection(vms=("web1",))) == (web,)
    assert select(taps, Selection(vms=("web1", "db1"))) == (web, db)
    assert select(taps, Selection(every=True)) == (web, db)
    assert select(taps, Selection(pids=(300,))) == (vpn,)
    assert select(taps, Selection(taps=("vnet1",), vms=("db1",))) == (db,)
    for nobody in (
        Selection(vms=("db1",), taps=("vnet0",)),
        Selection(pids=(1,)),
        Selection(taps=("eth0",)),
        Selection(taps=("vnet0", "eth0")),
        Selection(vms=("web1", "web2")),
        Selection(pids=(300, 301)),
    ):
        with pytest.raises(NotFoundError):
            select(taps, nobody)
    alone = tap(name="vnet2", active=1)
    assert select((*taps, alone), Selection(every=True)) == (web, db)


def test_a_tap_name_of_two_namespaces_is_refused() -> None:
    there = tap(netns=2, holder=process(200, "db1"), queues=(queue(200),))
    with pytest.raises(UsageError, match="pid 100"):
        select((tap(), there), Selection(taps=("vnet0",)))
    assert select((tap(), there), Selection(taps=("vnet0",), pids=(200,))) == (there,)


def test_a_name_of_two_vms_is_refused_with_the_candidates() -> None:
    twice = (tap(), tap(name="vnet1", holder=process(200), queues=(queue(200, "vnet1"),)))
    with pytest.raises(UsageError, match="pid 100, uid 64055, vnet0; pid 200, uid 64055, vnet1"):
        select(twice, Selection(vms=("web1",)))
    assert issubclass(UsageError, QsteerError)
