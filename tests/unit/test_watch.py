# SPDX-License-Identifier: BSD-2-Clause
"""What counts as a change, what is said about it, whom a name means, and when a repair has become a fight."""

import json
import random
from dataclasses import replace
from typing import Any

import pytest

from qsteer.model import Domain, Inventory, Kind, MapsContent, Nic, OpenQueue, Tap, Unsteerable
from qsteer.rss import HashType
from qsteer.selection import Selection
from qsteer.watch import (
    Attached,
    Event,
    Queues,
    Repairs,
    What,
    choose,
    events,
    key_of,
    missing,
    text,
    to_json,
    who,
)
from tests.unit.taps import CONFIG, FOREIGN, OWN_SHARED, OWN_STATIC, QEMUS, content, process, queue, tap

OTHER_TABLE = replace(CONFIG, table=(3, 2, 1, 0))


def inventory(*taps: Tap, **others: Any) -> Inventory:
    return Inventory(taps=taps, **others)


def attached_at(attachment: int) -> tuple[OpenQueue, ...]:
    return (replace(queue(), attachment=attachment, program_id=1),)


def changes(before: Tap | None, after: Tap | None) -> list[Event]:
    found = events(*(inventory(seen) if seen else inventory() for seen in (before, after)))
    return [one for happened in found.values() for one in happened]


@pytest.mark.parametrize(
    ("before", "after", "what", "line"),
    [
        (tap(), tap(program=OWN_STATIC), What.ATTACHED, "web1 (pid 100) vnet0: program none -> 7"),
        (tap(program=OWN_STATIC), tap(), What.DETACHED, "web1 (pid 100) vnet0: program 7 -> none"),
        (
            tap(program=OWN_STATIC),
            tap(program=FOREIGN),
            What.REPLACED,
            'web1 (pid 100) vnet0: program 7 -> foreign 10 "lb_steer"',
        ),
        (
            tap(program=QEMUS),
            tap(program=OWN_STATIC),
            What.REPLACED,
            'web1 (pid 100) vnet0: program qemu 9 "tun_rss_steerin" -> 7',
        ),
        (tap(program_id=3), tap(program_id=4), What.REPLACED, "web1 (pid 100) vnet0: program 3 -> 4"),
        (
            tap(program=OWN_SHARED, queues=attached_at(1)),
            tap(program=OWN_SHARED, queues=attached_at(2)),
            What.ATTACHED_AGAIN,
            "web1 (pid 100) vnet0: program 8 -> 8: the guest set RSS",
        ),
        (
            tap(program=OWN_SHARED, queues=attached_at(1)),
            tap(program=OWN_SHARED, queues=attached_at(2), content=content(config=OTHER_TABLE)),
            What.CONFIGURATION,
            "web1 (pid 100) vnet0: configuration: the guest set table",
        ),
        (tap(disabled=3, active=1), tap(), What.QUEUES, "web1 (pid 100) vnet0: queues 1/4 -> 4/4"),
        (tap(disabled=1), tap(disabled=2), What.QUEUES, "web1 (pid 100) vnet0: queues 4/5 -> 4/6"),
        (
            tap(program=OWN_STATIC),
            tap(program=OWN_STATIC, body_present=False),
            What.BODY_GONE,
            "web1 (pid 100) vnet0: program 7 -> 7: the shared body is gone",
        ),
        (
            tap(program=OWN_STATIC, body_present=False),
            tap(program=OWN_STATIC),
            What.BODY_BACK,
            "web1 (pid 100) vnet0: program 7 -> 7: the shared body is back",
        ),
        (tap(), tap(hold=True), What.HELD, "web1 (pid 100) vnet0: held off"),
        (tap(hold=True), tap(), What.HOLD_LIFTED, "web1 (pid 100) vnet0: the hold is lifted"),
    ],
)
def test_one_change(before: Tap, after: Tap, what: What, line: str) -> None:
    (happened,) = changes(before, after)
    assert happened.what is what
    assert text(happened) == line


@pytest.mark.parametrize(
    "seen", [tap(), tap(program=OWN_STATIC), tap(program=OWN_SHARED, queues=attached_at(5)), tap(program_id=3)]
)
def test_nothing_changed(seen: Tap) -> None:
    assert changes(seen, replace(seen)) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (content(), content(config=replace(CONFIG, key=bytes(40))), "key"),
        (content(), content(config=replace(CONFIG, types=HashType.TCP4, unclassified_queue=2)), "types, unclassified"),
        (content(), content(enabled=False), "RSS off"),
        (content(enabled=False), content(), "RSS anew"),
        (content(), content(config=None), "RSS off"),
    ],
)
def test_what_of_a_configuration_changed(old: MapsContent, new: MapsContent, words: str) -> None:
    (happened,) = changes(tap(program=OWN_SHARED, content=old), tap(program=OWN_SHARED, content=new))
    assert happened.what is What.CONFIGURATION and words in text(happened)


def test_a_vm_comes_and_goes_with_its_taps() -> None:
    came = changes(None, tap(program=OWN_STATIC))
    assert [one.what for one in came] == [What.VM_APPEARED, What.TAP_APPEARED]
    assert [text(one) for one in came] == [
        "web1 (pid 100): the VM is there",
        "web1 (pid 100) vnet0: the tap is there, queues 4/4: steered by program 7",
    ]
    went = changes(tap(), None)
    assert [text(one) for one in went] == ["web1 (pid 100): the VM is gone", "web1 (pid 100) vnet0: the tap is gone"]


def test_a_persistent_tap_of_another_vm() -> None:
    later = replace(process(), started=2)
    happened = changes(tap(program=OWN_STATIC), tap(program=OWN_STATIC, holder=later))
    assert [one.what for one in happened] == [What.VM_GONE, What.VM_APPEARED]


def test_a_vm_without_a_tap() -> None:
    nic = Nic(id="n0", netdev="n0", mac=None, rss=False, vhost=False)
    domain = Domain(name="web9", uuid="u", pid=100, interfaces=(), monitor=None, agent=None)
    other = Unsteerable(vm=process(), domain=domain, nic=nic, backend="macvtap")
    (happened,) = events(inventory(), inventory(unsteerable=(other,)))[None]
    assert text(happened) == "web9 (pid 100): the VM is there"


def test_a_tap_is_told_by_its_index_and_not_by_its_name() -> None:
    happened = changes(tap(), tap(ifindex=5))
    assert [one.what for one in happened] == [What.TAP_GONE, What.TAP_APPEARED]
    assert events(inventory(tap()), inventory(tap(name="renamed"))) == {}


def test_json() -> None:
    (happened,) = changes(tap(program=OWN_STATIC), tap(program=FOREIGN))
    assert to_json(happened, time="2025-01-01T00:00:00.000Z") == {
        "schema": "qsteer.monitor/1",
        "time": "2025-01-01T00:00:00.000Z",
        "event": "replaced",
        "vm": "web1",
        "pid": 100,
        "tap": "vnet0",
        "netns": 1,
        "old": {"program": 7, "kind": "qsteer"},
        "new": {"program": 10, "kind": "foreign"},
        "detail": "",
    }
    (happened,) = changes(tap(active=1, disabled=3), tap())
    assert to_json(happened, time="t")["old"] == {"active": 1, "attached": 4}
    (happened,) = changes(tap(program=OWN_SHARED), tap(program=OWN_SHARED, content=content(config=OTHER_TABLE)))
    assert json.loads(json.dumps(to_json(happened, time="t")))["new"]["table"] == [3, 2, 1, 0]
    (happened,) = changes(tap(program=OWN_SHARED), tap(program=OWN_SHARED, content=content(config=None)))
    assert to_json(happened, time="t")["new"] == {"enabled": True}


def test_hostile_names_stay_on_their_line() -> None:
    bad = "\x1b[2Jweb\n<0>keep: forged\u2028"
    seen = tap(holder=process(name=bad), program=replace(FOREIGN, name=bad))
    for one in changes(tap(holder=process(name=bad)), seen):
        assert text(one).isprintable()
        assert json.loads(json.dumps(to_json(one, time="t")))["vm"] == bad


def test_any_two_looks_can_be_compared() -> None:
    """Whatever two looks hold: nothing falls over, every line is one, and comparing a look with itself says nothing."""
    draw = random.Random(3)

    def anything() -> Tap:
        info = draw.choice([None, OWN_STATIC, OWN_SHARED, QEMUS, FOREIGN])
        return tap(
            name=draw.choice(["vnet0", "\n"]),
            ifindex=draw.randrange(3),
            active=draw.randrange(3),
            disabled=draw.randrange(2),
            queues=draw.choice([(), attached_at(draw.randrange(3))]),
            program=info,
            program_id=info.id if info else draw.choice([0, 3]),
            content=draw.choice([None, content(), content(config=None), content(enabled=False)]),
            body_present=draw.random() < 0.5,
            holder=draw.choice([None, process(), process(name=""), replace(process(), args=None)]),
            hold=draw.random() < 0.5,
            unheld=draw.random() < 0.1,
        )

    for _ in range(2000):
        before, after = (inventory(*(anything() for _ in range(draw.randrange(4)))) for _ in range(2))
        for happened in events(before, after).values():
            for one in happened:
                assert text(one).isprintable()
                json.dumps(to_json(one, time="t"))
        assert events(after, after) == {}


def test_the_text_of_what_keep_does() -> None:
    put_back = Event(
        what=What.PUT_BACK,
        vm="web1",
        pid=123,
        tap="vnet0",
        netns=1,
        old=Attached(id=12, kind=Kind.QSTEER),
        new=Attached(id=34, kind=Kind.QSTEER),
        detail="put back, QEMU took it off",
    )
    assert text(put_back) == "web1 (pid 123) vnet0: program 12 -> 34: put back, QEMU took it off"
    assert text(replace(put_back, vm=None, pid=None)).startswith("no VM vnet0: ")
    alone = replace(put_back, what=What.LEFT_ALONE, old=None, new=None, detail="because")
    assert text(alone) == "web1 (pid 123) vnet0: left alone: because"
    assert str(Queues(active=1, attached=4)) == "1/4"


WEB = tap()
FORGED = tap(name="tap9", ifindex=9, holder=process(200), queues=(queue(200, "tap9"),))
BY_NAME = Selection(vms=("web1",))


def test_a_name_of_two_vms_means_the_one_that_is_known() -> None:
    assert choose((WEB,), BY_NAME, (), own_netns=1) == ((WEB,), ())
    both, doubts = choose((WEB, FORGED), BY_NAME, (), own_netns=1)
    assert both == () and "vnet0 of pid 100" in doubts[0] and "tap9 of pid 200" in doubts[0]
    kept, doubts = choose((WEB, FORGED), BY_NAME, {who(WEB)}, own_netns=1)
    assert kept == (WEB,) and "tap9 of pid 200" in doubts[0] and "vnet0" not in doubts[0]
    hot_plugged = tap(name="vnet1", ifindex=5)
    assert choose((WEB, hot_plugged, FORGED), BY_NAME, {who(WEB)}, own_netns=1)[0] == (WEB, hot_plugged)
    assert choose((WEB, FORGED), Selection(vms=("web1",), pids=(200,)), (), own_netns=1) == ((FORGED,), ())
    assert choose((WEB, FORGED), Selection(vms=("web1",), pids=(100, 200)), (), own_netns=1) == ((WEB, FORGED), ())


def test_a_name_that_libvirt_knows() -> None:
    domain = Domain(name="web1", uuid="u", pid=100, interfaces=(), monitor=None, agent=None)
    known = replace(WEB, domain=domain)
    kept, doubts = choose((known, FORGED), BY_NAME, (), own_netns=1)
    assert kept == (known,) and len(doubts) == 1
    assert choose((known, FORGED), BY_NAME, {who(FORGED)}, own_netns=1)[0] == (known,), "who was first does not matter"
    again = replace(FORGED, domain=domain)
    assert choose((known, again), BY_NAME, (), own_netns=1)[0] == ()


def test_a_tap_name_of_two_namespaces() -> None:
    there = tap(netns=2, holder=process(200, "db1"))
    by_tap = Selection(taps=("vnet0",))
    assert choose((WEB, there), by_tap, (), own_netns=3)[0] == ()
    assert choose((WEB, there), by_tap, {who(WEB)}, own_netns=3)[0] == (WEB,)
    assert choose((WEB, there), by_tap, {who(there)}, own_netns=1)[0] == (WEB,), (
        "anybody's namespace may have been first"
    )
    assert choose((WEB, there), Selection(every=True), (), own_netns=1)[0] == (WEB, there)


def test_what_else_makes_a_name_one() -> None:
    """As for ``apply``: with a VM its NICs' ids are its own, with a network namespace its taps' names are."""
    other = tap(name="vnet1", ifindex=5, holder=process(200, "db1"), queues=(queue(200, "vnet1"),))
    assert choose((WEB, other), Selection(nics=("net0",)), (), own_netns=1)[0] == ()
    assert choose((WEB, other), Selection(nics=("net0",)), {who(WEB)}, own_netns=1)[0] == (WEB,)
    assert choose((WEB, other), Selection(nics=("net0",), vms=("web1", "db1")), (), own_netns=1)[0] == (WEB, other)
    there = tap(netns=2, holder=process(200, "db1"))
    assert choose((WEB, there), Selection(taps=("vnet0",), namespaces=("1", "2")), (), own_netns=1)[0] == (WEB, there)


def test_a_tap_that_nobody_has_open_is_not_cared_for() -> None:
    assert choose((tap(unheld=True, holder=None, queues=()),), Selection(taps=("vnet0",)), (), own_netns=1) == ((), ())


def test_what_is_not_there_yet() -> None:
    wanted = Selection(vms=("web1", "db\n1"), taps=("vnet0",), pids=(7,))
    assert missing((WEB,), wanted) == ("--vm db?1", "--pid 7")
    assert missing((), Selection(every=True)) == ("a VM with a multi-queue tap",)
    assert missing((WEB,), Selection(every=True)) == ()


def put_back(repairs: Repairs, times: int, start: float, step: float) -> list[bool]:
    done = []
    for number in range(times):
        now = start + number * step
        done.append(repairs.may_put_back((1, 4), now))
        if done[-1]:
            repairs.count((1, 4), now)
    return done


def test_a_fight_ends_and_begins_anew() -> None:
    repairs = Repairs()
    assert put_back(repairs, 6, 1000.0, 1.0) == [True] * 5 + [False]
    assert repairs.fighting((1, 4), 1006.0) and repairs.ends((1, 4)) == 1305.0
    assert not repairs.fighting((1, 5), 1006.0)
    assert not repairs.fighting((1, 4), 1305.0) and repairs.ends((1, 4)) is None
    assert put_back(repairs, 6, 1305.0, 1.0) == [True] * 5 + [False]


def test_what_is_put_back_now_and_then_is_no_fight() -> None:
    assert all(put_back(Repairs(), 100, 0.0, 12.1))
    assert not all(put_back(Repairs(), 100, 0.0, 11.9))


def test_peace() -> None:
    repairs = Repairs()
    put_back(repairs, 6, 0.0, 1.0)
    repairs.over((1, 4))
    assert not repairs.fighting((1, 4), 6.0)
    assert put_back(repairs, 5, 6.0, 1.0) == [True] * 5


def test_keys() -> None:
    assert key_of(WEB) == (1, 4) and who(WEB) == ((1, 4), (100, 1))
    assert who(tap(holder=None)) == ((1, 4), None)
