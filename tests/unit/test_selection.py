# SPDX-License-Identifier: BSD-2-Clause
"""Every selector alone, together, and where what it names is several things, or none that can be steered."""

import os
from pathlib import Path
from typing import Any

import pytest

from qsteer import namespaces, qemuargs
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, UsageError
from qsteer.model import Domain, Inventory, Nic, Process, Tap, Unsteerable
from qsteer.selection import Selection, select
from tests.unit import taps as made

UUID = "11111111-2222-4333-8444-555555555555"
BLUE, RED = 4026532001, 4026532002


def process(pid: int, name: str | None = None, uuid: str | None = None, uid: int = 64055) -> Process:
    argv = ["qemu-system-x86_64", *(("-name", name) if name else ()), *(("-uuid", uuid) if uuid else ())]
    return Process(pid=pid, started=1, uid=uid, comm="qemu-system-x86", args=qemuargs.parse(argv))


def domain(pid: int, name: str, uuid: str = UUID) -> Domain:
    return Domain(name=name, uuid=uuid, pid=pid, interfaces=(), monitor=None, agent=None)


def nic(id: str | None = "net0", mac: str | None = "52:54:00:00:00:01") -> Nic:
    return Nic(id=id, netdev=f"host{id}", mac=mac, rss=False, vhost=False)


def tap(name: str, holder: Process | None, **changed: Any) -> Tap:
    queues = (made.queue(pid=holder.pid, tap=name),) if holder else ()
    return made.tap(**{"name": name, "holder": holder, "queues": queues, "nic": None, **changed})


WEB = process(100, "web1", UUID)
DB = process(200, "db1")
NOBODY = Process(pid=300, started=1, uid=1000, comm="openvpn", args=None)
MACVTAP = process(400, "mac1")

WEB_NET0 = tap("vnet0", WEB, nic=nic("net0"), netns=BLUE, netns_name="blue")
WEB_NET1 = tap("vnet1", WEB, nic=nic("net1", "52:54:00:00:00:02"), netns=BLUE, netns_name="blue")
DB_NET0 = tap("vnet2", DB, nic=nic("net0", "52:54:00:00:00:03"), netns=RED)
VPN = tap("tap0", NOBODY)
UNHELD = tap("spare", None, active=0, unheld=True)
MAC_NET0 = Unsteerable(vm=MACVTAP, domain=None, nic=nic("macnet", "52:54:00:00:00:04"), backend="macvtap")
MAC_NET1 = Unsteerable(vm=MACVTAP, domain=None, nic=nic("usernet", None), backend="user")
WEB_USER = Unsteerable(vm=WEB, domain=None, nic=nic("slow", None), backend="user")

HOST = Inventory(
    taps=(WEB_NET0, WEB_NET1, DB_NET0, VPN, UNHELD), unsteerable=(MAC_NET0, MAC_NET1, WEB_USER), notes=("a note",)
)


@pytest.fixture(autouse=True)
def resolved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two namespaces with names; the rest is as it is on any host."""
    real = namespaces.resolve
    known = {"blue": BLUE, "red": RED, "/run/netns/blue": BLUE}
    monkeypatch.setattr(namespaces, "resolve", lambda text: known[text] if text in known else real(text))


def refused(kind: type[QsteerError], inventory: Inventory, **selectors: Any) -> QsteerError:
    with pytest.raises(kind) as caught:
        select(inventory, Selection(**selectors))
    return caught.value


@pytest.mark.parametrize(
    ("selectors", "selected"),
    [
        ({"vms": ("web1",)}, (WEB_NET0, WEB_NET1)),
        ({"vms": (UUID.upper(),)}, (WEB_NET0, WEB_NET1)),
        ({"vms": ("web1", "db1")}, (WEB_NET0, WEB_NET1, DB_NET0)),
        ({"pids": (200,)}, (DB_NET0,)),
        ({"pids": (300,)}, (VPN,)),
        ({"taps": ("vnet1",)}, (WEB_NET1,)),
        ({"taps": ("vnet1", "vnet2")}, (WEB_NET1, DB_NET0)),
        ({"nics": ("net1",)}, (WEB_NET1,)),
        ({"nics": ("hostnet1",)}, (WEB_NET1,)),
        ({"vms": ("web1",), "nics": ("net0",)}, (WEB_NET0,)),
        ({"pids": (200,), "nics": ("net0",)}, (DB_NET0,)),
        ({"nics": ("net0",), "taps": ("vnet2",)}, (DB_NET0,)),
        ({"nics": ("net0",), "namespaces": ("red",)}, (DB_NET0,)),
        ({"vms": ("web1", "db1"), "nics": ("net0",)}, (WEB_NET0, DB_NET0)),
        ({"macs": ("52:54:00:00:00:03",)}, (DB_NET0,)),
        ({"macs": ("52-54-00-00-00-02",)}, (WEB_NET1,)),
        ({"macs": ("52:54:00:00:00:01", "52:54:00:00:00:03")}, (WEB_NET0, DB_NET0)),
        ({"namespaces": ("blue",)}, (WEB_NET0, WEB_NET1)),
        ({"namespaces": ("/run/netns/blue",)}, (WEB_NET0, WEB_NET1)),
        ({"namespaces": (str(RED),)}, (DB_NET0,)),
        ({"namespaces": ("blue", "red"), "macs": ("52:54:00:00:00:01", "52:54:00:00:00:03")}, (WEB_NET0, DB_NET0)),
        ({"vms": ("web1",), "namespaces": ("blue",), "macs": ("52:54:00:00:00:02",)}, (WEB_NET1,)),
        ({"every": True}, (WEB_NET0, WEB_NET1, DB_NET0)),
        ({"every": True, "vms": ("db1",)}, (DB_NET0,)),
    ],
)
def test_selected(selectors: dict[str, Any], selected: tuple[Tap, ...]) -> None:
    assert select(HOST, Selection(**selectors)) == selected
    assert Selection(**selectors)


def test_nothing_given() -> None:
    assert not Selection()


@pytest.mark.parametrize(
    ("selectors", "says"),
    [
        ({"vms": ("nosuch",)}, 'no VM "nosuch" that has a tap'),
        ({"vms": ("web",)}, 'no VM "web" that has a tap'),
        ({"vms": ("web1", "nosuch")}, 'no VM "nosuch" that has a tap'),
        ({"vms": ("openvpn",)}, 'no VM "openvpn" that has a tap'),
        ({"pids": (999,)}, "no process 999 that has a tap"),
        ({"pids": (100, 999)}, "no process 999 that has a tap"),
        ({"taps": ("nosuch",)}, 'no tap "nosuch"'),
        ({"taps": ("vnet0", "nosuch")}, 'no tap "nosuch"'),
        ({"nics": ("net9",)}, 'no NIC "net9" that has a tap'),
        ({"nics": ("net1", "net9")}, 'no NIC "net9" that has a tap'),
        ({"macs": ("52:54:00:00:00:99",)}, "no MAC 52:54:00:00:00:99 that has a tap"),
        ({"vms": ("web1",), "taps": ("vnet2",)}, 'nothing is at once VM "web1" and tap "vnet2"'),
        ({"vms": ("web1",), "nics": ("net9",)}, 'nothing is at once VM "web1" and NIC "net9"'),
        ({"vms": ("mac1",), "nics": ("net9",)}, 'nothing is at once VM "mac1" and NIC "net9"'),
        (
            {"namespaces": ("blue", "red"), "nics": ("net1",)},
            'nothing is at once NIC "net1" and network namespace "red"',
        ),
        ({"vms": ("web1", "db1"), "nics": ("net1",)}, 'nothing is at once VM "db1" and NIC "net1"'),
        ({"namespaces": ("12345",)}, 'no tap in network namespace "12345"'),
        ({"namespaces": ("no-such-name",)}, 'no network namespace "no-such-name"'),
        ({"namespaces": ("blue", "/no/such/path")}, 'no network namespace "/no/such/path"'),
    ],
)
def test_nothing_found(selectors: dict[str, Any], says: str) -> None:
    error = refused(NotFoundError, HOST, **selectors)
    assert str(error) == says and error.hint and error.exit_code == 3


def test_no_vm_at_all() -> None:
    assert str(refused(NotFoundError, Inventory(taps=(VPN, UNHELD)), every=True)) == "no VM has a multi-queue tap"


@pytest.mark.parametrize(
    "text", ["", "52:54:00", "52:54:00:00:00:0g", "52:54:00:00:00:01:02", "5254.0000.0001", "\x1b"]
)
def test_a_mac_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="is not a MAC"):
        Selection(macs=(text,))


@pytest.mark.parametrize(
    ("selectors", "says"),
    [
        ({"vms": ("mac1",)}, 'VM "mac1" has macvtap and user only: their packets do not pass a tap'),
        ({"pids": (400,)}, 'VM "mac1" has macvtap and user only: their packets do not pass a tap'),
        ({"vms": ("web1", "mac1")}, 'VM "mac1" has macvtap and user only: their packets do not pass a tap'),
        ({"nics": ("macnet",)}, 'NIC "macnet" of VM "mac1" is macvtap: its packets do not pass a tap'),
        ({"vms": ("web1",), "nics": ("slow",)}, 'NIC "slow" of VM "web1" is user: its packets do not pass a tap'),
        ({"nics": ("net1", "macnet")}, 'NIC "macnet" of VM "mac1" is macvtap: its packets do not pass a tap'),
        ({"macs": ("52:54:00:00:00:04",)}, 'NIC "macnet" of VM "mac1" is macvtap: its packets do not pass a tap'),
    ],
)
def test_what_has_no_tap_is_named(selectors: dict[str, Any], says: str) -> None:
    error = refused(UnsupportedError, HOST, **selectors)
    assert str(error) == says and error.exit_code == 5


def test_one_nic_without_a_tap() -> None:
    host = Inventory(taps=(), unsteerable=(Unsteerable(vm=process(7), domain=None, nic=nic(), backend="macvtap"),))
    assert str(refused(UnsupportedError, host, pids=(7,))) == (
        "process 7 has macvtap only: its packets do not pass a tap"
    )


def test_a_tap_that_nobody_has_open() -> None:
    assert str(refused(UnsupportedError, HOST, taps=("spare",))) == (
        'no process has tap "spare" open: there is nothing to steer'
    )
    refused(UnsupportedError, HOST, taps=("vnet0", "spare"))
    # Not named, only in the same place as others.
    spare = tap("spare", None, active=0, unheld=True, netns=RED)
    assert select(Inventory(taps=(DB_NET0, spare)), Selection(namespaces=("red",))) == (DB_NET0,)
    refused(UnsupportedError, Inventory(taps=(spare,)), namespaces=("red",))


FORGED = process(666, "web1", uid=1000)
FORGED_TAP = tap("evil0", FORGED, nic=nic("net0", "52:54:00:00:00:01"))


def test_a_name_that_two_processes_claim() -> None:
    host = Inventory(taps=(*HOST.taps, FORGED_TAP))
    error = refused(UsageError, host, vms=("web1",))
    assert str(error) == (
        '"web1" is the name of several VMs: pid 100, uid 64055, vnet0 in blue, vnet1 in blue; pid 666, uid 1000, evil0'
    )
    assert error.hint == "choose one with --pid or --netns"
    # Other names that the process could have chosen do not tell which one is meant.
    refused(UsageError, host, vms=("web1",), taps=("evil0",))
    refused(UsageError, host, vms=("web1",), nics=("net0",))
    refused(UsageError, host, vms=("web1",), macs=("52:54:00:00:00:01",))
    assert select(host, Selection(vms=("web1",), pids=(666,))) == (FORGED_TAP,)
    assert select(host, Selection(vms=("web1",), namespaces=("blue",))) == (WEB_NET0, WEB_NET1)
    assert select(host, Selection(vms=(UUID,))) == (WEB_NET0, WEB_NET1)
    assert set(Selection(vms=("web1",)).narrow(host).taps) == {WEB_NET0, WEB_NET1, FORGED_TAP}


def test_libvirt_is_named_as_the_one_who_knows() -> None:
    vouched = tap("vnet0", WEB, domain=domain(100, "web1"))
    error = refused(UsageError, Inventory(taps=(vouched, FORGED_TAP)), vms=("web1",))
    assert "libvirt knows pid 100 by that name" in error.hint


def test_a_forged_name_of_a_domain_without_a_tap() -> None:
    """The only tap of that name is the forger's."""
    real = Unsteerable(vm=WEB, domain=domain(100, "web1"), nic=nic(), backend="macvtap")
    error = refused(UsageError, Inventory(taps=(FORGED_TAP,), unsteerable=(real,)), vms=("web1",))
    assert "pid 100, uid 64055, macvtap; pid 666, uid 1000, evil0" in str(error)
    assert "libvirt knows pid 100" in error.hint


def test_libvirts_word_is_before_the_command_lines() -> None:
    """What a domain's own command line says counts no more."""
    renamed = tap("vnet0", WEB, domain=domain(100, "shop", "99999999-2222-4333-8444-55555555555a"))
    host = Inventory(taps=(renamed,))
    assert select(host, Selection(vms=("shop",))) == (renamed,)
    assert select(host, Selection(vms=("99999999-2222-4333-8444-55555555555A",))) == (renamed,)
    refused(NotFoundError, host, vms=("web1",))
    refused(NotFoundError, host, vms=(UUID,))


def test_a_tap_name_in_two_namespaces() -> None:
    blue, red = tap("tap0", WEB, netns=BLUE, netns_name="blue"), tap("tap0", DB, netns=RED)
    host = Inventory(taps=(blue, red))
    error = refused(UsageError, host, taps=("tap0",))
    assert str(error) == (
        '"tap0" is the name of several taps: pid 100, uid 64055, tap0 in blue; pid 200, uid 64055, tap0'
    )
    assert "--netns" in error.hint
    assert select(host, Selection(taps=("tap0",), namespaces=("blue",))) == (blue,)
    assert select(host, Selection(taps=("tap0",), pids=(200,))) == (red,)
    assert select(host, Selection(taps=("tap0",), namespaces=("blue", "red"))) == (blue, red)


@pytest.mark.parametrize("selectors", [{"nics": ("net0",)}, {"nics": ("net1", "net0")}])
def test_a_nic_of_several_vms(selectors: dict[str, Any]) -> None:
    error = refused(UsageError, HOST, **selectors)
    assert str(error) == 'NIC "net0" is of several VMs: pid 100, uid 64055, vnet0 in blue; pid 200, uid 64055, vnet2'
    assert error.hint == "choose one with --vm or --pid"


def test_a_mac_of_several_vms() -> None:
    error = refused(UsageError, Inventory(taps=(WEB_NET0, FORGED_TAP)), macs=("52:54:00:00:00:01",))
    assert str(error).startswith("MAC 52:54:00:00:00:01 is of several VMs: ")


def test_a_nic_that_another_vm_has_without_a_tap() -> None:
    other = Unsteerable(vm=MACVTAP, domain=None, nic=nic("net1"), backend="macvtap")
    refused(UsageError, Inventory(taps=(WEB_NET1,), unsteerable=(other,)), nics=("net1",))


def test_many_candidates_are_not_all_named() -> None:
    host = Inventory(taps=tuple(tap(f"t{pid}", process(pid, "same")) for pid in range(1, 1001)))
    text = str(refused(UsageError, host, vms=("same",)))
    assert text.endswith("; and 984 more") and len(text) < 1000


def test_to_look_is_to_see_all() -> None:
    found = Selection(vms=("web1", "mac1", "nosuch")).narrow(HOST)
    assert found == Inventory(taps=(WEB_NET0, WEB_NET1), unsteerable=(MAC_NET0, MAC_NET1, WEB_USER), notes=("a note",))
    assert Selection(taps=("spare",)).narrow(HOST).taps == (UNHELD,)
    assert not Selection(namespaces=("blue",)).narrow(HOST).unsteerable
    for nothing in (Selection(vms=("nosuch",)), Selection(namespaces=("no-such-name",))):
        with pytest.raises(NotFoundError):
            nothing.narrow(HOST)


def test_a_namespace_that_went_away_matches_nothing() -> None:
    assert not Selection(namespaces=("no-such-name",)).matches(WEB_NET0)


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    own = os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
    assert namespaces.own() == own
    assert namespaces.resolve("/proc/self/ns/net") == own
    assert namespaces.resolve(str(own)) == own
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a network namespace"):
        namespaces.resolve(str(tmp_path / "file"))
    for text in (
        "",
        ".",
        "..",
        "nosuch",
        "/",
        "/proc/self/ns/net/x",
        "/no/such",
        "9" * 30,
        "٣",
        "-1",
        "a\0b",
        "x" * 5000,
    ):
        with pytest.raises((NotFoundError, UsageError)) as caught:
            namespaces.resolve(text)
        assert len(str(caught.value)) < 300


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name is a file with a namespace mounted on it; one without is left over."""
    monkeypatch.setattr(namespaces, "DIRECTORY", tmp_path)
    (tmp_path / "left-over").write_text("")
    (tmp_path / "zz").symlink_to("/proc/self/ns/net")
    (tmp_path / "aa").symlink_to("/proc/self/ns/net")
    (tmp_path / "broken").symlink_to("/no/such")
    assert namespaces.named() == {namespaces.own(): "aa"}
    monkeypatch.setattr(namespaces, "DIRECTORY", tmp_path / "none")
    assert namespaces.named() == {}
