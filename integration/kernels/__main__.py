# SPDX-License-Identifier: BSD-2-Clause
"""``make test-kernels``: on every kernel of the table the chosen tests, then real guests, QEMU by QEMU; and vhost.

Each part of a run stands for itself: what fails is told at the end, when everything else has had its turn.  Results go
to build/kernels/results.json; with ``--save`` also to docs/support.json, and docs/support.md is written anew.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from integration import provision
from integration.agent_guest import with_agent
from integration.apt import ProvisionError
from integration.kernels import boot, document, hashing, record
from integration.kernels.guests import QEMUS
from integration.kernels.parts import ENVIRONMENT, PARTS
from integration.kernels.table import KERNELS, Kernel
from integration.provision import BUILD

SHARED = BUILD / "kernels" / "shared"
TIMEOUT_S = 5400.0
VHOST_KERNEL = "6.12"
VHOST_QEMUS = ("10.0", "11.1")
PART_NAMES = ("tests", "rights", "guests", "vhost", "hashing")
WITH_GUESTS = frozenset(("guests", "vhost", "hashing"))


class FailedError(Exception):
    """A part of the run does not hold; ``str()`` says which and why in one line."""


class Run:
    """What was asked for, and what was found so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.found = record.empty()
        self._options = options

    def tests(self, kernel: Kernel) -> None:
        """The chosen part of tests/kernel.  Raises FailedError, ProvisionError."""
        parts = [part for part in PARTS if part.quick or not self._options.quick]
        shared = SHARED / f"{kernel.name}-tests"
        report = shared / "report.xml"
        report.unlink(missing_ok=True)
        variables = (f"{name}={value}" for name, value in ENVIRONMENT.items())
        pytest = ("env", *variables, sys.executable, "-m", "pytest", "-v", "-o", "cache_dir=/run/pytest")
        ids = (test for part in parts for test in part.tests)
        outcome = boot.run(kernel, (*pytest, f"--junitxml={report}", *ids), shared=shared, timeout_s=TIMEOUT_S)
        if outcome.status is None or not report.exists():
            raise FailedError(f"the tests did not come to an end: {_last_line(outcome.output)}")
        row = record.of_tests(kernel, boot.unpacked(kernel), parts, report)
        self.found["kernels"][kernel.name] = row
        if outcome.status:
            raise FailedError(f"tests fail: {_last_line(outcome.output)}")

    def guests(self, kernel: Kernel) -> None:
        """Every source with every QEMU.  Raises FailedError, ProvisionError."""
        try:
            self._inside(kernel, "guests", "cells", record.cell_key, self._options.qemu or tuple(QEMUS))
        finally:
            measured = {key: row for key, row in self.found["cells"].items() if row["kernel"] == kernel.name}
            wrong = record.worse(record.load(record.RECORD), {"cells": measured})
        if wrong:
            raise FailedError("; ".join(wrong))

    def vhost(self, kernel: Kernel) -> None:
        """What a guest's RSS comes to with vhost=on.  Raises FailedError, ProvisionError."""
        self._inside(
            kernel,
            "vhost",
            "vhost",
            lambda row: str(row["qemu"]),
            [name for name in VHOST_QEMUS if name in (self._options.qemu or VHOST_QEMUS)],
        )

    def hashing(self, kernel: Kernel) -> None:
        """In-kernel RSS of every generation, and what it costs.  Raises FailedError, ProvisionError."""
        shared = SHARED / f"{kernel.name}-hashing"
        outcome, rows = hashing.run(kernel, (*hashing.EVERY, "12"), shared=shared, more=tuple(hashing.MORE))
        for row in rows:
            found = row | {"kernel": boot.unpacked(kernel).release, "date": record.today()}
            self.found["hashing"][str(row.get("generation") or next(iter(row)))] = found
        if outcome.status != 0:
            raise FailedError(f"hashing: {_last_line(outcome.output)}; see {shared / 'output'}")

    def rights(self, kernel: Kernel) -> None:
        """Which capability each verb needs.  Raises FailedError, ProvisionError."""
        self._inside(kernel, "rights", "rights", lambda row: kernel.name, ("--for-good",))
        self.found["rights"][kernel.name] = record.of_rights(self.found["rights"][kernel.name])

    def _inside(
        self,
        kernel: Kernel,
        module: str,
        section: str,
        key: Callable[[dict[str, Any]], str],
        arguments: Sequence[str],
    ) -> None:
        """Run a module of this package under ``kernel``; it writes a JSON object a line, as it finds them."""
        shared = SHARED / f"{kernel.name}-{module}"
        rows = shared / "rows.json"
        rows.unlink(missing_ok=True)
        command = (sys.executable, "-m", f"integration.kernels.{module}", str(rows), *arguments)
        outcome = boot.run(kernel, command, shared=shared, timeout_s=TIMEOUT_S)
        for line in rows.read_text().splitlines() if rows.exists() else ():
            row = json.loads(line) | {"kernel": kernel.name, "date": record.today()}
            self.found[section][key(row)] = row
        if outcome.status != 0:
            raise FailedError(f"{module}: {_last_line(outcome.output)}; see {shared / 'output'}")


def _last_line(output: str) -> str:
    return output.strip().rpartition("\n")[2] or "nothing was said"


def main() -> int:
    options = _parser().parse_args()
    if os.geteuid() != 0:
        print("kernels: only root may do this: sudo make test-kernels", file=sys.stderr)
        return 1
    parts = options.part or PART_NAMES
    run = Run(options)
    failures: list[str] = []
    try:
        if WITH_GUESTS & set(parts):  # they cannot be fetched under the other kernel
            with_agent(provision.provision())
            for name in options.qemu or QEMUS:
                QEMUS[name]()
        for kernel in (kernel for kernel in KERNELS if kernel.name in (options.kernel or kernel.name)):
            for part in parts:
                if kernel.name != {"vhost": VHOST_KERNEL, "hashing": hashing.KERNEL}.get(part, kernel.name):
                    continue
                began = time.monotonic()
                print(f"kernels: {part} on Linux {boot.unpacked(kernel).release}", flush=True)
                try:
                    getattr(run, part)(kernel)
                except FailedError as error:
                    failures.append(f"Linux {kernel.name}: {error}")
                    print(f"kernels: {failures[-1]}", file=sys.stderr, flush=True)
                print(f"kernels: {part} took {time.monotonic() - began:.0f} s", flush=True)
                record.save(options.results, record.merged(record.load(options.results), run.found))
    except ProvisionError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 1
    if options.save:
        recorded = record.merged(record.load(record.RECORD), run.found)
        record.save(record.RECORD, recorded)
        document.write(recorded)
    for failure in failures:
        print(f"kernels: {failure}", file=sys.stderr)
    print(f"kernels: {'does not hold' if failures else 'all holds'}; results in {options.results}", flush=True)
    return int(bool(failures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="integration.kernels", description="Prove qsteer on other kernels.")
    parser.add_argument("part", nargs="*", choices=PART_NAMES, help="default: all of them")
    parser.add_argument("--kernel", action="append", choices=[kernel.name for kernel in KERNELS])
    parser.add_argument("--qemu", action="append", choices=tuple(QEMUS))
    parser.add_argument("--quick", action="store_true", help="of the tests only the quick ones")
    parser.add_argument("--results", type=Path, default=record.RESULTS, metavar="FILE")
    parser.add_argument("--save", action="store_true", help="write docs/support.json and docs/support.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
