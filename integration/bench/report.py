# SPDX-License-Identifier: BSD-2-Clause
"""The figures as tables for people, and as JSON."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from integration.bench import shapes
from integration.bench.contenders import CAPBPF, FLOOR, LABELS, PERIODIC, QEMU, SHARED_MAPS, SPREAD, STATIC
from integration.bench.figures import Figure, Figures, path
from integration.bench.random_order import FLOOR_EACH
from integration.bench.targets import Verdict, judged
from integration.bench.throughput import FAMILIES

NONE = "-"
TAPS = (1, 10, 100, 300, 1000)
FAMILY_LABELS = {"v4": "IPv4", "v6": "IPv6"}
ROW_LABELS = {**LABELS, FLOOR_EACH: "return 0 for each tap"}

Row = Sequence[str]


def text(figures: Figures, machine: Mapping[str, str], notes: Sequence[str]) -> str:
    """All tables that there are figures for."""
    parts = [_machine(machine)]
    parts += [
        f"{title}\n{_table(rows)}"
        for title, rows in (
            ("BPF_PROG_TEST_RUN: ns over return 0 (times cheaper than QEMU's)", _testrun(figures)),
            ("Packets into a tap of 4 queues that nobody reads", _throughput(figures, "undrained")),
            ("Packets into a tap of 4 queues that are read by another processor", _throughput(figures, "drained")),
            ("Many taps in random order, nobody reads: share of one return 0 (ns over it)", _random_order(figures)),
            ("Set-up: what a tap takes, its program and maps", _setup(figures)),
            ("Set-up of so many taps: ms per tap", _growth(figures)),
            ("Targets", _targets(figures)),
        )
        if len(rows) > 1
    ]
    parts.append("\n".join(notes))
    return "\n\n".join(part for part in parts if part)


def write_json(figures: Figures, machine: Mapping[str, str], out: Path) -> None:
    """The figures as a flat object, and the machine in a file beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    flat = {name: asdict(_rounded(figure)) for name, figure in sorted(figures.items())}
    out.write_text(json.dumps(flat, indent=1) + "\n")
    out.with_name(f"{out.stem}-machine.json").write_text(json.dumps(dict(machine), indent=1) + "\n")


def _rounded(figure: Figure) -> Figure:
    return Figure(
        value=round(figure.value, 4), unit=figure.unit, spread=round(figure.spread, 4), comparator=figure.comparator
    )


def _machine(machine: Mapping[str, str]) -> str:
    lines = [f"{name:<12}{value}" for name, value in machine.items()]
    lines.append("Medians over the rounds; ± is the distance between the quartiles.")
    return "\n".join(lines)


def _testrun(figures: Figures) -> Sequence[Row]:
    names = (QEMU, CAPBPF, SHARED_MAPS, STATIC, PERIODIC)
    rows: list[Row] = [("packet", *(LABELS[name] for name in names))]
    for kind, label in shapes.KINDS.items():
        cells = []
        for name in names:
            section, whose = (f"capbpf.{kind}", STATIC) if name == CAPBPF else (f"testrun.{kind}", name)
            cost, ratio = (figures.get(path(section, whose, leaf)) for leaf in ("over_floor_ns", "ratio"))
            cells.append(_cell(cost, 1) + (f" ({ratio.value:.1f})" if ratio and name != QEMU else ""))
        rows.append((label, *cells))
    return _without_empty(rows)


def _throughput(figures: Figures, way: str) -> Sequence[Row]:
    titles = ("million/s", "of return 0", "of automq")
    rows: list[Row] = [
        ("program", *(f"{FAMILY_LABELS[family]} {title}" for family in FAMILIES for title in titles)),
    ]
    for name, label in LABELS.items():
        sections = (f"tap.{family}" if way == "undrained" else f"tap.{family}.{way}" for family in FAMILIES)
        found = (
            figures.get(path(section, name, leaf)) for section in sections for leaf in ("mpps", "of_floor", "of_automq")
        )
        rows.append((label, *(_cell(figure, 3) for figure in found)))
    return _without_empty(rows)


def _random_order(figures: Figures) -> Sequence[Row]:
    names = (FLOOR_EACH, QEMU, SHARED_MAPS, STATIC, PERIODIC, SPREAD)
    rows: list[Row] = [("taps", *(ROW_LABELS[name] for name in names))]
    for count, way, (family, label) in itertools.product(TAPS, ("", ".direct"), FAMILY_LABELS.items()):
        cells = []
        for name in names:
            section = f"taps{count}.{family}{way}"
            share, over = (figures.get(path(section, name, leaf)) for leaf in ("of_floor", "over_floor_ns"))
            cells.append(f"{_cell(share, 3)} ({over.value:+.0f})" if share and over else NONE)
        rows.append((f"{count}, {label}{', a system call each' if way else ''}", *cells))
    return _without_empty(rows)


def _setup(figures: Figures) -> Sequence[Row]:
    leaves = {
        "taps": ("taps", 0),
        "per_tap_ms": ("ms", 3),
        "with_tap_ms": ("ms, with the tap", 2),
        "per_tap_kib": ("KiB taken", 1),
        "accounted_kib": ("KiB accounted", 1),
        "verify_ms": ("ms of verification", 2),
        "load_ms": ("ms of the whole load", 2),
    }
    rows: list[Row] = [("program", *(title for title, _ in leaves.values()))]
    for name in (QEMU, CAPBPF, SHARED_MAPS, STATIC, FLOOR):
        found = [(figures.get(path("setup", name, leaf)), digits) for leaf, (_, digits) in leaves.items()]
        rows.append((LABELS[name], *(_cell(figure, digits) for figure, digits in found)))
    return _without_empty(rows)


def _growth(figures: Figures) -> Sequence[Row]:
    names = (QEMU, CAPBPF, SHARED_MAPS, STATIC)
    rows: list[Row] = [("taps", *(LABELS[name] for name in names))]
    for count in TAPS:
        found = [figures.get(path(f"setup.taps{count}", name, "per_tap_ms")) for name in names]
        rows.append((str(count), *(_cell(figure, 3) for figure in found)))
    return _without_empty(rows)


def _targets(figures: Figures) -> Sequence[Row]:
    rows: list[Row] = [("figure", "value", "target", "stretch", "")]
    for target, figure, verdict in judged(figures):
        sign = "<=" if target.at_most else ">="
        stretch = f"{sign} {target.stretch:g}" if target.stretch is not None else ""
        mark = verdict.value.upper() if verdict is Verdict.SHORT else verdict.value
        unit = "" if figure.unit == "ratio" else f" {figure.unit}"
        value = f"{_significant(figure.value)} ±{_significant(figure.spread)}{unit}"
        rows.append((target.figure, value, f"{sign} {target.target:g}", stretch, mark))
    return rows


def _cell(figure: Figure | None, digits: int) -> str:
    if not figure:
        return NONE
    spread = f" ±{figure.spread:.{digits}f}" if figure.spread else ""
    return f"{figure.value:.{digits}f}{spread}"


def _significant(value: float) -> str:
    return f"{value:.3g}"


def _without_empty(rows: Sequence[Row]) -> Sequence[Row]:
    """Without the rows, after the first, that say nothing."""
    return [rows[0], *(row for row in rows[1:] if any(cell != NONE for cell in row[1:]))]


def _table(rows: Sequence[Row]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(_line(row, widths) for row in rows)


def _line(row: Row, widths: Sequence[int]) -> str:
    def cells() -> Iterator[str]:
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            yield cell.ljust(width) if column == 0 else cell.rjust(width)

    return "  ".join(cells()).rstrip()
