# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer clean``: what nothing uses goes; what is in use, or not qsteer's, stays."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer import clean, execute, kernel, programs
from qsteer._shim import lib
from qsteer.clean import Cleaned
from qsteer.errors import BusyError
from qsteer.model import Build, Source
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, RssConfig
from tests import packets
from tests.kernel import private, support

pytestmark = [pytest.mark.root, pytest.mark.shared_body]

TAP = "qsun-clean"
CONFIG = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(0, 1, 2, 3))
PACKET = packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, packets.tcp((7, 80))))


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    with private.memory():
        yield


def cleaned() -> Cleaned:
    with execute.lock(1):
        return clean.execute(clean.plan(clean.fetch()))


def names(items: tuple[clean.Item, ...]) -> list[str]:
    """Without what all paths have in common."""
    return [str(item.path).removeprefix("/sys/fs/bpf/").removeprefix("/run/") for item in items]


@contextlib.contextmanager
def pinned(name: str) -> Iterator[int]:
    """A body of some version, pinned; an fd of it, which keeps it alive for as long."""
    bodies = private.unpinned_bodies()
    path = private.PINS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    assert lib.qs_pin(bodies, os.fsencode(path)) == 0
    try:
        yield bodies
    finally:
        os.close(bodies)


@contextlib.contextmanager
def stub_over(bodies: int) -> Iterator[programs.Program]:
    program = programs._load(Build.SHARED_BODY, TAP, Source.STATIC, 0, CONFIG, bodies)
    try:
        yield program
    finally:
        program.close()


def answers(program: programs.Program) -> bool:
    """With the body's queue, not with that of a stub whose body is gone."""
    info = programs.program_info(program.id)
    right = programs.run_program(program.prog_fd, PACKET).queue == queue_of(PACKET, CONFIG)
    return programs.body_present(info) and right


def record(name: str, *, pid: int, started: int = 1) -> Path:
    path = private.RUNTIME / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"tap": "vnet0", "pid": pid, "started": started}))
    return path


def started_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


def test_nothing_there() -> None:
    assert str(cleaned()) == "nothing to clean"


def test_bodies(namespace: str) -> None:
    """Of this version and of others, used by a program that is attached, by one that a process holds, by none."""
    with pinned("v1/bodies-0123456789ab"), pinned("v2/bodies-of-map-17"):
        pass
    with support.tap(TAP, 4) as tap:
        with pinned("v3/bodies-attached") as bodies, stub_over(bodies) as program:
            tap.attach(program)
        with pinned("v1/bodies-held") as bodies:
            held = programs._load(Build.SHARED_BODY, TAP, Source.STATIC, 0, CONFIG, bodies)
        wanted = clean.plan(clean.fetch())
        assert "would remove  /sys/fs/bpf/qsteer/v2/bodies-of-map-17: shared body, used by no program" in str(wanted)
        done = cleaned()
        assert names(done.removed) == ["qsteer/v1/bodies-0123456789ab", "qsteer/v2/bodies-of-map-17", "qsteer/v2"]
        assert names(done.kept) == ["qsteer/v1/bodies-held", "qsteer/v3/bodies-attached"]
        assert "kept  /sys/fs/bpf/qsteer/v1/bodies-held: shared body, used by 1 program" in str(done)
        assert sorted(private.pins()) == ["v1/bodies-held", "v3/bodies-attached"]
        with programs.program_by_id(kernel.queue_of(tap.open.fds[0]).program_id) as prog_fd:
            assert programs.run_program(prog_fd, PACKET).queue == queue_of(PACKET, CONFIG)
        assert answers(held)
        assert str(cleaned()).splitlines()[0] == "nothing to clean"
        held.close()
    support.wait_until("the programs' end", lambda: not support.programs_of(TAP))
    assert names(cleaned().removed) == [
        "qsteer/v1/bodies-held",
        "qsteer/v3/bodies-attached",
        "qsteer/v3",
        "qsteer/v1",
        "qsteer",
    ]
    assert not private.PINS.exists()
    assert str(cleaned()) == "nothing to clean"


def test_what_is_not_qsteers(need_root: None) -> None:
    """Whatever its name is, and a whole directory of it."""
    foreign = support.foreign_program(1)
    with pinned("v1/bodies-0123456789ab"), pinned("v1/somebodys"), pinned("other/bodies-0123456789ab"):
        assert lib.qs_pin(foreign, os.fsencode(private.PINS / "v1/bodies-aprogram")) == 0
        (private.PINS / "v1/bodies-adirectory").mkdir()
        (private.PINS / "v1/bodies-alink").symlink_to("bodies-0123456789ab")
    for name, text in (("holds/notes.txt", "mine"), ("holds/1-1", "[]"), ("holds/1-2", ""), ("pauses/x.new", "")):
        path = private.RUNTIME / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (private.RUNTIME / "holds/3-4").symlink_to("/etc/hostname")
    left = {
        "qsteer/other",
        "qsteer/v1/bodies-adirectory",
        "qsteer/v1/bodies-alink",
        "qsteer/v1/bodies-aprogram",
        "qsteer/v1/somebodys",
        "qsteer/holds/1-1",
        "qsteer/holds/1-2",
        "qsteer/holds/3-4",
        "qsteer/holds/notes.txt",
        "qsteer/pauses/x.new",
    }
    done = cleaned()
    assert names(done.removed) == ["qsteer/v1/bodies-0123456789ab"]
    assert set(names(done.kept)) == left
    assert {item.why for item in done.kept} == {"left alone"}
    assert set(names(cleaned().kept)) == left
    os.close(foreign)


def test_holds_and_stamps() -> None:
    """They go with their process; another process of the same pid is another one."""
    me = os.getpid()
    record("holds/4026531840-2", pid=me, started=started_of(me))
    record("holds/4026531840-3", pid=me, started=started_of(me) - 1)
    record("holds/4026531840-4", pid=1 << 22)
    record("holds/4026531840-5.new", pid=me, started=started_of(me))
    record(f"pauses/{1 << 22}-1", pid=0)
    record(f"pauses/{me}-{started_of(me)}", pid=0)
    record(f"pauses/{me}-{started_of(me) + 1}", pid=0)
    done = cleaned()
    assert set(names(done.removed)) == {
        "qsteer/holds/4026531840-3",
        "qsteer/holds/4026531840-4",
        "qsteer/holds/4026531840-5.new",
        f"qsteer/pauses/{me}-{started_of(me) + 1}",
        f"qsteer/pauses/{1 << 22}-1",
    }
    assert f"kept  /run/qsteer/holds/4026531840-2: hold, process {me} runs" in str(done)
    assert f"kept  /run/qsteer/pauses/{me}-{started_of(me)}: stamp, process {me} runs" in str(done)


def test_a_stub_that_comes_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody without the lock opened the pin before it was moved aside, and loads a stub right after."""
    look_again = clean.users_of_maps
    with pinned("v1/bodies-late") as bodies, contextlib.ExitStack() as stack:
        wanted = clean.plan(clean.fetch())
        late: list[programs.Program] = []

        def loads_first() -> dict[int, tuple[int, ...]]:
            late.append(stack.enter_context(stub_over(bodies)))
            return look_again()

        monkeypatch.setattr(clean, "users_of_maps", loads_first)
        done = clean.execute(wanted)
        assert (names(done.removed), names(done.kept)) == ([], ["qsteer/v1/bodies-late"])
        assert list(private.pins()) == ["v1/bodies-late"]
        os.close(bodies)
        # A prog_array without a pin is emptied by now or in a moment; this one has its pin.
        time.sleep(0.1)
        assert answers(late[0])
        stack.callback(os.dup2, os.open(os.devnull, os.O_RDONLY), bodies)


def test_another_body_took_the_name_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    look_again = clean.users_of_maps
    with pinned("v1/bodies-late") as bodies, contextlib.ExitStack() as stack:
        wanted = clean.plan(clean.fetch())

        def takes_the_name() -> dict[int, tuple[int, ...]]:
            stack.enter_context(stub_over(bodies))
            stack.enter_context(pinned("v1/bodies-late"))
            return look_again()

        monkeypatch.setattr(clean, "users_of_maps", takes_the_name)
        done = clean.execute(wanted)
        monkeypatch.undo()
        aside = f"v1/removing-{wanted.bodies[0].map_id}"
        assert names(done.kept) == [f"qsteer/{aside}"]
        assert sorted(private.pins()) == ["v1/bodies-late", aside]
        # Next time it is told from the others, and stays for as long as it is used.
        assert names(cleaned().kept) == [f"qsteer/{aside}"]
    support.wait_until("the stub's end", lambda: not support.programs_of(TAP))
    assert f"qsteer/{aside}" in names(cleaned().removed)


CLEAN_ALL_THE_TIME = """
import sys
from qsteer import clean
print("ready", flush=True)
while True:
    clean.execute(clean.plan(clean.fetch()))
"""


def test_run_loads_while_clean_removes(need_root: None) -> None:
    """``run`` takes no lock: whatever the two do to the pin, every stub that is given out has its body."""
    cleaner = subprocess.Popen([sys.executable, "-c", CLEAN_ALL_THE_TIME], stdout=subprocess.PIPE)
    assert cleaner.stdout and cleaner.stdout.readline()
    builds = set()
    try:
        for _ in range(60):
            program = programs.load_program(tap=TAP, source=Source.SHARED_MAPS, config=CONFIG)
            try:
                builds.add(program.build)
                assert answers(program)
            finally:
                program.close()
    finally:
        cleaner.kill()
        cleaner.communicate()
    assert Build.SHARED_BODY in builds


KILLED = """
import os, sys
from qsteer import clean
step = clean.{step}
def and_die(*arguments):
    step(*arguments)
    os.kill(os.getpid(), 9)
clean.{step} = and_die
clean.execute(clean.plan(clean.fetch()))
"""


@pytest.mark.parametrize("step", ["_move_aside", "_remove"])
def test_killed(step: str) -> None:
    """In the middle: what is used works on, and the next clean takes the rest."""
    for name in ("v1/bodies-one", "v1/bodies-two", "v2/bodies-three"):
        with pinned(name):
            pass
    with pinned("v1/bodies-used") as bodies, stub_over(bodies) as program:
        died = subprocess.run([sys.executable, "-c", KILLED.format(step=step)], check=False)
        assert died.returncode == -signal.SIGKILL
        assert len(private.pins()) >= 3
        assert answers(program)
        assert names(cleaned().kept) == ["qsteer/v1/bodies-used"]
        assert list(private.pins()) == ["v1/bodies-used"]


FETCH = "from qsteer import clean; clean.fetch()"


@pytest.mark.parametrize(
    "who",
    [
        ("--securebits=+noroot", "--inh-caps=-all,+dac_read_search,+bpf", "--ambient-caps=-all,+dac_read_search,+bpf"),
        ("--reuid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
    ],
    ids=["CAP_BPF alone", "another user"],
)
def test_rights_that_are_missing(who: tuple[str, ...]) -> None:
    with pinned("v1/bodies-0123456789ab"):
        pass
    command = ["setpriv", *who, sys.executable, "-c", FETCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "PermissionDeniedError: cannot " in done.stderr
    assert len(private.pins()) == 1


def test_one_at_a_time() -> None:
    with execute.lock(1), pytest.raises(BusyError):
        cleaned()


def test_the_command(namespace: str) -> None:
    with pinned("v1/bodies-0123456789ab"):
        pass
    dry = support.qsteer("clean", "-n")
    assert dry.returncode == 0 and dry.stdout.startswith("would remove  /sys/fs/bpf/qsteer/v1/bodies-0123456789ab: ")
    assert len(private.pins()) == 1
    done = support.qsteer("clean")
    assert (done.returncode, done.stdout.splitlines()) == (
        0,
        [
            "removed  /sys/fs/bpf/qsteer/v1/bodies-0123456789ab: shared body, used by no program",
            "removed  /sys/fs/bpf/qsteer/v1: directory, empty",
            "removed  /sys/fs/bpf/qsteer: directory, empty",
        ],
    )
    assert support.qsteer("clean").stdout == "nothing to clean\n"
    with execute.lock(1):
        busy = support.qsteer("clean", "--timeout", "0")
        assert busy.returncode == 8 and "another qsteer" in busy.stderr
        assert support.qsteer("clean", "-n").returncode == 0
    bare = ["setpriv", "--reuid=65534", "--clear-groups"]
    bare += ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]
    command = [*bare, sys.executable, "-m", "qsteer", "clean"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 4 and refused.stderr.startswith("qsteer: cannot open /run/qsteer/lock: ")
