# SPDX-License-Identifier: BSD-2-Clause
"""What was measured on which kernel: build/kernels/results.json has this checkout's runs, docs/support.json the record.

Both are JSON objects of the same form: ``kernels`` by name, ``cells`` by "KERNEL QEMU VHOST SOURCE", ``vhost`` by QEMU,
``rights`` by kernel and ``hashing`` by the generation of in-kernel RSS.  A run replaces what it measured anew, and
leaves the rest.
"""

import datetime
import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from integration.kernels.boot import Image
from integration.kernels.parts import Part
from integration.kernels.table import Kernel
from integration.provision import BUILD, CHECKOUT

RESULTS = BUILD / "kernels" / "results.json"
RECORD = CHECKOUT / "docs" / "support.json"

Data = dict[str, dict[str, Any]]
SECTIONS = ("kernels", "cells", "vhost", "rights", "hashing")


def empty() -> Data:
    """A record of nothing."""
    return {section: {} for section in SECTIONS}


def load(path: Path) -> Data:
    """A record; an empty one where there is no file yet."""
    found: Data = json.loads(path.read_text()) if path.exists() else {}
    return empty() | found


def save(path: Path, data: Data) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n")


def merged(old: Data, new: Data) -> Data:
    """``old``, with what ``new`` has in its place."""
    return {section: old[section] | new[section] for section in SECTIONS}


def today() -> str:
    return datetime.date.today().isoformat()


def of_tests(kernel: Kernel, image: Image, parts: Sequence[Part], report: Path) -> dict[str, Any]:
    """The row of a kernel: how many tests of each part passed and failed.  ``report`` is pytest's junit XML."""
    counts: dict[str, Counter[str]] = {part.name: Counter() for part in parts}
    for case in ElementTree.parse(report).iter("testcase"):
        module, test = case.get("classname", ""), case.get("name", "").partition("[")[0]
        failed = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
        for part in parts:
            if any(_names(node, module, test) for node in part.tests):
                counts[part.name]["failed" if failed else "passed"] += 1
    return {
        "release": image.release,
        "version": image.version,
        "suite": kernel.suite,
        "builds": [str(build) for build in kernel.builds],
        "date": today(),
        "parts": {name: dict(count) for name, count in counts.items()},
    }


def outcomes(report: Path) -> dict[str, str]:
    """How each test of pytest's junit XML ended: ``passed``, ``failure``, ``error`` or ``skipped``."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        bad = [kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None]
        found[case.get("name", "")] = bad[0] if bad else "passed"
    return found


def properties(report: Path, test: str) -> dict[str, str]:
    """What a test has noted (``record_property``)."""
    cases = (case for case in ElementTree.parse(report).iter("testcase") if case.get("name") == test)
    return {one.get("name", ""): one.get("value", "") for case in cases for one in case.iter("property")}


def of_rights(found: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of ``rights``: what each verb takes, and what goes otherwise under a setting than as it is."""
    usual = {row["verb"]: row for row in found["settings"] if row["setting"] == "as it is"}
    changed = [
        row
        for row in found["settings"]
        if "verb" in row and any(row[name] != usual[row["verb"]][name] for name in ("exit", "result"))
    ]
    tried = dict.fromkeys(row["setting"] for row in found["settings"] if "verb" in row)
    return {
        "release": found["kernel"],
        "date": today(),
        "verbs": [
            {name: row[name] for name in ("verb", "user", "every", "needs")}
            | {"without": {name: less["exit"] for name, less in row["without"].items()}}
            for row in found["verbs"]
        ],
        "settings": [{name: row[name] for name in ("setting", "verb", "exit", "says", "result")} for row in changed],
        "no_difference": [one for one in tried if one not in {row["setting"] for row in changed} | {"as it is"}],
        "not_set": [row["setting"] for row in found["settings"] if "cannot be set" in row],
    }


def _names(node: str, module: str, test: str) -> bool:
    """Whether a pytest node id stands for a test of a module (``tests.kernel.test_x``), or for all of that module's."""
    path, _, wanted = node.partition("::")
    return path.removesuffix(".py").replace("/", ".") == module and wanted.partition("[")[0] in ("", test)


def cell_key(row: Mapping[str, Any]) -> str:
    return f"{row['kernel']} {row['qemu']} {'on' if row['vhost'] else 'off'} {row['source']}"


def worse(recorded: Data, found: Data) -> tuple[str, ...]:
    """The cells that do not hold: wrong ones, and those that were steered when the record was made."""
    lines = []
    for key, row in found["cells"].items():
        before = recorded["cells"].get(key, {}).get("result")
        if row["result"] == "wrong" or (before == "steered" and row["result"] != "steered"):
            lines.append(f"{key}: {row['result']}{f' (was {before})' if before else ''}: {row['says']}")
    return tuple(lines)
