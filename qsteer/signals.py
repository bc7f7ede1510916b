# SPDX-License-Identifier: BSD-2-Clause
"""The one place that waits: for a change of anything about the host's taps, for a time, or for a signal to stop.

Theory of operation

What has changed is not for this module.  It compares what it sees with what it saw before (``_Seen``): the kernel's
digest of all taps, the digest of the processes that hold their queues, and the time stamp of the directory of holds.
The caller then looks at the host itself.

Hints say when to look: a program was loaded or unloaded, a device or a queue came or went, a process ended.  None of
them is relied on.  A program taken off sends none if somebody else has it open, a flood of them loses some, and some
hosts give none at all; then a change is seen after ``interval_s``.  One hint comes before its change (a program is
loaded, then attached), hence several looks after it.

Nothing is lost between two calls of wait().  What was told is taken off before the look that it leads to, and that look
is before wait() returns, hence before the caller's own look at the host.  So a change falls on one of two sides: before
the look of wait(), and the caller sees it; or after it, and the next look of wait() finds another digest than this one,
whether or not the caller has seen the change as well.  Looking once too often is the price.  The first wait() reports a
change, as everything is new.

All this is about what the caller has seen.  What it has done itself it has to tell by acted(), and to look again: if it
attaches a program, and QEMU takes that off again before the next look, everything is as at the last one.

What others put back exactly as it was between two looks is no change.  A program attached again is one where the kernel
keeps the attachment at another address: always if the old one was replaced, or taken off a moment before.  Once an RCU
grace period has passed (10 to 20 ms), the kernel mostly uses the old address again; then what was off for less than an
interval, and is on again as before, is not seen unless a hint came in between.

A time stamp of a file system is as coarse as a timer tick, so two holds may have one.  A stamp counts as another one as
soon as it is so old that nothing more can be stored under it.

Costs (see pace.py): one look per interval; more looks, and the hints that lead to them, get half a percent of a core.
With nothing left, hints do not wake this process; they wait in the kernel, or are lost there, which is told.  The
digest of the holders costs more the more files the host has open, so it has its own share, and is taken less often
where it is dear.
"""

import contextlib
import enum
import logging
import math
import os
import resource
import select
import signal
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Self

from qsteer import holds, kernel
from qsteer.errors import QsteerError
from qsteer.hints import BpfEvents, Uevents
from qsteer.pace import Bucket, Pace

log = logging.getLogger(__name__)

_HOLDERS_SHARE, _HOLDERS_BURST_S = 0.003, 0.02
"""What the digest of the holders may take of one core for long, and in a burst."""
_TICK_NS = 20_000_000
"""More than a timer tick of any kernel."""
_NAMESPACES_MAX = 64
"""Each costs a socket, and what its own processes make the kernel say."""
_FDS_MAX = 16384
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Wake(enum.Enum):
    """Why wait() has returned."""

    CHANGED = "changed"
    DEADLINE = "deadline"
    RELOAD = "reload"
    STOP = "stop"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """All of the host that is compared: two digests and the directory of holds."""

    devices: int
    holders: int
    holds: tuple[int, int, bool] | None


class Signals:
    """A context manager, for the main thread: within it SIGTERM, SIGINT and SIGHUP are what wait() returns.

    ``interval_s`` is the longest time between two looks; ``hints=False`` leaves it at that.  Raises QsteerError where
    the kernel does not let qsteer look at its taps.
    """

    def __init__(self, *, interval_s: float = 0.8, hints: bool = True) -> None:
        self._interval_s = interval_s
        self._with_hints = hints
        now = time.monotonic()
        self._pace = Pace(interval_s=interval_s, now=now)
        self._holders_budget = Bucket(per_s=_HOLDERS_SHARE, limit=_HOLDERS_BURST_S, now=now)
        self._holders_due = now
        self._seen: _Seen | None = None
        self._cpu_at = 0.0
        self._stop = self._reload = False
        self._programs: frozenset[int] = frozenset()
        self._pidfds: dict[int, int] = {}  # by pid
        self._pids: dict[int, int] = {}  # by pidfd
        self._ended: set[int] = set()  # pids, as long as the caller wants them watched
        self._news = False  # a watched process has ended, or the caller has acted, since the last look
        self._bpf_events: BpfEvents | None = None
        self._uevents: dict[int, Uevents] = {}  # by the inode number of the network namespace
        self._namespaces: dict[int, int] = {}  # that number, by pid
        self._own_namespace = 0
        self._muted = False
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            _raise_fd_limit()
            self._epoll = stack.enter_context(select.epoll())
            self._hints = stack.enter_context(select.epoll())
            self._epoll.register(self._hints, select.EPOLLIN)
            self._signals_fd = _signals_into_a_pipe(stack)
            self._epoll.register(self._signals_fd, select.EPOLLIN)
            stack.callback(self._forget_all)
            if self._with_hints:
                kernel.digest()  # who may not look at all is told that alone
                self._open_hints()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def watch(self, *, programs: Collection[int], pids: Collection[int], netns_pids: Collection[int]) -> None:
        """What to be woken by, from now on: the unload of these programs, the end of these processes, and what happens
        to network devices in the namespaces of the latter ones.

        A change of any tap of the host is seen without it, later.  A process that is gone already is a change.
        """
        self._programs = frozenset(programs)
        wanted = {*pids, *netns_pids}
        self._ended &= wanted
        for pid in self._pidfds.keys() - wanted:
            self._forget(pid)
        for pid in wanted - self._pidfds.keys() - self._ended:
            self._watch_process(pid)
        if self._with_hints:
            self._watch_namespaces(netns_pids)

    def acted(self) -> None:
        """The caller has changed something about taps or holds; the next wait() reports it as a change."""
        self._news = True
        self._pace.hinted(time.monotonic(), early=False)

    def wait(self, deadline: float | None = None) -> Wake:
        """Sleep until there is something to do; ``deadline`` is a time of time.monotonic().

        CHANGED: the caller has to look at the host, to call watch() with what it finds, and acted() if it acts.  It is
        also what a look that fails comes to; only of the first one the QsteerError is raised.
        """
        self._cpu_at = time.thread_time()
        now = time.monotonic()
        self._sleep(now, until=now)  # what has come since the last call; a flood of changes must not hide a signal
        while True:
            now = time.monotonic()
            self._charge(now)
            if self._stop:
                return Wake.STOP
            if self._reload:
                self._reload = False
                return Wake.RELOAD
            if now >= self._pace.look_at(now) and self._look(now):
                return Wake.CHANGED
            if deadline is not None and now >= deadline:
                return Wake.DEADLINE
            self._sleep(now, until=min(self._pace.look_at(now), math.inf if deadline is None else deadline))

    # Looking

    def _look(self, now: float) -> bool:
        self._take_hints()  # this look is the one that they are for
        try:
            seen = self._see(now)
        except QsteerError as error:
            if not self._seen:
                raise
            # While tun is unloaded and loaded again, say.  The caller's own look tells whether it is more than that.
            log.info("%s", error)
            self._pace.looked(time.monotonic(), changed=True)
            return True
        changed = self._news or seen != self._seen
        self._seen, self._news = seen, False
        self._pace.looked(time.monotonic(), changed=changed)
        return changed

    def _see(self, now: float) -> _Seen:
        before = self._seen
        devices, stamp = kernel.digest(), _hold_stamp()
        if before and not self._may_see_holders(now, wanted=devices != before.devices):
            return _Seen(devices=devices, holders=before.holders, holds=stamp)
        return _Seen(devices=devices, holders=self._holders(now), holds=stamp)

    def _may_see_holders(self, now: float, *, wanted: bool) -> bool:
        """A queue that comes or goes changes both digests; seen at once, they are one change."""
        return (wanted or now >= self._holders_due) and self._holders_budget.has(0, now)

    def _holders(self, now: float) -> int:
        started = time.thread_time()
        holders = kernel.holders_digest()
        cost = time.thread_time() - started
        self._holders_budget.take(cost, now)
        self._holders_due = now + self._interval_s
        self._cpu_at += cost  # not charged twice
        return holders

    def _charge(self, now: float) -> None:
        spent = time.thread_time()
        self._pace.charge(spent - self._cpu_at, now)
        self._cpu_at = spent

    # Sleeping

    def _sleep(self, now: float, *, until: float) -> None:
        """Take what comes; hints only as long as they make a difference."""
        self._mute(not self._pace.listens(now))
        if (affordable := self._pace.affordable_at(now)) > now:
            until = min(until, affordable)
        for fd, _ in self._epoll.poll(max(0.0, until - now)):
            if fd == self._signals_fd:
                self._take_signals()
            elif fd == self._hints.fileno():
                self._take_hints()
            else:
                self._process_ended(self._pids[fd])

    def _mute(self, muted: bool) -> None:
        if muted == self._muted:
            return
        self._muted = muted
        self._epoll.modify(self._hints, 0 if muted else select.EPOLLIN)
        if not muted:
            # perf's poll says once that there is something, and may have said so to a mask of nothing.
            self._take_hints()

    def _take_signals(self) -> None:
        numbers = os.read(self._signals_fd, 4096)
        self._stop = self._stop or any(number in _STOPPING for number in numbers)
        self._reload = self._reload or signal.SIGHUP in numbers

    def _take_hints(self) -> None:
        ready = {fd for fd, _ in self._hints.poll(0)}
        told = [uevents.take() for uevents in self._uevents.values() if uevents.fileno() in ready]
        gone, loaded = self._bpf_events.take(self._programs) if self._bpf_events else (False, False)
        if gone or loaded or any(told):
            self._pace.hinted(time.monotonic(), early=loaded)

    # What is watched

    def _open_hints(self) -> None:
        try:
            self._bpf_events = BpfEvents()
            self._hints.register(self._bpf_events, select.EPOLLIN)
        except QsteerError as error:
            self._say_once(f"{error}; changes are seen within {self._interval_s} s")
        self._own_namespace = _namespace_of(os.getpid())
        self._open_uevents(self._own_namespace, 0)

    def _open_uevents(self, namespace: int, pid: int) -> None:
        try:
            uevents = Uevents(pid)
        except QsteerError as error:
            log.info("%s; changes there are seen within %s s", error, self._interval_s)
            return
        self._uevents[namespace] = uevents
        self._hints.register(uevents, select.EPOLLIN)

    def _watch_process(self, pid: int) -> None:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            self._note_end(pid)
            return
        except OSError as error:
            self._say_once(f"cannot watch for the end of some processes: {error.strerror}")
            return
        self._pidfds[pid] = pidfd
        self._pids[pidfd] = pid
        self._epoll.register(pidfd, select.EPOLLIN)

    def _watch_namespaces(self, pids: Collection[int]) -> None:
        for pid in self._pidfds.keys() & set(pids) - self._namespaces.keys():
            self._namespaces[pid] = _namespace_of(pid)
        wanted = {self._namespaces[pid]: pid for pid in pids if self._namespaces.get(pid)}
        self._close_uevents(self._uevents.keys() - wanted.keys())
        for namespace in wanted.keys() - self._uevents.keys():
            if len(self._uevents) > _NAMESPACES_MAX:
                self._say_once(f"more than {_NAMESPACES_MAX} network namespaces: changes in the others are seen later")
                break
            self._open_uevents(namespace, wanted[namespace])

    def _close_uevents(self, namespaces: Collection[int]) -> None:
        """A socket would keep a namespace alive that nobody else is in, and the devices in it."""
        for namespace in self._uevents.keys() & set(namespaces) - {self._own_namespace}:
            self._uevents.pop(namespace).close()

    def _process_ended(self, pid: int) -> None:
        self._forget(pid)
        self._close_uevents(self._uevents.keys() - set(self._namespaces.values()))
        self._note_end(pid)

    def _note_end(self, pid: int) -> None:
        self._ended.add(pid)
        self._news = True
        self._pace.hinted(time.monotonic(), early=False)

    def _forget(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid)
        del self._pids[pidfd]
        os.close(pidfd)
        self._namespaces.pop(pid, None)

    def _forget_all(self) -> None:
        for pid in tuple(self._pidfds):
            self._forget(pid)
        for uevents in self._uevents.values():
            uevents.close()
        self._uevents.clear()
        if self._bpf_events:
            self._bpf_events.close()
            self._bpf_events = None

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.warning("%s", message)


def _signals_into_a_pipe(stack: contextlib.ExitStack) -> int:
    """The end to read: one byte, its number, for each signal that Python handles."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    stack.callback(os.close, read_fd)
    stack.callback(os.close, write_fd)
    stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False))
    for number in (*_STOPPING, signal.SIGHUP):
        stack.callback(signal.signal, number, signal.signal(number, _leave_it_to_the_pipe))
    return read_fd


def _leave_it_to_the_pipe(number: int, frame: FrameType | None) -> None:
    pass


def _hold_stamp() -> tuple[int, int, bool] | None:
    """Changes with every hold that is put or removed, in the end."""
    try:
        status = (holds.RUNTIME / "holds").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, abs(time.time_ns() - status.st_mtime_ns) > _TICK_NS


def _namespace_of(pid: int) -> int:
    """The inode number of a process's network namespace, 0 once the process is gone."""
    try:
        return Path(f"/proc/{pid}/ns/net").stat().st_ino
    except OSError:
        return 0


def _raise_fd_limit() -> None:
    """One fd per process that is watched."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FDS_MAX if hard == resource.RLIM_INFINITY else min(_FDS_MAX, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
