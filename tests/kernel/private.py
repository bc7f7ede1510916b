# SPDX-License-Identifier: BSD-2-Clause
"""A host's memory of one's own: what qsteer keeps in /sys/fs/bpf and /run/qsteer, apart from the host's."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from qsteer import programs, shim
from qsteer._shim import lib

CLONE_NEWNS = 0x00020000

PINS = Path("/sys/fs/bpf/qsteer")
RUNTIME = Path("/run/qsteer")

_libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """Live in a mount namespace with an empty BPF file system and an empty /run/qsteer; children do, too."""
    with contextlib.ExitStack() as stack:
        outside = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, outside)
        here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, here)
        _checked(_libc.unshare(CLONE_NEWNS))
        stack.callback(os.fchdir, here)  # setns() goes to the root directory
        stack.callback(lambda: _checked(_libc.setns(outside, CLONE_NEWNS)))
        mount("--make-rprivate", "/")
        mount("-t", "bpf", "bpf", "/sys/fs/bpf")
        RUNTIME.mkdir(exist_ok=True)
        mount("-t", "tmpfs", "qsteer", str(RUNTIME))
        yield


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def unmount(path: str) -> None:
    subprocess.run(["umount", path], check=True)


def _checked(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def pins() -> dict[str, int | None]:
    """What is pinned for qsteer: path below its directory to the id of the map."""
    return {
        str(path.relative_to(PINS)): programs.pinned_bodies(path) for path in sorted(PINS.rglob("*")) if path.is_file()
    }


def files() -> dict[str, bytes]:
    """What qsteer keeps in /run/qsteer, but for the lock's file."""
    found = {str(path.relative_to(RUNTIME)): path for path in sorted(RUNTIME.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if name != "lock"}


def unpinned_bodies() -> int:
    """An fd of a new prog_array with the shared body, which goes when the fd is closed."""
    return shim.out_fd(
        lambda out: lib.qs_bodies_create(os.fsencode(shim.OBJECTS / "tap_body.bpf.o"), out), "cannot load the body"
    )


def pin(name: str) -> None:
    """Pin a shared body that nothing uses."""
    path = PINS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    bodies = unpinned_bodies()
    try:
        assert lib.qs_pin(bodies, os.fsencode(path)) == 0
    finally:
        os.close(bodies)


BPF_F_RDONLY_PROG = 1 << 7


def array_map(name: bytes, value_size: int, *, entries: int = 1, flags: int = 0) -> int:
    """An fd of a new array map."""

    class Options(ctypes.Structure):
        _fields_ = [
            ("size", ctypes.c_size_t),
            ("btf", ctypes.c_uint32 * 4),
            ("inner_map_fd", ctypes.c_uint32),
            ("map_flags", ctypes.c_uint32),
        ]

    array = 2  # BPF_MAP_TYPE_ARRAY
    options = Options(map_flags=flags)
    options.size = ctypes.sizeof(options)
    libbpf = ctypes.CDLL("libbpf.so.1", use_errno=True)
    fd = libbpf.bpf_map_create(array, name, 4, value_size, entries, ctypes.byref(options))
    assert fd >= 0, os.strerror(-fd)
    return int(fd)


def forget_holds() -> None:
    """Remove the holds: the next tap may have the same number in a network namespace of the same number."""
    for path in (RUNTIME / "holds").glob("*"):
        path.unlink()
