# SPDX-License-Identifier: BSD-2-Clause
"""The hook, the policy in a domain and the emulator's wrapper, with a real libvirtd and real guests of its."""

import contextlib
import json
import os
import pwd
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from integration.handover import Handover
from integration.keeping import keep
from integration.libvirt_host import QEMU, USER, Domain, Journal, Libvirtd, Nic, another_host, host, provision_libvirt
from integration.provision import BUILD, Provisioned, provision_new_qemu, provision_old_qemu
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
def newest_qemu(request: pytest.FixtureRequest) -> Path | None:
    """Made before the module's own host, in which apt does not work; only where some test wants it."""
    wanted = any(item.get_closest_marker("compat") for item in request.session.items)
    return provision_new_qemu() if wanted else None


@pytest.fixture(scope="module")
def old_qemu(request: pytest.FixtureRequest) -> Path | None:
    """Likewise."""
    wanted = any(item.get_closest_marker("compat") for item in request.session.items)
    return provision_old_qemu() if wanted else None


@pytest.fixture(scope="module")
def place(
    need_root_for_module: None, files: Provisioned, newest_qemu: Path | None, old_qemu: Path | None
) -> Iterator[Place]:
    root = provision_libvirt()
    with host(root) as journal, support.network_namespace(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSTEER_CONFIG", str(CONFIG.parent))
        shutil.rmtree(CONFIG.parent, ignore_errors=True)  # the machine's own, of which this host has a copy
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


@pytest.mark.compat
def test_the_newest_qemu(place: Place, newest_qemu: Path) -> None:
    with place.domain("qslv-new", Nic(mac=MACS[0], tap=TAPS[0]), emulator=newest_qemu) as domain:
        domain.boot()
        config = attached(domain)
        assert config
        check_flows(domain, place.files, TAPS[0], config)


@pytest.mark.compat
def test_an_old_qemu(place: Place, old_qemu: Path) -> None:
    """The guest's driver makes QEMU take the program off: the hook says so beforehand, and keep puts it back."""
    with place.domain("qslv-old", Nic(mac=MACS[0], tap=TAPS[0]), emulator=old_qemu) as domain:
        domain.boot()
        assert "takes the program off when the guest's driver starts: it takes qsteer keep" in place.journal.text(
            domain.name
        )
        assert not seen(domain).program_id
        with keep(domain.name) as kept:
            kept.wait_for("steered", TAPS[0])
            place.libvirtd.virsh("destroy", domain.name)
            at = len(kept.read())
            domain.boot()
            assert f"left to qsteer keep (process {kept.process.pid})" in place.journal.text(domain.name)
            kept.wait_for("put-back", TAPS[0], after=at)
            config = attached(domain)
            assert config
            check_flows(domain, place.files, TAPS[0], config)


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
        assert "it takes a QMP socket of its own, and qsteer keep" in place.journal.text(domain.name)


@contextlib.contextmanager
def script_replaced(text: str) -> Iterator[None]:
    """What libvirt calls."""
    script = hookfile.SCRIPT.read_text()
    hookfile.SCRIPT.write_text(text)
    try:
        yield
    finally:
        hookfile.SCRIPT.write_text(script)


NOWHERE, BROKEN = Path("/var/lib/libvirt/no-hook"), Path("/var/lib/libvirt/broken-hook")
BROKEN_HOOKS = {
    "missing": hookfile.text(NOWHERE),
    "a Python that does not start": hookfile.text(BROKEN, "/nonexistent/python"),
    "a traceback": hookfile.text(BROKEN),
}


@pytest.mark.parametrize("what", BROKEN_HOOKS)
def test_a_domain_starts_without_a_qsteer_that_works(place: Place, what: str) -> None:
    policy = " required='yes'><q:interface equal='3'/>"
    BROKEN.write_text("raise SystemError\n")
    with (
        script_replaced(BROKEN_HOOKS[what]),
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


@pytest.fixture(scope="module", params=["a copy", pytest.param("the newest", marks=pytest.mark.compat)])
def upgrade(request: pytest.FixtureRequest, place: Place, newest_qemu: Path | None) -> Path:
    """Another QEMU than the one of libvirt's release; a copy of it is another one, too."""
    if request.param == "a copy":
        other = Path("/var/lib/libvirt/other")
        other.mkdir()
        return Path(shutil.copy(QEMU, other))
    assert newest_qemu
    return newest_qemu


def test_an_upgrade_behind_the_wrapper(place: Place, upgrade: Path) -> None:
    """libvirt looks at the wrapper's own times; the hook has it look again when there is another QEMU behind it."""
    nic = Nic(mac=MACS[0], tap=TAPS[0], rss=True)
    real = Path("/etc/qsteer/qemu") / QEMU.name
    real.parent.mkdir()
    with contextlib.ExitStack() as undo, serving():
        undo.callback(shutil.rmtree, real.parent)
        domain = undo.enter_context(place.domain("qslv-upgraded", nic, emulator=WRAPPER))

        def start() -> int:
            """How many times the hook has said that there is another QEMU."""
            place.libvirtd.virsh("start", domain.name)
            domain.reconnected()
            assert "qsteer-qemu: net0: program qsteer" in domain.log()
            place.libvirtd.virsh("destroy", domain.name)
            return place.journal.text(domain.name).count("has another QEMU than when libvirt last looked")

        start()  # the folder of links is new: libvirt looks again
        start()
        before, told = known_of_wrapper(), start()
        assert known_of_wrapper() == before
        real.symlink_to(upgrade)
        assert start() == told + 1  # by what it knew of the one before
        assert start() == told + 1
        after = known_of_wrapper()
        assert after != before
        print(f"libvirt knows the wrapped QEMU as {before} and then as {after}")
        domain.boot()
        domain.run("ethtool -X eth0 equal 3")
        check_flows(domain, place.files, TAPS[0], domain.rss())


def known_of_wrapper() -> tuple[str | None, ...]:
    """libvirt's cache: the ctime of the wrapper, and the version that it told."""
    for path in Path("/var/cache/libvirt/qemu/capabilities").glob("*.xml"):
        known = ElementTree.parse(path).getroot()
        if known.findtext("emulator") == str(WRAPPER):
            return known.findtext("qemuctime"), known.findtext("version")
    raise AssertionError("libvirt has not looked at the wrapper")


# rss='on' without the wrapper


def test_what_is_said_where_qemu_steers_in_software(place: Place) -> None:
    """The hook and status say it; with keep, a QMP socket and a policy that lets it pause, the kernel does the work."""
    extra = (
        "<qemu:commandline><qemu:arg value='-qmp'/>"
        "<qemu:arg value='unix:/run/libvirt/qemu/qslv.qmp,server=on,wait=off'/></qemu:commandline>"
    )
    nic, policy = Nic(mac=MACS[0], tap=TAPS[0], rss=True), "><q:interface source='device-state' allow='pause'/>"
    may_pause = '[libvirt]\nmetadata = ["source", "pause"]\n'
    with configured(may_pause), place.domain("qslv-software", nic, policy=policy, extra=extra) as domain:
        domain.boot()
        told = place.journal.entries(domain.name)[-1]
        assert told["PRIORITY"] == "4" and "steers in software" in told["MESSAGE"] and "qsteer keep" in told["MESSAGE"]
        assert "QEMU steers in software" in support.qsteer("status", "--vm", domain.name).stdout
        domain.run("ethtool -X eth0 equal 3")
        with keep(domain.name) as kept:
            kept.wait_for("steered", TAPS[0])
            check_flows(domain, place.files, TAPS[0], domain.rss())
            source = seen(domain).program.ident.source  # type: ignore[union-attr]
            assert source is Source.DEVICE_STATE
            # The next start is left to it.
            place.libvirtd.virsh("destroy", domain.name)
            place.libvirtd.virsh("start", domain.name)
            assert f"left to qsteer keep (process {kept.process.pid})" in place.journal.text(domain.name)


# Hotplug, with keep


def test_keep_steers_what_is_plugged_in(place: Place) -> None:
    """No hook fires: keep sees the tap, finds its policy, and is done with it when it is gone."""
    policy = f"><q:interface mac='{MACS[1]}' weight='1,2,1,1'/>"
    plugged = Nic(mac=MACS[1], tap=TAPS[1])
    with (
        place.domain("qslv-plug", Nic(mac=MACS[0], tap=TAPS[0]), policy=policy) as domain,
        keep(domain.name) as kept,
    ):
        domain.boot()
        for _ in range(2):
            at = len(kept.read())
            began = time.monotonic()
            place.libvirtd.virsh("attach-device", domain.name, place.libvirtd.file(plugged.xml(), "nic.xml"))
            kept.wait_for("steered", TAPS[1], after=at)
            print(f"steered {(time.monotonic() - began) * 1000:.0f} ms after the beginning of attach-device")
            support.wait_until("the policy", lambda: table_of(domain) == weighted_table((1, 2, 1, 1)), 60)
            support.wait_until("the guest's driver", lambda: MACS[1] in devices(domain))
            device = devices(domain)[MACS[1]]
            domain.run(f"ip link set {device} up; ethtool -L {device} combined {QUEUES}")
            config = attached(domain, TAPS[1])
            assert config
            check_flows(domain, place.files, TAPS[1], config)
            place.libvirtd.virsh("detach-device", domain.name, place.libvirtd.file(plugged.xml(), "nic.xml"))
            kept.wait_for("tap-gone", TAPS[1], after=at)
            support.wait_until("the program's end", lambda: not support.programs_of(TAPS[1]))


def table_of(domain: Domain) -> tuple[int, ...] | None:
    config = attached(domain, TAPS[1])
    return config.table if config else None


# Guests that come from elsewhere


def restored(domain: Domain) -> float:
    """Save a guest and bring it back; for how many milliseconds it ran unsteered."""
    domain.libvirtd.virsh("managedsave", domain.name)
    with Handover(TAPS[0], 0, Path(f"/run/libvirt/qemu/{domain.name}.xml")) as handover:
        domain.libvirtd.virsh("start", domain.name)
        told = handover.wait_steered()
    domain.reconnected()
    return told


SET_UPS = ("hook", "hook and keep")


@pytest.mark.parametrize("set_up", SET_UPS)
def test_a_guest_is_saved_and_restored(place: Place, set_up: str) -> None:
    policy = f"><q:interface key='{KEY.hex(':')}' equal='3'/>"
    with place.domain("qslv-saved", Nic(mac=MACS[0], tap=TAPS[0]), policy=policy) as domain:
        domain.boot()
        before = attached(domain)
        assert before
        with keep(domain.name) if set_up == "hook and keep" else contextlib.nullcontext():
            for _ in range(3):
                told = restored(domain)
                print(f"restored, with {set_up}: unsteered for {told:.0f} ms")
                assert told < support.patience(2000)
                assert attached(domain) == before
            check_flows(domain, place.files, TAPS[0], before)


def test_a_guest_with_the_wrapper_is_saved_and_restored(place: Place) -> None:
    """Its own table comes with its state."""
    nic = Nic(mac=MACS[0], tap=TAPS[0], rss=True)
    with serving(), place.domain("qslv-saved-own", nic, emulator=WRAPPER) as domain:
        domain.boot()
        domain.run(f"ethtool -X eth0 hkey {KEY.hex(':')} equal 3")
        asked = domain.rss()
        for _ in range(3):
            told = restored(domain)
            print(f"restored, with the wrapper: unsteered for {told:.0f} ms")
            assert told < support.patience(2000)
            assert attached(domain) == asked
        check_flows(domain, place.files, TAPS[0], asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """Where guests migrate to."""

    libvirtd: Libvirtd
    journal: Journal

    def qsteer(self, *arguments: str) -> str:
        return self.libvirtd.run(*QSTEER, *arguments).stdout


@pytest.fixture(scope="module")
def destination(place: Place) -> Iterator[Destination]:
    """Another host, without qsteer's hook."""
    with another_host(place.root) as (pid, journal):
        Path(f"/proc/{pid}/root{hookfile.SCRIPT}").unlink()
        with Libvirtd(pid) as libvirtd:
            yield Destination(libvirtd=libvirtd, journal=journal)


def migrate(domain: Domain, to: Destination, *options: str) -> float:
    """For how many milliseconds it ran unsteered; "inf" if it is not steered."""
    path = f"{to.libvirtd.folder}/migration"
    status = to.libvirtd.root / f"run/libvirt/qemu/{domain.name}.xml"
    with Handover("vnet", domain.pid, status) as handover:
        flags = ("--live", "--persistent", "--undefinesource", *options)
        domain.libvirtd.virsh("migrate", *flags, domain.name, to.libvirtd.uri, f"unix://{path}")
        domain.libvirtd = to.libvirtd
        domain.reconnected()
        support.wait_until("the guest runs", lambda: handover.ran_at)
        try:
            return handover.wait_steered()
        except AssertionError:
            return float("inf")


def test_a_guest_migrates_with_its_policy(place: Place, destination: Destination) -> None:
    """To a host without the hook, which takes it all the same; and to one that has it."""
    policy = f"><q:interface key='{KEY.hex(':')}' weight='3,2,1,1'/>"
    with place.domain("qslv-moves", Nic(mac=MACS[0]), policy=policy) as domain:
        domain.boot()
        before = attached(domain)
        assert before
        path = f"{destination.libvirtd.folder}/migration"
        domain.libvirtd.virsh("migrate", "--live", domain.name, destination.libvirtd.uri, f"unix://{path}")
        domain.libvirtd = destination.libvirtd
        domain.reconnected()
        assert domain.run("echo here") == "here"
        assert not seen(domain).program_id and not destination.journal.text(domain.name)
        # The policy is there, for whoever looks at it.
        assert "replaced" not in destination.qsteer("apply", "--vm", domain.name)
        assert attached(domain) == before
        back = Destination(libvirtd=place.libvirtd, journal=place.journal)
        at = len(place.journal.entries(domain.name))
        told = migrate(domain, back)
        print(f"migrated, with the hook: unsteered for {told:.0f} ms")
        assert told < support.patience(2000)
        assert attached(domain) == before
        said = [entry["MESSAGE"] for entry in place.journal.entries(domain.name)[at:]]
        assert "migrates to this host: its policy comes along" in said[0]
        check_flows(domain, place.files, seen(domain).name, before)


def test_a_guest_migrates_with_the_wrapper(place: Place, destination: Destination) -> None:
    """The guest's own table comes with its state: the new QEMU writes it into the new program's maps, and attaches it.

    A host without the wrapper does not take the domain as it is; with another emulator it does, and steers in software.
    """
    with serving(), place.domain("qslv-wraps", Nic(mac=MACS[0], rss=True), emulator=WRAPPER) as domain:
        domain.boot()
        domain.run(f"ethtool -X eth0 hkey {KEY.hex(':')} weight 1 2 3 4")
        asked = domain.rss()
        path = f"unix://{destination.libvirtd.folder}/migration"
        there = destination.libvirtd.root / str(WRAPPER).lstrip("/")
        there.rename(there.with_suffix(".away"))
        done = domain.libvirtd.virsh("migrate", "--live", domain.name, destination.libvirtd.uri, path, check=False)
        assert done.returncode and str(WRAPPER) in done.stderr, done
        assert domain.run("echo here") == "here"
        check_flows(domain, place.files, seen(domain).name, asked)

        plain = domain.libvirtd.file(domain.live_xml().replace(str(WRAPPER), str(QEMU)), "plain.xml")
        domain.libvirtd.virsh("migrate", "--live", "--xml", plain, domain.name, destination.libvirtd.uri, path)
        domain.libvirtd = destination.libvirtd
        domain.reconnected()
        assert domain.rss() == asked
        assert "QEMU steers in software" in destination.qsteer("status", "--vm", domain.name)

        wrapped = domain.libvirtd.file(domain.live_xml().replace(str(QEMU), str(WRAPPER)), "wrapped.xml")
        there.with_suffix(".away").rename(there)
        back = Destination(libvirtd=place.libvirtd, journal=place.journal)
        told = migrate(domain, back, "--xml", wrapped)
        print(f"migrated, with the wrapper: unsteered for {told:.0f} ms")
        assert domain.rss() == asked and attached(domain) == asked
        check_flows(domain, place.files, seen(domain).name, asked)


# What it costs


def test_what_the_hook_adds_to_a_start(place: Place) -> None:
    """Ten starts with and without it, by turns."""
    without: list[float] = []
    with_it: list[float] = []
    script = hookfile.SCRIPT.read_text()
    with place.domain("qslv-time", Nic(mac=MACS[0], tap=TAPS[0])) as domain:
        for _ in range(10):
            for times, text in ((without, "#!/bin/sh\n"), (with_it, script)):
                hookfile.SCRIPT.write_text(text)
                began = time.monotonic()
                place.libvirtd.virsh("start", domain.name)
                times.append((time.monotonic() - began) * 1000)
                domain.reconnected()
                assert bool(seen(domain).program_id) == (times is with_it)
                place.libvirtd.virsh("destroy", domain.name)
    added = statistics.median(with_it) - statistics.median(without)
    least = min(with_it) - min(without)
    for what, times in (("without", without), ("with", with_it)):
        spread = f"{min(times):.0f} to {max(times):.0f}"
        print(f"virsh start {what} the hook: median {statistics.median(times):.0f} ms, {spread}")
    print(f"added: {added:.0f} ms; by the least disturbed starts {least:.0f} ms")
    assert least < support.patience(300)
