# SPDX-License-Identifier: BSD-2-Clause
"""What to do to a tap: desired steering and what is there go in, a plan comes out.  Pure.

A plan is carried out by ``execute`` and printed by ``--dry-run``; both see the same steps.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from qsteer.errors import ConflictError, UnsupportedError
from qsteer.model import Held, Kind, ProgramInfo, Source, Tap
from qsteer.rss import BASE_TYPES, KEY_BYTES, TABLE_MAX, HashType, RssConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Load a new program with a configuration in its maps, and attach it in place of whatever is there."""

    config: RssConfig
    displaced: int

    def __str__(self) -> str:
        taken_off = f", in place of program {self.displaced}" if self.displaced else ""
        return f"load a steering program with a table of {len(self.config.table)} entries and attach it{taken_off}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachHeld:
    """Attach a program that QEMU has open."""

    program_id: int
    fd: int

    def __str__(self) -> str:
        return f"attach program {self.program_id}, which QEMU holds"


@dataclass(frozen=True, slots=True)
class RefillBody:
    """Give the attached stub its shared body back, and every other stub that lost it with it."""

    def __str__(self) -> str:
        return "load the shared body again, which the attached program lacks"


@dataclass(frozen=True, slots=True)
class Detach:
    """Take the program off."""

    def __str__(self) -> str:
        return "detach the program: the kernel's automq takes over"


@dataclass(frozen=True, slots=True)
class PutHold:
    """Remember that it is to stay off."""

    def __str__(self) -> str:
        return "hold it off until the next apply or the VM's end"


@dataclass(frozen=True, slots=True)
class RemoveHold:
    """Forget the hold."""

    def __str__(self) -> str:
        return "remove the hold"


Step = Attach | AttachHeld | RefillBody | Detach | PutHold | RemoveHold


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The steps for one tap, none if it is as wanted; ``program_id`` is what has to be attached in the end.

    ``program_id`` is None for a program that is yet to be loaded.  ``notes`` are for the user to know.
    """

    tap: Tap
    steps: tuple[Step, ...]
    result: str
    source: Source | None
    program_id: int | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Static:
    """What the operator says about the RSS configuration; None leaves it as it is, or to the default."""

    types: HashType | None = None
    key: bytes | None = None
    table: tuple[int, ...] | None = None
    unclassified_queue: int | None = None

    def __bool__(self) -> bool:
        return self != Static()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What ``apply`` was asked for.  ``source`` None is ``auto``."""

    source: Source | None = None
    static: Static = Static()
    replace: bool = False
    force: bool = False


def describe(program: ProgramInfo) -> str:
    """A program as messages name it."""
    name = program.name or "without a name"
    return f'program {program.id} ("{name}", tag {program.tag}, loaded by uid {program.uid})'


def plan_apply(tap: Tap, wanted: Wanted, *, random_key: Callable[[int], bytes] = secrets.token_bytes) -> Plan:
    """Steer a tap.

    Raises ConflictError (a foreign program, or QEMU's own, is attached and ``replace`` is not given) and
    UnsupportedError (nothing to steer, software steering, a guest's table that cannot be read).
    """
    if not tap.steerable:
        raise UnsupportedError(f'tap "{tap.name}" has a single queue: there is nothing to steer')
    if wanted.source is Source.STATIC or wanted.static:
        return _apply_static(tap, wanted, random_key)
    return _apply_auto(tap, wanted, random_key)


def _apply_auto(tap: Tap, wanted: Wanted, random_key: Callable[[int], bytes]) -> Plan:
    """The best source that works: QEMU's own program, the one it was given, what is attached, an even spread."""
    attached, shared, qemus = tap.program, _shared_maps(tap), _of_qemu(tap)
    if attached and attached.kind is Kind.QEMU and not wanted.source and not wanted.replace:
        return _unchanged(tap, Source.QEMU_MAPS)
    _refuse_foreign(tap, wanted)
    if shared:
        return _apply_shared(tap, wanted, shared)
    if wanted.source:
        raise UnsupportedError(
            f'the QEMU behind tap "{tap.name}" has no program of qsteer\'s to write into: no {wanted.source}',
            hint="qsteer run starts a VM that has",
        )
    if attached and attached.ident and tap.body_present:
        return _unchanged(tap, attached.ident.source)
    if tap.nic and tap.nic.rss and not attached:
        _refuse_software(tap, wanted)
        if qemus:
            return _ready(tap, Source.QEMU_MAPS, "QEMU attaches its own program when the guest asks for RSS")
        raise UnsupportedError(
            f'the guest behind tap "{tap.name}" is offered RSS, and its table cannot be read from here',
            hint="--source static steers by a table of yours",
        )
    return _apply_static(tap, wanted, random_key)


def _apply_shared(tap: Tap, wanted: Wanted, shared: Held) -> Plan:
    """Follow the guest through the program that QEMU was started with."""
    if tap.program_id == shared.info.id:
        if not tap.body_present and shared.info.ident and shared.info.ident.outdated:
            raise UnsupportedError(
                f'the shared body of tap "{tap.name}" is gone, and was that of another version of qsteer',
                hint="restart the VM with qsteer run, or --source static",
            )
        mend: tuple[Step, ...] = () if tap.body_present else (RefillBody(),)
        result = "mended" if mend else "unchanged"
        return replace(_unchanged(tap, Source.SHARED_MAPS), steps=(*mend, *_lift_hold(tap)), result=result)
    # What QEMU took off itself holds the table of before a reset: that comes back only on request.
    taken_off_by_us = tap.hold or tap.program_id
    if shared.content and shared.content.enabled and (taken_off_by_us or wanted.source):
        return Plan(
            tap=tap,
            steps=(AttachHeld(program_id=shared.info.id, fd=shared.fd), *_lift_hold(tap)),
            result="replaced" if tap.program_id else "attached",
            source=Source.SHARED_MAPS,
            program_id=shared.info.id,
            notes=_displaces(tap),
        )
    return _ready(tap, Source.SHARED_MAPS, "QEMU attaches the program when the guest asks for RSS")


def _ready(tap: Tap, source: Source, note: str) -> Plan:
    """QEMU will attach a program by itself; until then nothing steers."""
    off: tuple[Step, ...] = (Detach(),) if tap.program_id else ()
    return Plan(
        tap=tap,
        steps=(*off, *_lift_hold(tap)),
        result="ready",
        source=source,
        program_id=0,
        notes=(*_displaces(tap), note),
    )


def _apply_static(tap: Tap, wanted: Wanted, random_key: Callable[[int], bytes]) -> Plan:
    _refuse_foreign(tap, wanted)
    attached = tap.program
    own = attached if attached and attached.kind is Kind.QSTEER else None
    _refuse_software(tap, wanted)
    # What is attached stays, but for what is given: the guest's own table in QEMU's program, too.
    current = tap.content.config if tap.content else None
    base = current or RssConfig(types=BASE_TYPES, key=random_key(KEY_BYTES), table=tuple(range(TABLE_MAX)))
    config = _merged(base, wanted.static)
    is_static = own and own.ident and own.ident.source is Source.STATIC
    if is_static and config == current and tap.content and tap.content.enabled and tap.body_present:
        return _unchanged(tap, Source.STATIC)

    displaced = 0
    if own and own.ident:
        displaced = own.ident.displaced
    elif attached and attached.kind is Kind.QEMU:
        displaced = attached.id
    notes = list(_displaces(tap))
    last = tap.attached - 1
    if wanted.static.table and (beyond := max(config.table)) > last:
        notes.append(f"the table names queue {beyond}, the tap has 0 to {last}: the kernel folds it (modulo)")
    if config.unclassified_queue > last:
        notes.append(f"unclassified queue {config.unclassified_queue}: the tap has 0 to {last}, the kernel folds it")
    if _shared_maps(tap):
        notes.append(
            "the guest's own table is not followed now: --source shared-maps goes back to it, "
            "and so does QEMU when the guest sets RSS"
        )
    elif displaced or _of_qemu(tap):
        notes.append("QEMU holds a program of its own for this tap, and attaches it when the guest sets RSS")
    notes.append("not kept: QEMU may remove it on reset or migration; status shows it, apply puts it back")
    return Plan(
        tap=tap,
        steps=(Attach(config=config, displaced=displaced), *_lift_hold(tap)),
        result="replaced" if tap.program_id else "attached",
        source=Source.STATIC,
        program_id=None,
        notes=tuple(notes),
    )


def plan_off(tap: Tap, *, replace_foreign: bool = False) -> Plan:
    """Stop steering a tap, and hold it off.  Raises ConflictError if what is attached is not qsteer's."""
    holding: tuple[Step, ...] = () if tap.hold else (PutHold(),)
    if not tap.program_id:
        result = "off" if holding else "unchanged"
        return Plan(tap=tap, steps=holding, result=result, source=None, program_id=0, notes=_may_come_back(tap))
    _refuse_foreign(tap, Wanted(replace=replace_foreign))
    program = tap.program
    notes = list(_displaces(tap))
    if program and program.ident and program.ident.displaced:
        put_back = next((held for held in tap.held if held.info.id == program.ident.displaced), None)
        if put_back:
            return Plan(
                tap=tap,
                steps=(*holding, AttachHeld(program_id=put_back.info.id, fd=put_back.fd)),
                result="put back",
                source=Source.QEMU_MAPS,
                program_id=put_back.info.id,
                notes=(f"QEMU's own {describe(put_back.info)} steers again",),
            )
        notes.append(f"the program that it displaced ({program.ident.displaced}) is gone")
    return Plan(
        tap=tap,
        steps=(*holding, Detach()),
        result="off",
        source=None,
        program_id=0,
        notes=(*notes, *_may_come_back(tap)),
    )


def _may_come_back(tap: Tap) -> tuple[str, ...]:
    if not tap.held:
        return ()
    ids = ", ".join(str(held.info.id) for held in tap.held)
    return (f"QEMU holds program {ids} and may attach it again when the guest sets RSS",)


def _shared_maps(tap: Tap) -> Held | None:
    """qsteer's program that QEMU was started with for this tap."""
    idents = ((held, held.info.ident) for held in tap.held)
    return next((held for held, ident in idents if ident and ident.source is Source.SHARED_MAPS), None)


def _of_qemu(tap: Tap) -> Held | None:
    """A program that QEMU loaded itself."""
    return next((held for held in tap.held if held.info.kind is Kind.QEMU), None)


def _displaces(tap: Tap) -> tuple[str, ...]:
    """Names what is taken off, if it is not qsteer's."""
    if not tap.program_id or (tap.program and tap.program.kind is Kind.QSTEER):
        return ()
    return (f"in place of {describe(tap.program) if tap.program else f'program {tap.program_id}'}",)


def _refuse_foreign(tap: Tap, wanted: Wanted) -> None:
    if not tap.program_id or wanted.replace:
        return
    if not tap.program:
        raise ConflictError(
            f'tap "{tap.name}" is steered by program {tap.program_id}, which cannot be looked at',
            hint="with CAP_SYS_ADMIN qsteer can tell whose it is; --replace takes it off all the same",
        )
    if tap.program.kind is Kind.QSTEER:
        return
    owner = "QEMU's own" if tap.program.kind is Kind.QEMU else "the foreign"
    raise ConflictError(
        f'tap "{tap.name}" is steered by {owner} {describe(tap.program)}', hint="--replace takes it off"
    )


def _refuse_software(tap: Tap, wanted: Wanted) -> None:
    """QEMU moves every packet again where it steers in software; what the kernel chose is lost."""
    if wanted.force or not steers_in_software(tap):
        return
    raise UnsupportedError(
        f'the QEMU behind tap "{tap.name}" steers in software (rss=on, vhost=off, no program loaded): '
        "it undoes any other steering",
        hint="qsteer run starts it with a program; --force attaches one all the same",
    )


def steers_in_software(tap: Tap) -> bool:
    """Whether QEMU itself moves packets to the guest's queues, or will once the guest asks for RSS."""
    return bool(tap.nic and tap.nic.rss and not tap.nic.vhost and not tap.held)


def _merged(base: RssConfig, static: Static) -> RssConfig:
    return replace(
        base,
        types=base.types if static.types is None else static.types,
        key=static.key or base.key,
        table=static.table or base.table,
        unclassified_queue=(
            base.unclassified_queue if static.unclassified_queue is None else static.unclassified_queue
        ),
    )


def _unchanged(tap: Tap, source: Source | None) -> Plan:
    return Plan(tap=tap, steps=_lift_hold(tap), result="unchanged", source=source, program_id=tap.program_id)


def _lift_hold(tap: Tap) -> tuple[Step, ...]:
    return (RemoveHold(),) if tap.hold else ()


def state(tap: Tap) -> str:
    """The STATE column of ``status``."""
    if tap.program_id and not tap.program:
        return "steered, no right to see by whom"
    if tap.program:
        return _state_steered(tap, tap.program)
    if tap.hold:
        return "held off"
    if not tap.steerable:
        return "single queue"
    if steers_in_software(tap):
        return "guest is offered RSS, QEMU steers in software"
    if _shared_maps(tap) or _of_qemu(tap):
        return "ready, the guest has not asked for RSS"
    if tap.nic and tap.nic.rss:
        return "guest is offered RSS, not steered"
    return "not steered"


def _state_steered(tap: Tap, program: ProgramInfo) -> str:
    if program.kind is Kind.FOREIGN:
        holders = ", ".join(map(str, tap.program_holders))
        return f'"{program.name}", loaded by uid {program.uid}' + (f", held by pid {holders}" if holders else "")
    if not tap.body_present:
        return "broken: the shared body is gone"
    if program.kind is Kind.QSTEER and steers_in_software(tap):
        return "undone: QEMU steers in software"
    return "ok"
