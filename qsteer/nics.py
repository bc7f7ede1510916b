# SPDX-License-Identifier: BSD-2-Clause
"""Which NIC of a VM is behind which tap, and which is behind none.  Pure.

Theory of operation
===================

A NIC is known by what libvirt's status file says now, or by QEMU's command line, which says what there was at the
start.  Of what was plugged in later without libvirt only QMP knows (qmpvm).  A NIC is joined with a tap by the device's
name, where that is given, or by the numbers of the fds that QEMU was given, which are still those of its queues.  Where
several NICs fit none is taken: a wrong MAC is worse than none.

What libvirt plugged in and out since the start, only its status file knows; so of a domain's command line only those
NICs count by themselves that libvirt did not put there (its netdevs are called ``host`` and the NIC's alias).
"""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

from qsteer import qemuargs
from qsteer.model import Domain, Interface, Nic
from qsteer.qemuargs import Defaults, Device, Netdev, QemuArgs

_OF_LIBVIRT = {
    "bridge": None,
    "network": None,
    "ethernet": None,
    "direct": "macvtap",
    "vhostuser": "vhost-user",
    "vdpa": "vhost-vdpa",
    "server": "socket",
    "client": "socket",
    "mcast": "socket",
    "udp": "socket",
}
_OF_QEMU = {"tap": None, "bridge": None}
_MAC = re.compile("[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
_BACKEND_MAX = 32
"""Characters of the name of a backend that is not known here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """A NIC, and how to find its tap.  ``backend`` is None where a tap is behind it, be it a macvtap."""

    nic: Nic
    backend: str | None = None
    ifname: str | None = None
    fds: frozenset[int] = frozenset()


class VmNics:
    """The NICs of a VM; ``vhost_net`` says whether it has /dev/vhost-net open, which libvirt uses where it can."""

    def __init__(self, args: QemuArgs | None, domain: Domain | None, *, vhost_net: bool) -> None:
        start = tuple(_of_command_line(args)) if args else ()
        self.known = tuple(_of_domain(domain, start, vhost_net=vhost_net)) if domain else start
        self._by_fd: dict[int, list[Known]] = {}
        self._by_name: dict[str, list[Known]] = {}
        self._with_tap = [known for known in self.known if known.backend is None]
        for known in self._with_tap:
            for fd in known.fds:
                self._by_fd.setdefault(fd, []).append(known)
            if known.ifname:
                self._by_name.setdefault(known.ifname, []).append(known)

    def of_tap(self, name: str, fds: Iterable[int], *, only_one: bool) -> Nic | None:
        """The NIC behind a tap of which the VM has queues by these fds, if it is plain which one that is.

        ``only_one``: the VM has no other tap, so that its only NIC with one needs no description.
        """
        found = self._by_name.get(name) or [known for fd in fds for known in self._by_fd.get(fd, ())]
        if not found and only_one:
            found = self._with_tap if not any(known.ifname or known.fds for known in self._with_tap) else []
        nics = {known.nic for known in found}
        return nics.pop() if len(nics) == 1 else None

    def without_tap(self, macvtaps: Collection[int]) -> Iterator[tuple[Nic, str]]:
        """The NICs whose packets do not pass a tap, and what they pass; ``macvtaps`` are the VM's fds of such."""
        for known in self.known:
            if known.backend is not None:
                yield known.nic, known.backend
            elif not known.fds.isdisjoint(macvtaps):
                yield known.nic, "macvtap"


def _of_domain(domain: Domain, start: Sequence[Known], *, vhost_net: bool) -> Iterator[Known]:
    by_id: dict[str | None, list[Known]] = {}
    for known in start:
        by_id.setdefault(known.nic.id, []).append(known)
    for interface in domain.interfaces:
        # Another NIC may have been plugged in under the alias of one that was there at the start.
        at_start = [known for known in by_id.get(interface.alias, ()) if known.nic.mac == interface.mac]
        yield _of_interface(interface, at_start[0] if len(at_start) == 1 else None, vhost_net=vhost_net)
    yield from (known for known in start if known.nic.netdev != f"host{known.nic.id}")


def _of_interface(interface: Interface, start: Known | None, *, vhost_net: bool) -> Known:
    """The command line knows more of a NIC that was there at the start: what -global and overrides make of it."""
    virtio = not interface.model or interface.model.startswith("virtio")
    if start:
        rss, vhost = start.nic.rss, start.nic.vhost
    else:
        rss = bool(interface.rss)
        vhost = virtio and vhost_net if interface.vhost is None else interface.vhost
    netdev = f"host{interface.alias}" if interface.alias else None
    return Known(
        nic=Nic(id=interface.alias, netdev=netdev, mac=interface.mac, rss=rss, vhost=vhost),
        backend=_OF_LIBVIRT.get(interface.kind, interface.kind[:_BACKEND_MAX] or "unknown"),
        ifname=interface.target,
        fds=start.fds if start else frozenset(),
    )


def _of_command_line(args: QemuArgs) -> Iterator[Known]:
    """One for each netdev that a device uses, or that -nic or -net brings along with one."""
    defaults = Defaults(args.globals)
    users: dict[str | None, list[Device]] = {}
    for device in args.devices:
        users.setdefault(device.netdev, []).append(device)
    for netdev in args.netdevs:
        if netdev.option != "netdev" and netdev.kind != "none":
            nic = Nic(id=None, netdev=netdev.id, mac=_mac(netdev.mac), rss=False, vhost=bool(netdev.vhost))
            yield Known(nic=nic, backend=_backend(netdev), ifname=netdev.ifname, fds=_numbers(netdev))
        elif netdev.id and len(devices := users.get(netdev.id, [])) == 1:
            yield _of_device(devices[0], netdev, defaults)


def _of_device(device: Device, netdev: Netdev, defaults: Defaults) -> Known:
    virtio, own = device.driver.startswith("virtio-net"), dict(device.properties)
    nic = Nic(
        id=device.id,
        netdev=netdev.id,
        mac=_mac(own.get("mac", defaults.get(device.driver, "mac"))),
        rss=virtio and bool(qemuargs.parse_bool(own.get("rss", defaults.get(device.driver, "rss")))),
        vhost=bool(netdev.vhost),
    )
    return Known(nic=nic, backend=_backend(netdev), ifname=netdev.ifname, fds=_numbers(netdev))


def _backend(netdev: Netdev) -> str | None:
    """passt is the usual thing behind a unix socket, and puts its name into the path, by itself as under libvirt."""
    if netdev.kind in ("stream", "dgram") and netdev.path and "passt" in netdev.path:
        return "passt"
    return _OF_QEMU.get(netdev.kind, netdev.kind[:_BACKEND_MAX])


def _numbers(netdev: Netdev) -> frozenset[int]:
    return frozenset(int(fd) for fd in netdev.fds if fd.isascii() and fd.isdecimal() and len(fd) <= 7)


def _mac(text: object) -> str | None:
    return text.lower() if isinstance(text, str) and _MAC.fullmatch(text) else None
