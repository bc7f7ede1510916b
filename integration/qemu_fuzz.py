# SPDX-License-Identifier: BSD-2-Clause
"""Hostile command lines for qsteer-qemu: what reads and changes them, in one process (tests/fuzz_qemu).

``python -m integration.qemu_fuzz`` prints counts of what was tried.
"""

import argparse
import sys

from integration import sanitized
from integration.apt import ProvisionError
from integration.provision import CHECKOUT
from integration.sanitized import FuzzError

INPUTS = 200_000

_SOURCES = (
    CHECKOUT / "tests" / "fuzz_qemu" / "fuzz.c",
    sanitized.C / "qemu_nics.c",
    sanitized.C / "json.c",
)


def command_lines(inputs: int, *, seed: int) -> str:
    """What the in-process fuzzer says of its run.  Raises FuzzError, ProvisionError."""
    return sanitized.run_fuzzer(sanitized.program("qemu-fuzz", _SOURCES, ("-ljson-c",)), inputs, seed)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.qemu_fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=INPUTS, help="command lines (%(default)s)")
    options = parser.parse_args()
    try:
        for seed in (1, 2):
            print(command_lines(options.inputs // 2, seed=seed).strip(), flush=True)
    except (ProvisionError, FuzzError) as error:
        print(f"qemu_fuzz: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
