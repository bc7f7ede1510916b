# SPDX-License-Identifier: BSD-2-Clause
"""What is said where something may not be seen; real taps are in tests/kernel/test_inventory.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import inventory, kernel, libvirt, namespaces, procs, qemuargs, tuns
from qsteer.errors import PermissionDeniedError, from_errno
from qsteer.model import Domain, Interface, Inventory, OpenQueue, Process
from qsteer.tuns import Tun
from qsteer.vms import several
from tests.unit import taps as made


def tun(name: str, ifindex: int = 5, **changed: object) -> Tun:
    values = {"is_tap": True, "persistent": False, "multi_queue": True, "active": 4} | changed
    return Tun(name=name, ifindex=ifindex, **values)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def empty_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tap, no VM, no namespace with a name, and no right to look at what is attached."""

    def refuse(pid: int = 0) -> None:
        raise PermissionDeniedError("cannot read", errno=1, hint="try sudo")

    monkeypatch.setattr(kernel, "open_queues", refuse)
    monkeypatch.setattr(namespaces, "DIRECTORY", tmp_path / "none")
    monkeypatch.setattr(libvirt, "SYSTEM", tmp_path / "none")
    monkeypatch.setattr(procs, "running_qemus", lambda: ())
    monkeypatch.setattr(procs, "open_files", lambda pid: files())
    monkeypatch.setattr(tuns, "driver_is_loaded", lambda: True)
    monkeypatch.setattr(tuns, "in_sysfs", lambda: ())


def files(*queues: int, seen: bool = True) -> procs.OpenFiles:
    return procs.OpenFiles(programs={}, queues=frozenset(queues), macvtaps=frozenset(), vhost_net=False, seen=seen)


def test_strict_raises() -> None:
    with pytest.raises(PermissionDeniedError):
        inventory.fetch()
    with pytest.raises(PermissionDeniedError):
        inventory.fetch(strict=True)


def test_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    assert inventory.fetch() == inventory.fetch(strict=False) == Inventory(taps=())


def test_what_can_be_seen_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = (tun("vnet0"), tun("spare", 6, persistent=True, active=0), tun("one", 7, multi_queue=False, active=1))
    monkeypatch.setattr(tuns, "in_sysfs", lambda: (*devices, tun("vpn", 8, is_tap=False)))
    found = inventory.fetch(strict=False)
    assert found.notes == ("cannot read: Operation not permitted (try sudo)",)
    assert [(tap.name, tap.active, tap.unheld, tap.queues) for tap in found.taps] == [
        ("vnet0", 4, False, ()),
        ("spare", 0, False, ()),
        ("one", 1, False, ()),
    ]


def test_a_holder_that_proc_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuns, "in_sysfs", lambda: (tun("vnet0"), tun("vnet1", 6)))
    monkeypatch.setattr(procs, "running_qemus", lambda: (made.process(pid=100, name="web1"),))
    monkeypatch.setattr(procs, "open_files", lambda pid: files(9, 10))
    monkeypatch.setattr(procs, "tap_of", lambda pid, fd: "vnet0")
    vnet0, vnet1 = inventory.fetch(strict=False).taps
    assert (vnet0.vm_name, vnet1.vm_name) == ("web1", None)


def test_a_name_in_two_places_tells_no_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuns, "in_sysfs", lambda: (tun("vnet0"),))
    monkeypatch.setattr(namespaces, "named", lambda: {11: "blue"})
    monkeypatch.setattr(namespaces, "visit", lambda names, look: {"blue": (tun("vnet0"),)})
    monkeypatch.setattr(procs, "running_qemus", lambda: (made.process(pid=100, name="web1"),))
    monkeypatch.setattr(procs, "open_files", lambda pid: files(9))
    monkeypatch.setattr(procs, "tap_of", lambda pid, fd: "vnet0")
    assert [tap.holder for tap in inventory.fetch(strict=False).taps] == [None, None]


def test_a_module_without_a_description(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "initstate").write_text("live\n")
    monkeypatch.setattr(inventory, "_MODULE_LOADED", tmp_path / "initstate")
    monkeypatch.setattr(inventory, "_MODULE_BTF", tmp_path / "btf")
    (note,) = inventory.fetch(strict=False).notes
    assert note.endswith(f"(tun is a module, and {tmp_path / 'btf'}, which describes it, is missing)")
    (tmp_path / "btf").write_text("")
    assert inventory.fetch(strict=False).notes == ("cannot read: Operation not permitted (try sudo)",)


def test_no_tun_no_taps(monkeypatch: pytest.MonkeyPatch) -> None:
    def must_not() -> tuple[Tun, ...]:
        raise AssertionError

    monkeypatch.setattr(tuns, "driver_is_loaded", lambda: False)
    monkeypatch.setattr(tuns, "in_sysfs", must_not)
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    assert inventory.fetch().notes == ()


def test_namespaces_that_may_not_be_looked_into(monkeypatch: pytest.MonkeyPatch) -> None:
    error = from_errno(1, "cannot look")
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    monkeypatch.setattr(namespaces, "named", lambda: {namespaces.own(): "mine", 11: "blue", 12: "red"})
    monkeypatch.setattr(namespaces, "visit", lambda names, look: {"blue": error, "red": (tun("t", persistent=True),)})
    found = inventory.fetch()
    assert [(tap.name, tap.netns, tap.netns_name, tap.unheld) for tap in found.taps] == [("t", 12, "red", True)]
    assert found.notes == (
        "not looked into network namespace blue for taps that no process has open: Operation not permitted",
        "what steers t cannot be seen: no process has it open",
    )


def test_a_sysfs_of_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    from qsteer import links

    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    monkeypatch.setattr(tuns, "in_sysfs", lambda: None)
    monkeypatch.setattr(links, "tuns", lambda: (tun("spare", persistent=True),))
    (spare,) = inventory.fetch().taps
    assert spare.unheld


def test_a_tap_in_use_is_not_one_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = made.queue(tap="vnet0")
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: (queue,))
    monkeypatch.setattr(namespaces, "own", lambda: queue.netns)
    monkeypatch.setattr(tuns, "in_sysfs", lambda: (tun("vnet0", queue.ifindex, persistent=True),))
    monkeypatch.setattr(procs, "read", lambda pid: made.process(pid=pid, name="web1"))
    found = inventory.fetch()
    assert [(tap.name, tap.unheld, tap.vm_name, tap.netns_name) for tap in found.taps] == [
        ("vnet0", False, "web1", None)
    ]
    assert found.notes == ()


def test_a_tap_that_went_away_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    monkeypatch.setattr(tuns, "in_sysfs", lambda: (tun("vnet0"),))
    assert inventory.fetch() == Inventory(taps=())


def qemu(*arguments: str, pid: int = 100) -> Process:
    args = qemuargs.parse(("qemu-system-x86_64", *arguments, "-device", "virtio-net,netdev=n"))
    return replace(made.process(pid=pid), args=args)


def nics_seen(monkeypatch: pytest.MonkeyPatch, vm: Process, *queues: OpenQueue) -> list[str | None]:
    others = {pid: replace(made.process(pid=pid), args=None) for pid in range(1, 1000)}
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: queues)
    monkeypatch.setattr(procs, "running_qemus", lambda: (vm,))
    monkeypatch.setattr(procs, "read", others.get)
    return [tap.nic.netdev if tap.nic else None for tap in inventory.fetch().taps]


def test_the_only_nic_is_that_of_the_only_tap(monkeypatch: pytest.MonkeyPatch) -> None:
    vm, first = qemu("-netdev", "tap,id=n"), made.queue(pid=100)
    assert nics_seen(monkeypatch, vm, first) == ["n"]
    second = replace(first, ifindex=first.ifindex + 1, tap="vnet1", file=2)
    assert nics_seen(monkeypatch, vm, first, second) == [None, None]


def test_fd_numbers_are_those_of_the_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever started it may have the same queue by another number."""
    vm = qemu("-netdev", "tap,id=n,fd=7")
    queue = made.queue(pid=100)
    assert nics_seen(monkeypatch, vm, replace(queue, fd=7), replace(queue, fd=8, pid=50)) == ["n"]
    assert nics_seen(monkeypatch, vm, replace(queue, fd=8), replace(queue, fd=7, pid=50)) == [None]


def test_libvirt_uses_vhost_where_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    nic = Interface(
        kind="bridge", alias="net9", mac=None, model="virtio", target="vnet0", queues=4, rss=True, vhost=None
    )
    domain = Domain(name="web1", uuid="u", pid=100, interfaces=(nic,), monitor=None, agent=None)
    monkeypatch.setattr(libvirt, "domains", lambda processes: libvirt.Found(domains={100: domain}, notes=("n",)))
    for vhost_net in (True, False):
        open_files = replace(files(), vhost_net=vhost_net)
        monkeypatch.setattr(procs, "open_files", lambda pid, found=open_files: found)
        nics_seen(monkeypatch, qemu(), made.queue(pid=100))
        found = inventory.fetch()
        (tap,) = found.taps
        assert (tap.vm_name, tap.nic and tap.nic.vhost, found.notes) == ("web1", vhost_net, ("n",))


def test_what_a_qemu_has_open_may_be_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "open_queues", lambda pid=0: ())
    monkeypatch.setattr(procs, "running_qemus", lambda: tuple(made.process(pid=pid) for pid in range(1, 10)))
    monkeypatch.setattr(procs, "open_files", lambda pid: files(seen=False))
    (note,) = inventory.fetch().notes
    assert note == ("what process 1, 2, 3, 4, 5 and 4 more has open cannot be seen: it takes CAP_SYS_PTRACE; try sudo")


def test_several() -> None:
    assert several("abc") == "a, b, c"
    assert several("abcdefg") == "a, b, c, d, e and 2 more"
