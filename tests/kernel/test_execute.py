# SPDX-License-Identifier: BSD-2-Clause
"""Every step of a plan fails in turn: what had been done is undone, and the tap is as it was."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from qsteer import execute, holds, inventory, kernel, procs, programs
from qsteer.errors import BusyError, ConflictError, QsteerError
from qsteer.model import Source, Tap
from qsteer.plan import Static, Wanted, plan_apply, plan_off
from tests.kernel import support

pytestmark = pytest.mark.root


def seen() -> Tap:
    """This test's tap, looked at afresh."""
    taps = inventory.fetch().taps
    return next(tap for tap in taps if tap.holder and tap.holder.pid == os.getpid())


@pytest.fixture(autouse=True)
def own_runtime_directory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "RUNTIME", tmp_path_factory.mktemp("run"))


@pytest.fixture
def steered(tap: support.TapUnderTest) -> Iterator[int]:
    """The id of a program that is attached already."""
    yield execute.execute(plan_apply(seen(), Wanted()))


def fail(*_: object, **__: object) -> None:
    raise QsteerError("made to fail")


STATIC = Wanted(source=Source.STATIC, static=Static(table=(0, 1)))


@pytest.mark.parametrize(("module", "broken"), [(programs, "load_program"), (kernel, "attach")])
def test_apply_that_fails_leaves_what_was(
    steered: int, module: ModuleType, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_apply(seen(), STATIC)
    monkeypatch.setattr(module, broken, fail)
    with pytest.raises(QsteerError, match="made to fail"):
        execute.execute(plan)
    monkeypatch.undo()
    assert seen().program_id == steered


def test_apply_that_cannot_lift_the_hold(steered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    execute.execute(plan_off(seen()))
    held = seen()
    assert held.hold and not held.program_id
    with monkeypatch.context() as patched:
        patched.setattr(holds, "remove", fail)
        with pytest.raises(QsteerError, match="made to fail"):
            execute.execute(plan_apply(held, STATIC))
    assert (seen().program_id, seen().hold) == (0, True)


def test_off_that_cannot_detach_lifts_its_hold(steered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "detach", fail)
        with pytest.raises(QsteerError, match="made to fail"):
            execute.execute(plan_off(seen()))
    assert (seen().program_id, seen().hold) == (steered, False)


def test_a_program_that_came_meanwhile_stays(tap: support.TapUnderTest) -> None:
    """Between looking and changing somebody else attaches: it must not be displaced unseen."""
    plan = plan_apply(seen(), STATIC)
    foreign = support.foreign_program(1)
    kernel.attach(tap.open.fds[0], foreign)
    there = seen().program_id
    with pytest.raises(BusyError, match="meanwhile"):
        execute.execute(plan)
    assert seen().program_id == there
    os.close(foreign)


def test_undo_leaves_what_came_after_it(
    tap: support.TapUnderTest, steered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU attaches its program right after us: that is a conflict, and QEMU's program stays."""
    foreign = support.foreign_program(1)
    attach = kernel.attach

    def overtaken(queue_fd: int, prog_fd: int) -> None:
        attach(queue_fd, prog_fd)
        attach(queue_fd, foreign)

    plan = plan_apply(seen(), STATIC)
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "attach", overtaken)
        with pytest.raises(ConflictError, match="something else"):
            execute.execute(plan)
    assert seen().program_id == programs.program_info_of(foreign).id
    os.close(foreign)


def test_a_holder_that_went_away(tap: support.TapUnderTest) -> None:
    gone = dataclasses.replace(seen(), holder=None)
    with pytest.raises(BusyError):
        execute.execute(plan_off(gone))


def test_a_result_that_the_kernel_does_not_confirm(
    tap: support.TapUnderTest, steered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something takes the program off at once: that is said, and left as it is."""
    attach = kernel.attach

    def undone(queue_fd: int, prog_fd: int) -> None:
        attach(queue_fd, prog_fd)
        kernel.detach(queue_fd)

    plan = plan_apply(seen(), STATIC)
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "attach", undone)
        with pytest.raises(ConflictError, match="something else"):
            execute.execute(plan)
    assert seen().program_id == 0


def test_no_program_is_left_behind(steered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a failed apply loaded is gone, and no fd of this process holds it."""
    plan = plan_apply(seen(), STATIC)
    before = procs.held_programs(os.getpid())
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "attach", fail)
        with pytest.raises(QsteerError):
            execute.execute(plan)
    execute.execute(plan)
    assert procs.held_programs(os.getpid()) == before


def test_a_tap_that_went_away(tap: support.TapUnderTest) -> None:
    plan = plan_apply(seen(), STATIC)
    fds = tap.open.fds
    saved = [os.dup(fd) for fd in fds]
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nothing, fd)
    os.close(nothing)
    try:
        with pytest.raises(QsteerError):
            execute.execute(plan)
    finally:
        for copy, fd in zip(saved, fds, strict=True):
            os.dup2(copy, fd)
            os.close(copy)


def test_one_change_at_a_time() -> None:
    with execute.lock(1), pytest.raises(BusyError), execute.lock(0.05):
        pass


KILLED = """
import os, sys
from qsteer import holds, kernel, programs
from qsteer.__main__ import main
step = {step}
def and_die(*arguments, **options):
    step(*arguments, **options)
    os.kill(os.getpid(), 9)
{step} = and_die
sys.exit(main())
"""


def killed_after(step: str, *arguments: str) -> None:
    """Run qsteer on this test's tap, and kill it right after a step."""
    command = [sys.executable, "-c", KILLED.format(step=step), *arguments, "--pid", str(os.getpid())]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL


def test_apply_killed_before_it_attaches(steered: int) -> None:
    before = support.loaded_programs()
    killed_after("programs.load_program", "apply", "--equal", "2")
    assert seen().program_id == steered
    support.wait_until("the program's end", lambda: support.loaded_programs() == before)


def test_apply_killed_after_it_attached(steered: int) -> None:
    killed_after("kernel.attach", "apply", "--equal", "2")
    after = seen()
    assert after.program_id not in (0, steered)
    assert after.content and after.content.config and set(after.content.config.table) == {0, 1}
    assert support.qsteer("apply", "--pid", str(os.getpid())).stdout.split()[1] == "unchanged"


def test_off_killed_before_it_detaches(steered: int) -> None:
    killed_after("holds.put", "off")
    assert seen().program_id == steered
    done = support.qsteer("off", "--pid", str(os.getpid()))
    assert done.returncode == 0 and seen().program_id == 0
    assert support.qsteer("apply", "--pid", str(os.getpid())).returncode == 0
