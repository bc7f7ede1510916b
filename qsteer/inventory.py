# SPDX-License-Identifier: BSD-2-Clause
"""What is there: every tap of the host, the VM behind it, and what steers it; and the NICs that have no tap.

Theory of operation
===================

The kernel says which taps some process has open, by which queues, and what steers them.  rtnetlink adds those that
nobody has open, in qsteer's own network namespace and in those with a name.  Who a process is comes from libvirt's
status files, else from its command line.  Each process, program and directory is looked at once, however many taps
there are.

What takes a right that is missing is left out and noted, unless ``strict`` asks for the error.
"""

import itertools
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from qsteer import hashing, holds, kernel, libvirt, marks, namespaces, tuns
from qsteer.attached import Programs
from qsteer.errors import QsteerError
from qsteer.model import Domain, Inventory, OpenQueue, Process, ProgramInfo, Tap
from qsteer.tuns import Tun
from qsteer.vms import Vms, every, several

_Place = tuple[int, int]
"""A network namespace's inode number, and an ifindex in it."""


def fetch(*, strict: bool = True) -> Inventory:
    """Every tap, and every NIC of a VM without one.

    Raises QsteerError where the kernel does not let qsteer look at what is attached; without ``strict`` the inventory's
    notes say what could not be seen, and its taps are as rtnetlink and /proc know them: without queues.
    """
    notes: list[str] = []
    names, own = namespaces.named(), namespaces.own()
    names.pop(own, None)
    # Before the queues: what is opened in between is no tap that nobody has open.
    devices = _devices(names, own, notes)
    try:
        queues: tuple[OpenQueue, ...] | None = kernel.open_queues()
    except QsteerError as error:
        if strict:
            raise
        queues = None
        notes.append(_why_unseen(error))
    vms = every({queue.pid for queue in queues or ()})
    notes += vms.notes
    if queues is None:
        taps = tuple(_taps_unseen(devices, names, vms))
    else:
        groups = _by_tap(queues)
        held = tuple(_taps_held(groups, names, vms, _taps_of(groups)))
        taps = (*held, *_taps_unheld(devices, held, names, notes))
    return Inventory(
        taps=tuple(sorted(taps, key=lambda tap: (tap.netns, tap.ifindex))),
        unsteerable=tuple(vms.unsteerable()),
        notes=tuple(notes),
    )


def fetch_again(before: Inventory) -> Inventory:
    """A quick look at the taps that some process has open, which takes over what cannot have changed.

    That is all about a tap whose queues are the very same, with the same attachment of a program, but for a hold, the
    shared body, and whose RSS of tun's own is.  NICs without a tap, and all that a VM does without touching its taps,
    take a ``fetch``.  Raises QsteerError.
    """
    known = {(tap.netns, tap.ifindex): tap for tap in before.taps if bool(tap.program_id) == bool(tap.program)}
    groups = _by_tap(kernel.open_queues())
    held, programs = holds.places(), Programs()
    same, changed = [], []
    for group in groups:
        tap = known.get((group[0].netns, group[0].ifindex))
        if tap and tap.queues == group:
            hold, present = _is_on_hold(group, held), programs.body_present(tap.program)
            rss = tap.vnet_hash and marks.marked(tap.vnet_hash, netns=tap.netns, ifindex=tap.ifindex)
            unchanged = (hold, present, rss) == (tap.hold, tap.body_present, tap.vnet_hash)
            same.append(tap if unchanged else replace(tap, hold=hold, body_present=present, vnet_hash=rss))
        else:
            changed.append(group)
    if changed:
        names = namespaces.named()
        names.pop(namespaces.own(), None)
        vms = every({queue.pid for group in changed for queue in group})
        same += _taps_held(changed, names, vms, _taps_of(groups))
    return replace(before, taps=tuple(sorted(same, key=lambda tap: (tap.netns, tap.ifindex))))


def of_domain(process: Process, domain: Domain) -> tuple[Tap, ...]:
    """The taps that the QEMU of one libvirt domain has open, looking at nothing else of the host.

    Raises QsteerError where the kernel does not let qsteer look.
    """
    groups = _by_tap(kernel.open_queues(process.pid))
    vms = Vms({process.pid: process}, lambda _: libvirt.Found(domains={process.pid: domain}))
    return tuple(_taps_held(groups, {}, vms, _taps_of(groups)))


def _by_tap(queues: Iterable[OpenQueue]) -> list[tuple[OpenQueue, ...]]:
    of_taps = (queue for queue in queues if queue.is_tap)
    return [tuple(group) for _, group in itertools.groupby(of_taps, key=lambda queue: (queue.netns, queue.ifindex))]


def _taps_of(groups: Sequence[tuple[OpenQueue, ...]]) -> Counter[int]:
    """How many taps each process has open."""
    return Counter(pid for group in groups for pid in {queue.pid for queue in group})


def _taps_held(
    groups: Sequence[tuple[OpenQueue, ...]], names: Mapping[int, str], vms: Vms, taps_of: Mapping[int, int]
) -> Iterator[Tap]:
    """The taps that some process has open."""
    held, programs, rss = holds.places(), Programs(), hashing.of_taps(itertools.chain.from_iterable(groups))
    for group in groups:
        tap = _tap(group, names.get(group[0].netns), vms, taps_of, programs, hold=_is_on_hold(group, held))
        found = rss.get((tap.netns, tap.ifindex))
        yield replace(hashing.looked(tap), vnet_hash=found) if found else tap


def _is_on_hold(queues: Sequence[OpenQueue], places: Collection[_Place]) -> bool:
    place = (queues[0].netns, queues[0].ifindex)
    if place not in places:
        return False
    hold = holds.find(netns=place[0], ifindex=place[1])
    return bool(hold and any(hold.is_of(queue.pid) for queue in queues))


def _tap(
    queues: tuple[OpenQueue, ...],
    netns_name: str | None,
    vms: Vms,
    taps_of: Mapping[int, int],
    programs: Programs,
    *,
    hold: bool,
) -> Tap:
    first = queues[0]
    holder = _holder(queues, vms)
    pid = holder.pid if holder else 0
    fds = {queue.fd for queue in queues if queue.pid == pid}
    program = programs.info(first.program_id)
    return Tap(
        name=first.tap,
        ifindex=first.ifindex,
        netns=first.netns,
        netns_name=netns_name,
        active=first.active,
        disabled=first.disabled,
        multi_queue=first.multi_queue,
        persistent=first.persistent,
        queues=queues,
        program_id=first.program_id,
        program=program,
        content=programs.content(program),
        body_present=programs.body_present(program),
        program_holders=programs.holders(program),
        holder=holder,
        domain=vms.domains.get(pid),
        nic=vms.nic_of(pid, first.tap, fds, only_one=taps_of.get(pid) == 1),
        held=tuple(one for one in programs.held(pid, vms.files.get(pid)) if _may_be_for(one.info, first)),
        hold=hold,
    )


def _holder(queues: Sequence[OpenQueue], vms: Vms) -> Process | None:
    found = [process for queue in queues if (process := vms.processes[queue.pid])]
    return next((process for process in found if process.args), found[0] if found else None)


def _may_be_for(program: ProgramInfo, queue: OpenQueue) -> bool:
    """qsteer's programs name their tap, by the name that it had; QEMU's do not."""
    return not program.ident or program.ident.tap == queue.tap or program.id == queue.program_id


def _devices(names: Mapping[int, str], own: int, notes: list[str]) -> dict[_Place, Tun]:
    """The taps of qsteer's network namespace, and of those with a name."""
    if not tuns.driver_is_loaded():
        return {}
    found: dict[_Place, Tun] = {}
    failed: dict[str, QsteerError] = {}
    here = tuns.in_sysfs()
    answers: Mapping[str, tuple[Tun, ...] | QsteerError] = {}
    if names or here is None:
        from qsteer import links  # takes a while

        answers = namespaces.visit(names.values(), links.tuns)
        here = links.tuns() if here is None else here
    for netns, name in names.items():
        answer = answers[name]
        if isinstance(answer, QsteerError):
            failed[name] = answer
        else:
            found |= {(netns, tun.ifindex): tun for tun in answer if tun.is_tap}
    if failed:
        first = next(iter(failed.values()))
        reason = os.strerror(first.errno) if first.errno else first
        notes.append(f"not looked into network namespace {several(failed)} for taps that no process has open: {reason}")
    return found | {(own, tun.ifindex): tun for tun in here if tun.is_tap}


def _taps_unheld(
    devices: Mapping[_Place, Tun], held: Sequence[Tap], names: Mapping[int, str], notes: list[str]
) -> list[Tap]:
    """The persistent taps that no process has open."""
    seen = {(tap.netns, tap.ifindex) for tap in held}
    found = [
        _device_tap(tun, netns, names.get(netns), unheld=True)
        for (netns, ifindex), tun in devices.items()
        if tun.persistent and (netns, ifindex) not in seen
    ]
    if found:
        notes.append(f"what steers {several(tap.name for tap in found)} cannot be seen: no process has it open")
    return found


def _taps_unseen(devices: Mapping[_Place, Tun], names: Mapping[int, str], vms: Vms) -> Iterator[Tap]:
    """The taps, where the kernel does not let qsteer look at who has them open: as far as /proc tells."""
    holders = vms.taps_open()
    same_name = Counter(tun.name for tun in devices.values())
    taps_of = Counter(pid for of_process in holders.values() for pid in of_process)
    for (netns, _), tun in devices.items():
        tap = _device_tap(tun, netns, names.get(netns), unheld=False)
        of_process = holders.get(tun.name, {})
        # /proc tells the name of the tap, but not where it is.
        if len(of_process) == 1 and same_name[tun.name] == 1:
            ((pid, fds),) = of_process.items()
            nic = vms.nic_of(pid, tun.name, fds, only_one=taps_of[pid] == 1)
            tap = replace(tap, holder=vms.qemus[pid], domain=vms.domains.get(pid), nic=nic)
        yield tap


def _device_tap(tun: Tun, netns: int, netns_name: str | None, *, unheld: bool) -> Tap:
    """A tap of which nothing but the device is known."""
    return Tap(
        name=tun.name,
        ifindex=tun.ifindex,
        netns=netns,
        netns_name=netns_name,
        active=0 if unheld else tun.active,
        disabled=0,
        multi_queue=tun.multi_queue,
        persistent=tun.persistent,
        unheld=unheld,
    )


def _why_unseen(error: QsteerError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
