# SPDX-License-Identifier: BSD-2-Clause
"""What is there: every tap of the host that some process holds, the VM behind it, and what steers it."""

import itertools
from collections.abc import Mapping

from qsteer import holds, kernel, procs, programs, qemuargs
from qsteer.errors import QsteerError
from qsteer.model import Held, Inventory, Kind, MapsContent, Nic, OpenQueue, Process, ProgramInfo, Tap


def fetch() -> Inventory:
    """Every tap that some process has open.  Raises QsteerError where the kernel does not let qsteer look."""
    processes: dict[int, Process | None] = {}
    attached: dict[int, ProgramInfo | None] = {}
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
        taps.append(_tap(of_tap, holder, held.get(holder.pid, ()) if holder else (), attached))
    return Inventory(taps=tuple(taps))


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
        return programs.program_info(program_id)
    except QsteerError:
        return None


def _content(info: ProgramInfo) -> MapsContent | None:
    if not info.has_maps:
        return None
    try:
        return programs.read_maps(info)
    except QsteerError:
        return None


def _body_present(program: ProgramInfo | None) -> bool:
    """As far as can be seen."""
    if not program or program.kind is not Kind.QSTEER:
        return True
    try:
        return programs.body_present(program)
    except QsteerError:
        return True


def _holders(program: ProgramInfo | None) -> tuple[int, ...]:
    """Who may have attached a foreign program: the kernel does not keep it, but whoever has it open may tell."""
    return procs.holders_of_program(program.id) if program and program.kind is Kind.FOREIGN else ()


def _tap(
    queues: tuple[OpenQueue, ...],
    holder: Process | None,
    held: tuple[Held, ...],
    attached: dict[int, ProgramInfo | None],
) -> Tap:
    first = queues[0]
    if first.program_id and first.program_id not in attached:
        attached[first.program_id] = _program(first.program_id)
    program = attached.get(first.program_id)
    hold = holds.find(netns=first.netns, ifindex=first.ifindex)
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
        body_present=_body_present(program),
        program_holders=_holders(program),
        holder=holder,
        domain=None,
        nic=_nic(first.tap, queues, holder),
        held=tuple(one for one in held if _may_be_for(one.info, first)),
        hold=bool(hold and any(hold.is_of(queue.pid) for queue in queues)),
    )


def _may_be_for(program: ProgramInfo, queue: OpenQueue) -> bool:
    """qsteer's programs name their tap, by the name that it had; QEMU's do not."""
    return not program.ident or program.ident.tap == queue.tap or program.id == queue.program_id


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
    own = qemuargs.defaults_of(args, devices[0].driver) | dict(devices[0].properties)
    mac = own.get("mac")
    return Nic(
        id=devices[0].id,
        netdev=netdev.id,
        mac=mac.lower() if isinstance(mac, str) else None,
        rss=bool(qemuargs.parse_bool(own.get("rss"))),
        vhost=bool(netdev.vhost),
    )
