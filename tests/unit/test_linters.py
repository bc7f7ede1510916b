# SPDX-License-Identifier: BSD-2-Clause
"""Formatters, linters and the type checker, each as a test that fails with what the tool says."""

import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON_SOURCES = ("qsteer", "tests", "integration", "conftest.py", "setup.py")
SPDX = "SPDX-License-Identifier:"
NO_SPDX = {"LICENSE"}
NO_SPDX_SUFFIXES = {".md", ".json", ".txt", ".typed"}


@cache
def sources() -> tuple[Path, ...]:
    """Every file of the project, relative to ROOT: what git knows or would add; all of an unpacked archive."""
    if (ROOT / ".git").exists():
        git = ("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        listed = subprocess.run(git, check=True, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
        found = [Path(name) for name in listed if name and (ROOT / name).is_file()]
    else:
        made = {"build", "dist", "__pycache__", "qsteer.egg-info"}
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
        found = [path for path in found if not made & set(path.parts) and path.suffix not in (".so", ".o")]
    return tuple(sorted(found))


def text_of(path: Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def run(tool: str, *arguments: str) -> None:
    """Run a tool of this virtual environment, or of the system; what it says is the failure."""
    beside = Path(sys.executable).parent / tool
    program = str(beside) if beside.exists() else shutil.which(tool)
    if not program:
        pytest.skip(f"{tool} is missing: pip install '.[test]'")
    done = subprocess.run(
        (program, *arguments), check=False, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        pytest.fail(done.stdout or f"{tool}: exit status {done.returncode}", pytrace=False)


def test_python_format() -> None:
    run("ruff", "format", "--check", "--diff", "--quiet", *PYTHON_SOURCES)


def test_python_lint() -> None:
    run("ruff", "check", "--quiet", *PYTHON_SOURCES)


def test_python_types() -> None:
    run("mypy", "--strict", "--no-error-summary", *PYTHON_SOURCES)


def test_c_format() -> None:
    run("clang-format", "--dry-run", "-Werror", *(str(path) for path in sources() if path.suffix in (".c", ".h")))


def test_licence_is_named_in_every_file() -> None:
    wanted = [path for path in sources() if path.name not in NO_SPDX and path.suffix not in NO_SPDX_SUFFIXES]
    assert wanted
    assert [str(path) for path in wanted if SPDX not in "".join(text_of(path).splitlines(keepends=True)[:3])] == []


def test_no_path_of_one_machine() -> None:
    """No file names this checkout, a home directory, or another place that only its author has."""
    private = [r"/home/\w", r"/Users/\w", r"/root/\w"]
    if len(ROOT.parts) > 2:
        private.append(re.escape(str(ROOT)) + r"\b")
    # Not in the middle of a longer path: a root file system of a guest, say.
    pattern = re.compile(rf"(?<![\w.$)}}-])(?:{'|'.join(private)})")
    me = Path(__file__).relative_to(ROOT)
    assert [
        f"{path}:{number}: {line}"
        for path in sources()
        if path != me
        for number, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ] == []
