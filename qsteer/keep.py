# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer keep`` and ``qsteer monitor``: look whenever something has changed, and act or tell.

Theory of operation
===================

One loop: wait for a signal or a deadline, look at the whole host, say what changed (``watch``), and put right what is
not as wanted (``keeper``).  Nothing is stored: what is attached is read from the kernel, holds from their files.
Killed at any point, steering is as the last finished step left it.

Privileges of ``keep``: CAP_BPF and CAP_PERFMON load programs and tell of their end, CAP_SYS_ADMIN looks at programs by
their ids and into other network namespaces, CAP_SYS_PTRACE copies a QEMU's queue, CAP_DAC_OVERRIDE reaches the sockets
of QEMU's user.  systemd/qsteer-keep.service.in leaves it no more than these.
"""

import datetime
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from qsteer import inventory, libvirt, programs, render
from qsteer.errors import QsteerError
from qsteer.intent import Intent
from qsteer.keeper import Keeper
from qsteer.model import Inventory, ProgramInfo, Tap
from qsteer.notify import Journal, Priority, Service, write_line
from qsteer.readings import Manner
from qsteer.selection import Selection
from qsteer.signals import Signals, Wake
from qsteer.watch import Event, events, missing, text, to_json

LOOK_AGAIN_S, LOOK_AGAIN_MOST_S = 30.0, 300.0
"""For what sends no signal."""
IDLE_SHARE = 1000
"""Looking again must not cost more than one part in so many of a core."""
STORM_SHARE = 2
"""Between two looks this many times what a look takes: a guest that makes signals must not keep a core busy."""
TICK_S = 1.0
"""How often the shared bodies are looked at, whose end is no change of any tap, and whether libvirt wrote something."""
LIBVIRT_S, LIBVIRT_SHARE = 5.0, 100
"""Shortest time between two looks at everything because libvirt wrote something (a NIC's name, a policy), and the part
of a core that they may cost at most."""
STDOUT = 1
FAILED_S = 1.0
"""How long to wait when the host cannot be looked at."""


class Worker(Protocol):
    """What the loop drives; all times are those of time.monotonic()."""

    @property
    def taps(self) -> Sequence[Tap]:
        """Those that are cared for."""

    def look(self, found: Inventory, now: float) -> None:
        """See what there is."""

    def turn(self, now: float) -> None:
        """Do what is due without looking."""

    def deadline(self, now: float) -> float:
        """When something is due."""

    def wants_look(self, now: float) -> bool:
        """Whether what was seen is not enough."""

    @property
    def is_done(self) -> bool:
        """Whether all that was seen was put right, as far as that goes."""

    def has_acted(self) -> bool:
        """Whether something was changed since this was last asked."""

    def reload(self) -> None:
        """Look at everything as if for the first time."""

    def status(self) -> str:
        """One line."""


def main_keep(
    selection: Selection,
    wanted: Intent,
    manner: Manner,
    *,
    reread_s: float = 60.0,
    json: bool = False,
    quiet: bool = False,
) -> int:
    """Keep the taps of a selection as wanted, until SIGTERM or SIGINT; they stay steered then.

    ``reread_s`` is how often a guest is asked again that gives no signal, 0 for never; that may stop the VM for a
    moment where ``wanted`` allows it.  SIGHUP reads the configuration again.  Gives the exit code.  Raises QsteerError
    where the host cannot be looked at.
    """
    journal = Journal("keep", least=Priority.WARNING if quiet else Priority.INFO)

    def tell(told: Event, priority: Priority) -> None:
        journal.say(text(told), priority)
        if json:
            write_line(_line_of_json(told), STDOUT)

    keeper = Keeper(selection, wanted, manner, reread_s=reread_s, reread=wanted.reload, tell=tell, say=journal.say)
    try:
        return _Loop(keeper, Service(), journal).run()
    finally:
        keeper.close()


def main_monitor(selection: Selection, *, json: bool = False, quiet: bool = False) -> int:
    """Print what happens to the taps of a selection (nothing selected: to all), until SIGTERM or SIGINT.

    Gives the exit code.  Raises QsteerError where the host cannot be looked at.
    """
    journal = Journal("monitor", least=Priority.WARNING if quiet else Priority.INFO)

    def tell(told: Event) -> None:
        print(_line_of_json(told) if json else f"{_now()} {text(told)}", flush=True)

    return _Loop(_Monitor(selection, tell=tell, say=journal.say), Service(), journal).run()


def _line_of_json(told: Event) -> str:
    return render.json_text(to_json(told, time=_now()), pretty=False)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Loop:
    """Waits, looks and lets its worker work.

    ``soonest`` and ``latest`` are the times between which the next look is, ``due`` when the worker has to be asked,
    ``alive`` when the watchdog wants a word.
    """

    def __init__(self, worker: Worker, service: Service, journal: Journal) -> None:
        self._worker, self._service, self._journal = worker, service, journal
        self._look_wanted = True
        self._found: Inventory | None = None
        self._ready = False
        self._soonest = self._latest = self._alive = self._tick = self._due = self._libvirt_due = 0.0
        self._libvirt = libvirt.changed_at()
        self._bodies: dict[int, tuple[ProgramInfo, bool]] = {}
        self._said = self._failure = ""

    def run(self) -> int:
        """Until a signal ends it.  Gives the exit code."""
        with Signals() as signals:
            while True:
                self._go_round(signals)
                match signals.wait(self._deadline()):
                    case Wake.CHANGED:
                        self._look_wanted = True
                    case Wake.STOP:
                        self._service.stopping()
                        return 0
                    case Wake.RELOAD:
                        self._service.reloading()
                        self._worker.reload()
                        self._look_wanted, self._ready, self._latest = True, False, 0.0

    def _go_round(self, signals: Signals) -> None:
        now = time.monotonic()
        if now >= self._tick:
            self._tick = now + TICK_S
            if now >= self._libvirt_due and (changed := libvirt.changed_at()) != self._libvirt:
                self._libvirt, self._latest = changed, 0.0
            if self._bodies_changed():
                self._look_wanted = True
        if self._worker.wants_look(now) or now >= self._latest:
            self._look_wanted = True
        if self._look_wanted and now >= self._soonest:
            self._look(signals, now)
            self._due = now
        # To ask each of a thousand taps whether it is due costs more than all the rest of an idle second.
        if now >= self._due:
            self._worker.turn(time.monotonic())
            if self._worker.has_acted():
                signals.acted()
            self._tell_service()
            self._due = self._worker.deadline(time.monotonic())
        if self._service.alive_every_s and now >= self._alive:
            self._service.alive()
            self._alive = now + self._service.alive_every_s

    def _bodies_changed(self) -> bool:
        return any(_is_there(program) not in (present, None) for program, present in self._bodies.values())

    def _look(self, signals: Signals, now: float) -> None:
        self._look_wanted = False
        try:
            found = self._fetch(now)
        except QsteerError as error:
            if not self._found:
                raise
            if str(error) != self._failure:
                self._journal.say(f"cannot look: {error}", Priority.WARNING)
            self._failure = str(error)
            self._look_wanted, self._soonest = True, now + FAILED_S
            return
        self._failure = ""
        seen = time.monotonic()
        self._found = found
        self._worker.look(found, seen)
        taps = self._worker.taps
        signals.watch(
            programs={tap.program_id for tap in taps if tap.program_id},
            pids={tap.holder.pid for tap in taps if tap.holder},
            netns_pids=tuple({tap.netns: tap.holder.pid for tap in taps if tap.holder}.values()),
        )
        self._bodies, self._tick = _bodies(taps), now + TICK_S
        self._soonest = time.monotonic() + (seen - now) * STORM_SHARE

    def _fetch(self, now: float) -> Inventory:
        """All there is now and then, and in between what may have changed."""
        if self._found and now < self._latest:
            return inventory.fetch_again(self._found)
        found = inventory.fetch()
        took = time.monotonic() - now
        self._latest = now + min(max(LOOK_AGAIN_S, took * IDLE_SHARE), LOOK_AGAIN_MOST_S)
        self._libvirt_due = now + max(LIBVIRT_S, took * LIBVIRT_SHARE)
        return found

    def _tell_service(self) -> None:
        status = self._worker.status()
        if not self._ready and self._found and not self._look_wanted and self._worker.is_done:
            self._ready = True
            self._service.ready(status)
        elif self._ready and status != self._said:
            self._service.status(status)
        self._said = status

    def _deadline(self) -> float:
        alive = [self._alive] if self._service.alive_every_s else []
        if self._look_wanted or self._worker.wants_look(time.monotonic()):
            return min(self._soonest, *alive) if alive else self._soonest
        return min(self._tick, self._latest, self._due, *alive)


def _is_there(program: ProgramInfo) -> bool | None:
    """Whether the shared body of a program is; None once the last program that calls it is gone."""
    try:
        return programs.body_present(program)
    except QsteerError:
        return None


def _bodies(taps: Sequence[Tap]) -> dict[int, tuple[ProgramInfo, bool]]:
    """For each shared body, by its map's id, a program that calls it, and whether it is there."""
    stubs = ((tap.program, tap.body_present) for tap in taps if tap.program)
    return {program.bodies_id: (program, present) for program, present in stubs if program.bodies_id}


class _Monitor:
    """Tells what changed."""

    def __init__(self, selection: Selection, *, tell: Callable[[Event], None], say: Callable[[str], None]) -> None:
        self._selection, self._tell, self._say = selection, tell, say
        self._before: Inventory | None = None

    @property
    def taps(self) -> Sequence[Tap]:
        return self._before.taps if self._before else ()

    def look(self, found: Inventory, now: float) -> None:
        if self._selection:
            found = Inventory(taps=tuple(tap for tap in found.taps if self._selection.matches(tap)))
            if self._before is None and (nobody := missing(found.taps, self._selection)):
                self._say(f"waiting for {', '.join(nobody)}")
        if self._before is not None:
            for happened in events(self._before, found).values():
                for one in happened:
                    self._tell(one)
        self._before = found

    def turn(self, now: float) -> None:
        """Looking is all it does."""

    def deadline(self, now: float) -> float:
        return float("inf")

    def wants_look(self, now: float) -> bool:
        return False

    @property
    def is_done(self) -> bool:
        return True

    def has_acted(self) -> bool:
        return False

    def reload(self) -> None:
        """It remembers nothing but the last look."""

    def status(self) -> str:
        return f"watching {len(self.taps)} taps"
