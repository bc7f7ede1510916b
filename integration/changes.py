# SPDX-License-Identifier: BSD-2-Clause
"""Changes of key and table under traffic: which packets are on a queue that neither the old nor the new one gives?

    python -m integration.changes [--changes 10000] [--commands 50] [--build BUILD] [--sabotage detach|mixed]
    python -m integration.changes --guest [--changes 100]
    python -m integration.changes --engines [--changes 1000]

Takes root.  The first changes a static configuration on a tap of 16 queues: a new program, attached over the old one,
as ``qsteer apply`` does it; then some by ``qsteer apply`` itself.  The second is about a guest that changes its own
(windows.py).  The third is for a kernel whose tun hashes by itself: the engine changes each time, by the plan that
``qsteer apply`` makes, and the configuration every other time.  How packets are judged is said in numbered.py.
"""

import argparse
import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from integration import windows
from integration.apt import ProvisionError
from integration.guest import GuestError, ordinary_user
from integration.numbered import Mapping, Traffic, TrafficError, Verdict, judge, off_the_senders_cpu, queues_of
from integration.provision import provision, readable_by
from qsteer import execute, kernel, programs
from qsteer.attached import tap_of
from qsteer.errors import BusyError, QsteerError
from qsteer.model import Build, Engine, Source
from qsteer.plan import Static, Wanted, plan_apply
from qsteer.render import columns
from qsteer.rss import BASE_TYPES, KEY_BYTES, HashType, RssConfig, format_hash_types, format_key
from tests.kernel import support

QUEUES = 16
TAP = "qschg0"
PAUSE_S = 0.002
"""How often packets are collected while a command runs."""
FREED_S = 10.0
SABOTAGES = ("detach", "mixed")
"""``detach``: the old program is taken off before the new one is attached.  ``mixed``: a program with the new key and
another table is attached in between.
"""
SABOTAGED = 10
"""Every how many changes."""

OVER_IP4 = (BASE_TYPES, HashType.TCP4, HashType.IP4 | HashType.IP6, HashType.UDP4 | HashType.TCP6)
"""Such that every generation of in-kernel RSS can do them."""
_MAC = bytes.fromhex("525400005101")


def random_config(rng: random.Random, types: Sequence[HashType] = ()) -> RssConfig:
    """Any key; any table, periodic ones among them; mostly all hash types, or one of ``types``."""
    length = 1 << rng.randrange(8)
    period = rng.choice([part for part in (1, 2, 4, 16, 128) if part <= length])
    table = [rng.randrange(QUEUES) for _ in range(period)] * (length // period)
    any_types = (BASE_TYPES, BASE_TYPES, HashType(rng.randrange(1, sum(HashType) + 1)))
    chosen = rng.choice(types or any_types)
    return RssConfig(
        types=chosen, key=rng.randbytes(KEY_BYTES), table=tuple(table), unclassified_queue=rng.randrange(QUEUES)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A row of the result: how many changes, in which time, and what came of the packets.

    ``left`` are the programs that were still loaded when the tap had gone.
    """

    name: str
    changes: int
    took_s: float
    verdict: Verdict
    left: int

    @property
    def holds(self) -> bool:
        verdict = self.verdict
        return not verdict.outside and not verdict.lost and not self.left and verdict.least > 0


class Changed:
    """A tap of ours, its traffic, and when each mapping was attached."""

    def __init__(self, tap: support.TapUnderTest, flow: Traffic) -> None:
        self.tap, self.traffic = tap, flow
        self._attached: list[tuple[int, int, tuple[int, ...]]] = []

    @contextlib.contextmanager
    def attaching(self, queues: tuple[int, ...]) -> Iterator[None]:
        """What attaches the configuration that gives these queues runs in it."""
        began = time.monotonic_ns()
        yield
        self._attached.append((began, time.monotonic_ns(), queues))

    def check(self, program: programs.Program) -> None:
        """Raise BusyError unless this is what is attached, by the kernel's word."""
        found = kernel.queue_of(self.tap.open.fds[0]).program_id
        if found != program.id:
            raise BusyError(f"program {found} is attached, not {program.id}")

    def mappings(self) -> tuple[Mapping, ...]:
        ends = [ended for _, ended, _ in self._attached[1:]]
        return tuple(
            Mapping(since_ns=began, until_ns=until, queues=queues)
            for (began, _, queues), until in zip(self._attached, [*ends, time.monotonic_ns()], strict=True)
        )


def _load(config: RssConfig, build: Build | None) -> programs.Program:
    return programs.load_program(tap=TAP, source=Source.STATIC, config=config, build=build)


def change_directly(changes: int, seed: int, *, build: Build | None = None, sabotage: str = "") -> Outcome:
    """Load and attach, again and again, as ``execute`` does it.  Raises QsteerError, TrafficError."""
    rng = random.Random(seed)

    def change(changed: Changed, number: int) -> None:
        config = random_config(rng)
        queues = queues_of(config, _MAC, QUEUES)
        with contextlib.closing(_load(config, build)) as program:
            changed.traffic.collect()
            changed.traffic.wait_for_packet()
            if number % SABOTAGED == SABOTAGED - 1:
                _sabotage(changed, sabotage, config, rng)
            with changed.attaching(queues):
                changed.tap.attach(program)
            changed.check(program)

    return _under_traffic(f"{build or 'default'} build", changes, change)


def _sabotage(changed: Changed, how: str, config: RssConfig, rng: random.Random) -> None:
    """What ought to be found."""
    if how == "detach":
        kernel.detach(changed.tap.open.fds[0])
    elif how == "mixed":
        table = tuple(rng.randrange(QUEUES) for _ in range(128))
        mixed = RssConfig(types=BASE_TYPES, key=config.key, table=table)
        with contextlib.closing(_load(mixed, None)) as program:
            changed.tap.attach(program)
    for _ in range(2 if how else 0):  # the first packet may be one from before
        changed.traffic.collect()
        changed.traffic.wait_for_packet()


def change_by_command(changes: int, seed: int) -> Outcome:
    """``qsteer apply``, again and again.  Raises QsteerError, TrafficError."""
    rng = random.Random(seed)

    def change(changed: Changed, _: int) -> None:
        config = random_config(rng)
        with changed.traffic.flowing(PAUSE_S), changed.attaching(queues_of(config, _MAC, QUEUES)):
            done = support.qsteer("apply", "--dev", TAP, "--pid", str(os.getpid()), *_given(config))
        if done.returncode:
            raise BusyError(f"qsteer apply: {' / '.join(done.stderr.splitlines())}")

    return _under_traffic("qsteer apply", changes, change)


def change_engines(changes: int, seed: int) -> Outcome:
    """From a program to in-kernel RSS and back.  Raises QsteerError, TrafficError."""
    rng = random.Random(seed)
    engines = itertools.cycle((Engine.KERNEL, Engine.EBPF))
    config = random_config(rng, OVER_IP4)

    def change(changed: Changed, number: int) -> None:
        nonlocal config
        if number % 2 == 0:
            config = random_config(rng, OVER_IP4)
        engine = next(engines)
        changed.traffic.collect()
        changed.traffic.wait_for_packet()
        tap = tap_of(kernel.queue_of(changed.tap.open.fds[0]))
        plan = plan_apply(tap, Wanted(source=Source.STATIC, engine=engine, static=static_of(config)))
        with changed.traffic.flowing(PAUSE_S), changed.attaching(queues_of(config, _MAC, QUEUES)):
            execute.execute(plan)

    return _under_traffic("another engine", changes, change)


def static_of(config: RssConfig) -> Static:
    """What asks for all of a configuration."""
    return Static(types=config.types, key=config.key, table=config.table, unclassified_queue=config.unclassified_queue)


def _given(config: RssConfig) -> tuple[str, ...]:
    return (
        *("--types", ",".join(format_hash_types(config.types)), "--key", format_key(config.key)),
        *("--table", ",".join(map(str, config.table)), "--unclassified-queue", str(config.unclassified_queue)),
    )


def _under_traffic(name: str, changes: int, change: Callable[[Changed, int], None]) -> Outcome:
    """Make changes, and judge the packets that were sent meanwhile."""
    with support.network_namespace(), support.tap(TAP, QUEUES) as tap:
        changed = Changed(tap, Traffic(TAP, _MAC, tap.open.fds))
        first = random_config(random.Random(0))
        with contextlib.closing(_load(first, None)) as program, changed.attaching(queues_of(first, _MAC, QUEUES)):
            changed.tap.attach(program)
        with changed.traffic, off_the_senders_cpu():
            changed.traffic.wait_for_packet()
            began = time.monotonic()
            for number in range(changes):
                change(changed, number)
            changed.traffic.collect()
            changed.traffic.wait_for_packet()
            took = time.monotonic() - began
            log = changed.traffic.finish()
        if not support.programs_of(TAP):
            raise BusyError("the program that is attached is not found, so none that stays behind would be")
    return Outcome(
        name=name, changes=changes, took_s=took, verdict=judge(log, changed.mappings()), left=_programs_left()
    )


def _programs_left() -> int:
    """How many programs of the tap outlive it, when the kernel has had time to free them."""
    deadline = time.monotonic() + FREED_S
    while (left := len(support.programs_of(TAP))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per way of changing."""
    head = ("CHANGED BY", "CHANGES", "PER S", "PACKETS", "PER CHANGE", "ONE MAPPING", "OLD", "NEW", "EITHER")
    rows: list[tuple[str, ...]] = [(*head, "OUTSIDE", "LOST", "PROGRAMS LEFT")]
    for outcome in outcomes:
        verdict = outcome.verdict
        counts = (verdict.alone, verdict.old, verdict.new, verdict.either, len(verdict.outside), verdict.lost)
        rows.append(
            (
                *(outcome.name, f"{outcome.changes:,}", f"{outcome.changes / outcome.took_s:.0f}"),
                *(f"{verdict.packets:,}", f"{verdict.median:.0f} (at least {verdict.least})"),
                *(f"{count:,}" for count in counts),
                str(outcome.left),
            )
        )
    return columns(rows)


def main() -> int:
    """Print what was found; exit code 1 if anything was outside, lost or left."""
    parser = argparse.ArgumentParser(prog="python -m integration.changes", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--changes", type=int, default=None, help="how many changes (10000; 100 with --guest)")
    parser.add_argument("--commands", type=int, default=50, help="how many by the command line (50)")
    parser.add_argument("--build", choices=tuple(Build), type=Build, help="default: the one that qsteer chooses")
    parser.add_argument("--sabotage", choices=SABOTAGES, default="", help="do it wrongly: has to be found")
    parser.add_argument("--engines", action="store_true", help="another engine each time (1000)")
    parser.add_argument("--guest", action="store_true", help="a guest changes what it wants, through QEMU")
    parser.add_argument("--seed", type=int, default=1, help="for other configurations")
    given = parser.parse_args()
    if os.geteuid() != 0:
        print("changes: only root may make taps and load BPF programs; try sudo", file=sys.stderr)
        return 1
    try:
        return _guest(given.changes or 100, given.seed) if given.guest else _static(given)
    except (GuestError, ProvisionError, QsteerError, TrafficError, subprocess.TimeoutExpired) as error:
        hint = f" ({error.hint})" if isinstance(error, QsteerError) and error.hint else ""
        print(f"changes: {error}{hint}", file=sys.stderr)
        return 1


def _static(given: argparse.Namespace) -> int:
    outcomes = []
    if given.engines:
        outcomes.append(change_engines(given.changes or 1000, given.seed))
        print(table(outcomes))
        return 0 if outcomes[0].holds else 1
    if given.changes != 0:
        changes = given.changes or 10_000
        outcomes.append(change_directly(changes, given.seed, build=given.build, sabotage=given.sabotage))
    if given.commands:
        outcomes.append(change_by_command(given.commands, given.seed))
    print(table(outcomes))
    return 0 if all(outcome.holds for outcome in outcomes) else 1


def _guest(changes: int, seed: int) -> int:
    user = ordinary_user()
    with readable_by(user, provision()) as files:
        found = windows.change_in_a_guest(files, user, changes, seed)
    print(windows.text(found))
    return 1 if found.stray else 0


if __name__ == "__main__":
    sys.exit(main())
