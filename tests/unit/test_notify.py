# SPDX-License-Identifier: BSD-2-Clause
"""What goes to the system's log: by journald's native protocol, else by syslogd's, and never with waiting."""

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer.notify import Priority, SystemJournal


class Log:
    """A socket that takes datagrams."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)

    def lines(self) -> list[str]:
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.socket.recv(1 << 20).decode())
        return found

    def fill(self) -> None:
        """Until it takes no more."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender, contextlib.suppress(BlockingIOError):
            sender.setblocking(False)
            while True:
                sender.sendto(b"x", self.socket.getsockname())


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the sockets are to be; none is there."""
    monkeypatch.setattr(SystemJournal, "SOCKET", str(tmp_path / "journal"))
    monkeypatch.setattr(SystemJournal, "SYSLOG", str(tmp_path / "log"))
    return tmp_path


@pytest.fixture
def journal(paths: Path) -> Iterator[Log]:
    log = Log(paths / "journal")
    with log.socket:
        yield log


@pytest.fixture
def syslog(paths: Path) -> Iterator[Log]:
    log = Log(paths / "log")
    with log.socket:
        yield log


def test_where_the_sockets_are() -> None:
    """systemd-journald.service(8), "Native Journal Protocol"; syslog(3)."""
    assert (SystemJournal.SOCKET, SystemJournal.SYSLOG) == ("/run/systemd/journal/socket", "/dev/log")


def test_the_journal_gets_fields(journal: Log, syslog: Log) -> None:
    SystemJournal("qsteer-x", QSTEER_DOMAIN="web 1", OTHER="a=b").say("net0: größer", Priority.WARNING)
    assert journal.lines() == [
        "MESSAGE=net0: größer\nPRIORITY=4\nSYSLOG_IDENTIFIER=qsteer-x\nQSTEER_DOMAIN=web 1\nOTHER=a=b\n"
    ]
    assert syslog.lines() == []


def test_one_datagram_for_each_line(journal: Log) -> None:
    said = SystemJournal("x")
    for priority in Priority:
        said.say(priority.name, priority)
    said.say("by default")
    told = [dict(line.split("=", 1) for line in lines.splitlines()) for lines in journal.lines()]
    assert [(fields["MESSAGE"], fields["PRIORITY"]) for fields in told] == [
        ("WARNING", "4"),
        ("NOTICE", "5"),
        ("INFO", "6"),
        ("by default", "6"),
    ]


def test_without_a_journal_it_is_syslogs(syslog: Log) -> None:
    SystemJournal("qsteer-x", QSTEER_DOMAIN="web1").say("net0: 100 % größer", Priority.NOTICE)
    (line,) = syslog.lines()
    # RFC 3164: facility daemon (3), and a day that is filled up with a blank.
    assert re.fullmatch(
        rf"<29>[A-Z][a-z]{{2}} [ 123]\d \d\d:\d\d:\d\d qsteer-x\[{os.getpid()}\]: net0: 100 % größer", line
    )


@pytest.mark.parametrize(
    ("now", "told"),
    [((2026, 3, 1, 2, 3, 4), "Mar  1 02:03:04"), ((2026, 12, 31, 23, 59, 59), "Dec 31 23:59:59")],
)
def test_the_time_of_a_line(syslog: Log, monkeypatch: pytest.MonkeyPatch, now: tuple[int, ...], told: str) -> None:
    monkeypatch.setattr(time, "localtime", lambda: time.struct_time((*now, 0, 0, 0)))
    SystemJournal("x").say("y")
    assert syslog.lines() == [f"<30>{told} x[{os.getpid()}]: y"]


@pytest.mark.parametrize("leftover", ["socket", "file"])
def test_a_journal_that_is_gone(paths: Path, syslog: Log, leftover: str) -> None:
    if leftover == "file":
        (paths / "journal").touch()
    else:
        Log(paths / "journal").socket.close()
    SystemJournal("x").say("y")
    assert len(syslog.lines()) == 1


def test_what_cannot_be_encoded(journal: Log) -> None:
    SystemJournal("x").say("a\udcffb")
    assert journal.lines()[0].startswith("MESSAGE=a\\udcffb\n")


def test_nobody_there(paths: Path) -> None:
    SystemJournal("x").say("y")
    assert list(paths.iterdir()) == []


def test_nobody_is_waited_for(journal: Log, syslog: Log) -> None:
    """A journald that hangs is behind /dev/log, too; a line is lost, and not the start of a VM."""
    journal.fill()
    SystemJournal("x").say("lost")
    assert not syslog.lines()
    assert "MESSAGE" not in "".join(journal.lines())
    SystemJournal("x").say("there")
    assert len(journal.lines()) == 1
    journal.socket.close()
    syslog.fill()
    SystemJournal("x").say("lost")
    assert "lost" not in "".join(syslog.lines())


def test_no_fd_stays_open(journal: Log) -> None:
    said = SystemJournal("x")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    for _ in range(20):
        said.say("y")
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
