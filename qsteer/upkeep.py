# SPDX-License-Identifier: BSD-2-Clause
"""What ``keep`` remembers of a tap, and what it therefore wants of it now.  Pure.

Theory of operation
===================

``apply`` looks at a tap once.  ``keep`` sees it again and again, and knows three things more: what qsteer's program
held before it was taken off, what the guest was last seen to ask for, and whether the tap has been in the wanted state
before.  ``remember`` gathers them, ``decide`` puts them in front of ``plan_apply``, which does not tell them from what
it would have found by itself:

- At first sight a tap is given to ``plan_apply`` as ``apply`` gives it.  Only that ``auto`` leaves what qsteer has
  attached.
- From then on a program of qsteer's that works is right, whatever its static table: somebody applied it.
- Nothing attached: the static configuration of before comes back, key and all; or what the guest was last seen to ask
  for, until it has been asked again.  What QEMU writes into maps is QEMU's to attach: after a reset the maps hold the
  table of before it.
- QEMU's own program follows the guest.  ``auto`` leaves it, once the tap is kept even with --replace, or the two would
  take turns.
- A foreign program is ``plan_apply``'s to refuse, or to displace where that is wanted.
- Where something else is wanted than before (the configuration was read again, the NIC became known), the tap is as at
  first sight.
"""

from dataclasses import dataclass, replace

from qsteer.model import Engine, Kind, Nic, Reading, Source, Tap, VnetHash
from qsteer.plan import Attach, Plan, SetRss, Static, Wanted, readings_wanted
from qsteer.rss import RssConfig

_MAPS = frozenset({Source.SHARED_MAPS, Source.QEMU_MAPS})


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What was last looked at for what it holds is ``program_id``, or where that is 0 ``rss``.

    ``settled``: was as wanted before.  Either ``static`` or ``reading``, by ``engine``, is what comes back when it is
    taken off.  ``asked``: QEMU or the guest was asked, and ``unread`` says why in vain; ``nic`` is what QEMU told of a
    NIC that its command line does not have.
    """

    program_id: int = 0
    rss: VnetHash | None = None
    engine: Engine | None = None
    settled: bool = False
    static: RssConfig | None = None
    reading: Reading | None = None
    nic: Nic | None = None
    asked: bool = False
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What to give to ``plan_apply`` now, and what to ``readings.complete`` when it is time to; None is nothing."""

    plan: tuple[Tap, Wanted] | None = None
    ask: tuple[Tap, Wanted] | None = None


def remember(memory: Memory, tap: Tap, wanted: Wanted) -> Memory:
    """The memory after a look at what is attached."""
    steering = tap.steering
    if not steering or steering.kind in (None, Kind.FOREIGN):
        return memory
    seen = replace(memory, program_id=tap.program_id, rss=None if tap.program_id else tap.vnet_hash)
    if seen == memory:
        return memory
    seen = replace(seen, engine=steering.engine)
    source, config = steering.source, steering.config
    if source in _MAPS:
        # From here on the guest is followed, unless the operator's own table is what is wanted.
        return seen if wanted.source is Source.STATIC else replace(seen, static=None, reading=None)
    if not config:
        return memory
    if source and source.is_asked:
        return replace(seen, static=None, reading=Reading(source=source, config=config))
    return replace(seen, static=config, reading=None)


def answered(memory: Memory, tap: Tap) -> Memory:
    """The memory after ``readings.complete``; an answer in vain leaves what was read before."""
    unread = () if tap.reading else tap.unread
    reading = tap.reading or memory.reading
    return replace(memory, asked=True, nic=tap.nic, reading=reading, unread=unread)


def failed(memory: Memory, why: str) -> Memory:
    """The memory after ``readings.complete`` failed."""
    return replace(memory, asked=True, unread=(why,))


def done(memory: Memory, plan: Plan, program_id: int) -> Memory:
    """The memory after a plan was carried out, or had nothing to do: the tap is as wanted."""
    memory = replace(memory, settled=True)
    for step in plan.steps:
        match step:
            case Attach(config=config, source=source):
                memory = replace(memory, program_id=program_id, rss=None)
            case SetRss(rss=VnetHash(config=config, source=source) as rss):
                memory = replace(memory, program_id=program_id, rss=rss)
            case _:
                continue
        memory = replace(memory, engine=plan.engine, static=None)
        if source is Source.STATIC:
            memory = replace(memory, static=config, reading=None)
    return memory


def known(memory: Memory, tap: Tap) -> Tap:
    """The tap with its NIC as far as that was told: the command line may have none, or no MAC."""
    return tap if memory.nic is None or (tap.nic and tap.nic.mac) else replace(tap, nic=memory.nic)


def rewanted(memory: Memory) -> Memory:
    """The memory once something else is wanted than before: the tap is as at first sight, but for its NIC."""
    return Memory(nic=memory.nic)


def decide(memory: Memory, tap: Tap, wanted: Wanted) -> Decision:
    """What to do about a tap that nobody holds off."""
    steering = tap.steering
    tap = known(memory, tap)
    if wanted.identify and not memory.asked:
        return Decision(ask=(tap, wanted))
    if not steering or steering.kind in (None, Kind.FOREIGN):
        return _restore(memory, tap, wanted)
    if steering.kind is Kind.QEMU:
        leave = wanted.source in (None, Source.QEMU_MAPS) and memory.settled
        return _restore(memory, tap, replace(wanted, replace=wanted.replace and not leave))
    other_engine = wanted.engine not in (None, steering.engine)
    if not memory.settled and (wanted.source or other_engine or wanted.report):
        return _with_reading(memory, tap, wanted)
    wanted = _as_before(wanted, replace(memory, engine=steering.engine, rss=None))
    source = steering.source
    if source and source.is_asked:
        return _with_reading(memory, tap, _from(source, tap, wanted))
    if steering.works and not (wanted.report and source is Source.STATIC):
        return Decision()
    # What lost its body is loaded again with what it holds; what does not report may have come to be able to.
    again = Wanted(source=Source.STATIC if source is Source.STATIC else None, engine=Engine.EBPF, force=True)
    if steering.works:
        again = replace(again, engine=wanted.engine, report=True, lenient=True)
    return Decision(plan=(tap, again))


def _restore(memory: Memory, tap: Tap, wanted: Wanted) -> Decision:
    """No program of qsteer's is attached: what was there before, else what is wanted."""
    if memory.static:
        config = memory.static
        static = Static(
            types=config.types,
            key=config.key,
            table=config.table,
            unclassified_queue=config.unclassified_queue,
        )
        # It was there before, so somebody wanted it, be it against what QEMU does in software.
        before = _as_before(wanted, memory)
        again = replace(before, source=Source.STATIC, static=static, force=True, allow_pause=False, identify=False)
        return Decision(plan=(tap, again))
    if memory.reading:
        wanted = _as_before(wanted, memory)
        return _with_reading(memory, tap, _from(memory.reading.source, tap, wanted))
    if memory.settled and wanted.source in _MAPS:
        wanted = replace(wanted, source=None)
    return _with_reading(memory, tap, wanted)


def _as_before(wanted: Wanted, memory: Memory) -> Wanted:
    """By the engine that steered, if that was a program, which can do all; tun is what ``auto`` takes where it can."""
    engine = wanted.engine or (memory.engine if memory.engine is Engine.EBPF else None)
    report = memory.rss.report if wanted.report is None and memory.rss else wanted.report
    return replace(wanted, engine=engine, report=report, lenient=True)


def _from(source: Source | None, tap: Tap, wanted: Wanted) -> Wanted:
    """To follow the guest by a source that it was read from before, which need not be the one that is wanted."""
    if wanted.source is None and source in readings_wanted(tap, wanted):
        return wanted
    return replace(wanted, source=source, static=Static())


def _with_reading(memory: Memory, tap: Tap, wanted: Wanted) -> Decision:
    """By what the guest was last seen to ask for; a tap that wants to be asked first is not planned for before."""
    sources = readings_wanted(tap, wanted)
    may_ask = any(source is not Source.DEVICE_STATE or wanted.allow_pause for source in sources)
    unknown = tap.vm is not None and tap.nic is None and not memory.asked
    ask = (tap, wanted) if may_ask or unknown else None
    if memory.reading and wanted.source in (None, memory.reading.source):
        return Decision(plan=(replace(tap, reading=memory.reading), wanted), ask=ask)
    if ask and not memory.asked:
        return Decision(ask=ask)
    return Decision(plan=(replace(tap, unread=memory.unread), wanted), ask=ask)
