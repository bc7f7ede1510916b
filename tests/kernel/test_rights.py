# SPDX-License-Identifier: BSD-2-Clause
"""What some capabilities only are enough for; integration.kernels.rights measures it for whole verbs."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernel import support

pytestmark = pytest.mark.root

OTHER_USER = 65534


def with_only(*names: str, script: str, argument: object) -> str:
    """What a script prints that runs as root with a few capabilities."""
    bounding = ",".join(("-all", *(f"+{name}" for name in names)))
    command = ["setpriv", f"--bounding-set={bounding}", "--inh-caps=-all", "--", sys.executable, "-c", script]
    return subprocess.run([*command, str(argument)], check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def test_the_files_of_another_users_qemu(need_root: None) -> None:
    """To list them takes less than to look at them; what was not looked at is not taken for nothing."""
    script = "import sys; from qsteer import procs; print(procs.open_files(int(sys.argv[1])).seen)"
    with subprocess.Popen(("setpriv", f"--reuid={OTHER_USER}", "--clear-groups", "sleep", "1000")) as process:
        try:
            exe = Path(f"/proc/{process.pid}/exe")
            support.wait_until("the other user's process", lambda: "sleep" in exe.readlink().name)
            assert with_only(script=script, argument=process.pid) == "False\n"
            assert with_only("dac_read_search", script=script, argument=process.pid) == "False\n"
            assert with_only("dac_read_search", "sys_ptrace", script=script, argument=process.pid) == "True\n"
        finally:
            process.kill()


PROBE = f"""
import os, sys
from qsteer import qmp
qmp.PROBE_TIMEOUT_S = 1.0
try:
    qmp.probe(sys.argv[1], drivers=(), become=lambda: os.setresuid({OTHER_USER}, {OTHER_USER}, {OTHER_USER}))
except qmp.UnsupportedError as error:
    print(error)
"""


def test_another_users_qemu_is_ended_without_cap_kill(need_root: None) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        qemu = folder / "qemu"
        qemu.write_text("#!/bin/sh\nexec sleep 1000\n")
        qemu.chmod(0o755)
        told = with_only("setuid", "setgid", script=PROBE, argument=qemu)
    assert "does not answer as QEMU" in told
