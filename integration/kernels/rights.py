# SPDX-License-Identifier: BSD-2-Clause
"""Which capabilities each verb takes on this kernel, and what the kernel's settings do to qsteer: measured.

    python -m integration.kernels.rights FILE [--for-good]

Takes root.  FILE gets JSON.  --for-good also sets what only a reboot takes back: for a machine that goes away.

Theory of operation
-------------------
Each verb (``verbs``) runs with every capability first; what comes of it then is what it
has to do with less.  Capabilities are taken away one by one, CAP_SYS_ADMIN first, for it stands for CAP_BPF and
CAP_PERFMON, too; what is left is needed.  Then each of these is missing alone, and what qsteer says is kept.  Where it
does a part of its work without CAP_SYS_ADMIN, what that part takes is a row of its own.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from integration.kernels import verbs
from integration.kernels.verbs import VERBS, Outcome, Prefix, Vm

ADMIN = "sys_admin"
AS_NOBODY = ("status", "show", "apply", "run -n", "run")

SYSCTLS = (
    *(("/proc/sys/kernel/unprivileged_bpf_disabled", value) for value in "02"),
    ("/proc/sys/net/core/bpf_jit_harden", "2"),
    ("/proc/sys/net/core/bpf_jit_enable", "0"),
    ("/proc/sys/kernel/perf_event_paranoid", "4"),
    ("/proc/sys/kernel/kptr_restrict", "2"),
    *(("/proc/sys/kernel/yama/ptrace_scope", value) for value in "012"),
)
FOR_GOOD = (
    ("/proc/sys/kernel/unprivileged_bpf_disabled", "1"),
    ("/sys/kernel/security/lockdown", "integrity"),
    ("/sys/kernel/security/lockdown", "confidentiality"),
    ("/proc/sys/kernel/yama/ptrace_scope", "3"),
)
HIDDEN = {
    "no BTF": "mount -t tmpfs none /sys/kernel/btf",
    "no BPF file system": "mount -t tmpfs none /sys/fs/bpf",
    "a read-only BPF file system": "mount -o remount,bind,ro /sys/fs/bpf",
    "no /proc/kallsyms, cgroups, debugfs, tracefs": "mount --bind /dev/null /proc/kallsyms; mount -t tmpfs none "
    "/sys/fs/cgroup; mount -t tmpfs none /sys/kernel/debug; mount -t tmpfs none /sys/kernel/tracing",
    "no /dev/net/tun": "mount -t tmpfs none /dev/net",
    "a read-only /run/qsteer": "mount -o remount,bind,ro /run/qsteer",
    "no sysfs": "mount -t tmpfs none /sys",
}
NAMESPACES = {
    "another pid namespace": ("--pid", "--fork", "--kill-child", "--mount-proc"),
    "root of a user namespace": ("--user", "--map-root-user"),
}
UNDER = ("status", "apply", "keep", "run, the first on a host")


def capabilities() -> tuple[str, ...]:
    """Those that this process has, CAP_SYS_ADMIN first, as setpriv calls them."""
    listed = subprocess.run(("setpriv", "--list-caps"), check=True, capture_output=True, text=True).stdout.split()
    found = re.search(r"^CapPrm:\t(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    have = [name for number, name in enumerate(listed) if int(found[1], 16) >> number & 1]
    return (ADMIN, *(name for name in have if name != ADMIN))


def setpriv(names: Sequence[str], *, root: bool) -> Prefix:
    rights = ",".join(("-all", *(f"+{name}" for name in names)))
    if root:
        return ("setpriv", f"--bounding-set={rights}", "--inh-caps=-all", "--")
    who = ("--reuid=65534", "--regid=65534", "--clear-groups")
    return ("setpriv", *who, f"--inh-caps={rights}", f"--ambient-caps={rights}", "--")


def rights(vm: Vm, name: str, every: Sequence[str], *, root: bool) -> Iterator[dict[str, object]]:
    """The row of a verb, and that of what it does without CAP_SYS_ADMIN."""
    verb, guess = VERBS[name]

    def with_only(names: Sequence[str]) -> Outcome:
        return verb(vm, setpriv(names, root=root))

    goal = with_only(every)
    without: dict[str, dict[str, object]] = {}
    needs = [one for one in every if one in guess]
    if not with_only(needs).is_as(goal):
        needs = list(every)
    for one in tuple(needs):
        less = with_only([other for other in (every if one == ADMIN else needs) if other != one])
        if less.is_as(goal):
            needs.remove(one)
        else:
            fell_back = not less.exit and "steered: no program" not in less.result
            without[one] = {**asdict(less), "fell_back": fell_back, "fine": less.is_in_order}
    row = {"verb": name, "user": "root" if root else "nobody", "every": ADMIN in every, "exit": goal.exit}
    yield {**row, "result": goal.result, "says": goal.says, "needs": needs, "without": without}
    if without.get(ADMIN, {}).get("fell_back"):
        yield from rights(vm, name, [one for one in every if one != ADMIN], root=root)


def under(vm: Vm, setting: str, prefix: Prefix = (), names: Sequence[str] = UNDER) -> Iterator[dict[str, object]]:
    for name in names:
        done = VERBS[name][0](vm, prefix)
        yield {"setting": setting, "verb": name, **asdict(done), "fine": done.is_in_order}


def settings(vm: Vm, files: Mapping[tuple[str, str], int | str]) -> Iterator[dict[str, object]]:
    yield from under(vm, "as it is")
    for name, script in HIDDEN.items():
        hide = ("unshare", "--mount", "sh", "-c", f"{script}; echo; exec sleep infinity")
        with subprocess.Popen(hide, stdout=subprocess.PIPE) as hidden:
            assert hidden.stdout and hidden.stdout.read(1) == b"\n"
            yield from under(vm, name, ("nsenter", f"--mount=/proc/{hidden.pid}/ns/mnt", f"--wd={Path.cwd()}"))
            hidden.kill()
    for name, options in NAMESPACES.items():
        yield from under(vm, name, ("unshare", *options), ("status", "apply"))
    for (path, value), file in files.items():
        setting = f"{path}={value}"
        try:
            if isinstance(file, str):
                raise OSError(0, file)
            before = os.pread(file, 64, 0)
            os.pwrite(file, value.encode(), 0)
        except OSError as error:
            yield {"setting": setting, "cannot be set": error.strerror}
            continue
        yield from under(vm, setting)
        if (path, value) not in FOR_GOOD:
            os.pwrite(file, before, 0)


def opened(path: str) -> int | str:
    """A setting's file, or why there is none.  Those of the network are the first network namespace's alone."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or ""


def main() -> int:
    """Exit code 1 where qsteer ended in a way that it should not."""
    parser = argparse.ArgumentParser(prog="python -m integration.kernels.rights", description=__doc__.split("\n")[0])
    parser.add_argument("file", metavar="FILE", type=Path)
    parser.add_argument("--for-good", action="store_true", help="set what only a reboot takes back, too")
    given = parser.parse_args()
    found: dict[str, list[dict[str, object]]] = {"verbs": [], "settings": []}

    def keep(kind: str, rows: Iterator[dict[str, object]]) -> None:
        for row in rows:
            print(json.dumps(row), flush=True)
            found[kind].append(row)
            given.file.write_text(json.dumps({"kernel": os.uname().release, **found}) + "\n")

    wanted = (*SYSCTLS, *(FOR_GOOD if given.for_good else ()))
    files = {setting: opened(setting[0]) for setting in wanted}
    with verbs.vm() as vm:
        for name in VERBS:
            keep("verbs", rights(vm, name, capabilities(), root=True))
        for name in AS_NOBODY:
            keep("verbs", rights(vm, name, capabilities(), root=False))
        keep("settings", settings(vm, files))
    return int('"fine": false' in given.file.read_text())


if __name__ == "__main__":
    sys.exit(main())
