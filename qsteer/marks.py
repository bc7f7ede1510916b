# SPDX-License-Identifier: BSD-2-Clause
"""Marks: which in-kernel RSS is qsteer's, and where its configuration comes from.

A program says so itself, in its rodata; RSS of tun's own has no room for a word.  So what qsteer sets is put down
beforehand, one small file per tap.  A mark counts for as long as the kernel has the very same: it does not say what is
set, only who has set it.
"""

import hashlib
import json
from dataclasses import replace

from qsteer import holds
from qsteer.model import Source, VnetHash
from qsteer.tapfiles import TapFile

FOLDER = "marks"


def file(*, netns: int, ifindex: int) -> TapFile:
    """Where the mark of a tap is."""
    return TapFile(holds.RUNTIME / FOLDER, "mark", netns, ifindex)


def of(rss: VnetHash) -> bytes:
    """The mark of what is going to be set."""
    said = {"digest": _digest(rss), "source": rss.source, "displaced": rss.displaced}
    return (json.dumps(said) + "\n").encode()


def marked(rss: VnetHash, *, netns: int, ifindex: int) -> VnetHash:
    """What the kernel has, with what the mark says of it; as it is where that is not the mark of this."""
    try:
        said = json.loads(file(netns=netns, ifindex=ifindex).path.read_text())
        if said["digest"] != _digest(rss):
            return rss
        return replace(rss, source=Source(said["source"]), displaced=int(said["displaced"]))
    except (OSError, ValueError, TypeError, KeyError):
        return rss


def _digest(rss: VnetHash) -> str:
    config = rss.config
    content = (rss.rss, rss.report, int(rss.types), config and (config.key, config.table, config.unclassified_queue))
    return hashlib.sha256(repr(content).encode()).hexdigest()
