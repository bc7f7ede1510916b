# SPDX-License-Identifier: BSD-2-Clause
"""The loop of qsteer serve over socket pairs, on a host that is made up; tests/kernel/test_serve.py has a real one."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from integration import serve_fuzz
from qsteer import kernel, links, serve, server, wire
from qsteer.access import Grant, Rule
from qsteer.errors import BusyError, PermissionDeniedError, QsteerError, UsageError
from qsteer.notify import Priority
from qsteer.ready import ReadyTap
from qsteer.runplan import Order
from qsteer.server import Host, Peer, Policy, Server
from qsteer.settings import Config, Serve

RULE = Rule(user="1000", bridges=("br0", ""), prefix="al", queues=256, taps=4, vhost=True)
POLICY = Policy(serve=Serve(clients=6, clients_per_user=4, timeout_s=0.3), grants=(Grant(rule=RULE, uid=1000),))
PATIENT = Policy(serve=Serve(clients=6, clients_per_user=4, timeout_s=30.0), grants=POLICY.grants)
"""With which what takes a client's time to end does not end in a test's."""
ALICE, BOB, ROOT = (Peer(pid=7, uid=uid, gids=frozenset({uid})) for uid in (1000, 1001, 0))
ORDER = Order(id="net0", queues=4, bridge="br0")


class MadeUp(Host):
    """Taps and programs are open files."""

    def __init__(self) -> None:
        self.made: list[ReadyTap] = []
        self.fails: Exception | None = None

    def make(self, order: Order) -> ReadyTap:
        if self.fails:
            raise self.fails
        tap = ReadyTap(
            name=order.ifname,
            mac="52:54:00:00:00:01",
            queue_fds=tuple(os.open("/dev/null", os.O_RDONLY) for _ in range(order.queues)),
            vhost_fds=tuple(os.open("/dev/zero", os.O_RDONLY) for _ in range(order.queues * order.vhost)),
            program_fds=tuple(os.open("/dev/full", os.O_RDONLY) for _ in range(4 * order.steered)),
            program="made up",
        )
        self.made.append(tap)
        return tap

    def load_program(self, tap: str) -> tuple[tuple[int, ...], str]:
        return tuple(os.open("/dev/full", os.O_RDONLY) for _ in range(4)), f"for {tap}"

    def is_tun(self, fd: int) -> bool:
        return Path(f"/proc/self/fd/{fd}").readlink() == Path("/dev/null")

    def multi_queue_tap(self, queue_fd: int) -> str:
        return "al0"

    def taps(self, rule: Rule) -> int:
        return len(self.made)

    def bridge_mtu(self, name: str) -> int:
        return 1500

    def has_vhost(self) -> bool:
        return True


class Served:
    """A server, its host, and what it said."""

    def __init__(self) -> None:
        self.host = MadeUp()
        self.said: list[str] = []
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind("")
        self.listener.listen()
        self.server = Server(self.listener, POLICY, self.host, self._say)

    def _say(self, text: str, priority: Priority) -> None:
        self.said.append(text)

    def connect(self, peer: Peer = ALICE) -> socket.socket:
        theirs, ours = socket.socketpair()
        theirs.settimeout(5)
        self.server.adopt(ours, peer)
        return theirs

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < deadline
            self.server.turn(0.01)

    def until_idle(self) -> None:
        self.until(lambda: not self.server.clients)


@pytest.fixture
def served() -> Iterator[Served]:
    """Afterwards as many fds are open as before."""
    before = fds()
    one = Served()
    yield one
    one.server.close()
    assert fds() == before
    assert not [line for line in one.said if not line.isprintable()]


def fds() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def body(sock: socket.socket) -> bytes:
    return sock.recv(wire.body_length(sock.recv(4), wire.ANSWER_MAX))


def refusal(sock: socket.socket) -> QsteerError:
    with pytest.raises(QsteerError) as caught:
        wire.decode_limits(body(sock))
    return caught.value


def ask(sock: socket.socket, order: Order | None = ORDER, what: wire.What = wire.What.TAP) -> None:
    sock.sendall(wire.encode_request(wire.Request(what=what, order=order)))


def test_a_tap(served: Served) -> None:
    with served.connect() as sock:
        ask(sock, Order(id="net0", queues=20, vhost=True))
        served.until_idle()
        answer = wire.decode_tap(body(sock))
        assert (answer.name, answer.queues, answer.vhosts, answer.programs) == ("al%d", 20, 20, 4)
        received: list[str] = []
        for count in (16, 16, 12):
            for fd in kernel.receive_fds(sock.fileno(), count):
                received.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
                os.close(fd)
        assert received == ["/dev/null"] * 20 + ["/dev/zero"] * 20 + ["/dev/full"] * 4
        assert sock.recv(1) == b""
    assert "pid 7 uid 1000: tap net0 (20 queues, vhost): al%d, 52:54:00:00:00:01, program made up, " in served.said[0]


def test_limits(served: Served) -> None:
    for peer, rules in ((ALICE, 1), (BOB, 0), (ROOT, 1)):
        with served.connect(peer) as sock:
            ask(sock, None, wire.What.LIMITS)
            served.until_idle()
            limits = wire.decode_limits(body(sock))
            assert (len(limits.rules), limits.vhost) == (rules, bool(rules))


@pytest.mark.parametrize("order", [ORDER, Order(id="n", queues=1, bridge="br9"), Order(id="n", queues=1, mtu=70)])
def test_who_has_no_rule_learns_nothing(served: Served, order: Order) -> None:
    with served.connect(BOB) as sock:
        ask(sock, order)
        served.until_idle()
        error = refusal(sock)
        assert (type(error), "br" in str(error)) == (PermissionDeniedError, False)
    assert not served.host.made


def test_a_request_a_byte_at_a_time(served: Served) -> None:
    with served.connect() as sock:
        for byte in wire.encode_request(wire.Request(what=wire.What.LIMITS)):
            sock.sendall(bytes((byte,)))
            served.server.turn(0.01)
        served.until_idle()
        assert wire.decode_limits(body(sock)).vhost


@pytest.mark.parametrize(
    "sent", [b"", b"\0\0", b"\0\0\0\5{", wire.encode_request(wire.Request(what=wire.What.PROGRAM))]
)
def test_half_a_request_is_given_up(served: Served, sent: bytes) -> None:
    with served.connect() as sock:
        sock.sendall(sent)
        began = time.monotonic()
        served.until_idle()
        assert 0.2 < time.monotonic() - began < 2
        error = refusal(sock)
        assert isinstance(error, BusyError) and "0.3 s" in str(error)
        assert sock.recv(1) == b""


def test_who_hangs_up_is_forgotten_at_once(served: Served) -> None:
    served.server.policy = PATIENT
    for sent in (b"", b"\0", wire.encode_request(wire.Request(what=wire.What.PROGRAM))):
        with served.connect() as sock:
            sock.sendall(sent)
        served.until_idle()
    assert all("hung up" in line for line in served.said)


def test_who_does_not_read_loses_the_tap(served: Served) -> None:
    theirs, ours = socket.socketpair()
    with theirs:
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 0)
        served.server.adopt(ours, ALICE)
        ask(theirs, Order(id="net0", queues=250, vhost=True))
        served.until(lambda: served.host.made)
        assert served.server.clients == 1
        served.until_idle()
        assert "did not take the answer within 0.3 s" in served.said[-1]
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.fstat(served.host.made[0].queue_fds[-1])


def test_too_many_of_one_user_are_told_so_and_others_are_served(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stack.enter_context(served.connect())
        for _ in range(20):
            error = refusal(stack.enter_context(served.connect()))
            assert isinstance(error, BusyError) and "uid 1000 has too many" in str(error)
        assert served.server.clients == 4
        with served.connect(ROOT) as other:
            ask(other)
            served.until(lambda: served.server.clients == 4)
            assert wire.decode_tap(body(other)).queues == 4
        for _ in range(2):
            stack.enter_context(served.connect(ROOT))
        assert "qsteer serve has too many" in str(refusal(stack.enter_context(served.connect(ROOT))))


def test_those_without_a_rule_leave_half_of_the_places(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        for uid in range(1, 4):
            stack.enter_context(served.connect(Peer(pid=8, uid=uid, gids=frozenset())))
        stranger = stack.enter_context(served.connect(Peer(pid=8, uid=9, gids=frozenset())))
        assert "qsteer serve has too many" in str(refusal(stranger))
        known = stack.enter_context(served.connect(ALICE))
        ask(known)
        served.until(lambda: served.host.made)
        assert wire.decode_tap(body(known)).queues == 4


def test_floods_are_told_by_their_number(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(100):
        with served.connect(BOB) as sock:
            ask(sock)
            served.until_idle()
    assert len(served.said) <= server.LINES_AT_ONCE + 2
    with served.connect(ROOT) as sock:
        ask(sock)
        served.until_idle()
    assert "uid 0" in served.said[-1]
    now = time.monotonic() + 60
    monkeypatch.setattr(time, "monotonic", lambda: now)
    served.server.turn(0)
    (line,) = [line for line in served.said if "more requests" in line]
    assert line.startswith("uid 1001: ") and int(line.split()[2]) >= 78


def send_fds(sock: socket.socket, *paths: str) -> None:
    opened = [os.open(path, os.O_RDONLY) for path in paths]
    socket.send_fds(sock, [b"\0"], opened)
    for fd in opened:
        os.close(fd)


def test_a_program_for_the_clients_own_tap(served: Served) -> None:
    with served.connect() as sock:
        ask(sock, None, wire.What.PROGRAM)
        send_fds(sock, "/dev/null")
        served.until_idle()
        assert wire.decode_program(body(sock)) == "for al0"
        for fd in kernel.receive_fds(sock.fileno(), 4):
            os.close(fd)


def test_a_user_has_no_end_of_programs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a tap or by itself: it may be kept after the tap has gone."""
    monkeypatch.setattr(server, "PROGRAMS_AT_ONCE", 3)

    def wants(peer: Peer, order: Order | None) -> bool:
        with served.connect(peer) as sock:
            ask(sock, order, wire.What.TAP if order else wire.What.PROGRAM)
            if not order:
                send_fds(sock, "/dev/null")
            served.until_idle()
            return bool(json.loads(body(sock))["ok"])

    assert [wants(ALICE, order) for order in (ORDER, None, ORDER, ORDER, None)] == [True, True, True, False, False]
    assert wants(ALICE, Order(id="net0", queues=2, steered=False))
    assert all(wants(ROOT, None) for _ in range(5))
    now = time.monotonic() + 1.01 / server.PROGRAMS_PER_S
    monkeypatch.setattr(time, "monotonic", lambda: now)
    assert wants(ALICE, None)


def no_closing() -> None:
    for thread in threading.enumerate():
        if thread.name == server.CLOSING:
            thread.join(5)


@pytest.mark.parametrize(
    ("paths", "words"),
    [
        (("/dev/zero",), "no queue of a tap"),
        (("/etc/passwd",), "no queue of a tap"),
        (("/dev/null", "/dev/null"), "more than one fd"),
        (("/dev/null",) * 16, "more than one fd"),
        (("/dev/null",) * 253, "more than one fd"),
        ((), "no fd came"),
    ],
)
def test_programs_for_anything_else(served: Served, paths: tuple[str, ...], words: str) -> None:
    with served.connect() as sock:
        ask(sock, None, wire.What.PROGRAM)
        send_fds(sock, *paths)
        served.until_idle()
        error = refusal(sock)
        assert isinstance(error, UsageError) and words in str(error)
    no_closing()


def test_programs_are_refused_before_an_fd_is_taken(served: Served) -> None:
    with served.connect(BOB) as sock:
        ask(sock, None, wire.What.PROGRAM)
        send_fds(sock, "/dev/zero")
        served.until_idle()
        assert isinstance(refusal(sock), PermissionDeniedError)


def test_an_fd_that_does_not_close_holds_nobody_up(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of a file system whose process does not answer."""
    go = threading.Event()
    close = os.close

    def slow_close(fd: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(5)
        close(fd)

    monkeypatch.setattr(os, "close", slow_close)
    served.server.policy = PATIENT
    began = time.monotonic()
    for kind in (UsageError, BusyError):
        with served.connect() as sock:
            ask(sock, None, wire.What.PROGRAM)
            send_fds(sock, "/dev/zero")
            served.until_idle()
            assert type(refusal(sock)) is kind
    with served.connect(ROOT) as sock:
        ask(sock, None, wire.What.PROGRAM)
        send_fds(sock, "/dev/null")
        served.until_idle()
        assert wire.decode_program(body(sock)) == "for al0"
    assert time.monotonic() - began < 4
    go.set()
    no_closing()


def test_fds_that_nobody_asked_for(served: Served) -> None:
    frame = wire.encode_request(wire.Request(what=wire.What.LIMITS))
    with served.connect() as sock, contextlib.ExitStack() as stack:
        null = os.open("/dev/null", os.O_RDONLY)
        stack.callback(os.close, null)
        for part in (frame[:2], frame[2:10], frame[10:]):
            socket.send_fds(sock, [part], [null] * 17)
            before = fds()
            served.server.turn(0.01)
            assert fds() <= before
        served.until_idle()
        assert wire.decode_limits(body(sock)).vhost


@pytest.mark.parametrize("failure", [QsteerError("no room", errno=12, hint="buy some"), ZeroDivisionError("\x1b")])
def test_what_fails_is_told(served: Served, failure: Exception) -> None:
    served.host.fails = failure
    for _ in range(2):
        with served.connect() as sock:
            ask(sock)
            served.until_idle()
            error = refusal(sock)
            assert (error.hint, error.errno) == (("buy some", 12) if isinstance(failure, QsteerError) else ("", 0))
    assert "refused (1)" in served.said[0]


def test_a_lower_mtu_than_the_bridges(served: Served) -> None:
    with served.connect() as sock:
        ask(sock, Order(id="net0", queues=1, bridge="br0", mtu=1400))
        served.until_idle()
        assert "MTU 1400" in str(refusal(sock))


def test_out_of_fds_it_waits(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not ask for the next client again and again."""
    asked = 0

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, object]:
            nonlocal asked
            asked += 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(server, "DEAF_S", 0.1)
    with Listener(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind("")
        listener.listen()
        one = Server(listener, POLICY, served.host, served._say)
        client.connect(listener.getsockname())
        began = time.monotonic()
        while asked < 3:
            one.turn(0.05)
            assert time.monotonic() - began < 5
        assert time.monotonic() - began > 0.2
        assert "cannot accept" in served.said[0]
        one.close()


def test_the_fuzz() -> None:
    """A few rounds of integration.serve_fuzz, always the same."""
    findings = serve_fuzz.fuzz(3000, seed=7)
    assert not findings.wrong, findings
    assert findings.answers["a tap"] > 50 and findings.answers["a program"] > 10, findings


@pytest.mark.parametrize(
    ("prefix", "most", "asked"), [("al", 4, 2), ("al", 2, 1), ("", 9, 5), ("", 5, 1), ("br", 1, 0)]
)
def test_taps_are_counted_by_their_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prefix: str, most: int, asked: int
) -> None:
    """In sysfs where it matters; where that shows another network namespace, over rtnetlink."""
    devices = {"lo": 1, "br0": 2, "al0": 3, "al-br": 4, "eth0": 5}
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(index, name) for name, index in devices.items()])
    monkeypatch.setattr(server, "_DEVICES", tmp_path)
    for name, index in devices.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "ifindex").write_text(f"{index}\n")
    (tmp_path / "al0" / "tun_flags").write_text("0x1102\n")
    rule = Rule(prefix=prefix, taps=most)
    assert Host().taps(rule) == asked
    (tmp_path / "al-br" / "ifindex").write_text("7\n")
    monkeypatch.setattr(links, "tuns", lambda: (SimpleNamespace(name="al8"),) * 8)
    if asked == 1:
        assert Host().taps(rule) == 8


def test_unknown_users_are_for_nobody() -> None:
    said: list[str] = []
    rules = (Rule(user="qs-nobody"), Rule(group="qs-nobody"), Rule(user="root"), Rule(group="0"), Rule(user="4000"))
    policy = serve._policy(Config(rules=rules), lambda text, _: said.append(text))
    assert [(grant.uid, grant.gid) for grant in policy.grants] == [(0, None), (None, 0), (4000, None)]
    assert said == [f'there is no {what} "qs-nobody": its rule is for nobody' for what in ("user", "group")]


def test_a_path_to_listen_at(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serve.listening(path, {}) as listener:
        assert path.stat().st_mode & 0o777 == 0o666
        with pytest.raises(BusyError, match="somebody listens"), serve.listening(path, {}):
            pass
        listener.close()
        with serve.listening(path, {}):  # in place of a stale one
            assert path.is_socket()
        assert not path.exists()
    path.write_text("a file")
    with pytest.raises(QsteerError, match="Address already in use"), serve.listening(path, {}):
        pass
    assert path.read_text() == "a file"
    with pytest.raises(QsteerError, match="cannot listen"), serve.listening(tmp_path / ("x" * 200), {}):
        pass


def test_another_ones_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with serve.listening(path, {}):
        path.unlink()
        path.write_text("of somebody else")
    assert path.exists()
