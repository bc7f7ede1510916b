# SPDX-License-Identifier: BSD-2-Clause
"""The work of libvirt's hook: ``qsteer apply`` for a domain that starts, and what else its life brings.

Theory of operation
===================

A hook must not call libvirt, which would wait for itself: everything comes from the domain's XML, libvirt's status
files and its cache.  Nothing that belongs to the domain is executed: this is root.

=========  =========================================================================================
started    steer every NIC as the policy in the domain and the configuration say (``hookplan``)
reconnect  the daemon was restarted: what is attached stays, a NIC without a program gets one
migrate    the domain is about to come: say what of its policy this host will not do
release    it has ended: forget what ``qsteer off`` held for it
=========  =========================================================================================

A guest whose state comes later (migration, restore) is followed when the hook is done, until it runs and is steered, or
its QEMU has ended.  Where a ``qsteer keep`` runs, that is left to it.

With a mistake in the configuration nobody knows what policies may ask for: nothing is steered then.
"""

import contextlib
import os
import select
import stat
import time
from collections.abc import Callable
from pathlib import Path

from qsteer import execute, hashing, holds, hookplan, inventory, libvirt, marks, others, procs
from qsteer.config import ConfigError, load
from qsteer.domainpolicy import of_interface
from qsteer.errors import BusyError, QsteerError, UsageError, printable
from qsteer.hookfile import NAME, STARTED
from qsteer.hookplan import WRAPPER, Decision
from qsteer.intent import Intent
from qsteer.libvirt import Description
from qsteer.model import Domain, Engine, Process, Tap
from qsteer.notify import Priority, SystemJournal
from qsteer.settings import Config, Libvirt, Settings

LOCK_S = 1.0
FOLLOW_S = 24 * 3600.0
FOLLOW_EVERY_S = 0.02
BUSY_S = 0.5
_CHOICES = "/etc/qsteer/qemu"
"""Where an administrator says which QEMU a wrapper runs (c/qemu_find.c)."""

_NOTHING = Config(libvirt=Libvirt(steer="policy", metadata=()))


def run(
    domain: str,
    operation: str,
    xml: bytes,
    *,
    required: Callable[[], None],
    refuse: Callable[[str], None],
    done: Callable[[], None],
) -> None:
    """One call of the hook for a domain.  Raises nothing.

    ``required`` is called when it shows that the domain must not start unless it is steered, ``refuse`` with each
    reason why it is not, and ``done`` when all has been said; what comes then is for nobody to wait for.
    """
    work = _Work(domain, operation, required, refuse)
    work.told(lambda: work.do(xml), f"{operation}: ")
    done()
    work.told(work.afterwards, "no longer followed: ")


class _Work:
    def __init__(self, name: str, operation: str, required: Callable[[], None], refuse: Callable[[str], None]) -> None:
        self._name, self._operation = name, operation
        self._tell_required, self._refuse = required, refuse
        self._journal = SystemJournal(NAME, QSTEER_DOMAIN=printable(name))
        self._required = False
        self._wrapper: str | None = None
        self._to_follow: tuple[Process, Config] | None = None

    def told(self, act: Callable[[], None], what: str) -> None:
        """Do something, and say why it fails if it does."""
        try:
            act()
        except QsteerError as error:
            self._fails(f"{what}{error}" + (f" ({error.hint})" if error.hint else ""), required=self._required)
        except Exception as error:  # a mistake of qsteer's is no reason for a VM not to start
            self._fails(f"{what}{type(error).__name__}: {error}", required=self._required)

    def do(self, xml: bytes) -> None:
        """What there is to be done before libvirt goes on.  Raises QsteerError."""
        description = libvirt.describe(xml)
        if not description:
            raise UsageError("what came on stdin describes no domain")
        if self._operation == "release":
            with execute.lock(LOCK_S):
                holds.forget_ended()
                marks.forget_ended()
            return
        config = self._config()
        self._check_policy(description, config)
        if self._operation == "migrate":
            self._migrate(description, config)
            return
        process, domain = libvirt.running(self._name)
        seen = libvirt.emulator(description.emulator) if description.emulator else None
        is_start = self._operation == STARTED
        decisions = self._steer(
            process,
            domain,
            Intent(Settings(), if_absent=not is_start, lenient=True, load=lambda: config),
            version=seen.version if seen else None,
            incoming=domain.incoming and is_start,
            wrapped=(description.emulator or "").rpartition("/")[2].startswith(WRAPPER),
        )
        if is_start:
            self._refuse_without_tap(domain, config)
            if any(decision.follow for decision in decisions):
                self._to_follow = process, config
            if seen and description.emulator and _is_newer(process, seen.looked_at):
                self._wrapper = description.emulator

    def afterwards(self) -> None:
        """What nobody waits for.  Raises QsteerError."""
        self._required = False  # it has started
        if self._wrapper:
            self._mark_wrapper(self._wrapper)
        if self._to_follow:
            self._until_it_runs(*self._to_follow)

    def _fails(self, why: str, *, required: bool) -> None:
        """Say it; and refuse the start, where steering is required."""
        refuses = required and self._operation == STARTED
        self.say(f"{why}; steering is required, the start is refused" if refuses else why, Priority.WARNING)
        if refuses:
            self._refuse(why)

    def say(self, text: str, priority: Priority = Priority.INFO) -> None:
        self._journal.say(printable(f"{self._name}: {text}"), priority)

    def _config(self) -> Config:
        try:
            return load()
        except ConfigError as error:
            self.say(f"nothing is steered, the configuration has a mistake: {error}", Priority.WARNING)
            return _NOTHING

    def _check_policy(self, domain: Description, config: Config) -> None:
        """Say what is wrong with the policy, and see whether it, or the configuration, insists on steering."""
        mistakes = domain.policy.mistakes if domain.policy else ()
        for mistake in mistakes:
            self.say(f"the domain's policy is left out: {mistake}", Priority.WARNING)
        for nic in domain.policy.about_none_of(domain.interfaces) if domain.policy else ():
            self.say(f"the domain's policy is about a NIC {nic}, which it does not have", Priority.WARNING)
        wanted = [of_interface(config, domain.name, domain.policy, one)[0] for one in domain.interfaces]
        self._required = any(one.required for one in wanted)
        if self._required:
            self._tell_required()
        if mistakes and self._required:
            self._fails(f"the domain's policy has a mistake: {mistakes[0]}", required=True)

    def _refuse_without_tap(self, domain: Domain, config: Config) -> None:
        """A NIC that is to be steered, and whose packets pass no tap."""
        for one in domain.interfaces:
            wanted, _ = of_interface(config, domain.name, domain.policy, one)
            if wanted.required and not one.target:
                self._fails(f"{one.alias or one.mac} ({one.kind}): its packets do not pass a tap", required=True)

    def _migrate(self, domain: Description, config: Config) -> None:
        """There is no tap yet: only the policy can be looked at."""
        told = "its policy comes along, and this host lets it ask for all that it does"
        refused = {
            word for one in domain.interfaces for word in of_interface(config, domain.name, domain.policy, one)[1]
        }
        if refused:
            told = f"its policy comes along, and this host does not let it ask for {', '.join(sorted(refused))}"
        elif not domain.policy:
            told = "it has no policy of its own"
        self.say(f"migrates to this host: {told}", Priority.NOTICE if refused else Priority.INFO)

    def _steer(
        self,
        process: Process,
        domain: Domain,
        intent: Intent,
        *,
        version: tuple[int, int] | None = None,
        incoming: bool = False,
        wrapped: bool = False,
    ) -> list[Decision]:
        """What was done, tap by tap.  Raises QsteerError."""
        keep_pid = others.keep_of((domain.name, domain.uuid))
        decisions = []
        # Under the lock, so that a keep that acts at the same time is none that is in the way.
        with execute.lock(LOCK_S):
            for tap in inventory.of_domain(process, domain):
                wanted = intent.settings(tap) != Settings() or intent.refused(tap)
                if wanted or intent.config.libvirt.steer == "all":
                    decision = hookplan.decide(
                        hashing.looked(tap),
                        intent(tap),
                        version=version,
                        keep_pid=keep_pid,
                        incoming=incoming,
                        wrapped=wrapped,
                    )
                    self._carry_out(tap, decision, intent)
                    decisions.append(decision)
        return decisions

    def _mark_wrapper(self, emulator: str) -> None:
        """Have libvirt look again at a wrapper behind which there is another QEMU now.

        libvirt remembers what a QEMU can do for as long as the file's ctime is the same, which that of a wrapper is
        when the QEMU behind it is upgraded.
        """
        path = os.path.realpath(emulator)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                about = os.fstat(fd)
                ours = about.st_uid == 0 and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
                if path.rpartition("/")[2].startswith(WRAPPER) and stat.S_ISREG(about.st_mode) and ours:
                    os.utime(fd)
                    told = "another QEMU than when libvirt last looked: it looks again at the next start"
                    self.say(f"{emulator} has {told}")
            finally:
                os.close(fd)
        except OSError as error:
            told = f"libvirt takes {emulator} for an older QEMU, until it is touched: {error.strerror}"
            self.say(told, Priority.WARNING)

    def _carry_out(self, tap: Tap, decision: Decision, intent: Intent) -> None:
        """Do it, and say it.  What fails is that tap's."""
        nic = f"{tap.nic.id} " if tap.nic and tap.nic.id else ""
        if refused := intent.refused(tap):
            told = f"{nic}({tap.name}): the configuration does not let its policy ask for {', '.join(refused)}"
            self.say(told, Priority.WARNING)
        told, fine = decision.told, decision.fine
        if plan := decision.plan:
            try:
                program_id = execute.execute(plan)
            except QsteerError as error:
                told, fine = f"not steered: {error}", False
            else:
                source = f", source {plan.source}" if plan.source else ""
                kernel = ", in-kernel RSS" if plan.engine is Engine.KERNEL else ""
                program = f", program {program_id}" if program_id else kernel
                notes = [note for note in plan.notes if not note.startswith("not kept: ")]
                told = "; ".join((f"{plan.result}{source}{program}", *notes, *((told,) if told else ())))
        told = f"{nic}({tap.name}): {told}"
        if fine:
            self.say(told)
        else:
            self._fails(told, required=bool(intent.settings(tap).required))

    def _until_it_runs(self, process: Process, config: Config) -> None:
        """Steer a guest whose state comes later, once it runs.  Raises QsteerError."""
        intent = Intent(Settings(), if_absent=True, lenient=True, load=lambda: config)
        ends, seen = time.monotonic() + FOLLOW_S, None
        has_ended = _watched(process)
        while time.monotonic() < ends:
            wait_s = FOLLOW_EVERY_S
            try:
                # Nothing tells that a file was replaced, without inotify, which Python lacks.
                if (found := libvirt.status_file(self._name)) != seen:
                    now, domain = libvirt.running(self._name)
                    if now.pid != process.pid:
                        return
                    if not domain.incoming:
                        self._steer(now, domain, intent)
                        return
                    seen = found
            except BusyError:
                wait_s = BUSY_S
            if has_ended(wait_s):
                return


def _watched(process: Process) -> Callable[[float], bool]:
    """What waits for the end of a process, so many seconds at most, and tells whether it has come."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return lambda wait_s: True
    # From now on its number is no other's.
    found = procs.read(process.pid)
    if not found or found.started != process.started:
        return lambda wait_s: True
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return lambda wait_s: bool(poll.poll(wait_s * 1000))


def _is_newer(process: Process, looked_at: float) -> bool:
    """Whether the program that runs, or a link by which the wrapper chooses one, was put there after libvirt looked."""
    for path in (f"/proc/{process.pid}/exe", _CHOICES):
        with contextlib.suppress(OSError):
            if Path(path).stat().st_ctime > looked_at:
                return True
    return False
