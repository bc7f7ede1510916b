# SPDX-License-Identifier: BSD-2-Clause
"""A running keep by its command line, and a QEMU's version by its own word."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsteer.others import asked_for_version, is_keep_of, keep_of, version

UUID = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/usr/local/bin/qsteer keep --all", True),
        ("/usr/bin/python3 -I /usr/local/bin/qsteer keep --all", True),
        ("/usr/bin/python3 -I /usr/local/bin/qsteer keep --help", False),
        ("qsteer keep --allow pause --vm=a", True),
        ("qsteer keep --vm b --pid a", False),
        ("qsteer keep --vm b --vm a", True),
        (f"qsteer keep --vm {UUID}", True),
        (f"qsteer keep --vm={UUID[:-1]}", False),
        ("qsteer keep --vm", False),
        ("qsteer keep --vm ab", False),
        ("python3 -m qsteer keep --vm a", True),
        ("qsteer apply --vm keep", False),
        ("qsteer apply --vm a", False),
        ("qsteer monitor --all", False),
        ("keep qsteer --all", False),
        ("qsteer status", False),
        ("vi qsteer.py keep", False),
        ("grep -r a b c d qsteer keep", False),
        ("su root -- qsteer keep --all", False),
        ("sudo qsteer keep --all", False),
        ("", False),
    ],
)
def test_a_running_keep(line: str, expected: bool) -> None:
    assert is_keep_of(("a", UUID), line.split()) is expected


def test_a_keep_of_nobody_in_particular() -> None:
    assert not is_keep_of((), ["qsteer", "keep", "--vm", "a"])
    assert is_keep_of((), ["qsteer", "keep", "--all"])


@contextmanager
def program(*argv: str, executable: str = "/bin/sh") -> Iterator[int]:
    """A process that calls itself so, and waits."""
    with subprocess.Popen(argv, executable=executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"ready\n"
        yield child.pid
        child.kill()


WAITS = ("-c", "echo ready; read line")


def test_a_keep_among_the_processes_of_the_host(tmp_path: Path) -> None:
    name = str(tmp_path)
    assert keep_of((name, "other")) is None
    script = tmp_path / "qsteer"
    script.write_text("print('ready', flush=True); input()")
    with program("python3", str(script), "keep", "--vm", name, executable=sys.executable) as pid:
        assert keep_of((name, "other")) == keep_of(("other", name)) == pid
        assert keep_of((f"{name}x",)) is None
    assert keep_of((name,)) is None


def test_a_command_line_alone_makes_no_keep(tmp_path: Path) -> None:
    """Anybody may start su(1), which is root's then, with words of their own."""
    script = tmp_path / "qsteer"
    script.write_text("echo ready; read line")
    with program("python3", str(script), "keep", "--all"):
        assert keep_of((str(tmp_path),)) is None


def qemu(tmp_path: Path, text: str) -> str:
    """A program by that name, which with an argument does what it is told to, and else waits."""
    path = tmp_path / "qemu-system-x86_64"
    source = tmp_path / "said.c"
    source.write_text(
        "#include <stdio.h>\n#include <unistd.h>\n"
        f'int main(int argc, char **argv) {{ if (argc == 2) {{ {text} return 0; }} puts("ready"); fflush(stdout);'
        " return getchar(); }\n"
    )
    subprocess.run(("cc", "-o", path, source), check=True, capture_output=True)
    return str(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('puts("QEMU emulator version 10.0.3 (Debian 1:10.0.3+ds-0+deb13u1)");', (10, 0)),
        ('puts("QEMU emulator version 7.2.22\\nCopyright");', (7, 2)),
        ('puts("QEMU emulator version 99999.1");', None),
        ('puts("version 10.0");', None),
        ("", None),
        ("sleep(600);", None),
    ],
)
def test_the_version_of_the_very_program_that_runs(tmp_path: Path, text: str, expected: object) -> None:
    path = qemu(tmp_path, text)
    with program("a name of no meaning", executable=path) as pid:
        Path(path).unlink()
        with asked_for_version(pid) as asked:
            assert asked and version(asked, 5.0 if "sleep" not in text else 0.2) == expected
        assert asked.poll() is not None


def test_what_is_no_qemu_is_not_asked() -> None:
    with program("qemu-system-x86_64", *WAITS) as pid, asked_for_version(pid) as asked:
        assert asked is None
    with asked_for_version(1 << 22) as asked:
        assert asked is None
    assert version(None) is None
