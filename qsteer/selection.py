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
        if self.vms and not any(_is_vm(tap, vm) for vm in self.vms):
            return False
        if self.pids and not any(_has_pid(tap, pid) for pid in self.pids):
            return False
        if self.taps and tap.name not in self.taps:
            return False
        return not self.every or (tap.steerable and tap.vm is not None)


def select(taps: Iterable[Tap], selection: Selection) -> tuple[Tap, ...]:
    """The taps that are meant.

    Raises NotFoundError if there is none, or if one of the names matches none; UsageError if a VM's name is that of
    several processes, or a tap's name that of taps in several network namespaces.
    """
    found = tuple(tap for tap in taps if selection.matches(tap))
    if not found:
        raise NotFoundError(_nothing_found(selection), hint="qsteer status lists what is there")
    for vm in selection.vms:
        _refuse_ambiguous(f'"{vm}" is the name of several VMs', [tap for tap in found if _is_vm(tap, vm)], by="pid")
    for name in selection.taps:
        _refuse_ambiguous(
            f'"{name}" is the name of several taps', [tap for tap in found if tap.name == name], by="netns"
        )
    for pid in selection.pids:
        if not any(_has_pid(tap, pid) for tap in found):
            raise NotFoundError(_nothing_found(Selection(pids=(pid,))))
    return found


def _is_vm(tap: Tap, vm: str) -> bool:
    return bool(tap.vm and tap.vm.args and vm in (tap.vm.args.name, tap.vm.args.uuid))


def _has_pid(tap: Tap, pid: int) -> bool:
    return any(queue.pid == pid for queue in tap.queues)


def _refuse_ambiguous(message: str, taps: list[Tap], *, by: str) -> None:
    """``taps`` are those that one name selects: they must be some, and of one process or network namespace."""
    if not taps:
        name = message.partition(" is ")[0]
        raise NotFoundError(f"{name} matches nothing", hint="qsteer status lists what is there")
    owners = {tap.netns if by == "netns" else tap.vm.pid if tap.vm else 0 for tap in taps}
    if len(owners) == 1:
        return
    candidates: dict[tuple[int, int], list[str]] = {}
    for tap in taps:
        holder = (tap.holder.pid, tap.holder.uid) if tap.holder else (0, 0)
        candidates.setdefault(holder, []).append(tap.name)
    told = (f"pid {pid}, uid {uid}, {', '.join(names)}" for (pid, uid), names in sorted(candidates.items()))
    raise UsageError(f"{message}: {'; '.join(told)}", hint="choose one with --pid")


def _nothing_found(selection: Selection) -> str:
    if selection.every:
        return "no VM has a multi-queue tap"
    wanted = (
        " or ".join(f'VM "{vm}"' for vm in selection.vms),
        " or ".join(f"process {pid}" for pid in selection.pids),
        " or ".join(f'tap "{tap}"' for tap in selection.taps),
    )
    given = [kind for kind in wanted if kind]
    if len(given) > 1:
        return f"nothing is at once {' and '.join(given)}"
    return f"no {given[0]} that a process holds" if selection.taps else f"no {given[0]} that has a tap"
