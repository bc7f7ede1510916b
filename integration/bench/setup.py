# SPDX-License-Identifier: BSD-2-Clause
"""(d) and half of (e): what it takes to give taps a program, in time and in kernel memory.

Memory is told twice.  ``accounted`` is what the kernel says in /proc/self/fdinfo of the programs and their maps, each
map once however many programs share it; machine code is not in it.  ``taken`` is by how much slab, vmalloc and per-CPU
memory of the whole machine grow, with all that the programs need beside.
"""

import os
import re
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration.bench.contenders import Contender
from integration.bench.fleet import Fleet, fleet
from integration.bench.native import NativeError, checked, ffi, lib
from integration.bench.rounds import turns
from integration.bench.taps import QUEUES, Tap
from qsteer import kernel
from qsteer._shim import ffi as shim_ffi
from qsteer._shim import lib as shim
from qsteer.shim import OBJECTS

_STEP_S = 0.05
_STEADY = 4
_STEADY_KIB = 64
_SETTLE_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """Milliseconds, round by round: the verifier's part as the kernel tells it, and the whole of loading."""

    verify_ms: Sequence[float]
    load_ms: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SetUp:
    """Round by round: milliseconds per tap by (contender, number of taps); KiB per tap by contender, two ways.

    ``tap_ms`` is what a tap itself takes, without a program.
    """

    per_tap_ms: Mapping[tuple[str, int], Sequence[float]]
    accounted_kib: Mapping[str, Sequence[float]]
    taken_kib: Mapping[str, Sequence[float]]
    tap_ms: Sequence[float]


def body_objects() -> Mapping[str, bytes]:
    """What is verified once per host.  Raises NativeError if there is nothing."""
    found = {path.name: path.read_bytes() for path in OBJECTS.glob("tap_bod*.o")}
    if not found:
        raise NativeError(f"there are no shared bodies in {OBJECTS}")
    return found


def verification(elf: bytes, rounds: int) -> Verification:
    """Load the programs of an object, and drop them again.  Raises NativeError."""
    verify_ms, load_ms = [], []
    verified, loaded = ffi().new("uint64_t *"), ffi().new("uint64_t *")
    for _ in range(rounds):
        checked(lib().qb_verification(elf, len(elf), verified, loaded), "cannot load a program")
        verify_ms.append(verified[0] / 1e3)
        load_ms.append(loaded[0] / 1e6)
    return Verification(verify_ms=verify_ms, load_ms=load_ms)


def measure(contenders: Sequence[Contender], taps: Sequence[Tap], *, rounds: int, budget_s: float) -> SetUp:
    """Give 1, 10, 100, ... taps a program; as many as there are in each round, fewer ones more often.

    A contender that takes long is loaded for as many taps as ``budget_s`` allows in a round.
    """
    per_tap_ms: dict[tuple[str, int], list[float]] = {}
    accounted: dict[str, list[float]] = {}
    taken: dict[str, list[float]] = {}
    counts = {contender.name: _affordable(contender, taps, budget_s) for contender in contenders}
    for _, contender in turns(contenders, rounds):
        name, count = contender.name, counts[contender.name]
        for fewer in _powers_of_ten(count):
            for _ in range(_repetitions(fewer, count)):
                with fleet(contender, taps[:fewer]) as few:
                    per_tap_ms.setdefault((name, fewer), []).append(_mean_ms(few))
        _detach(taps[:count])
        before = _settled_kib()
        with fleet(contender, taps[:count]) as made:
            accounted.setdefault(name, []).append(_accounted_bytes(made.prog_fds) / 1024 / count)
            per_tap_ms.setdefault((name, count), []).append(_mean_ms(made))
        # Attached they stay, and no open file is counted.
        taken.setdefault(name, []).append((_settled_kib() - before) / count)
        _detach(taps[:count])
    return SetUp(per_tap_ms=per_tap_ms, accounted_kib=accounted, taken_kib=taken, tap_ms=_tap_ms(20))


def _detach(taps: Sequence[Tap]) -> None:
    for tap in taps:
        kernel.detach(tap.queues[0])


def _affordable(contender: Contender, taps: Sequence[Tap], budget_s: float) -> int:
    """How many taps to give a program, by what a second one takes: the first loads what a host has once."""
    with fleet(contender, taps[:2]) as first:
        return max(2, min(len(taps), int(budget_s / first.took_s[1])))


def _powers_of_ten(below: int) -> Sequence[int]:
    return [number for number in (1, 10, 100, 1000) if number < below]


def _repetitions(fewer: int, count: int) -> int:
    """A few taps are over soon: they are repeated, but take no longer than a tenth of what all take."""
    return max(1, min(10, count // fewer // 10))


def _mean_ms(made: Fleet) -> float:
    return statistics.mean(made.took_s) * 1000


def _tap_ms(count: int) -> Sequence[float]:
    took = []
    for _ in range(count):
        began = time.perf_counter()
        tap = kernel.open_tap("qsb-made", QUEUES)
        took.append((time.perf_counter() - began) * 1000)
        tap.close()
    return took


def _settled_kib() -> int:
    """The kernel's memory once it has freed what it is freeing: a program goes after some grace periods."""
    deadline = time.monotonic() + _SETTLE_S
    readings = [_kernel_kib()]
    while time.monotonic() < deadline:
        time.sleep(_STEP_S)
        readings.append(_kernel_kib())
        lately = readings[-_STEADY:]
        if len(lately) == _STEADY and max(lately) - min(lately) < _STEADY_KIB:
            break
    return readings[-1]


def _kernel_kib() -> int:
    """Slab, vmalloc and per-CPU memory of the whole machine."""
    fields = dict(
        re.findall(r"^(Slab|VmallocUsed|Percpu):\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    )
    return sum(map(int, fields.values()))


def _accounted_bytes(prog_fds: Sequence[int]) -> int:
    """What the kernel accounts for programs and their maps."""
    maps: set[int] = set()
    total = 0
    ids, count = shim_ffi.new(f"uint32_t[{shim.QS_PROGRAM_MAPS}]"), shim_ffi.new("uint32_t *")
    for fd in prog_fds:
        total += _memlock(fd)
        checked(shim.qs_program_maps(fd, ids, count), "cannot look at a program's maps")
        maps.update(ids[0 : count[0]])
    for number in maps:
        out = shim_ffi.new("int *")
        checked(shim.qs_map_fd(number, out), "cannot open a map")
        total += _memlock(out[0])
        os.close(out[0])
    return total


def _memlock(fd: int) -> int:
    found = re.search(r"^memlock:\s+(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.MULTILINE)
    assert found, "the kernel accounts for every BPF object"
    return int(found[1])
