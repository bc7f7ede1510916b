# SPDX-License-Identifier: BSD-2-Clause
"""Who may have what from ``qsteer serve``: the administrator's rules.  Pure."""

from dataclasses import dataclass


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
