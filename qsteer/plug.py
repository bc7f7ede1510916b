# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer plug``: a NIC for a VM that runs, over QMP.

Theory of operation
===================

QEMU is asked what there is (``fetch``), then it is decided what to do (``plugplan``), and only then is anything made:
first the tap, with its program, by this process or the service.  Then, in one session with the monitor, each of their
fds gets a name in QEMU (``getfd``), the tap becomes a netdev, and the netdev gets a device.  With the device the NIC is
there, and the copies of this process are closed.

What fails on the way, be it for a signal, is undone from its end: the netdev goes, and what is still a name is closed.
A command that QEMU has but has not answered is waited for, as only its answer tells what there is to undo.  To undo the
device takes the guest's consent, so once QEMU has it a signal comes too late.

QEMU closes what a client sent and did not name when that client goes, but keeps what has a name until the name is used,
closed, or given anew (7.2, 10.0 and 11.1 do).  So a qsteer that is killed in the middle may leave fds in QEMU, and the
tap with them.  The names are always the same ones: the next plug by that monitor closes them before all else.

QEMU 10.0 keeps the netdev of a device that it refused for its program, and dies when the VM goes on after that; 11.1
does not.  So all fds have their names before the netdev is added: what could be refused then comes earlier.
"""

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

from qsteer import plugplan, procs, qemuargs, qmp, qmpvm, reach, ready, runplan
from qsteer.errors import QsteerError
from qsteer.plugplan import PlugPlan, Seen
from qsteer.provider import Provider, provider
from qsteer.qmp import Monitor
from qsteer.qmpvm import Backend, QmpVm
from qsteer.reach import Reach
from qsteer.ready import ReadyTap
from qsteer.render import columns
from qsteer.run import HEADINGS, row
from qsteer.runplan import CCW_DRIVER, PCI_DRIVER, QUEUES_MAX

LONGER_S = 25.0
"""For making the tap and for QEMU's answers, beyond what an exchange takes that changes nothing."""

_LAST_WORDS_S = 3.0
_TAP_GONE_S = 2.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NO_ARGS = qemuargs.parse(())


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugged:
    """What was done, or with a dry run is to be done: ``tap`` is None then.  Its fds are closed by now."""

    vm: Reach
    plan: PlugPlan
    tap: ReadyTap | None
    steps: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        place = f" at {self.plan.bus}" if self.plan.bus else ""
        if not self.tap:
            return "\n".join((*self.steps, *self.notes, f"into {self.vm}{place}"))
        table = columns((HEADINGS, row(self.plan.nic, self.tap)))
        steered = "; what it asks for (ethtool -X) is steered from then on" if self.plan.nic.steered else ""
        return "\n".join(
            (table, *self.notes, f"plugged into {self.vm}{place}: the guest has it once its driver is there{steered}")
        )

    def json(self) -> dict[str, object]:
        """``qsteer.plug/1``."""
        spec, tap = self.plan.nic.spec, self.tap
        return {
            "schema": "qsteer.plug/1",
            "dry_run": tap is None,
            "vm": self.vm.name,
            "pid": self.vm.process.pid,
            "nic": spec.id,
            "bus": self.plan.bus,
            "tap": tap.name if tap else spec.ifname or None,
            "queues": spec.queues,
            "mac": tap.mac if tap else self.plan.nic.mac,
            "vhost": self.plan.nic.vhost,
            "bridge": spec.bridge or None,
            "program": tap.program if tap and self.plan.nic.steered else None,
            "steps": list(self.steps),
            "notes": list(self.notes),
        }


def plug(vm: Reach, tap: str, *, bus: str | None, dry_run: bool, service: str | None = None) -> Plugged:
    """Plug a NIC with a tap of its own into a VM.

    ``tap`` is what --tap says, ``bus`` what --bus and ``service`` what --service says, if they are given.  Raises
    QsteerError; nothing is left then, unless its hint says so.
    """
    from qsteer import config, links

    spec = runplan.parse_tap(tap, config.load(), vm.name)
    mtu = links.bridge(spec.bridge).mtu if spec.bridge else None
    maker = provider(service)

    async def look(monitor: Monitor) -> Seen:
        if not dry_run:
            await close_left_over(monitor)
        return await fetch(monitor, vm.process.pid)

    seen = reach.converse(vm, look, longer_s=LONGER_S)
    plan = plugplan.plan_plug(
        spec,
        seen,
        vm.process.args or _NO_ARGS,
        vm=vm.name,
        vhost_available=maker.has_vhost,
        machine_id=ready.machine_id(),
        bus=bus,
    )
    if spec.ifname and links.find(spec.ifname):
        raise QsteerError(
            f'the name "{spec.ifname}" is in use by another network device', hint="choose another ifname="
        )
    if dry_run:
        maker.check(plan.order)
    made, notes = (None, ()) if dry_run else _execute(vm, plan, maker, seen)
    steps = tuple(plugplan.plug_steps(plan, maker=maker.name, mtu=mtu))
    return Plugged(vm=vm, plan=plan, tap=made, steps=steps, notes=(*plan.notes, *notes))


def _execute(vm: Reach, plan: PlugPlan, maker: Provider, seen: Seen) -> tuple[ReadyTap, tuple[str, ...]]:
    """Carry a plan out; gives the tap, whose fds are closed, and notes.  Raises QsteerError."""
    tap = maker.make(plan.order)
    try:
        with contextlib.closing(tap):
            plugplan.check_mac(tap.mac, seen.vm.nics)
            notes = reach.converse(vm, lambda monitor: give(monitor, plan, tap, vm.process.pid), longer_s=LONGER_S)
    except QsteerError as error:
        # The queues are what QEMU is given first, and what it gives up last.
        if not wait_until_gone(tap.name):
            error.hint = (
                f"QEMU keeps tap {tap.name} open: the next qsteer plug closes fds that are left, "
                f"qsteer unplug --nic {plan.nic.spec.id} removes the rest"
            )
        raise
    return tap, notes


async def fetch(monitor: Monitor, pid: int) -> Seen:
    """All that a plan needs to know of a QEMU and its VM.  Changes nothing.  Raises QsteerError."""
    return Seen(
        probe=await monitor.probe((PCI_DRIVER, CCW_DRIVER)),
        vm=await qmpvm.describe(monitor, pid),
        netdevs=await qmpvm.netdevs(monitor),
        device_ids=await qmpvm.device_ids(monitor),
        buses=await qmpvm.buses(monitor),
    )


@contextlib.asynccontextmanager
async def stopping(hint: str = "") -> AsyncIterator[None]:
    """Have a signal that would end this process cancel the running task instead, and raise QsteerError here.

    ``hint`` says what is left then.  A signal that the caller ignores, or deals with, stays as it is.
    """
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    told: list[signal.Signals] = []

    def stop(number: int, _: object) -> None:
        if not told:
            task.cancel()
            loop.call_soon_threadsafe(lambda: None)  # it may wait for something
        told.append(signal.Signals(number))

    caught = [one for one in _SIGNALS if one is signal.SIGINT or signal.getsignal(one) is signal.SIG_DFL]
    before = {one: signal.signal(one, stop) for one in caught}
    try:
        yield
    except asyncio.CancelledError:
        if not told:
            raise
        raise QsteerError(f"stopped by {told[0].name}", hint=hint) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        if told:
            with contextlib.suppress(asyncio.CancelledError):  # one that came after the last step
                await asyncio.sleep(0)


def wait_until_gone(tap: str) -> bool:
    """Whether a network device of this network namespace goes within a moment.  Raises QsteerError."""
    from qsteer import links

    deadline = time.monotonic() + _TAP_GONE_S
    while links.find(tap):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)  # the kernel has no signal for it that is simpler
    return True


async def give(monitor: Monitor, plan: PlugPlan, tap: ReadyTap, pid: int) -> tuple[str, ...]:
    """Have the QEMU ``pid`` make a NIC of a tap, and check that it has; notes on what it does not do as asked.

    Raises QsteerError; what had been done in QEMU is undone then, as far as it still answers.
    """
    changes, nic_id = _Changes(monitor), plan.nic.spec.id
    async with stopping():
        try:
            for name, fd in zip(plugplan.fd_names(plan), tap.fds, strict=True):
                await changes.give(name, fd)
            await changes.do("netdev_add", plan.netdev, ("netdev_del", {"id": nic_id}))
            mac = {"mac": tap.mac} if "mac" in plan.nic.gains else {}
            await changes.do("device_add", {**plan.device, **mac}, ("device_del", {"id": nic_id}), last=True)
        except BaseException:
            await changes.undo()
            raise
    try:
        async with asyncio.timeout(qmp.TIMEOUT_S):
            return _check(plan, tap, await qmpvm.describe(monitor, pid), pid)
    except QsteerError:
        await changes.undo()
        raise


def _check(plan: PlugPlan, tap: ReadyTap, vm: QmpVm, pid: int) -> tuple[str, ...]:
    """That QEMU has what it was given."""
    spec = plan.nic.spec
    nic = next((nic for nic in vm.nics if nic.id == spec.id), None)
    if not nic or nic.netdev != spec.id or not _is_tap(nic.backend, tap, pid):
        raise QsteerError(f'QEMU does not have NIC "{spec.id}" on tap {tap.name}, although it says so')
    if plan.nic.steered and not nic.rss:
        raise QsteerError(f'QEMU does not offer the guest RSS on NIC "{spec.id}", although it says so')
    without_vhost = plan.nic.vhost and nic.vhost is False
    return (f"{spec.id}: QEMU does not use vhost for it, see its log",) if without_vhost else ()


def _is_tap(backend: Backend | None, tap: ReadyTap, pid: int) -> bool:
    """Whether the fds of a netdev of a process are a tap's queues, as far as that may be seen."""
    if not backend or backend.kind != "tap" or len(backend.fds) != len(tap.queue_fds):
        return False
    return all(procs.tap_of(pid, fd) in (None, tap.name) for fd in backend.fds)


async def close_left_over(monitor: Monitor) -> None:
    """Close what a qsteer that was killed has left in a monitor."""
    for kind, most in (
        (plugplan.QUEUE, QUEUES_MAX),
        (plugplan.VHOST, QUEUES_MAX),
        (plugplan.PROGRAM, plugplan.PROGRAM_FDS),
    ):
        for name in plugplan.names(kind, most):
            try:
                await monitor.ask("closefd", {"fdname": name})
            except QsteerError:
                break  # there is none of that name


_Command = tuple[str, Mapping[str, object]]


class _Changes:
    """Commands that have changed something in QEMU, each with the one that undoes it."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._undo: list[_Command] = []
        self._unanswered: tuple[asyncio.Task[object], _Command] | None = None

    async def give(self, name: str, fd: int) -> None:
        """Have QEMU know an fd by a name."""
        self._monitor.send_fd(fd)
        await self.do("getfd", {"fdname": name}, ("closefd", {"fdname": name}))

    async def do(
        self,
        command: str,
        arguments: Mapping[str, object],
        undo: _Command,
        *,
        last: bool = False,
    ) -> None:
        """One command.  The last one counts as done once QEMU has done it, whatever comes meanwhile."""
        await asyncio.sleep(0)  # a signal that has come stops it here
        task = asyncio.ensure_future(self._monitor.ask(command, arguments))
        self._unanswered = (task, undo)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not last:
                raise
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.shield(task)
        self._unanswered = None
        self._undo.append(undo)

    async def undo(self) -> None:
        """Undo everything, the last first, as far as QEMU still answers.

        A netdev whose device the guest does not let go of goes with it, once it does.
        """
        with contextlib.suppress(TimeoutError, *qmp.failures()):
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._settle()
                for command, arguments in reversed(self._undo):
                    with contextlib.suppress(QsteerError):  # a name that has been used is none any more
                        await self._monitor.ask(command, arguments)

    async def _settle(self) -> None:
        """Learn whether the last command was done."""
        if self._unanswered:
            task, undo = self._unanswered
            with contextlib.suppress(QsteerError):  # refused
                await asyncio.shield(task)
                self._undo.append(undo)
