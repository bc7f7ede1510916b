# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-qemu in front of a real QEMU, as libvirt runs it: another user, taps and JSON of libvirt's."""

import pwd
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from integration import qemu_fuzz
from integration.guest import Guest, as_user
from integration.provision import Provisioned
from integration.test_serve import check_flows, devices, serving
from qsteer import kernel, service
from tests.kernel import bridges, emulator, private, support

pytestmark = pytest.mark.root

QUEUES = 4
TIMEOUT_S = support.patience(60)
CAPABILITIES = ("-S", "-no-user-config", "-nodefaults", "-nographic", "-machine", "none,accel=kvm:tcg", "-qmp", "stdio")
"""How libvirt asks a QEMU what it can do, but for the socket."""
QUESTIONS = '{"execute":"qmp_capabilities"}{"execute":"query-commands"}{"execute":"query-machines"}{"execute":"quit"}'
TIME = re.compile(r'"timestamp": \{[^}]*\}')
"""Of an event, the one thing that differs from run to run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """``files`` are those of a guest, whose QEMU is the wrapper; ``qemu`` is the one that an administrator chose."""

    files: Provisioned
    qemu: Path


@pytest.fixture
def place(with_qemu: Provisioned) -> Iterator[Place]:
    assert emulator.WRAPPER.exists(), "make build makes it"
    with support.network_namespace(), bridges.host() as folder:
        private.RUNTIME.chmod(0o755)
        private.mount("-t", "sysfs", "qsteer", "/sys")  # that of the network
        private.mount("-t", "bpf", "bpf", "/sys/fs/bpf")
        emulator.CHOICES.mkdir()
        (emulator.CHOICES / emulator.QEMU).symlink_to(with_qemu.qemu)
        wrapper = bridges.copy(emulator.WRAPPER, folder / "bin")
        yield Place(files=replace(with_qemu, qemu=wrapper), qemu=with_qemu.qemu)


@pytest.mark.guest
def test_a_guest_as_libvirt_starts_it(place: Place, user: str) -> None:
    """Every flow of both NICs is on the queue that the guest's table says; QEMU has no rights, and no complaints."""
    with (
        serving(user) as path,
        support.tap("qsqw0", QUEUES) as first,
        support.tap("qsqw1", QUEUES) as second,
    ):
        service.SOCKET.symlink_to(path)
        nics = (emulator.Nic(fds=first.open.fds), emulator.Nic(number=1, fds=second.open.fds))
        # One bus, no slots of libvirt's choice: this machine has no root ports.
        arguments = tuple(word for nic in nics for word in replace(nic, device={"bus": None, "addr": None}).words)
        fds = (*first.open.fds, *second.open.fds)
        guest = Guest(place.files, name="qsqw", user=user, prefix=as_user(user), arguments=arguments, pass_fds=fds)
        with guest:
            guest.wait_ready()
            uid, capabilities = guest.credentials()
            assert (uid, int(capabilities, 16)) == (pwd.getpwnam(user).pw_uid, 0)
            said = (guest.folder / "qemu.log").read_text()
            version = tuple(map(int, place.files.qemu_version.split(".")[:2]))
            if version < (9, 0):
                why = f"no program: QEMU {version[0]}.{version[1]} takes none, 9.0 and later do"
                assert [f"qsteer-qemu: net{number}: {why}" in said for number in (0, 1)] == [True, True], said
                return
            numbers = [
                int(number) for number in re.findall(r"^qsteer-qemu: net[01]: program qsteer (\d+) ", said, re.M)
            ]
            assert len(set(numbers)) == 2 and "eBPF" not in said and "RSS" not in said, said
            names = devices(guest)
            for number, (tap, weights) in enumerate((("qsqw0", "4 3 2 1"), ("qsqw1", "1 2 3 4"))):
                check_flows(guest, place.files, names[f"52:54:00:71:77:0{number}"], tap, weights)
                attached = {queue.program_id for queue in kernel.open_queues(guest.pid) if queue.tap == tap}
                assert attached == {numbers[number]}
            assert (guest.folder / "qemu.log").read_text() == said


def test_a_vm_without_a_service(place: Place, user: str) -> None:
    """It starts, as QEMU alone would."""
    with support.tap("qsqw0", QUEUES) as tap:
        nic = emulator.Nic(fds=tap.open.fds, device={"bus": None, "addr": None})
        quit_at_once = ("-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio")
        done = subprocess.run(
            [*as_user(user), place.files.qemu, *quit_at_once, *nic.words],
            input='{"execute":"qmp_capabilities"}{"execute":"query-status"}{"execute":"quit"}',
            pass_fds=tap.open.fds,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    assert done.returncode == 0 and '"prelaunch"' in done.stdout, done
    assert done.stderr.splitlines()[0].startswith("qsteer-qemu: net0: no program: ")
    assert "ebpf-rss-fds" not in done.stderr


def test_libvirts_questions_pass_through(place: Place, user: str) -> None:
    for words in (CAPABILITIES, ("--version",), ("-help",), ("-machine", "help"), ("-device", "virtio-net-pci,help")):
        outcomes = [
            subprocess.run(
                [*as_user(user), program, *words],
                input=QUESTIONS,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
            for program in (place.files.qemu, place.qemu)
        ]
        wrapped, plain = ((done.returncode, TIME.sub("", done.stdout), done.stderr) for done in outcomes)
        assert wrapped == plain and len(plain[1]) > 20


def test_it_stands_hostile_command_lines() -> None:
    told = qemu_fuzz.command_lines(20_000, seed=3)
    counted = re.fullmatch(r"20000 command lines: (\d+) NICs that get a program, (\d+) that do not\n", told)
    assert counted and all(int(count) > 1000 for count in counted.groups()), told
