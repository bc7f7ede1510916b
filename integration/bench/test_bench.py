# SPDX-License-Identifier: BSD-2-Clause
"""A cut-down ``make bench``: that it runs, that the queues agree, and what it leaves behind; no times."""

import json
import math
import os
import select
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from integration.bench import figures, shapes, targets
from integration.bench.rounds import by_round, summary, turns
from integration.bench.taps import Tap, taps
from integration.bench.traffic import Load, drained, sender
from integration.provision import CHECKOUT
from qsteer.reference import classify
from qsteer.rss import HashType
from tests.kernel import support


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """It checks the queues itself, and fails on a wrong one."""
    command = [sys.executable, "-m", "integration.bench", *map(str, arguments)]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.root
def test_a_quick_run(tmp_path: Path) -> None:
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    done = run("--quick", "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    made = json.loads(out.read_text())
    for name in figures.REQUIRED:
        assert name in made and f"qemu.{name}" in made
    for name, figure in made.items():
        assert set(figure) == {"value", "unit", "spread", "comparator"}, name
        assert math.isfinite(figure["value"]) and math.isfinite(figure["spread"]), name
    for target in targets.TARGETS:
        assert target.figure in made
        assert target.figure in done.stdout
    machine = json.loads((tmp_path / "bench-machine.json").read_text())
    assert {"cpu", "kernel", "qemu", "clang", "date"} <= set(machine)
    drawn = ElementTree.parse(plot).getroot()
    assert drawn.tag.endswith("svg")
    assert machine["kernel"] in "".join(drawn.itertext())


@pytest.mark.parametrize(
    ("option", "values", "told"),
    [("--only", "testrun,everything", "no such part: everything"), ("--without", "qemu", "cannot be left out: qemu")],
)
def test_a_wrong_option(option: str, values: str, told: str) -> None:
    done = run(option, values)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(told)


@pytest.mark.root
def test_a_part_of_it(tmp_path: Path) -> None:
    """One part, and without a program that may not load while it is worked on."""
    out, plot = tmp_path / "bench.json", tmp_path / "bench.svg"
    done = run("--quick", "--only", "testrun", "--without", "capbpf,periodic", "--out", out, "--plot", plot)
    assert done.returncode == 0, done.stderr
    made = json.loads(out.read_text())
    assert "testrun.v4_tcp.ratio" in made and "testrun.v4_tcp.shared_maps.ratio" in made
    assert not [name for name in made if "capbpf" in name or "periodic" in name or name.startswith("tap.")]
    assert not plot.exists()


@pytest.mark.root
def test_an_order_is_kept_and_repeated() -> None:
    packets = shapes.flows("v4_tcp", 5)
    with support.network_namespace(), taps(3, length=16) as three, sender(direct=True) as out:
        sent = out.send(Load(packets=packets, taps=three, order=[(0, 2), (4, 0), (1, 1), (3, 2)]), 6)
        assert sent.dropped == 0 and sent.ns_per_packet > 0
        assert [received(tap) for tap in three] == [
            [packets[4]] * 2,
            [packets[1]],
            sorted([packets[0]] * 2 + [packets[3]]),
        ]
        with drained(three[1], cpu=min(os.sched_getaffinity(0))):
            out.send(Load(packets=packets, taps=three, order=[(0, 1)]), 100)
            support.wait_until("the tap is drained", lambda: not readable(three[1]))


def readable(tap: Tap) -> list[int]:
    return select.select(tap.queues, (), (), 0)[0]


def received(tap: Tap) -> list[bytes]:
    """All that waits in a tap."""
    frames = []
    while ready := readable(tap):
        frames += [os.read(queue, 2048)[support.VNET_HEADER :] for queue in ready]
    return sorted(frames)


def test_turns_are_fair() -> None:
    taken = list(turns("abc", 4))
    assert "".join(item for _, item in taken) == "abcbcacababc"
    assert [number for number, _ in taken] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine at half its speed for two of five rounds changes the times, and no ratio."""
    slow = (1, 2, 2, 1, 1)
    ours, theirs = [10.0 * factor for factor in slow], [200.0 * factor for factor in slow]
    ratio = by_round(lambda a, b: a / b, theirs, ours)
    assert (ratio.median, ratio.spread) == (20, 0)
    assert summary(ours).spread == 10
    assert summary([7.0]).spread == 0


def test_every_kind_of_packet_is_what_it_says() -> None:
    every = HashType(sum(HashType))
    wanted = {
        "v4_tcp": HashType.TCP4,
        "v4_udp": HashType.UDP4,
        "v6_tcp": HashType.TCP6,
        "v6_ext": HashType.TCP_EX,
        "vlan": HashType.TCP4,
        "qinq": HashType.TCP4,
        "non_ip": None,
    }
    for kind in shapes.KINDS:
        for packet in shapes.flows(kind, 4):
            match = classify(packet, every)
            assert (match.hash_type if match else None) == wanted[kind]


def test_wrong_queues_are_found() -> None:
    assert shapes.wrong_queues(len, len) == {}
    first = shapes.flows("vlan", 1)[0]
    assert shapes.wrong_queues(lambda packet: packet == first, lambda _: 0) == {"vlan": 1}


@pytest.mark.parametrize(
    ("value", "at_most", "verdict"),
    [
        (20.0, False, targets.Verdict.HOLDS),
        (19.99, False, targets.Verdict.SHORT),
        (40.0, False, targets.Verdict.STRETCH),
        (20.0, True, targets.Verdict.HOLDS),
        (20.01, True, targets.Verdict.SHORT),
    ],
)
def test_targets(value: float, at_most: bool, verdict: targets.Verdict) -> None:
    target = targets.Target(figure="x", target=20, stretch=None if at_most else 40, at_most=at_most)
    assert target.verdict(value) is verdict
