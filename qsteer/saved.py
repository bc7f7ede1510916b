# SPDX-License-Identifier: BSD-2-Clause
"""``apply --save``: one file of conf.d for each NIC, which says what was asked for.

Its first line says whose it is; a file that is somebody else's is never touched.  It is made whole, and renamed into
its place.  The names in it are those that a QEMU gives itself: they are bounded, and escaped three times over, for the
file's name, for the pattern, and for TOML.
"""

import contextlib
import glob
import hashlib
import os
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from qsteer import config, configtext, settings
from qsteer.errors import QsteerError, UsageError, from_errno
from qsteer.model import Source, Tap
from qsteer.rss import format_hash_types, format_key, table_in_words
from qsteer.settings import AUTO, Settings

MARK = '# Written by "qsteer apply --save", which writes it anew; put what is yours into another file.'
_PREFIX = "90-saved-"
_NAME_MAX = 80
"""Longest name of a VM or NIC, in characters as they stand in the file's name, that does."""
_FOREIGN_HINT = "move it away, or say in it what is wanted"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One that is to be written."""

    path: Path
    content: str


def plan(tap: Tap, given: Settings, effective: Settings) -> File:
    """The file for one tap's NIC, such that ``apply`` without options does the same from now on.

    ``given`` are the options, which go over what the file says already; ``effective`` is what was made of them and of
    the whole configuration: it says the source if nothing else does.  Raises QsteerError where that cannot be said in
    a file, or the file is not qsteer's.
    """
    match = _match(tap)
    path = config.directory() / config.MORE / _file_name(tap)
    levels = (*_stored(path), given)
    said = settings.fold(levels)
    source = said.source or effective.source or AUTO
    try:
        entry = ["[[nic]]", *(f"match.{kind} = {_string(glob.escape(name))}" for kind, name in match)]
    except UsageError as error:
        raise UsageError(f'tap "{tap.name}": what is wanted cannot be saved: {error}', hint=error.hint) from None
    lines = [MARK]
    if source is Source.STATIC and any(level.source not in (None, Source.STATIC) for level in levels):
        # The tables of other files were taken away once: they must not come back.
        lines += [*entry, f'source = "{AUTO}"']
    lines += [*entry, f'source = "{source}"', *lines_of(said), ""]
    return File(path=path, content="\n".join(lines))


def write(file: File) -> None:
    """Put a file into its place, and conf.d where it is missing.  Only for who has execute's lock.

    Raises QsteerError.
    """
    new = file.path.with_name(f".{file.path.name}.new")
    directory = file.path.parent
    try:
        for made in (directory.parent, directory):
            with contextlib.suppress(FileExistsError):
                made.mkdir()
                made.chmod(0o755)
        try:
            _write_whole(new, file.content.encode())
            new.replace(file.path)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
        _sync_directory(directory)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot save {file.path}") from None


def _write_whole(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)  # what a qsteer that was killed has left
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o644)
        file.write(content)
        file.flush()
        os.fsync(fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stored(path: Path) -> tuple[Settings, ...]:
    """What the file says now; nothing if there is none.  Raises QsteerError if it is not qsteer's."""
    try:
        content = path.read_bytes()[: config.SIZE_MAX].decode(errors="replace")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot read {path}") from None
    if content.partition("\n")[0] != MARK:
        raise QsteerError(f"{path} is there, and was not written by qsteer", hint=_FOREIGN_HINT)
    return tuple(entry.settings for entry in configtext.parse(content, str(path)).entries)


def _match(tap: Tap) -> tuple[tuple[str, str], ...]:
    """What the entry is about: the VM and its NIC, or what else of the two is known."""
    nic = tap.nic
    vm = (("vm", tap.vm_name),) if tap.vm_name else ()
    if not vm or not nic:
        return (*vm, ("dev", tap.name))
    if nic.id or nic.netdev:
        return (*vm, ("nic", nic.id or nic.netdev or ""))
    return (*vm, ("mac", nic.mac) if nic.mac else ("dev", tap.name))


def _file_name(tap: Tap) -> str:
    """Another one for each VM and NIC: neither "@" nor "=" comes out of quoting."""
    parts = dict(_match(tap))
    vm = parts.pop("vm", "")
    ((kind, name),) = parts.items()
    return f"{_PREFIX}{_quoted(vm)}@{'' if kind == 'nic' else f'{kind}='}{_quoted(name)}{config.SUFFIX}"


def _quoted(name: str) -> str:
    quoted = urllib.parse.quote(name, safe="", errors="backslashreplace")
    if len(quoted) <= _NAME_MAX:
        return quoted
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{quoted[: _NAME_MAX - 20]}={digest}"


def _string(text: str) -> str:
    """A pattern as a basic string of TOML.  Raises UsageError for what none can hold, or no pattern."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError("a name is not UTF-8")
    if len(text) > configtext.PATTERN_MAX:
        raise UsageError(f"a name of more than {configtext.PATTERN_MAX} characters")
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08X}"


def lines_of(said: Settings) -> list[str]:
    """The lines of an entry but for the source: what ``apply`` has options for."""
    static = said.static
    lines = []
    if said.engine is not None:
        lines.append(f'engine = "{said.engine}"')
    if said.hash_report is not None:
        lines.append(f"hash-report = {str(said.hash_report).lower()}")
    if static.types is not None:
        lines.append(f"types = {_array(format_hash_types(static.types))}")
    if static.key is not None:
        lines.append(f'key = "{format_key(static.key)}"')
    if static.table is not None:
        lines.append(_table(static.table))
    if static.unclassified_queue is not None:
        lines.append(f"unclassified-queue = {static.unclassified_queue}")
    if said.allow is not None:
        lines.append(f"allow = {_array(said.allow)}")
    lines += [f"{name} = true" for name in ("replace", "force") if getattr(said, name)]
    return lines


def _table(table: tuple[int, ...]) -> str:
    word, numbers = table_in_words(table)
    return f"{word} = {numbers[0] if word == 'equal' else list(numbers)}"


def _array(words: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{word}"' for word in words) + "]"
