# SPDX-License-Identifier: BSD-2-Clause
"""In-kernel RSS of each generation with every run of all tests, on a stock kernel with a tun.ko of our own."""

from pathlib import Path

import pytest

from integration.kernels import hashing
from integration.kernels.table import KERNELS

pytestmark = [pytest.mark.root, pytest.mark.guest]

GENERATIONS = (
    "12",
    f"8:{hashing.QUICK}",
    f"11:{hashing.DIFFERENT}",
    f"4:{hashing.DIFFERENT}",
    hashing.DECOY,
)


def test_in_kernel_rss_of_every_generation(tmp_path: Path) -> None:
    (kernel,) = (kernel for kernel in KERNELS if kernel.name == hashing.KERNEL)
    outcome, rows = hashing.run(kernel, GENERATIONS, shared=tmp_path / "shared")
    counts = {row["generation"]: len(row["tests"]) for row in rows}
    bad = [
        f"{row['generation']}: {test}: {how}" for row in rows for test, how in row["tests"].items() if how != "passed"
    ]
    assert not bad and outcome.status == 0, "\n".join((*bad, outcome.output[-6000:]))
    assert counts.pop(hashing.DECOY) == 1
    assert counts.keys() == {"12", "8", "11", "4"} and min(counts.values()) > 20
