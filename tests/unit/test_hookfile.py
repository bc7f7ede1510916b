# SPDX-License-Identifier: BSD-2-Clause
"""The script that libvirt calls, run by the system's shell; and how it gets into its place, and out of it."""

import shlex
import stat
import subprocess
import sysconfig
import time
from pathlib import Path

import pytest

from qsteer import cli, hookfile
from qsteer.errors import NotFoundError, QsteerError
from qsteer.hookfile import MARK, NAME, OPERATIONS, REFUSE

XML = "<domain type='kvm'>\n<name>web 1</name>\n</domain>\n"
LIBVIRTS = ("prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach")
"""Every operation of libvirt's qemu hook."""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def hook_of(path: Path, text: str) -> Path:
    """A hook, which Python reads, that does what a shell's text says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"import os, sys\nos.execv('/bin/sh', ['sh', '-c', {text!r}, 'sh', *sys.argv[1:]])\n")
    return path


def run(script: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it, with a logger(1) that writes into a file beside it."""
    logger = f'#!/bin/sh\nprintf "%s\\n" "$*" >>{shlex.quote(str(script.parent / "log"))}\n'
    if not (script.parent / "bin").exists():  # nobody waits for one that runs already
        executable(script.parent / "bin" / "logger", logger)
    path = f"{script.parent / 'bin'}:/usr/bin:/bin"
    return subprocess.run(
        (script, *arguments), input=XML, capture_output=True, text=True, timeout=20, check=False, env={"PATH": path}
    )


def calls(tmp_path: Path, hook: Path, operation: str, ends: str = "exit 0") -> tuple[int, str]:
    """The script, with a hook that tells what it was given: its exit code, and what that was."""
    told = tmp_path / "told"
    told.unlink(missing_ok=True)
    hook_of(hook, f'{{ printf "%s|" "$@"; cat; }} >{shlex.quote(str(told))}\n{ends}\n')
    done = run(executable(tmp_path / "script", hookfile.text(hook)), "web 1", operation, "begin", "-")
    assert not done.stdout
    return done.returncode, told.read_text() if told.exists() else ""


# --- What it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", [*LIBVIRTS, "", "started ", "start*", "started|release"])
def test_what_the_hook_is_started_for(tmp_path: Path, operation: str) -> None:
    """With what libvirt gives, each argument as it is."""
    code, told = calls(tmp_path, tmp_path / "hook", operation)
    assert (code, told) == (0, f"web 1|{operation}|begin|-|{XML}" if operation in OPERATIONS else "")


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("ends", "code"),
    [
        ("exit 0", 0),
        (f"exit {REFUSE}", 1),
        ("exit 1", 0),
        ("exit 2", 0),
        (f"exit {REFUSE + 1}", 0),
        ("exit 127", 0),
        ("exit 255", 0),
        ("kill -KILL $$", 0),
        ("kill -TERM $$", 0),
        (f"kill -{REFUSE} $$", 0),
    ],
)
def test_no_failure_but_one_is_passed_on(tmp_path: Path, operation: str, ends: str, code: int) -> None:
    done, told = calls(tmp_path, tmp_path / "hook", operation, ends)
    assert told and done == code


@pytest.mark.parametrize("name", ["hook", "a hook", "a'hook\"", "$(hook)", "hook;exit 1", "-n", "h\\ook\n", "ä"])
def test_wherever_the_hook_is(tmp_path: Path, name: str) -> None:
    assert calls(tmp_path, tmp_path / name / name, "started", f"exit {REFUSE}")[0] == 1


def wait_for_log(tmp_path: Path, lines: int) -> list[str]:
    """So many lines that were given to logger(1), for which nobody waits."""
    log, deadline = tmp_path / "log", time.monotonic() + 20
    while not log.exists() or len(log.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, "nothing was logged"
        time.sleep(0.02)
    return log.read_text().splitlines()


@pytest.mark.parametrize(("ends", "status"), [("exit 1", 1), ("kill -KILL $$", 137), ("exit 127", 127)])
def test_a_hook_that_fails_is_told(tmp_path: Path, ends: str, status: int) -> None:
    calls(tmp_path, tmp_path / "hook", "started", ends)
    told = f"-t {NAME} -p daemon.warning -- web 1: started: {NAME} does not run: exit status {status}"
    assert wait_for_log(tmp_path, 1) == [told]


@pytest.mark.parametrize("ends", ["exit 0", f"exit {REFUSE}"])
def test_a_hook_that_does_not_fail_has_nothing_to_be_told(tmp_path: Path, ends: str) -> None:
    calls(tmp_path, tmp_path / "hook", "started", ends)
    calls(tmp_path, tmp_path / "hook", "started", "exit 3")
    assert len(wait_for_log(tmp_path, 1)) == 1


def test_nobody_waits_for_a_log_that_hangs(tmp_path: Path) -> None:
    script = executable(tmp_path / "script", hookfile.text(tmp_path / "missing"))
    executable(tmp_path / "bin" / "logger", "#!/bin/sh\nexec sleep 60\n")
    began = time.monotonic()
    done = subprocess.run(
        (script, "-s", "started", "begin", "-"),
        capture_output=True,
        timeout=20,
        check=False,
        env={"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"},
    )
    assert done.returncode == 0 and time.monotonic() - began < 10


def test_without_the_hook_domains_start(tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    script = executable(tmp_path / "script", hookfile.text(hook))

    def code() -> int:
        return run(script, "web1", "started", "begin", "-").returncode

    assert code() == 0
    hook.symlink_to("nowhere")
    assert code() == 0
    hook.unlink()
    hook.mkdir()
    assert code() == 0
    hook.rmdir()
    hook.write_text("raise SystemError\n")
    assert code() == 0
    assert len(wait_for_log(tmp_path, 4)) == 4
    hook_of(hook, f"exit {REFUSE}")
    assert code() == 1
    executable(script, hookfile.text(hook, "/nonexistent/python"))
    assert code() == 0


def test_without_arguments_it_does_nothing(tmp_path: Path) -> None:
    hook = hook_of(tmp_path / "hook", f"exit {REFUSE}")
    script = executable(tmp_path / "script", hookfile.text(hook))
    assert [run(script, *arguments).returncode for arguments in ((), ("web1",), ("web1", "started"))] == [0, 0, 1]


def test_it_says_whose_it_is(tmp_path: Path) -> None:
    lines = hookfile.text(tmp_path / "hook").splitlines()
    assert (lines[0], lines[1]) == ("#!/bin/sh", MARK)
    assert any("SPDX-License-Identifier: BSD-2-Clause" in line for line in lines)


# --- How it gets there -----------------------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where it is to be, of a libvirt and a hook that are there."""
    hooks = tmp_path / "libvirt" / "hooks"
    hooks.parent.mkdir()
    monkeypatch.setattr(hookfile, "HOOKS", hooks)
    monkeypatch.setattr(hookfile, "SCRIPT", hooks / "qemu.d" / "50-qsteer")
    executable(tmp_path / "bin" / NAME, "#!/bin/sh\nexit 0\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path / "bin"))
    return hookfile.SCRIPT


def modes(*paths: Path) -> list[int]:
    return [stat.S_IMODE(path.stat().st_mode) for path in paths]


def test_install_and_uninstall(script: Path, tmp_path: Path) -> None:
    assert not hookfile.is_installed()
    assert hookfile.install()
    assert script.read_text() == hookfile.text(tmp_path / "bin" / NAME)
    assert modes(script) == [0o755]
    assert list(script.parent.iterdir()) == [script]
    assert hookfile.is_installed()
    assert hookfile.uninstall()
    assert not script.parent.exists() and hookfile.HOOKS.is_dir()
    assert not hookfile.uninstall()


def test_what_is_there_already_is_not_written_again(script: Path) -> None:
    assert hookfile.install()
    before = script.stat()
    assert not hookfile.install()
    assert script.stat() == before


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o644),
        lambda path: path.write_text(path.read_text().replace("exit 0", "exit 3")),
        lambda path: path.write_text(f"{MARK}\n"),
        lambda path: path.write_bytes(path.read_bytes() + b"\xff"),
    ],
    ids=["without the right to run", "of another version", "cut off", "with noise"],
)
def test_what_is_not_as_it_should_be_is_written_again(script: Path, change: object) -> None:
    assert callable(change)
    assert hookfile.install()
    wanted = script.read_text()
    change(script)
    assert hookfile.install()
    assert script.read_text() == wanted
    assert modes(script) == [0o755]


FOREIGN = {
    "empty": "",
    "another's": "#!/bin/sh\nexit 0\n",
    "with the mark further down": f"#!/bin/sh\n# mine\n{MARK}\n",
    "with some of the mark": f"#!/bin/sh\n{MARK[:-1]}\n",
    "with more than the mark": f"#!/bin/sh\n {MARK}\n",
}


@pytest.mark.parametrize("case", FOREIGN)
def test_somebody_elses_file_stays(script: Path, case: str) -> None:
    script.parent.mkdir(parents=True)
    script.write_text(FOREIGN[case])
    for call in (hookfile.install, hookfile.uninstall, hookfile.is_installed):
        with pytest.raises(QsteerError) as caught:
            call()
        assert str(caught.value) == f"{script} is there, and was not written by qsteer"
        assert caught.value.hint == "move it away"
    assert script.read_text() == FOREIGN[case]
    assert list(script.parent.iterdir()) == [script]


def test_what_is_no_file(script: Path) -> None:
    script.mkdir(parents=True)
    for call in (hookfile.install, hookfile.uninstall, hookfile.is_installed):
        with pytest.raises(QsteerError, match="Is a directory"):
            call()


def test_other_hooks_stay(script: Path) -> None:
    other = executable(script.with_name("40-other"), "#!/bin/sh\n")
    assert hookfile.install() and hookfile.uninstall()
    assert list(script.parent.iterdir()) == [other]


@pytest.mark.parametrize("is_link", [False, True])
def test_what_a_killed_qsteer_has_left(script: Path, tmp_path: Path, is_link: bool) -> None:
    script.parent.mkdir(parents=True)
    left = hookfile.HOOKS / f".{script.name}.new"
    if is_link:
        left.symlink_to(tmp_path / "elsewhere")
    else:
        left.write_text("half")
    assert hookfile.install()
    assert list(script.parent.iterdir()) == [script] and not script.is_symlink()
    assert not (tmp_path / "elsewhere").exists() and not left.exists()


def test_a_write_that_fails_leaves_what_was_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hookfile.install()
    executable(script, f"#!/bin/sh\n{MARK}\n# of another version\n")
    before = script.read_text()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(QsteerError, match=rf"cannot write {script}: No space left"):
        hookfile.install()
    assert {path.name: path.read_text() for path in script.parent.iterdir()} == {script.name: before}


def test_no_libvirt(script: Path) -> None:
    hookfile.HOOKS.parent.rmdir()
    with pytest.raises(NotFoundError, match="is libvirt on this host"):
        hookfile.install()
    assert not hookfile.HOOKS.parent.exists()
    assert not hookfile.uninstall()


def test_no_hook(script: Path, tmp_path: Path) -> None:
    (tmp_path / "bin" / NAME).chmod(0o644)
    with pytest.raises(NotFoundError) as caught:
        hookfile.install()
    assert str(caught.value) == f"{tmp_path / 'bin' / NAME} is missing"
    assert caught.value.hint == "make install puts it there"
    assert not hookfile.HOOKS.exists()


# --- What is printed -------------------------------------------------------------------------------------------------


def said(capsys: pytest.CaptureFixture[str], *command: str) -> str:
    assert cli.command(["libvirt", *command]) == 0
    printed = capsys.readouterr()
    assert not printed.err
    return printed.out.splitlines()[0]


def test_what_the_verbs_print(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, "uninstall") == f"{script}: is not there"
    assert said(capsys, "install", "-n") == f"{script}:"
    assert not script.exists()
    assert said(capsys, "install") == f"{script}: written"
    assert said(capsys, "install") == f"{script}: unchanged"
    assert said(capsys, "uninstall", "-n") == f"{script}: to be removed"
    assert said(capsys, "install", "--uninstall", "--dry-run") == f"{script}: to be removed"
    assert script.exists()
    assert said(capsys, "install", "--uninstall") == f"{script}: removed; what is steered stays steered"
    assert not script.exists()
