# SPDX-License-Identifier: BSD-2-Clause
"""The first process of ours under another kernel: set the system up as on a host of virtual machines, run a command.

``python -m integration.kernels.inside FOLDER``: what to do is in FOLDER/command.json (``Orders``); what the command
prints goes to FOLDER/output, its exit status to FOLDER/status.
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from integration.kernels import disk

ORDERS = "command.json"
TUN = "tun.ko"
MODULES = ("tun", "vhost_net", "bridge", "veth", "8021q")
RULES = Path("/run/modprobe.d/qsteer.conf")
BPFFS = Path("/sys/fs/bpf")
PATIENCE = "10"
"""For integration.guest and the tests: all of this may be emulated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What is run, and whether FOLDER/tun.ko is loaded in place of the kernel's own tun."""

    command: tuple[str, ...]
    tun: bool


def set_up(tun: Path | None) -> None:
    """Modules, a BPF file system, loopback; what systemd and udev do elsewhere."""
    if tun:  # also when a test has unloaded it, and for what depends on it
        RULES.parent.mkdir(exist_ok=True)
        RULES.write_text(f"install tun insmod {shlex.quote(str(tun))}\n")
    subprocess.run(("modprobe", "--all", *MODULES), check=True)
    if not os.path.ismount(BPFFS):
        subprocess.run(("mount", "-t", "bpf", "bpf", str(BPFFS)), check=True)
    subprocess.run(("ip", "link", "set", "lo", "up"), check=True)
    # pyroute2 keeps namespaces there; tests and qsteer their files.
    for folder in ("/run/netns", "/run/qsteer"):
        Path(folder).mkdir(mode=0o755, exist_ok=True)


def main() -> int:
    folder = Path(sys.argv[1])
    orders = Orders(**json.loads((folder / ORDERS).read_text()))
    temporary = Path(tempfile.mkdtemp(prefix="qsk-", dir="/run"))
    temporary.chmod(0o1777)  # a QEMU that is an ordinary user's has files there
    ours = {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(temporary), "QSTEER_PATIENCE": PATIENCE}
    with (folder / "output").open("ab") as output:
        try:
            set_up(folder / TUN if orders.tun else None)
            disk.cover(folder)
            status = subprocess.run(orders.command, env=os.environ | ours, stdout=output, stderr=output).returncode
        except (OSError, subprocess.CalledProcessError) as error:
            output.write(f"inside: {error}\n".encode())
            status = 1
    (folder / "status").write_text(str(status))
    os.sync()
    return status


if __name__ == "__main__":
    sys.exit(main())
