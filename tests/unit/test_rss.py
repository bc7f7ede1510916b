# SPDX-License-Identifier: BSD-2-Clause
"""RSS configurations: what is allowed, what is refused and how, and ethtool's ways to make a table."""

import pytest

from qsteer.errors import UsageError
from qsteer.rss import (
    BASE_TYPES,
    KEY_BYTES,
    TABLE_MAX,
    HashType,
    RssConfig,
    equal_table,
    format_hash_types,
    format_key,
    parse_hash_types,
    parse_key,
    weighted_table,
)

KEY = bytes(range(KEY_BYTES))


def config(
    *, types: HashType = BASE_TYPES, key: bytes = KEY, table: tuple[int, ...] = (0,), unclassified_queue: int = 0
) -> RssConfig:
    return RssConfig(types=types, key=key, table=table, unclassified_queue=unclassified_queue)


class TestHashType:
    @pytest.mark.parametrize(
        ("name", "bit"),
        [
            ("ip4", 0),
            ("tcp4", 1),
            ("udp4", 2),
            ("ip6", 3),
            ("tcp6", 4),
            ("udp6", 5),
            ("ip-ex", 6),
            ("tcp-ex", 7),
            ("udp-ex", 8),
        ],
    )
    def test_bits_of_the_specification(self, name: str, bit: int) -> None:
        assert int(parse_hash_types(name)) == 1 << bit
        assert format_hash_types(HashType(1 << bit)) == (name,)

    def test_base_types(self) -> None:
        assert int(BASE_TYPES) == 0x3F

    def test_every_combination_comes_back(self) -> None:
        for bits in range(1, 1 << 9):
            assert int(parse_hash_types(",".join(format_hash_types(HashType(bits))))) == bits

    @pytest.mark.parametrize("text", ["tcp4,udp4", "udp4,tcp4", "TCP4, udp4", "tcp4,udp4,tcp4"])
    def test_order_case_and_blanks_do_not_matter(self, text: str) -> None:
        assert parse_hash_types(text) == HashType.TCP4 | HashType.UDP4

    def test_underscore(self) -> None:
        assert parse_hash_types("tcp_ex") == HashType.TCP_EX

    @pytest.mark.parametrize("text", ["", "tcp", "tcp4,", "tcp4 udp4", "ipv4", "0x3f"])
    def test_unknown_names(self, text: str) -> None:
        with pytest.raises(UsageError, match="unknown hash type") as caught:
            parse_hash_types(text)
        assert "tcp4" in caught.value.hint


class TestKey:
    def test_comes_back(self) -> None:
        assert parse_key(format_key(KEY)) == KEY
        assert format_key(KEY).startswith("00:01:02:")

    @pytest.mark.parametrize("text", ["", "zz", "00:01:-1", "00:0x1", "00::01", "00 01", "+1:00", "000:00", "1_0:00"])
    def test_not_a_key(self, text: str) -> None:
        with pytest.raises(UsageError):
            parse_key(text)

    @pytest.mark.parametrize("count", [1, 39, 41, 52])
    def test_wrong_length(self, count: int) -> None:
        with pytest.raises(UsageError, match=f"a hash key has 40 bytes, not {count}"):
            parse_key(":".join(["5a"] * count))


class TestConfig:
    @pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32, 64, 128])
    def test_lengths_of_the_table(self, length: int) -> None:
        assert len(config(table=(0,) * length).table) == length

    @pytest.mark.parametrize("length", [0, 3, 5, 6, 7, 100, 127, 129, 256])
    def test_other_lengths(self, length: int) -> None:
        with pytest.raises(UsageError, match=f"1 to 128 entries, a power of two, not {length}$"):
            config(table=(0,) * length)

    @pytest.mark.parametrize("queue", [-1, 65536])
    def test_queues_out_of_range(self, queue: int) -> None:
        for wrong in ({"table": (0, queue)}, {"unclassified_queue": queue}):
            with pytest.raises(UsageError, match=f"queue {queue} is not in the range"):
                config(**wrong)

    def test_greatest_queue(self) -> None:
        assert config(table=(65535,), unclassified_queue=65535).table == (65535,)

    @pytest.mark.parametrize("count", [0, 39, 41])
    def test_length_of_the_key(self, count: int) -> None:
        with pytest.raises(UsageError, match=f"a hash key has 40 bytes, not {count}"):
            config(key=bytes(count))

    @pytest.mark.parametrize("bits", [1 << 9, 1 << 31, 0x3F | 1 << 16])
    def test_unknown_types(self, bits: int) -> None:
        with pytest.raises(UsageError, match="unknown hash type bits"):
            config(types=HashType(bits))

    def test_no_types_is_a_configuration(self) -> None:
        assert not config(types=HashType(0)).types


class TestTables:
    def test_equal(self) -> None:
        assert equal_table(3, 8) == (0, 1, 2, 0, 1, 2, 0, 1)
        assert len(equal_table(4)) == TABLE_MAX

    @pytest.mark.parametrize("queues", [0, -1])
    def test_equal_of_nothing(self, queues: int) -> None:
        with pytest.raises(UsageError):
            equal_table(queues)

    @pytest.mark.parametrize(
        ("weights", "table"),
        [
            ((1, 1), (0, 0, 0, 0, 1, 1, 1, 1)),
            ((1, 1, 2), (0, 0, 1, 1, 2, 2, 2, 2)),
            ((0, 1), (1,) * 8),
            ((3, 0, 1), (0, 0, 0, 0, 0, 0, 2, 2)),
            ((1, 2), (0, 0, 1, 1, 1, 1, 1, 1)),
            ((5,), (0,) * 8),
        ],
    )
    def test_weights(self, weights: tuple[int, ...], table: tuple[int, ...]) -> None:
        assert weighted_table(weights, 8) == table

    @pytest.mark.parametrize("weights", [(1,), (1, 2, 3), (1,) * 200, (0, 0, 7), (10**9, 1)])
    def test_weights_always_fill_the_table(self, weights: tuple[int, ...]) -> None:
        table = weighted_table(weights)
        assert len(table) == TABLE_MAX
        assert all(weights[queue] for queue in table)

    @pytest.mark.parametrize("weights", [(), (0,), (0, 0), (2, -1), (-1, 2)])
    def test_weights_of_nothing(self, weights: tuple[int, ...]) -> None:
        with pytest.raises(UsageError):
            weighted_table(weights)
