# SPDX-License-Identifier: BSD-2-Clause
"""Programs of c/ under AddressSanitizer and UndefinedBehaviorSanitizer, made once under build/, and fuzzers of them."""

import hashlib
import subprocess
from collections.abc import Sequence
from pathlib import Path

from integration.apt import run
from integration.provision import BUILD, CHECKOUT

C = CHECKOUT / "c"
_FLAGS = ("-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined")


class FuzzError(Exception):
    """Something gave way; ``str()`` says to what."""


def program(name: str, sources: Sequence[Path], libraries: Sequence[str] = ()) -> Path:
    """A program, named after what it is made of.  Raises ProvisionError."""
    inputs = (*sources, *sorted(C.glob("*.h")), *sorted((CHECKOUT / "tests").glob("*.h")))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in inputs)).hexdigest()
    binary = BUILD / f"{name}-{digest[:12]}"
    if not binary.exists():
        BUILD.mkdir(exist_ok=True)
        partial = BUILD / f"{name}.partial"
        flags = (*_FLAGS, "-fno-sanitize-recover=all", '-DQS_VERSION="sanitized"', f"-I{C}")
        run("gcc", *flags, "-o", partial, *sources, *libraries)
        for old in BUILD.glob(f"{name}-*"):
            old.unlink()
        partial.rename(binary)
    return binary


def run_fuzzer(fuzzer: Path, inputs: int, seed: int, *arguments: str) -> str:
    """What an in-process fuzzer says of its run.  Raises FuzzError."""
    command = [str(fuzzer), str(inputs), str(seed), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, check=False)
    if done.returncode:
        raise FuzzError(f"{' '.join(command)}: exit status {done.returncode}: {done.stdout}{done.stderr[-4000:]}")
    return done.stdout
