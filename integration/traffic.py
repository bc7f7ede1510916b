# SPDX-License-Identifier: BSD-2-Clause
"""Many flows through a tap, and for each of them the queue that it arrived on.

Theory of operation
-------------------
Flow i is one packet that ends in the number i (guest/flowrx.c reads it), so the report is per flow: two flows that
swapped queues show as two mismatches, although the totals are equal.  Two observers follow the same flows: flowrx in
the guest sees the queue that the guest got, flowrx on the host's side of the tap the queue that the kernel chose.  They
differ where QEMU moves packets between queues itself.

No packet may be lost for want of room, or the result would depend on the machine's speed.  So the sender never has more
than WINDOW packets under way, and goes on when the guest has said that it got them.  What is lost all the same is sent
again, in another round; a flow that never arrives is ``lost``, which is neither a match nor a mismatch.
"""

import contextlib
import errno
import functools
import ipaddress
import random
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.guest import Console, GuestError
from qsteer.reference import queue_of
from qsteer.rss import RssConfig
from tests.kernel import support
from tests.kernel.support import PATIENCE

FLOWS = 4096
WINDOW = 256
"""Packets under way at once: as many as one receive ring of the guest holds; a queue of a tap holds 1000."""
ROUNDS = 5
QUIET_MS = int(3000 * PATIENCE)
"""How long an observer waits for the next packet."""
TIMEOUT_S = 60.0 * PATIENCE

_MAGIC = b"qsteerrx"
_SOURCE_MAC = bytes.fromhex("020071737400")
_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_V4 = ipaddress.IPv4Network("198.18.0.0/15")
_V6 = ipaddress.IPv6Network("2001:db8::/32")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """Flow i was seen on queue ``guest[i]`` by the guest and put on queue ``host[i]`` by the host; None is nowhere.

    -1 is a flow whose packets came on different queues, although nothing was changed meanwhile.
    """

    guest: tuple[int | None, ...]
    host: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """How many flows belong on a queue, and how many the guest counted there."""

    queue: int
    expected: int
    counted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of the flows.

    ``mismatches`` are those that the guest got on another queue than it asked for, ``host_mismatches`` those that the
    host's kernel put on another; ``lost`` are those that the guest never saw.
    """

    flows: int
    mismatches: int
    host_mismatches: int
    lost: int
    queues: tuple[Queue, ...]


@functools.lru_cache(maxsize=65536)
def frame(number: int, mac: bytes, batch: int = 0) -> bytes:
    """Flow ``number`` as an Ethernet frame to ``mac``: IPv4 TCP, IPv4 UDP, IPv6 TCP and IPv6 UDP in turn.

    Addresses and ports are drawn from the number alone, so that every run sends the same flows.
    """
    draw = random.Random(number)
    protocol = _UDP if number % 2 else _TCP
    payload = struct.pack("!8sII", _MAGIC, batch, number)
    ports = struct.pack("!HH", draw.randrange(1024, 65536), draw.randrange(1, 65536))
    if number % 4 < 2:
        addresses = b"".join(_V4[draw.randrange(1, _V4.num_addresses - 1)].packed for _ in range(2))
    else:
        addresses = b"".join(_V6[draw.getrandbits(96)].packed for _ in range(2))
    segment = _segment(protocol, ports, payload, addresses)
    if len(addresses) == 8:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(segment), number & 0xFFFF, 0x4000, 64, protocol, 0)
        checksum = _checksum(header + addresses)
        return mac + _SOURCE_MAC + b"\x08\x00" + header[:10] + checksum + addresses + segment
    header = struct.pack("!IHBB", 6 << 28, len(segment), protocol, 64)
    return mac + _SOURCE_MAC + b"\x86\xdd" + header + addresses + segment


def _segment(protocol: int, ports: bytes, payload: bytes, addresses: bytes) -> bytes:
    length = len(payload) + (20 if protocol == _TCP else 8)
    if protocol == _TCP:
        before, after = ports + struct.pack("!IIBBH", 1, 1, 5 << 4, 0x10, 1024), b"\0\0"
    else:
        before, after = ports + struct.pack("!H", length), b""
    pseudo = addresses + struct.pack("!II", length, protocol)
    return before + _checksum(pseudo + before + after + payload) + after + payload


def _checksum(data: bytes) -> bytes:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def follow(
    guest: Console, tap: str, flowrx: Path, *, queues: int, flows: int = FLOWS, device: str = "eth0"
) -> Sighting:
    """Send ``flows`` flows through ``tap`` and see where each goes; lost ones again, up to ROUNDS times.

    ``queues`` is the number of queues that the device has.  Raises GuestError.
    """
    mac = guest.mac(device)
    support.links_up(tap)
    in_guest = ["."] * flows
    on_host = ["."] * flows
    for batch in range(1, ROUNDS + 1):
        missing = [number for number in range(flows) if in_guest[number] == "."]
        if not missing:
            break
        options = f"{queues} {flows} {len(missing)} {batch} {WINDOW} {QUIET_MS}"
        with _host_flowrx(flowrx, f"{tap} {options}") as host:
            guest.start(f"flowrx {device} {options}")
            guest.expect("ready")
            report = _send(guest, tap, [frame(number, mac, batch) for number in missing])
            guest.finish()
            _merge(in_guest, report)
            _merge(on_host, host.communicate(timeout=TIMEOUT_S)[0])
    return Sighting(guest=_queues(in_guest), host=_queues(on_host))


def verify(sighting: Sighting, config: RssConfig, *, queues: int, active: int = 0) -> Verdict:
    """Compare every flow with the queue that ``config`` gives it, folded by the ``active`` queues (default: all)."""
    flows = len(sighting.guest)
    fold = active or queues
    expected = [queue_of(frame(number, bytes(6)), config) % fold for number in range(flows)]
    seen = [(want, got) for want, got in zip(expected, sighting.guest, strict=True) if got is not None]
    on_host = zip(expected, sighting.host, strict=True)
    return Verdict(
        flows=flows,
        mismatches=sum(want != got for want, got in seen),
        host_mismatches=sum(want != got for want, got in on_host if got is not None),
        lost=flows - len(seen),
        queues=tuple(
            Queue(queue=queue, expected=expected.count(queue), counted=sighting.guest.count(queue))
            for queue in range(queues)
        ),
    )


def _send(guest: Console, tap: str, frames: Sequence[bytes]) -> str:
    """Send, a window at a time; flowrx's report, which comes early when packets are lost."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sender:
        sender.bind((tap, 0))
        for start in range(0, len(frames), WINDOW):
            for one in frames[start : start + WINDOW]:
                try:
                    sender.send(one)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # the kernel's word for a dropped packet
                        raise
            answer = guest.expect(f"+{start + WINDOW}", "flows ", timeout_s=TIMEOUT_S)
            if answer.startswith("flows "):
                return answer
    return guest.expect("flows ", timeout_s=TIMEOUT_S)


@contextlib.contextmanager
def _host_flowrx(flowrx: Path, arguments: str) -> Iterator[subprocess.Popen[str]]:
    """flowrx on the host, listening."""
    with subprocess.Popen([flowrx, *arguments.split()], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise GuestError("flowrx does not start on the host")
            yield process
        finally:
            process.kill()


def _merge(seen: list[str], output: str) -> None:
    """Add what flowrx reported in its last line to what is known."""
    report = output.split()[-1]
    for number, digit in enumerate(report):
        if digit != ".":
            seen[number] = digit if seen[number] in (".", digit) else "!"


def _queues(digits: Sequence[str]) -> tuple[int | None, ...]:
    return tuple(None if digit == "." else -1 if digit == "!" else int(digit, 16) for digit in digits)
