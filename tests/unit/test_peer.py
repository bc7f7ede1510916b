# SPDX-License-Identifier: BSD-2-Clause
"""Who is at the other end of a unix socket: the process that is meant, or an error of one line."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import peer, procs
from qsteer.errors import BusyError, NotFoundError, PermissionDeniedError, QsteerError
from qsteer.model import Process


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.fixture
def me() -> Process:
    process = procs.read(os.getpid())
    assert process
    return process


@pytest.fixture(autouse=True)
def no_fd_is_left() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A listener at ``sock``, in the working directory, with room for one client to wait (and, in Linux, one more)."""
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
        listening.listen(0)
        yield listening


def test_connects(listener: socket.socket, me: Process, tmp_path: Path) -> None:
    for path in ("sock", "./sock", str(tmp_path / "sock"), "/../.." + str(tmp_path) + "//sock"):
        with peer.connect(path, me, timeout_s=5) as ours, listener.accept()[0] as theirs:
            assert ours.gettimeout() == 5
            ours.sendall(b"there")
            assert theirs.recv(9) == b"there"


def test_a_path_longer_than_sun_path(me: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path.joinpath(*["d" * 100] * 20)
    deep.mkdir(parents=True)
    monkeypatch.chdir(deep)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("sock")
        listening.listen(1)
        monkeypatch.chdir("/")
        peer.connect(str(deep / "sock"), me, timeout_s=5).close()


@pytest.mark.parametrize("target", ["sock", "../{name}/sock", "{folder}/sock", "second"])
def test_symbolic_links(listener: socket.socket, me: Process, tmp_path: Path, target: str) -> None:
    (tmp_path / "second").symlink_to("sock")
    (tmp_path / "first").symlink_to(target.format(name=tmp_path.name, folder=tmp_path))
    peer.connect(str(tmp_path / "first"), me, timeout_s=5).close()


def other_process(code: str, *arguments: str) -> "subprocess.Popen[str]":
    """A Python that runs ``code``, says ``ready``, and waits for the end of its input."""
    code = f"import os, socket, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
    argv = [sys.executable, "-IS", "-c", code, *arguments]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout and child.stdout.readline() == "ready\n"
    return child


def test_another_process_s_root_and_working_directory(tmp_path: Path) -> None:
    """Its own view of the file system counts, for symbolic links, too."""
    if os.geteuid():
        pytest.skip("not root (make test takes care of it): chroot")
    (tmp_path / "run").mkdir()
    (tmp_path / "var").symlink_to("/run")
    code = """
os.chdir(sys.argv[1] + "/run")
os.chroot(sys.argv[1])
listening = socket.socket(socket.AF_UNIX)
listening.bind("qsteer-test")
listening.listen(9)
"""
    with other_process(code, str(tmp_path)) as child:
        process = procs.read(child.pid)
        assert process
        for path in ("qsteer-test", "/run/qsteer-test", "/var/qsteer-test", "../../var/qsteer-test"):
            peer.connect(path, process, timeout_s=5).close()
        with pytest.raises(NotFoundError):
            peer.connect(str(tmp_path / "run" / "qsteer-test"), process, timeout_s=5)


def test_another_process_listens(listener: socket.socket, tmp_path: Path) -> None:
    with other_process("") as child:
        process = procs.read(child.pid)
        assert process
        with pytest.raises(QsteerError) as caught:
            peer.connect(str(tmp_path / "sock"), process, timeout_s=5)
        assert str(caught.value) == f'"{tmp_path}/sock" of process {child.pid} is served by process {os.getpid()}'


def test_who_listened_last_counts(listener: socket.socket, tmp_path: Path) -> None:
    """A listener that was passed to a QEMU, as libvirt does: QEMU calls listen() once more."""
    os.set_inheritable(listener.fileno(), True)
    code = "listening = socket.socket(fileno=int(sys.argv[1]))\nlistening.listen(1)"
    argv = [sys.executable, "-IS", "-c", f"import socket, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"]
    with subprocess.Popen(
        [*argv, str(listener.fileno())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(listener.fileno(),),
    ) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        process = procs.read(child.pid)
        assert process
        peer.connect(str(tmp_path / "sock"), process, timeout_s=5).close()


def test_a_process_that_is_gone(listener: socket.socket, me: Process) -> None:
    with pytest.raises(NotFoundError, match="has ended"):
        peer.connect("sock", replace(me, started=me.started + 1), timeout_s=5)
    with other_process("") as child:
        process = procs.read(child.pid)
    assert process
    with pytest.raises(NotFoundError, match="has ended"):
        peer.connect("sock", process, timeout_s=5)


def test_a_process_that_ends_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends after it was looked at, and before its socket is connected to: nothing that follows is believed."""
    monkeypatch.chdir(tmp_path)
    code = "listening = socket.socket(socket.AF_UNIX)\nlistening.bind('sock')\nlistening.listen(1)"
    real = socket.socket.connect
    with other_process(code) as child:
        process = procs.read(child.pid)
        assert process

        def connect(self: socket.socket, address: str) -> None:
            real(self, address)
            child.communicate()

        monkeypatch.setattr(socket.socket, "connect", connect)
        with pytest.raises(NotFoundError, match="has ended"):
            peer.connect("sock", process, timeout_s=5)


def test_a_listener_without_room(listener: socket.socket, me: Process) -> None:
    with peer.connect("sock", me, timeout_s=5):
        before = time.monotonic()
        with pytest.raises(BusyError) as caught:
            peer.connect("sock", me, timeout_s=0.1)
        assert 0.05 < time.monotonic() - before < 2
        assert str(caught.value) == f'"sock" of process {me.pid} has no place for one more client'


def test_what_is_no_socket(me: Process, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nothing")
    names = ("fifo", "file", "dangling", "none", "file/x", "fifo/..", ".")
    for path in (*(str(tmp_path / name) for name in names), "/dev/null", "/", "x" * 300):
        with pytest.raises(NotFoundError):
            peer.connect(path, me, timeout_s=5)


def test_a_loop_of_symbolic_links(me: Process, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(NotFoundError, match="Too many levels of symbolic links"):
        peer.connect(str(tmp_path / "loop"), me, timeout_s=5)


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "x/" * 5000, "\ud800", "..", "\x1b[2J", "/" * 4095, "a\nb"])
def test_hostile_paths(me: Process, path: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        peer.connect(path, me, timeout_s=5)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 250


def test_a_socket_that_nobody_listens_on(me: Process, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "sock"))
        with pytest.raises(NotFoundError, match="Connection refused"):
            peer.connect(str(tmp_path / "sock"), me, timeout_s=5)


def test_a_relative_path_that_leads_nowhere(me: Process) -> None:
    with pytest.raises(NotFoundError) as caught:
        peer.connect("no-such-socket", me, timeout_s=5)
    assert "-daemonize" in caught.value.hint


def test_another_kind_of_socket(me: Process, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(tmp_path / "sock"))
        with pytest.raises(QsteerError, match="wrong type"):
            peer.connect(str(tmp_path / "sock"), me, timeout_s=5)


def test_without_the_right(listener: socket.socket, me: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if path == f"/proc/{me.pid}/root":
            raise PermissionError(13, "no")
        return real(path, flags, mode, dir_fd=dir_fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(PermissionDeniedError) as caught:
            peer.connect("sock", me, timeout_s=5)
    assert caught.value.hint == "it takes CAP_SYS_PTRACE and CAP_DAC_OVERRIDE, or to be QEMU's user; try sudo"


def test_a_path_of_our_own(tmp_path: Path) -> None:
    """It is looked up from here, not from where the listener is."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "served"))
        listener.listen()
        own = procs.read(os.getpid())
        assert own
        assert peer.server_of(str(tmp_path / "served")) == own.pid
        peer.connect(peer.OwnPath(tmp_path / "served"), own, timeout_s=1).close()
    for nowhere in (tmp_path / "served", tmp_path / "none", tmp_path):
        with pytest.raises(NotFoundError):
            peer.server_of(str(nowhere))
