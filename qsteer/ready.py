# SPDX-License-Identifier: BSD-2-Clause
"""Taps made ready for a QEMU: opened, set up, in their bridge, with a steering program and vhost.

Nothing that is made here outlives the process that holds it: a tap goes with its last queue fd, a program with its last
fd.  So a failure at any step leaves nothing behind, and so does the death of whoever holds the fds.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from qsteer import kernel, procs, programs
from qsteer.errors import from_errno
from qsteer.model import Engine, Source, Tap
from qsteer.plan import Plan, Static, Wanted, plan_apply
from qsteer.runplan import Order, stable_mac

VHOST_NET = Path("/dev/vhost-net")
MACHINE_ID = Path("/etc/machine-id")
LOCK_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadyTap:
    """A tap that QEMU can be given.  ``mac`` is the NIC's; all fds are close-on-exec and this process's.

    ``program_fds`` are program, configuration, key and table, as QEMU's ``ebpf-rss-fds`` wants them, or none;
    ``program`` tells which it is.
    """

    name: str
    mac: str
    queue_fds: tuple[int, ...]
    vhost_fds: tuple[int, ...] = ()
    program_fds: tuple[int, ...] = ()
    program: str = "-"

    @property
    def fds(self) -> tuple[int, ...]:
        """All of them, in the order of the fields."""
        return (*self.queue_fds, *self.vhost_fds, *self.program_fds)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


def make(order: Order) -> ReadyTap:
    """Make one tap ready with the rights of this process.  Raises QsteerError; nothing is left then."""
    with contextlib.ExitStack() as undo:
        tap = kernel.open_tap(order.ifname, order.queues)
        undo.callback(tap.close)
        mac = order.mac or stable_mac(order.vm or tap.name, order.id, machine_id())
        _set_up_link(tap.name, order, mac)
        program = programs.load_program(tap=tap.name, source=Source.SHARED_MAPS) if order.steered else None
        if program:
            undo.callback(program.close)
        vhost_fds = _open_vhost(order.queues) if order.vhost else ()
        undo.pop_all()
    return ReadyTap(
        name=tap.name,
        mac=mac,
        queue_fds=tap.fds,
        vhost_fds=vhost_fds,
        program_fds=program.fds if program else (),
        program=f"qsteer {program.id} ({program.build})" if program else "-",
    )


def check_in_kernel(order: Order, static: Static) -> None:
    """Raises what ``steer_in_kernel`` would raise on this host: UnsupportedError or PermissionDeniedError."""
    from qsteer import hashing

    _plan_in_kernel(
        Tap(
            name=order.ifname or order.id,
            ifindex=0,
            netns=0,
            active=order.queues,
            disabled=0,
            multi_queue=order.queues > 1,
            persistent=False,
            hashing=hashing.hashing(),
        ),
        static,
    )


def steer_in_kernel(tap: ReadyTap, static: Static) -> ReadyTap:
    """Have tun itself steer a tap, by a configuration of the host's.  Raises QsteerError; the tap is as it was then."""
    from qsteer import execute
    from qsteer.attached import tap_of

    # QEMU will be this very process.
    made = replace(tap_of(kernel.queue_of(tap.queue_fds[0])), holder=procs.read(os.getpid()))
    plan = _plan_in_kernel(made, static)
    with execute.lock(LOCK_S):
        execute.execute(plan)
    return replace(tap, program=f"in-kernel RSS ({plan.tap.hashing.generation})")


def _plan_in_kernel(tap: Tap, static: Static) -> Plan:
    return plan_apply(tap, Wanted(source=Source.STATIC, engine=Engine.KERNEL, static=static))


def has_vhost() -> bool:
    """Whether vhost works here.  The node may be there without the module, which opening it loads where it can."""
    try:
        os.close(os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def machine_id() -> str:
    """What tells this host from others; empty where it has no id."""
    try:
        return MACHINE_ID.read_text("ascii").strip()
    except (OSError, ValueError):
        return ""


def _set_up_link(tap: str, order: Order, mac: str) -> None:
    from qsteer import links

    if order.bridge:
        bridge = links.bridge(order.bridge)
        port_mac = links.bridge_port_mac(mac)
        links.configure(tap, mac=port_mac, mtu=order.mtu or bridge.mtu, bridge_index=bridge.index)
    else:
        links.configure(tap, mtu=order.mtu)


def _open_vhost(queues: int) -> tuple[int, ...]:
    """One fd of /dev/vhost-net per queue, which QEMU's user could not open."""
    fds: list[int] = []
    with contextlib.ExitStack() as undo:
        for _ in range(queues):
            try:
                fds.append(os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC))
            except OSError as error:
                hint = "vhost=off does without it"
                raise from_errno(error.errno or 0, f"cannot open {VHOST_NET}", hint=hint) from None
            undo.callback(os.close, fds[-1])
        undo.pop_all()
    return tuple(fds)
