# SPDX-License-Identifier: BSD-2-Clause
"""The reference against published vectors, against the golden table, and against slips of its own.

Published: the verification suite of the Toeplitz hash as RSS uses it, and the vectors of the selftests that came with
the in-kernel RSS patches for tun (v12).
"""

import random
import types
from collections import Counter
from ipaddress import ip_address
from itertools import islice
from pathlib import Path

import pytest

from qsteer import reference
from qsteer.reference import Classified, classify, queue_of, toeplitz_hash
from qsteer.rss import BASE_TYPES, HashType, RssConfig, equal_table
from tests.packets import (
    ALL_TYPES,
    DESTINATION4,
    DESTINATION6,
    ESP,
    ETH_IPV4,
    ETH_IPV6,
    ETH_LOOPBACK,
    EXPERIMENT,
    GOLDEN,
    HOME,
    ICMP,
    ICMPV6,
    OTHER_HOME,
    OTHER_ROUTED,
    PACKET_MAX,
    PORT_BYTES,
    ROUTED,
    SOURCE4,
    SOURCE6,
    TCP,
    UDP,
    ethernet,
    ipv4,
    ipv6,
    random_config,
    random_packets,
    tcp,
    udp,
)

IP4, TCP4, UDP4, IP6, TCP6, UDP6, IP_EX, TCP_EX, UDP_EX = HashType

KEY = bytes.fromhex("6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa")

VERIFICATION_SUITE = (
    # source, port, destination, port, hash of the addresses, hash with the ports
    ("66.9.149.187", 2794, "161.142.100.80", 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", 14230, "65.69.140.83", 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", 12898, "12.22.207.184", 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("38.27.205.30", 48228, "209.142.163.6", 2217, 0x82989176, 0xAFC7327F),
    ("153.39.163.191", 44251, "202.188.127.2", 1303, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:1fff::7", 2794, "3ffe:2501:200:3::1", 1766, 0x2CC18CD5, 0x40207D3D),
    ("3ffe:501:8::260:97ff:fe40:efab", 14230, "ff02::1", 4739, 0x0F0C461C, 0xDDE51BBF),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", 44251, "fe80::200:f8ff:fe21:67cf", 38024, 0x4B61E985, 0x02D1FEEF),
)


def bit_serial_toeplitz(key: bytes, data: bytes) -> int:
    """The definition, a bit at a time: the key slides left under the data."""
    window = "".join(f"{byte:08b}" for byte in key)
    result = 0
    for at, bit in enumerate("".join(f"{byte:08b}" for byte in data)):
        if bit == "1":
            result ^= int(window[at : at + 32], 2)
    return result


class TestToeplitz:
    @pytest.mark.parametrize(("source", "sport", "destination", "dport", "plain", "ported"), VERIFICATION_SUITE)
    def test_verification_suite(
        self, source: str, sport: int, destination: str, dport: int, plain: int, ported: int
    ) -> None:
        addresses = ip_address(source).packed + ip_address(destination).packed
        assert toeplitz_hash(KEY, addresses) == plain
        assert toeplitz_hash(KEY, addresses + sport.to_bytes(2) + dport.to_bytes(2)) == ported

    @pytest.mark.parametrize(("source", "sport", "destination", "dport", "plain", "ported"), VERIFICATION_SUITE)
    @pytest.mark.parametrize("protocol", [TCP, UDP, EXPERIMENT])
    def test_verification_suite_as_packets(
        self, source: str, sport: int, destination: str, dport: int, plain: int, ported: int, protocol: int
    ) -> None:
        addresses = ip_address(source).packed + ip_address(destination).packed
        payload = {TCP: tcp((sport, dport)), UDP: udp((sport, dport))}.get(protocol, tcp((sport, dport)))
        if len(addresses) == 8:
            packet = ethernet(ETH_IPV4, ipv4(protocol, payload, addresses=addresses))
        else:
            packet = ethernet(ETH_IPV6, ipv6(protocol, payload, addresses=addresses))
        match = classify(packet, BASE_TYPES)
        assert match is not None
        assert toeplitz_hash(KEY, match.data) == (plain if protocol == EXPERIMENT else ported)

    def test_agrees_with_the_definition(self) -> None:
        rng = random.Random(1)
        for _ in range(300):
            key, data = rng.randbytes(40), rng.randbytes(rng.choice((8, 12, 32, 36)))
            assert toeplitz_hash(key, data) == bit_serial_toeplitz(key, data)

    @pytest.mark.parametrize("bit", [0, 1, 7, 8, 31, 100, 287])
    def test_one_bit_of_data_is_one_window_of_the_key(self, bit: int) -> None:
        data = (1 << 287 - bit).to_bytes(36)
        assert toeplitz_hash(KEY, data) == int.from_bytes(KEY) >> 288 - bit & 0xFFFFFFFF

    def test_the_longest_data_needs_all_of_the_key(self) -> None:
        data = bytes(35) + b"\x01"
        assert toeplitz_hash(KEY, data) != toeplitz_hash(KEY[:39] + bytes((KEY[39] ^ 0x80,)), data)

    def test_data_too_long_for_the_key(self) -> None:
        with pytest.raises(ValueError, match="key of 40 bytes is too short for 37 bytes"):
            toeplitz_hash(KEY, bytes(37))


def type_of(match: Classified | None) -> HashType | None:
    return match.hash_type if match else None


SELFTEST_ADDRESSES4 = ip_address("172.17.0.0").packed + ip_address("172.17.0.1").packed
SELFTEST_ADDRESSES6 = ip_address("ffff::ac11:0").packed + ip_address("ffff::ac11:1").packed
SELFTEST_CONFIG = RssConfig(types=HashType(0x3F), key=KEY, table=(3, 4), unclassified_queue=5)


@pytest.mark.parametrize(
    ("packet", "hash_type", "value", "queue"),
    [
        pytest.param(ethernet(ETH_LOOPBACK, bytes(46)), None, 0, 2, id="loopback"),
        pytest.param(
            ethernet(ETH_IPV4, ipv4(EXPERIMENT, b"", addresses=SELFTEST_ADDRESSES4)), IP4, 0x6E45D952, 0, id="ipv4"
        ),
        pytest.param(
            ethernet(ETH_IPV4, ipv4(TCP, tcp((9, 9)), addresses=SELFTEST_ADDRESSES4)), TCP4, 0xFB63539A, 0, id="tcpv4"
        ),
        pytest.param(
            ethernet(ETH_IPV4, ipv4(UDP, udp((9, 9)), addresses=SELFTEST_ADDRESSES4)), UDP4, 0xFB63539A, 0, id="udpv4"
        ),
        pytest.param(
            ethernet(ETH_IPV6, ipv6(EXPERIMENT, b"", addresses=SELFTEST_ADDRESSES6)), IP6, 0xD6EB560F, 1, id="ipv6"
        ),
        pytest.param(
            ethernet(ETH_IPV6, ipv6(TCP, tcp((9, 9)), addresses=SELFTEST_ADDRESSES6)), TCP6, 0xC2B9F251, 1, id="tcpv6"
        ),
        pytest.param(
            ethernet(ETH_IPV6, ipv6(UDP, udp((9, 9)), addresses=SELFTEST_ADDRESSES6)), UDP6, 0xC2B9F251, 1, id="udpv6"
        ),
    ],
)
def test_vectors_of_the_kernel_selftests(packet: bytes, hash_type: HashType | None, value: int, queue: int) -> None:
    match = classify(packet, SELFTEST_CONFIG.types)
    assert type_of(match) == hash_type
    assert match is None or toeplitz_hash(KEY, match.data) == value
    assert queue_of(packet, SELFTEST_CONFIG) % 3 == queue


ADDRESSES4 = SOURCE4 + DESTINATION4
ADDRESSES6 = SOURCE6 + DESTINATION6

# What the golden packets are: with all nine types enabled, and with the six base types.
UNCLASSIFIED = (None, b"", None)
IS_TCP4 = (TCP4, ADDRESSES4 + PORT_BYTES, TCP4)
IS_UDP4 = (UDP4, ADDRESSES4 + PORT_BYTES, UDP4)
IS_IP4 = (IP4, ADDRESSES4, IP4)
IS_TCP6 = (TCP6, ADDRESSES6 + PORT_BYTES, TCP6)
IS_UDP6 = (UDP6, ADDRESSES6 + PORT_BYTES, UDP6)
IS_IP6 = (IP6, ADDRESSES6, IP6)


def tcp_ex(addresses: bytes = ADDRESSES6) -> tuple[HashType, bytes, HashType]:
    return TCP_EX, addresses + PORT_BYTES, TCP6


def udp_ex(addresses: bytes = ADDRESSES6) -> tuple[HashType, bytes, HashType]:
    return UDP_EX, addresses + PORT_BYTES, UDP6


def ip_ex(addresses: bytes = ADDRESSES6) -> tuple[HashType, bytes, HashType]:
    return IP_EX, addresses, IP6


FROM_HOME = HOME + DESTINATION6
TO_ROUTED = SOURCE6 + ROUTED

EXPECTED: dict[str, tuple[HashType | None, bytes, HashType | None]] = {
    "ethernet header only": UNCLASSIFIED,
    "arp": UNCLASSIFIED,
    "lldp": UNCLASSIFIED,
    "loopback": UNCLASSIFIED,
    "802.3 length": UNCLASSIFIED,
    "802.1q tcp4": IS_TCP4,
    "802.1ad tcp4": IS_TCP4,
    "802.1ad 802.1q tcp6": IS_TCP6,
    "802.1q 802.1q udp4": IS_UDP4,
    "802.1q 802.1ad tcp6": IS_TCP6,
    "802.1ad 802.1q arp": UNCLASSIFIED,
    "three tags tcp4": UNCLASSIFIED,
    "tag 9100 tcp4": UNCLASSIFIED,
    "802.1q cut in the tag": UNCLASSIFIED,
    "802.1q cut after the tag": UNCLASSIFIED,
    "tcp4": IS_TCP4,
    "udp4": IS_UDP4,
    "icmp4": IS_IP4,
    "sctp4": IS_IP4,
    "ipip4": IS_IP4,
    "ah4 tcp": IS_IP4,
    "hop-by-hop number in ipv4": IS_IP4,
    "tcp4 with payload": IS_TCP4,
    "tcp4 options": IS_TCP4,
    "udp4 most options": IS_UDP4,
    "tcp4 options cut off": IS_IP4,
    "ipv4 header length 4": UNCLASSIFIED,
    "ipv4 version 6": UNCLASSIFIED,
    "ipv4 header cut by 1": UNCLASSIFIED,
    "ipv4 header only": IS_IP4,
    "tcp4 cut by 1": IS_IP4,
    "udp4 cut by 1": IS_IP4,
    "udp4 where tcp would be cut": IS_UDP4,
    "tcp4 with ethernet padding": IS_TCP4,
    "tcp4 total length 0": IS_TCP4,
    "tcp4 total length too long": IS_TCP4,
    "tcp4 first fragment": IS_IP4,
    "tcp4 middle fragment": IS_IP4,
    "tcp4 last fragment": IS_IP4,
    "udp4 last fragment far off": IS_IP4,
    "tcp4 do not fragment": IS_TCP4,
    "tcp4 reserved flag": IS_TCP4,
    "tcp6": IS_TCP6,
    "udp6": IS_UDP6,
    "icmp6": IS_IP6,
    "esp6": IS_IP6,
    "no next header": IS_IP6,
    "mobility": IS_IP6,
    "ipv6 version 4": UNCLASSIFIED,
    "ipv6 header cut by 1": UNCLASSIFIED,
    "ipv6 header only": IS_IP6,
    "tcp6 cut by 1": IS_IP6,
    "udp6 cut by 1": IS_IP6,
    "tcp6 payload length 0": IS_TCP6,
    "hop-by-hop tcp6": tcp_ex(),
    "hop-by-hop udp6": udp_ex(),
    "hop-by-hop of 24 bytes tcp6": tcp_ex(),
    "hop-by-hop icmp6": ip_ex(),
    "hop-by-hop esp6": ip_ex(),
    "hop-by-hop no next header": ip_ex(),
    "routing type 0 tcp6": tcp_ex(),
    "routing type 4 tcp6": tcp_ex(),
    "destination options tcp6": tcp_ex(),
    "ah tcp6": tcp_ex(),
    "ah of 28 bytes udp6": udp_ex(),
    "ah of 8 bytes tcp6": tcp_ex(),
    "every extension header tcp6": tcp_ex(),
    "extension headers cut tcp6": ip_ex(),
    "home address tcp6": tcp_ex(FROM_HOME),
    "home address udp6": udp_ex(FROM_HOME),
    "home address icmp6": ip_ex(FROM_HOME),
    "home address after pads": tcp_ex(FROM_HOME),
    "home address after an option": tcp_ex(FROM_HOME),
    "home address at the header's end": tcp_ex(FROM_HOME),
    "home address all zero": tcp_ex(bytes(16) + DESTINATION6),
    "home address in hop-by-hop": tcp_ex(),
    "home address of length 15": tcp_ex(),
    "home address of length 17": tcp_ex(),
    "home address of length 15, then one": tcp_ex(FROM_HOME),
    "other option of length 16": tcp_ex(),
    "home address beyond the header": ip_ex(),
    "home address wholly beyond the header": ip_ex(),
    "option beyond the header, then home": tcp_ex(FROM_HOME),
    "option length in the last byte": tcp_ex(FROM_HOME),
    "option type in the last byte": tcp_ex(FROM_HOME),
    "option over the home address": tcp_ex(),
    "home address cut by 1": ip_ex(),
    "home address, packet ends": ip_ex(FROM_HOME),
    "home address, header cut": ip_ex(FROM_HOME),
    "two home addresses in a header": tcp_ex(FROM_HOME),
    "home addresses in two headers": tcp_ex(OTHER_HOME + DESTINATION6),
    "home address, then options without": tcp_ex(FROM_HOME),
    "home address is option 31": tcp_ex(FROM_HOME),
    "home address is option 31 after pad1": tcp_ex(FROM_HOME),
    "home address is option 32": tcp_ex(FROM_HOME),
    "home address is option 32 after pad1": tcp_ex(FROM_HOME),
    "home address is option 33": tcp_ex(),
    "home address is option 33 after pad1": tcp_ex(),
    "many options in each header": tcp_ex(FROM_HOME),
    "routing type 2 tcp6": tcp_ex(TO_ROUTED),
    "routing type 2 udp6": udp_ex(TO_ROUTED),
    "routing type 2 no segments left": tcp_ex(TO_ROUTED),
    "routing type 2 of two addresses": tcp_ex(),
    "routing type 2 of half an address": tcp_ex(),
    "routing type 2 cut by 1": ip_ex(),
    "routing type 2, packet ends": ip_ex(TO_ROUTED),
    "two routing headers of type 2": tcp_ex(SOURCE6 + OTHER_ROUTED),
    "routing type 2, then type 0": tcp_ex(TO_ROUTED),
    "home and routing address tcp6": tcp_ex(HOME + ROUTED),
    "home and routing address udp6": udp_ex(HOME + ROUTED),
    "tcp6 atomic fragment": ip_ex(),
    "tcp6 first fragment": ip_ex(),
    "tcp6 middle fragment": ip_ex(),
    "tcp6 last fragment": ip_ex(),
    "udp6 second fragment": ip_ex(),
    "first fragment, then home address": ip_ex(FROM_HOME),
    "later fragment, then home address": ip_ex(),
    "first fragment, then routing type 2": ip_ex(TO_ROUTED),
    "later fragment, then routing type 2": ip_ex(),
    "home and routing, then later fragment": ip_ex(HOME + ROUTED),
    "15 headers tcp6": tcp_ex(),
    "home address in header 15": tcp_ex(FROM_HOME),
    "16 headers tcp6": tcp_ex(),
    "home address in header 16": tcp_ex(FROM_HOME),
    "17 headers tcp6": ip_ex(),
    "home address in header 17": ip_ex(),
    "no byte of the extension header": ip_ex(),
    "extension header cut by 1": ip_ex(),
    "extension header, packet ends": ip_ex(),
    "second extension header cut by 1": ip_ex(FROM_HOME),
    "fragment header cut by 1": ip_ex(),
    "extension header longer than the packet": ip_ex(),
    "destination options longer than the packet": ip_ex(FROM_HOME),
}


class TestGolden:
    def test_every_packet_has_an_expectation_and_a_name_of_its_own(self) -> None:
        assert [name for name, _ in GOLDEN] == list(EXPECTED)

    @pytest.mark.parametrize(("name", "packet"), GOLDEN)
    def test_all_types(self, name: str, packet: bytes) -> None:
        hash_type, data, _ = EXPECTED[name]
        expected = None if hash_type is None else Classified(hash_type=hash_type, data=data)
        assert classify(packet, ALL_TYPES) == expected

    @pytest.mark.parametrize(("name", "packet"), GOLDEN)
    def test_base_types_use_the_addresses_of_the_header(self, name: str, packet: bytes) -> None:
        hash_type = EXPECTED[name][2]
        match = classify(packet, BASE_TYPES)
        if hash_type is None:
            assert match is None
            return
        addresses = ADDRESSES4 if hash_type in IP4 | TCP4 | UDP4 else ADDRESSES6
        ports = b"" if hash_type in IP4 | IP6 else PORT_BYTES
        assert match == Classified(hash_type=hash_type, data=addresses + ports)

    @pytest.mark.parametrize(("name", "packet"), GOLDEN)
    def test_nothing_enabled_is_unclassified(self, name: str, packet: bytes) -> None:
        assert classify(packet, HashType(0)) is None


# For each packet the hash types that may match it, best first; another type never does.
PRECEDENCE = {
    "tcp4": (TCP4, IP4),
    "udp4": (UDP4, IP4),
    "icmp4": (IP4,),
    "tcp4 first fragment": (IP4,),
    "tcp4 cut by 1": (IP4,),
    "arp": (),
    "tcp6": (TCP6, IP6),
    "udp6": (UDP6, IP6),
    "icmp6": (IP6,),
    "esp6": (IP6,),
    "home and routing address tcp6": (TCP_EX, IP_EX, TCP6, IP6),
    "home and routing address udp6": (UDP_EX, IP_EX, UDP6, IP6),
    "home address icmp6": (IP_EX, IP6),
    "tcp6 atomic fragment": (IP_EX, IP6),
    "17 headers tcp6": (IP_EX, IP6),
}


class TestPrecedence:
    @pytest.mark.parametrize("name", PRECEDENCE)
    def test_every_combination_of_types(self, name: str) -> None:
        packet = dict(GOLDEN)[name]
        for bits in range(ALL_TYPES + 1):
            enabled = HashType(bits)
            expected = next((hash_type for hash_type in PRECEDENCE[name] if hash_type in enabled), None)
            match = classify(packet, enabled)
            assert type_of(match) == expected, enabled

    @pytest.mark.parametrize(
        ("enabled", "expected"),
        [
            pytest.param(TCP_EX | IP_EX | TCP6 | IP6, TCP_EX, id="tcp-ex first"),
            pytest.param(IP_EX | TCP6 | IP6, IP_EX, id="ip-ex before tcp6"),
            pytest.param(UDP_EX | TCP6 | IP6, TCP6, id="udp-ex is for udp"),
            pytest.param(IP6, IP6, id="headers skipped"),
            pytest.param(TCP_EX, TCP_EX, id="tcp-ex alone"),
            pytest.param(UDP_EX | UDP6, None, id="nothing fits"),
        ],
    )
    def test_tcp_packet_with_extension_headers(self, enabled: HashType, expected: HashType | None) -> None:
        match = classify(dict(GOLDEN)["home address tcp6"], enabled)
        assert type_of(match) == expected
        if match:
            source = HOME if match.hash_type in TCP_EX | UDP_EX | IP_EX else SOURCE6
            assert match.data[:16] == source

    @pytest.mark.parametrize("enabled", [TCP_EX, UDP_EX, IP_EX, TCP_EX | UDP_EX | IP_EX])
    def test_ex_types_are_for_extension_headers_only(self, enabled: HashType) -> None:
        for name in ("tcp6", "udp6", "icmp6", "esp6"):
            assert classify(dict(GOLDEN)[name], enabled) is None


class TestEthernet:
    @pytest.mark.parametrize(("name", "packet"), [(n, p) for n, p in GOLDEN if p[12:14] in (b"\x08\x00", b"\x86\xdd")])
    def test_two_tags_change_nothing_and_three_hide_the_packet(self, name: str, packet: bytes) -> None:
        plain = classify(packet, ALL_TYPES)
        tags = (b"\x81\x00\x00\x05", b"\x88\xa8\xe1\x23")
        for outer in tags:
            assert classify(packet[:12] + outer + packet[12:], ALL_TYPES) == plain
            for inner in tags:
                assert classify(packet[:12] + outer + inner + packet[12:], ALL_TYPES) == plain
                assert classify(packet[:12] + outer + inner + outer + packet[12:], ALL_TYPES) is None

    @pytest.mark.parametrize("length", range(15))
    def test_shorter_than_any_packet(self, length: int) -> None:
        assert classify(dict(GOLDEN)["tcp4"][:length], ALL_TYPES) is None

    @pytest.mark.parametrize(("name", "packet"), GOLDEN)
    def test_cut_anywhere(self, name: str, packet: bytes) -> None:
        """Every cut is survived; one byte less never makes a better match."""
        rank = {None: 0, IP4: 1, IP6: 1, IP_EX: 1, TCP4: 2, UDP4: 2, TCP6: 2, UDP6: 2, TCP_EX: 2, UDP_EX: 2}
        last = 0
        for length in range(len(packet) + 1):
            match = classify(packet[:length], ALL_TYPES)
            now = rank[type_of(match)]
            assert now >= last
            last = now


class TestQueue:
    def config(self, **fields: object) -> RssConfig:
        usual: dict[str, object] = {"types": BASE_TYPES, "key": KEY, "table": equal_table(4), "unclassified_queue": 9}
        return RssConfig(**{**usual, **fields})  # type: ignore[arg-type]

    @pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 32, 64, 128])
    def test_the_table_is_indexed_by_the_hash_modulo_its_length(self, length: int) -> None:
        table = tuple(range(1000, 1000 + length))
        for source, sport, destination, dport, _, ported in VERIFICATION_SUITE[:5]:
            addresses = ip_address(source).packed + ip_address(destination).packed
            packet = ethernet(ETH_IPV4, ipv4(TCP, tcp((sport, dport)), addresses=addresses))
            assert queue_of(packet, self.config(table=table)) == 1000 + ported % length

    def test_unclassified(self) -> None:
        assert queue_of(dict(GOLDEN)["arp"], self.config()) == 9
        assert queue_of(dict(GOLDEN)["udp4"], self.config(types=TCP4)) == 9

    def test_hash_0_is_a_hash(self) -> None:
        packet = dict(GOLDEN)["tcp4"]
        assert queue_of(packet, self.config(key=bytes(40), table=(7, 8))) == 7

    def test_the_whole_range_of_queues(self) -> None:
        packet = dict(GOLDEN)["tcp4"]
        assert queue_of(packet, self.config(table=(0xFFFF,))) == 0xFFFF

    def test_the_key_counts(self) -> None:
        """Two keys in turn, so that nothing remembered for one is used for the other."""
        data = ADDRESSES4 + PORT_BYTES
        table = tuple(range(128))
        for key in (KEY, KEY[::-1]) * 2:
            queue = queue_of(dict(GOLDEN)["tcp4"], self.config(key=key, table=table))
            assert queue == bit_serial_toeplitz(key, data) % 128


@pytest.fixture(scope="module")
def mix() -> list[bytes]:
    return list(random_packets(20, 30_000))


class TestRandomPackets:
    def test_deterministic(self) -> None:
        assert list(random_packets(7, 200)) == list(random_packets(7, 200))
        assert list(random_packets(7, 200)) != list(random_packets(8, 200))

    def test_lengths(self, mix: list[bytes]) -> None:
        lengths = [len(packet) for packet in mix]
        assert min(lengths) >= 14
        assert max(lengths) <= PACKET_MAX
        assert sum(length < 34 for length in lengths) > 300
        assert sum(length > 256 for length in lengths) > 300

    def test_every_hash_type_and_none(self, mix: list[bytes]) -> None:
        for enabled in (ALL_TYPES, BASE_TYPES):
            found = Counter(type_of(classify(packet, enabled)) for packet in mix)
            assert set(found) == {None, *(hash_type for hash_type in HashType if hash_type in enabled)}
            assert min(found.values()) > len(mix) / 100, found

    def test_tags(self, mix: list[bytes]) -> None:
        found: Counter[tuple[bytes, ...]] = Counter()
        for packet in mix:
            tags: list[bytes] = []
            while packet[12 + 4 * len(tags) :][:2] in (b"\x81\x00", b"\x88\xa8"):
                tags.append(packet[12 + 4 * len(tags) :][:2])
            found[tuple(tags)] += 1
        for count in range(4):
            assert len([tags for tags in found if len(tags) == count]) == 2**count
        assert min(n for tags, n in found.items() if len(tags) <= 2) > 300

    def test_next_headers(self, mix: list[bytes]) -> None:
        first = Counter(packet[20] for packet in mix if packet[12:14] == b"\x86\xdd" and len(packet) > 54)
        for number in (0, 6, 17, 43, 44, ESP, 51, ICMPV6, 60):
            assert first[number] > 20, number
        protocols = Counter(packet[23] for packet in mix if packet[12:14] == b"\x08\x00" and len(packet) > 34)
        for number in (TCP, UDP, ICMP, ESP, 51):
            assert protocols[number] > 20, number

    def test_configurations(self) -> None:
        rng = random.Random(3)
        configs = [random_config(rng) for _ in range(1000)]
        assert {len(config.table) for config in configs} == {1, 2, 4, 8, 16, 32, 64, 128}
        assert len({config.types for config in configs}) > 250
        assert len({config.key for config in configs}) > 900
        distinct = [c for c in configs if len({*c.table, c.unclassified_queue}) == len(c.table) + 1]
        assert 700 < len(distinct) < 1000


# Slips that a program, or this reference, could have; the text of the reference before and after.
SLIPS = {
    "1 tag": ("TAGS_MAX = 2", "TAGS_MAX = 1"),
    "3 tags": ("TAGS_MAX = 2", "TAGS_MAX = 3"),
    "no 802.1q": (r'_TAGS = (b"\x81\x00", b"\x88\xa8")', r'_TAGS = (b"\x88\xa8",)'),
    "no 802.1ad": (r'_TAGS = (b"\x81\x00", b"\x88\xa8")', r'_TAGS = (b"\x81\x00",)'),
    "tag 9100": (r'_TAGS = (b"\x81\x00", b"\x88\xa8")', r'_TAGS = (b"\x81\x00", b"\x88\xa8", b"\x91\x00")'),
    "ipv4 version": ("header[0] >> 4 != 4", "header[0] >> 4 not in (4, 6)"),
    "ipv6 version": ("header[0] >> 4 != 6", "header[0] >> 4 not in (4, 6)"),
    "short ipv4 header": ("if words < 5:", "if words < 4:"),
    "ipv4 header length": ("if words < 5:", "if words < 6:"),
    "ipv4 options": ("start + words * 4", "start + 20"),
    "first fragment": ("& 0x3FFF", "& 0x1FFF"),
    "later fragment": ("& 0x3FFF", "& 0x2000"),
    "high offset": ("& 0x3FFF", "& 0x2FFF"),
    "do not fragment": ("& 0x3FFF", "& 0x7FFF"),
    "reserved flag": ("& 0x3FFF", "& 0xBFFF"),
    "tcp header of 19": ("_TCP: 20", "_TCP: 19"),
    "tcp header of 21": ("_TCP: 20", "_TCP: 21"),
    "udp header of 7": ("_UDP: 8", "_UDP: 7"),
    "udp header of 9": ("_UDP: 8", "_UDP: 9"),
    "no hop-by-hop": ("frozenset({_HOP_BY_HOP, ", "frozenset({"),
    "no routing": ("_ROUTING, _FRAGMENT, _AH", "_FRAGMENT, _AH"),
    "no fragment": ("_ROUTING, _FRAGMENT, _AH", "_ROUTING, _AH"),
    "no ah": ("_FRAGMENT, _AH, _DESTINATION})", "_FRAGMENT, _DESTINATION})"),
    "no destination options": ("_AH, _DESTINATION})", "_AH})"),
    "esp followed": ("_AH, _DESTINATION})", "_AH, _DESTINATION, 50})"),
    "mobility followed": ("_AH, _DESTINATION})", "_AH, _DESTINATION, 135})"),
    "15 headers": ("HEADERS_MAX = 16", "HEADERS_MAX = 15"),
    "17 headers": ("HEADERS_MAX = 16", "HEADERS_MAX = 17"),
    "ah as the others": ("(packet[at + 1] + 2) * 4", "(packet[at + 1] + 1) * 8"),
    "fragment header with a length": ("            size = 8\n", ""),
    "atomic fragment has its l4": (
        "            fragmented = True\n",
        "            fragmented = packet[at + 3] & 1 != 0\n",
    ),
    "fragment's l4 counts": ("            fragmented = True\n", ""),
    "walk on after a later fragment": ("                break\n        elif", "                pass\n        elif"),
    "walk ends at any fragment": ("packet[at + 2 : at + 4]) >> 3", "packet[at + 2 : at + 4]) >= 0"),
    "more fragments ends the walk": ("packet[at + 2 : at + 4]) >> 3", "packet[at + 2 : at + 4])"),
    "one header is none": ("headers > 0", "headers > 1"),
    "cut header drops the addresses": (
        "_Chain(_L4(), True, home_address, routing_address)",
        '_Chain(_L4(), True, b"", b"")',
    ),
    "cut header is no extension": ("_Chain(_L4(), True, home", "_Chain(_L4(), headers > 1, home"),
    "no home address": ("(chain.home_address or source)", "source"),
    "no routing address": ("(chain.routing_address or destination)", "destination"),
    "home address with base types": (
        "chain.l4, source + destination)",
        "chain.l4, (chain.home_address or source) + destination)",
    ),
    "tcp6 before ip-ex": ("if match is not None:", "if match is not None and not (match.hash_type & HashType.IP_EX):"),
    "ex for every packet": ("if chain.extended:", "if True:"),
    "last header decides": ("at + size) or home_address", "at + size)"),
    "first home address wins": (
        "= _find_home_address(packet, at, at + size) or home_address",
        "= home_address or _find_home_address(packet, at, at + size)",
    ),
    "home address in hop-by-hop": ("elif protocol == _DESTINATION:", "elif protocol in (_DESTINATION, _HOP_BY_HOP):"),
    "any routing type": ("packet[at + 2] == 2 and", ""),
    "routing length 1": ("packet[at + 1] == 2 and packet", "packet[at + 1] >= 1 and packet"),
    "routing length 4": ("packet[at + 1] == 2 and packet", "packet[at + 1] in (2, 4) and packet"),
    "routing header cut": ("at + 24 <= len(packet)", "at + 23 <= len(packet)"),
    "routing header at the end": ("at + 24 <= len(packet)", "at + 24 < len(packet)"),
    "first routing address wins": (
        "routing_address = packet[at + 8",
        "routing_address = routing_address or packet[at + 8",
    ),
    "31 options": ("OPTIONS_MAX = 32", "OPTIONS_MAX = 31"),
    "33 options": ("OPTIONS_MAX = 32", "OPTIONS_MAX = 33"),
    "options beyond the header": ("end = min(end, len(packet))", "end = len(packet)"),
    "pad1 with a length": ("            at += 1\n            continue\n", "            pass\n"),
    "pad1 not counted": (
        "        if packet[at] == _PAD1:\n            at += 1\n            continue\n",
        "        while at < end - 1 and packet[at] == _PAD1:\n            at += 1\n",
    ),
    "option to the last byte": ("if after > end:", "if after >= end:"),
    "option over the end": ("if after > end:", "if after > end + 1:"),
    "home address of any length": (
        "packet[at] == _HOME_ADDRESS and after == at + 18",
        "packet[at] == _HOME_ADDRESS and after >= at + 18",
    ),
    "any option of length 16": ("packet[at] == _HOME_ADDRESS and after == at + 18", "after == at + 18"),
    "other option type": ("_HOME_ADDRESS = 0xC9", "_HOME_ADDRESS = 0xC8"),
}


def slipped(before: str, after: str) -> types.ModuleType:
    """The reference with a slip in it."""
    text = Path(reference.__file__).read_text()
    assert text.count(before) == 1, f"the reference no longer says {before!r} once"
    # Under the reference's own name: dataclass() looks its module up.
    module = types.ModuleType(reference.__name__)
    exec(compile(text.replace(before, after), "slipped", "exec"), vars(module))
    return module


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_shows(slip: str, mix: list[bytes]) -> None:
    """It changes what becomes of a golden packet and of at least 3 random ones: both reach every rule."""
    module = slipped(*SLIPS[slip])

    def shows(packet: bytes) -> bool:
        for enabled in (ALL_TYPES, BASE_TYPES):
            right, wrong = classify(packet, enabled), module.classify(packet, enabled)
            if (right and (right.hash_type, right.data)) != (wrong and (wrong.hash_type, wrong.data)):
                return True
        return False

    assert any(shows(packet) for _, packet in GOLDEN)
    assert len(list(islice(filter(shows, mix), 3))) == 3
