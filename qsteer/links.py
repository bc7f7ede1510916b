# SPDX-License-Identifier: BSD-2-Clause
"""Network devices over rtnetlink: look at one, and set a tap up.

The only module that imports pyroute2 (0.9), which takes a while: import it where it is needed.
"""

import errno
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from qsteer._shim import lib
from qsteer.errors import NotFoundError, UsageError, from_errno
from qsteer.tuns import Tun


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """A network device.  ``kind`` is rtnetlink's (``tun``, ``bridge``, ``veth``), empty for a physical device."""

    index: int
    name: str
    kind: str
    mtu: int
    mac: str
    up: bool
    bridge_index: int | None


def find(name: str) -> Link | None:
    """The network device of that name in the caller's network namespace, or None.  Raises QsteerError."""
    try:
        with IPRoute() as route:
            return _find(route, name)
    except (NetlinkError, OSError) as error:
        raise from_errno(_errno(error), f'cannot look up network device "{name}"') from None


def bridge(name: str) -> Link:
    """The bridge of that name.  Raises NotFoundError if there is no such device, UsageError if it is not a bridge."""
    link = find(name)
    if link is None:
        raise NotFoundError(f'unknown bridge "{name}"', hint="ip link show type bridge")
    if link.name != name:
        raise UsageError(f'"{name}" is another name of "{link.name}"', hint="a bridge is given by its own name")
    if link.kind != "bridge":
        raise UsageError(f'"{name}" is not a bridge', hint="ip link show type bridge")
    return link


def bridge_port_mac(mac: str) -> str:
    """The MAC for a bridge port that leads to a NIC with ``mac``: the same, but for a first byte of fe.

    A bridge takes the lowest MAC among its ports for its own, so a port's is high; and it must differ from the NIC's,
    or the bridge would keep the NIC's frames to itself.
    """
    return f"{'fa' if mac[:2] == 'fe' else 'fe'}{mac[2:]}"


def configure(
    tap: str, *, mac: str | None = None, mtu: int | None = None, bridge_index: int | None = None, up: bool = True
) -> None:
    """Set ``tap``'s MAC and MTU where given, join the bridge (0: leave its own), and bring it up, or down.

    Raises QsteerError.
    """
    steps: list[tuple[str, dict[str, object]]] = []
    if mac is not None:
        steps.append((f"set the MAC of {tap} to {mac}", {"address": mac}))
    if mtu is not None:
        steps.append((f"set the MTU of {tap} to {mtu}", {"mtu": mtu}))
    if bridge_index is not None:
        steps.append((f"add {tap} to its bridge", {"master": bridge_index}))
    state = "up" if up else "down"
    steps.append((f"bring {tap} {state}", {"state": state}))

    what = f"find {tap}"
    try:
        with IPRoute() as route:
            link = _find(route, tap)
            if link is None:
                raise from_errno(errno.ENODEV, f"cannot {what}")
            for what, change in steps:  # noqa: B007 (the failed step is named below)
                route.link("set", index=link.index, **change)
    except (NetlinkError, OSError) as error:
        raise from_errno(_errno(error), f"cannot {what}") from None


def tuns() -> tuple[Tun, ...]:
    """The tun devices of the network namespace that the calling thread is in.  Raises QsteerError."""
    try:
        with IPRoute() as route:
            found = [_tun(message) for message in route.link("dump") if message.get(("linkinfo", "kind")) == "tun"]
    except (NetlinkError, OSError) as error:
        raise from_errno(_errno(error), "cannot list this network namespace's devices") from None
    return tuple(found)


def bridges() -> dict[int, str]:
    """By ifindex, for each device of the calling thread's network namespace, the bridge that it is in; "" for none.

    Raises QsteerError.
    """
    try:
        with IPRoute() as route:
            found = list(route.link("dump"))
    except (NetlinkError, OSError) as error:
        raise from_errno(_errno(error), "cannot list this network namespace's devices") from None
    names = {one["index"]: one.get("ifname") for one in found if one.get(("linkinfo", "kind")) == "bridge"}
    return {one["index"]: names.get(one.get("master"), "") for one in found}


def _tun(message: Any) -> Tun:
    return Tun(
        name=message.get("ifname"),
        ifindex=message["index"],
        is_tap=message.get(("linkinfo", "data", "tun_type")) == lib.IFF_TAP,
        persistent=bool(message.get(("linkinfo", "data", "tun_persist"))),
        multi_queue=bool(message.get(("linkinfo", "data", "tun_multi_queue"))),
        active=message.get(("linkinfo", "data", "tun_num_queues")) or 0,
    )


def _find(route: Any, name: str) -> Link | None:
    try:
        messages = route.link("get", ifname=name)
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ERANGE):  # ERANGE: longer than any device's name
            return None
        raise
    message = messages[0]
    info = message.get(("linkinfo", "kind"))
    return Link(
        index=message["index"],
        name=message.get("ifname"),
        kind=info or "",
        mtu=message.get("mtu"),
        mac=message.get("address") or "",
        up=message["state"] == "up",
        bridge_index=message.get("master"),
    )


def _errno(error: Exception) -> int:
    return int(getattr(error, "code", 0) or getattr(error, "errno", 0) or 0)
