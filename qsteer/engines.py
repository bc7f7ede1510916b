# SPDX-License-Identifier: BSD-2-Clause
"""Which engine steers a tap by an RSS configuration: a program, or tun itself where the kernel can.  Pure.

The kernel takes nearly anything, and makes nonsense of nonsense; what it could not do right is refused here.
"""

from qsteer.errors import PermissionDeniedError, QsteerError, UnsupportedError
from qsteer.model import Engine, Hashing, Tap
from qsteer.rss import HashType, RssConfig, format_hash_types

HEADER_BYTES = 20
"""struct virtio_net_hdr_v1_hash: virtio 1.2, 5.1.6."""
_OVER_IP4 = HashType.IP4 | HashType.TCP4 | HashType.UDP4


def choose(tap: Tap, wanted: Engine | None, config: RssConfig, *, report: bool) -> Engine:
    """The engine for a tap that is to be steered by ``config``; ``wanted`` None is ``auto``.

    ``report``: the guest is to be told the hash, which only the kernel can.  Raises UnsupportedError or
    PermissionDeniedError where the engine that is wanted cannot do it.
    """
    if wanted is Engine.EBPF:
        if report:
            raise UnsupportedError("a program cannot report a hash", hint="--engine kernel, or auto")
        return Engine.EBPF
    reason = _why_not(tap.hashing, config, "" if report else "--engine ebpf steers by a program")
    reason = reason or (_why_no_report(tap) if report else None)
    if not reason:
        # Where QEMU holds a program, it could not attach that any more.
        locked_out = tap.held and tap.hashing.generation and tap.hashing.generation.exclusive
        return Engine.EBPF if locked_out and wanted is None and not report else Engine.KERNEL
    if wanted is Engine.KERNEL or report:
        raise reason
    return Engine.EBPF


def _why_not(hashing: Hashing, config: RssConfig, hint: str) -> QsteerError | None:
    """Why this kernel cannot steer by this configuration; ``hint`` is what can."""
    if not hashing.generation:
        kind = PermissionDeniedError if hashing.denied else UnsupportedError
        return kind(f"no in-kernel RSS: {hashing.why_not}", hint=hint)
    if unknown := config.types & ~hashing.types:
        names = ", ".join(format_hash_types(unknown))
        return UnsupportedError(f"this kernel's tun does not hash {names}", hint=hint)
    if config.types and not config.types & _OVER_IP4:
        # All generations: they take 4 bytes of the key then, and whatever lay in memory for the rest.
        return UnsupportedError(
            "this kernel's tun takes the key wrongly where no hash type is over IPv4", hint="add one, such as ip4"
        )
    return None


def _why_no_report(tap: Tap) -> QsteerError | None:
    """Why the guest cannot be told the hash."""
    if not tap.hashing.reports:
        return UnsupportedError("this kernel's tun does not report hashes")
    queue = tap.queues[0] if tap.queues else None
    if not queue or queue.header < HEADER_BYTES:
        has = f"has {queue.header if queue else 0} bytes, it takes {HEADER_BYTES}"
        return UnsupportedError(
            f'no hash report on tap "{tap.name}": its virtio-net header {has}',
            hint="the guest has to negotiate VIRTIO_NET_F_HASH_REPORT (QEMU's hash=on)",
        )
    if not queue.header_little_endian:
        return UnsupportedError(
            f'no hash report on tap "{tap.name}": its virtio-net header is big-endian, hashes are little-endian'
        )
    return None
