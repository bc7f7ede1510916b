# SPDX-License-Identifier: BSD-2-Clause
"""libvirt's status files: real in shape (9.0), stale, half-written, and of a user's own making."""

import fcntl
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qsteer import libvirt, procs
from qsteer.errors import BusyError, NotFoundError, QsteerError
from qsteer.model import Domain, Interface, Process
from qsteer.rss import equal_table

UUID = "11111111-2222-4333-8444-555555555555"

STATUS = f"""<!--
WARNING: THIS IS AN AUTO-GENERATED FILE. CHANGES TO IT ARE LIKELY TO BE
OVERWRITTEN AND LOST.
-->

<domstatus state='running' reason='booted' pid='4711'>
  <monitor path='/var/lib/libvirt/qemu/domain-1-web 1/monitor.sock' type='unix'/>
  <vcpus>
    <vcpu id='0' pid='4719'/>
  </vcpus>
  <qemuCaps>
    <flag name='virtio-net.rss'/>
  </qemuCaps>
  <domain type='qemu' id='1'>
    <name>web 1</name>
    <uuid>{UUID.upper()}</uuid>
    <devices>
      <interface type='ethernet'>
        <mac address='52:54:00:AA:00:01'/>
        <target dev='tap-web'/>
        <model type='virtio'/>
        <driver queues='4' rss='on'/>
        <alias name='net0'/>
      </interface>
      <interface type='network'>
        <mac address='52:54:00:aa:00:02'/>
        <source network='default' portid='{UUID}'/>
        <actual type='bridge'>
          <source bridge='br0'/>
        </actual>
        <target dev='vnet2'/>
        <model type='virtio'/>
        <driver name='qemu' queues='3' rss='off'/>
        <alias name='ua-lan'/>
      </interface>
      <interface type='network'>
        <mac address='52:54:00:aa:00:03'/>
        <source network='fast' portid='{UUID}'/>
        <actual type='direct'>
          <source dev='eth1' mode='bridge'/>
        </actual>
        <target dev='macvtap0'/>
        <model type='virtio'/>
        <driver name='vhost'/>
        <alias name='net2'/>
      </interface>
      <interface type='user'>
        <mac address='52:54:00:aa:00:04'/>
        <model type='e1000'/>
        <alias name='net3'/>
        <backend type='passt'/>
      </interface>
      <interface type='vhostuser'>
        <mac address='52:54:00:aa:00:05'/>
        <source type='unix' path='/run/ovs/vhost1' mode='server'/>
        <model type='virtio'/>
        <alias name='net4'/>
      </interface>
      <channel type='spicevmc'>
        <target type='virtio' name='com.redhat.spice.0'/>
      </channel>
      <channel type='unix'>
        <source mode='bind' path='/run/libvirt/qemu/channel/1-web 1/org.qemu.guest_agent.0'/>
        <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
        <alias name='channel0'/>
      </channel>
    </devices>
  </domain>
</domstatus>
"""


def small(*, name: str = "web1", pid: int = 4711, uuid: str = UUID) -> str:
    return f"<domstatus pid='{pid}'><domain><name>{name}</name><uuid>{uuid}</uuid></domain></domstatus>"


def test_a_status_file() -> None:
    domain = libvirt.parse(STATUS.encode())
    assert domain
    assert (domain.name, domain.uuid, domain.pid) == ("web 1", UUID, 4711)
    assert domain.monitor == "/var/lib/libvirt/qemu/domain-1-web 1/monitor.sock"
    assert domain.agent == "/run/libvirt/qemu/channel/1-web 1/org.qemu.guest_agent.0"
    assert domain.interfaces == (
        Interface(
            kind="ethernet",
            alias="net0",
            mac="52:54:00:aa:00:01",
            model="virtio",
            target="tap-web",
            queues=4,
            rss=True,
            vhost=None,
        ),
        Interface(
            kind="bridge",
            alias="ua-lan",
            mac="52:54:00:aa:00:02",
            model="virtio",
            target="vnet2",
            queues=3,
            rss=False,
            vhost=False,
            bridge="br0",
        ),
        Interface(
            kind="direct",
            alias="net2",
            mac="52:54:00:aa:00:03",
            model="virtio",
            target="macvtap0",
            queues=None,
            rss=None,
            vhost=True,
        ),
        Interface(
            kind="passt",
            alias="net3",
            mac="52:54:00:aa:00:04",
            model="e1000",
            target=None,
            queues=None,
            rss=None,
            vhost=None,
        ),
        Interface(
            kind="vhostuser",
            alias="net4",
            mac="52:54:00:aa:00:05",
            model="virtio",
            target=None,
            queues=None,
            rss=None,
            vhost=None,
        ),
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        STATUS[: len(STATUS) // 2],
        STATUS.replace("</domstatus>", ""),
        STATUS.replace("<name>web 1</name>", ""),
        STATUS.replace("<name>web 1</name>", "<name/>"),
        STATUS.replace(" pid='4711'", ""),
        STATUS.replace("4711", "0"),
        STATUS.replace("4711", "-1"),
        STATUS.replace("4711", "٣"),
        STATUS.replace("4711", "9" * 5000),
        STATUS.replace("domstatus", "domain"),
        STATUS.replace("web 1</name>", "x" * 5000 + "</name>"),
        "<!DOCTYPE a>" + STATUS,
        f"<!DOCTYPE a [<!ENTITY web 'web 1'>]>{small(name='&web;')}",
        f"<!DOCTYPE a [<!ENTITY x SYSTEM 'file:///etc/hostname'>]>{small(name='&x;')}",
        f"<!DOCTYPE a SYSTEM 'file:///etc/hostname'>{small()}",
        small(name="&web;"),
        "<a>" * 50_000,
        "<a>" * 60_000 + "</a>" * 60_000,
        small().replace("</domain>", "<x/>" * 100_000 + "</domain>"),
        "\0",
    ],
)
def test_what_is_no_status_file(text: str) -> None:
    assert libvirt.parse(text.encode()) is None


BRIDGES: dict[str, tuple[str, str | None]] = {
    "a bridge": ("<source bridge='br7'/>", "br7"),
    "a network of a bridge's, as it runs": ("<source network='lan' portid='1' bridge='virbr0'/>", "virbr0"),
    "a network, as libvirt keeps it": (
        "<source network='lan'/><actual type='network'><source bridge='virbr1'/></actual>",
        "virbr1",
    ),
    "a network that does not run": ("<source network='lan'/>", None),
    "a device": ("<source dev='eth1' mode='bridge'/>", None),
    "nothing": ("", None),
    "no name": ("<source bridge=''/>", None),
}


@pytest.mark.parametrize("case", BRIDGES)
def test_the_bridge_of_a_nic(case: str) -> None:
    text, bridge = BRIDGES[case]
    devices = f"<devices><interface type='network'>{text}</interface></devices>"
    domain = libvirt.parse(small().replace("</domain>", f"{devices}</domain>").encode())
    assert domain and [nic.bridge for nic in domain.interfaces] == [bridge]


# --- What hooks are given --------------------------------------------------------------------------------------------

POLICY = """<metadata><q:steering xmlns:q='urn:qsteer:domain:1' required='yes'>
<q:interface equal='2'/></q:steering></metadata>"""
DOMAIN = STATUS[STATUS.index("  <domain ") : STATUS.index("</domstatus>")]


def test_a_domain() -> None:
    """The same, but for what only runs."""
    described, running = libvirt.describe(DOMAIN.encode()), libvirt.parse(STATUS.encode())
    assert described and running
    assert described.interfaces == running.interfaces
    assert (described.name, described.uuid, described.emulator, described.policy) == ("web 1", UUID, None, None)
    text = DOMAIN.replace("<devices>", f"{POLICY}<devices><emulator>/usr/bin/qsteer-qemu</emulator>")
    described = libvirt.describe(f"<?xml version='1.0' encoding='UTF-8'?>\n{text}".encode())
    assert described and described.emulator == "/usr/bin/qsteer-qemu"
    assert described.policy and described.policy.required and len(described.policy.entries) == 1
    assert described.interfaces == running.interfaces


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        DOMAIN[: len(DOMAIN) // 2],
        STATUS,
        DOMAIN.replace("<name>web 1</name>", ""),
        DOMAIN.replace("<name>web 1</name>", "<name></name>"),
        DOMAIN.replace("web 1</name>", "x" * 5000 + "</name>"),
        re.sub("<uuid>.*</uuid>", "", DOMAIN),
        "<!DOCTYPE domain>" + DOMAIN,
        DOMAIN.replace("web 1</name>", "&web;</name>"),
        DOMAIN.replace("domain", "network"),
        DOMAIN.replace("</devices>", "<x/>" * 100_000 + "</devices>"),
        DOMAIN + " " * libvirt.FILE_MAX,
        "\0",
    ],
)
def test_what_is_no_domain(text: str) -> None:
    assert libvirt.describe(text.encode()) is None


INCOMING = {
    "a migration comes": ("paused", "migration", True),
    "booted": ("running", "booted", False),
    "migrated": ("running", "migrated", False),
    "restored": ("running", "restored", False),
    "paused by a user": ("paused", "user", False),
    "paused as it starts": ("paused", "starting up", False),
    "on its way to another host": ("running", "migration", False),
}


@pytest.mark.parametrize("case", INCOMING)
def test_whether_its_state_is_yet_to_come(case: str) -> None:
    state, reason, incoming = INCOMING[case]
    text = small().replace("<domstatus", f"<domstatus state='{state}' reason='{reason}'")
    domain = libvirt.parse(text.encode())
    assert domain and domain.incoming == incoming


def test_a_policy_in_a_status_file() -> None:
    domain = libvirt.parse(small().replace("</domain>", f"{POLICY}</domain>").encode())
    assert domain and domain.policy and domain.policy.required
    (entry,) = domain.policy.entries
    assert (entry.alias, entry.mac, entry.settings.static.table) == (None, None, equal_table(2))


@pytest.mark.parametrize("data", [b"\xff" + STATUS.encode(), STATUS.encode("utf-16"), small().encode("utf-32")])
def test_another_encoding_is_none(data: bytes) -> None:
    assert libvirt.parse(data) is None


@pytest.mark.parametrize("depth", [1000, 40_000])
def test_depth_is_no_trouble(depth: int) -> None:
    text = small().replace("<uuid>", "<x>" * depth + "</x>" * depth + "<uuid>")
    assert libvirt.parse(text.encode())


def test_entities_do_not_grow() -> None:
    bomb = "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10 if i else 'x' * 10}'>" for i in range(10))
    assert libvirt.parse(f"<!DOCTYPE a [{bomb}]>{small(name='&e9;')}".encode()) is None


def test_noise_never_raises() -> None:
    generator = random.Random(6)
    for _ in range(1500):
        data = bytearray(STATUS.encode())
        for _ in range(generator.randrange(1, 12)):
            position = generator.randrange(len(data))
            match generator.randrange(4):
                case 0:
                    data[position] = generator.randrange(256)
                case 1:
                    del data[position : position + generator.randrange(200)]
                case 2:
                    data[position:position] = generator.choice(
                        (b"<!DOCTYPE x [", b"]>", b"&amp;", b"<x/>", b"]]>", b"'")
                    )
                case 3:
                    data += data[position : position + 300]
        domain = libvirt.parse(bytes(data))
        assert domain is None or domain.pid > 0


HOLDER = """
import fcntl, os, sys
writes = sys.argv[2] == "write"
fd = os.open(sys.argv[1], (os.O_WRONLY if writes else os.O_RDONLY) | os.O_CREAT, 0o644)
fcntl.lockf(fd, fcntl.LOCK_EX if writes else fcntl.LOCK_SH, 1)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(pid_file: Path, lock: str = "write") -> Iterator[Process]:
    """A process that has a pid file the way libvirt's QEMUs do."""
    command = (sys.executable, "-c", HOLDER, str(pid_file), lock)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"ready\n"
        process = procs.read(child.pid)
        assert process
        yield process
        child.kill()


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Process]:
    """The process of a domain whose files are in tmp_path."""
    with running(tmp_path / "web1.pid") as process:
        (tmp_path / "web1.xml").write_text(small(pid=process.pid))
        yield process


def names_in(
    directory: Path,
    *processes: Process,
    mount: int | None = None,
    owner: int | None = None,
    limits: libvirt.Limits = libvirt.SESSION_LIMITS,
) -> list[str]:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        by_pid = {process.pid: process for process in processes}
        found = libvirt.domains_in(fd, os.getuid() if owner is None else owner, mount, by_pid, limits)
        assert all(domain.pid == pid for pid, domain in found.items())
        return [domain.name for domain in found.values()]
    finally:
        os.close(fd)


def test_the_domain_of_a_process(tmp_path: Path, vm: Process) -> None:
    assert names_in(tmp_path, vm) == ["web1"]
    assert names_in(tmp_path) == []


def test_a_file_that_is_left_over(tmp_path: Path, vm: Process) -> None:
    """Its pid is another process's by now, which may call itself as it likes."""
    (tmp_path / "old.xml").write_text(small(name="old", pid=vm.pid))
    (tmp_path / "old.pid").write_text(str(vm.pid))
    assert names_in(tmp_path, vm) == ["web1"]
    (tmp_path / "web1.pid").unlink()
    (tmp_path / "web1.pid").write_text(str(vm.pid))
    assert names_in(tmp_path, vm) == []


def test_a_read_lock_is_not_libvirts(tmp_path: Path) -> None:
    """Whoever may read the file can have one."""
    with running(tmp_path / "web1.pid", lock="read") as process:
        (tmp_path / "web1.xml").write_text(small(pid=process.pid))
        assert names_in(tmp_path, process) == []


def test_a_file_about_another_process(tmp_path: Path, vm: Process) -> None:
    (tmp_path / "web1.xml").write_text(small(pid=vm.pid + 1))
    assert names_in(tmp_path, vm) == []


def test_files_that_are_none(tmp_path: Path, vm: Process) -> None:
    good = tmp_path / "web1.xml"
    content = good.read_text()
    for make in (
        lambda path: path.symlink_to(tmp_path / "elsewhere"),
        lambda path: os.mkfifo(path),
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(content.encode() + b" " * libvirt.FILE_MAX),
        lambda path: path.write_text(content[:-5]),
        lambda path: None,
    ):
        (tmp_path / "elsewhere").write_text(content)
        if good.is_dir():
            good.rmdir()
        else:
            good.unlink(missing_ok=True)
        make(good)
        assert names_in(tmp_path, vm) == []
    if good.exists():
        good.unlink()
    good.write_bytes(content.encode() + b" " * (libvirt.FILE_MAX - len(content)))
    assert names_in(tmp_path, vm) == ["web1"]


def test_a_file_of_another_user(tmp_path: Path, vm: Process) -> None:
    assert names_in(tmp_path, vm, owner=os.getuid() + 1) == []


def test_a_file_of_another_file_system(tmp_path: Path, vm: Process) -> None:
    assert names_in(tmp_path, vm, mount=-1) == []


def test_one_bad_file_does_not_hide_the_others(tmp_path: Path, vm: Process) -> None:
    (tmp_path / "aa.xml").write_text("<")
    (tmp_path / "aa.pid").write_text("x")
    (tmp_path / "zz.xml").mkdir()
    (tmp_path / f"{'n' * 200}\n.xml").write_text("")
    assert names_in(tmp_path, vm) == ["web1"]


@pytest.mark.parametrize("name", ["web1.xml", "other.pid"])
def test_a_lease_is_not_waited_for(tmp_path: Path, vm: Process, name: str) -> None:
    """Its holder can keep whoever opens the file waiting for 45 s."""
    (tmp_path / "other.xml").write_text("")
    (tmp_path / name).touch()
    handler = signal.signal(signal.SIGIO, signal.SIG_IGN)
    fd = os.open(tmp_path / name, os.O_RDONLY)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        began = time.monotonic()
        assert names_in(tmp_path, vm) == ([] if name == "web1.xml" else ["web1"])
        assert time.monotonic() - began < 1
    finally:
        os.close(fd)
        signal.signal(signal.SIGIO, handler)
    assert names_in(tmp_path, vm) == ["web1"]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that are parsed from now on."""
    sizes: list[int] = []
    parse = libvirt.parse

    def counting(data: bytes) -> Domain | None:
        sizes.append(len(data))
        return parse(data)

    monkeypatch.setattr(libvirt, "parse", counting)
    return sizes


def test_a_file_of_many_names_is_read_once(tmp_path: Path, vm: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web1.xml").write_text("<")
    for number in range(50):
        (tmp_path / f"n{number}.pid").hardlink_to(tmp_path / "web1.pid")
        (tmp_path / f"n{number}.xml").hardlink_to(tmp_path / "web1.xml")
    parsed = counted(monkeypatch)
    assert names_in(tmp_path, vm) == []
    assert parsed == [1]


def test_the_first_domain_of_a_process_counts(tmp_path: Path, vm: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web2.pid").hardlink_to(tmp_path / "web1.pid")
    (tmp_path / "web2.xml").write_text(small(name="web2", pid=vm.pid))
    parsed = counted(monkeypatch)
    assert names_in(tmp_path, vm) == ["web1"]
    assert len(parsed) == 1


def test_the_bytes_of_a_directory_are_bounded(tmp_path: Path, vm: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a1", "a2", "a3"):
        (tmp_path / f"{name}.pid").hardlink_to(tmp_path / "web1.pid")
        (tmp_path / f"{name}.xml").write_text("<" * 1000)
    parsed = counted(monkeypatch)
    assert names_in(tmp_path, vm, limits=libvirt.Limits(files=9, bytes=2500)) == ["web1"]
    assert parsed == [1000, 1000, (tmp_path / "web1.xml").stat().st_size]


def test_the_files_of_a_directory_are_bounded(tmp_path: Path, vm: Process) -> None:
    (tmp_path / "a.xml").write_text("")
    assert names_in(tmp_path, vm, limits=libvirt.Limits(files=2, bytes=9999)) == ["web1"]
    assert names_in(tmp_path, vm, limits=libvirt.Limits(files=1, bytes=9999)) == []


def test_no_libvirt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vm: Process) -> None:
    monkeypatch.setattr(libvirt, "SYSTEM", tmp_path / "none")
    monkeypatch.setattr(libvirt, "SESSIONS", tmp_path / "none")
    assert libvirt.domains((vm,)) == libvirt.Found(domains={})


def test_what_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vm: Process) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "no")

    monkeypatch.setattr(libvirt, "SYSTEM", tmp_path)
    monkeypatch.setattr(libvirt, "SESSIONS", tmp_path / "none")
    monkeypatch.setattr(libvirt, "_regular_file", refuse)
    (note,) = libvirt.domains((vm,)).notes
    assert note == f"what libvirt knows is not shown: cannot read {tmp_path}: Permission denied"


# --- The domain of a hook --------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, need_root: None) -> Path:
    """Where the system's daemon, which is root's, keeps its files."""
    monkeypatch.setattr(libvirt, "SYSTEM", tmp_path)
    return tmp_path


def test_the_domain_of_a_name(system: Path, vm: Process) -> None:
    (system / "other.xml").write_text(small(name="other", pid=vm.pid))
    process, domain = libvirt.running("web1")
    assert (process, domain.name, domain.pid) == (vm, "web1", vm.pid)


@pytest.mark.parametrize("name", ["web2", "", ".", "web1.xml", "x" * 400, "\udcff"])
def test_no_domain_of_that_name(system: Path, vm: Process, name: str) -> None:
    with pytest.raises(QsteerError) as caught:
        libvirt.running(name)
    assert name in str(caught.value)
    assert isinstance(caught.value, NotFoundError) or caught.value.errno


def test_a_domain_whose_qemu_is_gone(system: Path) -> None:
    with running(system / "web1.pid") as process:
        (system / "web1.xml").write_text(small(pid=process.pid))
    with pytest.raises(NotFoundError, match='libvirt\'s domain "web1" does not run'):
        libvirt.running("web1")


@pytest.mark.parametrize("text", ["", "<", small(pid=1), small().replace("<name>web1</name>", "")])
def test_a_status_file_that_does_not_fit(system: Path, vm: Process, text: str) -> None:
    """libvirt puts a new one into its place."""
    (system / "web1.xml").write_text(text)
    with pytest.raises(BusyError, match=rf'what libvirt knows of domain "web1" does not fit process {vm.pid}'):
        libvirt.running("web1")


def test_a_status_file_that_is_missing(system: Path, vm: Process) -> None:
    (system / "web1.xml").unlink()
    with pytest.raises(BusyError):
        libvirt.running("web1")


def test_the_files_of_somebody_else_do_not_count(system: Path, vm: Process) -> None:
    os.chown(system / "web1.xml", 65534, 65534)
    with pytest.raises(BusyError):
        libvirt.running("web1")
    os.chown(system / "web1.pid", 65534, 65534)
    with pytest.raises(QsteerError):
        libvirt.running("web1")


def test_no_libvirt_at_all(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt, "SYSTEM", system / "none")
    with pytest.raises(NotFoundError):
        libvirt.running("web1")
    assert libvirt.status_file("web1") is None


def test_a_status_file_that_is_written_anew_is_another(system: Path, vm: Process) -> None:
    before = libvirt.status_file("web1")
    assert before and libvirt.status_file("web1") == before
    (system / "new").write_text((system / "web1.xml").read_text())
    (system / "new").replace(system / "web1.xml")
    assert libvirt.status_file("web1") not in (before, None)


def test_no_fd_stays_open(tmp_path: Path, vm: Process) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    test_one_bad_file_does_not_hide_the_others(tmp_path, vm)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
