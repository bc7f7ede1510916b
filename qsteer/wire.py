# SPDX-License-Identifier: BSD-2-Clause
"""What goes over the socket of ``qsteer serve``, as bytes and back.  Pure.

Protocol
========

A connection is one request and its answer.  Each is a frame: four bytes of length (big endian), and that many bytes of
JSON, an object::

    client   {"version": 1, "request": "limits"}
    server   {"version": 1, "ok": true, "vhost": false, "rules": [{"bridges": ["br0"], "prefix": "al", ...}]}

    client   {"version": 1, "request": "tap", "id": "net0", "queues": 4, ...}
    server   {"version": 1, "ok": true, "name": "al0", "mac": "52:...", "queues": 4, "vhosts": 0, "programs": 4, ...}
             then the fds: queues, vhost, program, at most 16 a message, each message with one byte

    client   {"version": 1, "request": "program"}, then one message of one byte with the fd of a queue of its tap
    server   {"version": 1, "ok": true, "program": "qsteer 1132 (shared-body)"}, then a message with four fds

    server   {"version": 1, "ok": false, "error": "...", "hint": "...", "exit": 4, "errno": 0}

Fds that come with anything but that one byte are not even received: whoever reads the frame has no room for them.

What a client sends is checked here in full, whatever it is.  What the server sends is believed, but bounded.
"""

import enum
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NoReturn

from qsteer.access import Limits, Rule
from qsteer.errors import KINDS, QsteerError, UnsupportedError, UsageError, printable
from qsteer.runplan import MTU_MAX, MTU_MIN, QUEUES_MAX, Order, device_name

VERSION = 1
HEADER_BYTES = 4
REQUEST_MAX = 4096
ANSWER_MAX = 65536
"""Bytes of JSON."""
FDS_A_MESSAGE = 16
PROGRAM_FDS = 4
TEXT_MAX = 1000
"""Characters of an error's message, or of its hint."""

_VM_CHARACTERS = 255
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}")
_MAC = re.compile(r"[0-9a-f][02468ace](?::[0-9a-f]{2}){5}")
_RULE_KEYS = tuple(field.name for field in fields(Rule) if field.name not in ("user", "group"))


class What(enum.StrEnum):
    """What can be asked for."""

    LIMITS = "limits"
    TAP = "tap"
    PROGRAM = "program"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request; ``order`` is there for a tap only."""

    what: What
    order: Order | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TapAnswer:
    """A tap that is ready, and how many fds of each kind follow."""

    name: str
    mac: str
    program: str
    queues: int
    vhosts: int
    programs: int


def body_length(header: bytes, most: int) -> int:
    """How many bytes follow a frame's first four.  Raises UsageError if there are more than ``most``, or none."""
    (length,) = struct.unpack("!I", header)
    if not 0 < length <= most:
        raise UsageError(f"a message of {length} bytes: it may have 1 to {most}")
    return int(length)


def encode_request(request: Request) -> bytes:
    """A frame."""
    order = asdict(request.order) if request.order else {}
    return _frame({"request": request.what.value, **order})


def decode_request(body: bytes) -> Request:
    """A request that is right in every part.  Raises UsageError, UnsupportedError on another version."""
    given = _object(body)
    what = given.pop("request", None)
    if what not in tuple(What):
        raise UsageError(f"no request that this qsteer knows; it knows {', '.join(What)}")
    if what != What.TAP:
        if given:
            raise UsageError(f'request "{what}" has nothing else in it')
        return Request(what=What(what))
    return Request(what=What.TAP, order=_order(given))


def encode_limits(limits: Limits) -> bytes:
    """A frame; of more rules than it can hold, the first ones."""
    rules = [{key: value for key, value in asdict(rule).items() if key in _RULE_KEYS} for rule in limits.rules]
    while True:
        frame = _frame({"ok": True, "vhost": limits.vhost, "rules": rules})
        if len(frame) <= HEADER_BYTES + ANSWER_MAX:
            return frame
        rules.pop()


def encode_tap(answer: TapAnswer) -> bytes:
    """A frame."""
    return _frame({"ok": True, **asdict(answer)})


def encode_program(program: str) -> bytes:
    """A frame."""
    return _frame({"ok": True, "program": program})


def encode_failure(error: QsteerError) -> bytes:
    """A frame.  What the error's text has of the client's own making is cut and made printable."""
    return _frame(
        {
            "ok": False,
            "error": printable(error.message)[:TEXT_MAX],
            "hint": printable(error.hint)[:TEXT_MAX],
            "exit": error.exit_code,
            "errno": error.errno,
        }
    )


def decode_limits(body: bytes) -> Limits:
    """Raises the server's QsteerError, or one about the answer."""
    given = _answer(body)
    rules, vhost = given.get("rules"), given.get("vhost")
    if not isinstance(rules, list) or not isinstance(vhost, bool):
        _bad_answer()
    return Limits(rules=tuple(_rule(one) for one in rules), vhost=vhost)


def decode_tap(body: bytes) -> TapAnswer:
    """Raises the server's QsteerError, or one about the answer."""
    given = _answer(body)
    try:
        answer = TapAnswer(**given)
    except TypeError:
        _bad_answer()
    counts = (answer.queues, answer.vhosts, answer.programs)
    texts = (answer.name, answer.mac, answer.program)
    if not all(type(count) is int and 0 <= count <= QUEUES_MAX for count in counts):
        _bad_answer()
    if not all(isinstance(text, str) and text.isprintable() for text in texts):
        _bad_answer()
    return answer


def decode_program(body: bytes) -> str:
    """What the program is called.  Raises the server's QsteerError, or one about the answer."""
    given = _answer(body)
    program = given.get("program")
    if len(given) != 1 or not isinstance(program, str) or not program.isprintable():
        _bad_answer()
    return program


def messages(fds: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Fds as they go over the socket, message by message."""
    return tuple(tuple(fds[start : start + FDS_A_MESSAGE]) for start in range(0, len(fds), FDS_A_MESSAGE))


def _frame(members: dict[str, object]) -> bytes:
    body = json.dumps({"version": VERSION, **members}, separators=(",", ":")).encode()
    return struct.pack("!I", len(body)) + body


def _object(body: bytes) -> dict[str, Any]:
    """The members of a JSON object of this version, without the version; no member is there twice."""
    try:
        given = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):  # of UTF-8, of JSON, of what is above; thousands of brackets
        given = None
    if not isinstance(given, dict):
        raise UsageError("a message that is not a JSON object")
    version = given.pop("version", None)
    if type(version) is not int or version != VERSION:
        told = version if type(version) is int and abs(version) < 1000 else "another one"
        raise UnsupportedError(
            f"the other side speaks version {told} of the protocol, this qsteer {VERSION}",
            hint="run the same version of qsteer on both sides: qsteer --version",
        )
    return given


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a member that is there twice")
    return members


def _no_constant(text: str) -> NoReturn:
    raise ValueError(text)  # NaN and Infinity, which are not JSON's


def _answer(body: bytes) -> dict[str, Any]:
    given = _object(body)
    ok = given.pop("ok", None)
    if ok is True:
        return given
    if ok is not False:
        _bad_answer()
    raise _failure(given)


def _failure(given: dict[str, Any]) -> QsteerError:
    error, hint, code, errno = (given.get(key) for key in ("error", "hint", "exit", "errno"))
    if not isinstance(error, str) or not isinstance(hint, str):
        _bad_answer()
    kind = next((kind for kind in KINDS if kind.exit_code == code), QsteerError)
    known = errno if type(errno) is int and 0 <= errno < 4096 else 0
    return kind(printable(error)[:TEXT_MAX], hint=printable(hint)[:TEXT_MAX], errno=known)


def _bad_answer() -> NoReturn:
    raise QsteerError("what qsteer serve answered is not an answer of its protocol")


def _rule(given: object) -> Rule:
    if not isinstance(given, dict) or given.keys() != set(_RULE_KEYS):
        _bad_answer()
    bridges, prefix, queues, taps = (given[key] for key in ("bridges", "prefix", "queues", "taps"))
    if not isinstance(bridges, list) or not all(isinstance(text, str) for text in (*bridges, prefix)):
        _bad_answer()
    if type(queues) is not int or type(taps) is not int:
        _bad_answer()
    vhost, programs = given["vhost"] is True, given["programs"] is True
    return Rule(bridges=tuple(bridges), prefix=prefix, queues=queues, taps=taps, vhost=vhost, programs=programs)


def _order(given: dict[str, Any]) -> Order:
    expected = {field.name for field in fields(Order)}
    if given.keys() != expected:
        raise UsageError(f'request "tap" has {", ".join(sorted(expected))}, and nothing else')
    _check("id", given["id"], _is_id(given["id"]))
    _check("queues", given["queues"], _is_number(given["queues"], 1, QUEUES_MAX))
    for key in ("ifname", "bridge"):
        _check(key, given[key], given[key] == "" or _is_device_name(given[key]))
    _check("mac", given["mac"], given["mac"] is None or _is_mac(given["mac"]))
    _check("mtu", given["mtu"], given["mtu"] is None or _is_number(given["mtu"], MTU_MIN, MTU_MAX))
    for key in ("vhost", "steered"):
        _check(key, given[key], isinstance(given[key], bool))
    _check("vm", given["vm"], given["vm"] is None or _is_vm(given["vm"]))
    return Order(**given)


def _check(key: str, value: object, right: bool) -> None:
    if not right:
        raise UsageError(f'request "tap": {key} is not what it may be: {printable(repr(value))[:40]}')


def _is_id(value: object) -> bool:
    return isinstance(value, str) and bool(_ID.fullmatch(value))


def _is_number(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most  # a bool is an int, too


def _is_device_name(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(device_name("", value))
    except UsageError:
        return False


def _is_mac(value: object) -> bool:
    """In small letters, of one NIC."""
    return isinstance(value, str) and bool(_MAC.fullmatch(value)) and value != "00:00:00:00:00:00"


def _is_vm(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _VM_CHARACTERS and value.isprintable()
