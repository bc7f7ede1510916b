# SPDX-License-Identifier: BSD-2-Clause
"""What holds for a NIC when several have had their say."""

import dataclasses
import itertools
import random
from typing import Any

import pytest

from qsteer.model import Source
from qsteer.plan import Static, Wanted
from qsteer.rss import HashType
from qsteer.settings import AUTO, METADATA_WORDS, Config, Entry, Libvirt, Match, Settings, fold, wanted

KEY = bytes(range(40))
TABLE = Settings(source=Source.STATIC, static=Static(table=(0, 1)))


def test_key_by_key() -> None:
    low = Settings(allow=("pause",), queues=4, mtu=9000, bridge="br0", replace=True)
    high = Settings(queues=8, bridge="", replace=False, allow=())
    assert fold((low, high)) == Settings(allow=(), queues=8, mtu=9000, bridge="", replace=False)
    assert fold(()) == Settings()
    assert fold((low,)) == low


def test_the_static_configuration_is_put_together_key_by_key() -> None:
    levels = (
        Settings(static=Static(table=(0, 1), types=HashType.TCP4)),
        Settings(static=Static(key=KEY)),
        Settings(source=Source.STATIC),
        Settings(static=Static(types=HashType(0), unclassified_queue=0)),
    )
    made = Static(table=(0, 1), key=KEY, types=HashType(0), unclassified_queue=0)
    assert fold(levels) == Settings(source=Source.STATIC, static=made)


@pytest.mark.parametrize("source", [AUTO, *Source])
def test_another_source_takes_the_tables_below_away(source: Any) -> None:
    above = fold((TABLE, Settings(source=source)))
    assert above.source == source
    assert bool(above.static) == (source is Source.STATIC)
    assert fold((Settings(source=source), TABLE)) == TABLE


def test_folding_is_in_any_grouping_the_same() -> None:
    """So that a saved file may hold what was folded."""
    choices = (
        Settings(),
        TABLE,
        Settings(source=AUTO),
        Settings(source=Source.GUEST_AGENT, allow=()),
        Settings(source=Source.STATIC),
        Settings(source=Source.STATIC, static=Static(key=KEY), replace=True),
    )
    for levels in itertools.product(choices, repeat=3):
        first, second, third = levels
        assert fold(levels) == fold((fold((first, second)), third))
        # Not so the other way round: what takes tables away has done so, and does not do it again.
        if AUTO not in (second.source, third.source) and Source.GUEST_AGENT not in (second.source, third.source):
            assert fold(levels) == fold((first, fold((second, third))))


def test_what_is_wanted_of_a_tap() -> None:
    assert wanted(Settings()) == wanted(Settings(source=AUTO)) == Wanted()
    assert wanted(TABLE) == Wanted(source=Source.STATIC, static=Static(table=(0, 1)))
    assert wanted(Settings(source=Source.GUEST_AGENT, allow=("pause",), replace=True, force=False)) == Wanted(
        source=Source.GUEST_AGENT, allow_pause=True, replace=True
    )
    assert wanted(TABLE, refresh=True, expect="0" * 12) == Wanted(refresh=True, expect="0" * 12)
    assert wanted(Settings(), if_absent=True, identify=True) == Wanted(if_absent=True, identify=True)


NIC = {"vm": "web-1", "nics": ("net0", "hostnet0"), "mac": "52:54:00:12:34:56", "dev": "vnet0", "bridge": "br0"}


@pytest.mark.parametrize(
    ("match", "matches"),
    [
        ({}, True),
        ({"vm": ("web-*",)}, True),
        ({"vm": ("Web-*",)}, False),
        ({"vm": ("db", "web-?")}, True),
        ({"vm": ("web-1",), "nic": ("hostnet0",)}, True),
        ({"vm": ("web-1",), "nic": ("net1",)}, False),
        ({"nic": ("net[0-3]",)}, True),
        ({"mac": ("52:54:00:*",)}, True),
        ({"dev": ("vnet[!0]",)}, False),
        ({"bridge": ("br?",)}, True),
        ({"bridge": ("br",)}, False),
    ],
)
def test_who_matches(match: dict[str, tuple[str, ...]], matches: bool) -> None:
    settings = Settings(queues=3)
    config = Config(entries=(Entry(match=Match(**match), settings=settings),))
    assert config.settings(**NIC) == (settings if matches else Settings())  # type: ignore[arg-type]
    assert all(config.matches_on(kind) == (kind in match) for kind in ("vm", "nic", "mac", "dev", "bridge"))


def test_what_is_not_known_matches_nothing() -> None:
    for kind in ("vm", "nic", "mac", "dev", "bridge"):
        config = Config(entries=(Entry(match=Match(**{kind: ("*",)}), settings=Settings(queues=3)),))
        assert config.settings() == Settings(), kind


def test_a_pattern_that_is_a_name_is_only_that_name() -> None:
    """A name with a bracket in it is no pattern for itself: "[a]" is "a"."""
    config = Config(entries=(Entry(match=Match(vm=("[a]",)), settings=Settings(queues=3)),))
    assert config.settings(vm="a").queues == 3
    assert config.settings(vm="[a]").queues is None


def test_a_mac_in_capitals() -> None:
    config = Config(entries=(Entry(match=Match(mac=("52:54:00:ab:*",)), settings=Settings(queues=3)),))
    assert config.settings(mac="52:54:00:AB:00:01").queues == 3


def test_of_libvirts_policies_all_counts_but_to_stop_a_vm() -> None:
    assert Libvirt() == Config().libvirt
    assert Libvirt().steer == "all"
    assert set(METADATA_WORDS) - set(Libvirt().metadata) == {"pause"}


def test_later_entries_win() -> None:
    entries = tuple(
        Entry(match=Match(vm=(vm,)), settings=Settings(queues=queues))
        for vm, queues in (("*", 2), ("web-1", 4), ("web-*", 8), ("db", 16))
    )
    assert Config(entries=entries).settings(vm="web-1").queues == 8


def test_no_setting_is_forgotten() -> None:
    """Each field goes over the same field below, whatever is added."""
    numbers = random.Random(1)
    for field in dataclasses.fields(Settings):
        if field.name in ("source", "static"):
            continue
        low, high = (Settings(**{field.name: numbers.random()}) for _ in range(2))  # type: ignore[arg-type]
        assert fold((low, high)) == high and fold((high, low)) == low
        assert fold((low, Settings())) == low
