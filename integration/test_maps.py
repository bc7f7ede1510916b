# SPDX-License-Identifier: BSD-2-Clause
"""shared-maps and qemu-maps: what a guest sets is what qsteer reads back from the kernel's maps, on several QEMUs."""

import json
import sys
from typing import Any

import pytest

from integration.demo import QUEUES
from integration.guest import Guest
from integration.provision import Provisioned
from qsteer.rss import format_hash_types
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

KEY = bytes(range(100, 140)).hex(":")
CHANGES = (
    "ethtool -X eth0 equal 3",
    "ethtool -X eth0 weight 1 2 0 1",
    f"ethtool -X eth0 hkey {KEY}",
    # Linux tells the device of other types at once only while receive-hashing is on.
    "ethtool -K eth0 rxhash on && ethtool -N eth0 rx-flow-hash udp4 sd",
    "ethtool -X eth0 equal 2 && ethtool -N eth0 rx-flow-hash tcp6 sd",
)


def follow_the_guest(guest: Guest, source: str) -> None:
    """Each thing that the guest sets is in the maps, and what steers."""
    for change in CHANGES:
        guest.run(change)
        (shown,) = json.loads(support.qsteer("show", "--vm", guest.name, "--json").stdout)["taps"]
        asked = guest.rss(types=guest.hash_types())
        found: dict[str, Any] = shown["rss"]
        assert (shown["source"], found["enabled"]) == (source, True), change
        assert (found["key"], tuple(found["table"])) == (asked.key.hex(":"), asked.table), change
        if "rx-flow-hash" in change or "rxhash" in change:
            assert found["types"] == list(format_hash_types(asked.types)), change
    checked = support.qsteer("status", "--check", "--vm", guest.name)
    assert checked.returncode == 0 and "yes" in checked.stdout, checked.stdout


def test_qemus_own_maps(with_qemu: Provisioned) -> None:
    """QEMU as root loads its own program; where it cannot, QEMU steers in software, and that is said."""
    netdev = f"tap,id=net0,vhost=off,ifname=qsm-qemu,queues={QUEUES},script=no,downscript=no"
    device = f"virtio-net-pci,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss=on"
    with Guest(with_qemu, name="mapsq", arguments=("-netdev", netdev, "-device", device)) as guest:
        guest.wait_ready()
        if "legacy map definitions" in (guest.folder / "qemu.log").read_text():  # QEMU 7.2 with libbpf 1.0 or later
            assert "QEMU steers in software" in support.qsteer("status", "--vm", "mapsq").stdout
            done = support.qsteer("apply", "--vm", "mapsq", "--source", "qemu-maps")
            assert done.returncode == 5 and "loaded no program of its own" in done.stderr
            return
        follow_the_guest(guest, "qemu-maps")


def test_shared_maps(with_qemu: Provisioned, user: str) -> None:
    """QEMU as an ordinary user, with qsteer's program; before 9.0 it takes none, and that is said."""
    run = ("run", "--vm", "mapss", "--tap", f"id=net0,queues={QUEUES},ifname=qsm-own", "--user", user, "--")
    refused = support.qsteer(*run[:-1], "-n", "--", str(with_qemu.qemu))
    if refused.returncode:
        assert refused.returncode == 5 and "QEMU 7.2" in refused.stderr and "9.0 and later" in refused.stderr
        return
    prefix = (sys.executable, "-m", "qsteer", *run)
    with Guest(with_qemu, name="mapss", user=user, prefix=prefix) as guest:
        guest.wait_ready()
        follow_the_guest(guest, "shared-maps")
