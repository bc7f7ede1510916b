# SPDX-License-Identifier: BSD-2-Clause
"""The design size: what ``status`` and ``keep`` cost on a host with 1000 taps of four queues.

``python -m integration.thousand [--taps N] [--vms N] [--seconds S]`` makes the taps, in processes that look like QEMUs
(nothing reads the taps), steers them with ``keep``, and prints what was measured.  All goes away with it.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qsteer import kernel

QUEUES = 4
REPAIRS = 40
_HOLD = """
import resource, sys
from qsteer import kernel
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
first, last, queues = map(int, sys.argv[-3:])
taps = [kernel.open_tap(f"qs1k{number}", queues) for number in range(first, last)]
print("ready", flush=True)
for line in sys.stdin:
    kernel.detach(taps[int(line) - first].fds[0])
    print("off", flush=True)
"""


class Vm:
    """A process that its command line calls a QEMU, with taps ``first`` to ``last``."""

    def __init__(self, number: int, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.child = subprocess.Popen(
            ("qemu-system-x86_64", "-c", _HOLD, "-name", f"qs1k-vm{number}", str(first), str(last), str(QUEUES)),
            executable=sys.executable,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def said(self) -> str:
        """The next thing that it says."""
        assert self.child.stdout
        return self.child.stdout.readline()

    def take_off(self, tap: int) -> None:
        """Take whatever steers one of its taps off, as a QEMU does."""
        assert self.child.stdin
        self.child.stdin.write(f"{tap}\n")
        self.child.stdin.flush()
        self.said()


@contextlib.contextmanager
def vms(count: int, taps: int) -> Iterator[Sequence[Vm]]:
    """``count`` VMs that share ``taps`` taps."""
    bounds = [number * taps // count for number in range(count + 1)]
    made = [Vm(number, bounds[number], bounds[number + 1]) for number in range(count)]
    try:
        for vm in made:
            if vm.said() != "ready\n":
                raise SystemExit("a process could not make its taps")
        yield made
    finally:
        for vm in made:
            vm.child.kill()
            vm.child.communicate()


@contextlib.contextmanager
def keep(pids: Sequence[int], log: Path) -> Iterator[tuple[int, float]]:
    """``qsteer keep`` for some processes: its pid, and when it was started (of time.monotonic()), once it is ready."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(f"{folder}/notify")
        notified.settimeout(300)
        selectors = [word for pid in pids for word in ("--pid", str(pid))]
        began = time.monotonic()
        with log.open("wb") as output:
            child = subprocess.Popen(
                (sys.executable, "-m", "qsteer", "keep", *selectors),
                env=os.environ | {"NOTIFY_SOCKET": f"{folder}/notify"},
                stdout=output,
                stderr=output,
            )
        try:
            while not notified.recv(4096).startswith(b"READY=1"):
                pass
            yield child.pid, began
            child.send_signal(signal.SIGTERM)
            if child.wait(10):
                raise SystemExit(f"keep ended with {child.returncode}: {log}")
        finally:
            child.kill()
            child.wait()


def cpu_s(pid: int) -> float:
    """User and system time that a process has spent."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def status() -> tuple[float, float]:
    """Seconds, and seconds of CPU, that ``qsteer status`` takes; the least of five runs."""
    taken = []
    for _ in range(5):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
        subprocess.run((sys.executable, "-m", "qsteer", "status"), check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        taken.append((time.monotonic() - began, spent))
    return min(taken)


def unsteered_ms(made: Sequence[Vm], draw: random.Random) -> float:
    """How long one tap was without a program after it was taken off."""
    vm = draw.choice(made)
    tap = draw.randrange(vm.first, vm.last)
    vm.take_off(tap)
    began = time.monotonic()
    while not any(queue.tap == f"qs1k{tap}" and queue.program_id for queue in kernel.open_queues(vm.child.pid)):
        if time.monotonic() > began + 30:
            raise SystemExit(f"qs1k{tap} is not put back")
        time.sleep(0.001)
    return (time.monotonic() - began) * 1000


def steered(made: Sequence[Vm]) -> int:
    """How many of the taps have a program."""
    pids = {vm.child.pid for vm in made}
    return len({queue.tap for queue in kernel.open_queues() if queue.pid in pids and queue.program_id})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m integration.thousand", description=__doc__.splitlines()[0])
    parser.add_argument("--taps", type=int, default=1000)
    parser.add_argument("--vms", type=int, default=250)
    parser.add_argument("--seconds", type=float, default=60, help="how long to look at an idle keep")
    options = parser.parse_args()
    draw = random.Random(1)
    log = Path(tempfile.gettempdir()) / "qsteer-thousand.log"
    with vms(options.vms, options.taps) as made:
        print(f"{options.taps} taps of {QUEUES} queues, {options.vms} VMs, Linux {os.uname().release}")
        print("status, not steered: {:.0f} ms, {:.0f} ms of CPU".format(*(1000 * taken for taken in status())))
        with keep([vm.child.pid for vm in made], log) as (pid, began):
            while steered(made) < options.taps:
                if time.monotonic() > began + 300:
                    raise SystemExit(f"only {steered(made)} taps are steered: {log}")
                time.sleep(0.05)
            took = time.monotonic() - began
            print(f"keep: all steered after {took:.1f} s and {cpu_s(pid):.1f} s of CPU")
            print("status, steered: {:.0f} ms, {:.0f} ms of CPU".format(*(1000 * taken for taken in status())))
            time.sleep(2)
            before, began = cpu_s(pid), time.monotonic()
            time.sleep(options.seconds)
            idle = (cpu_s(pid) - before) / (time.monotonic() - began)
            print(f"keep, idle for {options.seconds:.0f} s: {100 * idle:.2f} % of a core")
            gaps = []
            for _ in range(REPAIRS):
                gaps.append(unsteered_ms(made, draw))
                time.sleep(1)
            print(
                f"put back {REPAIRS} times, one a second: after {statistics.median(gaps):.0f} ms (median), "
                f"{max(gaps):.0f} ms at most"
            )
        print(f"keep has ended: {steered(made)} taps steered")
    log.unlink()


if __name__ == "__main__":
    main()
