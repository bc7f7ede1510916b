# SPDX-License-Identifier: BSD-2-Clause
"""Keeps taps in the wanted state: after each look at the host it plans for every tap that is not, and executes.

Theory of operation
===================

For each tap there is a ``_Care``: what is remembered of it, and when to try again what failed.  A tap is tended when a
look has seen it, when a guest has answered, and when it is time to try again; each time with what was last seen.  That
may be old by then: ``execute`` refuses (BusyError) if what is attached has changed, and the host is looked at again.

One VM's failure is that VM's: it is told once, and tried again later and later.  That something vanishes is normal.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from qsteer import execute, hashing, holds, namespaces, readings, upkeep
from qsteer.asking import Askers
from qsteer.errors import BusyError, ConflictError, NotFoundError, QsteerError
from qsteer.model import Engine, Inventory, Kind, Tap
from qsteer.notify import Priority
from qsteer.plan import Attach, AttachHeld, ClearRss, Detach, Plan, Refresh, SetRss, Wanted, plan_apply
from qsteer.readings import Manner
from qsteer.selection import Selection
from qsteer.upkeep import Memory
from qsteer.watch import (
    PROGRAM_CHANGES,
    Attached,
    Event,
    Key,
    Repairs,
    Vm,
    What,
    Who,
    attached,
    choose,
    event,
    events,
    key_of,
    missing,
    who,
)

LOCK_S = 0.25
SLICE_S = 0.5
"""Longest time for changes in a row: a thousand new taps must not hide one that lost its program."""
BUSY_S, BUSY_MOST_S = 0.1, 5.0
FAILED_S, FAILED_MOST_S = 1.0, 60.0
PATIENCE = 4
"""So many times in a row something is busy before it is told."""
ASK_AGAIN_S = 0.5
"""Shortest time between two questions to one guest."""
ASK_BUSY_S, ASK_BUSY_TIMES = 2.0, 10
"""A guest whose QEMU is busy, or that was stopped a moment ago, is asked again about so often before that is told."""
PERIODIC_S = 1.0
"""Shortest time between two questions to any guests that nothing but the clock asks for."""
SOON_S = 2.0
"""How soon a guest is asked again that has done something; then after twice that, and so on, up to ``reread_s``."""
ANSWERS_S = 0.02
"""How often to look whether a guest that is being asked has answered."""
LAST_ANSWERS_S = 2.0
FOLLOW_MOST, FOLLOW_CALM_S = 60, 15.0
"""So often within a minute a guest may make QEMU take a program off that follows it, and how long it waits then."""
NEVER = float("inf")

Tell = Callable[[Event, Priority], None]

_SPOKEN = PROGRAM_CHANGES | {What.QUEUES}
"""After these a guest may ask for something else than before."""
_ACTS = frozenset({What.STEERED, What.PUT_BACK, What.CORRECTED, What.TAKEN_OFF, What.MENDED})


@dataclass(slots=True, kw_only=True)
class _Care:
    """One tap of one VM.  Times are those of the clock; ``ask`` is what to give to ``readings.complete``.

    ``wanted`` is what was wanted of it last, None before it was tended.
    ``put`` is the program that keep attached last, ``lost`` qsteer's that is off and not back yet, and ``how`` it went;
    ``problem`` and ``unread`` are what was told last.
    ``spoken``: the guest did something since it was asked.
    """

    tap: Tap
    who: Who
    memory: Memory = field(default_factory=Memory)
    wanted: Wanted | None = None
    put: Attached | None = None
    lost: Attached | None = None
    how: str = ""
    unseen: int = 0
    problem: str = ""
    unread: str = ""
    failures: int = 0
    retry_at: float = 0.0
    ask: tuple[Tap, Wanted] | None = None
    ask_at: float = 0.0
    asked_at: float = -ASK_AGAIN_S
    asks_failed: int = 0
    silent: int = 0
    spoken: bool = True

    @property
    def urgent(self) -> bool:
        """Whether more than the clock wants the guest to be asked."""
        return self.spoken or not self.memory.asked or 0 < self.asks_failed < PATIENCE


class Keeper:
    """Keeps a selection of taps as wanted.

    ``wanted`` is asked for each tap again and again, and may change its mind after ``reread``, which raises QsteerError
    where it does not.  ``tell`` gets each event, ``say`` lines about no tap in particular.  ``clock`` gives seconds, as
    do all ``now``.
    """

    def __init__(
        self,
        selection: Selection,
        wanted: Callable[[Tap], Wanted],
        manner: Manner,
        *,
        reread_s: float,
        reread: Callable[[], None],
        tell: Tell,
        say: Callable[[str, Priority], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._selection, self._wanted, self._reread_s = selection, wanted, reread_s
        self._reread, self._tell, self._say, self._clock = reread, tell, say, clock
        self._cares: dict[Key, _Care] = {}
        self._before: dict[Key, Tap] | None = None
        self._untended: deque[Key] = deque()
        self._doubts: tuple[str, ...] = ()
        self._repairs = Repairs()
        # A guest that is followed may say something else often, and has to be read as often.
        self._followings = Repairs(most=FOLLOW_MOST, calm_s=FOLLOW_CALM_S)
        self._askers: Askers[Who] = Askers(lambda tap, wanted: readings.complete(tap, wanted, manner))
        # One question per VM: a QEMU that hangs must not take all who ask.
        self._asked_vms: set[Vm | None] = set()
        self._periodic_at = 0.0
        self._look_at = NEVER
        self._acted = False

    def has_acted(self) -> bool:
        """Whether something was changed, or tried to be, since this was last asked."""
        acted, self._acted = self._acted, False
        return acted

    @property
    def taps(self) -> Sequence[Tap]:
        """Those that are kept."""
        return [care.tap for care in self._cares.values()]

    def look(self, found: Inventory, now: float) -> None:
        """Compare with the last look, and put right what is not as wanted."""
        self._look_at = NEVER
        taps = self._chosen(found)
        happened = self._events(taps)
        for key in self._cares.keys() - {key_of(tap) for tap in taps}:
            del self._cares[key]
            self._peace(key)
        for one in happened.pop(None, ()):
            self._tell(one, Priority.INFO)
        self._untended.clear()
        # Those that something happened to come first.
        for tap in sorted(taps, key=lambda tap: key_of(tap) not in happened):
            care = self._care_for(tap)
            told = self._listen(care, happened.pop(key_of(tap), ()), now)
            act = None
            if self._clock() < now + SLICE_S:
                act = self._tend(care, now)
            else:
                self._untended.append(key_of(tap))
            for one in told:
                if not act or act.what not in _ACTS or one.what not in PROGRAM_CHANGES:
                    self._tell(one, Priority.INFO)
            self._tell_act(act)
        for gone in happened.values():
            for one in gone:
                self._tell(one, Priority.INFO)

    def turn(self, now: float) -> None:
        """Go on where the last look had no time, take answers, try again what failed, ask who is to be asked."""
        while self._untended and self._clock() < now + SLICE_S:
            self._tell_act(self._tend(self._cares[self._untended.popleft()], now))
        for of, answer in self._askers.answers():
            self._asked_vms.discard(of[1])
            care = self._cares.get(of[0])
            if care and care.who == of:
                self._answered(care, answer, now)
        for care in self._cares.values():
            ends = self._repairs_of(care).ends(key_of(care.tap))
            if 0 < care.retry_at <= now or (ends is not None and ends <= now):
                care.retry_at = 0.0
                self._tell_act(self._tend(care, now))
        for care in self._cares.values():
            if care.ask and self._ask_at(care) <= now and care.who[1] not in self._asked_vms:
                if not care.urgent:
                    self._periodic_at = now + PERIODIC_S
                care.spoken, care.asked_at = False, now
                self._asked_vms.add(care.who[1])
                self._askers.ask(care.who, *care.ask)

    def deadline(self, now: float) -> float:
        """When ``turn`` or ``look`` has something to do."""
        if self._untended:
            return now
        due = [self._look_at, now + ANSWERS_S if self._askers.busy else NEVER]
        for care in self._cares.values():
            if care.retry_at:
                due.append(care.retry_at)
            if (ends := self._repairs_of(care).ends(key_of(care.tap))) is not None:
                due.append(ends)
            if care.ask and care.who[1] not in self._asked_vms:
                due.append(self._ask_at(care))
        return min(due)

    def wants_look(self, now: float) -> bool:
        """Whether what was seen is not enough."""
        return self._look_at <= now

    @property
    def is_done(self) -> bool:
        """Whether all that was seen was put right, as far as that goes."""
        return not self._untended

    def reload(self) -> None:
        """Look at everything as if for the first time; what was attached and what the guests asked for stays known.

        But for taps of which something else is wanted now.
        """
        try:
            self._reread()
        except QsteerError as error:
            self._say(f"the configuration stays as it was: {error}", Priority.WARNING)
        self._doubts = ()
        for key, care in self._cares.items():
            self._peace(key)
            care.problem = care.unread = ""
            care.failures = care.asks_failed = 0
            care.retry_at = care.ask_at = 0.0
            care.spoken = True

    def status(self) -> str:
        """One line."""
        vms = {care.who[1] for care in self._cares.values()} - {None}
        alone = [
            care for key, care in self._cares.items() if care.problem or self._repairs_of(care).ends(key) is not None
        ]
        held = sum(care.tap.hold for care in self._cares.values())
        parts = [f"keeping {len(self._cares)} taps of {len(vms)} VMs"]
        parts += [f"{len(alone)} left alone"] * bool(alone) + [f"{held} held off"] * bool(held)
        return ", ".join(parts)

    def close(self) -> None:
        """Wait a while for the guests that are being asked."""
        self._askers.close(LAST_ANSWERS_S)

    def _chosen(self, found: Inventory) -> tuple[Tap, ...]:
        known = {care.who for care in self._cares.values()}
        taps, doubts = choose(found.taps, self._selection, known, own_netns=namespaces.own())
        for doubt in doubts:
            if doubt not in self._doubts:
                self._say(doubt, Priority.WARNING)
        self._doubts = doubts
        if self._before is None and (nobody := missing(taps, self._selection)):
            self._say(f"waiting for {', '.join(nobody)}", Priority.NOTICE)
        return taps

    def _events(self, taps: tuple[Tap, ...]) -> dict[Key | None, tuple[Event, ...]]:
        before, self._before = self._before, {key_of(tap): tap for tap in taps}
        if before is None:
            return {}
        return events(Inventory(taps=tuple(before.values())), Inventory(taps=taps))

    def _care_for(self, tap: Tap) -> _Care:
        key = key_of(tap)
        care = self._cares.get(key)
        if not care or care.who != who(tap):
            care = self._cares[key] = _Care(tap=tap, who=who(tap))
        care.tap = tap
        return care

    def _listen(self, care: _Care, happened: Sequence[Event], now: float) -> Sequence[Event]:
        """What happened to a tap may mean that its guest has to be asked again.  Gives it as it is to be told."""
        # What keep attached may have gone again before it was looked at.
        put = care.put
        told = [replace(one, old=put) if put and _is_program(one.old, put.id) else one for one in happened]
        if told:
            care.retry_at = 0.0
        for one in told:
            off = one.what in (What.DETACHED, What.REPLACED)
            if off and isinstance(one.old, Attached) and _was_kept(one.old, care.memory):
                care.lost, care.how = one.old, _how(care.tap, one)
            if one.what in _SPOKEN:
                care.spoken = True
                care.asks_failed = care.silent = 0
                care.ask_at = now
        return told

    def _ask_at(self, care: _Care) -> float:
        """When to ask a guest."""
        if care.urgent:
            return max(care.ask_at, care.asked_at + ASK_AGAIN_S)
        return max(care.ask_at, self._periodic_at)

    def _answered(self, care: _Care, answer: Tap | QsteerError, now: float) -> None:
        busy = isinstance(answer, BusyError)
        if isinstance(answer, QsteerError):
            care.asks_failed += 1
            if not busy or care.asks_failed > ASK_BUSY_TIMES:
                care.memory = upkeep.failed(care.memory, str(answer))
        else:
            care.memory = upkeep.answered(care.memory, answer)
            care.asks_failed = care.asks_failed + 1 if care.memory.unread else 0
        if care.asks_failed:
            most = ASK_BUSY_S if busy and care.asks_failed <= ASK_BUSY_TIMES else FAILED_MOST_S
            care.ask_at = now + _pause(care.asks_failed, FAILED_S, most)
        else:
            # A guest that boots says one thing after the other, and of some of them there is no sign.
            care.silent += 1
            care.ask_at = now + _pause(care.silent, SOON_S, self._reread_s) if self._reread_s else NEVER
        if care.spoken:
            care.ask_at = now
        unread = "; ".join(care.memory.unread)
        if care.memory.reading and unread and not care.unread:
            self._tell(event(What.UNREAD, care.tap, detail=unread), Priority.WARNING)
        care.unread = unread
        self._tell_act(self._tend(care, now))

    def _tend(self, care: _Care, now: float) -> Event | None:
        """Put one tap right if it is not; what was done, or what is in the way and was not told yet."""
        tap, key = care.tap, key_of(care.tap)
        if tap.hold:
            care.problem, care.ask = "", None
            return None
        if tap.program_id and not tap.program and care.unseen != tap.program_id:
            # It went away while it was looked at, or keep has just attached it.
            care.unseen = tap.program_id
            self._look_at = now
            return None
        wanted = self._wanted(upkeep.known(care.memory, tap))
        if care.wanted not in (None, wanted):
            care.memory = upkeep.rewanted(care.memory)
            care.spoken, care.ask_at = True, now
        care.wanted = wanted
        care.memory = upkeep.remember(care.memory, tap, wanted)
        if self._repairs_of(care).fighting(key, now):
            if not _is_ours(tap):
                return None
            self._peace(key)
        if now < care.retry_at:
            return None
        decision = upkeep.decide(care.memory, tap, wanted)
        care.ask = decision.ask
        if not decision.plan:
            if not decision.ask:
                self._is_fine(care)
            return None
        try:
            planned, wanted = decision.plan
            plan = plan_apply(hashing.looked(planned), wanted)
        except QsteerError as error:
            return _problem(care, error)
        return self._carry_out(care, plan, now)

    def _carry_out(self, care: _Care, plan: Plan, now: float) -> Event | None:
        tap, key = care.tap, key_of(care.tap)
        if not plan.steps:
            care.memory = upkeep.done(care.memory, plan, plan.program_id or 0)
            self._is_fine(care)
            return None
        repair = bool(care.lost or tap.steering) and care.memory.settled and not _is_ours(tap) and _attaches(plan)
        repairs = self._repairs_of(care)
        if repair and not repairs.may_put_back(key, now):
            told = f"put back {repairs.most} times within {repairs.window_s:g} s; again in {repairs.calm_s:g} s"
            return event(What.FIGHT, tap, old=care.lost, detail=told)
        self._acted = True
        try:
            program_id = _execute(plan)
        except QsteerError as error:
            if repair and isinstance(error, ConflictError):
                repairs.count(key, now)
            return self._failed(care, error, now)
        if repair:
            repairs.count(key, now)
        act = _act(care, plan, program_id)
        care.memory = upkeep.done(care.memory, plan, program_id)
        self._is_fine(care)
        care.put = act.new if isinstance(act.new, Attached) else None
        # As keep leaves it: what else happens is told, this is not told twice.
        left = replace(_with_rss(tap, plan), program_id=program_id, program=None, content=None, body_present=True)
        left = replace(left, queues=())
        care.tap = left
        if self._before is not None:
            self._before[key] = left
        return act

    def _repairs_of(self, care: _Care) -> Repairs:
        return self._followings if care.memory.reading else self._repairs

    def _peace(self, key: Key) -> None:
        self._repairs.over(key)
        self._followings.over(key)

    def _is_fine(self, care: _Care) -> None:
        care.memory = replace(care.memory, settled=True)
        care.problem, care.failures, care.retry_at, care.lost = "", 0, 0.0, None

    def _failed(self, care: _Care, error: QsteerError, now: float) -> Event | None:
        """Executing did not work: try again later, and look before that if something has changed."""
        care.failures += 1
        busy = isinstance(error, BusyError | NotFoundError)
        first, most = (BUSY_S, BUSY_MOST_S) if busy else (FAILED_S, FAILED_MOST_S)
        care.retry_at = now + _pause(care.failures, first, most)
        self._look_at = min(self._look_at, care.retry_at)
        return None if busy and care.failures < PATIENCE else _problem(care, error)

    def _tell_act(self, act: Event | None) -> None:
        if act:
            self._tell(act, Priority.NOTICE if act.what in _ACTS else Priority.WARNING)


def _pause(failures: int, first_s: float, most_s: float) -> float:
    """Twice as long after each failure."""
    return min(first_s * 2.0 ** min(failures - 1, 10), most_s)


def _problem(care: _Care, error: QsteerError) -> Event | None:
    """What is in the way, if that is news."""
    if str(error) == care.problem:
        return None
    care.problem = str(error)
    return event(What.LEFT_ALONE, care.tap, detail=f"{error}" + (f" ({error.hint})" if error.hint else ""))


def _execute(plan: Plan) -> int:
    with execute.lock(LOCK_S):
        # A hold is no change of what is attached, which execute() would notice.
        tap = plan.tap
        hold = holds.find(netns=tap.netns, ifindex=tap.ifindex)
        if hold and any(hold.is_of(queue.pid) for queue in tap.queues):
            raise BusyError(f'tap "{tap.name}" was held off meanwhile')
        return execute.execute(plan)


def _with_rss(tap: Tap, plan: Plan) -> Tap:
    """With what tun hashes by after a plan."""
    for step in plan.steps:
        if isinstance(step, SetRss | ClearRss):
            tap = replace(tap, vnet_hash=step.rss if isinstance(step, SetRss) else None)
    return tap


def _how(tap: Tap, happened: Event) -> str:
    """How a program of qsteer's went."""
    if tap.hold:
        return "the hold is lifted"
    if happened.what is What.DETACHED:
        by_qemu = tap.vm and isinstance(happened.old, Attached) and happened.old.id
        return "QEMU took it off" if by_qemu else "it was taken off"
    return f"{happened.new} was attached in its place"


def _was_kept(old: Attached, memory: Memory) -> bool:
    """Whether it is what was last looked at for what it holds: a program by its id, or RSS of tun's own."""
    return old.id == memory.program_id and (bool(old.id) or old.kind is Kind.QSTEER)


def _is_program(side: object, program_id: int) -> bool:
    """Whether one side of an event is that program."""
    return isinstance(side, Attached) and side.id == program_id


def _is_ours(tap: Tap) -> bool:
    return bool(tap.steering and tap.steering.kind is Kind.QSTEER)


def _attaches(plan: Plan) -> bool:
    return any(isinstance(step, Attach | AttachHeld | Refresh | SetRss) for step in plan.steps)


def _act(care: _Care, plan: Plan, program_id: int) -> Event:
    """What was done to a tap, in one line."""
    tap = care.tap
    old = attached(tap) or care.lost
    new = Attached(id=program_id, kind=Kind.QSTEER) if program_id or plan.engine is Engine.KERNEL else None
    pause = plan.tap.reading.paused_ms if plan.tap.reading else None
    source = f"source {plan.source}" + (f", the VM stood still for {pause:.1f} ms" if pause is not None else "")
    if not _attaches(plan) and any(isinstance(step, Detach | ClearRss) for step in plan.steps):
        return event(What.TAKEN_OFF, tap, old=old, detail=f"taken off, the guest asks for no RSS, {source}")
    if not _attaches(plan):
        return event(What.MENDED, tap, old=old, new=old, detail="mended, its shared body was gone")
    if not care.memory.settled:
        return event(What.STEERED, tap, old=old, new=new, detail=f"steered, {source}")
    if _is_ours(tap):
        if not tap.body_present:
            return event(What.MENDED, tap, old=old, new=new, detail="mended, its shared body was gone")
        return event(What.CORRECTED, tap, old=old, new=new, detail=f"as the guest asks now, {source}")
    if tap.steering:
        return event(What.PUT_BACK, tap, old=old, new=new, detail=f"put back in place of {old}")
    if not care.lost:
        return event(What.STEERED, tap, old=old, new=new, detail=f"as the guest asks now, {source}")
    return event(What.PUT_BACK, tap, old=old, new=new, detail=f"put back, {care.how}")
