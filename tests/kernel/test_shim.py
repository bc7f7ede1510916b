# SPDX-License-Identifier: BSD-2-Clause
"""What the C shim does that no other test goes through: fds over sockets, capabilities, taps of a given name."""

import contextlib
import errno
import os
import resource
import socket
import subprocess
import sys
import unittest.mock

import pytest

from qsteer import kernel, shim
from qsteer._shim import ffi, lib
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError
from tests.kernel import support

pytestmark = pytest.mark.root


def test_queues_passed_over_a_socket(tap: support.TapUnderTest) -> None:
    """The receiver has queues of the same tap, and nothing that a child would inherit."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kernel.send_fds(ours.fileno(), tap.open.fds)
        received = kernel.receive_fds(theirs.fileno(), 4)
        try:
            assert {kernel.tap_name(fd) for fd in received} == {tap.name}
            assert not any(os.get_inheritable(fd) for fd in received)
        finally:
            for fd in received:
                os.close(fd)


@pytest.mark.parametrize(("sent", "wanted"), [(2, 1), (1, 2), (16, 4)])
def test_another_number_of_fds_is_refused_and_none_kept(sent: int, wanted: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        kernel.send_fds(ours.fileno(), (ours.fileno(),) * sent)
        before = os.listdir("/proc/self/fd")  # noqa: PTH208
        with pytest.raises(QsteerError) as caught:
            kernel.receive_fds(theirs.fileno(), wanted)
        assert caught.value.errno == errno.EBADMSG
        assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


def test_a_message_without_fds() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.send(b"\0")
        with pytest.raises(QsteerError):
            kernel.receive_fds(theirs.fileno(), 1)
        with pytest.raises(QsteerError):
            kernel.receive_fds(theirs.fileno(), 17)
        with pytest.raises(QsteerError):
            kernel.send_fds(ours.fileno(), ())


def test_an_fd_of_another_process(tap: support.TapUnderTest) -> None:
    with kernel.fd_of_process(os.getpid(), tap.open.fds[2]) as copy:
        assert copy not in tap.open.fds
        assert kernel.tap_name(copy) == tap.name
    with pytest.raises(QsteerError), kernel.fd_of_process(os.getpid(), 9999):
        pass
    with pytest.raises(NotFoundError), kernel.fd_of_process(2**22 - 1, 0):
        pass


def test_what_is_no_tap() -> None:
    with pytest.raises(QsteerError, match="not a queue"):
        kernel.tap_name(0)
    with pytest.raises(QsteerError, match="cannot attach"):
        kernel.attach(0, 0)


def test_no_second_owner_of_a_name(tap: support.TapUnderTest) -> None:
    """A queue must never be added to somebody's tap: packets could land in it."""
    with pytest.raises(QsteerError, match="in use"):
        kernel.open_tap(tap.name, 2)
    assert len([queue for queue in kernel.open_queues() if queue.pid == os.getpid()]) == 4


def test_a_name_of_the_kernels_choice(namespace: str) -> None:
    opened = kernel.open_tap("", 3)
    try:
        assert opened.name.startswith("tap") and {kernel.tap_name(fd) for fd in opened.fds} == {opened.name}
    finally:
        opened.close()


def test_more_queues_than_a_tap_can_have(namespace: str) -> None:
    with pytest.raises(QsteerError, match="257 queues"):
        kernel.open_tap("qs-many", 257)
    assert not [queue for queue in kernel.open_queues() if queue.pid == os.getpid()]


def test_capabilities_are_given_up() -> None:
    text = "from qsteer import shim; shim.drop_capabilities(); print(shim.effective_capabilities())"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    assert shim.effective_capabilities() != 0


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.E2BIG])
def test_what_the_verifier_refuses_is_not_supported_here(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever errno it answers with: older kernels have EINVAL for what they do not know."""
    said = [b"", b"libbpf: prog 'qsteer_tap': -- BEGIN PROG LOAD LOG --"]
    take = unittest.mock.Mock(side_effect=lambda: ffi.new("char[]", said.pop()))
    monkeypatch.setattr(shim, "lib", unittest.mock.Mock(wraps=lib, qs_log_take=take, CAP_PERFMON=0))
    with pytest.raises(UnsupportedError) as caught:
        shim.check_bpf(-code, "cannot load")
    assert str(caught.value) == "cannot load: the kernel's verifier refuses it"
    assert "-vv shows why" in caught.value.hint
    with pytest.raises(QsteerError) as nothing_said:
        shim.check_bpf(-code, "cannot load")
    assert nothing_said.value.errno == code


def test_copies_of_a_queue_are_not_reported_one_by_one(tap: support.TapUnderTest) -> None:
    """Whoever has a queue can have it under any number of fds, in any order."""
    copies = [os.dup(fd) for _ in range(100) for fd in tap.open.fds]
    sleeper = subprocess.Popen(["sleep", "60"], pass_fds=(*tap.open.fds, *copies))
    try:
        for _ in range(2):  # nothing of one run is left for the next
            records = kernel._read_queues(sleeper.pid)
            assert sorted({queue.index for queue in records}) == [0, 1, 2, 3]
            assert len(records) < 50
            assert min(queue.fd for queue in records) == min(tap.open.fds)
            assert len([queue for queue in kernel.open_queues() if queue.pid == sleeper.pid]) == 4
        # One's own are found by any of their numbers.
        assert kernel.queue_of(copies[-1]).index == kernel.queue_of(tap.open.fds[-1]).index
        assert len(kernel._read_queues(os.getpid())) == 404
    finally:
        for fd in copies:
            os.close(fd)
        sleeper.kill()
        sleeper.wait()


def test_more_queues_than_one_read_takes(namespace: str) -> None:
    """The kernel comes again with the file that its buffer had no room for."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    with contextlib.ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        names: list[str] = []
        fds: list[int] = []
        for number in range(6):
            opened = kernel.open_tap(f"qs-many{number}", 200)
            stack.callback(opened.close)
            names.append(opened.name)
            fds += opened.fds
        sleeper = subprocess.Popen(["sleep", "60"], pass_fds=fds)
        stack.callback(sleeper.wait)
        stack.callback(sleeper.kill)
        found = kernel.open_queues(sleeper.pid)
        assert sorted((queue.tap, queue.index) for queue in found) == [
            (name, index) for name in names for index in range(200)
        ]


def test_a_queue_seen_once_for_each_process(tap: support.TapUnderTest) -> None:
    """dup shows one open file many times; fork gives it to another process, which may be the VM."""
    copy = os.dup(tap.open.fds[0])
    sleeper = subprocess.Popen(["sleep", "60"], pass_fds=tap.open.fds)
    try:
        for pid in (os.getpid(), sleeper.pid):
            queues = [queue for queue in kernel.open_queues() if queue.pid == pid]
            assert sorted(queue.index for queue in queues) == [0, 1, 2, 3]
            assert (queues[0].active, queues[0].disabled) == (4, 0)
            assert len({queue.file for queue in queues}) == 4
    finally:
        os.close(copy)
        sleeper.kill()
        sleeper.wait()
