# SPDX-License-Identifier: BSD-2-Clause
"""keep, on a host out of thin air: what it remembers, decides, does and says.  plan_apply is the real one."""

import contextlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import config, execute, holds, inventory, keeper, libvirt, programs, readings, settings
from qsteer import keep as daemon
from qsteer.asking import Askers
from qsteer.errors import BusyError, ConflictError, NotFoundError, PermissionDeniedError, QsteerError
from qsteer.intent import Intent
from qsteer.keeper import Keeper
from qsteer.model import Inventory, Kind, MapsContent, Reading, Source, Tap
from qsteer.notify import Journal, Priority, Service, write_line
from qsteer.plan import Attach, AttachHeld, Detach, Plan, RefillBody, Static, Wanted, plan_apply
from qsteer.rss import RssConfig
from qsteer.selection import Selection
from qsteer.signals import Wake
from qsteer.upkeep import Memory, answered, decide, done, failed, remember
from qsteer.watch import Attached, Event, text
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
    process,
    program,
    queue,
    tap,
)

AUTO = Wanted()
ALL = Selection(every=True)
PAUSE = Wanted(allow_pause=True)
OTHER = RssConfig(types=CONFIG.types, key=bytes(40), table=(1, 0))
FROM_STATE = program(Kind.QSTEER, id=11, source=Source.DEVICE_STATE)
ASKED = Reading(source=Source.DEVICE_STATE, config=CONFIG)
NOT_ASKED = replace(ASKED, config=None)
SETTLED = Memory(settled=True)


def plan_of(memory: Memory, seen: Tap, wanted: Wanted = AUTO) -> Plan | None:
    """What keep would carry out, None for nothing."""
    decision = decide(remember(memory, seen, wanted), seen, wanted)
    return plan_apply(*decision.plan) if decision.plan else None


def test_at_first_sight_it_is_as_apply() -> None:
    made = plan_of(Memory(), tap())
    assert made and isinstance(made.steps[0], Attach) and made.source is Source.STATIC
    assert plan_of(Memory(), tap(program=OWN_STATIC)) is None
    made = plan_of(Memory(), tap(program=OWN_STATIC), Wanted(source=Source.STATIC, static=Static(table=(0, 1))))
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == replace(CONFIG, table=(0, 1))


def test_what_is_put_back_is_the_very_same() -> None:
    memory = remember(SETTLED, tap(program=OWN_STATIC, content=content(config=OTHER)), AUTO)
    for wanted in (AUTO, Wanted(source=Source.STATIC, static=Static(table=(3, 2)))):
        made = plan_of(memory, tap(), wanted)
        assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == OTHER


def test_what_was_forced_is_put_back_by_force() -> None:
    memory = remember(SETTLED, tap(program=OWN_STATIC, nic=RSS_NIC), AUTO)
    made = plan_of(memory, tap(nic=RSS_NIC))
    assert made and isinstance(made.steps[0], Attach)


def test_an_applied_table_is_the_new_thing_to_keep() -> None:
    wanted = Wanted(source=Source.STATIC, static=Static(table=(0, 1)))
    operators = tap(program=program(Kind.QSTEER, id=12), content=content(config=OTHER))
    memory = replace(SETTLED, static=CONFIG, program_id=7)
    assert plan_of(memory, operators, wanted) is None
    made = plan_of(remember(memory, operators, wanted), tap(), wanted)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == OTHER


def test_what_qemu_writes_into_maps_is_qemus_to_attach() -> None:
    """After a reset the maps hold the table of before it."""
    steered = tap(nic=RSS_NIC, program=OWN_SHARED, held=held(OWN_SHARED))
    memory = remember(replace(SETTLED, static=OTHER), steered, AUTO)
    assert memory.static is None
    for wanted in (AUTO, Wanted(source=Source.SHARED_MAPS)):
        made = plan_of(memory, tap(nic=RSS_NIC, held=held(OWN_SHARED)), wanted)
        assert made and (made.steps, made.result) == ((), "ready")


def test_the_operators_table_outlives_the_guests() -> None:
    """Where a table of one's own is wanted, what QEMU attaches meanwhile does not make keep forget the key."""
    wanted = Wanted(source=Source.STATIC, replace=True)
    memory = remember(replace(SETTLED, static=OTHER, program_id=7), tap(program=QEMUS, held=held(QEMUS)), wanted)
    made = plan_of(memory, tap(program=QEMUS, held=held(QEMUS)), wanted)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == OTHER


def test_qemus_own_program_stays() -> None:
    guests = tap(nic=RSS_NIC, program=QEMUS, held=held(QEMUS))
    for memory in (SETTLED, replace(SETTLED, static=OTHER, program_id=7)):
        for wanted in (AUTO, Wanted(replace=True)):
            made = plan_of(memory, guests, wanted)
            assert made and made.steps == () and made.source is Source.QEMU_MAPS


def test_a_foreign_program_stays_unless_told() -> None:
    memory = replace(SETTLED, static=OTHER, program_id=7)
    with pytest.raises(ConflictError, match="lb_steer"):
        plan_of(memory, tap(program=FOREIGN))
    made = plan_of(memory, tap(program=FOREIGN), Wanted(replace=True))
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == OTHER


def test_a_lost_body_is_loaded_again() -> None:
    made = plan_of(SETTLED, tap(program=OWN_STATIC, body_present=False, content=content(config=OTHER)))
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == OTHER
    made = plan_of(SETTLED, tap(program=OWN_SHARED, body_present=False, held=held(OWN_SHARED)))
    assert made and made.steps == (RefillBody(),)
    made = plan_of(SETTLED, tap(program=FROM_STATE, nic=RSS_VHOST_NIC, body_present=False), PAUSE)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].source is Source.DEVICE_STATE


def test_a_guest_is_asked_before_anything_is_attached() -> None:
    seen = tap(nic=RSS_VHOST_NIC)
    decision = decide(Memory(), seen, PAUSE)
    assert decision.plan is None and decision.ask == (seen, PAUSE)
    memory = answered(Memory(), replace(seen, reading=ASKED))
    made = plan_of(memory, seen, PAUSE)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].source is Source.DEVICE_STATE
    memory = failed(Memory(), "it sulks")
    with pytest.raises(QsteerError, match="it sulks"):
        plan_of(memory, seen, PAUSE)


def test_the_last_reading_comes_back_until_the_guest_was_asked_again() -> None:
    gone = tap(nic=RSS_VHOST_NIC)
    memory = remember(SETTLED, tap(nic=RSS_VHOST_NIC, program=FROM_STATE), PAUSE)
    decision = decide(memory, gone, PAUSE)
    assert decision.ask
    made = plan_of(memory, gone, PAUSE)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].config == CONFIG
    memory = answered(memory, replace(gone, reading=NOT_ASKED))
    made = plan_of(memory, gone, PAUSE)
    assert made and made.steps == ()


def test_a_guest_that_turned_rss_off() -> None:
    seen = tap(nic=RSS_VHOST_NIC, program=FROM_STATE)
    memory = answered(remember(SETTLED, seen, PAUSE), replace(seen, reading=NOT_ASKED))
    made = plan_of(memory, seen, PAUSE)
    assert made and made.steps == (Detach(),)


def test_what_the_operator_had_read_is_followed_whatever_keep_was_told() -> None:
    seen = tap(nic=RSS_VHOST_NIC, program=FROM_STATE)
    wanted = Wanted(source=Source.STATIC, static=Static(table=(0, 1)), allow_pause=True)
    memory = remember(SETTLED, seen, wanted)
    decision = decide(memory, seen, wanted)
    assert decision.ask and decision.ask[1].source is Source.DEVICE_STATE
    assert decide(memory, seen, replace(wanted, allow_pause=False)).ask is None
    made = plan_of(memory, seen, wanted)
    assert made and made.steps == ()
    made = plan_of(memory, tap(nic=RSS_VHOST_NIC), wanted)
    assert made and isinstance(made.steps[0], Attach) and made.steps[0].source is Source.DEVICE_STATE


def test_auto_may_ask_by_another_source_than_the_last_time() -> None:
    seen = tap(nic=RSS_VHOST_NIC, program=FROM_STATE)
    decision = decide(remember(SETTLED, seen, PAUSE), seen, PAUSE)
    assert decision.ask and decision.ask[1].source is None


def test_a_reading_of_another_source_is_not_what_is_wanted() -> None:
    seen = tap(nic=RSS_VHOST_NIC, program=FROM_STATE)
    wanted = Wanted(source=Source.GUEST_AGENT)
    decision = decide(remember(Memory(), seen, wanted), seen, wanted)
    assert decision.plan is None and decision.ask == (seen, wanted)


def test_a_failed_question_leaves_what_was_read() -> None:
    memory = replace(SETTLED, reading=ASKED)
    assert failed(memory, "busy").reading == ASKED
    assert answered(memory, tap(unread=("no agent",))).reading == ASKED
    assert answered(memory, tap(reading=NOT_ASKED)).reading == NOT_ASKED


def test_a_nic_that_the_command_line_does_not_tell() -> None:
    """A NIC plugged in later: QEMU is asked first, and what it told stays known."""
    plugged = tap(nic=None)
    assert decide(Memory(), plugged, AUTO).plan is None and decide(Memory(), plugged, AUTO).ask
    memory = answered(Memory(), replace(plugged, nic=RSS_NIC))
    with pytest.raises(QsteerError, match="in software"):
        plan_of(memory, plugged, Wanted(source=Source.STATIC))
    assert plan_of(failed(Memory(), "no QMP socket"), plugged)
    assert plan_of(Memory(), tap(nic=None, holder=None))


def test_what_was_attached_is_known_before_it_is_seen() -> None:
    made = plan_of(Memory(), tap())
    assert made and isinstance(made.steps[0], Attach)
    memory = done(Memory(), made, 34)
    assert (memory.program_id, memory.settled, memory.static) == (34, True, made.steps[0].config)


class Host:
    """Taps that plans change, and QEMUs that undo it.  ``fail`` is raised instead, once per entry."""

    def __init__(self, *taps: Tap) -> None:
        self.taps = {found.name: found for found in taps}
        self.next_id = 100
        self.attachments = 0
        self.fail: list[QsteerError] = []
        self.executed: list[Plan] = []
        self.now = 1000.0

    def inventory(self) -> Inventory:
        return Inventory(taps=tuple(self.taps.values()))

    def execute(self, plan: Plan) -> int:
        if self.fail:
            raise self.fail.pop(0)
        before = self.taps[plan.tap.name]
        if before.program_id != plan.tap.program_id:
            raise BusyError("what is attached changed meanwhile")
        self.executed.append(plan)
        for step in plan.steps:
            match step:
                case Attach():
                    self.next_id += 1
                    info = program(Kind.QSTEER, id=self.next_id, source=step.source)
                    self.set(before.name, program=info, content=content(config=step.config), body_present=True)
                case AttachHeld():
                    self.set(before.name, program=replace(OWN_SHARED, id=step.program_id), content=content())
                case Detach():
                    self.take_off(before.name)
                case RefillBody():
                    self.change(before.name, body_present=True)
        return self.taps[before.name].program_id

    def change(self, name: str, **changed: object) -> None:
        self.taps[name] = replace(self.taps[name], **changed)  # type: ignore[arg-type]

    def set(self, name: str, **changed: object) -> None:
        info = changed["program"]
        program_id = info.id if info else 0  # type: ignore[attr-defined]
        self.attachments += 1
        attachment = self.attachments if info else 0
        queues = tuple(replace(one, program_id=program_id, attachment=attachment) for one in self.taps[name].queues)
        self.change(name, program_id=program_id, queues=queues, **changed)

    def take_off(self, name: str = "vnet0") -> None:
        self.set(name, program=None, content=None)


class Guests:
    """Answers for guests; who has none here does not answer until ``release``."""

    def __init__(self) -> None:
        self.answers: list[Reading | QsteerError] = []
        self.asked: list[str] = []
        self._released = threading.Event()

    def complete(self, tap: Tap, wanted: Wanted, manner: readings.Manner) -> Tap:
        self.asked.append(tap.name)
        if not self.answers:
            assert self._released.wait(10)
        if not self.answers:
            return replace(tap, unread=("nobody is there",))
        answer = self.answers.pop(0)
        if isinstance(answer, QsteerError):
            raise answer
        return replace(tap, reading=answer, nic=tap.nic or RSS_VHOST_NIC)

    def release(self) -> None:
        self._released.set()


class Kept:
    """A keeper on a host, and what it said."""

    def __init__(self, host: Host, guests: Guests, selection: Selection, wanted: Wanted, reread_s: float) -> None:
        self.host = host
        self.guests = guests
        self.wanted = wanted
        self.reread: Callable[[], None] = lambda: None
        self.told: list[tuple[Event, Priority]] = []
        self.said: list[str] = []
        self.keeper = Keeper(
            selection,
            lambda tap: self.wanted,
            readings.Manner(),
            reread_s=reread_s,
            reread=lambda: self.reread(),
            tell=lambda event, priority: self.told.append((event, priority)),
            say=lambda line, _: self.said.append(line),
            clock=lambda: self.host.now,
        )

    def look(self) -> list[str]:
        """One round of the loop at the host's time; what was told in it."""
        self.told.clear()
        self.keeper.look(self.host.inventory(), self.host.now)
        self.keeper.turn(self.host.now)
        return self.lines()

    def settle(self) -> list[str]:
        """Rounds until nothing is due any more and nobody is being asked."""
        told = self.look()
        deadline = time.monotonic() + 5
        while self.keeper.wants_look(self.host.now) or self.keeper._askers.busy:
            assert time.monotonic() < deadline
            if self.keeper.wants_look(self.host.now):
                told += self.look()
            else:
                told += self.turn()
        return told

    def turn(self) -> list[str]:
        self.told.clear()
        self.keeper.turn(self.host.now)
        return self.lines()

    def lines(self) -> list[str]:
        return [text(event) for event, _ in self.told]


Make = Callable[..., Kept]


@pytest.fixture
def keep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    monkeypatch.setattr(holds, "RUNTIME", tmp_path)
    guests = Guests()

    def make(*taps: Tap, wanted: Wanted = AUTO, selection: Selection = ALL, reread_s: float = 60.0) -> Kept:
        host = Host(*taps)
        monkeypatch.setattr(execute, "execute", host.execute)
        monkeypatch.setattr(execute, "lock", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(readings, "complete", guests.complete)
        return Kept(host, guests, selection, wanted, reread_s)

    yield make
    guests.release()


WHO = "web1 (pid 100) vnet0: "


def test_a_program_that_was_removed_is_put_back(keep: Make) -> None:
    kept = keep(tap())
    assert kept.settle() == [f"{WHO}program none -> 101: steered, source static"]
    first = kept.host.taps["vnet0"].content
    assert kept.settle() == []
    kept.host.take_off()
    assert kept.settle() == [f"{WHO}program 101 -> 102: put back, QEMU took it off"]
    assert kept.host.taps["vnet0"].content == first
    assert kept.keeper.status() == "keeping 1 taps of 1 VMs"


def test_one_that_is_removed_again_before_the_next_look(keep: Make) -> None:
    kept = keep(tap(program=OWN_STATIC))
    kept.settle()
    kept.host.take_off()
    assert kept.look() == [f"{WHO}program 7 -> 101: put back, QEMU took it off"]
    kept.host.take_off()
    assert kept.look() == [f"{WHO}program 101 -> 102: put back, QEMU took it off"]
    assert kept.told[0][0].old == Attached(id=101, kind=Kind.QSTEER)


def test_a_new_vm_is_taken_up(keep: Make) -> None:
    kept = keep(selection=Selection(vms=("web1",)))
    assert kept.settle() == [] and kept.said == ["waiting for --vm web1"]
    kept.host.taps["vnet0"] = tap()
    assert kept.settle() == [
        "web1 (pid 100): the VM is there",
        f"{WHO}the tap is there, queues 4/4: not steered",
        f"{WHO}program none -> 101: steered, source static",
    ]
    del kept.host.taps["vnet0"]
    assert kept.settle() == ["web1 (pid 100): the VM is gone", f"{WHO}the tap is gone"]
    assert len(kept.said) == 1


def test_others_are_not_touched(keep: Make) -> None:
    other = tap(name="vnet1", ifindex=5, holder=process(200, "db1"), queues=(queue(200, "vnet1"),))
    kept = keep(tap(), other, selection=Selection(vms=("web1",)))
    kept.settle()
    assert [plan.tap.name for plan in kept.host.executed] == ["vnet0"]
    kept.host.change("vnet1", active=2, disabled=2)
    assert kept.settle() == []


def test_a_hold_is_obeyed_until_it_goes(keep: Make) -> None:
    kept = keep(tap(program=OWN_STATIC, content=content(config=OTHER)))
    kept.settle()
    kept.host.take_off()
    kept.host.change("vnet0", hold=True)
    assert kept.settle() == [f"{WHO}program 7 -> none", f"{WHO}held off"]
    assert kept.keeper.status() == "keeping 1 taps of 1 VMs, 1 held off"
    kept.host.change("vnet0", hold=False)
    assert kept.settle()[-1] == f"{WHO}program 7 -> 101: put back, the hold is lifted"
    assert kept.host.taps["vnet0"].content == content(config=OTHER)


def test_a_hold_that_came_after_the_look(keep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(tap())
    monkeypatch.setattr(holds.Hold, "is_of", lambda hold, pid: pid == hold.pid)
    holds.put(holds.Hold(tap="vnet0", pid=100, started=1), netns=1, ifindex=4)
    assert kept.look() == [] and kept.host.executed == []


def test_a_foreign_program_is_told_once_and_left_alone(keep: Make) -> None:
    kept = keep(tap())
    kept.settle()
    mine = kept.host.taps["vnet0"]
    kept.host.set("vnet0", program=FOREIGN, content=None)
    lines = kept.settle()
    assert lines[0] == f'{WHO}program 101 -> foreign 10 "lb_steer"'
    assert lines[1].startswith(f"{WHO}left alone: ") and "--replace" in lines[1] and len(lines) == 2
    assert [priority for _, priority in kept.told] == [Priority.INFO, Priority.WARNING]
    assert kept.settle() == []
    assert kept.keeper.status().endswith("1 left alone")
    kept.host.take_off()
    lines = kept.settle()
    assert lines == [f'{WHO}program 101 -> 102: put back, foreign 10 "lb_steer" was attached in its place']
    assert kept.host.taps["vnet0"].content == mine.content


def test_a_foreign_program_is_displaced_where_that_is_wanted(keep: Make) -> None:
    kept = keep(tap(), wanted=Wanted(replace=True))
    kept.settle()
    kept.host.set("vnet0", program=FOREIGN, content=None)
    assert kept.settle() == [f'{WHO}program foreign 10 "lb_steer" -> 102: put back in place of foreign 10 "lb_steer"']


def test_what_an_operator_applies_stays(keep: Make) -> None:
    kept = keep(tap())
    kept.settle()
    kept.host.set("vnet0", program=program(Kind.QSTEER, id=50), content=content(config=OTHER))
    assert kept.settle() == [f"{WHO}program 101 -> 50"]
    kept.host.take_off()
    kept.settle()
    assert kept.host.taps["vnet0"].content == content(config=OTHER)


def test_a_fight_is_stopped_and_told_once(keep: Make) -> None:
    kept = keep(tap())
    kept.settle()
    for _ in range(5):
        kept.host.now += 1
        kept.host.take_off()
        assert "put back, QEMU took it off" in kept.settle()[0]
    kept.host.now += 1
    kept.host.take_off()
    lines = kept.settle()
    assert lines == [
        f"{WHO}program 106 -> none",
        f"{WHO}program 106 -> none: left alone, this is a fight: put back 5 times within 60 s; again in 300 s",
    ]
    assert kept.keeper.status().endswith("1 left alone")
    kept.host.now += 10
    assert kept.settle() == []
    assert kept.keeper.deadline(kept.host.now) == kept.host.now + 290
    kept.host.now += 290
    assert kept.turn() == [f"{WHO}program 106 -> 107: put back, QEMU took it off"]


def test_a_fight_ends_with_its_tap(keep: Make) -> None:
    kept = keep(tap())
    for _ in range(7):
        kept.settle()
        kept.host.take_off()
    gone = kept.host.taps.pop("vnet0")
    kept.settle()
    kept.host.taps["vnet0"] = gone
    assert "steered, source static" in kept.settle()[-1]
    kept.host.take_off()
    assert "put back" in kept.settle()[0]


def test_what_is_taken_off_in_the_very_moment_is_a_fight_too(keep: Make) -> None:
    kept = keep(tap(program=OWN_STATIC))
    kept.settle()
    kept.host.take_off()
    told = []
    for _ in range(7):
        kept.host.fail = [ConflictError("something else changes it, too")]
        told += kept.look()
        kept.host.now += 2
        kept.host.change("vnet0", active=9 - kept.host.taps["vnet0"].active)
    assert "this is a fight" in told[-1] or "this is a fight" in told[-2]


def test_a_guest_that_turns_rss_on_and_off_fights_nobody(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    for _ in range(7):
        for active, reading in ((4, ASKED), (2, NOT_ASKED)):
            kept.guests.answers = [reading]
            kept.host.change("vnet0", active=active)
            kept.host.now += 1
            kept.settle()
    assert sum(isinstance(step, Attach) for plan in kept.host.executed for step in plan.steps) == 7


def test_a_fight_is_over_when_somebody_applies(keep: Make) -> None:
    kept = keep(tap())
    for _ in range(7):
        kept.settle()
        kept.host.take_off()
    kept.host.set("vnet0", program=program(Kind.QSTEER, id=50), content=content(config=OTHER))
    kept.settle()
    assert kept.keeper.status() == "keeping 1 taps of 1 VMs"
    kept.host.take_off()
    assert "put back" in kept.settle()[0]


def test_what_is_busy_is_tried_again_soon(keep: Make) -> None:
    kept = keep(tap())
    kept.host.fail = [BusyError("another qsteer is changing things")] * 2
    assert kept.look() == []
    assert kept.keeper.deadline(kept.host.now) == pytest.approx(kept.host.now + 0.1)
    kept.host.now += 0.1
    assert kept.look() == []
    kept.host.now += 0.2
    assert kept.look() == [f"{WHO}program none -> 101: steered, source static"]


def test_what_stays_busy_is_told_once(keep: Make) -> None:
    kept = keep(tap())
    kept.host.fail = [BusyError("another qsteer is changing things")] * 20
    told = []
    for _ in range(10):
        told += kept.look()
        kept.host.now += 5.0
    assert told == [f"{WHO}left alone: another qsteer is changing things"]


def test_one_vm_that_fails_does_not_stop_the_others(keep: Make) -> None:
    other = tap(name="vnet1", ifindex=5, holder=process(200, "db1"), queues=(queue(200, "vnet1"),))
    kept = keep(tap(), other)
    kept.host.fail = [PermissionDeniedError("ptrace is denied")]
    assert kept.settle() == [
        f"{WHO}left alone: ptrace is denied",
        "db1 (pid 200) vnet1: program none -> 101: steered, source static",
    ]
    kept.host.fail = [PermissionDeniedError("ptrace is denied")] * 5
    told = []
    for _ in range(4):
        kept.host.now += 60.0
        told += kept.turn()
    assert told == [] and len(kept.host.fail) == 1
    kept.host.fail = []
    kept.host.now += 60.0
    assert kept.turn() == [f"{WHO}program none -> 102: steered, source static"]


def test_what_failed_is_tried_again_when_something_happens(keep: Make) -> None:
    kept = keep(tap())
    kept.host.fail = [PermissionDeniedError("ptrace is denied")]
    kept.settle()
    assert kept.settle() == []
    kept.host.change("vnet0", active=2)
    assert "steered" in kept.settle()[-1]


def test_that_something_vanishes_is_normal(keep: Make) -> None:
    kept = keep(tap())
    kept.host.fail = [NotFoundError("process 100 is gone")]
    assert kept.look() == []
    del kept.host.taps["vnet0"]
    kept.host.now += 0.1
    assert kept.settle() == ["web1 (pid 100): the VM is gone", f"{WHO}the tap is gone"]


def test_a_program_that_went_while_it_was_looked_at(keep: Make) -> None:
    kept = keep(tap(program=OWN_STATIC))
    kept.settle()
    kept.host.change("vnet0", program=None, program_id=88, content=None)
    assert kept.look() == [f"{WHO}program 7 -> 88"]
    assert kept.keeper.wants_look(kept.host.now)
    assert "cannot be looked at" in kept.look()[0]


def test_a_long_first_pass_can_be_interrupted(keep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand new taps must not hide one that lost its program."""
    taps = [
        tap(name=f"vnet{n}", ifindex=n, holder=process(n, f"vm{n}"), queues=(queue(n, f"vnet{n}"),))
        for n in range(1, 11)
    ]
    kept = keep(*taps)
    host, slow = kept.host, kept.keeper
    quick = host.execute

    def execute_slowly(plan: Plan) -> int:
        host.now += 0.2
        return quick(plan)

    monkeypatch.setattr(execute, "execute", execute_slowly)
    slow.look(host.inventory(), host.now)
    assert len(host.executed) == 3
    assert not slow.is_done and slow.deadline(host.now) == host.now
    slow.turn(host.now)
    assert len(host.executed) == 6
    host.taps = dict(reversed(host.taps.items()))
    host.take_off("vnet3")
    slow.look(host.inventory(), host.now)
    assert host.executed[6].tap.name == "vnet3"
    while not slow.is_done:
        slow.turn(host.now)
    assert all(found.program_id for found in host.taps.values()) and len(host.executed) == 11
    slow.look(host.inventory(), host.now)
    assert slow.is_done and len(kept.told) == len(host.executed)


def test_what_is_gone_before_its_turn(keep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(tap(), tap(name="vnet1", ifindex=5))
    monkeypatch.setattr(keeper, "SLICE_S", 0.0)
    kept.keeper.look(kept.host.inventory(), kept.host.now)
    kept.host.taps.clear()
    kept.keeper.look(kept.host.inventory(), kept.host.now)
    monkeypatch.undo()
    kept.keeper.turn(kept.host.now)
    assert kept.keeper.is_done and kept.host.executed == []


def test_a_guest_is_asked_and_followed(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    kept.guests.answers = [replace(ASKED, paused_ms=2.34)]
    assert kept.settle() == [f"{WHO}program none -> 101: steered, source device-state, the VM stood still for 2.3 ms"]
    # The guest speaks: its program is off.  What it asked for last comes back, then what it asks for now.
    kept.guests.answers = [replace(ASKED, config=OTHER)]
    kept.host.now += 5
    kept.host.take_off()
    assert kept.settle() == [
        f"{WHO}program 101 -> 102: put back, QEMU took it off",
        f"{WHO}program 102 -> 103: as the guest asks now, source device-state",
    ]
    assert kept.host.taps["vnet0"].content == content(config=OTHER)
    kept.guests.answers = [NOT_ASKED]
    kept.host.now += 5
    kept.host.take_off()
    assert kept.settle()[-1] == f"{WHO}program 104 -> none: taken off, the guest asks for no RSS, source device-state"
    # Without a signal it is asked again: soon, and then less and less often.
    for pause in (2, 4, 8, 16, 32, 60, 60):
        assert kept.keeper.deadline(kept.host.now) == kept.host.now + pause
        kept.guests.answers = [NOT_ASKED]
        kept.host.now += pause
        assert kept.settle() == []
    kept.guests.answers = [ASKED]
    kept.host.now += 60
    assert kept.settle() == [f"{WHO}program none -> 105: as the guest asks now, source device-state"]


def test_a_guest_that_changes_its_mind_is_no_fight(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    kept.guests.answers = [ASKED]
    kept.settle()
    for number in range(20):
        kept.guests.answers = [replace(ASKED, config=OTHER if number % 2 else CONFIG)]
        kept.host.now += 2
        kept.host.take_off()
        kept.settle()
        assert kept.host.taps["vnet0"].program_id
    told: list[str] = []
    for _ in range(80):
        kept.guests.answers = [ASKED]
        kept.host.now += 0.5
        if kept.host.taps["vnet0"].program_id:
            kept.host.take_off()
        told += kept.settle()
    assert sum("this is a fight" in line for line in told) >= 1, "as often as that is too often"


def test_one_question_at_a_time_for_each_vm(keep: Make) -> None:
    """A QEMU that hangs does not take all who ask."""
    mine = [tap(name=f"vnet{number}", ifindex=10 + number, nic=RSS_VHOST_NIC) for number in range(5)]
    kept = keep(*mine, wanted=PAUSE)
    kept.keeper.look(kept.host.inventory(), kept.host.now)
    kept.keeper.turn(kept.host.now)
    assert len(kept.keeper._askers._open) == 1


def test_a_guest_that_does_not_answer_holds_nobody_up(keep: Make) -> None:
    other = tap(name="vnet1", ifindex=5, holder=process(200, "db1"), queues=(queue(200, "vnet1"),))
    kept = keep(tap(nic=RSS_VHOST_NIC), other, wanted=PAUSE)
    assert kept.look() == ["db1 (pid 200) vnet1: program none -> 101: steered, source static"]
    kept.host.now += 60
    kept.host.take_off("vnet1")
    assert "put back" in kept.look()[0]
    assert kept.guests.asked == ["vnet0"]


def test_queues_that_change_mean_that_the_guest_is_up_to_something(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC, active=1, disabled=3), wanted=PAUSE, reread_s=0)
    kept.guests.answers = [NOT_ASKED]
    kept.settle()
    assert kept.keeper.deadline(kept.host.now) == float("inf")
    kept.guests.answers = [ASKED]
    kept.host.now += 5
    kept.host.change("vnet0", active=4, disabled=0)
    assert kept.settle() == [
        f"{WHO}queues 1/4 -> 4/4",
        f"{WHO}program none -> 101: as the guest asks now, source device-state",
    ]


def test_questions_are_not_asked_in_a_row(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC, program=FROM_STATE), wanted=PAUSE)
    kept.guests.answers = [ASKED] * 10
    kept.settle()
    for _ in range(10):
        kept.host.now += 0.1
        kept.host.take_off()
        kept.settle()
    assert len(kept.guests.asked) == 3


def test_a_guest_that_cannot_be_asked_is_told_once_and_asked_later_and_later(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC, program=FROM_STATE), wanted=PAUSE)
    told, pauses = [], []
    for number in range(10):
        kept.guests.answers = [QsteerError("QEMU sulks")]
        told += kept.settle()
        due = kept.keeper.deadline(kept.host.now)
        pauses.append(due - kept.host.now)
        kept.host.now = due
        assert len(kept.guests.asked) == number + 1
    assert told == [f"{WHO}the guest cannot be asked: QEMU sulks"]
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60, 60]
    kept.guests.answers = [replace(ASKED, config=OTHER)]
    assert kept.settle() == [f"{WHO}program 11 -> 101: as the guest asks now, source device-state"]


def test_a_guest_that_speaks_is_asked_soon_again(keep: Make) -> None:
    """Whatever has failed before; and once more if it speaks while it is being asked."""
    kept = keep(tap(nic=RSS_VHOST_NIC, program=FROM_STATE), wanted=PAUSE)
    for _ in range(5):
        kept.guests.answers = [QsteerError("QEMU sulks")]
        kept.settle()
        kept.host.now += 60
    kept.guests.answers = [QsteerError("QEMU sulks")]
    kept.host.change("vnet0", active=2)
    kept.settle()
    assert kept.keeper.deadline(kept.host.now) == kept.host.now + 1
    kept.host.now += 1
    kept.turn()
    kept.host.change("vnet0", active=4)
    kept.look()
    kept.guests.answers = [ASKED]
    kept.guests.release()
    kept.host.now += 1
    kept.settle()
    assert kept.guests.asked == ["vnet0"] * 8


def test_an_answer_in_vain_is_a_failure(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    kept.guests.release()
    assert "nobody is there" in kept.settle()[0]
    assert kept.keeper.deadline(kept.host.now) == kept.host.now + 1


def test_guests_that_spoke_do_not_wait_for_one_another(keep: Make) -> None:
    others = {"nic": RSS_VHOST_NIC, "program": FROM_STATE}
    kept = keep(tap(**others), tap(name="vnet1", ifindex=5, **others), wanted=PAUSE)
    kept.guests.answers = [ASKED] * 2
    kept.settle()
    kept.host.now += 10
    for name in ("vnet0", "vnet1"):
        kept.host.change(name, active=2)
    kept.guests.answers = [BusyError("rate limit")] * 2
    kept.settle()
    kept.host.now += 1
    kept.guests.answers = [ASKED] * 2
    kept.settle()
    assert len(kept.guests.asked) == 6


def test_a_busy_guest_is_asked_again_before_that_is_told(keep: Make) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    for _ in range(10):
        kept.guests.answers = [BusyError("rate limit")]
        assert kept.settle() == []
        kept.host.now += 2
    kept.guests.answers = [BusyError("rate limit")]
    assert "rate limit" in kept.settle()[0]


def test_many_guests_are_not_all_asked_at_once_by_the_clock(keep: Make) -> None:
    taps = [
        tap(name=f"vnet{n}", ifindex=n, holder=process(n, f"vm{n}"), queues=(queue(n, f"vnet{n}"),), nic=RSS_VHOST_NIC)
        for n in range(1, 6)
    ]
    kept = keep(*taps, wanted=PAUSE)
    kept.guests.answers = [ASKED] * 20
    kept.settle()
    assert len(kept.guests.asked) == 5
    kept.host.now += 60
    for seconds in range(3):
        kept.settle()
        assert len(kept.guests.asked) == 6 + seconds
        kept.host.now += 1


def test_an_answer_of_a_vm_that_is_gone_is_nothing_to_the_next(keep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = keep(tap(nic=RSS_VHOST_NIC), wanted=PAUSE)
    gone = threading.Event()

    def complete(tap: Tap, wanted: Wanted, manner: readings.Manner) -> Tap:
        if tap.holder and tap.holder.started == 1:
            assert gone.wait(10)
            return replace(tap, reading=ASKED)
        raise QsteerError("too early to ask")

    monkeypatch.setattr(readings, "complete", complete)
    kept.look()
    kept.host.change("vnet0", holder=replace(process(), started=2))
    gone.set()
    kept.settle()
    assert kept.host.executed == []


def test_sighup_makes_it_look_at_everything_anew(keep: Make) -> None:
    kept = keep(tap(program=FOREIGN))
    assert len(kept.settle()) == 1
    assert kept.settle() == []
    kept.keeper.reload()
    assert len(kept.settle()) == 1
    kept.host.take_off()
    kept.host.fail = [PermissionDeniedError("ptrace is denied")]
    kept.settle()
    kept.keeper.reload()
    assert "steered" in kept.settle()[0]


def static(*table: int) -> Wanted:
    return Wanted(source=Source.STATIC, static=Static(table=table))


def table_of(kept: Kept) -> tuple[int, ...] | None:
    found = kept.host.taps["vnet0"].content
    return found.config.table if found and found.config else None


def test_another_wish_after_a_reload_is_obeyed(keep: Make) -> None:
    kept = keep(tap(), wanted=static(0, 1))
    kept.settle()
    first = kept.host.taps["vnet0"].content
    kept.reread = lambda: setattr(kept, "wanted", static(3, 2))
    kept.keeper.reload()
    assert kept.settle() == [f"{WHO}program 101 -> 102: steered, source static"]
    second = kept.host.taps["vnet0"].content
    assert first and first.config and second and second.config
    assert (second.config.table, second.config.key) == ((3, 2), first.config.key)
    kept.host.take_off()
    kept.settle()
    assert kept.host.taps["vnet0"].content == second
    # To have no wish any more leaves it as it is.
    kept.reread = lambda: setattr(kept, "wanted", AUTO)
    kept.keeper.reload()
    assert kept.settle() == [] and table_of(kept) == (3, 2)


def test_the_same_wish_after_a_reload_leaves_what_was_applied(keep: Make) -> None:
    kept = keep(tap(), wanted=static(0, 1))
    kept.settle()
    applied = replace(CONFIG, table=(1, 1))
    kept.host.set("vnet0", program=replace(OWN_STATIC, id=77), content=content(config=applied))
    kept.settle()
    kept.keeper.reload()
    assert kept.settle() == [] and table_of(kept) == (1, 1)


def test_a_wish_that_cannot_be_read_again_stays(keep: Make) -> None:
    def broken() -> None:
        raise QsteerError("qsteer.toml:1: nonsense")

    kept = keep(tap(), wanted=static(0, 1))
    kept.settle()
    kept.reread = broken
    kept.keeper.reload()
    assert kept.settle() == [] and table_of(kept) == (0, 1)
    assert kept.said == ["the configuration stays as it was: qsteer.toml:1: nonsense"]


def test_what_is_wanted_may_depend_on_the_nic_that_qemu_tells(keep: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done before that is known, nor is the guest asked."""
    asked: list[Wanted] = []

    def complete(tap: Tap, wanted: Wanted, manner: readings.Manner) -> Tap:
        asked.append(wanted)
        if len(asked) == 1:
            raise BusyError("not yet")
        return replace(tap, nic=RSS_VHOST_NIC, reading=None if wanted.identify else ASKED)

    unknown = replace(static(0, 1), identify=True)
    kept = keep(tap(nic=None))
    monkeypatch.setattr(readings, "complete", complete)
    kept.keeper._wanted = lambda tap: PAUSE if tap.nic else unknown
    kept.settle()
    for _ in range(20):
        kept.host.now += 0.5
        kept.settle()
    assert asked[:3] == [unknown, unknown, PAUSE]
    (plan,) = kept.host.executed
    assert [step.source for step in plan.steps if isinstance(step, Attach)] == [Source.DEVICE_STATE]


def test_a_tap_whose_nic_matters_is_not_left_as_it_is_before_that_is_known() -> None:
    wanted = Wanted(identify=True)
    for seen in (tap(program=OWN_STATIC, nic=None), tap(program=OWN_STATIC)):
        assert decide(Memory(), seen, wanted).ask == (seen, wanted)
        assert decide(Memory(asked=True, settled=True), seen, wanted).ask is None


def test_the_same_name_twice(keep: Make) -> None:
    kept = keep(tap(), selection=Selection(vms=("web1",)))
    kept.settle()
    kept.host.taps["tap9"] = tap(name="tap9", ifindex=9, holder=process(200), queues=(queue(200, "tap9"),))
    kept.settle()
    kept.settle()
    assert [plan.tap.name for plan in kept.host.executed] == ["vnet0"]
    assert len(kept.said) == 1 and "tap9 of pid 200" in kept.said[0]


def test_answers_come_as_they_are_there() -> None:
    first_may_go = threading.Event()

    def ask(tap: Tap, wanted: Wanted) -> Tap:
        if tap.name == "slow":
            assert first_may_go.wait(10)
        if tap.name == "broken":
            raise ZeroDivisionError("a bug")
        return tap

    askers: Askers[str] = Askers(ask, threads=2)
    for name in ("slow", "broken", "quick"):
        askers.ask(name, tap(name=name), AUTO)
    answers = dict(wait_for(askers, 2))
    assert isinstance(answers["broken"], QsteerError) and "a bug" in str(answers["broken"])
    assert isinstance(answers["quick"], Tap) and askers.busy
    first_may_go.set()
    assert [name for name, _ in wait_for(askers, 1)] == ["slow"]
    assert not askers.busy


def test_the_end_does_not_wait_for_ever() -> None:
    stuck = threading.Event()

    def ask(tap: Tap, wanted: Wanted) -> Tap:
        stuck.wait(10)
        return tap

    askers: Askers[int] = Askers(ask, threads=1)
    for number in range(3):
        askers.ask(number, tap(), AUTO)
    began = time.monotonic()
    askers.close(0.05)
    assert time.monotonic() - began < 5
    stuck.set()


def test_the_end_waits_for_an_answer_under_way() -> None:
    under_way, may_go = threading.Event(), threading.Event()
    answered_by: list[str] = []

    def ask(tap: Tap, wanted: Wanted) -> Tap:
        under_way.set()
        may_go.wait(10)
        answered_by.append(tap.name)
        return tap

    askers: Askers[int] = Askers(ask, threads=1)
    askers.ask(1, tap(), AUTO)
    assert under_way.wait(10)
    may_go.set()
    began = time.monotonic()
    askers.close(30)
    assert answered_by and time.monotonic() - began < 20


def wait_for(askers: Askers[str], count: int) -> Sequence[tuple[str, Tap | QsteerError]]:
    found: list[tuple[str, Tap | QsteerError]] = []
    deadline = time.monotonic() + 5
    while len(found) < count:
        assert time.monotonic() < deadline
        found += askers.answers()
    return found


def test_contents_that_say_nothing_are_not_remembered() -> None:
    for nothing in (None, content(config=None), MapsContent(enabled=False, config=CONFIG)):
        assert remember(SETTLED, tap(program=OWN_STATIC, content=nothing), AUTO).static is None


class Script:
    """Signals by a script: each entry is what wait() returns, after what it does to the host.

    What is due in a moment is waited for, as it really is: a look that took its time puts off the next one.
    """

    def __init__(self, *entries: Wake | Callable[[], Wake], moment_s: float = 0.01) -> None:
        self.entries = list(entries)
        self._moment_s = moment_s
        self.deadlines: list[float] = []
        self.watched: list[tuple[object, object, object]] = []
        self.acts = 0

    def __call__(self) -> "Script":
        return self

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def watch(self, *, programs: object, pids: object, netns_pids: object) -> None:
        self.watched.append((programs, pids, netns_pids))

    def acted(self) -> None:
        self.acts += 1

    def wait(self, deadline: float) -> Wake:
        left = deadline - time.monotonic()
        if 0 < left < self._moment_s:
            time.sleep(left)
            return Wake.DEADLINE
        self.deadlines.append(left)
        entry = self.entries.pop(0)
        return entry if isinstance(entry, Wake) else entry()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    """A host that the whole of keep and monitor run on."""
    host = Host(tap())
    monkeypatch.setattr(holds, "RUNTIME", tmp_path)
    # Again or for the first time: what may be taken over is inventory's business.
    monkeypatch.setattr(inventory, "fetch", lambda: host.inventory())
    monkeypatch.setattr(inventory, "fetch_again", lambda before: inventory.fetch())
    monkeypatch.setattr(execute, "execute", host.execute)
    monkeypatch.setattr(execute, "lock", lambda _: contextlib.nullcontext())
    return host


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[[], list[str]]]:
    """What systemd is told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def told() -> list[str]:
            found = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.append(listener.recv(4096).decode())
            return found

        yield told


def run_keep(monkeypatch: pytest.MonkeyPatch, script: Script, *, json: bool = False, quiet: bool = False) -> int:
    monkeypatch.setattr(daemon, "Signals", script)
    monkeypatch.setenv(config.VARIABLE, "/nonexistent")
    wanted = Intent(settings.Settings())
    return daemon.main_keep(Selection(vms=("web1",)), wanted, readings.Manner(), json=json, quiet=quiet)


def test_what_keep_does_itself_is_no_state_to_compare_with(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU may take a program off before the next look, and all be as at the last one."""
    script = Script(Wake.CHANGED, Wake.STOP)
    assert run_keep(monkeypatch, script) == 0
    assert (len(host.executed), script.acts) == (1, 1)


def test_a_life_of_keep(
    host: Host,
    service: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told: list[list[str]] = []

    def take_off() -> Wake:
        told.append(service())
        host.take_off()
        return Wake.CHANGED

    def hang_up() -> Wake:
        told.append(service())
        return Wake.RELOAD

    quiet = Wake.DEADLINE
    script = Script(Wake.CHANGED, Wake.CHANGED, take_off, quiet, Wake.CHANGED, hang_up, quiet, Wake.STOP)
    assert run_keep(monkeypatch, script, json=True) == 0
    assert "NOTIFY_SOCKET" not in os.environ
    assert told[0] == ["READY=1\nSTATUS=keeping 1 taps of 1 VMs"]
    reloading, ready, stopping = service()
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", reloading)
    assert (ready.split("\n")[0], stopping) == ("READY=1", "STOPPING=1")
    out, err = capfd.readouterr()
    assert err.splitlines() == [
        f"keep: {WHO}program none -> 101: steered, source static",
        f"keep: {WHO}program 101 -> 102: put back, QEMU took it off",
    ]
    events = [json.loads(line) for line in out.splitlines()]
    assert [one["event"] for one in events] == ["steered", "put-back"]
    assert {one["schema"] for one in events} == {"qsteer.monitor/1"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", events[0]["time"])
    assert script.watched[-1] == ({102}, {100}, (100,))
    assert host.taps["vnet0"].program_id == 102


def test_sighup_is_passed_on(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    host.set("vnet0", program=FOREIGN, content=None)
    run_keep(monkeypatch, Script(Wake.CHANGED, Wake.RELOAD, Wake.DEADLINE, Wake.STOP))
    assert capfd.readouterr().err.count("left alone") == 2


def test_it_is_ready_when_all_is_done(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    ready: list[int] = []
    host.taps |= {f"vnet{n}": tap(name=f"vnet{n}", ifindex=10 + n) for n in range(1, 4)}
    slow = host.execute

    def execute_slowly(plan: Plan) -> int:
        time.sleep(0.002)
        return slow(plan)

    monkeypatch.setattr(execute, "execute", execute_slowly)
    monkeypatch.setattr(keeper, "SLICE_S", 0.001)
    monkeypatch.setattr(Service, "ready", lambda *_: ready.append(len(host.executed)))
    run_keep(monkeypatch, Script(*[Wake.DEADLINE] * 100, Wake.STOP))
    assert ready == [4]


def test_it_is_not_ready_again_before_it_has_looked(
    host: Host, service: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look_slowly() -> Inventory:
        time.sleep(0.05)
        return host.inventory()

    def ask() -> Wake:
        told.extend(service())
        return Wake.STOP

    told: list[str] = []
    monkeypatch.setattr(inventory, "fetch", look_slowly)
    run_keep(monkeypatch, Script(Wake.RELOAD, ask))
    assert [one.split("=")[0] for one in told] == ["READY", "RELOADING"]


def test_it_looks_now_and_then_without_a_signal(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(daemon, "LOOK_AGAIN_S", 0.0)
    monkeypatch.setattr(daemon, "IDLE_SHARE", 0)

    def take_off() -> Wake:
        host.take_off()
        return Wake.DEADLINE

    run_keep(monkeypatch, Script(Wake.CHANGED, Wake.CHANGED, take_off, Wake.DEADLINE, Wake.STOP))
    assert "put back" in capfd.readouterr().err


def test_quiet(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    host.set("vnet0", program=FOREIGN, content=None)
    assert run_keep(monkeypatch, Script(Wake.CHANGED, Wake.STOP), quiet=True) == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"keep: {WHO}left alone: ")


def test_monitor_changes_nothing(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def take_off() -> Wake:
        host.take_off()
        return Wake.CHANGED

    for as_json in (False, True):
        host.set("vnet0", program=OWN_STATIC, content=content())
        script = Script(Wake.CHANGED, take_off, Wake.DEADLINE, Wake.RELOAD, Wake.STOP)
        monkeypatch.setattr(daemon, "Signals", script)
        assert daemon.main_monitor(Selection(vms=("web1", "db1")), json=as_json) == 0
        assert script.acts == 0
        out, err = capfd.readouterr()
        assert err == "monitor: waiting for --vm db1\n"
        (line,) = out.splitlines()
        if as_json:
            assert json.loads(line)["event"] == "detached"
        else:
            assert re.fullmatch(r"\S+Z web1 \(pid 100\) vnet0: program 7 -> none", line)
    assert host.executed == []


def test_monitor_of_all(host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def another() -> Wake:
        host.taps["vnet1"] = tap(name="vnet1", ifindex=5, holder=None)
        return Wake.CHANGED

    monkeypatch.setattr(daemon, "Signals", Script(Wake.CHANGED, another, Wake.STOP))
    assert daemon.main_monitor(Selection()) == 0
    assert "no VM vnet1: the tap is there" in capfd.readouterr().out


def test_a_host_that_cannot_be_looked_at(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """At first that is the end; later it is told, and tried again."""

    def fail() -> Inventory:
        raise PermissionDeniedError("no right to look")

    def no_more() -> Wake:
        monkeypatch.setattr(inventory, "fetch", fail)
        return Wake.CHANGED

    script = Script(Wake.CHANGED, no_more, Wake.DEADLINE, Wake.STOP)
    assert run_keep(monkeypatch, script) == 0
    assert "keep: cannot look: no right to look" in capfd.readouterr().err
    assert 0.5 < script.deadlines[-1] <= daemon.FAILED_S
    with pytest.raises(PermissionDeniedError):
        run_keep(monkeypatch, Script(Wake.STOP))


def test_a_storm_of_signals_does_not_keep_a_core_busy(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []

    def look_slowly() -> Inventory:
        looks.append(time.monotonic())
        while time.monotonic() < looks[-1] + 0.02:
            pass
        return host.inventory()

    monkeypatch.setattr(inventory, "fetch", look_slowly)
    script = Script(*[Wake.CHANGED] * 50, Wake.STOP, moment_s=0.0)
    monkeypatch.setattr(daemon, "Signals", script)
    assert daemon.main_monitor(Selection()) == 0
    assert len(looks) <= 2
    assert all(deadline > 0 for deadline in script.deadlines)


def test_a_shared_body_that_goes_is_seen(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No tap changes with it, so that no signal comes."""
    monkeypatch.setattr(daemon, "TICK_S", 0.0)
    monkeypatch.setattr(programs, "body_present", lambda _: host.taps["vnet0"].body_present)
    host.set("vnet0", program=replace(OWN_STATIC, bodies_id=5), content=content())

    def lose() -> Wake:
        host.change("vnet0", body_present=False)
        return Wake.DEADLINE

    assert run_keep(monkeypatch, Script(Wake.CHANGED, Wake.DEADLINE, lose, Wake.DEADLINE, Wake.STOP)) == 0
    assert capfd.readouterr().err.splitlines() == [f"keep: {WHO}program 7 -> 101: mended, its shared body was gone"]


def test_the_watchdog(monkeypatch: pytest.MonkeyPatch, host: Host, service: Callable[[], list[str]]) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    script = Script(Wake.CHANGED, Wake.DEADLINE, Wake.STOP)
    assert run_keep(monkeypatch, script) == 0
    assert "WATCHDOG=1" in service() and "WATCHDOG_USEC" not in os.environ
    assert all(deadline <= 0.2 for deadline in script.deadlines)


@pytest.mark.parametrize(
    ("environment", "every_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "3000000"}, 1.5),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "-5"}, None),
        ({"WATCHDOG_USEC": "nonsense"}, None),
    ],
)
def test_when_the_watchdog_wants_a_word(environment: dict[str, str], every_s: float | None) -> None:
    assert Service(environment).alive_every_s == every_s


def test_an_abstract_socket() -> None:
    name = f"qsteer-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(f"\0{name}")
        listener.settimeout(5)
        Service({"NOTIFY_SOCKET": f"@{name}"}).stopping()
        assert listener.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize(
    "address", ["", "/nowhere/at/all", "vsock:2:1234", "@qsteer-nobody", "relative", "/" + "x" * 200]
)
def test_a_service_manager_that_is_not_there(address: str) -> None:
    service = Service({"NOTIFY_SOCKET": address})
    service.ready("fine")
    service.alive()


def test_a_reader_that_is_slow_is_not_waited_for() -> None:
    reader, writer = os.pipe()
    for _ in range(100):
        write_line("x" * 1000, writer)
    assert os.read(reader, 1001) == b"x" * 1000 + b"\n"
    os.close(reader)
    write_line("to nobody", writer)
    os.close(writer)


def test_a_journal_gets_priorities(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    found = os.fstat(writer)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    Journal("keep", fd=writer).say("it is so", Priority.WARNING)
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")
    Journal("keep", fd=writer).say("and so", Priority.WARNING)
    Journal("keep", fd=writer, least=Priority.WARNING).say("and not so", Priority.NOTICE)
    assert os.read(reader, 1000) == b"<4>keep: it is so\nkeep: and so\n"
    os.close(reader)
    Journal("keep", fd=writer).say("to nobody")
    os.close(writer)
    Journal("keep", fd=writer).say("to nobody at all")


def test_what_libvirt_writes_is_seen_at_the_next_tick(
    host: Host, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A policy that changes is no change of any tap: libvirt's directory tells of it, and everything is looked at."""
    written = [1]
    looks = []

    def look() -> Inventory:
        looks.append(written[0])
        return host.inventory()

    def write() -> Wake:
        written[0] += 1
        return Wake.DEADLINE

    monkeypatch.setattr(daemon, "TICK_S", 0.0)
    monkeypatch.setattr(daemon, "LIBVIRT_S", 0.0)
    monkeypatch.setattr(daemon, "LIBVIRT_SHARE", 0)
    monkeypatch.setattr(libvirt, "changed_at", lambda: written[0])
    monkeypatch.setattr(inventory, "fetch", look)
    monkeypatch.setattr(inventory, "fetch_again", lambda before: host.inventory())
    run_keep(monkeypatch, Script(Wake.CHANGED, Wake.DEADLINE, write, Wake.DEADLINE, Wake.DEADLINE, Wake.STOP))
    assert looks == [1, 2]
