# SPDX-License-Identifier: BSD-2-Clause
"""What is wanted of each tap: the options of a command over the configuration."""

from qsteer import config, settings
from qsteer.bridges import Bridges
from qsteer.model import Tap
from qsteer.plan import Wanted
from qsteer.settings import Config, Settings

_REMEMBERED_MAX = 4096


class Intent:
    """For ``apply`` and ``keep``.

    ``given`` are the options; ``if_absent``, ``expect`` and ``refresh`` are of one command, and of no configuration.
    ``identify`` wants every NIC to be known.  Reads the configuration; raises ConfigError.
    """

    def __init__(
        self,
        given: Settings,
        *,
        if_absent: bool = False,
        expect: str | None = None,
        refresh: bool = False,
        identify: bool = False,
    ) -> None:
        self._given = given
        self._if_absent, self._expect, self._refresh, self._identify = if_absent, expect, refresh, identify
        self.reload()

    def reload(self) -> None:
        """Read the configuration again.  Raises ConfigError, and goes on with the one of before."""
        self.config: Config = config.load()
        self._by_nic = self._identify or self.config.matches_on("nic")
        self._by_mac = self.config.matches_on("mac")
        self._bridges = Bridges() if self.config.matches_on("bridge") else None
        self._remembered: dict[object, Wanted] = {}

    def __call__(self, tap: Tap) -> Wanted:
        """What is wanted of one tap.

        Where it takes to know the NIC and that is not known, ``identify`` of it says so.
        """
        nic, bridge = tap.nic, self._bridges.of(tap) if self._bridges else None
        names = (tap.vm_name, nic and (nic.id, nic.netdev, nic.mac), tap.name, bridge, tap.vm is not None)
        if names not in self._remembered:
            # Who may start processes may make up any number of names.
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[names] = self._of(tap, bridge)
        return self._remembered[names]

    def settings(self, tap: Tap) -> Settings:
        """The settings of one tap, options and all."""
        return self._settings(tap, self._bridges.of(tap) if self._bridges else None)

    def _of(self, tap: Tap, bridge: str | None) -> Wanted:
        unknown = (self._by_nic and not tap.nic) or (self._by_mac and not (tap.nic and tap.nic.mac))
        return settings.wanted(
            self._settings(tap, bridge),
            if_absent=self._if_absent,
            expect=self._expect,
            refresh=self._refresh,
            identify=bool(unknown and tap.vm and not self._refresh),
        )

    def _settings(self, tap: Tap, bridge: str | None) -> Settings:
        nic = tap.nic
        below = self.config.settings(
            vm=tap.vm_name,
            nics=tuple(name for name in (nic.id, nic.netdev) if name) if nic else (),
            mac=nic.mac if nic else None,
            dev=tap.name,
            bridge=bridge,
        )
        return settings.fold((below, self._given))
