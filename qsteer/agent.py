# SPDX-License-Identifier: BSD-2-Clause
"""The guest agent edge: what ethtool in the guest says of a NIC, by way of the QEMU guest agent (qemu-ga).

Theory of operation
===================

The agent's socket is that of the chardev behind ``-device virtserialport,name=org.qemu.guest_agent.0``.  One JSON
object a line goes each way (QEMU's docs/interop/qemu-ga-ref).  The line stays when clients come and go, so an answer to
an earlier client may come first: 0xFF makes the agent forget half a request, and ``guest-sync-delimited`` is answered
by 0xFF and a number of our choice.  Then the guest's interface with the NIC's address is looked up, and ethtool is run
with ``guest-exec``, from a list of arguments, never through a shell.

QEMU serves one client of that socket at a time, and lets the next one wait without a word.  There is no answer either
where no agent runs in the guest: the two look alike, and the hint names both.

All that is received is the guest's word.  One deadline holds for the whole of it, and one bound for all of its bytes.

What a reading means
====================

ethtool tells what the guest's driver has, not what the device was told (drivers/net/virtio_net.c of Linux):

- without VIRTIO_NET_F_RSS, ``ethtool -x`` shows no table: there is no configuration;
- with it, the driver makes a random key and an equal table when it starts, and ethtool shows them.  Linux before 6.12
  tells the device nothing of it before the first ``ethtool -X``: then the reading is what the guest would ask for;
- some (6.12.107) tell the device another key than ethtool, shifted by a byte.  Nothing in the guest shows that;
- hash types chosen with ``ethtool -N`` reach the device at once only while receive-hashing is on (``ethtool -K``),
  which it is not at first; else with the next ``ethtool -X``.  So the types are exact only while it is on.
"""

import base64
import contextlib
import json
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from qsteer import ethtool, peer
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError, UsageError, from_errno, printable
from qsteer.model import Process, Reading, Source
from qsteer.rss import BASE_TYPES, HashType, RssConfig

TIMEOUT_S = 5.0
"""For all of a reading; one of a guest with nothing else to do takes some hundredths of a second."""
SYNC_TIMEOUT_S = 2.0
"""For the agent's first answer."""
BYTES_MAX = 1 << 20
"""For all that is received; a guest with 100 interfaces sends 50 kB."""

_ETHTOOLS: tuple[str, ...] = ("ethtool", "/usr/sbin/ethtool", "/sbin/ethtool")
"""The second and third for an agent without the sbin directories in its PATH."""
_FREEZE_STATUS = "guest-fsfreeze-status"
_FLOWS = ("tcp4", "udp4", "tcp6", "udp6")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]{0,14}")
"""Names that Linux allows (dev_valid_name, 15 bytes), and no program takes for an option."""
_SAME_MAC_MAX = 8
_NOT_SUPPORTED = "Operation not supported"
_POLL_FIRST_S, _POLL_LAST_S = 0.002, 0.1
_SHOWN_MAX = 200


def read(path: str, process: Process, mac: str, *, answer_s: float = 0.0) -> Reading:
    """Key, table and hash types that the guest's driver has for the NIC with the address ``mac``.

    ``path`` is the agent's socket as ``process``, a QEMU, sees it.  The reading has no configuration if the guest's NIC
    has no RSS.  Takes ``answer_s`` at most, or TIMEOUT_S if that is longer.  Raises BusyError if there is no answer in
    time; UnsupportedError if the agent may not do it or there is no ethtool; NotFoundError if there is no such socket,
    or no interface with that address; QsteerError on anything else, be it an answer that makes no sense.
    """
    deadline = time.monotonic() + max(TIMEOUT_S, answer_s)
    with peer.connect(path, process, timeout_s=SYNC_TIMEOUT_S) as connected:
        agent = _Agent(connected, f"the guest agent of process {process.pid}", deadline)
        agent.synchronise(max(SYNC_TIMEOUT_S, answer_s / 2))
        # QEMU takes dashes for colons.
        mac = printable(mac[:_SHOWN_MAX]).replace("-", ":").lower()
        return _read(agent, _interfaces(agent, mac), mac)


def _interfaces(agent: "_Agent", mac: str) -> tuple[str, ...]:
    """The names of the guest's interfaces with an address: the NIC's, and those of VLANs and bridges on it."""
    names: list[str] = []
    answer = agent.execute("guest-network-get-interfaces")
    for interface in answer if isinstance(answer, list) else ():
        match interface:
            case {"name": str(name), "hardware-address": str(address)} if address.lower() == mac:
                names.append(name)
    if not names:
        raise NotFoundError(
            f"{agent.who} knows no interface with the address {mac}",
            hint="the guest may have changed it, or moved the interface to another network namespace",
        )
    if len(names) > _SAME_MAC_MAX or not all(map(_NAME.fullmatch, names)):
        shown = printable(", ".join(names)[:_SHOWN_MAX])
        raise QsteerError(f'{agent.who} names interfaces with the address {mac} that cannot be looked at: "{shown}"')
    return tuple(names)


def _read(agent: "_Agent", names: Sequence[str], mac: str) -> Reading:
    outputs = agent.ethtool(*(("-x", name) for name in names))
    tables = [(name, output) for name, output in zip(names, outputs, strict=True) if not output.says_no_rss]
    if not tables:
        return Reading(source=Source.GUEST_AGENT, config=None)
    if len(tables) > 1:
        raise QsteerError(f"{agent.who} has more than one interface with RSS and the address {mac}")
    ((name, output),) = tables
    if output.status != 0:
        raise QsteerError(f"ethtool -x fails for {agent.who}: {output.reason}")
    try:
        parsed = ethtool.parse(output.out)
    except UsageError as error:
        raise QsteerError(f"ethtool -x of {agent.who} prints what cannot be used: {error.message}") from None
    if parsed.key is None:
        raise QsteerError(f"ethtool -x of {agent.who} prints no hash key")
    types, exact = _types(agent, name)
    config = RssConfig(types=types, key=parsed.key, table=parsed.table)
    return Reading(source=Source.GUEST_AGENT, config=config, exact_types=exact)


def _types(agent: "_Agent", name: str) -> tuple[HashType, bool]:
    """The hash types, and whether the device must have these; the usual ones where ethtool does not tell."""
    features, *outputs = agent.ethtool(("-k", name), *(("-n", name, "rx-flow-hash", flow) for flow in _FLOWS))
    try:
        types = ethtool.hash_types(
            {flow: ethtool.parse_flow_hash(output.out, flow) for flow, output in zip(_FLOWS, outputs, strict=True)}
        )
    except UsageError:
        return BASE_TYPES, False
    return types, ethtool.parse_receive_hashing(features.out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """What a command in the guest printed; ``status`` is None where a signal ended it."""

    status: int | None
    out: str
    err: str

    @property
    def says_no_rss(self) -> bool:
        """Of ``ethtool -x``: no RSS, be it of a virtio_net, or of what knows nothing of it, like a VLAN."""
        return _NOT_SUPPORTED in self.err or ethtool.has_no_table(self.out)

    @property
    def reason(self) -> str:
        lines = (self.err or self.out).strip().splitlines() or [f"exit status {self.status}"]
        return printable(lines[-1][:_SHOWN_MAX])


class _CommandError(QsteerError):
    """The agent tried, and could not."""


class _Agent:
    """One client's exchange with an agent, until ``deadline`` (of time.monotonic); messages call it ``who``."""

    def __init__(self, connected: socket.socket, who: str, deadline: float) -> None:
        self.who = who
        self._socket = connected
        self._deadline = deadline
        self._pending = b""
        self._left = BYTES_MAX
        self._programs = _ETHTOOLS

    def synchronise(self, timeout_s: float) -> None:
        """Pass over all that was said before.  Raises BusyError if nobody is there to talk to."""
        number = int.from_bytes(os.urandom(6))
        deadline = min(self._deadline, time.monotonic() + timeout_s)
        try:
            self._send(b"\xff" + _encode("guest-sync-delimited", {"id": number}), deadline)
            while True:
                self._receive(deadline)
                # Nothing comes behind the answer that is sought: only the last mark counts, whatever is before it.
                lines, _, self._pending = self._pending.rpartition(b"\n")
                with contextlib.suppress(ValueError):
                    if _decode(lines.rpartition(b"\xff")[2]) == {"return": number}:
                        return
        except BusyError as error:
            hint = "is qemu-guest-agent running in the guest? Or another client (libvirt) may hold its socket"
            raise BusyError(error.message, hint=hint) from None

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> object:
        """One command's answer.  Raises QsteerError if the agent refuses or fails, or answers with nonsense."""
        self._send(_encode(command, arguments or {}), self._deadline)
        try:
            answer = _decode(self._line(self._deadline))
        except ValueError:
            raise self._nonsense(command) from None
        match answer:
            case {"return": returned}:
                return returned
            case {"error": {"class": str(kind), "desc": str(text)}}:
                raise self._refusal(command, kind, printable(text[:_SHOWN_MAX]))
        raise self._nonsense(command)

    def ethtool(self, *commands: Sequence[str]) -> list[_Output]:
        """What ethtool prints with each of these arguments; all of them run at the same time."""
        return [self._finish(pid) for pid in [self._start(arguments) for arguments in commands]]

    def _start(self, arguments: Sequence[str]) -> int:
        """The pid of an ethtool that was started in the guest."""
        wanted = {"path": self._programs[0], "arg": arguments, "capture-output": True}
        try:
            started = self.execute("guest-exec", wanted)
        except _CommandError as error:
            self._programs = self._programs[1:]
            if self._programs:
                return self._start(arguments)
            hint = "is it installed in the guest, and may the agent run it (SELinux)?"
            raise UnsupportedError(f"{self.who} cannot run ethtool: {error.message}", hint=hint) from None
        match started:
            case {"pid": int(pid)}:
                return pid
        raise self._nonsense("guest-exec")

    def _finish(self, pid: int) -> _Output:
        """What it printed, once it has ended."""
        pause = _POLL_FIRST_S
        while True:
            match self.execute("guest-exec-status", {"pid": pid}):
                case {"exited": True, **ended}:
                    break
                case {"exited": False}:
                    time.sleep(pause)
                    pause = min(2 * pause, _POLL_LAST_S)
                case _:
                    raise self._nonsense("guest-exec-status")
        match {"exitcode": None, "out-data": "", "err-data": ""} | ended:
            case {"exitcode": int() | None as status, "out-data": str(out), "err-data": str(err)}:
                with contextlib.suppress(ValueError):
                    return _Output(status=status, out=_unpack(out), err=_unpack(err))
        raise self._nonsense("guest-exec-status")

    def _refusal(self, command: str, kind: str, text: str) -> QsteerError:
        if kind == "CommandNotFound" or "disabled" in text:
            if command != _FREEZE_STATUS and self._is_frozen():
                return BusyError(f"{self.who} does nothing while the guest's file systems are frozen")
            return UnsupportedError(
                f"{self.who} refuses {command}: {text}",
                hint="allow it in the guest's configuration of qemu-ga (block-rpcs, allow-rpcs; BLACKLIST_RPC)",
            )
        return _CommandError(f"{command}: {text}")

    def _is_frozen(self) -> bool:
        """Whether it is between guest-fsfreeze-freeze and -thaw, when it refuses most commands."""
        with contextlib.suppress(QsteerError):
            return self.execute(_FREEZE_STATUS) == "frozen"
        return False

    def _nonsense(self, command: str) -> QsteerError:
        return QsteerError(f"{self.who} answers {command} with what makes no sense")

    def _send(self, line: bytes, deadline: float) -> None:
        with self._in_time(deadline):
            self._socket.sendall(line)

    def _line(self, deadline: float) -> bytes:
        """The next line, without its end."""
        while b"\n" not in self._pending:
            self._receive(deadline)
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _receive(self, deadline: float) -> None:
        with self._in_time(deadline):
            received = self._socket.recv(1 << 16)
        self._left -= len(received)
        if not received:
            raise QsteerError(f"{self.who} is gone: its connection was closed")
        if self._left < 0:
            raise QsteerError(f"{self.who} sends more than {BYTES_MAX} bytes")
        self._pending += received

    @contextlib.contextmanager
    def _in_time(self, deadline: float) -> Iterator[None]:
        """For one system call on the socket."""
        remaining = deadline - time.monotonic()
        try:
            if remaining <= 0:
                raise TimeoutError
            self._socket.settimeout(remaining)
            yield
        except TimeoutError:
            raise BusyError(f"{self.who} does not answer in time") from None
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot talk to {self.who}") from None


def _unpack(text: str) -> str:
    """Raises ValueError on what is not base64."""
    return base64.b64decode(text, validate=True).decode(errors="replace")


def _encode(command: str, arguments: Mapping[str, object]) -> bytes:
    return json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n"


def _decode(line: bytes) -> object:
    """Raises ValueError on what is no JSON, or too deep."""
    try:
        answer: object = json.loads(line.decode())
    except RecursionError:
        raise ValueError("too deep") from None
    return answer
