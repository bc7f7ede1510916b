# SPDX-License-Identifier: BSD-2-Clause
"""Guests of a host that is a virtual machine itself: several NICs each, with vhost and without, side by side.

Starting a guest is what takes long there, not sending it flows; so one guest has all the NICs that are compared.
"""

import contextlib
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.agent_guest import agent_arguments, restart_agent
from integration.guest import Guest, as_user
from integration.provision import Provisioned
from integration.traffic import FLOWS, Verdict, follow, verify
from qsteer import ethtool, kernel
from qsteer.rss import RssConfig
from tests.kernel.support import PATIENCE

QUEUES = 4
USER = "nobody"
PATIENTLY = ("--timeout", str(12 * PATIENCE))
"""For every verb that asks QEMU or a guest."""
_QSTEER = (sys.executable, "-m", "qsteer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A NIC of a guest: ``tap`` is its tap's name and its netdev's id.

    ``passed`` says that ``qsteer run`` makes tap and program, and passes them to QEMU.
    """

    tap: str
    vhost: bool
    rss: bool
    passed: bool = False

    @property
    def mac(self) -> str:
        return f"52:54:{self.tap.encode()[-4:].hex(':')}"

    @property
    def word(self) -> str:
        """``on`` or ``off``: vhost, as QEMU has it."""
        return "on" if self.vhost else "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A guest that is up, with its agent running, and what its NICs are called there."""

    guest: Guest
    files: Provisioned
    devices: dict[str, str]

    def device(self, nic: Nic) -> str:
        return self.devices[nic.mac]

    def is_offered_rss(self, nic: Nic) -> bool:
        """Whether the guest's driver has a table for the NIC."""
        return not ethtool.has_no_table(self.guest.run(f"ethtool -x {self.device(nic)}"))

    def ethtool(self, nic: Nic, arguments: str) -> RssConfig:
        """Let the guest set its RSS configuration (``-X``'s arguments); what its ethtool then tells."""
        self.guest.run(f"ethtool -X {self.device(nic)} {arguments}")
        return self.guest.rss(self.device(nic))

    def verdict(self, nic: Nic, config: RssConfig, flows: int = FLOWS) -> Verdict:
        """Follow the flows through a NIC, and compare them with a configuration."""
        sighting = follow(self.guest, nic.tap, self.files.flowrx, queues=QUEUES, flows=flows, device=self.device(nic))
        return verify(sighting, config, queues=QUEUES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What a qsteer command came to."""

    status: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """Why it failed, in one line."""
        return " / ".join(self.err.strip().splitlines())


def qsteer(*arguments: str) -> Said:
    """Run a qsteer command as a user would."""
    done = subprocess.run([*_QSTEER, *arguments], capture_output=True, text=True, timeout=60 * PATIENCE)
    return Said(status=done.returncode, out=done.stdout, err=done.stderr)


def run_options(name: str, nics: Sequence[Nic], engine: str = "auto") -> tuple[str, ...]:
    """The options of ``qsteer run``, QEMU's command line follows, for NICs that are passed to it."""
    options = []
    for nic in nics:
        rss = "on" if nic.rss else "off"
        options += ["--tap", f"id={nic.tap},queues={QUEUES},ifname={nic.tap},vhost={nic.word},rss={rss},mac={nic.mac}"]
    return ("--vm", name, *options, "--engine", engine, "--user", USER, "--")


@contextlib.contextmanager
def unprivileged(files: Provisioned, name: str, nics: Sequence[Nic], engine: str = "auto") -> Iterator[Vm]:
    """A guest whose QEMU is an ordinary user's; what is not ``passed`` comes as from libvirt, opened by somebody else.

    ``engine`` is that of ``qsteer run``, for what is passed.  ``files`` has a guest with an agent
    (``agent_guest.with_agent``).  Raises GuestError.
    """
    passed = [nic for nic in nics if nic.passed]
    with contextlib.ExitStack() as stack:
        # QEMU has copies of its own once it is started.
        ours = stack.enter_context(contextlib.ExitStack())
        fds: list[int] = []
        arguments: list[str] = []
        for nic in (nic for nic in nics if not nic.passed):
            tap = kernel.open_tap(nic.tap, QUEUES)
            ours.callback(tap.close)
            vhost = [os.open("/dev/vhost-net", os.O_RDWR) for _ in range(QUEUES if nic.vhost else 0)]
            for fd in vhost:
                ours.callback(os.close, fd)
            backend = f"vhost=on,vhostfds={_colons(vhost)}" if nic.vhost else "vhost=off"
            arguments += _nic(nic, f"fds={_colons(tap.fds)},{backend}")
            fds += (*tap.fds, *vhost)
        prefix = (*_QSTEER, "run", *run_options(name, passed, engine)) if passed else as_user(USER)
        yield stack.enter_context(_booted(files, name, arguments, prefix=prefix, pass_fds=fds, opened=ours))


@contextlib.contextmanager
def rooted(files: Provisioned, name: str, nics: Sequence[Nic]) -> Iterator[Vm]:
    """A guest whose QEMU is root, and does everything itself.  Raises GuestError."""
    arguments: list[str] = []
    for nic in nics:
        netdev = f"ifname={nic.tap},queues={QUEUES},vhost={nic.word},script=no,downscript=no"
        arguments += _nic(nic, netdev)
    with contextlib.ExitStack() as nothing, _booted(files, name, arguments, opened=nothing) as vm:
        yield vm


def _nic(nic: Nic, backend: str) -> tuple[str, ...]:
    device = f"virtio-net-pci,netdev={nic.tap},mac={nic.mac},mq=on,vectors={2 * QUEUES + 2}"
    rss = ",rss=on" if nic.rss else ""
    return ("-netdev", f"tap,id={nic.tap},{backend}", "-device", device + rss)


@contextlib.contextmanager
def _booted(
    files: Provisioned,
    name: str,
    arguments: Sequence[str],
    *,
    prefix: Sequence[str] = (),
    pass_fds: Sequence[int] = (),
    opened: contextlib.ExitStack,
) -> Iterator[Vm]:
    user = USER if prefix else "root"
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix=f"qsteer-{name}-agent-"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        agent = agent_arguments(folder / "agent")
        guest = Guest(files, name=name, user=user, prefix=prefix, arguments=(*arguments, *agent), pass_fds=pass_fds)
        with opened:
            stack.enter_context(guest)
        guest.wait_ready()
        restart_agent(guest)
        told = guest.run('for nic in /sys/class/net/eth*; do echo "$(cat $nic/address) ${nic##*/}"; done')
        devices = dict(line.split() for line in told.splitlines())
        yield Vm(guest=guest, files=files, devices=devices)


def _colons(fds: Sequence[int]) -> str:
    return ":".join(map(str, fds))
