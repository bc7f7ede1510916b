# SPDX-License-Identifier: BSD-2-Clause
"""One VM that runs, and the ways to talk to its QEMU.

A VM is known by its process.  Its name is libvirt's word where libvirt knows the process, else that of its command
line, which anybody can write: a name that several processes claim is refused.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from qsteer import peer, procs, qmp
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError, UsageError, printable
from qsteer.model import Domain, Process
from qsteer.qmp import Monitor

_PATHS_MAX = 3
"""QMP sockets of one VM that are tried: who can write a command line can write a thousand paths on it."""
_SHOWN_MAX = 16
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """A process, and the paths of the QMP sockets that it may serve; ``name`` is the VM's, if it has one."""

    process: Process
    paths: tuple[str, ...]
    name: str | None = None

    def __str__(self) -> str:
        return printable(
            f'VM "{self.name}", process {self.process.pid}' if self.name else f"process {self.process.pid}"
        )


def at_socket(path: str) -> Reach:
    """What serves the QMP socket at ``path``, as qsteer sees it.  Raises what ``peer.connect`` raises."""
    server = peer.server_of(path)
    process = procs.read(server)
    if process is None:
        raise NotFoundError(f'process {server}, which served "{printable(path)}", has ended')
    return Reach(process=process, paths=(peer.OwnPath(path),), name=_name(process, _domain(process)))


def of_process(pid: int) -> Reach:
    """The QEMU with that pid.  Raises NotFoundError, UnsupportedError if it has no QMP socket for qsteer."""
    process = procs.read(pid)
    if process is None or process.args is None:
        raise NotFoundError(f"process {pid} is not a QEMU", hint="qsteer status lists what is there")
    return _reach(process, _domain(process))


def of_name(vm: str) -> Reach:
    """The VM of that name or UUID.

    Raises NotFoundError if there is none, UsageError if several processes claim to be it, UnsupportedError if it has no
    QMP socket for qsteer.
    """
    from qsteer import libvirt

    qemus = procs.running_qemus()
    domains = libvirt.domains(qemus).domains
    found = [process for process in qemus if _claims(process, domains.get(process.pid), vm)]
    if not found:
        raise NotFoundError(f'no VM "{vm}" runs', hint="qsteer status lists what is there")
    if len(found) > 1:
        told = "; ".join(f"pid {process.pid}, uid {process.uid}" for process in found[:_SHOWN_MAX])
        raise UsageError(f'VM "{vm}" is the name of several: {told}', hint="choose one with --pid or --qmp")
    return _reach(found[0], domains.get(found[0].pid))


def converse(
    reach: Reach, exchange: Callable[[Monitor], Awaitable[_Answer]], *, answer_s: float = 0.0, longer_s: float = 0.0
) -> _Answer:
    """One exchange, by the first socket that can be had.  Raises what ``qmp.converse`` raises.

    Once it has begun there is no other try.
    """
    began = False

    async def begin(monitor: Monitor) -> _Answer:
        nonlocal began
        began = True
        return await exchange(monitor)

    failure: QsteerError | None = None
    for path in reach.paths[:_PATHS_MAX]:
        try:
            return qmp.converse(path, reach.process, begin, answer_s=answer_s, longer_s=longer_s)
        except (BusyError, NotFoundError) as error:
            if began:
                raise
            failure = failure or error
    assert failure
    raise failure


def _reach(process: Process, domain: Domain | None) -> Reach:
    args, monitor = process.args, domain.monitor if domain else None
    paths = tuple(path for path in dict.fromkeys(args.qmp_paths if args else ()) if path != monitor)
    reach = Reach(process=process, paths=paths, name=_name(process, domain))
    if not paths:
        only = "libvirt holds its only one" if monitor else "it was started without one"
        raise UnsupportedError(
            f"{reach} has no QMP socket for qsteer: {only}", hint="-qmp unix:PATH,server=on,wait=off for its QEMU"
        )
    return reach


def _domain(process: Process) -> Domain | None:
    from qsteer import libvirt

    return libvirt.domains((process,)).domains.get(process.pid) if process.args else None


def _name(process: Process, domain: Domain | None) -> str | None:
    return domain.name if domain else process.args.name if process.args else None


def _claims(process: Process, domain: Domain | None, vm: str) -> bool:
    if domain:
        return vm == domain.name or vm.lower() == domain.uuid
    args = process.args
    return bool(args and (vm == args.name or (args.uuid and vm.lower() == args.uuid.lower())))
