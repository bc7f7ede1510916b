# SPDX-License-Identifier: BSD-2-Clause
"""Where the figures come from: the machine and the versions."""

import datetime
import os
import re
import subprocess
from pathlib import Path

_VULNERABILITIES = Path("/sys/devices/system/cpu/vulnerabilities")


def describe(qemu_version: str) -> dict[str, str]:
    """What is known of this machine, in the order in which it is told."""
    cpu = Path("/proc/cpuinfo").read_text()
    virtual = " (virtual machine)" if " hypervisor" in cpu else ""
    return {
        "cpu": _first(r"^model name\s*: (.+)$", cpu, os.uname().machine) + virtual,
        "cores": str(len(os.sched_getaffinity(0))),
        "kernel": os.uname().release,
        "jit": "on" if _text("/proc/sys/net/core/bpf_jit_enable", "1") != "0" else "off",
        "mitigations": _mitigations(),
        "qdisc": _text("/proc/sys/net/core/default_qdisc", "pfifo_fast"),
        "qemu": qemu_version,
        "clang": _clang(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _clang() -> str:
    compiler = os.environ.get("CLANG") or "clang"
    try:
        said = subprocess.run((compiler, "--version"), capture_output=True, text=True, check=False).stdout
    except OSError:
        return "unknown"
    return _first(r"clang version (\S+)", said, "unknown")


def _mitigations() -> str:
    """Those that make calls and branches dear, as far as the kernel's first words on each."""
    said = {name: _text(str(_VULNERABILITIES / name), "unknown") for name in ("spectre_v1", "spectre_v2", "retbleed")}
    return ", ".join(f"{name} {words.removeprefix('Mitigation: ').split(';')[0]}" for name, words in said.items())


def _text(path: str, otherwise: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return otherwise


def _first(pattern: str, text: str, otherwise: str) -> str:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else otherwise
