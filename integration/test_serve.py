# SPDX-License-Identifier: BSD-2-Clause
"""A user without any right starts a guest with a tap and with programs of qsteer serve; every flow is checked."""

import contextlib
import json
import os
import pwd
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from integration import traffic
from integration.guest import Guest
from integration.provision import Provisioned
from qsteer import kernel, links
from qsteer.rss import RssConfig
from tests.kernel import support

pytestmark = [pytest.mark.root, pytest.mark.guest]

BRIDGE, PREFIX = "qssvbr0", "qssv"
OWN = "qsvown"
QUEUES = 4
MACS = {"net0": "52:54:00:71:73:00", "net1": "52:54:00:71:73:01"}
WAIT_S = support.patience(60)

AS_USER = """
import importlib, os, pkgutil, pwd, sys
from pathlib import Path
import qsteer
# The user may not be able to read the checkout.
for module in pkgutil.iter_modules(qsteer.__path__):
    if module.name != "shim_build":
        importlib.import_module(f"qsteer.{module.name}")
from qsteer import service
from qsteer.__main__ import main
user, path, queue_fd, *arguments = sys.argv[1:]
entry = pwd.getpwnam(user)
os.setgroups([])
os.setresgid(entry.pw_gid, entry.pw_gid, entry.pw_gid)
os.setresuid(entry.pw_uid, entry.pw_uid, entry.pw_uid)
if queue_fd != "-":
    fds, text = service.request_program(int(queue_fd), Path(path))
    print(text, flush=True)
    for fd in fds:
        os.set_inheritable(fd, True)
    arguments = [word.replace("@PROGRAM@", ",".join(f'"{fd}"' for fd in fds)) for word in arguments]
sys.argv = ["qsteer", *arguments]
sys.exit(main())
"""
"""Becomes a user; asks for a program for a tap that it has open, if it has; then is qsteer."""


@contextlib.contextmanager
def serving(user: str) -> Iterator[Path]:
    """A service, and where it listens; a bridge and a tap of four queues are what the user may have."""
    config = f"""
[[serve.allow]]
user = "{user}"
bridges = ["{BRIDGE}"]
prefix = "{PREFIX}"
queues = {QUEUES}
taps = 1
"""
    subprocess.run(["ip", "link", "add", BRIDGE, "type", "bridge"], check=True)
    try:
        with tempfile.TemporaryDirectory(prefix="qsteer-serve-") as name:
            folder = Path(name)
            folder.chmod(0o755)
            (folder / "qsteer.toml").write_text(config)
            with (folder / "stderr").open("w") as stderr:
                process = subprocess.Popen(
                    [sys.executable, "-m", "qsteer", "serve", "--socket", str(folder / "socket")],
                    stderr=stderr,
                    env={**os.environ, "QSTEER_CONFIG": name},
                )
            try:
                support.wait_until("the service", lambda: _listens(folder / "socket") or process.poll() is not None)
                yield folder / "socket"
            finally:
                process.kill()
                process.wait()
                said = (folder / "stderr").read_text()
                assert "Traceback" not in said and "serve fails" not in said, said
    finally:
        subprocess.run(["ip", "link", "del", BRIDGE], check=True)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(os.fspath(path)) == 0


def qsteer_run(user: str, path: Path, tap: str, *, queue_fd: int | None = None) -> tuple[str, ...]:
    wrapper = (sys.executable, "-c", AS_USER, user, str(path), "-" if queue_fd is None else str(queue_fd))
    return (*wrapper, "run", "--service", str(path), "--tap", tap, "--")


def check_flows(guest: Guest, files: Provisioned, device: str, tap: str, weights: str) -> None:
    """Every flow is on the queue that the guest's table says, by the guest's word and by the host's."""
    guest.run(f"ethtool -X {device} weight {weights}")
    config: RssConfig = guest.rss(device)
    sighting = traffic.follow(guest, tap, files.flowrx, queues=QUEUES, device=device)
    verdict = traffic.verify(sighting, config, queues=QUEUES)
    assert (verdict.flows, verdict.mismatches, verdict.host_mismatches, verdict.lost) == (4096, 0, 0, 0), verdict
    print(device, tap, verdict)


def devices(guest: Guest) -> dict[str, str]:
    """The guest's names of its NICs, by their MACs."""
    told = guest.run("cd /sys/class/net; for nic in eth*; do echo $nic $(cat $nic/address); done").split()
    return dict(zip(told[1::2], told[::2], strict=True))


def own_nic(fds: Sequence[int]) -> tuple[str, ...]:
    """A NIC whose tap somebody else has made, as a management layer does, and whose program the service gives."""
    device = {"driver": "virtio-net-pci", "netdev": "net1", "mac": MACS["net1"], "mq": True, "vectors": 10, "rss": True}
    text = json.dumps(device)[:-1] + ', "ebpf-rss-fds": [@PROGRAM@]}'
    return ("-netdev", f"tap,id=net1,vhost=off,fds={':'.join(map(str, fds))}", "-device", text)


def test_a_guest_of_a_user_without_rights(files: Provisioned, user: str) -> None:
    """One NIC has its tap and its program from the service, the other one its program only."""
    mine = f"id=net0,queues={QUEUES},bridge={BRIDGE},mac={MACS['net0']}"
    with serving(user) as path, support.tap(OWN, QUEUES) as own:
        prefix = qsteer_run(user, path, mine, queue_fd=own.open.fds[0])
        arguments = own_nic(own.open.fds)
        guest = Guest(files, name="qssv", user=user, prefix=prefix, arguments=arguments, pass_fds=own.open.fds)
        with guest:
            guest.wait_ready()
            uid, capabilities = guest.credentials()
            assert (uid, int(capabilities, 16)) == (pwd.getpwnam(user).pw_uid, 0)
            taps = {queue.tap for queue in kernel.open_queues(guest.pid)}
            assert taps == {OWN, f"{PREFIX}0"}
            link, bridge = links.find(f"{PREFIX}0"), links.bridge(BRIDGE)
            assert link and link.bridge_index == bridge.index
            names = devices(guest)
            check_flows(guest, files, names[MACS["net0"]], f"{PREFIX}0", "4 3 2 1")
            check_flows(guest, files, names[MACS["net1"]], OWN, "1 2 3 4")
            # It has its one tap: a second VM of the user's gets none.
            done = refused(qsteer_run(user, path, mine), files)
            assert "one more tap" in done.stderr
        support.wait_until("the tap's end", lambda: not links.find(f"{PREFIX}0"))


def refused(command: Sequence[str], files: Provisioned) -> subprocess.CompletedProcess[str]:
    idle = (str(files.qemu), "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none", "-S")
    done = subprocess.run((*command, *idle), capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) == 2, done.stderr
    return done


REFUSED = {
    "another bridge": ("id=net0,queues=4,bridge=qssvbr1", '"qssvbr1"'),
    "no bridge": ("id=net0,queues=4", "no bridge"),
    "too many queues": (f"id=net0,queues=5,bridge={BRIDGE}", "5 queues (at most 4)"),
    "another name": (f"id=net0,queues=4,bridge={BRIDGE},ifname=eth7", "begin with"),
}


def test_what_a_user_is_refused(files: Provisioned, user: str) -> None:
    subprocess.run(["ip", "link", "add", "qssvbr1", "type", "bridge"], check=True)
    try:
        with serving(user) as path:
            for tap, words in REFUSED.values():
                assert words in refused(qsteer_run(user, path, tap), files).stderr
            assert not [tun for tun in links.tuns() if tun.name.startswith("qssv")]
    finally:
        subprocess.run(["ip", "link", "del", "qssvbr1"], check=True)
