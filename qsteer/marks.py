# SPDX-License-Identifier: BSD-2-Clause
"""Marks: which in-kernel RSS is qsteer's, and where its configuration comes from.

A program says so itself, in its rodata; RSS of tun's own has no room for a word.  So what qsteer sets is put down
beforehand, one small file per tap.  A mark counts for as long as the kernel has the very same: it does not say what is
set, only who has set it.  But for the end of a key, which v12 does not take where no hash type needs it.
"""

import hashlib
import json
from dataclasses import replace

from qsteer import holds
from qsteer.errors import UsageError
from qsteer.model import Source, VnetHash
from qsteer.rss import key_bytes_used
from qsteer.tapfiles import TapFile

FOLDER = "marks"


def file(*, netns: int, ifindex: int) -> TapFile:
    """Where the mark of a tap is."""
    return TapFile(holds.RUNTIME / FOLDER, "mark", netns, ifindex)


def of(rss: VnetHash) -> bytes:
    """The mark of what is going to be set."""
    key = rss.config.key.hex() if rss.config else ""
    said = {"digest": digest(rss), "key": key, "source": rss.source, "displaced": rss.displaced}
    return (json.dumps(said) + "\n").encode()


def marked(rss: VnetHash, *, netns: int, ifindex: int) -> VnetHash:
    """What the kernel has, with what the mark says of it; as it is where that is not the mark of this."""
    try:
        said = json.loads(file(netns=netns, ifindex=ifindex).path.read_text())
        config = rss.config and replace(rss.config, key=bytes.fromhex(said["key"]))
        whole = replace(rss, config=config, source=Source(said["source"]), displaced=int(said["displaced"]))
        return whole if said["digest"] == digest(rss) == digest(whole) else rss
    except (OSError, ValueError, TypeError, KeyError, UsageError):
        return rss


def digest(rss: VnetHash | None) -> str:
    """The same for what steers and reports alike; empty for nothing."""
    if not rss:
        return ""
    config = rss.config
    table = config and (config.key[: key_bytes_used(rss.types)], config.table, config.unclassified_queue)
    return hashlib.sha256(repr((rss.rss, rss.report, int(rss.types), table)).encode()).hexdigest()
