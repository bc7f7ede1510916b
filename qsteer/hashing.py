# SPDX-License-Identifier: BSD-2-Clause
"""In-kernel hashing: what this host's tun can do of it, and setting it on a tap.

Theory of operation
===================

The series "tun: Introduce virtio-net hashing feature" is in no released kernel, and its ABI changed twice.  Its numbers
are the next that others will be given.  So nothing is concluded from a version: a process of qsteer's own makes a tap
in a network namespace of its own, sets RSS there, and sends packets whose hashes are known (``qs_vnet_probe_start``).
Only what steered them as it should is ever used on anybody's tap.

What is set cannot be asked for.  It is read out of the kernel's memory (``vnet_hashes``), which has to tell of that tap
what was set there; and whose it is out of a mark (``marks``).

The kernel checks little of what it is given.  ``engines`` does, before it comes here.
"""

import errno
import math
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from qsteer import kernel, marks
from qsteer._shim import ffi, lib
from qsteer.errors import QsteerError
from qsteer.model import Generation, Hashing, OpenQueue, Tap, VnetHash
from qsteer.rss import NO_TYPES, HashType, RssConfig, known_types
from qsteer.shim import check, raw_config

_NONE = "this kernel's tun does not hash by itself (TUNSETVNETRSS, TUNSETVNETHASH)"
_TAKES = "CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF, and AF_PACKET"
_DENIED = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT)

_AGAIN_S = 60.0
"""When to look again where it could not be seen for a reason that may pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """What the probe has found, and until when that counts (``time.monotonic()``).

    ``swapped``: the kernel keeps a key in words of the machine's order, which mostly is not that of its bytes.
    """

    hashing: Hashing
    until: float = math.inf
    swapped: bool = sys.byteorder == "little"


_known: dict[int, _Known] = {}
"""By the driver that was looked at."""


def hashing() -> Hashing:
    """What this host's tun can do.  The first call in a process probes, which takes some milliseconds.  Raises nothing.

    Where tun was unloaded and loaded again, it is looked at again.
    """
    return _look().hashing


def looked(tap: Tap) -> Tap:
    """A tap that is planned for: with what tun could do."""
    return replace(tap, hashing=hashing())


def _look() -> _Known:
    driver = kernel.driver()
    if driver not in _known or _known[driver].until < time.monotonic():
        _known.clear()
        _known[driver] = _probe() if driver else _Known(hashing=Hashing(why_not=_NONE))
    return _known[driver]


def _probe() -> _Known:
    probing, found = ffi.new("struct qs_vnet_probing *"), ffi.new("struct qs_vnet_probe *")
    result = -lib.qs_vnet_probe_start(probing, found)
    if result in _DENIED:
        why_not = f"whether tun hashes by itself can only be seen with {_TAKES}"
        return _Known(hashing=Hashing(why_not=why_not, denied=True))
    if result == errno.EOPNOTSUPP:
        return _Known(hashing=Hashing(why_not=_NONE))
    if result:
        why_not = f"whether tun hashes by itself could not be seen: {os.strerror(result)}"
        return _Known(hashing=Hashing(why_not=why_not), until=time.monotonic() + _AGAIN_S)
    try:
        return _of(found, probing.pid)
    finally:
        lib.qs_vnet_probe_end(probing)


def _of(found: Any, pid: int) -> _Known:
    """What a tun that answers is good for; the process has RSS set that is known."""
    generation = _generation(found)
    if not found.steers or not generation:
        why_not = "this kernel's tun has an ioctl of that number, but steered known packets wrongly"
        return _Known(hashing=Hashing(why_not=why_not))
    types = known_types(found.can.types)
    try:
        told = list(kernel.vnet_hashes(pid).values())
    except QsteerError as error:
        return _Known(hashing=Hashing(why_not=str(error)))
    for swapped in (False, True):
        key = bytes(lib.qs_vnet_probe_key)
        config = RssConfig(types=types, key=_swapped(key) if swapped else key, table=tuple(lib.qs_vnet_probe_table))
        if told == [VnetHash(rss=True, report=False, types=types, config=config)]:
            able = Hashing(generation=generation, types=types, reports=bool(found.reports), why_not="")
            return _Known(hashing=able, swapped=swapped)
    return _Known(hashing=Hashing(why_not="this kernel's tun hashes by itself, but does not show what is set (BTF)"))


def _swapped(key: bytes) -> bytes:
    """With the bytes of each word the other way round."""
    return b"".join(key[at : at + 4][::-1] for at in range(0, len(key), 4))


def _generation(found: Any) -> Generation | None:
    """None for what no version is like."""
    if found.can.abi == lib.QS_VNET_ABI_12:
        return None if found.exclusive else Generation.V12
    if not found.exclusive:
        return Generation.V11
    return Generation.V4 if found.strict else Generation.V9


def vnet_hashes(pid: int = 0) -> dict[tuple[int, int], VnetHash]:
    """What tun hashes by itself on the taps that some process has open, or one.

    By network namespace (inode number) and ifindex.  Raises QsteerError as ``kernel.open_queues`` does.
    """
    return {place: _readings(rss)[0] for place, rss in kernel.vnet_hashes(pid).items()}


def _readings(rss: VnetHash) -> tuple[VnetHash, ...]:
    """What the kernel's memory may say, where nobody could see how a key is kept."""
    known = _look()
    orders = (known.swapped,) if known.hashing.generation else (known.swapped, not known.swapped)
    return tuple(
        replace(rss, config=replace(rss.config, key=_swapped(rss.config.key))) if rss.config and swapped else rss
        for swapped in orders
    )


def of_taps(queues: Iterable[OpenQueue]) -> dict[tuple[int, int], VnetHash]:
    """The same for the taps of some queues, with what qsteer's marks say of it."""
    places = {(queue.netns, queue.ifindex) for queue in queues if queue.vnet_hash}
    found = kernel.vnet_hashes() if places else {}
    return {place: _marked(rss, *place) for place, rss in found.items() if place in places}


def _marked(rss: VnetHash, netns: int, ifindex: int) -> VnetHash:
    seen = [marks.marked(one, netns=netns, ifindex=ifindex) for one in _readings(rss)]
    return next((one for one in seen if one.source), seen[0])


def set_rss(queue_fd: int, generation: Generation, config: RssConfig, *, report: bool) -> None:
    """Steer the tap of a queue fd by RSS; it replaces what tun hashed by, at once.  Raises QsteerError."""
    result = lib.qs_vnet_rss(queue_fd, _abi(generation), *raw_config(config), report)
    check(result, "cannot set in-kernel RSS")


def set_automq(queue_fd: int, generation: Generation, types: HashType = NO_TYPES) -> None:
    """Let automq choose; report the kernel's own hash (not Toeplitz) of ``types``, if any.  Raises QsteerError."""
    check(lib.qs_vnet_automq(queue_fd, _abi(generation), int(types)), "cannot take in-kernel RSS off")


def _abi(generation: Generation) -> int:
    return int(lib.QS_VNET_ABI_12 if generation is Generation.V12 else lib.QS_VNET_ABI_3)
