# SPDX-License-Identifier: BSD-2-Clause
"""The process that libvirt waits for: what its child says, or does not say in time, and what libvirt is told then."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qsteer import hookwork, libvirthook
from qsteer.hookfile import OPERATIONS, REFUSE, STARTED
from qsteer.notify import Priority

Word = Callable[[], None]
Why = Callable[[str], None]
Behaviour = Callable[[Word, Why, Word], None]
DEADLINE_S = 0.4


class Journal:
    """What was said by the parent; the child's would be lost with it."""

    said: tuple[tuple[str, Priority], ...] = ()

    def __init__(self, name: str, **fields: str) -> None:
        self.fields = fields

    def say(self, text: str, priority: Priority) -> None:
        Journal.said = (*Journal.said, (text, priority))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Behaviour], int]:
    """The hook for a domain, with a child that does as it is told."""
    monkeypatch.setattr(Journal, "said", ())
    monkeypatch.setattr(libvirthook, "SystemJournal", Journal)
    monkeypatch.setattr(libvirthook, "DEADLINE_S", DEADLINE_S)

    def called(operation: str, behave: Behaviour) -> int:
        def run(domain: str, of: str, xml: bytes, *, required: Word, refuse: Why, done: Word) -> None:
            assert (domain, of) == ("web1", operation)
            behave(required, refuse, done)

        monkeypatch.setattr(hookwork, "run", run)
        monkeypatch.setattr(sys, "argv", ["qsteer-libvirt-hook", "web1", operation, "begin", "-"])
        return libvirthook.main()

    return called


def fine(required: Word, refuse: Why, done: Word) -> None:
    done()


def fine_though_required(required: Word, refuse: Why, done: Word) -> None:
    required()
    done()


def refuses(required: Word, refuse: Why, done: Word) -> None:
    required()
    refuse("net0: done\nnot steered")
    done()


def dies(required: Word, refuse: Why, done: Word) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_required(required: Word, refuse: Why, done: Word) -> None:
    required()
    os.kill(os.getpid(), signal.SIGKILL)


def fails_required(required: Word, refuse: Why, done: Word) -> None:
    required()
    raise ImportError("no module\nof that name")


def hangs(required: Word, refuse: Why, done: Word) -> None:
    signal.pause()


def hangs_required(required: Word, refuse: Why, done: Word) -> None:
    required()
    signal.pause()


def goes_on(required: Word, refuse: Why, done: Word) -> None:
    done()
    signal.alarm(20)  # should this test forget it
    signal.pause()


GIVEN_UP = f"not done within {DEADLINE_S:g} s, given up"
CASES: dict[str, tuple[Behaviour, bool, str]] = {
    # behaviour, whether a start is refused, what the journal has of it
    "fine": (fine, False, ""),
    "fine, though required": (fine_though_required, False, ""),
    "refused": (refuses, True, ""),
    "it dies": (dies, False, "qsteer failed"),
    "it dies, required": (dies_required, True, "qsteer failed"),
    "it fails, required": (fails_required, True, "ImportError: no module?of that name"),
    "it hangs": (hangs, False, GIVEN_UP),
    "it hangs, required": (hangs_required, True, GIVEN_UP),
    "it goes on": (goes_on, False, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_a_start(call: Callable[[str, Behaviour], int], case: str, capfd: pytest.CaptureFixture[str]) -> None:
    behave, is_refused, told = CASES[case]
    began = time.monotonic()
    assert call(STARTED, behave) == (REFUSE if is_refused else 0)
    took_s = time.monotonic() - began
    assert took_s >= DEADLINE_S if told == GIVEN_UP else took_s < 5
    assert took_s < DEADLINE_S + 5
    end = "; steering is required, the start is refused" if is_refused else ""
    assert Journal.said == (((f"web1: started: {told}{end}", Priority.WARNING),) if told else ())
    err = capfd.readouterr().err
    assert len(err.splitlines()) == is_refused and err.endswith("steering is required\n" if is_refused else "")


@pytest.mark.parametrize("operation", [one for one in OPERATIONS if one != STARTED])
@pytest.mark.parametrize("case", ["it dies, required", "it fails, required", "it hangs, required"])
def test_nothing_else_is_refused(
    call: Callable[[str, Behaviour], int], operation: str, case: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A daemon that is restarted would end the domain."""
    behave, _, told = CASES[case]
    assert call(operation, behave) == 0
    assert Journal.said == ((f"web1: {operation}: {told}", Priority.WARNING),)
    assert not capfd.readouterr().err


def test_the_child_has_nothing_of_libvirts(call: Callable[[str, Behaviour], int], tmp_path: Path) -> None:
    """Neither a pipe that libvirt waits for, nor its session or folder."""
    found = tmp_path / "found"

    def look(required: Word, refuse: Why, done: Word) -> None:
        streams = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(3)]  # noqa: PTH115
        found.write_text(f"{streams} {os.getsid(0) == os.getpid()} {os.getcwd()}")  # noqa: PTH109
        done()

    assert call(STARTED, look) == 0
    assert found.read_text() == "['/dev/null', '/dev/null', '/dev/null'] True /"


@pytest.mark.parametrize("operation", ["prepare", "start", "stopped", "", "Started"])
def test_other_operations_are_nothing_to_it(operation: str, call: Callable[[str, Behaviour], int]) -> None:
    assert call(operation, dies_required) == 0
    assert not Journal.said


@pytest.mark.parametrize("arguments", [(), ("web1",), ("web1", "started", "begin"), ("a", "b", "c", "d", "e")])
def test_only_libvirt_calls_it(
    arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["qsteer-libvirt-hook", *arguments])
    assert libvirthook.main() == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
