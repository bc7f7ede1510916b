# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer run``: make the taps, load their programs, and become QEMU.

Theory of operation
===================

What is to be done is decided in ``runplan``; here the host is looked at, and the plan is carried out.  A failure at
any step leaves nothing behind, and so does the death of qsteer, or of the QEMU that it has become (``ready``).

QEMU inherits the fds that stand on its command line, and what the caller of qsteer gave.  It runs as the user that was
asked for, with empty capability sets, and so does the QEMU that is asked beforehand what it can do.
"""

import contextlib
import os
import pwd
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

from qsteer import procs, qemuargs, qmp, ready, runplan, shim
from qsteer.errors import PermissionDeniedError, QsteerError, UnsupportedError, UsageError, from_errno
from qsteer.provider import Provider, provider
from qsteer.render import columns
from qsteer.runplan import Nic, NicHandles, RunPlan

if TYPE_CHECKING:
    from qsteer.links import Link


HEADINGS = ("NIC", "TAP", "QUEUES", "MAC", "VHOST", "BRIDGE", "PROGRAM")


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The user that QEMU is to run as, with the groups that the user is in."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What a run would do: its steps in words, and QEMU's command line with names in place of the fds."""

    steps: tuple[str, ...]
    command: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join((*self.steps, f"  {shlex.join(self.command)}", *self.notes))


def run(
    *,
    vm: str | None,
    taps: Sequence[str],
    user: str | None,
    dry_run: bool,
    command: Sequence[str],
    quiet: bool = False,
    service: str | None = None,
    engine: str | None = None,
) -> Rehearsal:
    """Start QEMU with NICs that are steered.  Returns only from a dry run; otherwise this process becomes QEMU.

    ``taps`` are the values of --tap, ``command`` is QEMU's argv, ``user`` None where --user is not given, and
    ``service`` and ``engine`` where those options are not.  Raises QsteerError.
    """
    from qsteer import config, links

    args = qemuargs.parse(command)
    specs = runplan.parse_taps(taps, config.load(), vm or args.name, engine)
    if not specs:
        raise UsageError("run wants a --tap", hint="such as --tap id=net0,queues=4")
    if not command:
        raise UsageError("run wants QEMU's command line", hint="qsteer run --tap ... -- qemu-system-x86_64 ...")
    identity = _identity(user)
    binary = shutil.which(command[0])
    if binary is None:
        raise UsageError(f'there is no program "{command[0]}" to run', hint="what follows -- is QEMU's command line")
    bridges = {spec.bridge: links.bridge(spec.bridge) for spec in specs if spec.bridge}
    for spec in specs:
        if spec.ifname and links.find(spec.ifname):
            raise QsteerError(
                f'the name "{spec.ifname}" is in use by another network device', hint="choose another ifname="
            )

    maker = provider(service)
    probe = qmp.probe(binary, drivers=runplan.drivers_of(args), become=lambda: _become(identity))
    plan = runplan.make_plan(specs=specs, command=command, probe=probe, vm=vm, vhost_available=maker.has_vhost)
    # Anybody may give a process of their own any name: only root and the VM's user can be in the way.
    users = (0, identity.uid if identity else os.geteuid())
    for process in procs.running_qemus() if plan.vm else ():
        if process.args and process.args.name == plan.vm and process.uid in users:
            raise QsteerError(
                f'a VM named "{plan.vm}" runs already: process {process.pid} of uid {process.uid}',
                hint="choose another name with --vm",
            )

    if maker.name and any(nic.in_kernel is not None for nic in plan.nics):
        raise UnsupportedError(f"{maker.name} sets no in-kernel RSS", hint="--engine ebpf; or run as root")
    for nic, order in zip(plan.nics, runplan.orders(plan), strict=True):
        if nic.in_kernel is not None:
            ready.check_in_kernel(order, nic.in_kernel)
    if plan.vm is None and any(nic.mac is None and not nic.spec.ifname for nic in plan.nics):
        nameless = "the VM has no name: a MAC is made of the tap's, and may be another one next time; see --vm"
        plan = replace(plan, notes=(*plan.notes, nameless))
    if not dry_run:
        _execute(plan, maker, binary, identity, quiet=quiet)
    for order in runplan.orders(plan):
        maker.check(order)
    return _rehearse(plan, maker, identity, bridges)


def _execute(plan: RunPlan, maker: Provider, binary: str, identity: Identity | None, *, quiet: bool) -> NoReturn:
    with contextlib.ExitStack() as stack:
        taps: list[ready.ReadyTap] = []
        for nic, order in zip(plan.nics, runplan.orders(plan), strict=True):
            tap = maker.make(order)
            stack.callback(tap.close)
            taps.append(tap if nic.in_kernel is None else ready.steer_in_kernel(tap, nic.in_kernel))
        if not quiet:
            rows = [HEADINGS, *(row(nic, tap) for nic, tap in zip(plan.nics, taps, strict=True))]
            print(columns(rows), *plan.notes, f"QEMU runs as {_who(identity)}", sep="\n", file=sys.stderr, flush=True)
        for tap in taps:
            for fd in tap.fds:
                os.set_inheritable(fd, True)
        _become_qemu(binary, runplan.qemu_argv(plan, [_handles(tap) for tap in taps]), identity)


def _handles(tap: ready.ReadyTap) -> NicHandles:
    return NicHandles(
        queue_fds=tuple(map(str, tap.queue_fds)),
        vhost_fds=tuple(map(str, tap.vhost_fds)),
        program_fds=tuple(map(str, tap.program_fds)),
        mac=tap.mac,
    )


def _become_qemu(binary: str, argv: tuple[str, ...], identity: Identity | None) -> NoReturn:
    # Python ignores these, and a program that is executed would go on doing so.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        _become(identity)
    except OSError as error:
        raise from_errno(error.errno or 0, f"QEMU cannot run as {_who(identity)}") from None
    try:
        os.execve(binary, argv, _environment(identity))
    except OSError as error:
        raise from_errno(error.errno or 0, f'cannot run "{binary}"') from None


def _identity(user: str | None) -> Identity | None:
    """The user to become; None where this process keeps its own.  Raises UsageError or PermissionDeniedError."""
    if user is None:
        if os.geteuid() == 0:
            raise UsageError("run as root needs --user NAME", hint="--user root if QEMU is meant to run as root")
        return None
    try:
        entry = pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f'there is no user "{user}"') from None
    if os.geteuid() != 0:
        if entry.pw_uid == os.geteuid():
            return None
        raise PermissionDeniedError(f"only root can run QEMU as {user}")
    return Identity(
        name=user,
        uid=entry.pw_uid,
        gid=entry.pw_gid,
        groups=tuple(os.getgrouplist(user, entry.pw_gid)),
        home=entry.pw_dir,
    )


def _become(identity: Identity | None) -> None:
    """Take on the user, and give up every capability unless that is root.  Raises OSError or QsteerError."""
    if identity:
        os.setgroups(identity.groups)
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    # To leave uid 0 empties all sets but the inheritable one.
    if os.geteuid() != 0:
        shim.drop_capabilities()


def _environment(identity: Identity | None) -> dict[str, str]:
    if identity is None:
        return dict(os.environ)
    # The session of whoever called is not the user's.
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "DBUS_", "SUDO_"))}
    return {**kept, "HOME": identity.home, "USER": identity.name, "LOGNAME": identity.name}


def row(nic: Nic, tap: ready.ReadyTap) -> tuple[str, ...]:
    """What is told of a NIC whose tap is ready; under HEADINGS."""
    vhost = "on" if nic.vhost else "off"
    return (nic.spec.id, tap.name, str(nic.spec.queues), tap.mac, vhost, nic.spec.bridge or "-", tap.program)


def _who(identity: Identity | None) -> str:
    if identity and identity.uid == 0:
        return "root, with root's capabilities (--user root)"
    name, uid = (identity.name, identity.uid) if identity else ("this user", os.geteuid())
    return f"{name} (uid {uid}), without capabilities"


def _rehearse(plan: RunPlan, maker: Provider, identity: Identity | None, bridges: Mapping[str, "Link"]) -> Rehearsal:
    steps = [f"ask {maker.name} for what follows"] if maker.name else []
    handles: list[NicHandles] = []
    for nic in plan.nics:
        spec = nic.spec
        named_by = plan.vm or spec.ifname
        mac = nic.mac or (
            runplan.stable_mac(named_by, spec.id, ready.machine_id()) if named_by else "52:xx:xx:xx:xx:xx"
        )
        steps += runplan.tap_steps(nic, bridge_mtu=bridges[spec.bridge].mtu if spec.bridge else None)
        handles.append(
            NicHandles(
                queue_fds=tuple(f"{spec.id}-queue{index}" for index in range(spec.queues)),
                vhost_fds=tuple(f"{spec.id}-vhost{index}" for index in range(spec.queues)),
                program_fds=tuple(f"{spec.id}-{what}" for what in ("program", "config", "key", "table")),
                mac=mac,
            )
        )
    steps.append(f"become {_who(identity)}, and run:")
    return Rehearsal(steps=tuple(steps), command=runplan.qemu_argv(plan, handles), notes=plan.notes)
