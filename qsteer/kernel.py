# SPDX-License-Identifier: BSD-2-Clause
"""The kernel's edge: taps, steering programs and what is attached, over the C shim.

Theory of operation
-------------------
A tap's program comes in two builds that give the same queue on every packet.  ``shared-body``: a stub of the tap's
own tail-calls one body that is loaded once per host and kept by a pin (a prog_array is emptied when its last fd or pin
goes).
``complete``: all in one, for where the body cannot load (no CAP_PERFMON, a kernel before 6.2, no writable BPF file
system).  ``load_program`` tries the first and falls back to the second; a freshly pinned body has to give the
right queue for known packets before anything uses it.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsteer import __version__
from qsteer._shim import ffi, lib
from qsteer.errors import BusyError, NotFoundError, PermissionDeniedError, QsteerError, UnsupportedError, from_errno
from qsteer.model import Build, Ident, Kind, MapsContent, OpenQueue, ProgramInfo, Source
from qsteer.rss import BASE_TYPES, HashType, RssConfig

log = logging.getLogger(__name__)

OBJECTS = Path(__file__).parent / "bpf"
BPFFS = Path("/sys/fs/bpf")
PIN_DIRECTORY = BPFFS / "qsteer"

_BUILD_NUMBERS = {Build.SHARED_BODY: lib.QS_BUILD_SHARED_BODY, Build.COMPLETE: lib.QS_BUILD_COMPLETE}
_SOURCE_NUMBERS = {Source.STATIC: lib.QS_SOURCE_STATIC, Source.SHARED_MAPS: lib.QS_SOURCE_SHARED_MAPS}
_OBJECTS = {Build.SHARED_BODY: "tap_stub.bpf.o", Build.COMPLETE: "tap_complete.bpf.o"}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTap:
    """A tap made by this process: one close-on-exec fd per queue, in order.  It goes when the last one is closed."""

    name: str
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A loaded program and its three maps, as fds that this process owns."""

    id: int
    build: Build
    prog_fd: int
    config_fd: int
    key_fd: int
    table_fd: int

    @property
    def fds(self) -> tuple[int, int, int, int]:
        """In the order of QEMU's ``ebpf-rss-fds``."""
        return (self.prog_fd, self.config_fd, self.key_fd, self.table_fd)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def _check(result: int, message: str, hint: str = "") -> None:
    if result < 0:
        raise from_errno(result, message, hint=hint)


def _check_bpf(result: int, message: str, hint: str = "") -> None:
    """As _check, for what libbpf does: its and the verifier's words go to the log."""
    said = ffi.string(lib.qs_log_take()).decode(errors="replace").strip()
    for line in said.splitlines():
        log.debug("libbpf: %s", line)
    if result >= 0:
        return
    if result == -errno.EPERM or (result == -errno.EACCES and not _has_capability(lib.CAP_PERFMON)):
        raise PermissionDeniedError(message, errno=-result, hint=_missing_capabilities())
    if "not found in kernel or module BTFs" in said:
        raise UnsupportedError(message, errno=errno.EOPNOTSUPP, hint="this kernel lacks what the program calls: -vv")
    if result == -errno.EACCES and said:
        raise UnsupportedError(f"{message}: the kernel's verifier refuses it", hint="-vv shows its reasons")
    _check(result, message, hint)


def _has_capability(number: int) -> bool:
    return bool(effective_capabilities() >> number & 1)


def _missing_capabilities() -> str:
    wanted = {"CAP_BPF": lib.CAP_BPF, "CAP_PERFMON": lib.CAP_PERFMON}
    missing = [name for name, number in wanted.items() if not _has_capability(number)]
    if missing:
        return f"this process lacks {' and '.join(missing)}; try sudo"
    if not _has_capability(lib.CAP_SYS_ADMIN):
        return "this process lacks CAP_SYS_ADMIN, which it takes where tun is a module; try sudo"
    return "a security module or a container withholds the right"


def _string(chars: object) -> str:
    return bytes(ffi.string(chars)).decode(errors="replace")


def _out_fd(call: Callable[[object], int], message: str, hint: str = "") -> int:
    out = ffi.new("int *")
    _check(call(out), message, hint)
    return int(out[0])


# Taps


def open_tap(name: str, queues: int) -> OpenTap:
    """A new multi-queue tap with a virtio-net header; an empty name lets the kernel choose ``tap%d``.

    Raises QsteerError: the name is in use, a capability is missing, the kernel refuses.
    """
    fds: list[int] = []
    buffer = ffi.new("char[16]", (name or "tap%d").encode())
    try:
        for index in range(queues):
            fd = ffi.new("int *")
            result = lib.qs_tap_open(buffer, index == 0, fd)
            if result == -errno.EBUSY and index == 0:
                raise QsteerError(
                    f'the name "{name}" is in use by another network device',
                    hint="choose another ifname=, or leave it out",
                )
            if result == -errno.E2BIG:
                raise QsteerError(f'tap "{_string(buffer)}" cannot have {queues} queues', errno=errno.E2BIG)
            what = f'queue {index} of tap "{_string(buffer)}"' if name or index else "a tap"
            if result < 0:
                raise _tun_error(-result, f"cannot open {what}")
            fds.append(fd[0])
        if any(tap_name(opened) != _string(buffer) for opened in fds):
            raise BusyError(f'tap "{_string(buffer)}" was renamed while its queues were opened')
    except BaseException:
        for opened in fds:
            os.close(opened)
        raise
    return OpenTap(name=_string(buffer), fds=tuple(fds))


def _tun_error(code: int, message: str) -> QsteerError:
    if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return UnsupportedError(message, errno=code, hint="there is no working /dev/net/tun: modprobe tun")
    hint = "it takes CAP_NET_ADMIN, and /dev/net/tun; try sudo" if code in (errno.EPERM, errno.EACCES) else ""
    return from_errno(code, message, hint=hint)


def tap_name(queue_fd: int) -> str:
    """The name of the tap that a queue fd belongs to.  Raises QsteerError if it belongs to none."""
    buffer = ffi.new("char[16]")
    _check(lib.qs_tap_name(queue_fd, buffer), f"fd {queue_fd} is not a queue of a tap")
    return _string(buffer)


def attach(queue_fd: int, prog_fd: int) -> None:
    """Make the tap of a queue fd steer by a program (TUNSETSTEERINGEBPF); replaces whatever was attached, at once."""
    _check(lib.qs_steering_attach(queue_fd, prog_fd), "cannot attach the steering program")


def detach(queue_fd: int) -> None:
    """Take any steering program off the tap of a queue fd; the kernel's automq takes over."""
    _check(lib.qs_steering_detach(queue_fd), "cannot detach the steering program")


@contextlib.contextmanager
def fd_of_process(pid: int, fd: int) -> Iterator[int]:
    """A copy of another process's fd, through pidfd_getfd.

    Raises QsteerError: the process is gone, it has no such fd, or ptrace rights over it are missing.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot reach process {pid}") from None
    try:
        copy = _out_fd(
            lambda out: lib.qs_pidfd_getfd(pidfd, fd, out),
            f"cannot take fd {fd} of process {pid}",
            "it takes CAP_SYS_PTRACE, or to be the process's own user; try sudo",
        )
    finally:
        os.close(pidfd)
    try:
        yield copy
    finally:
        os.close(copy)


def send_fds(sock_fd: int, fds: tuple[int, ...]) -> None:
    """Pass 1 to 16 fds over a unix socket, with one byte (SCM_RIGHTS).  Raises QsteerError."""
    _check(lib.qs_fds_send(sock_fd, ffi.new("int[]", fds), len(fds)), "cannot send fds")


def receive_fds(sock_fd: int, count: int) -> tuple[int, ...]:
    """Exactly ``count`` fds from a unix socket; with any other number none is kept.  Raises QsteerError."""
    fds = ffi.new("int[]", max(count, 1))
    _check(lib.qs_fds_receive(sock_fd, fds, count), "cannot receive fds")
    return tuple(fds[0:count])


# Privileges


def effective_capabilities() -> int:
    """The effective capability set, bit n for capability n."""
    out = ffi.new("uint64_t *")
    _check(lib.qs_capabilities_effective(out), "cannot read this process's capabilities")
    return int(out[0])


def drop_capabilities() -> None:
    """Empty the ambient, inheritable, permitted and effective sets.  Raises QsteerError."""
    _check(lib.qs_capabilities_drop(), "cannot give up capabilities")


# Programs


def load_program(
    *, tap: str, source: Source, config: RssConfig | None = None, displaced: int = 0, build: Build | None = None
) -> Program:
    """Load a steering program for one tap, with ``config`` in its maps (none: QEMU will write them).

    ``displaced`` is the id of the QEMU program that it is going to take off.  ``build`` forces one; otherwise the
    shared body is used where it can be.  Raises QsteerError.
    """
    if build is Build.COMPLETE:
        program = _load(build, tap, source, displaced)
    else:
        try:
            program = _load_stub(tap, source, displaced)
        except QsteerError as error:
            if build:
                raise
            # A right or a kernel function that is missing is nothing to worry about; anything else is.
            expected = isinstance(error, PermissionDeniedError) or error.errno == errno.EOPNOTSUPP
            log.log(
                logging.INFO if expected else logging.WARNING, "no shared body (%s): a complete program instead", error
            )
            program = _load(Build.COMPLETE, tap, source, displaced)
    if config:
        try:
            _write_config(program, config)
        except BaseException:
            program.close()
            raise
    return program


def _load_stub(tap: str, source: Source, displaced: int) -> Program:
    bodies = _shared_bodies()
    try:
        return _load(Build.SHARED_BODY, tap, source, displaced, bodies)
    finally:
        os.close(bodies)


def _load(build: Build, tap: str, source: Source, displaced: int, bodies: int = -1) -> Program:
    version = [int(part) for part in __version__.split(".")[:3]]
    ident = ffi.new(
        "struct qs_ident *",
        {
            "magic": lib.qs_magic,
            "abi": lib.QS_ABI,
            "build": _BUILD_NUMBERS[build],
            "source": _SOURCE_NUMBERS[source],
            "displaced": displaced,
            "version": [*version, 0],
            "tap": tap.encode()[:15],
        },
    )
    program = ffi.new("struct qs_program *")
    result = lib.qs_program_load(os.fsencode(OBJECTS / _OBJECTS[build]), ident, bodies, program)
    _check_bpf(result, f'cannot load the steering program for tap "{tap}"')
    return Program(
        id=program.id,
        build=build,
        prog_fd=program.prog_fd,
        config_fd=program.config_fd,
        key_fd=program.key_fd,
        table_fd=program.table_fd,
    )


def _write_config(program: Program, config: RssConfig) -> None:
    raw = ffi.new(
        "struct qs_rss_config *",
        {
            "redirect": 1,
            "hash_types": int(config.types),
            "indirections_len": len(config.table),
            "default_queue": config.unclassified_queue,
        },
    )
    table = ffi.new(f"uint16_t[{lib.QS_TABLE_ENTRIES}]", config.table)
    result = lib.qs_config_write(program.config_fd, program.key_fd, program.table_fd, raw, config.key, table)
    _check_bpf(result, "cannot write the RSS configuration")


def _shared_bodies() -> int:
    """An fd of the host's prog_array, which is loaded, proven and pinned first where there is none."""
    found = _pinned_bodies()
    if found is not None:
        return found
    bodies = _out_fd_bpf(
        lambda out: lib.qs_bodies_create(os.fsencode(OBJECTS / "tap_body.bpf.o"), out), "cannot load the shared body"
    )
    try:
        _prove(bodies)
        _pin(bodies, bodies_pin())
        # Of two that pin at the same time one wins, and both use what is pinned.
        found = _pinned_bodies()
    finally:
        os.close(bodies)
    if found is None:
        raise UnsupportedError(f"{bodies_pin()} does not stay pinned")
    return found


@functools.cache
def bodies_pin() -> Path:
    """Where this qsteer's shared body is pinned: by ABI and content, so that no other body is taken for it."""
    digest = hashlib.sha256((OBJECTS / "tap_body.bpf.o").read_bytes()).hexdigest()
    return PIN_DIRECTORY / f"v{lib.QS_ABI}" / f"bodies-{digest[:12]}"


def _pinned_bodies() -> int | None:
    pin = bodies_pin()
    try:
        bodies = _out_fd_bpf(lambda out: lib.qs_pinned(os.fsencode(pin), out), f"cannot open {pin}")
    except QsteerError as error:
        if error.errno == errno.ENOENT:
            return None
        raise
    if not body_in(bodies):
        os.close(bodies)
        raise UnsupportedError(f"{pin} is not a filled prog_array", hint="remove it, then apply again")
    return bodies


def _pin(bodies: int, pin: Path) -> None:
    _check(lib.qs_bpffs_mount(os.fsencode(BPFFS)), f"cannot mount a BPF file system on {BPFFS}")
    try:
        PIN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
        pin.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot make {pin.parent}") from None
    result = lib.qs_pin(bodies, os.fsencode(pin))
    if result != -errno.EEXIST:
        _check(result, f"cannot pin {pin}")


def _prove(bodies: int) -> None:
    """Run known packets through a stub over a new body.  Raises UnsupportedError unless every queue is right."""
    key = secrets.token_bytes(lib.QS_KEY_BYTES)
    config = RssConfig(types=BASE_TYPES, key=key, table=tuple(range(lib.QS_TABLE_ENTRIES)), unclassified_queue=200)
    from qsteer.reference import queue_of

    program = _load(Build.SHARED_BODY, "", Source.STATIC, 0, bodies)
    try:
        _write_config(program, config)
        for packet in _proof_packets():
            queue = run_program(program.prog_fd, packet).queue
            if queue != queue_of(packet, config):
                raise UnsupportedError(f"the shared body answers wrongly on this kernel (queue {queue})")
    finally:
        program.close()


def _proof_packets() -> tuple[bytes, ...]:
    macs = bytes(12)
    tcp = bytes((4, 210, 0, 80)) + bytes(16)
    ip4 = bytes((0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 1, 2, 3, 10, 4, 5, 6))
    ip6 = bytes((0x60, 0, 0, 0, 0, 20, 6, 64)) + bytes(range(32))
    return (macs + b"\x08\x00" + ip4 + tcp, macs + b"\x86\xdd" + ip6 + tcp, macs + b"\x08\x06" + bytes(28))


def _out_fd_bpf(call: Callable[[object], int], message: str) -> int:
    out = ffi.new("int *")
    _check_bpf(call(out), message)
    return int(out[0])


@contextlib.contextmanager
def program_by_id(program_id: int) -> Iterator[int]:
    """An fd of any loaded program.  Raises NotFoundError if it is gone, PermissionDeniedError without CAP_SYS_ADMIN."""
    fd = _by_id(lib.qs_program_fd, program_id, "program")
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _map_by_id(map_id: int) -> Iterator[int]:
    fd = _by_id(lib.qs_map_fd, map_id, "map")
    try:
        yield fd
    finally:
        os.close(fd)


def _by_id(call: Callable[[int, object], int], wanted: int, what: str) -> int:
    out = ffi.new("int *")
    result = call(wanted, out)
    if result == -errno.EPERM:
        raise PermissionDeniedError(f"cannot look at {what} {wanted}", hint="it takes CAP_SYS_ADMIN; try sudo")
    if result == -errno.ENOENT:
        raise from_errno(errno.ENODEV, f"{what} {wanted} is gone")
    _check(result, f"cannot open {what} {wanted}")
    return int(out[0])


def program_info(program_id: int) -> ProgramInfo:
    """What the kernel, and the program's own rodata, say about a loaded program.  Raises QsteerError."""
    with program_by_id(program_id) as fd:
        return program_info_of(fd)


def program_info_of(prog_fd: int) -> ProgramInfo:
    """As program_info, for a program that is at hand."""
    out = ffi.new("struct qs_program_info *")
    _check(lib.qs_program_info(prog_fd, out), "cannot look at the program", "it takes CAP_SYS_ADMIN; try sudo")
    name = _string(out.name)
    maps = out.config_id and out.key_id and out.table_id
    ident = _ident(out.ident) if out.has_ident else None
    if ident:
        kind = Kind.QSTEER
    elif maps and name == "tun_rss_steerin":
        kind = Kind.QEMU
    else:
        kind = Kind.FOREIGN
    return ProgramInfo(
        id=out.id,
        kind=kind,
        name=name,
        tag=bytes(out.tag).hex(),
        loaded_ns=out.loaded_ns,
        uid=out.uid,
        config_id=out.config_id,
        key_id=out.key_id,
        table_id=out.table_id,
        bodies_id=out.bodies_id,
        verified_instructions=out.verified_insns,
        ident=ident,
    )


def _ident(raw: Any) -> Ident:
    builds = {number: build for build, number in _BUILD_NUMBERS.items()}
    sources = {number: source for source, number in _SOURCE_NUMBERS.items()}
    return Ident(
        abi=raw.abi,
        build=builds.get(raw.build),
        source=sources.get(raw.source),
        displaced=raw.displaced,
        version=".".join(str(part) for part in raw.version[0:3]),
        tap=_string(raw.tap),
        outdated=raw.abi != lib.QS_ABI,
    )


def refill_bodies(info: ProgramInfo) -> None:
    """Give a stub whose shared body is gone this qsteer's body, and pin it.  Raises QsteerError.

    One refill mends every tap whose stub calls into the same prog_array, which gets a pin of its own: new stubs may
    have another by now.
    """
    with _map_by_id(info.bodies_id) as bodies:
        _check_bpf(lib.qs_bodies_refill(bodies, os.fsencode(OBJECTS / "tap_body.bpf.o")), "cannot load the shared body")
        _pin(bodies, bodies_pin().with_name(f"bodies-of-map-{info.bodies_id}"))


def body_present(info: ProgramInfo) -> bool:
    """Whether a stub's shared body is still there: a stub without it spreads flows by the kernel's own hash."""
    if not info.bodies_id:
        return True
    with _map_by_id(info.bodies_id) as bodies:
        return body_in(bodies) != 0


def body_in(bodies_fd: int) -> int:
    """The id of the shared body in a prog_array, 0 if it is gone.  Raises QsteerError on what is no prog_array."""
    out = ffi.new("uint32_t *")
    _check(lib.qs_bodies_program(bodies_fd, out), "cannot look into the prog_array of the shared body")
    return int(out[0])


def read_maps(info: ProgramInfo) -> MapsContent:
    """The RSS configuration in a program's maps (qsteer's or QEMU's).

    Raises QsteerError: no such maps, or no right to open them.
    """
    if not info.has_maps:
        raise UnsupportedError(f'program {info.id} "{info.name}" has no RSS maps')
    raw = ffi.new("struct qs_rss_config *")
    key = ffi.new(f"uint8_t[{lib.QS_KEY_BYTES}]")
    table = ffi.new(f"uint16_t[{lib.QS_TABLE_ENTRIES}]")
    with (
        _map_by_id(info.config_id) as config_fd,
        _map_by_id(info.key_id) as key_fd,
        _map_by_id(info.table_id) as table_fd,
    ):
        result = lib.qs_config_read(config_fd, key_fd, table_fd, raw, key, table)
    _check(result, f"cannot read the maps of program {info.id}")
    length = raw.indirections_len
    config = None
    if 1 <= length <= lib.QS_TABLE_ENTRIES and not length & (length - 1):
        config = RssConfig(
            types=HashType(raw.hash_types & int(_all_types())),
            key=bytes(key),
            table=tuple(table[0:length]),
            unclassified_queue=raw.default_queue,
        )
    return MapsContent(enabled=bool(raw.redirect), config=config)


def _all_types() -> HashType:
    types = HashType(0)
    for bit in HashType:
        types |= bit
    return types


@dataclass(frozen=True, slots=True, kw_only=True)
class TestRun:
    """What a program did with a packet.  ``queue`` is 32 bits wide: tun takes the low 16, modulo the active queues."""

    __test__ = False

    queue: int
    cb_left: bool
    duration_ns: int


def run_program(prog_fd: int, packet: bytes, repeat: int = 1) -> TestRun:
    """BPF_PROG_TEST_RUN on a packet that starts at its Ethernet header (14 bytes at least).

    ``duration_ns`` is the kernel's average over the repetitions.  Raises QsteerError; EINVAL on a packet that the
    kernel's test run does not take (one shorter than the IP header that its ethertype promises).
    """
    answer, cb_left, duration = ffi.new("uint32_t *"), ffi.new("uint32_t *"), ffi.new("uint32_t *")
    result = lib.qs_program_run(prog_fd, packet, len(packet), repeat, answer, cb_left, duration)
    _check(result, "the program cannot be test-run")
    return TestRun(queue=answer[0], cb_left=bool(cb_left[0]), duration_ns=duration[0])


# What is attached

_TUN_DRIVER = Path("/sys/class/misc/tun")
_CANNOT_LOOK = "cannot read from the kernel what is attached to its taps"
_LOOKING_TAKES = "it takes Linux 6.1 with BTF"
# PROC_PID_INIT_INO of include/linux/proc_ns.h.
_HOST_PID_NAMESPACE = 0xEFFFFFFC


def open_queues(pid: int = 0) -> tuple[OpenQueue, ...]:
    """Every open queue of every tap of the host, from the kernel's own structures; or those of one process.

    A queue that several processes have open is there once for each of them, with the same ``file``.  Raises
    QsteerError: the iterator cannot be loaded (rights, no BTF, a kernel before 6.1), or this is a container whose pids
    are not the host's.
    """
    if not _TUN_DRIVER.exists():
        return ()  # no tap without it; to open /dev/net/tun would load the module
    once = {(queue.file, queue.pid): queue for queue in reversed(_read_queues(pid))}
    return tuple(sorted(once.values(), key=lambda queue: (queue.netns, queue.ifindex, queue.index, queue.pid)))


def _read_queues(pid: int) -> tuple[OpenQueue, ...]:
    records, count = ffi.new("struct qs_queue **"), ffi.new("size_t *")
    _check_bpf(lib.qs_tun_iter_read(_tun_iter(), pid, records, count), _CANNOT_LOOK, hint=_LOOKING_TAKES)
    try:
        return tuple(_queue(records[0][i]) for i in range(count[0]))
    finally:
        lib.qs_free(records[0])


def queue_of(queue_fd: int) -> OpenQueue:
    """What the kernel says now of a queue that this process has open.  Raises QsteerError if it is none."""
    for queue in _read_queues(os.getpid()):
        if queue.fd == queue_fd:
            return queue
    raise NotFoundError(f"fd {queue_fd} is not a queue of a tap any more")


@functools.cache
def _tun_iter() -> Any:
    """The loaded iterator, for as long as this process lives."""
    if Path("/proc/self/ns/pid").stat().st_ino != _HOST_PID_NAMESPACE:
        raise UnsupportedError(f"{_CANNOT_LOOK}: this is not the host's pid namespace", hint="docker run --pid=host")
    try:
        tun_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _tun_error(error.errno or 0, "cannot open /dev/net/tun") from None
    out = ffi.new("struct qs_tun_iter **")
    try:
        result = lib.qs_tun_iter_open(os.fsencode(OBJECTS / "tun_queues.bpf.o"), tun_fd, out)
    finally:
        os.close(tun_fd)
    _check_bpf(result, _CANNOT_LOOK, hint=_LOOKING_TAKES)
    return out[0]


def _queue(raw: Any) -> OpenQueue:
    return OpenQueue(
        file=raw.file,
        pid=raw.pid,
        fd=raw.fd,
        comm=_string(raw.comm),
        tap=_string(raw.tap),
        ifindex=raw.ifindex,
        netns=raw.netns,
        index=raw.queue_index,
        detached=bool(raw.detached),
        active=raw.active,
        disabled=raw.disabled,
        program_id=raw.prog_id,
        is_tap=bool(raw.flags & lib.IFF_TAP),
        multi_queue=bool(raw.flags & lib.IFF_MULTI_QUEUE),
        persistent=bool(raw.flags & lib.IFF_PERSIST),
    )
