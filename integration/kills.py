# SPDX-License-Identifier: BSD-2-Clause
"""kill -9 of qsteer at random moments: what is left behind, and whether the next command works.

    python -m integration.kills --times 200

Takes root.  Works on a tap and with pins and holds of its own; a stand-in holds the tap in a QEMU's place.

One kill in three comes at a moment of the whole time that the command takes.  Most of that is Python's start; so one
comes at a moment of the time for which it has the lock, and one right after the first change that can be seen.
"""

import argparse
import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from qsteer import clean, execute, holds, inventory, kernel, procs, programs, tapfiles
from qsteer.errors import QsteerError
from qsteer.model import Source, Tap
from qsteer.render import columns
from qsteer.rss import BASE_TYPES, RssConfig, format_hash_types, format_key
from tests.kernel import private, standin, support

TAP = "qsun-kill"
OLD = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(0, 1, 2, 3, 3, 2, 1, 0), unclassified_queue=1)
NEW = RssConfig(types=BASE_TYPES, key=bytes(range(90, 130)), table=(3, 3, 1, 2), unclassified_queue=2)
GIVEN = (
    *("--types", ",".join(format_hash_types(NEW.types)), "--key", format_key(NEW.key)),
    *("--table", ",".join(map(str, NEW.table)), "--unclassified-queue", str(NEW.unclassified_queue)),
)
KEEP_S = 1.5
"""How long a ``keep`` lives at most, which would never end."""
DISTURB_S = 0.1
"""How often its tap loses the program meanwhile."""
FREED_S = 5.0
CHANGES_S = 0.004
"""Longer than it takes from the first change to the last."""
TICK_S = 0.0005


class Bench:
    """The tap, and how to bring it into any state."""

    def __init__(self, vm: standin.Vm) -> None:
        self.vm = vm

    def tap(self) -> Tap:
        return next(tap for tap in inventory.fetch().taps if tap.name == TAP)

    def changing(self) -> object:
        """All that a command changes, as far as it is quickly seen."""
        names = {
            name
            for folder in (private.RUNTIME, private.PINS)
            for _, inside, files in os.walk(folder)  # which minds nothing that vanishes
            for name in (*inside, *files)
        }
        return kernel.queue_of(self.vm.tap.open.fds[0]).attachment, names - {"lock"}

    def nothing(self) -> None:
        """No program, no hold, no pin."""
        kernel.detach(self.vm.tap.open.fds[0])
        support.wait_until("the programs' end", lambda: not support.programs_of(TAP), FREED_S)
        private.forget_holds()
        with execute.lock(FREED_S):
            clean.execute(clean.plan(clean.fetch()))
        assert not private.files() and not private.pins()

    def steered(self) -> None:
        self.nothing()
        program = programs.load_program(tap=TAP, source=Source.STATIC, config=OLD)
        self.vm.tap.attach(program)
        program.close()

    def steered_by_another_version(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(programs, "__version__", "0.0.1")
            self.steered()

    def held_off(self) -> None:
        self.nothing()
        self._hold(self.vm.pid)

    def steered_over_leftovers(self) -> None:
        """Bodies of other versions, the hold of a process that is gone."""
        self.steered()
        for name in ("v7/bodies-one", "v7/bodies-two", "v8/bodies-three"):
            private.pin(name)
        tap = self.tap()
        gone = holds.Hold(tap="gone", pid=1 << 22, started=1)
        holds.put(gone, netns=tap.netns, ifindex=tap.ifindex + 1)

    def _hold(self, pid: int) -> None:
        tap, process = self.tap(), procs.read(pid)
        assert process
        holds.put(holds.Hold(tap=TAP, pid=pid, started=process.started), netns=tap.netns, ifindex=tap.ifindex)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A command to kill: from which state it starts, and the configuration before and after, None for no program.

    ``again`` is the command that has to work afterwards, the same by default.
    """

    name: str
    arguments: tuple[str, ...]
    prepare: Callable[[Bench], None]
    before: RssConfig | None
    after: RssConfig | None
    again: tuple[str, ...] | None = None
    daemon: bool = False
    holds: bool = False


SELECT = ("--dev", TAP)
JOBS = (
    Job(
        name="apply, first of all",
        arguments=("apply", *SELECT, *GIVEN),
        prepare=Bench.nothing,
        before=None,
        after=NEW,
    ),
    Job(
        name="apply, on hold",
        arguments=("apply", *SELECT, *GIVEN),
        prepare=Bench.held_off,
        before=None,
        after=NEW,
    ),
    Job(
        name="apply, another table",
        arguments=("apply", *SELECT, *GIVEN),
        prepare=Bench.steered,
        before=OLD,
        after=NEW,
    ),
    Job(
        name="apply --refresh",
        arguments=("apply", *SELECT, "--refresh"),
        prepare=Bench.steered_by_another_version,
        before=OLD,
        after=OLD,
    ),
    Job(
        name="off",
        arguments=("off", *SELECT),
        prepare=Bench.steered,
        before=OLD,
        after=None,
        holds=True,
    ),
    Job(
        name="clean",
        arguments=("clean",),
        prepare=Bench.steered_over_leftovers,
        before=OLD,
        after=OLD,
    ),
    Job(
        name="keep",
        arguments=("keep", *SELECT, *GIVEN),
        prepare=Bench.nothing,
        before=None,
        after=NEW,
        again=("apply", *SELECT, *GIVEN),
        daemon=True,
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """When to kill: so many seconds after the start; then after it took the lock, or after it changed something."""

    after_s: float = 0.0
    locked_s: float | None = None
    changed_s: float | None = None

    def __str__(self) -> str:
        text = f"after {self.after_s * 1000:.0f} ms"
        if self.locked_s is not None:
            text += f", {self.locked_s * 1000:.1f} ms after it took the lock"
        if self.changed_s is not None:
            text += f", {self.changed_s * 1000:.1f} ms after it changed something"
        return text


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One kill.  ``found`` is what steered the tap then: old, new, none; ``wrong`` says what was not as it must be."""

    job: str
    moment: Moment
    in_time: bool
    found: str
    half_written: int
    on_hold: bool
    leftovers: int
    wrong: tuple[str, ...]


def rounds(times: int, seed: int, jobs: Sequence[Job] = JOBS) -> Iterator[Round]:
    """Kill so many times, the jobs in turn, each at a random moment of the time that it takes."""
    dice = random.Random(seed)
    with private.memory(), support.network_namespace(), standin.vm(TAP) as vm:
        bench = Bench(vm)
        durations = {job.name: _durations(bench, job) for job in jobs}
        for number in range(times):
            job = jobs[number % len(jobs)]
            whole_s, locked_s = durations[job.name]
            yield _round(bench, job, _moment(dice, number // len(jobs) % 3, job, whole_s, locked_s))
        bench.nothing()


def _moment(dice: random.Random, kind: int, job: Job, whole_s: float, locked_s: float) -> Moment:
    after_s = dice.uniform(0, whole_s)
    if kind == 0:
        return Moment(after_s=after_s)
    if not job.daemon:
        after_s = 0.0
    if kind == 1:
        return Moment(after_s=after_s, locked_s=dice.uniform(0, locked_s))
    return Moment(after_s=after_s, changed_s=dice.uniform(0, CHANGES_S))


def _start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qsteer", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def _durations(bench: Bench, job: Job) -> tuple[float, float]:
    """Seconds that a command takes that is not killed, and for which it has the lock; it has to do what it is for."""
    whole, locked = [], []
    for _ in range(2):
        job.prepare(bench)
        started = time.monotonic()
        process = _start(*job.arguments)
        _wait_for_lock(process, started + KEEP_S)
        taken = time.monotonic()
        while time.monotonic() < started + KEEP_S and _has_lock(process):
            time.sleep(TICK_S)
        locked.append(time.monotonic() - taken)
        if job.daemon:
            process.kill()
        said = process.communicate()[1]
        whole.append(KEEP_S if job.daemon else time.monotonic() - started)
        assert not _not_reached(bench, job), f"{job.name}: {said}"
    return statistics.mean(whole), statistics.mean(locked)


def _wait_for_lock(process: subprocess.Popen[str], deadline: float) -> None:
    while time.monotonic() < deadline and process.poll() is None and not _has_lock(process):
        time.sleep(TICK_S)


def _has_lock(process: subprocess.Popen[str]) -> bool:
    """Whether a process has locked a file (proc(5): /proc/locks)."""
    return f" {process.pid} " in Path("/proc/locks").read_text()


def _round(bench: Bench, job: Job, moment: Moment) -> Round:
    job.prepare(bench)
    process = _start(*job.arguments)
    _let_run(bench, process, moment, disturb=job.daemon)
    in_time = process.poll() is None
    process.kill()
    said = process.communicate()[1]
    wrong: list[str] = []
    if "Traceback" in said:
        wrong.append(_last_line(said))
    tap = bench.tap()
    found = _found(bench, job, tap, wrong)
    half_written = sum(name.endswith(tapfiles.NEW) for name in private.files())
    on_hold = bool(holds.find(netns=tap.netns, ifindex=tap.ifindex))
    if on_hold and not tap.hold:
        wrong.append("the hold is not of the process that holds the tap")
    _check_lock(wrong)
    _check_programs(tap, wrong)
    leftovers = len(clean.plan(clean.fetch()).remove)
    _check_next(bench, job, wrong)
    _check_clean(bench, wrong)
    return Round(
        job=job.name,
        moment=moment,
        in_time=in_time,
        found=found,
        half_written=half_written,
        on_hold=on_hold,
        leftovers=leftovers,
        wrong=tuple(wrong),
    )


def _let_run(bench: Bench, process: subprocess.Popen[str], moment: Moment, *, disturb: bool) -> None:
    """Wait for the moment, or its end; a daemon gets something to do meanwhile."""
    deadline = time.monotonic() + moment.after_s
    while (left := deadline - time.monotonic()) > 0:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left, DISTURB_S) if disturb else left)
            return
        if disturb:
            kernel.detach(bench.vm.tap.open.fds[0])
    deadline = time.monotonic() + KEEP_S
    if moment.locked_s is not None:
        _wait_for_lock(process, deadline)
        time.sleep(moment.locked_s)
    if moment.changed_s is not None:
        before = bench.changing()
        while time.monotonic() < deadline and process.poll() is None and bench.changing() == before:
            time.sleep(TICK_S)
        time.sleep(moment.changed_s)


def _found(bench: Bench, job: Job, tap: Tap, wrong: list[str]) -> str:
    """Which configuration steers; that it does so rightly is tried with packets."""
    if not tap.program_id:
        if job.before and job.after:
            wrong.append("unsteered")
        return "none"
    config = tap.content.config if tap.content and tap.content.enabled else None
    if not config or config not in (job.before, job.after):
        wrong.append(f"steered by a configuration that nobody gave: {_brief(config)}")
        return "?"
    if not tap.body_present:
        wrong.append("the shared body is gone")
    wrong.extend(_misdirected(bench, config))
    changed = job.before != job.after and config == job.after
    swapped = bool(tap.program and tap.program.ident and not tap.program.ident.outdated)
    return "new" if changed or (job.before == job.after and swapped and "--refresh" in job.arguments) else "old"


def _misdirected(bench: Bench, config: RssConfig) -> tuple[str, ...]:
    try:
        bench.vm.check_packets(config)
    except AssertionError as error:
        return (f"a packet went elsewhere: {error}",)
    return ()


def _check_lock(wrong: list[str]) -> None:
    try:
        with execute.lock(0):
            pass
    except QsteerError as error:
        wrong.append(f"the lock is not free: {error}")


def _check_programs(tap: Tap, wrong: list[str]) -> None:
    """What was loaded and not attached goes with the process, as fast as the kernel frees it."""
    deadline = time.monotonic() + FREED_S
    attached = {tap.program_id} - {0}
    while (loaded := support.programs_of(TAP)) != attached:
        if time.monotonic() >= deadline:
            wrong.append(f"programs {loaded - attached} stay loaded")
            return
        time.sleep(0.02)


def _check_next(bench: Bench, job: Job, wrong: list[str]) -> None:
    """The next command does what the killed one was to do, and leaves nothing half written."""
    process = _start(*(job.again or job.arguments))
    said = process.communicate()[1]
    if process.returncode or said:
        wrong.append(f"the next command ends with {process.returncode}: {_last_line(said)}")
    wrong.extend(_not_reached(bench, job))
    if any(name.endswith(tapfiles.NEW) for name in private.files()):
        wrong.append("half-written files stay after the next command")


def _not_reached(bench: Bench, job: Job) -> tuple[str, ...]:
    """What is not as the job leaves it when it is not killed."""
    tap = bench.tap()
    config = tap.content.config if tap.content and tap.content.enabled else None
    if config != job.after:
        return (f"{job.name}: the tap has {_brief(config)}",)
    outdated = bool(tap.program and tap.program.ident and tap.program.ident.outdated)
    if tap.hold != job.holds or outdated or not tap.body_present:
        return (f"{job.name}: hold {tap.hold}, outdated {outdated}, body {tap.body_present}",)
    return _misdirected(bench, config) if config else ()


def _check_clean(bench: Bench, wrong: list[str]) -> None:
    """Nothing but what is in use is left, then; what was detached a moment ago is so no longer."""
    _check_programs(bench.tap(), wrong)
    with execute.lock(FREED_S):
        clean.execute(clean.plan(clean.fetch()))
    tap = bench.tap()
    expected = 1 if tap.program and tap.program.bodies_id else 0
    if len(private.pins()) != expected:
        wrong.append(f"pins stay after clean: {private.pins()}")
    if len(private.files()) != tap.hold:
        wrong.append(f"files stay after clean: {sorted(private.files())}")


def _brief(config: RssConfig | None) -> str:
    return f"key {config.key[:4].hex()}..., table of {len(config.table)}" if config else "no configuration"


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def table(done: Sequence[Round]) -> str:
    """One line per job, and what was wrong."""
    head = ("JOB", "KILLS", "IN TIME", "OLD", "NEW", "NONE", "ON HOLD", "HALF WRITTEN", "FOR CLEAN", "WRONG")
    rows: list[tuple[str, ...]] = [head]
    for name in dict.fromkeys(one.job for one in done):
        rows.append(_row(name, [one for one in done if one.job == name]))
    rows.append(_row("all", done))
    wrong = [f"{one.job}, killed {one.moment}: {what}" for one in done for what in one.wrong]
    return "\n".join((columns(rows), *wrong))


def _row(name: str, done: Sequence[Round]) -> tuple[str, ...]:
    counts = (
        len(done),
        sum(one.in_time for one in done),
        *(sum(one.found == found for one in done) for found in ("old", "new", "none")),
        sum(one.on_hold for one in done),
        sum(one.half_written for one in done),
        sum(one.leftovers for one in done),
        sum(bool(one.wrong) for one in done),
    )
    return (name, *map(str, counts))


def main() -> int:
    """Print the table; exit code 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=200, help="how many kills (200)")
    parser.add_argument("--seed", type=int, default=None, help="for the same moments again")
    given = parser.parse_args()
    seed = random.randrange(1 << 32) if given.seed is None else given.seed
    started = time.monotonic()
    done = []
    for one in rounds(given.times, seed):
        done.append(one)
        if sys.stderr.isatty():
            print(f"\r{len(done)} of {given.times}", end="" if len(done) < given.times else "\n", file=sys.stderr)
    print(table(done))
    print(f"{len(done)} kills in {time.monotonic() - started:.0f} s, seed {seed}")
    return 1 if any(one.wrong for one in done) else 0


if __name__ == "__main__":
    sys.exit(main())
