# SPDX-License-Identifier: BSD-2-Clause
"""Which taps a command is about.  Pure, but for the network namespaces that ``--netns`` names.

A VM is known by its process.  Its name is libvirt's word where libvirt knows the process, else that of its command
line, which anybody can write: a name that several processes claim is refused to what changes anything.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from qsteer import namespaces
from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, UsageError
from qsteer.model import Inventory, Nic, Process, Tap, Unsteerable

_LOOK = "qsteer status lists what is there"
_NOT_A_TAP = "packets do not pass a tap"
_MAC = re.compile("[0-9a-f]{2}(:[0-9a-f]{2}){5}")
_SHOWN_MAX = 16
"""Candidates that a message names."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which taps are meant: kinds AND, repeats OR; nothing given selects all that ``every`` allows.

    ``nics`` are a NIC's id (libvirt's alias) or that of its netdev; ``namespaces`` names, paths or inode numbers.
    Raises UsageError for a MAC that is none.
    """

    vms: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    taps: tuple[str, ...] = ()
    nics: tuple[str, ...] = ()
    macs: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    every: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "macs", tuple(_mac(text) for text in self.macs))

    def __bool__(self) -> bool:
        return self != Selection()

    def matches(self, tap: Tap) -> bool:
        """Whether a tap is selected.  ``every`` leaves out what is no multi-queue tap of a VM."""
        return (
            (not self.every or (tap.steerable and tap.vm is not None))
            and _any(self.vms, lambda vm: _claims(tap, vm))
            and _any(self.pids, lambda pid: _has_pid(tap, pid))
            and _any(self.taps, lambda name: tap.name == name)
            and _any(self.nics, lambda nic: _is_nic(tap.nic, nic))
            and _any(self.macs, lambda mac: _has_mac(tap.nic, mac))
            and _any(self.namespaces, lambda netns: _is_in(tap, netns))
        )

    def matches_unsteerable(self, other: Unsteerable) -> bool:
        """The same of a NIC without a tap, which ``every``, a tap's name and a network namespace never select."""
        return (
            not (self.every or self.taps or self.namespaces)
            and _any(self.vms, lambda vm: _claims(other, vm))
            and _any(self.pids, lambda pid: other.vm.pid == pid)
            and _any(self.nics, lambda nic: _is_nic(other.nic, nic))
            and _any(self.macs, lambda mac: _has_mac(other.nic, mac))
        )

    def narrow(self, inventory: Inventory) -> Inventory:
        """What is selected, to be looked at: a name may have several owners.

        Raises NotFoundError if there is nothing, or no network namespace of a name that is given.
        """
        _check_namespaces(self)
        found = replace(
            inventory,
            taps=tuple(tap for tap in inventory.taps if self.matches(tap)),
            unsteerable=tuple(other for other in inventory.unsteerable if self.matches_unsteerable(other)),
        )
        if not found.taps and not found.unsteerable:
            raise NotFoundError(_nothing_found(self), hint=_LOOK)
        return found


def select(inventory: Inventory, selection: Selection) -> tuple[Tap, ...]:
    """The taps that are meant, to be changed.

    Raises NotFoundError if there is none, or if one of what is named matches none; UsageError if a name is that of
    several VMs or taps, with who they are; UnsupportedError if what is named has no tap that can be steered.
    """
    _check_namespaces(selection)
    for vm in selection.vms:
        _refuse_several_claimants(inventory, selection, vm)
    found = tuple(tap for tap in inventory.taps if selection.matches(tap))
    others = tuple(other for other in inventory.unsteerable if selection.matches_unsteerable(other))
    if not found:
        raise _no_tap(others, selection)
    for one in _each_name(selection):
        if not any(one.matches(tap) for tap in found):
            raise _no_tap(tuple(other for other in others if one.matches_unsteerable(other)), one)
    _refuse_several_taps(found, selection)
    _refuse_several_nics(found, others, selection)
    return _within_reach(found, selection)


def _each_name(selection: Selection) -> Iterable[Selection]:
    """The selection with each thing that is named, alone of its kind: each has to match something."""
    yield from (replace(selection, vms=(vm,)) for vm in selection.vms)
    yield from (replace(selection, pids=(pid,)) for pid in selection.pids)
    yield from (replace(selection, taps=(tap,)) for tap in selection.taps)
    yield from (replace(selection, nics=(nic,)) for nic in selection.nics)
    yield from (replace(selection, macs=(mac,)) for mac in selection.macs)
    yield from (replace(selection, namespaces=(netns,)) for netns in selection.namespaces)


def _refuse_several_claimants(inventory: Inventory, selection: Selection, vm: str) -> None:
    """A VM's name must be that of one process; which one, --pid or --netns can say, but not what else a NIC is called.

    A process that forges a name may have named its taps and NICs, too.
    """
    if selection.pids:
        return
    claims = Selection(vms=(vm,), namespaces=selection.namespaces)
    taps = [tap for tap in inventory.taps if claims.matches(tap)]
    others = [other for other in inventory.unsteerable if claims.matches_unsteerable(other)]
    if len(_owners((*taps, *others))) < 2:
        return
    hint = "choose one with --pid or --netns"
    known = _owners([*(tap for tap in taps if tap.domain), *(other for other in others if other.domain)])
    if len(known) == 1:
        hint += f"; libvirt knows pid {known[0].pid} by that name"
    raise UsageError(f'"{vm}" is the name of several VMs: {_candidates(taps, others)}', hint=hint)


def _refuse_several_taps(found: Sequence[Tap], selection: Selection) -> None:
    """A tap's name must be that of one tap, unless the network namespaces are given."""
    for name in selection.taps if not selection.namespaces else ():
        taps = [tap for tap in found if tap.name == name]
        if len(taps) > 1:
            raise UsageError(
                f'"{name}" is the name of several taps: {_candidates(taps, ())}',
                hint="choose one with --netns or --pid",
            )


def _refuse_several_nics(found: Sequence[Tap], others: Sequence[Unsteerable], selection: Selection) -> None:
    """A NIC's id or MAC must be of one VM, unless VMs are given."""
    if selection.vms or selection.pids:
        return
    named = [
        *((f'NIC "{nic}"', Selection(nics=(nic,))) for nic in selection.nics),
        *((f"MAC {mac}", Selection(macs=(mac,))) for mac in selection.macs),
    ]
    for what, one in named:
        taps = [tap for tap in found if one.matches(tap)]
        nics = [other for other in others if one.matches_unsteerable(other)]
        if len(_owners((*taps, *nics))) > 1:
            raise UsageError(
                f"{what} is of several VMs: {_candidates(taps, nics)}", hint="choose one with --vm or --pid"
            )


def _within_reach(found: tuple[Tap, ...], selection: Selection) -> tuple[Tap, ...]:
    """Those that some process has open: to any other there is no way in.  Raises UnsupportedError."""
    held = tuple(tap for tap in found if not tap.unheld)
    unheld = [tap for tap in found if tap.unheld]
    if unheld and (not held or any(tap.name in selection.taps for tap in unheld)):
        raise UnsupportedError(
            f'no process has tap "{unheld[0].name}" open: there is nothing to steer', hint="start its VM first"
        )
    return held


def _no_tap(others: Sequence[Unsteerable], selection: Selection) -> QsteerError:
    """Why nothing is selected: it is not there, or its packets pass no tap."""
    if not others:
        return NotFoundError(_nothing_found(selection), hint=_LOOK)
    first = others[0]
    if selection.nics or selection.macs:
        name = first.nic.id or first.nic.netdev or first.nic.mac
        return UnsupportedError(f'NIC "{name}" of {_vm_text(first)} is {first.backend}: its {_NOT_A_TAP}')
    backends = sorted({other.backend for other in others})
    its = "its" if len(others) == 1 else "their"
    return UnsupportedError(f"{_vm_text(first)} has {' and '.join(backends)} only: {its} {_NOT_A_TAP}")


def _nothing_found(selection: Selection) -> str:
    if selection.every:
        return "no VM has a multi-queue tap"
    wanted = (
        " or ".join(f'VM "{vm}"' for vm in selection.vms),
        " or ".join(f"process {pid}" for pid in selection.pids),
        " or ".join(f'tap "{tap}"' for tap in selection.taps),
        " or ".join(f'NIC "{nic}"' for nic in selection.nics),
        " or ".join(f"MAC {mac}" for mac in selection.macs),
        " or ".join(f'network namespace "{netns}"' for netns in selection.namespaces),
    )
    given = [kind for kind in wanted if kind]
    if len(given) > 1:
        return f"nothing is at once {' and '.join(given)}"
    if selection.namespaces:
        return f"no tap in {given[0]}"
    return f"no {given[0]}" if selection.taps else f"no {given[0]} that has a tap"


def _check_namespaces(selection: Selection) -> None:
    for netns in selection.namespaces:
        namespaces.resolve(netns)


def _candidates(taps: Sequence[Tap], others: Sequence[Unsteerable]) -> str:
    """Each process, and what of it is meant."""
    found: dict[tuple[int, int], list[str]] = {}
    for tap in taps:
        place = f" in {tap.netns_name}" if tap.netns_name else ""
        found.setdefault(_pid_and_uid(tap.vm or tap.holder), []).append(f"{tap.name}{place}")
    for other in others:
        found.setdefault(_pid_and_uid(other.vm), []).append(other.backend)
    told = [f"pid {pid}, uid {uid}, {', '.join(names[:_SHOWN_MAX])}" for (pid, uid), names in sorted(found.items())]
    more = [f"and {len(told) - _SHOWN_MAX} more"] if len(told) > _SHOWN_MAX else []
    return "; ".join((*told[:_SHOWN_MAX], *more))


def _pid_and_uid(process: Process | None) -> tuple[int, int]:
    return (process.pid, process.uid) if process else (0, 0)


def _owners(entries: Iterable[Tap | Unsteerable]) -> list[Process]:
    """The processes behind, each once."""
    return list({entry.vm.pid: entry.vm for entry in entries if entry.vm}.values())


def _vm_text(other: Unsteerable) -> str:
    args = other.vm.args
    name = other.domain.name if other.domain else (args and (args.name or args.uuid))
    return f'VM "{name}"' if name else f"process {other.vm.pid}"


def _claims(entry: Tap | Unsteerable, vm: str) -> bool:
    """Whether it is of a VM with that name or UUID."""
    if entry.domain:
        return vm == entry.domain.name or vm.lower() == entry.domain.uuid
    args = entry.vm.args if entry.vm else None
    return bool(args and (vm == args.name or (args.uuid and vm.lower() == args.uuid.lower())))


def _has_pid(tap: Tap, pid: int) -> bool:
    return bool(tap.holder and tap.holder.pid == pid) or any(queue.pid == pid for queue in tap.queues)


def _is_nic(nic: Nic | None, name: str) -> bool:
    return nic is not None and name in (nic.id, nic.netdev)


def _has_mac(nic: Nic | None, mac: str) -> bool:
    return nic is not None and nic.mac == mac


def _is_in(tap: Tap, netns: str) -> bool:
    try:
        return tap.netns == namespaces.resolve(netns)
    except QsteerError:
        return False


def _mac(text: str) -> str:
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise UsageError(f'"{text}" is not a MAC', hint="52:54:00:12:34:56")
    return mac


def _any(values: tuple[_Value, ...], test: Callable[[_Value], bool]) -> bool:
    """Whether one of the values passes, or nothing is asked for."""
    return not values or any(map(test, values))
