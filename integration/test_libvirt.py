# SPDX-License-Identifier: BSD-2-Clause
"""The hook, the policy in a domain and the emulator's wrapper, with a real libvirtd and real guests of its."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.guest import GuestError
from integration.keeping import keep
from integration.libvirt_host import USER, Domain, Journal, Libvirtd, Nic, another_host, host, provision_libvirt
from integration.provision import BUILD, Provisioned
from integration.traffic import FLOWS, follow, verify
from qsteer import hookfile, inventory, service
from qsteer.domainpolicy import NAMESPACE
from qsteer.model import Source, Tap
from qsteer.rss import RssConfig, equal_table, weighted_table
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
MACS = ("52:54:00:71:6c:00", "52:54:00:71:6c:01")
TAPS = ("qslv0", "qslv1")
KEY = bytes(range(3, 43))
CONFIG = Path("/etc/qsteer/qsteer.toml")
WRAPPER = Path("/var/lib/libvirt/qsteer-qemu")
SERVE = f'[[serve.allow]]\nuser = "{USER}"\n'
QSTEER = (sys.executable, "-m", "qsteer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A host with a libvirtd, whose hook is installed."""

    files: Provisioned
    libvirtd: Libvirtd
    journal: Journal
    root: Path

    def domain(self, name: str, *nics: Nic, policy: str = "", **options: Any) -> Domain:
        """``policy`` is what is inside of the steering element, with its attributes before a ``>``."""
        metadata = f"<q:steering xmlns:q='{NAMESPACE}' {policy}</q:steering>" if policy else ""
        return Domain(self.libvirtd, self.files, name=name, nics=nics, metadata=metadata, **options)


@pytest.fixture(scope="module")
def place(need_root_for_module: None, files: Provisioned) -> Iterator[Place]:
    root = provision_libvirt()
    with host(root) as journal, support.network_namespace(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSTEER_CONFIG", str(CONFIG.parent))
        CONFIG.parent.mkdir()
        CONFIG.write_text(SERVE)
        shutil.copy(BUILD / "qsteer-qemu", WRAPPER)
        assert "written" in support.qsteer("libvirt", "install").stdout
        with Libvirtd() as libvirtd:
            yield Place(files=files, libvirtd=libvirtd, journal=journal, root=root)


@pytest.fixture(scope="module")
def need_root_for_module() -> None:
    if os.geteuid() != 0:
        pytest.skip("not root (make test takes care of it)")


@contextlib.contextmanager
def configured(text: str) -> Iterator[None]:
    CONFIG.write_text(SERVE + text)
    try:
        yield
    finally:
        CONFIG.write_text(SERVE)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """qsteer serve, where the wrapper looks for it."""
    with Path("/run/qsteer/serve.log").open("w") as log, subprocess.Popen((*QSTEER, "serve"), stderr=log) as process:
        try:
            support.wait_until("the service", lambda: service.SOCKET.is_socket() or process.poll() is not None)
            yield
        finally:
            process.terminate()
    assert "Traceback" not in Path("/run/qsteer/serve.log").read_text()


def seen(domain: Domain, tap: str | None = None) -> Tap:
    (found,) = (one for one in inventory.fetch().taps if one.vm_name == domain.name and tap in (None, one.name))
    return found


def attached(domain: Domain, tap: str | None = None) -> RssConfig | None:
    """What steers it, by the kernel's word."""
    content = seen(domain, tap).content
    return content.config if content and content.enabled else None


def check_flows(domain: Domain, files: Provisioned, tap: str, config: RssConfig, *, active: int = 0) -> None:
    """Every flow is on its queue, in the guest and by the host's kernel."""
    device = devices(domain)[seen(domain, tap).nic.mac]  # type: ignore[union-attr,index]
    sighting = follow(domain, tap, files.flowrx, queues=QUEUES, device=device)
    verdict = verify(sighting, config, queues=QUEUES, active=active)
    print(domain.name, tap, verdict)
    assert (verdict.flows, verdict.mismatches, verdict.host_mismatches, verdict.lost) == (FLOWS, 0, 0, 0), verdict


def devices(domain: Domain) -> dict[str, str]:
    """The guest's names of its NICs, by their MACs."""
    told = domain.run("cd /sys/class/net; for nic in eth*; do echo $nic $(cat $nic/address); done").split()
    return dict(zip(told[1::2], told[::2], strict=True))


def restart(libvirtd: Libvirtd) -> None:
    libvirtd.stop()
    libvirtd.start()


def cli(place: Place, *arguments: str) -> str:
    """``qsteer libvirt``, on this libvirtd."""
    done = support.qsteer("libvirt", *arguments, "--connect", place.libvirtd.uri)
    assert done.returncode == 0, done.stderr
    return done.stdout


# The hook, rss='off'


def test_the_policy_steers_from_the_start_on(place: Place) -> None:
    """Set on the command line, read by the hook, left alone when the daemon is restarted, gone with the domain."""
    with place.domain("qslv-policy", Nic(mac=MACS[0], tap=TAPS[0])) as domain:
        assert "equal" in cli(place, "set", domain.name, "--key", KEY.hex(":"), "--nic", "net0", "--equal", "3")
        shown = json.loads(cli(place, "show", domain.name, "--json"))["interfaces"]
        assert (shown[0]["mac"], shown[0]["table"]) == (MACS[0], list(equal_table(3)))
        domain.boot()
        before = seen(domain)
        assert before.program and before.program.ident and before.program.ident.source is Source.STATIC
        told = f"{domain.name}: net0 ({TAPS[0]}): attached, source static, program {before.program_id}"
        assert place.journal.text(domain.name) == told
        config = attached(domain)
        assert config and (config.key, config.table) == (KEY, equal_table(3))
        check_flows(domain, place.files, TAPS[0], config)
        domain.run("ethtool -L eth0 combined 2")
        check_flows(domain, place.files, TAPS[0], config, active=2)
        domain.run("ethtool -L eth0 combined 4")

        restart(place.libvirtd)
        support.wait_until("the hook", lambda: "unchanged" in place.journal.text(domain.name))
        assert seen(domain).program_id == before.program_id and seen(domain).queues == before.queues
        assert support.qsteer("off", "--vm", domain.name).returncode == 0
        restart(place.libvirtd)
        support.wait_until("the hook", lambda: "qsteer off holds it off" in place.journal.text(domain.name))
        assert not seen(domain).program_id

        # What is set while it runs counts for apply at once.
        cli(place, "set", domain.name, "--nic", "net0", "--weight", "1,2,3,2")
        assert "attached" in support.qsteer("apply", "--vm", domain.name).stdout
        config = attached(domain)
        assert config and (config.key, config.table) == (KEY, weighted_table((1, 2, 3, 2)))
        check_flows(domain, place.files, TAPS[0], config)
        place.libvirtd.virsh("destroy", domain.name)
        assert not list(Path("/run/qsteer/holds").glob("*"))
        support.wait_until("the program's end", lambda: not support.programs_of(TAPS[0]))
        cli(place, "set", domain.name, "--clear")
        assert "steering" not in place.libvirtd.virsh("dumpxml", domain.name).stdout
