# SPDX-License-Identifier: BSD-2-Clause
"""The text of one file of the configuration: what it says, and every mistake in it with its line.  Pure."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from qsteer import rss, tomlplaces
from qsteer.access import Rule
from qsteer.errors import UsageError
from qsteer.model import Engine, Source
from qsteer.plan import Static
from qsteer.runplan import MTU_MAX, MTU_MIN, QUEUES_MAX, Rss, Vhost
from qsteer.settings import AUTO, METADATA_WORDS, Entry, Match, Settings

PATTERN_MAX = 1024
"""Longest pattern, in characters."""
CLIENTS_MAX = 1024
TIMEOUT_MAX_S = 3600
_NAME_MAX = 256
_DEVICE_NAME_MAX = 15
_SHOWN_MAX = 40
_DOTS_MAX = 64
"""A line with more dots is looked at before tomllib takes a time that is the square of their number."""

_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_DIGITS = re.compile(r"[0-9][0-9_]{4000}")
_ANY_PATTERN = re.compile(r"(?:\[!?\]?[^\]]*\]|[^\[])+")
_MAC_PATTERN = re.compile(r"[0-9a-fA-F:*?!\[\]-]+")

Check = Callable[[Any], object]
"""Gives what a value of tomllib's means.  Raises UsageError."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """What is wrong.  ``line`` is 0 where it is the file itself."""

    file: str
    line: int
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}" if self.line else f"{self.file}: {self.message}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """One file.  ``serve`` and ``libvirt`` are those fields of ``settings.Serve`` and ``Libvirt`` that it sets."""

    entries: tuple[Entry, ...] = ()
    serve: Mapping[str, Any]
    libvirt: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()
    mistakes: tuple[Mistake, ...] = ()


def parse(text: str, file: str) -> Parsed:
    """What a text says; of what has a mistake nothing."""
    reader = _Reader(text, file)
    if any(line.count(".") > _DOTS_MAX for line in text.split("\n")):
        parts, line = tomlplaces.longest_key(text)
        if parts > tomlplaces.NESTED_MAX:
            reader.mistake_at(line, f"a key of {parts} parts")
            return reader.parsed()
    try:
        document = tomllib.loads(text)
    except RecursionError:
        reader.mistake_at(1, "arrays or tables are nested too deep")
    except tomllib.TOMLDecodeError as error:
        reader.not_toml(str(error))
    except ValueError:  # Python's own, of a number with thousands of digits
        reader.mistake_at(1 + text.count("\n", 0, _place_of_digits(text)), "a number of too many digits")
    else:
        reader.read(document)
    return reader.parsed()


class _Reader:
    def __init__(self, text: str, file: str) -> None:
        self._text, self._file = text, file
        self._places: dict[tomlplaces.Path, int] | None = None
        self._entries: list[Entry] = []
        self._serve: dict[str, Any] = {}
        self._libvirt: dict[str, Any] = {}
        self._rules: list[Rule] = []
        self._mistakes: list[Mistake] = []

    def parsed(self) -> Parsed:
        return Parsed(
            entries=tuple(self._entries),
            serve=self._serve,
            libvirt=self._libvirt,
            rules=tuple(self._rules),
            mistakes=tuple(sorted(self._mistakes, key=lambda mistake: mistake.line)),
        )

    def mistake_at(self, line: int, message: str, hint: str = "") -> None:
        self._mistakes.append(Mistake(file=self._file, line=line, message=message, hint=hint))

    def not_toml(self, message: str) -> None:
        """What tomllib says, without the place at its end."""
        place = _PLACE.search(message)
        last = self._text.rstrip("\n").count("\n") + 1
        line = int(place[1]) if place and place[1] else last
        message = message[: place.start()] if place else message
        hint = 'text stands in quotes: vm = "web1"' if message.startswith("Invalid value") else ""
        self.mistake_at(line, f"this is not TOML: {message}", hint)

    def read(self, document: Mapping[str, Any]) -> None:
        for key, value in document.items():
            if key == "nic":
                for path, table in self._tables((key,), value):
                    self._nic(path, table)
            elif key == "serve":
                self._read_serve((key,), value)
            elif key == "libvirt":
                if self._is_table((key,), value):
                    self._libvirt = self._fields((key,), value, _LIBVIRT)
            else:
                self._unknown((key,), ("libvirt", "nic", "serve"))

    def _nic(self, path: tomlplaces.Path, table: Mapping[str, Any]) -> None:
        before = len(self._mistakes)
        said = self._fields(path, table, _NIC, apart=("match",))
        patterns: Mapping[str, Any] = {}
        if "match" in table:
            patterns = self._match((*path, "match"), table["match"])
        static = self._static(path, said)
        if static and said.get("source") not in (None, Source.STATIC):
            self._wrong((*path, "source"), f"source {said['source']} takes the guest's table, not one of yours")
        if len(self._mistakes) > before:
            return
        settings = {key.replace("-", "_"): value for key, value in said.items() if key not in _STATIC}
        self._entries.append(Entry(match=Match(**patterns), settings=Settings(**settings, static=static)))

    def _match(self, path: tomlplaces.Path, value: Any) -> dict[str, Any]:
        if isinstance(value, dict):
            return self._fields(path, value, _MATCH)
        self._wrong(path, f"match: a table is wanted, not {_shown(value)}", 'match.vm = "web-*"')
        return {}

    def _static(self, path: tomlplaces.Path, said: Mapping[str, Any]) -> Static:
        tables = [key for key in ("table", "equal", "weight") if key in said]
        if len(tables) > 1:
            second = max(tables, key=lambda key: self._line((*path, key)))
            others = " and ".join(f'"{key}"' for key in tables if key != second)
            self._wrong((*path, second), f'"{second}" besides {others}', "one of table, equal and weight")
        return Static(
            types=said.get("types"),
            key=said.get("key"),
            table=said[tables[0]] if tables else None,
            unclassified_queue=said.get("unclassified-queue"),
        )

    def _read_serve(self, path: tomlplaces.Path, value: Any) -> None:
        if not self._is_table(path, value):
            return
        said = self._fields(path, value, _SERVE, apart=("allow",))
        self._serve = {_SERVE_FIELDS[key]: number for key, number in said.items()}
        for place, table in self._tables((*path, "allow"), value.get("allow", [])):
            self._rule(place, table)

    def _is_table(self, path: tomlplaces.Path, value: Any) -> bool:
        if not isinstance(value, dict):
            self._wrong(path, f"{path[-1]}: a table is wanted, not {_shown(value)}", f"[{path[-1]}]")
        return isinstance(value, dict)

    def _rule(self, path: tomlplaces.Path, table: Mapping[str, Any]) -> None:
        before = len(self._mistakes)
        rule = Rule(**self._fields(path, table, _RULE))
        if len(self._mistakes) == before:
            self._check_rule(path, rule)
        if len(self._mistakes) == before:
            self._rules.append(rule)

    def _check_rule(self, path: tomlplaces.Path, rule: Rule) -> None:
        if rule.user is not None and rule.group is not None:
            self._wrong(path, "both a user and a group", "one entry for each")
        elif rule.user is None and rule.group is None:
            self._wrong(path, "neither a user nor a group: whom is it for?", 'user = "alice"')
        if bool(rule.taps) != bool(rule.queues):
            given, missing = ("taps", "queues") if rule.taps else ("queues", "taps")
            self._wrong(path, f"{given} without {missing}: it allows no tap", "say both, or neither")
        elif rule.taps and not rule.prefix:
            self._wrong(path, "taps without a prefix", 'what their names begin with: prefix = "al-"')

    def _tables(self, path: tomlplaces.Path, value: Any) -> Iterable[tuple[tomlplaces.Path, Mapping[str, Any]]]:
        """The elements of an array of tables; anything else is a mistake."""
        name = ".".join(map(str, path))
        if not isinstance(value, list):
            self._wrong(path, f"{name}: an array of tables is wanted, not {_shown(value)}", f"[[{name}]]")
            return
        for number, table in enumerate(value):
            if isinstance(table, dict):
                yield (*path, number), table
            else:
                self._wrong((*path, number), f"{name}: a table is wanted, not {_shown(table)}", f"[[{name}]]")

    def _fields(
        self, path: tomlplaces.Path, table: Mapping[str, Any], checks: Mapping[str, Check], apart: tuple[str, ...] = ()
    ) -> dict[str, Any]:
        """What the keys of a table mean, but for those that are read apart."""
        said: dict[str, Any] = {}
        for key, value in table.items():
            if key in apart:
                continue
            if key not in checks:
                self._unknown((*path, key), (*checks, *apart))
                continue
            try:
                said[key] = checks[key](value)
            except UsageError as error:
                self._wrong((*path, key), f"{key}: {error.message}", error.hint)
        return said

    def _unknown(self, path: tomlplaces.Path, known: tuple[str, ...]) -> None:
        from difflib import get_close_matches

        key = str(path[-1])
        close = get_close_matches(key[:_NAME_MAX], known, 1)
        if not close and "match" in known and key in _MATCH:
            close = [f"match.{key}"]
        where = f" in {'.'.join(str(part) for part in path[:-1] if isinstance(part, str))}" if path[:-1] else ""
        hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
        self._wrong(path, f"unknown key {_shown(key)}{where}", hint)

    def _wrong(self, path: tomlplaces.Path, message: str, hint: str = "") -> None:
        self.mistake_at(self._line(path), message, hint)

    def _line(self, path: tomlplaces.Path) -> int:
        """That of a key, else that of what it is in."""
        if self._places is None:
            # tomllib takes CRLF for the end of a line, and so does the scanner.
            self._places = tomlplaces.places(self._text)
        while path and path not in self._places:
            path = path[:-1]
        return self._places.get(path, 1)


def _place_of_digits(text: str) -> int:
    found = _DIGITS.search(text)
    return found.start() if found else 0


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value[:_SHOWN_MAX]}"' if len(value) <= _SHOWN_MAX else f'"{value[:_SHOWN_MAX]}..."'
    if isinstance(value, int | float):
        # Python refuses to write numbers out that are longer than any that is meant.
        return str(value) if -1e18 < value < 1e18 else "such a number"
    return "a table" if isinstance(value, dict) else "an array" if isinstance(value, list) else "a date or time"


def _text(value: Any) -> str:
    if not isinstance(value, str):
        hint = f'"{value}"' if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1e18 else ""
        raise UsageError(f"text is wanted, not {_shown(value)}", hint=hint)
    return value


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"true or false is wanted, not {_shown(value)}")
    return value


def _whole(least: int, most: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UsageError(f"a whole number from {least} to {most} is wanted, not {_shown(value)}")
        return value

    return check


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.01 <= value <= TIMEOUT_MAX_S:
        raise UsageError(f"seconds from 0.01 to {TIMEOUT_MAX_S} are wanted, not {_shown(value)}")
    return float(value)


def _each(value: Any, check: Callable[[Any], Any]) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise UsageError(f"an array is wanted, not {_shown(value)}", hint="[..., ...]")
    return tuple(check(element) for element in value)


def _choice(*known: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise UsageError(f"{_shown(value)} is none of {', '.join(known)}")
        return value

    return check


def _source(value: Any) -> str:
    source = _choice(AUTO, *Source)(value)
    return source if source == AUTO else Source(source)


def _engine(value: Any) -> str:
    engine = _choice(AUTO, *Engine)(value)
    return engine if engine == AUTO else Engine(engine)


def _types(value: Any) -> rss.HashType:
    types = rss.HashType(0)
    for name in _each(value, _choice(*rss.HASH_TYPE_NAMES)):
        types |= rss.HASH_TYPE_NAMES[name]
    return types


def _key(value: Any) -> bytes:
    text = _text(value)
    if text == "random":
        raise UsageError("random would be another one each time", hint="without a key one is made once for each tap")
    if len(text) > 4 * rss.KEY_BYTES:
        raise UsageError(f"a hash key has {rss.KEY_BYTES} bytes, not {len(text)} characters")
    return rss.parse_key(text)


def _queues(value: Any) -> tuple[int, ...]:
    return _each(value, _whole(0, 0xFFFF))


def _table(value: Any) -> tuple[int, ...]:
    return rss.RssConfig(types=rss.BASE_TYPES, key=bytes(rss.KEY_BYTES), table=_queues(value)).table


def _equal(value: Any) -> tuple[int, ...]:
    return rss.equal_table(_whole(1, 0xFFFF)(value))


def _weight(value: Any) -> tuple[int, ...]:
    return rss.weighted_table(_queues(value))


def _allow(value: Any) -> tuple[str, ...]:
    return _each(value, _choice("pause"))


def _device(value: Any) -> str:
    """A network device's name by the kernel's rule, or none."""
    name = _text(value)
    if name in (".", "..") or not name.isprintable() or any(character in "/:% " for character in name):
        raise UsageError(f"{_shown(name)} is not a network device's name")
    if len(name.encode()) > _DEVICE_NAME_MAX:
        raise UsageError(f"{_shown(name)} is longer than a network device's name, {_DEVICE_NAME_MAX} bytes")
    return name


def _prefix(value: Any) -> str:
    name = _device(value)
    if len(name.encode()) > _DEVICE_NAME_MAX - 1:
        raise UsageError(f"{_shown(name)} leaves no room for the rest of a name")
    return name


def _who(value: Any) -> str:
    name = _text(value)
    if not name or not name.isprintable() or len(name) > _NAME_MAX or ":" in name:
        raise UsageError(f"{_shown(name)} is not a user's or group's name, or number")
    return name


def _pattern(value: Any) -> str:
    pattern = _text(value)
    if len(pattern) > PATTERN_MAX:
        raise UsageError(f"a pattern of more than {PATTERN_MAX} characters")
    if pattern and not _ANY_PATTERN.fullmatch(pattern):
        raise UsageError(f'{_shown(pattern)}: "[" without "]"', hint='a bracket itself is "[[]"')
    return pattern


def _patterns(value: Any) -> tuple[str, ...]:
    """One pattern, or an array of them."""
    patterns = _each(value, _pattern) if isinstance(value, list) else (_pattern(value),)
    if not patterns or "" in patterns:
        raise UsageError("an empty pattern matches nothing", hint='"*" matches all')
    return patterns


def _macs(value: Any) -> tuple[str, ...]:
    patterns = _patterns(value)
    for pattern in patterns:
        if not _MAC_PATTERN.fullmatch(pattern):
            raise UsageError(f"{_shown(pattern)} is no pattern of a MAC", hint="52:54:00:*")
    return tuple(pattern.lower() for pattern in patterns)


_STATIC: dict[str, Check] = {
    "types": _types,
    "key": _key,
    "table": _table,
    "equal": _equal,
    "weight": _weight,
    "unclassified-queue": _whole(0, 0xFFFF),
}
_NIC: dict[str, Check] = {
    "source": _source,
    "engine": _engine,
    "hash-report": _truth,
    **_STATIC,
    "allow": _allow,
    "replace": _truth,
    "force": _truth,
    "queues": _whole(1, QUEUES_MAX),
    "vhost": lambda value: Vhost(_choice(*Vhost)(value)),
    "rss": lambda value: Rss(_choice(*Rss)(value)),
    "bridge": _device,
    "mtu": _whole(MTU_MIN, MTU_MAX),
    "required": _truth,
}
_MATCH: dict[str, Check] = {"vm": _patterns, "nic": _patterns, "mac": _macs, "dev": _patterns, "bridge": _patterns}
_LIBVIRT: dict[str, Check] = {
    "steer": _choice("all", "policy"),
    "metadata": lambda value: _each(value, _choice(*METADATA_WORDS)),
}
_SERVE: dict[str, Check] = {
    "clients": _whole(1, CLIENTS_MAX),
    "clients-per-user": _whole(1, CLIENTS_MAX),
    "timeout": _seconds,
}
_SERVE_FIELDS = {"clients": "clients", "clients-per-user": "clients_per_user", "timeout": "timeout_s"}
_RULE: dict[str, Check] = {
    "user": _who,
    "group": _who,
    "bridges": lambda value: _each(value, _pattern),
    "prefix": _prefix,
    "queues": _whole(0, QUEUES_MAX),
    "taps": _whole(0, 0xFFFF),
    "vhost": _truth,
    "programs": _truth,
}
