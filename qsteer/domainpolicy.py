# SPDX-License-Identifier: BSD-2-Clause
"""The policy in a libvirt domain: what its ``<metadata>`` says about the steering of its NICs.  Pure.

Theory of operation
===================

libvirt keeps one element of each foreign namespace in a domain, and hands it to every hook, into its status files, and
to wherever the domain migrates.  qsteer's is ``steering`` (docs/qsteer-domain.rng)::

    <metadata>
      <qsteer:steering xmlns:qsteer="urn:qsteer:domain:1" required="yes">
        <qsteer:interface types="tcp4,tcp6"/>
        <qsteer:interface alias="net0" equal="3"/>
        <qsteer:interface mac="52:54:00:aa:bb:cc" source="device-state" allow="pause"/>
      </qsteer:steering>
    </metadata>

An ``interface`` is for the NIC of its alias or MAC, and without either for every NIC; as in qsteer's configuration
later ones go over earlier ones, and what is said here goes over the configuration.  But who may write a domain is not
always who administers the host: the configuration says which words of a policy count (``settings.Libvirt``).

A policy with a mistake counts for nothing, but for ``required``: whoever insists on steering, be it for one NIC, does
not want to go without because of a typing error, be it in that word itself.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from qsteer import rss
from qsteer.errors import UsageError, printable
from qsteer.model import Engine, Interface, Source
from qsteer.plan import Static
from qsteer.settings import AUTO, Config, Settings, fold

NAMESPACE = "urn:qsteer:domain:1"
PREFIX = "qsteer"
STEERING = f"{{{NAMESPACE}}}steering"
INTERFACE = f"{{{NAMESPACE}}}interface"

NOTHING_SAID = Settings()

INTERFACES_MAX = 64
TEXT_MAX = 1024
"""Characters of one attribute; a table of 128 queues has 900 at most."""
MISTAKES_MAX = 8
_SHOWN_MAX = 60

_MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_TABLES = ("table", "equal", "weight")
_NO_TYPES = "none"
_BLANKS = " \t\r\n"
"""XML's, which may be anywhere between elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One ``interface``, for the NIC of an alias or of a MAC (lower case); for every NIC where both are None."""

    alias: str | None = None
    mac: str | None = None
    settings: Settings

    def is_for(self, nics: Collection[str], mac: str | None) -> bool:
        """Whether it is for a NIC with these ids, and this MAC."""
        return (self.alias is None or self.alias in nics) and (self.mac is None or self.mac == mac)


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A domain's policy.  ``required`` is that of all NICs.

    With ``mistakes`` there are no ``entries``, and what one of them insisted on is ``required`` of all NICs.
    """

    entries: tuple[Entry, ...] = ()
    required: bool | None = None
    mistakes: tuple[str, ...] = ()

    def settings(self, nics: Iterable[str], mac: str | None) -> Settings:
        """What is said about one NIC.  ``nics`` are its ids."""
        ids, mac = tuple(nics), mac.lower() if mac else None
        of_nic = (entry.settings for entry in self.entries if entry.is_for(ids, mac))
        return fold((Settings(required=self.required), *of_nic))

    def about_none_of(self, interfaces: Sequence[Interface]) -> tuple[str, ...]:
        """The aliases and MACs of which there is no NIC."""
        aliases, macs = {one.alias for one in interfaces}, {one.mac for one in interfaces}
        return tuple(
            " ".join(filter(None, (entry.alias, entry.mac)))
            for entry in self.entries
            if entry.alias not in (None, *aliases) or entry.mac not in (None, *macs)
        )

    def matches_on(self, kind: str) -> bool:
        """Whether some entry is about an ``alias``, or a ``mac``."""
        return any(getattr(entry, kind) is not None for entry in self.entries)


def limited(said: Settings, words: Collection[str], below: Settings = NOTHING_SAID) -> tuple[Settings, tuple[str, ...]]:
    """Of what a policy says what the administrator lets count, and the words that do not.

    ``words`` are those that do, and ``below`` is what the configuration says of the NIC: a policy may insist on
    steering that it does not insist on, but not the other way round, and a table of one's own is another source than
    the guest's.  Without its table or key, static steering is still wanted, by those of the configuration.
    """
    asked = {
        "source": said.source is not None and not said.static,
        "engine": said.engine is not None,
        "table": said.static.table is not None,
        "key": said.static.key is not None,
        "types": said.static.types is not None,
        "unclassified-queue": said.static.unclassified_queue is not None,
        "pause": bool(said.allow),
        "required": said.required is not None,
    }
    allowed = set(words)
    if "source" not in words and below.source not in (None, AUTO, Source.STATIC):
        allowed -= {"table", "key", "types", "unclassified-queue"}
    if below.required and not said.required:
        allowed -= {"required"}
    refused = tuple(word for word, is_asked in asked.items() if is_asked and word not in allowed)
    static = Static(
        types=None if "types" in refused else said.static.types,
        key=None if "key" in refused else said.static.key,
        table=None if "table" in refused else said.static.table,
        unclassified_queue=None if "unclassified-queue" in refused else said.static.unclassified_queue,
    )
    source = said.source
    if "source" in refused or (said.static and not static):
        source = None
    return replace(
        said,
        source=source,
        engine=None if "engine" in refused else said.engine,
        static=static,
        allow=None if "pause" in refused else said.allow,
        required=None if "required" in refused else said.required,
    ), refused


def of_interface(
    configured: Config, domain: str, policy: Policy | None, interface: Interface
) -> tuple[Settings, tuple[str, ...]]:
    """What is wanted of a NIC that need not be there yet, and the words of the policy that do not count."""
    ids = (interface.alias, f"host{interface.alias}") if interface.alias else ()  # libvirt's name for the netdev
    below = configured.settings(vm=domain, nics=ids, mac=interface.mac, dev=interface.target, bridge=interface.bridge)
    said, refused = limited((policy or Policy()).settings(ids, interface.mac), configured.libvirt.metadata, below)
    return fold((below, said)), refused


def find(metadata: Element | None) -> Policy | None:
    """The policy in a domain's ``metadata``; None if there is none."""
    element = metadata.find(STEERING) if metadata is not None else None
    return None if element is None else parse(element)


def parse(element: Element) -> Policy:
    """What a ``steering`` element says.  Raises nothing: what is wrong with it is in ``mistakes``."""
    mistakes: list[str] = []
    required = _attributes(element, _STEERING, "steering", mistakes).get("required")
    entries: list[Entry] = []
    for number, child in enumerate(element, 1):
        if number > INTERFACES_MAX:
            mistakes.append(f"more than {INTERFACES_MAX} elements")
            break
        if child.tag != INTERFACE:
            mistakes.append(f"<{_shown(_local(child.tag))}> is not interface of the namespace {NAMESPACE}")
        elif entry := _entry(child, number, mistakes):
            entries.append(entry)
    children = element[:INTERFACES_MAX]
    texts = (element.text, *(text for child in children for text in (child.text, child.tail)))
    if any(text and text.strip(_BLANKS) for text in texts) or any(map(len, children)):
        mistakes.append("text, or an element, where none belongs")
    if not mistakes:
        return Policy(entries=tuple(entries), required=required)
    if any(one.get("required", "no") != "no" for one in (element, *children)):
        required = True
    if (more := len(mistakes) - MISTAKES_MAX) > 0:
        mistakes = [*mistakes[:MISTAKES_MAX], f"mistakes that are not shown: {more}"]
    return Policy(required=required, mistakes=tuple(mistakes))


def to_xml(policy: Policy) -> str:
    """As libvirt wants it, which puts the namespace in: ``steering``, and an ``interface`` for each entry."""
    root = Element("steering", _said({"required": _word(policy.required)}))
    for entry in policy.entries:
        static, said = entry.settings.static, entry.settings
        attributes = {
            "alias": entry.alias,
            "mac": entry.mac,
            "source": None if static or said.source is None else str(said.source),
            "engine": None if said.engine is None else str(said.engine),
            "types": None if static.types is None else ",".join(rss.format_hash_types(static.types)) or _NO_TYPES,
            "key": None if static.key is None else rss.format_key(static.key),
            **_table(static.table),
            "unclassified-queue": None if static.unclassified_queue is None else str(static.unclassified_queue),
            "allow": ",".join(said.allow) if said.allow else None,
            "required": _word(said.required),
        }
        ElementTree.SubElement(root, "interface", _said(attributes))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode")


def _said(attributes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in attributes.items() if value is not None}


def _word(value: bool | None) -> str | None:
    return None if value is None else "yes" if value else "no"


def _table(table: tuple[int, ...] | None) -> dict[str, str]:
    if table is None:
        return {}
    word, numbers = rss.table_in_words(table)
    return {word: ",".join(map(str, numbers))}


def _entry(element: Element, number: int, mistakes: list[str]) -> Entry | None:
    before = len(mistakes)
    name = element.get("alias") or element.get("mac") or str(number)
    where = f"interface {_shown(name)}"
    said = _attributes(element, _INTERFACE, where, mistakes)
    tables = [word for word in _TABLES if word in said]
    if len(tables) > 1:
        mistakes.append(f"{where}: {' and '.join(tables)}: one of them")
    static = Static(
        types=said.get("types"),
        key=said.get("key"),
        table=said[tables[0]] if tables else None,
        unclassified_queue=said.get("unclassified-queue"),
    )
    source = said.get("source")
    if static and source not in (None, Source.STATIC):
        mistakes.append(f"{where}: source {source} takes the guest's table, not one of the policy")
    if len(mistakes) > before:
        return None
    settings = Settings(
        source=Source.STATIC if static else source,
        engine=said.get("engine"),
        static=static,
        allow=said.get("allow"),
        required=said.get("required"),
    )
    return Entry(alias=said.get("alias"), mac=said.get("mac"), settings=settings)


def _attributes(
    element: Element, checks: Mapping[str, Callable[[str], object]], where: str, mistakes: list[str]
) -> dict[str, Any]:
    said: dict[str, Any] = {}
    if unknown := [name for name in element.attrib if name not in checks]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        mistakes.append(f"{where}: unknown attribute {_shown(unknown[0])}{more} (known: {', '.join(checks)})")
    for name, check in checks.items():
        text = element.get(name)
        if text is None:
            continue
        try:
            if len(text) > TEXT_MAX:
                raise UsageError(f"more than {TEXT_MAX} characters")
            if name != "alias" and not text.isascii():
                raise UsageError("plain letters and digits are wanted")
            said[name] = check(text)
        except UsageError as error:
            mistakes.append(f"{where}: {name}: {printable(error.message)[: 4 * _SHOWN_MAX]}")
    return said


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def _shown(text: str) -> str:
    return printable(text[:_SHOWN_MAX])


def _truth(text: str) -> bool:
    if text not in ("yes", "no"):
        raise UsageError(f'"{text}" is neither yes nor no')
    return text == "yes"


def _choice(*known: str) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise UsageError(f'"{text}" is none of {", ".join(known)}')
        return text

    return check


def _source(text: str) -> str:
    source = _choice(AUTO, *Source)(text)
    return source if source == AUTO else Source(source)


def _engine(text: str) -> str:
    engine = _choice(AUTO, *Engine)(text)
    return engine if engine == AUTO else Engine(engine)


def _alias(text: str) -> str:
    if not text or not text.isprintable():
        raise UsageError("an alias is wanted, such as net0, or ua-mine")
    return text


def _mac(text: str) -> str:
    if not _MAC.fullmatch(text.lower()):
        raise UsageError(f'"{text}" is not a MAC')
    return text.lower()


def _types(text: str) -> rss.HashType:
    return rss.HashType(0) if text == _NO_TYPES else rss.parse_hash_types(text)


def _queues(text: str) -> tuple[int, ...]:
    queues = rss.parse_numbers("queues", text)
    return rss.RssConfig(types=rss.BASE_TYPES, key=bytes(rss.KEY_BYTES), table=queues).table


def _allow(text: str) -> tuple[str, ...]:
    return tuple(_choice("pause")(word.strip()) for word in text.split(","))


_STEERING: Mapping[str, Callable[[str], object]] = {"required": _truth}
_INTERFACE: Mapping[str, Callable[[str], object]] = {
    "alias": _alias,
    "mac": _mac,
    "source": _source,
    "engine": _engine,
    "types": _types,
    "key": rss.parse_key,
    "table": _queues,
    "equal": lambda text: rss.equal_table(rss.parse_number("queues", text)),
    "weight": lambda text: rss.weighted_table(rss.parse_numbers("weights", text)),
    "unclassified-queue": lambda text: rss.parse_number("queue", text),
    "allow": _allow,
    "required": _truth,
}
