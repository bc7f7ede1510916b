# SPDX-License-Identifier: BSD-2-Clause
"""Carries a plan out: each step with its undo, and the kernel's word on the result at the end.

Theory of operation
-------------------
An undo is put down before the step that it undoes: it looks at what is there, and does nothing where the step has not
come about.  So a step that fails halfway is undone as well.  What comes before the switch (a program that is loaded)
belongs to nobody else, and goes with its fds.  The shared body's pin stays whatever happens: other taps may use it by
then, and ``clean`` takes it away.

A refreshed program works with the maps of the one whose place it takes, a static one as well: what is in them stays bit
by bit, be it what no RssConfig can say, and QEMU, which may write into them meanwhile, is followed.

Death at any point leaves the tap with the old program or with the new one, for the switch is one ioctl.  A hold is put
before a program is taken off, and lifted after one is attached: between the two the hold counts.  From a program to
in-kernel RSS and back it is two ioctls; where the kernel has a program go before RSS, one of the two always steers.
The mark that says whose RSS it is is put before it is set: without it, it would be somebody else's.
"""

import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterator

from qsteer import hashing, holds, kernel, marks, programs
from qsteer.errors import BusyError, ConflictError, QsteerError, UnsupportedError, from_errno, printable
from qsteer.model import Generation, OpenQueue, Process, ProgramInfo, Tap, VnetHash
from qsteer.plan import (
    Attach,
    AttachHeld,
    ClearRss,
    Detach,
    Plan,
    PutHold,
    RefillBody,
    Refresh,
    RemoveHold,
    SetRss,
    Step,
)
from qsteer.rss import NO_TYPES
from qsteer.tapfiles import TapFile

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
        hint = "changing what is attached takes root" if isinstance(error, PermissionError) else ""
        raise from_errno(error.errno or 0, f"cannot open {path}", hint=hint) from None
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
            log.info("%s: %s", printable(plan.tap.name), step)
            change.carry_out(step)
        found = kernel.queue_of(fd)
        if found.program_id != change.attached:
            raise ConflictError(
                f'tap "{plan.tap.name}" is steered by program {found.program_id}, not {change.attached}: '
                "something else changes it, too"
            )
        change.check_rss(found)
        undo.pop_all()
    return found.program_id


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
            if (now.program_id, now.vnet_hash) != (tap.program_id, queue.vnet_hash):
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
        self._rss = tap.vnet_hash
        self._tap = tap
        self._fd = fd
        self._before = before
        self._undo = undo

    def carry_out(self, step: Step) -> None:
        """Do one step, and remember its undo."""
        match step:
            case Attach():
                self._load_and_attach(
                    lambda: programs.load_program(
                        tap=self._tap.name, source=step.source, config=step.config, displaced=step.displaced
                    )
                )
            case Refresh():
                self._load_and_attach(
                    lambda: programs.load_program(
                        tap=self._tap.name,
                        source=step.source,
                        displaced=step.displaced,
                        maps_of=self._attached_program(),
                    )
                )
            case AttachHeld():
                with kernel.fd_of_process(self._holder().pid, step.fd) as prog_fd:
                    if programs.program_info_of(prog_fd).id != step.program_id:
                        raise BusyError(f"QEMU does not hold program {step.program_id} any more", hint="try again")
                    self._attach(prog_fd, step.program_id)
            case RefillBody():
                program = self._attached_program()
                self._on_failure("the shared body stays pinned", programs.unpin_refilled, program)
                programs.refill_bodies(program)
            case SetRss():
                self._refuse_changed()
                generation, ours = self._generation(), (self._rss,) if self._rss and self._rss.source else ()
                self._changes_file(self._mark)
                self._mark.restore(marks.of(self._tap, (step.rss, *ours)))
                self._changes_rss(step.rss)
                if step.rss.config:
                    hashing.set_rss(self._fd, generation, step.rss.config, report=step.rss.report)
                self._mark.restore(marks.of(self._tap, (step.rss,)))
            case ClearRss():
                self._refuse_changed()
                generation = self._generation()
                self._changes_file(self._mark)
                self._changes_rss(None)
                hashing.set_automq(self._fd, generation)
                self._mark.remove()
            case Detach():
                self._refuse_changed()
                self._changes_to(0)
                kernel.detach(self._fd)
            case PutHold():
                hold = holds.Hold(tap=self._tap.name, pid=self._holder().pid, started=self._holder().started)
                self._changes_file(self._hold)
                holds.put(hold, netns=self._tap.netns, ifindex=self._tap.ifindex)
            case RemoveHold():
                self._changes_file(self._hold)
                holds.remove(netns=self._tap.netns, ifindex=self._tap.ifindex)

    @property
    def _hold(self) -> TapFile:
        return holds.file(netns=self._tap.netns, ifindex=self._tap.ifindex)

    @property
    def _mark(self) -> TapFile:
        return marks.file(netns=self._tap.netns, ifindex=self._tap.ifindex)

    def check_rss(self, found: OpenQueue) -> None:
        """Whether tun hashes as it was told to.  Raises ConflictError."""
        if not found.vnet_hash and not self._rss:
            return
        if marks.digest(self._rss_now(found)) != marks.digest(self._rss):
            raise ConflictError(f'tap "{self._tap.name}" has another in-kernel RSS: something else changes it, too')

    def _rss_now(self, queue: OpenQueue) -> VnetHash | None:
        return hashing.vnet_hashes(os.getpid()).get((queue.netns, queue.ifindex)) if queue.vnet_hash else None

    def _generation(self) -> Generation:
        generation = self._tap.hashing.generation
        if not generation:
            raise UnsupportedError(f"in-kernel RSS cannot be changed: {self._tap.hashing.why_not}")
        return generation

    def _changes_rss(self, rss: VnetHash | None) -> None:
        before, self._rss = self._rss, rss
        self._on_failure("in-kernel RSS is not as it was", self._put_rss_back, rss, before)

    def _put_rss_back(self, rss: VnetHash | None, before: VnetHash | None) -> None:
        """Back to what was set before, unless something else has been set since."""
        if marks.digest(self._rss_now(kernel.queue_of(self._fd))) != marks.digest(rss):
            return
        if before and before.config:
            hashing.set_rss(self._fd, self._generation(), before.config, report=before.report)
        else:
            hashing.set_automq(self._fd, self._generation(), before.types if before and before.report else NO_TYPES)

    def _holder(self) -> Process:
        if not self._tap.holder:
            raise BusyError(f'the process that holds tap "{self._tap.name}" went away')
        return self._tap.holder

    def _attached_program(self) -> ProgramInfo:
        if not self._tap.program:
            raise BusyError(f'what is attached to tap "{self._tap.name}" is not known', hint="try again")
        return self._tap.program

    def _load_and_attach(self, load: Callable[[], programs.Program]) -> None:
        program = load()
        try:
            self._attach(program.prog_fd, program.id)
        finally:
            program.close()

    def _refuse_changed(self) -> None:
        """To load a program takes a while; what was attached meanwhile is not taken off."""
        now = kernel.queue_of(self._fd)
        if now.program_id != self.attached or bool(now.vnet_hash) != bool(self._rss):
            raise BusyError(f'tap "{self._tap.name}": what is attached changed meanwhile', hint="try again")

    def _attach(self, prog_fd: int, program_id: int) -> None:
        self._refuse_changed()
        self._changes_to(program_id)
        kernel.attach(self._fd, prog_fd)

    def _changes_to(self, program_id: int) -> None:
        self.attached = program_id
        self._on_failure("what steered it is not put back", self._put_back, program_id)

    def _put_back(self, program_id: int) -> None:
        """Back to what was attached before, unless something else has attached another program since."""
        # Where the kernel does not tell, what was attached a moment ago is taken to be still there.
        with contextlib.suppress(QsteerError):
            if kernel.queue_of(self._fd).program_id != program_id:
                return
        if self._before is None:
            kernel.detach(self._fd)
        else:
            kernel.attach(self._fd, self._before)

    def _changes_file(self, file: TapFile) -> None:
        self._on_failure(f"its {file.what} is not as it was", self._put_file_back, file, file.stored())

    def _put_file_back(self, file: TapFile, found: bytes | None) -> None:
        if file.stored() != found:
            file.restore(found)

    def _on_failure(self, lost: str, undo: Callable[..., None], *arguments: object) -> None:
        """Have an undo run if a step fails.  One that fails itself is told, and does not hide why the plan failed."""

        def run() -> None:
            try:
                undo(*arguments)
            except QsteerError as error:
                log.error("tap %s: %s: %s", printable(self._tap.name), lost, printable(str(error)))

        self._undo.callback(run)
