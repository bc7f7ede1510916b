# SPDX-License-Identifier: BSD-2-Clause
"""What is said where something may not be seen; real taps are in tests/kernel/test_inventory.py."""

from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import holds, inventory, kernel, libvirt, namespaces, procs, programs, qemuargs, tuns
from qsteer.errors import PermissionDeniedError, from_errno
from qsteer.model import Domain, Interface, Inventory, Kind, OpenQueue, Process, ProgramInfo
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
    seen = "what process 1, 2, 3, 4, 5 and 4 more has open cannot be seen"
    assert note == f"{seen}: it takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, and 65536 files at most"


def test_several() -> None:
    assert several("abc") == "a, b, c"
    assert several("abcdefg") == "a, b, c, d, e and 2 more"


class Host:
    """Taps of a made-up host; counts what is looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queues = tuple(
            replace(made.queue(tap=f"vnet{number}"), ifindex=number, program_id=number, attachment=number)
            for number in (1, 2)
        )
        self.looked: list[int] = []
        self.held: frozenset[tuple[int, int]] = frozenset()
        monkeypatch.setattr(kernel, "open_queues", lambda pid=0: self.queues)
        monkeypatch.setattr(procs, "read", lambda pid: made.process(pid=pid))
        monkeypatch.setattr(programs, "program_info", self.program)
        monkeypatch.setattr(programs, "read_maps", lambda info: made.content())
        monkeypatch.setattr(programs, "body_present", lambda info: True)
        monkeypatch.setattr(holds, "places", lambda: self.held)

    def program(self, program_id: int) -> ProgramInfo:
        self.looked.append(program_id)
        return made.program(Kind.QSTEER, id=program_id)


def test_looking_again_takes_over_what_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    before = inventory.fetch()
    assert host.looked == [1, 2]
    again = inventory.fetch_again(before)
    assert (again, host.looked) == (before, [1, 2])
    assert again.taps[0] is before.taps[0]

    first, second = host.queues
    host.queues = (first, replace(second, attachment=9))
    again = inventory.fetch_again(before)
    assert host.looked == [1, 2, 2], "the same program, attached once more: the maps may have changed"
    assert again.taps[0] is before.taps[0] and again.taps[1] is not before.taps[1]

    host.queues = (first,)
    assert [tap.name for tap in inventory.fetch_again(before).taps] == ["vnet1"]
    host.queues = (first, second, replace(first, ifindex=3, tap="vnet3", pid=101, file=3))
    assert [tap.name for tap in inventory.fetch_again(before).taps] == ["vnet1", "vnet2", "vnet3"]


def test_looking_again_sees_holds_and_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    before = inventory.fetch()
    host.held = frozenset({(host.queues[0].netns, 1)})
    monkeypatch.setattr(holds, "find", lambda *, netns, ifindex: holds.Hold(tap="vnet1", pid=100, started=1))
    monkeypatch.setattr(holds.Hold, "is_of", lambda self, pid: pid == 100)
    assert [tap.hold for tap in inventory.fetch_again(before).taps] == [True, False]
    with_bodies = replace(
        before, taps=tuple(replace(tap, program=replace(made.OWN_STATIC, bodies_id=5)) for tap in before.taps)
    )
    monkeypatch.setattr(programs, "body_present", lambda info: False)
    assert [tap.body_present for tap in inventory.fetch_again(with_bodies).taps] == [False, False]


def test_looking_again_at_a_program_that_could_not_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(monkeypatch)
    before = inventory.fetch()
    unseen = replace(before, taps=(replace(before.taps[0], program=None), before.taps[1]))
    assert inventory.fetch_again(unseen).taps[0].program
    assert host.looked == [1, 2, 1]


def test_one_changed_tap_of_two_is_not_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which netdev is behind a tap is not guessed for a VM that has another tap."""
    host = Host(monkeypatch)
    args = qemuargs.parse(("qemu-system-x86_64", "-netdev", "tap,id=n", "-device", "virtio-net,netdev=n"))
    vm = replace(made.process(pid=100), args=args)
    monkeypatch.setattr(procs, "running_qemus", lambda: (vm,))
    monkeypatch.setattr(procs, "open_files", lambda pid: files())
    before = inventory.fetch()
    host.queues = (host.queues[0], replace(host.queues[1], attachment=9))
    assert [tap.nic for tap in before.taps] == [tap.nic for tap in inventory.fetch_again(before).taps] == [None, None]
