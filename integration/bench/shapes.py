# SPDX-License-Identifier: BSD-2-Clause
"""The packets that are timed: one of each kind, and the flows of a kind."""

import random
from collections.abc import Callable, Mapping

from tests import packets

MINIMUM = 60
"""Bytes of the shortest Ethernet frame, without its FCS."""
CHECKED = 64
"""Flows of each kind of packet whose queues are checked before anything is timed."""


class WrongQueueError(Exception):
    """A program answers wrongly; ``str()`` is one line for the user."""


def _v4_tcp(draw: random.Random) -> bytes:
    return packets.ethernet(packets.ETH_IPV4, _tcp4(draw))


def _v4_udp(draw: random.Random) -> bytes:
    body = packets.ipv4(packets.UDP, packets.udp(_ports(draw)), addresses=draw.randbytes(8))
    return packets.ethernet(packets.ETH_IPV4, body)


def _v6_tcp(draw: random.Random) -> bytes:
    body = packets.ipv6(packets.TCP, packets.tcp(_ports(draw)), addresses=draw.randbytes(32))
    return packets.ethernet(packets.ETH_IPV6, body)


def _v6_ext(draw: random.Random) -> bytes:
    """TCP behind destination options with a home address, which is hashed in place of the source."""
    extensions = (packets.destination(packets.home_address(draw.randbytes(16))),)
    tcp = packets.tcp(_ports(draw))
    body = packets.ipv6(packets.TCP, tcp, extensions=extensions, addresses=draw.randbytes(32))
    return packets.ethernet(packets.ETH_IPV6, body)


def _vlan(draw: random.Random) -> bytes:
    return packets.ethernet(packets.ETH_IPV4, _tcp4(draw), tags=(packets.ETH_8021Q,))


def _qinq(draw: random.Random) -> bytes:
    return packets.ethernet(packets.ETH_IPV4, _tcp4(draw), tags=(packets.ETH_8021AD, packets.ETH_8021Q))


def _arp(draw: random.Random) -> bytes:
    return packets.ethernet(packets.ETH_ARP, bytes.fromhex("0001080006040001") + draw.randbytes(20))


def _tcp4(draw: random.Random) -> bytes:
    return packets.ipv4(packets.TCP, packets.tcp(_ports(draw)), addresses=draw.randbytes(8))


def _ports(draw: random.Random) -> tuple[int, int]:
    return draw.randrange(1024, 0x10000), draw.randrange(1, 1024)


_MAKERS: Mapping[str, Callable[[random.Random], bytes]] = {
    "v4_tcp": _v4_tcp,
    "v4_udp": _v4_udp,
    "v6_tcp": _v6_tcp,
    "v6_ext": _v6_ext,
    "vlan": _vlan,
    "qinq": _qinq,
    "non_ip": _arp,
}
KINDS: Mapping[str, str] = {
    "v4_tcp": "IPv4 TCP",
    "v4_udp": "IPv4 UDP",
    "v6_tcp": "IPv6 TCP",
    "v6_ext": "IPv6 dst options TCP",
    "vlan": "802.1Q IPv4 TCP",
    "qinq": "802.1ad 802.1Q IPv4 TCP",
    "non_ip": "ARP",
}
"""Every kind, and how it is called in tables."""


def flows(kind: str, count: int) -> tuple[bytes, ...]:
    """``count`` packets of one kind with addresses and ports of their own; the same ones every time."""
    draw = random.Random(f"qsb {kind}")
    return tuple(_MAKERS[kind](draw).ljust(MINIMUM, b"\0") for _ in range(count))


def wrong_queues(answer: Callable[[bytes], int], wanted: Callable[[bytes], int]) -> dict[str, int]:
    """The kinds of packet that do not get the queue they should, and for how many of CHECKED flows."""
    wrong: dict[str, int] = {}
    for kind in KINDS:
        for packet in flows(kind, CHECKED):
            if answer(packet) != wanted(packet):
                wrong[kind] = wrong.get(kind, 0) + 1
    return wrong
