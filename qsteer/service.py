# SPDX-License-Identifier: BSD-2-Clause
"""The client of ``qsteer serve``: taps and programs for who has no right to make them."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from qsteer import kernel, wire
from qsteer.access import Limits
from qsteer.errors import BusyError, PermissionDeniedError, QsteerError, from_errno
from qsteer.ready import ReadyTap
from qsteer.runplan import Order

SOCKET = Path("/run/qsteer/serve.sock")
TIMEOUT_S = 30.0
"""How long the service may let one wait; it serves one request after the other."""

_NOBODY = (errno.ENOENT, errno.ECONNREFUSED)
_HUNG_UP = (errno.EPIPE, errno.ECONNRESET)


def limits(path: Path = SOCKET) -> Limits:
    """What this user may have.  Raises QsteerError; PermissionDeniedError where there is no service, too."""
    with _Conversation(path) as service:
        service.send(wire.encode_request(wire.Request(what=wire.What.LIMITS)))
        return wire.decode_limits(service.answer())


def request_tap(order: Order, path: Path = SOCKET) -> ReadyTap:
    """A tap that is ready.  Raises QsteerError, of the class that the service says; the tap is gone then."""
    with _Conversation(path) as service, contextlib.ExitStack() as undo:
        service.send(wire.encode_request(wire.Request(what=wire.What.TAP, order=order)))
        answer = wire.decode_tap(service.answer())
        counts = (answer.queues, answer.vhosts, answer.programs)
        if counts != (order.queues, order.queues * order.vhost, wire.PROGRAM_FDS * order.steered):
            raise QsteerError("qsteer serve gives other things than were asked for")
        fds = service.fds(sum(counts), undo)
        undo.pop_all()
    queues, vhosts = answer.queues, answer.queues + answer.vhosts
    return ReadyTap(
        name=answer.name,
        mac=answer.mac,
        queue_fds=fds[:queues],
        vhost_fds=fds[queues:vhosts],
        program_fds=fds[vhosts:],
        program=answer.program,
    )


def request_program(queue_fd: int, path: Path = SOCKET) -> tuple[tuple[int, ...], str]:
    """A steering program for the tap of a queue that this process has open, with maps for QEMU to write.

    Gives its fds in the order of QEMU's ``ebpf-rss-fds``, and what it is called.  Raises QsteerError, of the class
    that the service says.
    """
    with _Conversation(path) as service, contextlib.ExitStack() as undo:
        service.send(wire.encode_request(wire.Request(what=wire.What.PROGRAM)))
        service.send_fd(queue_fd)
        program = wire.decode_program(service.answer())
        fds = service.fds(wire.PROGRAM_FDS, undo)
        undo.pop_all()
    return fds, program


class _Conversation(contextlib.AbstractContextManager["_Conversation"]):
    """A connection; each step waits for TIMEOUT_S at most."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A socket with a timeout of Python's does not wait for its turn to connect, and cannot be given to C.
        period = struct.pack("ll", int(TIMEOUT_S), 0)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, period)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, period)
        try:
            self._socket.connect(os.fspath(path))
        except OSError as error:
            self._socket.close()
            if error.errno in _NOBODY:
                raise PermissionDeniedError(
                    f"this user has no right to make taps, and no qsteer serve listens at {path}",
                    hint="as root: systemctl enable --now qsteer-serve.socket",
                ) from None
            raise from_errno(error.errno or 0, f"cannot reach qsteer serve at {path}") from None

    def __exit__(self, *exception: object) -> None:
        self._socket.close()

    def send(self, frame: bytes) -> None:
        """Send a request.  A service that has hung up by then has answered."""
        with _hung_up_is_an_answer():
            self._socket.sendall(frame)

    def send_fd(self, fd: int) -> None:
        with _hung_up_is_an_answer():
            kernel.send_fds(self._socket.fileno(), (fd,))

    def answer(self) -> bytes:
        """The JSON of the answer, and not a byte of what follows."""
        header = self._receive(wire.HEADER_BYTES)
        return self._receive(wire.body_length(header, wire.ANSWER_MAX))

    def fds(self, count: int, undo: contextlib.ExitStack) -> tuple[int, ...]:
        """That many, which ``undo`` closes."""
        fds: list[int] = []
        while missing := count - len(fds):
            received = kernel.receive_fds(self._socket.fileno(), min(missing, wire.FDS_A_MESSAGE))
            for fd in received:
                undo.callback(os.close, fd)
            fds += received
        return tuple(fds)

    def _receive(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            try:
                piece = self._socket.recv(count - len(received))
            except OSError as error:
                if error.errno == errno.EAGAIN:
                    raise BusyError(f"qsteer serve does not answer within {TIMEOUT_S:g} s") from None
                raise from_errno(error.errno or 0, "cannot read what qsteer serve answers") from None
            if not piece:
                raise BusyError("qsteer serve has ended the connection", hint="journalctl -u qsteer-serve")
            received += piece
        return bytes(received)


@contextlib.contextmanager
def _hung_up_is_an_answer() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _HUNG_UP:
            raise from_errno(error.errno or 0, "cannot send the request to qsteer serve") from None
    except QsteerError as error:
        if error.errno not in _HUNG_UP:
            raise
