# SPDX-License-Identifier: BSD-2-Clause
"""Which bridge a tap is in.

sysfs tells for next to nothing, of the network namespace that it was mounted in (``tuns``).  In other namespaces, and
where sysfs shows another one than qsteer's own, rtnetlink is asked for all devices at once, and not again for a while:
a host may have a thousand taps.
"""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from qsteer import namespaces, tuns
from qsteer.errors import QsteerError
from qsteer.model import Tap

_DEVICES = "/sys/class/net"
OLD_S, IDLE_SHARE = 30.0, 1000
"""An answer of rtnetlink's is good for so long, and for so many times what it took."""


class Bridges:
    """Remembers what it was told, as long as that is good."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._own = namespaces.own()
        self._in_sysfs = _sysfs_is_own()
        self._asked: dict[int, tuple[float, Mapping[int, str]]] = {}

    def of(self, tap: Tap) -> str | None:
        """The name of the bridge; None if it is in none, or that cannot be found out."""
        if self._in_sysfs and tap.netns == self._own:
            return _in_sysfs(tap)
        good_until, bridges = self._asked.get(tap.netns, (0.0, {}))
        began = self._clock()
        if began >= good_until or tap.ifindex not in bridges:
            bridges = self._ask(tap)
            took = self._clock() - began
            self._asked[tap.netns] = (began + max(OLD_S, took * IDLE_SHARE), bridges)
        return bridges.get(tap.ifindex) or None

    def _ask(self, tap: Tap) -> Mapping[int, str]:
        """By ifindex the bridge of each device in a tap's network namespace."""
        from qsteer import links

        try:
            if tap.netns == self._own:
                return links.bridges()
            answers = namespaces.visit((tap.netns_name,), links.bridges) if tap.netns_name else {}
        except QsteerError:
            return {}
        told = [answer for answer in answers.values() if not isinstance(answer, QsteerError)]
        return told[0] if told else {}


def _sysfs_is_own() -> bool:
    try:
        return tuns.in_sysfs() is not None
    except OSError:
        return False


def _in_sysfs(tap: Tap) -> str | None:
    device = f"{_DEVICES}/{tap.name}"
    try:
        if int(Path(f"{device}/ifindex").read_text()) != tap.ifindex:
            return None
        return os.path.basename(os.readlink(f"{device}/brport/bridge"))  # noqa: PTH115, PTH119 (a thousand taps)
    except (OSError, ValueError):
        return None
