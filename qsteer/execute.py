# SPDX-License-Identifier: BSD-2-Clause
"""Carries a plan out: each step with its undo, and the kernel's word on the result at the end."""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator

from qsteer import holds, kernel
from qsteer.errors import BusyError, ConflictError, QsteerError, from_errno
from qsteer.model import Source, Tap
from qsteer.plan import Attach, AttachHeld, Detach, Plan, PutHold, RemoveHold, Step


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

    Raises QsteerError; what had been done is undone then.
    """
    if not plan.steps:
        return plan.program_id or 0
    tap = plan.tap
    with _queue_fd(tap) as fd, _program_before(tap) as before, contextlib.ExitStack() as undo:
        program_id = plan.program_id or 0
        for step in plan.steps:
            program_id = _carry_out(step, tap, fd, before, undo) or program_id
        found = _attached_now(tap)
        if found != program_id:
            raise ConflictError(
                f'tap "{tap.name}" is steered by program {found}, not {program_id}: something else changes it, too'
            )
        undo.pop_all()
    return program_id


@contextlib.contextmanager
def _queue_fd(tap: Tap) -> Iterator[int]:
    """One of the tap's queues, for ioctls on the device; whichever process lets go of one."""
    failure: QsteerError | None = None
    for queue in tap.queues:
        with contextlib.ExitStack() as stack:
            try:
                fd = stack.enter_context(kernel.fd_of_process(queue.pid, queue.fd))
                # The process may have closed it, and opened another, since it was looked at.
                if kernel.tap_name(fd) != tap.name:
                    continue
            except QsteerError as error:
                failure = error
                continue
            yield fd
            return
    raise failure or BusyError(f'tap "{tap.name}" is going away')


def _carry_out(step: Step, tap: Tap, fd: int, before: int | None, undo: contextlib.ExitStack) -> int | None:
    """Do one step and say how to undo it; gives the program that it attached."""
    match step:
        case Attach():
            program = kernel.load_program(
                tap=tap.name, source=Source.STATIC, config=step.config, displaced=step.displaced
            )
            try:
                _switch(fd, before, undo, lambda: kernel.attach(fd, program.prog_fd))
            finally:
                program.close()
            return program.id
        case AttachHeld():
            assert tap.holder
            with kernel.fd_of_process(tap.holder.pid, step.fd) as prog_fd:
                if kernel.program_info_of(prog_fd).id != step.program_id:
                    raise BusyError(f"QEMU does not hold program {step.program_id} any more")
                _switch(fd, before, undo, lambda: kernel.attach(fd, prog_fd))
            return step.program_id
        case Detach():
            _switch(fd, before, undo, lambda: kernel.detach(fd))
        case PutHold():
            assert tap.holder
            holds.put(
                holds.Hold(tap=tap.name, pid=tap.holder.pid, started=tap.holder.started),
                netns=tap.netns,
                ifindex=tap.ifindex,
            )
            undo.callback(holds.remove, netns=tap.netns, ifindex=tap.ifindex)
        case RemoveHold():
            hold = holds.find(netns=tap.netns, ifindex=tap.ifindex, name=tap.name)
            holds.remove(netns=tap.netns, ifindex=tap.ifindex)
            if hold:
                undo.callback(holds.put, hold, netns=tap.netns, ifindex=tap.ifindex)
    return None


@contextlib.contextmanager
def _program_before(tap: Tap) -> Iterator[int | None]:
    """What is attached now, kept open so that it can be put back."""
    if not tap.program_id:
        yield None
        return
    with kernel.program_by_id(tap.program_id) as prog_fd:
        yield prog_fd


def _switch(fd: int, before: int | None, undo: contextlib.ExitStack, change: Callable[[], None]) -> None:
    """Change what is attached; the undo puts the program of before back."""
    change()
    if before is None:
        undo.callback(kernel.detach, fd)
    else:
        undo.callback(kernel.attach, fd, before)


def _attached_now(tap: Tap) -> int:
    for queue in kernel.open_queues():
        if (queue.netns, queue.ifindex) == (tap.netns, tap.ifindex):
            return queue.program_id
    raise BusyError(f'tap "{tap.name}" went away')
