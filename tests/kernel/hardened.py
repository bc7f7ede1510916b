# SPDX-License-Identifier: BSD-2-Clause
"""What the unit file of qsteer keep leaves a process, without systemd: on x86_64."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel import private

UNIT = Path(__file__).parents[2] / "systemd" / "qsteer-keep.service.in"


def unit(option: str) -> list[str]:
    """The values of an option of the unit file, line by line."""
    lines = UNIT.read_text().splitlines()
    return [line.partition("=")[2] for line in lines if line.startswith(f"{option}=")]


def system_calls() -> set[int]:
    """The numbers of those that the unit file allows."""
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if os.uname().machine != "x86_64" or not shutil.which("systemd-analyze") or not header.exists():
        pytest.skip("not x86_64, no systemd-analyze, or no asm/unistd_64.h")
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", header.read_text())}
    allowed: set[str] = set()
    for line in unit("SystemCallFilter"):
        names = {name for word in line.lstrip("~").split() for name in members(word)}
        allowed = allowed - names if line.startswith("~") else allowed | names
    # What systemd itself allows for the start of the service.
    allowed |= {"execve", "exit", "exit_group", "getrlimit", "rt_sigreturn", "sigreturn"}
    return {numbers[name] for name in allowed if name in numbers}


def members(name: str) -> set[str]:
    """The system calls of a set of systemd's, and of the sets in it; or the system call itself."""
    if not name.startswith("@"):
        return {name}
    told = subprocess.run(["systemd-analyze", "syscall-filter", name], capture_output=True, text=True, check=True)
    words = [line.strip() for line in told.stdout.splitlines()[1:]]
    return {one for word in words if word and not word.startswith("#") for one in members(word)}


HARDENED = """
import ctypes, os, socket, struct, sys
bounding, calls, families = (set(map(int, text.split(","))) for text in sys.argv[1:4])
libc = ctypes.CDLL(None, use_errno=True)

def prctl(*arguments):
    if libc.prctl(*(ctypes.c_ulong(value) for value in arguments)):
        raise OSError(ctypes.get_errno(), f"prctl {arguments[0]}")

for capability in range(64):
    if capability not in bounding and libc.prctl(23, capability, 0, 0, 0) == 1:  # PR_CAPBSET_READ
        prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
libc.prctl(65, 1, 0, 0, 0)  # PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: from Linux 6.3

def load(offset): return struct.pack("=HBBI", 0x20, 0, 0, offset)
def equal(value, yes, no): return struct.pack("=HBBI", 0x15, yes, no, value)
def answer(value): return struct.pack("=HBBI", 0x06, 0, 0, value)

ALLOW, FORBID = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM
NUMBER, FIRST, SECOND = 0, 16, 24
SOCKET, SETNS, CLONE_NEWNET = 41, 308, 0x40000000
code = [load(NUMBER), equal(SOCKET, 0, 2 + len(families)), load(FIRST)]
code += [equal(family, len(families) - at, 0) for at, family in enumerate(sorted(families))] + [answer(FORBID)]
code += [load(NUMBER), equal(SETNS, 0, 3), load(SECOND), equal(CLONE_NEWNET, 1, 0), answer(FORBID), load(NUMBER)]
for number in sorted(calls):
    code += [equal(number, 0, 1), answer(ALLOW)]
code += [answer(FORBID)]
text = b"".join(code)
filter = struct.pack("=H6xQ", len(code), ctypes.addressof(buffer := ctypes.create_string_buffer(text, len(text))))
prctl(22, 2, ctypes.addressof(program := ctypes.create_string_buffer(filter, len(filter))), 0, 0)  # PR_SET_SECCOMP
os.execv(sys.argv[4], sys.argv[4:])
"""
"""Gives up what a unit file takes away (x86_64), and becomes another program."""
CAPABILITIES = {"CAP_DAC_OVERRIDE": 1, "CAP_SYS_PTRACE": 19, "CAP_SYS_ADMIN": 21, "CAP_PERFMON": 38, "CAP_BPF": 39}


def prefix() -> tuple[str, ...]:
    """A command prefix: what follows it runs as under the unit file."""
    bounding = [CAPABILITIES[name] for name in unit("CapabilityBoundingSet")[0].split()]
    families = [int(getattr(socket, name)) for name in unit("RestrictAddressFamilies")[0].split()]
    lists = [",".join(map(str, values)) for values in (bounding, sorted(system_calls()), families)]
    return (sys.executable, "-c", HARDENED, *lists)


@contextlib.contextmanager
def read_only() -> Iterator[None]:
    """ProtectSystem=strict and ProtectKernelTunables; /run/qsteer and /sys/fs/bpf are mounts of this test's own."""
    with contextlib.ExitStack() as stack:
        for place in ("/", "/sys"):
            private.mount("-o", "remount,bind,ro", place)
            stack.callback(private.mount, "-o", "remount,bind,rw", place)
        yield
