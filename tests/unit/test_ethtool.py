# SPDX-License-Identifier: BSD-2-Clause
"""ethtool's text: what ethtool 6.1 and later print, what qsteer prints, and everything that is neither."""

import random
import string
import time

import pytest

from qsteer.errors import UsageError
from qsteer.ethtool import (
    TEXT_MAX,
    FlowHash,
    Parsed,
    format_table,
    has_no_table,
    hash_types,
    parse,
    parse_flow_hash,
    parse_receive_hashing,
)
from qsteer.rss import BASE_TYPES, HashType, RssConfig, equal_table, format_key
from tests.packets import ALL_TYPES, random_config

KEY_TEXT = (
    "6d:5a:56:da:25:5b:0e:c2:41:67:25:3d:43:a3:8f:b0:d0:ca:2b:cb:"
    "ae:7b:30:b4:77:cb:2d:a3:80:30:f2:0c:6a:42:b7:3b:be:ac:01:fa"
)
KEY = bytes.fromhex(KEY_TEXT.replace(":", ""))

HEADING = "RX flow hash indirection table for eth0 with 3 RX ring(s):\n"
ROWS = """\
    0:      0     1     2     0     1     2     0     1
    8:      2     0     1     2     0     1     2     0
"""
FUNCTION = """\
RSS hash function:
    toeplitz: on
    xor: off
    crc32: off
"""
TABLE = equal_table(3, 16)
ETHTOOL_6_1 = f"{HEADING}{ROWS}RSS hash key:\n{KEY_TEXT}\n{FUNCTION}"
ETHTOOL_6_15 = ETHTOOL_6_1 + "RSS input transformation:\n    symmetric-xor: off\n    symmetric-or-xor: off\n"

WIDE_ROWS = """\
    0:  65535     0     0     0     0     0     0     0
    8:      0     0     0     0     0     0     0     0
   16:      0     0     0     0     0     0     0     0
   24:      0     0     0     0     0     0     0     0
   32:      0     0     0     0     0     0     0     0
   40:      0     0     0     0     0     0     0     0
   48:      0     0     0     0     0     0     0     0
   56:      0     0     0     0     0     0     0     0
   64:      0     0     0     0     0     0     0     0
   72:      0     0     0     0     0     0     0     0
   80:      0     0     0     0     0     0     0     0
   88:      0     0     0     0     0     0     0     0
   96:      0     0     0     0     0     0     0     0
  104:      0     0     0     0     0     0     0     0
  112:      0     0     0     0     0     0     0     0
  120:      0     0     0     0     0     0     0 12345
"""


def config(*, types: HashType = BASE_TYPES, table: tuple[int, ...] = TABLE, unclassified_queue: int = 0) -> RssConfig:
    return RssConfig(types=types, key=KEY, table=table, unclassified_queue=unclassified_queue)


class TestFormat:
    def test_starts_as_ethtool_prints_it(self) -> None:
        assert format_table(config(), device="eth0", rings=3).startswith(ETHTOOL_6_1)

    def test_qsteer_adds_its_own(self) -> None:
        text = format_table(config(unclassified_queue=2), device="eth0", rings=3)
        added = "RSS hash types:\n    ip4,tcp4,udp4,ip6,tcp6,udp6\nRSS unclassified queue:\n    2\n"
        assert text == ETHTOOL_6_1 + added

    def test_columns_of_the_longest_table(self) -> None:
        text = format_table(config(table=(65535, *[0] * 126, 12345)), device="tap0", rings=256)
        assert text.startswith(
            f"RX flow hash indirection table for tap0 with 256 RX ring(s):\n{WIDE_ROWS}RSS hash key:"
        )

    @pytest.mark.parametrize(
        ("table", "row"),
        [
            ((7,), "    0:      7\n"),
            ((1, 2), "    0:      1     2\n"),
            ((0, 1, 2, 3), "    0:      0     1     2     3\n"),
        ],
    )
    def test_short_tables(self, table: tuple[int, ...], row: str) -> None:
        lines = format_table(config(table=table), device="t", rings=4).splitlines(keepends=True)
        assert lines[1] == row
        assert lines[2] == "RSS hash key:\n"

    def test_no_types(self) -> None:
        assert "RSS hash types:\n    none\n" in format_table(config(types=HashType(0)), device="t", rings=1)


class TestParse:
    @pytest.mark.parametrize("text", [ETHTOOL_6_1, ETHTOOL_6_15], ids=["6.1", "6.15"])
    def test_what_ethtool_prints(self, text: str) -> None:
        assert parse(text) == Parsed(table=TABLE, key=KEY)

    def test_round_trip(self) -> None:
        rng = random.Random(5)
        for _ in range(300):
            want = random_config(rng)
            got = parse(format_table(want, device="tap0", rings=4))
            assert got == Parsed(
                table=want.table, key=want.key, types=want.types, unclassified_queue=want.unclassified_queue
            )

    @pytest.mark.parametrize("types", [HashType(0), ALL_TYPES])
    def test_round_trip_of_extreme_types(self, types: HashType) -> None:
        assert parse(format_table(config(types=types), device="tap0", rings=4)).types == types

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(f"{HEADING}{ROWS}", id="table only"),
            pytest.param(f"{HEADING}{ROWS}RSS hash key:\nOperation not supported\n{FUNCTION}", id="no key"),
            pytest.param(
                f"{HEADING}{ROWS}RSS hash function:\n    Operation not supported\n", id="hash function not known"
            ),
        ],
    )
    def test_key_may_be_absent(self, text: str) -> None:
        assert parse(text) == Parsed(table=TABLE)

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(ETHTOOL_6_1.replace("\n", "\r\n"), id="from a serial console"),
            pytest.param(f"\n\n{ETHTOOL_6_1}\n  \n", id="blank lines"),
            pytest.param("\n".join(line.strip() for line in ETHTOOL_6_1.splitlines()), id="no indent, no last newline"),
            pytest.param(ETHTOOL_6_1.replace(KEY_TEXT, KEY_TEXT.upper()), id="upper case key"),
        ],
    )
    def test_harmless_differences(self, text: str) -> None:
        assert parse(text) == Parsed(table=TABLE, key=KEY)


NO_RSS = f"{HEADING}Operation not supported\nRSS hash key:\nOperation not supported\n{FUNCTION}"


def test_a_device_without_rss() -> None:
    """As ethtool 6.1, and 6.14 to 7.2, print it of a virtio_net that was not offered RSS; the exit status is 0."""
    assert has_no_table(NO_RSS)
    assert has_no_table(f"\n{NO_RSS}RSS input transformation:\n    symmetric-xor: off\n")
    for text in ("", HEADING, ETHTOOL_6_1, "Operation not supported\n", f"x\n{NO_RSS}", HEADING * 2):
        assert not has_no_table(text)


BAD = {
    "empty": ("", "there is no indirection table in the text"),
    "blank": (" \n\n", "there is no indirection table in the text"),
    "no table": (f"RSS hash key:\n{KEY_TEXT}\n", "there is no indirection table in the text"),
    "another tool's": ("driver: virtio_net\n", "line 1: 'driver: virtio_net' is not what ethtool prints here"),
    "prompt": (
        f"$ ethtool -x eth0\n{ETHTOOL_6_1}",
        "line 1: '$ ethtool -x eth0' is not what ethtool prints here",
    ),
    "device without a table": (
        "RX flow hash indirection table for eth0 with 1 RX ring(s):\nOperation not supported\n",
        "line 2: the device has no indirection table",
    ),
    "heading only": (HEADING, "line 1: an indirection table has 1 to 128 entries, a power of two, not 0"),
    "3 entries": (f"{HEADING}    0:      0     1     2\n", "line 1: an indirection table has 1 to 128 entries"),
    "row lost": (
        f"{HEADING}{ROWS.splitlines()[1]}\n",
        "line 2: entry 0 of the table is wanted here, not entry 8",
    ),
    "row twice": (
        f"{HEADING}{ROWS}{ROWS}",
        "line 4: entry 16 of the table is wanted here, not entry 0",
    ),
    "256 entries": (
        HEADING + "".join(f"{i:5}: " + "     0" * 8 + "\n" for i in range(0, 256, 8)),
        "line 1: an indirection table has 1 to 128 entries, a power of two, not 256",
    ),
    "queue 65536": (
        f"{HEADING}    0:      0 65536\n",
        "line 2: queue 65536 is not in the range 0 to 65535",
    ),
    "negative queue": (f"{HEADING}    0:      0    -1\n", "line 2: '0:      0    -1' is not what"),
    "queue in hex": (f"{HEADING}    0:      0   0x1\n", "line 2: '0:      0   0x1' is not what"),
    "digits of another script": (f"{HEADING}    0:      0     \u0661\n", r"line 2: '0:      0     \u0661' is not"),
    "queue of very many digits": (f"{HEADING}    0: {'9' * 5000}\n", "line 2: '0: 9999999999999"),
    "row without entries": (f"{HEADING}    0:\n", "line 2: '0:' is not what ethtool prints here"),
    "two tables": (
        ETHTOOL_6_1 + ETHTOOL_6_1,
        'line 10: a second "RX flow hash indirection table"',
    ),
    "two keys": (
        f"{HEADING}{ROWS}RSS hash key:\n{KEY_TEXT}\nRSS hash key:\n{KEY_TEXT}\n",
        'line 6: a second "RSS hash key"',
    ),
    "two lines of key": (
        f"{HEADING}{ROWS}RSS hash key:\n{KEY_TEXT}\n{KEY_TEXT}\n",
        "line 6: '6d:5a:56:da:",
    ),
    "text ends before the key": (f"{HEADING}{ROWS}RSS hash key:\n", 'line 4: nothing follows "RSS hash key:"'),
    "key of 39 bytes": (
        ETHTOOL_6_1.replace(KEY_TEXT, KEY_TEXT[:-3]),
        "line 5: a hash key has 40 bytes, not 39",
    ),
    "key of 52 bytes": (
        ETHTOOL_6_1.replace(KEY_TEXT, ":".join(["00"] * 52)),
        "line 5: a hash key has 40 bytes, not 52",
    ),
    "key not in hex": (ETHTOOL_6_1.replace("6d:", "6x:"), "line 5: '6x:5a:56:da:"),
    "key cut in a byte": (ETHTOOL_6_1.replace(KEY_TEXT, KEY_TEXT[:-1]), "line 5: '6d:5a:"),
    "xor": (
        ETHTOOL_6_1.replace("toeplitz: on", "toeplitz: off").replace("xor: off", "xor: on"),
        "line 8: the device hashes with xor",
    ),
    "symmetric": (
        ETHTOOL_6_15.replace("symmetric-xor: off", "symmetric-xor: on"),
        "line 11: the device hashes with symmetric-xor",
    ),
    "unknown function": (
        ETHTOOL_6_1 + "    Unknown hash function: 0x8\n",
        "line 10: 'Unknown hash function: 0x8' is not what",
    ),
    "unknown section": (ETHTOOL_6_1 + "RSS hash colour:\n    blue: on\n", "line 10: 'RSS hash colour:' is not what"),
    "unknown type": (f"{HEADING}{ROWS}RSS hash types:\n    tcp5\n", 'line 5: unknown hash type "tcp5"'),
    "types not names": (f"{HEADING}{ROWS}RSS hash types:\n    tcp4;rm\n", "line 5: 'tcp4;rm' is not"),
    "no types": (f"{HEADING}{ROWS}RSS hash types:\n", 'line 4: nothing follows "RSS hash types:"'),
    "unclassified queue 70000": (
        f"{HEADING}{ROWS}RSS unclassified queue:\n    70000\n",
        "line 5: queue 70000 is not in the range 0 to 65535",
    ),
    "unclassified queue not a number": (f"{HEADING}{ROWS}RSS unclassified queue:\n    x\n", "line 5: 'x' is not"),
    "terminal escapes": (f"{HEADING}\x1b]0;owned\x07\x9b31m\n", r"line 2: '\x1b]0;owned\x07\x9b31m' is not"),
    "too long": ("x" * (TEXT_MAX + 1), f"a text of more than {TEXT_MAX} characters is not what ethtool prints"),
}


class TestBadText:
    @pytest.mark.parametrize("name", BAD)
    def test_one_clear_line(self, name: str) -> None:
        text, message = BAD[name]
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert str(caught.value).startswith(message)
        assert str(caught.value).isprintable()
        assert str(caught.value).isascii()
        assert len(str(caught.value)) < 200
        assert caught.value.exit_code == 2

    def test_cut_at_any_line_is_less_or_nothing_but_never_something_else(self) -> None:
        text = format_table(config(table=equal_table(3)), device="eth0", rings=3)
        lines = text.splitlines(keepends=True)
        whole = parse(text)
        refused = 0
        for count in range(len(lines)):
            try:
                part = parse("".join(lines[:count]))
            except UsageError:
                refused += 1
                continue
            if len(part.table) < 128:
                # A text that ends in the table looks whole at powers of two: nothing in it says how long the table is.
                assert part.table == whole.table[: len(part.table)]
            assert part.key in (None, whole.key)
            assert part.types in (None, whole.types)
        assert refused > 15

    @pytest.mark.parametrize(
        "text",
        [
            pytest.param(HEADING + "\n".join(["0: 1"] * (TEXT_MAX // 6)), id="rows"),
            pytest.param(HEADING + "x\n" * (TEXT_MAX // 3), id="lines"),
            pytest.param(HEADING + "0:" + " 1" * (TEXT_MAX // 3), id="one row"),
            pytest.param(HEADING + "0:" + " " * (TEXT_MAX - 200) + "x", id="blanks"),
            pytest.param(HEADING + ROWS + "RSS hash key:\n" + "aa:" * (TEXT_MAX // 4), id="key"),
            pytest.param("RX flow hash indirection table for " + "x" * (TEXT_MAX - 100), id="heading"),
            pytest.param("RX flow hash indirection table for x with " + "1" * (TEXT_MAX - 100), id="rings"),
        ],
    )
    def test_hostile_text_is_refused_soon(self, text: str) -> None:
        assert len(text) <= TEXT_MAX
        before = time.process_time()
        with pytest.raises(UsageError):
            parse(text)
        assert time.process_time() - before < 0.5

    def test_damage(self) -> None:
        """Whatever is done to a text, there is a whole answer or a UsageError."""
        rng = random.Random(9)
        text = format_table(config(), device="eth0", rings=3)
        refused = 0
        for _ in range(3000):
            at = rng.randrange(len(text))
            damaged = text[:at] + rng.choice(string.printable + "\x00\xe9\u0663") + text[at + rng.randint(0, 2) :]
            try:
                got = parse(damaged)
            except UsageError:
                refused += 1
                continue
            assert len(got.table) in (1, 2, 4, 8, 16)
            assert got.key is None or len(format_key(got.key)) == len(KEY_TEXT)
        assert 1000 < refused < 3000


FLOW_HEADING = "UDP over IPV4 flows use these fields for computing Hash flow key:\n"
PORTS = "L4 bytes 0 & 1 [TCP/UDP src port]\nL4 bytes 2 & 3 [TCP/UDP dst port]\n"


class TestFlowHash:
    """``ethtool -n DEV rx-flow-hash udp4``, as ethtool 6.1 prints it of a virtio_net."""

    @pytest.mark.parametrize(
        ("text", "want"),
        [
            (f"{FLOW_HEADING}IP SA\nIP DA\n{PORTS}\n", FlowHash.PORTS),
            (f"{FLOW_HEADING}IP SA\nIP DA\n\n", FlowHash.ADDRESSES),
            (f"{FLOW_HEADING}None\n", FlowHash.NOTHING),
            (f"{FLOW_HEADING}None\n".replace("\n", "\r\n"), FlowHash.NOTHING),
        ],
    )
    def test_what_ethtool_prints(self, text: str, want: FlowHash) -> None:
        assert parse_flow_hash(text, "udp4") is want
        assert parse_flow_hash(text.replace("UDP over IPV4", "TCP over IPV6"), "tcp6") is want

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "\n",
            FLOW_HEADING,
            f"{FLOW_HEADING}\n\n",
            f"{FLOW_HEADING}IP SA\n",
            f"{FLOW_HEADING}IP DA\nIP SA\n",
            f"{FLOW_HEADING}{PORTS}",
            f"{FLOW_HEADING}IP SA\nIP DA\nVLAN tag\n",
            f"{FLOW_HEADING}None\nNone\n",
            f"{FLOW_HEADING}\x1b[2J\n",
            f"For RSS context 1:\n{FLOW_HEADING}None\n",
            f"{FLOW_HEADING}None\n".replace("UDP", "TCP"),
            f"{FLOW_HEADING}{'IP SA' * TEXT_MAX}",
        ],
    )
    def test_anything_else(self, text: str) -> None:
        with pytest.raises(UsageError) as caught:
            parse_flow_hash(text, "udp4")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200

    @pytest.mark.parametrize("types", range(64))
    def test_hash_types(self, types: int) -> None:
        """All that virtio_net can have: what its driver makes of the types leads back to them."""
        want = HashType(types)
        flows = {}
        for flow in ("tcp4", "udp4", "tcp6", "udp6"):
            addresses = FlowHash.ADDRESSES if HashType[f"IP{flow[3]}"] in want else FlowHash.NOTHING
            flows[flow] = FlowHash.PORTS if HashType[flow.upper()] in want else addresses
        for version in "46":
            if FlowHash.PORTS is flows[f"tcp{version}"] is flows[f"udp{version}"]:
                want |= HashType[f"IP{version}"]  # it does not show, and is taken to be there
        assert hash_types(flows) == want

    @pytest.mark.parametrize("family", ["4", "6"])
    def test_answers_that_contradict_each_other(self, family: str) -> None:
        flows = dict.fromkeys(("tcp4", "udp4", "tcp6", "udp6"), FlowHash.ADDRESSES)
        with pytest.raises(UsageError, match=f"IPv{family}"):
            hash_types(flows | {f"udp{family}": FlowHash.NOTHING})

    def test_receive_hashing(self) -> None:
        around = "Features for eth0:\nrx-checksumming: on\n{}\nhighdma: on [fixed]\n"
        for line in ("receive-hashing: on", "receive-hashing: on [fixed]", "receive-hashing: on [requested off]"):
            assert parse_receive_hashing(around.format(line))
        for line in ("receive-hashing: off", "receive-hashing: off [requested on]", "", "receive-hashing: onward"):
            assert not parse_receive_hashing(around.format(line))
