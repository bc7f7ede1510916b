# SPDX-License-Identifier: BSD-2-Clause
"""Two versions of qsteer on one host: each knows the other's programs, leaves them alone, and can take their place.

The other version is this checkout with a later version number, another ABI number and another body.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qsteer import __version__, programs
from qsteer._shim import ffi, lib
from qsteer.model import Build, Source
from qsteer.programs import Program
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import private, support
from tests.kernel.standin import Vm, vm

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[2]
NEXT_VERSION = "9.8.7"

FIRST = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(3, 2, 1, 0, 0, 0, 1, 3), unclassified_queue=2)
SECOND = RssConfig(types=BASE_TYPES, key=bytes(range(60, 100)), table=(1, 1, 3, 2), unclassified_queue=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """One version of qsteer: where its package is."""

    root: Path
    number: str
    abi: int

    def qsteer(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "qsteer", *arguments],
            cwd=self.root,
            env={**os.environ, "PYTHONPATH": str(self.root)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def document(self, *arguments: str) -> dict[str, Any]:
        """What it says of the one tap."""
        return result_of(self.qsteer(*arguments, "--json"))

    def clean(self) -> str:
        out, err = self.qsteer("clean").communicate()
        assert not err, err
        return out


def result_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate()
    assert process.returncode == 0, err
    (tap,) = json.loads(out)["taps"]
    assert isinstance(tap, dict)
    return tap


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with private.memory():
        yield


@pytest.fixture(scope="module")
def this() -> Version:
    return Version(root=ROOT, number=__version__, abi=lib.QS_ABI)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """Built in a copy of the checkout."""
    root = tmp_path_factory.mktemp("other")
    made = shutil.ignore_patterns("__pycache__", "*.so", "*.o")
    for name in ("c", "qsteer"):
        shutil.copytree(ROOT / name, root / name, ignore=made)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, root / name)
    rewrite(root / "qsteer/__init__.py", f'"{__version__}"', f'"{NEXT_VERSION}"')
    rewrite(root / "c/bpf/abi.h", f"#define QS_ABI {lib.QS_ABI}\n", f"#define QS_ABI {lib.QS_ABI + 1}\n")
    clears = "\tQS_CB_WORD(skb) = 0;\n"
    rewrite(
        root / "c/bpf/tap_body.bpf.c", clears, f"\tvolatile __u32 next = 2;\n\n{clears.replace('0', 'next - next')}"
    )
    build = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version = Version(root=root, number=NEXT_VERSION, abi=lib.QS_ABI + 1)
    assert version.qsteer("--version").communicate()[0] == f"qsteer {NEXT_VERSION}\n"
    return version


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


def write_as_qemu(program: Program, config: RssConfig) -> None:
    """QEMU writes into the maps that it was given."""
    programs._write_config(program, config)


def seen_as_outdated(version: Version, running: Vm, of: Version, source: str, config: RssConfig) -> int:
    """What a version says of another one's program; ``apply`` leaves it alone."""
    before = version.document("status", "--vm", running.name)
    assert before["state"].startswith("ok")
    program = before["program"]
    assert (program["kind"], program["outdated"], program["version"]) == ("qsteer", True, of.number)
    assert (program["abi"], before["source"]) == (of.abi, source)
    applied = version.document("apply", "--vm", running.name)
    assert (applied["result"], applied["program"]) == ("unchanged", program["id"])
    assert version.document("show", "--vm", running.name)["rss"]["table"] == list(config.table)
    running.check_packets(config)
    return int(program["id"])


def refreshed(version: Version, running: Vm, before: int, source: str, config: RssConfig) -> None:
    """``apply --refresh`` takes the program's place while packets go by, with the same configuration."""
    rss = version.document("show", "--vm", running.name)["rss"]
    process = version.qsteer("apply", "--vm", running.name, "--refresh", "--json")
    running.check_packets_during(process, config)
    swapped = result_of(process)
    assert (swapped["result"], swapped["source"]) == ("refreshed", source)
    assert swapped["program"] != before
    after = version.document("status", "--vm", running.name)
    assert (after["state"], after["source"], after["program"]["id"]) == ("ok", source, swapped["program"])
    assert (after["program"]["version"], after["program"]["outdated"]) == (version.number, False)
    assert version.document("show", "--vm", running.name)["rss"] == rss
    running.check_packets(config)
    assert version.document("apply", "--vm", running.name)["result"] == "unchanged"


@pytest.mark.parametrize("build", support.BUILDS)
def test_a_static_tap(namespace: str, this: Version, other: Version, build: Build) -> None:
    """Up and down again."""
    with vm("qsun-static") as running:
        program = programs.load_program(tap=running.tap.name, source=Source.STATIC, config=FIRST, build=build)
        running.tap.attach(program)
        program.close()
        first = seen_as_outdated(other, running, this, "static", FIRST)
        refreshed(other, running, first, "static", FIRST)
        second = seen_as_outdated(this, running, other, "static", FIRST)
        refreshed(this, running, second, "static", FIRST)


def test_shared_maps(namespace: str, this: Version, other: Version) -> None:
    """QEMU writes into its maps before and after the swap, and is followed."""
    held = programs.load_program(tap="qsun-shared", source=Source.SHARED_MAPS)
    with contextlib.closing(held), vm("qsun-shared", held) as running:
        write_as_qemu(held, FIRST)
        running.tap.attach(held)
        first = seen_as_outdated(other, running, this, "shared-maps", FIRST)
        assert first == held.id
        refreshed(other, running, first, "shared-maps", FIRST)
        write_as_qemu(held, SECOND)
        running.check_packets(SECOND)
        second = seen_as_outdated(this, running, other, "shared-maps", SECOND)
        # QEMU attaches what it holds again when the guest sets RSS: nobody minds.
        running.tap.attach(held)
        running.check_packets(SECOND)
        assert this.document("status", "--vm", "qsun-shared")["program"]["id"] == held.id != second
        seen_as_outdated(other, running, this, "shared-maps", SECOND)
        refreshed(other, running, held.id, "shared-maps", SECOND)
        assert other.document("off", "--vm", "qsun-shared")["result"] == "off"


def test_maps_that_say_nothing_sensible(namespace: str, this: Version, other: Version) -> None:
    """Bit by bit what QEMU wrote, also where it is no configuration."""
    held = programs.load_program(tap="qsun-odd", source=Source.SHARED_MAPS, config=FIRST)
    with contextlib.closing(held), vm("qsun-odd", held) as running:
        odd = {"redirect": 1, "hash_types": 0xFFFF, "indirections_len": 100, "default_queue": 3}
        raw, table = ffi.new("struct qs_rss_config *", odd), ffi.new("uint16_t[128]", FIRST.table)
        assert lib.qs_config_write(held.config_fd, held.key_fd, held.table_fd, raw, FIRST.key, table) == 0
        running.tap.attach(held)
        swapped = other.document("apply", "--vm", "qsun-odd", "--refresh")
        assert swapped["result"] == "refreshed"
        info = programs.program_info(swapped["program"])
        assert info.config_id == programs.program_info_of(held.prog_fd).config_id
        assert info.ident and info.ident.tap == "qsun-odd" and info.ident.source is Source.SHARED_MAPS
        assert not programs.read_maps(info).config


@pytest.mark.shared_body
def test_clean_waits_for_the_last_user(namespace: str, this: Version, other: Version) -> None:
    """Each version removes the other's body, and only when nothing uses it."""
    held = programs.load_program(tap="qsun-clean", source=Source.SHARED_MAPS, config=FIRST, build=Build.SHARED_BODY)
    pin = str(programs.bodies_pin())
    with vm("qsun-clean", held) as running:
        running.tap.attach(held)
        assert pin not in other.clean().partition("kept")[0]
        refreshed(other, running, held.id, "shared-maps", FIRST)
        theirs = next(path for path in private.pins() if path.startswith(f"v{other.abi}/"))
        assert theirs.rpartition("-")[2] != pin.rpartition("-")[2]
        # QEMU still holds the old program, which may come back.
        said = this.clean()
        assert f"kept  {pin}: shared body, used by 1 program" in said and theirs in said
        running.check_packets(FIRST)
    held.close()
    support.wait_until("the programs' end", lambda: not support.programs_of("qsun-clean"))
    assert f"removed  {pin}: shared body" in other.clean()
    assert private.pins() == {}
