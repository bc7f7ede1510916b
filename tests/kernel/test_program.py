# SPDX-License-Identifier: BSD-2-Clause
"""Both builds of the steering program against the reference: one packet, one queue, whoever computes it."""

import contextlib
import ctypes
import errno
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest

from qsteer import kernel, model, programs, shim
from qsteer.errors import NotFoundError, QsteerError
from qsteer.model import Build, Source
from qsteer.programs import Program
from qsteer.reference import classify, queue_of
from qsteer.rss import RssConfig
from tests import packets
from tests.kernel import support

pytestmark = pytest.mark.root


class Kind(NamedTuple):
    """How a program is loaded: its configuration is frozen into the shared body's stub, or in maps that QEMU writes."""

    build: Build
    source: Source

    def __str__(self) -> str:
        return f"{self.build}-{self.source}"


KINDS = tuple(
    Kind(build, source)
    for build in support.BUILDS
    for source in (Source.STATIC, Source.SHARED_MAPS)
    if build is Build.SHARED_BODY or source is Source.STATIC
)
RANDOM_PACKETS = int(os.environ.get("QSTEER_PACKETS", "100000"))
"""Fewer where a kernel is emulated."""
QUEUES = 16
SO_ATTACH_BPF = 50

EVERYTHING = RssConfig(
    types=packets.ALL_TYPES, key=bytes(range(7, 47)), table=tuple(range(128)), unclassified_queue=999
)


@contextlib.contextmanager
def loaded(kind: Kind, config: RssConfig) -> Iterator[Program]:
    program = programs.load_program(tap="qs-tap", source=kind.source, config=config, build=kind.build)
    try:
        yield program
    finally:
        program.close()


@pytest.fixture(scope="module", params=KINDS, ids=str)
def program_of_a_kind(request: pytest.FixtureRequest) -> Iterator[Program]:
    """Loaded once: the verifier takes a while, where a processor is emulated."""
    with loaded(request.param, EVERYTHING) as program:
        yield program


@pytest.mark.parametrize("packet", [pytest.param(packet, id=name) for name, packet in packets.GOLDEN])
def test_golden_packets(program_of_a_kind: Program, packet: bytes) -> None:
    try:
        answer = programs.run_program(program_of_a_kind.prog_fd, packet)
    except QsteerError:
        # BPF_PROG_TEST_RUN refuses what is shorter than its IP header; a real tap takes it (below).
        assert len(packet) < 14 + 40
        return
    assert answer.queue == queue_of(packet, EVERYTHING)
    assert not answer.cb_left


def test_random_packets() -> None:
    """100,000 packets (QSTEER_PACKETS) of every shape, over many configurations, through every build."""
    rng = random.Random(20)
    run = refused = hashed = 0
    configurations = min(100, math.ceil(RANDOM_PACKETS / 100))
    for seed in range(configurations):
        config = packets.random_config(rng)
        if seed % 2:  # what can be frozen
            config = replace(config, table=tuple(entry % 256 for entry in config.table))
        with contextlib.ExitStack() as stack:
            built = [stack.enter_context(loaded(kind, config)) for kind in KINDS]
            for packet in packets.random_packets(seed, math.ceil(1.05 * RANDOM_PACKETS / configurations)):
                try:
                    answers = [programs.run_program(program.prog_fd, packet) for program in built]
                except QsteerError:
                    refused += 1
                    continue
                wanted = queue_of(packet, config)
                assert {answer.queue for answer in answers} == {wanted}, (config, packet.hex())
                assert not any(answer.cb_left for answer in answers)
                run += 1
                hashed += classify(packet, config.types) is not None
    assert run >= RANDOM_PACKETS > 0
    assert hashed > run / 3
    assert refused < run / 20


def through(tap: support.TapUnderTest, sock: socket.socket, packet: bytes, header: bytes = b"") -> int:
    """The queue that a packet comes out of."""
    sock.send(header + packet)
    queue, frame = tap.receive()
    assert frame == packet
    return queue


def cut_packets() -> list[bytes]:
    """Golden packets, whole and cut: what a cut one lacks is still in memory from the whole one before it."""
    cut = []
    for _, packet in packets.GOLDEN[::3]:
        cut += [packet, *(packet[:length] for length in range(14, min(len(packet), 140), 3))]
    return cut


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_on_a_tap(namespace: str, kind: Kind) -> None:
    """Random packets, and golden ones cut short, as tun itself runs the program."""
    shapes = [*packets.random_packets(77, 1500), *cut_packets()]
    with support.tap("qs-tap", QUEUES) as tap, loaded(kind, EVERYTHING) as program, support.sender(tap.name) as sock:
        tap.attach(program)
        for packet in shapes:
            assert through(tap, sock, packet) == queue_of(packet, EVERYTHING) % QUEUES, packet.hex()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    "tags",
    [
        (),
        (packets.ETH_8021Q,),
        (packets.ETH_8021AD,),
        (packets.ETH_8021AD, packets.ETH_8021Q),
        (0x8100, 0x8100, 0x8100),
    ],
)
def test_vlan_through_a_bridge(namespace: str, kind: Kind, tags: tuple[int, ...]) -> None:
    """On the way through veth and bridge the outer tag leaves the packet's data."""
    support.add_bridge("qs-br")
    support.add_veth("qs-veth", "qs-peer")
    support.links_up("qs-veth")
    support.links_up("qs-peer", master="qs-br")
    with support.tap("qs-tap", QUEUES) as tap, loaded(kind, EVERYTHING) as program, support.sender("qs-veth") as sock:
        support.links_up(tap.name, master="qs-br")
        tap.attach(program)
        for packet in flows(tags):
            assert through(tap, sock, packet) == queue_of(packet, EVERYTHING) % QUEUES


def flows(tags: tuple[int, ...] = ()) -> list[bytes]:
    """Some hundred flows: IPv4 and IPv6, TCP and UDP, with and without options and extension headers."""
    made = []
    for port in range(30):
        tcp, udp = packets.tcp((port, 80), b"payload"), packets.udp((port, 53), b"payload")
        made += [
            packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.TCP, tcp), tags=tags),
            packets.ethernet(packets.ETH_IPV4, packets.ipv4(packets.UDP, udp), tags=tags),
            packets.ethernet(packets.ETH_IPV6, packets.ipv6(packets.TCP, tcp), tags=tags),
            packets.ethernet(
                packets.ETH_IPV6,
                packets.ipv6(packets.UDP, udp, extensions=(packets.destination(packets.home_address()),)),
                tags=tags,
            ),
        ]
    return made


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("linear", [14, 18, 22, 30, 40, 58])
def test_headers_outside_of_the_linear_area(namespace: str, kind: Kind, linear: int) -> None:
    """Another guest's tap, with a small hdr_len in the virtio-net header, leaves only that many bytes linear.

    tun does so from a page on (drivers/net/tun.c: tun_alloc_skb), hence jumbo frames.
    """
    support.add_bridge("qs-br")
    header = bytes((0, 0)) + linear.to_bytes(2, "little") + bytes(6)
    shapes = [*flows(), *flows((packets.ETH_8021AD, packets.ETH_8021Q)), *packets.random_packets(3, 300)]
    with (
        support.tap("qs-tap", QUEUES) as tap,
        support.tap("qs-from", 1) as guest,
        loaded(kind, EVERYTHING) as program,
    ):
        support.links_up(tap.name, guest.name, "qs-br", mtu=9000)
        support.links_up(tap.name, guest.name, master="qs-br")
        tap.attach(program)
        for shape in shapes:
            packet = shape.ljust(5000, b"\xa5")
            os.write(guest.open.fds[0], header + packet)
            assert tap.receive() == (queue_of(packet, EVERYTHING) % QUEUES, packet)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_nothing_is_read_on_a_unix_socket(kind: Kind) -> None:
    """QEMU has the program's fd; what the program returns must tell nothing of the kernel's memory."""
    config = RssConfig(types=packets.ALL_TYPES, key=EVERYTHING.key, table=(250,) * 128, unclassified_queue=7)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with loaded(kind, config) as program, ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program.prog_fd)
        theirs.settimeout(support.WAIT_S)
        for message in [*(bytes((0x45,)) * length for length in (1, 2, 13, 14, 15, 20, 34, 1000)), *flows()]:
            ours.send(message)
            # A socket filter's answer is the number of bytes to keep.
            assert len(theirs.recv(2000)) == min(7, len(message))


@pytest.mark.shared_body
def test_nothing_is_read_on_a_udp_socket() -> None:
    config = RssConfig(types=packets.ALL_TYPES, key=EVERYTHING.key, table=(250,) * 128, unclassified_queue=20)
    with (
        loaded(Kind(Build.SHARED_BODY, Source.STATIC), config) as program,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ours,
    ):
        theirs.bind(("127.0.0.1", 0))
        theirs.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program.prog_fd)
        theirs.settimeout(support.WAIT_S)
        for length in (0, 1, 11, 12, 13, 900):
            ours.sendto(bytes(length), theirs.getsockname())
            # 8 of the 20 bytes are the UDP header's.
            assert len(theirs.recv(2000)) == min(12, length)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("socket_type", [socket.SOCK_RAW, socket.SOCK_DGRAM], ids=["raw", "dgram"])
def test_on_a_packet_socket(namespace: str, kind: Kind, socket_type: int) -> None:
    """The reference's answer, whether the socket's data starts at the MAC header or at the IP header."""
    config = RssConfig(types=packets.ALL_TYPES, key=EVERYTHING.key, table=tuple(range(100, 228)), unclassified_queue=99)
    everything = 3  # ETH_P_ALL
    support.add_veth("qs-veth", "qs-peer")
    support.links_up("qs-veth", "qs-peer")
    with (
        loaded(kind, config) as program,
        support.sender("qs-veth") as sock,
        socket.socket(socket.AF_PACKET, socket_type, socket.htons(everything)) as theirs,
    ):
        theirs.bind(("qs-peer", everything))
        theirs.settimeout(support.WAIT_S)
        theirs.setsockopt(socket.SOL_SOCKET, SO_ATTACH_BPF, program.prog_fd)
        for packet in flows():
            longer = packet.ljust(300, b"\0")
            sock.send(longer)
            # What the filter returns is how many bytes are kept.
            assert len(theirs.recv(2000)) == queue_of(longer, config)


WITH_MAPS = tuple(kind for kind in KINDS if kind.build is Build.COMPLETE or kind.source is Source.SHARED_MAPS)
"""Where the configuration is in maps that may be written to."""


@pytest.mark.parametrize("kind", WITH_MAPS, ids=str)
def test_hostile_maps(tap: support.TapUnderTest, kind: Kind) -> None:
    """Whatever QEMU writes into the maps, packets go somewhere, and to the unclassified queue if it makes no sense."""
    packet = flows()[0]
    with loaded(kind, EVERYTHING) as program:
        for length, types, redirect in (
            (0, 511, 1),
            (100, 511, 1),
            (129, 511, 1),
            (65535, 511, 1),
            (128, 0, 1),
            (128, 511, 0),
        ):
            write_config(program, redirect=redirect, types=types, length=length, unclassified=65535)
            assert programs.run_program(program.prog_fd, packet).queue == 65535
        write_config(program, redirect=255, types=0xFFFFFFFF, length=128, unclassified=0)
        assert programs.run_program(program.prog_fd, packet).queue == queue_of(packet, EVERYTHING)


def write_config(program: Program, *, redirect: int, types: int, length: int, unclassified: int) -> None:
    """What a hostile QEMU may do: the shim writes any configuration, only Python refuses."""
    from qsteer._shim import ffi, lib

    raw = ffi.new(
        "struct qs_rss_config *",
        {"redirect": redirect, "hash_types": types, "indirections_len": length, "default_queue": unclassified},
    )
    table = ffi.new("uint16_t[128]", EVERYTHING.table)
    assert lib.qs_config_write(program.config_fd, program.key_fd, program.table_fd, raw, EVERYTHING.key, table) == 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_small_tables(kind: Kind) -> None:
    """Tables of every length, and of every period: where few bits of the hash are needed, few are computed."""
    shapes = [packet for _, packet in packets.GOLDEN[::9]] + flows()
    rng = random.Random(7)
    for length in (1, 2, 4, 8, 16, 32, 64, 128):
        for period in (1, 2, 4, 8, 16, 32, 64, 128):
            if period > length:
                continue
            entries = tuple(rng.sample(range(256), period)) * (length // period)
            for table in (entries, (*entries[:-1], (entries[-1] + 1) % 256)):  # and one that nearly repeats itself
                config = replace(EVERYTHING, table=table)
                with loaded(kind, config) as program:
                    for packet in shapes:
                        if len(packet) >= 14 + 40:
                            assert programs.run_program(program.prog_fd, packet).queue == queue_of(packet, config)


def test_queues_beyond_a_byte(need_root: None) -> None:
    """A guest may ask for a queue that no tap has; the configuration is then kept as QEMU keeps it."""
    config = replace(EVERYTHING, table=tuple(range(200, 328)))
    for kind in KINDS:
        with loaded(kind, config) as program:
            for packet in flows():
                assert programs.run_program(program.prog_fd, packet).queue == queue_of(packet, config)
            assert programs.read_maps(programs.program_info(program.id)).config == config


@pytest.mark.shared_body
def test_what_is_frozen_stays_so(need_root: None) -> None:
    """Nobody writes to it any more, and it goes with the program."""
    with loaded(Kind(Build.SHARED_BODY, Source.STATIC), EVERYTHING) as program:
        info = programs.program_info(program.id)
        assert info.frozen_id and not info.has_maps and programs.read_maps(info).config == EVERYTHING
        with programs._map_by_id(info.frozen_id) as fd:
            libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
            assert libbpf.bpf_map_update_elem(fd, bytes(4), bytes(4096), ctypes.c_uint64(0)) == -errno.EPERM

    def gone() -> bool:
        try:
            with programs._map_by_id(info.frozen_id):
                return False
        except NotFoundError:
            return True

    support.wait_until("the map is gone", gone)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_taps_with_one_ifindex(need_root: None, kind: Kind) -> None:
    """Each pod has a tap of the same name and ifindex; each is steered by its own table."""
    with contextlib.ExitStack() as stack:
        taps = []
        for queue in (1, 3):
            namespace = stack.enter_context(support.network_namespace())
            tap = stack.enter_context(support.tap("qs-tap", 4))
            config = RssConfig(types=packets.ALL_TYPES, key=EVERYTHING.key, table=(queue,))
            tap.attach(stack.enter_context(loaded(kind, config)))
            taps.append((namespace, tap, queue))
        seen = [open_queue for open_queue in kernel.open_queues() if open_queue.pid == os.getpid()]
        assert len({open_queue.ifindex for open_queue in seen}) == 1
        assert len({open_queue.netns for open_queue in seen}) == 2
        for namespace, tap, queue in taps:
            with support.inside(namespace), support.sender("qs-tap") as sock:
                assert {through(tap, sock, packet) for packet in flows()} == {queue}


def test_what_is_loaded_says_who_it_is() -> None:
    with loaded(Kind(Build.COMPLETE, Source.STATIC), EVERYTHING) as program:
        info = programs.program_info(program.id)
        assert info.kind is model.Kind.QSTEER
        assert info.ident and info.ident.tap == "qs-tap" and info.ident.build is Build.COMPLETE
        assert programs.read_maps(info).config == EVERYTHING


@pytest.mark.shared_body
def test_the_body_is_gone(tap: support.TapUnderTest) -> None:
    """A stub without its body still answers, leaves no address behind, and is reported as broken."""
    from qsteer._shim import ffi, lib

    empty = ffi.new("int *")
    body = str(shim.OBJECTS / "tap_body.bpf.o").encode()
    assert lib.qs_bodies_create(body, empty) == 0
    program = programs._load(Build.SHARED_BODY, "qs-tap", Source.STATIC, 0, EVERYTHING, empty[0])
    try:
        info = programs.program_info(program.id)
        assert programs.body_present(info)
        assert programs.run_program(program.prog_fd, flows()[0]).queue == queue_of(flows()[0], EVERYTHING)
        os.close(empty[0])  # the last hold on the prog_array: the kernel empties it, in a worker of its own
        support.wait_until("the body is gone", lambda: not programs.body_present(info))
        answer = programs.run_program(program.prog_fd, flows()[0])
        assert answer.queue < 128 and not answer.cb_left
        tap.attach(program)
        assert "broken" in support.qsteer("status", "--pid", str(os.getpid())).stdout
        programs.refill_bodies(info)
        assert programs.body_present(info)
        assert programs.run_program(program.prog_fd, flows()[0]).queue == queue_of(flows()[0], EVERYTHING)
        assert support.qsteer("status", "--check", "--pid", str(os.getpid())).returncode == 0
        programs.bodies_pin().with_name(f"bodies-of-map-{info.bodies_id}").unlink()
        checked = support.qsteer("status", "--check", "--pid", str(os.getpid()))
        assert checked.returncode == 7 and "broken" in checked.stdout
        done = support.qsteer("apply", "--pid", str(os.getpid()))
        assert done.returncode == 0 and "replaced" in done.stdout, done.stderr
        assert "ok" in support.qsteer("status", "--pid", str(os.getpid())).stdout
    finally:
        program.close()


@pytest.mark.shared_body
@pytest.mark.parametrize("source", [Source.STATIC, Source.SHARED_MAPS])
def test_flows_are_spread_without_the_body(namespace: str, source: Source) -> None:
    """By the hash that the kernel has at hand, and through the table: flows stay on their queues."""
    from qsteer._shim import ffi, lib

    empty = ffi.new("int *")
    assert lib.qs_bodies_create(str(shim.OBJECTS / "tap_body.bpf.o").encode(), empty) == 0
    config = replace(EVERYTHING, table=(1, 3))
    with (
        contextlib.closing(programs._load(Build.SHARED_BODY, "qs-tap", source, 0, config, empty[0])) as program,
        support.tap("qs-tap", 4) as tap,
        support.sender("qs-tap") as sock,
    ):
        tap.attach(program)
        os.close(empty[0])
        info = programs.program_info(program.id)
        support.wait_until("the body is gone", lambda: not programs.body_present(info))
        first = [through(tap, sock, packet) for packet in flows()]
        assert set(first) <= {1, 3} and first == [through(tap, sock, packet) for packet in flows()]


def test_the_verifier_has_room(need_root: None) -> None:
    """It stops at a million instructions; other compilers and kernels need more of them than this one."""
    with contextlib.ExitStack() as stack:
        for kind in KINDS:
            program = stack.enter_context(loaded(kind, EVERYTHING))
            assert programs.program_info(program.id).verified_instructions < 200_000
    if Build.SHARED_BODY in support.BUILDS:
        bodies = programs.shared_bodies()
        assert programs.program_info(programs.body_in(bodies)).verified_instructions < 200_000
        os.close(bodies)


LOAD_COMPLETE = """
from qsteer import programs
from qsteer.model import Build, Source
program = programs.load_program(tap="qs-tap", source=Source.STATIC, build=Build.COMPLETE)
print(program.id, flush=True)
input()
"""


def test_the_complete_build_takes_no_perfmon(need_root: None) -> None:
    """With CAP_BPF alone the verifier lets nothing smaller than a pointer be stored where a pointer was."""
    rights = "-all,+bpf,+dac_read_search"  # the last for a checkout in a closed home
    only = ("setpriv", "--securebits=+noroot", f"--inh-caps={rights}", f"--ambient-caps={rights}")
    with subprocess.Popen(
        [*only, sys.executable, "-c", LOAD_COMPLETE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout
        number = child.stdout.readline()
        # it takes more than this to look
        taken = programs.program_info(int(number)).verified_instructions if number else 0
        _, said = child.communicate("\n")
    assert child.returncode == 0, said
    assert 0 < taken < 200_000, "the verifier stops at a million"
