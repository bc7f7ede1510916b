# SPDX-License-Identifier: BSD-2-Clause
"""Every step of a plan fails in turn: what had been done is undone, and the tap is as it was."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from qsteer import execute, holds, inventory, kernel, procs, programs
from qsteer.errors import BusyError, ConflictError, PermissionDeniedError, QsteerError, UnsupportedError
from qsteer.model import Build, Source, Tap
from qsteer.plan import Plan, Refresh, Static, Wanted, plan_apply, plan_off
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import private, standin, support

pytestmark = pytest.mark.root


def seen() -> Tap:
    """This test's tap, looked at afresh."""
    taps = inventory.fetch().taps
    return next(tap for tap in taps if tap.holder and tap.holder.pid == os.getpid())


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with private.memory():
        yield


@pytest.fixture(autouse=True)
def no_holds(memory: None) -> Iterator[None]:
    yield
    private.forget_holds()


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
    attached: list[int] = []

    def overtaken(queue_fd: int, prog_fd: int) -> None:
        attach(queue_fd, prog_fd)
        if not attached:
            attach(queue_fd, foreign)
        attached.append(prog_fd)

    plan = plan_apply(seen(), STATIC)
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "attach", overtaken)
        with pytest.raises(ConflictError, match="something else"):
            execute.execute(plan)
    assert seen().program_id == programs.program_info_of(foreign).id
    assert len(attached) == 1
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


def test_refresh_goes_on_with_the_configuration(steered: int) -> None:
    """The same configuration in another program."""
    before = seen()
    assert before.program and before.program.ident
    done = execute.execute(
        Plan(
            tap=before,
            steps=(Refresh(source=Source.STATIC, displaced=before.program.ident.displaced),),
            result="refreshed",
            source=Source.STATIC,
            program_id=None,
        )
    )
    after = seen()
    assert after.program and after.program_id == done != steered
    assert before.content and after.content == before.content
    assert after.program.ident == before.program.ident


def test_a_refresh_of_what_went_away(steered: int, tap: support.TapUnderTest) -> None:
    """Taken off between looking and refreshing: that is somebody else's doing, and stays so."""
    wanted = Plan(
        tap=seen(),
        steps=(Refresh(source=Source.STATIC, displaced=0),),
        result="refreshed",
        source=Source.STATIC,
        program_id=None,
    )
    kernel.detach(tap.open.fds[0])
    with pytest.raises(BusyError, match="meanwhile"):
        execute.execute(wanted)
    assert seen().program_id == 0


@pytest.mark.parametrize("build", support.BUILDS)
def test_maps_that_qemu_writes_are_handed_on(need_root: None, build: Build) -> None:
    """The very maps, whatever they hold; a configuration that qsteer was given is handed on as it is."""
    config = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(3, 1), unclassified_queue=1)
    for source in (Source.SHARED_MAPS, Source.STATIC):
        first = programs.load_program(tap="qs-tap", source=source, config=config, build=build)
        before = programs.program_info(first.id)
        second = programs.load_program(tap="qs-tap", source=source, maps_of=before, build=build)
        after = programs.program_info(second.id)
        maps = [(info.config_id, info.key_id, info.table_id) for info in (before, after)]
        assert source is Source.STATIC or (maps[0] == maps[1] and all(maps[0]))
        assert programs.read_maps(after).config == config
        for packet in standin.PACKETS:
            assert programs.run_program(second.prog_fd, packet).queue == queue_of(packet, config)
        first.close()
        second.close()


@pytest.mark.parametrize("source", [Source.STATIC, Source.SHARED_MAPS])
@pytest.mark.parametrize("build", support.BUILDS)
def test_maps_of_others_are_never_used(need_root: None, build: Build, source: Source) -> None:
    foreign = support.foreign_program(1)
    with pytest.raises(UnsupportedError, match=r"has no (RSS )?maps"):
        programs.load_program(tap="qs-tap", source=source, maps_of=programs.program_info_of(foreign), build=build)
    os.close(foreign)


@pytest.mark.parametrize("build", support.BUILDS)
def test_maps_that_are_laid_out_otherwise(tap: support.TapUnderTest, build: Build) -> None:
    """Each in the place of another, of another size; and one that BPF may only read, of the right size."""
    bodies = programs.shared_bodies() if build is Build.SHARED_BODY else programs.NO_BODIES
    program = programs.load_program(tap="qs-tap", source=Source.SHARED_MAPS)
    config, key, table = program.fds[1:]
    read_only = private.array_map(b"tap_rss_map_con", 10, flags=private.BPF_F_RDONLY_PROG)
    cases = (
        (key, key, table),
        (config, config, table),
        (config, key, key),
        (table, key, table),
        (read_only, key, table),
    )
    try:
        for maps in cases:
            with pytest.raises(UnsupportedError) as caught:
                programs._load(build, "qs-tap", Source.SHARED_MAPS, 0, None, bodies, maps)
            assert caught.value.errno == errno.EOPNOTSUPP
        programs._load(build, "qs-tap", Source.SHARED_MAPS, 0, None, bodies, (config, key, table)).close()
    finally:
        program.close()
        os.close(read_only)
        if bodies != programs.NO_BODIES:
            os.close(bodies)


@pytest.mark.shared_body
def test_odd_maps_cost_no_other_tap_the_shared_body(need_root: None) -> None:
    """That a program cannot be loaded over some QEMU's maps says nothing about the body."""
    odd = (private.array_map(b"odd", 10), private.array_map(b"odd", 40), private.array_map(b"odd", 4))
    try:
        with pytest.raises(UnsupportedError):
            programs._load_either(
                None, lambda which, bodies: programs._load(which, "qs-tap", Source.QEMU_MAPS, 0, None, bodies, odd)
            )
    finally:
        for fd in odd:
            os.close(fd)
    program = programs.load_program(tap="qs-tap", source=Source.STATIC)
    assert program.build is Build.SHARED_BODY
    program.close()


@pytest.mark.shared_body
def test_a_body_that_is_refused_is_not_tried_again(need_root: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But one that somebody else has pinned is used."""
    tried = []
    refusal = PermissionDeniedError("no body", errno=errno.EPERM)

    def refuse(*_: object) -> int:
        tried.append(1)
        raise refusal

    with monkeypatch.context() as patched:
        patched.setattr(programs, "_refused", None)
        patched.setattr(programs, "out_fd_bpf", refuse)
        patched.setattr(programs, "_pinned_bodies", lambda: None)
        for _ in range(3):
            program = programs.load_program(tap="qs-tap", source=Source.STATIC)
            assert program.build is Build.COMPLETE
            program.close()
        assert len(tried) == 1
    os.close(programs.shared_bodies())
    with monkeypatch.context() as patched:
        patched.setattr(programs, "_refused", refusal)
        program = programs.load_program(tap="qs-tap", source=Source.STATIC)
        assert program.build is Build.SHARED_BODY
        program.close()


@pytest.mark.parametrize("build", support.BUILDS)
def test_maps_of_an_old_qemu(tap: support.TapUnderTest, build: Build) -> None:
    """Before 9.0 the maps of QEMU's own program are not mmapable; nothing else about them differs."""
    config = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(5, 9, 7, 3), unclassified_queue=1)
    maps = (
        private.array_map(b"tap_rss_map_con", 10),
        private.array_map(b"tap_rss_map_toe", 40),
        private.array_map(b"tap_rss_map_ind", 2, entries=128),
    )
    bodies = programs.shared_bodies() if build is Build.SHARED_BODY else programs.NO_BODIES
    program = programs._load(build, "qs-tap", Source.QEMU_MAPS, 0, None, bodies, maps)
    try:
        programs._write_config(program, config)
        info = programs.program_info(program.id)
        assert info.ident and info.ident.source is Source.QEMU_MAPS
        assert programs.read_maps(info).config == config
        for packet in standin.PACKETS:
            assert programs.run_program(program.prog_fd, packet).queue == queue_of(packet, config)
    finally:
        program.close()
        for fd in (*maps, bodies):
            if fd != programs.NO_BODIES:
                os.close(fd)


def test_another_version_is_outdated(steered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def outdated() -> bool:
        program = seen().program
        return bool(program and program.ident and program.ident.outdated)

    assert not outdated()
    monkeypatch.setattr(programs, "__version__", "0.0.9")
    assert outdated()


@pytest.mark.parametrize("change", ["apply", "off"])
def test_what_is_attached_while_a_program_is_loaded_stays(
    change: str, steered: int, tap: support.TapUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one is not qsteer's, and nobody said --replace."""
    plan = plan_apply(seen(), STATIC) if change == "apply" else plan_off(seen())
    load, put = programs.load_program, holds.put
    foreign = support.foreign_program(3)

    def attach_another() -> None:
        kernel.attach(tap.open.fds[0], foreign)

    def load_slowly(**wanted: Any) -> programs.Program:
        attach_another()
        return load(**wanted)

    def put_slowly(hold: holds.Hold, *, netns: int, ifindex: int) -> None:
        attach_another()
        put(hold, netns=netns, ifindex=ifindex)

    monkeypatch.setattr(programs, "load_program", load_slowly)
    monkeypatch.setattr(holds, "put", put_slowly)
    try:
        with pytest.raises(BusyError, match="changed meanwhile"):
            execute.execute(plan)
        assert seen().program_id == programs.program_info_of(foreign).id
        assert not seen().hold
    finally:
        os.close(foreign)
