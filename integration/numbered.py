# SPDX-License-Identifier: BSD-2-Clause
"""Numbered packets into a tap while what steers it changes, and the mapping that each of them was steered by.

Theory of operation
-------------------
A process sends numbered packets of FLOWS flows, and notes when each call of send() began and ended; tun chooses the
queue within that call.  A mapping may be in force from the moment that its attachment begins until the next change has
ended.  So each packet has the mappings that may have been in force while it was sent: mostly one, two around a change.
A packet on a queue that none of them gives is outside.

Packets are sent as others arrive: never more than a window of them is under way.  So none is lost for want of room in
a queue that is read at once, nobody waits busily, and whoever changes something can wait for the sender to be at work.
"""

import contextlib
import errno
import itertools
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

from integration import traffic
from integration.provision import CHECKOUT
from qsteer.reference import queue_of
from qsteer.rss import RssConfig
from tests.kernel import support

FLOWS = 64
WINDOW = 48
"""Packets under way at once; a queue of a tap holds ten times as many."""
WAIT_S = 10.0
NOWHERE = 0xFF

_NUMBER_BYTES = 8
_MAGIC = b"qsteerch"
_TRAILER = len(_MAGIC) + _NUMBER_BYTES


class TrafficError(Exception):
    """Packets do not flow; ``str()`` is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """The queue of each flow, by a configuration that may have been in force between two times.

    Times are nanoseconds of CLOCK_MONOTONIC.
    """

    since_ns: int
    until_ns: int
    queues: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """Packet i belongs to flow i modulo FLOWS.

    It was sent from ``began[i]`` to ``ended[i]`` (nanoseconds of CLOCK_MONOTONIC), and came out of ``queue[i]``, or of
    NOWHERE.
    """

    began: Sequence[int]
    ended: Sequence[int]
    queue: Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of the packets.

    ``alone``: where the only mapping that was in force puts them.  During a change two were: ``old`` and ``new`` are
    where only one of them puts them, ``either`` where both do.  ``outside`` are the numbers of those that are somewhere
    else; ``lost`` never arrived.  ``least`` and ``median`` are packets per mapping.
    """

    packets: int
    alone: int
    old: int
    new: int
    either: int
    outside: tuple[int, ...]
    lost: int
    least: int
    median: float


def judge(log: Log, mappings: Sequence[Mapping]) -> Verdict:
    """Which mapping has steered each packet.  Mappings are in the order of time, and so are the packets."""
    counts = dict.fromkeys(("alone", "old", "new", "either", "lost"), 0)
    outside = []
    per_mapping = [0] * len(mappings)
    first = 0
    for number, (began, ended, queue) in enumerate(zip(log.began, log.ended, log.queue, strict=True)):
        while first < len(mappings) - 1 and mappings[first].until_ns < began:
            first += 1
        per_mapping[first] += 1
        allowed = [mapping.queues[number % FLOWS] for mapping in _in_force(mappings, first, began, ended)]
        if queue == NOWHERE:
            counts["lost"] += 1
        elif queue not in allowed:
            outside.append(number)
        elif len(allowed) == 1:
            counts["alone"] += 1
        elif len(set(allowed)) == 1:
            counts["either"] += 1
        else:
            counts["old" if queue == allowed[0] else "new"] += 1
    return Verdict(
        packets=len(log.queue),
        outside=tuple(outside),
        least=min(per_mapping),
        median=statistics.median(per_mapping),
        **counts,
    )


def _in_force(mappings: Sequence[Mapping], first: int, began: int, ended: int) -> list[Mapping]:
    """The mappings, from the first one on, that may have been in force between two times."""
    last = first
    while last < len(mappings) and mappings[last].since_ns <= ended:
        last += 1
    return [mapping for mapping in mappings[first:last] if mapping.until_ns >= began]


def frames(mac: bytes) -> tuple[bytes, ...]:
    """A packet of each flow without its number, which takes the last bytes."""
    return tuple(traffic.frame(flow, mac)[:-_TRAILER] + _MAGIC for flow in range(FLOWS))


def queues_of(config: RssConfig, mac: bytes, queues: int) -> tuple[int, ...]:
    """The queue of each flow."""
    return tuple(queue_of(frame + bytes(_NUMBER_BYTES), config) % queues for frame in frames(mac))


class Traffic:
    """Numbered packets into a tap from a process of their own, and the queue that each came out of.

    ``receivers`` are non-blocking fds that packets are read from, one for each queue.  A context manager.
    """

    def __init__(self, tap: str, mac: bytes, receivers: Sequence[int], *, window: int = WINDOW) -> None:
        self._command = (sys.executable, "-c", f"from {__name__} import send; send()", tap, mac.hex())
        self._queues = {fd: queue for queue, fd in enumerate(receivers)}
        self._poll = select.poll()
        for fd in receivers:
            self._poll.register(fd, select.POLLIN)
        self._window = window
        self._seen = bytearray()

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, cwd=CHECKOUT
        )
        self._grant(self._window)
        return self

    def __exit__(self, *_: object) -> None:
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe
            pipe.close()

    def collect(self) -> None:
        """Read what has arrived, and let as many more be sent."""
        self._grant(self._read())

    def wait_for_packet(self) -> None:
        """Until there is something to read: then the sender is at work.  Raises TrafficError."""
        if not self._poll.poll(WAIT_S * 1000):
            raise TrafficError("no packet comes out of the tap")

    @contextlib.contextmanager
    def flowing(self, pause_s: float) -> Iterator[None]:
        """Collect again and again, in the background."""
        ended = threading.Event()

        def collect() -> None:
            while not ended.wait(pause_s):
                self.collect()

        thread = threading.Thread(target=collect, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def finish(self) -> Log:
        """Until the sender has sent all that it may.  Raises TrafficError."""
        assert self._child.stdin and self._child.stdout
        self._child.stdin.close()
        times = array("q", self._child.stdout.read())
        if self._child.wait() or not times:
            raise TrafficError(f"the sender has ended with exit status {self._child.returncode}")
        self._read()
        count = len(times) // 2
        self._seen.extend(bytes((NOWHERE,)) * (count - len(self._seen)))
        return Log(began=times[:count], ended=times[count:], queue=bytes(self._seen))

    def _read(self) -> int:
        """How many of our packets were there."""
        arrived = 0
        for fd, _ in self._poll.poll(0):
            with contextlib.suppress(BlockingIOError):
                while True:
                    arrived += self._note(os.read(fd, 2048), self._queues[fd])
        return arrived

    def _note(self, frame: bytes, queue: int) -> bool:
        """Whether it is a packet of ours."""
        trailer = frame[-_TRAILER:]
        if not trailer.startswith(_MAGIC):
            return False
        number = int.from_bytes(trailer[len(_MAGIC) :])
        if number >= len(self._seen):
            self._seen.extend(bytes((NOWHERE,)) * (number + 1 - len(self._seen)))
        self._seen[number] = queue
        return True

    def _grant(self, packets: int) -> None:
        assert self._child.stdin
        if packets:
            with contextlib.suppress(BrokenPipeError):  # finish() says that the sender has ended
                self._child.stdin.write(bytes(packets))


def send() -> None:
    """The sender: one packet for each byte of its input, and in the end all the times, on a CPU of its own."""
    tap, mac = sys.argv[1], bytes.fromhex(sys.argv[2])
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flows = itertools.cycle(frames(mac))
    began, ended = array("q"), array("q")
    with support.sender(tap) as sock:
        while granted := os.read(0, 4096):
            for _ in granted:
                frame = next(flows) + len(began).to_bytes(_NUMBER_BYTES)
                began.append(time.monotonic_ns())
                try:
                    sock.send(frame)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:  # the kernel's word for a dropped packet
                        raise
                ended.append(time.monotonic_ns())
    with os.fdopen(1, "wb") as output:
        output.write(began.tobytes() + ended.tobytes())


@contextlib.contextmanager
def off_the_senders_cpu() -> Iterator[None]:
    """Run beside the sender and not in turn with it: its packets are to meet the change itself."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus - {max(cpus)} or cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
