# SPDX-License-Identifier: BSD-2-Clause
"""The work of libvirt's hook: ``qsteer apply`` for a domain that starts, and what else its life brings.

Theory of operation
===================

A hook must not call libvirt, which would wait for itself: everything comes from stdin and from libvirt's status files.

=========  =========================================================================================
started    steer every NIC as the policy in the domain and the configuration say (``hookplan``)
reconnect  the daemon was restarted: what is attached stays, a NIC without a program gets one
migrate    the domain is about to come: say what of its policy this host will not do
release    it has ended: forget what ``qsteer off`` held for it
=========  =========================================================================================

Only a start can be refused: libvirt would end a domain that runs if its ``reconnect`` failed.

A guest whose state comes later (migration, restore) is followed when the hook is done, until it runs and is steered, or
its QEMU has ended.  Where a ``qsteer keep`` runs, that is left to it.
"""

import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from qsteer import execute, holds, hookplan, inventory, libvirt, others
from qsteer.config import ConfigError, load
from qsteer.domainpolicy import of_interface
from qsteer.errors import QsteerError, UsageError, printable
from qsteer.hookfile import NAME
from qsteer.hookplan import Decision
from qsteer.intent import Intent
from qsteer.libvirt import Description
from qsteer.model import Domain, Process, Tap
from qsteer.notify import Priority, SystemJournal
from qsteer.settings import Config, Settings

LOCK_S = 1.0
VERSION_S = 0.5
FOLLOW_S = 24 * 3600.0
FOLLOW_EVERY_S = 0.02
_WRAPPERS = "qsteer-"
"""How the names of qsteer-qemu begin (c/qemu_find.c)."""


def run(
    domain: str,
    operation: str,
    *,
    required: Callable[[], None],
    refuse: Callable[[str], None],
    done: Callable[[], None],
) -> None:
    """One call of the hook for a domain, whose XML is on stdin.  Raises nothing.

    ``required`` is called when it shows that the domain must not start unless it is steered, ``refuse`` with each
    reason why it is not, and ``done`` when all has been said; what comes then is for nobody to wait for.
    """
    work = _Work(domain, required, refuse if operation == "started" else None)
    try:
        work.do(operation)
    except QsteerError as error:
        work.failed(f"{operation}: {error}" + (f" ({error.hint})" if error.hint else ""))
    except OSError as error:
        work.failed(f"{operation}: {error.strerror or error}")
    except Exception as error:  # a mistake of qsteer's is no reason for a VM not to start
        work.failed(f"{operation}: {type(error).__name__}: {error}")
    done()
    work.follow()


class _Work:
    def __init__(self, name: str, required: Callable[[], None], refuse: Callable[[str], None] | None) -> None:
        self._name = name
        self._tell_required, self._refuse = required, refuse
        self._journal = SystemJournal(NAME, QSTEER_DOMAIN=printable(name))
        self._required = False
        self._version: tuple[int, int] | None = None
        self._to_follow: tuple[Process, Config] | None = None

    def do(self, operation: str) -> None:
        """Raises QsteerError."""
        description = libvirt.describe(sys.stdin.buffer.read(libvirt.FILE_MAX + 1))
        if not description:
            raise UsageError("what came on stdin describes no domain")
        if operation == "release":
            self._release()
            return
        config = self._config()
        self._check_policy(description, config)
        if operation == "migrate":
            self._migrate(description, config)
            return
        process, domain = libvirt.running(self._name)
        decisions = self._steer(process, domain, config, is_start=operation == "started")
        self._mark_wrapper(description, process)
        if any(decision.follow for decision in decisions):
            self._to_follow = process, config

    def failed(self, why: str) -> None:
        """Say it; and refuse the start, where steering is required."""
        self._say_failure(why, required=self._required)

    def _say_failure(self, why: str, *, required: bool) -> None:
        refuse = self._refuse if required else None
        self.say(f"{why}; steering is required, the start is refused" if refuse else why, Priority.WARNING)
        if refuse:
            refuse(why)

    def follow(self) -> None:
        """Steer a guest whose state comes later, once it runs."""
        if not self._to_follow:
            return
        self._refuse = None  # it has started
        try:
            self._until_it_runs(*self._to_follow)
        except QsteerError as error:
            self.say(f"no longer followed: {error}", Priority.WARNING)

    def say(self, text: str, priority: Priority = Priority.INFO) -> None:
        self._journal.say(printable(f"{self._name}: {text}"), priority)

    def _config(self) -> Config:
        """One with a mistake is left out, as if there were none."""
        try:
            return load()
        except ConfigError as error:
            self.say(f"the configuration is left out: {error}", Priority.WARNING)
            return Config()

    def _check_policy(self, domain: Description, config: Config) -> None:
        """Say what is wrong with the policy, and see whether it, or the configuration, insists on steering."""
        mistakes = domain.policy.mistakes if domain.policy else ()
        for mistake in mistakes:
            self.say(f"the domain's policy is left out: {mistake}", Priority.WARNING)
        wanted = [of_interface(config, domain.name, domain.policy, one)[0] for one in domain.interfaces]
        self._required = any(one.required for one in wanted)
        if self._required:
            self._tell_required()
        if mistakes and self._required:
            self.failed(f"the domain's policy has a mistake: {mistakes[0]}")

    def _release(self) -> None:
        with execute.lock(LOCK_S):
            holds.forget_ended()

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

    def _steer(self, process: Process, domain: Domain, config: Config, *, is_start: bool) -> list[Decision]:
        """What was done, tap by tap.  Raises QsteerError."""
        intent = Intent(Settings(), if_absent=not is_start, load=lambda: config)
        is_needed = not self._version and hookplan.needs_version(domain)
        with others.asked_for_version(process.pid) if is_needed else contextlib.nullcontext() as asked:
            taps = [tap for tap in inventory.of_domain(process, domain) if self._is_wanted(tap, intent)]
            keep_pid = others.keep_of((domain.name, domain.uuid))
            self._version = self._version or others.version(asked, VERSION_S)
        incoming = domain.incoming and is_start
        decisions = [
            hookplan.decide(tap, intent(tap), version=self._version, keep_pid=keep_pid, incoming=incoming)
            for tap in taps
        ]
        with execute.lock(LOCK_S):
            for tap, decision in zip(taps, decisions, strict=True):
                self._carry_out(tap, decision, intent)
        return decisions

    def _mark_wrapper(self, description: Description, process: Process) -> None:
        """Have libvirt look again at a wrapper behind which there is another QEMU now.

        libvirt remembers what a QEMU can do for as long as the file's ctime is the same, which that of a wrapper is
        when the QEMU is upgraded.  The file's mtime says which QEMU it was seen with: that one's ctime.
        """
        emulator = description.emulator or ""
        if not emulator.rpartition("/")[2].startswith(_WRAPPERS):
            return
        try:
            qemu, wrapper = Path(f"/proc/{process.pid}/exe").stat(), Path(emulator).stat()
            if wrapper.st_mtime_ns != qemu.st_ctime_ns:
                os.utime(emulator, ns=(wrapper.st_atime_ns, qemu.st_ctime_ns))
                self.say(
                    f"{emulator} runs another QEMU than when libvirt last looked: it looks again at the next start"
                )
        except OSError as error:
            told = f"libvirt may take {emulator} for an older QEMU: cannot mark it: {error.strerror}"
            self.say(told, Priority.WARNING)

    def _is_wanted(self, tap: Tap, intent: Intent) -> bool:
        return intent.config.libvirt.steer == "all" or intent.settings(tap) != Settings()

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
                program = f", program {program_id}" if program_id else ""
                notes = [note for note in plan.notes if not note.startswith("not kept: ")]
                told = "; ".join((f"{plan.result}{source}{program}", *notes, *((told,) if told else ())))
        told = f"{nic}({tap.name}): {told}"
        if fine:
            self.say(told)
        else:
            self._say_failure(told, required=bool(intent.settings(tap).required))

    def _until_it_runs(self, process: Process, config: Config) -> None:
        """Raises QsteerError, NotFoundError once the domain has ended."""
        ends = time.monotonic() + FOLLOW_S
        seen = None
        while time.monotonic() < ends:
            found = libvirt.status_file(self._name)
            if found != seen:
                seen = found
                now, domain = libvirt.running(self._name)
                if (now.pid, now.started) != (process.pid, process.started):
                    return
                if not domain.incoming:
                    self._steer(now, domain, config, is_start=True)
                    return
            time.sleep(FOLLOW_EVERY_S)  # nothing tells that a file was replaced without inotify, which Python lacks
