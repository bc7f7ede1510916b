# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer plug`` and ``unplug`` with real QEMUs: into guests that run, what is refused, and that nothing is left."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import provision
from integration.guest import Guest, as_user
from integration.plugged import ROOT_PORT, SANDBOX, Idle, exists, idle, open_files
from integration.provision import Provisioned
from integration.traffic import follow, verify
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
TAP = "qspl0"
NIC = f"id=net1,queues={QUEUES},ifname={TAP}"
MACHINES = {"i440fx": ("-machine", "pc"), "q35": ROOT_PORT}


def flows_are_right(guest: Guest, files: Provisioned) -> None:
    """Every flow is where the guest's own key and table say, in the guest and by the host's kernel."""
    verdict = verify(follow(guest, TAP, files.flowrx, queues=QUEUES), guest.rss(), queues=QUEUES)
    assert (verdict.mismatches, verdict.host_mismatches, verdict.lost) == (0, 0, 0)
    assert verdict.flows == 4096


def bring_up(guest: Guest) -> None:
    guest.run("for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done; ip link set eth0 up")


@pytest.mark.parametrize("machine", MACHINES)
def test_a_nic_for_a_guest_that_runs(files: Provisioned, user: str, machine: str) -> None:
    plug_twice(files, user, machine)


@pytest.mark.compat
@pytest.mark.parametrize("machine", MACHINES)
def test_a_nic_for_a_guest_of_a_new_qemu(user: str, machine: str) -> None:
    files = provision.with_qemu(provision.provision(), provision.provision_new_qemu())
    with provision.readable_by(user, files) as readable:
        plug_twice(readable, user, machine)


def plug_twice(files: Provisioned, user: str, machine: str) -> None:
    arguments = (*MACHINES[machine], "-sandbox", SANDBOX)
    with Guest(files, name="plug", user=user, prefix=as_user(user), arguments=arguments) as guest:
        guest.wait_ready()
        before, socket = open_files(guest.pid), ("--qmp", str(guest.qmp))
        for equal in (3, 2):
            done = support.qsteer("plug", *socket, "--tap", NIC)
            assert done.returncode == 0, done.stderr
            print(done.stdout)
            bring_up(guest)
            if equal == 3:
                guest.run("ethtool -X eth0 equal 3")
                flows_are_right(guest, files)
            guest.run("ethtool -X eth0 weight 1 2 3 2")
            flows_are_right(guest, files)
            (seen,) = json.loads(support.qsteer("status", "--dev", TAP, "-j").stdout)["taps"]
            assert (seen["state"], seen["source"]) == ("ok", "shared-maps")
            (mac,) = re.findall("52(?::[0-9a-f]{2}){5}", done.stdout)
            for named in (("--nic", "net1"), ("--mac", mac)):
                found = support.qsteer("apply", "--pid", str(guest.pid), *named)
                assert (found.returncode, found.stderr) == (0, "") and "unchanged" in found.stdout

            done = support.qsteer("unplug", *socket, "--nic", "net1")
            assert done.returncode == 0, done.stderr
            print(done.stdout)
            assert "eth0" not in guest.run("ls /sys/class/net")
            assert open_files(guest.pid) == before and not exists(TAP)
            support.wait_until("the program's end", lambda: not support.programs_of(TAP))
        uid, capabilities = guest.credentials()
        assert uid and not int(capabilities, 16)


@pytest.fixture(scope="module")
def i440fx(files: Provisioned, user: str) -> Iterator[Idle]:
    """A QEMU to which nothing happens for good; it has a netdev that its ``info network`` does not call one."""
    hub = ("-netdev", "hubport,id=hub1,hubid=0")
    with idle(files.qemu, user, "-machine", "pc", "-netdev", "user,id=net0", "-device", "e1000,id=nic0", *hub) as qemu:
        yield qemu


@contextlib.contextmanager
def nothing_changes(qemu: Idle) -> Iterator[None]:
    before = open_files(qemu.pid), qemu.netdevs(), qemu.ask("qom-list", path="/machine/peripheral")
    yield
    assert (open_files(qemu.pid), qemu.netdevs(), qemu.ask("qom-list", path="/machine/peripheral")) == before
    assert not exists(TAP)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in done.stderr and done.returncode, done.stderr
    (said,) = [line for line in done.stderr.splitlines() if not line.startswith("hint: ")]
    return said


REFUSED = {
    "a netdev's id": (NIC.replace("net1", "net0"), (), 2, 'a netdev "net0" already'),
    "a device's id": (NIC.replace("net1", "nic0"), (), 2, 'a device "nic0" already'),
    "an id that netdev_add refuses": (NIC.replace("net1", "hub1"), (), 1, "netdev_add: Duplicate ID"),
    "no such bus": (NIC, ("--bus", "nowhere"), 1, "device_add: Bus 'nowhere' not found"),
    "a bus of another kind": (NIC, ("--bus", "isa.0"), 1, "device_add: "),
    "no MAC": (f"{NIC},mac=52:54", (), 2, "mac="),
    "no such bridge": (f"{NIC},bridge=qspl-nowhere", (), 3, "qspl-nowhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(i440fx: Idle, case: str) -> None:
    tap, options, code, words = REFUSED[case]
    with nothing_changes(i440fx):
        done = i440fx.plug(tap, *options)
        assert words in one_line(done) and done.returncode == code, done.stderr


def test_a_name_in_use(i440fx: Idle) -> None:
    with support.tap(TAP, 2):
        assert f'"{TAP}" is in use' in one_line(i440fx.plug(NIC))


def test_a_qemu_without_room_for_fds(files: Provisioned) -> None:
    """QEMU gets the message, and no fd with it.  It is root's here, so that its limit can be set from outside."""
    with idle(files.qemu, "root") as qemu, nothing_changes(qemu):
        used = len(list(Path(f"/proc/{qemu.pid}/fd").iterdir()))
        soft, hard = resource.prlimit(qemu.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(qemu.pid, resource.RLIMIT_NOFILE, (used + 4, hard))
        done = qemu.plug(NIC)
        resource.prlimit(qemu.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert "getfd: No file descriptor supplied" in one_line(done)


def test_a_root_port_takes_one(files: Provisioned, user: str) -> None:
    with idle(files.qemu, user, *ROOT_PORT) as qemu:
        assert qemu.plug("id=net1,queues=2,ifname=qspl1").returncode == 0
        with nothing_changes(qemu):
            done = qemu.plug("id=net2,queues=2")
            assert done.returncode == 5 and "its 1 PCIe port is taken" in one_line(done)
            assert "-device pcie-root-port" in done.stderr
            for bus in ("rp0", "pcie.0"):
                done = qemu.plug(f"id=net2,queues=2,ifname={TAP}", "--bus", bus)
                assert done.returncode == 1 and "device_add" in one_line(done)
        done = qemu.plug("id=net3,queues=2,mac=52:54:00:00:00:01", "--bus", "x\ny")
        assert done.returncode == 2
        done = qemu.unplug("net1", "--timeout", "0.5")
        assert done.returncode == 8 and "nothing was changed" in done.stderr
        assert qemu.unplug("net2").returncode == 3
        # The guest's reset lets go of it.
        qemu.ask("cont")
        qemu.ask("system_reset")
        support.wait_until("the NIC's end", lambda: "net1" not in str(qemu.ask("qom-list", path="/machine/peripheral")))
        assert "type=tap" in qemu.netdevs()
        done = qemu.unplug("net1")
        assert done.returncode == 0 and "type=tap" not in qemu.netdevs() and not exists("qspl1"), done.stderr


def test_a_nic_that_qsteer_did_not_plug(files: Provisioned) -> None:
    """It has no id, and its tap is persistent."""
    tap = "qspl2"
    subprocess.run(["ip", "tuntap", "add", tap, "mode", "tap", "multi_queue"], check=True)
    try:
        netdev = f"tap,id=net0,ifname={tap},queues=2,script=no,downscript=no"
        nic = ("-netdev", netdev, "-device", "virtio-net-pci,netdev=net0,mq=on")
        with idle(files.qemu, "root", "-machine", "pc", *nic) as qemu:
            assert qemu.unplug("net0", "-n").returncode == 0
            assert qemu.unplug("net0", "--timeout", "0").returncode == 8
            qemu.ask("cont")
            qemu.ask("system_reset")
            anonymous = "/machine/peripheral-anon"
            support.wait_until("the NIC's end", lambda: "virtio" not in str(qemu.ask("qom-list", path=anonymous)))
            done = qemu.unplug("net0")
            assert done.returncode == 0 and f"tap {tap} stays: it is persistent" in done.stdout, done.stderr
            assert "tap" not in qemu.netdevs()
    finally:
        subprocess.run(["ip", "link", "del", tap], check=True)


def test_wrong_sockets(i440fx: Idle, tmp_path: Path) -> None:
    missing = support.qsteer("plug", "--qmp", str(tmp_path / "none"), "--tap", NIC)
    assert missing.returncode == 3 and "none" in one_line(missing)
    with nothing_changes(i440fx):
        with socket.socket(socket.AF_UNIX) as other:
            other.connect(str(i440fx.path))
            other.recv(1)
            done = i440fx.plug(NIC)
            assert done.returncode == 8 and "another client may hold that monitor" in done.stderr
        assert support.qsteer("plug", "--pid", str(os.getpid()), "--tap", NIC).returncode == 3
        no_vm = support.qsteer("plug", "--vm", "qspl-none", "--tap", NIC)
        assert no_vm.returncode == 3 and 'no VM "qspl-none" runs' in one_line(no_vm)


def test_no_right_to_make_a_tap(files: Provisioned) -> None:
    with idle(files.qemu, "root") as qemu, nothing_changes(qemu):
        rights = ("setpriv", "--securebits=+noroot", "--inh-caps=-all", "--ambient-caps=-all", "--bounding-set=-all")
        command = (sys.executable, "-m", "qsteer", "plug", "--qmp", str(qemu.path), "--tap", NIC)
        done = subprocess.run((*rights, *command), capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 4 and "CAP_NET_ADMIN" in done.stderr, done.stderr


def test_on_a_bridge(files: Provisioned, user: str) -> None:
    bridge = "qsplbr"
    subprocess.run(["ip", "link", "add", bridge, "mtu", "1400", "type", "bridge"], check=True)
    try:
        with idle(files.qemu, user) as qemu:
            done = qemu.plug(f"{NIC},bridge={bridge},mtu=1300,mac=52:54:00:00:00:77", "-j")
            assert json.loads(done.stdout)["bridge"] == bridge
            link = Path("/sys/class/net", TAP)
            assert (link / "master").resolve().name == bridge and (link / "mtu").read_text() == "1300\n"
            path = "/machine/peripheral/net1"
            assert qemu.ask("qom-get", path=path, property="mac") == "52:54:00:00:00:77"
            assert qemu.ask("qom-get", path=path, property="host_mtu") == 1300
            other = qemu.plug("id=net2,queues=2,mac=52:54:00:00:00:77")
            assert other.returncode == 2 and "net1 has MAC 52:54:00:00:00:77 already" in one_line(other)
    finally:
        subprocess.run(["ip", "link", "del", bridge], check=True)


AT_STEP = """
import os, sys
from qsteer import plug
from qsteer.__main__ import main
do, done = plug._Changes.do, 0
async def counted(*arguments, **options):
    global done
    await do(*arguments, **options)
    done += 1
    if done == {step}:
        os.kill({pid}, {signal})
plug._Changes.do = counted
sys.exit(main())
"""
STEPS = {"the first fd is named": 1, "all fds are named": QUEUES + 4, "the netdev is there": QUEUES + 5}


def plug_and_die(qemu: Idle, step: int, number: signal.Signals, pid: str = "os.getpid()") -> tuple[int, str]:
    """Plug, with a signal to some process after so many steps; exit status, and what was said."""
    code = AT_STEP.format(step=step, pid=pid, signal=int(number))
    done = subprocess.run(
        [sys.executable, "-c", code, "plug", "--qmp", str(qemu.path), "--tap", NIC],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize("step", STEPS)
def test_a_signal_leaves_nothing(i440fx: Idle, step: str) -> None:
    with nothing_changes(i440fx):
        code, said = plug_and_die(i440fx, STEPS[step], signal.SIGTERM)
        assert (code, said) == (1, "qsteer: stopped by SIGTERM\n")


@pytest.mark.parametrize("step", STEPS)
def test_a_killed_qsteer_and_the_next_one(files: Provisioned, user: str, step: str) -> None:
    """QEMU keeps what has a name, and with it the tap; the next plug gets over that."""
    with idle(files.qemu, user) as qemu:
        before = open_files(qemu.pid)
        assert plug_and_die(qemu, STEPS[step], signal.SIGKILL)[0] == -signal.SIGKILL
        assert exists(TAP) and open_files(qemu.pid) != before
        if step == "the netdev is there":
            refused = qemu.plug(NIC)
            assert refused.returncode == 2 and "qsteer unplug --nic net1 removes it" in refused.stderr
            assert qemu.unplug("net1").returncode == 0
            assert not exists(TAP) and open_files(qemu.pid) == before
        assert qemu.plug(NIC).returncode == 0
        assert sum((open_files(qemu.pid) - before).values()) == QUEUES + 4


@pytest.mark.parametrize("step", STEPS)
def test_a_qemu_that_dies(files: Provisioned, user: str, step: str) -> None:
    with idle(files.qemu, user) as qemu:
        code, said = plug_and_die(qemu, STEPS[step], signal.SIGKILL, pid=str(qemu.pid))
        assert code == 1 and "broke off" in said and "hint" not in said, said
        assert not exists(TAP)
    support.wait_until("the program's end", lambda: not support.programs_of(TAP))


@pytest.mark.compat
def test_an_old_qemu(old_qemu: Path, user: str) -> None:
    """It takes no program; without RSS it takes a NIC."""
    with idle(old_qemu, "root") as qemu:
        with nothing_changes(qemu):
            done = qemu.plug(NIC)
            assert done.returncode == 5 and "7.2" in one_line(done) and "rss=off" in done.stderr
        assert qemu.plug(f"{NIC},rss=off").returncode == 0
        assert "type=tap" in qemu.netdevs()
