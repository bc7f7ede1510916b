# SPDX-License-Identifier: BSD-2-Clause
"""On which line each key of a TOML text stands, which tomllib does not tell.  Pure.

Theory of operation
===================

A scanner goes through the text once, and knows just enough of TOML 1.0: tables, arrays of tables, dotted and quoted
keys, inline tables and arrays, and where strings and comments end.  A path leads to a key as it does in what tomllib
gives: names, and numbers for the elements of arrays.  It never fails: of a text that is not TOML it finds the places up
to what is wrong, or something that is of no use.
"""

import bisect
import contextlib
import re
import tomllib

Path = tuple[str | int, ...]

NESTED_MAX = 32
"""How deep arrays and inline tables may be nested, and how many parts a key may have; nothing of qsteer's has four."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\.)*"|'[^'\n]*'""")
_STRING = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*"{3,5}|\'\'\'(?:[^']|'(?!''))*'{3,5}|"(?:[^"\\\n]|\\.)*"|'[^'\n]*\'''', re.DOTALL
)
_SCALAR = re.compile(r"[^,\]}#\n]+")


class _Lost(Exception):
    """This is not TOML."""


def places(text: str) -> dict[Path, int]:
    """The line, from 1 on, of each key and each table's first mention."""
    return _scanned(text).found


def longest_key(text: str) -> tuple[int, int]:
    """The parts of the key that has most of them, and its line."""
    return _scanned(text).longest


def _scanned(text: str) -> "_Scanner":
    scanner = _Scanner(text)
    with contextlib.suppress(_Lost):
        scanner.document()
    return scanner


class _Scanner:
    def __init__(self, text: str) -> None:
        self.found: dict[Path, int] = {}
        self.longest = (0, 0)
        self._text, self._at = text, 0
        self._line_starts = [0, *(match.end() for match in re.finditer("\n", text))]
        self._arrays: dict[Path, int] = {}

    def document(self) -> None:
        table: Path = ()
        while self._skip(_BLANK):
            if self._take("["):
                table = self._header(is_array=self._take("["))
            else:
                self._pair(table, 0)

    def _header(self, *, is_array: bool) -> Path:
        line = self._line()
        self._skip(_SPACE)
        path: Path = ()
        parts = self._key()
        for part in parts[:-1]:
            path = self._last((*path, part))
            self.found.setdefault(path, line)
        path = (*path, parts[-1])
        if is_array:
            self.found.setdefault(path, line)
            self._arrays[path] = self._arrays.get(path, -1) + 1
        path = self._last(path)
        self.found.setdefault(path, line)
        if not self._take("]]" if is_array else "]"):
            raise _Lost
        return path

    def _last(self, path: Path) -> Path:
        """Into an array of tables leads the last of them."""
        return (*path, self._arrays[path]) if path in self._arrays else path

    def _pair(self, table: Path, depth: int) -> None:
        line, path = self._line(), table
        for part in self._key():
            path = (*path, part)
            self.found.setdefault(path, line)
        if not self._take("="):
            raise _Lost
        self._value(path, depth)

    def _key(self) -> tuple[str, ...]:
        line, parts = self._line(), [self._key_part()]
        while self._take("."):
            self._skip(_SPACE)
            parts.append(self._key_part())
        self.longest = max(self.longest, (len(parts), line))
        if len(parts) > NESTED_MAX:
            raise _Lost
        return tuple(parts)

    def _key_part(self) -> str:
        raw = self._match(_KEY_PART)
        self._skip(_SPACE)
        if raw[0] == "'":
            return raw[1:-1]
        if raw[0] != '"':
            return raw
        try:
            return str(tomllib.loads(f"key = {raw}")["key"])
        except ValueError:
            raise _Lost from None

    def _value(self, path: Path, depth: int) -> None:
        if depth > NESTED_MAX:
            raise _Lost
        self._skip(_SPACE)
        if self._take("["):
            self._array(path, depth)
        elif self._take("{"):
            self._inline_table(path, depth)
        elif self._text[self._at : self._at + 1] in ('"', "'"):
            self._match(_STRING)
        else:
            self._match(_SCALAR)
        self._skip(_SPACE)

    def _array(self, path: Path, depth: int) -> None:
        number = 0
        while self._skip(_BLANK) and not self._take("]"):
            self.found[*path, number] = self._line()
            self._value((*path, number), depth + 1)
            number += 1
            self._skip(_BLANK)
            if not self._take(",") and self._text[self._at : self._at + 1] != "]":
                raise _Lost

    def _inline_table(self, path: Path, depth: int) -> None:
        self._skip(_SPACE)
        while not self._take("}"):
            self._pair(path, depth + 1)
            if not self._take(",") and self._text[self._at : self._at + 1] != "}":
                raise _Lost
            self._skip(_SPACE)

    def _line(self) -> int:
        return bisect.bisect_right(self._line_starts, self._at)

    def _take(self, wanted: str) -> bool:
        if not self._text.startswith(wanted, self._at):
            return False
        self._at += len(wanted)
        return True

    def _skip(self, what: re.Pattern[str]) -> bool:
        """Whether there is more."""
        if match := what.match(self._text, self._at):
            self._at = match.end()
        return self._at < len(self._text)

    def _match(self, what: re.Pattern[str]) -> str:
        match = what.match(self._text, self._at)
        if not match:
            raise _Lost
        self._at = match.end()
        return match[0]
