# SPDX-License-Identifier: BSD-2-Clause
"""The configuration's files: /etc/qsteer/qsteer.toml, then conf.d/*.toml in the order of their names.

Who writes them decides what qsteer does as root, and whom ``serve`` gives taps: as root it takes none that somebody
else may write.
"""

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qsteer.errors import UsageError
from qsteer.settings import Config, Libvirt, Serve

if TYPE_CHECKING:
    from qsteer.configtext import Mistake, Parsed

DIRECTORY = Path("/etc/qsteer")
VARIABLE = "QSTEER_CONFIG"
"""The environment variable that names another directory."""
MAIN = "qsteer.toml"
MORE = "conf.d"
SUFFIX = ".toml"
SIZE_MAX = 1 << 20
"""Largest file, in bytes."""


class ConfigError(UsageError):
    """The configuration has a mistake; the first one is told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """One file: how many entries and rules it has, and its mistakes."""

    file: str
    entries: int
    rules: int
    mistakes: "tuple[Mistake, ...]"


def directory() -> Path:
    """Where the configuration is."""
    return Path(os.environ.get(VARIABLE) or DIRECTORY)


def load(where: Path | None = None) -> Config:
    """The whole configuration; without files an empty one.  Raises ConfigError."""
    parsed = _read_all(directory() if where is None else where)
    mistakes = [mistake for one in parsed for mistake in one.mistakes]
    if mistakes:
        more = f"; {len(mistakes) - 1} more: qsteer config check" if len(mistakes) > 1 else ""
        raise ConfigError(str(mistakes[0]), hint=(mistakes[0].hint + more).removeprefix("; "))
    serve = {field: value for one in parsed for field, value in one.serve.items()}
    libvirt = {field: value for one in parsed for field, value in one.libvirt.items()}
    return Config(
        entries=tuple(entry for one in parsed for entry in one.entries),
        serve=Serve(**serve),
        libvirt=Libvirt(**libvirt),
        rules=tuple(rule for one in parsed for rule in one.rules),
    )


def check(files: Sequence[str] = ()) -> tuple[Checked, ...]:
    """Every mistake in files, wherever they are and whoever owns them; without any, in those that ``load`` takes."""
    if files:
        found = [(file, _read(Path(file), trusted=True)) for file in files]
    else:
        where = directory()
        listed, mistakes = _files(where)
        found = [(str(path), _read(path)) for path in listed]
        found += [(mistake.file, _nothing(mistake)) for mistake in mistakes]
    return tuple(
        Checked(file=file, entries=len(parsed.entries), rules=len(parsed.rules), mistakes=parsed.mistakes)
        for file, parsed in found
    )


def _read_all(where: Path) -> "list[Parsed]":
    files, mistakes = _files(where)
    return [*map(_nothing, mistakes), *map(_read, files)]


def _files(where: Path) -> "tuple[list[Path], list[Mistake]]":
    """The files in their order, and what is wrong with the directories."""
    mistakes: list[Mistake] = []
    files = [where / MAIN] if _is_there(where / MAIN) else []
    for path in (where, where / MORE):
        try:
            about = path.stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            mistakes.append(_mistake(path, os.strerror(error.errno or 0)))
            continue
        if not stat.S_ISDIR(about.st_mode):
            mistakes.append(_mistake(path, "this is no directory"))
        elif why := _why_not_trusted(about):
            mistakes.append(_mistake(path, *why))
    try:
        names = sorted(path.name for path in (where / MORE).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        names = []
        mistakes.append(_mistake(where / MORE, os.strerror(error.errno or 0)))
    files += [where / MORE / name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    return files, mistakes


def _is_there(path: Path) -> bool:
    """Whether there is something to read, be it that reading fails."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _read(path: Path, *, trusted: bool = False) -> "Parsed":
    """One file.  ``trusted``: whoever may write it."""
    from qsteer import configtext

    try:
        content, why = _content(path, trusted=trusted)
    except (OSError, ValueError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "this is no path"
        return _nothing(_mistake(path, reason))
    if why:
        return _nothing(_mistake(path, *why))
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return _nothing(_mistake(path, "this is not UTF-8", line=line))
    return configtext.parse(text, str(path))


def _content(path: Path, *, trusted: bool) -> tuple[bytes, tuple[str, ...]]:
    """What a file holds, or why that does not count.  Raises OSError, and ValueError for what cannot be a path."""
    # Not opened before it is known to be a file: a FIFO or a device would do something.
    if not stat.S_ISREG(path.stat().st_mode):
        return b"", ("this is no ordinary file",)
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            return b"", ("this is no ordinary file",)
        if not trusted and (why := _why_not_trusted(about)):
            return b"", why
        content = file.read(SIZE_MAX + 1)
    if len(content) > SIZE_MAX:
        return b"", (f"this is larger than {SIZE_MAX >> 20} MiB",)
    return content, ()


def _why_not_trusted(about: os.stat_result) -> tuple[str, ...]:
    """Why root does not take it, and what to do about it; nothing if it does."""
    if os.geteuid() != 0:
        return ()
    if about.st_uid != 0:
        return (f"this is uid {about.st_uid}'s, and decides what root does", "chown root")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return ("others than its owner may write this, and it decides what root does", "chmod go-w")
    return ()


def _nothing(*mistakes: "Mistake") -> "Parsed":
    from qsteer.configtext import Parsed

    return Parsed(serve={}, libvirt={}, mistakes=mistakes)


def _mistake(path: Path, message: str, hint: str = "", *, line: int = 0) -> "Mistake":
    from qsteer.configtext import Mistake

    return Mistake(file=str(path), line=line, message=message, hint=hint)
