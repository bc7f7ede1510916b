# SPDX-License-Identifier: BSD-2-Clause
"""Steering programs: load one for a tap, look at any, read what is in its maps.

Theory of operation
-------------------
A tap's program comes in two builds that give the same queue on every packet.  ``shared-body``: a stub of the tap's
own (c/stub.h) tail-calls bodies that are loaded once per host and kept by a pin (a prog_array is emptied when its last
fd or pin goes).
``complete``: all in one, for where the body cannot load (no CAP_PERFMON, a kernel before 6.2, no writable BPF file
system).  ``load_program`` tries the first and falls back to the second; a freshly pinned body has to give the
right queue for known packets before anything uses it.

A configuration that QEMU writes is in three maps.  A program is loaded with maps of its own, or over those of another
program, and both have the same configuration then, also one that QEMU changes meanwhile: that is how a running VM gets
the program of another version of qsteer.  A configuration that qsteer was given is frozen into a stub; for another one
another program is loaded, which takes the first one's place between two packets.

A body's pin may be removed (``clean``) while a stub is being loaded over it by somebody who holds no lock (``run``).
Whoever removes one looks for its users after the pin is out of the way; whoever loads one looks at the pin after the
stub is loaded.  So at least one of the two sees the other.
"""

import contextlib
import errno
import functools
import hashlib
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qsteer import __version__
from qsteer._shim import ffi, lib
from qsteer.errors import BusyError, NotFoundError, PermissionDeniedError, QsteerError, UnsupportedError, from_errno
from qsteer.model import Build, Ident, Kind, MapsContent, ProgramInfo, Source
from qsteer.rss import BASE_TYPES, RssConfig, known_types
from qsteer.shim import OBJECTS, check, check_bpf, out_fd_bpf, raw_config, string

log = logging.getLogger(__name__)

BPFFS = Path("/sys/fs/bpf")
PIN_DIRECTORY = BPFFS / "qsteer"

_BUILD_NUMBERS = {Build.SHARED_BODY: lib.QS_BUILD_SHARED_BODY, Build.COMPLETE: lib.QS_BUILD_COMPLETE}
_SOURCE_NUMBERS = {
    Source.STATIC: lib.QS_SOURCE_STATIC,
    Source.SHARED_MAPS: lib.QS_SOURCE_SHARED_MAPS,
    Source.DEVICE_STATE: lib.QS_SOURCE_DEVICE_STATE,
    Source.GUEST_AGENT: lib.QS_SOURCE_GUEST_AGENT,
    Source.QEMU_MAPS: lib.QS_SOURCE_QEMU_MAPS,
}
NO_BODIES = -1
_PIN_ATTEMPTS = 5
_BODY = os.fsencode(OBJECTS / "tap_body.bpf.o")
_COMPLETE = os.fsencode(OBJECTS / "tap_complete.bpf.o")
_WRITTEN_BY_QEMU = (Source.SHARED_MAPS, Source.QEMU_MAPS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A loaded program and its three maps, as fds that this process owns.

    The maps' are -1 where the configuration is frozen into the program.
    """

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
            if fd >= 0:
                os.close(fd)


def load_program(
    *,
    tap: str,
    source: Source,
    config: RssConfig | None = None,
    displaced: int = 0,
    build: Build | None = None,
    maps_of: ProgramInfo | None = None,
) -> Program:
    """Load a steering program for one tap, with a configuration (none: QEMU will write it).

    With ``maps_of`` it goes on with the configuration of a program that is loaded, qsteer's or QEMU's, instead of
    ``config``: with the very maps of it where QEMU writes into them.  ``displaced`` is the id of the QEMU program that
    it is going to take off.  ``build`` forces one; otherwise the shared body is used where it can be.  Raises
    QsteerError.
    """
    assert not (config and maps_of)
    if maps_of and source not in _WRITTEN_BY_QEMU:
        config, maps_of = _config_of(maps_of), None
    with _maps_of(maps_of) as maps:
        return _load_either(build, lambda which, bodies: _load(which, tap, source, displaced, config, bodies, maps))


def _config_of(info: ProgramInfo) -> RssConfig:
    config = read_maps(info).config
    if not config:
        raise UnsupportedError(f"program {info.id} has no RSS configuration that qsteer could go on with")
    return config


@contextlib.contextmanager
def _maps_of(info: ProgramInfo | None) -> Iterator[tuple[int, int, int] | None]:
    """Fds of a program's three maps, in QEMU's order; None for no program."""
    if not info:
        yield None
        return
    if info.kind is Kind.FOREIGN or not info.has_maps:
        raise UnsupportedError(f'program {info.id} "{info.name}" has no maps that qsteer could go on with')
    with _map_by_id(info.config_id) as config, _map_by_id(info.key_id) as key, _map_by_id(info.table_id) as table:
        yield (config, key, table)


def _load_either(build: Build | None, load: Callable[[Build, int], Program]) -> Program:
    """A stub over the shared body if that can be, or a complete program."""
    if build is Build.COMPLETE:
        return load(build, NO_BODIES)
    try:
        return _load_stub(load)
    except QsteerError as error:
        if build:
            raise
        level = logging.INFO if _is_expected(error) else logging.WARNING
        log.log(level, "no shared body (%s): a complete program instead", error)
        return load(Build.COMPLETE, NO_BODIES)


def _is_expected(error: QsteerError) -> bool:
    """A right or a kernel function that is missing is nothing to worry about; anything else is."""
    return isinstance(error, PermissionDeniedError) or error.errno in (errno.EOPNOTSUPP, errno.ENOSYS)


def _load_stub(load: Callable[[Build, int], Program]) -> Program:
    for _ in range(_PIN_ATTEMPTS):
        bodies = shared_bodies()
        try:
            program = load(Build.SHARED_BODY, bodies)
            try:
                stays = _is_pinned(bodies, bodies_pin())
            except BaseException:
                program.close()
                raise
            if stays:
                return program
            program.close()
        finally:
            os.close(bodies)
    raise BusyError(f"{bodies_pin()} is removed again and again")


def _load(
    build: Build,
    tap: str,
    source: Source,
    displaced: int,
    config: RssConfig | None = None,
    bodies: int = NO_BODIES,
    maps: tuple[int, int, int] | None = None,
) -> Program:
    ident = ffi.new(
        "struct qs_ident *",
        {
            "magic": lib.qs_magic,
            "abi": lib.QS_ABI,
            "build": _BUILD_NUMBERS[build],
            "source": _SOURCE_NUMBERS[source],
            "displaced": displaced,
            "version": [*_own_version(), 0],
            "tap": tap.encode()[:15],
        },
    )
    out = ffi.new("struct qs_program *")
    map_fds = ffi.new("int[3]", maps) if maps else ffi.NULL
    frozen = build is Build.SHARED_BODY and config is not None and _can_be_frozen(source, config)
    if build is Build.COMPLETE:
        result = lib.qs_program_load(_COMPLETE, ident, map_fds, out)
    elif frozen:
        assert config
        result = lib.qs_stub_load_frozen(ident, *raw_config(config), bodies, out)
    else:
        result = lib.qs_stub_load_maps(ident, map_fds, bodies, out)
    check_bpf(result, f'cannot load the steering program for tap "{tap}"')
    program = Program(
        id=out.id,
        build=build,
        prog_fd=out.prog_fd,
        config_fd=out.config_fd,
        key_fd=out.key_fd,
        table_fd=out.table_fd,
    )
    if config and not frozen:
        try:
            _write_config(program, config)
        except BaseException:
            program.close()
            raise
    return program


def _can_be_frozen(source: Source, config: RssConfig) -> bool:
    """A frozen table has a byte for each queue; a guest may ask for a queue that no tap has."""
    return source not in _WRITTEN_BY_QEMU and max(config.table) <= 0xFF


def _own_version() -> tuple[int, ...]:
    return tuple(int(part) for part in __version__.split(".")[:3])


def _write_config(program: Program, config: RssConfig) -> None:
    result = lib.qs_config_write(program.config_fd, program.key_fd, program.table_fd, *raw_config(config))
    check_bpf(result, "cannot write the RSS configuration")


def shared_bodies() -> int:
    """An fd of the host's prog_array, which is loaded, proven and pinned first where there is none.

    Raises QsteerError.
    """
    found = _pinned_bodies()
    if found is not None:
        return found
    bodies = _new_bodies()
    try:
        _prove(bodies)
        _pin(bodies, bodies_pin())
        # Of two that pin at the same time one wins, and both use what is pinned.
        found = _pinned_bodies()
    finally:
        os.close(bodies)
    if found is None:
        raise BusyError(f"{bodies_pin()} does not stay pinned")
    return found


_refused: QsteerError | None = None
"""Why this process cannot load the body: to hear it again takes longer than all else that a tap needs."""


def _new_bodies() -> int:
    """An fd of a prog_array with a body of its own.  Raises QsteerError."""
    global _refused
    if _refused:
        raise _refused.with_traceback(None)
    try:
        return out_fd_bpf(lambda out: lib.qs_bodies_create(_BODY, out), "cannot load the shared body")
    except QsteerError as error:
        if _is_expected(error):
            _refused = error
        raise


@functools.cache
def bodies_pin() -> Path:
    """Where this qsteer's shared body is pinned: by ABI and content, so that no other body is taken for it."""
    digest = hashlib.sha256(Path(os.fsdecode(_BODY)).read_bytes()).hexdigest()
    return PIN_DIRECTORY / f"v{lib.QS_ABI}" / f"bodies-{digest[:12]}"


def _pinned_bodies() -> int | None:
    pin = bodies_pin()
    bodies = _pinned(pin)
    if bodies is None:
        return None
    try:
        if not body_in(bodies):
            raise UnsupportedError(f"{pin} is empty", hint="remove it, then apply again")
    except BaseException:
        os.close(bodies)
        raise
    return bodies


def _pinned(pin: Path) -> int | None:
    """An fd of what is pinned, None for nothing."""
    try:
        return out_fd_bpf(lambda out: lib.qs_pinned(os.fsencode(pin), out), f"cannot open {pin}")
    except QsteerError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def _pin(bodies: int, pin: Path) -> None:
    check(lib.qs_bpffs_mount(os.fsencode(BPFFS)), f"cannot mount a BPF file system on {BPFFS}")
    result = -errno.ENOENT
    for _ in range(_PIN_ATTEMPTS):  # clean removes empty directories
        try:
            PIN_DIRECTORY.mkdir(mode=0o700, exist_ok=True)
            pin.parent.mkdir(mode=0o700, exist_ok=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot make {pin.parent}") from None
        result = lib.qs_pin(bodies, os.fsencode(pin))
        if result != -errno.ENOENT:
            break
    if result != -errno.EEXIST:
        check(result, f"cannot pin {pin}")


def _is_pinned(bodies: int, pin: Path) -> bool:
    """Whether what is pinned there is this very prog_array."""
    return pinned_bodies(pin) == _bodies_id(bodies)


def pinned_bodies(pin: Path) -> int | None:
    """The map id of the prog_array of a shared body, of any version, that is pinned there; None for nothing.

    Raises QsteerError; UnsupportedError where something else is pinned.
    """
    pinned = _pinned(pin)
    if pinned is None:
        return None
    try:
        found = _bodies_id(pinned)
    finally:
        os.close(pinned)
    if found is None:
        raise UnsupportedError(f"{pin} is not a shared body")
    return found


def _bodies_id(fd: int) -> int | None:
    """The map id of a shared body's prog_array; None for anything else."""
    found, kind, name = ffi.new("uint32_t *"), ffi.new("uint32_t *"), ffi.new("char[16]")
    result = lib.qs_map_info(fd, found, kind, name)
    if result == -errno.EBADMSG:
        return None
    check(result, "cannot look at a map")
    is_one = kind[0] == lib.BPF_MAP_TYPE_PROG_ARRAY and string(name) == "qsteer_bodies"
    return int(found[0]) if is_one else None


def _prove(bodies: int) -> None:
    """Run known packets through a stub over a new body.  Raises UnsupportedError unless every queue is right."""
    from qsteer.reference import queue_of  # once per host: the others need not load it

    key = secrets.token_bytes(lib.QS_KEY_BYTES)
    config = RssConfig(types=BASE_TYPES, key=key, table=tuple(range(lib.QS_TABLE_ENTRIES)), unclassified_queue=200)
    with_few = replace(config, table=(1, 0, 3, 2))
    for proven, source in ((config, Source.STATIC), (with_few, Source.STATIC), (config, Source.SHARED_MAPS)):
        program = _load(Build.SHARED_BODY, "", source, 0, proven, bodies)
        try:
            for packet in _proof_packets():
                queue = run_program(program.prog_fd, packet).queue
                if queue != queue_of(packet, proven):
                    raise UnsupportedError(f"the shared body answers wrongly on this kernel (queue {queue})")
        finally:
            program.close()


def _proof_packets() -> tuple[bytes, ...]:
    macs = bytes(12)
    tcp = bytes((4, 210, 0, 80)) + bytes(16)
    ip4 = bytes((0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 1, 2, 3, 10, 4, 5, 6))
    ip6 = bytes((0x60, 0, 0, 0, 0, 20, 6, 64)) + bytes(range(32))
    hops = bytes((6, 0, 1, 4, 0, 0, 0, 0))
    extended = ip6[:6] + b"\0" + ip6[7:] + hops
    return (
        macs + b"\x08\x00" + ip4 + tcp,
        macs + b"\x86\xdd" + ip6 + tcp,
        macs + b"\x86\xdd" + extended + tcp,
        macs + b"\x08\x06" + bytes(28),
    )


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
        raise NotFoundError(f"{what} {wanted} is gone")
    check(result, f"cannot open {what} {wanted}")
    return int(out[0])


def program_info(program_id: int) -> ProgramInfo:
    """What the kernel, and the program's own rodata, say about a loaded program.  Raises QsteerError."""
    with program_by_id(program_id) as fd:
        return program_info_of(fd)


def program_info_of(prog_fd: int) -> ProgramInfo:
    """As program_info, for a program that is at hand."""
    out = ffi.new("struct qs_program_info *")
    check(lib.qs_program_info(prog_fd, out), "cannot look at the program", "it takes CAP_SYS_ADMIN; try sudo")
    name = string(out.name)
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
        frozen_id=out.frozen_id,
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
        tap=string(raw.tap),
        outdated=raw.abi != lib.QS_ABI or tuple(raw.version[0:3]) != _own_version(),
    )


def refill_bodies(info: ProgramInfo) -> None:
    """Give a stub whose shared body is gone this qsteer's body, and pin it.  Raises QsteerError.

    One refill mends every tap whose stub calls into the same prog_array, which gets a pin of its own: new stubs may
    have another by now.
    """
    pin = _refilled_pin(info)
    with _map_by_id(info.bodies_id) as bodies:
        check_bpf(lib.qs_bodies_refill(bodies, _BODY), "cannot load the shared body")
        _pin(bodies, pin)
        if not _is_pinned(bodies, pin):
            raise UnsupportedError(f"{pin} is in the way", hint="qsteer clean removes it, unless it is in use")


def unpin_refilled(info: ProgramInfo) -> None:
    """Undo ``refill_bodies``: the kernel empties the prog_array again.  Raises QsteerError."""
    pin = _refilled_pin(info)
    try:
        if pinned_bodies(pin) != info.bodies_id:
            return
    except UnsupportedError:
        return  # what was in the way
    try:
        pin.unlink(missing_ok=True)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot remove {pin}") from None


def _refilled_pin(info: ProgramInfo) -> Path:
    return bodies_pin().with_name(f"bodies-of-map-{info.bodies_id}")


def body_present(info: ProgramInfo) -> bool:
    """Whether a stub's shared body is still there: a stub without it spreads flows by the kernel's own hash."""
    if not info.bodies_id:
        return True
    with _map_by_id(info.bodies_id) as bodies:
        return body_in(bodies) != 0


def body_in(bodies_fd: int) -> int:
    """The id of the shared body in a prog_array, 0 if it is gone.  Raises QsteerError on what is no prog_array."""
    out = ffi.new("uint32_t *")
    check(lib.qs_bodies_program(bodies_fd, out), "cannot look into the prog_array of the shared body")
    return int(out[0])


def read_maps(info: ProgramInfo) -> MapsContent:
    """The RSS configuration that a program (qsteer's or QEMU's) works with.

    Raises QsteerError: it has none, or no right to look at it.
    """
    if not info.has_config:
        raise UnsupportedError(f'program {info.id} "{info.name}" has no RSS maps')
    raw = ffi.new("struct qs_rss_config *")
    key = ffi.new(f"uint8_t[{lib.QS_KEY_BYTES}]")
    table = ffi.new(f"uint16_t[{lib.QS_TABLE_ENTRIES}]")
    if info.frozen_id:
        with _map_by_id(info.frozen_id) as frozen_fd:
            result = lib.qs_frozen_read(frozen_fd, raw, key, table)
    else:
        with _maps_of(info) as maps:
            assert maps
            result = lib.qs_config_read(*maps, raw, key, table)
    check(result, f"cannot read the maps of program {info.id}")
    length = raw.indirections_len
    config = None
    if 1 <= length <= lib.QS_TABLE_ENTRIES and not length & (length - 1):
        config = RssConfig(
            types=known_types(raw.hash_types),
            key=bytes(key),
            table=tuple(table[0:length]),
            unclassified_queue=raw.default_queue,
        )
    return MapsContent(enabled=bool(raw.redirect), config=config)


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
    check(result, "the program cannot be test-run")
    return TestRun(queue=answer[0], cb_left=bool(cb_left[0]), duration_ns=duration[0])
