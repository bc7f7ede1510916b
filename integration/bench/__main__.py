# SPDX-License-Identifier: BSD-2-Clause
"""``make bench``: run the parts in one process, then the tables, build/bench.json and the plot.

Everything happens in a network namespace and with a BPF file system of its own, which go with the process.
"""

import argparse
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration import provision
from integration.apt import ProvisionError
from integration.bench import figures, machine, plot, qemu, random_order, report, setup, shapes, testrun, throughput
from integration.bench.contenders import (
    CAPBPF,
    FLOOR,
    LABELS,
    PERIODIC,
    QEMU,
    SHARED_MAPS,
    STATIC,
    Contender,
    ContenderError,
    contenders,
)
from integration.bench.figures import Figure
from integration.bench.native import NativeError
from integration.bench.shapes import WrongQueueError
from integration.bench.taps import enter_private_network, taps
from integration.provision import BUILD
from qsteer.errors import QsteerError
from tests.kernel import private

PARTS = ("testrun", "tap", "taps300", "setup", "growth")
DISPENSABLE = (STATIC, PERIODIC, SHARED_MAPS, CAPBPF)
"""The others are what these are compared with."""
QEMU_REACH = 300
"""Taps that QEMU's program is loaded for, at 60 ms each."""
MANY_LENGTH = 16
"""Packets that wait in each queue of the many taps: nobody reads them."""
ONE_LENGTH = 1000
"""Of the one tap: what the kernel gives it when nobody says otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How thorough a run is."""

    rounds: int
    sample_s: float
    packets: int
    taps: int
    growth: Mapping[int, int]
    taps300: int
    setup_rounds: int
    setup_budget_s: float
    verifications: int
    qemu_programs: int


FULL = Extent(
    rounds=61,
    sample_s=0.005,
    packets=20_000,
    taps=1000,
    growth={1: 15, 10: 15, 100: 15, 1000: 15},
    taps300=41,
    setup_rounds=3,
    setup_budget_s=4.0,
    verifications=7,
    qemu_programs=QEMU_REACH,
)
QUICK = Extent(
    rounds=2,
    sample_s=0.0005,
    packets=2000,
    taps=20,
    growth={1: 2, 10: 2},
    taps300=2,
    setup_rounds=1,
    setup_budget_s=0.1,
    verifications=2,
    qemu_programs=3,
)


class Run:
    """What is measured, part by part."""

    def __init__(self, extent: Extent, elf: bytes, every: Mapping[str, Contender], drain_cpu: int) -> None:
        self.extent, self.elf, self.every, self.drain_cpu = extent, elf, every, drain_cpu
        self.figures: dict[str, Figure] = {}
        self.notes: list[str] = []

    def some(self, *names: str) -> Sequence[Contender]:
        return tuple(self.every[name] for name in names if name in self.every)

    def testrun(self) -> None:
        costs = testrun.measure(tuple(self.every.values()), rounds=self.extent.rounds, sample_s=self.extent.sample_s)
        self.figures.update(figures.of_testrun(costs))
        if costs.qemu_wrong:
            # It reads from the network header, which a test run leaves in front of the tags.
            self.notes.append(f"In a test run QEMU's program gives wrong queues for {_told(costs.qemu_wrong)}.")

    def tap(self) -> None:
        extent = self.extent
        every = tuple(self.every.values())
        with taps(1, length=ONE_LENGTH) as (tap,):
            rates = throughput.measure(
                every, tap, rounds=extent.rounds, packets=extent.packets, drain_cpu=self.drain_cpu
            )
        self.figures.update(figures.of_throughput(rates))
        for name, wrong in rates.wrong.items():
            came = f"wrong queues for {_told(wrong)}" if wrong else "the right queue for every packet"
            self.notes.append(f"On a tap {LABELS[name]} gave {came}.")
        self.notes.append(f"Of the packets into the tap that was read {100 * rates.lost:.2f} % were lost.")

    def random_order(self, parts: Sequence[str]) -> None:
        counts = dict(self.extent.growth) if "growth" in parts else {}
        counts |= {300: self.extent.taps300} if "taps300" in parts else {}
        with taps(max(counts), length=MANY_LENGTH) as many:
            costs = random_order.measure(
                self.some(FLOOR, QEMU, SHARED_MAPS, STATIC, PERIODIC),
                many,
                counts=dict(sorted(counts.items())),
                direct=(300,),
                packets=self.extent.packets,
                programs={QEMU: self.extent.qemu_programs},
                reach={QEMU: QEMU_REACH},
            )
        self.figures.update(figures.of_random_order(costs))

    def setup(self) -> None:
        extent = self.extent
        bodies = {name: setup.verification(body, extent.verifications) for name, body in setup.body_objects().items()}
        theirs = setup.verification(self.elf, extent.verifications)
        self.figures.update(figures.of_verification(bodies, theirs))
        with taps(extent.taps, length=MANY_LENGTH) as many:
            made = setup.measure(
                self.some(FLOOR, QEMU, CAPBPF, SHARED_MAPS, STATIC),
                many,
                rounds=extent.setup_rounds,
                budget_s=extent.setup_budget_s,
            )
        self.figures.update(figures.of_setup(made))


def measure(parts: Sequence[str], without: Collection[str], extent: Extent, elf: bytes) -> Run:
    """Raises what any part raises."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})
    with private.memory(), contenders(elf) as every:
        some = {name: contender for name, contender in every.items() if name not in without}
        run = Run(extent, elf, some, drain_cpu=cpus[0])
        for part, run_it in (("testrun", run.testrun), ("tap", run.tap), ("setup", run.setup)):
            if part in parts:
                progress(part)
                run_it()
        if {"taps300", "growth"} & set(parts):
            progress("many taps")
            run.random_order(parts)
    return run


def _told(wrong: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} ({count} of {shapes.CHECKED})" for kind, count in wrong.items())


def progress(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m integration.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few rounds: that it works, not what it measures")
    parser.add_argument(
        "--only", metavar="PART,...", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; no plot then"
    )
    parser.add_argument(
        "--without", metavar="PROGRAM,...", default="", help=f"leave out some of {', '.join(DISPENSABLE)}; no plot then"
    )
    parser.add_argument("--out", type=Path, default=BUILD / "bench.json", help="the figures (build/bench.json)")
    parser.add_argument("--plot", type=Path, default=BUILD / "bench.svg", help="the plot (build/bench.svg)")
    options = parser.parse_args()
    options.parts = options.only.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    options.without = options.without.split(",") if options.without else []
    if unknown := set(options.without) - set(DISPENSABLE):
        parser.error(f"cannot be left out: {', '.join(sorted(unknown))}")
    return options


def main() -> int:
    options = parse()
    if os.geteuid() != 0:
        print("bench: only root may load BPF programs and make taps: sudo make bench", file=sys.stderr)
        return 1
    try:
        files = provision.provision()
        elf = qemu.steering_object(files.qemu)
        where = machine.describe(files.qemu_version)
        enter_private_network()
        run = measure(options.parts, options.without, QUICK if options.quick else FULL, elf)
    except (ProvisionError, ContenderError, NativeError, WrongQueueError, OSError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except QsteerError as error:
        print(f"bench: {error}{f' ({error.hint})' if error.hint else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    print(report.text(run.figures, where, run.notes))
    report.write_json(run.figures, where, options.out)
    if set(options.parts) == set(PARTS) and not options.without:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        options.plot.write_text(plot.svg(run.figures, where))
    return 0


if __name__ == "__main__":
    sys.exit(main())
