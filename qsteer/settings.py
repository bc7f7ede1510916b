# SPDX-License-Identifier: BSD-2-Clause
"""What an administrator, or who calls qsteer, has said about NICs, and which of it holds for one.  Pure.

Theory of operation
===================

A level is one ``Settings``: an entry of the configuration that matches the NIC, or the options of a command.  ``fold``
lays levels over each other, the later ones over the earlier ones, key by key.  Only the RSS configuration is a matter
of its own: a level that names a source other than ``static`` takes the static configuration of the levels below away,
and one that has a static configuration makes the source ``static``.
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal

from qsteer.model import Engine, Source
from qsteer.plan import Static, Wanted

if TYPE_CHECKING:
    from qsteer.access import Rule
    from qsteer.runplan import Rss, Vhost

AUTO: Final = "auto"
_NOTHING = Static()
_SPECIAL = frozenset("*?[")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is said about one NIC; None, and an empty ``static``, where nothing is.

    ``source``, ``engine``, ``hash_report``, ``static``, ``allow``, ``replace`` and ``force`` are those of ``apply`` and
    ``keep``.  ``queues``,
    ``vhost``, ``rss``, ``bridge`` ("" is none) and ``mtu`` are what ``run``, ``plug`` and qsteer-ifup make, and
    ``required`` is qsteer-ifup's: no steering, no VM.
    """

    source: Source | Literal["auto"] | None = None
    engine: Engine | Literal["auto"] | None = None
    hash_report: bool | None = None
    static: Static = _NOTHING
    allow: tuple[str, ...] | None = None
    replace: bool | None = None
    force: bool | None = None
    queues: int | None = None
    vhost: "Vhost | None" = None
    rss: "Rss | None" = None
    bridge: str | None = None
    mtu: int | None = None
    required: bool | None = None


def fold(levels: Iterable[Settings]) -> Settings:
    """All levels in one, the first of them the lowest."""
    folded = Settings()
    for level in levels:
        said = {field.name: getattr(level, field.name) for field in fields(level)}
        said = {name: value for name, value in said.items() if value is not None}
        said["static"] = _over(folded.static, level)
        if level.static:
            said["source"] = Source.STATIC
        folded = replace(folded, **said)
    return folded


def _over(below: Static, level: Settings) -> Static:
    if level.source not in (None, Source.STATIC):
        below = Static()
    said = {field.name: getattr(level.static, field.name) for field in fields(level.static)}
    return replace(below, **{name: value for name, value in said.items() if value is not None})


def wanted(
    settings: Settings,
    *,
    if_absent: bool = False,
    expect: str | None = None,
    refresh: bool = False,
    identify: bool = False,
    lenient: bool = False,
) -> Wanted:
    """What ``apply`` and ``keep`` do with settings.  ``refresh`` keeps the configuration, whatever is set."""
    source = settings.source if isinstance(settings.source, Source) and not refresh else None
    return Wanted(
        source=source,
        engine=settings.engine if isinstance(settings.engine, Engine) else None,
        report=settings.hash_report,
        lenient=lenient,
        static=settings.static if source else Static(),
        replace=bool(settings.replace),
        force=bool(settings.force),
        if_absent=if_absent,
        expect=expect,
        refresh=refresh,
        allow_pause="pause" in (settings.allow or ()),
        identify=identify,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Which NICs an entry is about: shell patterns (fnmatchcase).  Kinds AND, patterns of one kind OR, none: every NIC.

    What is not known of a NIC matches no pattern.
    """

    vm: tuple[str, ...] = ()
    nic: tuple[str, ...] = ()
    mac: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    bridge: tuple[str, ...] = ()

    def __call__(
        self, *, vm: str | None, nics: Iterable[str], mac: str | None, dev: str | None, bridge: str | None
    ) -> bool:
        """``nics`` are the NIC's id and that of its netdev, ``mac`` is in lower case."""
        return (
            _any(self.vm, (vm,))
            and _any(self.nic, nics)
            and _any(self.mac, (mac,))
            and _any(self.dev, (dev,))
            and _any(self.bridge, (bridge,))
        )


def _any(patterns: tuple[str, ...], names: Iterable[str | None]) -> bool:
    return not patterns or any(_fits(name, pattern) for name in names if name is not None for pattern in patterns)


def _fits(name: str, pattern: str) -> bool:
    # A thousand VMs may each have an entry of their own: most patterns are names.
    return name == pattern if _SPECIAL.isdisjoint(pattern) else fnmatchcase(name, pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One ``[[nic]]``."""

    match: Match
    settings: Settings


@dataclass(frozen=True, slots=True, kw_only=True)
class Serve:
    """``[serve]``: connections at once, of those for one user, and seconds that a request may take."""

    clients: int = 32
    clients_per_user: int = 4
    timeout_s: float = 2.0


METADATA_WORDS = ("source", "engine", "table", "key", "types", "unclassified-queue", "required", "pause")
"""What a policy in a libvirt domain can ask for; ``table`` is ``equal`` and ``weight``, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Libvirt:
    """``[libvirt]``: what the hook steers, and which METADATA_WORDS count in the policies of domains.

    With ``steer`` POLICY that is what a policy or an entry is about, else every multi-queue NIC.  To stop a VM is not
    for whoever can write a domain, unless the administrator says so.
    """

    steer: Literal["all", "policy"] = "all"
    metadata: tuple[str, ...] = tuple(word for word in METADATA_WORDS if word != "pause")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All files together: entries and rules in their order, the last of which wins."""

    entries: tuple[Entry, ...] = ()
    serve: Serve = Serve()
    libvirt: Libvirt = Libvirt()
    rules: "tuple[Rule, ...]" = ()

    def settings(
        self,
        *,
        vm: str | None = None,
        nics: Iterable[str] = (),
        mac: str | None = None,
        dev: str | None = None,
        bridge: str | None = None,
    ) -> Settings:
        """What is set for one NIC.

        ``nics`` are its id and that of its netdev, ``dev`` its tap, ``bridge`` the one that the tap is in, or is to
        join; None where there is none, or that is not known.
        """
        names, mac = tuple(nics), mac.lower() if mac else None
        return fold(
            entry.settings for entry in self.entries if entry.match(vm=vm, nics=names, mac=mac, dev=dev, bridge=bridge)
        )

    def matches_on(self, kind: str) -> bool:
        """Whether some entry is about ``vm``, ``nic``, ``mac``, ``dev`` or ``bridge``."""
        return any(getattr(entry.match, kind) for entry in self.entries)
