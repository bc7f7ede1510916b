# SPDX-License-Identifier: BSD-2-Clause
"""A few thousand packets on which everything has to agree, and that a disagreement would be found."""

from dataclasses import replace
from typing import Any

import pytest

from integration import agreement, cases, kinds
from integration.bench import qemu
from integration.provision import Provisioned
from qsteer import programs
from qsteer.model import Build
from qsteer.reference import queue_of
from qsteer.rss import RssConfig
from tests import packets
from tests.kernel import support

EVERYTHING = RssConfig(
    types=packets.ALL_TYPES, key=bytes(range(7, 47)), table=tuple(range(128)), unclassified_queue=999
)


def flipped(config: RssConfig, bit: int) -> RssConfig:
    """The same with another bit ``bit`` of the key, counted from the first one."""
    key = int.from_bytes(config.key) ^ 1 << len(config.key) * 8 - 1 - bit
    return replace(config, key=key.to_bytes(len(config.key)))


def test_every_combination_of_types_and_every_table() -> None:
    configs = [cases.config(3, number) for number in range(cases.TYPES)]
    assert {config.types for config in configs} == set(range(cases.TYPES))
    assert {len(config.table) for config in configs} == {1, 2, 4, 8, 16, 32, 64, 128}
    assert {(len(config.table), period(config)) for config in configs} >= set(cases.SHAPES)
    assert {config.key for config in configs} > {bytes(40), b"\xff" * 40}


def period(config: RssConfig) -> int:
    length = len(config.table)
    return next(
        part for part in (1 << bits for bits in range(8)) if config.table[:part] * (length // part) == config.table
    )


def test_each_bit_of_the_key_decides_a_queue() -> None:
    """A table of 128 entries takes the last 7 of 32 bits: windows of the key that begin at bits 0 to 287."""
    before = [queue_of(packet, EVERYTHING) for packet in cases.bit_packets()]
    for bit in range(320):
        other = flipped(EVERYTHING, bit)
        same = before == [queue_of(packet, other) for packet in cases.bit_packets()]
        assert same == (not 25 <= bit <= 318), bit


@pytest.mark.root
def test_qsteers_programs_agree_with_the_reference() -> None:
    tally = agreement.check(agreement.Job(seed=1, first=0, last=9, per_config=400, elf=b""))
    assert tally.holds, agreement.report(tally, 1)
    assert Build.SHARED_BODY not in support.BUILDS or tally.frozen > tally.configs / 2
    assert tally.packets > 3600 and tally.on_tap == 9 * agreement.ON_TAP and tally.refused
    assert set(tally.runs.values()) == {tally.packets + tally.on_tap}


@pytest.mark.root
def test_qemus_program_is_wrong_in_known_ways_alone(files: Provisioned) -> None:
    elf = qemu.steering_object(files.qemu)
    tally = agreement.check(agreement.Job(seed=2, first=0, last=6, per_config=600, elf=elf))
    assert tally.holds and kinds.UNEXPLAINED not in tally.by_kind, agreement.report(tally, 1)
    assert tally.by_kind.keys() >= {kinds.TAG, kinds.LONG, kinds.AUTHENTICATION, kinds.EX_TYPES, kinds.CUT}
    assert tally.different.keys() == {agreement.QEMU}
    assert sum(count for count, _ in tally.by_kind.values()) == tally.different[agreement.QEMU]


@pytest.mark.root
@pytest.mark.parametrize("bit", [25, 318])
def test_a_wrong_program_is_found(monkeypatch: pytest.MonkeyPatch, bit: int) -> None:
    """One bit of the key is enough, and the report says on which packet."""
    load = programs.load_program

    def wrong(*, config: RssConfig | None = None, **how: Any) -> programs.Program:
        return load(config=config and flipped(config, bit), **how)

    monkeypatch.setattr(programs, "load_program", wrong)
    monkeypatch.setattr(cases, "config", lambda seed, number: EVERYTHING)
    tally = agreement.check(agreement.Job(seed=1, first=0, last=1, per_config=50, elf=b""))
    assert not tally.holds
    assert {name.rpartition(" ")[2] for name in tally.different} == {"static"}
    example = tally.examples[0]
    assert example.packet.hex() in agreement.report(tally, 1)
    assert example.wanted == queue_of(example.packet, EVERYTHING)


@pytest.mark.root
def test_a_program_that_does_not_follow_its_maps_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    write = agreement.Written.set
    seen: set[str] = set()

    def once(self: agreement.Written, config: RssConfig) -> None:
        if self.name not in seen:
            seen.add(self.name)
            write(self, config)

    monkeypatch.setattr(agreement.Written, "set", once)
    tally = agreement.check(agreement.Job(seed=1, first=0, last=2, per_config=50, elf=b""))
    assert not tally.holds
    assert {name.rpartition(" ")[2] for name in tally.different} == {"shared-maps"}


def test_parts_add_up() -> None:
    packet = packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, packets.tcp()))
    tagged = packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, packets.tcp()), tags=(packets.ETH_8021Q,))
    whole, part = agreement.Tally(), agreement.Tally(packets=5)
    for program, sent in (("x, static", packet), (agreement.QEMU, tagged), (agreement.QEMU, packet)):
        part.note(agreement.Difference(program=program, where="tap", packet=sent, config=EVERYTHING, queue=1, wanted=2))
    for _ in range(3):
        whole.add(part)
    assert whole.packets == 15 and whole.different == {"x, static": 3, agreement.QEMU: 6}
    assert {kind: count for kind, (count, _) in whole.by_kind.items()} == {kinds.TAG: 3, kinds.UNEXPLAINED: 3}
    assert len(whole.examples) == 3 and not whole.holds
