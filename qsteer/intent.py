# SPDX-License-Identifier: BSD-2-Clause
"""What is wanted of each tap: the options of a command over its libvirt domain's policy over the configuration."""

from collections.abc import Callable

from qsteer import config, domainpolicy, settings
from qsteer.bridges import Bridges
from qsteer.domainpolicy import Policy
from qsteer.model import Tap
from qsteer.plan import Wanted
from qsteer.settings import Config, Settings

_REMEMBERED_MAX = 4096


class Intent:
    """For ``apply``, ``keep`` and libvirt's hook.

    ``given`` are the options; ``if_absent``, ``expect`` and ``refresh`` are of one command, and of no configuration.
    ``identify`` wants every NIC to be known, ``lenient`` steering also where no hash can be reported.  Reads the
    configuration with ``load``; raises what that raises, ConfigError.
    """

    def __init__(
        self,
        given: Settings,
        *,
        if_absent: bool = False,
        expect: str | None = None,
        refresh: bool = False,
        identify: bool = False,
        lenient: bool = False,
        load: Callable[[], Config] = config.load,
    ) -> None:
        self._given, self._load = given, load
        self._if_absent, self._expect, self._refresh, self._identify = if_absent, expect, refresh, identify
        self._lenient = lenient
        self.reload()

    def reload(self) -> None:
        """Read the configuration again.  Raises ConfigError, and goes on with the one of before."""
        self.config: Config = self._load()
        self._by_nic = self._identify or self.config.matches_on("nic")
        self._by_mac = self.config.matches_on("mac")
        self._bridges = Bridges() if self.config.matches_on("bridge") else None
        self._remembered: dict[object, Wanted] = {}

    def __call__(self, tap: Tap) -> Wanted:
        """What is wanted of one tap.

        Where it takes to know the NIC and that is not known, ``identify`` of it says so.
        """
        nic, bridge = tap.nic, self._bridge(tap)
        nic_names = nic and (nic.id, nic.netdev, nic.mac)
        # The policy's hash stands for it: one may take up a hundred thousand bytes, and this is of one NIC.
        names = (tap.vm_name, nic_names, tap.name, bridge, tap.vm is not None, hash(_policy(tap)))
        if names not in self._remembered:
            # Who may start processes may make up any number of names.
            if len(self._remembered) >= _REMEMBERED_MAX:
                self._remembered.clear()
            self._remembered[names] = self._of(tap, bridge)
        return self._remembered[names]

    def settings(self, tap: Tap) -> Settings:
        """The settings of one tap, options and all."""
        return self._settings(tap, self._bridge(tap))[0]

    def refused(self, tap: Tap) -> tuple[str, ...]:
        """The words of the domain's policy that the configuration does not let count."""
        return self._settings(tap, self._bridge(tap))[1]

    def _bridge(self, tap: Tap) -> str | None:
        return self._bridges.of(tap) if self._bridges else None

    def _of(self, tap: Tap, bridge: str | None) -> Wanted:
        policy = _policy(tap)
        by_nic = self._by_nic or (policy is not None and policy.matches_on("alias"))
        by_mac = self._by_mac or (policy is not None and policy.matches_on("mac"))
        unknown = (by_nic and not tap.nic) or (by_mac and not (tap.nic and tap.nic.mac))
        return settings.wanted(
            self._settings(tap, bridge)[0],
            if_absent=self._if_absent,
            expect=self._expect,
            refresh=self._refresh,
            identify=bool(unknown and tap.vm and not self._refresh),
            lenient=self._lenient,
        )

    def _settings(self, tap: Tap, bridge: str | None) -> tuple[Settings, tuple[str, ...]]:
        policy, ids, mac = _policy(tap), _ids(tap), tap.nic.mac if tap.nic else None
        below = self.config.settings(vm=tap.vm_name, nics=ids, mac=mac, dev=tap.name, bridge=bridge)
        if policy is None:
            return settings.fold((below, self._given)), ()
        said, refused = domainpolicy.limited(policy.settings(ids, mac), self.config.libvirt.metadata, below)
        return settings.fold((below, said, self._given)), refused


def _policy(tap: Tap) -> Policy | None:
    return tap.domain.policy if tap.domain else None


def _ids(tap: Tap) -> tuple[str, ...]:
    """Of the NIC and of its netdev."""
    return tuple(name for name in (tap.nic.id, tap.nic.netdev) if name) if tap.nic else ()
