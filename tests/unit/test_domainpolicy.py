# SPDX-License-Identifier: BSD-2-Clause
"""The policy in a domain: what parser and schema take, whom it is for, what of it counts, and what hostile ones do."""

import random
import re
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lxml import etree

from qsteer import domainpolicy, libvirt
from qsteer.domainpolicy import INTERFACES_MAX, MISTAKES_MAX, NAMESPACE, Entry, Policy, limited, parse, to_xml
from qsteer.model import Engine, Source
from qsteer.plan import Static
from qsteer.rss import HashType, equal_table, weighted_table
from qsteer.settings import AUTO, METADATA_WORDS, Libvirt, Settings

SCHEMA = etree.RelaxNG(etree.parse(Path(__file__).parents[2] / "docs" / "qsteer-domain.rng"))
KEY = bytes(range(40))
HEX = KEY.hex(":")
MAC = "52:54:00:aa:bb:cc"


def steering(content: str = "", attributes: str = "") -> str:
    return f'<q:steering xmlns:q="{NAMESPACE}" {attributes}>{content}</q:steering>'


def nic(attributes: str) -> str:
    return steering(f"<q:interface {attributes}/>")


def parsed(document: str) -> Policy:
    return parse(ElementTree.fromstring(document))


def said(attributes: str) -> Settings:
    """What a policy of one interface says."""
    policy = parsed(nic(attributes))
    assert not policy.mistakes
    (entry,) = policy.entries
    return entry.settings


# --- Parser and schema -----------------------------------------------------------------------------------------------

GOOD = {
    "nothing": steering(),
    "an interface that says nothing": nic(""),
    "as the default namespace": f'<steering xmlns="{NAMESPACE}"><interface equal="3"/></steering>',
    "required": steering(attributes='required="yes"'),
    "not required": steering(attributes='required="no"'),
    "an interface that is required": nic('required="yes" alias="net0"'),
    "an alias of the user's": nic('alias="ua-3c0f_x"'),
    "an alias with a blank": nic('alias="a b"'),
    "an alias of other letters": nic('alias="größe"'),
    "the longest alias": nic(f'alias="{"é" * 1024}"'),
    "a MAC": nic(f'mac="{MAC}"'),
    "a MAC in capitals": nic(f'mac="{MAC.upper()}"'),
    "alias and MAC": nic(f'alias="net0" mac="{MAC}"'),
    **{f"source {source}": nic(f'source="{source}"') for source in (AUTO, *Source)},
    "engine auto": nic('engine="auto"'),
    "engine kernel": nic('engine="kernel"'),
    "engine ebpf": nic('engine="ebpf" source="guest-agent"'),
    "all types": nic('types="ip4,tcp4,udp4,ip6,tcp6,udp6,ip-ex,tcp-ex,udp-ex"'),
    "types as ethtool's users write them": nic('types=" TCP4 , Udp_Ex"'),
    "no types": nic('types="none"'),
    "a key with colons": nic(f'key="{HEX}"'),
    "a key of short bytes": nic(f'key="{":".join("0" * 40)}"'),
    "a key without colons": nic(f'key="{KEY.hex().upper()}"'),
    "a key in groups": nic(f'key=" {KEY.hex(" ", 4)} "'),
    "a table of one": nic('table="65535"'),
    "a table with blanks": nic('table=" 0, 1 ,2,00003&#10;"'),
    "the longest table": nic(f'table="{",".join(map(str, range(128)))}"'),
    "equal": nic('equal="3"'),
    "equal, with zeros": nic('equal="00003"'),
    "equal, the most": nic('equal="65535"'),
    "weight": nic('weight="0,1,2"'),
    "weight, many": nic(f'weight="{",".join("1" * 200)}"'),
    "weight, a single zero among": nic('weight="0,0,10"'),
    "unclassified": nic('unclassified-queue="0"'),
    "static by name": nic('source="static" equal="2"'),
    "pause": nic('source="device-state" allow="pause"'),
    "pause twice": nic('allow="pause, pause"'),
    "all of it": nic(
        f'alias="net0" mac="{MAC}" engine="ebpf" source="static" types="tcp4" key="{HEX}" table="0,1"'
        ' unclassified-queue="3" allow="pause" required="no"'
    ),
    "the most interfaces": steering("<q:interface/>" * INTERFACES_MAX),
    "blanks and comments": steering("\n <!-- one --> <q:interface> <!-- two --> \n</q:interface>\t<?three?>\n"),
    "another prefix": nic('alias="a"').replace("q:", "qsteer:").replace(":q=", ":qsteer="),
}
BAD = {
    "required by another word": steering(attributes='required="true"'),
    "required with a blank": steering(attributes='required=" yes"'),
    "required by an empty word": steering(attributes='required=""'),
    "an attribute of an interface's": steering(attributes='equal="3"'),
    "an attribute of nobody's": nic('queues="3"'),
    "an attribute in capitals": nic('Alias="net0"'),
    "an attribute of the namespace": nic('q:alias="net0"'),
    "an attribute of XML's": nic('xml:space="preserve"'),
    "an attribute of another namespace": nic('xmlns:x="urn:x" x:alias="net0"'),
    "no alias": nic('alias=""'),
    "an alias of two lines": nic('alias="a&#10;b"'),
    "an alias with an escape": nic('alias="a&#x9b;b"'),
    "an alias that turns around": nic('alias="&#x202e;net0"'),
    "an alias that is too long": nic(f'alias="{"é" * 1025}"'),
    "a short MAC": nic('mac="52:54:00"'),
    "a MAC with dashes": nic('mac="52-54-00-aa-bb-cc"'),
    "a MAC with a blank": nic(f'mac="{MAC} "'),
    "a pattern of a MAC": nic('mac="52:54:00:*"'),
    "an unknown source": nic('source="guest"'),
    "no source": nic('source=""'),
    "an unknown engine": nic('engine="tc"'),
    "an unknown type": nic('types="tcp4,tcp"'),
    "an empty type": nic('types="tcp4,"'),
    "types that are not said": nic('types=""'),
    "none among types": nic('types="none,tcp4"'),
    "a short key": nic('key="6d:5a"'),
    "a key of 41 bytes": nic(f'key="{HEX}:00"'),
    "a key of no digits": nic(f'key="{"zz:" * 39}zz"'),
    "a random key": nic('key="random"'),
    "a key of both kinds": nic(f'key="{KEY[:39].hex()}:00"'),
    "a key with blanks": nic(f'key="{HEX.replace(":", ": ")}"'),
    "an empty table": nic('table=""'),
    "a table with a hole": nic('table="0,,1,2"'),
    "a table out of range": nic('table="0,65536"'),
    "a table of minus": nic('table="0,-1"'),
    "a table of blanks": nic('table="0 1"'),
    "a table of other digits": nic('table="&#x660;,&#x661;"'),
    "a table with a blank of another kind": nic('table="0,&#xa0;1"'),
    "equal to nothing": nic('equal="0"'),
    "equal to 00": nic('equal="00"'),
    "equal to too many": nic('equal="65536"'),
    "equal with a blank": nic('equal="3 "'),
    "equal with a sign": nic('equal="+3"'),
    "weights of nothing": nic('weight="0, 00"'),
    "no weight": nic('weight=""'),
    "too much text": nic(f'weight="{",".join("1" * 513)}"'),
    "an unclassified queue with a blank": nic('unclassified-queue=" 1"'),
    "an unclassified queue of six digits": nic('unclassified-queue="000001"'),
    "table and equal": nic('table="0,1" equal="2"'),
    "equal and weight": nic('equal="2" weight="1,1"'),
    "all three": nic('table="0" equal="1" weight="1"'),
    "a table, and a guest's source": nic('table="0,1" source="guest-agent"'),
    "a key, and auto": nic(f'key="{HEX}" source="auto"'),
    "allow nothing": nic('allow=""'),
    "allow something else": nic('allow="pause,taint"'),
    "text": steering("equal 3"),
    "text after an interface": steering("<q:interface/>;"),
    "text in an interface": steering("<q:interface>net0</q:interface>"),
    "text of another kind of blank": steering("&#xa0;"),
    "an element in an interface": steering("<q:interface><q:interface/></q:interface>"),
    "another element": steering("<q:nic/>"),
    "an element without a namespace": steering("<interface/>"),
    "an element of another namespace": steering('<interface xmlns="urn:x"/>'),
    "steering in steering": steering(steering()),
}
# What RELAX NG has no words for, or only a hundred of them: taken by the schema, and by the parser not.
UNSAID = {
    "a table that has no power of two of entries": nic('table="0,1,2"'),
    "a table of more than 128": nic(f'table="{",".join("0" * 256)}"'),
    "more than 64 interfaces": steering("<q:interface/>" * (INTERFACES_MAX + 1)),
}


@pytest.mark.parametrize("case", GOOD)
def test_a_good_policy(case: str) -> None:
    assert parsed(GOOD[case]).mistakes == ()
    SCHEMA.assertValid(etree.fromstring(GOOD[case]))


@pytest.mark.parametrize("case", BAD)
def test_a_bad_policy(case: str) -> None:
    policy = parsed(BAD[case])
    assert policy.mistakes and not policy.entries
    assert not SCHEMA.validate(etree.fromstring(BAD[case]))


@pytest.mark.parametrize("case", UNSAID)
def test_what_the_schema_cannot_say(case: str) -> None:
    assert parsed(UNSAID[case]).mistakes
    SCHEMA.assertValid(etree.fromstring(UNSAID[case]))


VALUES = {
    "alias": ("net0", "a b", "", "&#xa0;", "&#9;"),
    "mac": (MAC, "52:54:00:aa:bb", ""),
    "source": ("auto", "static", "guest-agent", " static", "x"),
    "engine": ("auto", "ebpf", "kernel", "EBPF"),
    "types": ("tcp4", "ip-ex, UDP6", "none", "", "None", "tcp-4", "tcp4;udp4"),
    "key": (HEX, KEY.hex(), HEX[:-1], HEX + " ", KEY.hex() + "0", ":" + HEX),
    "table": ("0,1", "3", "", "1,", " 65535 , 0", "1,1.5", "0x1,0", "1_0"),
    "equal": ("1", "0", "65535", "65536", "99999", "1 "),
    "weight": ("1,2,3", "0,0", "0,1", "000000", "7"),
    "unclassified-queue": ("0", "60000", "70000", "-1"),
    "allow": ("pause", "pause,pause", " pause ", "force", "pause,"),
    "required": ("yes", "no", "YES", "1"),
    "queues": ("4",),
}


def test_parser_and_schema_agree_on_whatever_there_is() -> None:
    """Any attributes together; what decides is never a table's length, which is 1 or 2."""
    numbers = random.Random(7)
    valid = 0
    for _ in range(4000):
        names = numbers.sample(list(VALUES), numbers.randrange(1, 4))
        document = nic(" ".join(f'{name}="{numbers.choice(VALUES[name])}"' for name in names))
        is_valid = SCHEMA.validate(etree.fromstring(document))
        assert is_valid == (not parsed(document).mistakes), document
        valid += is_valid
    assert 600 < valid < 3400


def test_parser_and_schema_agree_on_numbers() -> None:
    numbers = random.Random(5)
    some = [*range(130), *range(9900, 10100), *range(59_900, 60_100), *range(64_900, 65_700), 99_999, 100_000]
    texts = [str(number) for number in (*some, *(numbers.randrange(70_000) for _ in range(500)))]
    for text in (*texts, *(f"0{text}" for text in texts)):
        for name, value in (("unclassified-queue", text), ("equal", text), ("table", f"1,{text}"), ("weight", text)):
            document = nic(f'{name}="{value}"')
            assert SCHEMA.validate(etree.fromstring(document)) == (not parsed(document).mistakes), document


def test_parser_and_schema_agree_on_keys() -> None:
    """Of every length near the right one, with blanks and without."""
    numbers = random.Random(4)
    valid = 0
    for _ in range(3000):
        text = numbers.choice((":", "", " ")).join(
            numbers.randbytes(1).hex() for _ in range(numbers.choice((39, 40, 41)))
        )
        if numbers.random() < 0.5:
            at = numbers.randrange(len(text))
            text = text[:at] + numbers.choice(("", " ", ":", "0", "g", "&#10;")) + text[at + numbers.randrange(2) :]
        document = nic(f'key="{text}"')
        is_valid = SCHEMA.validate(etree.fromstring(document))
        assert is_valid == (not parsed(document).mistakes), document
        valid += is_valid
    assert 500 < valid < 2500


# --- What it says ----------------------------------------------------------------------------------------------------


def test_all_that_can_be_said_of_a_nic() -> None:
    (entry,) = parsed(GOOD["all of it"]).entries
    static = Static(types=HashType.TCP4, key=KEY, table=(0, 1), unclassified_queue=3)
    settings = Settings(source=Source.STATIC, engine=Engine.EBPF, static=static, allow=("pause",), required=False)
    assert entry == Entry(alias="net0", mac=MAC, settings=settings)


def test_short_forms() -> None:
    assert said('equal="3"') == Settings(source=Source.STATIC, static=Static(table=equal_table(3)))
    assert said('weight="1,0,2"').static.table == weighted_table((1, 0, 2))
    assert said('types="none"') == Settings(source=Source.STATIC, static=Static(types=HashType(0)))
    assert said('source="auto"') == Settings(source=AUTO)
    assert said('allow="pause,pause"').allow == ("pause", "pause")
    assert said("") == Settings()


def again(policy: Policy) -> Policy:
    """What is written, read as libvirt hands it back: with the namespace that it has put in."""
    document = to_xml(policy).replace("<steering", f'<steering xmlns="{NAMESPACE}"', 1)
    SCHEMA.assertValid(etree.fromstring(document))
    return parsed(document)


def any_settings(numbers: random.Random) -> Settings:
    table = (
        None,
        (numbers.randrange(65536),),
        tuple(numbers.randrange(65536) for _ in range(128)),
        equal_table(numbers.randrange(1, 200)),
        weighted_table((1, 0, numbers.randrange(9))),
        (0, 1, 2, 3),
    )
    static = Static(
        types=numbers.choice((None, HashType(numbers.randrange(512)), HashType(0))),
        key=numbers.choice((None, numbers.randbytes(40))),
        table=numbers.choice(table),
        unclassified_queue=numbers.choice((None, 0, numbers.randrange(65536))),
    )
    if numbers.random() < 0.4:
        static = Static()
    return Settings(
        source=Source.STATIC if static else numbers.choice((None, AUTO, *Source)),
        engine=numbers.choice((None, AUTO, *Engine)),
        static=static,
        allow=numbers.choice((None, ("pause",))),
        required=numbers.choice((None, True, False)),
    )


def test_what_is_written_is_read_again() -> None:
    numbers = random.Random(8)
    for _ in range(200):
        entries = tuple(
            Entry(
                alias=numbers.choice((None, "net0", "ua-1", "a&<>\"' b", "ä", "x" * 1024)),
                mac=numbers.choice((None, MAC)),
                settings=any_settings(numbers),
            )
            for _ in range(numbers.choice((0, 1, 2, 5, INTERFACES_MAX)))
        )
        policy = Policy(entries=entries, required=numbers.choice((None, True, False)))
        assert again(policy) == policy


def test_a_spread_is_written_in_one_word() -> None:
    written = to_xml(Policy(entries=(Entry(settings=said('equal="3"')), Entry(settings=said('table="0,1"')))))
    assert written == '<steering>\n  <interface equal="3" />\n  <interface table="0,1" />\n</steering>'


# --- Whom it is for --------------------------------------------------------------------------------------------------

OF_NICS = parsed(
    steering(
        '<q:interface types="tcp4" allow="pause"/>'
        '<q:interface alias="net0" equal="3"/>'
        f'<q:interface mac="{MAC}" unclassified-queue="7" required="no"/>'
        f'<q:interface alias="net1" mac="{MAC}" source="guest-agent"/>',
        'required="yes"',
    )
)
EVERY = Static(types=HashType.TCP4)
NICS: dict[str, tuple[tuple[str, ...], str | None, Settings]] = {
    "no other": (("net7",), None, Settings(source=Source.STATIC, static=EVERY, allow=("pause",), required=True)),
    "unknown": ((), None, Settings(source=Source.STATIC, static=EVERY, allow=("pause",), required=True)),
    "by its alias": (
        ("net0", "hostnet0"),
        "52:54:00:00:00:01",
        Settings(
            source=Source.STATIC,
            static=Static(types=HashType.TCP4, table=equal_table(3)),
            allow=("pause",),
            required=True,
        ),
    ),
    "by its MAC, in capitals": (
        ("net7",),
        MAC.upper(),
        Settings(
            source=Source.STATIC,
            static=Static(types=HashType.TCP4, unclassified_queue=7),
            allow=("pause",),
            required=False,
        ),
    ),
    "by both": (
        ("net0",),
        MAC,
        Settings(
            source=Source.STATIC,
            static=Static(types=HashType.TCP4, table=equal_table(3), unclassified_queue=7),
            allow=("pause",),
            required=False,
        ),
    ),
    "by an entry of both": (
        ("net1",),
        MAC,
        Settings(source=Source.GUEST_AGENT, allow=("pause",), required=False),
    ),
    "not by half of it": (
        ("net1",),
        "52:54:00:00:00:01",
        Settings(source=Source.STATIC, static=EVERY, allow=("pause",), required=True),
    ),
}


@pytest.mark.parametrize("case", NICS)
def test_what_is_said_of_one_nic(case: str) -> None:
    nics, mac, expected = NICS[case]
    assert OF_NICS.settings(nics, mac) == expected


def test_whether_an_entry_is_about_an_alias_or_a_mac() -> None:
    for document, kinds in (
        (nic('equal="3"'), set()),
        (nic('alias="a"'), {"alias"}),
        (nic(f'mac="{MAC}"'), {"mac"}),
        (steering(f'<q:interface alias="a"/><q:interface mac="{MAC}"/>'), {"alias", "mac"}),
    ):
        assert {kind for kind in ("alias", "mac") if parsed(document).matches_on(kind)} == kinds


# --- What of it counts -----------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[Settings, ...]] = {
    "source": (Settings(source=AUTO), Settings(source=Source.STATIC), Settings(source=Source.GUEST_AGENT)),
    "engine": (Settings(engine=AUTO), Settings(engine=Engine.EBPF), Settings(engine=Engine.KERNEL)),
    "table": (said('equal="2"'), said('table="0"'), said('weight="0,1"')),
    "key": (said(f'key="{HEX}"'),),
    "types": (said('types="tcp4"'), said('types="none"')),
    "unclassified-queue": (said('unclassified-queue="0"'),),
    "required": (Settings(required=True), Settings(required=False)),
    "pause": (Settings(allow=("pause",)),),
}


def test_each_word_has_its_cases() -> None:
    assert WORDS.keys() == set(METADATA_WORDS)
    everything = (
        said(f'engine="kernel" types="tcp4" key="{HEX}" equal="2" unclassified-queue="1" allow="pause" required="yes"'),
    )
    refused = {word for one in (*everything, *WORDS["source"]) for word in limited(one, ())[1]}
    assert refused == set(METADATA_WORDS)


@pytest.mark.parametrize("word", METADATA_WORDS)
def test_a_word_counts_where_the_configuration_says_so(word: str) -> None:
    for one in WORDS[word]:
        assert limited(one, (word,)) == (one, ())
        assert limited(one, METADATA_WORDS) == (one, ())
        others = [other for other in METADATA_WORDS if other != word]
        assert limited(one, others) == limited(one, ()) == (Settings(), (word,))


def test_what_is_left_of_a_static_configuration() -> None:
    one = said(f'types="tcp4" key="{HEX}" equal="2" source="static"')
    left, refused = limited(one, ("types", "table"))
    assert left == Settings(source=Source.STATIC, static=Static(types=HashType.TCP4, table=equal_table(2)))
    assert refused == ("key",)
    assert limited(one, ("source",)) == (Settings(), ("table", "key", "types"))


def test_who_can_write_a_domain_does_not_stop_it() -> None:
    """By default."""
    assert limited(said('source="device-state" allow="pause"'), Libvirt().metadata) == (
        Settings(source=Source.DEVICE_STATE),
        ("pause",),
    )


def test_nothing_said_nothing_refused() -> None:
    assert limited(Settings(), ()) == (Settings(), ())


# --- Mistakes --------------------------------------------------------------------------------------------------------


def test_mistakes_leave_only_what_insists() -> None:
    for attributes, interfaces, required in (
        ("", '<q:interface equal="2"/><q:nic/>', None),
        ('required="yes"', '<q:interface equal="0"/>', True),
        ('required="no"', '<q:interface equal="0" required="no"/>', False),
        ('required="maybe"', "", True),
        ("", '<q:interface alias="a" required="true"/>', True),
        ("", '<q:interface alias="a" required="yes"/><q:interface equals="2"/>', True),
        ('required="no"', '<q:interface equals="2" required="yes"/>', True),
        ("", '<q:interface/>text<q:interface required="yes"/>', True),
    ):
        policy = parsed(steering(interfaces, attributes))
        assert policy.mistakes
        assert policy == Policy(required=required, mistakes=policy.mistakes)
        assert policy.settings(("net0",), None) == Settings(required=required)


TOLD = {
    "the schema's own words": (BAD["an attribute of an interface's"], "steering: unknown attribute equal (known: requ"),
    "by its alias": (nic('alias="net0" equal="0"'), "interface net0: equal: equal wants at least 1 queue"),
    "by its MAC": (nic(f'mac="{MAC}" equal="x"'), f'interface {MAC}: equal: queues: "x" is not a whole number from 0'),
    "by its number": (steering('<q:interface/><q:interface source="x"/>'), 'interface 2: source: "x" is none of auto'),
    "unknown": (nic('a="1" b="2" c="3"'), "interface 1: unknown attribute a and 2 more (known: alias, mac, source,"),
    "two tables": (nic('equal="1" table="0"'), "interface 1: table and equal: one of them"),
    "whose table": (nic('equal="1" source="auto"'), "interface 1: source auto takes the guest's table, not one of"),
    "another element": (steering("<q:nic/>"), "<nic> is not interface of the namespace urn:qsteer:domain:1"),
    "text": (steering("x"), "text, or an element, where none belongs"),
    "letters": (nic('types="tcp&#xff14;"'), "interface 1: types: plain letters and digits are wanted"),
    "long": (BAD["too much text"], "interface 1: weight: more than 1024 characters"),
    "many": (UNSAID["more than 64 interfaces"], "more than 64 elements"),
    "truth": (nic('required="1"'), 'interface 1: required: "1" is neither yes nor no'),
    "pause": (nic('allow="kill"'), 'interface 1: allow: "kill" is none of pause'),
    "mac": (nic('mac="a"'), 'interface a: mac: "a" is not a MAC'),
    "alias": (nic('alias=""'), "interface 1: alias: an alias is wanted, such as net0, or ua-mine"),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_a_mistake_says(case: str) -> None:
    document, told = TOLD[case]
    (mistake,) = parsed(document).mistakes
    assert mistake.startswith(told), mistake


def check_mistakes(policy: Policy) -> None:
    """A line each, for any terminal, and not many."""
    assert len(policy.mistakes) <= MISTAKES_MAX + 1
    assert all(mistake.isprintable() and len(mistake) < 500 for mistake in policy.mistakes)
    assert not (policy.mistakes and policy.entries)


HOSTILE = {
    "thousands of attributes": steering(attributes=" ".join(f'a{i}="{i}"' for i in range(20_000))),
    "thousands of attributes each": steering(("<q:interface " + " ".join(f"a{i}=''" for i in range(300)) + "/>") * 64),
    "thousands of elements": steering("<q:x/>" * 20_000),
    "thousands of mistakes": steering('<q:interface equal="0" table="," source="x" mac="" alias=""/>' * 5000),
    "a long name": steering(f"<q:{'x' * 100_000}/>"),
    "a long attribute's name": nic(f'{"x" * 100_000}="1"'),
    "long values": nic(" ".join(f'{name}="{"9" * 100_000}"' for name in VALUES)),
    "values up to the limit": nic(" ".join(f'{name}="{"9" * 1024}"' for name in VALUES)),
    "escapes": nic(" ".join(f'{name}="&#x9b;31m&#x202e;&#10;&#13;"' for name in VALUES)),
    "depth": steering("<q:interface>" * 20_000 + "</q:interface>" * 20_000),
    "text": steering("x" * 1_000_000),
    "blanks": nic('key="' + " " * 1000 + '"'),
    "commas": nic('table="' + "," * 1000 + '"'),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_policy(case: str) -> None:
    element = ElementTree.fromstring(HOSTILE[case])
    began = time.process_time()
    policy = parse(element)
    assert time.process_time() - began < 0.05
    assert policy.mistakes
    check_mistakes(policy)


def test_mistakes_that_are_not_shown_are_counted() -> None:
    policy = parsed(steering("<q:x/>" * MISTAKES_MAX))
    assert len(policy.mistakes) == MISTAKES_MAX
    assert {mistake[:3] for mistake in policy.mistakes} == {"<x>"}
    policy = parsed(steering("<q:x/>" * 20))
    assert len(policy.mistakes) == MISTAKES_MAX + 1
    assert policy.mistakes[-1] == f"mistakes that are not shown: {20 - MISTAKES_MAX}"


# --- In a domain -----------------------------------------------------------------------------------------------------

UUID = "11111111-2222-4333-8444-555555555555"


def domain(metadata: str, before: str = "") -> str:
    return (
        f"{before}<domain type='kvm'><name>web1</name><uuid>{UUID}</uuid><metadata>{metadata}</metadata>"
        "<devices><emulator>/usr/bin/qemu</emulator><interface type='bridge'><alias name='net0'/></interface></devices>"
        "</domain>"
    )


def status(metadata: str) -> str:
    return f"<domstatus state='running' reason='booted' pid='4711'>{domain(metadata)}</domstatus>"


FOREIGN = '<o:os xmlns:o="http://libosinfo.org/xmlns/libvirt/domain/1.0"><o:steering/></o:os>'
IN_DOMAINS: dict[str, tuple[str, int | None]] = {
    "its own": (nic('equal="2"'), 1),
    "beside another's": (FOREIGN + nic('equal="2"') + FOREIGN, 1),
    "another's only": (FOREIGN, None),
    "none": ("", None),
    "without a namespace": ("<steering/>", None),
    "of a later version": (steering().replace("domain:1", "domain:2"), None),
    "the first of two": (nic('equal="2"') + steering(), 1),
    "not deeper": (f'<o:o xmlns:o="urn:o">{steering()}</o:o>', None),
}


@pytest.mark.parametrize("case", IN_DOMAINS)
def test_the_policy_of_a_domain(case: str) -> None:
    metadata, entries = IN_DOMAINS[case]
    described, running = libvirt.describe(domain(metadata).encode()), libvirt.parse(status(metadata).encode())
    assert described and running
    for policy in (described.policy, running.policy):
        assert (None if policy is None else len(policy.entries)) == entries
        assert not (policy and policy.mistakes)


def test_no_metadata_no_policy() -> None:
    assert domainpolicy.find(None) is None
    described = libvirt.describe(domain("").replace("<metadata></metadata>", "").encode())
    assert described and described.policy is None


@pytest.mark.parametrize(
    "doctype",
    [
        "<!DOCTYPE domain>",
        "<!DOCTYPE domain [<!ENTITY two '2'>]>",
        "<!DOCTYPE domain [<!ENTITY two SYSTEM 'file:///etc/hostname'>]>",
        "<!DOCTYPE domain SYSTEM 'file:///etc/hostname'>",
        "<!DOCTYPE domain ["
        + "".join(f"<!ENTITY e{i} '{f'&e{i - 1};' * 10 if i else 'x'}'>" for i in range(10))
        + "]>",
    ],
)
def test_a_document_type_is_refused(doctype: str) -> None:
    assert libvirt.describe(domain(nic('equal="2"')).encode())
    assert libvirt.describe(domain(nic('equal="2"'), doctype).encode()) is None


def test_an_entity_of_nobodys() -> None:
    assert libvirt.describe(domain(nic('equal="&two;"')).encode()) is None


PIECES = (
    b"<!DOCTYPE x [<!ENTITY a 'b'>]>",
    b"&#0;",
    b"&#x9b;",
    b"&lt;",
    b"]]>",
    b"<![CDATA[",
    b"'",
    b'"',
    b"<q:interface ",
    b"/>",
    b"</q:steering>",
    b"<q:steering>",
    b' xmlns:q="urn:x" ',
    b' required="yes" ',
    b"\xff",
    b"\xef\xbb\xbf",
    "\u202e".encode(),
    b"65536",
    b",",
    b"<!--",
    b"-->",
    b"<?x ?>",
    b"9" * 2000,
    b"<x>" * 500,
    b' a="b"' * 3,
)


def mistyped(numbers: random.Random, data: bytes) -> bytes:
    """With another value of some attribute, so that it is XML."""
    values = [found.span(1) for found in re.finditer(rb' [a-z-]+="([^"]*)"', data)]
    if not values:
        return data
    start, end = numbers.choice(values)
    at = numbers.randrange(start, end + 1)
    word = numbers.choice((b"", b"0", b",", b"x", b" ", b"&#10;", b"&lt;", b"&#x202e;", b"65536", b"9" * 2000))
    return data[:at] + word + data[numbers.randrange(at, min(end, at + 3) + 1) :]


def mutated(numbers: random.Random, data: bytes) -> bytes:
    if numbers.random() < 0.5:
        return mistyped(numbers, data)
    changed = bytearray(data)
    for _ in range(numbers.choice((1, 1, 1, 2, 5))):
        at = numbers.randrange(len(changed) + 1)
        match numbers.choice((0, 1, 2, 3, 4)):
            case 0:
                changed[at : at + 1] = bytes((numbers.randrange(256),))
            case 1:
                changed[at : at + 1] = numbers.choice(b"0123456789abcx,:- ").to_bytes()
            case 2:
                del changed[at : at + numbers.randrange(40)]
            case 3:
                changed[at:at] = numbers.choice(PIECES)
            case 4:
                changed[at:at] = changed[at : at + numbers.randrange(200)]
    return bytes(changed)


def test_whatever_is_in_a_domain() -> None:
    """Nothing raises, nothing takes long, and what is told can be shown."""
    numbers = random.Random(9)
    seeds = [*GOOD.values(), *BAD.values(), *UNSAID.values(), FOREIGN + GOOD["all of it"]]
    seeds = [seed for seed in seeds if len(seed) < 3000]
    policies, mistaken, slowest = 0, 0, 0.0
    for number in range(20_000):
        metadata = numbers.choice(seeds)
        # Mostly the policy itself is changed, so that most is XML; sometimes all around it.
        inside = mutated(numbers, metadata.encode()) if number % 4 else metadata.encode()
        whole = [text(metadata).encode().replace(metadata.encode(), inside) for text in (domain, status)]
        whole = whole if number % 4 else [mutated(numbers, data) for data in whole]
        began = time.process_time()
        found = (libvirt.describe(whole[0]), libvirt.parse(whole[1]))
        slowest = max(slowest, time.process_time() - began)
        for one in found:
            if one and one.policy:
                check_mistakes(one.policy)
                one.policy.settings(("net0",), MAC)
                policies += 1
                mistaken += bool(one.policy.mistakes)
    assert slowest < 0.05
    assert mistaken > 10_000 and policies - mistaken > 2000
