# SPDX-License-Identifier: BSD-2-Clause
"""What changed on a host between two looks at it, which taps are meant, and when a repair has become a fight.  Pure.

``monitor`` prints the events, ``keep`` acts on them and adds its own.
"""

import enum
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from qsteer.errors import printable
from qsteer.model import Inventory, Kind, MapsContent, Process, Tap
from qsteer.render import Json, config_json
from qsteer.selection import Selection

SCHEMA = "qsteer.monitor/1"

Key = tuple[int, int]
"""A tap: its network namespace's inode number and its index there."""
Vm = tuple[int, int]
"""A process: its pid, and when it started (clock ticks after boot)."""
Who = tuple[Key, Vm | None]
"""A tap in the hands of one process."""

_SHOWN_MAX = 8
"""Candidates that a message names."""


class What(enum.StrEnum):
    """What happened: the first group to the host, the second by ``keep``."""

    VM_APPEARED = "vm-appeared"
    VM_GONE = "vm-gone"
    TAP_APPEARED = "tap-appeared"
    TAP_GONE = "tap-gone"
    ATTACHED = "attached"
    DETACHED = "detached"
    REPLACED = "replaced"
    ATTACHED_AGAIN = "attached-again"
    QUEUES = "queues"
    CONFIGURATION = "configuration"
    BODY_GONE = "body-gone"
    BODY_BACK = "body-back"
    HELD = "held"
    HOLD_LIFTED = "hold-lifted"

    STEERED = "steered"
    PUT_BACK = "put-back"
    CORRECTED = "corrected"
    TAKEN_OFF = "taken-off"
    MENDED = "mended"
    LEFT_ALONE = "left-alone"
    UNREAD = "unread"
    FIGHT = "fight"


PROGRAM_CHANGES = frozenset(
    {What.ATTACHED, What.DETACHED, What.REPLACED, What.ATTACHED_AGAIN, What.CONFIGURATION, What.BODY_GONE}
)
"""Those that ``keep`` tells in one line with what it did about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attached:
    """The program on a tap; ``kind`` is None where looking at it takes a right that is missing.

    ``id`` is 0 for in-kernel RSS, whose ``kind`` is QSTEER or FOREIGN.
    """

    id: int
    kind: Kind | None
    name: str = ""

    def __str__(self) -> str:
        if not self.id:
            return "in-kernel RSS" if self.kind is Kind.QSTEER else f"{self.kind} in-kernel RSS"
        if self.kind is Kind.QSTEER or not self.kind:
            return str(self.id)
        return f'{self.kind} {self.id} "{self.name}"' if self.name else f"{self.kind} {self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Queues:
    """How many queues the guest uses, of how many that some process has."""

    active: int
    attached: int

    def __str__(self) -> str:
        return f"{self.active}/{self.attached}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change.  ``old`` and ``new`` are of the type that goes with ``what``; None is nothing, or unknown.

    ``vm`` is the VM's name, ``pid`` its process; ``tap`` and ``netns`` (an inode number) are None where a VM is all.
    """

    what: What
    vm: str | None
    pid: int | None
    tap: str | None = None
    netns: int | None = None
    old: Attached | Queues | MapsContent | None = None
    new: Attached | Queues | MapsContent | None = None
    detail: str = ""


def key_of(tap: Tap) -> Key:
    """What tells a tap from any other, whatever their names."""
    return tap.netns, tap.ifindex


def vm_of(process: Process) -> Vm:
    """What tells a process from a later one with its pid."""
    return process.pid, process.started


def who(tap: Tap) -> Who:
    """What tells a tap of one VM from the same tap of a later one."""
    return key_of(tap), vm_of(tap.holder) if tap.holder else None


def event(
    what: What,
    tap: Tap,
    *,
    old: Attached | Queues | MapsContent | None = None,
    new: Attached | Queues | MapsContent | None = None,
    detail: str = "",
) -> Event:
    """Something that happened to a tap."""
    return Event(
        what=what,
        vm=tap.vm_name,
        pid=tap.holder.pid if tap.holder else None,
        tap=tap.name,
        netns=tap.netns,
        old=old,
        new=new,
        detail=detail,
    )


def attached(tap: Tap) -> Attached | None:
    """What steers a tap, as events name it."""
    if not tap.program_id:
        return Attached(id=0, kind=tap.steering.kind) if tap.steering else None
    program = tap.program
    return Attached(id=tap.program_id, kind=program.kind if program else None, name=program.name if program else "")


def events(before: Inventory, after: Inventory) -> dict[Key | None, tuple[Event, ...]]:
    """What changed, by tap; None is the key of what happened to whole VMs."""
    was, now = {key_of(tap): tap for tap in before.taps}, {key_of(tap): tap for tap in after.taps}
    found: dict[Key | None, tuple[Event, ...]] = {None: tuple(_of_vms(before, after))}
    for key in (*was, *(key for key in now if key not in was)):
        happened = tuple(_of_tap(was.get(key), now.get(key)))
        if happened:
            found[key] = happened
    return {key: happened for key, happened in found.items() if happened}


def _of_vms(before: Inventory, after: Inventory) -> Iterator[Event]:
    was, now = dict(_vms(before)), dict(_vms(after))
    for vm in was.keys() - now.keys():
        yield Event(what=What.VM_GONE, vm=was[vm], pid=vm[0])
    for vm in now.keys() - was.keys():
        yield Event(what=What.VM_APPEARED, vm=now[vm], pid=vm[0])


def _vms(inventory: Inventory) -> Iterator[tuple[Vm, str | None]]:
    for unsteerable in inventory.unsteerable:
        vm, domain = unsteerable.vm, unsteerable.domain
        yield vm_of(vm), domain.name if domain else vm.args.name if vm.args else None
    for tap in inventory.taps:
        if tap.vm:
            yield vm_of(tap.vm), tap.vm_name


def _of_tap(was: Tap | None, now: Tap | None) -> Iterator[Event]:
    if not was or not now:
        if now:
            queues = Queues(active=now.active, attached=now.attached)
            by = f"program {attached(now)}" if now.program_id else attached(now)
            steered = f"steered by {by}" if by else "not steered"
            yield event(What.TAP_APPEARED, now, new=queues, detail=steered)
        elif was:
            yield event(What.TAP_GONE, was)
        return
    if (was.active, was.attached) != (now.active, now.attached):
        old, new = (Queues(active=tap.active, attached=tap.attached) for tap in (was, now))
        yield event(What.QUEUES, now, old=old, new=new)
    yield from _of_program(was, now)
    if was.hold != now.hold:
        yield event(What.HELD if now.hold else What.HOLD_LIFTED, now)


def _of_program(was: Tap, now: Tap) -> Iterator[Event]:
    old, new = was.steering, now.steering
    if was.program_id != now.program_id or bool(old) != bool(new):
        what = What.REPLACED if old and new else What.ATTACHED
        yield event(what if new else What.DETACHED, now, old=attached(was), new=attached(now))
        return
    if not now.program_id:
        yield from _of_rss(was, now)
        return
    # QEMU attaches its program after each RSS command of the guest.
    again = attachment(was) and attachment(was) != attachment(now)
    if now.content and was.content and was.content != now.content:
        detail = f"the guest set {_difference(was.content, now.content)}"
        yield event(What.CONFIGURATION, now, old=was.content, new=now.content, detail=detail)
    elif again:
        yield event(What.ATTACHED_AGAIN, now, old=attached(was), new=attached(now), detail="the guest set RSS")
    if was.body_present != now.body_present:
        what = What.BODY_BACK if now.body_present else What.BODY_GONE
        yield event(what, now, old=attached(was), new=attached(now))


def _of_rss(was: Tap, now: Tap) -> Iterator[Event]:
    """Of in-kernel RSS, that is there before and after."""
    if was.steering and now.steering and was.vnet_hash != now.vnet_hash:
        old, new = (MapsContent(enabled=True, config=one.config) for one in (was.steering, now.steering))
        detail = f"somebody set {_difference(old, new)}" if now.steering.kind is not Kind.QSTEER else ""
        yield event(What.CONFIGURATION, now, old=old, new=new, detail=detail or _difference(old, new))


def attachment(tap: Tap) -> int:
    """Which attachment of a program this is; 0 for none."""
    return tap.queues[0].attachment if tap.queues else 0


def _difference(old: MapsContent, new: MapsContent) -> str:
    """What of a configuration is another one, in words."""
    if old.enabled != new.enabled or not new.config or not old.config:
        return "RSS anew" if new.enabled and new.config else "RSS off"
    parts = [
        name
        for name, was, now in (
            ("types", old.config.types, new.config.types),
            ("key", old.config.key, new.config.key),
            ("table", old.config.table, new.config.table),
            ("unclassified queue", old.config.unclassified_queue, new.config.unclassified_queue),
        )
        if was != now
    ]
    return ", ".join(parts) or "RSS anew"


_IN_WORDS = {
    What.VM_APPEARED: "the VM is there",
    What.VM_GONE: "the VM is gone",
    What.TAP_APPEARED: "the tap is there",
    What.TAP_GONE: "the tap is gone",
    What.BODY_GONE: "the shared body is gone",
    What.BODY_BACK: "the shared body is back",
    What.HELD: "held off",
    What.HOLD_LIFTED: "the hold is lifted",
    What.LEFT_ALONE: "left alone",
    What.UNREAD: "the guest cannot be asked",
    What.FIGHT: "left alone, this is a fight",
    What.CONFIGURATION: "configuration",
}


def text(told: Event) -> str:
    """One line: who, the tap, old -> new, why."""
    vm = told.vm or ("a VM without a name" if told.tap is None else "no VM")
    who = f"{vm} (pid {told.pid})" if told.pid else vm
    parts = [f"{who} {told.tap}" if told.tap else who]
    if isinstance(told.old, Attached) or isinstance(told.new, Attached):
        parts.append(_steers(told.old, told.new))
    elif isinstance(told.old, Queues):
        parts.append(f"queues {told.old} -> {told.new}")
    elif isinstance(told.new, Queues):
        parts.append(f"{_IN_WORDS[told.what]}, queues {told.new}")
    if told.what in _IN_WORDS and not isinstance(told.new, Queues):
        parts.append(_IN_WORDS[told.what])
    if told.detail:
        parts.append(told.detail)
    return printable(": ".join(parts))


def _steers(old: object, new: object) -> str:
    """What steered, and what does: ``program 1 -> 2``, or with in-kernel RSS ``program 1 -> in-kernel RSS``."""
    if all(not isinstance(side, Attached) or side.id for side in (old, new)):
        return f"program {old or 'none'} -> {new or 'none'}"
    sides = (
        f"program {side}" if isinstance(side, Attached) and side.id else str(side or "nothing") for side in (old, new)
    )
    return " -> ".join(sides)


def to_json(told: Event, *, time: str) -> Json:
    """One object of ``qsteer.monitor/1``; ``time`` is ISO 8601, in UTC."""
    return {
        "schema": SCHEMA,
        "time": time,
        "event": told.what,
        "vm": told.vm,
        "pid": told.pid,
        "tap": told.tap,
        "netns": told.netns,
        "old": _side(told.old),
        "new": _side(told.new),
        "detail": told.detail,
    }


def _side(side: Attached | Queues | MapsContent | None) -> Json | None:
    match side:
        case Attached():
            return {"program": side.id or None, "kind": side.kind}
        case Queues():
            return {"active": side.active, "attached": side.attached}
        case MapsContent():
            return {"enabled": side.enabled, **(config_json(side.config) if side.config else {})}
    return None


def choose(
    taps: Iterable[Tap], selection: Selection, known: Collection[Who], *, own_netns: int
) -> tuple[tuple[Tap, ...], tuple[str, ...]]:
    """The taps that a daemon cares for, and what it has to say about those that it does not.

    Anybody may give a process or a tap of their own any name, and be there first.  So a name of several means the one
    that libvirt knows by it, or the tap of qsteer's own network namespace; else the one that is ``known`` already, and
    none where there is no such one.
    """
    found = [tap for tap in taps if selection.matches(tap) and not tap.unheld]
    doubts = []
    for name, one in _ambiguous(selection):
        by_tap = bool(one.taps)
        named = [tap for tap in found if one.matches(tap)]
        if len({_owner(tap, by_tap) for tap in named}) < 2:
            continue
        vouched = [tap for tap in named if (tap.netns == own_netns if by_tap else tap.domain)]
        firm = {_owner(tap, by_tap) for tap in vouched or named if vouched or who(tap) in known}
        left = [tap for tap in named if len(firm) != 1 or _owner(tap, by_tap) not in firm]
        found = [tap for tap in found if tap not in left]
        candidates = sorted({f"{tap.name} of pid {tap.holder.pid if tap.holder else '?'}" for tap in left})
        told = ", ".join(candidates[:_SHOWN_MAX]) + ", ..." * (len(candidates) > _SHOWN_MAX)
        doubts.append(printable(f'"{name}" is the name of several, left alone: {told}; --pid chooses one'))
    return tuple(found), tuple(doubts)


def _ambiguous(selection: Selection) -> Iterator[tuple[str, Selection]]:
    """Each name that may be that of several, and which nothing else makes one: as ``select`` has it."""
    if selection.pids:
        return
    yield from ((name, Selection(vms=(name,))) for name in selection.vms)
    if not selection.namespaces:
        yield from ((name, Selection(taps=(name,))) for name in selection.taps)
    if not selection.vms:
        yield from ((name, Selection(nics=(name,))) for name in selection.nics)
        yield from ((name, Selection(macs=(name,))) for name in selection.macs)


def _owner(tap: Tap, by_tap: bool) -> Key | Vm | None:
    """Whose a name is: the tap's own, or its VM's."""
    return key_of(tap) if by_tap else who(tap)[1]


_OPTIONS = {
    "vms": "--vm",
    "pids": "--pid",
    "taps": "--dev",
    "nics": "--nic",
    "macs": "--mac",
    "namespaces": "--netns",
}


def missing(taps: Collection[Tap], selection: Selection) -> tuple[str, ...]:
    """The names of a selection that nothing has, as the command line gives them."""
    found = []
    for field in fields(Selection):
        names = getattr(selection, field.name)
        for name in names if isinstance(names, tuple) else ():
            one: dict[str, Any] = {field.name: (name,)}
            if not any(Selection(**one).matches(tap) for tap in taps):
                found.append(printable(f"{_OPTIONS[field.name]} {name}"))
    if selection.every and not taps:
        found.append("a VM with a multi-queue tap")
    return tuple(found)


class Repairs:
    """Counts what is put back, so that a fight with whoever takes it off ends.

    More than ``most`` times within ``window_s`` seconds is a fight; the tap is left alone for ``calm_s`` seconds then.
    Times are seconds of any clock that only goes forward.
    """

    def __init__(self, *, most: int = 5, window_s: float = 60.0, calm_s: float = 300.0) -> None:
        self.most, self.window_s, self.calm_s = most, window_s, calm_s
        self._done: dict[Key, deque[float]] = {}
        self._until: dict[Key, float] = {}

    def fighting(self, key: Key, now: float) -> bool:
        """Whether a tap is to be left alone."""
        until = self._until.get(key)
        if until is not None and until <= now:
            self.over(key)
            return False
        return until is not None

    def ends(self, key: Key) -> float | None:
        """When a fight ends."""
        return self._until.get(key)

    def may_put_back(self, key: Key, now: float) -> bool:
        """Whether one more time is all right.  If not, this is a fight from now on."""
        done = self._done.get(key, ())
        if sum(at > now - self.window_s for at in done) < self.most:
            return True
        self._until[key] = now + self.calm_s
        return False

    def count(self, key: Key, now: float) -> None:
        """One more time."""
        self._done.setdefault(key, deque(maxlen=self.most)).append(now)

    def over(self, key: Key) -> None:
        """Peace: what is attached is as wanted, or the tap is gone."""
        self._until.pop(key, None)
        self._done.pop(key, None)
