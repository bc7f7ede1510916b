# SPDX-License-Identifier: BSD-2-Clause
"""Who may have what from qsteer serve."""

from dataclasses import replace
from typing import Any

import pytest

from qsteer import access
from qsteer.access import Grant, Rule
from qsteer.errors import PermissionDeniedError, UsageError
from qsteer.runplan import QUEUES_MAX, Order

RULE = Rule(user="alice", bridges=("br0", "vm*"), prefix="al", queues=4, taps=3)
ORDER = Order(id="net0", queues=4, bridge="br0")
UID = 1000


def refusal(*rules: Rule, taps: int = 0, **order: Any) -> str:
    """Why an order is refused, "" if it is not."""
    try:
        access.allow_tap(rules, replace(ORDER, **order), uid=UID, taps=lambda rule: taps)
    except PermissionDeniedError as error:
        assert error.exit_code == 4 and "serve.allow" in error.hint
        return str(error)
    return ""


ALLOWED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a bridge by its pattern": {"bridge": "vm7"},
    "fewer queues": {"queues": 1},
    "a name": {"ifname": "alx"},
    "the prefix itself": {"ifname": "al"},
    "the last tap": {"taps": 2},
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_a_rule_allows(case: str) -> None:
    assert refusal(RULE, **ALLOWED[case]) == ""


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another bridge": ({"bridge": "br1"}, 'bridge "br1" (allowed: "br0", "vm*")'),
    "a longer name of a bridge": ({"bridge": "br00"}, 'bridge "br00"'),
    "another case": ({"bridge": "BR0"}, 'bridge "BR0"'),
    "no bridge": ({"bridge": ""}, 'no bridge (allowed: "br0", "vm*")'),
    "too many queues": ({"queues": 5}, "5 queues (at most 4)"),
    "another prefix": ({"ifname": "eth0"}, 'the name "eth0" (it has to begin with "al")'),
    "too many taps": ({"taps": 3}, 'one more tap "al..." (3 of at most 3 are there)'),
    "vhost": ({"vhost": True}, "vhost (not allowed)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_rule_does_not_allow(case: str) -> None:
    change, words = REFUSED[case]
    assert refusal(RULE, **change).startswith(f"uid 1000 may not have this tap: {words}")


def test_all_that_is_refused_is_told() -> None:
    told = refusal(RULE, bridge="br1", queues=8, ifname="x", vhost=True, taps=9)
    assert all(words in told for words in ("br1", "8 queues", '"x"', "vhost", "9 of at most 3"))


def test_no_bridge_has_to_be_allowed_by_itself() -> None:
    assert refusal(replace(RULE, bridges=("*",)), bridge="") != ""
    assert refusal(replace(RULE, bridges=("",)), bridge="") == ""
    assert refusal(replace(RULE, bridges=("",)), bridge="br0").endswith("(allowed: none)")
    assert refusal(replace(RULE, bridges=())).endswith("(allowed: nothing)")


def test_who_has_no_rule_is_told_nothing() -> None:
    assert refusal() == "no rule of qsteer serve is for uid 1000 or one of its groups"
    with pytest.raises(PermissionDeniedError, match="no rule of qsteer serve is for uid 1000"):
        access.allow_program((), uid=UID)


def test_one_of_several_rules_has_to_allow_all() -> None:
    wide = replace(RULE, bridges=("wide",), queues=16)
    assert refusal(RULE, wide) == "" and refusal(wide, RULE) == ""
    assert refusal(RULE, wide, bridge="wide", queues=16) == ""
    told = refusal(wide, RULE, queues=8)
    assert told.startswith('uid 1000 may not have this tap: bridge "br0" (allowed: "wide"); no other rule')
    order = replace(ORDER, bridge="wide", queues=16)
    assert access.allow_tap((RULE, wide), order, uid=UID, taps=lambda rule: 0) is wide


def test_many_patterns_are_one_line() -> None:
    told = refusal(replace(RULE, bridges=tuple(f"br-number-{index}" for index in range(100))))
    assert told.endswith('"br-number-7", ...)') and len(told) < 300


def test_rules_are_for_users_and_groups() -> None:
    rules = [replace(RULE, prefix=prefix) for prefix in ("a", "b", "c", "d")]
    grants = [
        Grant(rule=rules[0], uid=UID),
        Grant(rule=rules[1], gid=UID),
        Grant(rule=rules[2], gid=7),
        Grant(rule=rules[3], uid=7),
    ]
    assert access.rules_for(grants, uid=UID, gids=frozenset({100})) == (rules[0],)
    assert access.rules_for(grants, uid=UID, gids=frozenset({100, 7})) == (rules[0], rules[2])
    assert access.rules_for(grants, uid=1001, gids=frozenset({UID})) == (rules[1],)
    assert access.rules_for(grants, uid=1001, gids=frozenset({0})) == ()


def test_root_may_have_everything() -> None:
    rules = access.rules_for((), uid=0, gids=frozenset({0}))
    for change in ({"bridge": ""}, {"bridge": "any"}, {"queues": QUEUES_MAX}, {"ifname": "x"}, {"vhost": True}):
        assert refusal(*rules, taps=1000, **change) == ""
    access.allow_program(rules, uid=0)
    access.check_mtu(replace(ORDER, mtu=68), uid=0, bridge_mtu=1500)


def test_programs() -> None:
    access.allow_program((replace(RULE, programs=False), RULE), uid=UID)
    with pytest.raises(PermissionDeniedError, match="may not have programs"):
        access.allow_program((replace(RULE, programs=False),), uid=UID)


def test_a_tap_must_not_lower_its_bridges_mtu() -> None:
    for mtu in (None, 1500, 9000):
        access.check_mtu(replace(ORDER, mtu=mtu), uid=UID, bridge_mtu=1500)
    with pytest.raises(PermissionDeniedError, match=r'MTU 1499 .bridge "br0" has 1500'):
        access.check_mtu(replace(ORDER, mtu=1499), uid=UID, bridge_mtu=1500)


def test_names() -> None:
    assert access.named(RULE, ORDER).ifname == "al%d"
    assert access.named(RULE, replace(ORDER, ifname="alx")).ifname == "alx"
    assert access.named(replace(RULE, prefix=""), ORDER).ifname == ""
    assert access.named(replace(RULE, prefix="x" * 13), ORDER).ifname == "x" * 13 + "%d"
    with pytest.raises(UsageError, match="begins with"):
        access.named(replace(RULE, prefix="x" * 14), ORDER)
