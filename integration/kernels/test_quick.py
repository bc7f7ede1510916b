# SPDX-License-Identifier: BSD-2-Clause
"""One kernel of the table with every run of all tests: the oldest, which lacks most."""

import subprocess
import sys
from pathlib import Path

import pytest

from integration.kernels import record
from integration.kernels.parts import PARTS
from integration.kernels.table import KERNELS

pytestmark = [pytest.mark.root, pytest.mark.guest]

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_part_on_the_oldest_kernel(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    chosen = ("tests", "--kernel", KERNELS[0].name, "--quick", "--results", str(results))
    command = [sys.executable, "-m", "integration.kernels", *chosen]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    counts = record.load(results)["kernels"][KERNELS[0].name]["parts"]
    assert counts.keys() == {part.name for part in PARTS if part.quick}
    assert all(count["passed"] and count.keys() == {"passed"} for count in counts.values())
