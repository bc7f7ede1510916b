# SPDX-License-Identifier: BSD-2-Clause
"""What the kernel tells by itself: BPF programs loaded and unloaded, network devices and their queues made and removed.

Nothing of it is more than a reason to look: it can be lost, and be about something else.  Whoever may load programs or
make devices, a guest that turns queues on and off included, can cause any number of them.
"""

import os
from collections.abc import Collection

from qsteer._shim import ffi, lib
from qsteer.errors import from_errno
from qsteer.shim import check, out_fd

_ROOM = 512
"""Events taken at once; a flood has more, and is told as a loss."""


class BpfEvents:
    """Loads and unloads of BPF programs, whoever does them.

    ``fileno()`` is for an epoll that it is registered with beforehand: it says once that there is something.  Raises
    QsteerError where perf events are withheld (CAP_PERFMON, a container).
    """

    def __init__(self) -> None:
        events, fd = ffi.new("struct qs_bpf_events **"), ffi.new("int *")
        check(lib.qs_bpf_events_open(events, fd), "cannot be told of BPF programs that are loaded and unloaded")
        self._events = events[0]
        self._fd = int(fd[0])
        self._into = ffi.new("struct qs_bpf_event[]", _ROOM)
        self._count, self._lost = ffi.new("size_t *"), ffi.new("int *")

    def fileno(self) -> int:
        return self._fd

    def take(self, programs: Collection[int]) -> tuple[bool, bool]:
        """Take what was told.  Whether one of these is gone, and whether any program was loaded.

        If something was lost, it may have been both.
        """
        check(
            lib.qs_bpf_events_read(self._events, self._into, _ROOM, self._count, self._lost),
            "cannot read the events of BPF programs",
        )
        told, lost = self._into[0 : self._count[0]], bool(self._lost[0])
        # Some kernels before 6.2 say 0 of a program that is gone.
        gone = any(one.unload and (not one.id or one.id in programs) for one in told)
        return lost or gone, lost or any(not one.unload for one in told)

    def close(self) -> None:
        lib.qs_bpf_events_close(self._events)


class Uevents:
    """The kernel's messages on network devices and their queues, in one network namespace.

    The namespace lives on while this is open.  Raises QsteerError.
    """

    def __init__(self, pid: int = 0) -> None:
        """In the namespace of a process, or in this process's own."""
        where = f"the network namespace of process {pid}" if pid else "this network namespace"
        message = f"cannot be told of network devices in {where}"
        try:
            netns = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC) if pid else -1
        except OSError as error:
            raise from_errno(error.errno or 0, message) from None
        try:
            self._fd = out_fd(lambda out: lib.qs_uevents_open(netns, out), message)
        finally:
            if netns >= 0:
                os.close(netns)
        self._hint = ffi.new("int *")

    def fileno(self) -> int:
        return self._fd

    def take(self) -> bool:
        """Take what was told.  Whether any of it was about a network device, or something was lost."""
        check(lib.qs_uevents_read(self._fd, self._hint), "cannot read uevents")
        return bool(self._hint[0])

    def close(self) -> None:
        os.close(self._fd)
