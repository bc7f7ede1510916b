# SPDX-License-Identifier: BSD-2-Clause
"""Packets into taps, from one processor, and out of them again on another one."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from integration.bench.native import checked, ffi, lib
from integration.bench.taps import Tap


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Packets of one length, taps, and the order in which they are sent: (number of the packet, number of the tap)."""

    packets: tuple[bytes, ...]
    taps: Sequence[Tap]
    order: Sequence[tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """What sending took, and how many packets the sender was told that the tap dropped."""

    ns_per_packet: float
    dropped: int


class Sender:
    """A packet socket.  ``direct`` is around the queueing discipline, and only for taps that somebody reads."""

    def __init__(self, *, direct: bool) -> None:
        self._sock = checked(lib().qb_sender_open(direct), "cannot open a packet socket")

    def close(self) -> None:
        os.close(self._sock)

    def send(self, load: Load, total: int) -> Sent:
        """``total`` packets of a load, from its beginning."""
        (size,) = {len(packet) for packet in load.packets}
        devices = [tap.ifindex for tap in load.taps]
        dropped, elapsed = ffi().new("uint64_t *"), ffi().new("uint64_t *")
        result = lib().qb_send(
            self._sock,
            b"".join(load.packets),
            size,
            len(load.packets),
            ffi().new("int32_t[]", devices),
            len(devices),
            ffi().new("struct qb_step[]", load.order),
            len(load.order),
            total,
            dropped,
            elapsed,
        )
        checked(result, "cannot send into a tap")
        return Sent(ns_per_packet=elapsed[0] / total, dropped=dropped[0])


@contextlib.contextmanager
def sender(*, direct: bool) -> Iterator[Sender]:
    made = Sender(direct=direct)
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def drained(tap: Tap, cpu: int) -> Iterator[None]:
    """Somebody reads all that comes out of a tap, on a processor of its own."""
    stop, queues = ffi().new("int *"), ffi().new("int[]", tap.queues)
    failed: list[int] = []

    def drain() -> None:
        os.sched_setaffinity(0, {cpu})
        failed.append(lib().qb_drain(queues, len(tap.queues), stop))

    thread = threading.Thread(target=drain)
    thread.start()
    try:
        yield
    finally:
        stop[0] = 1
        thread.join()
    checked(failed[0], "cannot read a tap")
