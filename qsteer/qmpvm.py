# SPDX-License-Identifier: BSD-2-Clause
"""What a QEMU that runs says of its VM and of its virtio-net devices, through QMP.  Changes nothing.

Theory of operation
===================

The devices come from QEMU's object tree (``qom-list``, ``qom-get``), where those that were plugged in later are, too.
Which tap is behind a netdev is only in what the human monitor's ``info network`` prints, which is text: a line for each
queue, with the fd or the name of the tap.  ``x-query-virtio-status`` would tell more, and crashes QEMU 11.1.3.

A device's place in the device state (``0000:00:02.0:00.0``) is what QEMU makes of the slots between the root of its
PCI bus and the device (pcibus_get_dev_path() in hw/pci/pci.c), so the same way is gone here, upwards.  It is not known
for a device on another bus than PCI, and behind a host bridge of another kind than those of x86 and of Arm's ``virt``.

All of this is another process's word, and that process may be hostile: answers are checked for what they are, bounded,
and made printable.
"""

import contextlib
import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsteer import qmp
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, printable
from qsteer.model import Nic, Process, Tap
from qsteer.qmp import Monitor, member

_CONTAINERS = ("/machine/peripheral", "/machine/peripheral-anon", "/machine/unattached")
"""Where devices are: those with an id, those without one, those that a board makes itself (-nic)."""
_CHILD = re.compile(r"child<([A-Za-z0-9_.-]{1,64})>")
_DRIVER = re.compile(r"virtio-net-[a-z-]{1,40}")
_PCI_HOST = re.compile(r"[A-Za-z0-9-]+-pcihost")
_PORTS = ("pcie-root-port", "ioh3420", "xio3130-downstream")
_BRIDGES = ("pci-bridge", "pcie-pci-bridge")
_PCI_HOSTS = ("i440FX-pcihost", "q35-pcihost", "gpex-pcihost")
_PCI_ROOT = "0000:00"
_SLOT = re.compile(r"[0-9a-f]{2}\.[0-7]")
_CLIENT = re.compile(r"(?: \\ )?([^\s:]{1,128}): index=[0-9]{1,4},type=([a-z0-9-]{1,32}),(.*)")
_FD = re.compile(r"fd=([0-9]{1,9})")
_IFNAME = re.compile(r"ifname=([^\s/:]{1,15}?)(?:,script=.*)?")
_VHOST_NET = Path("/dev/vhost-net")

_NICS_MAX = 256
_BUSES_MAX = 32
_BRIDGES_MAX = 1024
_TEXT_MAX = 255
_INFO_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """A netdev: its kind (``tap``, ``user``, ``vhost-user``, ...), and the tap's fds in QEMU, or the name it had."""

    kind: str
    queues: int = 0
    fds: tuple[int, ...] = ()
    ifname: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpNic:
    """A virtio-net device.  ``path`` is its own in QEMU's object tree; ``id`` is None where it was given none.

    ``device`` is its place in the device state, as ``devicestate.parse`` wants it.  ``vhost`` is None where only some
    of the VM's NICs use it, or it cannot be seen.
    """

    path: str
    driver: str
    id: str | None
    netdev: str | None
    mac: str | None
    rss: bool
    mq: bool
    device: str | None
    backend: Backend | None
    vhost: bool | None


class Slot(enum.Enum):
    """What kind of bus it is that a device can be plugged into."""

    ROOT = enum.auto()
    PORT = enum.auto()
    BRIDGE = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Bus:
    """A PCI bus, and how many devices it has; one behind a port takes one."""

    name: str
    slot: Slot
    devices: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpVm:
    """A VM.  ``status`` is QEMU's word for what it does: ``running``, ``paused``, ``inmigrate``, ..."""

    name: str | None
    uuid: str | None
    version: tuple[int, int, int]
    status: str
    nics: tuple[QmpNic, ...]


def inspect(path: str, process: Process, *, answer_s: float = 0.0) -> QmpVm:
    """What the QEMU ``process`` says at its QMP socket ``path``.  Raises what ``qmp.converse`` raises."""
    return qmp.converse(path, process, lambda monitor: describe(monitor, process.pid), answer_s=answer_s)


def used_buffers(path: str, process: Process, tap: Tap, *, answer_s: float = 0.0) -> tuple[int | None, ...]:
    """``used`` of the NIC behind ``tap``, which has a queue for each of the tap's.

    Raises what ``qmp.converse`` and ``nic_of`` raise.
    """

    async def exchange(monitor: Monitor) -> tuple[int | None, ...]:
        nic = nic_of(await describe(monitor, process.pid), tap)
        return await used(monitor, nic, tap.attached)

    return qmp.converse(path, process, exchange, answer_s=answer_s)


async def used(monitor: Monitor, nic: QmpNic, queues: int) -> tuple[int | None, ...]:
    """How many buffers each receive queue of a NIC has used since the guest set it up, modulo 65536.

    None where it cannot be told: QEMU before 7.2, no such queue.  With vhost QEMU does not count (and would ask its
    backend, which may stop the queue), so all are None unless it is certain that there is none.
    """
    if nic.vhost is not False or not nic.backend or nic.backend.kind != "tap":
        return (None,) * queues
    return tuple([await _used(monitor, nic.path, 2 * queue) for queue in range(queues)])


def nic_of(vm: QmpVm, tap: Tap) -> QmpNic:
    """The NIC behind a tap: by the fds that the VM's process has of it, by its name, or by what the command line says.

    Raises NotFoundError unless there is exactly one.
    """
    fds = {queue.fd for queue in tap.queues if tap.holder and queue.pid == tap.holder.pid}
    for matches in (
        [nic for nic in vm.nics if nic.backend and fds.intersection(nic.backend.fds)],
        [nic for nic in vm.nics if nic.backend and nic.backend.ifname == tap.name],
        [nic for nic in vm.nics if tap.nic and _is(nic, tap.nic)],
    ):
        if len(matches) == 1:
            return matches[0]
        if matches:
            break
    raise NotFoundError(f'QEMU does not tell which of its {len(vm.nics)} virtio NICs is behind tap "{tap.name}"')


async def describe(monitor: Monitor, pid: int) -> QmpVm:
    """``inspect``, within an exchange.  Raises QsteerError."""
    status = _text(member(await monitor.ask("query-status"), "status"))
    if not status:
        raise QsteerError("QEMU does not say whether the VM runs")
    backends = await netdevs(monitor)
    found = [await _nic(monitor, path, driver, backends) for path, driver in await _paths(monitor)]
    return QmpVm(
        name=_text(member(await monitor.ask("query-name"), "name")),
        uuid=_text(member(await monitor.ask("query-uuid"), "UUID")),
        version=monitor.version,
        status=status,
        nics=_with_vhost(found, pid),
    )


def parse_info_network(answer: object) -> Mapping[str, Backend]:
    """What the human monitor's ``info network`` prints, by netdev.  A line that is not understood is passed over."""
    found: dict[str, Backend] = {}
    for line in (answer if isinstance(answer, str) else "")[:_INFO_MAX].splitlines():
        client = _CLIENT.fullmatch(line)
        if not client or client[2] in ("nic", "hubport"):
            continue
        before = found.get(client[1], Backend(kind=client[2]))
        fd, ifname = _FD.fullmatch(client[3]), _IFNAME.fullmatch(client[3])
        found[client[1]] = Backend(
            kind=client[2],
            queues=before.queues + 1,
            fds=(*before.fds, int(fd[1])) if fd else before.fds,
            ifname=printable(ifname[1]) if ifname else before.ifname,
        )
    return found


async def netdevs(monitor: Monitor) -> Mapping[str, Backend]:
    """Every netdev of a VM, by its id, also those that no device uses.  Raises QsteerError."""
    return parse_info_network(await monitor.ask("human-monitor-command", {"command-line": "info network"}))


async def device_ids(monitor: Monitor) -> frozenset[str]:
    """The ids of all devices that were given one.  Raises QsteerError."""
    names = (_text(member(child, "name")) for child in _list(await monitor.ask("qom-list", {"path": _CONTAINERS[0]})))
    return frozenset(name for name in names if name)


async def nic_paths(monitor: Monitor) -> frozenset[str]:
    """Where the virtio-net devices are in QEMU's object tree.  Raises QsteerError."""
    return frozenset(path for path, _ in await _paths(monitor))


async def buses(monitor: Monitor) -> tuple[Bus, ...]:
    """Where a PCI device can be plugged in: a root bus of conventional PCI, and ports and bridges with an id.

    The root bus of PCI Express takes none, and of a port without an id the bus has a name that others have, too.
    Raises QsteerError.
    """
    found: list[Bus] = []
    for name, kind in await _children(monitor, "/machine"):
        if _PCI_HOST.fullmatch(kind):
            found += await _buses_of(monitor, f"/machine/{name}", Slot.ROOT, "PCI")
    for name, kind in (await _children(monitor, _CONTAINERS[0]))[:_BRIDGES_MAX]:
        path = f"{_CONTAINERS[0]}/{name}"
        if kind in _PORTS and await _get(monitor, path, "hotplug") is not False:
            found += await _buses_of(monitor, path, Slot.PORT, "PCIE")
        elif kind in _BRIDGES:
            found += await _buses_of(monitor, path, Slot.BRIDGE, "PCI")
    return tuple(found)


async def _buses_of(monitor: Monitor, path: str, slot: Slot, bus_kind: str) -> list[Bus]:
    """The buses of one kind behind a host bridge, a port or a bridge."""
    names = [name for name, kind in await _children(monitor, path) if kind == bus_kind]
    found = []
    for name in names:
        members = _list(await monitor.ask("qom-list", {"path": f"{path}/{name}"}))
        devices = sum((_text(member(child, "name")) or "").startswith("child[") for child in members)
        found.append(Bus(name=name, slot=slot, devices=devices))
    return found


async def _children(monitor: Monitor, path: str) -> list[tuple[str, str]]:
    """Name and type of what is in an object, without what has no name that a path could have."""
    found = []
    for child in _list(await monitor.ask("qom-list", {"path": path})):
        name, kind = _text(member(child, "name")), _CHILD.fullmatch(_text(member(child, "type")) or "")
        if name and kind and "/" not in name:
            found.append((name, kind[1]))
    return found


async def _paths(monitor: Monitor) -> Sequence[tuple[str, str]]:
    """Path and driver of each virtio-net device."""
    found = [
        (f"{container}/{name}", kind)
        for container in _CONTAINERS
        for name, kind in await _children(monitor, container)
        if _DRIVER.fullmatch(kind)
    ]
    return found[:_NICS_MAX]


async def _nic(monitor: Monitor, path: str, driver: str, backends: Mapping[str, Backend]) -> QmpNic:
    netdev = _text(await _get(monitor, path, "netdev"))
    mac = _text(await _get(monitor, path, "mac"))
    return QmpNic(
        path=path,
        driver=driver,
        id=path.removeprefix(_CONTAINERS[0] + "/") if path.startswith(_CONTAINERS[0] + "/") else None,
        netdev=netdev,
        mac=mac.lower() if mac else None,
        rss=await _get(monitor, path, "rss") is True,
        mq=await _get(monitor, path, "mq") is True,
        device=await _place(monitor, path),
        backend=backends.get(netdev) if netdev else None,
        vhost=None,
    )


async def _place(monitor: Monitor, path: str) -> str | None:
    """The slots from the root of the PCI bus down to a device; None where that is not how its place is told."""
    slots: list[str] = []
    for _ in range(_BUSES_MAX):
        slot = _slot(await _get(monitor, path, "addr"))
        if slot is None:
            host = await _get(monitor, path, "type")
            return ":".join((_PCI_ROOT, *reversed(slots))) if slots and host in _PCI_HOSTS else None
        slots.append(slot)
        bus = _text(await _get(monitor, path, "parent_bus"))
        path = bus.rpartition("/")[0] if bus else ""
    return None


def _slot(addr: object) -> str | None:
    """A PCI address as QEMU tells it: slot and function in a number, or text."""
    match addr:
        case bool():
            return None
        case int() if 0 <= addr <= 0xFF:
            return f"{addr >> 3:02x}.{addr & 7}"
        case str() if _SLOT.fullmatch(addr):
            return addr
    return None


async def _get(monitor: Monitor, path: str, name: str) -> object:
    """A property; None where there is none."""
    try:
        return await monitor.ask("qom-get", {"path": path, "property": name})
    except UnsupportedError:
        raise
    except QsteerError:
        return None


async def _used(monitor: Monitor, path: str, queue: int) -> int | None:
    try:
        status = await monitor.ask("x-query-virtio-queue-status", {"path": f"{path}/virtio-backend", "queue": queue})
    except QsteerError:
        return None
    used = member(status, "used-idx")
    return used & 0xFFFF if isinstance(used, int) else None


def _with_vhost(nics: Sequence[QmpNic], pid: int) -> tuple[QmpNic, ...]:
    """Each vhost-net is an fd, but not one that tells for which NIC: it must be none of them, or all."""
    queues = sum(nic.backend.queues for nic in nics if nic.backend and nic.backend.kind == "tap")
    vhost = {0: False, queues: True}.get(_vhost_fds(pid)) if queues else None
    return tuple(replace(nic, vhost=vhost if nic.backend and nic.backend.kind == "tap" else None) for nic in nics)


def _vhost_fds(pid: int) -> int:
    """How many vhost-nets a process has open; -1 if it does not let itself be looked at."""
    found = 0
    try:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):
                found += fd.readlink() == _VHOST_NET
    except OSError:
        return -1
    return found


def _is(nic: QmpNic, named: Nic) -> bool:
    """By the first that the command line tells."""
    if named.netdev:
        return nic.netdev == named.netdev
    if named.id:
        return nic.id == named.id
    return bool(named.mac) and nic.mac == named.mac


def _list(answer: object) -> Sequence[object]:
    return answer if isinstance(answer, list) else ()


def _text(value: object) -> str | None:
    return printable(value) if isinstance(value, str) and 0 < len(value) <= _TEXT_MAX else None
