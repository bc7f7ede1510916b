# SPDX-License-Identifier: BSD-2-Clause
"""What goes over the socket of qsteer serve."""

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from qsteer import errors, wire
from qsteer.access import Limits, Rule
from qsteer.errors import KINDS, QsteerError, UnsupportedError, UsageError
from qsteer.runplan import Order

ORDER = Order(id="net0", queues=4, ifname="al0", bridge="br0", mac="52:54:00:12:34:56", mtu=1400, vm="web 1")
TAP: dict[str, Any] = {"version": 1, "request": "tap", **asdict(ORDER)}


def body(frame: bytes) -> bytes:
    length = wire.body_length(frame[: wire.HEADER_BYTES], wire.ANSWER_MAX)
    assert len(frame) == wire.HEADER_BYTES + length
    return frame[wire.HEADER_BYTES :]


def decoded(members: object) -> wire.Request:
    return wire.decode_request(json.dumps(members).encode())


@pytest.mark.parametrize(
    "request_",
    [
        wire.Request(what=wire.What.LIMITS),
        wire.Request(what=wire.What.PROGRAM),
        wire.Request(what=wire.What.TAP, order=ORDER),
        wire.Request(what=wire.What.TAP, order=Order(id="n", queues=256, vhost=True, steered=False)),
    ],
    ids=lambda request: request.what,
)
def test_requests_come_back_as_they_were(request_: wire.Request) -> None:
    frame = wire.encode_request(request_)
    assert wire.decode_request(body(frame)) == request_
    assert len(frame) < wire.REQUEST_MAX


@pytest.mark.parametrize("length", [0, wire.REQUEST_MAX + 1, (1 << 32) - 1])
def test_lengths_that_are_refused(length: int) -> None:
    with pytest.raises(UsageError, match=f"message of {length} bytes"):
        wire.body_length(length.to_bytes(4, "big"), wire.REQUEST_MAX)


def test_lengths_that_are_taken() -> None:
    assert wire.body_length(b"\0\0\0\1", wire.REQUEST_MAX) == 1
    assert wire.body_length(wire.REQUEST_MAX.to_bytes(4, "big"), wire.REQUEST_MAX) == wire.REQUEST_MAX


NOT_OBJECTS = {
    "nothing": b"",
    "not UTF-8": b"\xff\xfe{}",
    "not JSON": b"{",
    "an array": b"[]",
    "a number": b"1",
    "NaN": b'{"version": NaN}',
    "Infinity": b'{"version": 1, "request": "tap", "queues": -Infinity}',
    "twice": b'{"version": 1, "request": "limits", "request": "tap"}',
    "brackets": b"[" * 4000,
    "objects": b'{"a":' * 800,
    "digits": b"9" * 4096,
}


@pytest.mark.parametrize("case", NOT_OBJECTS)
def test_what_is_no_request(case: str) -> None:
    with pytest.raises(UsageError, match="JSON object"):
        wire.decode_request(NOT_OBJECTS[case])


@pytest.mark.parametrize("version", [0, 2, -1, True, "1", 1.0, None, [], 10**300])
def test_other_versions(version: object) -> None:
    with pytest.raises(UnsupportedError, match="version"):
        decoded({"version": version, "request": "limits"})
    with pytest.raises(UnsupportedError, match="version"):
        decoded({"request": "limits"})


@pytest.mark.parametrize("what", [None, "", "taps", 1, True, [], {}, ["tap"]])
def test_unknown_requests(what: object) -> None:
    with pytest.raises(UsageError, match="limits, tap, program"):
        decoded({"version": 1, "request": what})


def test_members_that_do_not_belong_there() -> None:
    with pytest.raises(UsageError, match="nothing else"):
        decoded({"version": 1, "request": "program", "fd": 3})
    with pytest.raises(UsageError, match="nothing else"):
        decoded({**TAP, "user": "root"})
    for key in asdict(ORDER):
        with pytest.raises(UsageError, match="nothing else"):
            decoded({name: value for name, value in TAP.items() if name != key})


WRONG: dict[str, tuple[object, ...]] = {
    "id": (None, "", "0net", "a b", "net0\n", "x" * 65, 1, ["net0"], "é"),
    "queues": (0, 257, -1, 1.0, True, "4", None, 10**30),
    "ifname": (None, ".", "..", "a/b", "tap%d", "a b", "a:b", "x" * 16, "é" * 8, "a\0", "\ud800", 1),
    "bridge": (None, ".", "../br0", "br%d", "x" * 16, "br0\n", "\udcff", 1, ["br0"]),
    "mac": ("", "52:54", "01:00:5e:00:00:01", "00:00:00:00:00:00", "52:54:00:12:34:5G", "52:54:00:12:34:56\n", 1),
    "mtu": (0, 67, 65522, "1500", True, 1500.0),
    "vhost": (None, 0, 1, "on"),
    "steered": (None, 0, "true"),
    "vm": ("", "x" * 256, "a\nb", "\x1b[31m", "\ud800", 1),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_orders_that_are_wrong(key: str, value: object) -> None:
    with pytest.raises(UsageError) as caught:
        decoded({**TAP, key: value})
    assert f": {key} is not" in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 120


def test_odd_orders_that_are_right() -> None:
    for change in ({"ifname": ""}, {"bridge": ""}, {"mac": None}, {"mtu": 68}, {"vm": None}, {"ifname": "é.,-_@"}):
        assert decoded({**TAP, **change}).order == replace(ORDER, **change)


RULE = Rule(user="alice", bridges=("br*", ""), prefix="al", queues=8, taps=3, vhost=True, programs=False)


def test_limits_tell_no_names() -> None:
    frame = wire.encode_limits(Limits(rules=(RULE, replace(RULE, vhost=False)), vhost=True))
    assert b"alice" not in frame
    there = wire.decode_limits(body(frame))
    assert there == Limits(rules=(replace(RULE, user=None), replace(RULE, user=None, vhost=False)), vhost=True)


def test_more_limits_than_an_answer_holds() -> None:
    frame = wire.encode_limits(Limits(rules=(replace(RULE, bridges=("b" * 60,) * 500),) * 50))
    assert 0 < len(wire.decode_limits(body(frame)).rules) < 50


def test_taps_and_programs() -> None:
    answer = wire.TapAnswer(name="al0", mac="52:54:00:12:34:56", program="-", queues=4, vhosts=0, programs=4)
    assert wire.decode_tap(body(wire.encode_tap(answer))) == answer
    assert wire.decode_program(body(wire.encode_program("qsteer 7"))) == "qsteer 7"


@pytest.mark.parametrize("kind", KINDS)
def test_failures_are_the_same_class_there(kind: type[QsteerError]) -> None:
    frame = wire.encode_failure(kind("it failed\x1b", hint="do this\n", errno=12))
    for decode in (wire.decode_limits, wire.decode_tap, wire.decode_program):
        with pytest.raises(QsteerError) as caught:
            decode(body(frame))
        error = caught.value
        assert (type(error), error.message, error.hint, error.errno) == (kind, "it failed?", "do this?", 12)


def test_long_failures_are_cut() -> None:
    frame = wire.encode_failure(QsteerError("é" * 100_000, hint="é" * 100_000))
    assert len(frame) < wire.ANSWER_MAX
    with pytest.raises(QsteerError, match="é" * 100):
        wire.decode_tap(body(frame))


BAD_ANSWERS: tuple[dict[str, object], ...] = (
    {},
    {"ok": 1},
    {"ok": None, "error": "x", "hint": ""},
    {"ok": False},
    {"ok": False, "error": 1, "hint": ""},
    {"ok": True, "name": "al0"},
    {"ok": True, "name": "\x1b", "mac": "m", "program": "p", "queues": 1, "vhosts": 0, "programs": 0},
    {"ok": True, "name": "n", "mac": "m", "program": "p", "queues": -1, "vhosts": 0, "programs": 0},
    {"ok": True, "name": "n", "mac": "m", "program": 3, "queues": 1, "vhosts": 0, "programs": 0},
    {"ok": True, "program": 3},
    {"ok": True, "rules": [[]], "vhost": True},
    {"ok": True, "rules": [{"bridges": [1], "prefix": "", "queues": 1, "taps": 1, "vhost": True, "programs": True}]},
    {"ok": True, "rules": {}, "vhost": True},
)


@pytest.mark.parametrize("answer", BAD_ANSWERS)
def test_answers_that_are_none(answer: dict[str, object]) -> None:
    for decode in (wire.decode_limits, wire.decode_tap, wire.decode_program):
        with pytest.raises(QsteerError):
            decode(json.dumps({"version": 1, **answer}).encode())
    with pytest.raises(UnsupportedError):
        wire.decode_tap(b'{"version": 9, "ok": true}')


def test_an_unknown_exit_code_is_a_failure() -> None:
    with pytest.raises(QsteerError) as caught:
        wire.decode_tap(b'{"version": 1, "ok": false, "error": "e", "hint": "", "exit": [], "errno": "x"}')
    assert (type(caught.value), caught.value.errno) == (errors.QsteerError, 0)


def test_fds_by_the_message() -> None:
    assert [len(one) for one in wire.messages(tuple(range(36)))] == [16, 16, 4]
    assert wire.messages(()) == ()
    assert sum(wire.messages(tuple(range(36))), ()) == tuple(range(36))
