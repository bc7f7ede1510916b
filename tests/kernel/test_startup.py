# SPDX-License-Identifier: BSD-2-Clause
"""What a command costs before it does anything: start-up is part of the user's experience."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RUNS = 7
IDLE = ("unshare", "-m", "sh", "-c", '[ ! -d /run/netns ] || mount -t tmpfs none /run/netns; exec "$@"', "sh")
"""Without the named network namespaces of other tests: to look into these takes pyroute2, and a tenth of a second."""


def cpu_ms(pycache: Path, *command: str) -> float:
    """User and system time of one command, the least of several, with compiled modules at hand."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    spent = []
    for _ in range(RUNS):
        child = subprocess.Popen(
            command,
            env=environment | {"PYTHONPYCACHEPREFIX": str(pycache)},
            stdout=subprocess.DEVNULL,
        )
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        assert child.returncode == 0
        spent.append((usage.ru_utime + usage.ru_stime) * 1000)
    return min(spent)


def test_help(tmp_path: Path) -> None:
    spent = cpu_ms(tmp_path, sys.executable, "-m", "qsteer", "--help")
    print(f"qsteer --help: {spent:.0f} ms of CPU")
    assert spent <= 60


@pytest.mark.root
def test_status_of_an_idle_host(tmp_path: Path) -> None:
    spent = cpu_ms(tmp_path, *IDLE, sys.executable, "-m", "qsteer", "status")
    print(f"qsteer status: {spent:.0f} ms of CPU")
    assert spent <= 150
