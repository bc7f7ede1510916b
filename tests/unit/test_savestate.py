# SPDX-License-Identifier: BSD-2-Clause
"""Readings of the device state, with QEMUs that fail, hang and lie; integration/ has the real ones."""

import contextlib
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import holds, pauses, procs, qmp, qmpvm, savestate
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.model import Domain, Nic, Process, Tap
from qsteer.qmpvm import Backend, QmpNic, QmpVm
from tests.unit import taps
from tests.unit.qemus import FakeQemu, HangUp, Refusal

STATE = b"the state"
RUNNING = {"status": "running", "running": True}


def used(path: str, process: Process, nic: qmpvm.QmpNic, queues: int) -> tuple[int | None, ...]:
    return qmp.converse(path, process, lambda monitor: qmpvm.used(monitor, nic, queues))


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(holds, "RUNTIME", tmp_path / "run")
    return holds.RUNTIME


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    yield
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.fixture
def me() -> Process:
    process = procs.read(os.getpid())
    assert process
    return process


class Qemu(FakeQemu):
    """A VM that runs and writes STATE."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        self.path = str(path)
        self.status = "running"
        self.fdsets: dict[int, object] = {}
        self.answers = {
            "query-status": lambda _: {"status": self.status, "running": self.status == "running"},
            "query-migrate": {},
            "query-jobs": [],
            "query-block-jobs": [],
            "query-fdsets": lambda _: [
                {"fdset-id": number, "fds": [{"fd": 9, "opaque": opaque}]} for number, opaque in self.fdsets.items()
            ],
            "add-fd": self.add_fd,
            "remove-fd": self.remove_fd,
            "xen-save-devices-state": self.write,
            "cont": self.cont,
        }

    def add_fd(self, arguments: Mapping[str, object]) -> object:
        self.fdsets[3] = arguments["opaque"]
        return {"fdset-id": 3, "fd": 9}

    def remove_fd(self, arguments: Mapping[str, object]) -> object:
        number = arguments["fdset-id"]
        if not isinstance(number, int) or number not in self.fdsets:
            raise Refusal("GenericError", "no such fdset")
        del self.fdsets[number]
        return {}

    def write(self, arguments: Mapping[str, object]) -> object:
        if arguments != {"filename": "/dev/fdset/3", "live": False}:
            raise Refusal("GenericError", "not what may be asked")
        os.write(self.fds[-1], STATE)
        return {}

    def cont(self, _: object) -> object:
        self.status = "running"
        return {}

    def read(self, process: Process) -> savestate.DeviceState:
        return savestate.device_state(self.path, process, interval_s=0)


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    fake = Qemu(tmp_path / "qmp")
    fake.start()
    yield fake
    fake.close()


def test_a_reading(qemu: Qemu, me: Process) -> None:
    qemu.answers["xen-save-devices-state"] = with_events(qemu, ("STOP", 1000.25), ("X", 1000.3), ("RESUME", 1000.2505))
    state = qemu.read(me)
    assert state.data == STATE
    assert state.paused_ms == pytest.approx(0.5)
    assert not qemu.fdsets
    assert "cont" not in qemu.commands


def with_events(qemu: Qemu, *events: tuple[str, float]) -> Callable[[Mapping[str, object]], object]:
    def write(arguments: Mapping[str, object]) -> object:
        for name, seconds in events:
            qemu.say(name, seconds)
        time.sleep(0.002)  # a VM stands still for as long as its QEMU says, but not longer than we waited
        return qemu.write(arguments)

    return write


@pytest.mark.parametrize(
    "events",
    [
        (),
        (("STOP", 5.0),),
        (("RESUME", 5.0),),
        (("STOP", 5.0), ("RESUME", 4.0)),
        (("STOP", 5.0), ("RESUME", 500.0)),
    ],
)
def test_a_pause_without_sensible_events(qemu: Qemu, me: Process, events: tuple[tuple[str, float], ...]) -> None:
    """How long the answer took is the bound."""
    qemu.answers["xen-save-devices-state"] = with_events(qemu, *events)
    assert 2 <= qemu.read(me).paused_ms < 5000


def test_no_more_events_are_kept_than_needed(qemu: Qemu, me: Process) -> None:
    qemu.answers["do"] = lambda _: qemu.said.extend([{"event": "STOP"}, {"event": "X"}] * 500)

    async def ask(monitor: qmp.Monitor) -> int:
        return len((await monitor.ask_and_hear("do", {}, ("STOP", "RESUME")))[1])

    assert qmp.converse(qemu.path, me, ask) == 64


@pytest.mark.parametrize("timestamp", [None, 7, {}, {"seconds": "1"}, {"seconds": 10**400, "microseconds": 10**400}])
def test_events_without_a_time(qemu: Qemu, me: Process, timestamp: object) -> None:
    def write(arguments: Mapping[str, object]) -> object:
        qemu.said += [{"event": name, "timestamp": timestamp} for name in ("STOP", "RESUME")]
        return qemu.write(arguments)

    qemu.answers["xen-save-devices-state"] = write
    assert not math.isnan(qemu.read(me).paused_ms)


@pytest.mark.parametrize("status", ["paused", "postmigrate", "inmigrate", "io-error", "save-vm", "\x1b[2J", None, 7])
def test_only_while_it_runs(qemu: Qemu, me: Process, status: object) -> None:
    qemu.answers["query-status"] = {"status": status}
    with pytest.raises(BusyError, match="not running") as caught:
        qemu.read(me)
    assert str(caught.value).isprintable()
    assert not {"add-fd", "xen-save-devices-state", "cont"} & set(qemu.commands)


@pytest.mark.parametrize(
    ("query", "answer", "says"),
    [
        ("query-migrate", {"status": "active"}, "migration"),
        ("query-migrate", {"status": "postcopy-active"}, "migration"),
        ("query-migrate", {"status": 7}, "migration"),
        ("query-jobs", [{"id": "a", "type": "backup", "status": "running"}], "job"),
        ("query-jobs", [{"status": "concluded"}, {"type": "mirror", "status": "ready"}], "mirror"),
        ("query-jobs", [7], "job"),
        ("query-block-jobs", [{"device": "d", "type": "stream", "status": "paused"}], "stream"),
    ],
)
def test_what_a_stop_could_disturb(qemu: Qemu, me: Process, query: str, answer: object, says: str) -> None:
    qemu.answers[query] = answer
    with pytest.raises(BusyError, match=says):
        qemu.read(me)
    assert not {"add-fd", "xen-save-devices-state"} & set(qemu.commands)


def test_what_has_ended_does_not_matter(qemu: Qemu, me: Process) -> None:
    del qemu.answers["query-jobs"]  # older than jobs
    qemu.answers["query-migrate"] = {"status": "completed", "blocked-reasons": []}
    qemu.answers["query-block-jobs"] = [{"type": "backup", "status": "concluded"}]
    assert qemu.read(me).data == STATE


def test_an_earlier_reading_that_was_killed(qemu: Qemu, me: Process) -> None:
    """Its fd is taken back; nobody else's is."""
    qemu.fdsets = {0: None, 1: "qsteer device-state", 2: "of libvirt"}
    qemu.read(me)
    assert qemu.fdsets == {0: None, 2: "of libvirt"}


def refuse(*_: object) -> object:
    raise Refusal("GenericError", "saving\nfailed")


@pytest.mark.parametrize(("left", "told"), [("running", False), ("save-vm", True), ("paused", False)])
def test_a_failure_leaves_it_running(qemu: Qemu, me: Process, left: str, told: bool) -> None:
    """It is told to go on only if it stands there for the saving."""

    def fail(_: object) -> object:
        qemu.status = left
        return refuse()

    qemu.answers["xen-save-devices-state"] = fail
    with pytest.raises(QsteerError, match=r"did not do xen-save-devices-state: saving$"):
        qemu.read(me)
    assert ("cont" in qemu.commands) == told
    assert not qemu.fdsets


def test_a_qemu_without_the_command(qemu: Qemu, me: Process) -> None:
    del qemu.answers["xen-save-devices-state"]
    with pytest.raises(UnsupportedError, match="does not know xen-save-devices-state"):
        qemu.read(me)
    assert not qemu.fdsets


def hang_up(*_: object) -> object:
    raise HangUp


@pytest.mark.parametrize("command", ["query-status", "add-fd", "xen-save-devices-state", "remove-fd"])
def test_a_qemu_that_ends(qemu: Qemu, me: Process, command: str) -> None:
    qemu.answers[command] = hang_up
    if command == "remove-fd":
        assert qemu.read(me).data == STATE
        return
    with pytest.raises(QsteerError, match="broke off"):
        qemu.read(me)


def test_a_disk_that_does_not_write(qemu: Qemu, me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savestate, "WRITING_TIMEOUT_S", 0.2)
    monkeypatch.setattr(savestate, "_LAST_WORDS_S", 0.1)
    qemu.answers["xen-save-devices-state"] = lambda _: time.sleep(1)
    began = time.monotonic()
    with pytest.raises(QsteerError, match=r"not written its device state within 0\.2 s") as caught:
        qemu.read(me)
    assert time.monotonic() - began < 0.9
    assert "lets the VM run again" in caught.value.hint


def test_too_much(qemu: Qemu, me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(arguments: Mapping[str, object]) -> object:
        os.truncate(qemu.fds[-1], savestate.STATE_MAX + 1)
        return {}

    qemu.answers["xen-save-devices-state"] = write
    with pytest.raises(UnsupportedError, match="64 MiB"):
        qemu.read(me)


def test_not_too_often(qemu: Qemu, me: Process, runtime: Path) -> None:
    """A refusal before the VM was stopped does not count."""
    qemu.status = "paused"
    with pytest.raises(BusyError, match="not running"):
        savestate.device_state(qemu.path, me)
    qemu.status = "running"
    savestate.device_state(qemu.path, me)
    with pytest.raises(BusyError, match="was stopped for a reading") as caught:
        savestate.device_state(qemu.path, me)
    assert caught.value.exit_code == 8
    assert "try again in 1 s" in caught.value.hint
    (stamp,) = (runtime / "pauses").iterdir()
    for damaged in ("", "soon", "1 soon", "1e999 0", "nan 0", "99999999999 0", "-1 0", "-1 -1", "1 1 1"):
        stamp.write_text(damaged)
        savestate.device_state(qemu.path, me)


def test_the_longer_it_took_the_longer_it_takes(me: Process, runtime: Path) -> None:
    with pauses.turn(me) as stamp:
        stamp(pauses.UNFINISHED_S)
    with pytest.raises(BusyError) as caught, pauses.turn(me):
        pass
    assert "try again in 10 s" in caught.value.hint
    with pauses.turn(me, interval_s=0) as stamp:
        stamp(0.7)
    with pytest.raises(BusyError) as caught, pauses.turn(me):
        pass
    assert "try again in 35 s" in caught.value.hint


def test_stamps_of_processes_that_are_gone(me: Process, runtime: Path) -> None:
    (runtime / "pauses").mkdir(parents=True)
    for name in (f"{me.pid}-1", "4194305-5", "x", "-", f"{me.pid}"):
        (runtime / "pauses" / name).touch()
    with pauses.turn(me):
        assert [path.name for path in (runtime / "pauses").iterdir()] == [f"{me.pid}-{me.started}"]
        with pytest.raises(BusyError, match="being read already"), pauses.turn(me, interval_s=0):
            pass


def test_patience(me: Process, runtime: Path) -> None:
    """The next turn is waited for if it comes in time, and refused at once if it does not."""
    with pauses.turn(me) as stamp:
        stamp(0.001)
        stopped = time.monotonic()
    with pytest.raises(BusyError, match="was stopped"), pauses.turn(me, interval_s=0.3, patience_s=0.05):
        pass
    assert time.monotonic() - stopped < 0.25
    with pauses.turn(me, interval_s=0.3, patience_s=5):
        assert 0.29 < time.monotonic() - stopped < 3


def test_patience_while_another_reads(me: Process, runtime: Path) -> None:
    with contextlib.ExitStack() as other:
        other.enter_context(pauses.turn(me, interval_s=0))
        began = time.monotonic()
        with pytest.raises(BusyError, match="being read"), pauses.turn(me, interval_s=0, patience_s=0.1):
            pass
        assert 0.1 <= time.monotonic() - began < 2
        timer = threading.Timer(0.1, other.pop_all().close)
        timer.start()
        with pauses.turn(me, interval_s=0, patience_s=10):
            assert time.monotonic() - began < 5
        timer.join()


def test_a_reading_is_as_patient_as_it_is_told(qemu: Qemu, me: Process) -> None:
    described(qemu)
    with pauses.turn(me) as stamp:
        stamp(0.001)
    for patience_s, says in ((0.0, "was stopped"), (5.0, "device state")):
        with pytest.raises(QsteerError, match=says):
            savestate.reading(qemu.path, me, tap_of_fd(3), interval_s=0.2, patience_s=patience_s)


def test_the_folder_is_removed_meanwhile(me: Process, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``qsteer clean`` does with one that is empty: once is no matter, and it is not tried for ever."""
    real = os.open
    removed = 0

    def remove_first(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        nonlocal removed
        if removed < times and str(path).startswith(str(runtime)):
            removed += 1
            (runtime / "pauses").rmdir()
            runtime.rmdir()
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", remove_first)
    times = 2
    with pytest.raises(QsteerError, match="cannot keep"), pauses.turn(me):
        pass
    times, removed = 1, 0
    with pauses.turn(me):
        assert removed == 1


def test_no_place_for_stamps(me: Process, runtime: Path) -> None:
    runtime.write_text("a file")
    with pytest.raises(QsteerError, match="cannot keep"), pauses.turn(me):
        pass


@pytest.mark.parametrize(
    ("text", "locks"),
    [
        ("", False),
        ('lock_manager = "lockd"', True),
        ("  lock_manager='sanlock' # ours", True),
        ('#lock_manager = "lockd"', False),
        ('lock_manager = "nop"', False),
        ('x = 1\nlock_manager = "lockd"\n', True),
        ('user = "lock_manager"', False),
        ("\udcff" * 10, False),
    ],
)
def test_lock_manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, locks: bool) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_bytes(text.encode("utf-8", "surrogateescape"))
    monkeypatch.setattr(savestate, "_LIBVIRT_CONF", conf)
    assert savestate.lock_manager() == locks
    conf.unlink()
    assert not savestate.lock_manager()
    conf.mkdir()  # cannot be read
    assert savestate.lock_manager()


INFO = """\
virtio-net-pci.0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
 \\ #net071: index=0,type=user,net=10.0.2.0,restrict=off
net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:57
 \\ net0: index=0,type=tap,fd=3
net0: index=1,type=nic,
 \\ net0: index=1,type=tap,fd=4
nic1: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:58
 \\ net1: index=0,type=tap,ifname=tap7,script=no,downscript=no
alone: index=0,type=tap,fd=12
hub0port0: index=0,type=hubport,
fd=99
 \\ net2: index=0,type=tap,fd=99999999999999999999
 \\ net3: index=0,type=tap,ifname=a/b,script=no
"""


def test_info_network() -> None:
    assert qmpvm.parse_info_network(INFO.replace("\n", "\r\n")) == {
        "#net071": Backend(kind="user", queues=1),
        "net0": Backend(kind="tap", queues=2, fds=(3, 4)),
        "net1": Backend(kind="tap", queues=1, ifname="tap7"),
        "alone": Backend(kind="tap", queues=1, fds=(12,)),
        "net2": Backend(kind="tap", queues=1),
        "net3": Backend(kind="tap", queues=1),
    }
    answers: tuple[object, ...] = (None, 7, [], "", "\0" * 100, "a: index=" * 100_000, "x" * (5 << 20))
    for nonsense in answers:
        assert qmpvm.parse_info_network(nonsense) == {}


TREE: Mapping[str, Mapping[str, object]] = {
    "/machine/peripheral/n0": {"netdev": "net0", "mac": "52:54:00:00:00:AB", "rss": True, "mq": True, "addr": 0,
                               "parent_bus": "/machine/peripheral/br/br", "type": "virtio-net-pci"},
    "/machine/peripheral/br": {"addr": "00.0", "parent_bus": "/machine/peripheral/rp/rp"},
    "/machine/peripheral/rp": {"addr": 17, "parent_bus": "/machine/q35/pcie.0"},
    "/machine/peripheral-anon/device[0]": {"netdev": "net1", "parent_bus": "/machine/odd/pci.0", "addr": 8},
    "/machine/unattached/device[7]": {"netdev": "net2", "parent_bus": "/machine/loop/bus", "addr": 24},
    "/machine/loop": {"addr": 8, "parent_bus": "/machine/loop/bus"},
    "/machine/q35": {"type": "q35-pcihost"},
    "/machine/odd": {"type": "pxb-host"},
}  # fmt: skip


def described(qemu: Qemu) -> None:
    """Answers that tell of the devices in TREE."""

    def get(arguments: Mapping[str, object]) -> object:
        try:
            return TREE[str(arguments["path"])][str(arguments["property"])]
        except KeyError:
            raise Refusal("GenericError", "no such property") from None

    def children(arguments: Mapping[str, object]) -> object:
        paths = [path for path in TREE if path.rpartition("/")[0] == arguments["path"]]
        nics = [path for path in paths if "netdev" in TREE[path]]
        found = [{"name": path.rpartition("/")[2], "type": "child<virtio-net-pci>"} for path in nics]
        return [{"name": "type", "type": "string"}, 7, {"name": "../x", "type": "child<virtio-net-pci>"}, *found]

    qemu.answers |= {
        "human-monitor-command": INFO,
        "query-name": {"name": "web1"},
        "query-uuid": {"UUID": "11111111-2222-3333-4444-555555555555"},
        "qom-list": children,
        "qom-get": get,
    }


def test_inspect(qemu: Qemu, me: Process) -> None:
    described(qemu)
    vm = qmpvm.inspect(qemu.path, me)
    assert (vm.name, vm.uuid, vm.version, vm.status) == (
        "web1",
        "11111111-2222-3333-4444-555555555555",
        (10, 0, 2),
        "running",
    )
    assert [(nic.id, nic.netdev, nic.mac, nic.rss, nic.mq) for nic in vm.nics] == [
        ("n0", "net0", "52:54:00:00:00:ab", True, True),
        (None, "net1", None, False, False),
        (None, "net2", None, False, False),
    ]
    assert [nic.device for nic in vm.nics] == ["0000:00:02.1:00.0:00.0", None, None]
    assert [nic.backend and nic.backend.fds for nic in vm.nics] == [(3, 4), (), ()]
    assert "x-query-virtio-status" not in qemu.commands


def test_used_buffers(qemu: Qemu, me: Process) -> None:
    def queue_status(arguments: Mapping[str, object]) -> object:
        assert arguments["path"] == "/machine/peripheral/n0/virtio-backend"
        answers = {0: {"used-idx": 65537}, 2: {"used-idx": "7"}, 4: []}
        try:
            return answers[arguments["queue"]]  # type: ignore[index]
        except KeyError:
            raise Refusal("GenericError", "Invalid virtqueue number") from None

    described(qemu)
    nic = qmpvm.inspect(qemu.path, me).nics[0]
    assert used(qemu.path, me, nic, 2) == (None, None)  # before 7.2
    qemu.answers["x-query-virtio-queue-status"] = queue_status
    assert used(qemu.path, me, nic, 4) == (1, None, None, None)
    for other in (replace(nic, vhost=True), replace(nic, vhost=None), replace(nic, backend=None)):
        assert used(qemu.path, me, other, 2) == (None, None)


def test_the_vhost_of_a_process(me: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qemu: Qemu) -> None:
    """None of the NICs' queues has one, all have, or it cannot be told."""
    described(qemu)
    stand_in = tmp_path / "vhost-net"
    stand_in.touch()
    monkeypatch.setattr(qmpvm, "_VHOST_NET", stand_in)
    for opened, vhost in ((0, False), (1, None), (4, True)):
        with contextlib.ExitStack() as stack:
            for _ in range(opened):
                stack.enter_context(stand_in.open())
            assert {nic.vhost for nic in qmpvm.inspect(qemu.path, me).nics} == {vhost}


def hostile(draw: random.Random, depth: int = 0) -> object:
    """Anything that JSON can say."""
    match draw.randrange(9 if depth < 4 else 6):
        case 0:
            return None
        case 1:
            return draw.choice((True, False, -1, 0, 3, 255, 256, 1 << 70, 1e308, -0.5))
        case 2:
            return draw.choice(("", "running", "\x1b]0;x\x07", "\ud800", "a" * 300, "/machine/q35", INFO, "..", "00.0"))
        case 3:
            return draw.choice(("child<virtio-net-pci>", "q35-pcihost", "net0", "concluded", "qsteer device-state"))
        case 4 | 5:
            return draw.choice(([], {}, [{}], {"status": "running"}, [{"name": "n0", "type": "child<virtio-net-pci>"}]))
        case 6:
            return [hostile(draw, depth + 1) for _ in range(draw.randrange(4))]
    keys = ("status", "name", "type", "UUID", "fdset-id", "fds", "fd", "opaque", "used-idx", "return", "error", "id")
    return {draw.choice(keys): hostile(draw, depth + 1) for _ in range(draw.randrange(4))}


def test_hostile_answers(qemu: Qemu, me: Process) -> None:
    """A QEMU that says anything at all raises nothing but QsteerError, of one line."""
    draw = random.Random(7)
    described(qemu)
    sane = dict(qemu.answers)
    done = 0
    for _ in range(150):
        qemu.answers = dict(sane)
        for command in draw.sample(sorted(sane), draw.choice((1, 1, 2, len(sane)))):
            qemu.answers[command] = hostile(draw)
        for ask in (lambda: qmpvm.inspect(qemu.path, me), lambda: qemu.read(me)):
            try:
                done += bool(ask())
            except QsteerError as error:
                assert str(error).isprintable()
        qemu.fdsets.clear()
    assert done > 50


def nic(**fields: object) -> QmpNic:
    plain = QmpNic(
        path="/machine/peripheral/n0",
        driver="virtio-net-pci",
        id=None,
        netdev=None,
        mac=None,
        rss=True,
        mq=True,
        device="0000:00:02.0",
        backend=None,
        vhost=False,
    )
    return replace(plain, **fields)  # type: ignore[arg-type]


def vm(*nics: QmpNic) -> QmpVm:
    return QmpVm(name="web1", uuid=None, version=(10, 0, 2), status="running", nics=nics)


def tap_of_fd(fd: int, named: Nic | None = None) -> Tap:
    """The tap ``vnet0``, whose one queue is fd ``fd`` of the VM's process."""
    return replace(taps.tap(), queues=(replace(taps.queue(), fd=fd),), nic=named)


NAMED = Nic(id=None, netdev=None, mac=None, rss=True, vhost=False)


def test_the_nic_behind_a_tap() -> None:
    """The fds count first, then the name that QEMU gave the tap, then the command line: its netdev, id or MAC."""
    first = nic(netdev="net0", id="n0", mac="52:54:00:00:00:01", backend=Backend(kind="tap", fds=(9, 10)))
    second = nic(netdev="net1", id="n1", mac="52:54:00:00:00:02", backend=Backend(kind="tap", ifname="vnet0"))
    third = nic(netdev="net2", id="n2", mac="52:54:00:00:00:03", backend=Backend(kind="tap", ifname="other"))
    seen = vm(first, second, third)
    assert qmpvm.nic_of(seen, tap_of_fd(9, replace(NAMED, netdev="net2"))) == first
    assert qmpvm.nic_of(seen, tap_of_fd(11, replace(NAMED, netdev="net2"))) == second
    by_name = vm(first, third)
    for named in (
        replace(NAMED, netdev="net2", id="n0"),
        replace(NAMED, id="n2", mac="52:54:00:00:00:01"),
        replace(NAMED, mac="52:54:00:00:00:03"),
    ):
        assert qmpvm.nic_of(by_name, tap_of_fd(11, named)) == third
    for seen, tap in (
        (by_name, tap_of_fd(11)),
        (by_name, tap_of_fd(11, NAMED)),
        (by_name, tap_of_fd(11, replace(NAMED, netdev="net7"))),
        (vm(), tap_of_fd(9)),
        (vm(first, replace(first, netdev="net3")), tap_of_fd(9, replace(NAMED, netdev="net0"))),
        (by_name, replace(tap_of_fd(9), queues=(replace(taps.queue(), fd=9, pid=5),))),
    ):
        with pytest.raises(NotFoundError, match="which of its"):
            qmpvm.nic_of(seen, tap)


def test_what_is_refused_before_the_vm_is_stopped(qemu: Qemu, me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    described(qemu)
    qemu.answers["human-monitor-command"] = INFO.replace("net0: index=0,type=tap,fd=3", "net1: index=0,type=tap,fd=3")
    with pytest.raises(UnsupportedError, match="place of the NIC"):
        savestate.reading(qemu.path, me, tap_of_fd(3))
    domain = Domain(name="web\x1b1", uuid="", pid=me.pid, interfaces=(), monitor=None, agent=None)
    monkeypatch.setattr(savestate, "lock_manager", lambda: True)
    with pytest.raises(UnsupportedError, match="leases") as caught:
        savestate.reading(qemu.path, me, replace(tap_of_fd(4), domain=domain))
    assert str(caught.value).isprintable()
    assert "xen-save-devices-state" not in qemu.commands
