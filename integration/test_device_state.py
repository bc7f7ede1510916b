# SPDX-License-Identifier: BSD-2-Clause
"""The source ``device-state`` on real guests: what it reads is what the guest's own ethtool tells, and it does no harm.

By default with the QEMU of every other test; marked ``compat`` (``make test-qemus``) with QEMU 7.2 and the newest.
"""

import contextlib
import fcntl
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from integration import traffic
from integration.guest import ACCEL, Guest, as_user
from integration.provision import Provisioned
from qsteer import devicestate, holds, inventory, kernel, pauses, procs, qmp, qmpvm, savestate
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.model import Domain, Process, Reading, Source, Tap
from qsteer.rss import BASE_TYPES, HashType, format_key
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
READS = 20
ONE_THREAD = "tcg,thread=single" if ACCEL == "tcg" else ACCEL
"""With a thread for each CPU, QEMU 10.0 rarely fails an assertion while Linux sets up bridges (iotlb_to_section)."""
KEY = format_key(bytes(range(1, 41)))


def used(path: str, process: Process, nic: qmpvm.QmpNic, queues: int) -> tuple[int | None, ...]:
    return qmp.converse(path, process, lambda monitor: qmpvm.used(monitor, nic, queues))


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stamps of these tests' own."""
    monkeypatch.setattr(holds, "RUNTIME", tmp_path / "run")
    return holds.RUNTIME


@dataclass(frozen=True, kw_only=True)
class Vm:
    """A guest that runs, seen from outside."""

    guest: Guest
    process: Process
    path: str

    def ask(self, command: str, **arguments: object) -> object:
        return qmp.execute(self.path, command, {key.replace("_", "-"): value for key, value in arguments.items()})

    def read(self, tap: str, *, interval_s: float = 0) -> Reading:
        return savestate.reading(self.path, self.process, found(tap), interval_s=interval_s)

    def is_running(self) -> bool:
        status = self.ask("query-status")
        return isinstance(status, dict) and status["status"] == "running"

    def is_unharmed(self) -> bool:
        """It runs, and QEMU has nothing of qsteer's left."""
        return self.is_running() and not self.ask("query-fdsets")


def found(name: str) -> Tap:
    (tap,) = (tap for tap in inventory.fetch().taps if tap.name == name)
    return tap


def running_process(pid: int) -> Process:
    process = procs.read(pid)
    assert process
    return process


@contextlib.contextmanager
def booted(
    files: Provisioned, user: str, *nics: str, taps: str = "qsds", machine: tuple[str, ...] = ("-machine", "pc")
) -> Iterator[Vm]:
    """A guest with a NIC for each of ``nics`` on a tap of its own (``taps`` and a number); QEMU is an ordinary user."""
    with contextlib.ExitStack() as stack:
        opened = [kernel.open_tap(f"{taps}{number}", QUEUES) for number in range(len(nics))]
        arguments = [*machine]
        for number, (tap, nic) in enumerate(zip(opened, nics, strict=True)):
            netdev = f"tap,id=net{number},vhost=off,fds={':'.join(map(str, tap.fds))}"
            device = f"virtio-net-pci,netdev=net{number},mq=on,vectors={2 * QUEUES + 2},{nic}"
            arguments += ["-netdev", netdev, "-device", device]
        fds = [fd for tap in opened for fd in tap.fds]
        try:
            guest = stack.enter_context(
                Guest(
                    files,
                    name="qsds",
                    user=user,
                    prefix=as_user(user),
                    arguments=arguments,
                    pass_fds=fds,
                    accel=ONE_THREAD,
                )
            )
        finally:
            for tap in opened:
                tap.close()
        guest.wait_ready()
        yield Vm(guest=guest, process=running_process(guest.pid), path=str(guest.qmp))


@pytest.fixture(scope="module")
def vm(with_qemu: Provisioned, user: str) -> Iterator[Vm]:
    """One with an id, one without, and one that the guest cannot enable RSS on."""
    with booted(with_qemu, user, "rss=on,id=nic0", "rss=on", "rss=off,id=nic2") as started:
        yield started


ALL = "for t in tcp4 udp4 tcp6 udp6; do ethtool -N {nic} rx-flow-hash $t sdfn; done; "
CHANGES = (
    "ethtool -X {nic} equal 3",
    "ethtool -X {nic} weight 1 2 3 2",
    f"ethtool -X {{nic}} hkey {KEY}",
    "ethtool -N {nic} rx-flow-hash tcp4 sd; ethtool -N {nic} rx-flow-hash udp6 sd; ethtool -X {nic} equal 4",
    "ethtool -N {nic} rx-flow-hash tcp6 sd; ethtool -X {nic} weight 0 1 0 1",
    ALL + "ethtool -X {nic} equal 2",
)


def test_every_change_of_the_guest(vm: Vm) -> None:
    """Two NICs, each with a configuration of its own, changed one after the other."""
    assert vm.read("qsds0").config is None
    seen = set()
    for turn in range(len(CHANGES) + 1):
        for number in (0, 1):
            nic = f"eth{number}"
            vm.guest.run(CHANGES[(turn + number) % len(CHANGES)].format(nic=nic))
            reading = vm.read(f"qsds{number}")
            assert reading.source is Source.DEVICE_STATE and reading.exact_types
            assert reading.config == vm.guest.rss(nic, vm.guest.hash_types(nic))
            seen.add(reading.config)
    types = {config.types for config in seen if config}
    assert BASE_TYPES in types and BASE_TYPES & ~(HashType.TCP4 | HashType.UDP6) in types
    assert KEY in {format_key(config.key) for config in seen if config}
    assert len(seen) >= len(CHANGES)
    assert vm.read("qsds2").config is None
    assert vm.is_unharmed()


def test_a_command_for_queues_ends_rss(vm: Vm) -> None:
    """The device's word counts: VQ_PAIRS_SET makes it forget RSS, although the guest's ethtool still shows it."""
    vm.guest.run("ethtool -X eth1 equal 2; ethtool -L eth1 combined 2")
    assert vm.read("qsds1").config is None
    vm.guest.run("ethtool -L eth1 combined 4; ethtool -X eth1 equal 4")
    reading = vm.read("qsds1")
    assert reading.config and set(reading.config.table) == {0, 1, 2, 3}


def test_what_qemu_says(vm: Vm) -> None:
    seen = qmpvm.inspect(vm.path, vm.process)
    assert (seen.name, seen.status) == ("qsds", "running")
    assert seen.version == tuple(map(int, qemu_version(vm).split(".")))
    nics = {nic.netdev: nic for nic in seen.nics}
    assert nics.keys() == {"net0", "net1", "net2"}
    assert [nics[netdev].id for netdev in ("net0", "net1", "net2")] == ["nic0", None, "nic2"]
    assert [nics[netdev].rss for netdev in ("net0", "net1", "net2")] == [True, True, False]
    for number, nic in enumerate(nics[f"net{number}"] for number in range(3)):
        assert nic.mq and nic.vhost is False and nic.backend and nic.backend.kind == "tap"
        assert nic.mac and bytes.fromhex(nic.mac.replace(":", "")) == vm.guest.mac(f"eth{number}")
        tap = found(f"qsds{number}")
        assert set(nic.backend.fds) == {queue.fd for queue in tap.queues}
        assert qmpvm.nic_of(seen, tap) == nic


def qemu_version(vm: Vm) -> str:
    version = vm.ask("query-version")
    assert isinstance(version, dict)
    return ".".join(str(version["qemu"][part]) for part in ("major", "minor", "micro"))


def test_a_nic_that_is_plugged_in_later(vm: Vm) -> None:
    vm.ask("netdev_add", type="user", id="later")
    vm.ask("device_add", driver="virtio-net-pci", netdev="later", id="nic9", mac="52:54:00:0A:0B:0C")
    (nic,) = (nic for nic in qmpvm.inspect(vm.path, vm.process).nics if nic.id == "nic9")
    assert (nic.netdev, nic.mac, nic.rss, nic.vhost) == ("later", "52:54:00:0a:0b:0c", False, None)
    assert nic.backend and nic.backend.kind == "user"
    assert nic.device
    assert nic.device.encode() + b"/virtio-net" in savestate.device_state(vm.path, vm.process, interval_s=0).data


def test_used_buffers(vm: Vm, files: Provisioned) -> None:
    """What the device has used grows by what the guest has seen on each queue."""
    vm.guest.run("ethtool -X eth0 weight 1 2 3 2")
    nic = qmpvm.nic_of(qmpvm.inspect(vm.path, vm.process), found("qsds0"))
    before = used(vm.path, vm.process, nic, QUEUES)
    sighting = traffic.follow(vm.guest, "qsds0", files.flowrx, queues=QUEUES, flows=512)
    after = used(vm.path, vm.process, nic, QUEUES)
    for queue, (first, last) in enumerate(zip(before, after, strict=True)):
        assert first is not None and last is not None
        assert 0 <= (last - first) % 65536 - sighting.guest.count(queue) < 64
    assert used(vm.path, vm.process, replace(nic, vhost=None), 2) == (None, None)
    assert used(vm.path, vm.process, nic, 2 * QUEUES)[-1] is None


def test_how_long_the_vm_stands_still(vm: Vm) -> None:
    vm.guest.run("ethtool -X eth0 equal 4")
    took = [reading.paused_ms or 0.0 for reading in (vm.read("qsds0") for _ in range(READS))]
    low, high = min(took), max(took)
    print(
        f"QEMU {qemu_version(vm)}: paused {statistics.median(took):.2f} ms ({low:.2f} to {high:.2f}) in {READS} reads"
    )
    assert low > 0 and high < 5000
    assert vm.is_unharmed()


def test_a_vm_that_does_not_run_is_left_alone(vm: Vm) -> None:
    vm.ask("stop")
    try:
        with pytest.raises(BusyError, match=r"not running \(paused\)"):
            vm.read("qsds0")
        status = vm.ask("query-status")
        assert isinstance(status, dict) and status["status"] == "paused"
    finally:
        vm.ask("cont")
    assert vm.is_unharmed()


def test_a_migration_is_left_alone(vm: Vm) -> None:
    vm.ask("migrate-set-parameters", max_bandwidth=100_000)
    vm.ask("migrate", uri="exec:cat >/dev/null")
    try:
        with pytest.raises(BusyError, match="migration"):
            vm.read("qsds0")
    finally:
        vm.ask("migrate_cancel")

    def ended() -> bool:
        migration = vm.ask("query-migrate")
        return isinstance(migration, dict) and migration["status"] == "cancelled"

    support.wait_until("the migration's end", ended)
    assert vm.read("qsds0").source is Source.DEVICE_STATE
    assert vm.is_unharmed()


def test_a_job_is_left_alone(vm: Vm) -> None:
    for node in ("from", "to"):
        vm.ask("blockdev-add", driver="null-co", node_name=node, size=1 << 30)
    vm.ask("blockdev-backup", job_id="copy", device="from", target="to", sync="full", speed=1)
    try:
        with pytest.raises(BusyError, match=r"a job of the VM is under way \(backup\)"):
            vm.read("qsds0")
    finally:
        vm.ask("block-job-cancel", device="copy", force=True)
    support.wait_until("the job's end", lambda: not vm.ask("query-jobs"))
    assert vm.read("qsds0").source is Source.DEVICE_STATE
    for node in ("from", "to"):
        vm.ask("blockdev-del", node_name=node)


def test_another_client_holds_the_monitor(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmp, "TIMEOUT_S", 0.5)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(vm.path)
        assert other.recv(1)
        with pytest.raises(BusyError) as caught:
            vm.read("qsds0")
        assert caught.value.exit_code == 8 and "another client" in caught.value.hint
    assert vm.is_unharmed()


def test_the_monitor_of_another_process(vm: Vm, tmp_path: Path) -> None:
    """A path that is not the QEMU's own is refused before anything is said there."""
    other = running_process(os.getpid())
    with pytest.raises(QsteerError, match=f"process {vm.process.pid}"):
        savestate.reading(vm.path, other, found("qsds0"), interval_s=0)
    with socket.socket(socket.AF_UNIX) as ours:
        ours.bind(str(tmp_path / "forged"))
        ours.listen(1)
        with pytest.raises(QsteerError, match=f"process {os.getpid()}"):
            savestate.reading(str(tmp_path / "forged"), vm.process, found("qsds0"), interval_s=0)
        said = ours.accept()[0]
        with said:
            assert said.recv(64) == b""
    with pytest.raises(NotFoundError, match="has ended"):
        savestate.reading(vm.path, replace(vm.process, started=1), found("qsds0"), interval_s=0)
    assert vm.is_unharmed()


def test_not_too_often(vm: Vm, runtime: Path) -> None:
    assert vm.read("qsds0", interval_s=60).paused_ms
    with pytest.raises(BusyError, match="was stopped for a reading") as caught:
        vm.read("qsds1", interval_s=60)
    assert caught.value.exit_code == 8 and "try again in" in caught.value.hint
    (stamp,) = (runtime / "pauses").iterdir()
    assert stamp.name == f"{vm.process.pid}-{vm.process.started}"
    assert vm.read("qsds1", interval_s=0).paused_ms
    with pauses.turn(vm.process, interval_s=0), pytest.raises(BusyError, match="being read already"):
        vm.read("qsds0")


def test_a_writing_that_fails(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The VM runs again, and QEMU does not keep the fd."""
    make = os.memfd_create

    def sealed(name: str, flags: int) -> int:
        memory = make(name, flags | os.MFD_ALLOW_SEALING)
        os.ftruncate(memory, 1 << 20)
        fcntl.fcntl(memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        return memory

    with monkeypatch.context() as patch, pytest.raises(QsteerError, match="xen-save-devices-state"):
        patch.setattr(os, "memfd_create", sealed)
        vm.read("qsds0")
    assert vm.is_unharmed()
    assert vm.read("qsds0").paused_ms


KILLED = """
import asyncio, os, signal, sys
from pathlib import Path
from qsteer import holds, procs, qmp, savestate
holds.RUNTIME = Path(sys.argv[3])
stop_and_write = qmp.Monitor.ask_and_hear
def dying(*arguments):
    asyncio.get_running_loop().call_later(float(sys.argv[4]), os.kill, os.getpid(), signal.SIGKILL)
    return stop_and_write(*arguments)
qmp.Monitor.ask_and_hear = dying
savestate.device_state(sys.argv[1], procs.read(int(sys.argv[2])), interval_s=0)
"""


@pytest.mark.parametrize("after_s", ["0", "0.0005", "0.001"])
def test_qsteer_is_killed_meanwhile(vm: Vm, runtime: Path, after_s: str) -> None:
    """The VM runs on, and the next reading takes back what the first has left."""
    code = [sys.executable, "-c", KILLED, vm.path, str(vm.process.pid), str(runtime), after_s]
    assert subprocess.run(code, check=False).returncode == -signal.SIGKILL
    support.wait_until("the VM runs", vm.is_running)
    assert vm.read("qsds0").paused_ms
    assert vm.is_unharmed()


def test_leases_of_libvirt(vm: Vm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conf = tmp_path / "qemu.conf"
    conf.write_text('lock_manager = "lockd"\n')
    monkeypatch.setattr(savestate, "_LIBVIRT_CONF", conf)
    domain = Domain(name="web1", uuid="", pid=vm.process.pid, interfaces=(), monitor=None, agent=None)
    with pytest.raises(UnsupportedError, match="leases"):
        savestate.reading(vm.path, vm.process, replace(found("qsds0"), domain=domain), interval_s=0)
    conf.write_text('#lock_manager = "lockd"\n')
    assert savestate.reading(vm.path, vm.process, replace(found("qsds0"), domain=domain), interval_s=0).paused_ms


def test_behind_bridges(with_qemu: Provisioned, user: str) -> None:
    """On q35: behind a root port, behind a bridge behind a root port, and on the root bus."""
    bridges = ("-device", "pcie-root-port,id=rp1,chassis=1", "-device", "pcie-root-port,id=rp2,chassis=2")
    machine = ("-machine", "q35", *bridges, "-device", "pcie-pci-bridge,id=br,bus=rp2")
    nics = ("rss=on,bus=rp1", "rss=on,bus=br,addr=5", "rss=on,addr=1e.0")
    with booted(with_qemu, user, *nics, taps="qsdsq", machine=machine) as vm:
        seen = qmpvm.inspect(vm.path, vm.process)
        places = [qmpvm.nic_of(seen, found(f"qsdsq{number}")).device for number in range(3)]
        assert places == ["0000:00:01.0:00.0", "0000:00:02.0:00.0:05.0", "0000:00:1e.0"]
        devices = {vm.guest.mac(f"eth{number}"): f"eth{number}" for number in range(3)}
        for number in range(3):
            mac = qmpvm.nic_of(seen, found(f"qsdsq{number}")).mac
            nic = devices[bytes.fromhex((mac or "").replace(":", ""))]
            vm.guest.run(f"ethtool -X {nic} equal {number + 1}")
            assert vm.read(f"qsdsq{number}").config == vm.guest.rss(nic)
        assert vm.is_unharmed()


def test_before_the_guest_has_a_driver(with_qemu: Provisioned, user: str) -> None:
    """QEMU in its firmware: there is no RSS yet, in any of the forms that a NIC may have."""
    forms = {
        "plain": "mq=on,rss=on",
        "one pair": "mq=off,rss=on",
        "legacy": "mq=on,rss=on,disable-modern=on",
        "modern, packed": "mq=on,rss=on,disable-legacy=on,packed=on",
        "no MSI-X": "mq=on,rss=on,vectors=0",
        "no offloads": "mq=on,rss=on,ctrl_guest_offloads=off",
        "hash reports": "mq=on,rss=on,hash=on,host_mtu=1400",
    }
    arguments = [word for form in forms.values() for word in ("-device", f"virtio-net-pci,{form}")]
    machine = ("-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qsteer-qsds-")))
        folder.chmod(0o777)
        monitor = ("-qmp", f"unix:{folder}/qmp,server=on,wait=off")
        command = [*as_user(user), str(with_qemu.qemu), *machine, *arguments, *monitor]
        qemu = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        stack.callback(qemu.wait)
        stack.callback(qemu.kill)
        support.wait_until("QEMU's QMP socket", (folder / "qmp").exists)
        process = running_process(qemu.pid)
        nics = qmpvm.inspect(f"{folder}/qmp", process).nics
        data = savestate.device_state(f"{folder}/qmp", process, interval_s=0).data
        assert {nic.device for nic in nics} == set(devicestate.devices(data))
        assert len(nics) == len(forms)
        for nic in nics:
            assert nic.device and devicestate.parse(data, nic.device) is None
