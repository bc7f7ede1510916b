# SPDX-License-Identifier: BSD-2-Clause
"""Links of a network namespace of our own: what ``run`` does to a tap, and what it refuses."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer import kernel, links
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, UsageError

pytestmark = pytest.mark.root


@pytest.fixture
def tap(need_root: None) -> Iterator[str]:
    """A tap in a network namespace that has a bridge br0 with an MTU of 1400, too, and goes with the test."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    os.unshare(os.CLONE_NEWNET) if hasattr(os, "unshare") else pytest.skip("Python 3.12's os.unshare")
    try:
        subprocess.run(["ip", "link", "add", "br0", "mtu", "1400", "type", "bridge"], check=True)
        opened = kernel.open_tap("tap0", 2)
        yield opened.name
        opened.close()
    finally:
        os.setns(home)
        os.close(home)
