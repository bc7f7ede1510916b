# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-qemu on real taps, with a real qsteer serve and with services and QEMUs that misbehave.

What takes a real QEMU is in integration/test_qemu_wrapper.py.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from qsteer import kernel, programs, service
from qsteer.model import Source
from tests.kernel import bridges, emulator, private, support
from tests.kernel.emulator import BUILT_WITH_EBPF, BUILT_WITHOUT, QEMU, STANDARD, Answer, Nic, Outcome, greeting

DEADLINE_S = 2.0
SLACK_S = 0.5
PROGRAM = ("anon_inode:bpf-prog", "anon_inode:bpf-map", "anon_inode:bpf-map", "anon_inode:bpf-map")
NOBODY = bridges.without()


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A host of this module's own."""

    folder: Path
    wrapper: Path
    standin: Path

    def start(self, words: Sequence[str], **options: Any) -> Outcome:
        return emulator.run(self.wrapper, words, **{"prefix": NOBODY, **options})

    def untouched(self, words: Sequence[str], **options: Any) -> Outcome:
        """The same without the wrapper."""
        return emulator.run(self.standin, words, **{"prefix": NOBODY, **options})


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    if os.geteuid() != 0:
        pytest.skip("not root (make test takes care of it)")
    with support.network_namespace(), bridges.host() as folder:
        private.RUNTIME.chmod(0o755)
        wrapper, standin = emulator.install(folder)
        yield Place(folder=folder, wrapper=wrapper, standin=standin)


@contextlib.contextmanager
def serving(uid: int = bridges.NOBODY) -> Iterator[Path]:
    """A real service with a rule for one user; it has failed nowhere.  Yields where it listens."""
    with tempfile.TemporaryDirectory(prefix="qsqw-", dir="/dev/shm") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "qsteer.toml").write_text(f'[[serve.allow]]\nuser = "{uid}"\n')
        path = folder / "socket"
        with (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "qsteer", "serve", "--socket", path],
                stderr=stderr,
                env={**os.environ, "QSTEER_CONFIG": name},
            )
        try:
            support.wait_until("the service", lambda: listens(path) or process.poll() is not None)
            yield path
        finally:
            process.terminate()
            status = process.wait(support.patience(20))
            said = (folder / "stderr").read_text()
            assert status == 0 and "Traceback" not in said and "serve fails" not in said, said


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(os.fspath(path)) == 0


@pytest.fixture(scope="module")
def running(place: Place) -> Iterator[Path]:
    with serving() as path:
        yield path


@pytest.fixture
def served(running: Path) -> Iterator[None]:
    """A real service is where one is looked for."""
    service.SOCKET.symlink_to(running)
    yield
    service.SOCKET.unlink()


@pytest.fixture
def tap() -> Iterator[support.TapUnderTest]:
    with support.tap("qsqw0", 4) as under_test:
        yield under_test


def program_id(line: str, name: str = "net0") -> int:
    """The program's number, of the line that a NIC with one has."""
    words = line.split()
    assert words[:3] == [f"{name}:", "program", "qsteer"] and len(words) == 5, line
    return int(words[3])


def without_programs(outcome: Outcome, words: Sequence[str], plain: Outcome | None = None) -> None:
    """QEMU was started as it would have been."""
    assert outcome.started.argv[1:] == tuple(words)
    assert not any("bpf" in target for target in outcome.started.fds.values())
    if plain:
        assert replace(outcome.started, argv=()) == replace(plain.started, argv=())


# What it gives


def test_a_program_for_a_nic(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """As an ordinary user; the program is of that tap, and works."""
    nic = Nic(fds=tap.open.fds)
    words = (*STANDARD, *nic.words, "-msg", "timestamp=on")
    done = place.start(words, pass_fds=tap.open.fds)
    plain = place.untouched(words, pass_fds=tap.open.fds)
    (line,) = done.lines
    number = program_id(line)
    assert done.probe and done.took_s < DEADLINE_S

    argv = done.started.argv
    added = sorted(set(done.started.fds) - set(plain.started.fds))
    assert tuple(done.started.fds[fd] for fd in added) == PROGRAM
    changed = words.index(nic.words[3]) + 1
    assert (
        argv[changed]
        == nic.words[3][:-1] + ',"ebpf-rss-fds":' + json.dumps(list(map(str, added))).replace(" ", "") + "}"
    )
    assert argv[1:changed] + argv[changed + 1 :] == words[: changed - 1] + words[changed:]
    assert argv[0] == str(place.standin)
    # Nothing else is another: environment, signals, limits, no child.
    assert {fd: of for fd, of in done.started.fds.items() if fd not in added} == plain.started.fds
    assert replace(done.started, argv=(), fds={}) == replace(plain.started, argv=(), fds={})
    assert "children No child" in done.started.others
    assert number not in support.loaded_programs()  # it went with the only process that had it


HOLDER = """
import os, sys, time
words = sys.argv[sys.argv.index("-device") + 1]
import json
print(*json.loads(words)["ebpf-rss-fds"], flush=True)
sys.stdin.read()
"""


def test_the_program_steers(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """The four fds are a program for that very tap, and its maps, in QEMU's order."""
    script = place.folder / "holder"
    script.write_text(
        "#!/bin/sh\n"
        f'case "$*" in *-qmp*) exec {place.standin} "$@" ;; esac\n'
        f"exec {sys.executable} -IS -c '{HOLDER}' \"$@\"\n"
    )
    script.chmod(0o755)
    (emulator.CHOICES / "qemu-holder").symlink_to(script)
    called = place.folder / "bin" / "qsteer-qemu-holder"
    called.symlink_to(place.wrapper)
    answer = place.folder / "answer"
    answer.write_text(Answer().text)
    with tempfile.TemporaryDirectory(prefix="qsqw-", dir="/dev/shm") as name:
        told = {"QSQW_FOLDER": name, "QSQW_ANSWER": str(answer), "QSQW_THEN": "wait"}
        with subprocess.Popen(
            [called, *Nic(fds=tap.open.fds).words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=tap.open.fds,
            env={**os.environ, **told},
        ) as holder:
            assert holder.stdout and holder.stdin and holder.stderr
            numbers = [int(word) for word in holder.stdout.readline().split()]
            pidfd = os.pidfd_open(holder.pid)
            fds = [_take(pidfd, number) for number in numbers]
            holder.stdin.close()
            number = program_id(holder.stderr.read().removeprefix("qsteer-qemu: "))
        os.close(pidfd)
    kernel.attach(tap.open.fds[0], fds[0])
    assert {queue.program_id for queue in kernel.open_queues(os.getpid()) if queue.tap == "qsqw0"} == {number}
    ident = programs.program_info(number).ident
    assert ident and (ident.tap, ident.source) == ("qsqw0", Source.SHARED_MAPS)
    sizes = [_map_value_size(fd) for fd in fds[1:]]
    assert sizes == [10, 40, 2]
    for fd in fds:
        os.close(fd)


def _take(pidfd: int, number: int) -> int:
    import ctypes

    pidfd_getfd = 438
    taken = ctypes.CDLL(None, use_errno=True).syscall(pidfd_getfd, pidfd, number, 0)
    assert taken >= 0, os.strerror(ctypes.get_errno())
    return int(taken)


def _map_value_size(fd: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("value_size:"))


def test_nics_are_independent(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """Each that fails has its own reason, and costs no other one its program."""
    with support.tap("qsqw1", 2) as second, support.tap("qsqw2", 1) as single:
        nics = (
            Nic(number=0, fds=tap.open.fds),
            Nic(number=1, fds=(999,)),
            Nic(number=2, fds=second.open.fds, netdev={"type": "user", "fds": None}),
            Nic(number=3, fds=second.open.fds, device={"driver": "virtio-net-pci-non-transitional"}),
            Nic(number=4, fds=(0,)),
            Nic(number=5, fds=second.open.fds, device={"rss": False}),
        )
        words = [*STANDARD, *(word for nic in nics for word in nic.words)]
        fds = (*tap.open.fds, *second.open.fds, *single.open.fds)
        done = place.start(words, pass_fds=fds)
    first, *rest = done.lines
    first_id, second_id = program_id(first), program_id(rest[2], "net3")
    assert first_id != second_id
    assert rest[0] == "net1: no program: cannot send the tap to qsteer serve: Bad file descriptor"
    assert rest[1] == "net2: no program: its -netdev is no tap"
    assert rest[3] == "net4: no program: the fd that came with the request for a program is no queue of a tap"
    assert len(rest) == 4
    given = [word for word in done.started.argv if "ebpf-rss-fds" in word]
    numbers = [int(fd) for word in given for fd in json.loads(word)["ebpf-rss-fds"]]
    assert len(set(numbers)) == 8
    assert [done.started.fds[fd] for fd in numbers] == [*PROGRAM, *PROGRAM]
    left = [word for word in done.started.argv[1:] if "ebpf-rss-fds" not in word]
    assert left == [word for word in words if word not in (nics[0].words[3], nics[3].words[3])]


def test_what_the_service_refuses(place: Place, tap: support.TapUnderTest) -> None:
    words = (*STANDARD, *Nic(fds=tap.open.fds).words)
    with serving(64321) as path:
        service.SOCKET.symlink_to(path)
        done = place.start(words, pass_fds=tap.open.fds)
        service.SOCKET.unlink()
    said = f"no rule of qsteer serve is for uid {bridges.NOBODY} or one of its groups"
    assert done.lines == (f"net0: no program: {said}",)
    without_programs(done, words)


# What is no NIC for it


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A NIC's words, with @FDS@ in them, and the line that there is about it, if any: a program, or why not."""

    words: tuple[str, ...]
    said: str | None
    name: str = "net0"


YES = "program qsteer "
NO_FDS = "no program: its -netdev has no numbers of fds"
NO_NETDEV = "no program: its -netdev is not there, or not JSON"
NOT_JSON = "no program: its -device is not JSON, and so can hold no fds"
UNREADABLE = "no program: its -device cannot be read"
HAS_FDS = "no program: its -device has ebpf-rss-fds already"
NAMELESS = "a virtio-net"
DEVICE = '{"driver":"virtio-net-pci","rss":true,"netdev":"hostnet0","id":"net0"}'
NETDEV = '{"type":"tap","fds":"@FDS@","id":"hostnet0"}'


def words(text: str, *, of_netdev: str = NETDEV) -> tuple[str, ...]:
    return ("-netdev", of_netdev, "-device", text)


def device(said: str | None = YES, name: str = "net0", **changes: object) -> Case:
    return Case(words=Nic(device=changes, netdev={"fds": "@FDS@"}).words, said=said, name=name)


def netdev(said: str | None = YES, **changes: object) -> Case:
    return Case(words=Nic(netdev={"fds": "@FDS@", **changes}).words, said=said)


CASES = {
    "as libvirt writes it": Case(words=words(DEVICE), said=YES),
    "two dashes": Case(words=("--netdev", NETDEV, "--device", DEVICE), said=YES),
    "the device first": Case(words=("-device", DEVICE, "-netdev", NETDEV), said=YES),
    "behind a -device that is a value": Case(words=("-append", "-device", *words(DEVICE)), said=YES),
    "blanks": Case(words=words(DEVICE[:-1] + " \t}\n ", of_netdev=NETDEV + " "), said=YES),
    "braces in strings": Case(words=words(DEVICE.replace('net0"}', '}{"}')), said=YES, name="}{"),
    "keys with escapes": Case(words=words(DEVICE.replace("rss", "r\\u0073s")), said=YES),
    "rss is a word": device(rss="on"),
    "by its alias": device(driver="virtio-net"),
    "ccw": device(driver="virtio-net-ccw"),
    "mmio": device(driver="virtio-net-device"),
    "transitional": device(driver="virtio-net-pci-transitional"),
    "no id": device(name="hostnet0", id=None),
    "vhost off": netdev(vhost=False, vhostforce=True),
    "vhost on, QEMU 10.0": netdev(vhost=True, vhostfds="7:8"),
    "fd instead of fds": Case(words=Nic(netdev={"fds": None, "fd": "@FD@"}).words, said=YES),
    "a name that is not printable": device(name="?[2J?", id="\x1b[2J\n"),
    "a long name": device(name="n" * 63, id="n" * 5000),
    "no rss": device(None, rss=None),
    "rss off": device(None, rss=False),
    "rss off by a word": device(None, rss="off"),
    "rss up to QEMU": device(None, rss="auto"),
    "rss is a number": device(None, rss=1),
    "another driver": device(None, driver="e1000e"),
    "a longer name of a driver": device(None, driver="virtio-network"),
    "no driver": device(None, driver=None),
    "nothing after -device": Case(words=("-netdev", NETDEV, "-device"), said=None),
    "an empty object": Case(words=words("{}"), said=None),
    "no option": Case(words=("-netdev", NETDEV, "device", DEVICE), said=None),
    "three dashes": Case(words=("-netdev", NETDEV, "---device", DEVICE), said=None),
    "keyval, rss off": Case(words=("-device", "virtio-net-pci,rss=off,id=rss=on"), said=None),
    "keyval of another driver": Case(words=("-device", "virtio-blk,rss=on"), said=None),
    "cut short, another driver": Case(words=("-device", '{"driver":"e1000'), said=None),
    "fds already": Case(words=words(DEVICE[:-1] + ',"ebpf-rss-fds":["1","2","3","4"]}'), said=HAS_FDS),
    "fds already, by an escape": Case(words=words(DEVICE[:-1] + ',"ebpf\\u002drss-fds":["1"]}'), said=HAS_FDS),
    "keyval": Case(words=words("virtio-net-pci,rss=on,netdev=hostnet0,id=net0"), said=NOT_JSON),
    "keyval without id": Case(words=words("virtio-net,netdev=hostnet0,rss=yes"), said=NOT_JSON, name="hostnet0"),
    "keyval without anything": Case(words=words("virtio-net-pci,rss=y"), said=NOT_JSON, name=NAMELESS),
    "not quite JSON": Case(words=words(DEVICE.replace('"', "'")), said=UNREADABLE, name=NAMELESS),
    "more behind the object": Case(words=words(DEVICE + "}"), said=UNREADABLE, name=NAMELESS),
    "cut short": Case(words=words(DEVICE[:-1]), said=UNREADABLE, name=NAMELESS),
    "too long": Case(words=words(DEVICE[:-1] + " " * 66000 + "}"), said=UNREADABLE, name=NAMELESS),
    "too deep": Case(words=words(DEVICE[:-1] + ',"x":' + "[" * 99 + "]" * 99 + "}"), said=UNREADABLE, name=NAMELESS),
    "no netdev": device(NO_NETDEV, netdev=None),
    "another netdev": device(NO_NETDEV, netdev="hostnet7"),
    "a netdev that is a number": device(NO_NETDEV, netdev=7),
    "a keyval netdev": Case(words=words(DEVICE, of_netdev="tap,id=hostnet0,fds=@FDS@"), said=NO_NETDEV),
    "a netdev that is no tap": netdev("no program: its -netdev is no tap", type="vhost-user"),
    "a netdev of no type": netdev("no program: its -netdev is no tap", type=None),
    "no fds": netdev(NO_FDS, fds=None),
    "fds are a number": netdev(NO_FDS, fds=5),
    "fds are empty": netdev(NO_FDS, fds=""),
    "names of fds": netdev(NO_FDS, fds="vnet0:vnet1"),
    "a number and a name": netdev(NO_FDS, fds="@FD@:vnet1"),
    "a negative fd": netdev(NO_FDS, fds="-1"),
    "an fd too large": netdev(NO_FDS, fds="2147483648"),
    "an fd far too large": netdev(NO_FDS, fds="9" * 60),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_command_lines(place: Place, served: None, tap: support.TapUnderTest, case: Case) -> None:
    fds = ":".join(map(str, tap.open.fds))
    nic = [word.replace("@FDS@", fds).replace("@FD@", str(tap.open.fds[1])) for word in case.words]
    given = (*STANDARD, *nic)
    done = place.start(given, pass_fds=tap.open.fds)
    if case.said != YES:
        assert done.lines == (() if case.said is None else (f"{case.name}: {case.said}",))
        without_programs(done, given)
        assert not done.probe
        return
    (line,) = done.lines
    assert line.startswith(f"{case.name}: {YES}")
    (changed,) = (i for i, word in enumerate(done.started.argv[1:]) if word != given[i])
    assert given[changed - 1].endswith("-device")
    before, after = json.loads(given[changed]), json.loads(done.started.argv[1:][changed])
    numbers = after.pop("ebpf-rss-fds")
    assert (before, [done.started.fds[int(fd)] for fd in numbers]) == (after, list(PROGRAM))


# What is passed through

WITHOUT_NICS = {
    "libvirt asks what QEMU can do": (
        *("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg"),
        *("-qmp", "unix:/run/capabilities,server=on,wait=off", "-pidfile", "/run/capabilities.pid", "-daemonize"),
    ),
    "help": ("-help",),
    "version": ("--version",),
    "nothing": (),
    "a VM without RSS": (*STANDARD, *Nic(device={"rss": None}).words),
    "bytes that are no text": (os.fsdecode(b"\xff\xfe"), "", " ", "\n", "-device", os.fsdecode(b"{\xff}")),
}


def left_behind() -> None:
    """What a process may inherit."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE))
    os.kill(os.getpid(), signal.SIGUSR1)
    os.umask(0o027)
    for number in (20, 33):
        os.dup2(0, number, inheritable=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def pending_too() -> None:
    left_behind()
    for number in (signal.SIGPIPE, signal.SIGUSR2):
        signal.pthread_sigmask(signal.SIG_BLOCK, (number,))
        os.kill(os.getpid(), number)


def no_streams() -> None:
    for number in (0, 1, 2):
        os.close(number)


def nothing() -> None:
    pass


@pytest.mark.parametrize("prepare", [nothing, left_behind, pending_too, no_streams])
@pytest.mark.parametrize("given", WITHOUT_NICS.values(), ids=WITHOUT_NICS)
def test_without_nics_it_is_an_exec(place: Place, given: tuple[str, ...], prepare: Callable[[], None]) -> None:
    """Nobody is asked: there is no service."""
    options: dict[str, Any] = {"prepare": prepare, "cwd": "/var/tmp", "environment": {"A": "b" * 5000, "QSTEER": ""}}
    # What the stand-in is told is that it is to answer nothing: here a -qmp is a VM's.
    done = place.start(given, **options, answer=Answer(text="", then="end"))
    plain = place.untouched(given, **options, answer=Answer(text="", then="end"))
    assert (done.status, done.stderr) == (plain.status, "")
    assert (done.vm or done.probe) and (done.vm is None) == (plain.vm is None)
    assert (done.vm, done.probe) == (plain.vm, plain.probe)


@pytest.mark.parametrize("prepare", [nothing, left_behind, pending_too, no_streams])
def test_with_a_nic_all_else_is_as_it_was(
    place: Place, served: None, tap: support.TapUnderTest, prepare: Callable[[], None]
) -> None:
    given = (*STANDARD, *Nic(fds=tap.open.fds).words)
    options: dict[str, Any] = {"pass_fds": tap.open.fds, "prepare": prepare, "cwd": "/var/tmp"}
    done, plain = place.start(given, **options), place.untouched(given, **options)
    added = {fd: done.started.fds[fd] for fd in sorted(set(done.started.fds) - set(plain.started.fds))}
    assert tuple(added.values()) == PROGRAM and min(added) > 2
    assert {fd: of for fd, of in done.started.fds.items() if fd not in added} == plain.started.fds
    assert replace(done.started, argv=(), fds={}) == replace(plain.started, argv=(), fds={})
    # A child has no signals that wait.
    waiting = {"SigPnd": "0" * 16, "ShdPnd": "0" * 16}
    assert done.probe and done.probe.status == {**plain.started.status, **waiting}
    assert (done.probe.limits, done.probe.environ) == (plain.started.limits, plain.started.environ)


def test_a_log_that_nobody_reads(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """Its reader is gone, or slow: neither ends a VM, or keeps it waiting."""
    given = Nic(fds=tap.open.fds).words
    reader, writer = os.pipe()
    os.close(reader)
    for stderr in (writer, full_pipe()):
        done = place.start(given, pass_fds=tap.open.fds, prepare=lambda fd=stderr: os.dup2(fd, 2))
        assert any("ebpf-rss-fds" in word for word in done.started.argv)
        assert int(done.started.status["SigPnd"], 16) == int(done.started.status["ShdPnd"], 16) == 0
        assert done.took_s < DEADLINE_S
    os.close(writer)


def full_pipe() -> int:
    _, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return writer


def test_the_longest_command_line(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """One that the kernel takes as it is, but not with the fds."""

    def start(length: int) -> Outcome | None:
        limit = 400_000  # of the stack: a quarter of it, and at least 128 KiB, is for words
        try:
            return place.start(
                ("-append", "x" * (length // 2), "x" * (length - length // 2), *Nic(fds=tap.open.fds).words),
                pass_fds=tap.open.fds,
                prefix=(),
                prepare=lambda: resource.setrlimit(resource.RLIMIT_STACK, (limit, limit)),
            )
        except OSError:
            return None

    low, high = 100_000, 140_000
    assert start(low) and not start(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if start(middle) else (low, middle)
    done = start(low)
    assert done
    first, second = done.lines
    assert program_id(first)
    assert second == f"{place.standin} does not start with programs: Argument list too long"
    assert not any("ebpf-rss-fds" in word for word in done.started.argv)
    assert not any("bpf" in target for target in done.started.fds.values())


@pytest.mark.parametrize(
    ("limit", "value"), [("nproc", 1), ("nofile", 9), ("nofile", 10), ("nofile", 12), ("nofile", 14), ("as", 4 << 20)]
)
def test_too_little_of_something(place: Place, served: None, tap: support.TapUnderTest, limit: str, value: int) -> None:
    """A VM that starts without the wrapper starts with it."""
    given = Nic(fds=[5]).words
    prefix = (*NOBODY, "prlimit", f"--{limit}={value}:{value}", "--")
    options: dict[str, Any] = {"prefix": prefix, "prepare": lambda: os.dup2(tap.open.fds[0], 5)}
    plain = place.untouched(given, **options)
    done = place.start(given, **options)
    assert plain.started.argv[1:] == given
    assert len(done.lines) == 1, done.lines
    if "no program" in done.lines[0]:
        without_programs(done, given, plain)
    else:
        assert any("ebpf-rss-fds" in word for word in done.started.argv)


# QEMUs

UNKNOWN = "what {standin} can do is unknown: "
VHOST = "vhost=on, and QEMU 10.1 and later use none there; qsteer keep can steer it"
EVENT = '{"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}}\r\n'
QEMUS: dict[str, tuple[Answer, str]] = {
    "9.0": (Answer(text=greeting(9, 0) + BUILT_WITH_EBPF), YES),
    "10.1": (Answer(text=greeting(10, 1) + BUILT_WITH_EBPF), YES),
    "100.0": (Answer(text=greeting(100, 0) + BUILT_WITH_EBPF), YES),
    "events come between": (Answer(text=EVENT + greeting() + EVENT + BUILT_WITH_EBPF), YES),
    "it ends after its answer": (Answer(then="end"), YES),
    "8.2": (Answer(text=greeting(8, 2) + BUILT_WITHOUT), "QEMU 8.2 takes none, 9.0 and later do"),
    "7.2 that says yes": (Answer(text=greeting(7, 2) + BUILT_WITH_EBPF), "QEMU 7.2 takes none, 9.0 and later do"),
    "without eBPF": (Answer(text=greeting() + BUILT_WITHOUT), "this QEMU was built without eBPF"),
    "no object": (Answer(text=greeting() + '{"return":{},"id":"ebpf"}'), "this QEMU was built without eBPF"),
    "no version": (Answer(text='{"QMP":{"version":7}}' + BUILT_WITH_EBPF), "QEMU 0.0 takes none, 9.0 and later do"),
    "it says nothing": (Answer(text="", then="end"), UNKNOWN + "it ended without an answer"),
    "it ends too early": (Answer(text=greeting(), then="end"), UNKNOWN + "it ended without an answer"),
    "half an answer": (Answer(text=BUILT_WITH_EBPF[:9000], then="end"), UNKNOWN + "it ended without an answer"),
    "no JSON": (Answer(text="QEMU 10.0"), UNKNOWN + "it answered something else than JSON"),
    "too deep": (Answer(text="[" * 5000), UNKNOWN + "it answered something else than JSON"),
    "no end": (Answer(text=greeting(), then="flood"), UNKNOWN + "its answer has no end"),
    "no end of a string": (Answer(text='{"a":"', then="flood"), UNKNOWN + "its answer has no end"),
    "it hangs": (Answer(text=""), UNKNOWN + "it did not answer in time"),
    "it hangs later": (Answer(text=greeting()), UNKNOWN + "it did not answer in time"),
}


@pytest.mark.parametrize(("answer", "said"), QEMUS.values(), ids=QEMUS)
def test_qemus(place: Place, served: None, tap: support.TapUnderTest, answer: Answer, said: str) -> None:
    """What it says decides, for all NICs at once; no process of it is left."""
    nics = (Nic(fds=tap.open.fds), Nic(number=1, fds=tap.open.fds))
    given = (*STANDARD, *nics[0].words, *nics[1].words)
    done = place.start(given, pass_fds=tap.open.fds, answer=answer)
    plain = place.untouched(given, pass_fds=tap.open.fds, answer=answer)
    assert processes_of(place.standin) == []
    assert done.probe and done.took_s < DEADLINE_S + support.patience(SLACK_S)
    if "in time" in said:
        assert done.took_s >= DEADLINE_S
    if said == YES:
        assert [program_id(line, f"net{number}") > 0 for number, line in enumerate(done.lines)] == [True, True]
        return
    why = said.format(standin=place.standin)
    assert done.lines == (f"net0: no program: {why}", f"net1: no program: {why}")
    without_programs(done, given, plain)


def processes_of(program: Path) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal() and (entry / "exe").readlink() == program:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("version", [(9, 0), (10, 0), (10, 1), (11, 1)])
def test_vhost(place: Place, served: None, tap: support.TapUnderTest, version: tuple[int, int]) -> None:
    """From 10.1 on QEMU ignores programs there; a NIC without vhost beside it gets its own."""
    ways: tuple[dict[str, object], ...] = (
        {"vhost": True, "vhostfds": "7"},
        {"vhostfd": "7"},
        {"vhostfds": "7:8"},
        {"vhostforce": True},
        {},
        {"vhost": False, "vhostfds": "7"},
    )
    nics = [Nic(number=number, fds=tap.open.fds, netdev=way) for number, way in enumerate(ways)]
    given = tuple(word for nic in nics for word in nic.words)
    done = place.start(given, pass_fds=tap.open.fds, answer=Answer(text=greeting(*version) + BUILT_WITH_EBPF))
    assert len(done.lines) == len(ways)
    for number, line in enumerate(done.lines):
        if number < 4 and version > (10, 0):
            assert line == f"net{number}: no program: {VHOST}"
        else:
            program_id(line, f"net{number}")
    assert sum("ebpf-rss-fds" in word for word in done.started.argv) == (2 if version > (10, 0) else 6)


def test_how_qemu_is_asked(place: Place, served: None, tap: support.TapUnderTest) -> None:
    """Once, with nothing of the VM's, not even its user's configuration."""
    given = (*Nic(fds=tap.open.fds).words, *Nic(number=1, fds=tap.open.fds).words)
    done = place.start(given, pass_fds=tap.open.fds)
    asked = done.probe
    assert asked and asked.argv == (
        *(str(place.standin), "-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *("-qmp", "stdio"),
    )
    assert asked.fds == {0: "pipe:", 1: "pipe:", 2: "/dev/null"}
    decoder, text, commands = json.JSONDecoder(), asked.asked, []
    while text:
        command, end = decoder.raw_decode(text)
        commands.append(command)
        text = text[end:]
    assert [command["execute"] for command in commands] == ["qmp_capabilities", "request-ebpf"]
    assert commands[1]["arguments"] == {"id": "rss"}


# Services

Behaviour = Callable[[socket.socket], object]
ANSWER = {"version": 1, "ok": True, "program": "qsteer 7 (shared-body)"}
LATE = "qsteer serve does not answer in time"
ENDED = "qsteer serve has ended the connection"
BAD = "what qsteer serve answered is not an answer of this version's protocol"


def frame(members: object) -> bytes:
    body = json.dumps(members).encode()
    return struct.pack("!I", len(body)) + body


def right_fds() -> list[int]:
    """A program and its maps."""
    return list(programs.load_program(tap="qsqw0", source=Source.SHARED_MAPS).fds)


def maps_that_are(path: str) -> Callable[[], list[int]]:
    """A program, and files in the place of its maps."""

    def make() -> list[int]:
        program, *maps = right_fds()
        for fd in maps:
            os.close(fd)
        return [program, *(os.open(path, os.O_RDWR) for _ in maps)]

    return make


def give(what: int | Callable[[], list[int]], body: bytes | None = None, *, early: bool = False) -> Behaviour:
    """An answer, then fds in a message, or so many that are of no use; or with the answer itself."""

    def behave(sock: socket.socket) -> None:
        fds = [os.open("/dev/zero", os.O_RDWR) for _ in range(what)] if isinstance(what, int) else what()
        answer = frame(ANSWER) if body is None else body
        if early:
            socket.send_fds(sock, [answer], fds)
        else:
            sock.sendall(answer)
            socket.send_fds(sock, [b"\0"], fds)
        for fd in fds:
            os.close(fd)
        sock.recv(1)

    return behave


def say(data: bytes) -> Behaviour:
    """Some bytes, and then nothing for as long as the client stays."""

    def behave(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.recv(1)

    return behave


def say_and_end(data: bytes) -> Behaviour:
    return lambda sock: sock.sendall(data)


def dribble(sock: socket.socket) -> None:
    """A byte now and then, each in time."""
    with contextlib.suppress(OSError):
        sock.settimeout(0.1)
        for byte in struct.pack("!I", 1000) + b" " * 1000:
            sock.sendall(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                if not sock.recv(1):
                    return


def refuse(text: str) -> Behaviour:
    return say_and_end(frame({"version": 1, "ok": False, "error": text, "hint": "", "exit": 4, "errno": 0}))


hang_up, refuse_at_once = say_and_end(b""), refuse("too many requests")
DEAF = (hang_up, refuse_at_once)
"""Those who do not even read what is asked."""
SERVICES: dict[str, tuple[Behaviour, str]] = {
    "it hangs up": (say_and_end(b""), ENDED),
    "it hangs up at once": (hang_up, ENDED),
    "it refuses at once": (refuse_at_once, "too many requests"),
    "half a length": (say_and_end(b"\0\0"), ENDED),
    "half an answer": (say_and_end(frame(ANSWER)[:20]), ENDED),
    "no fds": (say_and_end(frame(ANSWER)), ENDED),
    "it says nothing": (say(b""), LATE),
    "it hangs in the answer": (say(frame(ANSWER)[:20]), LATE),
    "it hangs before the fds": (say(frame(ANSWER)), LATE),
    "it dribbles": (dribble, LATE),
    "garbage": (say(b"HTTP/1.1 400 Bad Request\r\n" * 100), BAD),
    "an empty answer": (say(struct.pack("!I", 0)), BAD),
    "no JSON": (say(struct.pack("!I", 3) + b"{x}"), BAD),
    "not an object": (say(frame([1])), BAD),
    "more behind the object": (say(struct.pack("!I", 5) + b"{} {}"), BAD),
    "another version": (say(frame({**ANSWER, "version": 2})), BAD),
    "no version": (say(frame({"ok": True, "program": "x"})), BAD),
    "no verdict": (say(frame({"version": 1, "program": "x"})), BAD),
    "no program": (say(frame({"version": 1, "ok": True})), BAD),
    "a program that is a number": (say(frame({**ANSWER, "program": 7})), BAD),
    "no reason": (say(frame({"version": 1, "ok": False})), BAD),
    "no fds in the message": (give(0), BAD),
    "three fds": (give(3), BAD),
    "five fds": (give(5), "qsteer serve gives more fds than there is room for"),
    "fds with the answer": (give(4, early=True), LATE),
    "four files": (give(4), "what qsteer serve gives is no program"),
    "no maps": (give(maps_that_are("/dev/zero")), "what qsteer serve gives are no maps"),
    "nothing that can be mapped": (
        give(maps_that_are("/dev/null")),
        "cannot use the maps that qsteer serve gives: No such device",
    ),
    "maps and no program": (give(lambda: right_fds()[::-1]), "what qsteer serve gives is no program"),
    "a reason": (refuse("no rule is for you"), "no rule is for you"),
    "a reason that is not printable": (refuse("a\n\x1b[2J\u20ac"), "a??[2J???"),
}


@contextlib.contextmanager
def pretending(behave: Behaviour | None) -> Iterator[None]:
    """A service that does to each client what is given; without it, one whose queue is full."""
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as stack:
        listener.bind(os.fspath(service.SOCKET))
        stack.callback(service.SOCKET.unlink)
        service.SOCKET.chmod(0o666)
        if not behave:
            listener.listen(0)
            for _ in range(2):
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect_ex(os.fspath(service.SOCKET))
            yield
            return
        listener.listen(8)
        thread = threading.Thread(target=_serve, args=(listener, behave))
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve(listener: socket.socket, behave: Behaviour) -> None:
    while True:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        with sock, contextlib.suppress(ConnectionResetError, BrokenPipeError):
            if behave not in DEAF:
                (length,) = struct.unpack("!I", sock.recv(4, socket.MSG_WAITALL))
                assert json.loads(sock.recv(length, socket.MSG_WAITALL)) == {"version": 1, "request": "program"}
                byte, fds, _, _ = socket.recv_fds(sock, 1, 2)
                assert (byte, len(fds)) == (b"\0", 1)
                os.close(fds[0])
            behave(sock)


@pytest.mark.parametrize(("behave", "said"), SERVICES.values(), ids=SERVICES)
def test_services(place: Place, tap: support.TapUnderTest, behave: Behaviour, said: str) -> None:
    given = (*STANDARD, *Nic(fds=tap.open.fds).words)
    with pretending(behave):
        done = place.start(given, pass_fds=tap.open.fds)
    plain = place.untouched(given, pass_fds=tap.open.fds)
    assert done.lines == (f"net0: no program: {said}",)
    without_programs(done, given, plain)
    assert done.took_s < DEADLINE_S + support.patience(SLACK_S)
    if said == LATE:
        assert done.took_s >= DEADLINE_S


def test_a_service_is_as_it_should_be(place: Place, tap: support.TapUnderTest) -> None:
    """The same stand-in, right in every part: what the cases above spoil.  Its name is bounded, and made printable."""
    answer = frame({**ANSWER, "program": "qsteer 7\n\x1b" + "x" * 5000})
    with pretending(give(right_fds, answer)):
        done = place.start((*STANDARD, *Nic(fds=tap.open.fds).words), pass_fds=tap.open.fds)
    assert done.lines == ("net0: program qsteer 7??" + "x" * 53,)
    targets = list(done.started.fds.values())
    assert (targets.count("anon_inode:bpf-prog"), targets.count("anon_inode:bpf-map")) == (1, 3)
    assert any("ebpf-rss-fds" in word for word in done.started.argv)


def test_one_deadline_for_all(place: Place, tap: support.TapUnderTest) -> None:
    nics = [Nic(number=number, fds=tap.open.fds) for number in range(8)]
    with pretending(say(b"")):
        done = place.start([word for nic in nics for word in nic.words], pass_fds=tap.open.fds)
    assert done.lines == tuple(f"net{number}: no program: {LATE}" for number in range(8))
    assert DEADLINE_S <= done.took_s < DEADLINE_S + support.patience(SLACK_S)
    assert done.started


def test_nobody_serves(place: Place, tap: support.TapUnderTest) -> None:
    given = (*STANDARD, *Nic(fds=tap.open.fds).words)

    def said() -> str:
        done = place.start(given, pass_fds=tap.open.fds)
        without_programs(done, given)
        (line,) = done.lines
        return line.removeprefix("net0: no program: ")

    nobody = f"no qsteer serve listens at {service.SOCKET}"
    assert said() == nobody
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(os.fspath(service.SOCKET))
        service.SOCKET.chmod(0o666)
        assert said() == nobody
        service.SOCKET.chmod(0o600)
        assert said() == "cannot reach qsteer serve: Permission denied"
    service.SOCKET.unlink()
    with pretending(None):
        assert said() == LATE


# Which QEMU


def test_the_name_says_which(place: Place) -> None:
    """What /etc/qsteer/qemu has goes before what is found; each other place has its turn."""
    private.mount("-t", "tmpfs", "qsqw", "/usr/libexec")
    private.mount("-t", "tmpfs", "qsqw", "/usr/local/bin")
    try:
        for folder in ("/usr/libexec", "/usr/local/bin"):
            Path(folder).chmod(0o755)

        def ran(name: str) -> str:
            called = place.folder / "called" / name
            called.parent.mkdir(exist_ok=True)
            called.unlink(missing_ok=True)
            called.symlink_to(place.wrapper)
            done = emulator.run(called, ("-m", "1"), prefix=NOBODY)
            assert not done.stderr
            return done.started.argv[0]

        for target in ("/usr/libexec/qemu-kvm", f"/usr/libexec/{QEMU}", "/usr/local/bin/qemu-system-aarch64"):
            shutil.copy(place.standin, target)
        assert ran("qsteer-qemu-kvm") == ran("qemu-kvm") == "/usr/libexec/qemu-kvm"
        assert ran("qsteer-qemu-system-aarch64") == "/usr/local/bin/qemu-system-aarch64"
        assert ran("qsteer-qemu") == ran(f"qsteer-{QEMU}") == str(place.standin)
        shutil.copy(place.standin, "/usr/local/bin/qemu-kvm")
        assert ran("qsteer-qemu-kvm") == "/usr/local/bin/qemu-kvm"
        # /usr/bin has one of that name.
        shutil.copy(place.standin, "/usr/local/bin/false")
        called = place.folder / "called" / "qsteer-false"
        called.symlink_to(place.wrapper)
        done = emulator.run(called, (), prefix=NOBODY)
        assert (done.status, done.stderr, done.vm) == (1, "", None)
        # Never itself.
        Path("/usr/local/bin/qemu-kvm").unlink()
        Path("/usr/local/bin/qemu-kvm").symlink_to(place.wrapper)
        assert ran("qsteer-qemu-kvm") == "/usr/libexec/qemu-kvm"
    finally:
        private.unmount("/usr/local/bin")
        private.unmount("/usr/libexec")


def dangling(link: Path, place: Place) -> None:
    link.symlink_to("/nonexistent")


def itself(link: Path, place: Place) -> None:
    link.symlink_to(place.wrapper)


def not_executable(link: Path, place: Place) -> None:
    link.symlink_to(place.folder / "not-executable")
    (place.folder / "not-executable").touch()


def directory(link: Path, place: Place) -> None:
    link.mkdir()


def somebody_elses(link: Path, place: Place) -> None:
    link.symlink_to(place.standin)
    os.chown(link, bridges.NOBODY, bridges.NOBODY, follow_symlinks=False)


def writable(link: Path, place: Place) -> None:
    shutil.copy(place.standin, link)
    link.chmod(0o777)


def in_an_open_directory(link: Path, place: Place) -> None:
    link.symlink_to(place.standin)
    emulator.CHOICES.chmod(0o777)


OTHERS = "others than root may change it"


@pytest.mark.parametrize(
    ("choose", "why"),
    [
        (dangling, "No such file or directory"),
        (itself, "it is qsteer-qemu itself"),
        (not_executable, "Permission denied"),
        (directory, "it is no program"),
        (somebody_elses, OTHERS),
        (writable, OTHERS),
        (in_an_open_directory, OTHERS),
    ],
)
def test_choices_that_are_passed_over(place: Place, choose: Callable[[Path, Place], None], why: str) -> None:
    """It says so, and goes on: another one is found, or there is none."""
    link = emulator.CHOICES / "qemu-kvm"
    called = place.folder / "bin" / "qsteer-qemu-kvm"
    called.symlink_to(place.wrapper)
    private.mount("-t", "tmpfs", "-o", "mode=755", "qsqw", "/usr/libexec")
    try:
        choose(link, place)
        done = emulator.run(called, ("-m", "1"), prefix=NOBODY)
        assert (done.status, done.vm) == (127, None)
        passed_over = f"{link} is passed over: {why}"
        assert done.lines == (
            passed_over,
            f"there is no qemu-kvm to run in {emulator.CHOICES}, /usr/bin or another usual place",
        )
        shutil.copy(place.standin, "/usr/libexec/qemu-kvm")
        done = emulator.run(called, ("-m", "1"), prefix=NOBODY)
        assert done.started.argv == ("/usr/libexec/qemu-kvm", "-m", "1")
        assert done.lines == (passed_over,)
    finally:
        private.unmount("/usr/libexec")
        called.unlink()
        emulator.CHOICES.chmod(0o755)
        if link.is_dir() and not link.is_symlink():
            link.rmdir()
        else:
            link.unlink()


def test_what_cannot_be_run(place: Place) -> None:
    """Executable by its mode, and no program; the exit status is a shell's."""
    broken = place.folder / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    link, called = emulator.CHOICES / "qemu-broken", place.folder / "bin" / "qsteer-qemu-broken"
    link.symlink_to(broken)
    called.symlink_to(place.wrapper)
    done = emulator.run(called, ("-m", "1"), prefix=NOBODY)
    assert (done.status, done.lines) == (126, (f"cannot run {broken}: Exec format error",))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "qsteer-", "qsteer-..", "x/"])
def test_names_of_nothing(place: Place, name: str) -> None:
    done = subprocess.run([name], executable=place.wrapper, capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr == "qsteer-qemu: it has to be called by a name: qsteer-qemu\n"
