# SPDX-License-Identifier: BSD-2-Clause
"""make install and make uninstall, for real, under a PREFIX and a DESTDIR in temporary directories."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qsteer import kernel, programs
from qsteer.model import Source

ROOT = Path(__file__).parents[2]
LOAD_EVERYTHING = "import qsteer.kernel as k; print(*sorted(path.name for path in k.OBJECTS.iterdir()), k.__file__)"


def make(target: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """One make target with variables, not under the make that may have started the tests."""
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    variables = {"PYTHON": Path(sys.executable).resolve(), **variables}
    return subprocess.run(
        ("make", target, *(f"{name}={value}" for name, value in variables.items())),
        check=False,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def checkout() -> dict[Path, tuple[int, int]]:
    """Every file of the checkout but the caches: owner and time of change."""
    return {
        path: (path.lstat().st_uid, path.lstat().st_mtime_ns)
        for path in ROOT.rglob("*")
        if path.is_file() and not {"build", ".git", "__pycache__"} & set(path.relative_to(ROOT).parts)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Staged:
    """An installation under ``stage`` (DESTDIR) that is meant for ``prefix``, which does not exist."""

    stage: Path
    prefix: Path
    touched: tuple[Path, ...]

    @property
    def tree(self) -> Path:
        return self.stage / self.prefix.relative_to("/")


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Staged:
    """The one real installation of this module, over an older one."""
    directory = tmp_path_factory.mktemp("install")
    stage, prefix = directory / "a stage", directory / "prefix"
    older = Staged(stage=stage, prefix=prefix, touched=()).tree / "lib/qsteer"
    older.mkdir(parents=True)
    (older / ".from-make-install").touch()
    (older / "file-of-an-older-release").touch()
    before = checkout()
    done = make("install", DESTDIR=stage, PREFIX=prefix)
    assert done.returncode == 0, done.stderr
    assert not prefix.exists()
    after = checkout()
    touched = tuple(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    return Staged(stage=stage, prefix=prefix, touched=touched)


@pytest.fixture
def prefix(staged: Staged) -> Iterator[Path]:
    """A copy of the installation where it is meant to be."""
    shutil.copytree(staged.tree, staged.prefix, symlinks=True)
    yield staged.prefix
    shutil.rmtree(staged.prefix)


def test_the_checkout_is_left_as_it_was(staged: Staged) -> None:
    assert staged.touched == ()


def test_nothing_inside_knows_the_stage(staged: Staged) -> None:
    stage = os.fsencode(staged.stage)
    assert [path for path in staged.tree.rglob("*") if path.is_file() and stage in path.read_bytes()] == []
    assert [
        path for path in staged.tree.rglob("*") if path.is_symlink() and str(staged.stage) in str(path.readlink())
    ] == []


def test_it_runs_from_where_it_is_meant_to_be(prefix: Path) -> None:
    python = prefix / "lib/qsteer/bin/python"
    done = subprocess.run((python, "-I", "-c", LOAD_EVERYTHING), check=True, capture_output=True, text=True, cwd="/")
    *objects, module = done.stdout.split()
    assert objects == sorted(path.with_suffix(".o").name for path in (ROOT / "c/bpf").glob("*.bpf.c"))
    assert Path(module).is_relative_to(prefix)

    command = prefix / "bin/qsteer"
    assert (prefix / "bin" / command.readlink()).resolve() == (prefix / "lib/qsteer/bin/qsteer").resolve()
    done = subprocess.run((command, "--help"), check=False, capture_output=True, text=True, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert "qsteer" in done.stdout


def test_others_may_read_it(staged: Staged) -> None:
    """Whatever the umask of root is."""
    modes = [path.stat().st_mode for path in staged.tree.rglob("*") if not path.is_symlink()]
    assert all(mode & 0o044 == 0o044 for mode in modes)


def test_objects_have_btf_and_no_more(staged: Staged) -> None:
    for path in staged.tree.glob("lib/qsteer/lib/python3*/site-packages/qsteer/bpf/*.o"):
        content = path.read_bytes()
        assert b".BTF" in content
        assert b".debug_info" not in content
        assert os.fsencode(ROOT) not in content


def test_an_older_installation_is_replaced(staged: Staged) -> None:
    assert not (staged.tree / "lib/qsteer/file-of-an-older-release").exists()
    assert sorted(path.name for path in (staged.tree / "lib").iterdir()) == ["qsteer", "systemd"]


def test_the_unit_and_the_manual_page_are_found(prefix: Path) -> None:
    unit = (prefix / "lib/systemd/system/qsteer-keep.service").read_text()
    assert f"ExecStart={prefix}/bin/qsteer keep" in unit and "@PREFIX@" not in unit
    assert (prefix / "share/man/man8/qsteer.8").read_text() == (ROOT / "docs/qsteer.8").read_text()


def test_an_installation_that_fails_leaves_the_older_one(prefix: Path) -> None:
    done = make("install", PREFIX=prefix, CLANG="no-such-compiler")
    assert done.returncode != 0
    assert done.stderr.splitlines()[0] == "qsteer cannot be built without no-such-compiler (Debian package clang)"
    subprocess.run((prefix / "bin/qsteer", "--help"), check=True, capture_output=True)


def test_the_helper_has_no_privileges(staged: Staged) -> None:
    helper = staged.tree / "lib/qsteer/libexec/qsteer-bridge-helper"
    assert helper.stat().st_mode & 0o7777 == 0o755
    assert not os.listxattr(helper)


def test_the_wrapper_is_found_by_its_name(prefix: Path) -> None:
    """As libvirt is told to run it, and by another name: what it looks for is not here."""
    command = prefix / "bin/qsteer-qemu"
    assert command.resolve() == (prefix / "lib/qsteer/libexec/qsteer-qemu").resolve()
    another = prefix / "bin/qsteer-qemu-system-pdp11"
    another.symlink_to("qsteer-qemu")
    done = subprocess.run((another, "--version"), check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (127, "")
    assert done.stderr.startswith("qsteer-qemu: there is no qemu-system-pdp11 to run")


@pytest.mark.parametrize(
    "foreign",
    [
        "bin/qsteer",
        "bin/qsteer-ifup",
        "bin/qsteer-qemu",
        "lib/qsteer",
        "libexec/qsteer-bridge-helper",
        "lib/systemd/system/qsteer-keep.service",
    ],
)
@pytest.mark.parametrize("target", ["install", "uninstall"])
def test_what_is_not_ours_stays(tmp_path: Path, target: str, foreign: str) -> None:
    path = tmp_path / foreign
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    done = make(target, PREFIX=tmp_path)
    assert done.returncode != 0
    assert f"{path} is not from make install" in done.stderr.splitlines()[0]
    assert path.read_text() == "mine"


@pytest.mark.parametrize("bad", ["relative", "", "/with space", "/with'quote"])
def test_a_bad_prefix_is_refused(tmp_path: Path, bad: str) -> None:
    done = make("install", DESTDIR=tmp_path, PREFIX=bad)
    assert done.returncode != 0
    assert "PREFIX is an absolute path" in done.stderr.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.root
def test_uninstall_takes_exactly_that_and_leaves_taps_steered(prefix: Path) -> None:
    neighbour = prefix / "bin/another-command"
    neighbour.touch()
    tap = kernel.open_tap("qsuninstall", 2)
    try:
        program = programs.load_program(tap=tap.name, source=Source.SHARED_MAPS)
        kernel.attach(tap.fds[0], program.prog_fd)
        program.close()

        done = make("uninstall", PREFIX=prefix)
        assert done.returncode == 0, done.stderr
        assert "stay steered" in done.stdout
        left = {path.relative_to(prefix).as_posix() for path in prefix.rglob("*")}
        assert left == {"bin", "bin/another-command", "lib", "share"}

        attached = {queue.program_id for queue in kernel.open_queues() if queue.tap == tap.name}
        assert attached == {program.id}
        assert programs.body_present(programs.program_info(program.id))
    finally:
        tap.close()

    again = make("uninstall", PREFIX=prefix)
    assert (again.returncode, "not installed" in again.stdout) == (0, True)
