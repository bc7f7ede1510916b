# SPDX-License-Identifier: BSD-2-Clause
"""Network namespaces: the names that ``ip netns`` gives them, and a look into those that are not qsteer's own.

A namespace is known by its inode number on the kernel's nsfs; a name is a file under /run/netns on which it is mounted.
"""

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from qsteer._shim import lib
from qsteer.errors import NotFoundError, QsteerError, UsageError, from_errno, printable

DIRECTORY = Path("/run/netns")
OWN = Path("/proc/thread-self/ns/net")

_SHOWN_MAX = 120
_Answer = TypeVar("_Answer")


def own() -> int:
    """The inode number of the network namespace that the caller is in."""
    return OWN.stat().st_ino


def named() -> dict[int, str]:
    """The name of every namespace that has one, by inode number; of several the first in the alphabet."""
    names: dict[int, str] = {}
    with contextlib.suppress(OSError), os.scandir(DIRECTORY) as entries:
        nsfs = OWN.stat().st_dev
        for entry in sorted(entries, key=lambda entry: entry.name):
            with contextlib.suppress(OSError):
                # Through os.stat(): the entry itself knows the file under the mount.
                found = os.stat(entry.path)  # noqa: PTH116
                if found.st_dev == nsfs:  # the file of a name whose namespace is gone is an ordinary one
                    names.setdefault(found.st_ino, entry.name)
    return names


def resolve(text: str) -> int:
    """The inode number of the namespace that a user means by a name, a path or an inode number.

    A number is not looked for.  Raises NotFoundError if there is no such name or path, UsageError if it is something
    else, PermissionDeniedError if it may not be looked at.
    """
    shown = f'"{printable(text[:_SHOWN_MAX])}"'
    path = Path(text) if "/" in text else DIRECTORY / text
    try:
        if text in ("", ".", ".."):
            raise FileNotFoundError
        found = path.stat()
        if found.st_dev != OWN.stat().st_dev:
            raise UsageError(f"{shown} is not a network namespace", hint="ip netns list")
    except PermissionError:
        raise from_errno(errno.EACCES, f"cannot look at network namespace {shown}", hint="try sudo") from None
    except (OSError, ValueError):
        if text.isascii() and text.isdecimal() and len(text) <= 10:
            return int(text)
        raise NotFoundError(f"no network namespace {shown}", hint="ip netns list") from None
    return found.st_ino


def visit(names: Iterable[str], look: Callable[[], _Answer]) -> dict[str, _Answer | QsteerError]:
    """What ``look`` gives inside of each named namespace, or why that could not be found out.

    It is called in a thread of its own, which never comes back out of the last one, so that the caller stays where it
    is.
    """
    answers: dict[str, _Answer | QsteerError] = {}

    def walk() -> None:
        for name in names:
            try:
                _enter(DIRECTORY / name)
                answers[name] = look()
            except QsteerError as error:
                answers[name] = error
            except OSError as error:
                answers[name] = from_errno(error.errno or 0, f'cannot look into network namespace "{printable(name)}"')

    thread = threading.Thread(target=walk, name="qsteer-netns")
    thread.start()
    thread.join()
    return answers


def _enter(path: Path) -> None:
    """Move the calling thread.  Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        code = -lib.qs_netns_enter(fd)
        if code:
            raise OSError(code, os.strerror(code))
    finally:
        os.close(fd)
