# SPDX-License-Identifier: BSD-2-Clause
"""What is seen of a host: real taps and macvtaps, in several network namespaces, held by stand-ins for VMs."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyroute2 import IPRoute, netns

from qsteer import inventory, kernel, libvirt, links, namespaces, procs, programs, tuns
from qsteer.model import Inventory, Source, Tap
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import support

pytestmark = pytest.mark.root

NOBODY = 65534
WAITS = "import sys; print('ready', flush=True); sys.stdin.read()"
WITH_PID_FILE = f"import fcntl, os; fcntl.lockf(int(os.environ['PID_FILE']), fcntl.LOCK_EX, 1); {WAITS}"


@contextlib.contextmanager
def qemu(*arguments: str, fds: tuple[int, ...] = (), pid_file: Path | None = None, uid: int = 0) -> Iterator[int]:
    """A stand-in with a QEMU's command line, and its pid file as libvirt's have theirs; gives its pid."""
    command = ["qemu-system-x86_64", "-c", WITH_PID_FILE if pid_file else WAITS, *arguments]
    with contextlib.ExitStack() as stack:
        inherited = -1
        if pid_file:
            inherited = os.open(pid_file, os.O_WRONLY | os.O_CREAT, 0o644)
            stack.callback(os.close, inherited)
            os.fchown(inherited, uid, uid)
            fds = (*fds, inherited)
        child = subprocess.Popen(
            command,
            executable="/usr/bin/python3",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=fds,
            env={**os.environ, "PID_FILE": str(inherited)},
            user=uid,
        )
        stack.enter_context(child)
        stack.callback(child.kill)
        assert child.stdout and child.stdout.readline() == b"ready\n"
        yield child.pid


def status_file(directory: Path, name: str, pid: int, *interfaces: str, uuid: str = "u", uid: int = 0) -> Path:
    path = directory / f"{name}.xml"
    path.write_text(
        f"<domstatus pid='{pid}'><monitor path='/mon' type='unix'/><domain><name>{name}</name><uuid>{uuid}</uuid>"
        f"<devices>{''.join(interfaces)}</devices></domain></domstatus>"
    )
    os.chown(path, uid, uid)
    return path


@pytest.fixture
def other_namespace(namespace: str) -> Iterator[str]:
    """A named network namespace that the test does not live in."""
    name = f"qsdi-{os.getpid()}"
    netns.create(name)
    try:
        yield name
    finally:
        netns.remove(name)


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)


def taps_named(found: Inventory, *names: str) -> list[Tap]:
    return [tap for name in names for tap in found.taps if tap.name == name]


def test_a_tap_that_is_open(tap: support.TapUnderTest, namespace: str) -> None:
    (found,) = taps_named(inventory.fetch(), "qs-tap")
    assert (found.netns, found.netns_name) == (namespaces.own(), None)
    assert (found.unheld, len(found.queues), found.active, found.multi_queue) == (False, 4, 4, True)
    assert found.holder and found.holder.pid == os.getpid()
    (device,) = links.tuns()
    assert device == tuns.Tun(
        name="qs-tap",
        ifindex=found.ifindex,
        is_tap=True,
        persistent=False,
        multi_queue=True,
        active=4,
    )
    assert tuns.in_sysfs() is None, "the sysfs of the network namespace that we came from"
    sysfs = "mount -t sysfs sysfs /sys; exec $0 -c 'from qsteer import tuns; print(tuns.in_sysfs())'"
    told = subprocess.run(
        ("unshare", "-m", "sh", "-c", sysfs, sys.executable), check=True, capture_output=True, text=True
    )
    assert told.stdout.strip() == repr((device,))


def test_taps_that_nobody_has_open(other_namespace: str) -> None:
    ip("tuntap", "add", "qsdi-own", "mode", "tap", "multi_queue")
    ip("tuntap", "add", "qsdi-vpn", "mode", "tun")
    ip("-n", other_namespace, "tuntap", "add", "qsdi-many", "mode", "tap", "multi_queue")
    ip("-n", other_namespace, "tuntap", "add", "qsdi-one", "mode", "tap")
    before = namespaces.own()
    found = inventory.fetch()
    assert namespaces.own() == before
    own, many, one = taps_named(found, "qsdi-own", "qsdi-many", "qsdi-one")
    other = namespaces.resolve(other_namespace)
    assert [(tap.netns, tap.netns_name) for tap in (own, many, one)] == [
        (before, None),
        (other, other_namespace),
        (other, other_namespace),
    ]
    assert all(tap.unheld and tap.persistent and not tap.queues and not tap.attached for tap in (own, many, one))
    assert [tap.multi_queue for tap in (own, many, one)] == [True, True, False]
    assert not taps_named(found, "qsdi-vpn")
    assert any(note.startswith("what steers ") for note in found.notes)


def test_a_persistent_tap_that_is_open_is_held(tap: support.TapUnderTest) -> None:
    import fcntl

    set_persist = 0x400454CB
    fcntl.ioctl(tap.open.fds[0], set_persist, 1)
    try:
        (found,) = taps_named(inventory.fetch(), "qs-tap")
        assert found.persistent and not found.unheld and len(found.queues) == 4
    finally:
        fcntl.ioctl(tap.open.fds[0], set_persist, 0)


def test_a_tap_in_another_namespace(other_namespace: str) -> None:
    with support.inside(other_namespace):
        opened = kernel.open_tap("qsdi-there", 2)
    try:
        (found,) = taps_named(inventory.fetch(), "qsdi-there")
        assert (found.netns_name, found.netns) == (other_namespace, namespaces.resolve(other_namespace))
        assert not found.unheld
    finally:
        opened.close()


def test_a_name_that_is_left_over(namespace: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ip netns leaves the file of a name whose namespace could not be unmounted; visit() says why it cannot look."""
    (tmp_path / "gone").write_text("")
    monkeypatch.setattr(namespaces, "DIRECTORY", tmp_path)
    assert namespaces.named() == {}
    assert "Invalid argument" in str(namespaces.visit(("gone",), links.tuns)["gone"])
    assert "No such file" in str(namespaces.visit(("never",), links.tuns)["never"])


def test_without_rights_what_can_be_seen_is_shown(tap: support.TapUnderTest) -> None:
    ip("tuntap", "add", "qsdi-own", "mode", "tap", "multi_queue")
    script = """
from qsteer import inventory
found = inventory.fetch(strict=False)
for tap in found.taps:
    print(tap.name, tap.active, tap.unheld, len(tap.queues), tap.holder and tap.holder.args.name)
print(*found.notes, sep="\\n")
try:
    inventory.fetch(strict=True)
except Exception as error:
    print(type(error).__name__)
"""
    with qemu("-name", "qsdi-vm", "-netdev", f"tap,id=n,fd={tap.open.fds[0]}", fds=tap.open.fds):
        done = subprocess.run(
            ("setpriv", "--bounding-set=-all", "--inh-caps=-all", sys.executable, "-c", script),
            capture_output=True,
            text=True,
            check=True,
        )
    lines = done.stdout.splitlines()
    # A process of the same user without more rights can be looked into; where it cannot, the holder is not known.
    assert lines[0] in ("qs-tap 4 False 0 qsdi-vm", "qs-tap 4 False 0 None")
    assert lines[1] == "qsdi-own 0 False 0 None", "who has it open, if anybody, cannot be seen"
    assert any("CAP_BPF" in note for note in lines[2:-1])
    assert lines[-1] == "PermissionDeniedError"


def test_a_macvtap_is_named(namespace: str) -> None:
    support.add_veth("qsdi-eth", "qsdi-peer")
    with IPRoute() as route:
        route.link("add", ifname="qsdi-mac", kind="macvtap", link=route.link_lookup(ifname="qsdi-eth")[0])
        index = route.link_lookup(ifname="qsdi-mac")[0]
    device = Path(f"/dev/tap{index}")
    if not device.exists():
        pytest.skip(f"no {device}: nothing makes device nodes here")
    fd = os.open(device, os.O_RDWR)
    try:
        arguments = ("-name", "qsdi-mac", "-netdev", f"tap,id=n,fd={fd}", "-device", "virtio-net-pci,netdev=n,id=d")
        with qemu(*arguments, fds=(fd,)) as pid:
            (found,) = (one for one in inventory.fetch().unsteerable if one.vm.pid == pid)
            assert (found.backend, found.nic.id) == ("macvtap", "d")
    finally:
        os.close(fd)


def test_a_vm_without_a_tap(namespace: str) -> None:
    with qemu("-name", "qsdi-user", "-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n") as pid:
        (found,) = (one for one in inventory.fetch().unsteerable if one.vm.pid == pid)
        assert (found.backend, found.domain) == ("user", None)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the system's libvirt keeps its files."""
    directory = tmp_path / "system"
    directory.mkdir()
    monkeypatch.setattr(libvirt, "SYSTEM", directory)
    return directory


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where nobody's libvirt keeps its files."""
    monkeypatch.setattr(libvirt, "SESSIONS", tmp_path / "user")
    directory = tmp_path / "user" / str(NOBODY)
    for name in (".", *libvirt.SESSION_STEPS):
        directory = directory / name
        directory.mkdir(parents=True, exist_ok=True)
        os.chown(directory, NOBODY, NOBODY)
    return directory


INTERFACE = """<interface type='bridge'><mac address='52:54:00:00:00:01'/><target dev='qs-tap'/><model type='virtio'/>
<driver queues='4' rss='on'/><alias name='ua-lan'/></interface>"""
DIRECT = "<interface type='direct'><target dev='macvtap0'/><alias name='net1'/></interface>"


def test_libvirt_tells_who_it_is(tap: support.TapUnderTest, system: Path) -> None:
    with qemu("-name", "forged", fds=tap.open.fds, pid_file=system / "web1.pid") as pid:
        status_file(system, "web1", pid, INTERFACE, DIRECT)
        found = inventory.fetch()
        (seen,) = taps_named(found, "qs-tap")
        assert seen.domain and (seen.vm_name, seen.domain.pid, seen.domain.monitor) == ("web1", pid, "/mon")
        assert seen.nic and (seen.nic.id, seen.nic.netdev, seen.nic.mac) == (
            "ua-lan",
            "hostua-lan",
            "52:54:00:00:00:01",
        )
        assert seen.nic.rss and not seen.nic.vhost
        (other,) = (one for one in found.unsteerable if one.vm.pid == pid)
        assert other.domain and (other.domain.name, other.backend, other.nic.id) == ("web1", "macvtap", "net1")


def test_a_file_that_is_left_over_tells_nothing(tap: support.TapUnderTest, system: Path) -> None:
    with qemu("-name", "web1", "-uuid", "u", fds=tap.open.fds) as pid:
        status_file(system, "web1", pid, INTERFACE)
        (system / "web1.pid").write_text(str(pid))
        (seen,) = taps_named(inventory.fetch(), "qs-tap")
        assert seen.domain is None and seen.vm_name == "web1"


def test_a_users_libvirt_tells_of_that_users_processes(tap: support.TapUnderTest, system: Path, session: Path) -> None:
    with qemu("-name", "cmd", fds=tap.open.fds, pid_file=session / "mine.pid", uid=NOBODY) as pid:
        process = procs.read(pid)
        assert process and process.uid == NOBODY

        def names() -> list[str]:
            return [domain.name for domain in libvirt.domains((process,)).domains.values()]

        path = status_file(session, "mine", pid, INTERFACE, uid=NOBODY)
        assert names() == ["mine"]
        (seen,) = taps_named(inventory.fetch(), "qs-tap")
        assert seen.vm_name == "mine" and seen.nic and seen.nic.id == "ua-lan"

        # Another user's file, another user's process.
        os.chown(path, 0, 0)
        assert names() == []
        os.chown(path, NOBODY, NOBODY)
        with qemu("-name", "another", pid_file=session / "another.pid", uid=NOBODY - 1) as another:
            os.chown(session / "another.pid", NOBODY, NOBODY)
            status_file(session, "another", another, uid=NOBODY)
            of_another = procs.read(another)
            assert of_another and of_another.uid == NOBODY - 1
            assert list(libvirt.domains((of_another, process)).domains) == [pid]


def test_a_user_cannot_take_a_domains_name(system: Path, session: Path) -> None:
    with (
        qemu("-name", "web1", pid_file=system / "web1.pid") as real,
        qemu("-name", "web1", pid_file=session / "web1.pid", uid=NOBODY) as forged,
    ):
        status_file(system, "web1", real)
        processes = [process for pid in (real, forged) if (process := procs.read(pid))]
        for name, uuid in (("web1", "other"), ("other", "u")):
            status_file(session, "web1", forged, uuid=uuid, uid=NOBODY).write_text(
                f"<domstatus pid='{forged}'><domain><name>{name}</name><uuid>{uuid}</uuid></domain></domstatus>"
            )
            assert list(libvirt.domains(processes).domains) == [real]


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_users_directory_leads_nowhere_else(session: Path, tmp_path: Path, step: int) -> None:
    """Neither through a symbolic link nor onto another file system."""
    with qemu("-name", "x", pid_file=session / "mine.pid", uid=NOBODY) as pid:
        status_file(session, "mine", pid, uid=NOBODY)
        process = procs.read(pid)
        assert process and libvirt.domains((process,)).domains
        place = (tmp_path / "user" / str(NOBODY)).joinpath(*libvirt.SESSION_STEPS[: step + 1])
        ip_mount = ("mount", "--bind", str(place), str(place))
        subprocess.run(ip_mount, check=True)
        try:
            assert not libvirt.domains((process,)).domains
        finally:
            subprocess.run(("umount", str(place)), check=True)
        assert libvirt.domains((process,)).domains
        place.rename(tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
        assert not libvirt.domains((process,)).domains


def test_many_taps_are_read_quickly(namespace: str) -> None:
    """50 of them, each with a program of its own; a host of 1000 takes twenty times that."""
    opened = [kernel.open_tap(f"qsdi{number}", 4) for number in range(50)]
    config = RssConfig(types=BASE_TYPES, key=bytes(40), table=tuple(range(128)))
    try:
        for one in opened:
            program = programs.load_program(tap=one.name, source=Source.STATIC, config=config)
            kernel.attach(one.fds[0], program.prog_fd)
            program.close()
        inventory.fetch()
        before = time.process_time()
        found = inventory.fetch()
        cost_s = time.process_time() - before
    finally:
        for one in opened:
            one.close()
    mine = [tap for tap in found.taps if tap.netns == namespaces.resolve(namespace)]
    assert len(mine) == 50 and all(tap.program and tap.content for tap in mine)
    assert cost_s < support.patience(0.2 + 0.002 * len(found.taps))  # of the whole host
