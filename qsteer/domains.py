# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer libvirt show`` and ``set``: the policy in a domain, and what the configuration makes of it.

This speaks to libvirt (``virsh``), which a hook must not: it is for the command line.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from qsteer import config, domainpolicy, libvirt, settings
from qsteer.domainpolicy import INTERFACES_MAX, NAMESPACE, PREFIX, Entry, Policy
from qsteer.errors import QsteerError, UsageError
from qsteer.libvirt import Description
from qsteer.model import Interface
from qsteer.settings import Settings
from qsteer.virsh import Virsh


@dataclass(frozen=True, slots=True, kw_only=True)
class NicPolicy:
    """What is wanted of one NIC of a domain, and the words of its policy that do not count."""

    interface: Interface
    wanted: Settings
    refused: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A domain, its policy, and what comes of it."""

    domain: Description
    nics: tuple[NicPolicy, ...]

    @property
    def doubts(self) -> tuple[str, ...]:
        """What may not be meant: NICs that are not there, queues that are not, words that do not count."""
        policy = self.domain.policy or Policy()
        doubts = [f"the policy is about a NIC {nic}, which there is not" for nic in policy.about_none_of(self._nics())]
        for nic in self.nics:
            name, queues = nic.interface.alias or nic.interface.mac, nic.interface.queues or 1
            doubts += [
                f"{name}: the configuration does not let the policy ask for {word} ([libvirt] metadata)"
                for word in nic.refused
            ]
            static = nic.wanted.static
            most = max((*(static.table or ()), static.unclassified_queue or 0))
            if most >= queues:
                doubts.append(f"{name}: queue {most} of {queues}, 0 to {queues - 1}: the kernel folds it (modulo)")
        return tuple(doubts)

    def _nics(self) -> tuple[Interface, ...]:
        return tuple(nic.interface for nic in self.nics)

    @property
    def mistakes(self) -> tuple[str, ...]:
        """Of the policy."""
        return self.domain.policy.mistakes if self.domain.policy else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What ``set`` writes into one place: the domain that runs (``live``), or its configuration, or both.

    ``xml`` None takes the policy away.
    """

    xml: str | None
    live: bool
    config: bool


def show(virsh: Virsh) -> Shown:
    """The domain as it runs, else as it will start.  Raises QsteerError."""
    domain = _describe(virsh, inactive=False)
    configured = config.load()
    nics = []
    for interface in domain.interfaces:
        wanted, refused = domainpolicy.of_interface(configured, domain.name, domain.policy, interface)
        nics.append(NicPolicy(interface=interface, wanted=wanted, refused=refused))
    return Shown(domain=domain, nics=tuple(nics))


def plan_set(virsh: Virsh, *, alias: str | None, mac: str | None, said: Settings, clear: bool) -> tuple[Written, ...]:
    """What ``set`` is going to write: into the domain that runs and its configuration, which may differ.

    ``said`` goes over what a policy says already of the NIC of that alias or MAC, of every NIC where both are None;
    with ``clear`` nothing is said of it any more.  Raises QsteerError; UsageError for an alias or MAC of no NIC, unless
    it is there to be cleared.
    """
    live, persistent = virsh.is_running(), virsh.is_persistent()
    of_live = [False] * persistent + [True] * live
    places = [_describe(virsh, inactive=not one) for one in of_live]
    policies = [place.policy or Policy() for place in places]
    mistakes = [mistake for policy in policies for mistake in policy.mistakes]
    if mistakes and not (clear and alias is None and mac is None):
        raise UsageError(f"the policy that is there has a mistake: {mistakes[0]}", hint="virsh edit, or --clear")
    if not (clear and any((one.alias, one.mac) == (alias, mac) for policy in policies for one in policy.entries)):
        _check_nic(places, alias, mac)
    entry = Entry(alias=alias, mac=mac, settings=said)
    texts = [_text(_changed(policy, entry, clear=clear)) for policy in policies]
    if len(texts) == 2 and texts[0] == texts[1]:
        return (Written(xml=texts[0], live=True, config=True),)
    return tuple(Written(xml=text, live=one, config=not one) for text, one in zip(texts, of_live, strict=True))


def _text(policy: Policy) -> str | None:
    if len(policy.entries) > INTERFACES_MAX:
        raise UsageError(
            f"the policy would be of more than {INTERFACES_MAX} interfaces", hint="--clear --nic ALIAS for those gone"
        )
    return domainpolicy.to_xml(policy) if policy.entries or policy.required is not None else None


def write(virsh: Virsh, what: Sequence[Written]) -> None:
    """Raises QsteerError."""
    for one in what:
        virsh.set_metadata(NAMESPACE, PREFIX, one.xml, live=one.live, config=one.config)


def _describe(virsh: Virsh, *, inactive: bool) -> Description:
    domain = libvirt.describe(virsh.xml(inactive=inactive))
    if not domain:
        raise QsteerError("what virsh dumpxml tells is no domain")
    return replace(domain, interfaces=_with_aliases(domain.interfaces))


def _with_aliases(interfaces: Iterable[Interface]) -> tuple[Interface, ...]:
    """As a start will call them: those without an alias of the user's get net0, net1, ... but for hostdevs."""
    numbers = itertools.count()
    return tuple(
        one if one.alias or one.kind == "hostdev" else replace(one, alias=f"net{next(numbers)}") for one in interfaces
    )


def _check_nic(places: Sequence[Description], alias: str | None, mac: str | None) -> None:
    """Raises UsageError where there is no such NIC: none that is there now, or at the next start."""
    nics = [nic for place in places for nic in place.interfaces]
    for name, names in ((alias, [nic.alias for nic in nics]), (mac, [nic.mac for nic in nics])):
        known = dict.fromkeys(one for one in names if one)
        if name is not None and name not in known:
            hint = f"it has {', '.join(known) or 'none'}"
            raise UsageError(f'domain "{places[0].name}" has no NIC "{name}"', hint=hint)


def _changed(policy: Policy, entry: Entry, *, clear: bool) -> Policy:
    """With one entry instead of those for the same NIC: the last, so that it counts; those for all NICs come first."""
    is_of_all = entry.alias is None and entry.mac is None
    if clear and is_of_all:
        return Policy()
    same = [one for one in policy.entries if (one.alias, one.mac) == (entry.alias, entry.mac)]
    others = tuple(one for one in policy.entries if one not in same)
    if clear:
        return replace(policy, entries=others)
    said = settings.fold([*(one.settings for one in same), entry.settings])
    if not is_of_all:
        return replace(policy, entries=(*others, replace(entry, settings=said)))
    required = policy.required if said.required is None else said.required
    said = replace(said, required=None)
    of_all = (replace(entry, settings=said),) if said != Settings() else ()
    return replace(policy, required=required, entries=(*of_all, *others))
