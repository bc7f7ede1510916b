# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer plug`` and ``unplug`` against a QEMU made of a few lines of Python; integration/ has the real one."""

import asyncio
import contextlib
import os
import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
from qemu.qmp import ExecuteError
from qemu.qmp.models import ErrorResponse

from qsteer import cli, libvirt, plug, plugplan, procs, qemuargs, qmp, qmpvm, reach, ready, runplan, unplug
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError, UsageError
from qsteer.libvirt import Found
from qsteer.model import Domain, Process
from qsteer.peer import OwnPath
from qsteer.provider import Provider
from qsteer.qmpvm import Bus, Slot
from qsteer.reach import Reach, at_socket
from qsteer.ready import ReadyTap
from qsteer.runplan import CCW_DRIVER, PCI_DRIVER, Order
from tests.unit.qemus import GREETING, FakeQemu, HangUp, Refusal

TYPES = {
    "mac": "str",
    "mq": "bool",
    "vectors": "uint32",
    "rss": "bool",
    "host_mtu": "uint16",
    "netdev": "str",
    "ebpf-rss-fds": "list",
}
PORT = "/machine/peripheral/rp0"
CHANGES = ("getfd", "netdev_add", "device_add")
FDS = 4 + 4
TAP = "id=net1,queues=4"


class FakeVm:
    """What a QEMU has of its VM, and its answers to what plug and unplug ask.

    ``devices`` and ``netdevs`` are by id, ``names`` the fds that were given names.
    """

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.netdevs: dict[str, list[int]] = {}
        self.devices: dict[str, dict[str, Any]] = {}
        self.libbpf = True
        self.lets_go = True
        self.buses: dict[str, tuple[str, list[str]]] = {
            "/machine/q35/pcie.0": ("PCIE", []),
            f"{PORT}/rp0": ("PCIE", []),
        }

    def close(self) -> None:
        """What QEMU's end does."""
        for fds in (self.names.values(), *self.netdevs.values(), *(one["_fds"] for one in self.devices.values())):
            for fd in fds:
                os.close(fd)

    def take_fd(self) -> int:
        """The fd that came with a command."""
        raise NotImplementedError

    def say(self, event: str, data: Mapping[str, object]) -> None:
        raise NotImplementedError

    def answer(self, command: str, arguments: Mapping[str, Any]) -> object:
        """Raises Refusal."""
        handler = getattr(self, "_" + command.replace("-", "_"), None)
        if handler is None:
            raise Refusal("CommandNotFound", f"The command {command} has not been found")
        return handler(arguments)

    def _query_status(self, _: Mapping[str, Any]) -> object:
        return {"status": "running"}

    def _query_name(self, _: Mapping[str, Any]) -> object:
        return {"name": "web1"}

    def _query_uuid(self, _: Mapping[str, Any]) -> object:
        return {"UUID": "00000000-0000-0000-0000-000000000000"}

    def _request_ebpf(self, _: Mapping[str, Any]) -> object:
        if not self.libbpf:
            raise Refusal("CommandNotFound", "no")
        return {"object": ""}

    def _device_list_properties(self, arguments: Mapping[str, Any]) -> object:
        if arguments["typename"] != PCI_DRIVER:
            raise Refusal("DeviceNotFound", "no")
        return [{"name": name, "type": kind} for name, kind in TYPES.items()]

    def _human_monitor_command(self, _: Mapping[str, Any]) -> object:
        used = {device["netdev"] for device in self.devices.values()}
        lines: list[str] = []
        for netdev, fds in self.netdevs.items():
            before = " \\ " if netdev in used else ""
            lines += (f"{before}{netdev}: index={index},type=tap,fd={fd}" for index, fd in enumerate(fds))
        return "\r\n".join(lines)

    def _qom_list(self, arguments: Mapping[str, Any]) -> object:
        path = arguments["path"]
        if path == "/machine":
            return [{"name": "q35", "type": "child<q35-pcihost>"}]
        if path == "/machine/peripheral":
            ports = [name.split("/")[3] for name in self.buses if name.startswith(path)]
            return [
                *({"name": name, "type": f"child<{device['driver']}>"} for name, device in self.devices.items()),
                *({"name": name, "type": "child<pcie-root-port>"} for name in ports),
            ]
        if path in self.buses:
            return [{"name": f"child[{index}]", "type": "link<x>"} for index, _ in enumerate(self.buses[path][1])]
        return [
            {"name": bus.rpartition("/")[2], "type": f"child<{kind}>"}
            for bus, (kind, _) in self.buses.items()
            if bus.rpartition("/")[0] == path
        ]

    def _qom_get(self, arguments: Mapping[str, Any]) -> object:
        device = self.devices.get(arguments["path"].rpartition("/")[2], {})
        if arguments["property"] not in device:
            raise Refusal("GenericError", "no such property")
        return device[arguments["property"]]

    def _getfd(self, arguments: Mapping[str, Any]) -> object:
        fd = self.take_fd()
        if arguments["fdname"] in self.names:
            os.close(self.names[arguments["fdname"]])
        self.names[arguments["fdname"]] = fd
        return {}

    def _closefd(self, arguments: Mapping[str, Any]) -> object:
        if arguments["fdname"] not in self.names:
            raise Refusal("GenericError", "not found")
        os.close(self.names.pop(arguments["fdname"]))
        return {}

    def _netdev_add(self, arguments: Mapping[str, Any]) -> object:
        if arguments["id"] in self.netdevs:
            raise Refusal("GenericError", "Duplicate ID")
        names = arguments["fds"].split(":")
        if any(name not in self.names for name in names):
            raise Refusal("GenericError", "no such fd")
        self.netdevs[arguments["id"]] = [self.names.pop(name) for name in names]
        return {}

    def _netdev_del(self, arguments: Mapping[str, Any]) -> object:
        if arguments["id"] not in self.netdevs:
            raise Refusal("DeviceNotFound", "no such netdev")
        for fd in self.netdevs.pop(arguments["id"]):
            os.close(fd)
        return {}

    def _device_add(self, arguments: Mapping[str, Any]) -> object:
        if arguments["id"] in self.devices:
            raise Refusal("GenericError", "Duplicate device ID")
        fds = [self.names.pop(name) for name in arguments.get("ebpf-rss-fds", [])]
        self.devices[arguments["id"]] = {**arguments, "_fds": fds}
        return {}

    def _device_del(self, arguments: Mapping[str, Any]) -> object:
        name = arguments["id"]
        if name not in self.devices:
            raise Refusal("DeviceNotFound", "no such device")
        if self.devices[name].get("_asked"):
            raise Refusal("GenericError", f"Device {name} is already in the process of unplug")
        self.devices[name]["_asked"] = True
        if self.lets_go:
            self.release(name)
        return {}

    def release(self, name: str) -> None:
        """The guest lets a device go."""
        for fd in self.devices.pop(name)["_fds"]:
            os.close(fd)
        self.say("DEVICE_DELETED", {"path": f"/machine/peripheral/{name}/virtio-backend"})
        self.say("DEVICE_DELETED", {"device": name, "path": f"/machine/peripheral/{name}"})


class Served(FakeVm):
    """A fake VM behind a socket.  ``at`` is what to do instead of answering, at the nth command that changes it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.at: dict[int, Callable[[], object]] = {}
        self.changes: list[str] = []
        self.qemu = FakeQemu(path, {})
        self.qemu._answer = self._served  # type: ignore[method-assign]

    def take_fd(self) -> int:
        if not self.qemu.fds:
            raise Refusal("GenericError", "No file descriptor supplied via SCM_RIGHTS")
        return self.qemu.fds.pop(0)

    def say(self, event: str, data: Mapping[str, object]) -> None:
        self.qemu.said.append({"event": event, "data": data, "timestamp": {"seconds": 1, "microseconds": 0}})

    def _served(self, message: Mapping[str, object]) -> dict[str, object]:
        command, arguments = str(message["execute"]), cast(Mapping[str, Any], message.get("arguments", {}))
        if command == "qmp_capabilities":
            return {"return": {}}
        try:
            if command in CHANGES:
                self.changes.append(command)
                self.at.get(len(self.changes), lambda: None)()
            return {"return": self.answer(command, arguments)}
        except Refusal as refusal:
            return {"error": {"class": refusal.args[0], "desc": refusal.args[1]}}

    @property
    def held(self) -> int:
        """How many fds it has."""
        programs = sum(len(device["_fds"]) for device in self.devices.values())
        return len(self.names) + sum(map(len, self.netdevs.values())) + programs + len(self.qemu.fds)


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    before = open_fds()
    served = Served(tmp_path / "qmp")
    served.qemu.start()
    monkeypatch.setattr(plug, "provider", lambda _: Provider(make=fake_tap, has_vhost=False))
    yield served
    served.qemu.close()
    served.qemu.fds.clear()  # closed
    served.close()
    assert open_fds() == before, "an fd is left open"


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def fake_tap(order: Order) -> ReadyTap:
    """What QEMU is given, without a tap: it takes root to make one."""
    fds = [os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC) for _ in range(order.queues + 4 * order.steered)]
    name = order.ifname or "qsplfake"
    return ReadyTap(
        name=name,
        mac=order.mac or runplan.stable_mac(order.vm or name, order.id, ""),
        queue_fds=tuple(fds[: order.queues]),
        program_fds=tuple(fds[order.queues :]),
        program="qsteer 7 (complete)",
    )


def reached(vm: Served) -> Reach:
    return replace(at_socket(str(vm.path)), name="web1")


def plug_in(vm: Served, tap: str = TAP, *, bus: str | None = None, dry_run: bool = False) -> plug.Plugged:
    return plug.plug(reached(vm), tap, bus=bus, dry_run=dry_run)


def nothing_is_left(vm: Served) -> None:
    assert (vm.names, vm.netdevs, vm.devices, vm.held) == ({}, {}, {}, 0)


def test_plug_and_unplug(vm: Served) -> None:
    done = plug_in(vm)
    assert vm.changes == ["getfd"] * FDS + ["netdev_add", "device_add"]
    assert (len(vm.names), len(vm.netdevs["net1"]), vm.held) == (0, 4, FDS)
    device = vm.devices["net1"]
    assert (device["mq"], device["vectors"], device["rss"], device["bus"]) == (True, 10, True, "rp0")
    assert device["mac"] == runplan.stable_mac("web1", "net1", ready.machine_id())
    assert "qsplfake" in str(done) and done.json()["program"] == "qsteer 7 (complete)"

    gone = unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=False)
    assert gone.json()["steps"] == ["device_del net1, and wait until the guest lets it go", "netdev_del net1"]
    nothing_is_left(vm)


def test_a_dry_run_changes_nothing(vm: Served) -> None:
    vm.names["qsteer-queue0"] = a_fd()
    told = str(plug_in(vm, dry_run=True))
    assert vm.changes == [] and list(vm.names) == ["qsteer-queue0"]
    assert "open the tap of net1 with 4 queues" in told and "getfd qsteer-program3" in told and "device_add" in told
    vm.answer("closefd", {"fdname": "qsteer-queue0"})
    plug_in(vm)
    assert "device_del net1" in str(unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=True))
    assert list(vm.devices) == ["net1"]


def close_sent(vm: Served) -> None:
    """What came with a getfd that was not done, QEMU closes itself."""
    for fd in vm.qemu.fds:
        os.close(fd)
    vm.qemu.fds.clear()


def refuse() -> None:
    raise Refusal("GenericError", "made to\nfail")


def hang_up() -> None:
    raise HangUp


@pytest.mark.parametrize("step", range(1, FDS + 3))
def test_a_refusal_at_each_step_is_undone(vm: Served, step: int) -> None:
    vm.at[step] = refuse
    with pytest.raises(QsteerError, match=r"made to$"):
        plug_in(vm)
    assert len(vm.changes) == step
    close_sent(vm)
    nothing_is_left(vm)


@pytest.mark.parametrize("step", (1, 5, FDS, FDS + 1, FDS + 2))
def test_a_monitor_that_breaks_off(vm: Served, step: int) -> None:
    """What has a name stays in QEMU, and the next plug closes it."""
    vm.at[step] = hang_up
    with pytest.raises(QsteerError, match="broke off"):
        plug_in(vm)
    vm.at.clear()
    if step == FDS + 2:
        with pytest.raises(UsageError) as caught:
            plug_in(vm)
        assert caught.value.hint == "no virtio NIC uses it; qsteer unplug --nic net1 removes it"
        unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=False)
    plug_in(vm)
    close_sent(vm)
    assert vm.held == FDS and not vm.names


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
@pytest.mark.parametrize("step", (1, FDS, FDS + 1))
def test_a_signal_at_a_step_is_undone(vm: Served, step: int, number: signal.Signals) -> None:
    vm.at[step] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(QsteerError, match=f"stopped by {number.name}"):
        plug_in(vm)
    nothing_is_left(vm)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_comes_too_late(vm: Served) -> None:
    vm.at[FDS + 2] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert plug_in(vm).tap and vm.held == FDS and list(vm.devices) == ["net1"]


@pytest.mark.parametrize("step", (2, FDS + 1))
def test_an_answer_that_comes_too_late_is_undone(vm: Served, impatient: None, step: int) -> None:
    vm.at[step] = lambda: threading.Event().wait(0.6)
    with pytest.raises(BusyError):
        plug_in(vm)
    nothing_is_left(vm)


@pytest.mark.parametrize("refuses", (False, True))
def test_the_last_answer_counts_however_late(vm: Served, impatient: None, refuses: bool) -> None:
    def late() -> None:
        threading.Event().wait(0.6)
        if refuses:
            refuse()

    vm.at[FDS + 2] = late
    if refuses:
        with pytest.raises(QsteerError, match=r"made to$"):
            plug_in(vm)
        nothing_is_left(vm)
    else:
        assert plug_in(vm).tap and vm.held == FDS


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "TIMEOUT_S", 0.3)
    monkeypatch.setattr(plug, "LONGER_S", 0.0)


def test_a_device_that_the_guest_does_not_let_go_again(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its netdev goes all the same, with the device once that does."""
    vm.lets_go = False
    add = vm._device_add
    monkeypatch.setattr(vm, "_device_add", lambda given: add({**given, "rss": False}), raising=False)
    with pytest.raises(QsteerError, match="although it says so"):
        plug_in(vm)
    assert list(vm.devices) == ["net1"] and not vm.netdevs and not vm.names


def test_what_a_killed_qsteer_has_left_is_closed_first(vm: Served) -> None:
    for name in (*plugplan.names(plugplan.QUEUE, 9), "qsteer-program0", "other"):
        vm.names[name] = a_fd()
    plug_in(vm)
    assert list(vm.names) == ["other"]


REFUSED: dict[str, tuple[Callable[[Served], object], str, type[QsteerError]]] = {
    "a device of that id": (lambda vm: vm.devices.update(net1=device(vm)), "device", UsageError),
    "a netdev of that id": (lambda vm: vm.netdevs.update(net1=[a_fd()]), "netdev", UsageError),
    "its MAC": (lambda vm: vm.devices.update(net0=device(vm, mac="52:54:00:00:00:01")), "MAC", UsageError),
    "no free port": (lambda vm: vm.buses[f"{PORT}/rp0"][1].append("x"), "its 1 PCIe port is taken", UnsupportedError),
    "no port": (lambda vm: vm.buses.pop(f"{PORT}/rp0"), "no free place", UnsupportedError),
    "an old QEMU": (lambda vm: setattr(vm, "libbpf", False), "without libbpf", UnsupportedError),
}


def a_fd() -> int:
    return os.open(os.devnull, os.O_RDONLY)


def device(vm: Served, **more: object) -> dict[str, Any]:
    vm.netdevs["other"] = []
    return {"driver": PCI_DRIVER, "netdev": "other", "_fds": [], **more}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_anything_is_done(vm: Served, case: str) -> None:
    prepare, words, kind = REFUSED[case]
    prepare(vm)
    for dry_run in (True, False):
        with pytest.raises(kind, match=words):
            plug_in(vm, f"{TAP},mac=52:54:00:00:00:01", dry_run=dry_run)
    assert vm.changes == []


def test_a_nic_without_rss(vm: Served) -> None:
    vm.libbpf = False
    done = plug_in(vm, "id=net1,queues=2,rss=off", bus="mine")
    assert vm.changes == ["getfd", "getfd", "netdev_add", "device_add"]
    assert "rss" not in vm.devices["net1"] and vm.devices["net1"]["bus"] == "mine" and done.json()["program"] is None


def test_a_qemu_that_loses_a_queue(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    add = vm._netdev_add

    def lose_one(given: Mapping[str, Any]) -> object:
        add(given)
        os.close(vm.netdevs["net1"].pop())
        return {}

    monkeypatch.setattr(vm, "_netdev_add", lose_one, raising=False)
    with pytest.raises(QsteerError, match="although it says so"):
        plug_in(vm)
    nothing_is_left(vm)


@pytest.mark.parametrize("lie", ("netdev", "rss"))
def test_a_qemu_that_says_so_but_has_not(vm: Served, monkeypatch: pytest.MonkeyPatch, lie: str) -> None:
    add = vm._device_add
    monkeypatch.setattr(vm, "_device_add", lambda given: add({**given, lie: "x"}), raising=False)
    with pytest.raises(QsteerError, match="although it says so"):
        plug_in(vm)
    nothing_is_left(vm)


def test_a_guest_that_does_not_let_go(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unplug, "_AGAIN_S", 0.05)
    plug_in(vm)
    vm.lets_go = False
    with pytest.raises(BusyError, match=r'has not let go of NIC "net1" within 0\.2 s') as caught:
        unplug.unplug(reached(vm), "net1", timeout_s=0.2, dry_run=False)
    assert caught.value.exit_code == 8 and "nothing was changed" in caught.value.hint
    assert vm.held == FDS
    vm.release("net1")
    vm.qemu.said.clear()  # nobody listens
    unplug.unplug(reached(vm), "net1", timeout_s=0.2, dry_run=False)
    nothing_is_left(vm)


def test_a_guest_that_lets_go_while_it_is_asked_again(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unplug, "_AGAIN_S", 0.05)
    plug_in(vm)
    vm.lets_go = False
    ask, asked = vm._device_del, []

    def third_time(given: Mapping[str, Any]) -> object:
        asked.append(given)
        if len(asked) == 3:
            vm.release("net1")
        return ask(given)

    monkeypatch.setattr(vm, "_device_del", third_time, raising=False)
    unplug.unplug(reached(vm), "net1", timeout_s=10, dry_run=False)
    assert len(asked) == 3
    nothing_is_left(vm)


@pytest.mark.parametrize("events", (0, 2))
def test_an_event_that_is_lost_or_comes_twice(vm: Served, monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    monkeypatch.setattr(unplug, "_AGAIN_S", 0.05)
    plug_in(vm)
    say = vm.say
    monkeypatch.setattr(vm, "say", lambda *said: [say(*said) for _ in range(events)])
    unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=False)
    nothing_is_left(vm)


def test_a_guest_that_refuses(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(vm)
    said = {"device": "net1", "path": "/machine/peripheral/net1"}
    monkeypatch.setattr(vm, "_device_del", lambda _: vm.say("DEVICE_UNPLUG_GUEST_ERROR", said), raising=False)
    with pytest.raises(QsteerError, match="refuses to let go"):
        unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=False)
    monkeypatch.setattr(vm, "_device_del", lambda _: refuse(), raising=False)
    with pytest.raises(QsteerError, match=r"made to$"):
        unplug.unplug(reached(vm), "net1", timeout_s=5, dry_run=False)
    assert vm.held == FDS


def test_a_signal_while_the_guest_is_waited_for(vm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(vm)
    monkeypatch.setattr(vm, "_device_del", lambda _: os.kill(os.getpid(), signal.SIGTERM), raising=False)
    with pytest.raises(QsteerError, match="stopped by SIGTERM") as caught:
        unplug.unplug(reached(vm), "net1", timeout_s=30, dry_run=False)
    assert "all the same" in caught.value.hint and vm.held == FDS


def test_nothing_to_unplug(vm: Served) -> None:
    with pytest.raises(QsteerError) as caught:
        unplug.unplug(reached(vm), "net7", timeout_s=5, dry_run=False)
    assert caught.value.exit_code == 3


def test_where_a_nic_goes() -> None:
    root, full = Bus(name="pci.0", slot=Slot.ROOT, devices=5), Bus(name="pci.0", slot=Slot.ROOT, devices=32)
    taken, free = Bus(name="rp0", slot=Slot.PORT, devices=1), Bus(name="rp1", slot=Slot.PORT, devices=0)
    bridge = Bus(name="br", slot=Slot.BRIDGE, devices=3)
    for buses, expected in (
        ((bridge, free, root), "pci.0"),
        ((full, taken, free), "rp1"),
        ((bridge, taken, free), "rp1"),
        ((taken, bridge), "br"),
    ):
        assert plan(buses=buses).bus == expected
    with pytest.raises(UnsupportedError, match="its 2 PCIe ports are taken"):
        plan(buses=(taken, replace(taken, name="rp9")))
    assert plan(buses=(taken,), bus="rp0").bus == "rp0"
    on_s390 = plan(buses=(), drivers=(PCI_DRIVER, CCW_DRIVER))
    assert on_s390.bus is None and on_s390.device["driver"] == CCW_DRIVER and "bus" not in on_s390.device


def test_what_qemus_command_line_says_holds() -> None:
    args = qemuargs.parse(("qemu", "-global", "virtio-net-pci.rss=off", "-netdev", "tap,id=net1"))
    planned = plan(args=args)
    assert not planned.nic.steered and "rss" not in planned.device and "rss=off" in planned.notes[0]
    assert plan(vm=None).nic.mac is None and "mac" not in plan(vm=None).device
    assert plan(vm=None, tap=f"{TAP},ifname=x").nic.mac == runplan.stable_mac("x", "net1", "id")


def test_vhost() -> None:
    assert "vhostfds" not in plan(tap="id=net1,queues=2,vhost=off").netdev
    planned = plan(tap="id=net1,queues=2,vhost=on", version=(10, 0, 0))
    assert planned.netdev["vhostfds"] == "qsteer-vhost0:qsteer-vhost1" and planned.nic.steered
    assert len(plugplan.fd_names(planned)) == 2 + 2 + 4
    late = plan(tap="id=net1,queues=2,vhost=on", version=(10, 1, 0))
    assert (
        not late.nic.steered
        and "ebpf-rss-fds" not in late.device
        and "does not use a steering program" in late.notes[0]
    )


def plan(
    *,
    tap: str = TAP,
    buses: tuple[Bus, ...] = (Bus(name="pci.0", slot=Slot.ROOT, devices=5),),
    drivers: tuple[str, ...] = (PCI_DRIVER,),
    args: qemuargs.QemuArgs | None = None,
    vm: str | None = "web1",
    bus: str | None = None,
    version: tuple[int, int, int] = (10, 0, 2),
) -> plugplan.PlugPlan:
    seen = plugplan.Seen(
        probe=qmp.QemuProbe(version=version, libbpf=True, properties=dict.fromkeys(drivers, TYPES)),
        vm=qmpvm.QmpVm(name="web1", uuid=None, version=version, status="running", nics=()),
        netdevs={},
        device_ids=frozenset(),
        buses=buses,
    )
    return plugplan.plan_plug(
        runplan.parse_tap(tap),
        seen,
        args or qemuargs.parse(()),
        vm=vm,
        vhost_available=True,
        machine_id="id",
        bus=bus,
    )


def qemu(pid: int, name: str, *more: str) -> Process:
    args = qemuargs.parse(("qemu-system-x86_64", "-name", name, *more))
    return Process(pid=pid, started=1, uid=0, comm="qemu", args=args)


def test_which_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    served = ("-qmp", "unix:/run/a,server=on,wait=off", "-qmp", "unix:/run/b,server=on,wait=off")
    domain = Domain(name="of libvirt", uuid="u", pid=4, interfaces=(), monitor="/run/a", agent=None)
    found = (qemu(2, "web", *served), qemu(3, "twice", *served), qemu(4, "twice", *served), qemu(5, "mute"))
    monkeypatch.setattr(procs, "running_qemus", lambda: found)
    monkeypatch.setattr(procs, "read", {one.pid: one for one in found}.get)
    monkeypatch.setattr(libvirt, "domains", lambda _: Found(domains={4: domain}, notes=()))
    assert reach.of_name("web").paths == ("/run/a", "/run/b")
    assert reach.of_name("twice").process.pid == 3, "libvirt calls the other one by another name"
    assert (reach.of_process(4).name, reach.of_process(4).paths) == ("of libvirt", ("/run/b",))
    with pytest.raises(UnsupportedError, match='VM "mute", process 5 has no QMP socket'):
        reach.of_process(5)
    with pytest.raises(NotFoundError, match='no VM "none" runs'):
        reach.of_name("none")
    with pytest.raises(NotFoundError, match="process 9 is not a QEMU"):
        reach.of_process(9)
    monkeypatch.setattr(libvirt, "domains", lambda _: Found(domains={}, notes=()))
    with pytest.raises(UsageError, match="pid 3, uid 0; pid 4, uid 0"):
        reach.of_name("twice")


def test_another_socket_is_tried_but_not_once_it_has_begun(
    vm: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm_at_both = replace(reached(vm), paths=(OwnPath(str(tmp_path / "none")), OwnPath(str(vm.path))))
    assert plug.plug(vm_at_both, TAP, bus=None, dry_run=False).tap
    vm.lets_go = False
    twice = replace(vm_at_both, paths=vm_at_both.paths[1:] * 2)
    asked: list[object] = []
    monkeypatch.setattr(vm, "_query_uuid", asked.append, raising=False)
    with pytest.raises(BusyError, match="has not let go"):
        unplug.unplug(twice, "net1", timeout_s=0, dry_run=False)
    assert len(asked) == 1


@pytest.mark.parametrize(
    "argv",
    (
        ("plug", "--tap", TAP),
        ("plug", "--qmp", "x", "--vm", "y", "--tap", TAP),
        ("plug", "--qmp", "x"),
        ("plug", "--qmp", "x", "--tap", TAP, "--tap", TAP),
        ("plug", "--qmp", "x", "--tap", TAP, "--bus", "a\nb"),
        ("unplug", "--qmp", "x"),
        ("unplug", "--vm", "x", "--nic", "y", "--timeout", "soon"),
    ),
)
def test_usage(argv: tuple[str, ...]) -> None:
    with pytest.raises(UsageError):
        cli.command(argv)


# Fuzzing: what a QEMU answers, as it is and made wrong, into the exchanges of plug and unplug.


@dataclass
class Fuzzed:
    """What came of it; a result is what an exchange gave or raised."""

    replies: int
    made_wrong: int
    results: Counter[str]

    def __str__(self) -> str:
        told = ", ".join(f"{name} {count}" for name, count in self.results.most_common())
        return f"{self.replies} replies, {self.made_wrong} of them made wrong: {told}"


ERROR_CLASSES = ("GenericError", "CommandNotFound", "DeviceNotFound", "\x1b", "")


def _refused(kind: str, text: str) -> ExecuteError:
    reply: Any = {"error": {"class": kind, "desc": text}}
    return ExecuteError(ErrorResponse(reply), cast(Any, {}), reply)


class Hostile(FakeVm):
    """A client for Monitor without anything behind it, whose VM answers wrongly every now and then."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng
        self.rate = rng.choice((0.0, 0.05, 0.2, 0.5, 1.0))
        self.calm = rng.randrange(80)  # so many answers are right
        self.replies = self.made_wrong = 0
        self.lets_go = rng.random() < 0.7
        self.greeting = self
        self.QMP = self
        self.version: Any = cast(Any, GREETING)["QMP"]["version"]
        self._sent: list[int] = []
        self._hearing: list[tuple[tuple[str, ...], Callable[[Mapping[str, object]], bool]]] = []

    def take_fd(self) -> int:
        if not self._sent:
            raise Refusal("GenericError", "No file descriptor supplied via SCM_RIGHTS")
        return self._sent.pop()

    def say(self, event: str, data: Mapping[str, object]) -> None:
        for names, hear in self._hearing:
            said = {"event": event, "data": data}
            if self.rng.random() < self.rate:
                said["data"] = cast(Any, self._wrong(data))
            if event in names:
                hear(said)

    def send_fd_scm(self, fd: int) -> None:
        self._sent.append(os.dup(fd))

    @contextlib.contextmanager
    def listener(self, names: tuple[str, ...], hear: Callable[[Mapping[str, object]], bool]) -> Iterator[None]:
        self._hearing.append((names, hear))
        yield
        self._hearing.pop()

    async def execute(self, command: str, arguments: Mapping[str, Any]) -> object:
        self.replies += 1
        await asyncio.sleep(0)
        wrong = self.replies > self.calm and self.rng.random() < self.rate
        self.made_wrong += wrong
        if wrong and self.rng.random() < 0.1:
            raise EOFError
        if wrong and self.rng.random() < 0.2:
            raise _refused(self.rng.choice(ERROR_CLASSES), "\x1b[2J" + command * self.rng.randrange(3))
        try:
            answer = self.answer(command, arguments)
        except (Refusal, KeyError) as refusal:
            raise _refused("GenericError", str(refusal.args[-1])) from None
        return self._wrong(answer) if wrong else answer

    def _wrong(self, answer: Any) -> object:
        """Something else in one place of an answer."""
        inside = answer if isinstance(answer, (list, dict)) and answer and self.rng.random() < 0.8 else None
        if isinstance(inside, list):
            index = self.rng.randrange(len(inside))
            return [*inside[:index], self._wrong(inside[index]), *inside[index + 1 :]]
        if isinstance(inside, dict):
            key = self.rng.choice(list(inside))
            return {**inside, key: self._wrong(inside[key])}
        if isinstance(answer, str) and answer and self.rng.random() < 0.5:
            at = self.rng.randrange(len(answer))
            return (
                answer[:at] + self.rng.choice(("", "\0", "\n", "/", "..", "é", "\ud800", "x" * 300)) + answer[at + 1 :]
            )
        junk: tuple[Any, ...] = (None, True, -1, 1 << 70, 1.5, "", "net1", "a/b", "\x1b[2J", [], {}, [[]], {"name": {}})
        return self.rng.choice((*junk, [{"name": "net1", "type": "child<virtio-net-pci>"}] * 3, "é" * 1000))

    def close(self) -> None:
        for fd in self._sent:
            os.close(fd)
        super().close()


def fuzz(rounds: int, seed: int) -> Fuzzed:
    """Plug and unplug ``rounds`` times.

    Raises whatever is no QsteerError, or the monitor's end, and if an fd is left open, an exchange hangs, or there is
    no NIC where there should be.
    """
    found = Fuzzed(replies=0, made_wrong=0, results=Counter())
    before = open_fds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unplug, "_AGAIN_S", 0.0)
        with asyncio.Runner() as runner:
            inside = open_fds()
            for number in range(rounds):
                vm = Hostile(random.Random(f"{seed} {number}"))
                for exchange in (_plug, _unplug):
                    try:
                        runner.run(asyncio.wait_for(exchange(qmp.Monitor(cast(Any, vm), '"x"')), 20))
                        assert exchange is _unplug or ("net1" in vm.netdevs and "net1" in vm.devices)
                        found.results[f"{exchange.__name__[1:]} done"] += 1
                    except QsteerError as error:
                        assert "\n" not in error.message
                        found.results[f"{exchange.__name__[1:]} {type(error).__name__}"] += 1
                    except qmp.failures():
                        found.results[f"{exchange.__name__[1:]} broken off"] += 1
                vm.close()
                found.replies += vm.replies
                found.made_wrong += vm.made_wrong
                assert open_fds() == inside, f"seed {seed}, round {number}: an fd is left open"
    assert open_fds() == before
    return found


async def _plug(monitor: qmp.Monitor) -> None:
    await plug.close_left_over(monitor)
    seen = await plug.fetch(monitor, os.getpid())
    planned = plugplan.plan_plug(
        runplan.parse_tap(TAP),
        seen,
        qemuargs.parse(()),
        vm="web1",
        vhost_available=False,
        machine_id="",
        bus=None,
    )
    tuple(plugplan.plug_steps(planned, maker="", mtu=None))
    with contextlib.closing(fake_tap(planned.order)) as tap:
        await plug.give(monitor, planned, tap, os.getpid())


async def _unplug(monitor: qmp.Monitor) -> None:
    seen = await qmpvm.describe(monitor, os.getpid())
    planned = plugplan.plan_unplug("net1", seen, await qmpvm.netdevs(monitor))
    tuple(plugplan.unplug_steps(planned))
    await unplug._take_off(monitor, planned, 0.0)


def test_answers_made_wrong() -> None:
    found = fuzz(1000, seed=1)
    assert found.replies > 40_000 and found.made_wrong > 1500
    assert found.results["plug done"] and found.results["plug broken off"] and found.results["unplug BusyError"]
