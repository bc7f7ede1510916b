# SPDX-License-Identifier: BSD-2-Clause
"""Marks: which in-kernel RSS is qsteer's, and where its configuration comes from.

A program says so itself, in its rodata; RSS of tun's own has no room for a word.  So what qsteer sets is put down
beforehand, beside what it takes the place of, one small file per tap.  A mark counts for as long as the kernel has the
very same: it does not say what is set, only who has set it.  But for the end of a key, which tun does not take where no
hash type needs it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsteer import holds, procs
from qsteer.errors import UsageError
from qsteer.model import Source, Tap, VnetHash
from qsteer.rss import key_bytes_used
from qsteer.tapfiles import TapFile

FOLDER = "marks"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """``lasts``: the tap may outlive the process that had it, and its RSS with it; ``ended``: that process is gone."""

    lasts: bool
    ended: bool


def file(*, netns: int, ifindex: int) -> TapFile:
    """Where the mark of a tap is."""
    return TapFile(holds.RUNTIME / FOLDER, "mark", netns, ifindex)


def of(tap: Tap, several: Iterable[VnetHash]) -> bytes:
    """The mark of what is going to be set, and may be set still."""
    process = tap.holder
    said = {
        "pid": process.pid if process else 0,
        "started": process.started if process else 0,
        "lasts": tap.persistent or process is None,
        "rss": [
            {
                "digest": digest(rss),
                "key": rss.config.key.hex() if rss.config else "",
                "source": rss.source,
                "displaced": rss.displaced,
            }
            for rss in several
        ],
    }
    return (json.dumps(said) + "\n").encode()


def marked(rss: VnetHash, *, netns: int, ifindex: int) -> VnetHash:
    """What the kernel has, with what the mark says of it; nobody's where there is no mark of this."""
    bare = replace(rss, source=None, displaced=0)
    try:
        several = json.loads(file(netns=netns, ifindex=ifindex).path.read_text())["rss"]
        return next((whole for said in several if (whole := _whole(bare, said))), bare)
    except (OSError, ValueError, TypeError, KeyError, UsageError):
        return bare


def _whole(rss: VnetHash, said: Any) -> VnetHash | None:
    config = rss.config and replace(rss.config, key=bytes.fromhex(said["key"]))
    whole = replace(rss, config=config, source=Source(said["source"]), displaced=int(said["displaced"]))
    return whole if said["digest"] == digest(rss) == digest(whole) else None


def read(path: Path) -> Mark | None:
    """What a file says of the process that had the tap; None where it is no mark."""
    try:
        said = json.loads(path.read_text())
        pid, started = int(said["pid"]), int(said["started"])
        process = procs.read(pid) if pid > 0 else None
        return Mark(lasts=bool(said["lasts"]), ended=not process or process.started != started)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def forget_ended() -> None:
    """Remove the marks of taps that went with their process.  Only for who has execute's lock; what cannot be stays."""
    with contextlib.suppress(OSError):
        for path in (holds.RUNTIME / FOLDER).iterdir():
            mark = read(path)
            if mark and mark.ended and not mark.lasts:
                with contextlib.suppress(OSError):
                    path.unlink()


def digest(rss: VnetHash | None) -> str:
    """The same for what steers and reports alike; empty for nothing."""
    if not rss:
        return ""
    config = rss.config
    table = config and (config.key[: key_bytes_used(rss.types)], config.table, config.unclassified_queue)
    return hashlib.sha256(repr((rss.rss, rss.report, int(rss.types), table)).encode()).hexdigest()
