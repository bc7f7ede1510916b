# SPDX-License-Identifier: BSD-2-Clause
"""A host's /etc/qemu and bridges of one's own, and a bridge helper's run as QEMU would start it."""

import contextlib
import fcntl
import os
import shutil
import socket
import stat
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyroute2 import IPRoute

from tests.kernel import private, support

HELPER = Path(__file__).parents[2] / "build" / "qsteer-bridge-helper"
"""What make build makes."""
ACL = Path("/etc/qemu/bridge.conf")
NOBODY = 65534
MTU = 1400
"""Of the bridge br0."""
_TUNGETIFF = 0x800454D2
_TUN_DEVICE = os.makedev(10, 200)


@contextlib.contextmanager
def host() -> Iterator[Path]:
    """Live in a mount namespace with empty /etc/qemu and /etc/qsteer, and a /dev/net/tun for everybody.

    Yields an empty folder, which is a file system in memory, open to everybody, that knows file capabilities.  All of
    it goes with the namespace: nothing outside is ever written to.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="qsbh-", dir="/var/tmp"))
        stack.callback(folder.rmdir)
        stack.enter_context(private.memory())
        private.mount("-t", "tmpfs", "-o", "mode=755", "qsteer", str(folder))
        real, etc, work = (folder / name for name in ("etc-real", "etc", "work"))
        for path in (real, etc, work):
            path.mkdir()
        private.mount("--bind", "/etc", str(real))
        for entry in real.iterdir():
            if entry.name not in ("qemu", "qsteer"):
                (etc / entry.name).symlink_to(entry)
        for name in ("qemu", "qsteer"):
            (etc / name).mkdir()
        private.mount("--bind", str(etc), "/etc")
        tun = folder / "tun"
        os.mknod(tun, stat.S_IFCHR | 0o666, _TUN_DEVICE)
        tun.chmod(0o666)
        private.mount("--bind", str(tun), "/dev/net/tun")
        yield work


def add_bridges() -> None:
    """br0 (MTU 1400, other name br0-other), br1, one with the longest name, and veth0, which is none; all are up."""
    with IPRoute() as route:
        for name in ("br0", "br1", "fifteen-letters"):
            route.link("add", ifname=name, kind="bridge")
        index = route.link_lookup(ifname="br0")[0]
        route.link("set", index=index, mtu=MTU)
        route.link("property_add", index=index, altname="br0-other")
    support.add_veth("veth0", "veth1")
    support.links_up("br0", "br1", "fifteen-letters", "veth0", "veth1")


def taps() -> set[str]:
    with IPRoute() as route:
        return {link.get("ifname") for link in route.get_links() if link.get(("linkinfo", "kind")) == "tun"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """What came over the socket, and what the kernel says of it; ``flags`` are TUNGETIFF's, ``data`` the bytes."""

    name: str
    flags: int
    mtu: int
    mac: str
    master: str
    up: bool
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``status`` is the exit status, negative for a signal, None if the helper had to be killed."""

    status: int | None
    stderr: str
    tap: Tap | None

    @property
    def verdict(self) -> str:
        """``yes``, ``no``, or what a helper should never do."""
        if self.status is None:
            return "hangs"
        if self.status < 0:
            return f"signal {-self.status}"
        if (self.status == 0) != (self.tap is not None):
            return f"exit status {self.status} {'with' if self.tap else 'without'} a tap"
        return "yes" if self.tap else "no"


def with_net_admin(user: int = NOBODY, *groups: int) -> tuple[str, ...]:
    """A command prefix: another user, with CAP_NET_ADMIN alone, ambient: the dynamic loader trusts the caller then."""
    only = "-all,+net_admin"
    return (*as_user(user, *groups), f"--inh-caps={only}", f"--ambient-caps={only}", "--")


def without(user: int = NOBODY, *groups: int) -> tuple[str, ...]:
    """A command prefix: another user, with no capability."""
    return (*as_user(user, *groups), "--inh-caps=-all", "--")


def as_user(user: int, *groups: int) -> tuple[str, ...]:
    several = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return ("setpriv", f"--reuid={user}", f"--regid={user}", several)


def run(
    helper: Path,
    bridge: str,
    *options: str,
    prefix: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    cwd: str = "/",
    prepare: Callable[[], None] | None = None,
    timeout_s: float = 10.0,
) -> Outcome:
    """One start as QEMU does it, with a socket for its answer; ``prepare`` runs before exec, in the child."""
    ours, its = socket.socketpair()
    with ours, its:
        command = [*prefix, str(helper), *options, f"--br={bridge}", f"--fd={its.fileno()}"]
        try:
            done = subprocess.run(
                command,
                pass_fds=(its.fileno(),),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                cwd=cwd,
                preexec_fn=prepare,
                timeout=timeout_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(status=None, stderr="", tap=None)
        return Outcome(status=done.returncode, stderr=done.stderr, tap=_received(ours))


def _received(sock: socket.socket) -> Tap | None:
    sock.setblocking(False)
    try:
        data, fds, _, _ = socket.recv_fds(sock, 16, 4)
    except BlockingIOError:
        return None
    try:
        assert len(fds) == 1, (data, fds)
        return describe(fds[0], data)
    finally:
        for fd in fds:
            os.close(fd)


def describe(fd: int, data: bytes = b"") -> Tap:
    """What the kernel says of a tap."""
    name, flags = struct.unpack("16sH", fcntl.ioctl(fd, _TUNGETIFF, bytes(40))[:18])
    with IPRoute() as route:
        link = route.get_links(route.link_lookup(ifname=name.rstrip(b"\0").decode())[0])[0]
        master = route.get_links(link.get("master"))[0].get("ifname") if link.get("master") else ""
        return Tap(
            name=link.get("ifname"),
            flags=flags,
            mtu=link.get("mtu"),
            mac=link.get("address"),
            master=master,
            up=link["state"] == "up",
            data=data,
        )


def copy(helper: Path, folder: Path) -> Path:
    """A copy of the helper that everybody can run, without privileges."""
    folder.mkdir(mode=0o755, exist_ok=True)
    copied = Path(shutil.copy(helper, folder / helper.name))
    copied.chmod(0o755)
    return copied


def copy_with_capability(helper: Path, folder: Path) -> Path:
    """Another one, with what an administrator gives it."""
    copied = copy(helper, folder)
    subprocess.run(["setcap", "cap_net_admin+ep", copied], check=True)
    return copied
