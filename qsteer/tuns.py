# SPDX-License-Identifier: BSD-2-Clause
"""The tun devices of a network namespace, those that no process has open among them.

``in_sysfs`` costs next to nothing: ``status`` looks every time.  But a mount of sysfs shows the network namespace that
it was made in, be it another than the caller's; there, and in other namespaces, ``links.tuns`` looks, over rtnetlink.
"""

import contextlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from qsteer._shim import lib

_DRIVER = Path("/sys/class/misc/tun")
_DEVICES = Path("/sys/class/net")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tun:
    """A tun device.  ``active`` queues, of which there is one without IFF_MULTI_QUEUE, are those that are used."""

    name: str
    ifindex: int
    is_tap: bool
    persistent: bool
    multi_queue: bool
    active: int


def driver_is_loaded() -> bool:
    """Whether there can be a tap at all."""
    return _DRIVER.exists()


def in_sysfs() -> tuple[Tun, ...] | None:
    """Those of the network namespace that the caller is in; None if sysfs shows another one's devices."""
    indices = {name: index for index, name in socket.if_nameindex()}
    shown = {entry.name for entry in os.scandir(_DEVICES) if entry.is_symlink()}
    if shown != indices.keys():
        return None
    found = []
    for name, index in indices.items():
        with contextlib.suppress(OSError, ValueError):  # gone meanwhile, or no tun device
            flags = int(_read(f"{_DEVICES}/{name}/tun_flags"), 16)
            if int(_read(f"{_DEVICES}/{name}/ifindex")) != index:
                return None
            found.append(_tun(name, index, flags))
    return tuple(found)


def _tun(name: str, ifindex: int, flags: int) -> Tun:
    return Tun(
        name=name,
        ifindex=ifindex,
        is_tap=bool(flags & lib.IFF_TAP),
        persistent=bool(flags & lib.IFF_PERSIST),
        multi_queue=bool(flags & lib.IFF_MULTI_QUEUE),
        active=sum(queue.name.startswith("rx-") for queue in os.scandir(f"{_DEVICES}/{name}/queues")),
    )


def _read(path: str) -> bytes:
    """A short file, without what pathlib adds: a host has a thousand taps."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 64)
    finally:
        os.close(fd)
