# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-bridge-helper with a real kernel: what it gives, what it refuses, and how little it has at each step.

What takes QEMU, or QEMU's own helper, is in integration/test_bridge_helper.py.
"""

import contextlib
import ctypes
import os
import resource
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qsteer
from tests.kernel import bridge_acls, bridges, support, tracing

IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
LIBCS_SIGNALS = 0b11 << 31
"""32 and 33, which glibc lets nobody change: whoever started the tests may ignore them."""
NET_ADMIN = 1 << 12
NAME = "qsteer-bridge-helper"
HELPER = bridges.HELPER


@pytest.fixture(scope="module")
def folder(need_root_for_module: None) -> Iterator[Path]:
    """A place of this module's own, with bridges, /etc/qemu, and a helper that everybody can run."""
    assert HELPER.exists(), "make build makes it"
    with support.network_namespace(), bridges.host() as place:
        bridges.add_bridges()
        yield place


@pytest.fixture(scope="module")
def need_root_for_module() -> None:
    if os.geteuid() != 0:
        pytest.skip("not root (make test takes care of it)")


@pytest.fixture(scope="module")
def helper(folder: Path) -> Path:
    """With the file capability."""
    return bridges.copy_with_capability(HELPER, folder)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Path:
    """As it is installed: without privileges."""
    return bridges.copy(HELPER, folder / "plain")


@pytest.fixture(autouse=True)
def nothing_left(folder: Path) -> Iterator[None]:
    bridge_acls.text("allow all", "allow all\n").make()
    yield
    assert bridges.taps() == set()


def lines(outcome: bridges.Outcome) -> list[str]:
    """What a refusal says: one line, and perhaps a hint."""
    assert outcome.verdict == "no", outcome
    said = outcome.stderr.splitlines()
    assert 1 <= len(said) <= 2 and said[0].startswith(f"{NAME}: "), outcome
    assert all(line.startswith("hint: ") for line in said[1:]), outcome
    assert outcome.stderr.isprintable() or outcome.stderr.replace("\n", "").isprintable()
    return said


# What it gives


@pytest.mark.parametrize("vnet_header", [False, True])
def test_the_tap(helper: Path, vnet_header: bool) -> None:
    options = ["--use-vnet"] if vnet_header else []
    outcome = bridges.run(helper, "br0", *options, prefix=bridges.without())
    assert outcome.status == 0 and outcome.tap, outcome
    assert outcome.stderr == ""
    assert outcome.tap.data == b"\0"
    assert outcome.tap.name.startswith("tap")
    assert outcome.tap.flags == IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if vnet_header else 0)
    assert (outcome.tap.mtu, outcome.tap.master, outcome.tap.up) == (bridges.MTU, "br0", True)
    assert outcome.tap.mac.startswith("fe:")


def test_ways_to_be_privileged(folder: Path, plain: Path, helper: Path) -> None:
    setuid = bridges.copy(HELPER, folder / "setuid")
    setuid.chmod(0o4755)
    for program, prefix in (
        (plain, ()),
        (plain, bridges.with_net_admin()),
        (helper, bridges.without()),
        (setuid, bridges.without()),
    ):
        outcome = bridges.run(program, "br1", prefix=prefix)
        assert outcome.verdict == "yes", (program, prefix, outcome)


def test_words_in_any_order(helper: Path) -> None:
    """And what QEMU's own order is."""
    ours, its = socket.socketpair()
    with ours, its:
        words = (f"--fd={its.fileno()}", "--br=br0", "--queues=1", "--use-vnet")
        for command in (
            [helper, *words],
            ["/bin/sh", "-c", f"{helper} --use-vnet --fd={its.fileno()} --br=br0"],
        ):
            subprocess.run([*bridges.without(), *command], check=True, pass_fds=(its.fileno(),))
            _, fds, _, _ = socket.recv_fds(ours, 16, 4)
            (tap,) = fds
            assert bridges.describe(tap).flags & IFF_VNET_HDR
            os.close(tap)


def test_version_and_help(plain: Path) -> None:
    for option, expected in (("--version", f"{NAME} {qsteer.__version__}\n"), ("--help", f"usage: {NAME} ")):
        done = subprocess.run([plain, option], check=True, capture_output=True, text=True)
        assert done.stdout.startswith(expected) and done.stderr == ""


# The access list


@pytest.mark.parametrize("case", bridge_acls.CASES, ids=[case.name for case in bridge_acls.CASES])
def test_access_list(plain: Path, case: bridge_acls.Case) -> None:
    case.make()
    for bridge in case.asked:
        outcome = case.run(plain, bridge)
        assert outcome.verdict == case.verdict(bridge), (bridge, outcome)
        if outcome.tap:
            assert outcome.tap.master == bridge
        else:
            lines(outcome)


@pytest.mark.parametrize(
    ("acl", "said"),
    [
        ("allow all\ndeny br0\n", ["/etc/qemu/bridge.conf denies bridge br0"]),
        ("", ["/etc/qemu/bridge.conf does not allow bridge br0", "hint: .* line: allow br0"]),
        ("allow br0\npermit br1\n", ["/etc/qemu/bridge.conf:2: this is no rule"]),
        (None, ["cannot read /etc/qemu/bridge.conf: No such file or directory", "hint: "]),
    ],
)
def test_what_a_refusal_by_the_list_says(helper: Path, acl: str | None, said: list[str]) -> None:
    bridges.ACL.unlink()
    if acl is not None:
        bridges.ACL.write_text(acl)
    told = lines(bridges.run(helper, "br0", prefix=bridges.without()))
    assert len(told) == len(said)
    assert all(part in line for line, parts in zip(told, said, strict=True) for part in parts.split(" .* "))


def test_too_few_files_hide_no_deny(helper: Path) -> None:
    """An include that cannot be opened for want of a file descriptor is not one that is not there."""
    bridges.ACL.write_text("include /etc/qemu/1\nallow all\n")
    for number in range(1, 5):
        (bridges.ACL.parent / str(number)).write_text(f"include /etc/qemu/{number + 1}\n")
    (bridges.ACL.parent / "5").write_text("deny br0\n")

    def limited(files: int) -> bridges.Outcome:
        # The limit is for the helper itself, and is not to be in setpriv's way.
        prefix = (*bridges.without(), "prlimit", f"--nofile={files}:{files}", "--")
        return bridges.run(helper, "br0", prefix=prefix)

    for files in range(4, 16):
        assert limited(files).verdict == "no", files
    assert "Too many open files" in limited(7).stderr
    assert "denies bridge br0" in limited(15).stderr


# The command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--br=BRIDGE is missing"),
        (["--br=br0"], "--fd=N is missing"),
        (["--fd=3"], "--br=BRIDGE is missing"),
        (["--br=br0", "--fd="], "--fd= is no file descriptor"),
        (["--br=br0", "--fd=abc"], "--fd=abc is no file descriptor"),
        (["--br=br0", "--fd=3x"], "--fd=3x is no file descriptor"),
        (["--br=br0", "--fd=-1"], "--fd=-1 is no file descriptor"),
        (["--br=br0", "--fd=0x3"], "--fd=0x3 is no file descriptor"),
        (["--br=br0", "--fd= 3"], "--fd= 3 is no file descriptor"),
        (["--br=br0", "--fd=2147483648"], "--fd=2147483648 is no file descriptor"),
        (["--br=br0", f"--fd={2**32 + 3}"], "--fd=4294967299 is no file descriptor"),
        (["--br=br0", f"--fd={'9' * 5000}"], "is no file descriptor"),
        (["--br=br0", "--fd=2147483647"], "fd 2147483647 is no socket: Bad file descriptor"),
        (["--br=br0", "--fd=77"], "fd 77 is no socket: Bad file descriptor"),
        (["--br=br0", "--fd=0"], "fd 0 is no socket: Socket operation on non-socket"),
        (["--br=", "--fd=3"], "--br= names no bridge"),
        (["--br=sixteen-letters-", "--fd=3"], "15 characters at most"),
        ([f"--br={'x' * 100000}", "--fd=3"], "15 characters at most"),
        (["--br=.", "--fd=3"], "no network device has such a name"),
        (["--br=..", "--fd=3"], "no network device has such a name"),
        (["--br=../br0", "--fd=3"], "printable characters"),
        (["--br=br0/", "--fd=3"], "printable characters"),
        (["--br=br0:1", "--fd=3"], "printable characters"),
        (["--br=br 0", "--fd=3"], "printable characters"),
        (["--br=br0\n", "--fd=3"], "printable characters"),
        (["--br=\x1b[2Jbr0", "--fd=3"], "--br=?[2Jbr0: a bridge's name"),
        (["--br=br0", "--fd=3", "--br=br1"], "--br=br1: this option was given before"),
        (["--br=br0", "--fd=3", "--fd=3"], "--fd=3: this option was given before"),
        (["--use-vnet", "--br=br0", "--use-vnet", "--fd=3"], "--use-vnet: this option was given before"),
        (["--br=br0", "--fd=3", "more"], "more is no option of this program"),
        (["--br=br0", "--fd=3", ""], " is no option of this program"),
        (["--br=br0", "--fd=3", "--use-vnet=on"], "--use-vnet=on is no option of this program"),
        (["--br", "br0", "--fd=3"], "--br is no option of this program"),
        (["--br=br0", "--fd=3", "--queues=0"], "--queues=0: QEMU gives a netdev with helper= one queue, always"),
        (["--br=br0", "--fd=3", "--queues=4"], "--queues=4: QEMU gives a netdev with helper= one queue, always"),
        (["--queues=4"], "--queues=4: QEMU gives a netdev with helper= one queue, always"),
        (["--queues=1", "--queues=1"], "--queues=1: this option was given before"),
        (["--queues=many", "--br=br0", "--fd=3"], "--queues=many: QEMU gives"),
    ],
)
def test_command_lines_that_are_refused(helper: Path, words: list[str], said: str) -> None:
    done = subprocess.run(
        [*bridges.without(), helper, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=10,
    )
    told = lines(bridges.Outcome(status=done.returncode, stderr=done.stderr, tap=None))
    assert said in told[0]
    assert done.stdout == ""
    if said.endswith("always"):
        assert all(way in told[1] for way in ("qsteer run", "qsteer plug", "script=qsteer-ifup"))


def test_no_words_at_all(plain: Path) -> None:
    """Not even its own name."""

    def execute() -> None:
        nothing = (ctypes.c_char_p * 1)(None)
        ctypes.CDLL(None).execve(os.fsencode(plain), nothing, nothing)

    done = subprocess.run(["true"], preexec_fn=execute, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"{NAME}: --br=BRIDGE is missing")


# The bridge and the socket


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("br7", "there is no bridge br7: No such device"),
        ("veth0", "veth0 is not a bridge of the kernel's"),
        ("lo", "lo is not a bridge of the kernel's"),
        ("br0-other", "br0-other is another name of br0, and only that one counts"),
    ],
)
def test_what_is_no_bridge(helper: Path, name: str, said: str) -> None:
    assert lines(bridges.run(helper, name, prefix=bridges.without())) == [f"{NAME}: {said}"]


@contextlib.contextmanager
def pipe() -> Iterator[int]:
    ends = os.pipe()
    yield ends[1]
    for end in ends:
        os.close(end)


@contextlib.contextmanager
def internet_socket() -> Iterator[int]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        yield sock.fileno()


@contextlib.contextmanager
def unconnected() -> Iterator[int]:
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock.fileno()


@contextlib.contextmanager
def hung_up() -> Iterator[int]:
    ours, its = socket.socketpair()
    ours.close()
    with its:
        yield its.fileno()


@contextlib.contextmanager
def full() -> Iterator[int]:
    """A socket whose peer never reads."""
    ours, its = socket.socketpair()
    with ours, its:
        its.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                its.send(b"x" * 4096)
        its.setblocking(True)
        yield its.fileno()


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (pipe, "is no socket: Socket operation on non-socket"),
        (internet_socket, "is no unix socket"),
        (unconnected, "Transport endpoint is not connected"),
        (hung_up, "Broken pipe"),
        (full, "Resource temporarily unavailable"),
    ],
)
def test_sockets_that_are_refused(
    helper: Path, made: Callable[[], contextlib.AbstractContextManager[int]], reason: str
) -> None:
    with made() as fd:
        done = subprocess.run(
            [*bridges.without(), helper, "--br=br0", f"--fd={fd}"],
            pass_fds=(fd,),
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    (told,) = lines(bridges.Outcome(status=done.returncode, stderr=done.stderr, tap=None))
    assert reason in told


# Privileges


def test_without_the_capability(plain: Path) -> None:
    told = lines(bridges.run(plain, "br0", prefix=bridges.without()))
    assert told == [
        f"{NAME}: a tap on a bridge takes CAP_NET_ADMIN, which is missing",
        f"hint: as root, once: setcap cap_net_admin+ep {plain}",
    ]


def test_with_no_new_privs(helper: Path) -> None:
    # A second setpriv: the first one still has what its exec takes away.
    told = lines(bridges.run(helper, "br0", prefix=(*bridges.without(), "setpriv", "--no-new-privs", "--")))
    assert "CAP_NET_ADMIN" in told[0] and "no_new_privs" in told[1]


def test_a_closed_tun_device(helper: Path) -> None:
    device = Path("/dev/net/tun")
    device.chmod(0o600)
    try:
        told = lines(bridges.run(helper, "br0", prefix=bridges.without()))
    finally:
        device.chmod(0o666)
    assert told[0] == f"{NAME}: cannot open /dev/net/tun: Permission denied"
    assert "0666" in told[1]


@pytest.fixture
def traced() -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("not x86_64")


def hostile() -> None:
    """Become an ordinary user who leaves a helper signals, timers and fds."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    signal.setitimer(signal.ITIMER_REAL, 1000)
    for _ in range(20):
        os.set_inheritable(os.dup(0), True)
    os.setgroups([])


@pytest.mark.parametrize("way", ["file capability", "setuid", "ambient capability", "root"])
def test_what_it_is_at_each_step(traced: None, folder: Path, plain: Path, helper: Path, way: str) -> None:
    """CAP_NET_ADMIN is effective while the tap is made, never before the list is read, and gone before the tap is sent.

    The tracer is root: what it traces may gain privileges.
    """
    setuid = bridges.copy(HELPER, folder / "setuid-traced")
    setuid.chmod(0o4755)
    programs = {"file capability": helper, "setuid": setuid, "ambient capability": plain, "root": plain}
    command: list[str | Path] = [programs[way]]
    if way == "ambient capability":
        setpriv, *options = bridges.with_net_admin()
        command = [shutil.which(setpriv) or setpriv, *options, plain]

    def prepare() -> None:
        hostile()
        its.set_inheritable(True)
        if way in ("file capability", "setuid"):
            os.setresgid(bridges.NOBODY, bridges.NOBODY, bridges.NOBODY)
            os.setresuid(bridges.NOBODY, bridges.NOBODY, bridges.NOBODY)

    ours, its = socket.socketpair()
    with ours, its:
        seen: list[tuple[str, tracing.Call]] = []
        fds, owner, timers = 0, -1, 0
        for call in tracing.calls([*command, "--br=br0", f"--fd={its.fileno()}"], prepare):
            timers += call.number == tracing.SETITIMER
            if call.number == tracing.OPENAT:
                seen.append((call.text(1), call))
                owner = Path(f"/proc/{call.pid}/mem").stat().st_uid
            elif call.number in (tracing.IOCTL, tracing.SENDMSG):
                seen.append(("ioctl" if call.number == tracing.IOCTL else "sendmsg", call))
                fds = len(tuple(Path(f"/proc/{call.pid}/fd").iterdir()))
        _, received, _, _ = socket.recv_fds(ours, 16, 4)
        os.close(received[0])

    names = [name for name, _ in seen]
    uid = 0 if way == "root" else bridges.NOBODY
    effective = {name: {int(call.status["CapEff"], 16) for of, call in seen if of == name} for name in names}
    assert names.index("/etc/qemu/bridge.conf") < names.index("ioctl") < names.index("/dev/net/tun")
    assert effective["/etc/qemu/bridge.conf"] == {0}
    assert effective["/dev/net/tun"] == {NET_ADMIN}
    assert names[-1] == "sendmsg" and names.count("sendmsg") == 1

    reading = seen[names.index("/etc/qemu/bridge.conf")][1].status
    assert {reading["Uid"], reading["Gid"]} == {"\t".join([str(uid)] * 4)}
    assert int(reading["CapPrm"], 16) == NET_ADMIN and int(reading["CapInh"], 16) == int(reading["CapAmb"], 16) == 0
    assert reading["NoNewPrivs"] == "1"
    assert (int(reading["SigBlk"], 16), int(reading["SigIgn"], 16) & ~LIBCS_SIGNALS) == (0, 0)

    sending = seen[-1][1].status
    assert [int(sending[name], 16) for name in ("CapEff", "CapPrm", "CapInh", "CapAmb")] == [0] * 4
    assert fds == 6, "three streams, the socket, one for ioctl(), the tap"
    assert owner == 0, "the caller can look into it"
    assert timers == 3


def test_closed_streams_are_opened(traced: None, plain: Path) -> None:
    """Also by root, where the dynamic loader does not."""

    def prepare() -> None:
        its.set_inheritable(True)
        for fd in (0, 1, 2):
            os.close(fd)

    ours, its = socket.socketpair()
    with ours, its, contextlib.closing(tracing.calls([plain, "--br=br0", f"--fd={its.fileno()}"], prepare)) as walk:
        (call,) = (call for call in walk if call.number == tracing.SENDMSG and streams_of(call) == ["/dev/null"] * 3)
        assert call.arguments[0] == its.fileno()
        os.close(socket.recv_fds(ours, 16, 4)[1][0])


def streams_of(call: tracing.Call) -> list[str]:
    return [str(Path(f"/proc/{call.pid}/fd/{fd}").readlink()) for fd in (0, 1, 2)]


def test_killed_before_it_sends(traced: None, helper: Path) -> None:
    ours, its = socket.socketpair()
    with ours, its:
        walk = tracing.calls([helper, "--br=br0", f"--fd={its.fileno()}"], lambda: its.set_inheritable(True))
        with contextlib.closing(walk):
            assert any(call.number == tracing.SENDMSG for call in walk)
            assert len(bridges.taps()) == 1
    # nothing_left looks again: the tap went with its only process.


# What else a caller can leave behind


def test_streams_that_are_closed(helper: Path) -> None:
    def close() -> None:
        for fd in (0, 1, 2):
            os.close(fd)

    prefix = bridges.without()
    assert bridges.run(helper, "br0", prefix=prefix, prepare=close).verdict == "yes"
    assert bridges.run(helper, "br7", prefix=prefix, prepare=close).verdict == "no"


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_socket_is_a_standard_stream(helper: Path, number: int) -> None:
    """As in a QEMU that was started with closed streams."""
    ours, its = socket.socketpair()
    with ours, its:
        done = subprocess.run(
            [*bridges.without(), helper, "--br=br0", f"--fd={number}"],
            preexec_fn=lambda: os.dup2(its.fileno(), number) and None,
            check=False,
            timeout=10,
        )
        assert done.returncode == 0
        data, fds, _, _ = socket.recv_fds(ours, 16, 4)
        assert data == b"\0"
        os.close(fds[0])


def test_every_file_descriptor_is_taken(helper: Path) -> None:
    """Those that the caller left open are closed: they are not in the way."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        with contextlib.suppress(OSError):
            while True:
                os.set_inheritable(os.dup(0), True)
        os.close(63)  # for setpriv and the loader

    outcome = bridges.run(helper, "br0", prefix=bridges.without(), prepare=fill)
    assert outcome.verdict == "yes", outcome


@pytest.mark.parametrize(
    ("limit", "value"),
    [("fsize", 0), ("cpu", 1), ("core", 0), ("nproc", 1), ("memlock", 0), ("stack", 128 << 10), ("as", 4 << 20)],
)
def test_limits(helper: Path, limit: str, value: int) -> None:
    prefix = (*bridges.without(), "prlimit", f"--{limit}={value}:{value}", "--")
    assert bridges.run(helper, "br0", prefix=prefix).verdict == "yes"
    assert bridges.run(helper, "br7", prefix=prefix).tap is None


def test_signals_and_timers(helper: Path) -> None:
    def leave() -> None:
        for number in (signal.SIGALRM, signal.SIGVTALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        signal.setitimer(signal.ITIMER_REAL, 1000, 1000)

    assert bridges.run(helper, "br0", prefix=bridges.without(), prepare=leave).verdict == "yes"


def test_environment(helper: Path) -> None:
    tricks = {
        "LD_PRELOAD": "/nonexistent.so",
        "LD_LIBRARY_PATH": "/tmp",
        "GCONV_PATH": "/tmp",
        "LC_ALL": "../../../../tmp/x",
        "MALLOC_CHECK_": "7",
        "PATH": "",
        "TMPDIR": "/nonexistent",
        "A": "x" * 100000,
    }
    prefix = [word if word != "setpriv" else "/usr/bin/setpriv" for word in bridges.without()]
    outcome = bridges.run(helper, "br0", prefix=prefix, environment=tricks)
    assert outcome.verdict == "yes", outcome
