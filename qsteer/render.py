# SPDX-License-Identifier: BSD-2-Clause
"""What users and programs read: columns, ethtool's format, JSON with a schema.  Pure."""

import json
from collections.abc import Sequence

from qsteer import ethtool
from qsteer.errors import printable
from qsteer.model import Kind, Source, Tap
from qsteer.plan import Plan, state, steers_in_software
from qsteer.rss import RssConfig, format_hash_types, format_key

Json = dict[str, object]

_STATUS_COLUMNS = ("VM", "TAP", "QUEUES", "PROGRAM", "ENGINE", "SOURCE", "STATE")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def source_of(tap: Tap) -> Source | None:
    """Where the configuration that steers a tap comes from."""
    if not tap.program:
        return None
    if tap.program.kind is Kind.QEMU:
        return Source.QEMU_MAPS
    return tap.program.ident.source if tap.program.ident else None


def status_text(taps: Sequence[Tap]) -> str:
    """One line per tap."""
    if not taps:
        return "no process holds a tap"
    return columns([_STATUS_COLUMNS, *(_status_row(tap) for tap in taps)])


def _status_row(tap: Tap) -> tuple[str, ...]:
    return (
        printable(tap.vm_name or (f"({tap.holder.comm} {tap.holder.pid})" if tap.holder else "-")),
        printable(tap.name),
        f"{tap.active}/{tap.attached}",
        _program_cell(tap),
        "ebpf" if tap.program_id else "automq",
        source_of(tap) or "-",
        printable(state(tap)),
    )


def _program_cell(tap: Tap) -> str:
    if not tap.program_id:
        return "-"
    return f"{tap.program.kind if tap.program else '?'} {tap.program_id}"


def tap_json(tap: Tap) -> Json:
    """One tap of ``qsteer.status/1``."""
    return {
        "vm": tap.vm_name,
        "tap": tap.name,
        "netns": tap.netns,
        "ifindex": tap.ifindex,
        "queues": {"active": tap.active, "attached": tap.attached},
        "program": program_json(tap),
        "engine": "ebpf" if tap.program_id else "automq",
        "source": source_of(tap),
        "state": state(tap),
        "software_steering": steers_in_software(tap),
        "holder": ({"pid": tap.holder.pid, "uid": tap.holder.uid, "comm": tap.holder.comm} if tap.holder else None),
        "held": tap.hold,
    }


def program_json(tap: Tap) -> Json | None:
    """The attached program; only its id where looking at it takes a right that is missing."""
    if not tap.program_id:
        return None
    program = tap.program
    if not program:
        return {"id": tap.program_id}
    ident = program.ident
    return {
        "id": program.id,
        "name": program.name,
        "tag": program.tag,
        "kind": program.kind,
        "loaded_by_uid": program.uid,
        "held_by": list(tap.program_holders),
        "build": ident.build if ident else None,
        "abi": ident.abi if ident else None,
        "version": ident.version if ident else None,
        "outdated": ident.outdated if ident else None,
        "displaced": ident.displaced or None if ident else None,
    }


def show_text(tap: Tap) -> str:
    """A tap's RSS configuration as ``ethtool -x`` prints it; what qsteer adds is in lines that begin with #."""
    name, program = printable(tap.name), tap.program
    if not tap.program_id:
        return f"# {name}: no steering program is attached, the kernel's automq chooses the queue ({state(tap)})"
    if not program:
        return f"# {name}: steered by program {tap.program_id}; CAP_SYS_ADMIN is missing to look at it"
    about = [_program_cell(tap), f"source {source_of(tap) or '-'}"]
    if program.ident:
        about += [str(program.ident.build), f"qsteer {program.ident.version}"]
    lines = [f"# {name}: {', '.join(about)}"]
    config = tap.content.config if tap.content else None
    if tap.content and not tap.content.enabled:
        lines.append("# RSS is not enabled: every packet goes to the unclassified queue")
    if not config:
        lines.append("# its maps hold no RSS configuration" if program.has_maps else "# it has no RSS maps")
        return "\n".join(lines)
    lines.append(ethtool.format_table(config, device=name, rings=tap.active).rstrip("\n"))
    if max(config.table) >= tap.active:
        lines.append(f"# the kernel folds what is beyond the {tap.active} active queues (modulo)")
    return "\n".join(lines)


def show_json(tap: Tap) -> Json:
    """One tap of ``qsteer.show/1``."""
    return {
        "tap": tap.name,
        "vm": tap.vm_name,
        "program": program_json(tap),
        "source": source_of(tap),
        "rss": _rss_json(tap),
    }


def _rss_json(tap: Tap) -> Json | None:
    if not tap.content or not tap.content.config:
        return None
    return {"enabled": tap.content.enabled, **config_json(tap.content.config)}


def config_json(config: RssConfig) -> Json:
    """Types, key, table and unclassified queue."""
    return {
        "types": list(format_hash_types(config.types)),
        "key": format_key(config.key),
        "table": list(config.table),
        "unclassified_queue": config.unclassified_queue,
    }


def plan_text(plan: Plan) -> str:
    """What ``--dry-run`` prints for one tap."""
    steps = [f"  {number}. {step}" for number, step in enumerate(plan.steps, 1)] or ["  nothing to do"]
    return "\n".join([f"{printable(plan.tap.name)}:", *steps, *(f"  note: {printable(note)}" for note in plan.notes)])


def done_text(plan: Plan, program_id: int) -> str:
    """What ``apply`` and ``off`` print for one tap."""
    parts = [printable(plan.tap.name), plan.result]
    if program_id:
        parts.append(f"program {program_id}")
    if plan.source:
        parts.append(f"source {plan.source}")
    return "  ".join(parts) + "".join(f"\n  {printable(note)}" for note in plan.notes)


def plan_json(plan: Plan, program_id: int | None) -> Json:
    """One tap of ``qsteer.apply/1`` and ``qsteer.off/1``; ``program_id`` is None in a dry run."""
    return {
        "tap": plan.tap.name,
        "vm": plan.tap.vm_name,
        "result": plan.result,
        "dry_run": program_id is None,
        "source": plan.source,
        "program": program_id or None,
        "steps": [str(step) for step in plan.steps],
        "notes": list(plan.notes),
    }


def document(schema: str, taps: Sequence[Json], *, pretty: bool) -> str:
    """A JSON document about taps, which names its schema."""
    return json_text({"schema": schema, "taps": taps}, pretty=pretty)


def json_text(value: Json, *, pretty: bool) -> str:
    """JSON on one line, or indented."""
    return json.dumps(value, indent=2 if pretty else None)
