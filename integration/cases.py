# SPDX-License-Identifier: BSD-2-Clause
"""Configurations and packets on which everything that steers has to agree (agreement.py).  Pure.

What tests/packets.py draws is mostly unusual.  Here are besides it: ordinary packets, whole and cut at any byte; those
of which a single bit is hashed, so that each bit of the key decides a queue; keys of few bits; and tables that repeat
after any number of entries, or nearly so, since a program may look at fewer bits of the hash for such a table.
"""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import TypeVar

from qsteer.rss import KEY_BYTES, HashType, RssConfig, equal_table
from tests import packets
from tests.packets import TCP, UDP, ethernet, ipv4, ipv6, tcp, udp

TYPES = packets.ALL_TYPES + 1
"""Combinations of hash types."""
SHAPES = tuple((1 << length, 1 << period) for length in range(8) for period in range(length + 1))
"""Each length of a table, with each number of entries after which it repeats."""
BITS_EVERY = 8
"""Every how many configurations the packets with a single bit are sent, one for each bit that is hashed."""
LONG = 5000
"""From a page on, the kernel keeps only the Ethernet header of a packet socket's packet in the linear area."""
FILLER = b"\xa5"
"""What makes a packet that long."""

_BYTES_4, _BYTES_6 = 12, 36
_TAGGINGS: Sequence[tuple[int, ...]] = (
    (),
    (packets.ETH_8021Q,),
    (packets.ETH_8021AD,),
    (packets.ETH_8021AD, packets.ETH_8021Q),
    (packets.ETH_8021Q, packets.ETH_8021Q),
    (packets.ETH_8021AD, packets.ETH_8021Q, packets.ETH_8021Q),
)

T = TypeVar("T")


def config(seed: int, number: int) -> RssConfig:
    """Configuration ``number``: of 512 in a row each has other hash types, of 36 in a row each another of SHAPES."""
    rng = random.Random(f"{seed} {number}")
    length, period = _turn(SHAPES, seed, number)
    return RssConfig(
        types=HashType(_turn(range(TYPES), seed, number)),
        key=_key(rng),
        table=_table(rng, length, period),
        unclassified_queue=rng.choice((0, 0xFFFF, rng.randrange(0x10000))),
    )


def _turn(values: Sequence[T], seed: int, number: int) -> T:
    """One after the other, in another order each time around."""
    around, at = divmod(number, len(values))
    return random.Random(f"{seed} {around}").sample(values, len(values))[at]


def _key(rng: random.Random) -> bytes:
    bit = 1 << rng.randrange(KEY_BYTES * 8)
    ones = (1 << KEY_BYTES * 8) - 1
    keep = rng.randrange(KEY_BYTES)
    degenerate = (
        bytes(KEY_BYTES),
        b"\xff" * KEY_BYTES,
        bit.to_bytes(KEY_BYTES),
        (ones ^ bit).to_bytes(KEY_BYTES),
        rng.randbytes(keep).ljust(KEY_BYTES, b"\0"),
        rng.randbytes(keep).rjust(KEY_BYTES, b"\0"),
        rng.randbytes(2) * (KEY_BYTES // 2),
    )
    return rng.choice(degenerate) if rng.random() < 0.3 else rng.randbytes(KEY_BYTES)


def _table(rng: random.Random, length: int, period: int) -> tuple[int, ...]:
    """``period`` queues, mostly no two alike, again and again; sometimes with an entry that spoils the repetition.

    Mostly they are queues that a tap can have, for which qsteer keeps a byte each.
    """
    if rng.random() < 0.15:
        return equal_table(rng.randint(1, 16), length)
    queues = range(0x100) if rng.random() < 0.8 else range(0x10000)
    table = rng.sample(queues, period) * (length // period)
    if rng.random() < 0.2:
        table[rng.randrange(length)] = rng.choice(queues)
    return tuple(table)


def packets_for(seed: int, number: int, count: int) -> Iterator[bytes]:
    """``count`` packets for configuration ``number``, of 14 bytes and more; and those with a single bit, if it is their
    turn.
    """
    rng = random.Random(f"{seed} {number} packets")
    unusual = count // 2
    yield from packets.random_packets(rng.getrandbits(32), unusual)
    for _ in range(count - unusual):
        packet = _ordinary(rng)
        yield packet if rng.random() < 0.7 else packet[: rng.randint(14, len(packet))]
    if number % BITS_EVERY == 0:
        yield from bit_packets()


@functools.cache
def bit_packets() -> tuple[bytes, ...]:
    """TCP packets whose addresses and ports are all zero but for one bit."""
    made = []
    for size in (_BYTES_4, _BYTES_6):
        for bit in range(size * 8):
            hashed = (1 << bit).to_bytes(size)
            made.append(_over_ip(hashed[:-4], TCP, tcp(_ports(hashed[-4:]))))
    return tuple(made)


def _over_ip(addresses: bytes, protocol: int, payload: bytes) -> bytes:
    if len(addresses) == _BYTES_4 - 4:
        return ethernet(packets.ETH_IPV4, ipv4(protocol, payload, addresses=addresses))
    return ethernet(packets.ETH_IPV6, ipv6(protocol, payload, addresses=addresses))


def _ports(raw: bytes) -> tuple[int, int]:
    return int.from_bytes(raw[:2]), int.from_bytes(raw[2:])


def _ordinary(rng: random.Random) -> bytes:
    """What a network carries, tags and fragments included."""
    protocol, payload = _transport(rng)
    tags = rng.choices(_TAGGINGS, (70, 10, 4, 8, 4, 4))[0]
    if rng.random() < 0.45:
        body = ipv4(
            protocol,
            payload,
            addresses=_bytes(rng, _BYTES_4 - 4),
            options=bytes(4 * rng.choices((0, 1, 3, 10), (80, 8, 6, 6))[0]),
            fragment=rng.choices((0, packets.DONT_FRAGMENT, packets.MORE_FRAGMENTS, 185), (45, 45, 5, 5))[0],
        )
        return ethernet(packets.ETH_IPV4, body, tags=tags)
    extensions = [_extension(rng) for _ in range(rng.choices((0, 1, 2, 3), (60, 25, 10, 5))[0])]
    body = ipv6(protocol, payload, extensions=extensions, addresses=_bytes(rng, _BYTES_6 - 4))
    return ethernet(packets.ETH_IPV6, body, tags=tags)


def _transport(rng: random.Random) -> tuple[int, bytes]:
    ports, data = _ports(_bytes(rng, 4)), bytes(rng.choice((0, 1, 26, 100, 400)))
    made = ((TCP, tcp(ports, data)), (UDP, udp(ports, data)))
    others = (packets.ICMP, packets.ICMPV6, packets.SCTP, packets.ESP, packets.NO_NEXT_HEADER)
    return rng.choices((*made, (rng.choice(others), bytes(8) + data)), (55, 35, 10))[0]


def _extension(rng: random.Random) -> packets.Extension:
    address = rng.randbytes(16)
    return rng.choice(
        (
            packets.hop_by_hop(),
            packets.destination(packets.pad_n(6)),
            packets.destination(packets.home_address(address)),
            packets.routing(2, address),
            packets.routing(4, address),
            packets.fragment(rng.choice((0, 1, 181)), more=rng.random() < 0.5),
            packets.authentication(),
        )
    )


def _bytes(rng: random.Random, size: int) -> bytes:
    """Any bits, few bits, or all of them."""
    few = sum({1 << rng.randrange(size * 8) for _ in range(3)})
    return rng.choices((rng.randbytes(size), few.to_bytes(size), b"\xff" * size), (70, 25, 5))[0]
