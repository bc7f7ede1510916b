# SPDX-License-Identifier: BSD-2-Clause
"""Which builds of the steering program this kernel loads; where the shared body is missing, what qsteer says and does.

The shared body calls bpf_cast_to_kern_ctx (Linux 6.2).  Whether the kernel has it decides what is right here, so that
either outcome is a failure on the other sort of kernel.
"""

import json
import logging
import os
from collections.abc import Iterator

import pytest

from qsteer import programs
from qsteer.errors import UnsupportedError
from qsteer.model import Build, Source
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import private, standin, support

pytestmark = pytest.mark.root

HAS_THE_CALL = Build.SHARED_BODY in support.BUILDS
CONFIG = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(2, 0, 3, 1))
REASON = "cannot load the shared body: Operation not supported"


@pytest.fixture(autouse=True)
def own_memory(need_root: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No body is pinned, and this process has not tried yet."""
    monkeypatch.setattr(programs, "_refused", None)
    with private.memory():
        yield


def check_queues(program: programs.Program) -> None:
    for packet in standin.PACKETS:
        assert programs.run_program(program.prog_fd, packet).queue == queue_of(packet, CONFIG)


def test_the_complete_build() -> None:
    program = programs.load_program(tap="qs-tap", source=Source.STATIC, config=CONFIG, build=Build.COMPLETE)
    check_queues(program)
    program.close()


def test_the_shared_body() -> None:
    """It loads, and is pinned; or the refusal is one line, which says what is missing."""
    if HAS_THE_CALL:
        program = programs.load_program(tap="qs-tap", source=Source.STATIC, config=CONFIG, build=Build.SHARED_BODY)
        check_queues(program)
        assert list(private.pins()) == [str(programs.bodies_pin().relative_to(private.PINS))]
        program.close()
        return
    with pytest.raises(UnsupportedError) as caught:
        programs.load_program(tap="qs-tap", source=Source.STATIC, config=CONFIG, build=Build.SHARED_BODY)
    assert str(caught.value) == REASON
    assert caught.value.hint == "this kernel lacks what the program calls: -vv"
    assert private.pins() == {}


def test_what_is_loaded_where_nobody_chooses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qsteer"):
        program = programs.load_program(tap="qs-tap", source=Source.STATIC, config=CONFIG)
    check_queues(program)
    info = programs.program_info(program.id)
    program.close()
    said = [record.getMessage() for record in caplog.records]
    if HAS_THE_CALL:
        assert (program.build, said) == (Build.SHARED_BODY, [])
    else:
        assert (program.build, said) == (Build.COMPLETE, [f"no shared body ({REASON}): a complete program instead"])
    assert info.ident and info.ident.build is program.build


def test_what_users_see(tap: support.TapUnderTest) -> None:
    """A kernel that lacks something is no news to somebody who steers a tap, but to somebody who asks."""
    dev = ("--dev", tap.name, "--pid", str(os.getpid()))
    done = support.qsteer("apply", *dev)
    assert (done.returncode, done.stderr) == (0, "")
    (shown,) = json.loads(support.qsteer("status", *dev, "--json").stdout)["taps"]
    assert shown["program"]["build"] == (Build.SHARED_BODY if HAS_THE_CALL else Build.COMPLETE)
    assert shown["state"] == "ok"
    about_it = [f"qsteer: no shared body ({REASON}): a complete program instead"] * (not HAS_THE_CALL)
    asked = support.qsteer("apply", "--equal", "2", "-v", *dev)
    assert [line for line in support.lines(asked.stderr) if "body" in line] == about_it
    asked = support.qsteer("apply", "--equal", "3", "-vv", *dev)
    assert ("'bpf_cast_to_kern_ctx': not found in kernel or module BTFs" in asked.stderr) != HAS_THE_CALL
