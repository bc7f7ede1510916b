# SPDX-License-Identifier: BSD-2-Clause
"""Packets to steer: builders for every shape that RSS tells apart, a golden table, and a random mix of it all.

Packets start at the Ethernet header, with their VLAN tags in band and no FCS.  Checksums are 0: steering does not look
at them.  Everything that a header says about lengths can be made a lie.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qsteer.rss import BASE_TYPES, KEY_BYTES, HashType, RssConfig, equal_table

PACKET_MAX = 400
"""Longest packet that ``random_packets`` makes; the shortest is an Ethernet header."""

ALL_TYPES = HashType(sum(HashType))
"""The nine hash types."""

HEADERS = 16
"""Extension headers that are followed; not taken from the code under test, lest the packets move with a slip in it."""
OPTIONS = 32
"""Options of a destination options header that are looked at."""

ETH_IPV4 = 0x0800
ETH_ARP = 0x0806
ETH_8021Q = 0x8100
ETH_IPV6 = 0x86DD
ETH_8021AD = 0x88A8
ETH_LOOPBACK = 0x9000
ETH_QINQ_OLD = 0x9100
ETH_LLDP = 0x88CC

HOP_BY_HOP = 0
ICMP = 1
IPIP = 4
TCP = 6
UDP = 17
ROUTING = 43
FRAGMENT = 44
ESP = 50
AH = 51
ICMPV6 = 58
NO_NEXT_HEADER = 59
DESTINATION = 60
SCTP = 132
MOBILITY = 135
EXPERIMENT = 253

DONT_FRAGMENT = 0x4000
MORE_FRAGMENTS = 0x2000

PAD1 = b"\x00"
HOME_ADDRESS = 0xC9

SOURCE4 = bytes((192, 0, 2, 17))
DESTINATION4 = bytes((198, 51, 100, 203))
SOURCE6 = bytes.fromhex("20010db8000100000000000000000a17")
DESTINATION6 = bytes.fromhex("20010db8000200000000000000000bcb")
HOME = bytes.fromhex("20010db8c0de0000000000000000c001")
OTHER_HOME = bytes.fromhex("20010db8c0de0000000000000000c002")
ROUTED = bytes.fromhex("20010db8f00d0000000000000000f001")
OTHER_ROUTED = bytes.fromhex("20010db8f00d0000000000000000f002")
PORTS = (40961, 443)
PORT_BYTES = PORTS[0].to_bytes(2) + PORTS[1].to_bytes(2)

_MACS = bytes.fromhex("525400000001525400000002")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """An IPv6 extension header: its protocol number, and its bytes with a placeholder for the next header."""

    number: int
    header: bytes


def ethernet(ethertype: int, payload: bytes, *, tags: Sequence[int] = ()) -> bytes:
    """An Ethernet frame; ``tags`` are the tag protocol identifiers, the outer one first."""
    tagged = b"".join(tag.to_bytes(2) + (0x2000 | 100 + i).to_bytes(2) for i, tag in enumerate(tags))
    return _MACS + tagged + ethertype.to_bytes(2) + payload


def tcp(ports: tuple[int, int] = PORTS, payload: bytes = b"") -> bytes:
    """A TCP header of 20 bytes, and a payload."""
    return ports[0].to_bytes(2) + ports[1].to_bytes(2) + bytes(8) + b"\x50\x10\xff\xff" + bytes(4) + payload


def udp(ports: tuple[int, int] = PORTS, payload: bytes = b"") -> bytes:
    """A UDP header and a payload."""
    return ports[0].to_bytes(2) + ports[1].to_bytes(2) + (8 + len(payload)).to_bytes(2) + bytes(2) + payload


def ipv4(
    protocol: int,
    payload: bytes,
    *,
    addresses: bytes = SOURCE4 + DESTINATION4,
    options: bytes = b"",
    fragment: int = 0,
    version: int = 4,
    words: int | None = None,
    total: int | None = None,
) -> bytes:
    """An IPv4 packet; ``fragment`` is flags and offset, ``words`` the header length to claim, ``total`` the length."""
    words = 5 + len(options) // 4 if words is None else words
    total = 20 + len(options) + len(payload) if total is None else total
    fixed = bytes((version << 4 | words, 0)) + total.to_bytes(2) + bytes(2) + fragment.to_bytes(2)
    return fixed + bytes((64, protocol)) + bytes(2) + addresses + options + payload


def ipv6(
    protocol: int,
    payload: bytes,
    *,
    extensions: Sequence[Extension] = (),
    addresses: bytes = SOURCE6 + DESTINATION6,
    version: int = 6,
    length: int | None = None,
) -> bytes:
    """An IPv6 packet with extension headers in the order given; ``length`` is the payload length to claim."""
    followers = [*(extension.number for extension in extensions), protocol]
    body = b"".join(
        bytes((follower,)) + extension.header[1:] for extension, follower in zip(extensions, followers[1:], strict=True)
    )
    body += payload
    length = len(body) if length is None else length
    return bytes((version << 4, 0, 0, 0)) + length.to_bytes(2) + bytes((followers[0], 64)) + addresses + body


def option(kind: int, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A hop-by-hop or destination option that has a length; ``length`` is the one to claim."""
    return bytes((kind, len(data) if length is None else length)) + data


def pad_n(size: int) -> bytes:
    """A PadN option of ``size`` bytes in all, at least 2."""
    return option(1, bytes(size - 2))


def home_address(address: bytes = HOME) -> bytes:
    """The home address option."""
    return option(HOME_ADDRESS, address)


def options_header(number: int, options: bytes = b"", *, length: int | None = None) -> Extension:
    """Hop-by-hop or destination options, filled up with Pad1 to 8 byte units; ``length`` is the one to claim."""
    body = b"\x00\x00" + options
    body += PAD1 * (-len(body) % 8)
    units = len(body) // 8 - 1 if length is None else length
    return Extension(number=number, header=bytes((0, units)) + body[2:])


def hop_by_hop(options: bytes = b"", *, length: int | None = None) -> Extension:
    """A hop-by-hop options header."""
    return options_header(HOP_BY_HOP, options, length=length)


def destination(options: bytes = b"", *, length: int | None = None) -> Extension:
    """A destination options header."""
    return options_header(DESTINATION, options, length=length)


def routing(kind: int, data: bytes = b"", *, length: int | None = None, segments_left: int = 1) -> Extension:
    """A routing header; ``data`` (addresses, as a rule) follows its first 8 bytes."""
    units = len(data) // 8 if length is None else length
    return Extension(number=ROUTING, header=bytes((0, units, kind, segments_left)) + bytes(4) + data)


def fragment(offset: int = 0, *, more: bool = False) -> Extension:
    """A fragment header; ``offset`` in units of 8 bytes.  Its reserved byte is not 0, lest it pass as a length."""
    return Extension(number=FRAGMENT, header=b"\x00\x05" + (offset << 3 | more).to_bytes(2) + b"\x00\x00\x00\x01")


def authentication(icv: bytes = bytes(12), *, length: int | None = None) -> Extension:
    """An AH; ``icv`` follows SPI and sequence number and is a multiple of 4 bytes."""
    units = 1 + len(icv) // 4 if length is None else length
    return Extension(number=AH, header=bytes((0, units, 0, 0)) + b"\x00\x00\x10\x00\x00\x00\x00\x07" + icv)


def short_authentication() -> Extension:
    """An AH of 8 bytes: shorter than any real one, the shortest that its length field can say."""
    return Extension(number=AH, header=bytes((0, 0, 0, 0)) + b"\x00\x00\x10\x00")


def _golden() -> Iterator[tuple[str, bytes]]:
    def v4(protocol: int = TCP, payload: bytes = tcp(), **fields: Any) -> bytes:
        return ethernet(ETH_IPV4, ipv4(protocol, payload, **fields))

    def v6(*extensions: Extension, protocol: int = TCP, payload: bytes = tcp(), **fields: Any) -> bytes:
        return ethernet(ETH_IPV6, ipv6(protocol, payload, extensions=extensions, **fields))

    # Ethernet
    tcp4, udp4, tcp6 = ipv4(TCP, tcp()), ipv4(UDP, udp()), ipv6(TCP, tcp())
    yield "ethernet header only", ethernet(ETH_IPV4, b"")
    yield "arp", ethernet(ETH_ARP, bytes.fromhex("0001080006040001") + bytes(20))
    yield "lldp", ethernet(ETH_LLDP, bytes(46))
    yield "loopback", ethernet(ETH_LOOPBACK, bytes(46))
    yield "802.3 length", ethernet(46, tcp4)
    yield "802.1q tcp4", ethernet(ETH_IPV4, tcp4, tags=(ETH_8021Q,))
    yield "802.1ad tcp4", ethernet(ETH_IPV4, tcp4, tags=(ETH_8021AD,))
    yield "802.1ad 802.1q tcp6", ethernet(ETH_IPV6, tcp6, tags=(ETH_8021AD, ETH_8021Q))
    yield "802.1q 802.1q udp4", ethernet(ETH_IPV4, udp4, tags=(ETH_8021Q, ETH_8021Q))
    yield "802.1q 802.1ad tcp6", ethernet(ETH_IPV6, tcp6, tags=(ETH_8021Q, ETH_8021AD))
    yield "802.1ad 802.1q arp", ethernet(ETH_ARP, bytes(28), tags=(ETH_8021AD, ETH_8021Q))
    yield "three tags tcp4", ethernet(ETH_IPV4, tcp4, tags=(ETH_8021AD, ETH_8021Q, ETH_8021Q))
    yield "tag 9100 tcp4", ethernet(ETH_IPV4, tcp4, tags=(ETH_QINQ_OLD,))
    yield "802.1q cut in the tag", ethernet(ETH_IPV4, tcp4, tags=(ETH_8021Q,))[:17]
    yield "802.1q cut after the tag", ethernet(ETH_IPV4, tcp4, tags=(ETH_8021Q,))[:18]

    # IPv4
    yield "tcp4", v4()
    yield "udp4", v4(UDP, udp())
    yield "icmp4", v4(ICMP, bytes(8))
    yield "sctp4", v4(SCTP, tcp())
    yield "ipip4", v4(IPIP, tcp4)
    yield "ah4 tcp", v4(AH, bytes((TCP, 0)) + bytes(6) + tcp())
    yield "hop-by-hop number in ipv4", v4(HOP_BY_HOP, bytes((TCP, 0)) + bytes(6) + tcp())
    yield "tcp4 with payload", v4(TCP, tcp(payload=bytes(100)))
    yield "tcp4 options", v4(options=b"\x94\x04\x00\x00")
    yield "udp4 most options", v4(UDP, udp(), options=b"\x01" * 40)
    yield "tcp4 options cut off", v4(TCP, b"", options=b"\x01" * 4, words=15)
    yield "ipv4 header length 4", v4(words=4)
    yield "ipv4 version 6", v4(version=6)
    yield "ipv4 header cut by 1", v4()[: 14 + 19]
    yield "ipv4 header only", v4()[: 14 + 20]
    yield "tcp4 cut by 1", v4()[: 14 + 20 + 19]
    yield "udp4 cut by 1", v4(UDP, udp())[: 14 + 20 + 7]
    yield "udp4 where tcp would be cut", v4(UDP, udp(payload=bytes(11)))
    yield "tcp4 with ethernet padding", v4(TCP, tcp()[:8] + bytes(18), total=28)
    yield "tcp4 total length 0", v4(total=0)
    yield "tcp4 total length too long", v4(total=0xFFFF)
    yield "tcp4 first fragment", v4(fragment=MORE_FRAGMENTS)
    yield "tcp4 middle fragment", v4(fragment=MORE_FRAGMENTS | 185)
    yield "tcp4 last fragment", v4(fragment=370)
    yield "udp4 last fragment far off", v4(UDP, udp(), fragment=0x1000)
    yield "tcp4 do not fragment", v4(fragment=DONT_FRAGMENT)
    yield "tcp4 reserved flag", v4(fragment=0x8000)

    # IPv6 without extension headers
    yield "tcp6", v6()
    yield "udp6", v6(protocol=UDP, payload=udp())
    yield "icmp6", v6(protocol=ICMPV6, payload=bytes(8))
    yield "esp6", v6(protocol=ESP, payload=bytes((TCP, 0)) + bytes(6) + tcp())
    yield "no next header", v6(protocol=NO_NEXT_HEADER)
    yield "mobility", v6(protocol=MOBILITY, payload=bytes((TCP, 0)) + bytes(6) + tcp())
    yield "ipv6 version 4", v6(version=4)
    yield "ipv6 header cut by 1", v6()[: 14 + 39]
    yield "ipv6 header only", v6()[: 14 + 40]
    yield "tcp6 cut by 1", v6()[: 14 + 40 + 19]
    yield "udp6 cut by 1", v6(protocol=UDP, payload=udp())[: 14 + 40 + 7]
    yield "tcp6 payload length 0", v6(length=0)

    # Each extension header
    yield "hop-by-hop tcp6", v6(hop_by_hop())
    yield "hop-by-hop udp6", v6(hop_by_hop(pad_n(6)), protocol=UDP, payload=udp())
    yield "hop-by-hop of 24 bytes tcp6", v6(hop_by_hop(pad_n(22)))
    yield "hop-by-hop icmp6", v6(hop_by_hop(), protocol=ICMPV6, payload=bytes(8))
    yield "hop-by-hop esp6", v6(hop_by_hop(), protocol=ESP, payload=tcp())
    yield "hop-by-hop no next header", v6(hop_by_hop(), protocol=NO_NEXT_HEADER)
    yield "routing type 0 tcp6", v6(routing(0, ROUTED))
    yield "routing type 4 tcp6", v6(routing(4, ROUTED + OTHER_ROUTED))
    yield "destination options tcp6", v6(destination(pad_n(14)))
    yield "ah tcp6", v6(authentication())
    yield "ah of 28 bytes udp6", v6(authentication(bytes(16)), protocol=UDP, payload=udp())
    yield "ah of 8 bytes tcp6", v6(short_authentication())
    yield "every extension header tcp6", v6(hop_by_hop(), destination(), routing(0, ROUTED), authentication())
    yield "extension headers cut tcp6", v6(hop_by_hop(), authentication())[:-1]

    # Home address
    yield "home address tcp6", v6(destination(home_address()))
    yield "home address udp6", v6(destination(home_address()), protocol=UDP, payload=udp())
    yield "home address icmp6", v6(destination(home_address()), protocol=ICMPV6, payload=bytes(8))
    yield "home address after pads", v6(destination(PAD1 + pad_n(3) + PAD1 + pad_n(2) + home_address()))
    yield "home address after an option", v6(destination(option(0x1E, b"abcd") + home_address()))
    yield "home address at the header's end", v6(destination(pad_n(4) + home_address(), length=2))
    yield "home address all zero", v6(destination(home_address(bytes(16))))
    yield "home address in hop-by-hop", v6(hop_by_hop(home_address()))
    yield "home address of length 15", v6(destination(option(HOME_ADDRESS, HOME[:15])))
    yield "home address of length 17", v6(destination(option(HOME_ADDRESS, HOME + b"\x00")))
    yield "home address of length 15, then one", v6(destination(option(HOME_ADDRESS, HOME[:15]) + home_address()))
    yield "other option of length 16", v6(destination(option(0xC8, HOME)))
    yield "home address beyond the header", v6(destination(pad_n(5) + home_address(), length=2), protocol=ICMPV6)
    yield "home address wholly beyond the header", v6(destination(pad_n(6) + home_address(), length=0), protocol=ICMPV6)
    yield (
        "option beyond the header, then home",
        v6(destination(option(0x1E, b"abcd", length=5), length=0), destination(home_address())),
    )
    yield "option length in the last byte", v6(destination(pad_n(4) + option(0x1E)), destination(home_address()))
    yield "option type in the last byte", v6(destination(pad_n(5) + b"\x1e"), destination(home_address()))
    yield "option over the home address", v6(destination(option(0x1E, length=40) + home_address()))
    yield "home address cut by 1", v6(destination(pad_n(4) + home_address()), payload=b"")[:-1]
    yield "home address, packet ends", v6(destination(pad_n(4) + home_address()), payload=b"")
    yield "home address, header cut", v6(destination(home_address() + pad_n(36)), payload=b"")[:-20]
    yield "two home addresses in a header", v6(destination(home_address() + home_address(OTHER_HOME)))
    yield "home addresses in two headers", v6(destination(home_address()), destination(home_address(OTHER_HOME)))
    yield "home address, then options without", v6(destination(home_address()), destination(pad_n(6)))
    for count in (OPTIONS - 1, OPTIONS, OPTIONS + 1):
        yield f"home address is option {count}", v6(destination(pad_n(2) * (count - 1) + home_address()))
        yield f"home address is option {count} after pad1", v6(destination(PAD1 * (count - 1) + home_address()))
    yield (
        "many options in each header",
        v6(destination(pad_n(2) * (OPTIONS - 2)), destination(pad_n(2) * 20 + home_address())),
    )

    # Type 2 routing header
    yield "routing type 2 tcp6", v6(routing(2, ROUTED))
    yield "routing type 2 udp6", v6(routing(2, ROUTED), protocol=UDP, payload=udp())
    yield "routing type 2 no segments left", v6(routing(2, ROUTED, segments_left=0))
    yield "routing type 2 of two addresses", v6(routing(2, ROUTED + OTHER_ROUTED))
    yield "routing type 2 of half an address", v6(routing(2, ROUTED[:8]))
    yield "routing type 2 cut by 1", v6(routing(2, ROUTED), payload=b"")[:-1]
    yield "routing type 2, packet ends", v6(routing(2, ROUTED), payload=b"")
    yield "two routing headers of type 2", v6(routing(2, ROUTED), routing(2, OTHER_ROUTED))
    yield "routing type 2, then type 0", v6(routing(2, ROUTED), routing(0, OTHER_ROUTED))
    yield "home and routing address tcp6", v6(routing(2, ROUTED), destination(home_address()))
    yield (
        "home and routing address udp6",
        v6(destination(home_address()), routing(2, ROUTED), protocol=UDP, payload=udp()),
    )

    # Fragments
    yield "tcp6 atomic fragment", v6(fragment())
    yield "tcp6 first fragment", v6(fragment(more=True))
    yield "tcp6 middle fragment", v6(fragment(181, more=True))
    yield "tcp6 last fragment", v6(fragment(362))
    yield "udp6 second fragment", v6(fragment(1), protocol=UDP, payload=udp())
    yield "first fragment, then home address", v6(fragment(more=True), destination(home_address()))
    yield "later fragment, then home address", v6(fragment(1), destination(home_address()))
    yield "first fragment, then routing type 2", v6(fragment(), routing(2, ROUTED))
    yield "later fragment, then routing type 2", v6(fragment(4096), routing(2, ROUTED))
    yield "home and routing, then later fragment", v6(routing(2, ROUTED), destination(home_address()), fragment(9))

    # Limits of the walk, and cuts in it
    for count in (HEADERS - 1, HEADERS, HEADERS + 1):
        yield f"{count} headers tcp6", v6(*(hop_by_hop(),) * count)
        yield f"home address in header {count}", v6(*(hop_by_hop(),) * (count - 1), destination(home_address()))
    yield "no byte of the extension header", v6(hop_by_hop())[: 14 + 40]
    yield "extension header cut by 1", v6(hop_by_hop(), payload=b"")[:-1]
    yield "extension header, packet ends", v6(hop_by_hop(), payload=b"")
    yield "second extension header cut by 1", v6(destination(home_address()), hop_by_hop(), payload=b"")[:-1]
    yield "fragment header cut by 1", v6(fragment(1), payload=b"")[:-1]
    yield "extension header longer than the packet", v6(hop_by_hop(length=255))
    yield "destination options longer than the packet", v6(destination(home_address(), length=255))


GOLDEN: tuple[tuple[str, bytes], ...] = tuple(_golden())
"""Named packets; between them they touch every rule of ``qsteer.reference`` on both sides."""


def random_packets(seed: int, count: int) -> Iterator[bytes]:
    """``count`` packets of 14 to PACKET_MAX bytes, of every shape and damage; the same ones for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _random_packet(rng)


def random_config(rng: random.Random) -> RssConfig:
    """A configuration with any types, key and length of table.

    Mostly no queue is in the table twice and the unclassified queue is none of them, so that no mistake can hide.
    """
    types = rng.choices((_random_types(rng), BASE_TYPES, ALL_TYPES, rng.choice(tuple(HashType))), (4, 1, 2, 1))[0]
    key = rng.choices(
        (rng.randbytes(KEY_BYTES), bytes(KEY_BYTES), rng.randbytes(2) + bytes(KEY_BYTES - 2)), (30, 1, 1)
    )[0]
    length = rng.choices((1, 2, 4, 8, 16, 32, 64, 128), (1, 1, 1, 1, 1, 1, 2, 8))[0]
    unclassified, *table = rng.sample(range(0x10000), length + 1)
    if rng.random() < 0.15:
        queues = rng.randint(1, 8)
        unclassified, table = rng.randrange(queues), list(equal_table(queues, length))
    return RssConfig(types=types, key=key, table=tuple(table), unclassified_queue=unclassified)


def _random_types(rng: random.Random) -> HashType:
    return HashType(rng.randrange(ALL_TYPES + 1))


def _random_packet(rng: random.Random) -> bytes:
    kind = rng.choices(("ipv4", "ipv6", "extended", "other", "noise"), (25, 12, 56, 4, 3))[0]
    if kind == "ipv4":
        ethertype, body = ETH_IPV4, _random_ipv4(rng)
    elif kind == "other":
        ethertype, body = _random_ethertype(rng), rng.choice((rng.randbytes(rng.randrange(100)), _random_ipv4(rng)))
    elif kind == "noise":
        ethertype, body = rng.choice((ETH_IPV4, ETH_IPV6)), rng.randbytes(rng.randrange(PACKET_MAX))
    else:
        extensions = _random_extensions(rng) if kind == "extended" else ()
        protocol, payload = _random_l4(rng)
        version = 6 if rng.random() < 0.98 else rng.randrange(16)
        ends = extensions and rng.random() < 0.08  # with its last extension header, or a byte before that header's end
        body = ipv6(
            protocol, b"" if ends else payload, extensions=extensions, addresses=rng.randbytes(32), version=version
        )
        if ends and rng.random() < 0.3:
            body = body[:-1]
        ethertype = ETH_IPV6
    count = rng.choices((0, 1, 2, 3, 4), (70, 12, 12, 5, 1))[0]
    tags = [rng.choices((ETH_8021Q, ETH_8021AD, ETH_QINQ_OLD), (50, 48, 2))[0] for _ in range(count)]
    return _damaged(rng, ethernet(ethertype, body, tags=tags)[:PACKET_MAX])


def _damaged(rng: random.Random, packet: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.05:
        return packet[: max(len(packet) - rng.randint(1, 3), 14)]
    if kind < 0.09:
        return packet[: rng.randint(14, len(packet))]
    if kind < 0.11:
        return packet[: rng.randint(14, min(len(packet), 64))]
    if kind < 0.15 and len(packet) > 14:
        at = rng.randrange(12, len(packet))
        return packet[:at] + rng.randbytes(1) + packet[at + 1 :]
    return packet


def _random_ethertype(rng: random.Random) -> int:
    return rng.choice((ETH_ARP, ETH_LLDP, ETH_LOOPBACK, 0x8847, 0x8864, rng.randrange(1501), rng.randrange(0x10000)))


def _random_l4(rng: random.Random) -> tuple[int, bytes]:
    """A protocol above IP and its bytes; one in five is cut at or near the end of its header."""
    protocol = rng.choices((TCP, UDP, -1), (50, 30, 20))[0]
    if protocol < 0:
        others = (ICMP, IPIP, ESP, AH, ICMPV6, NO_NEXT_HEADER, SCTP, MOBILITY, EXPERIMENT, rng.randrange(256))
        # Half of them look as if a TCP header followed an extension header.
        return rng.choice(others), rng.choice((rng.randbytes(rng.randrange(60)), bytes((TCP, 0)) + bytes(6) + tcp()))
    ports = rng.randrange(0x10000), rng.randrange(0x10000)
    header = tcp(ports) if protocol == TCP else udp(ports)
    if rng.random() < 0.2:
        cut = len(header) + 1 - int(rng.expovariate(0.5))
        return protocol, (header + b"\xaa")[: max(cut, 0)]
    return protocol, header + rng.randbytes(rng.randrange(24))


def _random_ipv4(rng: random.Random) -> bytes:
    protocol, payload = _random_l4(rng)
    offset = rng.choice((1, 185, 0x1000, rng.randrange(1, 0x2000)))
    return ipv4(
        protocol,
        payload,
        addresses=rng.randbytes(8),
        options=rng.randbytes(4 * rng.randint(1, 10)) if rng.random() < 0.3 else b"",
        fragment=rng.choices(
            (0, DONT_FRAGMENT, 0x8000, MORE_FRAGMENTS, MORE_FRAGMENTS | offset, offset), (60, 12, 3, 9, 8, 8)
        )[0],
        version=4 if rng.random() < 0.97 else rng.randrange(16),
        words=None if rng.random() < 0.9 else rng.randrange(16),
        total=None if rng.random() < 0.9 else rng.randrange(0x10000),
    )


def _random_extensions(rng: random.Random) -> tuple[Extension, ...]:
    if rng.random() < 0.88:
        return tuple(_random_extension(rng) for _ in range(rng.choices((1, 2, 3, 4), (50, 30, 15, 5))[0]))
    # Near the limit: small headers, and one of those near the limit says something.
    small = (hop_by_hop(), destination(), destination(pad_n(6)), routing(0), short_authentication())
    extensions = rng.choices(small, k=rng.randint(HEADERS - 2, HEADERS + 2))
    telling = rng.choice((destination(home_address(rng.randbytes(16))), routing(2, rng.randbytes(16)), fragment()))
    if rng.random() < 0.6:
        extensions[rng.randint(HEADERS - 3, len(extensions) - 1)] = telling
    return tuple(extensions)


def _random_extension(rng: random.Random) -> Extension:
    kind = rng.choices((HOP_BY_HOP, ROUTING, FRAGMENT, AH, DESTINATION), (12, 22, 14, 12, 40))[0]
    if kind == FRAGMENT:
        offset = rng.choice((0, 0, 1, 0x1000, rng.randrange(0x2000)))
        return fragment(offset, more=rng.random() < 0.5)
    if kind == AH:
        icv = rng.randbytes(4 * rng.randint(0, 6))
        return rng.choice((authentication(icv), short_authentication(), authentication(icv, length=rng.randint(0, 9))))
    if kind == ROUTING:
        return _random_routing(rng)
    if kind == DESTINATION and rng.random() < 0.08:
        # A home address that just fits into the header, or just does not.
        return destination(pad_n(rng.choice((3, 4, 4, 5, 5, 6))) + home_address(rng.randbytes(16)), length=2)
    options = _random_options(rng)
    if rng.random() < 0.85:
        return options_header(kind, options)
    # A lie about the length: a little too short or too long, or anything.
    true = (len(options) + 9) // 8 - 1
    return options_header(kind, options, length=rng.choice((max(true - 1, 0), true + 1, rng.randrange(256))))


def _random_routing(rng: random.Random) -> Extension:
    units = rng.choices((2, 0, 1, 3, 4), (75, 5, 5, 5, 10))[0]
    length = None if rng.random() < 0.9 else rng.randint(0, 5)
    kind = rng.choices((2, 0, 4, rng.randrange(256)), (70, 12, 12, 6))[0]
    return routing(kind, rng.randbytes(8 * units), length=length, segments_left=rng.randrange(3))


def _random_options(rng: random.Random) -> bytes:
    """Options of a header, most often with a home address among them; one in six has about as many as are looked at."""
    limit = rng.random() < 0.17
    count = OPTIONS - 1 + rng.randint(-3, 3) if limit else rng.choices((0, 1, 2, 3, 5), (30, 25, 20, 15, 10))[0]
    before = [_random_option(rng, small=limit) for _ in range(count)]
    after = [_random_option(rng, small=False) for _ in range(rng.choice((0, 0, 1, 2)))]
    home = [home_address(rng.randbytes(16))] if rng.random() < 0.75 else []
    return b"".join(before + home + after)


def _random_option(rng: random.Random, *, small: bool) -> bytes:
    kind = rng.random()
    if kind < 0.35:
        return PAD1
    if small or kind < 0.65:
        return pad_n(rng.choice((2, 2, 3, 4)))
    if kind < 0.75:
        return option(HOME_ADDRESS, rng.randbytes(rng.choice((0, 15, 16, 17))))
    if kind < 0.80:
        return option(rng.randrange(1, 256), rng.randbytes(4), length=rng.choice((0, 3, 5, 6, 16, rng.randrange(256))))
    return option(rng.choice((0x05, 0x1E, 0xC2, 0xC8, rng.randrange(1, 256))), rng.randbytes(rng.choice((0, 4, 6, 16))))
