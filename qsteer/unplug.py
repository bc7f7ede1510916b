# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer unplug``: take a NIC off a VM that runs, with its tap, over QMP.

Theory of operation
===================

``device_del`` asks the guest, whose driver lets the device go or does not; DEVICE_DELETED says that it has.  Only then
the netdev is removed, and with its queues' last fds the tap: before, the guest would lose its network and keep the NIC.
QEMU refuses to ask again while it waits for the guest, with PCI Express for some seconds (7.2, 10.0, 11.1), so it is
asked again and again.
"""

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qsteer import plug, plugplan, procs, qmpvm, reach
from qsteer.errors import BusyError, QsteerError, printable
from qsteer.plugplan import UnplugPlan
from qsteer.qmp import Monitor
from qsteer.reach import Reach

_LONGER_S = 10.0
_AGAIN_S = 1.0
_WAITS = ("in the process of unplug", "guest is busy")
"""What QEMU says while the guest has been asked already, or cannot be yet."""
_STILL = "if the guest lets it go all the same, qsteer unplug removes what remains"


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplugged:
    """What was done, or with a dry run is to be done.  ``tap`` is None where it cannot be told."""

    vm: Reach
    plan: UnplugPlan
    tap: str | None
    dry_run: bool
    notes: tuple[str, ...]

    def __str__(self) -> str:
        tap = f" and tap {printable(self.tap)}" if self.tap and not self.notes else ""
        done = f"NIC {self.plan.name}{tap} {'would go' if self.dry_run else 'are gone' if tap else 'is gone'}"
        return "\n".join((*(self.steps if self.dry_run else ()), *self.notes, f"{done}: {self.vm}"))

    @property
    def steps(self) -> tuple[str, ...]:
        """In words."""
        return tuple(map(printable, plugplan.unplug_steps(self.plan)))

    def json(self) -> dict[str, object]:
        """``qsteer.unplug/1``."""
        return {
            "schema": "qsteer.unplug/1",
            "dry_run": self.dry_run,
            "vm": self.vm.name,
            "pid": self.vm.process.pid,
            "nic": self.plan.name,
            "netdev": self.plan.netdev,
            "tap": self.tap,
            "steps": list(self.steps),
            "notes": list(self.notes),
        }


def unplug(vm: Reach, name: str, *, timeout_s: float, dry_run: bool) -> Unplugged:
    """Take off the NIC with that id, or that of its netdev; the guest has so many seconds to let it go.

    Raises NotFoundError if there is none, BusyError if the guest does not let it go in time, QsteerError otherwise.
    """

    async def exchange(monitor: Monitor) -> tuple[UnplugPlan, str | None]:
        async with plug.stopping(_STILL):
            seen = await qmpvm.describe(monitor, vm.process.pid)
            plan = plugplan.plan_unplug(name, seen, await qmpvm.netdevs(monitor))
            tap = _tap_of(plan, vm.process.pid)
            if not dry_run:
                await _take_off(monitor, plan, timeout_s)
            return plan, tap

    plan, tap = reach.converse(vm, exchange, longer_s=timeout_s + _LONGER_S)
    left = () if dry_run else _left(tap, vm.process.pid)
    return Unplugged(vm=vm, plan=plan, tap=tap, dry_run=dry_run, notes=left)


def _tap_of(plan: UnplugPlan, pid: int) -> str | None:
    """The name of a netdev's tap; that of one that QEMU was given by fds takes a right over QEMU."""
    backend = plan.backend
    if not backend:
        return None
    return next((name for fd in backend.fds if (name := procs.tap_of(pid, fd))), backend.ifname)


async def _take_off(monitor: Monitor, plan: UnplugPlan, timeout_s: float) -> None:
    if plan.device:
        await _release(monitor, plan, timeout_s)
    # It has gone with the device where it was removed before.
    if plan.netdev and plan.netdev in await qmpvm.netdevs(monitor):
        await monitor.ask("netdev_del", {"id": plan.netdev})
        if plan.netdev in await qmpvm.netdevs(monitor):
            raise QsteerError(f'QEMU keeps netdev "{plan.netdev}", although it says that it has removed it')


async def _release(monitor: Monitor, plan: UnplugPlan, timeout_s: float) -> None:
    """Have the guest let the device go.  Raises BusyError if it does not in time, QsteerError if it refuses."""

    def is_it(data: Mapping[str, object]) -> bool:
        return data.get("path") == plan.path

    deadline = time.monotonic() + timeout_s
    with monitor.hearing(("DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR"), is_it) as heard:
        while True:
            await _ask_guest(monitor, plan)
            left = deadline - time.monotonic()
            match await heard(min(_AGAIN_S, max(left, 0.0))):
                case "DEVICE_DELETED":
                    return
                case "DEVICE_UNPLUG_GUEST_ERROR":
                    raise QsteerError(f'the guest refuses to let go of NIC "{plan.name}"')
            if plan.path not in await qmpvm.nic_paths(monitor):
                return
            if left <= 0:
                raise _not_let_go(plan, timeout_s)


async def _ask_guest(monitor: Monitor, plan: UnplugPlan) -> None:
    """Raises QsteerError if QEMU does not, for another reason than that the guest has been asked."""
    try:
        await monitor.ask("device_del", {"id": plan.device})
    except QsteerError as error:
        if not any(word in error.message for word in _WAITS) and plan.path in await qmpvm.nic_paths(monitor):
            raise


def _not_let_go(plan: UnplugPlan, timeout_s: float) -> BusyError:
    still = "" if plan.status == "running" else f" (the VM is {plan.status})"
    return BusyError(
        f'the guest has not let go of NIC "{plan.name}" within {timeout_s:g} s{still}',
        hint=f"nothing was changed; {_STILL}",
    )


def _left(tap: str | None, pid: int) -> tuple[str, ...]:
    """A tap that is still there, and why."""
    from qsteer import links

    if not tap or not _shares_network(pid) or plug.wait_until_gone(tap):
        return ()
    persistent = any(tun.name == tap and tun.persistent for tun in links.tuns())
    why = "it is persistent" if persistent else "another process has it open, too"
    return (f"tap {tap} stays: {why}",)


def _shares_network(pid: int) -> bool:
    """Whether a process lives in qsteer's own network namespace, as far as that may be seen."""
    with contextlib.suppress(OSError):
        return os.path.samestat(Path(f"/proc/{pid}/ns/net").stat(), Path("/proc/self/ns/net").stat())
    return False
