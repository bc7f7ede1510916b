# SPDX-License-Identifier: BSD-2-Clause
"""shared-maps: how long the kernel's automq steers when a guest changes its key or table.

QEMU then takes the program off, writes the maps, and attaches it again.

Theory of operation
-------------------
When QEMU calls TUNSETSTEERINGEBPF is the kernel's word: its tracepoints of ioctl(), by the clock that the packets are
timed by.  The program is off at least from the end of the first call to the beginning of the second, and at most from
the beginning of the first to the end of the second.  Tracing makes each call some hundred nanoseconds longer.

Numbered packets (numbered.py) say the same from the other side.  QEMU reads the tap, so packet sockets watch it, one
per queue; they see a packet's queue also if the guest is too slow to get it.  On a queue that neither the old nor the
new table gives there may be packets only while the program was off.
"""

import contextlib
import ctypes
import os
import random
import re
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from integration.guest import Guest
from integration.numbered import Log, Mapping, Traffic, Verdict, judge, queues_of
from integration.provision import Provisioned
from integration.timeline import STEP_S, Sampler
from qsteer.errors import UnsupportedError
from qsteer.render import columns
from qsteer.rss import KEY_BYTES
from tests.kernel import support

TAP = "qschg1"
QUEUES = 4
PAUSE_S = 0.0003
"""How often packets are collected, and more are sent."""

_TUNSETSTEERINGEBPF = 0x800454E0
"""<linux/if_tun.h>, on most architectures: _IOR('T', 224, int)."""
_EVENTS = ("sys_enter_ioctl", "sys_exit_ioctl")
_TRACED = re.compile(r"-(\d+) +\[\d+\].* (\d+)\.(\d{6}): sys_ioctl(\(.*cmd: 0x0*([0-9a-f]+)| -> )")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A call of TUNSETSTEERINGEBPF, in nanoseconds of CLOCK_MONOTONIC; a microsecond more, at both ends together."""

    began_ns: int
    ended_ns: int


class Tracer:
    """The calls of TUNSETSTEERINGEBPF that a process makes, by the kernel's tracepoints.  A context manager.

    It has a buffer of its own, and disturbs nobody else who traces.  Raises UnsupportedError where the kernel has none.
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="qsteer-trace-"))
            done = subprocess.run(("mount", "-t", "tracefs", "tracefs", folder), capture_output=True, check=False)
            if done.returncode:
                raise UnsupportedError("this kernel has no tracefs, which tells when QEMU attaches a program")
            stack.callback(subprocess.run, ("umount", folder), check=True)
            self._here = Path(folder, "instances", f"qsteer-{os.getpid()}")
            self._here.mkdir()
            stack.callback(self._here.rmdir)
            self._turn_on()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _turn_on(self) -> None:
        (self._here / "trace_clock").write_text("mono")
        threads = sorted(int(path.name) for path in Path(f"/proc/{self._pid}/task").iterdir())
        (self._here / "set_event_pid").write_text(" ".join(map(str, threads)))
        try:
            for event in _EVENTS:
                (self._here / "events/syscalls" / event / "enable").write_text("1")
        except OSError:
            raise UnsupportedError("this kernel does not trace system calls (CONFIG_FTRACE_SYSCALLS)") from None

    def calls(self) -> tuple[Call, ...]:
        """Those so far, in the order of time."""
        begun: dict[str, int] = {}
        found = []
        for line in (self._here / "trace").read_text().splitlines():
            if not (told := _TRACED.search(line)):
                continue
            thread, at = told[1], int(told[2] + told[3]) * 1000
            if told[5] and int(told[5], 16) == _TUNSETSTEERINGEBPF:
                begun[thread] = at
            elif not told[5] and thread in begun:
                found.append(Call(began_ns=begun.pop(thread), ended_ns=at + 1000))
        return tuple(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """How long the kernel's automq steered at each change of a guest, at least and at most, in microseconds.

    ``polled`` is how many of these windows a look every few milliseconds has seen.  ``stray`` is how many packets of
    the verdict's ``outside`` were sent while a program was attached.
    """

    qemu_version: str
    took_s: float
    at_least_us: tuple[float, ...]
    at_most_us: tuple[float, ...]
    verdict: Verdict
    stray: int
    polled: int


def change_in_a_guest(files: Provisioned, user: str, changes: int, seed: int) -> Found:
    """Boot a guest with ``qsteer run``, and let it change key and table.  Raises UnsupportedError, GuestError."""
    tap = f"id=net0,queues={QUEUES},ifname={TAP}"
    prefix = (sys.executable, "-m", "qsteer", "run", "--vm", TAP, "--tap", tap, "--user", user, "--")
    with Guest(files, name=TAP, user=user, prefix=prefix) as guest, contextlib.ExitStack() as stack:
        guest.wait_ready()
        mac = guest.mac()
        support.links_up(TAP)
        guest.run("ethtool -X eth0 equal 3")  # QEMU attaches it for the first time, over nothing
        configs = [guest.rss()]
        watchers = [stack.enter_context(_watcher(TAP, queue)) for queue in range(QUEUES)]
        tracer = stack.enter_context(Tracer(guest.pid))
        sampler = stack.enter_context(Sampler(guest.pid, TAP))
        flow = stack.enter_context(Traffic(TAP, mac, [watcher.fileno() for watcher in watchers]))
        began = time.monotonic()
        with flow.flowing(PAUSE_S):
            for command in _guest_commands(changes, seed):
                guest.run(command)
                configs.append(guest.rss())
        took = time.monotonic() - began
        log, calls = flow.finish(), tracer.calls()
    if len(calls) != 2 * changes:
        raise UnsupportedError(
            f"QEMU has called TUNSETSTEERINGEBPF {len(calls)} times for {changes} changes, not twice each"
        )
    off, on = calls[::2], calls[1::2]
    verdict = judge(log, _guest_mappings([queues_of(config, mac, QUEUES) for config in configs], off, on))
    return Found(
        qemu_version=files.qemu_version,
        took_s=took,
        at_least_us=tuple(max(new.began_ns - old.ended_ns, 0) / 1000 for old, new in zip(off, on, strict=True)),
        at_most_us=tuple((new.ended_ns - old.began_ns) / 1000 for old, new in zip(off, on, strict=True)),
        verdict=verdict,
        stray=_stray(log, verdict.outside, off, on),
        polled=sum(not moment.program for moment in sampler.moments),
    )


def _guest_commands(changes: int, seed: int) -> Iterator[str]:
    """Tables by weight, and every third time a key."""
    rng = random.Random(seed)
    for number in range(changes):
        if number % 3 == 2:
            yield f"ethtool -X eth0 hkey {rng.randbytes(KEY_BYTES).hex(':')}"
        else:
            weights = [rng.randrange(10) for _ in range(QUEUES - 1)]
            yield f"ethtool -X eth0 weight {' '.join(map(str, weights))} {rng.randrange(1, 10)}"


def _guest_mappings(queues: Sequence[tuple[int, ...]], off: Sequence[Call], on: Sequence[Call]) -> tuple[Mapping, ...]:
    since = [0, *(call.began_ns for call in on)]
    until = [*(call.ended_ns for call in off), time.monotonic_ns()]
    return tuple(
        Mapping(since_ns=first, until_ns=last, queues=given)
        for first, last, given in zip(since, until, queues, strict=True)
    )


def _stray(log: Log, outside: Sequence[int], off: Sequence[Call], on: Sequence[Call]) -> int:
    """How many packets were sent while a program was attached all the time."""
    windows = [(old.began_ns, new.ended_ns) for old, new in zip(off, on, strict=True)]
    return sum(
        not any(began <= log.ended[number] and log.began[number] <= ended for began, ended in windows)
        for number in outside
    )


_SO_ATTACH_FILTER = 26
_ETH_P_ALL = 3
_SKF_AD_OFF = 0xFFFFF000
_SKF_AD_PKTTYPE, _SKF_AD_QUEUE = 4, 24
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06


@contextlib.contextmanager
def _watcher(tap: str, queue: int) -> Iterator[socket.socket]:
    """A packet socket that sees what is sent out of one queue of a device, in the kernel's classic BPF."""
    code = (
        (_LOAD_WORD, 0, 0, _SKF_AD_OFF + _SKF_AD_PKTTYPE),
        (_JUMP_IF_EQUAL, 0, 3, socket.PACKET_OUTGOING),
        (_LOAD_WORD, 0, 0, _SKF_AD_OFF + _SKF_AD_QUEUE),
        (_JUMP_IF_EQUAL, 0, 1, queue),
        (_RETURN, 0, 0, 0xFFFF),
        (_RETURN, 0, 0, 0),
    )
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0) as sock:
        program = struct.pack("HP", len(code), ctypes.addressof(instructions))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
        sock.bind((tap, _ETH_P_ALL))
        yield sock


def text(found: Found) -> str:
    """What a guest's changes came to."""
    verdict = found.verdict
    rows: list[tuple[str, ...]] = [("WITHOUT A PROGRAM", "MEDIAN", "MIN", "MAX")]
    for name, times in (("at least", found.at_least_us), ("at most", found.at_most_us)):
        rows.append((name, *(f"{value:.0f} us" for value in (statistics.median(times), min(times), max(times)))))
    return "\n".join(
        (
            columns(rows),
            f"QEMU {found.qemu_version}, {len(found.at_most_us)} changes by the guest; a look every "
            f"{STEP_S * 1000:.0f} ms has seen {found.polled} of these windows",
            f"{verdict.packets:,} packets, {verdict.packets / found.took_s:,.0f} a second: {len(verdict.outside)} on a "
            f"queue that neither the old nor the new table gives, {found.stray} of them while a program was attached",
        )
    )
