# SPDX-License-Identifier: BSD-2-Clause
"""The hook, the policy in a domain and the emulator's wrapper, with a real libvirtd and real guests of its."""

import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from integration.libvirt_host import USER, Domain, Journal, Libvirtd, Nic, host, provision_libvirt
from integration.provision import BUILD, Provisioned
from integration.traffic import FLOWS, follow, verify
from qsteer import hookfile, inventory, service
from qsteer.domainpolicy import NAMESPACE
from qsteer.model import Source, Tap
from qsteer.rss import RssConfig, equal_table, weighted_table
from tests.kernel import fuse, support

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


def test_every_nic_is_steered_where_nobody_says_otherwise(place: Place) -> None:
    """And only those that something is said about, where the administrator wants that."""
    nics = (Nic(mac=MACS[0], tap=TAPS[0]), Nic(mac=MACS[1], tap=TAPS[1], queues=1))
    with place.domain("qslv-plain", *nics) as domain:
        place.libvirtd.virsh("start", domain.name)
        assert attached(domain, TAPS[0]) and not seen(domain, TAPS[1]).program_id
        assert "one queue" in place.journal.text(domain.name).splitlines()[1]
    with configured('[libvirt]\nsteer = "policy"\n'), place.domain("qslv-policy-only", nics[0]) as domain:
        place.libvirtd.virsh("start", domain.name)
        assert not seen(domain).program_id and not place.journal.text(domain.name)
    entry = '[libvirt]\nsteer = "policy"\n[[nic]]\nmatch.vm = "qslv-conf*"\nequal = 2\n'
    with configured(entry), place.domain("qslv-configured", nics[0]) as domain:
        place.libvirtd.virsh("start", domain.name)
        config = attached(domain)
        assert config and config.table == equal_table(2)


POLICY_OF_TWO = ">" + f"<q:interface mac='{MACS[1]}' weight='1,3'/><q:interface alias='net0' equal='2' types='tcp4'/>"


def test_a_policy_for_each_nic(place: Place) -> None:
    nics = (Nic(mac=MACS[0], tap=TAPS[0]), Nic(mac=MACS[1], tap=TAPS[1]))
    with place.domain("qslv-two", *nics, policy=POLICY_OF_TWO) as domain:
        place.libvirtd.virsh("start", domain.name)
        configs = [attached(domain, tap) for tap in TAPS]
        assert [config and config.table for config in configs] == [equal_table(2), weighted_table((1, 3))]


# The hook, when something is wrong

WRONG = {
    "an unknown attribute": "><q:interface alias='net0' equals='3'/>",
    "a number that is none": "><q:interface alias='net0' equal='three'/>",
    "an unknown element": "><q:nic alias='net0'/>",
}


@pytest.mark.parametrize("what", WRONG)
def test_a_broken_policy_counts_for_nothing(place: Place, what: str) -> None:
    """The domain starts, and is steered as without it."""
    with place.domain("qslv-broken", Nic(mac=MACS[0], tap=TAPS[0]), policy=WRONG[what]) as domain:
        before = len(place.journal.entries(domain.name))
        place.libvirtd.virsh("start", domain.name)
        told = place.journal.entries(domain.name)[before:]
        assert [entry["PRIORITY"] for entry in told] == ["4", "6"]
        assert told[0]["MESSAGE"].startswith(f"{domain.name}: the domain's policy is left out: ")
        config = attached(domain)
        assert config and config.table == tuple(range(128))
        done = support.qsteer("libvirt", "show", domain.name, "--connect", place.libvirtd.uri)
        assert done.returncode == 2 and "the domain's policy is left out" in done.stderr


def refused(domain: Domain) -> str:
    """What virsh says when a domain does not start; nothing of it is left."""
    done = domain.libvirtd.virsh("start", domain.name, check=False)
    assert done.returncode and "Hook script execution failed" in done.stderr, done
    assert domain.libvirtd.virsh("domstate", domain.name).stdout.strip() == "shut off"
    assert not [tap for tap in inventory.fetch().taps if tap.name in TAPS]
    return done.stderr


def test_required_means_no_steering_no_start(place: Place) -> None:
    broken = " required='yes'><q:interface equal='three'/>"
    with place.domain("qslv-required", Nic(mac=MACS[0], tap=TAPS[0]), policy=broken) as domain:
        assert "steering is required" in refused(domain)
    software = "><q:interface required='yes'/>"
    with place.domain("qslv-required", Nic(mac=MACS[0], tap=TAPS[0], rss=True), policy=software) as domain:
        assert "steers in software" in refused(domain)
        # The administrator may say that no domain is to insist.
        with configured('[libvirt]\nmetadata = ["table"]\n'):
            place.libvirtd.virsh("start", domain.name)
            assert "does not let its policy ask for required" in place.journal.text(domain.name)
    with place.domain("qslv-required", Nic(mac=MACS[0], tap=TAPS[0]), policy=" required='yes'>") as domain:
        place.libvirtd.virsh("start", domain.name)
        assert attached(domain)


def test_pause_is_the_administrators(place: Place) -> None:
    asks = "><q:interface source='device-state' allow='pause'/>"
    with place.domain("qslv-pause", Nic(mac=MACS[0], tap=TAPS[0]), policy=asks) as domain:
        place.libvirtd.virsh("start", domain.name)
        assert "does not let its policy ask for pause" in place.journal.text(domain.name)
        assert "it takes qsteer keep" in place.journal.text(domain.name)


@contextlib.contextmanager
def hook_replaced(text: str) -> Iterator[None]:
    """The script that libvirt calls, with another hook behind it."""
    script = hookfile.SCRIPT.read_text()
    fake = Path("/var/lib/libvirt/fake-hook")
    fake.write_text(text)
    fake.chmod(0o755)
    hookfile.SCRIPT.write_text(hookfile.text(fake if text else Path("/nonexistent")))
    try:
        yield
    finally:
        hookfile.SCRIPT.write_text(script)


BROKEN_HOOKS = {
    "missing": "",
    "a Python that does not start": "#!/nonexistent/python\n",
    "a traceback": f"#!{sys.executable}\nraise SystemError\n",
    "killed": "#!/bin/sh\nkill -9 $$\n",
}


@pytest.mark.parametrize("what", BROKEN_HOOKS)
def test_a_domain_starts_without_a_qsteer_that_works(place: Place, what: str) -> None:
    policy = " required='yes'><q:interface equal='3'/>"
    with (
        hook_replaced(BROKEN_HOOKS[what]),
        place.domain("qslv-missing", Nic(mac=MACS[0], tap=TAPS[0]), policy=policy) as domain,
    ):
        place.libvirtd.virsh("start", domain.name)
        assert not seen(domain).program_id


def test_the_hook_keeps_its_deadline(place: Place) -> None:
    """A configuration on a file system that does not answer: the domain starts all the same, after two seconds."""
    with fuse.stalled() as directory, place.domain("qslv-late", Nic(mac=MACS[0], tap=TAPS[0])) as domain:
        CONFIG.rename(CONFIG.with_suffix(".kept"))
        CONFIG.symlink_to(directory / "file")
        try:
            began = time.monotonic()
            place.libvirtd.virsh("start", domain.name)
            took_s = time.monotonic() - began
        finally:
            CONFIG.unlink()
            CONFIG.with_suffix(".kept").rename(CONFIG)
        assert "not done within 2 s, given up" in place.journal.text(domain.name)
        assert 2.0 <= took_s < support.patience(4.0)
        assert not seen(domain).program_id
        print(f"start with a hook that stalls: {took_s:.2f} s")


# The wrapper, rss='on'


def test_a_guest_sets_its_own_table_with_the_wrapper(place: Place) -> None:
    """Real RSS for libvirt's unprivileged QEMU: every flow where the guest asks for it, put there by the kernel."""
    nics = (Nic(mac=MACS[0], tap=TAPS[0], rss=True), Nic(mac=MACS[1], tap=TAPS[1], rss=False))
    with serving(), place.domain("qslv-wrapped", *nics, emulator=WRAPPER) as domain:
        domain.boot()
        status = Path(f"/proc/{domain.pid}/status").read_text()
        assert f"Uid:\t{pwd.getpwnam(USER).pw_uid}" in status and "CapEff:\t0000000000000000" in status
        assert "qsteer-qemu: net0: program qsteer" in domain.log()
        assert "Unable to load eBPF" not in domain.log()
        told = place.journal.text(domain.name)
        assert f"net0 ({TAPS[0]}): ready, source shared-maps" in told
        assert f"net1 ({TAPS[1]}): attached, source static" in told
        device = devices(domain)[MACS[0]]
        for setting in ("weight 4 3 2 1", "equal 3", f"hkey {KEY.hex(':')} equal 4"):
            domain.run(f"ethtool -X {device} {setting}")
            check_flows(domain, place.files, TAPS[0], domain.rss(device))
            assert attached(domain, TAPS[0]) == domain.rss(device)
        other = attached(domain, TAPS[1])
        assert other
        check_flows(domain, place.files, TAPS[1], other)


def test_the_wrapper_without_a_service(place: Place) -> None:
    """QEMU starts as it would have without; the hook says what that means."""
    with place.domain("qslv-alone", Nic(mac=MACS[0], tap=TAPS[0], rss=True), emulator=WRAPPER) as domain:
        place.libvirtd.virsh("start", domain.name)
        assert "qsteer-qemu: net0: no program: no qsteer serve listens" in domain.log()
        assert "steers in software" in place.journal.text(domain.name)
