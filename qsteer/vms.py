# SPDX-License-Identifier: BSD-2-Clause
"""The VMs of a host: their processes, what libvirt says of them, their NICs and what they have open."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from qsteer import libvirt, procs
from qsteer.model import Nic, Process, Unsteerable
from qsteer.nics import VmNics

_NAMED_MAX = 5


class Vms:
    """QEMUs, and other processes that have a tap open; ``notes`` say what could not be seen.

    ``domains`` tells what libvirt knows of QEMUs.  All is read once, when this is made.
    """

    def __init__(
        self, processes: Mapping[int, Process | None], domains: Callable[[Collection[Process]], libvirt.Found]
    ) -> None:
        self.processes = processes
        self.qemus = {pid: process for pid, process in self.processes.items() if process and process.args}
        found = domains(self.qemus.values())
        self.domains = found.domains
        self.notes = found.notes
        self.files = {pid: procs.open_files(pid) for pid in self.qemus}
        if unseen := [str(pid) for pid, files in self.files.items() if not files.seen]:
            what = f"what process {several(unseen)} has open cannot be seen"
            takes = f"it takes CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH, and {procs.FDS_MAX} files at most"
            self.notes = (*self.notes, f"{what}: {takes}")
        self._nics = {
            pid: VmNics(process.args, self.domains.get(pid), vhost_net=self.files[pid].vhost_net)
            for pid, process in self.qemus.items()
        }

    def nic_of(self, pid: int, tap: str, fds: Iterable[int], *, only_one: bool) -> Nic | None:
        """The NIC of a process behind a tap, which may be its only one."""
        nics = self._nics.get(pid)
        return nics.of_tap(tap, fds, only_one=only_one) if nics else None

    def taps_open(self) -> dict[str, dict[int, set[int]]]:
        """What /proc tells without the kernel's help: by a tap's name and by process, the fds of its queues."""
        found: dict[str, dict[int, set[int]]] = {}
        for pid, files in self.files.items():
            for fd in files.queues:
                if name := procs.tap_of(pid, fd):
                    found.setdefault(name, {}).setdefault(pid, set()).add(fd)
        return found

    def unsteerable(self) -> Iterator[Unsteerable]:
        """The NICs whose packets do not pass a tap."""
        for pid, process in self.qemus.items():
            for nic, backend in self._nics[pid].without_tap(self.files[pid].macvtaps):
                yield Unsteerable(vm=process, domain=self.domains.get(pid), nic=nic, backend=backend)


def every(holders: Iterable[int]) -> Vms:
    """Those of the host: every QEMU, and who has a tap open."""
    processes: dict[int, Process | None] = {process.pid: process for process in procs.running_qemus()}
    for pid in set(holders) - processes.keys():
        processes[pid] = procs.read(pid)
    return Vms(processes, libvirt.domains)


def several(names: Iterable[str]) -> str:
    """Some names, for a note."""
    every = list(names)
    more = f" and {len(every) - _NAMED_MAX} more" if len(every) > _NAMED_MAX else ""
    return f"{', '.join(every[:_NAMED_MAX])}{more}"
