# SPDX-License-Identifier: BSD-2-Clause
"""The QMP edge against a QEMU made of a few lines of Python; integration/ has the real one."""

import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from qsteer import procs, qmp, qmpclient
from qsteer.errors import BusyError, PermissionDeniedError, QsteerError, UnsupportedError
from tests.unit.qemus import FakeQemu, HangUp

GREETING = {"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}
PROPERTIES = [{"name": "mq", "type": "bool"}, {"name": "vectors", "type": "uint32", "description": "x"}, {"name": 7}, 8]

FAKE_QEMU = f"""#!{sys.executable} -IS
import json, os, sys, time
fd = int(next(a for a in sys.argv if a.startswith("socket,id=")).rpartition("fd=")[2])
monitor = open(fd, "w")
def say(message):
    print(json.dumps(message), file=monitor, flush=True)
greeting = {GREETING!r}
PRELUDE
say(greeting)
while received := os.read(fd, 65536):  # one command at a time, without an end of line
    message = json.loads(received)
    answer = {{"return": {{}}}}
    if message["execute"] == "device-list-properties" and message["arguments"]["typename"] != "virtio-net-pci":
        answer = {{"error": {{"class": "DeviceNotFound", "desc": "not found"}}}}
    elif message["execute"] == "device-list-properties":
        answer = {{"return": {PROPERTIES!r}}}
    elif message["execute"] == "request-ebpf" and "old" in sys.argv[0]:
        answer = {{"error": {{"class": "CommandNotFound", "desc": "not found"}}}}
    say(answer | {{key: message[key] for key in ("id",) if key in message}})
"""


def fake_qemu(directory: Path, prelude: str = "", name: str = "qemu") -> str:
    path = directory / name
    path.write_text(FAKE_QEMU.replace("PRELUDE", prelude))
    path.chmod(0o755)
    return str(path)


def script(directory: Path, text: str) -> str:
    path = directory / "script"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def test_probe(tmp_path: Path) -> None:
    before = open_fds()
    found = qmp.probe(fake_qemu(tmp_path), drivers=("virtio-net-pci", "virtio-net-ccw"))
    assert found.version == (10, 0, 2)
    assert found.version_text == "10.0.2"
    assert found.libbpf
    assert found.properties == {"virtio-net-pci": {"mq": "bool", "vectors": "uint32"}}
    assert not qmp.probe(fake_qemu(tmp_path, name="old"), drivers=()).libbpf
    assert open_fds() == before


def test_what_a_probed_qemu_gets(tmp_path: Path) -> None:
    """The standard streams, the monitor, the lifeline, no fd of ours; no machine; a process group of its own."""
    seen = tmp_path / "seen"
    prelude = f"""
here = "/proc/self/fd/"
fds = [os.readlink(here + number) for number in os.listdir(here) if os.path.lexists(here + number)]
with open({str(seen)!r}, "w") as file:
    json.dump([fds, sys.argv, os.getpgid(0) == os.getpid(), os.getcwd()], file)
"""
    with (tmp_path / "ours").open("w") as ours:
        os.set_inheritable(ours.fileno(), True)
        qmp.probe(fake_qemu(tmp_path, prelude), drivers=(), become=lambda: os.chdir(tmp_path))
    fds, argv, leads, folder = json.loads(seen.read_text())
    assert not any("ours" in fd for fd in fds)
    assert sum(fd.startswith("socket:") for fd in fds) == 1
    assert argv[1:3] == ["-machine", "none"]
    assert {"-nodefaults", "-no-user-config", "-S"} <= set(argv)
    assert leads
    assert folder == str(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("exit 0", "it closed the monitor"),
        ("echo oh no >&2; echo more >&2; exit 1", "oh no"),
        ("printf 'a\\033[2Jb' >&2", "a?[2Jb"),
        ("kill -9 $$", "it closed the monitor"),
    ],
)
def test_what_is_no_qemu(tmp_path: Path, text: str, says: str) -> None:
    binary = script(tmp_path, text)
    with pytest.raises(UnsupportedError) as caught:
        qmp.probe(binary, drivers=())
    assert str(caught.value) == f'"{binary}" does not run as QEMU: {says}'


@pytest.mark.parametrize(
    "prelude",
    [
        "say({'QMP': 7}); time.sleep(60)",
        "say([]); time.sleep(60)",
        "print('hello', file=monitor, flush=True); time.sleep(60)",
        "greeting['QMP']['version'] = {'qemu': {'major': '10', 'minor': 0, 'micro': 0}}",
        "greeting['QMP']['version'] = {}",
        "print('{' * 100000, file=monitor, flush=True); time.sleep(60)",
    ],
)
def test_a_qemu_that_talks_nonsense(tmp_path: Path, prelude: str) -> None:
    with pytest.raises(UnsupportedError, match="does not run as QEMU") as caught:
        qmp.probe(fake_qemu(tmp_path, prelude), drivers=("virtio-net-pci",))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("left", ["{'return': {}}", "{'event': 'STOP', 'data': {}}", "{'error': {}, 'id': 'x'}"])
def test_what_a_lost_client_was_to_be_told(tmp_path: Path, left: str) -> None:
    """It may come before the greeting, and is no answer to us; so much of it is no QEMU's."""
    assert qmp.probe(fake_qemu(tmp_path, f"say({left}); say({left})"), drivers=()).version == (10, 0, 2)
    flood = f"[say({left}) for _ in range({qmpclient._LEFTOVERS_MAX + 1})]"
    with pytest.raises(UnsupportedError, match="does not run as QEMU"):
        qmp.probe(fake_qemu(tmp_path, flood), drivers=())


def test_a_qemu_that_says_nothing_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "PROBE_TIMEOUT_S", 0.3)
    pids = tmp_path / "pids"
    binary = script(tmp_path, f"sleep 600 & echo $$ $! > {pids}; wait")
    with pytest.raises(UnsupportedError, match=r"does not answer as QEMU within 0\.3 s"):
        qmp.probe(binary, drivers=())
    wait_until_gone(*map(int, pids.read_text().split()))


def test_the_death_of_qsteer_ends_it(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    binary = script(tmp_path, f"sleep 600 & echo $$ $! > {pids}.new; mv {pids}.new {pids}; wait")
    code = f"from qsteer import qmp; qmp.probe({binary!r}, drivers=())"
    prober = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    deadline = time.monotonic() + 20
    while not pids.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    prober.send_signal(signal.SIGKILL)
    prober.wait()
    wait_until_gone(*map(int, pids.read_text().split()))


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 10
    for pid in pids:
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]:
            assert time.monotonic() < deadline, f"process {pid} is still there"
            time.sleep(0.01)


def test_a_binary_that_cannot_be_run(tmp_path: Path) -> None:
    before = open_fds()
    with pytest.raises(QsteerError, match="No such file"):
        qmp.probe(str(tmp_path / "nosuch"), drivers=())
    (tmp_path / "plain").touch()
    with pytest.raises(PermissionDeniedError):
        qmp.probe(str(tmp_path / "plain"), drivers=())

    def fail() -> None:
        raise PermissionError(1, "no")

    with pytest.raises(PermissionDeniedError, match="cannot become the VM's user"):
        qmp.probe(fake_qemu(tmp_path), drivers=(), become=fail)
    assert open_fds() == before


class Monitor(threading.Thread):
    """A QMP socket that serves clients one after the other, as QEMU does."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen(4)
        self.received: list[dict[str, object]] = []

    def run(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            # A client that goes away early is none of our failures.
            with contextlib.suppress(OSError), client, client.makefile("w") as stream:
                print(json.dumps(GREETING), file=stream, flush=True)
                while received := client.recv(65536):
                    message = json.loads(received)
                    self.received.append(message)
                    answer: dict[str, object] = {"return": {"echo": message.get("arguments")}}
                    if message["execute"] == "qmp_capabilities":
                        answer = {"return": {}}
                    elif message["execute"] == "fail":
                        answer = {"error": {"class": "GenericError", "desc": "first\nsecond"}}
                    else:
                        print(json.dumps({"event": "X", "timestamp": {"seconds": 1, "microseconds": 2}}), file=stream)
                    answer |= {key: message[key] for key in ("id",) if key in message}
                    print(json.dumps(answer), file=stream, flush=True)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.join()
        self.listener.close()


@pytest.fixture
def monitor(tmp_path: Path) -> Iterator[Monitor]:
    monitor = Monitor(tmp_path / "qmp")
    monitor.start()
    yield monitor
    monitor.close()


def test_execute(tmp_path: Path, monitor: Monitor) -> None:
    path = str(tmp_path / "qmp")
    assert qmp.execute(path, "do", {"a": 1}) == {"echo": {"a": 1}}
    assert [message["execute"] for message in monitor.received] == ["qmp_capabilities", "do"]
    with socket.socket(socket.AF_UNIX) as ours:
        ours.connect(path)
        assert qmp.execute(ours, "do") == {"echo": {}}
    with pytest.raises(QsteerError) as caught:
        qmp.execute(path, "fail")
    assert str(caught.value) == f"QEMU at {path} did not do fail: first"


def test_execute_while_another_client_holds_the_monitor(tmp_path: Path, monitor: Monitor) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(path)
        other.recv(1)
        with pytest.raises(BusyError, match=r"does not answer within 0\.2 s") as caught:
            qmp.execute(path, "do", timeout_s=0.2)
    assert "another client" in caught.value.hint and "no QMP socket" in caught.value.hint
    assert monitor.is_alive()


def test_how_long_an_answer_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "TIMEOUT_S", 0.1)
    me = procs.read(os.getpid())
    assert me
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "qmp"))
        silent.listen(4)
        for answer_s, waits_s in ((0.0, 0.1), (0.05, 0.1), (0.3, 0.3)):
            with pytest.raises(BusyError, match=rf"does not answer within {waits_s:g} s"):
                qmp.converse(str(tmp_path / "qmp"), me, lambda monitor: monitor.ask("do"), answer_s=answer_s)


def test_execute_where_nobody_is(tmp_path: Path) -> None:
    with pytest.raises(QsteerError, match=r"cannot reach QEMU.*No such file"):
        qmp.execute(str(tmp_path / "qmp"), "do")


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b'{"QMP":7}\n',
        b"[" * 100_000 + b"\n",
        json.dumps(GREETING).encode() + b"\n",
        json.dumps(GREETING).encode() + b'\n{"return":{}}\n',
        json.dumps(GREETING).encode() + b'\n{"return":{}}\n{"error":{"class":"x","desc":"y"}}\n',
        json.dumps(GREETING).encode() + b'\n{"return":{}}\n\xff\xfe\n',
    ],
)
def test_a_monitor_that_breaks_off(tmp_path: Path, said: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """However the other side ends it, there is one error, and asyncio does not print another."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "qmp"))
        listener.listen(8)

        def serve() -> None:
            for _ in range(4):
                client, _ = listener.accept()
                with client:
                    client.sendall(said)

        server = threading.Thread(target=serve)
        server.start()
        for _ in range(4):
            with pytest.raises(QsteerError):
                qmp.execute(str(tmp_path / "qmp"), "do")
        server.join()
    gc.collect()
    assert not [record for record in caplog.records if record.name.startswith("asyncio")]


STOP = b'{"event":"STOP","timestamp":{"seconds":1,"microseconds":0}}\n'


class Flood(FakeQemu):
    """Sends one thing again and again, once it is asked to do something."""

    def __init__(self, path: Path, said: bytes) -> None:
        super().__init__(path, {"do": self.flood})
        self.said_again = said
        self.ended = threading.Event()

    def _serve(self, client: socket.socket) -> None:
        self.client = client
        super()._serve(client)

    def flood(self, _: Mapping[str, object]) -> object:
        with contextlib.suppress(OSError):
            while not self.ended.is_set():
                self.client.sendall(self.said_again)
        raise HangUp


@pytest.fixture
def flood(tmp_path: Path) -> Iterator[Callable[[bytes], str]]:
    floods: list[Flood] = []

    def start(said: bytes) -> str:
        path = tmp_path / f"flood{len(floods)}"
        floods.append(Flood(path, said))
        floods[-1].start()
        return str(path)

    yield start
    for started in floods:
        started.ended.set()
        started.close()


@pytest.mark.parametrize("said", [STOP * 64, b'{"return":{},"id":"x"}\n' * 64, b'{"event":"' + b"x" * 5000 + b'"}\n'])
def test_a_flood(
    flood: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends a session after so many bytes, and nothing of it is kept."""
    caplog.set_level("CRITICAL", "qemu.qmp")  # pytest would keep what is logged
    monkeypatch.setattr(qmpclient, "SESSION_MAX", 200_000)
    monkeypatch.setattr(qmpclient, "MESSAGE_MAX", 10_000)
    path = flood(said)
    me = procs.read(os.getpid())
    assert me
    qmp.failures()  # imported, so that it does not count
    tracemalloc.start()
    try:
        with pytest.raises(QsteerError) as caught:
            qmp.converse(path, me, lambda monitor: monitor.ask_and_hear("do", {}, ("STOP",)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value) == f'QEMU at "{path}" sends more than 200000 bytes'
    assert peak < 1_500_000


def test_a_message_without_an_end(flood: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmpclient, "MESSAGE_MAX", 100_000)
    path = flood(b"x" * 5000)
    with pytest.raises(QsteerError) as caught:
        qmp.execute(path, "do")
    assert str(caught.value) == f"QEMU at {path} sends a message of more than 100000 bytes"


def test_a_greeting_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmpclient, "MESSAGE_MAX", 100_000)
    prelude = (
        "os.dup2(os.open(os.devnull, os.O_WRONLY), 2); monitor.write('x' * 150000); monitor.flush(); time.sleep(60)"
    )
    with pytest.raises(UnsupportedError, match="does not run as QEMU: it sends a message of more than 100000 bytes"):
        qmp.probe(fake_qemu(tmp_path, prelude), drivers=())


def test_a_flood_does_not_outlast_the_time(
    flood: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Even with messages so short that what is read at once holds tens of thousands."""
    caplog.set_level("CRITICAL", "qemu.qmp")
    monkeypatch.setattr(qmpclient, "SESSION_MAX", 1 << 40)
    path = flood(b"{}\n" * 100_000)
    began = time.monotonic()
    with pytest.raises(BusyError, match="does not answer"):
        qmp.execute(path, "do", timeout_s=0.3)
    assert time.monotonic() - began < 0.9


def test_greeting_late_leaves_no_more_time(tmp_path: Path) -> None:
    """Connecting, greeting and answering have one time together."""

    class Late(FakeQemu):
        def _serve(self, client: socket.socket) -> None:
            time.sleep(0.4)
            super()._serve(client)

    late = Late(tmp_path / "qmp", {"do": lambda _: time.sleep(0.4)})
    late.start()
    try:
        began = time.monotonic()
        with pytest.raises(BusyError, match="does not answer"):
            qmp.execute(str(tmp_path / "qmp"), "do", timeout_s=0.6)
        assert time.monotonic() - began < 0.75
    finally:
        late.close()


def test_a_qemu_that_does_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has not taken does not hold us."""
    monkeypatch.setattr(qmp, "_DISCONNECT_TIMEOUT_S", 0.2)
    done = threading.Event()

    class Deaf(FakeQemu):
        def _serve(self, client: socket.socket) -> None:
            self._send(client, self.greeting)
            client.recv(4096)
            self._send(client, {"return": {}})
            done.wait(5)

    deaf = Deaf(tmp_path / "qmp", {})
    deaf.start()
    try:
        began = time.monotonic()
        with pytest.raises(BusyError, match="does not answer"):
            qmp.execute(str(tmp_path / "qmp"), "do", {"much": "x" * (4 << 20)}, timeout_s=0.3)
        assert time.monotonic() - began < 2
    finally:
        done.set()
        deaf.close()
