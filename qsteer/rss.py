# SPDX-License-Identifier: BSD-2-Clause
"""The RSS configuration: hash types, key, indirection table and unclassified queue.

Pure values; terms and limits are those of the virtio specification (1.2 and later, "Receive-side scaling (RSS)").
"""

import enum
import math
from dataclasses import dataclass

from qsteer.errors import UsageError

KEY_BYTES = 40
"""Length of the Toeplitz key, the only one that QEMU and qsteer's maps know."""
TABLE_MAX = 128
"""Most entries that an indirection table may have."""


class HashType(enum.IntFlag):
    """VIRTIO_NET_RSS_HASH_TYPE_*, by the specification's bit numbers."""

    IP4 = 1 << 0
    TCP4 = 1 << 1
    UDP4 = 1 << 2
    IP6 = 1 << 3
    TCP6 = 1 << 4
    UDP6 = 1 << 5
    IP_EX = 1 << 6
    TCP_EX = 1 << 7
    UDP_EX = 1 << 8


HASH_TYPE_NAMES: dict[str, HashType] = {
    member.name.lower().replace("_", "-"): member for member in HashType if member.name
}
"""``tcp4``, ``ip-ex``, ...: the names that ``--types`` takes and ``show`` prints."""

BASE_TYPES = HashType.IP4 | HashType.TCP4 | HashType.UDP4 | HashType.IP6 | HashType.TCP6 | HashType.UDP6
"""The six types that every implementation knows; what qsteer enables when nobody says otherwise."""


NO_TYPES = HashType(0)
ALL_TYPES = BASE_TYPES | HashType.IP_EX | HashType.TCP_EX | HashType.UDP_EX


def known_types(bits: int) -> HashType:
    """The specification's bits of a number that may have others."""
    return HashType(bits & int(ALL_TYPES))


def key_bytes_used(types: HashType) -> int:
    """How much of a key the hash of the longest input of these types depends on: 4 bytes and as many as the input.

    Without a type that is nothing.
    """
    if not types:
        return 0
    over_ports = HashType.TCP6 | HashType.UDP6 | HashType.TCP_EX | HashType.UDP_EX
    inputs = ((over_ports, 36), (HashType.IP6 | HashType.IP_EX, 32), (HashType.TCP4 | HashType.UDP4, 12))
    return 4 + next((length for kinds, length in inputs if types & kinds), 8)


def parse_hash_types(text: str) -> HashType:
    """``"tcp4,udp4,ip4"`` as bits.  Raises UsageError on a name that is not a hash type."""
    types = HashType(0)
    for name in text.split(","):
        try:
            types |= HASH_TYPE_NAMES[name.strip().lower().replace("_", "-")]
        except KeyError:
            raise UsageError(f'unknown hash type "{name}"', hint=f"hash types: {', '.join(HASH_TYPE_NAMES)}") from None
    return types


def format_hash_types(types: HashType) -> tuple[str, ...]:
    """The names of the bits that are set, in the specification's order."""
    return tuple(name for name, bit in HASH_TYPE_NAMES.items() if bit in types)


def parse_key(text: str) -> bytes:
    """An RSS hash key as ethtool prints it (``6d:5a:...``), or as hex digits alone.

    Raises UsageError unless it is KEY_BYTES bytes.
    """
    text = text.strip()
    try:
        if ":" in text:
            key = bytes(int(byte, 16) for byte in text.split(":") if _is_hex_byte(byte))
        else:
            key = bytes.fromhex(text)
    except ValueError:
        raise UsageError(f'"{text}" is not a hash key', hint=f"{KEY_BYTES} bytes in hex, joined by colons") from None
    if len(key) != KEY_BYTES:
        raise UsageError(f"a hash key has {KEY_BYTES} bytes, not {len(key)}", hint="or --key random")
    return key


def _is_hex_byte(text: str) -> bool:
    if not 1 <= len(text) <= 2 or not text.isascii() or not text.isalnum():
        raise ValueError(text)
    return True


def format_key(key: bytes) -> str:
    """A key as ethtool prints it."""
    return key.hex(":")


@dataclass(frozen=True, slots=True, kw_only=True)
class RssConfig:
    """What the guest, or the operator, wants.

    ``table`` holds 1 to TABLE_MAX queue indices, a power of two of them; an index beyond the active queues is folded by
    the kernel (modulo).  ``unclassified_queue`` gets what no enabled hash type matches.  Raises UsageError on anything
    that the specification does not allow.
    """

    types: HashType
    key: bytes
    table: tuple[int, ...]
    unclassified_queue: int = 0

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES:
            raise UsageError(f"a hash key has {KEY_BYTES} bytes, not {len(self.key)}")
        length = len(self.table)
        if not 1 <= length <= TABLE_MAX or length & (length - 1):
            raise UsageError(
                f"an indirection table has 1 to {TABLE_MAX} entries, a power of two, not {length}",
                hint="--equal or --weight makes one",
            )
        for queue in (*self.table, self.unclassified_queue):
            if not 0 <= queue <= 0xFFFF:
                raise UsageError(f"queue {queue} is not in the range 0 to 65535")
        if self.types & ~sum(HashType):
            raise UsageError(f"unknown hash type bits {int(self.types):#x}")


def parse_numbers(what: str, text: str) -> tuple[int, ...]:
    """``"0,1,2"``: queues, or weights.  Raises UsageError that begins with ``what``."""
    return tuple(parse_number(what, part.strip()) for part in text.split(","))


def parse_number(what: str, text: str) -> int:
    """A queue, or a number of queues.  Raises UsageError that begins with ``what``."""
    if not text.isdecimal() or not text.isascii() or len(text) > 5 or int(text) > 0xFFFF:
        raise UsageError(f'{what}: "{text}" is not a whole number from 0 to 65535')
    return int(text)


def table_in_words(table: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
    """The shortest of ``("equal", (N,))``, ``("weight", weights)`` and ``("table", table)`` that makes a table."""
    queues = max(table) + 1
    if table == equal_table(queues):
        return "equal", (queues,)
    if queues <= TABLE_MAX:
        counts = tuple(map(table.count, range(queues)))
        weights = tuple(count // math.gcd(*counts) for count in counts)
        if table == weighted_table(weights):
            return "weight", weights
    return "table", table


def equal_table(queues: int, length: int = TABLE_MAX) -> tuple[int, ...]:
    """``ethtool -X DEV equal N``: entry i is i modulo ``queues``.  Raises UsageError on no queue at all."""
    if queues < 1:
        raise UsageError("equal wants at least 1 queue", hint="qsteer off stops steering")
    return tuple(i % queues for i in range(length))


def weighted_table(weights: tuple[int, ...], length: int = TABLE_MAX) -> tuple[int, ...]:
    """``ethtool -X DEV weight W0 W1 ...``: queue i gets a run of entries in proportion to its weight."""
    total = sum(weights)
    if not weights or total < 1 or min(weights) < 0:
        raise UsageError("weights are whole numbers, not all of them 0")
    table: list[int] = []
    partial = 0
    for queue, weight in enumerate(weights):
        partial += weight
        table += [queue] * (length * partial // total - len(table))
    return tuple(table)
