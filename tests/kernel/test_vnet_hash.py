# SPDX-License-Identifier: BSD-2-Clause
"""In-kernel RSS: on kernels whose tun has it (marker ``patched``), on one that has something else behind the same
numbers (``decoy``), and on this one.  integration/kernels boots the others; ``QSTEER_TUN`` says which tun it is.
"""

import contextlib
import ctypes
import errno
import fcntl
import io
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
from pyroute2 import IPRoute

from integration.changes import change_engines, static_of
from qsteer import hashing, inventory, kernel
from qsteer.__main__ import main
from qsteer._shim import ffi, lib
from qsteer.errors import ConflictError, QsteerError, UnsupportedError
from qsteer.execute import execute
from qsteer.model import Engine, Generation, Hashing, Kind, Source, Tap, VnetHash
from qsteer.plan import Plan, Static, Wanted, plan_apply, plan_off
from qsteer.rss import BASE_TYPES, NO_TYPES, HashType, RssConfig, parse_key
from qsteer.shim import raw_config
from tests.kernel import private, standin, support
from tests.kernel.daemons import daemon

pytestmark = pytest.mark.root
patched, decoy = pytest.mark.patched, pytest.mark.decoy

TUN = os.environ.get("QSTEER_TUN", "")
GENERATIONS = {"4": Generation.V4, "8": Generation.V9, "11": Generation.V11, "12": Generation.V12}
GENERATION = GENERATIONS.get(TUN)
NEWEST = GENERATION is Generation.V12
EXCLUSIVE = GENERATION is not None and GENERATION.exclusive
CHANGES = 300

TUNSETVNETHDRSZ = 0x400454D8

NAME = "qsvh0"
QUEUES = 3
HEADER = 20
KEY = parse_key(
    "6d:5a:56:da:25:5b:0e:c2:41:67:25:3d:43:a3:8f:b0:d0:ca:2b:cb:"
    "ae:7b:30:b4:77:cb:2d:a3:80:30:f2:0c:6a:42:b7:3b:be:ac:01:fa"
)
CONFIG = RssConfig(types=BASE_TYPES, key=KEY, table=(3, 4), unclassified_queue=5)
"""That of the facts' vectors."""

_MACS = b"\x02\x00\x00\x00\x00\x01\x02\x00\x00\x00\x00\x00"
_IP4 = bytes((172, 17, 0, 0, 172, 17, 0, 1))
_IP6 = b"".join(b"\xff\xff" + bytes(10) + bytes((172, 17, 0, last)) for last in (0, 1))
_PORTS = struct.pack("!HH", 9, 9)
_BODIES = {6: _PORTS + bytes(8) + bytes((5 << 4, 1)) + bytes(6), 17: _PORTS + struct.pack("!HH", 8, 0), 253: bytes(8)}


def ip4(protocol: int, *, fragment: int = 0) -> bytes:
    body = _BODIES[protocol]
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, fragment, 64, protocol, 0) + _IP4
    return _MACS + b"\x08\x00" + header + body


def ip6(protocol: int) -> bytes:
    body = _BODIES[protocol]
    return _MACS + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), protocol, 64) + _IP6 + body


@dataclass(frozen=True, slots=True)
class Vector:
    """A packet, VIRTIO_NET_HASH_REPORT_* and the hash of it, and its queue of three under CONFIG."""

    frame: bytes
    report: int
    hash: int
    queue: int


VECTORS = {
    "loopback, which no type is for": Vector(_MACS + b"\x90\x00" + bytes(46), 0, 0, 2),
    "ipv4": Vector(ip4(253), 1, 0x6E45D952, 0),
    "tcpv4": Vector(ip4(6), 2, 0xFB63539A, 0),
    "udpv4": Vector(ip4(17), 3, 0xFB63539A, 0),
    "ipv6": Vector(ip6(253), 4, 0xD6EB560F, 1),
    "tcpv6": Vector(ip6(6), 5, 0xC2B9F251, 1),
    "udpv6": Vector(ip6(17), 6, 0xC2B9F251, 1),
    "a fragment of tcpv4, by addresses": Vector(ip4(6, fragment=0x2000), 1, 0x6E45D952, 0),
}


class Device:
    """A tap of three queues with a header of 20 bytes, held by a stand-in for a VM; its bytes are read as they come."""

    def __init__(self, vm: standin.Vm, sender: socket.socket) -> None:
        self.tap, self.sender = vm.tap, sender
        self.fd = vm.tap.open.fds[0]
        self.header_bytes(HEADER)

    def header_bytes(self, size: int) -> None:
        fcntl.ioctl(self.fd, TUNSETVNETHDRSZ, struct.pack("i", size))
        self.size = size

    def send(self, frame: bytes) -> tuple[int, bytes]:
        """The queue that a packet came out of, and its header."""
        self.sender.send(frame)
        deadline = time.monotonic() + support.WAIT_S
        while ready := select.select(self.tap.open.fds, (), (), deadline - time.monotonic())[0]:
            data = bytearray(4096)  # where nothing is reported, tun may leave the end of the header alone
            length = os.readv(ready[0], (data,))
            if data[self.size : length] == frame:  # the kernel sends some of its own
                return self.tap.open.fds.index(ready[0]), bytes(data[: self.size])
        raise AssertionError("the packet does not come out")

    def queues(self) -> list[int]:
        """Those that the vectors come out of."""
        return [self.send(vector.frame)[0] for vector in VECTORS.values()]

    def known(self) -> Tap:
        (tap,) = (tap for tap in inventory.fetch().taps if tap.name == NAME)
        return hashing.looked(tap)

    def apply(
        self,
        engine: Engine | None = None,
        config: RssConfig = CONFIG,
        *,
        report: bool | None = None,
        replaces: bool = False,
    ) -> Plan:
        """As ``qsteer apply`` with a configuration of the operator's."""
        wanted = Wanted(source=Source.STATIC, engine=engine, static=static_of(config), report=report, replace=replaces)
        plan = plan_apply(self.known(), wanted)
        execute(plan)
        return plan

    def off(self) -> Plan:
        plan = plan_off(self.known())
        execute(plan)
        return plan

    def set(self, config: RssConfig = CONFIG, *, report: bool = False) -> None:
        """As somebody else does it."""
        assert GENERATION
        hashing.set_rss(self.fd, GENERATION, config, report=report)


RIGHT = [vector.queue for vector in VECTORS.values()]


@pytest.fixture(autouse=True)
def own_host(need_root: None) -> Iterator[None]:
    """Holds, marks, the lock and pins of this test's own, and a network namespace."""
    with private.memory(), support.network_namespace():
        yield


@pytest.fixture
def device() -> Iterator[Device]:
    with standin.vm(NAME, queues=QUEUES) as vm, support.sender(NAME) as sender:
        yield Device(vm, sender)


# --- The device itself, through the shim ------------------------------------------------------------------------------


@patched
@pytest.mark.parametrize("name", VECTORS)
def test_vectors(device: Device, name: str) -> None:
    """Report, hash and queue, and all other bytes of the header."""
    vector = VECTORS[name]
    device.set(report=True)
    assert device.send(vector.frame) == (
        vector.queue,
        bytes(12) + struct.pack("<IHH", vector.hash, vector.report, 0),
    )
    device.set(report=False)
    assert device.send(vector.frame) == (vector.queue, bytes(HEADER))


@patched
@pytest.mark.parametrize("name", VECTORS)
def test_vectors_with_a_report_over_automq(device: Device, name: str) -> None:
    """The kernel's own hash is told, which is not Toeplitz; off, nothing is."""
    assert GENERATION
    vector = VECTORS[name]
    hashing.set_automq(device.fd, GENERATION, BASE_TYPES)
    _, header = device.send(vector.frame)
    told, report, padding = struct.unpack("<IHH", header[12:])
    assert (header[:12], report, padding) == (bytes(12), vector.report, 0)
    assert bool(told) == bool(vector.report) and told not in {one.hash for one in VECTORS.values() if one.hash}
    hashing.set_automq(device.fd, GENERATION)
    assert device.send(vector.frame)[1] == bytes(HEADER)


@patched
def test_only_the_types_that_are_set_count(device: Device) -> None:
    device.set(replace(CONFIG, types=HashType.TCP4 | HashType.IP6), report=True)
    told = {name: struct.unpack("<IH", device.send(vector.frame)[1][12:18]) for name, vector in VECTORS.items()}
    assert told["tcpv4"] == (0xFB63539A, 2)
    assert told["ipv4"] == told["udpv4"] == (0, 0)
    assert told["tcpv6"] == told["udpv6"] == told["ipv6"] == (0xD6EB560F, 4)


@patched
def test_queues_beyond_those_there_are(device: Device) -> None:
    """Nothing is checked; the kernel folds."""
    device.set(replace(CONFIG, table=(65535, 65534), unclassified_queue=65533))
    assert [device.send(VECTORS[name].frame)[0] for name in ("tcpv4", "tcpv6", "loopback, which no type is for")] == [
        65535 % 3,
        65534 % 3,
        65533 % 3,
    ]


def result_of(call: Callable[[], int]) -> str:
    result = call()
    return errno.errorcode[-result] if result < 0 else "ok"


def set_raw(fd: int, config: RssConfig = CONFIG, *, report: bool = False) -> str:
    abi = lib.QS_VNET_ABI_12 if NEWEST else lib.QS_VNET_ABI_3
    return result_of(lambda: int(lib.qs_vnet_rss(fd, abi, *raw_config(config), report)))


def automq_raw(fd: int, types: HashType = NO_TYPES) -> str:
    abi = lib.QS_VNET_ABI_12 if NEWEST else lib.QS_VNET_ABI_3
    return result_of(lambda: int(lib.qs_vnet_automq(fd, abi, int(types))))


@patched
def test_errnos_without_a_device(device: Device) -> None:
    """What can be asked is told without one; what is set takes one."""
    can = ffi.new("struct qs_vnet_can *")
    with Path("/dev/net/tun").open("r+b", buffering=0) as none:
        assert result_of(lambda: int(lib.qs_vnet_can(none.fileno(), can))) == "ok"
        assert (can.types, can.rss, can.report) == (0x3F, 1, 1)
        assert can.abi == (lib.QS_VNET_ABI_12 if NEWEST else lib.QS_VNET_ABI_3)
        assert set_raw(none.fileno()) == automq_raw(none.fileno()) == "EBADFD"
    with IPRoute() as route:
        route.link("del", ifname=NAME)
    assert set_raw(device.fd) == automq_raw(device.fd, BASE_TYPES) == "EBADFD"


LIBC = ctypes.CDLL(None, use_errno=True)
SETTERS = (0x800454E5, 0x800854E6, 0x800854E7) if NEWEST else (0x400854E5,)


def ioctl_at_the_end(fd: int, request: int, message: bytes) -> str:
    """With nothing behind the message but an address that is nobody's."""
    page = mmap.PAGESIZE
    with mmap.mmap(-1, 2 * page) as memory:
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert not LIBC.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 0)
        ctypes.memmove(start + page - len(message), message, len(message))
        ctypes.set_errno(0)
        failed = LIBC.ioctl(fd, ctypes.c_ulong(request), ctypes.c_void_p(start + page - len(message)))
        told = errno.errorcode[ctypes.get_errno()] if failed else "ok"
        assert not LIBC.mprotect(ctypes.c_void_p(start + page), ctypes.c_size_t(page), 3)
        return told


def messages() -> Sequence[tuple[int, bytes]]:
    """Each setter with the least that it takes."""
    table_and_key = struct.pack("HH", 3, 4) + KEY
    if NEWEST:
        rss = struct.pack("IHH", 0x3F, 1, 5) + table_and_key
        return tuple(zip(SETTERS, (struct.pack("I", 0x3F), rss, rss), strict=True))
    return ((SETTERS[0], struct.pack("HxxIHH", 3, 0x3F, 1, 5) + table_and_key),)


@patched
def test_errnos_of_short_memory(device: Device) -> None:
    """EFAULT wherever it ends early, and what was set before stays."""
    for request, message in messages():
        assert ioctl_at_the_end(device.fd, request, message) == "ok"
        before = hashing.vnet_hashes()
        for length in range(0, len(message), 1 if len(message) < 9 else 3):
            assert ioctl_at_the_end(device.fd, request, message[:length]) == "EFAULT", (hex(request), length)
        assert hashing.vnet_hashes() == before


@patched
def test_errnos_of_a_header_without_room(device: Device) -> None:
    """v4 refuses to report; later it is taken, and told as soon as there is room."""
    for size in (10, 12, 19):
        device.header_bytes(size)
        assert set_raw(device.fd) == "ok"
        assert set_raw(device.fd, report=True) == ("EBUSY" if GENERATION is Generation.V4 else "ok")
        assert automq_raw(device.fd, BASE_TYPES) == ("EBUSY" if GENERATION is Generation.V4 else "ok")
    if GENERATION is not Generation.V4:
        device.set(report=True)
        device.header_bytes(12)
        assert device.send(VECTORS["tcpv4"].frame) == (0, bytes(12))
        device.header_bytes(HEADER)
        assert device.send(VECTORS["tcpv4"].frame)[1][12:18] == struct.pack("<IH", 0xFB63539A, 2)


@patched
def test_errnos_beside_a_program(device: Device) -> None:
    """Either refuses the other, or the program goes before RSS."""
    program = support.foreign_program(2)
    frame = VECTORS["tcpv4"].frame
    kernel.attach(device.fd, program)
    assert set_raw(device.fd) == set_raw(device.fd, report=True) == ("EBUSY" if EXCLUSIVE else "ok")
    assert automq_raw(device.fd) == "ok"
    kernel.detach(device.fd)
    device.set()
    if EXCLUSIVE:
        with pytest.raises(QsteerError) as caught:
            kernel.attach(device.fd, program)
        assert caught.value.errno == errno.EBUSY
        kernel.detach(device.fd)  # to attach none is not refused
        assert device.send(frame)[0] == 0
        return
    kernel.attach(device.fd, program)
    assert device.send(frame)[0] == 2
    kernel.detach(device.fd)
    assert device.send(frame)[0] == 0
    os.close(program)


@patched
def test_a_program_that_leaves_it_to_rss(device: Device) -> None:
    """Only v12 knows -1; for all others it is a queue."""
    program = support.foreign_program(0xFFFFFFFF)
    if not EXCLUSIVE:
        device.set()
    kernel.attach(device.fd, program)
    os.close(program)
    assert device.send(VECTORS["tcpv4"].frame)[0] == (0 if NEWEST else 65535 % 3)
    assert device.send(VECTORS["tcpv6"].frame)[0] == (1 if NEWEST else 65535 % 3)


@patched
def test_nonsense_is_taken(device: Device) -> None:
    """Unknown types, a mask that is no 2^n-1: it is for qsteer to refuse them, and to see what others have set."""
    kinds = 0xFFFFFFFF
    table_and_key = struct.pack("HHH", 3, 4, 5) + KEY
    head = struct.pack("IHH", kinds, 2, 5) if NEWEST else struct.pack("HxxIHH", 2, kinds, 2, 5)
    request = SETTERS[-1]
    message = head + table_and_key
    assert LIBC.ioctl(device.fd, ctypes.c_ulong(request), message) == 0
    (found,) = hashing.vnet_hashes().values()
    assert found == VnetHash(rss=True, report=False, types=HashType(0x1FF), config=None)
    assert device.known().steering
    with pytest.raises(ConflictError, match="somebody else has set"):
        device.apply()


@patched
def test_ipv6_alone_takes_the_key_wrongly(device: Device) -> None:
    """Why qsteer refuses that: the right hashes do not come out."""
    device.set(replace(CONFIG, types=HashType.IP6 | HashType.TCP6), report=True)
    told = {struct.unpack("<I", device.send(VECTORS[name].frame)[1][12:16])[0] for name in ("ipv6", "tcpv6")}
    assert told != {0xD6EB560F, 0xC2B9F251}


# --- What qsteer makes of it ------------------------------------------------------------------------------------------


@patched
def test_what_is_found() -> None:
    assert GENERATION
    assert hashing.hashing() == Hashing(generation=GENERATION, types=BASE_TYPES, reports=True, why_not="")
    support.wait_until("its tap is gone", lambda: not [one for one in kernel.open_queues() if "probe" in one.tap])


WITHOUT_RAW = ("setpriv", "--bounding-set=-net_raw", "--inh-caps=-net_raw", "--")


@patched
def test_who_may_not_look_steers_by_a_program(device: Device) -> None:
    """apply says so, keep goes on; what others have set is seen all the same."""
    device.apply()
    apply = (*WITHOUT_RAW, sys.executable, "-m", "qsteer", "apply", "--vm", NAME)
    with daemon("keep", NAME, prefix=WITHOUT_RAW) as keep:
        assert automq_raw(device.fd) == "ok"
        keep.wait_for("put-back")
    tap = device.known()
    assert tap.program_id and tap.steering and tap.steering.config == CONFIG
    device.off()
    done = subprocess.run(apply, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "by a program: whether tun hashes by itself can only be seen with" in done.stdout
    done = subprocess.run((*apply, "--engine", "kernel"), capture_output=True, text=True, check=False)
    assert done.returncode == 4 and done.stderr.startswith("qsteer: no in-kernel RSS: whether tun hashes")


@decoy
def test_another_meaning_of_the_numbers(device: Device) -> None:
    """It answers as v12 does, takes what v12 takes, and is found out; nobody's tap ever saw it."""
    can = ffi.new("struct qs_vnet_can *")
    assert result_of(lambda: int(lib.qs_vnet_can(device.fd, can))) == "ok"
    assert (can.abi, can.types) == (lib.QS_VNET_ABI_12, 0x3F)
    found = hashing.hashing()
    assert not found.generation and "steered known packets wrongly" in found.why_not
    assert device.apply().engine is Engine.EBPF
    assert device.queues() == RIGHT
    with pytest.raises(UnsupportedError, match="steered known packets wrongly"):
        device.apply(Engine.KERNEL)
    device.off()
    device.send(VECTORS["tcpv4"].frame)
    # What would have been seen otherwise: nothing comes out any more.
    assert lib.qs_vnet_rss(device.fd, lib.QS_VNET_ABI_12, *raw_config(CONFIG), False) == 0
    device.sender.send(VECTORS["tcpv4"].frame)
    assert not select.select(device.tap.open.fds, (), (), 0.5)[0]


def test_a_kernel_without(device: Device) -> None:
    """auto steers by a program and says nothing; kernel is refused."""
    can = ffi.new("struct qs_vnet_can *")
    assert result_of(lambda: int(lib.qs_vnet_can(device.fd, can))) == "EINVAL"
    with Path("/dev/net/tun").open("r+b", buffering=0) as none:
        assert result_of(lambda: int(lib.qs_vnet_can(none.fileno(), can))) == "EBADFD"
    assert not hashing.hashing().generation
    with pytest.raises(UnsupportedError, match="does not hash by itself"):
        device.apply(Engine.KERNEL)
    with pytest.raises(UnsupportedError, match="does not hash by itself"):
        device.apply(report=True)
    plan = device.apply()
    assert plan.engine is Engine.EBPF and not any("by a program" in note for note in plan.notes)
    told = support.qsteer("apply", "--vm", NAME, "--engine", "kernel")
    assert (told.returncode, told.stdout) == (5, "")
    assert told.stderr.startswith("qsteer: no in-kernel RSS: this kernel's tun does not hash by itself")


def place(tap: Tap) -> str:
    return f"{tap.netns}-{tap.ifindex}"


def of_kind(steps: Sequence[object]) -> list[str]:
    return [type(step).__name__ for step in steps]


@patched
def test_auto_and_the_way_back(device: Device) -> None:
    """Nothing steers, then tun does; again, and it is unchanged; off, and automq does."""
    plan = device.apply()
    assert (plan.engine, plan.result, of_kind(plan.steps)) == (Engine.KERNEL, "attached", ["SetRss"])
    assert device.queues() == RIGHT
    tap = device.known()
    assert tap.steering and tap.steering.engine is Engine.KERNEL and tap.steering.kind is Kind.QSTEER
    assert (tap.steering.source, tap.steering.config) == (Source.STATIC, CONFIG)
    again = device.apply()
    assert (again.result, again.steps) == ("unchanged", ())
    changed = device.apply(config=replace(CONFIG, table=(4, 3)))
    assert (changed.result, of_kind(changed.steps)) == ("replaced", ["SetRss"])
    assert device.send(VECTORS["tcpv4"].frame)[0] == 1
    assert of_kind(device.off().steps) == ["PutHold", "ClearRss"]
    assert not device.known().steering and not private.files().keys() - {f"holds/{place(tap)}"}
    lifted = device.apply()
    assert of_kind(lifted.steps) == ["SetRss", "RemoveHold"] and private.files().keys() == {f"marks/{place(tap)}"}


@patched
@pytest.mark.parametrize("types", [BASE_TYPES | HashType.TCP_EX, HashType.IP6 | HashType.TCP6])
def test_what_tun_cannot_do_a_program_does(device: Device, types: HashType) -> None:
    config = replace(CONFIG, types=types)
    assert device.apply(config=config).engine is Engine.EBPF
    device.off()
    with pytest.raises(UnsupportedError, match=r"does not hash tcp-ex|takes the key wrongly"):
        device.apply(Engine.KERNEL, config)
    assert not device.known().steering


@patched
def test_no_hash_type_at_all(device: Device) -> None:
    config = replace(CONFIG, types=NO_TYPES)
    assert device.apply(config=config).engine is Engine.KERNEL
    assert set(device.queues()) == {5 % 3}
    assert device.apply(config=config).result == "unchanged"


@patched
def test_from_one_engine_to_the_other(device: Device) -> None:
    """Below the program, or the one after the other; the configuration stays."""
    device.apply(Engine.EBPF)
    plan = plan_apply(device.known(), Wanted(engine=Engine.KERNEL))
    assert of_kind(plan.steps) == (["Detach", "SetRss"] if EXCLUSIVE else ["SetRss", "Detach"])
    execute(plan)
    tap = device.known()
    assert not tap.program_id and tap.steering and tap.steering.config == CONFIG
    plan = plan_apply(tap, Wanted(engine=Engine.EBPF))
    assert of_kind(plan.steps) == (["ClearRss", "Attach"] if EXCLUSIVE else ["Attach", "ClearRss"])
    execute(plan)
    tap = device.known()
    assert tap.program_id and not tap.vnet_hash and tap.steering and tap.steering.config == CONFIG
    assert not private.files()


@patched
@pytest.mark.parametrize("engine", Engine)
def test_a_step_that_fails_is_undone(device: Device, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """From one engine to the other, with the last step refused: all is as before."""
    device.apply(engine)
    before = device.known()
    other = Engine.EBPF if engine is Engine.KERNEL else Engine.KERNEL
    plan = plan_apply(before, Wanted(engine=other))

    def refuse(*_: object, **__: object) -> None:
        raise QsteerError("no", errno=errno.ENOMEM)

    last = of_kind(plan.steps)[-1]
    refused = {"SetRss": "hashing.set_rss", "ClearRss": "hashing.set_automq", "Detach": "kernel.detach"}
    name = f"qsteer.{refused.get(last, 'kernel.attach')}"
    module, _, function = name.rpartition(".")
    works = getattr(sys.modules[module], function)
    calls = iter((refuse,))  # its undo is not refused
    with monkeypatch.context() as patch, pytest.raises(QsteerError, match="no: Cannot allocate"):
        patch.setattr(name, lambda *given, **more: next(calls, works)(*given, **more))
        execute(plan)
    after = device.known()
    assert (after.program_id, after.vnet_hash) == (before.program_id, before.vnet_hash)
    assert device.queues() == RIGHT


@patched
def test_rss_that_somebody_else_has_set(device: Device) -> None:
    """It stays unless told, and auto does not choose against it."""
    device.set()
    tap = device.known()
    assert tap.steering and tap.steering.kind is Kind.FOREIGN
    for engine in (None, *Engine):
        with pytest.raises(ConflictError, match="in-kernel RSS that somebody else has set"):
            device.apply(engine)
    with pytest.raises(ConflictError):
        plan_off(tap)
    plan = device.apply(replaces=True, config=replace(CONFIG, table=(4, 3)))
    assert plan.engine is Engine.KERNEL and "in place of in-kernel RSS that somebody else has set" in plan.notes
    # What is set behind qsteer's back is somebody else's again, whatever the mark says.
    device.set()
    steering = device.known().steering
    assert steering and steering.kind is Kind.FOREIGN


@patched
def test_a_foreign_program(device: Device) -> None:
    program = support.foreign_program(1)
    kernel.attach(device.fd, program)
    os.close(program)
    for engine in (None, *Engine):
        with pytest.raises(ConflictError, match="lb_steer"):
            device.apply(engine)
    plan = device.apply(Engine.KERNEL, replaces=True)
    assert of_kind(plan.steps) == (["Detach", "SetRss"] if EXCLUSIVE else ["SetRss", "Detach"])
    assert device.send(VECTORS["tcpv6"].frame)[0] == 1


@patched
def test_hash_reports(device: Device) -> None:
    """Where the header has room, and else an honest refusal."""
    for size in (10, 12):
        device.header_bytes(size)
        for engine in (None, Engine.KERNEL):
            with pytest.raises(UnsupportedError, match=f"header has {size} bytes, it takes 20"):
                device.apply(engine, report=True)
    device.header_bytes(HEADER)
    plan = device.apply(report=True)
    assert plan.engine is Engine.KERNEL
    assert device.send(VECTORS["tcpv4"].frame)[1][12:18] == struct.pack("<IH", 0xFB63539A, 2)
    assert device.apply(report=True).result == device.apply().result == "unchanged"
    device.apply(config=replace(CONFIG, table=(4, 3)))
    assert device.send(VECTORS["tcpv4"].frame) == (1, bytes(12) + struct.pack("<IHH", 0xFB63539A, 2, 0))
    device.apply(report=False)
    assert device.send(VECTORS["tcpv4"].frame)[1] == bytes(HEADER)


@patched
def test_a_report_over_automq_is_somebodys(device: Device) -> None:
    assert automq_raw(device.fd, BASE_TYPES) == "ok"
    with pytest.raises(ConflictError, match="hashing that somebody else has set"):
        device.apply(Engine.KERNEL)
    if not EXCLUSIVE:
        assert device.apply().engine is Engine.EBPF
        assert [rss.report for rss in hashing.vnet_hashes().values()] == [True]


@patched
def test_death_at_any_moment_leaves_it_qsteers(device: Device) -> None:
    """Between the mark and what it is about, and after it."""
    device.apply()
    plan = plan_apply(device.known(), Wanted(static=Static(table=(4, 3)), source=Source.STATIC))
    for name in ("hashing.set_rss", "tapfiles.TapFile.restore"):
        code = f"""
import os, pickle, signal, sys
from qsteer import execute, hashing, tapfiles
works = {name}
calls = iter(range(3))
def dying(*given, **more):
    if next(calls) == {int("restore" in name)}:
        os.kill(os.getpid(), signal.SIGKILL)
    return works(*given, **more)
{name} = dying
execute.execute(pickle.load(sys.stdin.buffer))
"""
        killed = subprocess.run((sys.executable, "-c", code), input=pickle.dumps(plan), check=False)
        assert killed.returncode == -signal.SIGKILL
        steering = device.known().steering
        assert steering and steering.kind is Kind.QSTEER and steering.config
        assert steering.config.table == ((4, 3) if "restore" in name else (3, 4))


@patched
def test_what_replaced_it_meanwhile_stays(device: Device) -> None:
    tap = device.known()
    plan = plan_apply(tap, Wanted(source=Source.STATIC, static=static_of(CONFIG)))
    device.set(replace(CONFIG, table=(1, 2)))
    with pytest.raises(QsteerError, match="changed meanwhile"):
        execute(plan)
    (found,) = hashing.vnet_hashes().values()
    assert found.config and found.config.table == (1, 2)


@patched
def test_the_digest_changes(device: Device) -> None:
    seen = [kernel.digest()]
    for change in (
        lambda: device.set(),
        lambda: device.set(replace(CONFIG, table=(4, 3))),
        lambda: device.set(replace(CONFIG, key=bytes(40))),
        lambda: device.set(report=True),
        lambda: automq_raw(device.fd),
    ):
        change()
        seen.append(kernel.digest())
    assert len(set(seen[:-1])) == len(seen) - 1
    assert seen[-1] == seen[0]


def said(*arguments: str) -> tuple[int, str, str]:
    """The exit code, what is printed, and what goes wrong: in this process, as Python's start takes its time there."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["qsteer", *arguments, "--vm", NAME]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main()
    return code, out.getvalue(), err.getvalue()


def qsteer(*arguments: str) -> str:
    code, out, err = said(*arguments)
    assert (code, err) == (0, "")
    return out


@patched
def test_the_command_line(device: Device, tmp_path: Path) -> None:
    """From nothing to steered and back, as a user sees it."""
    assert GENERATION
    told = qsteer("apply", "--equal", "3")
    assert told.splitlines()[0] == f"{NAME}  attached  in-kernel RSS {GENERATION}  source static"
    assert qsteer("apply").startswith(f"{NAME}  unchanged")
    row = qsteer("status").splitlines()[1]
    assert f"3/3     -        kernel {GENERATION}" in row and row.endswith("ok"), row
    shown = qsteer("show")
    assert shown.startswith(f"# {NAME}: in-kernel RSS, {GENERATION}, source static\n")
    (tmp_path / "saved").write_text(shown)
    assert qsteer("apply", "--from", str(tmp_path / "saved")).startswith(f"{NAME}  unchanged")
    assert "in-kernel RSS" not in qsteer("apply", "--engine", "ebpf").splitlines()[0]
    assert "ebpf " in qsteer("status").splitlines()[1]
    assert "set in-kernel RSS with a table of 128 entries" in qsteer("apply", "--engine", "kernel", "-n")
    assert qsteer("apply", "--engine", "kernel").splitlines()[0].startswith(f"{NAME}  replaced  in-kernel RSS")
    assert said("apply", "--types", "tcp4,ip-ex", "--engine", "kernel") == (
        5,
        "",
        "qsteer: this kernel's tun does not hash ip-ex\nhint: --engine ebpf steers by a program\n",
    )
    assert qsteer("off").startswith(f"{NAME}  off")
    assert "automq" in qsteer("status").splitlines()[1]
    done = support.qsteer("apply", "--vm", NAME)
    assert "in-kernel RSS" in done.stdout and done.stderr == ""


@patched
def test_keep(device: Device) -> None:
    """What was taken off is put back, by the same engine; a hold is obeyed, what is applied meanwhile is kept."""
    with daemon("keep", NAME) as keep:
        assert keep.wait_for("steered")["new"] == {"program": None, "kind": "qsteer"}
        applied = device.apply(config=replace(CONFIG, table=(4, 3)))
        keep.wait_for("configuration")
        assert automq_raw(device.fd) == "ok"
        assert keep.wait_for("put-back")["detail"] == "put back, it was taken off"
        steering = device.known().steering
        assert steering and steering.config and steering.config.table == (4, 3) and applied.result == "replaced"
        assert f"{NAME}: in-kernel RSS -> in-kernel RSS: put back, it was taken off" in keep.said()
        qsteer("off")
        keep.wait_for("held")
        qsteer("apply", "--engine", "ebpf")
        keep.wait_for("hold-lifted")
        kernel.detach(device.fd)
        keep.wait_for("put-back")
        assert device.known().program_id


@patched
def test_keep_leaves_what_somebody_else_has_set(device: Device) -> None:
    with daemon("keep", NAME) as keep:
        keep.wait_for("steered")
        device.set()
        assert "in-kernel RSS that somebody else has set" in keep.wait_for("left-alone")["detail"]
        steering = device.known().steering
        assert steering and steering.kind is Kind.FOREIGN and steering.config == CONFIG


@patched
def test_clean(device: Device) -> None:
    """A mark stays for as long as what it is about is set."""
    device.apply()
    assert "mark, its RSS is set" in support.qsteer("clean").stdout
    assert automq_raw(device.fd) == "ok"
    assert "mark, its RSS is gone" in support.qsteer("clean").stdout
    assert not private.files()


@patched
def test_engines_change_under_traffic(record_property: Callable[[str, object], None]) -> None:
    """Not a packet outside of both mappings; but where the kernel refuses one beside the other there is a gap."""
    outcome = change_engines(CHANGES, 7)
    verdict = outcome.verdict
    for name, value in (("changes", CHANGES), ("packets", verdict.packets), ("outside", len(verdict.outside))):
        record_property(name, value)
    assert not outcome.verdict.lost and not outcome.left and outcome.verdict.least > 0
    assert bool(outcome.verdict.outside) == EXCLUSIVE
