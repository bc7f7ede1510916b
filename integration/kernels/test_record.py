# SPDX-License-Identifier: BSD-2-Clause
"""docs/support.md tells what docs/support.json has, of the kernels of the table; and what a run is compared with."""

from pathlib import Path
from typing import Any

import pytest

from integration.kernels import document, record
from integration.kernels.boot import Image
from integration.kernels.parts import PARTS, Part
from integration.kernels.table import KERNELS

REPORT = """<testsuites><testsuite name="pytest">
<testcase classname="tests.kernel.test_shim" name="test_a[x-y]"/>
<testcase classname="tests.kernel.test_shim" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.kernel.test_cli" name="test_c"/>
<testcase classname="tests.kernel.test_cli" name="test_cc"/>
<testcase classname="tests.kernel.test_cli" name="test_d"><skipped message="why"/></testcase>
</testsuite></testsuites>"""


def test_the_document_is_of_the_record() -> None:
    """After ``--save`` nobody has to write a table, and nobody has changed one by hand."""
    text = document.DOCUMENT.read_text()
    assert document.filled(text, document.tables(record.load(record.RECORD))) == text


def test_the_record_has_every_kernel_and_test() -> None:
    recorded = record.load(record.RECORD)
    for kernel in KERNELS:
        row = recorded["kernels"][kernel.name]
        assert row["suite"] == kernel.suite and row["builds"] == [str(build) for build in kernel.builds]
        assert list(row["parts"]) == sorted(part.name for part in PARTS)
        assert all(counts["passed"] for counts in row["parts"].values())
        assert any(key.split()[0] == kernel.name for key in recorded["cells"])


def test_counts_of_a_report(tmp_path: Path) -> None:
    (tmp_path / "report.xml").write_text(REPORT)
    parts = (
        Part(name="shim", tests=("tests/kernel/test_shim.py",)),
        Part(name="one", tests=("tests/kernel/test_cli.py::test_c",)),
        Part(name="two", tests=("tests/kernel/test_shim.py::test_a", "tests/kernel/test_cli.py::test_d")),
    )
    image = Image(image=Path("vmlinuz"), release="6.1.0", version="6.1.1-1")
    row = record.of_tests(KERNELS[0], image, parts, tmp_path / "report.xml")
    assert row["parts"] == {"shim": {"passed": 1, "failed": 1}, "one": {"passed": 1}, "two": {"passed": 1, "failed": 1}}
    assert (row["release"], row["version"]) == ("6.1.0", "6.1.1-1")


def cell(result: str, source: str = "static") -> dict[str, Any]:
    return {"kernel": "6.1", "qemu": "10.0", "vhost": True, "source": source, "result": result, "says": "why"}


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("steered", "steered", ()),
        ("steered", "refused", ("6.1 10.0 on static: refused (was steered): why",)),
        ("refused", "steered", ()),
        ("refused", "refused", ()),
        ("refused", "wrong", ("6.1 10.0 on static: wrong (was refused): why",)),
        ("", "wrong", ("6.1 10.0 on static: wrong: why",)),
        ("", "refused", ()),
    ],
)
def test_what_is_worse_than_the_record(before: str, after: str, told: tuple[str, ...]) -> None:
    def cells(result: str) -> record.Data:
        row = cell(result)
        return record.empty() | ({"cells": {record.cell_key(row): row}} if result else {})

    assert record.worse(cells(before), cells(after)) == told


def test_a_run_replaces_only_what_it_measured() -> None:
    old, new = record.empty(), record.empty()
    old["cells"] = {"a": {"result": "steered"}, "b": {"result": "refused"}}
    new["cells"] = {"b": {"result": "steered"}}
    assert record.merged(old, new)["cells"] == {"a": {"result": "steered"}, "b": {"result": "steered"}}


def test_marks() -> None:
    text = "one\n<!-- here -->\nold\n<!-- end of here -->\ntwo\n"
    assert document.filled(text, {"here": r"new \1"}) == "one\n<!-- here -->\nnew \\1\n<!-- end of here -->\ntwo\n"
    with pytest.raises(ValueError, match="0 places for the table there"):
        document.filled(text, {"there": "new"})
