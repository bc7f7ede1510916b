# SPDX-License-Identifier: BSD-2-Clause
"""What is there: every tap of the host that some process holds, the VM behind it, and what steers it.

``fetch`` looks (kernel, /proc, holds); the rest is pure.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from qsteer import holds, kernel, procs, qemuargs
from qsteer.errors import NotFoundError, QsteerError, UsageError
from qsteer.kernel import Kind, MapsContent, OpenQueue, ProgramInfo
from qsteer.procs import Process


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A virtio-net device and its netdev as QEMU's command line has them; None is what it does not say."""

    netdev: str | None
    rss: bool
    vhost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A steering program that a QEMU has open, attached or not; ``fd`` is the QEMU's."""

    fd: int
    info: ProgramInfo
    content: MapsContent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A tap, and all that decides how it is steered.

    ``program_id`` is the kernel's word (0: none); ``program`` is None too where looking at it takes a right that is
    missing.  ``nic`` is None where the command line does not tell (a NIC plugged in later).  ``held`` are the programs
    of this tap's VM with QEMU's maps, and only those which may be meant for this tap.
    """

    name: str
    ifindex: int
    netns: int
    active: int
    disabled: int
    multi_queue: bool
    persistent: bool
    queues: tuple[OpenQueue, ...]
    program_id: int
    program: ProgramInfo | None
    content: MapsContent | None
    body_present: bool
    holder: Process | None
    nic: Nic | None
    held: tuple[Held, ...]
    hold: bool

    @property
    def attached(self) -> int:
        """Queues that some process has, those that the guest does not use included."""
        return self.active + self.disabled

    @property
    def vm(self) -> Process | None:
        """The QEMU that holds the tap."""
        return self.holder if self.holder and self.holder.args else None

    @property
    def vm_name(self) -> str | None:
        return self.vm.args.name or self.vm.args.uuid if self.vm and self.vm.args else None


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


def fetch() -> tuple[Tap, ...]:
    """Every tap that some process has open.  Raises QsteerError where the kernel does not let qsteer look."""
    processes: dict[int, Process | None] = {}
    programs: dict[int, ProgramInfo | None] = {}
    held: dict[int, tuple[Held, ...]] = {}
    taps = []
    queues = [queue for queue in kernel.open_queues() if queue.is_tap]
    for _, group in itertools.groupby(queues, key=lambda queue: (queue.netns, queue.ifindex)):
        of_tap = tuple(group)
        for pid in {queue.pid for queue in of_tap} - processes.keys():
            processes[pid] = procs.read(pid)
        holder = _holder(of_tap, processes)
        if holder and holder.args and holder.pid not in held:
            held[holder.pid] = _held(holder.pid)
        taps.append(_tap(of_tap, holder, held.get(holder.pid, ()) if holder else (), programs))
    return tuple(taps)


def _holder(queues: tuple[OpenQueue, ...], processes: Mapping[int, Process | None]) -> Process | None:
    found = [process for queue in queues if (process := processes[queue.pid])]
    return next((process for process in found if process.args), found[0] if found else None)


def _held(pid: int) -> tuple[Held, ...]:
    found = []
    for program_id, fd in procs.held_programs(pid).items():
        info = _program(program_id)
        if info and info.has_maps:
            found.append(Held(fd=fd, info=info, content=_content(info)))
    return tuple(found)


def _program(program_id: int) -> ProgramInfo | None:
    """None where the program is gone again, or may not be looked at."""
    try:
        return kernel.program_info(program_id)
    except QsteerError:
        return None


def _content(info: ProgramInfo) -> MapsContent | None:
    if not info.has_maps:
        return None
    try:
        return kernel.read_maps(info)
    except QsteerError:
        return None


def _tap(
    queues: tuple[OpenQueue, ...],
    holder: Process | None,
    held: tuple[Held, ...],
    programs: dict[int, ProgramInfo | None],
) -> Tap:
    first = queues[0]
    if first.program_id and first.program_id not in programs:
        programs[first.program_id] = _program(first.program_id)
    program = programs.get(first.program_id)
    hold = holds.find(netns=first.netns, ifindex=first.ifindex, name=first.tap)
    return Tap(
        name=first.tap,
        ifindex=first.ifindex,
        netns=first.netns,
        active=first.active,
        disabled=first.disabled,
        multi_queue=first.multi_queue,
        persistent=first.persistent,
        queues=queues,
        program_id=first.program_id,
        program=program,
        content=_content(program) if program else None,
        body_present=kernel.body_present(program) if program and program.kind is Kind.QSTEER else True,
        holder=holder,
        nic=_nic(first.tap, queues, holder),
        held=tuple(one for one in held if not one.info.ident or one.info.ident.tap == first.tap),
        hold=bool(hold and any(hold.is_of(queue.pid) for queue in queues)),
    )


def _nic(tap: str, queues: tuple[OpenQueue, ...], holder: Process | None) -> Nic | None:
    """The NIC behind a tap: by the netdev's ifname, by its fd numbers, or because there is only one netdev."""
    if not holder or not holder.args:
        return None
    args = holder.args
    netdevs = [netdev for netdev in args.netdevs if netdev.kind in ("tap", "bridge")]
    numbers = {str(queue.fd) for queue in queues if queue.pid == holder.pid}
    found = [netdev for netdev in netdevs if netdev.ifname == tap or numbers & set(netdev.fds)]
    if not found and len(netdevs) == 1 and not netdevs[0].ifname and not netdevs[0].fds:
        found = netdevs
    if len(found) != 1:
        return None
    netdev = found[0]
    devices = [device for device in args.devices if netdev.id and device.netdev == netdev.id]
    if len(devices) != 1 or not devices[0].driver.startswith("virtio-net"):
        return None
    device = devices[0]
    return Nic(netdev=netdev.id, rss=_rss_asked(args, device), vhost=bool(netdev.vhost))


def _rss_asked(args: qemuargs.QemuArgs, device: qemuargs.Device) -> bool:
    for name, value in device.properties:
        if name == "rss":
            return bool(qemuargs.parse_bool(value))
    answer = False
    for setting in args.globals:
        if setting.property == "rss" and device.driver.startswith(setting.driver):
            answer = bool(qemuargs.parse_bool(setting.value))
    return answer


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
