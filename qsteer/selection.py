# SPDX-License-Identifier: BSD-2-Clause
"""Which taps a command is about.  Pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from qsteer.errors import NotFoundError, UsageError
from qsteer.model import Tap


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which taps are meant: kinds AND, repeats OR; nothing given selects all that ``every`` allows."""

    vms: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    taps: tuple[str, ...] = ()
    every: bool = False

    def __bool__(self) -> bool:
        return bool(self.vms or self.pids or self.taps or self.every)

    def matches(self, tap: Tap) -> bool:
        """Whether a tap is selected.  ``every`` leaves out what is no multi-queue tap of a VM."""
        args = tap.vm.args if tap.vm else None
        if self.vms and not (args and (args.name in self.vms or args.uuid in self.vms)):
            return False
        if self.pids and not any(queue.pid in self.pids for queue in tap.queues):
            return False
        if self.taps and tap.name not in self.taps:
            return False
        return not self.every or (tap.multi_queue and tap.vm is not None)


def select(taps: Iterable[Tap], selection: Selection) -> tuple[Tap, ...]:
    """The taps that are meant.

    Raises NotFoundError if there is none, UsageError if a VM's name is that of several processes.
    """
    found = tuple(tap for tap in taps if selection.matches(tap))
    for vm in selection.vms:
        pids = {
            tap.vm.pid: tap.vm for tap in found if tap.vm and tap.vm.args and vm in (tap.vm.args.name, tap.vm.args.uuid)
        }
        if len(pids) > 1:
            candidates = "; ".join(
                f"pid {pid}, uid {process.uid}, {', '.join(tap.name for tap in found if tap.vm == process)}"
                for pid, process in sorted(pids.items())
            )
            raise UsageError(
                f'"{vm}" is the name of {len(pids)} running VMs: {candidates}', hint="choose one with --pid"
            )
    if not found:
        raise NotFoundError(_nothing_found(selection), hint="qsteer status lists what is there")
    return found


def _nothing_found(selection: Selection) -> str:
    if selection.every:
        return "no VM has a multi-queue tap"
    wanted = [f'VM "{vm}"' for vm in selection.vms]
    wanted += [f"process {pid}" for pid in selection.pids]
    wanted += [f'tap "{tap}"' for tap in selection.taps]
    if selection.taps and not (selection.vms or selection.pids):
        return f"no {' or '.join(wanted)} that a process holds"
    return f"no {' and '.join(wanted)} with a tap"
