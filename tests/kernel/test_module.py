# SPDX-License-Identifier: BSD-2-Clause
"""tun as a module: its own BTF describes its structures, and it can go and come back while qsteer runs.

They unload tun, so they are collected only where that may be done (conftest.py), and need a host without taps.
"""

import json
import lzma
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsteer import kernel, programs
from qsteer.errors import UnsupportedError
from qsteer.model import Source
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import private, standin, support
from tests.kernel.daemons import config_of, daemon, program_of, take_off

pytestmark = [pytest.mark.root, pytest.mark.tun_module]

TUN = Path("/sys/module/tun")
DEVICE = Path("/dev/net/tun")
BTF = Path("/sys/kernel/btf")
CONFIG = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(2, 0, 3, 1))
USES_TUN = "vhost_net"
FILLERS = ("team", "dummy", "bonding", "ifb", "macvlan", "nlmon", "vcan", "vxlan")
"""Modules of which one may take the place that tun has left."""


@pytest.fixture(autouse=True)
def tun(need_root: None) -> Iterator[None]:
    """Loaded, and used by nobody; afterwards it is as it was."""
    used_by = [path.name for path in (TUN / "holders").iterdir()]
    if used_by not in ([], [USES_TUN]):
        pytest.skip(f"{used_by} use tun, which cannot be unloaded")
    ends = time.monotonic() + support.WAIT_S  # taps of a network namespace that is gone live on for a moment
    while int((TUN / "refcnt").read_text()) > len(used_by):
        if time.monotonic() > ends:
            pytest.skip("something has a tap open, or left one behind: tun cannot be unloaded")
        time.sleep(0.05)
    mode = DEVICE.stat().st_mode & 0o777
    with support.network_namespace(), private.memory():
        yield
    modprobe("tun", *used_by)
    DEVICE.chmod(mode)


def modprobe(*arguments: str) -> None:
    subprocess.run(("modprobe", "--all", *arguments), check=True)


def unload() -> None:
    """As soon as no process is looking, which takes a moment."""

    def is_gone() -> bool:
        subprocess.run(("modprobe", "--remove", USES_TUN, "tun"), check=False, stderr=subprocess.DEVNULL)
        return not TUN.exists()

    support.wait_until("tun is unloaded", is_gone)


def address() -> str:
    """Where the module has its constants, its file operations among them."""
    return (TUN / "sections" / ".rodata").read_text()


def load_elsewhere() -> None:
    """Load tun where it was not before, so that what knew its addresses knows nothing any more."""
    before = address()
    unload()
    fillers = [name for name in FILLERS if not (TUN.parent / name).exists()]
    for count in range(1, len(fillers) + 1):
        modprobe(*fillers[:count], "tun")
        if address() != before:
            break
        unload()
    else:
        pytest.fail(f"tun is at {before.strip()} again, whatever is loaded before it")
    modprobe("--remove", *fillers[:count])


def check_looking() -> None:
    """What this process reads from the kernel of a new tap."""
    before = kernel.digest()
    with support.tap("qsmo0", 4) as tap:
        assert kernel.digest() != before
        held, nothing = kernel.holders_digest(), kernel.digest()
        program = programs.load_program(tap=tap.name, source=Source.STATIC, config=CONFIG)
        tap.attach(program)
        assert kernel.digest() != nothing
        queues = kernel.open_queues()
        assert [(queue.tap, queue.index, queue.active, queue.pid) for queue in queues] == [
            ("qsmo0", index, 4, os.getpid()) for index in range(4)
        ]
        assert {queue.program_id for queue in queues} == {program.id}
        program.close()
        with subprocess.Popen(["sleep", "60"], pass_fds=tap.open.fds[:1]) as other:
            assert kernel.holders_digest() != held
            other.kill()


def status(*prefix: str) -> subprocess.CompletedProcess[str]:
    command = (*prefix, sys.executable, "-m", "qsteer", "status", "--json")
    return subprocess.run(command, capture_output=True, text=True, check=False)


def describes_tun(name: str) -> bool:
    """Whether the kernel's BTF, or a module's, has a structure with a member that only tun's has."""
    return b"\0numdisabled\0" in (BTF / name).read_bytes()


# Module BTF


def test_status_reads_by_the_modules_own_btf() -> None:
    """Nothing else describes tun's structures: without it no number here could be right."""
    assert (describes_tun("vmlinux"), describes_tun("tun")) == (False, True)
    with standin.vm("qsmo-vm") as vm:
        assert support.qsteer("apply", "--vm", "qsmo-vm").returncode == 0
        done = status()
        assert (done.returncode, done.stderr) == (0, "")
        (seen,) = json.loads(done.stdout)["taps"]
        assert seen["queues"] == {"active": 4, "attached": 4, "used": None}
        assert (seen["tap"], seen["holder"]["pid"], seen["state"]) == ("qsmo-vm", vm.pid, "ok")
        assert seen["program"]["id"] == program_of(vm) != 0


def hide(*shown: str) -> tuple[str, ...]:
    """A prefix of commands: /sys/kernel/btf has no more than these, in a mount namespace of the command's own."""
    script = f'd=$(mktemp -d) && mount --bind {BTF} "$d" && mount -t tmpfs none {BTF} || exit 99\n'
    for name in shown:
        script += f'touch {BTF}/{name} && mount --bind "$d/{name}" {BTF}/{name} || exit 99\n'
    return ("unshare", "--mount", "sh", "-c", script + 'exec "$@"', "sh")


def test_the_modules_file_in_sysfs_is_not_needed() -> None:
    """The kernel gives the BTF of its modules by their ids, too."""
    with support.tap("qsmo0", 4):
        done = status(*hide("vmlinux"))
        assert (done.returncode, done.stderr) == (0, "")
        (seen,) = json.loads(done.stdout)["taps"]
        assert seen["queues"]["attached"] == 4


def refused(*command: str, prefix: tuple[str, ...] = ()) -> str:
    """What a command says that is not possible here: a line, a hint, exit code 5, and nothing on stdout."""
    done = subprocess.run(
        (*prefix, sys.executable, "-m", "qsteer", *command),
        capture_output=True,
        text=True,
        check=False,
        timeout=support.patience(60),
    )
    said = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(said)) == (5, "", 2), done.stderr
    assert said[0].startswith("qsteer: ") and said[1].startswith("hint: ")
    return said[0].removeprefix("qsteer: ")


NO_BTF = f"cannot read from the kernel what is attached to its taps: this kernel has no BTF ({BTF}/vmlinux is missing)"


def test_a_kernel_without_btf() -> None:
    with support.tap("qsmo0", 4):
        done = status(*hide())
        document = json.loads(done.stdout)
        assert done.returncode == 0 and [tap["tap"] for tap in document["taps"]] == ["qsmo0"]
        assert [note.partition(" (it takes")[0] for note in document["notes"]] == [NO_BTF]
        assert refused("apply", "--dev", "qsmo0", prefix=hide()) == NO_BTF


NO_MODULE_BTF = (
    f"cannot read from the kernel what is attached to its taps: tun is a module without BTF ({BTF}/tun is missing)"
)


@pytest.fixture
def undescribed(tmp_path: Path) -> Path:
    """The module's file, but for its BTF."""
    objcopy = shutil.which("llvm-objcopy") or shutil.which("objcopy")
    if not objcopy:
        pytest.skip("no objcopy")
    found = subprocess.run(("modinfo", "-F", "filename", "tun"), check=True, capture_output=True, text=True)
    packed = Path(found.stdout.strip())
    content = packed.read_bytes()
    if packed.suffix == ".xz":
        content = lzma.decompress(content)
    elif packed.suffix != ".ko":
        pytest.skip(f"nothing here to unpack {packed.name}")
    whole, stripped = tmp_path / "whole.ko", tmp_path / "tun.ko"
    whole.write_bytes(content)
    subprocess.run((objcopy, "--remove-section=.BTF", "--remove-section=.BTF.base", whole, stripped), check=True)
    return stripped


def test_a_module_without_btf(undescribed: Path) -> None:
    """As where it was built without: the taps are seen, and nobody touches them."""
    unload()
    subprocess.run(("insmod", undescribed), check=True)
    try:
        assert not (BTF / "tun").exists()
        with standin.vm("qsmo-vm"):
            done = status()
            document: dict[str, Any] = json.loads(done.stdout)
            assert done.returncode == 0 and [tap["tap"] for tap in document["taps"]] == ["qsmo-vm"]
            assert [note.partition(" (it takes")[0] for note in document["notes"]] == [NO_MODULE_BTF]
            for verb in (("apply", "--vm", "qsmo-vm"), ("off", "--all"), ("keep", "--all"), ("status", "--check")):
                assert refused(*verb) == NO_MODULE_BTF
            with pytest.raises(UnsupportedError):
                kernel.digest()
    finally:
        load_elsewhere()
    check_looking()


def test_module_btf_takes_a_capability() -> None:
    """CAP_SYS_ADMIN; without it that is what status names."""
    rights = "-all,+bpf,+perfmon,+dac_read_search,+sys_ptrace"
    bare = ("setpriv", "--securebits=+noroot", f"--inh-caps={rights}", f"--ambient-caps={rights}")
    with support.tap("qsmo0", 4):
        done = status(*bare)
        document = json.loads(done.stdout)
        assert done.returncode == 0 and [tap["tap"] for tap in document["taps"]] == ["qsmo0"]
        (note,) = document["notes"]
        assert "this process lacks CAP_SYS_ADMIN, which it takes where tun is a module" in note
        checked = subprocess.run(
            (*bare, sys.executable, "-m", "qsteer", "status", "--check"), capture_output=True, text=True, check=False
        )
        assert checked.returncode == 4 and "CAP_SYS_ADMIN" in checked.stderr


# Unloaded and loaded again


def test_this_process_looks_at_the_module_that_is_there() -> None:
    check_looking()
    unload()
    assert (kernel.open_queues(), kernel.digest(), kernel.holders_digest()) == ((), 0, 0)
    assert support.qsteer("status").stdout == "no process holds a tap\n"
    assert not TUN.exists(), "looking has loaded it"
    modprobe("tun")
    check_looking()
    load_elsewhere()
    check_looking()


def test_keep_and_monitor_outlive_the_module() -> None:
    """Every VM is steered and told of, whichever module its tap belongs to."""
    with daemon("keep", "qsmo0") as keep, daemon("monitor") as monitor:
        for again in range(3):
            with standin.vm("qsmo0") as vm:
                assert monitor.wait_for("tap-appeared")["new"] == {"active": 4, "attached": 4}
                keep.wait_for("steered")
                config = config_of(vm)
                vm.check_packets(config)
                if again:  # what is under way when the module goes is not what is looked for here
                    take_off(vm)
                    keep.wait_for("put-back")
                    vm.check_packets(config)
            keep.wait_for("vm-gone")
            monitor.wait_for("vm-gone")
            load_elsewhere()
        assert keep.stop() == monitor.stop() == 0


def make_node(path: Path, major: int, minor: int) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(major, minor))


def test_a_device_node_that_comes_late() -> None:
    """The driver is there before its node in /dev is: who looks in between looks again."""
    with daemon("keep", "qsmo0") as keep, daemon("monitor") as monitor:
        unload()
        private.mount("-t", "tmpfs", "none", "/dev")
        try:
            make_node(Path("/dev/null"), 1, 3)
            DEVICE.parent.mkdir()
            modprobe("tun")
            support.wait_until("both say so", lambda: all("cannot look" in one.said() for one in (keep, monitor)))
            make_node(DEVICE, 10, 200)
            with standin.vm("qsmo0") as vm:
                keep.wait_for("steered")
                assert monitor.wait_for("tap-appeared")["new"] == {"active": 4, "attached": 4}
                vm.check_packets(config_of(vm))
        finally:
            private.unmount("/dev")
        for one in (keep, monitor):
            assert one.said().count("cannot look: cannot open /dev/net/tun: No such file or directory") == 1


def test_the_module_comes_and_goes_while_a_process_looks() -> None:
    """Whatever moment it is that the module goes or comes, keep and monitor go on."""
    with daemon("keep", "qsmo0") as keep, daemon("monitor") as monitor:
        ends = time.monotonic() + support.patience(2.0)
        while time.monotonic() < ends:
            unload()
            modprobe("tun")
        assert keep.process.poll() is None, keep.said()
        assert monitor.process.poll() is None, monitor.said()
        with standin.vm("qsmo0") as vm:
            keep.wait_for("steered")
            assert monitor.wait_for("tap-appeared")["new"] == {"active": 4, "attached": 4}
            vm.check_packets(config_of(vm))
