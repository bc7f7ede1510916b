# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-bridge-helper in the place of QEMU's own: the same answers, the same taps, a guest that has its network."""

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from pyroute2 import IPRoute

from integration import bridge_fuzz, bridge_helper, traffic
from integration.bridge_helper import Stock
from integration.guest import Guest, as_user
from integration.provision import Provisioned
from tests.kernel import bridge_acls, bridges, support

pytestmark = pytest.mark.root

NAME = bridge_fuzz.NAME
FLOWS = 256
TIMEOUT_S = 60.0


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A place of this module's own, with bridges and an /etc/qemu."""
    if os.geteuid() != 0:
        pytest.skip("not root (make test takes care of it)")
    with bridge_helper.place() as place:
        yield place


@pytest.fixture(scope="module")
def stock(folder: Path) -> Stock:
    return bridge_helper.stock(folder)


@pytest.fixture(scope="module")
def ours(folder: Path) -> Path:
    return bridges.copy(bridges.HELPER, folder / "ours")


@pytest.fixture(scope="module")
def capable(folder: Path) -> Path:
    """As an administrator sets it up."""
    (folder / "capable").mkdir(mode=0o755)
    return bridges.copy_with_capability(bridges.HELPER, folder / "capable")


def test_the_same_answers(ours: Path, stock: Stock) -> None:
    """Every difference is one that the table of lists names and explains, and is still there."""
    rows = tuple(bridge_helper.compare(bridge_acls.CASES, ours, stock))
    assert len(bridge_acls.CASES) >= 60
    assert [row for row in rows if not row.as_expected] == []
    assert {row.qemus for row in rows if row.qemus == row.qsteers} == {"yes", "no"}
    # Where they differ, it is ours that refuses.
    assert {row.qsteers for row in rows if row.qemus != row.qsteers} == {"no"}


def test_the_same_answers_to_random_lists(ours: Path, stock: Stock) -> None:
    rows = tuple(bridge_helper.compare(bridge_fuzz.random_lists(60, seed=7), ours, stock))
    assert {row.qsteers for row in rows} == {"yes", "no"}
    assert [row for row in rows if row.qsteers != row.qemus] == []


@pytest.mark.parametrize("options", [(), ("--use-vnet",)])
def test_the_same_tap(ours: Path, stock: Stock, options: Sequence[str]) -> None:
    """But for its name and the random part of its address."""
    bridge_acls.text("allow br0", "allow br0\n").make()
    taps = [
        bridges.run(helper, "br0", *options, prefix=bridges.with_net_admin(), environment=environment).tap
        for helper, environment in ((ours, None), (stock.path, stock.environment))
    ]
    alike = [tap and replace(tap, name=tap.name.rstrip("0123456789"), mac=tap.mac[:2]) for tap in taps]
    assert alike[0] and alike[0] == alike[1]


def test_the_parsers_stand_hostile_input() -> None:
    told = bridge_fuzz.parsers(20_000, seed=3)
    assert told.startswith("10000 command lines, ")


def test_the_program_stands_hostile_callers(folder: Path) -> None:
    for program in (bridge_fuzz.sanitized_helper(), bridges.HELPER):
        tally = bridge_fuzz.hostile(bridges.copy(program, folder / program.name), 100, seed=3)
        assert tally.taps > 5
        assert tally.statuses[1] > 20


# With a real QEMU


def idle(files: Provisioned, user: str, netdev: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A QEMU whose netdev is refused: it ends by itself."""
    quiet = ("-M", "none", "-nodefaults", "-display", "none")
    return subprocess.run(
        [*as_user(user), str(files.qemu), *quiet, *options, "-netdev", netdev],
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )


@pytest.mark.parametrize(
    ("netdev", "said"),
    [
        (
            "bridge,id=n,br=br1,helper={capable}",
            [
                f"{NAME}: /etc/qemu/bridge.conf does not allow bridge br1",
                "hint: the administrator allows it there with a line: allow br1",
            ],
        ),
        (
            "tap,id=n,br=br0,helper={ours}",
            [
                f"{NAME}: a tap on a bridge takes CAP_NET_ADMIN, which is missing",
                "hint: as root, once: setcap cap_net_admin+ep {ours}",
            ],
        ),
        (
            "tap,id=n,br=br0,helper={capable} --queues=4",
            [
                f"{NAME}: --queues=4: QEMU gives a netdev with helper= one queue, always",
                "hint: for more: qsteer run, qsteer plug, or -netdev tap,queues=N,script=qsteer-ifup",
            ],
        ),
    ],
)
def test_what_qemu_shows_of_a_refusal(
    files: Provisioned, user: str, ours: Path, capable: Path, netdev: str, said: Sequence[str]
) -> None:
    bridge_acls.text("allow br0", "allow br0\n").make()
    done = idle(files, user, netdev.format(ours=ours, capable=capable))
    assert done.returncode == 1
    assert done.stderr.splitlines()[: len(said)] == [line.format(ours=ours) for line in said]
    assert "bridge helper failed" in done.stderr
    assert bridges.taps() == set()


@pytest.mark.parametrize("sandbox", ["on", "on,elevateprivileges=deny"])
def test_in_qemus_sandbox(files: Provisioned, user: str, capable: Path, sandbox: str) -> None:
    """It takes away what a file capability gives, from QEMU's own helper, too; ours says so."""
    bridge_acls.text("allow br0", "allow br0\n").make()
    done = idle(files, user, f"bridge,id=n,br=br0,helper={capable}", "-sandbox", sandbox)
    assert done.returncode == 1
    first, hint, *_ = done.stderr.splitlines()
    assert first == f"{NAME}: a tap on a bridge takes CAP_NET_ADMIN, which is missing"
    assert "no_new_privs" in hint and "-sandbox on" in hint


@contextlib.contextmanager
def address(device: str, text: str) -> Iterator[None]:
    with IPRoute() as route:
        index = route.link_lookup(ifname=device)[0]
        route.addr("add", index=index, address=text, prefixlen=24)
        yield
        route.addr("delete", index=index, address=text, prefixlen=24)


@pytest.mark.guest
def test_a_guest_on_two_bridges(files: Provisioned, user: str, capable: Path) -> None:
    """A QEMU without any privilege, both kinds of netdev, packets to the guest and back over each bridge."""
    bridge_acls.text("two", "allow br0\nallow br1\n").make()
    arguments = (
        *("-netdev", f"bridge,id=n0,br=br0,helper={capable}", "-device", "virtio-net-pci,netdev=n0"),
        *("-netdev", f"tap,id=n1,br=br1,helper={capable} --queues=1", "-device", "virtio-net-pci,netdev=n1"),
    )
    with (
        Guest(files, name="bridged", arguments=arguments, prefix=as_user(user), user=user) as guest,
        address("br0", "198.51.100.1"),
        address("br1", "203.0.113.1"),
    ):
        guest.wait_ready()
        uid, capabilities = guest.credentials()
        assert uid != 0 and int(capabilities, 16) == 0
        assert len(bridges.taps()) == 2
        for number, net in enumerate(("198.51.100", "203.0.113")):
            device = f"eth{number}"
            (tap,) = ports(f"br{number}")
            seen = traffic.follow(guest, tap, files.flowrx, queues=1, flows=FLOWS, device=device)
            assert seen.guest == (0,) * FLOWS
            guest.run(f"busybox ip addr add {net}.2/24 dev {device} && busybox ping -c 3 -W 5 {net}.1")
    support.wait_until("the taps are gone", lambda: bridges.taps() == set())


def ports(bridge: str) -> tuple[str, ...]:
    """The taps on a bridge."""
    with IPRoute() as route:
        index = route.link_lookup(ifname=bridge)[0]
        return tuple(link.get("ifname") for link in route.get_links() if link.get("master") == index)
