# SPDX-License-Identifier: BSD-2-Clause
"""The computing part of ``qsteer plug`` and ``unplug``: from what a QEMU says of its VM to the commands for it.

Pure.  A plan refuses what cannot work before anything is done.  The names that a QEMU's monitor is to know fds by are
always the same: they outlive whoever gave them, so that the next one can close what is left.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from qsteer import runplan
from qsteer.errors import NotFoundError, UnsupportedError, UsageError, printable
from qsteer.qemuargs import Device, QemuArgs
from qsteer.qmp import QemuProbe
from qsteer.qmpvm import Backend, Bus, QmpNic, QmpVm, Slot
from qsteer.runplan import CCW_DRIVER, PCI_DRIVER, Nic, NicHandles, Order, TapSpec

QUEUE, VHOST, PROGRAM = "qsteer-queue", "qsteer-vhost", "qsteer-program"
"""What fds are called in a monitor, each with a number behind it."""

PROGRAM_FDS = 4
"""Program, configuration, key and table."""

_ROOT_DEVICES_MAX = 31
"""Slots of a bus of conventional PCI, but for the one that the bridge to it may take for itself."""
_NAMED_MAX = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a QEMU that runs says: of itself, of its VM, of its netdevs by id, of the ids of its devices, of its buses.

    ``probe`` holds the properties of virtio-net's drivers, as far as this QEMU has them.
    """

    probe: QemuProbe
    vm: QmpVm
    netdevs: Mapping[str, Backend]
    device_ids: frozenset[str]
    buses: tuple[Bus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlugPlan:
    """What ``plug`` is going to do.

    ``order`` is the tap that it takes; its MAC is None where it can only be made of the tap's name.  ``netdev`` and
    ``device`` are the arguments of netdev_add and device_add; ``device`` lacks the MAC then.
    """

    nic: Nic
    order: Order
    bus: str | None
    netdev: Mapping[str, object]
    device: Mapping[str, object]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class UnplugPlan:
    """What ``unplug`` is going to do.

    ``device`` is what device_del is told, ``path`` where the device is in QEMU's object tree; None where the netdev has
    no device.  ``netdev`` is None where the device has none any more.
    """

    name: str
    device: str | None
    path: str | None
    netdev: str | None
    backend: Backend | None
    status: str


def plan_plug(
    spec: TapSpec,
    seen: Seen,
    args: QemuArgs,
    *,
    vm: str | None,
    vhost_available: bool,
    machine_id: str,
    bus: str | None,
) -> PlugPlan:
    """Decide what to do.

    ``args`` is QEMU's command line, of which -global holds for what is plugged in, too; ``vm`` is the VM's name and
    ``machine_id`` the host's id, for the MAC; ``bus`` is the user's word, if any.  Raises UsageError on what is there
    already, UnsupportedError on what this QEMU, VM or host cannot do.
    """
    driver = CCW_DRIVER if CCW_DRIVER in seen.probe.properties else PCI_DRIVER
    _check_ids(spec, seen)
    asked = Device(position=0, driver=driver, json=True, id=spec.id, netdev=spec.id, properties=(("netdev", spec.id),))
    own = replace(args, netdevs=(), devices=(asked,))
    nic, notes = runplan.plan_nic(spec, own, seen.probe, vhost_available=vhost_available)
    if nic.mac is None and (named_by := vm or spec.ifname):
        nic = replace(nic, mac=runplan.stable_mac(named_by, spec.id, machine_id))
    elif nic.mac is None:
        nameless = f"{spec.id}: the VM has no name: the MAC is made of the tap's, and may be another one next time"
        notes = (*notes, f"{nameless}; mac= in --tap gives it one")
    if nic.mac:
        check_mac(nic.mac, seen.vm.nics)
    place = bus if bus or driver == CCW_DRIVER else _free_bus(seen.buses, spec.id)
    handles = NicHandles(
        queue_fds=names(QUEUE, spec.queues),
        vhost_fds=names(VHOST, spec.queues) if nic.vhost else (),
        program_fds=names(PROGRAM, PROGRAM_FDS) if nic.steered else (),
        mac=nic.mac or "",
    )
    properties = runplan.properties(nic, handles)
    if not nic.mac:
        properties.pop("mac", None)
    netdev = {"type": "tap", "id": spec.id, "fds": ":".join(handles.queue_fds), "vhost": nic.vhost}
    return PlugPlan(
        nic=nic,
        order=runplan.order_of(nic, vm),
        bus=place,
        netdev=netdev | ({"vhostfds": ":".join(handles.vhost_fds)} if nic.vhost else {}),
        device={"driver": driver, "id": spec.id, "netdev": spec.id} | ({"bus": place} if place else {}) | properties,
        notes=notes,
    )


def plan_unplug(name: str, vm: QmpVm, netdevs: Mapping[str, Backend]) -> UnplugPlan:
    """Decide how to take off the NIC whose id, or whose netdev's, is ``name``.

    Raises NotFoundError if there is none, UnsupportedError if its packets pass no tap.
    """
    nics = [nic for nic in vm.nics if nic.id == name] or [nic for nic in vm.nics if nic.netdev == name]
    nic = nics[0] if nics else None
    netdev = nic.netdev if nic else name
    backend = netdevs.get(netdev) if netdev else None
    if not nic and not backend:
        there = ", ".join(nic.id or nic.netdev or "?" for nic in vm.nics[:_NAMED_MAX])
        raise NotFoundError(f'the VM has no virtio NIC "{name}"', hint=f"it has {there}" if there else "it has none")
    if backend and backend.kind != "tap":
        raise UnsupportedError(f'NIC "{name}" is not on a tap, but {backend.kind}', hint="unplug takes off taps only")
    return UnplugPlan(
        name=name,
        device=nic.id or nic.path if nic else None,
        path=nic.path if nic else None,
        netdev=netdev if backend else None,
        backend=backend,
        status=vm.status,
    )


def check_mac(mac: str, nics: Sequence[QmpNic]) -> None:
    """Raise UsageError if another NIC of the VM has it."""
    for nic in nics:
        if nic.mac == mac:
            other = nic.id or nic.netdev or "without an id"
            raise UsageError(f"the VM's NIC {other} has MAC {mac} already", hint="choose another mac= for --tap")


def names(kind: str, count: int) -> tuple[str, ...]:
    """What so many fds of one kind are called in a monitor."""
    return tuple(f"{kind}{number}" for number in range(count))


def plug_steps(plan: PlugPlan, *, maker: str, mtu: int | None) -> Iterator[str]:
    """The steps of a plan in words; ``maker`` is the service that makes the tap, ``mtu`` that of its bridge, if any."""
    if maker:
        yield f"ask {maker} for what follows, up to getfd"
    yield from runplan.tap_steps(plan.nic, bridge_mtu=mtu)
    yield from (f"getfd {name}" for name in fd_names(plan))
    yield f"netdev_add {_json(plan.netdev)}"
    unknown = {} if plan.nic.mac else {"mac": "52:xx:xx:xx:xx:xx"}
    yield f"device_add {_json({**plan.device, **unknown})}"


def fd_names(plan: PlugPlan) -> tuple[str, ...]:
    """What QEMU is given fds as, in the order of ReadyTap.fds."""
    queues = plan.nic.spec.queues
    vhost = names(VHOST, queues) if plan.nic.vhost else ()
    program = names(PROGRAM, PROGRAM_FDS) if plan.nic.steered else ()
    return (*names(QUEUE, queues), *vhost, *program)


def unplug_steps(plan: UnplugPlan) -> Iterator[str]:
    """The steps of a plan in words."""
    if plan.device:
        yield f"device_del {plan.device}, and wait until the guest lets it go"
    if plan.netdev:
        yield f"netdev_del {plan.netdev}"


def _check_ids(spec: TapSpec, seen: Seen) -> None:
    another = "choose another id= for --tap"
    if spec.id in seen.device_ids:
        raise UsageError(f'QEMU has a device "{spec.id}" already', hint=another)
    if spec.id in seen.netdevs:
        used = any(nic.netdev == spec.id for nic in seen.vm.nics)
        unused = f"no virtio NIC uses it; qsteer unplug --nic {spec.id} removes it"
        raise UsageError(f'QEMU has a netdev "{spec.id}" already', hint=another if used else unused)


def _free_bus(buses: Sequence[Bus], nic_id: str) -> str:
    """Where a NIC goes by itself: the root bus, a free port, a bridge."""
    for slot, most in ((Slot.ROOT, _ROOT_DEVICES_MAX), (Slot.PORT, 0), (Slot.BRIDGE, _ROOT_DEVICES_MAX)):
        for bus in buses:
            if bus.slot is slot and bus.devices <= most:
                return bus.name
    ports = sum(bus.slot is Slot.PORT for bus in buses)
    taken = f": its {ports} PCIe port{'s are' if ports > 1 else ' is'} taken" if ports else ""
    raise UnsupportedError(
        f'the VM has no free place to plug NIC "{nic_id}" into{taken}',
        hint="start QEMU with one -device pcie-root-port,id=rp0,chassis=1 for each, or name a bus with --bus",
    )


def _json(members: Mapping[str, object]) -> str:
    return printable(json.dumps(members, separators=(",", ":"), ensure_ascii=False))
