# SPDX-License-Identifier: BSD-2-Clause
"""Reading a real guest through the real QEMU guest agent: what ethtool says there, and what the device was told."""

import contextlib
import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from integration import provision
from integration.agent_guest import agent_arguments, restart_agent, stop_agent, with_agent
from integration.guest import Guest, as_user
from integration.provision import Provisioned
from qsteer import agent, devicestate, ethtool, inventory, kernel, peer, procs, qmp
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.model import Process, Reading, Source
from qsteer.rss import BASE_TYPES, HashType, RssConfig, equal_table, format_key, weighted_table
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
MACS = {"eth0": "52:54:00:00:0a:00", "eth1": "52:54:00:00:0a:01", "eth2": "52:54:00:00:0a:02"}
"""The last one comes without RSS."""
KEY = bytes(range(200, 240))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A guest with three NICs, and where its agent's socket is."""

    guest: Guest
    socket: Path

    @property
    def process(self) -> Process:
        process = procs.read(self.guest.pid)
        assert process
        return process

    def read(self, device: str = "eth0") -> Reading:
        return agent.read(str(self.socket), self.process, MACS[device])

    def told(self, device: str) -> RssConfig | None:
        """What QEMU's device was told, from its device state."""
        address = Path(self.guest.run(f"readlink -f /sys/class/net/{device}/device/..").strip()).name
        state = self.guest.folder / "state"
        qmp.execute(str(self.guest.qmp), "xen-save-devices-state", {"filename": str(state), "live": False})
        return devicestate.parse(state.read_bytes(), address)


@pytest.fixture(
    scope="module",
    params=[
        "qemu",
        pytest.param("qemu-7.2", marks=pytest.mark.compat),
        pytest.param("qemu-11.1", marks=pytest.mark.compat),
    ],
)
def agent_files(request: pytest.FixtureRequest, user: str) -> Iterator[Provisioned]:
    """What a guest with an agent is made of."""
    files = with_agent(provision.provision())
    if request.param == "qemu-7.2":
        files = provision.with_qemu(files, provision.provision_old_qemu())
    elif request.param == "qemu-11.1":
        files = provision.with_qemu(files, provision.provision_new_qemu())
    with provision.readable_by(user, files) as readable:
        yield readable


@pytest.fixture(scope="module")
def booted(agent_files: Provisioned, user: str) -> Iterator[Vm]:
    """One guest for all tests, under an ordinary user's QEMU: it is offered RSS, and QEMU steers in software."""
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="qsteer-agent-"))
        stack.callback(shutil.rmtree, folder)
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        arguments = list(agent_arguments(folder / "agent"))
        fds: list[int] = []
        for number, mac in enumerate(list(MACS.values())[:2]):
            tap = kernel.open_tap(f"qsga{number}", QUEUES)
            stack.callback(tap.close)
            fds += tap.fds
            arguments += ["-netdev", f"tap,id=net{number},vhost=off,fds={':'.join(map(str, tap.fds))}"]
            arguments += ["-device", f"virtio-net-pci,netdev=net{number},mac={mac},mq=on,vectors=10,rss=on"]
        arguments += ["-netdev", "hubport,id=plain,hubid=0"]
        arguments += ["-device", f"virtio-net-pci,netdev=plain,mac={MACS['eth2']}"]
        guest = Guest(
            agent_files, name="agent", user=user, prefix=as_user(user), arguments=arguments, pass_fds=tuple(fds)
        )
        stack.enter_context(guest)
        guest.wait_ready()
        yield Vm(guest=guest, socket=folder / "agent")


@pytest.fixture
def vm(booted: Vm) -> Vm:
    """The guest with an agent that has just been started."""
    restart_agent(booted.guest)
    return booted


def test_each_change_is_read(vm: Vm) -> None:
    """Key, table and types, as the guest's own ethtool tells them, as they were set, and as the device was told."""
    assert vm.read("eth1").config == vm.guest.rss("eth1")
    want = vm.guest.rss()
    assert vm.read() == Reading(source=Source.GUEST_AGENT, config=want, exact_types=False)
    exact = False
    for command, change in (
        ("-X eth0 equal 3", {"table": equal_table(3)}),
        ("-X eth0 weight 1 2 0 1", {"table": weighted_table((1, 2, 0, 1))}),
        (f"-X eth0 hkey {format_key(KEY)}", {"key": KEY}),
        (f"-X eth0 equal 2 hkey {format_key(KEY[::-1])}", {"table": equal_table(2), "key": KEY[::-1]}),
        ("-K eth0 rxhash on", {}),
        ("-N eth0 rx-flow-hash udp4 sd", {"types": BASE_TYPES & ~HashType.UDP4}),
        ("-N eth0 rx-flow-hash tcp6 r", {"types": HashType.TCP4 | HashType.IP4 | HashType.UDP6}),
        ("-N eth0 rx-flow-hash tcp4 r", {"types": HashType.UDP6}),
        ("-N eth0 rx-flow-hash udp6 r", {"types": HashType(0)}),
        ("-N eth0 rx-flow-hash tcp6 sdfn", {"types": HashType.TCP6 | HashType.IP6}),
        ("-X eth0 default", {"table": equal_table(4)}),
    ):
        vm.guest.run(f"ethtool {command}")
        want = replace(want, **change)
        exact = exact or "rxhash on" in command
        own = ethtool.parse(vm.guest.run("ethtool -x eth0"))
        assert (own.table, own.key) == (want.table, want.key), command
        began = time.monotonic()
        assert vm.read() == Reading(source=Source.GUEST_AGENT, config=want, exact_types=exact), command
        print(f"ethtool {command}: read in {(time.monotonic() - began) * 1000:.0f} ms")
        assert vm.told("eth0") == want, command
    assert vm.read("eth1").config == vm.guest.rss("eth1") != want


def test_what_the_device_was_not_told(vm: Vm) -> None:
    """Linux before 6.12 says nothing of its first configuration, and, without receive-hashing, of other types."""
    driver = vm.guest.rss("eth1")
    assert vm.read("eth1").config == driver and vm.told("eth1") is None
    vm.guest.run("ethtool -X eth1 equal 3")
    vm.guest.run("ethtool -N eth1 rx-flow-hash udp4 sd")
    fewer = replace(driver, table=equal_table(3), types=BASE_TYPES & ~HashType.UDP4)
    assert vm.read("eth1") == Reading(source=Source.GUEST_AGENT, config=fewer, exact_types=False)
    assert vm.told("eth1") == replace(fewer, types=BASE_TYPES)
    vm.guest.run("ethtool -X eth1 equal 3")
    assert vm.told("eth1") == fewer


def test_a_nic_without_rss(vm: Vm) -> None:
    assert vm.read("eth2") == Reading(source=Source.GUEST_AGENT, config=None)


def test_an_address_that_is_not_there(vm: Vm) -> None:
    with pytest.raises(NotFoundError, match="knows no interface with the address 52:54:00:ff:ff:ff"):
        agent.read(str(vm.socket), vm.process, "52:54:00:ff:ff:ff")


def test_two_interfaces_with_one_address(vm: Vm) -> None:
    vm.guest.run(f"ip link set eth1 address {MACS['eth0']}")
    with pytest.raises(QsteerError, match="more than one interface with RSS"):
        vm.read("eth0")
    vm.guest.run(f"ip link set eth1 address {MACS['eth1']}")
    assert vm.read("eth0").config


def test_a_vlan(vm: Vm) -> None:
    """It has its NIC's address, and no RSS of its own."""
    before = vm.read()
    vm.guest.run("vconfig add eth0 7 && grep -q 0a:00 /sys/class/net/eth0.7/address")
    assert vm.read() == before and before.config
    vm.guest.run("vconfig rem eth0.7")


def test_no_agent(vm: Vm) -> None:
    stop_agent(vm.guest)
    began = time.monotonic()
    with pytest.raises(BusyError) as caught:
        vm.read()
    assert str(caught.value) == f"the guest agent of process {vm.guest.pid} does not answer in time"
    assert "is qemu-guest-agent running in the guest?" in caught.value.hint
    assert time.monotonic() - began < agent.SYNC_TIMEOUT_S + 1
    # What it was asked meanwhile reaches the next one.
    restart_agent(vm.guest)
    assert vm.read().config


@pytest.mark.parametrize("command", ["guest-exec", "guest-network-get-interfaces"])
def test_a_blocked_command(vm: Vm, command: str) -> None:
    restart_agent(vm.guest, f"--block-rpcs={command}")
    with pytest.raises(UnsupportedError, match=f"refuses {command}: .*disabled") as caught:
        vm.read()
    assert "block-rpcs" in caught.value.hint


def test_no_ethtool(vm: Vm) -> None:
    vm.guest.run("mv /bin/ethtool /bin/another")
    try:
        with pytest.raises(UnsupportedError, match=r"cannot run ethtool: guest-exec: .*No such file") as caught:
            vm.read()
    finally:
        vm.guest.run("mv /bin/another /bin/ethtool")
    assert "installed" in caught.value.hint


def request(client: socket.socket, command: str) -> object:
    """One command to the agent, and its answer."""
    client.sendall(json.dumps({"execute": command}).encode() + b"\n")
    with client.makefile("rb") as lines:
        return json.loads(lines.readline())["return"]


def test_another_client(vm: Vm) -> None:
    with peer.connect(str(vm.socket), vm.process, timeout_s=5) as other:
        assert request(other, "guest-ping") == {}
        with pytest.raises(BusyError, match="does not answer in time") as caught:
            vm.read()
        assert "another client (libvirt)" in caught.value.hint
        # Half a request, and one whose answer it does not wait for.
        other.sendall(b'{"execute": "guest-info"}\n{"execute": "guest-')
    assert vm.read().config


def test_a_frozen_guest(vm: Vm) -> None:
    """As between guest-fsfreeze-freeze and -thaw, while a snapshot is taken."""
    stop_agent(vm.guest)
    vm.guest.run("touch /tmp/qga.state.isfrozen")
    restart_agent(vm.guest)
    with pytest.raises(BusyError, match="file systems are frozen"):
        vm.read()
    with peer.connect(str(vm.socket), vm.process, timeout_s=5) as client:
        request(client, "guest-fsfreeze-thaw")
    assert vm.read().config


def test_who_listens(agent_files: Provisioned, tmp_path: Path) -> None:
    """libvirt binds the sockets and passes them on: the kernel still names QEMU, which listens once more."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "agent"))
        listener.listen(1)
        chardev = f"socket,id=agent,fd={listener.fileno()},server=on,wait=off"
        argv = [str(agent_files.qemu), "-machine", "none", "-nodefaults", "-display", "none", "-chardev", chardev]
        qmp_chardev = f"socket,id=qmp,path={tmp_path / 'qmp'},server=on,wait=off"
        argv += ["-chardev", qmp_chardev, "-mon", "chardev=qmp,mode=control"]
        with subprocess.Popen(argv, pass_fds=(listener.fileno(),)) as qemu:
            try:
                deadline = time.monotonic() + 20
                while not (process := procs.read(qemu.pid)) or not (tmp_path / "qmp").exists():
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                peer.connect(str(tmp_path / "agent"), process, timeout_s=5).close()
                with pytest.raises(QsteerError, match=f"is served by process {qemu.pid}"):
                    me = procs.read(os.getpid())
                    assert me
                    peer.connect(str(tmp_path / "agent"), me, timeout_s=5)
            finally:
                qemu.kill()


def test_the_guest_is_followed_by_its_agent(vm: Vm) -> None:
    """From the command line: what is attached is what the agent says, and ``keep`` stays with it."""

    types = vm.guest.hash_types()

    def attached() -> RssConfig | None:
        (tap,) = (tap for tap in inventory.fetch().taps if tap.name == "qsga0")
        return tap.content.config if tap.content else None

    vm.guest.run("ethtool -X eth0 equal 3")
    done = support.qsteer("apply", "--dev", "qsga0")
    assert done.returncode == 0 and "source guest-agent" in done.stdout, done.stderr
    assert attached() == vm.guest.rss(types=types)
    keep = subprocess.Popen((sys.executable, "-m", "qsteer", "keep", "--dev", "qsga0", "--reread", "2", "-q"))
    try:
        for change in ("-X eth0 equal 2", "-X eth0 weight 1 2 0 1", f"-X eth0 hkey {format_key(KEY)}"):
            vm.guest.run(f"ethtool {change}")
            support.wait_until(change, lambda: attached() == vm.guest.rss(types=types))
    finally:
        keep.terminate()
        assert keep.wait(10) == 0
    checked = support.qsteer("status", "--check", "--dev", "qsga0")
    assert checked.returncode == 0 and "yes" in checked.stdout, checked.stdout
    assert support.qsteer("off", "--dev", "qsga0").returncode == 0
