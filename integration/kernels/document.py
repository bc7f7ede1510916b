# SPDX-License-Identifier: BSD-2-Clause
"""docs/support.md and docs/in-kernel.md: their tables are written from docs/support.json, between marks.

The words around them stay.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from integration.bench.contenders import AUTOMQ, KERNEL, PERIODIC, QEMU, SHARED_MAPS, STATIC
from integration.bench.contenders import LABELS as BENCH_LABELS
from integration.bench.figures import path
from integration.bench.report import FAMILY_LABELS
from integration.kernels import hashing as hashing_of_kernels
from integration.kernels.guests import QEMUS
from integration.kernels.parts import PARTS
from integration.kernels.record import Data
from integration.kernels.table import KERNELS
from integration.provision import CHECKOUT

DOCUMENT = CHECKOUT / "docs" / "support.md"
IN_KERNEL = CHECKOUT / "docs" / "in-kernel.md"
_ID = re.compile(r"(?<=[ -])\d{3,}\b|/run/tmp\w*(?=/)|[0-9a-f]{12}")
"""What is another in every run: ids, temporary folders."""
LABELS = {"12": "v12", "11": "v11", "8": "v5-v9", "4": "v4", hashing_of_kernels.DECOY: "decoy"}
SOURCES = ("shared-maps", "qemu-maps", "device-state", "guest-agent", "static")


def tables(data: Data) -> dict[str, str]:
    """The text for each mark."""
    return {
        "kernels": kernels(data["kernels"]),
        "guests": guests(data["kernels"], data["cells"]),
        "vhost": vhost(data["vhost"]),
        "rights": rights(data["rights"]),
        "settings": settings(data["rights"]),
    }


def tables_in_kernel(data: Data) -> dict[str, str]:
    """The same for docs/in-kernel.md."""
    rows = data["hashing"]
    return {"tests": hashing(rows), "bench": hashing_bench(rows), "guests": hashing_guests(rows)}


def filled(text: str, texts: dict[str, str]) -> str:
    """The document with each table in its place.  Raises ValueError if a mark is missing."""
    for mark, table in texts.items():
        begin, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
        pattern = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}", re.DOTALL)
        text, times = pattern.subn(lambda _, made=f"{begin}\n{table}\n{end}": made, text)  # type: ignore[misc]
        if times != 1:
            raise ValueError(f"{times} places for the table {mark}")
    return text


def write(data: Data) -> None:
    """Both documents."""
    for document, texts in ((DOCUMENT, tables(data)), (IN_KERNEL, tables_in_kernel(data))):
        document.write_text(filled(document.read_text(), texts))


def kernels(rows: dict[str, Any]) -> str:
    """A column for each kernel, a row for each thing that was tested."""
    names = [kernel.name for kernel in KERNELS if kernel.name in rows]
    measured = [rows[name] for name in names]
    lines = [
        ("", *(f"Linux {row['release']}" for row in measured)),
        ("Debian package", *(f"{row['version']} ({row['suite']})" for row in measured)),
        ("builds that load", *(", ".join(row["builds"]) for row in measured)),
        *((part.name, *(_tests(row["parts"].get(part.name)) for row in measured)) for part in PARTS),
        ("run on", *(row["date"] for row in measured)),
    ]
    return _markdown(lines)


def _tests(counts: dict[str, int] | None) -> str:
    if not counts:
        return "-"
    failed = counts.get("failed", 0)
    return f"{counts.get('passed', 0)} tests" + (f", **{failed} failed**" if failed else "")


def guests(kernels: dict[str, Any], cells: dict[str, Any]) -> str:
    """A row for each kernel, QEMU and vhost; what was refused or cannot be has a number, with its words below."""
    notes: list[str] = []
    lines: list[Sequence[str]] = [
        ("Linux", "QEMU", "vhost", "without qsteer", *(f"`{name}`" for name in SOURCES), "run on")
    ]
    for kernel in KERNELS:
        for qemu in QEMUS:
            for vhost in ("off", "on"):
                found = {source: cells.get(f"{kernel.name} {qemu} {vhost} {source}") for source in SOURCES}
                measured = [cell for cell in found.values() if cell]
                if not measured:
                    continue
                bare = found["device-state"] or found["guest-agent"]
                lines.append(
                    (
                        kernels.get(kernel.name, {}).get("version", kernel.name).partition("-")[0],
                        measured[0]["version"],
                        vhost,
                        _without(bare),
                        *(_cell(cell, notes) for cell in found.values()),
                        max(cell["date"] for cell in measured),
                    )
                )
    return "\n".join([_markdown(lines), "", *(f"{number}. {note}" for number, note in enumerate(notes, 1))])


def _without(cell: dict[str, Any] | None) -> str:
    if not cell or not cell["without"]:
        return "-"
    guest, host, _ = cell["without"]
    flows = cell["flows"]
    return f"{_percent(flows - guest, flows)} right, {_percent(flows - host, flows)} by the host"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part // whole} %"


def _cell(cell: dict[str, Any] | None, notes: list[str]) -> str:
    if not cell:
        return "not run"
    if cell["result"] == "steered":
        return f"yes ({cell['flows']} of {cell['flows']})"
    if cell["says"] not in notes:
        notes.append(cell["says"])
    word = {"refused": "refused", "unsupported": "no"}.get(cell["result"], "**wrong**")
    return f"{word} ({notes.index(cell['says']) + 1})"


def vhost(rows: dict[str, Any]) -> str:
    """The phases of each QEMU, and what steering costs a packet that goes through vhost."""
    lines: list[Sequence[str]] = [
        ("QEMU", "what was done, as the guest said `ethtool -X`", "flows", "mismatches", "lost", "flows per queue")
    ]
    words = []
    for _, row in sorted(rows.items(), key=lambda item: [int(part) for part in item[0].split(".")]):
        for phase in row["phases"]:
            after = f" (followed after {phase['followed_after_s']} s)" if "followed_after_s" in phase else ""
            queues = " ".join(str(queue["counted"]) for queue in phase["queues"])
            numbers = (str(phase["flows"]), str(phase["mismatches"]), str(phase["lost"]), queues)
            lines.append((row["version"], phase["name"] + after, *numbers))
        if told := row["throughput"]:
            low, high = told["ratio_quartiles"]
            words.append(
                f"QEMU {row['version']}: packets per second that the guest got, with steering over without: "
                f"{told['ratio']} ({low} to {high}, the quartiles of {told['rounds']} pairs by turns)."
            )
    return "\n".join([_markdown(lines), "", *words])


def hashing(rows: dict[str, Any]) -> str:
    """A column for each generation, a row for each test: how many cases of it passed."""
    names = [name for name in hashing_of_kernels.EVERY if name in rows]
    tests: dict[str, None] = {}
    for name in names:
        tests |= dict.fromkeys(case.partition("[")[0] for case in rows[name]["tests"])
    lines: list[Sequence[str]] = [("", *(LABELS[name] for name in names))]
    for test in tests:
        ended = ([how for case, how in rows[name]["tests"].items() if case.partition("[")[0] == test] for name in names)
        lines.append((test.removeprefix("test_").replace("_", " "), *(_ended(one) for one in ended)))
    switched = [rows[name].get("switched", {}) for name in names]
    lines.append(("packets while the engine changed 300 times", *(one.get("packets", "-") for one in switched)))
    lines.append(("... where neither table wants them", *(one.get("outside", "-") for one in switched)))
    lines.append(("run on", *(rows[name]["date"] for name in names)))
    return _markdown(lines)


def _ended(cases: Sequence[str]) -> str:
    bad = sum(how != "passed" for how in cases)
    return f"**{bad} of {len(cases)} failed**" if bad else str(len(cases)) if cases else "-"


def hashing_bench(rows: dict[str, Any]) -> str:
    """Packets per second into a tap, as shares of those with a program that returns 0, and without any."""
    figures: dict[str, Any] = rows.get("bench", {}).get("bench", {})
    ways = (("nobody reads", ""), ("read by another processor", ".drained"))
    heads = (f"{family}, {way}" for way, _ in ways for family in FAMILY_LABELS.values())
    lines: list[Sequence[str]] = [("packets a second, of those with `return 0`", *heads)]
    for name in (QEMU, AUTOMQ, STATIC, PERIODIC, SHARED_MAPS, KERNEL):
        places = (path(f"tap.{family}{way}", name, "of_floor") for _, way in ways for family in FAMILY_LABELS)
        lines.append((BENCH_LABELS[name], *(_share(figures.get(place)) for place in places)))
    return _markdown(lines)


def hashing_guests(rows: dict[str, Any]) -> str:
    """Every flow through real guests, phase by phase."""
    told: dict[str, Any] = rows.get("guests", {}).get("guests", {})
    lines: list[Sequence[str]] = [
        (f"QEMU {told.get('qemu', '-')}, and what steered", "flows", "mismatches", "right by host", "lost", "per queue")
    ]
    for phase in told.get("phases", ()):
        queues = " ".join(str(queue["counted"]) for queue in phase["queues"])
        right = str(phase["flows"] - phase["host_mismatches"])
        lines.append((phase["name"], str(phase["flows"]), str(phase["mismatches"]), right, str(phase["lost"]), queues))
    return _markdown(lines)


def _share(figure: dict[str, Any] | None) -> str:
    return f"{figure['value']:.2f} ±{figure['spread']:.2f}" if figure else "-"


def rights(rows: dict[str, Any]) -> str:
    """What each verb takes, on the kernels named where they differ."""
    names = list(rows)
    taken: dict[tuple[str, str, bool], dict[str, list[str]]] = {}
    for name in names:
        for row in rows[name]["verbs"]:
            words = ", ".join(_capability(one, row) for one in row["needs"]) or "nothing"
            taken.setdefault((row["verb"], row["user"], row["every"]), {}).setdefault(words, []).append(name)
    lines: list[Sequence[str]] = [("verb", "as", "takes")]
    for (verb, user, every), found in taken.items():
        what = verb if every else f"{verb}, what it does without CAP_SYS_ADMIN"
        for words, kernels in found.items():
            lines.append((what, user, words + ("" if kernels == names else f" (Linux {', '.join(kernels)})")))
    return _markdown(lines)


def _capability(name: str, row: dict[str, Any]) -> str:
    """With the exit code without it."""
    code = row["without"][name]
    return f"CAP_{name.upper()} ({code or 'less'})"


def settings(rows: dict[str, Any]) -> str:
    """What goes otherwise than usual under a setting of the kernel, or with something missing."""
    names = [name for name, row in rows.items() if row["settings"]]
    seen: dict[tuple[str, str, int, str], list[str]] = {}
    for name in names:
        for row in rows[name]["settings"]:
            seen.setdefault((row["setting"], row["verb"], row["exit"], _said(row)), []).append(name)
    lines: list[Sequence[str]] = [("setting", "verb", "exit", "it says", "Linux")]
    for (setting, verb, code, says), kernels in seen.items():
        lines.append((f"`{setting}`", verb, str(code), says, "all" if kernels == names else ", ".join(kernels)))
    notes = []
    for heading, what in (("Nothing changes with", "no_difference"), ("Could not be set", "not_set")):
        where: dict[str, list[str]] = {}
        for name in names:
            for setting in rows[name][what]:
                where.setdefault(setting, []).append(name)
        told = (f"`{one}`" + ("" if at == names else f" (Linux {', '.join(at)})") for one, at in where.items())
        if where:
            notes += ["", f"{heading}: {', '.join(told)}."]
    return "\n".join([_markdown(lines), *notes])


def _said(row: dict[str, Any]) -> str:
    """What qsteer complained of, each thing once; else what came of it, in short."""
    lines = dict.fromkeys(_ID.sub("N", line) for line in row["says"].split(" / "))
    words = [line for line in lines if line.startswith(("qsteer:", "keep:", "hint:"))]
    return " / ".join(words) or f"({_ID.sub('N', row['result'].splitlines()[-1])})"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    first, *rest = ("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return "\n".join([first, "|" + "---|" * (first.count(" | ") + 1), *rest])
