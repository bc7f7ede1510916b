# SPDX-License-Identifier: BSD-2-Clause
"""Have a QEMU that runs write its device state, and read a guest's RSS configuration out of it.  Stops the VM shortly.

Theory of operation
===================

``xen-save-devices-state`` (in every QEMU, Xen or not) stops the VM, writes the state of all devices, without the RAM,
to a file, and lets it run again.  To stop a VM is to wait until its disks have written what is under way, so how long
that takes is theirs to decide; a QEMU that waits for them answers nobody.  What could go wrong, and what is done:

- ``live`` defaults to true, with which QEMU gives up the disks of a VM that does not run, and dies at the next write.
  It is always false, and the VM must be running.
- A VM that migrates, or has a block job under way, is left alone; so is one whose disks' leases libvirt gives back on
  STOP (``lock_manager`` in its qemu.conf) and does not take again on RESUME.
- QEMU lets the VM run again itself, also when writing fails.  Should it have failed and the VM still stand there for
  it (``save-vm``, which is nobody's pause), it is told to go on.
- The file is a memfd of qsteer's, given with ``add-fd`` and taken back whatever happens.  QEMU truncates it first, so
  it cannot be sealed against growth: 7.2, 10.0 and 11.1 all fail then, and 7.2 and 10.0 lose an fd.  Its pages count as
  those of who writes them, which is QEMU, and no more than STATE_MAX bytes are read.
- One reading at a time, and not too often (``pauses``).

QEMU keeps the fd of a qsteer that is killed meanwhile (from 9.1 on also after the monitor is closed); the next reading
takes it back, by its mark.
"""

import contextlib
import math
import os
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from qsteer import devicestate, pauses, qmp, qmpvm
from qsteer.errors import BusyError, QsteerError, UnsupportedError, from_errno, printable
from qsteer.model import Process, Reading, Source, Tap
from qsteer.qmp import Monitor, member

STATE_MAX = 64 << 20
"""Longest device state, in bytes, that is read; a small VM's is 0.1 MB, one with a large virtio-gpu takes several."""
WRITING_TIMEOUT_S = 30.0
"""For stopping and writing; a disk that does not write what is under way in that time is in trouble itself."""

_MARK = "qsteer device-state"
_LIBVIRT_CONF = Path("/etc/libvirt/qemu.conf")
_LOCK_MANAGER = re.compile(r"""^\s*lock_manager\s*=\s*(["'])(.*?)\1""", re.MULTILINE)
_MIGRATION_ENDED = (None, "none", "completed", "failed", "cancelled")
_JOB_ENDED = ("concluded", "null")
_LAST_WORDS_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceState:
    """The bytes that QEMU wrote, and for how many milliseconds the VM stood still."""

    data: bytes
    paused_ms: float


def reading(
    path: str,
    process: Process,
    tap: Tap,
    *,
    interval_s: float = pauses.INTERVAL_S,
    patience_s: float = 0.0,
    answer_s: float = 0.0,
) -> Reading:
    """What the guest asks of the NIC behind ``tap``, by the QEMU ``process`` at its QMP socket ``path``.

    Stops the VM for some milliseconds, and not more often than ``pauses`` allows; waits up to ``patience_s`` for its
    turn there.  Raises NotFoundError if QEMU does not tell which NIC it is, BusyError if the VM does not run, is busy,
    or was stopped a moment ago, UnsupportedError where this cannot be done, QsteerError otherwise.
    """
    _refuse_leases(tap)

    async def exchange(monitor: Monitor) -> Reading:
        vm = await qmpvm.describe(monitor, process.pid)
        nic = qmpvm.nic_of(vm, tap)
        if nic.device is None:
            raise UnsupportedError(
                f'the place of the NIC behind tap "{tap.name}" in the device state is not known ({nic.driver})'
            )
        state = await _save(monitor, stamp)
        config = devicestate.parse(state.data, nic.device)
        return Reading(source=Source.DEVICE_STATE, config=config, paused_ms=state.paused_ms)

    with pauses.turn(process, interval_s=interval_s, patience_s=patience_s) as stamp:
        longer_s = WRITING_TIMEOUT_S + _LAST_WORDS_S
        return qmp.converse(path, process, exchange, answer_s=answer_s, longer_s=longer_s)


def device_state(path: str, process: Process, *, interval_s: float = pauses.INTERVAL_S) -> DeviceState:
    """The state of all devices.  Stops the VM, and raises what ``reading`` raises, but for what is about a NIC.

    The caller has to leave a libvirt domain alone where ``lock_manager`` says so.
    """
    with pauses.turn(process, interval_s=interval_s) as stamp:
        longer_s = WRITING_TIMEOUT_S + _LAST_WORDS_S
        return qmp.converse(path, process, lambda monitor: _save(monitor, stamp), longer_s=longer_s)


def lock_manager() -> bool:
    """Whether libvirt holds leases on the disks of its domains, or that cannot be ruled out."""
    try:
        text = _LIBVIRT_CONF.read_text(errors="replace")
    except FileNotFoundError:
        return False
    except OSError:
        return True
    settings = _LOCK_MANAGER.findall(text)
    return bool(settings) and settings[-1][1] not in ("", "nop")


def _refuse_leases(tap: Tap) -> None:
    if tap.domain and lock_manager():
        raise UnsupportedError(
            f'stopping libvirt\'s domain "{printable(tap.domain.name)}" would lose the leases on its disks',
            hint=f"lock_manager is set in {_LIBVIRT_CONF}; use --source guest-agent",
        )


async def _save(monitor: Monitor, stamp: Callable[[float], None]) -> DeviceState:
    await _check_calm(monitor)
    with contextlib.ExitStack() as stack:
        try:
            memory = os.memfd_create("qsteer-device-state", os.MFD_CLOEXEC)
            stack.callback(os.close, memory)
            writer = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
            stack.callback(os.close, writer)
        except OSError as error:
            raise from_errno(error.errno or 0, "cannot make a file for the device state") from None
        monitor.send_fd(writer)
        try:
            added = await monitor.ask("add-fd", {"opaque": _MARK})
            fdset = added.get("fdset-id") if isinstance(added, dict) else None
            if not isinstance(fdset, int):
                raise QsteerError("QEMU does not tell where it keeps the file for its device state")
            stamp(pauses.UNFINISHED_S)
            paused_ms = await _stop_and_write(monitor, f"/dev/fdset/{fdset}")
            stamp(paused_ms / 1000)
        finally:
            await _last_words(monitor, _take_back)
        return DeviceState(data=_content(memory), paused_ms=paused_ms)


async def _check_calm(monitor: Monitor) -> None:
    """Raises BusyError unless the VM runs and nothing is under way that a stop could disturb."""
    status = member(await monitor.ask("query-status"), "status")
    if status != "running":
        raise BusyError(f"the VM is not running ({_shown(status)})", hint="its device state is read only while it runs")
    migration = member(await monitor.ask("query-migrate"), "status")
    if migration not in _MIGRATION_ENDED:
        raise BusyError(f"a migration of the VM is under way ({_shown(migration)})")
    for query in ("query-jobs", "query-block-jobs"):
        try:
            jobs = await monitor.ask(query)
        except UnsupportedError:
            continue
        under_way = [job for job in jobs if member(job, "status") not in _JOB_ENDED] if isinstance(jobs, list) else ()
        if under_way:
            kind = _shown(member(under_way[0], "type"))
            raise BusyError(f"a job of the VM is under way ({kind})", hint="wait until it has ended")


async def _take_back(monitor: Monitor) -> None:
    """Have QEMU close what qsteer gave it for a reading, this one or one that did not come to its end."""
    fdsets = await monitor.ask("query-fdsets")
    for fdset in fdsets if isinstance(fdsets, list) else ():
        fds = member(fdset, "fds")
        if isinstance(fds, list) and fds and all(member(fd, "opaque") == _MARK for fd in fds):
            await monitor.ask("remove-fd", {"fdset-id": member(fdset, "fdset-id")})


async def _stop_and_write(monitor: Monitor, file: str) -> float:
    """How long the VM stood still, in milliseconds: by QEMU's events, or else by how long its answer took."""
    import asyncio

    began = time.monotonic()
    command, arguments = "xen-save-devices-state", {"filename": file, "live": False}
    try:
        async with asyncio.timeout(WRITING_TIMEOUT_S):
            _, events = await monitor.ask_and_hear(command, arguments, ("STOP", "RESUME"))
    except BaseException as error:
        await _last_words(monitor, _let_run)
        if not isinstance(error, TimeoutError):
            raise
        raise QsteerError(
            f"QEMU has not written its device state within {WRITING_TIMEOUT_S:g} s",
            hint="it lets the VM run again as soon as the disks have written what was under way",
        ) from None
    took_ms = (time.monotonic() - began) * 1000
    stops = [when for name, when in events if name == "STOP"]
    resumes = [when for name, when in events if name == "RESUME"]
    paused_ms = (resumes[-1] - stops[0]) * 1000 if stops and resumes else math.nan
    return round(paused_ms if 0 <= paused_ms <= took_ms else took_ms, 3)


async def _let_run(monitor: Monitor) -> None:
    """Undo the stop of a saving that did not come to its end; any other pause is somebody's will."""
    if member(await monitor.ask("query-status"), "status") == "save-vm":
        await monitor.ask("cont")


async def _last_words(monitor: Monitor, undo: Callable[[Monitor], Awaitable[None]]) -> None:
    """Undo something as far as QEMU still answers."""
    import asyncio

    with contextlib.suppress(QsteerError, TimeoutError, *qmp.failures()):
        async with asyncio.timeout(_LAST_WORDS_S):
            await undo(monitor)


def _content(memory: int) -> bytes:
    size = os.fstat(memory).st_size
    if size > STATE_MAX:
        raise UnsupportedError(f"the device state has {size >> 20} MiB, more than {STATE_MAX >> 20}")
    return os.pread(memory, size, 0)


def _shown(word: object) -> str:
    return printable(word[:80]) if isinstance(word, str) else "?"
