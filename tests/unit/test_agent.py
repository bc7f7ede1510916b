# SPDX-License-Identifier: BSD-2-Clause
"""The guest agent edge against an agent made of a few lines of Python; integration/ has the real one."""

import base64
import contextlib
import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qsteer import agent, procs
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.ethtool import format_table
from qsteer.model import Process, Reading, Source
from qsteer.rss import BASE_TYPES, HashType, RssConfig, equal_table

MAC = "52:54:00:ab:cd:ef"
CONFIG = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=equal_table(3))
PORTS = "IP SA\nIP DA\nL4 bytes 0 & 1 [TCP/UDP src port]\nL4 bytes 2 & 3 [TCP/UDP dst port]\n\n"
ADDRESSES = "IP SA\nIP DA\n\n"
NOT_SUPPORTED = (1, "", "Cannot get RX ring count: Operation not supported\n")

Arguments = Mapping[str, Any]
Answer = Callable[[Arguments], object]


def flow(name: str, fields: str) -> str:
    return f"{name[:3].upper()} over IPV{name[3]} flows use these fields for computing Hash flow key:\n{fields}"


def table(config: RssConfig = CONFIG, device: str = "eth0") -> str:
    return format_table(config, device=device, rings=4).partition("RSS hash types:")[0]


def printed(device: str = "eth0", fields: Mapping[str, str] | None = None, hashing: str = "on") -> dict[str, Any]:
    """What the guest's ethtool says of one device: exit status, stdout and stderr for its arguments."""
    chosen = dict.fromkeys(("tcp4", "udp4", "tcp6", "udp6"), PORTS) | dict(fields or {})
    flows = {f"-n {device} rx-flow-hash {name}": (0, flow(name, text), "") for name, text in chosen.items()}
    features = f"Features for {device}:\nrx-checksumming: on\nreceive-hashing: {hashing}\nntuple-filters: off [fixed]\n"
    return {f"-x {device}": (0, table(device=device), ""), f"-k {device}": (0, features, ""), **flows}


def error(kind: str, text: str) -> bytes:
    return json.dumps({"error": {"class": kind, "desc": text}}).encode() + b"\n"


@dataclass
class FakeGuest:
    """An agent on one end of a connection.  ``answers`` gives bytes to be sent as they are, or what to return."""

    interfaces: object = field(
        default_factory=lambda: [{"name": "lo"}, {"name": "eth0", "hardware-address": MAC, "statistics": {}}]
    )
    printed: dict[str, Any] = field(default_factory=printed)
    programs: tuple[str, ...] = ("ethtool",)
    polls: int = 1
    greeting: bytes = b""
    half_request: bytes = b""
    answers: dict[str, Answer] = field(default_factory=dict)
    ran: list[str] = field(default_factory=list)
    _running: dict[int, tuple[str, int]] = field(default_factory=dict)

    def talk(self, connection: socket.socket) -> None:
        connection.sendall(self.greeting)
        with connection.makefile("rb") as lines:
            for line in lines:
                try:
                    request = json.loads((self.half_request + line).rpartition(b"\xff")[2])
                except ValueError:
                    connection.sendall(error("GenericError", "Invalid JSON syntax"))
                else:
                    connection.sendall(self.respond(request["execute"], request.get("arguments", {})))
                self.half_request = b""

    def respond(self, command: str, arguments: Arguments) -> bytes:
        answer = (self.answers.get(command) or getattr(self, command.replace("-", "_")))(arguments)
        return answer if isinstance(answer, bytes) else json.dumps({"return": answer}).encode() + b"\n"

    def guest_sync_delimited(self, arguments: Arguments) -> object:
        return b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n"

    def guest_fsfreeze_status(self, arguments: Arguments) -> object:
        return "thawed"

    def guest_network_get_interfaces(self, arguments: Arguments) -> object:
        return self.interfaces

    def guest_exec(self, arguments: Arguments) -> object:
        if arguments["path"] not in self.programs:
            return error("GenericError", "Guest agent command failed, error was 'Failed to execute child process'")
        assert arguments["capture-output"] is True
        pid = 1000 + len(self.ran)
        self.ran.append(" ".join(arguments["arg"]))
        self._running[pid] = (self.ran[-1], self.polls)
        return {"pid": pid}

    def guest_exec_status(self, arguments: Arguments) -> object:
        if arguments["pid"] not in self._running:
            return error("GenericError", "Invalid parameter 'pid'")
        command, polls = self._running.pop(arguments["pid"])
        if polls:
            self._running[arguments["pid"]] = (command, polls - 1)
            return {"exited": False}
        status, out, err = self.printed.get(command, NOT_SUPPORTED)
        data = {"out-data": out, "err-data": err}
        return {"exited": True, "exitcode": status} | {
            key: base64.b64encode(text.encode()).decode() for key, text in data.items() if text
        }


@pytest.fixture
def me() -> Process:
    process = procs.read(os.getpid())
    assert process
    return process


@contextlib.contextmanager
def serving(path: Path, talk: Callable[[socket.socket], object]) -> Iterator[None]:
    """``talk`` to each client that connects to ``path``, one after the other; no client is left when this ends."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(ConnectionError):
                        talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(10)
            path.unlink()
            assert not thread.is_alive()


@pytest.fixture
def ask(tmp_path: Path, me: Process) -> Callable[..., Reading]:
    """Read through an agent that ``talk`` is, or that a fake guest has."""

    def read(guest: FakeGuest | Callable[[socket.socket], object], mac: str = MAC, answer_s: float = 0.0) -> Reading:
        path = tmp_path / "agent"
        with serving(path, guest.talk if isinstance(guest, FakeGuest) else guest):
            return agent.read(str(path), me, mac, answer_s=answer_s)

    return read


Ask = Callable[..., Reading]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would take seconds takes tenths of them."""
    monkeypatch.setattr(agent, "TIMEOUT_S", 0.4)
    monkeypatch.setattr(agent, "SYNC_TIMEOUT_S", 0.2)


class TestReading:
    def test_a_guest(self, ask: Ask) -> None:
        guest = FakeGuest()
        assert ask(guest) == Reading(source=Source.GUEST_AGENT, config=CONFIG, exact_types=True, paused_ms=None)
        assert sorted(guest.ran) == sorted(guest.printed)

    @pytest.mark.usefixtures("hasty")
    def test_a_slow_guest(self, ask: Ask) -> None:
        def slow(connection: socket.socket) -> None:
            time.sleep(0.6)
            FakeGuest().talk(connection)

        with pytest.raises(BusyError):
            ask(slow)
        assert ask(slow, answer_s=10).config == CONFIG

    def test_spellings_of_the_address(self, ask: Ask) -> None:
        interfaces = [{"name": "eth0", "hardware-address": MAC.upper()}]
        assert ask(FakeGuest(interfaces=interfaces)).config == CONFIG
        for mac in (MAC.upper(), MAC.replace(":", "-")):
            assert ask(FakeGuest(), mac=mac).config == CONFIG
        with pytest.raises(NotFoundError, match=r"the address a\?\[2jb$"):
            ask(FakeGuest(), mac="a\x1b[2Jb")

    @pytest.mark.parametrize(
        ("fields", "types"),
        [
            ({"udp4": ADDRESSES}, BASE_TYPES & ~HashType.UDP4),
            ({"tcp6": ADDRESSES, "udp6": ADDRESSES}, BASE_TYPES & ~(HashType.UDP6 | HashType.TCP6)),
            ({"tcp4": "None\n"}, BASE_TYPES & ~(HashType.TCP4 | HashType.IP4)),
            (dict.fromkeys(("tcp4", "udp4", "tcp6", "udp6"), "None\n"), HashType(0)),
        ],
    )
    def test_hash_types(self, ask: Ask, fields: dict[str, str], types: HashType) -> None:
        reading = ask(FakeGuest(printed=printed(fields=fields)))
        assert reading.config and reading.config.types == types
        assert reading.exact_types

    @pytest.mark.parametrize("hashing", ["off", "off [fixed]", "", "on" * 9])
    def test_types_that_the_device_may_not_know(self, ask: Ask, hashing: str) -> None:
        reading = ask(FakeGuest(printed=printed(fields={"udp4": ADDRESSES}, hashing=hashing)))
        assert reading.config and reading.config.types == BASE_TYPES & ~HashType.UDP4
        assert not reading.exact_types

    @pytest.mark.parametrize(
        "answer",
        [
            (1, "", "ethtool: bad command line argument(s)\n"),
            (0, flow("udp6", "IP SA\n"), ""),
            (0, flow("udp6", ""), ""),
            (0, flow("udp6", ADDRESSES + "L2DA\n"), ""),
            (0, flow("tcp6", PORTS), ""),
            (0, flow("udp6", "None\n") * 2, ""),
            (0, "", ""),
            (0, "x" * 100000, ""),
            (None, "", ""),
        ],
    )
    def test_types_that_cannot_be_had(self, ask: Ask, answer: object) -> None:
        """The usual ones are taken, and the reading says so."""
        guest = FakeGuest(printed=printed(fields={"tcp4": ADDRESSES}))
        guest.printed["-n eth0 rx-flow-hash udp6"] = answer
        assert ask(guest) == Reading(source=Source.GUEST_AGENT, config=CONFIG, exact_types=False)

    def test_answers_that_contradict_each_other(self, ask: Ask) -> None:
        guest = FakeGuest(printed=printed(fields={"tcp4": ADDRESSES, "udp4": "None\n"}))
        assert not ask(guest).exact_types

    def test_no_rss(self, ask: Ask) -> None:
        nothing = Reading(source=Source.GUEST_AGENT, config=None)
        assert ask(FakeGuest(printed={})) == nothing
        heading = table().partition("\n")[0]
        text = f"{heading}\nOperation not supported\nRSS hash key:\nOperation not supported\n"
        assert ask(FakeGuest(printed={"-x eth0": (0, text, "")})) == nothing

    def test_an_ethtool_out_of_the_path(self, ask: Ask) -> None:
        assert ask(FakeGuest(programs=("/sbin/ethtool",))).config == CONFIG

    def test_what_an_earlier_client_left(self, ask: Ask) -> None:
        """Half a line, answers to others, and another client's synchronisation."""
        left = b'{"return": {}}\n\xff{"return": 7}\nx\xff\n{"return": ["\xff]}\n' + b"[" * 5000 + b"\nhalf a li"
        assert ask(FakeGuest(greeting=left, half_request=b'{"execute": "guest-')).config == CONFIG

    def test_one_agent_twice(self, tmp_path: Path, me: Process) -> None:
        with serving(tmp_path / "agent", FakeGuest().talk):
            assert {agent.read(str(tmp_path / "agent"), me, MAC).config for _ in range(2)} == {CONFIG}


class TestInterfaces:
    def test_two_nics(self, ask: Ask) -> None:
        other = RssConfig(types=BASE_TYPES, key=CONFIG.key, table=(1, 0))
        interfaces = [{"name": f"eth{n}", "hardware-address": f"52:54:00:00:00:0{n}"} for n in range(2)]
        both = printed() | printed("eth1") | {"-x eth1": (0, table(other, "eth1"), "")}
        assert ask(FakeGuest(interfaces=interfaces, printed=both), mac="52:54:00:00:00:00").config == CONFIG
        assert ask(FakeGuest(interfaces=interfaces, printed=both), mac="52:54:00:00:00:01").config == other

    def test_a_vlan_and_a_bridge_have_the_address_too(self, ask: Ask) -> None:
        interfaces = [{"name": name, "hardware-address": MAC} for name in ("br0", "eth0", "eth0.7")]
        guest = FakeGuest(interfaces=interfaces)
        assert ask(guest).config == CONFIG
        assert guest.ran[:3] == ["-x br0", "-x eth0", "-x eth0.7"]

    def test_two_with_the_address_and_rss(self, ask: Ask) -> None:
        interfaces = [{"name": name, "hardware-address": MAC} for name in ("eth0", "eth1")]
        with pytest.raises(QsteerError, match="more than one interface with RSS"):
            ask(FakeGuest(interfaces=interfaces, printed=printed() | printed("eth1")))

    @pytest.mark.parametrize(
        "interfaces",
        [
            [],
            {},
            None,
            "eth0",
            [[]],
            [None],
            [{"name": "eth0"}],
            [{"hardware-address": MAC}],
            [{"name": 7}],
            {"a": "b"},
        ],
    )
    def test_not_there(self, ask: Ask, interfaces: object) -> None:
        with pytest.raises(NotFoundError) as caught:
            ask(FakeGuest(interfaces=interfaces))
        assert str(caught.value).endswith(f"knows no interface with the address {MAC}")

    @pytest.mark.parametrize(
        "name",
        ["", "-x", "--version", "a b", "eth0;reboot", "e" * 16, "a/b", "..", "*", "eth0\n", "\x1b[2J", "ä", "\ud800"],
    )
    def test_names_that_are_none(self, ask: Ask, name: str) -> None:
        guest = FakeGuest(interfaces=[{"name": name, "hardware-address": MAC}])
        with pytest.raises(QsteerError, match="cannot be looked at") as caught:
            ask(guest)
        assert str(caught.value).isprintable()
        assert not guest.ran

    def test_too_many_names(self, ask: Ask) -> None:
        guest = FakeGuest(interfaces=[{"name": f"macvtap{n}", "hardware-address": MAC} for n in range(1000)])
        with pytest.raises(QsteerError, match="cannot be looked at") as caught:
            ask(guest)
        assert len(str(caught.value)) < 400
        assert not guest.ran


class TestRefusals:
    @pytest.mark.parametrize("command", ["guest-exec", "guest-network-get-interfaces", "guest-exec-status"])
    @pytest.mark.parametrize(
        "text", ["The command guest-exec has not been found", "Command guest-exec has been disabled"]
    )
    def test_a_command_that_is_blocked(self, ask: Ask, command: str, text: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            ask(FakeGuest(answers={command: lambda _: error("CommandNotFound", text)}))
        assert str(caught.value) == f"the guest agent of process {os.getpid()} refuses {command}: {text}"
        assert "block-rpcs" in caught.value.hint

    @pytest.mark.parametrize("text", ["the agent is in frozen state", "the command is not allowed"])
    def test_a_guest_that_is_frozen_for_a_snapshot(self, ask: Ask, text: str) -> None:
        """qemu-ga 7.2 says so, 10.0 to 11.1 do not; ``guest-fsfreeze-status`` tells."""
        refusal = error("CommandNotFound", f"Command guest-exec has been disabled: {text}")
        guest = FakeGuest(answers={"guest-exec": lambda _: refusal, "guest-fsfreeze-status": lambda _: "frozen"})
        with pytest.raises(BusyError, match="frozen"):
            ask(guest)
        for status in ("thawed", None, refusal):
            guest.answers["guest-fsfreeze-status"] = lambda _, status=status: status  # type: ignore[misc]
            with pytest.raises(UnsupportedError, match="refuses guest-exec"):
                ask(guest)

    def test_no_ethtool(self, ask: Ask) -> None:
        with pytest.raises(UnsupportedError, match="cannot run ethtool") as caught:
            ask(FakeGuest(programs=()))
        assert "installed" in caught.value.hint

    def test_ethtool_without_the_right(self, ask: Ask) -> None:
        guest = FakeGuest()
        guest.printed["-x eth0"] = (1, "", "first\nCannot open socket: Permission denied \x1b[1m\n")
        with pytest.raises(QsteerError, match=r"Cannot open socket: Permission denied \?\[1m$"):
            ask(guest)

    @pytest.mark.parametrize(("status", "says"), [(127, "exit status 127"), (None, "exit status None")])
    def test_ethtool_that_says_nothing(self, ask: Ask, status: int | None, says: str) -> None:
        guest = FakeGuest()
        guest.printed["-x eth0"] = (status, "", "")
        with pytest.raises(QsteerError, match=says):
            ask(guest)

    @pytest.mark.parametrize("text", ["", "RX flow hash\n", table() + "RSS hash colour:\n", table()[:-80], "x" * 70000])
    def test_a_table_that_is_none(self, ask: Ask, text: str) -> None:
        guest = FakeGuest()
        guest.printed["-x eth0"] = (0, text, "")
        with pytest.raises(QsteerError) as caught:
            ask(guest)
        assert caught.value.exit_code == 1  # not the user's fault
        assert str(caught.value).isprintable()

    def test_a_table_without_a_key(self, ask: Ask) -> None:
        guest = FakeGuest()
        guest.printed["-x eth0"] = (0, table().partition("RSS hash key")[0], "")
        with pytest.raises(QsteerError, match="no hash key"):
            ask(guest)


def endless(chunk: bytes) -> Callable[[socket.socket], None]:
    def talk(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection.sendall(chunk)

    return talk


def dribble(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"x")
            time.sleep(0.01)


def silent(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


NONSENSE: dict[str, bytes] = {
    "no JSON": b"hello\n",
    "empty": b"\n",
    "a number": b"7\n",
    "a list": b"[]\n",
    "no member": b"{}\n",
    "null": b"null\n",
    "deep": b"[" * 200000 + b"\n",
    "deep objects": b'{"return":' * 50000 + b"\n",
    "a long number": b'{"return": ' + b"9" * 10000 + b"}\n",
    "not UTF-8": b'{"return": "\x80"}\n',
    "UTF-16": '{"return": []}'.encode("utf-16") + b"\n",
    "a string for an error": b'{"error": "x"}\n',
    "a number for a class": b'{"error": {"class": 7, "desc": "x"}}\n',
    "an error without a text": b'{"error": {"class": "GenericError"}}\n',
    "0xff": b"\xff\n",
}


class TestHostile:
    @pytest.mark.parametrize("command", ["guest-network-get-interfaces", "guest-exec", "guest-exec-status"])
    @pytest.mark.parametrize("name", NONSENSE)
    def test_nonsense(self, ask: Ask, command: str, name: str) -> None:
        with pytest.raises(QsteerError) as caught:
            ask(FakeGuest(answers={command: lambda _: NONSENSE[name]}))
        assert str(caught.value).endswith(f"answers {command} with what makes no sense")

    @pytest.mark.parametrize("answer", [None, 7, [], {}, {"pid": "7"}, {"pid": None}, {"pid": 7.5}])
    def test_no_pid(self, ask: Ask, answer: object) -> None:
        with pytest.raises(QsteerError, match="makes no sense"):
            ask(FakeGuest(answers={"guest-exec": lambda _: answer}))

    @pytest.mark.parametrize(
        "answer",
        [
            None,
            [],
            {},
            {"exited": "yes"},
            {"exited": None},
            {"exited": True, "exitcode": "0"},
            {"exited": True, "exitcode": 0, "out-data": 7},
            {"exited": True, "exitcode": 0, "out-data": "no base64"},
            {"exited": True, "exitcode": 0, "out-data": "a"},
            {"exited": True, "exitcode": 0, "out-data": "\ud800"},
            {"exited": True, "exitcode": 0, "err-data": ["a"]},
        ],
    )
    def test_no_status(self, ask: Ask, answer: object) -> None:
        with pytest.raises(QsteerError, match="guest-exec-status with what makes no sense"):
            ask(FakeGuest(answers={"guest-exec-status": lambda _: answer}))

    @pytest.mark.parametrize("chunk", [b"x" * 65536, b'{"return": 1}\n' * 1000, b"\xff" * 65536, b"\n" * 65536])
    def test_an_endless_answer(self, ask: Ask, chunk: bytes) -> None:
        before = time.process_time()
        with pytest.raises(QsteerError, match=f"sends more than {agent.BYTES_MAX} bytes"):
            ask(endless(chunk))
        assert time.process_time() - before < 3

    def test_all_bytes_count(self, ask: Ask) -> None:
        """The bound is one for the whole exchange, not for a line."""
        many = [{"name": "x" * 100, "hardware-address": "x"}] * 3000
        guest = FakeGuest(interfaces=many, greeting=(b"x" * 1000 + b"\n") * 800)
        with pytest.raises(QsteerError, match="sends more than"):
            ask(guest)

    @pytest.mark.usefixtures("hasty")
    @pytest.mark.parametrize("talk", [silent, dribble], ids=["silent", "dribble"])
    def test_nobody_there(self, ask: Ask, talk: Callable[[socket.socket], None]) -> None:
        before = time.monotonic()
        with pytest.raises(BusyError) as caught:
            ask(talk)
        assert time.monotonic() - before < 2
        assert str(caught.value) == f"the guest agent of process {os.getpid()} does not answer in time"
        assert "qemu-guest-agent" in caught.value.hint and "libvirt" in caught.value.hint

    @pytest.mark.usefixtures("hasty")
    def test_another_client_holds_it(self, tmp_path: Path, me: Process) -> None:
        """QEMU does not accept a second one; what waits is told, and so is the one for whom there is no place."""
        path = tmp_path / "agent"
        with serving(path, silent), socket.socket(socket.AF_UNIX) as holder:
            holder.connect(str(path))
            with pytest.raises(BusyError, match="does not answer in time"):
                agent.read(str(path), me, MAC)
            with socket.socket(socket.AF_UNIX) as second:
                second.connect(str(path))
                with pytest.raises(BusyError, match="no place for one more client"):
                    agent.read(str(path), me, MAC)

    @pytest.mark.usefixtures("hasty")
    def test_a_command_that_never_ends(self, ask: Ask) -> None:
        before = time.monotonic()
        with pytest.raises(BusyError, match="does not answer in time"):
            ask(FakeGuest(polls=1 << 30))
        assert time.monotonic() - before < 2

    @pytest.mark.parametrize("command", ["guest-sync-delimited", "guest-network-get-interfaces", "guest-exec-status"])
    def test_a_connection_that_ends(self, ask: Ask, command: str) -> None:
        def end(arguments: Arguments) -> object:
            raise ConnectionError

        with pytest.raises(QsteerError, match=r"is gone: its connection was closed|cannot talk to"):
            ask(FakeGuest(answers={command: end}))

    def test_a_connection_that_is_reset(self, ask: Ask) -> None:
        """It is closed with something unread in it."""
        with pytest.raises(QsteerError, match="Connection reset by peer"):
            ask(lambda connection: connection.recv(1, socket.MSG_PEEK))

    @pytest.mark.usefixtures("hasty")
    def test_damage(self, tmp_path: Path, me: Process) -> None:
        """Whatever an agent says, there is a reading that can be had, or an error of one line, and soon."""
        rng = random.Random(11)
        readings = refused = 0

        def damaged(guest: FakeGuest, rng: random.Random) -> Callable[[socket.socket], None]:
            real = guest.respond
            when = rng.randrange(9)

            def respond(command: str, arguments: Arguments) -> bytes:
                nonlocal when
                answer = real(command, arguments)
                when -= 1
                if when or command == "guest-sync-delimited":
                    return answer
                at = rng.randrange(len(answer))
                return answer[:at] + rng.randbytes(rng.randint(0, 3)) + answer[at + rng.randint(0, 3) : -1] + b"\n"

            guest.respond = respond  # type: ignore[method-assign]
            return guest.talk

        path = tmp_path / "agent"
        talk: Callable[[socket.socket], None] = silent
        with serving(path, lambda connection: talk(connection)):
            for _ in range(300):
                talk = damaged(FakeGuest(polls=0), rng)
                try:
                    reading = agent.read(str(path), me, MAC)
                except QsteerError as caught:
                    refused += 1
                    assert str(caught).isprintable() and len(str(caught)) < 500
                else:
                    readings += 1
                    assert reading.config is None or len(reading.config.key) == 40
        assert readings > 50 and refused > 50
