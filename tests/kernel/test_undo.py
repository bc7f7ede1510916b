# SPDX-License-Identifier: BSD-2-Clause
"""Every call into the kernel fails in turn, in every step of every plan: the tap and its hold are as they were."""

import contextlib
import errno
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qsteer import execute, holds, inventory, kernel, links, programs, provider, run, runplan, shim
from qsteer.errors import QsteerError
from qsteer.model import Build, MapsContent, Source, Tap
from qsteer.plan import Attach, AttachHeld, Detach, Plan, PutHold, RefillBody, Refresh, RemoveHold, Step
from qsteer.qmp import QemuProbe
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, RssConfig
from tests import packets
from tests.kernel import private, support

pytestmark = pytest.mark.root

TAP = "qsun-undo"
OLD = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(0, 1, 2, 3))
NEW = RssConfig(types=BASE_TYPES, key=bytes(range(40, 80)), table=(3, 2), unclassified_queue=1)
PACKETS = [packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, packets.tcp((p, 80)))) for p in range(20)]

UNTOUCHED = {"qs_free", "qs_log_take"}
"""What gives no result."""
SWITCHES = {"qs_steering_attach", "qs_steering_detach", "replace", "unlink"}
"""What changes the tap or its hold: an interrupt right after one of them must be undone as well."""


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """``run`` gives QEMU the default handling of two signals that Python ignores, right before it becomes QEMU."""
    yield
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with private.memory():
        yield


@dataclass(kw_only=True)
class Fault:
    """Makes one call fail: the n-th into C or to the file system.  Counts them."""

    at: int
    interrupt: bool
    calls: int = 0
    hit: str = ""

    def is_next(self, name: str) -> bool:
        if self.interrupt and name not in SWITCHES:
            return False
        self.calls += 1
        if self.calls == self.at:
            self.hit = name
        return self.calls == self.at

    def around(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the shim that fails when it is its turn; interrupted ones have done their work."""

        def wrapped(*arguments: object) -> Any:
            if not self.is_next(name):
                return call(*arguments)
            if self.interrupt:
                call(*arguments)
                raise KeyboardInterrupt
            return -errno.EIO

        return wrapped

    def around_path(self, name: str) -> Callable[..., Any]:
        call = getattr(Path, name)

        def wrapped(path: Path, *arguments: object, **options: object) -> Any:
            if not path.is_relative_to(private.RUNTIME) or not self.is_next(name):
                return call(path, *arguments, **options)
            if self.interrupt:
                call(path, *arguments, **options)
                raise KeyboardInterrupt
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        return wrapped

    @contextlib.contextmanager
    def injected(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for module in (kernel, programs, shim):
                patch.setattr(module, "lib", FaultyLibrary(module.lib, self))
            for name in ("write_bytes", "read_bytes", "replace", "unlink"):
                patch.setattr(Path, name, self.around_path(name))
            yield


class FaultyLibrary:
    """The shim, with a fault in it."""

    def __init__(self, library: Any, fault: Fault) -> None:
        self._library = library
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._library, name)
        return self._fault.around(name, value) if callable(value) and name not in UNTOUCHED else value


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """All that a plan may change, and all that it may leave behind."""

    program_id: int
    content: MapsContent | None
    body_present: bool
    loaded: frozenset[int]
    files: dict[str, bytes]
    pins: dict[str, int | None]
    fds: int


def seen() -> Tap:
    return next(tap for tap in inventory.fetch().taps if tap.name == TAP)


def state() -> State:
    tap = seen()
    return State(
        program_id=tap.program_id,
        content=tap.content,
        body_present=tap.body_present,
        loaded=frozenset(support.programs_of(TAP)),
        files=private.files(),
        pins=private.pins(),
        fds=len(os.listdir("/proc/self/fd")),  # noqa: PTH208
    )


def as_it_was(before: State, after: str) -> None:
    """Fails the test unless everything is as before; the kernel frees programs in a worker of its own."""
    deadline = time.monotonic() + support.patience(5)
    while (now := state()) != before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert now == before, f"after {after}"
    check_packets()


def plan(*steps: Step) -> Plan:
    return Plan(tap=seen(), steps=steps, result="", source=None, program_id=None)


def attached(tap: support.TapUnderTest, *, source: Source = Source.STATIC, build: Build | None = None) -> int:
    """A program with the old configuration, on the tap."""
    program = programs.load_program(tap=TAP, source=source, config=OLD, build=build)
    tap.attach(program)
    program.close()
    return program.id


Prepare = Callable[[support.TapUnderTest, contextlib.ExitStack], tuple[Step, ...]]


def attach(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    return (Attach(config=NEW, source=Source.STATIC, displaced=0),)


def attach_on_hold(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    execute.execute(plan(PutHold()))
    return (Attach(config=NEW, source=Source.GUEST_AGENT, displaced=7), RemoveHold())


def replace(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    attached(tap)
    return (Attach(config=NEW, source=Source.DEVICE_STATE, displaced=0),)


def attach_held(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    held = programs.load_program(tap=TAP, source=Source.SHARED_MAPS, config=NEW)
    stack.callback(held.close)
    attached(tap)
    return (PutHold(), AttachHeld(program_id=held.id, fd=held.prog_fd))


def refresh_static(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    attached(tap)
    execute.execute(plan(PutHold()))
    return (Refresh(source=Source.STATIC, displaced=0), RemoveHold())


def refresh_shared(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    held = programs.load_program(tap=TAP, source=Source.SHARED_MAPS, config=OLD, build=Build.COMPLETE)
    stack.callback(held.close)
    tap.attach(held)
    return (Refresh(source=Source.SHARED_MAPS, displaced=0),)


def refill(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    bodies = private.unpinned_bodies()
    program = programs._load(Build.SHARED_BODY, TAP, Source.STATIC, 0, OLD, bodies)
    tap.attach(program)
    program.close()
    os.close(bodies)
    support.wait_until("the body is gone", lambda: not seen().body_present)
    execute.execute(plan(PutHold()))
    return (RefillBody(), RemoveHold())


def off(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    attached(tap)
    return (PutHold(), Detach())


def off_over_a_stale_hold(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    there = seen()
    holds.put(holds.Hold(tap="gone", pid=1, started=1), netns=there.netns, ifindex=there.ifindex)
    return off(tap, stack)


def hold_alone(tap: support.TapUnderTest, stack: contextlib.ExitStack) -> tuple[Step, ...]:
    return (PutHold(),)


SCENARIOS = (
    attach,
    attach_on_hold,
    replace,
    attach_held,
    refresh_static,
    refresh_shared,
    pytest.param(refill, marks=pytest.mark.shared_body),
    off,
    off_over_a_stale_hold,
    hold_alone,
)


def configuration(tap: Tap) -> RssConfig | None:
    return tap.content.config if tap.content and tap.content.enabled else None


def check_packets() -> None:
    """What is attached does what its maps say."""
    tap = seen()
    config = configuration(tap)
    if not tap.program_id or not tap.body_present:
        return
    assert config
    with programs.program_by_id(tap.program_id) as prog_fd:
        for packet in PACKETS:
            assert programs.run_program(prog_fd, packet).queue == queue_of(packet, config)


@contextlib.contextmanager
def prepared(prepare: Prepare) -> Iterator[tuple[Step, ...]]:
    """A tap as it is before the plan."""
    support.wait_until("the end of the last tap's programs", lambda: not support.programs_of(TAP))
    with contextlib.ExitStack() as stack:
        tap = stack.enter_context(support.tap(TAP, 4))
        stack.callback(private.forget_holds)
        yield prepare(tap, stack)


@pytest.mark.parametrize("interrupt", [False, True], ids=["fails", "is interrupted"])
@pytest.mark.parametrize("prepare", SCENARIOS)
def test_each_call_in_turn(namespace: str, prepare: Prepare, interrupt: bool) -> None:
    """Until the plan comes through without meeting the fault."""
    if Build.SHARED_BODY in support.BUILDS:
        os.close(programs.shared_bodies())
    kernel.open_queues()
    undone, number = 0, itertools.count(1)
    came_through = False
    while not came_through:
        with prepared(prepare) as steps:
            before = state()
            for at in number:
                fault = Fault(at=at, interrupt=interrupt)
                wanted = plan(*steps)
                try:
                    with fault.injected():
                        found = execute.execute(wanted)
                except (QsteerError, KeyboardInterrupt):
                    as_it_was(before, after=fault.hit)
                    undone += 1
                    continue
                # It met no fault, or a stub could not be loaded, and a complete program was.
                assert seen().program_id == found
                check_packets()
                came_through = not fault.hit
                break
    assert undone >= 1


@pytest.mark.parametrize("trouble", ["read-only", "full", "a file", "a directory in its place"])
def test_a_hold_that_cannot_be_written(namespace: str, trouble: str, caplog: pytest.LogCaptureFixture) -> None:
    """``off`` detaches nothing that it cannot hold off; nothing half written stays."""
    with prepared(off) as steps, contextlib.ExitStack() as stack:
        directory = private.RUNTIME / "holds"
        directory.mkdir(exist_ok=True)
        if trouble == "read-only":
            stack.callback(private.mount, "-o", "remount,rw", str(private.RUNTIME))
            private.mount("-o", "remount,ro", str(private.RUNTIME))
        elif trouble == "full":
            stack.callback(private.unmount, str(directory))
            private.mount("-t", "tmpfs", "-o", "size=4k", "qsteer", str(directory))
            (directory / "filler").write_bytes(bytes(4096))
        elif trouble == "a file":
            directory.rmdir()
            directory.write_text("not a directory\n")
            stack.callback(directory.unlink)
        else:
            there = seen()
            in_the_way = directory / f"{there.netns}-{there.ifindex}"
            in_the_way.mkdir()
            stack.callback(in_the_way.rmdir)
        before = state()
        with pytest.raises(QsteerError, match="hold"):
            execute.execute(plan(*steps))
        as_it_was(before, after=trouble)
        assert not caplog.records


def test_an_undo_that_fails_is_told(
    namespace: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The hold cannot be lifted, and then what was attached cannot be put back: both are said, in one line each."""
    with prepared(attach_on_hold) as steps:
        attached_once: list[int] = []

        def fail(*_: object, **__: object) -> None:
            attached_once.append(1)
            raise QsteerError("made to fail")

        monkeypatch.setattr(holds, "remove", fail)
        monkeypatch.setattr(kernel, "detach", fail)
        with pytest.raises(QsteerError, match="made to fail"):
            execute.execute(plan(*steps))
        assert len(attached_once) == 2
        (record,) = caplog.records
        assert record.getMessage() == f"tap {TAP}: what steered it is not put back: made to fail"


def test_the_kernel_does_not_tell(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is attached cannot be read any more, after the switch: what was there is put back all the same."""
    with prepared(replace) as steps:
        before = state()
        wanted, asked = plan(*steps), itertools.count()
        queue_of_kernel = kernel.queue_of

        def silent(queue_fd: int) -> Any:
            if next(asked):
                raise QsteerError("made to fail")
            return queue_of_kernel(queue_fd)

        with monkeypatch.context() as patch:
            patch.setattr(kernel, "queue_of", silent)
            with pytest.raises(QsteerError, match="made to fail"):
                execute.execute(wanted)
        as_it_was(before, after="the readback")


PROPERTIES = {"mac": "str", "mq": "bool", "vectors": "uint32", "rss": "bool", "ebpf-rss-fds": "list"}


class BecameQemuError(Exception):
    """In place of the exec that ends this process."""


def test_run_with_each_call_failing_in_turn(namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two NICs, of which the first is on a bridge: no tap, no program and no fd is left, wherever it fails."""
    support.add_bridge("qsun-br")
    specs = runplan.parse_taps(
        (f"id=net0,queues=2,ifname={TAP},bridge=qsun-br,mac=52:54:00:00:00:01", "id=net1,queues=2,ifname=qsun-two")
    )
    probe = QemuProbe(version=(10, 0, 0), libbpf=True, properties={"virtio-net-pci": PROPERTIES})
    wanted = runplan.make_plan(
        specs=specs, command=("qemu-system-x86_64",), probe=probe, vm="qsun", vhost_available=False
    )
    assert all(nic.steered for nic in wanted.nics)

    def execve(*_: object) -> None:
        raise BecameQemuError

    configure = links.configure
    monkeypatch.setattr(os, "execve", execve)
    names = (TAP, "qsun-two")
    if Build.SHARED_BODY in support.BUILDS:
        os.close(programs.shared_bodies())
    for at in itertools.count(1):
        before = (set(os.listdir("/proc/self/fd")), private.pins())  # noqa: PTH208
        fault = Fault(at=at, interrupt=False)

        def may_fail(*arguments: Any, fault: Fault = fault, **options: Any) -> None:
            if fault.is_next("configure"):
                raise QsteerError("made to fail")
            configure(*arguments, **options)

        monkeypatch.setattr(links, "configure", may_fail)
        with pytest.raises((QsteerError, BecameQemuError)), fault.injected():
            run._execute(wanted, provider.provider(None), "/usr/bin/qemu", None, quiet=True)
        assert (set(os.listdir("/proc/self/fd")), private.pins()) == before, f"after {fault.hit}"  # noqa: PTH208
        assert not any(links.find(name) for name in names), fault.hit
        support.wait_until(
            f"the end of programs after {fault.hit}", lambda: not any(map(support.programs_of, names)), timeout_s=5
        )
        if not fault.hit:
            break
    assert at > 20
