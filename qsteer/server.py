# SPDX-License-Identifier: BSD-2-Clause
"""The clients of ``qsteer serve``: one loop that takes their requests and gives them fds.

Theory of operation
===================

A client is who the kernel says that it is (SO_PEERCRED, SO_PEERGROUPS); the socket itself is open to everybody, and
``access`` decides.  The protocol is in ``wire``.

Nobody waits for anybody else's client.  All sockets are non-blocking; a client has ``timeout_s`` to send its request
and as long to take the answer, and is dropped then; one user has ``clients_per_user`` of them at once, and the next one
is told so and closed as soon as it is accepted, as are those without a rule, who may come as many uids, once half of
all places are taken.  What is made for a client that does not take it goes with its fds.

An fd can be a trap: to close one of a file system in user space (FUSE) may wait for that user's process.  So none is
received but the one that belongs to the request for a program, from a user whom a rule allows programs; it is looked at
in its fdinfo, which asks nobody; and one that is no tap's is closed by a thread of its own, while the user's next
requests for programs are refused.
"""

import contextlib
import enum
import errno
import functools
import os
import selectors
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qsteer import access, kernel, links, programs, ready, shim, wire
from qsteer._shim import ffi, lib
from qsteer.access import Grant, Limits, Rule
from qsteer.errors import BusyError, QsteerError, UsageError, printable
from qsteer.model import Source
from qsteer.notify import Priority
from qsteer.pace import Bucket
from qsteer.runplan import Order
from qsteer.settings import Serve

Say = Callable[[str, Priority], None]

ACCEPTED_AT_ONCE = 16
"""Then those that are accepted have their turn."""
CLOSING = "qsteer-closing"
"""What the threads are called that close fds."""
CLOSING_MOST = 16
DEAF_S = 0.2
"""How long to accept nobody after the kernel would not: out of fds, say."""
PROGRAMS_PER_S, PROGRAMS_AT_ONCE = 0.1, 1000
"""For one user.  A program lives as long as anybody has it open, which is not known here, and takes kernel memory."""
LINES_PER_S, LINES_AT_ONCE = 1.0, 20
"""What is said of one user's requests; of more only how many there were."""

_PEER = struct.Struct("iII")
_GROUPS_BYTES = 1024
"""Of SO_PEERGROUPS; Python asks for no more.  Who is in more than 256 groups is taken to be in the first one only."""
_DEVICES = Path("/sys/class/net")
_AGAIN = "try again"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """What the configuration says, with the numbers of its users and groups."""

    serve: Serve
    grants: tuple[Grant, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Who is at the other end of a socket, by the kernel's word; ``gids`` are all groups of the process."""

    pid: int
    uid: int
    gids: frozenset[int]

    def __str__(self) -> str:
        return f"pid {self.pid} uid {self.uid}"


class Host:
    """What the service does to the host; tests have another one."""

    def make(self, order: Order) -> ready.ReadyTap:
        """A tap.  Raises QsteerError."""
        return ready.make(order)

    def load_program(self, tap: str) -> tuple[tuple[int, ...], str]:
        """The fds of a program for QEMU, and what it is called.  Raises QsteerError."""
        program = programs.load_program(tap=tap, source=Source.SHARED_MAPS)
        return program.fds, f"qsteer {program.id} ({program.build})"

    def is_tun(self, fd: int) -> bool:
        """Whether an fd is one of /dev/net/tun, whatever else it may be; without asking its file system."""
        with contextlib.suppress(OSError):
            return any(line.startswith("iff:") for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
        return False

    def multi_queue_tap(self, queue_fd: int) -> str:
        """The name of the multi-queue tap that an fd of /dev/net/tun belongs to.  Raises QsteerError if it is none."""
        name = kernel.tap_name(queue_fd)
        flags = ffi.new("uint32_t *")
        shim.check(lib.qs_tap_flags(queue_fd, flags), f'cannot look at "{name}"')
        if not flags[0] & lib.IFF_TAP:
            raise UsageError(f'"{name}" is a tun device, not a tap: it carries no Ethernet frames')
        if not flags[0] & lib.IFF_MULTI_QUEUE:
            raise UsageError(f'tap "{name}" has one queue only: there is nothing to steer')
        return name

    def taps(self, rule: Rule) -> int:
        """How many taps have a rule's prefix, or, to be quick, something from there up to the rule's limit.

        Raises QsteerError.
        """
        named = {name: index for index, name in socket.if_nameindex() if name.startswith(rule.prefix)}
        if len(named) < rule.taps:
            return len(named)
        found = _taps_in_sysfs(named)
        # To list all devices takes 0.4 s where there are a thousand: too long for who asks again and again.
        return sum(tun.name.startswith(rule.prefix) for tun in links.tuns()) if found is None else found

    def bridge_mtu(self, name: str) -> int:
        """Raises QsteerError where there is no such bridge."""
        return links.bridge(name).mtu

    def has_vhost(self) -> bool:
        """Whether /dev/vhost-net works."""
        return ready.has_vhost()


class _Phase(enum.Enum):
    """What is next: a request's length, its JSON, the fd that belongs to it, or the client's taking the answer."""

    HEADER = enum.auto()
    BODY = enum.auto()
    FD = enum.auto()
    ANSWER = enum.auto()


@dataclass(slots=True, kw_only=True, eq=False)
class _Client:
    """A connection.

    ``needed`` bytes are in the part of the request that ``got`` is of.  ``out``, then ``messages``, are what the client
    has not taken yet, and ``fds`` are closed with it.  ``asked`` and ``result`` are for the log.
    """

    sock: socket.socket
    peer: Peer
    since: float
    deadline: float
    phase: _Phase = _Phase.HEADER
    needed: int = wire.HEADER_BYTES
    got: bytearray = field(default_factory=bytearray)
    out: bytearray = field(default_factory=bytearray)
    messages: deque[tuple[int, ...]] = field(default_factory=deque)
    fds: tuple[int, ...] = ()
    asked: str = "nothing"
    result: str = ""
    priority: Priority = Priority.INFO


class Server:
    """The loop over all clients.  It owns its listening socket."""

    def __init__(self, listener: socket.socket, policy: Policy, host: Host, say: Say) -> None:
        self.policy = policy
        self._listener, self._host, self._log = listener, host, _Log(say)
        self._clients: set[_Client] = set()
        self._closing: list[tuple[int, threading.Thread]] = []
        self._programs: dict[int, Bucket] = {}
        self._deaf_until: float | None = None
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self.watch(listener, self._accept)

    @property
    def clients(self) -> int:
        """How many there are."""
        return len(self._clients)

    def watch(self, readable: socket.socket, called: Callable[[], None]) -> None:
        """Call something whenever a socket is readable."""
        self._selector.register(readable, selectors.EVENT_READ, called)

    def turn(self, timeout_s: float) -> None:
        """Do what there is to do, and wait for it ``timeout_s`` at most."""
        now = time.monotonic()
        due = [client.deadline for client in self._clients]
        due += [at for at in (self._deaf_until, self._log.due(now)) if at is not None]
        for key, _ in self._selector.select(max(0.0, min([timeout_s, *(at - now for at in due)]))):
            key.data()
        now = time.monotonic()
        for client in [client for client in self._clients if client.deadline <= now]:
            self._time_is_up(client)
        if self._deaf_until is not None and self._deaf_until <= now:
            self._deaf_until = None
            self.watch(self._listener, self._accept)
        self._log.turn(now)

    def close(self) -> None:
        """End it at once.  What was handed out lives on."""
        for client in tuple(self._clients):
            self._drop(client)
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        for _ in range(ACCEPTED_AT_ONCE):
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                self._log.add(0, f"cannot accept: {error.strerror}", Priority.WARNING)
                self._selector.unregister(self._listener)
                self._deaf_until = time.monotonic() + DEAF_S
                return
            try:
                peer = _peer_of(sock)
            except OSError:
                sock.close()  # gone already
                continue
            self.adopt(sock, peer)

    def adopt(self, sock: socket.socket, peer: Peer) -> None:
        """A new client; it is told so at once if there are too many."""
        sock.setblocking(False)
        now = time.monotonic()
        serve = self.policy.serve
        client = _Client(sock=sock, peer=peer, since=now, deadline=now + serve.timeout_s)
        self._selector.register(sock, selectors.EVENT_READ, functools.partial(self._attend, client))
        full = len(self._clients) >= (serve.clients if self._rules(peer) else serve.clients // 2)
        self._clients.add(client)
        if full:
            self._dismiss(client, BusyError("qsteer serve has too many clients", hint=_AGAIN))
        elif sum(other.peer.uid == peer.uid for other in self._clients) > serve.clients_per_user:
            self._dismiss(client, BusyError(f"uid {peer.uid} has too many requests at once", hint=_AGAIN))

    def _rules(self, peer: Peer) -> tuple[Rule, ...]:
        return access.rules_for(self.policy.grants, uid=peer.uid, gids=peer.gids)

    def _attend(self, client: _Client) -> None:
        """Go on with a client as far as that goes without waiting."""
        try:
            try:
                self._step(client)
            except QsteerError as error:
                self._refuse(client, error)
            except OSError:
                raise
            except Exception as error:  # a mistake of qsteer's is no reason to leave all other clients
                self._refuse(client, QsteerError(f"qsteer serve fails: {type(error).__name__}: {error}"))
        except BlockingIOError:
            events = selectors.EVENT_WRITE if client.phase is _Phase.ANSWER else selectors.EVENT_READ
            self._selector.modify(client.sock, events, functools.partial(self._attend, client))
        except OSError as error:
            self._end(client, f"ended: {error.strerror}", Priority.NOTICE)

    def _step(self, client: _Client) -> None:
        """Raises BlockingIOError when it is the client's turn, OSError when it is gone, QsteerError to refuse it."""
        if client.phase is _Phase.ANSWER:
            self._write(client)
        elif client.phase is _Phase.FD:
            self._take_fd(client)
        else:
            # Without room for fds the kernel drops those that come along.
            piece = client.sock.recv(client.needed - len(client.got))
            if not piece:
                raise ConnectionResetError(errno.ECONNRESET, "hung up before its request was whole")
            client.got += piece
            if len(client.got) == client.needed:
                self._part_is_whole(client)

    def _part_is_whole(self, client: _Client) -> None:
        part = bytes(client.got)
        client.got.clear()
        if client.phase is _Phase.HEADER:
            client.asked = "something that is not a request"
            client.needed = wire.body_length(part, wire.REQUEST_MAX)
            client.phase = _Phase.BODY
            return
        request = wire.decode_request(part)
        client.asked = _in_words(request)
        rules = self._rules(client.peer)
        if request.order:
            self._make(client, request.order, rules)
        elif request.what is wire.What.LIMITS:
            vhost = any(rule.vhost for rule in rules) and self._host.has_vhost()
            self._answer(client, wire.encode_limits(Limits(rules=rules, vhost=vhost)), told="told")
        else:
            access.allow_program(rules, uid=client.peer.uid)
            client.phase = _Phase.FD

    def _make(self, client: _Client, order: Order, rules: Sequence[Rule]) -> None:
        uid = client.peer.uid
        rule = access.allow_tap(rules, order, uid=uid, taps=self._host.taps)
        if order.bridge:
            access.check_mtu(order, uid=uid, bridge_mtu=self._host.bridge_mtu(order.bridge))
        if order.steered:
            self._count_program(uid)
        tap = self._host.make(access.named(rule, order))
        client.fds = tap.fds
        answer = wire.TapAnswer(
            name=tap.name,
            mac=tap.mac,
            program=tap.program,
            queues=len(tap.queue_fds),
            vhosts=len(tap.vhost_fds),
            programs=len(tap.program_fds),
        )
        told = f"{tap.name}, {tap.mac}, program {tap.program}"
        self._answer(client, wire.encode_tap(answer), told=told, fds=tap.fds)

    def _take_fd(self, client: _Client) -> None:
        uid = client.peer.uid
        self._closing = [(whose, thread) for whose, thread in self._closing if thread.is_alive()]
        if any(whose == uid for whose, _ in self._closing):
            raise BusyError(f"an fd of uid {uid} that was no tap's is still being closed", hint=_AGAIN)
        if len(self._closing) >= CLOSING_MOST:
            raise BusyError("fds that were no tap's are still being closed", hint=_AGAIN)
        byte, fds, flags, _ = socket.recv_fds(client.sock, 1, 1, socket.MSG_CMSG_CLOEXEC)
        if not byte:
            raise ConnectionResetError(errno.ECONNRESET, "hung up before its fd came")
        if not fds:
            raise UsageError("no fd came with the request for a program")
        tap = self._tap_of(fds[0], uid)
        if flags & socket.MSG_CTRUNC:
            raise UsageError("more than one fd came with the request for a program")
        client.asked = f"program for tap {tap}"
        self._count_program(uid)
        client.fds, program = self._host.load_program(tap)
        self._answer(client, wire.encode_program(program), told=program, fds=client.fds)

    def _count_program(self, uid: int) -> None:
        """Raises BusyError for a user who has had too many; root may have any number."""
        now = time.monotonic()
        bucket = self._programs.setdefault(uid, Bucket(per_s=PROGRAMS_PER_S, limit=PROGRAMS_AT_ONCE, now=now))
        if uid and not bucket.has(1, now):
            raise BusyError(f"uid {uid} has had too many programs", hint=f"one more every {1 / PROGRAMS_PER_S:g} s")
        bucket.take(1, now)

    def _tap_of(self, fd: int, uid: int) -> str:
        """The name of the tap that a client's fd is a queue of.  Closes the fd."""
        if not self._host.is_tun(fd):
            thread = threading.Thread(target=_close, args=(fd,), name=CLOSING, daemon=True)
            self._closing.append((uid, thread))
            thread.start()
            raise UsageError("the fd that came with the request for a program is no queue of a tap")
        try:
            return self._host.multi_queue_tap(fd)
        finally:
            os.close(fd)

    def _refuse(self, client: _Client, error: QsteerError) -> None:
        client.priority = Priority.NOTICE
        self._answer(client, wire.encode_failure(error), told=f"refused ({error.exit_code}): {printable(str(error))}")

    def _answer(self, client: _Client, frame: bytes, *, told: str, fds: tuple[int, ...] = ()) -> None:
        client.phase = _Phase.ANSWER
        client.deadline = time.monotonic() + self.policy.serve.timeout_s
        client.out += frame
        client.messages.extend(wire.messages(fds))
        client.result = told
        self._write(client)

    def _write(self, client: _Client) -> None:
        while client.out:
            del client.out[: client.sock.send(client.out)]
        while client.messages:
            try:
                kernel.send_fds(client.sock.fileno(), client.messages[0])
            except QsteerError as error:
                raise OSError(error.errno, os.strerror(error.errno)) from None  # EAGAIN makes it a BlockingIOError
            client.messages.popleft()
        self._end(client, client.result, client.priority)

    def _time_is_up(self, client: _Client) -> None:
        timeout_s = self.policy.serve.timeout_s
        if client.phase is _Phase.ANSWER:
            told = f"{client.result}, but it did not take the answer within {timeout_s:g} s"
            self._end(client, told, Priority.NOTICE)
        else:
            self._dismiss(client, BusyError(f"the request was not whole within {timeout_s:g} s", hint=_AGAIN))

    def _dismiss(self, client: _Client, error: BusyError) -> None:
        """Tell a client why, if it takes that at once, and be done with it."""
        try:
            self._refuse(client, error)
        except OSError:
            self._end(client, client.result, Priority.NOTICE)

    def _end(self, client: _Client, result: str, priority: Priority) -> None:
        took_ms = (time.monotonic() - client.since) * 1000
        self._log.add(client.peer.uid, f"{client.peer}: {client.asked}: {result}, {took_ms:.0f} ms", priority)
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._selector.unregister(client.sock)
        client.sock.close()
        for fd in client.fds:
            os.close(fd)


class _Log:
    """One line a request, but for users who have too many: of those there is a number."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._buckets: dict[int, Bucket] = {}
        self._kept_back: Counter[int] = Counter()

    def add(self, uid: int, line: str, priority: Priority) -> None:
        """What was done for a user, 0 for what is nobody's."""
        now = time.monotonic()
        bucket = self._buckets.setdefault(uid, Bucket(per_s=LINES_PER_S, limit=LINES_AT_ONCE, now=now))
        if not bucket.has(1, now):
            self._kept_back[uid] += 1
            return
        bucket.take(1, now)
        self._say(line, priority)

    def due(self, now: float) -> float | None:
        """When ``turn`` has something to do."""
        return min((self._buckets[uid].ready_at(LINES_AT_ONCE / 2, now) for uid in self._kept_back), default=None)

    def turn(self, now: float) -> None:
        """Tell what was kept back of users who have calmed down, and forget who has."""
        for uid in [uid for uid in self._kept_back if self._buckets[uid].has(LINES_AT_ONCE / 2, now)]:
            self._say(f"uid {uid}: {self._kept_back.pop(uid)} more requests", Priority.NOTICE)
        for uid in [uid for uid, bucket in self._buckets.items() if bucket.has(LINES_AT_ONCE, now)]:
            del self._buckets[uid]


def _taps_in_sysfs(devices: Mapping[str, int]) -> int | None:
    """How many of these devices are tun's, by their names and indices.

    None if sysfs shows others: those of the network namespace that it was mounted in.
    """
    found = 0
    for name, index in devices.items():
        try:
            if int((_DEVICES / name / "ifindex").read_text()) != index:
                return None
        except (OSError, ValueError):
            return None
        found += (_DEVICES / name / "tun_flags").exists()
    return found


def _close(fd: int) -> None:
    """However long it takes, and whatever a file system says in the end."""
    with contextlib.suppress(OSError):
        os.close(fd)


def _in_words(request: wire.Request) -> str:
    order = request.order
    if not order:
        return request.what.value
    parts = [f"{order.queues} queue{'s' * (order.queues != 1)}"]
    parts += [f"bridge {order.bridge}"] if order.bridge else []
    parts += [f"name {order.ifname}"] if order.ifname else []
    parts += ["vhost"] if order.vhost else []
    return f"tap {order.id} ({', '.join(parts)})"


def _peer_of(sock: socket.socket) -> Peer:
    """Who has connected.  Raises OSError."""
    pid, uid, gid = _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    try:
        groups = sock.getsockopt(socket.SOL_SOCKET, lib.SO_PEERGROUPS, _GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = b""
    return Peer(pid=pid, uid=uid, gids=frozenset((gid, *struct.unpack(f"{len(groups) // 4}I", groups))))
