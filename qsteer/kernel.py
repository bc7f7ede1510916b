# SPDX-License-Identifier: BSD-2-Clause
"""Taps: make one, reach another process's, attach and detach, and the kernel's word on what is attached to each."""

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qsteer._shim import ffi, lib
from qsteer.errors import BusyError, NotFoundError, PermissionDeniedError, QsteerError, UnsupportedError, from_errno
from qsteer.model import OpenQueue, VnetHash
from qsteer.rss import RssConfig, known_types
from qsteer.shim import OBJECTS, check, check_bpf, string

_TUN_DRIVER = Path("/sys/class/misc/tun")
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_TUN_IS_MODULE = Path("/sys/module/tun/initstate")
_BTF = Path("/sys/kernel/btf")
_NO_SUCH_FEATURE = (errno.EINVAL, errno.E2BIG)
"""What a kernel answers to what it does not know: to a kind of program, a function, an attribute."""
_CANNOT_LOOK = "cannot read from the kernel what is attached to its taps"
_LOOKING_TAKES = "it takes Linux 6.1 with BTF"


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTap:
    """A tap made by this process: one close-on-exec fd per queue, in order.  It goes when the last one is closed."""

    name: str
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


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
                raise QsteerError(f'tap "{string(buffer)}" cannot have {queues} queues', errno=errno.E2BIG)
            what = f'queue {index} of tap "{string(buffer)}"' if name or index else "a tap"
            if result < 0:
                raise _tun_error(-result, f"cannot open {what}")
            fds.append(fd[0])
        if any(tap_name(opened) != string(buffer) for opened in fds):
            raise BusyError(f'tap "{string(buffer)}" was renamed while its queues were opened')
    except BaseException:
        for opened in fds:
            os.close(opened)
        raise
    return OpenTap(name=string(buffer), fds=tuple(fds))


def _tun_error(code: int, message: str) -> QsteerError:
    if code in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return UnsupportedError(message, errno=code, hint="there is no working /dev/net/tun: modprobe tun")
    hint = "it takes CAP_NET_ADMIN, and /dev/net/tun; try sudo" if code in (errno.EPERM, errno.EACCES) else ""
    return from_errno(code, message, hint=hint)


def tap_name(queue_fd: int) -> str:
    """The name of the tap that a queue fd belongs to.  Raises QsteerError if it belongs to none."""
    buffer = ffi.new("char[16]")
    check(lib.qs_tap_name(queue_fd, buffer), f"fd {queue_fd} is not a queue of a tap")
    return string(buffer)


def attach(queue_fd: int, prog_fd: int) -> None:
    """Make the tap of a queue fd steer by a program (TUNSETSTEERINGEBPF); replaces whatever was attached, at once."""
    check(lib.qs_steering_attach(queue_fd, prog_fd), "cannot attach the steering program")


def detach(queue_fd: int) -> None:
    """Take any steering program off the tap of a queue fd; the kernel's automq takes over."""
    check(lib.qs_steering_detach(queue_fd), "cannot detach the steering program")


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
        out = ffi.new("int *")
        result = lib.qs_pidfd_getfd(pidfd, fd, out)
        check(result, f"cannot take fd {fd} of process {pid}", _why_not_taken() if result == -errno.EPERM else "")
        copy = int(out[0])
    finally:
        os.close(pidfd)
    try:
        yield copy
    finally:
        os.close(copy)


def _why_not_taken() -> str:
    with contextlib.suppress(OSError):
        if _YAMA.read_text().strip() == "3":
            return f"{_YAMA} is 3: the kernel lets nobody, until the next boot"
    return "it takes CAP_SYS_PTRACE, or to be the process's own user; try sudo"


def send_fds(sock_fd: int, fds: tuple[int, ...]) -> None:
    """Pass 1 to 16 fds over a unix socket, with one byte (SCM_RIGHTS).  Raises QsteerError."""
    check(lib.qs_fds_send(sock_fd, ffi.new("int[]", fds), len(fds)), "cannot send fds")


def receive_fds(sock_fd: int, count: int) -> tuple[int, ...]:
    """Exactly ``count`` fds from a unix socket; with any other number none is kept.  Raises QsteerError."""
    fds = ffi.new("int[]", max(count, 1))
    check(lib.qs_fds_receive(sock_fd, fds, count), "cannot receive fds")
    return tuple(fds[0:count])


def open_queues(pid: int = 0) -> tuple[OpenQueue, ...]:
    """Every open queue of every tap of the host, from the kernel's own structures; or those of one process.

    A queue that several processes have open is there once for each of them, with the same ``file``.  Raises
    QsteerError: the iterator cannot be loaded (rights, no BTF, a kernel before 6.1), or this is a container whose pids
    are not the host's.
    """
    once = {(queue.file, queue.pid): queue for queue in reversed(_read_queues(pid))}
    return tuple(sorted(once.values(), key=lambda queue: (queue.netns, queue.ifindex, queue.index, queue.pid)))


def queue_of(queue_fd: int) -> OpenQueue:
    """What the kernel says now of a queue that this process has open.  Raises QsteerError if it is none."""
    for queue in _read_queues(os.getpid()):
        if queue.fd == queue_fd:
            return queue
    raise NotFoundError(f"fd {queue_fd} is not a queue of a tap any more")


def vnet_hashes(pid: int = 0) -> dict[tuple[int, int], VnetHash]:
    """What tun hashes by itself on the taps that some process has open, or one; none on a kernel that cannot do it.

    By the tap's network namespace (inode number) and its ifindex.  A key is as it lies in the kernel's memory
    (``hashing.vnet_hashes``).  Raises QsteerError as open_queues does.
    """
    return {(raw.netns, raw.ifindex): _vnet_hash(raw) for raw in _records("tun_vnet.bpf.o", "struct qs_vnet_hash", pid)}


def _vnet_hash(raw: Any) -> VnetHash:
    types, config, entries = known_types(raw.types), None, raw.entries
    if raw.rss and entries <= lib.QS_TABLE_ENTRIES and not entries & (entries - 1):
        config = RssConfig(
            types=types,
            key=bytes(raw.key),
            table=tuple(raw.table[0:entries]),
            unclassified_queue=raw.unclassified_queue,
        )
    return VnetHash(rss=bool(raw.rss), report=bool(raw.report), types=types, config=config)


def digest() -> int:
    """A 64-bit number that changes with the taps of the host, their names, queues, and what is attached to them.

    It sees persistent taps that nobody holds, too, but not who holds the others.  1000 taps of 4 queues take it half a
    millisecond, whatever else runs on the host.  Numbers of one process can be compared, until tun is loaded anew.
    Raises QsteerError as open_queues does.
    """
    return _digest(lib.qs_tun_digest_devices)


def holders_digest() -> int:
    """A 64-bit number that changes with the processes that have queues of tun devices open.

    It looks at every open file of the host: 0.2 µs for each.  Raises QsteerError as open_queues does.
    """
    return _digest(lib.qs_tun_digest_holders)


def _read_queues(pid: int) -> tuple[OpenQueue, ...]:
    return tuple(_queue(raw) for raw in _records("tun_queues.bpf.o", "struct qs_queue", pid))


def _records(name: str, kind: str, pid: int) -> Iterator[Any]:
    """What a BPF object that looks at tun devices tells of each open queue."""
    iterator = _look_with(name)
    if not iterator:
        return
    memory, size = ffi.new("void **"), ffi.new("size_t *")
    check_bpf(lib.qs_tun_iter_read(iterator, pid, memory, size), _CANNOT_LOOK, hint=_LOOKING_TAKES)
    try:
        records = ffi.cast(f"{kind} *", memory[0])
        for number in range(size[0] // ffi.sizeof(kind)):
            yield records[number]
    finally:
        lib.qs_free(memory[0])


def _digest(read: Callable[[Any, Any], int]) -> int:
    iterator = _look_with("tun_digest.bpf.o")
    if not iterator:
        return 0
    out = ffi.new("uint64_t *")
    check_bpf(read(iterator, out), _CANNOT_LOOK, hint=_LOOKING_TAKES)
    return int(out[0])


_loaded: dict[str, tuple[int, Any]] = {}
"""The BPF objects of this process that look at tun devices, each with the driver that it was loaded for."""


def _look_with(name: str) -> Any:
    """A BPF object that looks at tun devices, loaded; None without a tun driver: then there is no tap.

    What is loaded knows the driver by the address of its file operations and by its module's BTF, and so is loaded anew
    when the module was: its directory in sysfs is another one then.
    """
    loaded = driver()
    if not loaded:
        _loaded.clear()
        if not _TUN_DRIVER.parent.exists():
            raise UnsupportedError(f"cannot tell whether there are taps: {_TUN_DRIVER.parent} is missing") from None
        return None  # to open /dev/net/tun would load the module
    if name not in _loaded or _loaded[name][0] != loaded:
        _loaded[name] = (loaded, _load(name))
    return _loaded[name][1]


def driver() -> int:
    """A number that tells one tun driver from the next, where it is a module; 0 for none."""
    try:
        return _TUN_DRIVER.stat().st_ino
    except OSError:
        return 0


def _load(name: str) -> Any:
    if Path("/proc/self/ns/pid").stat().st_ino != lib.QS_HOST_PID_NAMESPACE:
        raise UnsupportedError(f"{_CANNOT_LOOK}: this is not the host's pid namespace", hint="docker run --pid=host")
    try:
        tun_fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _tun_error(error.errno or 0, "cannot open /dev/net/tun") from None
    out = ffi.new("struct qs_tun_iter **")
    try:
        result = lib.qs_tun_iter_open(os.fsencode(OBJECTS / name), tun_fd, out)
    finally:
        os.close(tun_fd)
    try:
        check_bpf(result, _CANNOT_LOOK, hint=_LOOKING_TAKES)
    except PermissionDeniedError:
        raise
    except QsteerError as error:
        if lacks := _not_described():
            raise UnsupportedError(f"{_CANNOT_LOOK}: {lacks}", hint=_LOOKING_TAKES) from None
        if error.errno in _NO_SUCH_FEATURE:
            raise UnsupportedError(_CANNOT_LOOK, hint=_LOOKING_TAKES, errno=error.errno) from None
        raise
    return ffi.gc(out[0], lib.qs_tun_iter_close)


def _not_described() -> str:
    """Whose structures this kernel does not describe; libbpf's errno does not tell."""
    if not (_BTF / "vmlinux").exists():
        return f"this kernel has no BTF ({_BTF / 'vmlinux'} is missing)"
    if _TUN_IS_MODULE.exists() and not (_BTF / "tun").exists():
        return f"tun is a module without BTF ({_BTF / 'tun'} is missing)"
    return ""


def _queue(raw: Any) -> OpenQueue:
    return OpenQueue(
        file=raw.file,
        pid=raw.pid,
        fd=raw.fd,
        comm=string(raw.comm),
        tap=string(raw.tap),
        ifindex=raw.ifindex,
        netns=raw.netns,
        index=raw.queue_index,
        detached=bool(raw.detached),
        active=raw.active,
        disabled=raw.disabled,
        program_id=raw.prog_id,
        attachment=raw.attachment,
        vnet_hash=raw.vnet_hash,
        header=raw.header if raw.flags & lib.IFF_VNET_HDR else 0,
        header_little_endian=bool(
            raw.flags & lib.QS_TUN_VNET_LE or (sys.byteorder == "little" and not raw.flags & lib.QS_TUN_VNET_BE)
        ),
        is_tap=bool(raw.flags & lib.IFF_TAP),
        multi_queue=bool(raw.flags & lib.IFF_MULTI_QUEUE),
        persistent=bool(raw.flags & lib.IFF_PERSIST),
    )
