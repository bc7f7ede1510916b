# SPDX-License-Identifier: BSD-2-Clause
"""A file system in user space with one file, that leaves something without an answer for ever (linux/fuse.h)."""

import contextlib
import ctypes
import errno
import os
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)
_IN, _OUT = struct.Struct("=IIQQIII4x"), struct.Struct("=IiQ")
_ATTR = struct.Struct("=6Q10I")
_LOOKUP, _GETATTR, _OPEN, _RELEASE, _FLUSH, _INIT = 1, 3, 14, 18, 25, 26
_DIRECTORY, _FILE = 1, 2
_MNT_FORCE, _MNT_DETACH = 1, 2
_SILENT = (2, 36, 42)  # FORGET, INTERRUPT, BATCH_FORGET want no answer


class FileSystem:
    """``never`` is the pid of the process whose closing is not answered, ``waits`` is set when it has closed.

    ``silent``: nothing is answered at all.
    """

    def __init__(self, device: int) -> None:
        self.never = 0
        self.silent = False
        self.waits = threading.Event()
        self._device = device

    def run(self) -> None:
        """Until it is unmounted."""
        with contextlib.suppress(OSError):
            while True:
                request = os.read(self._device, 1 << 17)
                _, opcode, unique, node, _, _, thread = _IN.unpack_from(request)
                if opcode in _SILENT or (self.silent and opcode != _INIT):
                    continue
                if opcode == _FLUSH and Path(f"/proc/{self.never}/task/{thread}").exists():
                    self.waits.set()
                    continue
                error, body = _answer(opcode, node)
                os.write(self._device, _OUT.pack(_OUT.size + len(body), -error, unique) + body)


def _answer(opcode: int, node: int) -> tuple[int, bytes]:
    if opcode == _INIT:
        return 0, struct.pack("=4I2H2I2HI7I", 7, 31, 4096, 0, 0, 0, 4096, 1, 1, 0, *[0] * 8)
    if opcode == _LOOKUP:
        return 0, struct.pack("=4Q2I", _FILE, 0, 0, 0, 0, 0) + _attributes(_FILE)
    if opcode == _GETATTR:
        return 0, struct.pack("=Q2I", 0, 0, 0) + _attributes(node)
    if opcode == _OPEN:
        return 0, struct.pack("=Q2I", 1, 0, 0)
    return (0, b"") if opcode in (_FLUSH, _RELEASE) else (errno.ENOSYS, b"")


def _attributes(node: int) -> bytes:
    mode = 0o40755 if node == _DIRECTORY else 0o100666
    return _ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


@contextlib.contextmanager
def mounted(place: Path) -> Iterator[FileSystem]:
    """Every name in it is its file.  Unmounting answers what was not."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    if _libc.mount(b"fuse", os.fsencode(place), b"fuse", 0, options):
        os.close(device)
        raise OSError(ctypes.get_errno(), f"cannot mount on {place}")
    served = FileSystem(device)
    thread = threading.Thread(target=served.run)
    thread.start()
    try:
        yield served
    finally:
        _libc.umount2(os.fsencode(place), _MNT_FORCE | _MNT_DETACH)
        thread.join(20)
        os.close(device)


@contextlib.contextmanager
def stalled() -> Iterator[Path]:
    """A directory in which whoever looks for a file waits until the end of this."""
    with tempfile.TemporaryDirectory(prefix="qsfuse-") as name, mounted(Path(name)) as served:
        served.silent = True
        yield Path(name)
