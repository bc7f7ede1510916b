# SPDX-License-Identifier: BSD-2-Clause
"""The kinds of packets and configurations on which QEMU's own program and the reference differ.  Pure.

A packet may be of several kinds; it counts as the first one.  ``Kind.open`` are those where the virtio specification
says nothing, and another choice than the reference's can be defended.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from qsteer.reference import classify, toeplitz_hash
from qsteer.rss import HashType, RssConfig

WITH_PORTS = HashType.TCP4 | HashType.UDP4 | HashType.TCP6 | HashType.UDP6 | HashType.TCP_EX | HashType.UDP_EX
"""The types that hash the ports, too."""

_TAGS = (0x8100, 0x88A8)
_IPV4, _IPV6 = 0x0800, 0x86DD
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION = 0, 43, 44, 51, 60
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION)
_TCP, _UDP, _ICMPV6, _NONE, _MOBILITY = 6, 17, 58, 59, 135
_L4_BYTES = {_TCP: 20, _UDP: 8}
_QEMU_HEADERS, _QEMU_OPTIONS = 11, 30


@dataclass(frozen=True, slots=True)
class Kind:
    """``name`` says what about the packet, and then what QEMU's program makes of it."""

    name: str
    open: bool = False


LONG = Kind("headers outside of the skb's linear area: unclassified")
TAG = Kind("VLAN tags in the packet's data: the IP header is taken to be where the tag is")
ZERO = Kind("a hash of 0: unclassified")
ODD = Kind("another IP version than the ethertype's, or an IPv4 header length below 20: not looked at", open=True)
NOT_EXTENSION = Kind("ICMPv6, no next header, mobility header: taken for IPv6 extension headers, and followed")
AUTHENTICATION = Kind("an AH among the IPv6 extension headers: not followed")
FRAGMENT = Kind(
    "an IPv6 fragment header: its reserved byte is taken for a length, a later fragment's payload for headers"
)
CUT = Kind("TCP or UDP header that is not all in the packet: unclassified", open=True)
CUT_CHAIN = Kind("IPv6 extension headers that are not all in the packet: unclassified", open=True)
MANY = Kind("more than 11 IPv6 extension headers, or more than 30 options: not followed", open=True)
EX_TYPES = Kind("extension headers and *_EX types: these count only besides the type without _EX, and after it")
ROUTING = Kind("a type 2 routing header whose segments left are not 1: not used", open=True)
OPTIONS = Kind("destination options: those in the last 8 bytes are not looked at, and lengths not checked")
UNEXPLAINED = Kind("unexplained")


@dataclass(frozen=True, slots=True)
class _Header:
    number: int
    at: int
    size: int


def of(packet: bytes, config: RssConfig, *, long: bool) -> Kind:
    """Why QEMU's program may differ here.  ``long``: only the Ethernet header is in the linear area."""
    if long:
        return LONG
    ethertype = int.from_bytes(packet[12:14])
    if ethertype in _TAGS:
        return TAG
    match = classify(packet, config.types)
    if match and toeplitz_hash(config.key, match.data) == 0:
        return ZERO
    if ethertype == _IPV4:
        return _of_ipv4(packet)
    if ethertype == _IPV6:
        return _of_ipv6(packet, config.types)
    return UNEXPLAINED


def _of_ipv4(packet: bytes) -> Kind:
    if len(packet) < 14 + 20:
        return UNEXPLAINED
    words = packet[14] & 0xF
    if packet[14] >> 4 != 4 or words < 5:
        return ODD
    fragment = int.from_bytes(packet[20:22]) & 0x3FFF
    return CUT if not fragment and _cut(packet, packet[23], 14 + words * 4) else UNEXPLAINED


def _of_ipv6(packet: bytes, types: HashType) -> Kind:
    if len(packet) < 14 + 40:
        return UNEXPLAINED
    if packet[14] >> 4 != 6:
        return ODD
    headers, protocol, at = _chain(packet)
    numbers = [header.number for header in headers]
    transport = not _cut(packet, protocol, at) and _FRAGMENT not in numbers
    for kind, applies in (
        (NOT_EXTENSION, protocol in (_ICMPV6, _NONE, _MOBILITY)),
        (AUTHENTICATION, _AH in numbers),
        (CUT_CHAIN, protocol in _EXTENSIONS),
        (MANY, len(headers) > _QEMU_HEADERS or any(_many_options(packet, header) for header in headers)),
        (EX_TYPES, headers and _ex_types(types, protocol if transport else _NONE)),
        (FRAGMENT, _FRAGMENT in numbers),
        (CUT, _cut(packet, protocol, at)),
        (ROUTING, any(_unused_route(packet, header) for header in headers)),
        (OPTIONS, _DESTINATION in numbers),
    ):
        if applies:
            return kind
    return UNEXPLAINED


def _cut(packet: bytes, protocol: int, at: int) -> bool:
    return at + _L4_BYTES.get(protocol, 0) > len(packet)


def _chain(packet: bytes) -> tuple[list[_Header], int, int]:
    """The extension headers that are in the packet; then what follows, and where."""
    protocol, at = packet[20], 14 + 40
    headers = []
    while protocol in _EXTENSIONS and at + 8 <= len(packet):
        size = 8 if protocol == _FRAGMENT else (packet[at + 1] + 2) * 4 if protocol == _AH else (packet[at + 1] + 1) * 8
        headers.append(_Header(protocol, at, size))
        protocol, at = packet[at], at + size
    return headers, protocol, at


def _ex_types(types: HashType, protocol: int) -> bool:
    """Whether it makes a difference that QEMU asks for the base type first."""
    base, extended = {_TCP: (HashType.TCP6, HashType.TCP_EX), _UDP: (HashType.UDP6, HashType.UDP_EX)}.get(
        protocol, (HashType(0), HashType(0))
    )
    if types & extended:
        return not types & base
    return bool(types & HashType.IP_EX) and (bool(types & base) or not types & HashType.IP6)


def _unused_route(packet: bytes, header: _Header) -> bool:
    return header.number == _ROUTING and packet[header.at + 2] == 2 and packet[header.at + 3] != 1


def _many_options(packet: bytes, header: _Header) -> bool:
    return header.number == _DESTINATION and sum(1 for _ in _options(packet, header)) > _QEMU_OPTIONS


def _options(packet: bytes, header: _Header) -> Iterator[int]:
    """Where the options of a header are."""
    at, end = header.at + 2, min(header.at + header.size, len(packet))
    while at < end:
        yield at
        at += 1 if packet[at] == 0 or at + 1 >= end else 2 + packet[at + 1]
