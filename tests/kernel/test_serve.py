# SPDX-License-Identifier: BSD-2-Clause
"""qsteer serve as a process, on real taps, asked by users without any right."""

import contextlib
import errno
import fcntl
import os
import pickle
import re
import shutil
import signal
import socket
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from qsteer import kernel, links, programs, ready, runplan, service, shim
from qsteer._shim import lib
from qsteer.access import Limits, Rule
from qsteer.errors import BusyError, QsteerError
from qsteer.model import Build, Source
from qsteer.ready import ReadyTap
from qsteer.runplan import Order
from tests.kernel import fuse, hardened, private, support

pytestmark = pytest.mark.root

T = TypeVar("T")
ALICE, BOB, CAROL, STAFF = 64321, 64322, 64323, 64324
"""Users and a group, by numbers that nobody has."""
BRIDGE = "qssvbr0"
CONFIG = f"""
[serve]
clients = 32
clients-per-user = 4
timeout = 2.0
[[serve.allow]]
user = "{ALICE}"
bridges = ["qssvbr*", ""]
prefix = "qssvt"
queues = 4
taps = 3
[[serve.allow]]
group = "{STAFF}"
bridges = ["{BRIDGE}"]
prefix = "qssvs"
queues = 256
taps = 1000
programs = false
"""
ORDER = Order(id="net0", queues=4, bridge=BRIDGE, vm="web1")
UNIT = Path(__file__).parents[2] / "systemd" / "qsteer-serve.service.in"


@pytest.fixture(autouse=True)
def own_host(need_root: None) -> Iterator[None]:
    """The socket, pins and a bridge of this test's own."""
    with private.memory(), support.network_namespace():
        private.RUNTIME.chmod(0o755)
        support.add_bridge(BRIDGE)
        yield


class Service:
    """A service that runs, and its configuration."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, manager: socket.socket) -> None:
        self.process = process
        self.config = folder / "qsteer.toml"
        self._stderr = folder / "stderr"
        self._manager = manager

    def said(self) -> str:
        return self._stderr.read_text()

    def told(self, prefix: str) -> None:
        """Wait until the service manager is."""
        self._manager.settimeout(support.patience(20))
        while not self._manager.recv(4096).decode().startswith(prefix):
            assert self.process.poll() is None, self.said()

    def fds(self) -> int:
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(support.patience(20))


@contextlib.contextmanager
def serving(prefix: Sequence[str] = (), pass_fds: Sequence[int] = ()) -> Iterator[Service]:
    """Afterwards it has no more fds than before, and has not failed anywhere."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=private.RUNTIME)))
        manager = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        manager.bind(str(folder / "notify"))
        (folder / "qsteer.toml").write_text(CONFIG)
        with (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "qsteer", "serve"],
                stderr=stderr,
                pass_fds=pass_fds,
                env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "QSTEER_CONFIG": str(folder)},
            )
        running = Service(process, folder, manager)
        try:
            running.told("READY=1")
            fds = running.fds()  # one more, perhaps, than later: the socket that READY was sent from
            yield running
            if process.poll() is None:
                support.wait_until("no fds", lambda: running.fds() <= fds)
        finally:
            process.kill()
            process.wait()
            assert "Traceback" not in running.said() and "serve fails" not in running.said(), running.said()


def as_user(uid: int, function: Callable[[], T], groups: Sequence[int] = ()) -> T:
    """What a function gives in a process of that user, without any capability; or raise what it raises."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        outcome: object = ("lost", None)
        try:
            os.setgroups(groups)
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            assert shim.effective_capabilities() == 0
            outcome = ("gave", function())
        except BaseException as error:
            told = (error.message, error.hint, error.errno) if isinstance(error, QsteerError) else None
            outcome = ("raised", (type(error), told, repr(error)))
        finally:
            os.write(writer, pickle.dumps(outcome))
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        kind, result = pickle.loads(stream.read())
    os.waitpid(child, 0)
    if kind == "raised":
        error_type, told, text = result
        if told is None:
            raise AssertionError(text)
        message, hint, errno = told
        raise error_type(message, hint=hint, errno=errno)
    assert kind == "gave"
    given: T = result
    return given


def refusal(order: Order, uid: int = ALICE, groups: Sequence[int] = ()) -> QsteerError:
    with pytest.raises(QsteerError) as caught:
        as_user(uid, lambda: service.request_tap(order), groups)
    return caught.value


def taps() -> set[str]:
    return {tun.name for tun in links.tuns()}


def described(tap: ReadyTap) -> dict[str, Any]:
    """What a client sees of its tap."""
    link, bridge = links.find(tap.name), links.find(BRIDGE)
    assert link and bridge
    # Without any capability: the fds are what gives the right.
    kernel.attach(tap.queue_fds[0], tap.program_fds[0])
    return {
        "name": tap.name,
        "names": {kernel.tap_name(fd) for fd in tap.queue_fds},
        "queues": len(tap.queue_fds),
        "mac": (tap.mac, link.mac),
        "up": link.up,
        "in bridge": link.bridge_index == bridge.index,
        "inheritable": any(os.get_inheritable(fd) for fd in tap.fds),
    }


def test_a_tap_and_its_program_for_a_user() -> None:
    with serving() as one:
        seen = as_user(ALICE, lambda: described(service.request_tap(ORDER)))
        mac, port_mac = seen.pop("mac")
        assert seen == {
            "name": "qssvt0",
            "names": {"qssvt0"},
            "queues": 4,
            "up": True,
            "in bridge": True,
            "inheritable": False,
        }
        assert port_mac == links.bridge_port_mac(mac) and mac == runplan.stable_mac("web1", "net0", ready.machine_id())
        support.wait_until("the tap's end", lambda: not taps())
        status = Path(f"/proc/{one.process.pid}/status").read_text()
        wanted = sum(1 << number for number in (lib.CAP_NET_ADMIN, lib.CAP_BPF, lib.CAP_PERFMON))
        for which in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            (held,) = re.findall(rf"^{which}:\t([0-9a-f]+)$", status, re.MULTILINE)
            assert int(held, 16) == (wanted if which in ("CapPrm", "CapEff", "CapBnd") else 0)
        assert "NoNewPrivs:\t1" in status
        (line,) = [line for line in one.said().splitlines() if "qssvt0" in line]
        assert re.fullmatch(
            rf"serve: pid \d+ uid {ALICE}: tap net0 \(4 queues, bridge {BRIDGE}\): qssvt0, {mac}, "
            r"program qsteer \d+ \([a-z-]+\), \d+ ms",
            line,
        )


def test_a_tap_has_all_its_queues_and_steers() -> None:
    with serving():
        tap = service.request_tap(Order(id="net0", queues=40, ifname="qssvr", steered=True))
        try:
            kernel.attach(tap.queue_fds[39], tap.program_fds[0])
            queues = [queue for queue in kernel.open_queues(os.getpid()) if queue.tap == "qssvr"]
            assert [queue.fd for queue in queues] == list(tap.queue_fds)
            info = programs.program_info(queues[0].program_id)
            assert info.ident and (info.ident.tap, info.ident.source) == ("qssvr", Source.SHARED_MAPS)
            assert tap.program.startswith(f"qsteer {info.id} (")
        finally:
            tap.close()


def test_nobody_else_can_add_queues_to_a_tap() -> None:
    node = private.RUNTIME / "tun"
    os.mknod(node, stat.S_IFCHR | 0o666, Path("/dev/net/tun").stat().st_rdev)
    node.chmod(0o666)  # as udev makes it

    def steal(name: str) -> int:
        fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
        set_iff = 0x400454CA
        flags = lib.IFF_TAP | lib.IFF_MULTI_QUEUE | 0x5000  # IFF_NO_PI, IFF_VNET_HDR
        try:
            fcntl.ioctl(fd, set_iff, struct.pack("16sH22x", name.encode(), flags))
        except PermissionError as error:
            return error.errno or 0
        return 0

    with serving():
        tap = service.request_tap(Order(id="net0", queues=2, ifname="qssvr"))
        try:
            assert as_user(BOB, lambda: steal("qssvr")) == errno.EPERM
        finally:
            tap.close()


REFUSED: dict[str, tuple[Order, str]] = {
    "another bridge": (Order(id="n", queues=4, bridge="br7"), 'bridge "br7" (allowed: "qssvbr*", none)'),
    "too many queues": (Order(id="n", queues=5, bridge=BRIDGE), "5 queues (at most 4)"),
    "another prefix": (Order(id="n", queues=4, ifname="eth7"), '"eth7" (it has to begin with "qssvt")'),
    "vhost": (Order(id="n", queues=4, vhost=True), "vhost (not allowed)"),
    "a lower MTU": (Order(id="n", queues=4, bridge=BRIDGE, mtu=1280), f'MTU 1280 (bridge "{BRIDGE}" has 1500'),
}


def test_what_is_refused() -> None:
    with serving() as one:
        for order, words in REFUSED.values():
            error = refusal(order)
            assert (error.exit_code, words in str(error)) == (4, True), error
            assert "serve.allow" in error.hint or "mtu=" in error.hint
        assert "unknown bridge" in str(refusal(Order(id="n", queues=1, bridge="qssvbr9")))
        for order in (ORDER, *(order for order, _ in REFUSED.values())):
            error = refusal(order, BOB)
            assert str(error) == f"no rule of qsteer serve is for uid {BOB} or one of its groups"
        assert not taps()
        assert one.said().count("refused (4)") == 11


def test_not_more_taps_than_allowed() -> None:
    def take_all() -> list[str]:
        held = [service.request_tap(ORDER) for _ in range(3)]
        with pytest.raises(QsteerError, match=r"one more tap .qssvt...\" .3 of at most 3 are there"):
            service.request_tap(ORDER)
        held[1].close()
        support.wait_until("a tap's end", lambda: len(taps()) == 2)
        return [*(tap.name for tap in held), service.request_tap(ORDER).name]

    with serving():
        assert as_user(ALICE, take_all) == ["qssvt0", "qssvt1", "qssvt2", "qssvt1"]
        support.wait_until("the taps' end", lambda: not taps())
        with support.tap("qssvt9", 1), support.tap("qssvt8", 1), support.tap("qssvt7", 1):
            assert "3 of at most 3" in str(refusal(ORDER))


def test_a_group_and_a_name() -> None:
    order = Order(id="net0", queues=17, bridge=BRIDGE, ifname="qssvsx", steered=False)

    def take() -> tuple[str, int, tuple[int, ...]]:
        tap = service.request_tap(order)
        with pytest.raises(QsteerError, match='"qssvsx" is in use') as caught:
            service.request_tap(order)
        assert caught.value.exit_code == 1
        with pytest.raises(QsteerError, match="may not have programs"):
            service.request_program(tap.queue_fds[0])
        return tap.name, len(tap.queue_fds), tap.program_fds

    with serving():
        assert as_user(CAROL, take, groups=(1, 2, STAFF)) == ("qssvsx", 17, ())
        assert "no rule" in str(refusal(order, CAROL, groups=(1, 2)))
        # More groups than are looked at: not allowed more than without them.
        assert "no rule" in str(refusal(order, CAROL, groups=(STAFF, *range(1, 300))))


def test_limits() -> None:
    with serving():
        mine = Rule(bridges=("qssvbr*", ""), prefix="qssvt", queues=4, taps=3)
        assert as_user(ALICE, service.limits) == Limits(rules=(mine,), vhost=False)
        assert as_user(BOB, service.limits) == Limits(rules=(), vhost=False)
        assert len(as_user(ALICE, service.limits, groups=(STAFF,)).rules) == 2
        assert service.limits().vhost == ready.has_vhost()


def tun(flags: int, name: bytes) -> int:
    """An fd of a device that is no multi-queue tap."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    set_iff = 0x400454CA
    fcntl.ioctl(fd, set_iff, struct.pack("16sH22x", name, flags))
    return fd


def test_programs_for_a_tap_of_ones_own() -> None:
    """As a QEMU's own user gets them: that it has a queue open is what it takes."""

    def take(queue_fd: int) -> tuple[int, str]:
        fds, text = service.request_program(queue_fd)
        kernel.attach(queue_fd, fds[0])
        return len(fds), text

    with serving() as one, support.tap("qssvq", 4) as under_test, contextlib.ExitStack() as stack:
        count, text = as_user(ALICE, lambda: take(under_test.open.fds[2]))
        assert count == 4 and re.fullmatch(r"qsteer \d+ \([a-z-]+\)", text)
        number = int(text.split()[1])
        attached = {queue.program_id for queue in kernel.open_queues(os.getpid()) if queue.tap == "qssvq"}
        assert attached == {number}
        info = programs.program_info(number)
        assert info.ident and (info.ident.tap, info.ident.source) == ("qssvq", Source.SHARED_MAPS)

        def opened(fd: int) -> int:
            stack.callback(os.close, fd)
            return fd

        regular = Path(stack.enter_context(tempfile.NamedTemporaryFile()).name)
        fds = {
            "no queue of a tap": opened(os.open("/dev/null", os.O_RDWR)),
            "is no queue": opened(os.open(regular, os.O_RDWR)),
            "not a tap": opened(tun(lib.IFF_MULTI_QUEUE | 1, b"qssvu")),
            "one queue only": opened(tun(lib.IFF_TAP, b"qssv1")),
            "File descriptor in bad state": opened(os.open("/dev/net/tun", os.O_RDWR)),
        }
        for words, fd in fds.items():
            assert words in str(program_refusal(ALICE, fd)), words
        assert "no rule" in str(program_refusal(BOB, under_test.open.fds[0]))
        assert f"uid {ALICE}: program for tap qssvq: {text}" in one.said()


def test_a_file_that_does_not_close(tmp_path: Path) -> None:
    """To close one of a file system in user space waits for whoever serves it; the service serves others meanwhile."""
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    with serving() as one, support.tap("qssvq", 4) as own, fuse.mounted(tmp_path) as files:
        files.never = one.process.pid
        trap = os.open(tmp_path / "trap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            assert "no queue of a tap" in str(program_refusal(ALICE, trap))
            assert files.waits.wait(support.patience(10))
            assert program_refusal(ALICE, own.open.fds[0]).exit_code == 8
            assert as_user(ALICE, lambda: service.request_tap(ORDER).name) == "qssvt0"
            fds, _ = service.request_program(own.open.fds[0])
            for fd in fds:
                os.close(fd)
        finally:
            os.close(trap)


def program_refusal(uid: int, fd: int) -> QsteerError:
    with pytest.raises(QsteerError) as caught:
        as_user(uid, lambda: service.request_program(fd))
    return caught.value


def test_half_open_clients_keep_nobody_out() -> None:
    """One user floods; another one is served meanwhile, and in time."""
    flood = f"""
import contextlib, os, socket, sys, time
os.setgroups([]); os.setresgid({BOB}, {BOB}, {BOB}); os.setresuid({BOB}, {BOB}, {BOB})
held = []
print(flush=True)
while True:
    while len(held) < 200:
        one = socket.socket(socket.AF_UNIX); one.connect({str(service.SOCKET)!r}); held.append(one)
        with contextlib.suppress(BrokenPipeError):  # it was sent away already
            one.send(b"\\0")
    held.pop(0).close()
"""

    def ask() -> list[float]:
        took = []
        for _ in range(50):
            began = time.monotonic()
            service.request_tap(Order(id="net0", queues=1)).close()
            took.append(time.monotonic() - began)
        return took

    with serving() as one:
        with subprocess.Popen([sys.executable, "-c", flood], stdout=subprocess.PIPE) as flooding:
            try:
                assert flooding.stdout and flooding.stdout.readline()
                support.wait_until("the flood", lambda: "too many requests at once" in one.said())
                took = as_user(ALICE, ask)
                assert flooding.poll() is None
            finally:
                flooding.kill()
        print(f"median {statistics.median(took) * 1000:.1f} ms, most {max(took) * 1000:.1f} ms")
        assert statistics.median(took) < support.patience(0.1), took
        assert len(one.said().splitlines()) < 400


def test_one_user_has_so_many_requests_at_once() -> None:
    def ask_again_and_again() -> set[str]:
        """Whether the service hangs up before or after it has been sent all: the client is told why."""
        said = set()
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                held = stack.enter_context(socket.socket(socket.AF_UNIX))
                held.connect(os.fspath(service.SOCKET))
            for _ in range(100):
                for ask in (lambda: service.request_tap(ORDER), lambda: service.request_program(0), service.limits):
                    with pytest.raises(BusyError) as caught:
                        ask()
                    said.add(str(caught.value))
        return said

    with serving():
        assert as_user(ALICE, ask_again_and_again) == {f"uid {ALICE} has too many requests at once"}


def test_sigterm_leaves_taps_as_they_are() -> None:
    with serving() as one:
        tap = service.request_tap(Order(id="net0", queues=2, ifname="qssvr"))
        kernel.attach(tap.queue_fds[0], tap.program_fds[0])
        assert one.stop() == 0
        assert not service.SOCKET.exists()
        link = links.find("qssvr")
        assert link and link.up and kernel.queue_of(tap.queue_fds[0]).program_id
        tap.close()
        error = refusal(ORDER)
        assert error.exit_code == 4 and "no qsteer serve listens" in str(error) and "systemctl" in error.hint


def test_sighup_reads_the_configuration_anew() -> None:
    with serving() as one:
        assert "no rule" in str(refusal(ORDER, BOB))
        one.config.write_text(CONFIG.replace(str(ALICE), str(BOB)))
        one.process.send_signal(signal.SIGHUP)
        one.told("RELOADING=1")
        one.told("READY=1")
        assert as_user(BOB, lambda: service.request_tap(ORDER).name) == "qssvt0"
        assert "no rule" in str(refusal(ORDER))
        one.config.write_text("what?")
        one.process.send_signal(signal.SIGHUP)
        one.told("READY=1")
        assert as_user(BOB, lambda: service.request_tap(ORDER).name) == "qssvt0"
        assert "the configuration stays as it was" in one.said() and "qsteer.toml:1" in one.said()


PASSED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What systemd does with the socket of a unit."""


def test_a_socket_of_the_service_manager() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(service.SOCKET))
        service.SOCKET.chmod(0o666)
        listener.listen(8)
        number = str(listener.fileno())
        prefix = (sys.executable, "-c", PASSED, number)
        for _ in range(2):
            with serving(prefix, (listener.fileno(),)) as one:
                assert as_user(ALICE, lambda: service.request_tap(ORDER).name) == "qssvt0"
                assert one.stop() == 0
            assert service.SOCKET.exists()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong:
        done = subprocess.run(
            [sys.executable, "-c", PASSED, str(wrong.fileno()), sys.executable, "-m", "qsteer", "serve"],
            pass_fds=(wrong.fileno(),),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2 and "one listening unix stream socket" in done.stderr


def test_what_keeps_it_from_starting() -> None:
    done = subprocess.run(
        ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-all", "--", sys.executable, "-m", "qsteer", "serve"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, "CAP_NET_ADMIN" in done.stderr) == (4, True)
    with serving():
        done = support.qsteer("serve")
        assert (done.returncode, "somebody listens" in done.stderr) == (8, True)
        assert as_user(ALICE, lambda: service.request_tap(ORDER).name) == "qssvt0"


def test_a_stale_socket_is_replaced() -> None:
    with serving() as one:
        one.process.kill()
        one.process.wait()
        assert service.SOCKET.exists()
        with serving():
            assert as_user(ALICE, lambda: service.request_tap(ORDER).name) == "qssvt0"


def test_the_unit_files(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qsteer").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "qsteer").chmod(0o755)
    units = []
    for kind in ("service", "socket"):
        units.append(str(tmp_path / f"qsteer-serve.{kind}"))
        text = UNIT.with_name(f"qsteer-serve.{kind}.in").read_text()
        Path(units[-1]).write_text(text.replace("@PREFIX@", str(tmp_path)))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *units], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", units[0]]
    assert subprocess.run(security, capture_output=True, check=False).returncode == 0
    assert f"ListenStream={service.SOCKET}\n" in Path(units[1]).read_text()


def test_it_works_as_the_unit_file_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardened, "UNIT", UNIT)
    monkeypatch.setitem(hardened.CAPABILITIES, "CAP_NET_ADMIN", lib.CAP_NET_ADMIN)
    with hardened.read_only(), serving(hardened.prefix()) as one, support.tap("qssvq", 4) as under_test:
        status = Path(f"/proc/{one.process.pid}/status").read_text()
        assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE)
        seen = as_user(ALICE, lambda: described(service.request_tap(ORDER)))
        assert seen["up"] and seen["in bridge"]
        assert as_user(ALICE, lambda: len(service.request_program(under_test.open.fds[0])[0])) == 4
        for pin in private.PINS.rglob("bodies-*"):
            pin.unlink()
        as_user(ALICE, lambda: service.request_tap(ORDER))  # what it shares with others is made anew
        one.process.send_signal(signal.SIGHUP)
        one.told("READY=1")
        if Build.SHARED_BODY in support.BUILDS:
            assert private.pins() and "(complete)" not in one.said()
        assert all(line.startswith("serve: ") for line in one.said().splitlines())
        assert one.stop() == 0
