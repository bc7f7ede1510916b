# SPDX-License-Identifier: BSD-2-Clause
"""In-kernel RSS on real devices: under one kernel, one tun.ko after the other (``patched.py``), and what its tests say.

``python -m integration.kernels.hashing FILE GENERATION[:TESTS]... [--guests] [--bench]`` under a kernel (inside.py),
with the modules beside FILE, writes one JSON object a line for each: how its tests ended, by name.  With the last
module, ``--guests`` shows it to real guests, and ``--bench`` measures what steering costs.  TESTS is what pytest takes
for ``-k``.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from integration.guest import GuestError
from integration.kernels import boot, hashing_guests, inside, patched
from integration.kernels.boot import Outcome
from integration.kernels.parts import ENVIRONMENT
from integration.kernels.record import outcomes, properties
from integration.kernels.table import Kernel
from integration.kernels.vhost import DoesNotHoldError

TESTS = "tests/kernel/test_vnet_hash.py"
QUICK = "not (command_line or keep or clean)"
"""Without what starts the command line, which takes its time where all is emulated."""
DIFFERENT = "errnos or found or vectors or from_one or under_traffic"
"""What one generation does otherwise than another."""
TIMEOUT_S = 3600.0
DECOY = "decoy"
USERS = ("vhost_net", "vhost_iotlb", "tun")
"""What has to go before another tun can come, in this order; what is not there is no matter."""


KERNEL = "6.12"
"""For whose sources tun/ is."""
EVERY = ("12", "11", "8", "4", DECOY)


def run(kernel: Kernel, asked: Sequence[str], *, shared: Path, more: Sequence[str] = ()) -> tuple[Outcome, list[Any]]:
    """Make the modules, and run their tests under ``kernel``, and ``more``.  Gives the rows, too.

    Raises ProvisionError.
    """
    rows = shared / "rows.json"
    shared.mkdir(parents=True, exist_ok=True)
    rows.unlink(missing_ok=True)
    for one in asked:
        generation = one.partition(":")[0]
        shutil.copyfile(patched.module(kernel, generation), module_beside(rows, generation))
    command = (sys.executable, "-m", "integration.kernels.hashing", str(rows), *asked, *more)
    outcome = boot.run(kernel, command, shared=shared, timeout_s=TIMEOUT_S)
    return outcome, [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []


def module_beside(rows: Path, generation: str) -> Path:
    """Where a module lies for the other kernel."""
    return rows.with_name(f"tun-{generation}.ko")


def load(rows: Path, generation: str) -> None:
    """Have another tun."""
    for user in USERS:
        subprocess.run(("modprobe", "--remove", user), stderr=subprocess.DEVNULL, check=False)
    inside.set_up(module_beside(rows, generation))


def tests(rows: Path, asked: str) -> dict[str, Any]:
    """Load a module, and run its tests."""
    generation, _, some = asked.partition(":")
    load(rows, generation)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        chosen = ("-m", DECOY if generation == DECOY else "patched", *(("-k", some) if some else ()))
        options = ("-q", "-o", "cache_dir=/run/pytest", "-o", "junit_family=xunit1", f"--junitxml={report}", *chosen)
        environment = os.environ | ENVIRONMENT | {"QSTEER_TUN": generation}
        subprocess.run((sys.executable, "-m", "pytest", *options, TESTS), env=environment, check=False)
        switched = properties(report, "test_engines_change_under_traffic")
        return {"generation": generation, "tests": outcomes(report), "switched": switched}


def bench() -> dict[str, Any]:
    """Packets a second into a tap, by turns."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        subprocess.run((sys.executable, "-m", "integration.bench", "--only", "tap", "--out", str(out)), check=True)
        return {"bench": json.loads(out.read_text())}


def guests() -> dict[str, Any]:
    """What real guests get.  Raises GuestError, DoesNotHoldError."""
    return {"guests": hashing_guests.show()}


MORE = {"--guests": guests, "--bench": bench}


def main(arguments: Sequence[str]) -> int:
    path, *rest = arguments
    rows = Path(path)
    failed = False
    with rows.open("a") as file:
        for asked in rest:
            try:
                row = MORE[asked]() if asked in MORE else tests(rows, asked)
            except (GuestError, DoesNotHoldError) as error:
                print(f"{asked}: {error}", flush=True)
                failed = True
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            # No tests at all are a failure, too.
            failed |= "tests" in row and set(row["tests"].values()) != {"passed"}
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
