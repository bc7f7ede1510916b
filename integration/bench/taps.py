# SPDX-License-Identifier: BSD-2-Clause
"""Taps in a network namespace of this process alone: nothing else sends into them, and all goes with the process."""

import contextlib
import os
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from integration.bench.native import checked, lib
from qsteer import kernel

QUEUES = 4
_GROUP = 0x717362
"""The taps are one group of devices: the kernel removes a group at once, and a device by itself in 25 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """``queues`` are fds that do not block."""

    name: str
    ifindex: int
    queues: tuple[int, ...]


def enter_private_network() -> None:
    """Leave the host's network for good.  There is no IPv6 here, which would send by itself."""
    checked(lib().qb_private_network(), "cannot make a network namespace")
    for path in Path("/proc/sys/net/ipv6/conf").glob("*/disable_ipv6"):
        path.write_text("1")
    # A queue is an fd, and so is a program.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextlib.contextmanager
def taps(count: int, *, length: int) -> Iterator[Sequence[Tap]]:
    """Taps of QUEUES queues that are up; ``length`` packets wait in a queue at most.  Raises QsteerError."""
    opened: list[kernel.OpenTap] = []
    try:
        for number in range(count):
            opened.append(kernel.open_tap(f"qsb-{number}", QUEUES))
        yield tuple(_set_up(opened, length))
    finally:
        # Where not one of them is in the group yet, closing them is left.
        with IPRoute() as route, contextlib.suppress(NetlinkError):
            route.link("del", index=0, group=_GROUP)
        for tap in opened:
            tap.close()


def _set_up(opened: Sequence[kernel.OpenTap], length: int) -> Iterator[Tap]:
    with IPRoute() as route:
        indices = {link.get_attr("IFLA_IFNAME"): link["index"] for link in route.get_links()}
        for tap in opened:
            for fd in tap.fds:
                os.set_blocking(fd, False)
            route.link("set", index=indices[tap.name], txqlen=length, group=_GROUP, state="up")
            yield Tap(name=tap.name, ifindex=indices[tap.name], queues=tap.fds)
