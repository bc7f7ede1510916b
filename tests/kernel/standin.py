# SPDX-License-Identifier: BSD-2-Clause
"""A stand-in for a VM: a process with a QEMU's command line holds a tap, whose packets the test reads."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qsteer.programs import Program
from qsteer.reference import queue_of
from qsteer.rss import RssConfig
from tests import packets
from tests.kernel import support

QUEUES = 4
PACKETS = tuple(
    packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, packets.tcp((port, 80), b"payload")))
    for port in range(40)
)
"""Flows enough for any two configurations to differ on some."""

_SLEEP = "import time; print('ready', flush=True); time.sleep(3600)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """``tap`` is named after the VM, and has QUEUES queues if nobody says otherwise."""

    name: str
    pid: int
    tap: support.TapUnderTest

    def check_packets(self, config: RssConfig, sent: Sequence[bytes] = PACKETS) -> None:
        """Real packets, each to the queue that the configuration names."""
        with support.sender(self.tap.name) as sock:
            for packet in sent:
                sock.send(packet)
                assert self.tap.receive() == (queue_of(packet, config) % QUEUES, packet)

    def check_packets_during(self, process: subprocess.Popen[str], config: RssConfig) -> None:
        """For as long as a process runs."""
        while process.poll() is None:
            self.check_packets(config)


@contextlib.contextmanager
def vm(name: str, held: Program | None = None, *, called: str = "", queues: int = QUEUES) -> Iterator[Vm]:
    """Started with a program of qsteer's, or without RSS; its name is its tap's, or what it is ``called``."""
    with support.tap(name, queues) as tap:
        fds = ":".join(map(str, tap.open.fds))
        argv = ["qemu-system-x86_64", "-name", called or name, "-netdev", f"tap,id=n0,fds={fds},vhost=off"]
        argv += ["-device", f"virtio-net-pci,netdev=n0,mq=on,rss={'on' if held else 'off'}"]
        stand_in = subprocess.Popen(
            [argv[0], "-c", _SLEEP, *argv[1:]],
            executable=sys.executable,
            pass_fds=(*tap.open.fds, *(held.fds if held else ())),
            stdout=subprocess.PIPE,
        )
        try:
            assert stand_in.stdout and stand_in.stdout.readline() == b"ready\n"
            yield Vm(name=name, pid=stand_in.pid, tap=tap)
        finally:
            stand_in.kill()
            stand_in.communicate()
