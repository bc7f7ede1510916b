# SPDX-License-Identifier: BSD-2-Clause
"""The figures as one SVG picture, drawn on a card of its own colour: a README may be white or dark."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from integration.bench import shapes
from integration.bench.contenders import AUTOMQ, CAPBPF, LABELS, PERIODIC, QEMU, SHARED_MAPS, STATIC
from integration.bench.figures import Figures, path
from integration.bench.random_order import FLOOR_EACH

WIDTH, HEIGHT = 1000, 760
COLOURS: Mapping[str, str] = {
    QEMU: "#d55e00",
    AUTOMQ: "#767676",
    FLOOR_EACH: "#a0a0a0",
    CAPBPF: "#cc79a7",
    SHARED_MAPS: "#009e73",
    STATIC: "#0072b2",
    PERIODIC: "#56b4e9",
}
"""They differ for the colour-blind, too."""
_LEGEND = {**LABELS, AUTOMQ: "no program (automq)", FLOOR_EACH: "return 0 for each tap"}
_INK, _FAINT, _CARD = "#1f2328", "#d8dee4", "#ffffff"
_COUNTS = (1, 10, 100, 300, 1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """Where a panel draws, without its labels: pixels, the origin at the top left."""

    left: float
    top: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.left + self.width

    @property
    def bottom(self) -> float:
        return self.top + self.height


def svg(figures: Figures, machine: Mapping[str, str]) -> str:
    """The whole picture; figures that are missing leave a gap."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="12" role="img">',
        "<!-- SPDX-License-Identifier: BSD-2-Clause -->",
        "<title>What qsteer costs</title>",
        f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8" fill="{_CARD}" stroke="{_FAINT}"/>',
        *_legend(20, 24),
        *_packet_costs(figures, Box(left=150, top=92, width=300, height=592)),
        *_shares(figures, Box(left=600, top=92, width=370, height=150)),
        *_lines(
            figures,
            Box(left=600, top=322, width=370, height=140),
            title="Steering in random order over many taps, IPv4: ns over one return 0",
            leaf=lambda count, name: path(f"taps{count}.v4", name, "over_floor_ns"),
            names=(QEMU, FLOOR_EACH, SHARED_MAPS, STATIC),
            logarithmic=False,
        ),
        *_lines(
            figures,
            Box(left=600, top=544, width=370, height=140),
            title="Set-up: ms per tap, by number of taps",
            leaf=lambda count, name: path(f"setup.taps{count}", name, "per_tap_ms"),
            names=(QEMU, CAPBPF, SHARED_MAPS, STATIC),
            logarithmic=True,
        ),
        *_footer(machine),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


# The panels


def _legend(left: float, top: float) -> Iterator[str]:
    at, line = left, top
    for name, colour in COLOURS.items():
        width = 30 + 6.4 * len(_LEGEND[name])
        if at + width > WIDTH - left:
            at, line = left, line + 20
        yield _rect(at, line - 9, 11, 11, colour)
        yield _text(at + 17, line + 1, _LEGEND[name])
        at += width


def _packet_costs(figures: Figures, box: Box) -> Iterator[str]:
    """Bars, one group for each kind of packet."""
    names = (QEMU, CAPBPF, SHARED_MAPS, STATIC, PERIODIC)
    yield _title(box, "One packet, BPF_PROG_TEST_RUN: ns over return 0", left=20)
    paths = {
        (kind, name): (f"capbpf.{kind}", STATIC) if name == CAPBPF else (f"testrun.{kind}", name)
        for kind in shapes.KINDS
        for name in names
    }
    costs = {at: figures.get(path(*where, "over_floor_ns")) for at, where in paths.items()}
    most = _ceiling(max((cost.value for cost in costs.values() if cost), default=1.0))
    for tick in _ticks(0, most, 4):
        x = box.left + box.width * tick / most
        yield _line(x, box.top, x, box.bottom)
        yield _text(x, box.bottom + 16, f"{tick:g}", anchor="middle")
    group = box.height / len(shapes.KINDS)
    bar = group * 0.84 / len(names)
    for row, (kind, label) in enumerate(shapes.KINDS.items()):
        top = box.top + row * group + group * 0.08
        for number, words in enumerate(_wrapped(label)):
            yield _text(box.left - 8, top + group * 0.35 + 14 * number, words, anchor="end")
        for number, name in enumerate(names):
            cost, ratio = costs[kind, name], figures.get(path(*paths[kind, name], "ratio"))
            if not cost:
                continue
            width = max(cost.value, 0) * box.width / most
            y = top + number * bar
            yield _rect(box.left, y, max(width, 1), bar - 1.5, COLOURS[name])
            times = f" ({ratio.value:.3g}x cheaper)" if ratio and name != QEMU and ratio.value > 1 else ""
            yield _text(box.left + width + 4, y + bar - 3.5, f"{cost.value:.3g}{times}", size=10, halo=True)


def _shares(figures: Figures, box: Box) -> Iterator[str]:
    """Dots on a line for each way to send."""
    sections = {
        "one tap, IPv4": "tap.v4",
        "one tap, IPv6": "tap.v6",
        "one tap, read, IPv4": "tap.v4.drained",
        "one tap, read, IPv6": "tap.v6.drained",
        "300 taps, IPv4": "taps300.v4",
        "300 taps, IPv6": "taps300.v6",
    }
    yield _title(box, "Packets per second into taps of 4 queues: share of return 0")
    found = {
        (label, name): figure.value
        for label, section in sections.items()
        for name in COLOURS
        if (figure := figures.get(path(section, name, "of_floor")))
    }
    least = math.floor(min(found.values(), default=0.9) * 10) / 10
    most = max(1.0, *found.values()) if found else 1.0
    step = box.height / len(sections)

    def across(value: float) -> float:
        return box.left + box.width * (value - least) / (most - least)

    for tick in _ticks(least, 1.0, round((1.0 - least) * 10)):
        yield _line(across(tick), box.top, across(tick), box.bottom)
        yield _text(across(tick), box.bottom + 16, f"{tick:.1f}", anchor="middle")
    for row, label in enumerate(sections):
        y = box.top + (row + 0.5) * step
        yield _text(box.left - 8, y + 4, label, anchor="end")
        yield _line(box.left, y, box.right, y)
        for number, (name, colour) in enumerate(COLOURS.items()):
            if (label, name) in found:  # not one on top of the other
                yield _dot(across(found[label, name]), y + 2.5 * (number - 3), colour)


def _lines(
    figures: Figures,
    box: Box,
    *,
    title: str,
    leaf: Callable[[int, str], str],
    names: Sequence[str],
    logarithmic: bool,
) -> Iterator[str]:
    """A line for each contender over the number of taps."""
    yield _title(box, title)
    series = {
        name: [(count, figure.value) for count in _COUNTS if (figure := figures.get(leaf(count, name)))]
        for name in names
    }
    values = [value for points in series.values() for _, value in points]
    if logarithmic:
        least: float = math.floor(math.log10(min(values, default=0.1)))
        most: float = math.ceil(math.log10(max(values, default=1.0)) + 1e-9)
        ticks = [(float(number), f"{10.0**number:g}") for number in range(int(least), int(most) + 1)]
    else:
        least, most = min(0, *values) if values else 0, _ceiling(max(values, default=1.0))
        ticks = [(tick, f"{tick:g}") for tick in _ticks(0, most, 4)]

    def across(count: int) -> float:
        return box.left + box.width * math.log10(count) / math.log10(_COUNTS[-1])

    def up(value: float) -> float:
        height = math.log10(value) if logarithmic else value
        return box.bottom - box.height * (height - least) / (most - least)

    for tick, label in ticks:
        y = box.bottom - box.height * (tick - least) / (most - least)
        yield _line(box.left, y, box.right, y)
        yield _text(box.left - 8, y + 4, label, anchor="end")
    for count in _COUNTS:
        yield _text(across(count), box.bottom + 16, str(count), anchor="middle")
    yield _text(box.right, box.bottom + 32, "taps", anchor="end")
    for name, points in series.items():
        joined = " ".join(f"{across(count):.1f},{up(value):.1f}" for count, value in points)
        yield f'<polyline points="{joined}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"/>'
        for count, value in points:
            yield _dot(across(count), up(value), COLOURS[name])


def _footer(machine: Mapping[str, str]) -> Iterator[str]:
    told = (
        f"{machine.get('cpu')}, {machine.get('cores')} cores; Linux {machine.get('kernel')}, JIT {machine.get('jit')}, "
        f"{machine.get('mitigations')}",
        f"QEMU {machine.get('qemu')}, clang {machine.get('clang')}; {machine.get('date')}; medians of one run",
    )
    for number, line in enumerate(told):
        yield _text(20, HEIGHT - 28 + 15 * number, line, size=10.5)


# Shapes and scales


def _title(box: Box, words: str, left: float | None = None) -> str:
    return _text(box.left - 130 if left is None else left, box.top - 14, words, size=13, weight="600")


def _text(
    x: float, y: float, words: str, *, size: float = 11, anchor: str = "start", weight: str = "", halo: bool = False
) -> str:
    """A halo keeps grid lines out of the letters."""
    extra = f' font-weight="{weight}"' if weight else ""
    extra += f' stroke="{_CARD}" stroke-width="3" paint-order="stroke"' if halo else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" text-anchor="{anchor}" fill="{_INK}"{extra}>'
        f"{escape(words)}</text>"
    )


def _rect(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_FAINT}"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}" stroke="{_CARD}"/>'


def _wrapped(label: str) -> Sequence[str]:
    """A long label as two lines."""
    words = label.split()
    half = (len(words) + 1) // 2
    return (label,) if len(label) < 16 else (" ".join(words[:half]), " ".join(words[half:]))


def _ceiling(value: float) -> float:
    """The next round number: 1, 2, 4, 6 or 8 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return next(step * power for step in (1, 2, 4, 6, 8, 10) if step * power >= value)


def _ticks(first: float, last: float, steps: int) -> Sequence[float]:
    return [first + (last - first) * number / max(steps, 1) for number in range(max(steps, 1) + 1)]
