# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-bridge-helper beside QEMU's own, on the same access lists; and what neither crashes it nor fools it.

``python -m integration.bridge_helper`` prints what both answer to every list of tests/kernel/bridge_acls.py, and where
and why they differ; ``--fuzz`` feeds ours what nobody should.  Both need root.
"""

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration import apt, bridge_fuzz, provision
from integration.apt import ProvisionError
from integration.sanitized import FuzzError
from tests.kernel import bridge_acls, bridges, private, support

NAME = "qemu-bridge-helper"
PACKAGE = "qemu-system-common"
INPUTS = 200_000
HOSTILE_RUNS = 3_000
RANDOM_LISTS = 1_500

_INSTALLED = (Path("/usr/lib/qemu"), Path("/usr/libexec"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """QEMU's own helper, where everybody can run it, and the environment in which it finds its libraries."""

    path: Path
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A list, a bridge, and both answers."""

    case: bridge_acls.Case
    bridge: str
    qsteers: str
    qemus: str

    @property
    def as_expected(self) -> bool:
        return (self.qsteers, self.qemus) == (self.case.verdict(self.bridge), self.case.verdict_of_qemus(self.bridge))


def provision_stock() -> Path:
    """QEMU's helper: the installed one, one that came with a QEMU under build/, or Debian's.  Raises ProvisionError."""
    unpacked = provision.BUILD / "bridge-helper"
    roots = (provision.BUILD / "qemu" / "root", unpacked)
    for folder in (*_INSTALLED, *(root / "usr/lib/qemu" for root in roots)):
        if (folder / NAME).exists():
            return folder / NAME
    apt.refresh_lists(PACKAGE)
    provision.BUILD.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=provision.BUILD, prefix="apt-") as name:
        apt.unpack(apt.PrivateApt(Path(name)).fetch(PACKAGE), unpacked)
    found = unpacked / "usr/lib/qemu" / NAME
    if not found.exists():
        raise ProvisionError(f"{PACKAGE} has no {NAME}")
    return found


def stock(folder: Path) -> Stock:
    """A copy in ``folder``, which everybody can enter, with those libraries that came with it."""
    source = provision_stock()
    root = next((parent for parent in source.parents if parent.name in ("root", "bridge-helper")), Path("/"))
    libraries = folder / "libraries"
    libraries.mkdir(mode=0o755)
    if root != Path("/"):
        search = f"{root}/usr/lib/{os.uname().machine}-linux-gnu:{root}/lib/{os.uname().machine}-linux-gnu"
        told = subprocess.run(
            ["ldd", source], env=os.environ | {"LD_LIBRARY_PATH": search}, capture_output=True, text=True, check=True
        )
        for library in re.findall(r"=> (\S+) \(0x", told.stdout):
            if Path(library).is_relative_to(root):
                shutil.copy(library, libraries)
    copied = bridges.copy(source, folder / "stock")
    return Stock(path=copied, environment=os.environ | {"LD_LIBRARY_PATH": str(libraries)})


@contextlib.contextmanager
def place() -> Iterator[Path]:
    """A network and an /etc/qemu of one's own; yields an empty folder, open to everybody."""
    with support.network_namespace(), bridges.host() as folder:
        private.mount("-t", "sysfs", "qsteer", "/sys")  # that of the network
        bridges.add_bridges()
        yield folder


def compare(cases: Sequence[bridge_acls.Case], ours: Path, other: Stock) -> Iterator[Row]:
    """Ask both helpers, in an ordinary user's name."""
    for case in cases:
        case.make()
        for bridge in case.asked:
            yield Row(
                case=case,
                bridge=bridge,
                qsteers=case.run(ours, bridge).verdict,
                qemus=case.run(other.path, bridge, other.environment).verdict,
            )


def print_matrix() -> int:
    """The table, and the number of answers that nobody expects."""
    unexpected = differences = questions = 0
    print(f"{'LIST':58} {'BRIDGE':18} {'QEMU':10} {'QSTEER':6} WHY THEY DIFFER")
    with place() as folder:
        for row in compare(bridge_acls.CASES, bridges.copy(bridges.HELPER, folder / "ours"), stock(folder)):
            questions += 1
            differs = row.qsteers != row.qemus
            differences += differs
            unexpected += not row.as_expected
            why = "UNEXPECTED" if not row.as_expected else row.case.why if differs else ""
            print(f"{row.case.name:58} {ascii(row.bridge)[1:-1]:18} {row.qemus:10} {row.qsteers:6} {why}".rstrip())
    lists = len(bridge_acls.CASES)
    print(f"{lists} lists, {questions} questions, {differences} answered differently, {unexpected} unexpectedly")
    return unexpected


def print_fuzz(inputs: int, runs: int, lists: int) -> int:
    """Counts of what was tried; an exit status."""
    for seed in (1, 2):
        print(bridge_fuzz.parsers(inputs // 2, seed=seed).strip(), flush=True)
    with place() as folder:
        for program in (bridge_fuzz.sanitized_helper(), bridges.HELPER):
            tally = bridge_fuzz.hostile(bridges.copy(program, folder / program.name), runs, seed=1)
            print(f"{program.name}: {tally}", flush=True)
        other = stock(folder)
        cases = bridge_fuzz.random_lists(lists, seed=1)
        rows = tuple(compare(cases, bridges.copy(bridges.HELPER, folder / "ours"), other))
    differing = [row for row in rows if row.qsteers != row.qemus]
    allowed = sum(row.qsteers == "yes" for row in rows)
    print(f"{len(cases)} random lists: {len(rows)} questions, {allowed} allowed, {len(differing)} answered differently")
    for row in differing[:10]:
        print(f"  {row.bridge}: QEMU's {row.qemus}, qsteer's {row.qsteers}: {row.case.files['bridge.conf'].content!r}")
    return int(bool(differing))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m integration.bridge_helper", description=__doc__)
    parser.add_argument("--fuzz", action="store_true", help="hostile input instead of the table")
    parser.add_argument("--inputs", type=int, default=INPUTS, help="command lines and lists (%(default)s)")
    parser.add_argument("--runs", type=int, default=HOSTILE_RUNS, help="starts of the whole program (%(default)s)")
    parser.add_argument("--lists", type=int, default=RANDOM_LISTS, help="lists for both helpers (%(default)s)")
    options = parser.parse_args()
    try:
        if options.fuzz:
            return print_fuzz(options.inputs, options.runs, options.lists)
        return int(bool(print_matrix()))
    except (ProvisionError, FuzzError) as error:
        print(f"bridge_helper: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
