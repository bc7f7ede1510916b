# SPDX-License-Identifier: BSD-2-Clause
"""A QMP client that a hostile QEMU cannot fill: qemu.qmp's own keeps every event for as long as a session lasts.

Import it only when needed: it takes qemu.qmp and asyncio with it.
"""

import asyncio

from qemu.qmp import Message, QMPClient, QMPError

SESSION_MAX = 16 << 20
"""Most bytes that are taken in a session; one with a VM of many NICs takes some 100 kB."""
MESSAGE_MAX = 2 << 20
"""Longest message, in bytes, with its end of line; more than ``info network`` takes for some thousand queues."""

_LEFTOVERS_MAX = 256
"""Messages that may come before the greeting."""


class TooMuchError(QMPError):
    """The other side sends more than is taken; ``str()`` says how much that is."""


class BoundedClient(QMPClient):
    """For one session.  ``too_much`` is set when that was ended for what the other side sent."""

    def __init__(self) -> None:
        super().__init__("qsteer", readbuflen=MESSAGE_MAX)
        self.too_much: TooMuchError | None = None
        self._taken = 0
        self._leftovers: int | None = 0  # None once QEMU has greeted
        # The default listener cannot be removed; this one keeps nothing.
        self.events.event_filter = lambda _: False

    def abort(self) -> None:
        """Drop the connection, and what the other side has not read: closing would wait until it does."""
        if self._writer:
            self._writer.transport.abort()

    async def _do_recv(self) -> Message:
        """QEMU keeps what it could not send to a client that went away, and sends that to the next one first."""
        message = await super()._do_recv()
        while self._leftovers is not None:
            if self._leftovers == _LEFTOVERS_MAX or not message.keys() & {"return", "error", "event"}:
                self._leftovers = None
                break
            self._leftovers += 1
            message = await super()._do_recv()
        return message

    async def _readline(self) -> bytes:
        # What is there already is read without a pause: the timeout, and who waits for an answer, would not get a turn.
        await asyncio.sleep(0)
        try:
            line = await super()._readline()
        except ValueError:  # what asyncio.StreamReader says of a line beyond its limit
            raise self._end(f"a message of more than {MESSAGE_MAX} bytes") from None
        self._taken += len(line)
        if self._taken > SESSION_MAX:
            raise self._end(f"more than {SESSION_MAX} bytes")
        return line

    def _end(self, what: str) -> TooMuchError:
        self.too_much = TooMuchError(what)
        return self.too_much
