# SPDX-License-Identifier: BSD-2-Clause
"""How the package is built, what happens where a tool is missing, and the steps around it (Debian packages, CI)."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import qsteer

ROOT = Path(__file__).parents[2]
PACKAGED = ("c", "qsteer", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")

NO_PYTHON_H = """
import runpy, sys, sysconfig
sysconfig.get_path = lambda name: "/nonexistent"
sys.argv = ["setup.py", "build"]
runpy.run_path("setup.py")
"""


def run(*command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command without the variables of a make above it, and with those given."""
    clean = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "CC", "CLANG")}
    return subprocess.run(
        command, check=False, cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, timeout=120
    )


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the package is made from, with nothing compiled in it."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("sources")
    for name in PACKAGED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*.o", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy)
    return copy


def assert_one_line(done: subprocess.CompletedProcess[str], sources: Path, *words: str) -> None:
    assert done.returncode != 0
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines
    assert not (sources / "build").exists(), "something was compiled"


@pytest.mark.parametrize(("variable", "package"), [("CLANG", "clang"), ("CC", "gcc")])
def test_a_missing_compiler_is_one_line(sources: Path, variable: str, package: str) -> None:
    done = run(sys.executable, "setup.py", "build", cwd=sources, **{variable: "no-such-compiler"})
    assert_one_line(done, sources, "no-such-compiler", f"Debian package {package}")


@pytest.mark.parametrize(
    ("header", "package"),
    [("stdlib.h", "libc6-dev"), ("linux/bpf.h", "linux-libc-dev"), ("bpf/libbpf.h", "libbpf-dev")],
)
def test_a_missing_header_is_one_line(sources: Path, tmp_path: Path, header: str, package: str) -> None:
    compiler = tmp_path / "cc"
    script(compiler, f'case "$*" in *{header}*) exit 1;; esac\nexec gcc "$@"')
    done = run(sys.executable, "setup.py", "build", cwd=sources, CC=str(compiler))
    assert_one_line(done, sources, header, f"Debian package {package}")


def test_a_missing_python_header_is_one_line(sources: Path) -> None:
    done = run(sys.executable, "-c", NO_PYTHON_H, cwd=sources)
    assert_one_line(done, sources, "Python.h", "Debian package python3-dev")


def test_source_distribution_has_the_c_sources(sources: Path, tmp_path: Path) -> None:
    """And takes no compiler to make."""
    done = run(
        *(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(tmp_path)),
        cwd=sources,
        CLANG="no-such-compiler",
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / f"qsteer-{qsteer.__version__}.tar.gz") as archive:
        inside = {Path(*Path(name).parts[1:]) for name in archive.getnames()}
    c_sources = {path.relative_to(sources) for path in (sources / "c").rglob("*") if path.is_file()}
    assert c_sources <= inside
    assert {Path("LICENSE"), Path("README.md"), Path("qsteer/shim_build.py")} <= inside


def test_version_is_said_once() -> None:
    try:
        installed = importlib.metadata.version("qsteer")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("qsteer is not installed in this environment: make build")
    assert installed == qsteer.__version__


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A directory for PATH: a Debian with every package but cpio and kmod, whose apt-get writes down its call."""
    path = tmp_path / "bin"
    script(path / "dpkg-query", 'case "$*" in *cpio|*kmod) exit 1;; esac\nprintf installed')
    script(path / "apt-get", f'echo "$@" >> {tmp_path}/apt')
    for tool in ("env", "find", "sh"):
        (path / tool).symlink_to(shutil.which(tool) or tool)
    return path


def packages(path: Path) -> subprocess.CompletedProcess[str]:
    return run(shutil.which("make") or "make", "packages", cwd=ROOT, PATH=str(path))


def test_only_missing_packages_are_installed(host: Path, tmp_path: Path) -> None:
    script(host / "id", "echo 0")
    done = packages(host)
    assert done.returncode == 0, done.stderr
    update, install = (tmp_path / "apt").read_text().splitlines()
    assert update.split()[0] == "update"
    assert [word for word in install.split() if not word.startswith("-")] == ["install", "cpio", "kmod"]
    assert "--no-remove" in install


def test_a_user_gets_packages_through_sudo(host: Path, tmp_path: Path) -> None:
    script(host / "id", "echo 1000")
    script(host / "sudo", f'echo "$@" >> {tmp_path}/sudo\nexec "$@"')
    assert packages(host).returncode == 0
    assert "cpio kmod" in (tmp_path / "sudo").read_text()
    assert "cpio kmod" in (tmp_path / "apt").read_text()


def test_a_user_without_sudo_is_told_what_to_install(host: Path, tmp_path: Path) -> None:
    script(host / "id", "echo 1000")
    done = packages(host)
    assert done.returncode != 0
    assert "as root: apt-get install cpio kmod" in done.stderr.splitlines()[0]
    assert not (tmp_path / "apt").exists()


@pytest.mark.parametrize(("status", "closing"), [(0, "=== 3 passed in 0.10s ==="), (1, "=== 1 failed in 0.10s ===")])
def test_ci_runs_what_is_committed(tmp_path: Path, status: int, closing: str) -> None:
    """Strictly, in a tree of its own; the closing line comes last, and the exit status is that of the tests."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    (tmp_path / "Makefile").write_text(
        f"test:\n\t@ls; echo strict $$QSTEER_STRICT; echo '{closing}'; echo later; exit {status}\n"
    )
    (tmp_path / ".gitignore").write_text("build\n")
    for command in (
        ("init", "--quiet"),
        ("add", "."),
        ("-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "--message", "t"),
    ):
        assert run("git", *command, cwd=tmp_path).returncode == 0
    (tmp_path / "left-over").touch()
    done = run(".ci/run", cwd=tmp_path)
    assert (done.returncode == 0) == (status == 0)
    assert done.stdout.splitlines()[-1] == closing
    assert "strict 1" in done.stdout
    assert "left-over" not in done.stdout
