# SPDX-License-Identifier: BSD-2-Clause
"""In-kernel hashing: what this host's tun can do of it, and setting it on a tap.

Theory of operation
===================

The series "tun: Introduce virtio-net hashing feature" is in no released kernel, and its ABI changed twice.  Its numbers
are the next that others will be given.  So nothing is concluded from a version: a process of qsteer's own makes a tap
in a network namespace of its own, sets RSS there, and sends packets whose hashes are known (``qs_vnet_probe``).  Only
what steered them as it should is ever used on anybody's tap.

What is set cannot be asked for.  It is read out of the kernel's memory (``kernel.vnet_hashes``), and whose it is out of
a mark (``marks``).

The kernel checks little of what it is given.  ``engines`` does, before it comes here.
"""

import errno
from collections.abc import Iterable

from qsteer import kernel, marks
from qsteer._shim import ffi, lib
from qsteer.model import Generation, Hashing, OpenQueue, VnetHash
from qsteer.rss import NO_TYPES, HashType, RssConfig, known_types
from qsteer.shim import check, raw_config

_NONE = "this kernel's tun does not hash by itself (TUNSETVNETRSS, TUNSETVNETHASH)"
_TAKES = "CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF, and AF_PACKET"
_DENIED = (errno.EPERM, errno.EACCES, errno.EAFNOSUPPORT)

_known: dict[int, Hashing] = {}
"""What the probe has found, by the driver that it looked at."""


def hashing() -> Hashing:
    """What this host's tun can do.  The first call in a process probes, which takes some milliseconds.  Raises nothing.

    Where tun was unloaded and loaded again, it is looked at again.
    """
    driver = kernel.driver()
    if driver not in _known:
        _known.clear()
        _known[driver] = _probe() if driver else Hashing(why_not=_NONE)
    return _known[driver]


def _probe() -> Hashing:
    found = ffi.new("struct qs_vnet_probe *")
    result = -lib.qs_vnet_probe(found)
    if result in _DENIED:
        return Hashing(why_not=f"whether tun hashes by itself can only be seen with {_TAKES}", denied=True)
    if result:
        return Hashing(why_not=_NONE if result == errno.EOPNOTSUPP else f"{_NONE}: {errno.errorcode.get(result)}")
    if not found.steers:
        return Hashing(why_not="this kernel's tun has an ioctl of that number, but steered known packets wrongly")
    if not kernel.tells_vnet_hash():
        return Hashing(why_not="this kernel's tun hashes by itself, but does not show what is set (BTF)")
    return Hashing(
        generation=_generation(found),
        types=known_types(found.can.types),
        reports=bool(found.reports),
        why_not="",
    )


def _generation(found: "ffi.CData") -> Generation:
    if found.can.abi == lib.QS_VNET_ABI_12:
        return Generation.V12
    if not found.exclusive:
        return Generation.V11
    return Generation.V4 if found.strict else Generation.V9


def of_taps(queues: Iterable[OpenQueue]) -> dict[tuple[int, int], VnetHash]:
    """What tun hashes by itself on the taps of some queues, with what qsteer's marks say of it.

    By network namespace (inode number) and ifindex.  Raises QsteerError as ``kernel.open_queues`` does.
    """
    places = {(queue.netns, queue.ifindex) for queue in queues if queue.vnet_hash}
    found = kernel.vnet_hashes() if places else {}
    return {
        (netns, ifindex): marks.marked(rss, netns=netns, ifindex=ifindex)
        for (netns, ifindex), rss in found.items()
        if (netns, ifindex) in places
    }


def set_rss(queue_fd: int, generation: Generation, config: RssConfig, *, report: bool) -> None:
    """Steer the tap of a queue fd by RSS; it replaces what tun hashed by, at once.  Raises QsteerError."""
    result = lib.qs_vnet_rss(queue_fd, _abi(generation), *raw_config(config), report)
    check(result, "cannot set in-kernel RSS")


def set_automq(queue_fd: int, generation: Generation, types: HashType = NO_TYPES) -> None:
    """Let automq choose; report the kernel's own hash (not Toeplitz) of ``types``, if any.  Raises QsteerError."""
    check(lib.qs_vnet_automq(queue_fd, _abi(generation), int(types)), "cannot take in-kernel RSS off")


def _abi(generation: Generation) -> int:
    return int(lib.QS_VNET_ABI_12 if generation is Generation.V12 else lib.QS_VNET_ABI_3)
