# SPDX-License-Identifier: BSD-2-Clause
"""keep and monitor as processes, on real taps that stand-ins for VMs hold."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer import kernel, programs
from qsteer.model import Build
from tests.kernel import hardened, private, standin, support
from tests.kernel.daemons import config_of, daemon, program_of, take_off

pytestmark = pytest.mark.root

WITHIN_S = support.patience(1.5)
"""How soon keep has put back what was taken off: it sees it after 0.8 s at the latest, on whatever machine."""


@pytest.fixture(autouse=True)
def own_host(need_root: None) -> Iterator[None]:
    """Holds, the lock and pins of this test's own, and a network namespace."""
    with private.memory(), support.network_namespace():
        yield


def put_back_after(vm: standin.Vm) -> float:
    """Seconds without a program after it was taken off."""
    take_off(vm)
    began = time.monotonic()
    while not program_of(vm):
        assert time.monotonic() < began + support.patience(20)
        time.sleep(0.002)
    return time.monotonic() - began


def test_a_program_that_was_removed_is_put_back() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        assert keep.wait_for("steered")["detail"] == "steered, source static"
        before, config = program_of(vm), config_of(vm)
        vm.check_packets(config)
        assert put_back_after(vm) < WITHIN_S
        event = keep.wait_for("put-back")
        assert (event["vm"], event["pid"], event["tap"]) == ("qske0", vm.pid, "qske0")
        assert event["old"] == {"program": before, "kind": "qsteer"}
        assert event["new"] == {"program": program_of(vm), "kind": "qsteer"} and program_of(vm) != before
        assert config_of(vm) == config
        vm.check_packets(config)
        (line,) = [line for line in support.lines(keep.said()) if "put back" in line]
        number = event["new"]["program"]
        assert line == f"keep: qske0 (pid {vm.pid}) qske0: program {before} -> {number}: put back, QEMU took it off"


def test_off_is_obeyed_and_apply_is_the_new_thing_to_keep() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        assert support.qsteer("off", "--vm", "qske0").returncode == 0
        keep.wait_for("held")
        took_off = program_of(vm)
        assert support.qsteer("apply", "--vm", "qske0", "--table", "3,1").returncode == 0
        keep.wait_for("hold-lifted")
        applied = config_of(vm)
        assert put_back_after(vm) < WITHIN_S
        keep.wait_for("put-back")
        assert (took_off, config_of(vm)) == (0, applied) and applied.table == (3, 1)
        vm.check_packets(applied)


def test_a_foreign_program_is_left_alone_and_told_once() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        config = config_of(vm)
        foreign = support.foreign_program(1)
        kernel.attach(vm.tap.open.fds[0], foreign)
        number = programs.program_info_of(foreign).id
        event = keep.wait_for("left-alone")
        assert f"program {number}" in event["detail"] and "--replace" in event["detail"]
        take_off(vm)
        os.close(foreign)
        keep.wait_for("put-back")
        assert config_of(vm) == config
        assert keep.said().count("left alone") == 1


def test_a_foreign_program_is_displaced_where_that_is_wanted() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0", options=("--replace",)) as keep:
        config = config_of(vm)
        foreign = support.foreign_program(1)
        kernel.attach(vm.tap.open.fds[0], foreign)
        assert "lb_steer" in keep.wait_for("put-back")["detail"]
        os.close(foreign)
        assert config_of(vm) == config


def test_vms_come_and_go_in_any_network_namespace() -> None:
    with daemon("keep", "qske0", "qske1") as keep:
        assert "waiting for --vm qske0, --vm qske1" in keep.said()
        for name in ("qske0", "qske1"):
            with support.network_namespace(), standin.vm(name) as vm:
                began = time.monotonic()
                keep.wait_for("steered")
                assert time.monotonic() - began < WITHIN_S + support.patience(1.0)
                assert put_back_after(vm) < WITHIN_S
                vm.check_packets(config_of(vm))
            assert keep.wait_for("vm-gone")["vm"] == name
        assert keep.process.poll() is None


def test_others_are_left_alone() -> None:
    with standin.vm("qske0") as vm, standin.vm("qske1") as other, daemon("keep", "qske0"):
        assert program_of(vm) and not program_of(other)


def test_a_fight_is_stopped() -> None:
    """Something takes the program off as often as keep puts it back: that costs nobody else anything."""
    with standin.vm("qske0") as vm, standin.vm("qske1") as other, daemon("keep", "qske0", "qske1") as keep:
        for _ in range(5):
            put_back_after(vm)
        take_off(vm)
        event = keep.wait_for("fight")
        assert (event["tap"], event["new"]) == ("qske0", None)
        assert put_back_after(other) < WITHIN_S
        assert program_of(vm) == 0
        assert support.qsteer("apply", "--vm", "qske0").returncode == 0
        keep.wait_for("attached")
        assert put_back_after(vm) < WITHIN_S


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_steering_outlives_it(number: signal.Signals) -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        before, config = program_of(vm), config_of(vm)
        assert keep.stop(number) == (-number if number is signal.SIGKILL else 0)
        assert program_of(vm) == before
        vm.check_packets(config)


def test_sighup() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        foreign = support.foreign_program(1)
        kernel.attach(vm.tap.open.fds[0], foreign)
        keep.wait_for("left-alone")
        keep.process.send_signal(signal.SIGHUP)
        keep.wait_told("RELOADING=1")
        keep.wait_for("left-alone")
        keep.wait_told("READY=1")
        os.close(foreign)


def test_monitor_tells_the_same_and_changes_nothing() -> None:
    with standin.vm("qske0") as vm, daemon("monitor", "qske0") as monitor:
        assert support.qsteer("apply", "--vm", "qske0").returncode == 0
        number = program_of(vm)
        event = monitor.wait_for("attached")
        assert (event["schema"], event["new"]["program"]) == ("qsteer.monitor/1", number)
        take_off(vm)
        assert monitor.wait_for("detached")["old"] == {"program": number, "kind": "qsteer"}
        assert support.qsteer("off", "--vm", "qske0").returncode == 0
        monitor.wait_for("held")
        assert program_of(vm) == 0
        assert monitor.stop() == 0 and monitor.said() == ""


@pytest.mark.shared_body
def test_a_shared_body_that_is_lost_is_mended() -> None:
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as keep:
        config = config_of(vm)
        for pin in private.PINS.rglob("bodies-*"):
            pin.unlink()
        assert keep.wait_for("mended")["new"]["program"] == program_of(vm)
        assert config_of(vm) == config
        vm.check_packets(config)


def test_two_that_keep_the_same_tap() -> None:
    """Whoever is first puts it back, and the other has nothing to do."""
    with standin.vm("qske0") as vm, daemon("keep", "qske0") as one, daemon("keep", "qske0") as other:
        config = config_of(vm)
        for _ in range(4):
            assert put_back_after(vm) < WITHIN_S
            assert config_of(vm) == config
        assert one.process.poll() is None and other.process.poll() is None
        assert "left alone" not in one.said() + other.said()


def test_the_unit_file(tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("no systemd-analyze")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qsteer").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "qsteer").chmod(0o755)
    service = tmp_path / "qsteer-keep.service"
    service.write_text(hardened.UNIT.read_text().replace("@PREFIX@", str(tmp_path)))
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(service)], capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
    security = ["systemd-analyze", "security", "--offline=true", "--threshold=40", "--no-pager", str(service)]
    assert subprocess.run(security, capture_output=True, check=False).returncode == 0
    assert "@" not in hardened.unit("ExecStart")[0].replace("@PREFIX@", "")


def test_it_works_as_the_unit_file_leaves_it() -> None:
    prefix = hardened.prefix()
    with standin.vm("qske0") as vm, hardened.read_only(), daemon("keep", "qske0", "qske1", prefix=prefix) as keep:
        status = Path(f"/proc/{keep.process.pid}/status").read_text()
        assert re.search(r"^Seccomp:\t2$", status, re.MULTILINE) and "NoNewPrivs:\t1" in status
        config = config_of(vm)
        assert put_back_after(vm) < WITHIN_S
        keep.wait_for("put-back")
        vm.check_packets(config)
        with support.network_namespace(), standin.vm("qske1") as other:
            keep.wait_for("steered")
            assert put_back_after(other) < WITHIN_S
        # Neither seccomp nor a capability made it do with less than what it does as root.
        assert all(line.startswith("keep: ") for line in support.lines(keep.said()))
        if Build.SHARED_BODY in support.BUILDS:
            assert private.pins()
        assert keep.stop() == 0


def test_that_the_prefix_takes_something_away() -> None:
    done = subprocess.run(
        [*hardened.prefix(), sys.executable, "-c", "import os; os.setuid(0)"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "PermissionError" in done.stderr
