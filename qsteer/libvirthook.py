# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer-libvirt-hook``: what libvirt's qemu hook does, ``qsteer apply`` for a domain that starts.

Theory of operation
===================

libvirt runs ``hooks/qemu.d/*`` as root with a domain's XML on stdin, at each turn of its life, and waits without a
limit; a failure ends the start.  A hook must not call libvirt, which would wait for itself.  So everything comes from
stdin and from libvirt's status files, and the time is limited here: when DEADLINE_S is over the process ends, whatever
it waits for.  A program is attached in one step, so that nothing half-done is left.

=========  =========================================================================================
started    steer every NIC as the policy in the domain and the configuration say (``hookplan``)
reconnect  the daemon was restarted: what is attached stays, a NIC without a program gets one
migrate    the domain is about to come: say what of its policy this host will not do
release    it has ended: forget what ``qsteer off`` held for it
=========  =========================================================================================

Nothing that fails here fails the domain, unless its policy, or the administrator's configuration, says that steering is
required: then the exit code is REFUSE, the only one that the script which libvirt calls passes on (``hookfile``).  On
``reconnect`` nothing fails at all: libvirt would end a domain that runs.  All is said in the system's journal, since
libvirt throws away what a hook says; and on stderr, which libvirt shows where a hook fails.

A guest whose state comes later (migration, restore) is followed by a child that outlives the hook, until the guest
runs and is steered, or its QEMU has ended.  Where a ``qsteer keep`` runs, that is left to it.
"""

import contextlib
import os
import sys
import threading
import time
from typing import NoReturn

from qsteer import execute, holds, hookplan, inventory, libvirt, others
from qsteer.config import ConfigError, load
from qsteer.domainpolicy import Policy, limited
from qsteer.errors import QsteerError, UsageError, printable
from qsteer.hookfile import NAME, OPERATIONS, REFUSE
from qsteer.hookplan import Decision
from qsteer.intent import Intent
from qsteer.libvirt import Description
from qsteer.model import Domain, Process, Tap
from qsteer.notify import Priority, SystemJournal
from qsteer.settings import Config, Settings

DEADLINE_S = 2.0
LOCK_S = 1.0
VERSION_S = 0.5
FOLLOW_S = 24 * 3600.0
FOLLOW_EVERY_S = 0.02


def main() -> int:
    """``qsteer-libvirt-hook NAME OPERATION SUBOPERATION EXTRA``, the domain's XML on stdin; gives the exit code."""
    arguments = sys.argv[1:]
    if len(arguments) != 4:
        print(f"{NAME}: this is for libvirt to run: NAME OPERATION SUBOPERATION EXTRA", file=sys.stderr)
        return UsageError.exit_code
    name, operation = arguments[:2]
    if operation not in OPERATIONS:
        return 0
    call = _Call(name, may_refuse=operation == "started")
    try:
        call.run(operation)
    except QsteerError as error:
        call.failed(f"{operation}: {error}" + (f" ({error.hint})" if error.hint else ""))
    except OSError as error:
        call.failed(f"{operation}: {error.strerror or error}")
    except Exception as error:  # a mistake of qsteer's is no reason for a VM not to start
        call.failed(f"{operation}: {type(error).__name__}: {error}")
    return call.end()


class _Call:
    """One call of the hook for a domain."""

    def __init__(self, name: str, *, may_refuse: bool) -> None:
        self._name, self._may_refuse = name, may_refuse
        self._journal = SystemJournal(NAME, QSTEER_DOMAIN=printable(name))
        self._required = False
        self._exit_code = 0
        self._deadline = threading.Timer(DEADLINE_S, self._time_is_up)
        self._deadline.daemon = True
        self._deadline.start()

    def run(self, operation: str) -> None:
        """Raises QsteerError."""
        description = libvirt.describe(sys.stdin.buffer.read(libvirt.FILE_MAX + 1))
        if not description:
            raise UsageError("what came on stdin describes no domain")
        if operation == "release":
            self._release()
            return
        config = self._config()
        self._check_policy(description.policy, config)
        if operation == "migrate":
            self._migrate(description, config)
            return
        process, domain = libvirt.running(self._name)
        decisions = self._steer(process, domain, config, is_start=operation == "started")
        if any(decision.follow for decision in decisions):
            self._follow(process, config)

    def end(self) -> int:
        """Nothing more is done; gives the exit code."""
        self._deadline.cancel()
        return self._exit_code

    def failed(self, why: str) -> None:
        """Say it; and refuse the start, where steering is required."""
        self._say_failure(why, required=self._required)

    def _say_failure(self, why: str, *, required: bool) -> None:
        if not required or not self._may_refuse:
            self.say(why, Priority.WARNING)
            return
        self._exit_code = REFUSE
        self.say(f"{why}; steering is required, the start is refused", Priority.WARNING)
        print(f"{NAME}: {printable(why)}; steering is required", file=sys.stderr, flush=True)

    def say(self, text: str, priority: Priority = Priority.INFO) -> None:
        self._journal.say(printable(f"{self._name}: {text}"), priority)

    def _time_is_up(self) -> NoReturn:
        self.failed(f"not done within {DEADLINE_S:g} s, given up")
        os._exit(self._exit_code)

    def _config(self) -> Config:
        """One with a mistake is left out, as if there were none."""
        try:
            return load()
        except ConfigError as error:
            self.say(f"the configuration is left out: {error}", Priority.WARNING)
            return Config()

    def _check_policy(self, policy: Policy | None, config: Config) -> None:
        """Say what is wrong with a policy, and see whether it insists."""
        if not policy:
            return
        for mistake in policy.mistakes:
            self.say(f"the domain's policy is left out: {mistake}", Priority.WARNING)
        insists = policy.required or any(entry.settings.required for entry in policy.entries)
        self._required = bool(insists) and "required" in config.libvirt.metadata
        if policy.mistakes and self._required:
            self.failed(f"the domain's policy: {policy.mistakes[0]}")

    def _release(self) -> None:
        with execute.lock(LOCK_S):
            holds.forget_ended()

    def _migrate(self, description: Description, config: Config) -> None:
        """There is no tap yet: only the policy can be looked at."""
        entries = description.policy.entries if description.policy else ()
        refused = {word for entry in entries for word in limited(entry.settings, config.libvirt.metadata)[1]}
        told = f"does not let it ask for {', '.join(sorted(refused))}" if refused else "does all that it asks for"
        about = f"its policy comes along, and this host {told}" if entries else "it comes without a policy"
        self.say(f"migrates to this host: {about}", Priority.NOTICE if refused else Priority.INFO)

    def _steer(self, process: Process, domain: Domain, config: Config, *, is_start: bool) -> list[Decision]:
        """What was done, tap by tap.  Raises QsteerError."""
        intent = Intent(Settings(), if_absent=not is_start, load=lambda: config)
        taps = [tap for tap in inventory.of_domain(process, domain) if self._is_wanted(tap, intent)]
        is_needed = any(map(hookplan.needs_version, taps))
        with others.asked_for_version(process.pid) if is_needed else contextlib.nullcontext() as asked:
            keep_pid = others.keep_of((domain.name, domain.uuid))
            version = others.version(asked, VERSION_S)
        decisions = [
            hookplan.decide(tap, intent(tap), version=version, keep_pid=keep_pid, incoming=domain.incoming and is_start)
            for tap in taps
        ]
        with execute.lock(LOCK_S):
            for tap, decision in zip(taps, decisions, strict=True):
                self._carry_out(tap, decision, intent)
        return decisions

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

    def _follow(self, process: Process, config: Config) -> None:
        """Leave a child that goes on until the guest runs; libvirt does not wait for it."""
        self._deadline.cancel()
        self._deadline.join()
        if os.fork():
            return
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for stream in range(3):
                os.dup2(null, stream)
            self._may_refuse = False
            self._until_it_runs(process, config)
        except QsteerError as error:
            self.say(f"no longer followed: {error}", Priority.WARNING)
        finally:
            os._exit(0)

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
