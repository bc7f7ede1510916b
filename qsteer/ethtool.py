# SPDX-License-Identifier: BSD-2-Clause
"""ethtool's texts: that of ``ethtool -x``, which ``show`` prints and ``--from`` takes, and those that tell hash types.

Theory of operation
===================

The text of ``ethtool -x DEV`` is sections, each a heading and its lines.  The first three are ethtool's (6.1), the last
two are qsteer's own, so that what ``show`` prints says everything and can be given back to ``--from``::

    RX flow hash indirection table for tap0 with 4 RX ring(s):
        0:      0     1     2     3
    RSS hash key:
    6d:5a:56:da:25:5b:0e:c2:41:67:25:3d:43:a3:8f:b0:d0:ca:2b:cb:ae:7b:30:b4:77:cb:2d:a3:80:30:f2:0c:6a:42:b7:3b:be:ac:01:fa
    RSS hash function:
        toeplitz: on
        xor: off
        crc32: off
    RSS hash types:
        ip4,tcp4,udp4
    RSS unclassified queue:
        0

ethtool 6.8 and later add "RSS input transformation", which changes the hash as another hash function would.  A section
that is not known may do so too, so it is refused like any other line that ethtool does not print.  The text may come
out of a guest: its size is bounded before anything else, and no message repeats it unescaped.

ethtool does not tell virtio's hash types as such.  ``ethtool -n DEV rx-flow-hash tcp4`` (and ``udp4``, ``tcp6``,
``udp6``) names the fields that are hashed, and Linux's virtio_net makes that answer out of the types: ports and
addresses if it has the TCP type, else addresses if it has the IP type, else none (virtnet_get_hashflow).
"""

import enum
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsteer.errors import UsageError
from qsteer.rss import KEY_BYTES, HashType, RssConfig, format_hash_types, format_key, parse_hash_types, parse_key

TEXT_MAX = 1 << 16
"""Longest text, in characters, that ``parse`` takes; what ethtool prints for a table of 128 is a fortieth of it."""

_TABLE = "RX flow hash indirection table"
_KEY = "RSS hash key"
_FUNCTION = "RSS hash function"
_TRANSFORMATION = "RSS input transformation"
_TYPES = "RSS hash types"
_UNCLASSIFIED = "RSS unclassified queue"

_HEADING = re.compile(
    rf"({_TABLE}) for \S+ with [0-9]+ RX ring\(s\):|({_KEY}|{_FUNCTION}|{_TRANSFORMATION}|{_TYPES}|{_UNCLASSIFIED}):"
)
_ROW = re.compile(r"([0-9]{1,5}): +([0-9]{1,10}(?: +[0-9]{1,10})*)")
_HEX = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2})*")
_SWITCH = re.compile(r"([a-z0-9-]{1,32}): (on|off)")
_QUEUE = re.compile(r"[0-9]{1,10}")
_NAMES = re.compile(r"[a-z0-9,-]{1,128}")

_ADDRESSES = ("IP SA", "IP DA")
_PORTS = ("L4 bytes 0 & 1 [TCP/UDP src port]", "L4 bytes 2 & 3 [TCP/UDP dst port]")
_RECEIVE_HASHING = re.compile(r"^receive-hashing: on\b", re.MULTILINE)

_NOT_SUPPORTED = "Operation not supported"
_NO_TYPES = "none"
_ROW_ENTRIES = 8

_Lines = Sequence[tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """What a text says; None for what it does not say.  ``table`` is one that RssConfig takes."""

    table: tuple[int, ...]
    key: bytes | None = None
    types: HashType | None = None
    unclassified_queue: int | None = None


def format_table(config: RssConfig, *, device: str, rings: int) -> str:
    """A configuration as ``ethtool -x`` prints it, with qsteer's two sections; ends with a newline.

    ``rings`` is the number of queues that the device has.
    """
    lines = [f"{_TABLE} for {device} with {rings} RX ring(s):"]
    for start in range(0, len(config.table), _ROW_ENTRIES):
        row = config.table[start : start + _ROW_ENTRIES]
        lines.append(f"{start:5}: " + "".join(f" {queue:5}" for queue in row))
    lines += [f"{_KEY}:", format_key(config.key)]
    lines += [f"{_FUNCTION}:", "    toeplitz: on", "    xor: off", "    crc32: off"]
    lines += [f"{_TYPES}:", f"    {','.join(format_hash_types(config.types)) or _NO_TYPES}"]
    lines += [f"{_UNCLASSIFIED}:", f"    {config.unclassified_queue}"]
    return "\n".join(lines) + "\n"


def parse(text: str) -> Parsed:
    """What ``ethtool -x`` or ``format_table`` printed; lines that begin with # are passed over.

    Raises UsageError, with the number of the line where there is one, on anything else; on a table that RssConfig does
    not take; and on a device whose hash is not plain Toeplitz.
    """
    hint = "what 'ethtool -x DEV' prints is wanted, unchanged"
    if len(text) > TEXT_MAX:
        raise UsageError(f"a text of more than {TEXT_MAX} characters is not what ethtool prints", hint=hint)
    sections = _split(text, hint)
    if _TABLE not in sections:
        raise UsageError("there is no indirection table in the text", hint=hint)
    for name in (_FUNCTION, _TRANSFORMATION):
        _check_toeplitz(sections.get(name, ()))
    return Parsed(
        table=_parse_table(sections[_TABLE]),
        key=_parse_key(sections[_KEY]) if _KEY in sections else None,
        types=_parse_types(sections[_TYPES]) if _TYPES in sections else None,
        unclassified_queue=_parse_unclassified(sections[_UNCLASSIFIED]) if _UNCLASSIFIED in sections else None,
    )


def has_no_table(text: str) -> bool:
    """Whether ``ethtool -x DEV`` printed that the device has no indirection table (virtio_net without RSS)."""
    lines = [line.strip() for line in text[:TEXT_MAX].split("\n") if line.strip()]
    return len(lines) > 1 and bool(_HEADING.fullmatch(lines[0])) and lines[1] == _NOT_SUPPORTED


class FlowHash(enum.Enum):
    """What is hashed of a packet of one kind."""

    NOTHING = ("None",)
    ADDRESSES = _ADDRESSES
    PORTS = _ADDRESSES + _PORTS
    """Addresses and ports."""


def parse_flow_hash(text: str, flow: str) -> FlowHash:
    """What ``ethtool -n DEV rx-flow-hash FLOW`` printed; ``flow`` is ``tcp4``, ``udp4``, ``tcp6`` or ``udp6``.

    Raises UsageError on anything else, and on a choice of fields that virtio cannot make.
    """
    heading = f"{flow[:3].upper()} over IPV{flow[3]} flows use these fields for computing Hash flow key:"
    lines = [line.strip() for line in text[:TEXT_MAX].split("\n")]
    if lines[0] != heading:
        raise _unknown(1, lines[0])
    fields = tuple(line for line in lines[1:] if line)
    try:
        return FlowHash(fields)
    except ValueError:
        raise _unknown(2, " ".join(fields)) from None


def hash_types(flows: Mapping[str, FlowHash]) -> HashType:
    """The hash types of a virtio_net that answers so for ``tcp4``, ``udp4``, ``tcp6`` and ``udp6``.

    With ports in both answers of a family the IP type does not show; it is taken to be there, as it is whenever the
    ports were chosen with ``ethtool -N`` (virtnet_set_hashflow).  Raises UsageError on answers that contradict each
    other.
    """
    types = HashType(0)
    for version in "46":
        tcp, udp = flows[f"tcp{version}"], flows[f"udp{version}"]
        if {tcp, udp} == {FlowHash.NOTHING, FlowHash.ADDRESSES}:
            raise UsageError(f"IPv{version} is hashed for TCP or for UDP alone, which virtio cannot do")
        if tcp is FlowHash.PORTS:
            types |= HashType[f"TCP{version}"]
        if udp is FlowHash.PORTS:
            types |= HashType[f"UDP{version}"]
        if FlowHash.NOTHING not in (tcp, udp):
            types |= HashType[f"IP{version}"]
    return types


def parse_receive_hashing(text: str) -> bool:
    """Whether ``ethtool -k DEV`` printed that receive-hashing is on."""
    return bool(_RECEIVE_HASHING.search(text[:TEXT_MAX]))


def _split(text: str, hint: str) -> Mapping[str, _Lines]:
    """The numbered lines of each section, its heading first."""
    sections: dict[str, list[tuple[int, str]]] = {}
    name = ""
    for number, raw in enumerate(text.split("\n"), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        heading = _HEADING.fullmatch(line)
        if heading:
            name = heading[1] or heading[2]
            if name in sections:
                raise _wrong(number, f'a second "{name}"', hint)
            sections[name] = []
        elif not name:
            raise _unknown(number, line, hint)
        sections[name].append((number, line))
    return sections


def _parse_table(lines: _Lines) -> tuple[int, ...]:
    heading, *rows = lines
    table: list[int] = []
    for number, line in rows:
        if line == _NOT_SUPPORTED:
            raise _wrong(number, "the device has no indirection table")
        row = _ROW.fullmatch(line)
        if not row:
            raise _unknown(number, line)
        if int(row[1]) != len(table):
            raise _wrong(number, f"entry {len(table)} of the table is wanted here, not entry {int(row[1])}")
        table += [_checked_queue(number, entry) for entry in row[2].split()]
    try:
        return RssConfig(types=HashType(0), key=bytes(KEY_BYTES), table=tuple(table)).table
    except UsageError as error:
        raise _wrong(heading[0], error.message, error.hint) from None


def _parse_key(lines: _Lines) -> bytes | None:
    number, line = _only_line(lines)
    if line == _NOT_SUPPORTED:
        return None
    if not _HEX.fullmatch(line):
        raise _unknown(number, line)
    try:
        return parse_key(line)
    except UsageError as error:
        raise _wrong(number, error.message, error.hint) from None


def _check_toeplitz(lines: _Lines) -> None:
    for number, line in lines[1:]:
        switch = _SWITCH.fullmatch(line)
        if not switch and line != _NOT_SUPPORTED:
            raise _unknown(number, line)
        if switch and switch[2] == "on" and switch[1] != "toeplitz":
            raise _wrong(number, f"the device hashes with {switch[1]}", "RSS of virtio is plain toeplitz")


def _parse_types(lines: _Lines) -> HashType:
    number, line = _only_line(lines)
    if line == _NO_TYPES:
        return HashType(0)
    if not _NAMES.fullmatch(line):
        raise _unknown(number, line)
    try:
        return parse_hash_types(line)
    except UsageError as error:
        raise _wrong(number, error.message, error.hint) from None


def _parse_unclassified(lines: _Lines) -> int:
    number, line = _only_line(lines)
    if not _QUEUE.fullmatch(line):
        raise _unknown(number, line)
    return _checked_queue(number, line)


def _only_line(lines: _Lines) -> tuple[int, str]:
    (heading, name), *body = lines
    if not body:
        raise _wrong(heading, f'nothing follows "{name}"')
    if len(body) > 1:
        raise _unknown(*body[1])
    return body[0]


def _checked_queue(number: int, text: str) -> int:
    queue = int(text)
    if queue > 0xFFFF:
        raise _wrong(number, f"queue {queue} is not in the range 0 to 65535")
    return queue


def _unknown(number: int, line: str, hint: str = "") -> UsageError:
    return _wrong(number, f"{line[:40]!a} is not what ethtool prints here", hint)


def _wrong(number: int, message: str, hint: str = "") -> UsageError:
    return UsageError(f"line {number}: {message}", hint=hint)
