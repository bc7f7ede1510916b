# SPDX-License-Identifier: BSD-2-Clause
"""What is wanted of a tap where its libvirt domain has a policy: whose word goes over whose."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qsteer.domainpolicy import Entry, Policy
from qsteer.intent import _REMEMBERED_MAX, Intent
from qsteer.model import Domain, Nic, Source, Tap
from qsteer.plan import Static, Wanted
from qsteer.rss import HashType
from qsteer.settings import AUTO, METADATA_WORDS, Config, Libvirt, Match, Settings
from qsteer.settings import Entry as Configured
from tests.unit.taps import process, tap

MAC = "52:54:00:00:00:01"
NIC = Nic(id="net0", netdev="hostnet0", mac=MAC, rss=False, vhost=False)
KEY = bytes(range(40))
ALL = Libvirt(metadata=METADATA_WORDS)


def domain(policy: Policy | None, name: str = "web1") -> Domain:
    return Domain(name=name, uuid="u", pid=100, interfaces=(), monitor=None, agent=None, policy=policy)


def of(policy: Policy | None, nic: Nic | None = NIC, **changed: object) -> Tap:
    """The tap of a domain with a policy."""
    return tap(domain=domain(policy), nic=nic, **changed)


def says(settings: Settings, *, alias: str | None = None, mac: str | None = None) -> Policy:
    return Policy(entries=(Entry(alias=alias, mac=mac, settings=settings),))


def loads(*entries: Settings, libvirt: Libvirt = ALL) -> Callable[[], Config]:
    """A configuration of entries for every NIC."""
    configured = tuple(Configured(match=Match(), settings=settings) for settings in entries)
    return lambda: Config(entries=configured, libvirt=libvirt)


def static(**said: object) -> Settings:
    return Settings(source=Source.STATIC, static=Static(**said))  # type: ignore[arg-type]


GUEST = Settings(source=Source.GUEST_AGENT)
NOTHING = Settings()
PAUSE = Settings(allow=("pause",))
LEVELS: dict[str, tuple[Settings, Settings, Settings, Settings]] = {
    # configuration, policy, options: what holds
    "nothing": (NOTHING, NOTHING, NOTHING, NOTHING),
    "the configuration": (GUEST, NOTHING, NOTHING, GUEST),
    "the policy": (NOTHING, GUEST, NOTHING, GUEST),
    "the options": (NOTHING, NOTHING, GUEST, GUEST),
    "the policy goes over the configuration": (GUEST, static(table=(0, 1)), NOTHING, static(table=(0, 1))),
    "the options go over the policy": (NOTHING, static(table=(0, 1)), static(table=(2,)), static(table=(2,))),
    "the options go over both": (GUEST, static(table=(0, 1)), Settings(source=AUTO), Settings(source=AUTO)),
    "key by key": (
        static(table=(0, 1), key=KEY),
        static(types=HashType.TCP4, table=(1,)),
        static(unclassified_queue=3),
        static(table=(1,), key=KEY, types=HashType.TCP4, unclassified_queue=3),
    ),
    "the policy takes the configuration's table away": (
        static(table=(0, 1)),
        GUEST,
        static(key=KEY),
        static(key=KEY),
    ),
    "pause of the policy": (NOTHING, PAUSE, NOTHING, PAUSE),
    "pause of the configuration": (PAUSE, GUEST, NOTHING, replace(GUEST, allow=("pause",))),
    "no pause, by the options": (PAUSE, PAUSE, Settings(allow=()), Settings(allow=())),
    "what policies cannot say stays": (
        Settings(replace=True, force=True, required=True),
        GUEST,
        NOTHING,
        replace(GUEST, replace=True, force=True, required=True),
    ),
    "required of the policy": (NOTHING, Settings(required=True), NOTHING, Settings(required=True)),
}


@pytest.mark.parametrize("case", LEVELS)
def test_whose_word_counts(case: str) -> None:
    configured, said, given, holds = LEVELS[case]
    intent = Intent(given, load=loads(configured))
    one = of(says(said))
    assert intent.settings(one) == holds
    assert intent.refused(one) == ()
    wanted = intent(one)
    assert wanted.source == (holds.source if isinstance(holds.source, Source) else None)
    assert (wanted.static, wanted.allow_pause) == (holds.static, "pause" in (holds.allow or ()))
    assert not wanted.identify


def test_what_the_administrator_requires_no_policy_lifts() -> None:
    intent = Intent(NOTHING, load=loads(Settings(required=True)))
    one = of(says(Settings(required=False)))
    assert intent.settings(one).required and intent.refused(one) == ("required",)


def test_a_table_is_another_source() -> None:
    """Whose words of it count, but not that of the source, keeps to the one that the administrator chose."""
    words = ("table", "unclassified-queue")
    cases = ((Source.DEVICE_STATE, False), (Source.STATIC, True), (None, True))
    for configured, counts in cases:
        intent = Intent(NOTHING, load=loads(Settings(source=configured), libvirt=Libvirt(metadata=words)))
        one = of(says(Settings(source=Source.STATIC, static=Static(unclassified_queue=3))))
        assert intent.refused(one) == (() if counts else ("unclassified-queue",))
        assert intent.settings(one).source == (Source.STATIC if counts else configured)


REFUSED: dict[str, tuple[Settings, tuple[str, ...], Settings, tuple[str, ...]]] = {
    # policy, the words that count: what holds over a key and a source of the configuration's, what is refused
    "nothing counts": (static(table=(0, 1)), (), static(key=KEY), ("table",)),
    "the table only": (
        static(table=(0, 1), key=bytes(40)),
        ("table",),
        static(table=(0, 1), key=KEY),
        ("key",),
    ),
    "no other source": (GUEST, ("table", "key", "pause"), static(key=KEY), ("source",)),
    "no auto, either": (Settings(source=AUTO), (), static(key=KEY), ("source",)),
    "another source, without pause": (
        Settings(source=Source.DEVICE_STATE, allow=("pause",)),
        Libvirt().metadata,
        Settings(source=Source.DEVICE_STATE),
        ("pause",),
    ),
    "not required": (Settings(required=False), (), static(key=KEY), ("required",)),
    "required": (Settings(required=True), ("source",), static(key=KEY), ("required",)),
    "all of it": (static(table=(0,)), METADATA_WORDS, static(table=(0,), key=KEY), ()),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_configuration_does_not_let_count(case: str) -> None:
    said, words, holds, refused = REFUSED[case]
    intent = Intent(Settings(), load=loads(static(key=KEY), libvirt=Libvirt(metadata=words)))
    one = of(says(said))
    assert intent.settings(one) == holds
    assert intent.refused(one) == refused


def test_who_administers_the_host_can_still_say_it() -> None:
    intent = Intent(Settings(allow=("pause",)), load=loads(libvirt=Libvirt(metadata=())))
    one = of(says(Settings(source=Source.DEVICE_STATE, allow=("pause",))))
    assert intent(one) == Wanted(allow_pause=True)
    assert intent.refused(one) == ("source", "pause")


def test_without_a_policy_nothing_is_refused() -> None:
    intent = Intent(Settings(), load=loads(GUEST, libvirt=Libvirt(metadata=())))
    for one in (of(None), of(Policy()), tap(domain=None)):
        assert intent.settings(one) == GUEST
        assert intent.refused(one) == ()


def test_of_a_policy_with_mistakes_only_what_insists() -> None:
    one = of(Policy(required=True, mistakes=("x",)))
    assert Intent(Settings(), load=loads(GUEST)).settings(one) == replace(GUEST, required=True)


# --- Which NIC it is -------------------------------------------------------------------------------------------------

TABLE = static(table=(0, 1))
WITHOUT_MAC = replace(NIC, mac=None)
OF_NICS: dict[str, tuple[Policy, Nic | None, bool, bool]] = {
    # the NIC: whether the table is its, whether QEMU has to be asked which it is
    "every, known": (says(TABLE), NIC, True, False),
    "every, unknown": (says(TABLE), None, True, False),
    "alias": (says(TABLE, alias="net0"), NIC, True, False),
    "alias of the netdev": (says(TABLE, alias="hostnet0"), NIC, True, False),
    "another alias": (says(TABLE, alias="net1"), NIC, False, False),
    "alias, unknown": (says(TABLE, alias="net0"), None, False, True),
    "alias, without MAC": (says(TABLE, alias="net0"), WITHOUT_MAC, True, False),
    "MAC": (says(TABLE, mac=MAC), NIC, True, False),
    "MAC in capitals": (says(TABLE, mac="52:54:00:aa:00:01"), replace(NIC, mac="52:54:00:AA:00:01"), True, False),
    "another MAC": (says(TABLE, mac="52:54:00:00:00:02"), NIC, False, False),
    "MAC, unknown": (says(TABLE, mac=MAC), None, False, True),
    "MAC, without MAC": (says(TABLE, mac=MAC), WITHOUT_MAC, False, True),
    "alias and MAC": (says(TABLE, alias="net0", mac=MAC), NIC, True, False),
    "alias and MAC, without MAC": (says(TABLE, alias="net0", mac=MAC), WITHOUT_MAC, False, True),
}


@pytest.mark.parametrize("case", OF_NICS)
def test_which_nic(case: str) -> None:
    policy, nic, is_its, identify = OF_NICS[case]
    wanted = Intent(Settings(), load=loads())(of(policy, nic))
    assert (wanted.static == TABLE.static, wanted.identify) == (is_its, identify)
    assert not Intent(Settings(), refresh=True, load=loads())(of(policy, nic)).identify


def test_only_a_vm_is_asked() -> None:
    assert not Intent(Settings(), load=loads())(of(says(TABLE, alias="net0"), None, holder=None)).identify


def test_a_policy_of_one_domain_is_no_other_domains() -> None:
    """Taps that are alike in all but that."""
    intent = Intent(Settings(), load=loads())
    policies = (None, Policy(), says(TABLE), says(static(table=(2,))), says(GUEST), says(TABLE, alias="net7"))
    expected = [Static(), Static(), TABLE.static, Static(table=(2,)), Static(), Static()]
    for _ in range(2):
        assert [intent(of(policy)).static for policy in policies] == expected
    assert intent(of(says(GUEST))).source is Source.GUEST_AGENT


def test_a_policy_that_is_changed_counts_at_once() -> None:
    intent = Intent(Settings(), load=loads())
    assert [intent(of(says(static(table=(queue,))))).static.table for queue in range(5)] == [
        (0,),
        (1,),
        (2,),
        (3,),
        (4,),
    ]


def test_the_same_is_remembered_and_not_for_ever() -> None:
    intent = Intent(Settings(), load=loads())
    assert intent(of(says(TABLE))) is intent(of(says(static(table=(0, 1)))))
    first = intent(of(says(TABLE)))
    for number in range(_REMEMBERED_MAX):
        intent(of(says(static(table=(number,)))))
    assert len(intent._remembered) <= _REMEMBERED_MAX
    assert intent(of(says(TABLE))) == first


def test_what_is_let_count_is_read_again() -> None:
    words: list[str] = []
    intent = Intent(Settings(), load=lambda: Config(libvirt=Libvirt(metadata=tuple(words))))
    one = of(says(TABLE))
    assert intent(one) == Wanted()
    words.append("table")
    assert intent(one) == Wanted()
    intent.reload()
    assert intent(one) == Wanted(source=Source.STATIC, static=TABLE.static)


def test_entries_of_the_configuration_for_the_domain() -> None:
    """By the domain's name, which goes before that of QEMU's command line."""
    configured = Configured(match=Match(vm=("web1",)), settings=static(key=KEY))
    one = of(says(TABLE), holder=process(name="other"))
    assert Intent(Settings(), load=lambda: Config(entries=(configured,)))(one).static == Static(key=KEY, table=(0, 1))
