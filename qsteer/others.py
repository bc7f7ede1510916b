# SPDX-License-Identifier: BSD-2-Clause
"""Other processes that decide how long it lasts what is attached: a QEMU by its version, and a ``qsteer keep``."""

import contextlib
import os
import re
import subprocess
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from qsteer import qemuargs

VERSION_S = 2.0
"""How long a QEMU may take to tell its version."""

_CMDLINE_START = 4096
_VERSION = re.compile(rb"QEMU emulator version (\d{1,4})\.(\d{1,4})")
_WORDS_BEFORE_VERB = 5
"""``python -I -m qsteer keep``, at most."""


@contextlib.contextmanager
def asked_for_version(pid: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """The very program that runs, asked in the background; None where that is run by something else, a loader, say."""
    path = f"/proc/{pid}/exe"
    asked = None
    with contextlib.suppress(OSError):
        # Not where the link leads: that may be another program by now.
        if qemuargs.is_qemu_name(os.readlink(path).removesuffix(" (deleted)")):  # noqa: PTH115
            asked = subprocess.Popen(
                (path, "--version"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
    try:
        yield asked
    finally:
        if asked:
            asked.kill()
            asked.wait()
            if asked.stdout:
                asked.stdout.close()


def version(asked: subprocess.Popen[bytes] | None, timeout_s: float = VERSION_S) -> tuple[int, int] | None:
    """What was answered; None where nothing was in time."""
    if not asked:
        return None
    try:
        found = _VERSION.search(asked.communicate(timeout=timeout_s)[0])
    except subprocess.TimeoutExpired:
        return None
    return (int(found[1]), int(found[2])) if found else None


def keep_of(names: Collection[str]) -> int | None:
    """The process of a ``qsteer keep`` of root's, or of this user's, that keeps a VM of one of these names."""
    with os.scandir("/proc") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and entry.stat().st_uid in (0, os.geteuid()):
                    with Path(entry.path, "cmdline").open("rb") as file:
                        start = file.read(_CMDLINE_START)
                    if is_keep_of(names, qemuargs.split_cmdline(start)) and _is_python(entry.name):
                        return int(entry.name)
    return None


def _is_python(pid: str) -> bool:
    """Whether Python runs there, and not su(1), say, whose command line is of the caller's making."""
    try:
        return os.readlink(f"/proc/{pid}/exe").rpartition("/")[2].startswith("python")  # noqa: PTH115
    except PermissionError:
        return True  # it is root's, and this is not: whoever lies here lies to nobody with more rights
    except OSError:
        return False


def is_keep_of(names: Collection[str], argv: Sequence[str]) -> bool:
    """Whether a command line is that of a ``qsteer keep`` that keeps every VM, or one of these; it can be forged."""
    words = [word.rpartition("/")[2] for word in argv[:_WORDS_BEFORE_VERB]]
    if not (words and words[0].startswith(("python", "qsteer"))) or ("qsteer", "keep") not in pairwise(words):
        return False
    kept = set(pairwise(argv)) | {("--vm", word.removeprefix("--vm=")) for word in argv if word.startswith("--vm=")}
    return "--all" in argv or any(("--vm", name) in kept for name in names)
