# SPDX-License-Identifier: BSD-2-Clause
"""What every floor of the tests shares: who is root, and what a skip means.

With QSTEER_STRICT=1 in the environment a test that would be skipped fails instead, with the reason; a run that is green
has then run everything.
"""

import os
import signal
from collections.abc import Generator
from typing import TypeVar

import pytest

# The machine's own configuration must not decide how a test ends.
os.environ.setdefault("QSTEER_CONFIG", "/nonexistent")

# A shell gives what it runs in the background SIGINT ignored, and some tests are about it.
signal.signal(signal.SIGINT, signal.default_int_handler)

STRICT = os.environ.get("QSTEER_STRICT", "0") not in ("", "0")

ReportT = TypeVar("ReportT", pytest.TestReport, pytest.CollectReport)


def skip_unless_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("not root (make test takes care of it)")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("root"):
        skip_unless_root()
    if (item.get_closest_marker("patched") or item.get_closest_marker("decoy")) and not os.environ.get("QSTEER_TUN"):
        pytest.skip("another tun is wanted (make test-kernels KERNELS_ARGS=hashing)")


@pytest.fixture
def need_root() -> None:
    """For other fixtures, what the marker ``root`` is for tests: a skip unless this is root."""
    skip_unless_root()


def without_skip(report: ReportT) -> ReportT:
    """The report of a skip as one of a failure, if skips are failures; an expected failure is neither."""
    if STRICT and report.outcome == "skipped" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {reason} (QSTEER_STRICT makes a skip a failure)"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return without_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return without_skip((yield))
