# SPDX-License-Identifier: BSD-2-Clause
"""Real guests: the demo, and a host on which qsteer's, QEMU's and a foreign program stand side by side."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration.demo import QUEUES, REPORT
from integration.guest import Guest, as_user
from integration.provision import Provisioned
from integration.traffic import follow, verify
from qsteer import kernel
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

ROOT = Path(__file__).resolve().parent.parent
TAPS = ("qsg-own", "qsg-qemu", "qsg-other")


def test_demo(files: Provisioned) -> None:
    """The main job, as ``make demo`` shows it."""
    REPORT.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "integration.demo"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(REPORT.read_text())
    phases = {phase["name"]: phase for phase in report["phases"]}
    for name in ("rss", "equal 3", "rss again", "apply"):
        assert phases[name]["mismatches"] == 0
        assert phases[name]["flows"] >= 4096
        assert all(queue["expected"] == queue["counted"] for queue in phases[name]["queues"])
    assert phases["equal 3"]["queues"][3]["counted"] == 0
    assert phases["automq"]["mismatches"] > phases["automq"]["flows"] / 4
    assert phases["off"]["mismatches"] > phases["off"]["flows"] / 4
    assert report["qemu"]["uid"] != 0
    assert int(report["qemu"]["cap_eff"], 16) == 0


def status(*selectors: str) -> dict[str, Any]:
    done = support.qsteer("status", *selectors, "--json")
    assert done.returncode == 0, done.stderr
    taps: list[dict[str, Any]] = json.loads(done.stdout)["taps"]
    return {tap["tap"]: tap for tap in taps}


def test_whose_program_it_is(files: Provisioned, user: str) -> None:
    """QEMU as root loads its own program; qsteer takes it off only when told, and puts it back."""
    tap_own, tap_qemu, tap_foreign = TAPS
    netdev = f"tap,id=net0,vhost=off,ifname={tap_qemu},queues={QUEUES},script=no,downscript=no"
    device = f"virtio-net-pci,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss=on"
    run = ("run", "--vm", "own", "--tap", f"id=net0,queues={QUEUES},ifname={tap_own}", "--user", user, "--")
    with (
        Guest(files, name="own", user=user, prefix=(sys.executable, "-m", "qsteer", *run)) as own,
        Guest(files, name="rooted", arguments=("-netdev", netdev, "-device", device)) as rooted,
        support.tap(tap_foreign, 2) as foreign,
    ):
        program = support.foreign_program(1)
        kernel.attach(foreign.open.fds[0], program)
        for guest in (own, rooted):
            guest.wait_ready()
            guest.run("ethtool -X eth0 equal 3")

        seen = status()
        assert [seen[tap]["program"]["kind"] for tap in TAPS] == ["qsteer", "qemu", "foreign"]
        assert [seen[tap]["source"] for tap in TAPS] == ["shared-maps", "qemu-maps", None]
        assert [seen[tap]["vm"] for tap in TAPS] == ["own", "rooted", None]
        print(support.qsteer("status").stdout)

        (shown,) = json.loads(support.qsteer("show", "--vm", "own", "--json").stdout)["taps"]
        config = own.rss()
        assert shown["rss"]["key"] == config.key.hex(":")
        assert tuple(shown["rss"]["table"]) == config.table
        assert shown["rss"]["types"] == ["ip4", "tcp4", "udp4", "ip6", "tcp6", "udp6"]

        qemus = seen[tap_qemu]["program"]["id"]
        assert "unchanged" in support.qsteer("apply", "--vm", "rooted").stdout
        for verb in (("apply", "--source", "static"), ("apply", "--equal", "2"), ("off",)):
            done = support.qsteer(*verb, "--vm", "rooted")
            assert done.returncode == 6 and f"program {qemus}" in done.stderr
        done = support.qsteer("apply", "--vm", "rooted", "--table", "2,3", "--replace")
        assert done.returncode == 0 and f"program {qemus}" in done.stdout, done.stderr
        replaced = status("--vm", "rooted")[tap_qemu]["program"]
        assert (replaced["kind"], replaced["displaced"]) == ("qsteer", qemus)
        done = support.qsteer("apply", "--vm", "rooted", "--table", "1,2")
        assert done.returncode == 0, done.stderr

        done = support.qsteer("off", "--vm", "rooted")
        assert done.returncode == 0 and "put back" in done.stdout, done.stderr
        assert status("--vm", "rooted")[tap_qemu]["program"]["id"] == qemus
        verdict = verify(follow(rooted, tap_qemu, files.flowrx, queues=QUEUES), rooted.rss(), queues=QUEUES)
        assert (verdict.mismatches, verdict.lost) == (0, 0)
        os.close(program)


def test_a_reset_of_the_guest(files: Provisioned, user: str) -> None:
    """QEMU takes the program off at reset, and attaches it again when the guest's driver sets RSS up anew."""
    tap = "qsg-reset"
    run = ("run", "--vm", "reset", "--tap", f"id=net0,queues={QUEUES},ifname={tap}", "--user", user, "--")
    with Guest(files, name="reset", user=user, prefix=(sys.executable, "-m", "qsteer", *run)) as guest:
        guest.wait_ready()
        guest.run("ethtool -X eth0 equal 2")
        before = status("--vm", "reset")[tap]["program"]
        guest.reset()
        # The maps hold the table of before; it must not come back by itself.
        assert status("--vm", "reset")[tap]["state"] == "ready, the guest has not asked for RSS"
        assert "ready" in support.qsteer("apply", "--vm", "reset").stdout
        assert status("--vm", "reset")[tap]["program"] is None
        guest.run("ethtool -X eth0 equal 3")
        after = status("--vm", "reset")[tap]
        assert after["program"] == before and after["state"] == "ok"
        verdict = verify(follow(guest, tap, files.flowrx, queues=QUEUES), guest.rss(), queues=QUEUES)
        assert (verdict.mismatches, verdict.lost) == (0, 0)


def test_software_steering_is_named_and_refused(files: Provisioned, user: str) -> None:
    """An unprivileged QEMU with rss=on and no program of anybody's undoes all other steering."""
    tap = kernel.open_tap("qsg-soft", QUEUES)
    netdev = f"tap,id=net0,vhost=off,fds={':'.join(map(str, tap.fds))}"
    device = f"virtio-net-pci,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss=on"
    arguments = ("-netdev", netdev, "-device", device, "-S")
    with Guest(files, name="soft", user=user, prefix=as_user(user), arguments=arguments, pass_fds=tap.fds):
        tap.close()
        support.wait_until("the VM shows", lambda: "soft" in {seen["vm"] for seen in status().values()})
        for options in ((), ("--source", "static"), ("--equal", "2")):
            done = support.qsteer("apply", "--vm", "soft", *options)
            assert done.returncode == 5 and "software" in done.stderr, done.stderr
        assert "QEMU steers in software" in support.qsteer("status", "--vm", "soft").stdout
        forced = support.qsteer("apply", "--vm", "soft", "--equal", "2", "--force")
        assert forced.returncode == 0, forced.stderr
        assert "undone" in support.qsteer("status", "--vm", "soft").stdout


def test_qsteers_program_over_the_maps_of_qemus_own(files: Provisioned) -> None:
    """QEMU as root has loaded a program; ``--replace`` puts qsteer's in its place, by what QEMU goes on writing."""
    tap = "qsg-over"
    netdev = f"tap,id=net0,vhost=off,ifname={tap},queues={QUEUES},script=no,downscript=no"
    device = f"virtio-net-pci,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss=on"
    with Guest(files, name="over", arguments=("-netdev", netdev, "-device", device)) as guest:
        guest.wait_ready()
        guest.run("ethtool -X eth0 equal 3")
        qemus = status("--vm", "over")[tap]["program"]["id"]
        done = support.qsteer("apply", "--vm", "over", "--replace")
        assert done.returncode == 0 and "source qemu-maps" in done.stdout, done.stderr
        seen = status("--vm", "over")[tap]
        assert (seen["program"]["kind"], seen["program"]["displaced"]) == ("qsteer", qemus)
        assert (seen["source"], seen["agrees"], seen["state"]) == ("qemu-maps", "yes", "ok")
        assert "unchanged" in support.qsteer("apply", "--vm", "over").stdout
        verdict = verify(follow(guest, tap, files.flowrx, queues=QUEUES), guest.rss(), queues=QUEUES)
        assert (verdict.mismatches, verdict.host_mismatches, verdict.lost) == (0, 0, 0)

        # QEMU writes the same maps, and attaches its own program again.
        guest.run("ethtool -X eth0 equal 2")
        assert status("--vm", "over")[tap]["program"]["id"] == qemus
        support.qsteer("apply", "--vm", "over", "--replace")
        (shown,) = json.loads(support.qsteer("show", "--vm", "over", "--json").stdout)["taps"]
        assert tuple(shown["rss"]["table"]) == guest.rss().table
        assert "put back" in support.qsteer("off", "--vm", "over").stdout
        assert status("--vm", "over")[tap]["program"]["id"] == qemus
