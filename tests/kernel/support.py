# SPDX-License-Identifier: BSD-2-Clause
"""Real taps in network namespaces of their own, and what tests do with them."""

import contextlib
import ctypes
import itertools
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pyroute2 import IPRoute, netns

from qsteer import kernel, programs
from qsteer.errors import QsteerError
from qsteer.model import Build

VNET_HEADER = 10
"""Length of the virtio-net header before every frame that is read from a tap or written to it."""
PATIENCE = float(os.environ.get("QSTEER_PATIENCE", "1"))
"""How much slower than on a machine of its own what is tested may be: everything is, where a processor is emulated."""


def patience(seconds: float) -> float:
    """A limit that is one of this machine's speed, not of qsteer's promises alone."""
    return seconds * PATIENCE


WAIT_S = patience(5.0)

BUILDS = tuple(
    build
    for build in Build
    if build is not Build.SHARED_BODY or "bpf_cast_to_kern_ctx" in Path("/proc/kallsyms").read_text()
)
"""What this kernel can load, by what it has and not by trying: a build that fails to load is a failure."""
TUN_MAY_GO = Path("/sys/module/tun/initstate").exists() and os.environ.get("QSTEER_UNLOAD_TUN", "0") not in ("", "0")
"""Whether tun is a module, and this is a machine on which tests may unload it."""

_numbers = itertools.count(1)


@contextlib.contextmanager
def network_namespace() -> Iterator[str]:
    """Live in a new network namespace, where no bridge looks into packets and nobody speaks IPv6 by itself."""
    name = f"qs-test-{os.getpid()}-{next(_numbers)}"
    netns.create(name)
    try:
        netns.pushns(name)
        try:
            for path in (
                Path("/proc/sys/net/ipv6/conf/all/disable_ipv6"),
                Path("/proc/sys/net/ipv6/conf/default/disable_ipv6"),
            ):
                path.write_text("1")
            for path in Path("/proc/sys/net/bridge").glob("bridge-nf-call-*"):
                path.write_text("0")
            yield name
        finally:
            netns.popns()
    finally:
        netns.remove(name)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Visit a network namespace."""
    netns.pushns(name)
    try:
        yield
    finally:
        netns.popns()


def links_up(*names: str, master: str | None = None, mtu: int | None = None) -> None:
    with IPRoute() as route:
        for name in names:
            index = route.link_lookup(ifname=name)[0]
            if master:
                route.link("set", index=index, master=route.link_lookup(ifname=master)[0])
            if mtu:
                route.link("set", index=index, mtu=mtu)
            route.link("set", index=index, state="up")
        if master:
            wait_until(
                f"{master} forwards to {', '.join(names)}", lambda: all(_forwards(route, name) for name in names)
            )


def _forwards(route: IPRoute, name: str) -> bool:
    """Whether a bridge passes packets to one of its ports: not before the kernel's worker has seen its carrier."""
    forwarding = 3  # BR_STATE_FORWARDING
    state = route.link("get", ifname=name)[0].get(("linkinfo", "slave_data", "state"))
    return bool(state == forwarding)


def _sends(name: str) -> bool:
    """Whether the same worker has made a device's queues ready; a tap's are at once, and it never says UP."""
    with IPRoute() as route:
        link = route.link("get", ifname=name)[0]
        return bool(link.get("operstate") == "UP" or link.get(("linkinfo", "kind")) == "tun")


def add_bridge(name: str) -> None:
    with IPRoute() as route:
        route.link("add", ifname=name, kind="bridge", br_mcast_snooping=0)
    links_up(name)


def add_veth(name: str, peer: str) -> None:
    with IPRoute() as route:
        route.link("add", ifname=name, kind="veth", peer=peer)


class TapUnderTest:
    """A tap that is up, whose queues the test reads itself."""

    def __init__(self, name: str, queues: int) -> None:
        self.open = kernel.open_tap(name, queues)
        self.name = self.open.name
        self._poll = select.poll()
        for fd in self.open.fds:
            self._poll.register(fd, select.POLLIN)
        links_up(self.name)

    def close(self) -> None:
        self.open.close()

    def attach(self, program: programs.Program) -> None:
        kernel.attach(self.open.fds[0], program.prog_fd)

    def drain(self) -> None:
        """Throw away what waits in the queues."""
        while ready := self._poll.poll(0):
            for fd, _ in ready:
                os.read(fd, 1 << 16)

    def receive(self) -> tuple[int, bytes]:
        """The next frame, and the queue that it came out of.  Fails the test if there is none."""
        ready = self._poll.poll(WAIT_S * 1000)
        assert ready, f"no packet came out of {self.name}"
        fd = ready[0][0]
        return self.open.fds.index(fd), os.read(fd, 1 << 16)[VNET_HEADER:]


@contextlib.contextmanager
def tap(name: str = "", queues: int = 4) -> Iterator[TapUnderTest]:
    under_test = TapUnderTest(name, queues)
    try:
        yield under_test
    finally:
        under_test.close()


@contextlib.contextmanager
def sender(device: str) -> Iterator[socket.socket]:
    """A packet socket that sends whole frames out of a device, once that one no longer throws them away."""
    wait_until(f"{device} has a carrier", lambda: _sends(device))
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as sock:
        sock.bind((device, 0))
        yield sock


def foreign_program(answer: int, name: bytes = b"lb_steer") -> int:
    """An fd of a steering program that is not qsteer's: it returns one number."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    # mov r0, answer; exit
    instructions = b"\xb7\x00\x00\x00" + answer.to_bytes(4, "little") + b"\x95" + bytes(7)
    socket_filter = 1
    fd = libbpf.bpf_prog_load(socket_filter, name, b"GPL", instructions, 2, None)
    assert fd >= 0, os.strerror(-fd)
    return int(fd)


def wait_until(what: str, condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    """Look again and again, until a deadline; for what sends no signal."""
    deadline = time.monotonic() + patience(timeout_s)
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def loaded_programs(name: str = "qsteer_tap") -> set[int]:
    """The ids of all programs of the host that have a name."""
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    found: set[int] = set()
    number = ctypes.c_uint32(0)
    while libbpf.bpf_prog_get_next_id(number, ctypes.byref(number)) == 0:
        # One may be unloaded between the two calls.
        with contextlib.suppress(QsteerError):
            if programs.program_info(number.value).name == name:
                found.add(number.value)
    return found


def programs_of(tap: str) -> set[int]:
    """The ids of all loaded programs that were made for a tap."""
    found = set()
    for number in loaded_programs():
        with contextlib.suppress(QsteerError):
            ident = programs.program_info(number).ident
            if ident and ident.tap == tap:
                found.add(number)
    return found


def qsteer(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would; every traceback is a failure."""
    done = subprocess.run(
        [sys.executable, "-m", "qsteer", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def lines(text: str) -> Sequence[str]:
    return [line.rstrip() for line in text.splitlines()]
