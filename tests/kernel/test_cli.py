# SPDX-License-Identifier: BSD-2-Clause
"""The command line on real taps: what users see, exit codes, and what stays behind."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qsteer import kernel, procs
from tests.kernel import support
from tests.kernel.support import qsteer

pytestmark = pytest.mark.root

KEY = ":".join(f"{byte:02x}" for byte in range(40))


def attached(name: str = "qs-tap") -> int:
    """The kernel's word: the program on this test's tap."""
    queues = [queue for queue in kernel.open_queues() if queue.tap == name and queue.pid == os.getpid()]
    return queues[0].program_id


def document(*arguments: str) -> list[dict[str, Any]]:
    done = qsteer(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    taps: list[dict[str, Any]] = json.loads(done.stdout)["taps"]
    return taps


@pytest.fixture
def dev(tap: support.TapUnderTest) -> Iterator[tuple[str, ...]]:
    """Selects this test's tap; its hold goes afterwards."""
    yield ("--dev", tap.name, "--pid", str(os.getpid()))
    holds = Path("/run/qsteer/holds")
    for path in holds.glob("*") if holds.exists() else ():
        if json.loads(path.read_text())["pid"] == os.getpid():
            path.unlink()


def test_from_nothing_to_steered_and_back(dev: tuple[str, ...]) -> None:
    (before,) = document("status", *dev)
    assert (before["program"], before["engine"], before["state"]) == (None, "automq", "not steered")
    assert before["queues"] == {"active": 4, "attached": 4, "used": None}
    assert before["holder"]["pid"] == os.getpid()

    done = qsteer("apply", *dev, "--types", "tcp4,ip4", "--key", KEY, "--equal", "3", "--unclassified-queue", "2")
    assert done.returncode == 0, done.stderr
    assert "not kept" in done.stdout
    (after,) = document("status", *dev)
    assert after["program"]["id"] == attached() != 0
    assert (after["program"]["kind"], after["source"], after["state"]) == ("qsteer", "static", "ok")

    (shown,) = document("show", *dev)
    assert shown["rss"]["types"] == ["ip4", "tcp4"]
    assert (shown["rss"]["key"], shown["rss"]["unclassified_queue"]) == (KEY, 2)
    assert shown["rss"]["table"] == [entry % 3 for entry in range(128)]

    assert "off" in qsteer("off", *dev).stdout
    assert attached() == 0
    (held,) = document("status", *dev)
    assert held["held"] and held["state"] == "held off"
    assert qsteer("off", *dev).returncode == 0

    assert qsteer("apply", *dev).returncode == 0
    (again,) = document("status", *dev)
    assert not again["held"] and again["program"]["id"] == attached()


def test_apply_again_changes_nothing(dev: tuple[str, ...]) -> None:
    assert qsteer("apply", *dev).returncode == 0
    first = attached()
    done = qsteer("apply", *dev)
    assert done.returncode == 0 and "unchanged" in done.stdout
    assert attached() == first


def test_the_attached_key_stays(dev: tuple[str, ...]) -> None:
    qsteer("apply", *dev)
    (first,) = document("show", *dev)
    qsteer("apply", *dev, "--weight", "3,1")
    (second,) = document("show", *dev)
    assert second["rss"]["key"] == first["rss"]["key"]
    assert [second["rss"]["table"].count(queue) for queue in range(4)] == [96, 32, 0, 0]


def test_what_show_prints_can_be_given_back(dev: tuple[str, ...]) -> None:
    qsteer("apply", *dev, "--types", "udp6", "--key", KEY, "--table", "3,1")
    text = qsteer("show", *dev).stdout
    qsteer("apply", *dev, "--equal", "2", "--types", "tcp4", "--key", "random")
    done = qsteer("apply", *dev, "--from", "-", stdin=text)
    assert done.returncode == 0, done.stderr
    (shown,) = document("show", *dev)
    assert shown["rss"] == {"enabled": True, "types": ["udp6"], "key": KEY, "table": [3, 1], "unclassified_queue": 0}


def test_a_dry_run_changes_nothing(dev: tuple[str, ...]) -> None:
    done = qsteer("apply", *dev, "-n")
    assert done.returncode == 0 and "load a steering program" in done.stdout
    assert attached() == 0
    qsteer("apply", *dev)
    before = attached()
    assert "detach" in qsteer("off", *dev, "--dry-run").stdout
    assert attached() == before


def test_a_foreign_program_stays_unless_told(tap: support.TapUnderTest, dev: tuple[str, ...]) -> None:
    foreign = support.foreign_program(1)
    try:
        kernel.attach(tap.open.fds[0], foreign)
        id_before = attached()
        (seen,) = document("status", *dev)
        assert (seen["program"]["kind"], seen["program"]["name"]) == ("foreign", "lb_steer")
        assert seen["program"]["held_by"] == [os.getpid()] and f"held by pid {os.getpid()}" in seen["state"]
        for verb in ("apply", "off"):
            done = qsteer(verb, *dev)
            assert done.returncode == 6
            assert f"program {id_before}" in done.stderr and "lb_steer" in done.stderr
            assert attached() == id_before
        done = qsteer("apply", *dev, "--replace")
        assert done.returncode == 0 and "lb_steer" in done.stdout
        assert attached() not in (0, id_before)
        (again,) = document("apply", *dev)
        assert (again["result"], again["dry_run"]) == ("unchanged", False)
    finally:
        os.close(foreign)


def test_a_tap_in_another_network_namespace(namespace: str) -> None:
    with contextlib.ExitStack() as stack:
        other = stack.enter_context(support.network_namespace())
        assert other != namespace
        stack.enter_context(support.tap("qs-far", 2))
        with support.inside(namespace):
            assert qsteer("apply", "--dev", "qs-far").returncode == 0
            assert attached("qs-far") != 0


BAD = {
    "no verb": ((), 2, "VERB"),
    "unknown verb": (("steer",), 2, "steer"),
    "unknown option": (("status", "--colour"), 2, "--colour"),
    "no selector": (("apply",), 2, "which taps"),
    "no selector for off": (("off",), 2, "which taps"),
    "no such tap": (("apply", "--dev", "qs-nope"), 3, "qs-nope"),
    "no such tap in status": (("status", "--dev", "qs-nope"), 3, "qs-nope"),
    "no such VM": (("show", "--vm", "qs-nobody"), 3, "qs-nobody"),
    "not a pid": (("apply", "--pid", "x"), 2, "process id"),
    "no such pid": (("apply", "--pid", "4194303"), 3, "4194303"),
    "source": (("apply", "--dev", "qs-tap", "--source", "magic"), 2, "magic"),
    "short key": (("apply", "--dev", "qs-tap", "--key", "6d:5a"), 2, "40 bytes"),
    "key of nonsense": (("apply", "--dev", "qs-tap", "--key", "zz"), 2, "zz"),
    "types": (("apply", "--dev", "qs-tap", "--types", "tcp5"), 2, "tcp5"),
    "table of three": (("apply", "--dev", "qs-tap", "--table", "0,1,2"), 2, "power of two"),
    "table of words": (("apply", "--dev", "qs-tap", "--table", "a,b"), 2, "--table"),
    "table too long": (("apply", "--dev", "qs-tap", "--table", ",".join(["0"] * 256)), 2, "128"),
    "table entry too large": (("apply", "--dev", "qs-tap", "--table", "65536,1"), 2, "65536"),
    "equal 0": (("apply", "--dev", "qs-tap", "--equal", "0"), 2, "at least 1"),
    "equal -1": (("apply", "--dev", "qs-tap", "--equal=-1"), 2, "--equal"),
    "weights of 0": (("apply", "--dev", "qs-tap", "--weight", "0,0"), 2, "weights"),
    "two tables": (("apply", "--dev", "qs-tap", "--equal", "2", "--weight", "1,1"), 2, "not allowed"),
    "unclassified": (("apply", "--dev", "qs-tap", "--unclassified-queue", "70000"), 2, "70000"),
    "no such file": (("apply", "--dev", "qs-tap", "--from", "/nowhere"), 1, "/nowhere"),
    "nonsense on stdin": (("apply", "--dev", "qs-tap", "--from", "-"), 2, "line 1"),
    "no file name": (("apply", "--dev", "qs-tap", "--from", ""), 1, "cannot read"),
    "a directory": (("apply", "--dev", "qs-tap", "--from", "/"), 1, "cannot read"),
    "a file and a table": (("apply", "--dev", "qs-tap", "--from", "-", "--equal", "2"), 2, "not allowed"),
    "one name of two": (("apply", "--dev", "qs-tap", "--dev", "qs-nope"), 3, "qs-nope"),
    "an abbreviation": (("apply", "--dev", "qs-tap", "--rep"), 2, "--rep"),
    "JSON of a run": (("run", "-j", "--tap", "id=net0,queues=4", "--", "true"), 2, "dry run"),
    "static by the guest's maps": (("apply", "--dev", "qs-tap", "--source", "shared-maps", "--equal", "2"), 2, "guest"),
    "maps that are not there": (("apply", "--dev", "qs-tap", "--source", "shared-maps"), 5, "shared-maps"),
    "a revision that is none": (("apply", "--dev", "qs-tap", "--expect", "zzz"), 2, "zzz"),
    "a revision that is none, for off": (("off", "--dev", "qs-tap", "--expect", "zzz"), 2, "zzz"),
    "timeout": (("apply", "--dev", "qs-tap", "--timeout", "soon"), 2, "soon"),
    "run without a command": (("run", "--tap", "id=net0,queues=4"), 2, "QEMU"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD)
def test_bad_input_is_one_line_and_an_exit_code(dev: tuple[str, ...], case: str) -> None:
    arguments, code, words = BAD[case]
    done = qsteer(*arguments, stdin="\x1b[2J nonsense\n")
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert said[0].startswith("qsteer: ") and words in said[0]
    assert len(said) == 1 or (len(said) == 2 and said[1].startswith("hint: "))
    assert "\x1b" not in done.stderr
    assert attached() == 0


def test_a_single_queue_has_nothing_to_steer(namespace: str) -> None:
    with support.tap("qs-one", 1):
        done = qsteer("apply", "--dev", "qs-one")
        assert done.returncode == 5 and "single queue" in done.stderr


def test_without_rights(dev: tuple[str, ...], tmp_path: Path) -> None:
    """As root without any capability but to read a checkout in a closed home: what is missing is named."""
    for verb, code in ((("status",), 0), (("status", "--check"), 4), (("show",), 4), (("apply", *dev), 4)):
        reads = "-all,+dac_read_search"
        bare = ("setpriv", "--securebits=+noroot", f"--inh-caps={reads}", f"--ambient-caps={reads}")
        done = subprocess.run(
            [*bare, sys.executable, "-m", "qsteer", *verb], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "CAP_BPF" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("end", ["closed pipe", "full device", "closed"])
def test_output_that_goes_nowhere(dev: tuple[str, ...], end: str) -> None:
    command = [sys.executable, "-m", "qsteer", "status"]
    if end == "closed pipe":
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, check=False)
        os.close(writer)
    elif end == "full device":
        with Path("/dev/full").open("w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False)
        assert b"No space left" in done.stderr
    else:
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False)
    assert done.returncode in (0, 1)
    assert b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_stdin_that_is_closed(dev: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "qsteer", "apply", *dev, "--from", "-"]
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.startswith("qsteer: cannot read")


HOSTILE = """
import ctypes, sys, time
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)  # PR_SET_NAME
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["\x1cUid: 0 0 0", "\x1cUid:", ") R 1 (", "a\nUid: 0", "\x85Uid: 0 x", "\u2028"])
def test_a_process_that_names_itself(tap: support.TapUnderTest, name: str) -> None:
    """Another user's process chooses its name; what is read of it stays true, and nothing falls over."""
    hostile = subprocess.Popen(
        ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=-all", "/usr/bin/python3", "-c", HOSTILE, name],
        pass_fds=tap.open.fds,
        stdout=subprocess.PIPE,
    )
    try:
        assert hostile.stdout and hostile.stdout.readline() == b"ready\n"
        process = procs.read(hostile.pid)
        assert process and process.uid == 65534
        assert process.comm.encode() == name.encode()[:15] or "\ufffd" in process.comm
        done = qsteer("status", "--pid", str(hostile.pid))
        assert done.returncode == 0 and "qs-tap" in done.stdout
    finally:
        hostile.kill()
        hostile.communicate()


def test_a_launcher_that_keeps_the_queues_does_not_hide_the_vm(tap: support.TapUnderTest) -> None:
    """The QEMU is found behind the lower pid of who started it, and its software steering with it."""
    fds = ":".join(map(str, tap.open.fds))
    argv = ["qemu-system-x86_64", "-name", "qs-launched", "-netdev", f"tap,id=n0,fds={fds}"]
    argv += ["-device", "virtio-net-pci,netdev=n0,rss=on"]
    with contextlib.ExitStack() as stack:
        child = launcher = stack.enter_context(_sleeping(("launcher",), tap))
        for _ in range(2):  # the kernel may begin with low pids again, but not twice in a row
            child = stack.enter_context(_sleeping(argv, tap))
            if child.pid > launcher.pid:
                break
            child.kill()
            launcher = stack.enter_context(_sleeping(("launcher",), tap))
        assert child.pid > launcher.pid
        (seen,) = document("status", "--vm", "qs-launched")
        assert (seen["tap"], seen["holder"]["pid"]) == ("qs-tap", child.pid)
        done = qsteer("apply", "--vm", "qs-launched", "--equal", "2")
        assert done.returncode == 5 and "software" in done.stderr


@contextlib.contextmanager
def _sleeping(argv: Sequence[str], tap: support.TapUnderTest) -> Iterator[subprocess.Popen[bytes]]:
    """A stand-in with any command line, and the tap's queues: python -c with the arguments behind it."""
    child = subprocess.Popen(
        [argv[0], "-c", "import time; print('ready', flush=True); time.sleep(60)", *argv[1:]],
        executable="/usr/bin/python3",
        pass_fds=tap.open.fds,
        stdout=subprocess.PIPE,
    )
    try:
        assert child.stdout and child.stdout.readline() == b"ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def test_only_where_nothing_is_attached(dev: tuple[str, ...]) -> None:
    assert qsteer("apply", *dev, "--if-absent").returncode == 0
    first = attached()
    done = qsteer("apply", *dev, "--if-absent", "--equal", "1")
    assert (done.returncode, attached()) == (0, first)
    assert "unchanged" in done.stdout and "--if-absent" in done.stdout


def test_only_what_was_looked_at(dev: tuple[str, ...]) -> None:
    (seen,) = document("status", *dev)
    assert f"(revision {seen['revision']})" in qsteer("apply", "-n", *dev).stdout
    done = qsteer("apply", *dev, "--expect", seen["revision"], "--equal", "2")
    assert done.returncode == 0, done.stderr
    first = attached()
    for verb in ("apply", "off"):
        done = qsteer(verb, *dev, "--expect", seen["revision"])
        assert (done.returncode, attached()) == (8, first)
        assert "it has changed" in done.stderr
    (now,) = document("status", *dev)
    assert qsteer("off", *dev, "--expect", now["revision"]).returncode == 0
    assert attached() == 0


def test_another_pid_namespace_is_refused(dev: tuple[str, ...]) -> None:
    """The kernel tells the host's pids; a container's are others."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "qsteer"]
    for verb, code in ((("status",), 0), (("status", "--check"), 5), (("off", *dev), 5)):
        done = subprocess.run([*command, *verb], capture_output=True, text=True, check=False)
        assert done.returncode == code and "pid namespace" in done.stderr
