# SPDX-License-Identifier: BSD-2-Clause
"""QSTEER_STRICT: a skip, wherever it comes from, is a failure that names what is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SKIPS = {
    "call": "import pytest\ndef test_it(): pytest.skip('no frobnicator')\n",
    "mark": "import pytest\n@pytest.mark.skip(reason='no frobnicator')\ndef test_it(): pass\n",
    "module": "import pytest\npytest.skip('no frobnicator', allow_module_level=True)\n",
}
XFAIL = "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False\n"


def pytest_on(directory: Path, text: str, *, strict: bool) -> tuple[int, str]:
    """Exit status and output of a pytest of its own, under the project's conftest.py, on one test file."""
    shutil.copy(ROOT / "conftest.py", directory)
    (directory / "pytest.ini").write_text("[pytest]\n")
    (directory / "test_it.py").write_text(text)
    environment = {**os.environ, "QSTEER_STRICT": "1" if strict else "0"}
    command = (sys.executable, "-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider")
    done = subprocess.run(command, check=False, cwd=directory, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize("kind", SKIPS)
def test_a_skip_fails(tmp_path: Path, kind: str) -> None:
    status, output = pytest_on(tmp_path, SKIPS[kind], strict=True)
    assert status != 0, output
    assert "no frobnicator" in output
    assert "QSTEER_STRICT" in output


def test_a_skip_is_a_skip_otherwise(tmp_path: Path) -> None:
    status, output = pytest_on(tmp_path, SKIPS["call"], strict=False)
    assert (status, "1 skipped" in output) == (0, True), output


def test_an_expected_failure_is_not_a_skip(tmp_path: Path) -> None:
    status, output = pytest_on(tmp_path, XFAIL, strict=True)
    assert (status, "1 xfailed" in output) == (0, True), output
