# SPDX-License-Identifier: BSD-2-Clause
"""Asks guests: fills in what a plan or a check needs to know beyond what the kernel and QEMU's maps tell.

``device-state`` goes through QEMU's QMP socket and stops the VM for a moment, ``guest-agent`` runs ethtool in the
guest.  Both speak to processes that are not trusted: what comes back is bounded and checked where it is read.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qsteer import peer
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.model import Nic, Process, Reading, Source, Tap
from qsteer.plan import Wanted, readings_wanted
from qsteer.state import Agrees, agrees

_PATHS_MAX = 3
"""QMP sockets of one VM that are tried: its users have one for themselves, seldom two."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manner:
    """How guests are asked: by which QMP socket (None: by those that their QEMUs name), and with how much patience.

    ``turn_s`` is how long to wait for a VM that was stopped a moment ago, or is being read; ``answer_s`` for what QEMU
    and the guest's agent say, if that is longer than they are given anyhow.
    """

    qmp: str | None = None
    turn_s: float = 0.0
    answer_s: float = 0.0


def complete(tap: Tap, wanted: Wanted, manner: Manner) -> Tap:
    """The tap with all that ``plan_apply`` needs to know for what is wanted.

    Where the NIC was not known, and what is wanted may depend on it, it is known then, and nothing else.  Raises
    QsteerError if a source that was named cannot be read, BusyError if one of several was busy and none answered.
    """
    if wanted.identify:
        identified = _with_nic(tap, manner, with_mac=True, needed=True)
        if identified.nic != tap.nic:
            return identified
    if not wanted.static and wanted.source is not Source.STATIC:
        tap = _with_nic(tap, manner)
    sources = readings_wanted(tap, wanted)
    if wanted.source in sources:
        return read(tap, wanted.source, manner, allow_pause=wanted.allow_pause)
    tap, busy = _first_that_answers(tap, sources, manner)
    if busy and not tap.reading:
        raise busy
    return tap


def nic(tap: Tap, manner: Manner) -> Nic | None:
    """The NIC behind a tap, with its MAC, of QEMU if its command line does not say; None if that does not, either."""
    return _with_nic(tap, manner, with_mac=True).nic


def check(tap: Tap, manner: Manner, *, allow_pause: bool) -> Tap:
    """The tap with what its guest asks for, unless that is known without asking; why not, where it cannot be asked."""
    tap = _with_used(_with_nic(tap, manner), manner)
    if agrees(tap) is not Agrees.UNKNOWN or not tap.steerable or not tap.vm:
        return tap
    paused = (Source.DEVICE_STATE,) if allow_pause else ()
    tap, busy = _first_that_answers(tap, (*paused, Source.GUEST_AGENT), manner)
    if tap.reading:
        return tap
    why = () if allow_pause else ("device-state takes --allow pause",)
    return replace(tap, unread=(*why, *tap.unread, *((str(busy),) if busy else ())))


def read(tap: Tap, source: Source | None, manner: Manner, *, allow_pause: bool) -> Tap:
    """The tap with what its guest asks for, by one source.  Raises QsteerError."""
    if source is Source.DEVICE_STATE:
        if not allow_pause:
            raise UnsupportedError(
                f'device-state stops the VM behind tap "{tap.name}" for a moment', hint="--allow pause, if it may"
            )
        return replace(tap, reading=_device_state(tap, manner))
    tap = _with_nic(tap, manner, with_mac=True)
    return replace(tap, reading=_guest_agent(tap, manner))


def _first_that_answers(tap: Tap, sources: Sequence[Source], manner: Manner) -> tuple[Tap, BusyError | None]:
    """The tap with the first reading there is; else why there is none, and what may go better a moment later."""
    busy: BusyError | None = None
    for source in sources:
        try:
            return read(tap, source, manner, allow_pause=True), None
        except BusyError as error:
            busy = busy or error
        except QsteerError as error:
            tap = replace(tap, unread=(*tap.unread, f"{source}: {error}"))
    return tap, busy


def _device_state(tap: Tap, manner: Manner) -> Reading:
    from qsteer import savestate

    def ask(path: str, process: Process) -> Reading:
        return savestate.reading(path, process, tap, patience_s=manner.turn_s, answer_s=manner.answer_s)

    return _over_qmp(tap, manner, ask)


def _guest_agent(tap: Tap, manner: Manner) -> Reading:
    from qsteer import agent

    process = _process(tap)
    path = tap.domain.agent if tap.domain else None
    path = path or (process.args.agent_path if process.args else None)
    if not path:
        raise UnsupportedError(
            f'the VM behind tap "{tap.name}" has no guest agent',
            hint="a virtserialport named org.qemu.guest_agent.0 on a chardev socket that QEMU serves",
        )
    if not tap.nic or not tap.nic.mac:
        raise UnsupportedError(
            f'the guest\'s MAC of the NIC behind tap "{tap.name}" is not known', hint="--qmp PATH, to ask QEMU"
        )
    return agent.read(path, process, tap.nic.mac, answer_s=manner.answer_s)


def _with_nic(tap: Tap, manner: Manner, *, with_mac: bool = False, needed: bool = False) -> Tap:
    """The NIC as QEMU knows it, where its command line does not say: one that was plugged in later, a default MAC.

    ``needed``: a QEMU that is busy is a BusyError.
    """
    if not tap.vm or (tap.nic and (tap.nic.mac or not with_mac)):
        return tap
    from qsteer import qmpvm

    try:
        vm = _over_qmp(tap, manner, lambda path, process: qmpvm.inspect(path, process, answer_s=manner.answer_s))
        found = qmpvm.nic_of(vm, tap)
    except QsteerError as error:
        if needed and isinstance(error, BusyError):
            raise
        return replace(tap, unread=(*tap.unread, f"its NIC: {error}"))
    # Where QEMU does not tell, its command line may; where that does not either, be sure to call nothing "software".
    vhost = found.vhost if found.vhost is not None else tap.nic.vhost if tap.nic else True
    return replace(tap, nic=Nic(id=found.id, netdev=found.netdev, mac=found.mac, rss=found.rss, vhost=vhost))


def _with_used(tap: Tap, manner: Manner) -> Tap:
    """What QEMU has counted of each receive queue, where it can be asked."""
    if not tap.vm or not tap.steerable:
        return tap
    from qsteer import qmpvm

    def ask(path: str, process: Process) -> tuple[int | None, ...]:
        return qmpvm.used_buffers(path, process, tap, answer_s=manner.answer_s)

    with contextlib.suppress(QsteerError):
        return replace(tap, used=_over_qmp(tap, manner, ask))
    return tap


def _over_qmp(tap: Tap, manner: Manner, ask: Callable[[str, Process], _Answer]) -> _Answer:
    """By the first QMP socket of the VM that can be had; libvirt's own monitor serves libvirt alone."""
    process = _process(tap)
    paths = (peer.OwnPath(manner.qmp),) if manner.qmp else process.args.qmp_paths if process.args else ()
    monitor = tap.domain.monitor if tap.domain else None
    # Who can write a command line can write a thousand paths on it, each of which takes its time.
    paths = tuple(path for path in dict.fromkeys(paths) if path != monitor)[:_PATHS_MAX]
    failure: QsteerError = UnsupportedError(
        f'the QEMU behind tap "{tap.name}" has no QMP socket to ask',
        hint="-qmp unix:PATH,server=on,wait=off" + (" in <qemu:commandline>: see docs/libvirt.md" if monitor else ""),
    )
    for path in paths:
        try:
            return ask(path, process)
        except (BusyError, NotFoundError) as error:
            failure = error
    raise failure


def _process(tap: Tap) -> Process:
    if not tap.vm:
        raise UnsupportedError(f'tap "{tap.name}" is not that of a QEMU: there is no guest to ask')
    return tap.vm
