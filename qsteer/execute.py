# SPDX-License-Identifier: BSD-2-Clause
"""Carries a plan out: each step with its undo, and the kernel's word on the result at the end."""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from qsteer import holds, kernel, programs
from qsteer.errors import BusyError, ConflictError, QsteerError, from_errno
from qsteer.model import Process, Source, Tap
from qsteer.plan import Attach, AttachHeld, Detach, Plan, PutHold, RefillBody, RemoveHold, Step

log = logging.getLogger(__name__)


@contextlib.contextmanager
def lock(timeout_s: float) -> Iterator[None]:
    """One change at a time on this host.  Raises BusyError when another qsteer does not finish in time."""
    deadline = time.monotonic() + timeout_s
    path = holds.RUNTIME / "lock"
    try:
        holds.RUNTIME.mkdir(mode=0o755, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot open {path}", hint="changing what is attached takes root") from None
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise BusyError("another qsteer is changing things", hint="try again, or raise --timeout") from None
                time.sleep(0.02)  # flock() knows no timeout
        yield
    finally:
        os.close(fd)


def execute(plan: Plan) -> int:
    """Carry out the steps, and check with the kernel.  Gives the id of the program that is attached, 0 for none.

    Raises QsteerError; what had been done is undone then, but for what something else has changed meanwhile.
    """
    if not plan.steps:
        return plan.program_id or 0
    with _queue_fd(plan.tap) as fd, _program_before(plan.tap) as before, contextlib.ExitStack() as undo:
        change = _Change(tap=plan.tap, fd=fd, before=before, undo=undo)
        for step in plan.steps:
            log.info("%s: %s", plan.tap.name, step)
            change.carry_out(step)
        found = kernel.queue_of(fd).program_id
        if found != change.attached:
            raise ConflictError(
                f'tap "{plan.tap.name}" is steered by program {found}, not {change.attached}: '
                "something else changes it, too"
            )
        undo.pop_all()
    return found


@contextlib.contextmanager
def _queue_fd(tap: Tap) -> Iterator[int]:
    """One of the tap's queues, for ioctls on the device; whichever process lets go of one.

    The process may have closed it, and opened another, since it was looked at: the copy itself must belong to the tap.
    """
    failure: QsteerError | None = None
    for queue in tap.queues:
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(kernel.fd_of_process(queue.pid, queue.fd))
                now = kernel.queue_of(fd)
            except QsteerError as error:
                failure = error
                continue
            if (now.netns, now.ifindex) != (tap.netns, tap.ifindex):
                continue
            if now.program_id != tap.program_id:
                raise BusyError(f'tap "{tap.name}": what is attached changed meanwhile', hint="try again")
            yield fd
            return
    raise failure or BusyError(f'tap "{tap.name}" went away')


@contextlib.contextmanager
def _program_before(tap: Tap) -> Iterator[int | None]:
    """What is attached now, kept open so that it can be put back."""
    if not tap.program_id:
        yield None
        return
    with programs.program_by_id(tap.program_id) as prog_fd:
        yield prog_fd


class _Change:
    """One plan on its way: what is attached by now, and how to go back."""

    def __init__(self, *, tap: Tap, fd: int, before: int | None, undo: contextlib.ExitStack) -> None:
        self.attached = tap.program_id
        self._tap = tap
        self._fd = fd
        self._before = before
        self._undo = undo

    def carry_out(self, step: Step) -> None:
        """Do one step, and remember its undo."""
        tap = self._tap
        match step:
            case Attach():
                program = programs.load_program(
                    tap=tap.name, source=Source.STATIC, config=step.config, displaced=step.displaced
                )
                try:
                    self._attach(program.prog_fd, program.id)
                finally:
                    program.close()
            case AttachHeld():
                with kernel.fd_of_process(self._holder().pid, step.fd) as prog_fd:
                    if programs.program_info_of(prog_fd).id != step.program_id:
                        raise BusyError(f"QEMU does not hold program {step.program_id} any more", hint="try again")
                    self._attach(prog_fd, step.program_id)
            case RefillBody():
                assert tap.program
                programs.refill_bodies(tap.program)
            case Detach():
                kernel.detach(self._fd)
                self._changed_to(0)
            case PutHold():
                hold = holds.Hold(tap=tap.name, pid=self._holder().pid, started=self._holder().started)
                holds.put(hold, netns=tap.netns, ifindex=tap.ifindex)
                self._undo.callback(holds.remove, netns=tap.netns, ifindex=tap.ifindex)
            case RemoveHold():
                found = holds.find(netns=tap.netns, ifindex=tap.ifindex)
                holds.remove(netns=tap.netns, ifindex=tap.ifindex)
                if found:
                    self._undo.callback(holds.put, found, netns=tap.netns, ifindex=tap.ifindex)

    def _holder(self) -> Process:
        if not self._tap.holder:
            raise BusyError(f'the process that holds tap "{self._tap.name}" went away')
        return self._tap.holder

    def _attach(self, prog_fd: int, program_id: int) -> None:
        kernel.attach(self._fd, prog_fd)
        self._changed_to(program_id)

    def _changed_to(self, program_id: int) -> None:
        self.attached = program_id
        self._undo.callback(self._put_back, program_id)

    def _put_back(self, program_id: int) -> None:
        """Back to what was attached before, unless something else has attached another program since."""
        if kernel.queue_of(self._fd).program_id != program_id:
            return
        if self._before is None:
            kernel.detach(self._fd)
        else:
            kernel.attach(self._fd, self._before)
