# SPDX-License-Identifier: BSD-2-Clause
"""Connect to a unix socket that a QEMU serves, and be sure that it is that QEMU at the other end.

Theory of operation
===================

The path comes from a command line, which a process can forge, and a pid may be another process's a moment later.  So a
pidfd is opened first, and the process compared with the one that is meant.  The path is followed as that process sees
it, name by name: from its root or its working directory, symbolic links within its root (a container's ``/var/run`` is
not the host's).  All is opened with O_PATH, which does nothing to a device or a FIFO.  The socket is connected to as
``/proc/self/fd/N``, which fits into the 108 bytes of sun_path, however long its path.

Nothing is sent before the kernel has said who listens (SO_PEERCRED, unix(7): the process that called listen() last).
If the pidfd then says that the process still lives, all of this was about one and the same process.
"""

import contextlib
import errno
import os
import select
import socket
import stat
import struct
from collections.abc import Iterator

from qsteer import procs
from qsteer.errors import BusyError, NotFoundError, QsteerError, from_errno, printable
from qsteer.model import Process

PATH_MAX = 4096
"""Longest path, in characters (Linux's PATH_MAX)."""

TIMEOUT_S = 5.0
"""How long to wait for a place in a listener's queue."""

_LINKS_MAX = 40
_SHOWN_MAX = 120
_UCRED = struct.Struct("@3i")  # struct ucred of unix(7), in the machine's own types: pid, uid, gid
_TIMEVAL = struct.Struct("@2l")  # struct timeval of setsockopt(2)'s SO_SNDTIMEO: seconds, microseconds
_NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ECONNREFUSED)


class OwnPath(str):
    """A path as qsteer sees it: the user's word, not a QEMU's."""

    __slots__ = ()


def server_of(path: str) -> int:
    """The process that listens on the unix socket at ``path``, as qsteer sees it.  Raises what ``connect`` raises."""
    what = f'"{printable(path[:_SHOWN_MAX])}"'
    try:
        with _connect(path, os.getpid(), TIMEOUT_S) as peer:
            return _listener(peer)
    except OSError as error:
        raise _failure(error, what, OwnPath(path)) from None


def connect(path: str, process: Process, *, timeout_s: float) -> socket.socket:
    """A stream socket connected to the one at ``path``, as ``process`` sees it, on which that very process listens.

    An ``OwnPath`` is looked up as qsteer sees it.

    Waits ``timeout_s`` at most for a place in the queue of a busy listener; the socket has that timeout, too.  The
    caller closes it.  Raises NotFoundError if there is no such process or socket, or nobody listens on it; BusyError if
    no place was free in time; QsteerError if another process listens there; and what the errno says otherwise.
    """
    what = f'"{printable(path[:_SHOWN_MAX])}" of process {process.pid}'
    with _held(process) as pidfd, contextlib.ExitStack() as on_failure:
        try:
            peer = _connect(path, os.getpid() if isinstance(path, OwnPath) else process.pid, timeout_s)
        except OSError as error:
            raise _failure(error, what, path) from None
        on_failure.callback(peer.close)
        listener = _listener(peer)
        if _has_ended(pidfd):
            raise _gone(process)
        if listener != process.pid:
            raise QsteerError(f"{what} is served by process {listener}", hint="a command line can be forged")
        on_failure.pop_all()
    return peer


@contextlib.contextmanager
def _held(process: Process) -> Iterator[int]:
    """A pidfd of ``process``, and not of a later one with the same pid."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        raise _gone(process) from None
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot reach process {process.pid}") from None
    try:
        now = procs.read(process.pid)
        if now is None or now.started != process.started:
            raise _gone(process)
        yield pidfd
    finally:
        os.close(pidfd)


def _listener(peer: socket.socket) -> int:
    """The pid of the process that called listen() last."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    return int(_UCRED.unpack(credentials)[0])


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _gone(process: Process) -> NotFoundError:
    return NotFoundError(f'process {process.pid} ("{printable(process.comm)}") has ended')


def _failure(error: OSError, what: str, path: str) -> QsteerError:
    code = error.errno or 0
    if code in _NOWHERE:
        hint = "nobody listens there (any more)"
        if code == errno.ENOENT and not path.startswith("/") and not isinstance(path, OwnPath):
            hint = "a QEMU with -daemonize is in / by now, not where this path began"
        return NotFoundError(f"cannot connect to {what}", errno=code, hint=hint)
    if code == errno.EAGAIN:
        return BusyError(f"{what} has no place for one more client", hint="another client holds it; try again")
    takes = "it takes CAP_SYS_PTRACE and CAP_DAC_OVERRIDE, or to be QEMU's user; try sudo"
    hint = takes if code in (errno.EPERM, errno.EACCES) else ""
    return from_errno(code, f"cannot connect to {what}", hint=hint)


def _connect(path: str, pid: int, timeout_s: float) -> socket.socket:
    """Raises OSError."""
    with contextlib.ExitStack() as on_failure:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        on_failure.callback(peer.close)
        target = _open_as(pid, path)
        try:
            # With Python's own timeout connect() would not wait for a place: the socket would be non-blocking.
            seconds, fraction = divmod(max(timeout_s, 0.001), 1)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(fraction * 1e6)))
            peer.connect(f"/proc/self/fd/{target}")
        finally:
            os.close(target)
        peer.settimeout(timeout_s)
        on_failure.pop_all()
    return peer


def _open_as(pid: int, path: str) -> int:
    """An O_PATH fd of what ``path`` is to a process.  Raises OSError."""
    names, links = _names(path), 0
    root = os.open(f"/proc/{pid}/root", os.O_PATH)
    try:
        at = os.open(f"/proc/{pid}/cwd", os.O_PATH)
        try:
            while names:
                name = names.pop()
                if name == ".." and os.path.sameopenfile(at, root):
                    continue
                entry = os.dup(root) if name == "/" else os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=at)
                if not stat.S_ISLNK(os.fstat(entry).st_mode):
                    os.close(at)
                    at = entry
                elif links < _LINKS_MAX:
                    links += 1
                    names += _names(_target(entry))
                else:
                    os.close(entry)
                    raise OSError(errno.ELOOP, "too many symbolic links")
        except BaseException:
            os.close(at)
            raise
    finally:
        os.close(root)
    return at


def _target(link: int) -> str:
    """Where a symbolic link leads; its fd is closed."""
    try:
        return os.readlink("", dir_fd=link)
    finally:
        os.close(link)


def _names(path: str) -> list[str]:
    """What ``path`` goes through, the last name first; "/" is the root.  Raises OSError if no file has such a name."""
    try:
        if not 0 < len(os.fsencode(path)) < PATH_MAX or "\0" in path:
            raise OSError(errno.ENAMETOOLONG, "no path")
    except UnicodeEncodeError:
        raise OSError(errno.ENOENT, "no path") from None
    names = [name for name in path.split("/") if name not in ("", ".")]
    return names[::-1] + ["/"] * path.startswith("/")
