# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-ifup and qsteer-ifdown as a real QEMU runs them: what stays attached, what keep takes over, what fails."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from integration.guest import Guest
from integration.keeping import keep
from integration.provision import Provisioned
from integration.traffic import follow, verify
from qsteer import inventory, kernel, qmp
from qsteer.ifupplan import DRIVER_TAKES_OFF_BEFORE, VHOST_TAKES_OFF
from qsteer.model import Source, Tap
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
FLOWS = 1024
TAPS = ("qsif0", "qsif1")
BRIDGE = "qsifbr0"
WAIT_S = 30.0
IDLE = ("-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-display", "none", "-S")


def only(rights: str) -> tuple[str, ...]:
    """A command prefix that leaves root these capabilities, and a program that it runs, too."""
    return ("setpriv", "--securebits=+noroot", f"--inh-caps=-all,{rights}", f"--ambient-caps=-all,{rights}")


@pytest.fixture(autouse=True)
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSTEER_CONFIG", str(tmp_path))


@pytest.fixture
def scripts(tmp_path: Path) -> dict[str, str]:
    """Scripts of a user's own, by what they give qsteer-ifup."""
    made = {}
    for number, options in enumerate(("", "-v", f"--bridge {BRIDGE}", f"--bridge {BRIDGE} --required")):
        for what in ("up", "down"):
            path = tmp_path / f"if{what}-{number}"
            code = f"import sys; from qsteer.ifup import main_{what}; sys.exit(main_{what}())"
            kept = options.replace("--required", "") if what == "down" else options
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" {kept} "$1"\n')
            path.chmod(0o755)
            made[f"{what} {options}".strip()] = str(path)
    return made


def nic(scripts: dict[str, str], options: str = "", *, tap: str = TAPS[0], rss: str = "off") -> tuple[str, ...]:
    up, down = scripts[f"up {options}".strip()], scripts[f"down {options}".strip()]
    return (
        *("-netdev", f"tap,id={tap}-net,ifname={tap},queues={QUEUES},vhost=off,script={up},downscript={down}"),
        *("-device", f"virtio-net-pci,netdev={tap}-net,mq=on,vectors={2 * QUEUES + 2},rss={rss}"),
    )


def seen(tap: str = TAPS[0]) -> Tap:
    return next(one for one in inventory.fetch().taps if one.name == tap and not one.unheld)


def status(tap: str, *options: str) -> dict[str, Any]:
    (found,) = json.loads(support.qsteer("status", "--dev", tap, "--json", *options).stdout)["taps"]
    return dict(found)


@contextlib.contextmanager
def idle(files: Provisioned, folder: Path, *arguments: str, prefix: Sequence[str] = ()) -> Iterator[Any]:
    """A QEMU whose guest does not run; ``stderr`` is a path."""
    stderr = folder / "stderr"
    with stderr.open("w") as log:
        qemu = subprocess.Popen(
            [*prefix, str(files.qemu), *IDLE, *arguments, "-qmp", f"unix:{folder}/qmp,server=on,wait=off"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        # Made before the NICs are, so wait for the queues.
        support.wait_until("QEMU's start", lambda: qemu.poll() is not None or _has_all_queues(qemu.pid))
        yield qemu
    finally:
        qemu.kill()
        qemu.wait()


def _has_all_queues(pid: int) -> bool:
    """The last one is opened after the script has ended."""
    return sum(queue.tap == TAPS[0] for queue in kernel.open_queues(pid)) == QUEUES


def test_what_stays(with_qemu: Provisioned, scripts: dict[str, str]) -> None:
    """Two NICs: without RSS the static configuration, through realize and reset; with RSS what QEMU does."""
    arguments = (*nic(scripts), *nic(scripts, tap=TAPS[1], rss="on"))
    with Guest(with_qemu, name="qsifvm", arguments=arguments) as guest:
        guest.wait_ready()
        said = (guest.folder / "qemu.log").read_text()
        assert f"qsteer-ifup: {TAPS[1]}: nothing attached, QEMU would take it off again (rss=on)" in said
        assert seen(TAPS[1]).program_id == 0
        attached = seen()
        if version(with_qemu) < DRIVER_TAKES_OFF_BEFORE:
            assert f"qsteer-ifup: {TAPS[0]}: nothing attached" in said and "driver starts" in said
            assert not attached.program_id
            return
        assert attached.program and attached.program.ident and attached.program.ident.source is Source.STATIC
        config = attached.content.config if attached.content else None
        assert config and config.table == tuple(range(128))
        sighting = follow(guest, TAPS[0], with_qemu.flowrx, queues=QUEUES, flows=FLOWS)
        verdict = verify(sighting, config, queues=QUEUES)
        print(verdict)
        assert (verdict.mismatches, verdict.host_mismatches, verdict.lost) == (0, 0, 0)
        assert all(queue.counted for queue in verdict.queues)
        guest.reset()
        assert seen().program_id == attached.program_id
        assert (status(TAPS[0])["source"], status(TAPS[0])["state"]) == ("static", "ok")
        assert "unchanged" in support.qsteer("apply", "--dev", TAPS[0]).stdout


def version(files: Provisioned) -> tuple[int, ...]:
    return tuple(map(int, files.qemu_version.split(".")[:2]))


def test_what_keep_takes_over(files: Provisioned, scripts: dict[str, str]) -> None:
    """A QEMU that may open taps and nothing else steers in software, until keep has asked it."""
    tap = TAPS[1]
    with keep("qsifvm", "--allow", "pause") as kept:
        arguments = nic(scripts, tap=tap, rss="on")
        with Guest(files, name="qsifvm", arguments=arguments, prefix=only("+net_admin")) as guest:
            guest.wait_ready()
            assert f"left to qsteer keep (process {kept.process.pid})" in (guest.folder / "qemu.log").read_text()
            guest.run("ethtool -X eth0 equal 3")
            kept.wait_for("steered", tap)
            verdict = verify(follow(guest, tap, files.flowrx, queues=QUEUES, flows=FLOWS), guest.rss(), queues=QUEUES)
            print(verdict)
            assert (verdict.mismatches, verdict.host_mismatches, verdict.lost) == (0, 0, 0)


def test_a_bridge_that_is_missing(files: Provisioned, scripts: dict[str, str], tmp_path: Path) -> None:
    """The VM starts, and is steered; with --required it does not."""
    unknown = f'unknown bridge "{BRIDGE}"'
    with idle(files, tmp_path, *nic(scripts, f"--bridge {BRIDGE}")) as qemu:
        assert qemu.poll() is None
        assert f"qsteer-ifup: {TAPS[0]} is not set up: {unknown}" in (tmp_path / "stderr").read_text()
        assert seen().program_id
    with idle(files, tmp_path, *nic(scripts, f"--bridge {BRIDGE} --required")) as qemu:
        assert qemu.wait(WAIT_S) != 0
        said = (tmp_path / "stderr").read_text().splitlines()
        assert said[0].startswith(f"qsteer-ifup: {unknown}"), said
        assert any("network script" in one and "failed" in one for one in said), said
    assert not Path("/sys/class/net", TAPS[0]).exists()


def test_no_right_to_load_bpf(files: Provisioned, scripts: dict[str, str], tmp_path: Path, bridge: str) -> None:
    """The VM starts on its bridge; with --required it does not."""
    with idle(files, tmp_path, *nic(scripts, f"--bridge {bridge}"), prefix=only("+net_admin")) as qemu:
        assert qemu.poll() is None
        assert f"qsteer-ifup: {TAPS[0]} is not steered" in (tmp_path / "stderr").read_text()
        assert Path("/sys/class/net", TAPS[0], "master").resolve().name == bridge
    with idle(files, tmp_path, *nic(scripts, f"--bridge {bridge} --required"), prefix=only("+net_admin")) as qemu:
        assert qemu.wait(WAIT_S) != 0
        assert "not permitted" in (tmp_path / "stderr").read_text()


def test_vhost_goes_by_the_version(files: Provisioned, scripts: dict[str, str], tmp_path: Path) -> None:
    """Which the program that runs tells; QEMU opens vhost-net, or fails to, when the script has ended."""
    arguments = [argument.replace("vhost=off", "vhost=on") for argument in nic(scripts, "-v")]
    with idle(files, tmp_path, *arguments):
        said = (tmp_path / "stderr").read_text()
    takes_off = version(files) >= VHOST_TAKES_OFF
    assert ("nothing attached" in said) == takes_off and ("attached, program" in said) != takes_off
    assert "not known" not in said


@pytest.fixture
def bridge() -> Iterator[str]:
    subprocess.run(("ip", "link", "add", BRIDGE, "type", "bridge"), check=True)
    yield BRIDGE
    subprocess.run(("ip", "link", "del", BRIDGE), check=True)


def test_the_end_of_a_vm_on_a_persistent_tap(
    files: Provisioned, scripts: dict[str, str], tmp_path: Path, bridge: str
) -> None:
    """Steered while it runs; then what qsteer-ifup made is gone, and the tap is there."""
    tap = Path("/sys/class/net", TAPS[0])
    subprocess.run(
        ("ip", "tuntap", "add", "dev", TAPS[0], "mode", "tap", "multi_queue", "vnet_hdr"), check=True, timeout=WAIT_S
    )
    try:
        with idle(files, tmp_path, *nic(scripts, f"--bridge {bridge}")) as qemu:
            qmp.execute(f"{tmp_path}/qmp", "query-status", {})  # from then on it ends by itself at a signal
            assert seen().program_id in support.programs_of(TAPS[0])
            assert (tap / "master").resolve().name == bridge
            assert (tap / "address").read_text().startswith("fe:")
            qemu.send_signal(signal.SIGTERM)
            assert qemu.wait(WAIT_S) == 0
        assert tap.exists() and not (tap / "master").exists()
        support.wait_until("the program's end", lambda: not support.programs_of(TAPS[0]))
        assert "qsteer-ifdown" not in (tmp_path / "stderr").read_text()
    finally:
        subprocess.run(("ip", "tuntap", "del", "dev", TAPS[0], "mode", "tap", "multi_queue"), check=True)


def test_in_the_background(files: Provisioned, scripts: dict[str, str], tmp_path: Path) -> None:
    """-daemonize: what is said still comes out of the QEMU that was started."""
    pid_file = tmp_path / "pid"
    done = subprocess.run(
        [str(files.qemu), *IDLE, *nic(scripts, "-v"), "-daemonize", "-pidfile", str(pid_file)],
        check=True,
        capture_output=True,
        text=True,
        timeout=WAIT_S,
    )
    pid = int(pid_file.read_text())
    try:
        after = seen()
        assert after.holder and after.holder.pid == pid and after.program_id
        assert f"{TAPS[0]}: attached, program {after.program_id}" in done.stderr
    finally:
        os.kill(pid, signal.SIGKILL)
        support.wait_until("the tap's end", lambda: not Path("/sys/class/net", TAPS[0]).exists())
