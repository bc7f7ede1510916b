# SPDX-License-Identifier: BSD-2-Clause
"""The part of links that needs no root; the rest is in tests/kernel."""

import pytest

from qsteer import links
from qsteer.errors import NotFoundError, UsageError


def test_bridge_port_mac() -> None:
    assert links.bridge_port_mac("52:54:00:12:34:56") == "fe:54:00:12:34:56"


def test_find() -> None:
    loopback = links.find("lo")
    assert loopback
    assert (loopback.name, loopback.index, loopback.kind) == ("lo", 1, "")
    assert links.find("qs-nosuch") is None


def test_bridge() -> None:
    with pytest.raises(NotFoundError, match='unknown bridge "qs-nosuch"') as caught:
        links.bridge("qs-nosuch")
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match='"lo" is not a bridge'):
        links.bridge("lo")
