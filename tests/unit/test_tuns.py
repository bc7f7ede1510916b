# SPDX-License-Identifier: BSD-2-Clause
"""Reading sysfs; what the kernel really says is in tests/kernel/test_inventory.py."""

import socket
from pathlib import Path

import pytest

from qsteer import tuns
from qsteer.tuns import Tun


@pytest.fixture(autouse=True)
def devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shown = tmp_path / "net"
    shown.mkdir()
    for name, index in (("lo", 1), ("vnet0", 7)):
        device = tmp_path / name
        device.mkdir()
        (device / "ifindex").write_text(f"{index}\n")
        (shown / name).symlink_to(device)
    (shown / "vnet0/tun_flags").write_text("0x5902\n")
    for queue in ("rx-0", "rx-1", "tx-0"):
        (shown / "vnet0/queues" / queue).mkdir(parents=True)
    (shown / "bonding_masters").write_text("")
    monkeypatch.setattr(tuns, "_DEVICES", shown)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (7, "vnet0")])
    return shown


def test_a_tap() -> None:
    assert tuns.in_sysfs() == (Tun(name="vnet0", ifindex=7, is_tap=True, persistent=True, multi_queue=True, active=2),)


@pytest.mark.parametrize("own", [[(1, "lo")], [(1, "lo"), (8, "vnet0")], [(1, "lo"), (7, "vnet0"), (8, "eth0")]])
def test_another_namespaces_devices(own: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: own)
    assert tuns.in_sysfs() is None


@pytest.mark.parametrize("flags", ["", "nonsense"])
def test_flags_that_are_none(flags: str, devices: Path) -> None:
    (devices / "vnet0/tun_flags").write_text(flags)
    assert tuns.in_sysfs() == ()
