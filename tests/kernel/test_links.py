# SPDX-License-Identifier: BSD-2-Clause
"""What ``run`` does to a tap's link, and what it is told when it cannot."""

import os

import pytest

from qsteer import links
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, UsageError
from tests.kernel import support

pytestmark = pytest.mark.root


def link_of(name: str) -> links.Link:
    found = links.find(name)
    assert found
    return found


def test_find(tap: support.TapUnderTest) -> None:
    found = link_of("qs-tap")
    assert (found.name, found.kind, found.mtu, found.bridge_index) == ("qs-tap", "tun", 1500, None)
    assert link_of("lo").kind == ""
    for name in ("qs-nosuch", "a-name-longer-than-any", ""):
        assert links.find(name) is None


def test_bridge(namespace: str) -> None:
    support.add_bridge("qs-br")
    assert links.bridge("qs-br") == link_of("qs-br")
    with pytest.raises(NotFoundError, match='unknown bridge "qs-nosuch"'):
        links.bridge("qs-nosuch")
    with pytest.raises(UsageError, match='"lo" is not a bridge'):
        links.bridge("lo")


def test_configure(tap: support.TapUnderTest) -> None:
    support.add_bridge("qs-br")
    mac = links.bridge_port_mac("52:54:00:12:34:56")
    links.configure("qs-tap", mac=mac, mtu=1400, bridge_index=links.bridge("qs-br").index)
    found = link_of("qs-tap")
    assert (found.mac, found.mtu, found.up) == ("fe:54:00:12:34:56", 1400, True)
    assert found.bridge_index == link_of("qs-br").index
    links.configure("qs-tap")
    assert link_of("qs-tap") == found


def test_a_bridge_with_another_port_keeps_its_mac(tap: support.TapUnderTest) -> None:
    support.add_bridge("qs-br")
    support.add_veth("qs-veth", "qs-peer")
    index = links.bridge("qs-br").index
    links.configure("qs-veth", mac="52:54:00:00:00:01", bridge_index=index)
    links.configure("qs-tap", mac=links.bridge_port_mac("00:00:00:00:00:02"), bridge_index=index)
    assert link_of("qs-br").mac == "52:54:00:00:00:01"


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"mtu": 60}, QsteerError, "cannot set the MTU of qs-tap to 60: Invalid argument"),
        ({"mtu": 65522}, QsteerError, "cannot set the MTU of qs-tap to 65522: Invalid argument"),
        ({"mac": "53:54:00:00:00:01"}, QsteerError, "cannot set the MAC of qs-tap to 53:54:00:00:00:01: Cannot assign"),
        ({"bridge_index": 1}, UnsupportedError, "cannot add qs-tap to its bridge: Operation not supported"),
        ({"bridge_index": 9999}, QsteerError, "cannot add qs-tap to its bridge: "),
    ],
)
def test_what_the_kernel_refuses(
    tap: support.TapUnderTest, settings: dict[str, object], error: type[QsteerError], says: str
) -> None:
    with pytest.raises(error) as caught:
        links.configure("qs-tap", **settings)  # type: ignore[arg-type]
    assert says in str(caught.value)


def test_the_largest_mtu_is_the_taps(tap: support.TapUnderTest) -> None:
    from qsteer.runplan import MTU_MAX, MTU_MIN

    for mtu in (MTU_MIN, MTU_MAX):
        links.configure("qs-tap", mtu=mtu)
        assert link_of("qs-tap").mtu == mtu


def test_a_device_that_is_not_there(namespace: str) -> None:
    with pytest.raises(NotFoundError, match="cannot find qs-tap"):
        links.configure("qs-tap")


def test_no_socket_stays_open(tap: support.TapUnderTest) -> None:
    links.find("lo")
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    links.find("lo")
    links.configure("qs-tap", mtu=1400)
    with pytest.raises(QsteerError):
        links.configure("qs-tap", mtu=1)
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208
