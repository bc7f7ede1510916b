# SPDX-License-Identifier: BSD-2-Clause
"""One packet, one queue, whoever computes it: both builds, both sources, the Python reference, and QEMU's own program.

    python -m integration.agreement [--packets 1000000] [--seed N] [--jobs 2] [--qemu PATH | --without-qemu]

Takes root.  Exit code 1 if any of qsteer's programs differs from the reference; the packet and the configuration are
printed.  Where QEMU's program differs, the kinds of such packets (kinds.py) are counted, each with an example; what no
kind explains is told apart.

Theory of operation
-------------------
Every program runs on every packet with BPF_PROG_TEST_RUN, and on some packets also where it belongs, on a tap of 16
queues: there go the packets that a test run refuses (those shorter than their IP header), and long ones, whose headers
are not in the skb's linear area.

A static program is loaded for each configuration.  The maps of the others are written as QEMU writes them, through
their mappings, in the same program again and again: what such a program might remember of an earlier configuration
would be found.
"""

import argparse
import contextlib
import errno
import math
import mmap
import os
import random
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol, Self

from integration import cases, kinds
from integration.apt import ProvisionError
from integration.bench import native, qemu
from integration.provision import provision
from qsteer import kernel, programs
from qsteer.errors import QsteerError
from qsteer.model import Build, Source
from qsteer.reference import classify, queue_of
from qsteer.render import columns
from qsteer.rss import RssConfig, format_hash_types, format_key
from tests.kernel import support

PACKETS = 1_000_000
PER_CONFIG = 1000
TAKEN = 0.95
"""How many of them a test run takes, at least."""
CONFIGS_PER_JOB = 32
"""To load QEMU's program and the complete build takes as long as some ten thousand packets."""
ON_TAP = 40
"""Packets of each configuration that go through the tap as well, the refused ones first."""
QUEUES = 16
TAP = "qsagree"
QEMU = "QEMU's"
EXAMPLES = 3


class Steers(Protocol):
    """A program that a configuration can be set in."""

    name: str

    @property
    def prog_fd(self) -> int: ...

    def set(self, config: RssConfig) -> None: ...


class Static:
    """A new program for each configuration, which is frozen into a stub of the shared body's if it can be."""

    def __init__(self, build: Build, stack: contextlib.ExitStack) -> None:
        self.name = f"{build}, static"
        self._build = build
        self._program: programs.Program | None = None
        stack.callback(self._close)

    @property
    def prog_fd(self) -> int:
        assert self._program
        return self._program.prog_fd

    def set(self, config: RssConfig) -> None:
        self._close()
        self._program = programs.load_program(tap=TAP, source=Source.STATIC, config=config, build=self._build)

    @property
    def is_frozen(self) -> bool:
        return bool(self._program and programs.program_info(self._program.id).frozen_id)

    def _close(self) -> None:
        if self._program:
            self._program.close()
        self._program = None


class Written:
    """One program for all configurations, which are written into its maps while it is loaded, as QEMU does it."""

    def __init__(self, name: str, fds: Sequence[int], stack: contextlib.ExitStack) -> None:
        self.name = name
        self.prog_fd = fds[0]
        self._config, self._key, self._table = (
            stack.enter_context(mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED)) for fd in fds[1:]
        )

    def set(self, config: RssConfig) -> None:
        """Configuration, table, key: QEMU's order."""
        head = struct.pack("=BBIHH", 1, 0, config.types, len(config.table), config.unclassified_queue)
        table = b"".join(struct.pack("=H6x", queue) for queue in config.table)
        self._config[: len(head)] = head
        self._table[: len(table)] = table
        self._key[: len(config.key)] = struct.pack("=I", int.from_bytes(config.key[:4])) + config.key[4:]


def shared_maps(build: Build, stack: contextlib.ExitStack) -> Written:
    program = programs.load_program(tap=TAP, source=Source.SHARED_MAPS, build=build)
    stack.callback(program.close)
    return Written(f"{build}, shared-maps", program.fds, stack)


def qemus_own(elf: bytes, stack: contextlib.ExitStack) -> Written:
    """Raises NativeError where it cannot be loaded."""
    fds = native.ffi().new("int[4]")
    native.checked(native.lib().qb_qemu_load(elf, len(elf), fds), "cannot load QEMU's program")
    for fd in fds:
        stack.callback(os.close, fd)
    return Written(QEMU, tuple(fds), stack)


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A packet that a program puts on another queue than the reference; ``where`` is a test run or a tap."""

    program: str
    where: str
    packet: bytes
    config: RssConfig
    queue: int
    wanted: int

    def __str__(self) -> str:
        return (
            f"{self.program}, {self.where}: queue {self.queue} where the reference says {self.wanted}\n"
            f"  packet {_hex(self.packet)}\n"
            f"  types {','.join(format_hash_types(self.config.types)) or 'none'}\n"
            f"  key {format_key(self.config.key)}\n"
            f"  table {','.join(map(str, self.config.table))} unclassified {self.config.unclassified_queue}"
        )

    @property
    def oddity(self) -> tuple[bool, int]:
        """Whole TCP and UDP packets are the plainest, then those with the least to read."""
        match = classify(self.packet, self.config.types)
        has_ports = bool(match and match.hash_type & kinds.WITH_PORTS)
        return not has_ports, len(self.packet) + 2 * len(self.config.table)


def _hex(packet: bytes) -> str:
    """In full, but for what makes a packet long."""
    if len(packet) < cases.LONG:
        return packet.hex()
    told = packet.rstrip(cases.FILLER)
    return f"{told.hex()} and {len(packet) - len(told)} bytes {cases.FILLER.hex()}"


@dataclass(slots=True, kw_only=True)
class Tally:
    """What was counted.  ``different`` are packets per program; ``by_kind`` QEMU's, each with the plainest example.

    ``frozen`` are configurations that one program had frozen into it; ``left_in_cb`` are runs of qsteer's programs that
    left something in skb->cb, which may be an address.
    """

    configs: int = 0
    frozen: int = 0
    packets: int = 0
    refused: int = 0
    on_tap: int = 0
    matched: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    different: Counter[str] = field(default_factory=Counter)
    examples: list[Difference] = field(default_factory=list)
    left_in_cb: int = 0
    by_kind: dict[kinds.Kind, tuple[int, Difference]] = field(default_factory=dict)

    def add(self, other: Self) -> None:
        """Count another part of the run as well."""
        self.configs += other.configs
        self.frozen += other.frozen
        self.packets += other.packets
        self.refused += other.refused
        self.on_tap += other.on_tap
        self.matched += other.matched
        self.runs += other.runs
        self.different += other.different
        self.left_in_cb += other.left_in_cb
        self.examples = [*self.examples, *other.examples][:EXAMPLES]
        for kind, (count, example) in other.by_kind.items():
            self._count_kind(kind, count, example)

    def note(self, found: Difference, *, long: bool = False) -> None:
        """Count a difference."""
        self.different[found.program] += 1
        if found.program == QEMU:
            self._count_kind(kinds.of(found.packet, found.config, long=long), 1, found)
        elif len(self.examples) < EXAMPLES:
            self.examples.append(found)

    def _count_kind(self, kind: kinds.Kind, count: int, example: Difference) -> None:
        before, plainest = self.by_kind.get(kind, (0, example))
        self.by_kind[kind] = (before + count, min(plainest, example, key=lambda one: one.oddity))

    @property
    def holds(self) -> bool:
        """Whether qsteer's programs agree with the reference everywhere."""
        return not self.examples and not self.left_in_cb


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Configurations ``first`` to ``last`` of a seed; ``elf`` is QEMU's object file, empty to leave it out."""

    seed: int
    first: int
    last: int
    per_config: int
    elf: bytes


def check(job: Job) -> Tally:
    """Everything on the packets of some configurations.  Raises QsteerError, NativeError."""
    tally = Tally()
    with contextlib.ExitStack() as stack:
        steers: list[Steers] = []
        for build in support.BUILDS:
            steers += [Static(build, stack), shared_maps(build, stack)]
        if job.elf:
            steers.append(qemus_own(job.elf, stack))
        stack.enter_context(support.network_namespace())
        tap = stack.enter_context(support.tap(TAP, QUEUES))
        support.links_up(TAP, mtu=9000)
        sock = stack.enter_context(support.sender(TAP))
        for number in range(job.first, job.last):
            config = cases.config(job.seed, number)
            for one in steers:
                one.set(config)
            packets = tuple(cases.packets_for(job.seed, number, job.per_config))
            refused = _test_run(steers, packets, config, tally)
            chosen = _chosen(random.Random(f"{job.seed} {number} tap"), refused, packets)
            for one in steers:
                _on_tap(one, tap, sock, chosen, config, tally)
            tally.configs += 1
            tally.frozen += any(isinstance(one, Static) and one.is_frozen for one in steers)
            tally.on_tap += len(chosen)
    return tally


def _test_run(steers: Sequence[Steers], packets: Sequence[bytes], config: RssConfig, tally: Tally) -> list[bytes]:
    """BPF_PROG_TEST_RUN of all packets; gives those that it refuses."""
    refused = []
    for packet in packets:
        try:
            answers = [(one.name, programs.run_program(one.prog_fd, packet)) for one in steers]
        except QsteerError as error:
            if error.errno != errno.EINVAL or len(packet) >= 14 + 40:
                raise
            refused.append(packet)
            continue
        match, wanted = classify(packet, config.types), queue_of(packet, config)
        tally.matched[match.hash_type.name or "" if match else "none"] += 1
        for name, answer in answers:
            tally.left_in_cb += answer.cb_left and name != QEMU
            if answer.queue != wanted:
                tally.note(_difference(name, "test run", packet, config, answer.queue, wanted))
    tally.packets += len(packets) - len(refused)
    tally.refused += len(refused)
    for one in steers:
        tally.runs[one.name] += len(packets) - len(refused)
    return refused


def _difference(program: str, where: str, packet: bytes, config: RssConfig, queue: int, wanted: int) -> Difference:
    return Difference(program=program, where=where, packet=packet, config=config, queue=queue, wanted=wanted)


def _chosen(rng: random.Random, refused: Sequence[bytes], packets: Sequence[bytes]) -> tuple[bytes, ...]:
    """For the tap: what was refused, and some others, half of them long."""
    short = refused[: ON_TAP // 2]
    others = rng.sample(packets, min(ON_TAP - len(short), len(packets)))
    return (*short, *(packet if at % 2 else packet.ljust(cases.LONG, cases.FILLER) for at, packet in enumerate(others)))


def _on_tap(
    one: Steers,
    tap: support.TapUnderTest,
    sock: socket.socket,
    chosen: Sequence[bytes],
    config: RssConfig,
    tally: Tally,
) -> None:
    """Packets through the tap while a program is attached to it."""
    kernel.attach(tap.open.fds[0], one.prog_fd)
    for packet in chosen:
        sock.send(packet)
    came = _received(tap, len(chosen))
    for packet in chosen:
        queue, wanted = came[packet].pop(0), queue_of(packet, config) % QUEUES
        if queue != wanted:
            long = len(packet) >= cases.LONG
            tally.note(_difference(one.name, "tap", packet, config, queue, wanted), long=long)
    tally.runs[one.name] += len(chosen)


def _received(tap: support.TapUnderTest, count: int) -> dict[bytes, list[int]]:
    """The queues that each packet came out of."""
    came: dict[bytes, list[int]] = {}
    for _ in range(count):
        queue, packet = tap.receive()
        came.setdefault(packet, []).append(queue)
    return came


def run(packets: int, seed: int, jobs: int, elf: bytes) -> Iterator[Tally]:
    """The tallies of the parts of a run, as they come."""
    per_config = min(PER_CONFIG, packets)
    configs = math.ceil(packets / per_config / TAKEN)
    step = min(CONFIGS_PER_JOB, -(-configs // jobs))
    parts = [
        Job(seed=seed, first=first, last=min(first + step, configs), per_config=per_config, elf=elf)
        for first in range(0, configs, step)
    ]
    if jobs == 1:
        yield from map(check, parts)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check, parts)


def report(tally: Tally, took_s: float) -> str:
    """What was found."""
    rows: list[tuple[str, ...]] = [("PROGRAM", "RUNS", "DIFFER FROM THE REFERENCE")]
    rows += [(name, f"{runs:,}", f"{tally.different[name]:,}") for name, runs in tally.runs.items()]
    matched = ", ".join(f"{name} {count:,}" for name, count in sorted(tally.matched.items()))
    parts = [
        columns(rows),
        f"{tally.packets:,} packets over {tally.configs:,} configurations ({tally.frozen:,} frozen) in {took_s:.0f} s: "
        f"{tally.packets / took_s:,.0f} packets, {tally.runs.total() / took_s:,.0f} runs a second",
        f"hashed as: {matched}",
        f"refused by test runs (shorter than their IP header): {tally.refused:,}; "
        f"through a tap of {QUEUES} queues, too: {tally.on_tap:,}",
    ]
    if tally.left_in_cb:
        parts.append(f"{tally.left_in_cb:,} runs of qsteer's programs have left something in skb->cb")
    parts += [str(one) for one in tally.examples]
    if tally.by_kind:
        parts += ["", "Where QEMU's program differs ([open]: the specification does not say which is right):"]
    for kind, (count, example) in sorted(tally.by_kind.items(), key=lambda item: -item[1][0]):
        parts += ["", f"{count:,} times: {kind.name}{' [open]' if kind.open else ''}", str(example)]
    return "\n".join(parts)


def main() -> int:
    """Print the report; exit code 1 if qsteer's programs do not agree with the reference."""
    parser = argparse.ArgumentParser(
        prog="python -m integration.agreement", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--packets", type=int, default=PACKETS, help=f"how many, at least ({PACKETS})")
    parser.add_argument("--seed", type=int, default=1, help="for other packets and configurations")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    parser.add_argument("--qemu", type=Path, help="whose program; default: the QEMU of provision.py")
    parser.add_argument("--without-qemu", action="store_true", help="leave QEMU's own program out")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("agreement: only root may load BPF programs; try sudo", file=sys.stderr)
        return 1
    try:
        elf = b"" if given.without_qemu else qemu.steering_object(given.qemu or provision().qemu)
        tally, took_s = _counted(run(given.packets, given.seed, given.jobs, elf))
    except (ProvisionError, QsteerError, native.NativeError) as error:
        print(f"agreement: {error}", file=sys.stderr)
        return 1
    print(report(tally, took_s))
    return 0 if tally.holds else 1


def _counted(parts: Iterator[Tally]) -> tuple[Tally, float]:
    """All of it, and the seconds that it took."""
    tally, began = Tally(), time.monotonic()
    for part in parts:
        tally.add(part)
        if sys.stderr.isatty():
            print(f"\r{tally.packets:,} packets", end="", file=sys.stderr, flush=True)
    return tally, time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
