# SPDX-License-Identifier: BSD-2-Clause
"""What to do to a tap: desired steering and what is there go in, a plan comes out.  Pure.

A plan is carried out by ``execute`` and printed by ``--dry-run``; both see the same steps.
"""

import hashlib
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from qsteer import engines
from qsteer.errors import BusyError, ConflictError, QsteerError, UnsupportedError
from qsteer.model import Engine, Held, Kind, ProgramInfo, Reading, Source, Steering, Tap, VnetHash
from qsteer.rss import BASE_TYPES, KEY_BYTES, TABLE_MAX, HashType, RssConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Attach:
    """Load a new program with a configuration in its maps, and attach it in place of whatever is there."""

    config: RssConfig
    source: Source
    displaced: int

    def __str__(self) -> str:
        taken_off = f", in place of program {self.displaced}" if self.displaced else ""
        return f"load a steering program with a table of {len(self.config.table)} entries and attach it{taken_off}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refresh:
    """Load this qsteer's program over the maps of the attached program, and attach it in its place.

    QEMU goes on writing into the maps, and is followed.
    """

    source: Source
    displaced: int

    def __str__(self) -> str:
        return "load a steering program over the maps of the attached one, and attach it in its place"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachHeld:
    """Attach a program that QEMU has open."""

    program_id: int
    fd: int

    def __str__(self) -> str:
        return f"attach program {self.program_id}, which QEMU holds"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRss:
    """Have tun steer by RSS of its own.  ``rss`` has the source, and what it takes the place of."""

    rss: VnetHash

    def __str__(self) -> str:
        entries = len(self.rss.config.table) if self.rss.config else 0
        report = ", and report the hash" if self.rss.report else ""
        return f"set in-kernel RSS with a table of {entries} entries{report}"


@dataclass(frozen=True, slots=True)
class ClearRss:
    """Take RSS of tun's own off."""

    def __str__(self) -> str:
        return "take in-kernel RSS off"


@dataclass(frozen=True, slots=True)
class RefillBody:
    """Give the attached stub its shared body back, and every other stub that lost it with it."""

    def __str__(self) -> str:
        return "load the shared body again, which the attached program lacks"


@dataclass(frozen=True, slots=True)
class Detach:
    """Take the program off."""

    def __str__(self) -> str:
        return "detach the program"


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


Step = Attach | AttachHeld | Refresh | RefillBody | SetRss | ClearRss | Detach | PutHold | RemoveHold


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The steps for one tap, none if it is as wanted; ``program_id`` is what has to be attached in the end.

    ``program_id`` is None for a program that is yet to be loaded.  ``engine`` is what steers then; None is automq, or
    what QEMU has attached by the time.  ``notes`` are for the user to know.
    """

    tap: Tap
    steps: tuple[Step, ...]
    result: str
    source: Source | None
    program_id: int | None
    engine: Engine | None = None
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
    """What ``apply`` was asked for.  ``source`` and ``engine`` None are ``auto``.

    ``report``: the guest is to be told the hash of each packet; None leaves that as it is.  ``lenient``: where it
    cannot be told, it is steered all the same.

    ``expect`` is the ``revision`` that the tap must have.  ``allow_pause`` lets a source stop the VM for a moment.
    ``identify``: something else may be wanted once it is known which NIC this is, so QEMU is asked for that alone.
    """

    source: Source | None = None
    engine: Engine | None = None
    report: bool | None = None
    lenient: bool = False
    static: Static = Static()
    replace: bool = False
    force: bool = False
    if_absent: bool = False
    expect: str | None = None
    refresh: bool = False
    allow_pause: bool = False
    identify: bool = False


def describe(program: ProgramInfo) -> str:
    """A program as messages name it."""
    name = program.name or "without a name"
    return f'program {program.id} ("{name}", tag {program.tag}, loaded by uid {program.uid})'


def revision(tap: Tap) -> str:
    """Twelve hexadecimal digits that change with what steers a tap: program, RSS, configuration, a hold."""
    config = tap.content.config if tap.content else None
    known: tuple[object, ...] = (tap.netns, tap.ifindex, tap.program_id, config, tap.hold)
    if tap.vnet_hash:
        known += (tap.vnet_hash.content,)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:12]


def readings_wanted(tap: Tap, wanted: Wanted) -> tuple[Source, ...]:
    """The sources that have to be asked before this tap can be planned for, best first; none for most."""
    steering = tap.steering
    if not tap.steerable or wanted.static or (wanted.if_absent and steering):
        return ()
    if wanted.source:
        return (wanted.source,) if wanted.source.is_asked else ()
    if not tap.nic or not tap.nic.rss or _follows_maps(tap):
        return ()
    if steering and not wanted.replace and not _to_be_seen_to(tap, steering):
        return ()
    return (Source.DEVICE_STATE, Source.GUEST_AGENT) if wanted.allow_pause else (Source.GUEST_AGENT,)


def _to_be_seen_to(tap: Tap, steering: Steering) -> bool:
    asked = bool(steering.source and steering.source.is_asked)
    return steering.kind is Kind.QSTEER and (asked or tap.steered_in_software)


def _follows_maps(tap: Tap) -> bool:
    """Whether QEMU writes what the guest sets into maps.  With vhost, QEMU 10.1 and later may not, and does not say."""
    enabled = any(held.content and held.content.enabled for held in tap.held)
    return bool(tap.held) and (enabled or not (tap.nic and tap.nic.vhost))


def plan_apply(tap: Tap, wanted: Wanted, *, random_key: Callable[[int], bytes] = secrets.token_bytes) -> Plan:
    """Steer a tap.

    Raises ConflictError (a foreign program, or QEMU's own, is attached and ``replace`` is not given), BusyError (it is
    not what was expected) and UnsupportedError (nothing to steer, software steering, a guest's table that cannot be
    read).
    """
    if not tap.steerable:
        raise UnsupportedError(f'tap "{tap.name}" has a single queue: there is nothing to steer')
    _refuse_unexpected(tap, wanted.expect)
    if wanted.if_absent and (steering := tap.steering):
        stays = f"program {tap.program_id} is attached" if tap.program_id else "in-kernel RSS is set"
        note = f"{stays}, and stays: --if-absent"
        return replace(_unchanged(tap, None), steps=(), engine=steering.engine, notes=(note,))
    if wanted.refresh:
        return _refresh(tap) or _nothing_to_refresh(tap)
    if wanted.source is Source.STATIC or wanted.static:
        return _apply_static(tap, wanted, random_key)
    return _apply_auto(tap, wanted, random_key)


def _refuse_unexpected(tap: Tap, expect: str | None) -> None:
    if expect is not None and expect != (found := revision(tap)):
        raise BusyError(
            f'tap "{tap.name}" is at revision {found}, not {expect}: it has changed',
            hint="look again: qsteer status -j",
        )


def _refresh(tap: Tap) -> Plan | None:
    """Swap a program of another version of qsteer for this one's; None if there is none."""
    ident = tap.program.ident if tap.program else None
    if not ident or not ident.outdated or not ident.source:
        return None
    again = Source.SHARED_MAPS is ident.source
    return Plan(
        tap=tap,
        steps=(Refresh(source=ident.source, displaced=ident.displaced), *_lift_hold(tap)),
        result="refreshed",
        source=ident.source,
        engine=Engine.EBPF,
        program_id=None,
        notes=("QEMU holds the old program, and attaches that when the guest sets RSS again",) if again else (),
    )


def _nothing_to_refresh(tap: Tap) -> Plan:
    ours = tap.program and tap.program.kind is Kind.QSTEER
    note = "it is this version's program" if ours else "no program of qsteer's is attached"
    return replace(_unchanged(tap, None), steps=(), notes=(f"nothing to refresh: {note}",))


def _apply_auto(tap: Tap, wanted: Wanted, random_key: Callable[[int], bytes]) -> Plan:
    """The best source that works: maps that QEMU writes, what was read from the guest, what is attached, a spread."""
    attached, shared, qemus, steering = tap.program, tap.given, tap.loaded_by_qemu, tap.steering
    if attached and attached.kind is Kind.QEMU and wanted.source in (None, Source.QEMU_MAPS):
        _refuse_kernel(tap, wanted)
        return _over_qemus(tap, attached) if wanted.replace else _unchanged(tap, Source.QEMU_MAPS)
    _refuse_foreign(tap, wanted)
    if tap.reading and ((wanted.source and wanted.source.is_asked) or tap.reading.config or not tap.held):
        return _apply_reading(tap, wanted, tap.reading)
    if shared and wanted.source in (None, Source.SHARED_MAPS):
        return _apply_held(tap, wanted, shared, Source.SHARED_MAPS)
    if qemus and (wanted.source is Source.QEMU_MAPS or _over(tap, qemus)):
        return _apply_held(tap, wanted, qemus, Source.QEMU_MAPS)
    if wanted.source:
        raise _cannot_follow(tap, wanted.source)
    if steering and steering.kind is Kind.QSTEER and steering.works:
        undone = ("QEMU undoes it in software: see qsteer off, or --allow pause",) if tap.steered_in_software else ()
        if not steering.config or not steering.source or _is_by(tap, wanted, steering.source, steering.config):
            return replace(_unchanged(tap, steering.source), notes=undone)
        return _steer(tap, wanted, steering.source, steering.config, undone)
    if tap.nic and tap.nic.rss and not steering:
        if qemus:
            return _ready(tap, Source.QEMU_MAPS, "QEMU attaches its own program when the guest asks for RSS")
        _refuse_software(tap, wanted)
        why = _why_unread(tap, wanted)
        raise UnsupportedError(
            f'the guest behind tap "{tap.name}" is offered RSS, and its table cannot be read: {why}',
            hint="--source static steers by a table of yours",
        )
    return _apply_static(tap, wanted, random_key)


def _cannot_follow(tap: Tap, source: Source) -> UnsupportedError:
    if source is Source.SHARED_MAPS:
        return UnsupportedError(
            f'the QEMU behind tap "{tap.name}" has no program of qsteer\'s to write into: no {source}',
            hint="qsteer run starts a VM that has",
        )
    if source is Source.QEMU_MAPS:
        return UnsupportedError(
            f'the QEMU behind tap "{tap.name}" has loaded no program of its own: no {source}',
            hint="it takes a QEMU that may load BPF, with rss=on",
        )
    return UnsupportedError(f'the configuration of the guest behind tap "{tap.name}" was not read: no {source}')


def _refuse_kernel(tap: Tap, wanted: Wanted) -> None:
    """tun reads no maps."""
    if wanted.engine is Engine.KERNEL or wanted.report:
        what = "--engine kernel" if wanted.engine is Engine.KERNEL else "--hash-report"
        raise UnsupportedError(
            f'QEMU writes what the guest behind tap "{tap.name}" asks for into maps; tun reads none: no {what}',
            hint="--source device-state or static",
        )


def _is_by(tap: Tap, wanted: Wanted, source: Source, config: RssConfig) -> bool:
    """Whether the tap is steered so already, by an engine that will do."""
    steering = tap.steering
    if not steering or steering.kind is not Kind.QSTEER or not steering.works:
        return False
    if (steering.source, steering.config) != (source, config) or wanted.engine not in (None, steering.engine):
        return False
    return wanted.report in (None, _reports(tap)) or _choose(tap, wanted, config)[1] in (None, _reports(tap))


def _reports(tap: Tap) -> bool:
    """Whether the guest is told the hash by what steers."""
    return bool(tap.vnet_hash and tap.vnet_hash.report and not tap.program_id)


def _choose(tap: Tap, wanted: Wanted, config: RssConfig) -> tuple[Engine, bool | None, tuple[str, ...]]:
    """The engine, whether it is to report (None: as it does), and what to know of it.

    Raises as ``engines.choose``, and ConflictError where what somebody else has set would go.
    """
    if tap.vnet_hash and not tap.vnet_hash.source and not wanted.replace:
        if wanted.engine is Engine.KERNEL or (wanted.report and not wanted.lenient):
            raise ConflictError(
                f'tap "{tap.name}" has in-kernel hashing that somebody else has set', hint="--replace takes it off"
            )
        return Engine.EBPF, None, ()
    try:
        return engines.choose(tap, wanted.engine, config, report=bool(wanted.report)), wanted.report, ()
    except QsteerError as error:
        if not (wanted.report and wanted.lenient):
            raise
        return engines.choose(tap, wanted.engine, config, report=False), None, (f"not reported: {error}",)


def _steer(tap: Tap, wanted: Wanted, source: Source, config: RssConfig, notes: tuple[str, ...]) -> Plan:
    """Steer by a configuration that qsteer has, by whichever engine is right."""
    engine, report, told = _choose(tap, wanted, config)
    notes, displaced = (*told, *notes), _displaced_id(tap)
    if engine is Engine.KERNEL:
        report = _reports(tap) if report is None else report
        rss = VnetHash(rss=True, report=report, types=config.types, config=config, source=source, displaced=displaced)
        steps = _beside_rss(tap, (Detach(),) if tap.program_id else (), SetRss(rss=rss))
    else:
        steps = _without_rss(tap, Attach(config=config, source=source, displaced=displaced))
        if tap.hashing.denied and not tap.steering:
            notes = (*notes, f"by a program: {tap.hashing.why_not}")
    return Plan(
        tap=tap,
        steps=(*steps, *_lift_hold(tap)),
        result="replaced" if tap.steering else "attached",
        source=source,
        engine=engine,
        program_id=0 if engine is Engine.KERNEL else None,
        notes=(*_displaces(tap), *_gap(tap, steps), *notes),
    )


def _beside_rss(tap: Tap, detach: tuple[Step, ...], set_rss: SetRss) -> tuple[Step, ...]:
    """Where a program goes before RSS, that is set below it and takes over when the program goes: no packet falls
    between the two.  Where they refuse each other there is no such way.
    """
    exclusive = tap.hashing.generation is not None and tap.hashing.generation.exclusive
    return (*detach, set_rss) if exclusive else (set_rss, *detach)


def _without_rss(tap: Tap, attach: Step) -> tuple[Step, ...]:
    """Attach a program, and take RSS off that would wait below it, or is in its way; if that is known to work."""
    generation = tap.hashing.generation
    if not _clears(tap) or not generation:
        return (attach,)
    return (ClearRss(), attach) if generation.exclusive else (attach, ClearRss())


def _gap(tap: Tap, steps: tuple[Step, ...]) -> tuple[str, ...]:
    """Names the moment in which nothing steers."""
    if len(steps) < 2 or not isinstance(steps[0], Detach | ClearRss):
        return ()
    return ("this kernel refuses a program beside in-kernel RSS: automq chooses between the two",)


def _why_unread(tap: Tap, wanted: Wanted) -> str:
    pause = () if wanted.allow_pause else ("device-state takes --allow pause",)
    return "; ".join((*pause, *tap.unread)) or "no source"


def _over_qemus(tap: Tap, qemus: ProgramInfo) -> Plan:
    """qsteer's program in place of QEMU's own, over the very maps that QEMU writes."""
    return Plan(
        tap=tap,
        steps=(Refresh(source=Source.QEMU_MAPS, displaced=qemus.id), *_lift_hold(tap)),
        result="replaced",
        source=Source.QEMU_MAPS,
        engine=Engine.EBPF,
        program_id=None,
        notes=(*_displaces(tap), "QEMU attaches its own again when the guest sets RSS"),
    )


def _over(tap: Tap, held: Held) -> bool:
    """Whether what is attached works with the maps of a program that QEMU holds."""
    return bool(tap.program and tap.program.config_id == held.info.config_id)


def _apply_held(tap: Tap, wanted: Wanted, held: Held, source: Source) -> Plan:
    """Follow the guest through a program that QEMU holds, and into whose maps it writes."""
    _refuse_kernel(tap, wanted)
    if _over(tap, held):
        if not tap.body_present and (refreshed := _refresh(tap)):
            return replace(refreshed, result="mended")
        mend: tuple[Step, ...] = () if tap.body_present else (RefillBody(),)
        result = "mended" if mend else "unchanged"
        return replace(_unchanged(tap, source), steps=(*mend, *_lift_hold(tap)), result=result)
    # What QEMU took off itself holds the table of before a reset: that comes back only on request.
    taken_off_by_us = tap.hold or tap.steering
    if held.content and held.content.enabled and (taken_off_by_us or wanted.source):
        steps = _without_rss(tap, AttachHeld(program_id=held.info.id, fd=held.fd))
        return Plan(
            tap=tap,
            steps=(*steps, *_lift_hold(tap)),
            result="replaced" if tap.steering else "attached",
            source=source,
            engine=Engine.EBPF,
            program_id=held.info.id,
            notes=(*_displaces(tap), *_gap(tap, steps)),
        )
    return _ready(tap, source, "QEMU attaches the program when the guest asks for RSS")


def _ready(tap: Tap, source: Source, note: str) -> Plan:
    """QEMU will attach a program by itself, or the guest asks for nothing; until then nothing steers."""
    return Plan(
        tap=tap,
        steps=(*take_off(tap), *_lift_hold(tap)),
        result="ready",
        source=source,
        program_id=0,
        notes=(*_displaces(tap), note),
    )


def _apply_reading(tap: Tap, wanted: Wanted, reading: Reading) -> Plan:
    """Steer by what was read from the guest.  Where QEMU steers in software it has nothing left to move then."""
    paused = () if reading.paused_ms is None else (f"the VM stood still for {reading.paused_ms:.1f} ms",)
    if not reading.config:
        ready = _ready(tap, reading.source, "the guest has not asked for RSS")
        return replace(ready, notes=(*ready.notes, *paused))
    if _is_by(tap, wanted, reading.source, reading.config):
        return replace(_unchanged(tap, reading.source), notes=paused)
    guessed = () if reading.exact_types else ("the guest's hash types could not be read: Linux's default is taken",)
    notes = (*paused, *guessed, "not kept: the guest may set another table; see qsteer keep")
    return _steer(tap, wanted, reading.source, reading.config, notes)


def _displaced_id(tap: Tap) -> int:
    """QEMU's own program that is displaced, or was already by what steers now."""
    if tap.steering and tap.steering.displaced:
        return tap.steering.displaced
    return tap.program.id if tap.program and tap.program.kind is Kind.QEMU else 0


def _apply_static(tap: Tap, wanted: Wanted, random_key: Callable[[int], bytes]) -> Plan:
    _refuse_foreign(tap, wanted)
    _refuse_software(tap, wanted)
    # What is attached stays, but for what is given: the guest's own table in QEMU's program, too.
    current = tap.content.config if tap.content else tap.steering.config if tap.steering else None
    base = current or RssConfig(types=BASE_TYPES, key=random_key(KEY_BYTES), table=tuple(range(TABLE_MAX)))
    config = _merged(base, wanted.static)
    if _is_by(tap, wanted, Source.STATIC, config):
        return _unchanged(tap, Source.STATIC)

    notes: list[str] = []
    last = tap.attached - 1
    if wanted.static.table and (beyond := max(config.table)) > last:
        notes.append(f"the table names queue {beyond}, the tap has 0 to {last}: the kernel folds it (modulo)")
    if config.unclassified_queue > last:
        notes.append(f"unclassified queue {config.unclassified_queue}: the tap has 0 to {last}, the kernel folds it")
    if tap.given:
        notes.append(
            "the guest's own table is not followed now: --source shared-maps goes back to it, "
            "and so does QEMU when the guest sets RSS"
        )
    elif _displaced_id(tap) or tap.loaded_by_qemu:
        notes.append("QEMU holds a program of its own for this tap, and attaches it when the guest sets RSS")
    plan = _steer(tap, wanted, Source.STATIC, config, tuple(notes))
    if plan.engine is Engine.KERNEL:  # of which QEMU knows nothing
        return plan
    return replace(plan, notes=(*plan.notes, "not kept: QEMU may remove it on reset or migration; see qsteer keep"))


def plan_off(tap: Tap, *, replace_foreign: bool = False, expect: str | None = None) -> Plan:
    """Stop steering a tap, and hold it off.

    Raises ConflictError (what is attached is not qsteer's) and BusyError (it is not what was expected).
    """
    _refuse_unexpected(tap, expect)
    holding: tuple[Step, ...] = () if tap.hold else (PutHold(),)
    steering = tap.steering
    if not steering:
        result = "off" if holding else "unchanged"
        return Plan(tap=tap, steps=holding, result=result, source=None, program_id=0, notes=_may_come_back(tap))
    _refuse_foreign(tap, Wanted(replace=replace_foreign))
    notes = list(_displaces(tap))
    if steering.displaced:
        put_back = next((held for held in tap.held if held.info.id == steering.displaced), None)
        if put_back:
            return Plan(
                tap=tap,
                steps=(*holding, *_without_rss(tap, AttachHeld(program_id=put_back.info.id, fd=put_back.fd))),
                result="put back",
                source=Source.QEMU_MAPS,
                engine=Engine.EBPF,
                program_id=put_back.info.id,
                notes=(f"QEMU's own {describe(put_back.info)} steers again",),
            )
        notes.append(f"the program that it displaced ({steering.displaced}) is gone")
    return Plan(
        tap=tap,
        steps=(*holding, *take_off(tap)),
        result="off",
        source=None,
        program_id=0,
        notes=(*notes, *_may_come_back(tap)),
    )


def take_off(tap: Tap) -> tuple[Step, ...]:
    """Leave it to automq.  RSS first: what waits below a program must not take over."""
    rss: tuple[Step, ...] = (ClearRss(),) if _clears(tap) else ()
    return (*rss, Detach()) if tap.program_id else rss


def _clears(tap: Tap) -> bool:
    """Whether RSS is taken off: it steers, or is qsteer's.  What somebody else has set below a program stays."""
    rss = tap.vnet_hash
    return bool(rss and rss.rss and (rss.source or not tap.program_id))


def _may_come_back(tap: Tap) -> tuple[str, ...]:
    if not tap.held:
        return ()
    ids = ", ".join(str(held.info.id) for held in tap.held)
    return (f"QEMU holds program {ids} and may attach it again when the guest sets RSS",)


def _displaces(tap: Tap) -> tuple[str, ...]:
    """Names what is taken off, if it is not qsteer's."""
    program = describe(tap.program) if tap.program else f"program {tap.program_id}"
    ours = not tap.program_id or (tap.program and tap.program.kind is Kind.QSTEER)
    if _is_foreign_rss(tap.steering):
        return ("in place of in-kernel RSS that somebody else has set",)
    return () if ours else (f"in place of {program}",)


def _is_foreign_rss(steering: Steering | None) -> bool:
    return bool(steering and steering.engine is Engine.KERNEL and steering.kind is Kind.FOREIGN)


def _refuse_foreign(tap: Tap, wanted: Wanted) -> None:
    if wanted.replace:
        return
    if _is_foreign_rss(tap.steering):
        raise ConflictError(
            f'tap "{tap.name}" has in-kernel RSS that somebody else has set', hint="--replace takes it off"
        )
    if not tap.program_id:
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
    if wanted.force or not tap.steered_in_software:
        return
    raise UnsupportedError(
        f'the QEMU behind tap "{tap.name}" steers in software (rss=on, vhost=off, no program loaded): '
        "it undoes any other steering",
        hint="<emulator> qsteer-qemu gives it a program; keep steers by the guest's own table: see docs/libvirt.md"
        if tap.domain
        else "qsteer run starts it with a program; --allow pause, or a guest agent, steers by the guest's own table",
    )


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
    return Plan(
        tap=tap,
        steps=_lift_hold(tap),
        result="unchanged",
        source=source,
        engine=tap.steering.engine if tap.steering else None,
        program_id=tap.program_id,
    )


def _lift_hold(tap: Tap) -> tuple[Step, ...]:
    return (RemoveHold(),) if tap.hold else ()
