# SPDX-License-Identifier: BSD-2-Clause
"""What libvirt's hook does about one tap of a domain that has just started.  Pure.

Theory of operation
===================

The hook has one moment: QEMU runs, and has made its NICs, the guest has not got to its driver.  What is attached then
lasts for a NIC without RSS; but before QEMU 9.1 the guest's driver takes it off as it starts.  A guest that is offered
RSS has not asked for anything yet: a QEMU that was given a program (``qsteer-qemu``), or could load its own, attaches
it when the guest asks.  Any other takes somebody who is there at that time, ``qsteer keep``.

A QEMU that waits for a guest's state (a migration, a restore) takes any program off when that has come.
"""

from dataclasses import dataclass, replace

from qsteer.errors import QsteerError
from qsteer.ifupplan import DRIVER_TAKES_OFF_BEFORE
from qsteer.model import Engine, Source, Tap
from qsteer.plan import Plan, Wanted, plan_apply

WRAPPER = "qsteer-qemu"
"""The <emulator> that gives a QEMU programs (c/qemu_wrapper.c); its links are called so, and more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """``plan`` is what to do now, ``told`` what to say of it; both may be empty.

    ``fine``: it is steered as wanted then, or will be when the time comes.  ``follow``: it has to be done again once
    the guest's state has come.
    """

    plan: Plan | None = None
    told: str = ""
    fine: bool = True
    follow: bool = False


def decide(
    tap: Tap,
    wanted: Wanted,
    *,
    version: tuple[int, int] | None,
    keep_pid: int | None,
    incoming: bool,
    wrapped: bool = False,
) -> Decision:
    """What to do.

    ``keep_pid`` is the process of a ``qsteer keep`` that keeps the domain, None for none; ``wrapped`` says that the
    emulator is WRAPPER.
    """
    if not tap.steerable:
        return Decision(told="one queue, there is nothing to steer")
    if tap.hold:
        return Decision(told="nothing changed: qsteer off holds it off, until qsteer apply")
    if wanted.if_absent and tap.steering:
        return _planned(tap, wanted)
    static = wanted.source is Source.STATIC
    if static and tap.steered_in_software:
        return _left(None, _why_asked(tap, wrapped), "a table of the host's changes nothing there")
    asked = wanted.source is not None and wanted.source.is_asked
    if asked or (not static and tap.nic and tap.nic.rss and not tap.held):
        return _left(keep_pid if _can_be_asked(tap) else None, _why_asked(tap, wrapped), _takes(tap))
    if incoming and keep_pid:
        return _left(keep_pid, "QEMU takes any program off when the guest's state has come", "")
    if incoming:
        return Decision(told="to be steered when the guest's state has come", follow=True)
    decision = _planned(tap, wanted)
    if decision.plan and decision.plan.engine is Engine.KERNEL:
        return decision  # which no QEMU takes off
    if decision.plan and version and version < DRIVER_TAKES_OFF_BEFORE and not (tap.nic and tap.nic.rss):
        why = f"QEMU {version[0]}.{version[1]} takes the program off when the guest's driver starts"
        return replace(_left(keep_pid, why, "it takes qsteer keep"), plan=decision.plan)
    return decision


def _planned(tap: Tap, wanted: Wanted) -> Decision:
    try:
        return Decision(plan=plan_apply(tap, wanted))
    except QsteerError as error:
        return Decision(told=f"not steered: {error}" + (f" ({error.hint})" if error.hint else ""), fine=False)


def _left(keep_pid: int | None, why: str, takes: str) -> Decision:
    """What cannot be done now."""
    if keep_pid:
        return Decision(told=f"{why}: left to qsteer keep (process {keep_pid})")
    return Decision(told=f"{why}: {takes}", fine=False)


def _can_be_asked(tap: Tap) -> bool:
    """Whether there is a QMP socket besides libvirt's own monitor, which serves libvirt alone, as does its agent's."""
    monitor = tap.domain.monitor if tap.domain else None
    return bool(tap.vm and tap.vm.args and any(path != monitor for path in tap.vm.args.qmp_paths))


def _takes(tap: Tap) -> str:
    if _can_be_asked(tap):
        return "it takes qsteer keep, which asks the guest"
    return "it takes a QMP socket of its own, and qsteer keep (see docs/libvirt.md)"


def _why_asked(tap: Tap, wrapped: bool) -> str:
    """Why nothing can be done before the guest has been asked."""
    if tap.steered_in_software:
        where = f"the domain's log has why {WRAPPER} gave none" if wrapped else f"see {WRAPPER}"
        return f"the guest is offered RSS, and QEMU, which has no program for it ({where}), steers in software"
    if tap.nic and tap.nic.rss and not tap.held:
        return "the guest is offered RSS, and this QEMU does not steer (vhost)"
    return "its guest has to be asked"
