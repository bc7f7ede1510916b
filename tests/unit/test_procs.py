# SPDX-License-Identifier: BSD-2-Clause
"""Who is a QEMU, and what a process has open."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsteer import procs

WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"


@contextmanager
def running(argv: Sequence[str], **options: object) -> Iterator[int]:
    """A process that waits, whatever it is called."""
    command = [*argv[:1], "-c", WAITS, *argv[1:]]
    child = subprocess.Popen(  # type: ignore[call-overload]
        command, **{"executable": sys.executable, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, **options}
    )
    with child:
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.kill()


def qemus() -> dict[int, str | None]:
    return {process.pid: process.args.name for process in procs.running_qemus() if process.args}


def test_by_the_command_line() -> None:
    with running(("/opt/bin/qemu-system-x86_64", "-name", "unit-1")) as pid:
        assert qemus()[pid] == "unit-1"
        process = procs.read(pid)
        assert process and process.args and process.uid == os.geteuid()


def test_by_the_program_that_runs(tmp_path: Path) -> None:
    """Whatever it calls itself."""
    sleep = shutil.which("sleep")
    assert sleep
    program = tmp_path / "qemu-system-unit"
    shutil.copy(sleep, program)
    child = subprocess.Popen(["web1", "60"], executable=program)
    try:
        # Its command line is empty for a moment while the kernel puts it in place.
        deadline = time.monotonic() + 10
        while child.pid not in qemus():
            assert time.monotonic() < deadline
        program.unlink()
        assert child.pid in qemus()
    finally:
        child.kill()
        child.wait()


def test_what_is_none() -> None:
    with running(("sleep", "-name", "unit-2", "qemu-system-x86_64")) as pid:
        assert pid not in qemus()
        process = procs.read(pid)
        assert process and process.args is None


def test_a_process_that_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert procs.read(child.pid) is None
    assert procs.open_files(child.pid) == procs.OpenFiles(
        programs={}, queues=frozenset(), macvtaps=frozenset(), vhost_net=False
    )
    assert procs.tap_of(child.pid, 3) is None


def test_files_are_told_by_name(tmp_path: Path) -> None:
    """The kernel's name for them: nothing is opened, and nothing asked of whoever is behind."""
    names = ("tap5", "tap12", "tapx", "net/tun", "vhost-net", "sub/tap7", "tap")
    files = []
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        files.append(os.open(path, os.O_RDONLY))
    try:
        found = procs.open_files(os.getpid())
    finally:
        for fd in files:
            os.close(fd)
    assert found.macvtaps == {files[0], files[1], files[5]}
    assert found.queues == {files[3]}
    assert found.vhost_net and found.seen


def test_the_files_looked_at_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process may have as many fds of one file as it likes; the rest is told as not seen."""
    copies = [os.dup(0) for _ in range(40)]
    try:
        count = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 (this has one of its own, as open_files has)
        monkeypatch.setattr(procs, "FDS_MAX", count)
        assert procs.open_files(os.getpid()).seen
        asked: list[str] = []

        def readlink(path: str) -> str:
            asked.append(path)
            return ""

        monkeypatch.setattr(os, "readlink", readlink)
        monkeypatch.setattr(procs, "FDS_MAX", 20)
        assert not procs.open_files(os.getpid()).seen
        assert len(asked) == 20
    finally:
        for fd in copies:
            os.close(fd)


@pytest.mark.root
def test_files_that_may_not_be_seen() -> None:
    script = f"from qsteer import procs; print(procs.open_files({os.getpid()}).seen)"
    as_nobody = ("setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all")
    done = subprocess.run(
        (*as_nobody, sys.executable, "-c", script), capture_output=True, text=True, check=False, cwd="/"
    )
    if done.returncode:
        pytest.skip(f"nobody cannot run this Python: {done.stderr[-200:]}")
    assert done.stdout == "False\n"


def test_to_look_for_qemus_is_cheap() -> None:
    """It is in every status."""
    before = os.times()
    for _ in range(20):
        procs.running_qemus()
    after = os.times()
    each = (after.user + after.system - before.user - before.system) / 20
    processes = sum(name.isdecimal() for name in os.listdir("/proc"))  # noqa: PTH208
    assert each < 0.02 + processes * 0.0003
