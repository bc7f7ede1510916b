# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer run`` with a real QEMU: what it gives QEMU, what it refuses, and that nothing is left behind."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from integration.provision import Provisioned
from qsteer import kernel, procs, programs, qmp
from qsteer.model import OpenQueue, Source
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

WAIT_S = 30.0
MAC = re.compile("52(?::[0-9a-f]{2}){5}")
TAP = "qsrun0"
IDLE = ("-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none", "-S")


def our_queues(name: str = TAP) -> tuple[OpenQueue, ...]:
    return tuple(queue for queue in kernel.open_queues() if queue.tap == name)


def link_exists(name: str = TAP) -> bool:
    return Path("/sys/class/net", name).exists()


class Running:
    """``qsteer run`` that has become QEMU, with a QMP socket."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.qmp_path = folder / "qmp"
        self.stderr = folder / "stderr"

    def qmp(self, command: str, **arguments: object) -> Any:
        return qmp.execute(str(self.qmp_path), command, arguments)


@contextlib.contextmanager
def running(files: Provisioned, user: str, *options: str, arguments: Sequence[str] = ()) -> Iterator[Running]:
    with tempfile.TemporaryDirectory(prefix="qsteer-run-") as name:
        folder = Path(name)
        folder.chmod(0o777)
        command = [*qsteer_run(files.qemu, user, *options), *IDLE, *arguments]
        with (folder / "stderr").open("w") as stderr:
            process = subprocess.Popen(
                [*command, "-qmp", f"unix:{folder}/qmp,server=on,wait=off"],
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                text=True,
            )
        started = Running(process, folder)
        try:
            support.wait_until("QEMU's QMP socket", lambda: started.qmp_path.exists() or process.poll() is not None)
            assert process.poll() is None, started.stderr.read_text()
            yield started
        finally:
            process.kill()
            process.wait()


def qsteer_run(qemu: Path | str, user: str, *options: str) -> list[str]:
    taps = [] if "--tap" in options else ["--tap", f"id=net0,queues=4,ifname={TAP}"]
    return [sys.executable, "-m", "qsteer", "run", *taps, "--user", user, *options, "--", str(qemu)]


def refused(*command: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("qsteer: ")]
    assert len(said) == 1, done.stderr
    return done


def test_what_qemu_gets(files: Provisioned, user: str) -> None:
    with running(files, user, "--vm", "idle") as qemu:
        status = dict(
            line.split(":\t", 1) for line in Path(f"/proc/{qemu.process.pid}/status").read_text().splitlines()
        )
        assert "qemu" in status["Name"]
        assert status["Uid"].split()[1] != "0"
        for capabilities in ("CapEff", "CapPrm", "CapInh", "CapAmb"):
            assert int(status[capabilities], 16) == 0
        assert Path(f"/proc/{qemu.process.pid}/task/{qemu.process.pid}/children").read_text() == ""

        queues = our_queues()
        assert {queue.pid for queue in queues} == {qemu.process.pid}
        assert len(queues) == 4 and queues[0].active + queues[0].disabled == 4
        (program,) = procs.held_programs(qemu.process.pid)
        info = programs.program_info(program)
        assert info.ident and info.ident.tap == TAP and info.ident.source is Source.SHARED_MAPS

        assert qemu.qmp("query-name") == {"name": "idle"}
        device = next(
            child for child in qemu.qmp("qom-list", path="/machine/peripheral-anon") if "device" in child["name"]
        )
        path = f"/machine/peripheral-anon/{device['name']}"
        assert qemu.qmp("qom-get", path=path, property="rss") is True
        assert qemu.qmp("qom-get", path=path, property="mq") is True
        assert qemu.qmp("qom-get", path=path, property="vectors") == 10

        done = support.qsteer("status", "--vm", "idle", "--json")
        (seen,) = json.loads(done.stdout)["taps"]
        assert (seen["tap"], seen["state"]) == (TAP, "ready, the guest has not asked for RSS")
        assert "ready" in support.qsteer("apply", "--vm", "idle").stdout
    assert not link_exists()


def test_a_mac_that_stays(files: Provisioned, user: str) -> None:
    said = []
    for _ in range(2):
        with running(files, user, "--vm", "idle") as qemu:
            said.append(MAC.findall(qemu.stderr.read_text()))
    with running(files, user, "--vm", "other") as qemu:
        said.append(MAC.findall(qemu.stderr.read_text()))
    assert said[0] == said[1] != said[2]
    assert len(said[0]) == 1


def test_several_nics_and_a_device_of_the_users_own(files: Provisioned, user: str) -> None:
    own = "virtio-net-pci,id=nic1,netdev=net1,mac=52:54:00:00:00:77,host_mtu=1400"
    options = ("--tap", f"id=net0,queues=2,ifname={TAP}", "--tap", "id=net1,queues=3,ifname=qsrun1")
    with running(files, user, *options, arguments=("-device", own)) as qemu:
        assert len(our_queues()) == 2 and len(our_queues("qsrun1")) == 3
        path = "/machine/peripheral/nic1"
        assert qemu.qmp("qom-get", path=path, property="mac") == "52:54:00:00:00:77"
        assert qemu.qmp("qom-get", path=path, property="host_mtu") == 1400
        assert qemu.qmp("qom-get", path=path, property="vectors") == 8
        assert len(procs.held_programs(qemu.process.pid)) == 2
    assert not link_exists() and not link_exists("qsrun1")


def test_on_a_bridge(files: Provisioned, user: str) -> None:
    bridge = "qsrunbr"
    subprocess.run(["ip", "link", "add", bridge, "mtu", "1400", "type", "bridge"], check=True)
    try:
        with running(files, user, "--tap", f"id=net0,queues=4,ifname={TAP},bridge={bridge}"):
            link = Path("/sys/class/net", TAP)
            assert (link / "master").resolve().name == bridge
            assert (link / "mtu").read_text().strip() == "1400"
            # The bridge must not take a guest's address for its own: a port's begins with fe.
            assert (link / "address").read_text().startswith("fe:")
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)


def test_qemus_death_leaves_nothing(files: Provisioned, user: str) -> None:
    for end in (signal.SIGKILL, signal.SIGTERM):
        with running(files, user) as qemu:
            assert support.programs_of(TAP)
            qemu.process.send_signal(end)
            qemu.process.wait(WAIT_S)
            support.wait_until("the tap's end", lambda: not link_exists())
            # Programs are freed after an RCU grace period.
            support.wait_until("the program's end", lambda: not support.programs_of(TAP))


STEPS = {
    "the first tap is open": "kernel.open_tap",
    "the link is set up": "ready._set_up_link",
    "the program is loaded": "programs.load_program",
    "QEMU's command line is made": "runplan.qemu_argv",
    "the user is changed": "run._become",
}


@pytest.mark.parametrize("step", STEPS, ids=STEPS)
@pytest.mark.parametrize("how", ["os.kill(os.getpid(), 9)", "raise_error()"])
def test_death_at_each_step_leaves_nothing(files: Provisioned, user: str, step: str, how: str) -> None:
    """qsteer is killed, or fails, right after each step of run."""
    patch = f"""
import os, sys
from qsteer import kernel, programs, qmp, ready, run, runplan
from qsteer.__main__ import main
from qsteer.errors import QsteerError
probe = qmp.probe
def raise_error():
    raise QsteerError("made to fail")
def and_die(step):
    def dying(*arguments, **options):
        step(*arguments, **options)
        {how}
    return dying
def arm(*arguments, **options):
    answer = probe(*arguments, **options)
    {STEPS[step]} = and_die({STEPS[step]})
    return answer
qmp.probe = arm
sys.exit(main())
"""
    command = qsteer_run(files.qemu, user)
    done = subprocess.run(
        [sys.executable, "-c", patch, *command[3:], *IDLE], capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    killed = "kill" in how
    assert done.returncode == (-signal.SIGKILL if killed else 1), done.stderr
    if not killed:
        assert "qsteer: made to fail" in done.stderr and "Traceback" not in done.stderr
    support.wait_until("the tap's end", lambda: not link_exists())
    support.wait_until("the program's end", lambda: not support.programs_of(TAP))


def test_a_qemu_that_refuses_its_command_line_leaves_nothing(files: Provisioned, user: str) -> None:
    command = [*qsteer_run(files.qemu, user), *IDLE, "-device", "no-such-device"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 1 and "no-such-device" in done.stderr
    support.wait_until("the tap's end", lambda: not link_exists())


def test_an_old_qemu_is_refused(old_qemu: Path) -> None:
    done = refused(*qsteer_run(old_qemu, "root"), *IDLE)  # who can read it, wherever the checkout is
    assert done.returncode == 5 and "7.2" in done.stderr
    assert not link_exists()


def test_a_name_in_use(files: Provisioned, user: str) -> None:
    with support.tap(TAP, 2):
        done = refused(*qsteer_run(files.qemu, user), *IDLE)
        assert f'"{TAP}" is in use' in done.stderr
        assert len(our_queues()) == 2
    with running(files, user, "--vm", "idle") as qemu:
        done = refused(*qsteer_run(files.qemu, user, "--vm", "idle", "--tap", "id=net0,queues=2"), *IDLE)
        assert '"idle"' in done.stderr and str(qemu.process.pid) in done.stderr


BAD = {
    "unknown bridge": ("id=net0,queues=4,ifname=qsrun0,bridge=qs-nowhere", "qs-nowhere"),
    "a bridge that is none": ("id=net0,queues=4,ifname=qsrun0,bridge=lo", "lo"),
    "too many queues": ("id=net0,queues=257", "257"),
    "no queues": ("id=net0,queues=0", "0"),
    "queues of words": ("id=net0,queues=many", "many"),
    "no id": ("queues=4", "id"),
    "a bad id": ("id=9net,queues=4", "9net"),
    "a long name": ("id=net0,queues=4,ifname=abcdefghijklmnopq", "abcdefghijklmnopq"),
    "a bad name": ("id=net0,queues=4,ifname=a/b", "a/b"),
    "a group MAC": ("id=net0,queues=4,mac=01:00:5e:00:00:01", "01:00:5e"),
    "not a MAC": ("id=net0,queues=4,mac=52:54", "52:54"),
    "MTU": ("id=net0,queues=4,mtu=12", "12"),
    "vhost": ("id=net0,queues=4,vhost=maybe", "maybe"),
    "rss": ("id=net0,queues=4,rss=perhaps", "perhaps"),
    "unknown key": ("id=net0,queues=4,colour=red", "colour"),
}


@pytest.mark.parametrize("case", BAD, ids=BAD)
def test_bad_input_is_one_line(files: Provisioned, user: str, case: str) -> None:
    tap, words = BAD[case]
    done = refused(*qsteer_run(files.qemu, user, "--tap", tap), *IDLE)
    assert words in done.stderr
    assert not link_exists()


def test_no_such_user(files: Provisioned) -> None:
    assert "qs-nobody" in refused(*qsteer_run(files.qemu, "qs-nobody"), *IDLE).stderr
    done = refused(sys.executable, "-m", "qsteer", "run", "--tap", "id=net0,queues=4", "--", str(files.qemu))
    assert done.returncode == 2 and "--user" in done.stderr


def test_no_such_qemu(user: str) -> None:
    assert "qs-qemu" in refused(*qsteer_run("qs-qemu", user)).stderr
    assert refused(*qsteer_run("/bin/true", user)).returncode != 0


def test_no_right_to_load_bpf(files: Provisioned) -> None:
    """CAP_NET_ADMIN makes the tap; without CAP_BPF that is as far as it goes, and the tap goes again."""
    rights = "-all,+net_admin,+setuid,+setgid,+dac_read_search"  # the last for a checkout in a closed home
    some = ("setpriv", "--securebits=+noroot", f"--inh-caps={rights},+setpcap", f"--ambient-caps={rights}")
    done = refused(*some, *qsteer_run(files.qemu, "root"), *IDLE)
    assert done.returncode == 4 and "CAP_BPF" in done.stderr
    assert not link_exists()


WITHOUT_VHOST = """
device=/dev/vhost-net
[ ! -e $device ] || { mount --bind $device $device && mount -o remount,bind,nodev $device; } || exit 99
exec "$@"
"""
"""A machine whose /dev/vhost-net, if there is one, does not open."""


def test_vhost_without_the_device(files: Provisioned, user: str) -> None:
    command = qsteer_run(files.qemu, user, "--tap", f"id=net0,queues=4,ifname={TAP},vhost=on")
    done = refused("unshare", "--mount", "sh", "-c", WITHOUT_VHOST, "sh", *command, *IDLE)
    assert done.returncode == 5 and "vhost" in done.stderr


def test_a_dry_run_makes_nothing(files: Provisioned, user: str) -> None:
    command = qsteer_run(files.qemu, user)
    done = subprocess.run([*command[:4], "-n", *command[4:], *IDLE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ebpf-rss-fds" in done.stdout and "load a steering program" in done.stdout
    rehearsal = json.loads(support.qsteer(*command[3:4], "-n", "-j", *command[4:], *IDLE).stdout)
    assert rehearsal["schema"] == "qsteer.run/1" and "-netdev" in rehearsal["command"]
    assert not link_exists()
