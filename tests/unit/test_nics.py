# SPDX-License-Identifier: BSD-2-Clause
"""Which NIC is behind which tap: plain QEMU, libvirt, NICs that came and went, and those without a tap."""

import random
import time

import pytest

from qsteer import qemuargs
from qsteer.model import Domain, Interface, Nic
from qsteer.nics import VmNics

MAC = "52:54:00:00:00:01"


def of_args(*arguments: str) -> VmNics:
    return VmNics(qemuargs.parse(("qemu-system-x86_64", *arguments)), None, vhost_net=False)


def interface(kind: str = "bridge", *, alias: str | None = "net0", mac: str = MAC, **more: object) -> Interface:
    rest = {"model": "virtio", "target": None, "queues": None, "rss": None, "vhost": None} | more
    return Interface(kind=kind, alias=alias, mac=mac, **rest)  # type: ignore[arg-type]


def of_libvirt(*interfaces: Interface, arguments: tuple[str, ...] = (), vhost_net: bool = False) -> VmNics:
    domain = Domain(name="web1", uuid="u", pid=1, interfaces=interfaces, monitor=None, agent=None)
    return VmNics(qemuargs.parse(("qemu-system-x86_64", *arguments)), domain, vhost_net=vhost_net)


def nic(id: str | None, netdev: str | None, mac: str | None = None, *, rss: bool = False, vhost: bool = False) -> Nic:
    return Nic(id=id, netdev=netdev, mac=mac, rss=rss, vhost=vhost)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-netdev", "tap,id=n,ifname=t0", "-device", "virtio-net-pci,netdev=n,id=d,rss=on"), nic("d", "n", rss=True)),
        (("-netdev", "tap,id=n,fds=7:8:9", "-device", "virtio-net-pci,netdev=n"), nic(None, "n")),
        (("-netdev", "tap,id=n,fd=8,vhost=on", "-device", "virtio-net,netdev=n"), nic(None, "n", vhost=True)),
        (("-netdev", "tap,id=n", "-device", f"virtio-net,netdev=n,mac={MAC.upper()}"), nic(None, "n", MAC)),
        (("-netdev", "bridge,id=n", "-device", "e1000,netdev=n,id=d,rss=on"), nic("d", "n")),
        (("-nic", f"tap,id=n,ifname=t0,model=virtio-net-pci,mac={MAC}"), nic(None, "n", MAC)),
        (
            ("-netdev", "tap,id=n", "-device", "virtio-net,netdev=n", "-global", "virtio-net.rss=on"),
            nic(None, "n", rss=True),
        ),
        (
            (
                *("-netdev", "tap,id=n", "-device", "virtio-net-pci,netdev=n"),
                *(
                    "-global",
                    "virtio-net-pci.rss=on",
                    "-global",
                    "virtio-net.rss=off",
                    "-global",
                    f"virtio-net.mac={MAC}",
                ),
            ),
            nic(None, "n", MAC),
        ),
        # Not the one, not known, or two that could be it.
        (("-netdev", "tap,id=n,ifname=t1", "-device", "virtio-net,netdev=n"), None),
        (("-netdev", "tap,id=n,fds=17:18", "-device", "virtio-net,netdev=n"), None),
        (("-netdev", "tap,id=n,ifname=t0"), None),
        (
            ("-netdev", "tap,id=n", "-netdev", "tap,id=m", "-device", "e1000,netdev=n", "-device", "e1000,netdev=m"),
            None,
        ),
        (("-netdev", "tap,id=n,ifname=t0", "-device", "e1000,netdev=n", "-device", "e1000,netdev=n"), None),
        (
            (
                "-netdev",
                "tap,id=n,fd=8",
                "-netdev",
                "tap,id=m,fd=8",
                "-device",
                "e1000,netdev=n",
                "-device",
                "e1000,netdev=m",
            ),
            None,
        ),
        (("-nic", "none"), None),
        ((), None),
    ],
)
def test_the_nic_of_a_tap(arguments: tuple[str, ...], expected: Nic | None) -> None:
    assert of_args(*arguments).of_tap("t0", {8, 9}, only_one=True) == expected


def test_a_nic_that_is_not_described_needs_the_only_tap() -> None:
    """The other tap may be that of a NIC which was plugged in later."""
    nics = of_args("-netdev", "tap,id=n", "-device", "virtio-net,netdev=n")
    assert nics.of_tap("t0", {8}, only_one=False) is None


@pytest.mark.parametrize("mac", ["on", "52:54:00", "x" * 17, "\x1b[2J", "52:54:00:00:00:01\n"])
def test_a_mac_that_is_none(mac: str) -> None:
    found = of_args("-netdev", "tap,id=n", "-device", f"virtio-net,netdev=n,mac={mac}").of_tap("t", (), only_one=True)
    assert found and found.mac is None


@pytest.mark.parametrize(
    ("netdev", "backend"),
    [
        ("user", "user"),
        ("vhost-user,chardev=c", "vhost-user"),
        ("vhost-vdpa,vhostdev=/dev/vhost-vdpa-0", "vhost-vdpa"),
        ("stream,server=off,addr.type=unix,addr.path=/run/libvirt/qemu/passt/1-web1-net0.socket", "passt"),
        ("stream,addr.type=unix,addr.path=/tmp/passt_1.socket", "passt"),
        ("stream,addr.type=inet,addr.host=h,addr.port=1", "stream"),
        ("dgram,remote.type=inet", "dgram"),
        ("passt", "passt"),
        ("socket,listen=:1", "socket"),
        ("l2tpv3,src=a", "l2tpv3"),
        ("vde,sock=/s", "vde"),
        ("af-xdp,ifname=eth0", "af-xdp"),
        ("hubport,hubid=0", "hubport"),
        ("netmap,ifname=vale0:1", "netmap"),
        ("x" * 1000, "x" * 32),
    ],
)
def test_without_a_tap(netdev: str, backend: str) -> None:
    nics = of_args("-netdev", f"{netdev},id=n", "-device", "virtio-net-pci,netdev=n,id=d")
    assert list(nics.without_tap(())) == [(nic("d", "n"), backend)]
    assert nics.of_tap("t0", {8}, only_one=True) is None


def test_passt_in_json() -> None:
    text = '{"type":"stream","addr":{"type":"unix","path":"/run/passt.sock"},"server":false,"id":"n"}'
    nics = of_args("-netdev", text, "-device", "virtio-net-pci,netdev=n")
    assert [backend for _, backend in nics.without_tap(())] == ["passt"]


def test_a_macvtap_is_told_by_its_file() -> None:
    nics = of_args("-netdev", "tap,id=n,fds=7:8", "-device", "virtio-net-pci,netdev=n,id=d")
    assert list(nics.without_tap({8, 30})) == [(nic("d", "n"), "macvtap")]
    assert list(nics.without_tap({30})) == []


def test_a_nic_and_a_network_of_old() -> None:
    assert [backend for _, backend in of_args("-net", "nic", "-net", "user").without_tap(())] == ["user"]
    assert [backend for _, backend in of_args("-nic", "user,model=virtio").without_tap(())] == ["user"]
    assert list(of_args("-nic", "none", "-net", "none", "-netdev", "user,id=unused").without_tap(())) == []


START = (
    *("-netdev", '{"type":"tap","fds":"30:31","vhost":true,"id":"hostnet0"}'),
    *("-device", f'{{"driver":"virtio-net-pci","rss":true,"netdev":"hostnet0","id":"net0","mac":"{MAC}"}}'),
)


def test_libvirt_at_the_start() -> None:
    nics = of_libvirt(interface(target="vnet0", rss=True), arguments=START)
    expected = nic("net0", "hostnet0", MAC, rss=True, vhost=True)
    assert nics.of_tap("vnet0", {30, 31}, only_one=True) == expected
    assert nics.of_tap("renamed", {30, 31}, only_one=True) == expected
    assert nics.of_tap("vnet9", {40}, only_one=False) is None
    assert list(nics.without_tap(())) == []


def test_what_the_command_line_makes_of_a_nic_counts() -> None:
    nics = of_libvirt(interface(target="vnet0", rss=True), arguments=(*START[:3], START[3].replace("true", "false")))
    found = nics.of_tap("vnet0", {30}, only_one=True)
    assert found and not found.rss


@pytest.mark.parametrize(
    ("given", "vhost_net", "vhost"),
    [(None, True, True), (None, False, False), (False, True, False), (True, False, True)],
)
def test_libvirt_plugged_it_in(given: bool | None, vhost_net: bool, vhost: bool) -> None:
    later = interface(alias="net4", mac="52:54:00:00:00:04", target="vnet4", rss=True, vhost=given)
    nics = of_libvirt(later, arguments=START, vhost_net=vhost_net)
    expected = nic("net4", "hostnet4", "52:54:00:00:00:04", rss=True, vhost=vhost)
    assert nics.of_tap("vnet4", {11}, only_one=True) == expected


def test_vhost_is_for_virtio() -> None:
    nics = of_libvirt(interface(model="e1000", target="vnet4"), vhost_net=True)
    found = nics.of_tap("vnet4", {11}, only_one=True)
    assert found and not found.vhost


def test_libvirt_unplugged_it() -> None:
    """The command line still has it."""
    nics = of_libvirt(arguments=START)
    assert nics.of_tap("vnet0", {30}, only_one=True) is None
    user = (START[0], '{"type":"user","id":"hostnet0"}', *START[2:])
    assert list(of_libvirt(arguments=user).without_tap(())) == []


def test_libvirt_plugged_in_another_by_the_same_alias() -> None:
    nics = of_libvirt(interface(mac="52:54:00:00:00:09", target="vnet7"), arguments=START)
    assert nics.of_tap("vnet7", {12}, only_one=True) == nic("net0", "hostnet0", "52:54:00:00:00:09")


def test_the_same_again_with_other_fds() -> None:
    nics = of_libvirt(interface(target="vnet7", rss=True), arguments=START)
    found = nics.of_tap("vnet7", {12}, only_one=True)
    assert found and (found.id, found.mac) == ("net0", MAC)


def test_what_the_user_gave_qemu_behind_libvirts_back() -> None:
    own = ("-netdev", "user,id=mine", "-device", "virtio-net-pci,netdev=mine,id=own")
    nics = of_libvirt(interface(target="vnet0"), arguments=(*START, *own))
    assert list(nics.without_tap(())) == [(nic("own", "mine"), "user")]


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("direct", "macvtap"),
        ("vhostuser", "vhost-user"),
        ("vdpa", "vhost-vdpa"),
        ("user", "user"),
        ("passt", "passt"),
        ("hostdev", "hostdev"),
        ("udp", "socket"),
        ("internal", "internal"),
        ("", "unknown"),
        ("brandnew" * 10, ("brandnew" * 10)[:32]),
    ],
)
def test_libvirt_without_a_tap(kind: str, backend: str) -> None:
    nics = of_libvirt(interface(kind, target="x0"))
    assert list(nics.without_tap(())) == [(nic("net0", "hostnet0", MAC), backend)]
    assert nics.of_tap("x0", {7}, only_one=True) is None


@pytest.mark.parametrize("kind", ["bridge", "network", "ethernet"])
def test_libvirt_with_a_tap(kind: str) -> None:
    nics = of_libvirt(interface(kind, target="t0"))
    assert nics.of_tap("t0", {7}, only_one=True) == nic("net0", "hostnet0", MAC)
    assert list(nics.without_tap(())) == []


def test_libvirts_ethernet_over_a_macvtap_of_the_users() -> None:
    nics = of_libvirt(interface("ethernet", target="macvtap0"), arguments=START)
    assert [backend for _, backend in nics.without_tap({30})] == ["macvtap"]


def test_noise_never_raises_and_costs_little() -> None:
    generator = random.Random(11)
    words = ["-netdev", "-device", "-nic", "-net", "tap,id=n,fds=1:2:x:-3", "user,id=n", "virtio-net,netdev=n,mac=on"]
    words += [
        '{"type":"tap","id":"n","fds":"9999999999:1"}',
        '{"driver":"e1000","netdev":"n","mac":7}',
        "hubport",
        "nic",
    ]
    for _ in range(2000):
        nics = of_args(*generator.choices(words, k=generator.randrange(30)))
        nics.of_tap("t0", {1, 2}, only_one=generator.random() < 0.5)
        assert all(len(backend) <= 32 for _, backend in nics.without_tap({1}))


def test_thousands_of_nics_and_defaults_cost_little() -> None:
    arguments: list[str] = []
    for number in range(3000):
        arguments += ("-netdev", f"tap,id=n{number},fd=3", "-device", f"virtio-net{number},netdev=n{number}")
        arguments += ("-global", f"virtio-net.p{number}=x", "-global", "virtio-net.rss=on")
    started = time.monotonic()
    nics = of_args(*arguments)
    assert nics.of_tap("t0", range(100), only_one=True) is None
    assert time.monotonic() - started < 5
