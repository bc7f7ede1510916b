# SPDX-License-Identifier: BSD-2-Clause
"""Who may have what from ``qsteer serve``: the administrator's rules.  Pure."""

import fnmatch
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace

from qsteer.errors import PermissionDeniedError, UsageError
from qsteer.runplan import QUEUES_MAX, Order

_ASK = "the administrator of this host allows it with [[serve.allow]] in qsteer's configuration"
NAME_BYTES = 15
"""Longest name of a network device."""
_PATTERNS_TOLD = 8
"""A message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One ``[[serve.allow]]`` of the configuration.

    ``user`` or ``group`` is whom it is for: a name, or a number in text; exactly one is given.  ``bridges`` are shell
    patterns of the bridges that a tap may join, "" in it stands for none.  A tap's name begins with ``prefix``, which
    is not empty; it has ``queues`` queues at most, and there are ``taps`` of that prefix at most, 0 for none at all.
    ``vhost`` allows /dev/vhost-net.  Programs for taps that the client has open itself are ``programs``.
    """

    user: str | None = None
    group: str | None = None
    bridges: tuple[str, ...] = ()
    prefix: str = ""
    queues: int = 0
    taps: int = 0
    vhost: bool = False
    programs: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A rule, and the number of the user or of the group that it is for; the other one is None."""

    rule: Rule
    uid: int | None = None
    gid: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one user may have: one of ``rules``, whose ``user`` and ``group`` are None, has to allow all of an order.

    ``vhost`` says that one of them allows vhost, and that /dev/vhost-net works where the service runs.
    """

    rules: tuple[Rule, ...]
    vhost: bool = False


EVERYTHING = Rule(user="0", bridges=("*", ""), queues=QUEUES_MAX, taps=1 << 31, vhost=True)
"""What root may have: root could make it without the service."""


def rules_for(grants: Iterable[Grant], *, uid: int, gids: Collection[int]) -> tuple[Rule, ...]:
    """The rules that are for a process of a user that is in these groups."""
    if uid == 0:
        return (EVERYTHING,)
    return tuple(grant.rule for grant in grants if grant.uid == uid or grant.gid in gids)


def allow_tap(rules: Sequence[Rule], order: Order, *, uid: int, taps: Callable[[Rule], int]) -> Rule:
    """The first rule that allows all of an order.

    ``taps`` tells how many taps there are whose names begin with a rule's prefix.  Raises PermissionDeniedError, which
    tells what the rule that comes closest does not allow, and nothing at all to whom no rule is for.
    """
    _check_any(rules, uid)
    lacking = [_lacking(rule, order, taps(rule)) for rule in rules]
    closest = min(range(len(rules)), key=lambda index: len(lacking[index]))
    if not lacking[closest]:
        return rules[closest]
    others = "; no other rule for this user allows all of it" if len(rules) > 1 else ""
    raise PermissionDeniedError(f"uid {uid} may not have this tap: {', '.join(lacking[closest])}{others}", hint=_ASK)


def allow_program(rules: Sequence[Rule], *, uid: int) -> None:
    """Raises PermissionDeniedError unless one of the rules allows programs."""
    _check_any(rules, uid)
    if not any(rule.programs for rule in rules):
        raise PermissionDeniedError(f"uid {uid} may not have programs: no rule says programs = true", hint=_ASK)


def check_mtu(order: Order, *, uid: int, bridge_mtu: int) -> None:
    """Raises PermissionDeniedError where a tap would lower its bridge's MTU, which is that of the lowest of its ports.

    Root may do it.
    """
    if uid and order.mtu is not None and order.mtu < bridge_mtu:
        raise PermissionDeniedError(
            f'uid {uid} may not have this tap: MTU {order.mtu} (bridge "{order.bridge}" has {bridge_mtu}, and would '
            "get the tap's)",
            hint="leave out mtu=",
        )


def named(rule: Rule, order: Order) -> Order:
    """The order with a name for its tap, numbered by the kernel where the client gave none.

    Raises UsageError where the rule's prefix leaves no room for the kernel's pattern.
    """
    if order.ifname or not rule.prefix:
        return order
    ifname = f"{rule.prefix}%d"
    if len(ifname.encode()) > NAME_BYTES:
        raise UsageError(f'a name for the tap is missing: one that begins with "{rule.prefix}"', hint="say ifname=")
    return replace(order, ifname=ifname)


def _check_any(rules: Sequence[Rule], uid: int) -> None:
    if not rules:
        raise PermissionDeniedError(f"no rule of qsteer serve is for uid {uid} or one of its groups", hint=_ASK)


def _lacking(rule: Rule, order: Order, taps: int) -> tuple[str, ...]:
    """What of an order a rule does not allow, each with what it does."""
    lacking = []
    if not _allows_bridge(rule, order.bridge):
        asked = f'bridge "{order.bridge}"' if order.bridge else "no bridge"
        allowed = ", ".join(f'"{pattern}"' if pattern else "none" for pattern in rule.bridges[:_PATTERNS_TOLD])
        more = ", ..." if len(rule.bridges) > _PATTERNS_TOLD else ""
        lacking.append(f"{asked} (allowed: {allowed or 'nothing'}{more})")
    if order.queues > rule.queues:
        lacking.append(f"{order.queues} queues (at most {rule.queues})")
    if order.ifname and not order.ifname.startswith(rule.prefix):
        lacking.append(f'the name "{order.ifname}" (it has to begin with "{rule.prefix}")')
    if taps >= rule.taps:
        lacking.append(f'one more tap "{rule.prefix}..." ({taps} of at most {rule.taps} are there)')
    if order.vhost and not rule.vhost:
        lacking.append("vhost (not allowed)")
    return tuple(lacking)


def _allows_bridge(rule: Rule, bridge: str) -> bool:
    """A pattern such as * is about bridges; to have none takes a "" of its own."""
    if not bridge:
        return "" in rule.bridges
    return any(fnmatch.fnmatchcase(bridge, pattern) for pattern in rule.bridges if pattern)
