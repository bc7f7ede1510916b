# SPDX-License-Identifier: BSD-2-Clause
"""Which queue a packet gets, said once in plain Python; the BPF programs are tested against this.

Theory of operation
===================

The rules are those of the virtio specification (1.2 and later, network device: "Hash calculation for incoming packets"
and "RSS processing").  Where it leaves something open, the choice made here is marked (*), and the BPF programs make
the same one.  A packet starts at its Ethernet header, has no FCS, and carries its VLAN tags in band.  Nothing that is
read may lie beyond the end of the packet; lengths that headers claim for the whole datagram are not looked at.

Ethernet (*)
    Up to two VLAN tags in a row (0x8100 or 0x88a8 each) are skipped.  A third tag, another ethertype than those of IPv4
    and IPv6, or a packet too short for any of this is unclassified.

IPv4 ("IPv4 packets")
    Needs the 20 bytes of the fixed header, version 4 and a header length of at least 5 words; else unclassified.  The
    protocol is the one that the header names.  TCP4 if the packet has a TCP header, else UDP4 if it has a UDP header,
    else IP4, where each of them must be enabled; else unclassified.

TCP and UDP headers
    "Has a header" means that all its bytes, 20 and 8, are in the packet (*).  A fragment, also the first one, has
    none (*), as in QEMU and Linux.

IPv6 ("IPv6 packets without extension header", "IPv6 packets with extension header")
    Needs the 40 bytes of the header and version 6; else unclassified.  The extension headers that are followed are
    hop-by-hop options, routing, fragment, destination options and AH; anything else, ESP too, is the upper layer (*).

    - A packet without extension headers: as IPv4, with TCP6, UDP6 and IP6.
    - A packet with any: TCP_EX, else UDP_EX, else IP_EX, in which the home address stands for the source, and the
      address in the routing header for the destination, where there are such; the base types need not be enabled.
      Else TCP6, UDP6 and IP6 with the addresses of the IPv6 header.  So IP_EX comes before TCP6 for a TCP packet.

    The walk along the extension headers (*):

    - HEADERS_MAX headers are followed.  With one more, or with one whose first 8 bytes are not in the packet, the walk
      ends, and the packet has no TCP or UDP header.  The header that ended it counts as an extension header all the
      same, since the one before it says that it is there.
    - A fragment header has 8 bytes, and the packet no TCP or UDP header, even if it is the only fragment.  What follows
      the fragment header is looked at only if its offset is 0; else it is payload.
    - The home address: the option of type 0xc9 and length 16 in a destination options header, of which OPTIONS_MAX
      options are looked at (a Pad1 counts as one), up to the first home address.  An option that does not lie wholly
      in the header and in the packet ends the search.  The last header that has a home address counts.
    - The routing address: bytes 8 to 23 of a routing header of type 2 whose length field is 2 and which is wholly in
      the packet, whatever its "segments left" says.  The last such header counts.

Hash and queue ("RSS processing")
    Toeplitz over source and destination address and, for the TCP and UDP types, source and destination port, as they
    are in the packet.  The queue is the table's entry at the hash modulo the table's length; an unclassified packet
    goes to the unclassified queue.  A hash of 0 is a hash like any other.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

from qsteer.rss import HashType, RssConfig

TAGS_MAX = 2
"""VLAN tags that are skipped."""
HEADERS_MAX = 16
"""IPv6 extension headers that are followed."""
OPTIONS_MAX = 32
"""Options that are looked at in one destination options header."""

_TAGS = (b"\x81\x00", b"\x88\xa8")
_IPV4 = b"\x08\x00"
_IPV6 = b"\x86\xdd"

_HOP_BY_HOP = 0
_TCP = 6
_UDP = 17
_ROUTING = 43
_FRAGMENT = 44
_AH = 51
_DESTINATION = 60
_EXTENSIONS = frozenset({_HOP_BY_HOP, _ROUTING, _FRAGMENT, _AH, _DESTINATION})
_L4_BYTES = {_TCP: 20, _UDP: 8}

_PAD1 = 0
_HOME_ADDRESS = 0xC9


class _Rules(NamedTuple):
    """The hash types of one kind of packet, in the order in which they are tried."""

    tcp: HashType
    udp: HashType
    ip: HashType


_RULES_4 = _Rules(HashType.TCP4, HashType.UDP4, HashType.IP4)
_RULES_6 = _Rules(HashType.TCP6, HashType.UDP6, HashType.IP6)
_RULES_EX = _Rules(HashType.TCP_EX, HashType.UDP_EX, HashType.IP_EX)


class _L4(NamedTuple):
    """A TCP or UDP header that is wholly in the packet; ``protocol`` is -1 if there is none."""

    protocol: int = -1
    ports: bytes = b""


class _Chain(NamedTuple):
    """What the extension headers of an IPv6 packet say; an address that they do not give is empty."""

    l4: _L4
    extended: bool
    home_address: bytes
    routing_address: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """The hash type that matched, and the Toeplitz input: 8, 12, 32 or 36 bytes."""

    hash_type: HashType
    data: bytes


def toeplitz_hash(key: bytes, data: bytes) -> int:
    """The Toeplitz hash, 32 bits: the XOR of the key's 32-bit windows at the positions of the data's set bits.

    Raises ValueError if the key is not at least 4 bytes longer than the data.
    """
    if len(data) > len(key) - 4:
        raise ValueError(f"a key of {len(key)} bytes is too short for {len(data)} bytes of data")
    result = 0
    for hashes, byte in zip(_byte_hashes(key), data, strict=False):
        result ^= hashes[byte]
    return result


@functools.lru_cache(maxsize=32)
def _byte_hashes(key: bytes) -> tuple[tuple[int, ...], ...]:
    """For each position of a byte in the data, what each of its 256 values adds to the hash."""
    bits = int.from_bytes(key)
    last = len(key) * 8 - 32
    tables = []
    for start in range(0, last, 8):
        # The most significant bit of a byte has the first window, so bit b of its value has window start + 7 - b.
        windows = [bits >> (last - (start + 7 - bit)) & 0xFFFFFFFF for bit in range(8)]
        hashes = [0]
        for window in windows:
            hashes += [window ^ lower for lower in hashes]
        tables.append(tuple(hashes))
    return tuple(tables)


def classify(packet: bytes, types: HashType) -> Classified | None:
    """The hash type among ``types`` that a packet matches, and what is hashed; None if it is unclassified."""
    at = 12
    for _ in range(TAGS_MAX):
        if packet[at : at + 2] not in _TAGS:
            break
        at += 4
    ethertype, start = packet[at : at + 2], at + 2
    if ethertype == _IPV4:
        return _classify_ipv4(packet, start, types)
    if ethertype == _IPV6:
        return _classify_ipv6(packet, start, types)
    return None


def queue_of(packet: bytes, config: RssConfig) -> int:
    """The queue that a packet gets, before the device folds it by the number of its active queues."""
    match = classify(packet, config.types)
    if match is None:
        return config.unclassified_queue
    return config.table[toeplitz_hash(config.key, match.data) % len(config.table)]


def _classify_ipv4(packet: bytes, start: int, types: HashType) -> Classified | None:
    header = packet[start : start + 20]
    if len(header) < 20 or header[0] >> 4 != 4:
        return None
    words = header[0] & 0xF
    if words < 5:
        return None
    fragmented = int.from_bytes(header[6:8]) & 0x3FFF  # "more fragments" and the offset
    l4 = _L4() if fragmented else _find_l4(packet, header[9], start + words * 4)
    return _match(types, _RULES_4, l4, header[12:20])


def _classify_ipv6(packet: bytes, start: int, types: HashType) -> Classified | None:
    header = packet[start : start + 40]
    if len(header) < 40 or header[0] >> 4 != 6:
        return None
    chain = _walk(packet, header[6], start + 40)
    source, destination = header[8:24], header[24:40]
    if chain.extended:
        addresses = (chain.home_address or source) + (chain.routing_address or destination)
        match = _match(types, _RULES_EX, chain.l4, addresses)
        if match is not None:
            return match
    return _match(types, _RULES_6, chain.l4, source + destination)


def _match(types: HashType, rules: _Rules, l4: _L4, addresses: bytes) -> Classified | None:
    if l4.protocol == _TCP and types & rules.tcp:
        return Classified(hash_type=rules.tcp, data=addresses + l4.ports)
    if l4.protocol == _UDP and types & rules.udp:
        return Classified(hash_type=rules.udp, data=addresses + l4.ports)
    if types & rules.ip:
        return Classified(hash_type=rules.ip, data=addresses)
    return None


def _find_l4(packet: bytes, protocol: int, at: int) -> _L4:
    size = _L4_BYTES.get(protocol)
    if size is None or at + size > len(packet):
        return _L4()
    return _L4(protocol, packet[at : at + 4])


def _walk(packet: bytes, protocol: int, at: int) -> _Chain:
    """Follow the extension headers from the one of type ``protocol``, which starts at ``at``."""
    headers = 0
    fragmented = False
    home_address = routing_address = b""
    while protocol in _EXTENSIONS:
        headers += 1
        if headers > HEADERS_MAX or at + 8 > len(packet):
            return _Chain(_L4(), True, home_address, routing_address)
        size = (packet[at + 1] + 1) * 8
        if protocol == _FRAGMENT:
            fragmented = True
            size = 8
            if int.from_bytes(packet[at + 2 : at + 4]) >> 3:
                break
        elif protocol == _AH:
            size = (packet[at + 1] + 2) * 4
        elif protocol == _DESTINATION:
            home_address = _find_home_address(packet, at, at + size) or home_address
        elif protocol == _ROUTING and packet[at + 1] == 2 and packet[at + 2] == 2 and at + 24 <= len(packet):
            routing_address = packet[at + 8 : at + 24]
        protocol, at = packet[at], at + size
    l4 = _L4() if fragmented else _find_l4(packet, protocol, at)
    return _Chain(l4, headers > 0, home_address, routing_address)


def _find_home_address(packet: bytes, start: int, end: int) -> bytes:
    """The home address in the destination options header from ``start`` to ``end``; empty if there is none."""
    end = min(end, len(packet))
    at = start + 2
    for _ in range(OPTIONS_MAX):
        if at >= end:
            break
        if packet[at] == _PAD1:
            at += 1
            continue
        if at + 2 > end:
            break
        after = at + 2 + packet[at + 1]
        if after > end:
            break
        if packet[at] == _HOME_ADDRESS and after == at + 18:
            return packet[at + 2 : after]
        at = after
    return b""
