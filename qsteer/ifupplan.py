# SPDX-License-Identifier: BSD-2-Clause
"""What ``qsteer-ifup`` can give a tap, told from the command line of the QEMU that runs it.  Pure.

Theory of operation
===================

QEMU runs the script when it has opened the first queue, before the NIC is made.  Making the NIC ("realize") takes any
program off the tap where the NIC has rss=on, and from QEMU 10.1 on where the netdev has vhost=on.  Before 9.1 so does
any command of the guest's driver about its queues, as it starts, whatever rss is.  What the script attaches stays on a
QEMU in between for rss=off, and there with vhost=on up to 10.0; elsewhere it takes ``keep``.  In-kernel RSS is nothing
that QEMU knows of: with rss=off it stays on every version.

The script is told the tap's name alone.  Which netdev it is for shows where that has an ``ifname``; of those without
one all that may be meant have to be alike.  What the command line does not have was plugged in later.
"""

from dataclasses import dataclass, replace

from qsteer.nics import VmNics
from qsteer.qemuargs import Netdev, QemuArgs

DRIVER_TAKES_OFF_BEFORE = (9, 1)
"""The first QEMU that leaves a program alone when the guest's driver sets its queues up ("Unify the logic to update NIC
state for RSS"); 7.2 was seen to take it off, 10.0 was not."""
VHOST_TAKES_OFF = (10, 1)
"""The first QEMU that takes a program off a tap as it makes a NIC with vhost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What QEMU is going to have behind a tap.

    ``rss`` is None where no -device uses the netdev.  ``ids`` are those of the NIC and of its netdev, ``mac`` is the
    guest's; empty and None where it is not plain which of several it is.
    """

    queues: int
    vhost: bool
    rss: bool | None
    ids: tuple[str, ...] = ()
    mac: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to steer, and why that does not, or may not, last; an empty ``lost`` is no reason.

    ``by_guest`` says that the guest is offered RSS of its own.
    """

    attach: bool
    lost: str = ""
    by_guest: bool = False


def behind(args: QemuArgs, tap: str) -> Behind | None:
    """What QEMU's command line says of a tap; None if it does not tell."""
    taps = [netdev for netdev in args.netdevs if netdev.kind == "tap" and not netdev.fds]
    named = [netdev for netdev in taps if netdev.ifname == tap]
    # With a % in it the kernel makes a name of it.
    found = _with_nics(args, named or [one for one in taps if one.ifname is None or "%" in one.ifname])
    if len({(one.queues, one.vhost, one.rss) for one in found}) != 1:
        return None
    return found[0] if len(found) == 1 else replace(found[0], ids=(), mac=None)


def _with_nics(args: QemuArgs, netdevs: list[Netdev]) -> list[Behind]:
    nics = {(known.nic.netdev, known.ifname): known.nic for known in VmNics(args, None, vhost_net=False).known}
    found = []
    for netdev in netdevs:
        nic = nics.get((netdev.id, netdev.ifname))
        found.append(
            Behind(
                queues=1 if netdev.queues is None else netdev.queues,
                vhost=bool(netdev.vhost),
                rss=nic.rss if nic else None,
                ids=tuple(name for name in (nic.id if nic else None, netdev.id) if name),
                mac=nic.mac if nic else None,
            )
        )
    return found


def needs_version(known: Behind | None) -> bool:
    """Whether it depends on QEMU's version if a program stays attached; to find that out takes a while."""
    return bool(known and known.queues > 1 and not known.rss)


def decide(known: Behind | None, version: tuple[int, int] | None = None, *, in_kernel: bool = False) -> Decision:
    """What to do for a tap; ``version`` is QEMU's, None if it is unknown or not needed.

    ``in_kernel``: tun itself is going to steer, which no QEMU takes off, but one with rss=on undoes in software.
    """
    with_rss = "QEMU may undo it with rss=on" if in_kernel else "QEMU takes it off with rss=on"
    if known is None:
        return Decision(attach=True, lost=f"{with_rss}, and its command line does not have this NIC")
    if known.queues == 1:
        return Decision(attach=False)
    if known.rss:
        return Decision(attach=False, lost="QEMU would take it off again (rss=on)", by_guest=True)
    if not in_kernel and (lost := _lost_by_version(known, version)):
        return lost
    if known.rss is None:
        return Decision(attach=True, lost=f"{with_rss}, and its command line has no -device for it")
    return Decision(attach=True)


def _lost_by_version(known: Behind, version: tuple[int, int] | None) -> Decision | None:
    """What comes of a program that this QEMU takes off, or may; None where it stays."""
    if version is None:
        which = "before 9.1, and from 10.1 on with vhost=on," if known.vhost else "before 9.1"
        return Decision(attach=True, lost=f"QEMU {which} takes it off, and this one's version is not known")
    told = f"QEMU {version[0]}.{version[1]} would take it off again"
    if version < DRIVER_TAKES_OFF_BEFORE:
        return Decision(attach=False, lost=f"{told} when the guest's driver starts")
    if known.vhost and version >= VHOST_TAKES_OFF:
        return Decision(attach=False, lost=f"{told} (vhost=on)")
    return None


def warning(decision: Decision, keep_pid: int | None) -> str:
    """The line for the user; ``keep_pid`` is the process of a ``qsteer keep``, if one runs."""
    what = "attached, but" if decision.attach else "nothing attached,"
    if keep_pid:
        then = f"left to qsteer keep (process {keep_pid})"
    elif decision.by_guest:
        then = "unless QEMU loads a program of its own it takes qsteer keep, or qsteer run"
    else:
        then = "it takes qsteer keep"
    return f"{what} {decision.lost}: {then}"
