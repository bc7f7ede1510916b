# SPDX-License-Identifier: BSD-2-Clause
"""Anything at all, sent to the real loop of ``qsteer serve``: it must answer, go on, and lose no fd.

    python -m integration.serve_fuzz [--requests 100000] [--seed N]

Takes no root.  Exit code 1 if anything was found; the seed is printed.

Theory of operation
-------------------
The server is the real one, with sockets of socketpair() in place of accepted ones; what it does to the host is made up
(_Host): taps whose fds are pipes, programs that are pipes, errors of every class, and mistakes that raise something
else.  Each client sends bytes that are drawn from a seed: right requests, requests with one thing changed, random JSON,
random bytes, right and wrong lengths, whole or in pieces, with fds attached anywhere, and then reads, does not read,
or hangs up.

After each round the server must have no client left, whatever it was sent, and this process as many fds open as
before.  What a client got is checked, too: it is nothing, or a whole answer of the protocol with the fds that belong
to it.
"""

import argparse
import array
import contextlib
import json
import os
import random
import socket
import stat
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qsteer import server, wire
from qsteer.access import Grant, Rule
from qsteer.errors import QsteerError
from qsteer.ready import ReadyTap
from qsteer.runplan import Order
from qsteer.server import Host, Peer, Policy, Server
from qsteer.settings import Serve

AT_ONCE = 24
"""Clients of one round; more than the server takes at once."""
TIMEOUT_S = 0.02
STUCK_S = 5.0
USERS, GROUPS = (0, 1000, 1001, 1002), (100, 101)
POLICY = Policy(
    serve=Serve(clients=AT_ONCE - 4, clients_per_user=AT_ONCE // 2, timeout_s=TIMEOUT_S),
    grants=(
        Grant(rule=Rule(bridges=("br0", ""), prefix="fz", queues=256, taps=10, vhost=True), uid=1000),
        Grant(rule=Rule(bridges=("br?",), prefix="tap", queues=4, taps=5, programs=False), gid=100),
    ),
)
NULL = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
KINDS: Sequence[type[QsteerError]] = (QsteerError, *QsteerError.__subclasses__())
VALUES: Sequence[object] = (
    *(None, True, False, 0, 1, -1, 4, 256, 257, 1.5, 1e400, 2**63, 10**300, "", "net0", "a/b", "..", "x" * 300),
    *("\0", "\ud800", "\u202e", "tap%d", "é" * 8, [], {}, [[]], {"a": 1}, "00:00:00:00:00:00", "01:00:00:00:00:01"),
)


class _Host(Host):
    """A host that does as it likes."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self._bridges = ("br0", "")

    def make(self, order: Order) -> ReadyTap:
        self._perhaps_fail()
        queues = tuple(_fd() for _ in range(order.queues))
        vhosts = tuple(_fd() for _ in range(order.queues * order.vhost))
        program_fds = tuple(_fd() for _ in range(wire.PROGRAM_FDS * order.steered))
        return ReadyTap(
            name=order.ifname.replace("%d", "7") or "tap0",
            mac=order.mac or "52:54:00:00:00:01",
            queue_fds=queues,
            vhost_fds=vhosts,
            program_fds=program_fds,
            program="made up",
        )

    def load_program(self, tap: str) -> tuple[tuple[int, ...], str]:
        self._perhaps_fail()
        return tuple(_fd() for _ in range(wire.PROGRAM_FDS)), f"for {tap}"

    def is_tun(self, fd: int) -> bool:
        return stat.S_ISCHR(os.fstat(fd).st_mode)

    def multi_queue_tap(self, queue_fd: int) -> str:
        self._perhaps_fail()
        return "tap0"

    def taps(self, rule: Rule) -> int:
        return self._draw.randrange(0, rule.taps + 1)

    def bridge_mtu(self, name: str) -> int:
        self._perhaps_fail()
        return 1500

    def has_vhost(self) -> bool:
        return self._draw.random() < 0.5

    def _perhaps_fail(self) -> None:
        if self._draw.random() < 0.2:
            raise self._draw.choice(KINDS)(
                "made to fail \x1b[31m" * 50, hint="hint\n", errno=self._draw.choice((0, 1, 12))
            )
        if self._draw.random() < 0.01:
            raise ZeroDivisionError("a mistake")


def _fd() -> int:
    return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)


@dataclass(slots=True)
class Findings:
    """What came of it."""

    requests: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    slowest_s: float = 0.0

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {what}" for what, count in sorted(self.answers.items()))
        wrong = "\n".join(self.wrong[:20]) or "nothing wrong, no fd lost"
        return f"{self.requests} requests: {counts}\nslowest round {self.slowest_s * 1000:.0f} ms\n{wrong}"


class _Sender:
    """One client: what it sends, piece by piece, and what it does then."""

    def __init__(self, draw: random.Random, sock: socket.socket) -> None:
        self.sock = sock
        sock.setblocking(False)
        self._draw = draw
        self._pieces = _pieces(draw, _message(draw))
        self.manner = draw.choices(("reads", "hangs up", "goes at once", "does not read"), (70, 10, 10, 10))[0]
        self.received = bytearray()
        self.fds = 0
        self.ended = False

    def turn(self) -> None:
        """Send a piece, take what there is."""
        if self.ended:
            return
        if self._pieces:
            self._send(self._pieces.pop(0))
            return
        if self.manner == "goes at once":
            self.close()
        elif self.manner == "hangs up":
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_WR)
            self._receive()
        elif self.manner == "reads":
            self._receive()

    def _send(self, piece: bytes) -> None:
        count = self._draw.choices(
            (0, 1, 2, 16, 17, 253), (10, 80, 4, 2, 2, 2) if len(piece) == 1 else (80, 10, 4, 2, 2, 2)
        )
        fds = [self._draw.choice((self.sock.fileno(), NULL))] * count[0]
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        with contextlib.suppress(OSError):
            self.sock.sendmsg([piece], control)

    def _receive(self) -> None:
        try:
            data, control, _, _ = self.sock.recvmsg(65536, socket.CMSG_SPACE(4 * 253), socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        for _, _, content in control:
            got = array.array("i", content[: len(content) // 4 * 4])
            self.fds += len(got)
            for fd in got:
                os.close(fd)
        self.received += data
        if not data:
            self.close()

    def close(self) -> None:
        self.sock.close()
        self.ended = True


def _message(draw: random.Random) -> list[bytes]:
    """A request in frames, mostly not quite right."""
    body = draw.choice(
        (_right, _right, _right, _right, _changed, _changed, _changed, _random_json, _random_bytes, _cut)
    )(draw)
    length = len(body) if draw.random() < 0.85 else draw.choice((0, 1, len(body) + 1, 4096, 4097, 65536, 2**32 - 1))
    frame = struct.pack("!I", length) + body
    after = draw.choices((b"", b"\0", draw.randbytes(draw.randrange(1, 64))), (3, 6, 1))[0]
    return [frame, after] if after else [frame]


def _right(draw: random.Random) -> bytes:
    what = draw.choices(tuple(wire.What), (1, 3, 3))[0]
    return wire.encode_request(wire.Request(what=what, order=_order(draw) if what is wire.What.TAP else None))[4:]


def _order(draw: random.Random) -> Order:
    return Order(
        id="net0",
        queues=draw.choice((1, 2, 4, 4, 8, 40, 256)),
        ifname=draw.choice(("", "", "fz0", "fzz", "eth0")),
        bridge=draw.choice(("", "br0", "br1")),
        mac=draw.choice((None, "52:54:00:12:34:56")),
        mtu=draw.choice((None, 1500, 68)),
        vhost=draw.random() < 0.3,
        steered=draw.random() < 0.7,
        vm=draw.choice((None, "vm")),
    )


def _changed(draw: random.Random) -> bytes:
    members: dict[str, Any] = {"version": wire.VERSION, "request": "tap", **asdict(_order(draw))}
    key = draw.choice((*members, "other"))
    if draw.random() < 0.2:
        members.pop(key, None)
    else:
        members[key] = draw.choice(VALUES)
    body = json.dumps(members).encode()
    return body.replace(b"}", b', "id": "twice"}') if draw.random() < 0.05 else body


def _random_json(draw: random.Random) -> bytes:
    def value(depth: int) -> object:
        kind = draw.randrange(8)
        if kind < 5 or depth > 4:
            return draw.choice(VALUES)
        if kind < 7:
            return [value(depth + 1) for _ in range(draw.randrange(4))]
        return {str(draw.choice(("version", "request", "tap", "id", "x"))): value(depth + 1) for _ in range(3)}

    if draw.random() < 0.1:
        return draw.choice((b"[", b'{"a":', b"-", b"1", b'"')) * draw.randrange(1, 800)
    return json.dumps(value(0)).encode()[:4096] or b"0"


def _random_bytes(draw: random.Random) -> bytes:
    return draw.randbytes(draw.choice((1, 7, 100, 4096)))


def _cut(draw: random.Random) -> bytes:
    """Bits and pieces of a right one."""
    body = bytearray(_right(draw))
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(body))
        body[at : at + draw.randrange(3)] = draw.randbytes(draw.randrange(3))
    return bytes(body) or b"0"


def _pieces(draw: random.Random, parts: list[bytes]) -> list[bytes]:
    """Whole, in pieces, or not all of it."""
    pieces = []
    for part in parts:
        if draw.random() < 0.2:
            at = sorted(draw.randrange(len(part) + 1) for _ in range(draw.randrange(1, 5)))
            pieces += [part[start:end] for start, end in zip((0, *at), (*at, len(part)), strict=True) if start < end]
        else:
            pieces.append(part)
    return pieces[: draw.randrange(len(pieces))] if draw.random() < 0.05 else pieces


def fuzz(requests: int, seed: int) -> Findings:
    """Send that many requests, a round of some at a time; the first round that finds something is the last."""
    draw = random.Random(seed)
    findings = Findings()
    said: list[str] = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        server = Server(listener, POLICY, _Host(draw), lambda text, _: said.append(text))
        fds = _open_fds()
        while findings.requests < requests and not findings.wrong:
            began = time.monotonic()
            _round(server, draw, findings)
            findings.slowest_s = max(findings.slowest_s, time.monotonic() - began)
            if (now := _open_fds()) != fds:
                findings.wrong.append(f"after {findings.requests} requests {now} fds are open, {fds} were")
            findings.wrong += [line for line in said if not line.isprintable() or _is_a_mistake(line)]
            said.clear()
        server.close()
    return findings


def _is_a_mistake(line: str) -> bool:
    return "qsteer serve fails" in line and "ZeroDivisionError" not in line


def _round(server: Server, draw: random.Random, findings: Findings) -> None:
    senders = []
    for _ in range(AT_ONCE):
        theirs, ours = socket.socketpair()
        if draw.random() < 0.3:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)  # takes a frame or some messages at once
        senders.append(_Sender(draw, theirs))
        server.adopt(ours, Peer(pid=1, uid=draw.choice(USERS), gids=frozenset((draw.choice(GROUPS),))))
    deadline = time.monotonic() + STUCK_S
    while server.clients or any(not sender.ended for sender in senders if sender.manner != "does not read"):
        for sender in senders:
            sender.turn()
        server.turn(0.001)
        if time.monotonic() > deadline:
            findings.wrong.append(f"stuck with {server.clients} clients after {findings.requests} requests")
            break
    for sender in senders:
        sender.close()
        findings.requests += 1
        if sender.manner == "reads":
            _judge(sender, findings)


def _judge(sender: _Sender, findings: Findings) -> None:
    """What a client got that reads to the end."""
    received = bytes(sender.received)
    if not received:
        findings.answers["without an answer"] += 1
        return
    length = struct.unpack("!I", received[:4])[0] if len(received) >= 4 else -1
    body, messages = received[4 : 4 + length], received[4 + length :]
    if len(body) != length:
        findings.answers["cut short"] += 1  # it took too long to take it
        return
    answer = json.loads(body)
    if answer["ok"]:
        kind = "a tap" if "mac" in answer else "a program" if "program" in answer else "limits"
        fds = {"a tap": sum(answer.get(key, 0) for key in ("queues", "vhosts", "programs")), "a program": 4}.get(
            kind, 0
        )
    else:
        kind, fds = f"refused with {answer['exit']}", 0
    if messages != bytes(len(messages)) or len(messages) > -(-fds // wire.FDS_A_MESSAGE) or sender.fds > fds:
        findings.wrong.append(f"{kind}: {sender.fds} fds in {len(messages)} messages")
    findings.answers[kind if sender.fds == fds else "cut short"] += 1


def _open_fds() -> int:
    """Once what is closed elsewhere is."""
    for thread in threading.enumerate():
        if thread.name == server.CLOSING:
            thread.join(STUCK_S)
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.serve_fuzz")
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=None)
    options = parser.parse_args()
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    findings = fuzz(options.requests, seed)
    print(findings)
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
