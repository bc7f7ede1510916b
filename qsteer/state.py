# SPDX-License-Identifier: BSD-2-Clause
"""What ``status`` says of a tap: its state in a few words, and whether its guest gets what it asks for.  Pure."""

import enum

from qsteer.model import Engine, Kind, ProgramInfo, Reading, Source, Steering, Tap
from qsteer.rss import RssConfig


class Agrees(enum.StrEnum):
    """Whether packets go where the guest asks for; ``NOTHING_ASKED``: the guest is not offered RSS."""

    YES = "yes"
    NO = "no"
    UNKNOWN = "unknown"
    NOTHING_ASKED = "-"


def state(tap: Tap) -> str:
    """The STATE column."""
    if tap.unheld:
        return "no process has it open"
    if not tap.queues:
        return "what steers it cannot be seen"
    if tap.program_id and not tap.program:
        return "steered, no right to see by whom"
    if tap.program:
        below = bool(tap.vnet_hash and tap.vnet_hash.rss)
        return _state_steered(tap, tap.program) + ("; in-kernel RSS waits below it" if below else "")
    if tap.steering:
        return _state_in_kernel(tap, tap.steering)
    if tap.hold:
        return "held off"
    if not tap.steerable:
        return "single queue"
    if tap.steered_in_software:
        return "guest is offered RSS, QEMU steers in software"
    if tap.given or tap.loaded_by_qemu:
        return "ready, the guest has not asked for RSS"
    if tap.nic and tap.nic.rss:
        return "guest is offered RSS, not steered"
    return "not steered"


def _state_steered(tap: Tap, program: ProgramInfo) -> str:
    ident = program.ident
    if program.kind is Kind.FOREIGN:
        holders = ", ".join(map(str, tap.program_holders))
        return f'"{program.name}", loaded by uid {program.uid}' + (f", held by pid {holders}" if holders else "")
    if not tap.body_present:
        return "broken: the shared body is gone"
    if ident and ident.source is Source.STATIC and tap.steered_in_software:
        return "undone: QEMU steers in software"
    if tap.hold:
        return "ok, but on hold: keep leaves it alone"
    if ident and ident.outdated:
        return f"ok, of qsteer {ident.version}: apply --refresh"
    return "ok"


def _state_in_kernel(tap: Tap, steering: Steering) -> str:
    if steering.kind is not Kind.QSTEER:
        return "in-kernel RSS that somebody else has set"
    if steering.source is Source.STATIC and tap.steered_in_software:
        return "undone: QEMU steers in software"
    return "ok, but on hold: keep leaves it alone" if tap.hold else "ok"


def broken(tap: Tap) -> bool:
    """Whether what steers does not work."""
    steering = tap.steering
    if not steering or steering.kind is not Kind.QSTEER:
        return False
    return not steering.works or (steering.source is Source.STATIC and tap.steered_in_software)


def agrees(tap: Tap) -> Agrees:
    """Whether the guest's packets go where it asks for, as far as that is known without asking it.

    With a reading, that is what the guest asks for; without one it is known where QEMU writes it into maps, and where
    QEMU moves the packets itself.
    """
    if not tap.queues or not tap.body_present:
        return Agrees.UNKNOWN
    if not tap.steerable:
        return Agrees.NOTHING_ASKED
    if tap.reading:
        return _agrees_with(tap, tap.reading)
    if not tap.nic:
        return Agrees.UNKNOWN
    if not tap.nic.rss:
        return Agrees.NOTHING_ASKED
    if _moved_by_qemu(tap):
        return Agrees.YES
    for held in tap.held:
        if held.content and held.content.enabled and held.content.config and tap.steering:
            return _same(tap, held.content.config, exact_types=True)
    return Agrees.UNKNOWN


def _moved_by_qemu(tap: Tap) -> bool:
    """Whether QEMU moves every packet to where the guest wants it, and nothing of qsteer's means to save it that."""
    return tap.steered_in_software and not _was_asked(tap)


def _was_asked(tap: Tap) -> bool:
    """Whether what is attached is what the guest said when it was asked."""
    steering = tap.steering
    return bool(steering and steering.kind is Kind.QSTEER and steering.source and steering.source.is_asked)


def _agrees_with(tap: Tap, reading: Reading) -> Agrees:
    if _moved_by_qemu(tap):
        return Agrees.YES
    if reading.config:
        return _same(tap, reading.config, exact_types=reading.exact_types)
    # It asks for nothing: what the operator attached is as good as the kernel's automq, what it once asked for is not.
    return Agrees.NO if _was_asked(tap) else Agrees.YES


def _same(tap: Tap, asked: RssConfig, *, exact_types: bool) -> Agrees:
    """Whether what steers has the configuration that is asked for."""
    if not tap.steering:
        return Agrees.NO
    if tap.steering.engine is Engine.EBPF and not tap.content:
        return Agrees.UNKNOWN
    found = tap.steering.config
    if not found:
        return Agrees.NO
    same = (found.key, found.table) == (asked.key, asked.table)
    if exact_types:
        same = same and (found.types, found.unclassified_queue) == (asked.types, asked.unclassified_queue)
    return Agrees.YES if same else Agrees.NO
