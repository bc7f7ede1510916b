# SPDX-License-Identifier: BSD-2-Clause
"""What users and programs read: columns, ethtool's format, JSON with a schema.  Pure."""

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from qsteer import ethtool
from qsteer.errors import printable
from qsteer.model import Engine, Inventory, Process, Reading, Source, Tap, Unsteerable
from qsteer.plan import Plan, revision
from qsteer.rss import RssConfig, format_hash_types, format_key
from qsteer.state import agrees, state

if TYPE_CHECKING:
    from qsteer.clean import Item
    from qsteer.config import Checked
    from qsteer.domains import NicPolicy, Shown, Written
    from qsteer.saved import File

Json = dict[str, object]

_COLUMNS: dict[str, Callable[[Tap], str]] = {
    "VM": lambda tap: tap.vm_name or (f"({tap.holder.comm} {tap.holder.pid})" if tap.holder else "-"),
    "NETNS": lambda tap: tap.netns_name or "-",
    "TAP": lambda tap: tap.name,
    "QUEUES": lambda tap: f"{tap.active}/{tap.attached}",
    "PROGRAM": lambda tap: _program_cell(tap) if tap.queues else "?",
    "ENGINE": lambda tap: _engine_cell(tap),
    "SOURCE": lambda tap: source_of(tap) or "-",
    "AGREES": agrees,
    "USED": lambda tap: " ".join("?" if used is None else str(used) for used in tap.used or ()) or "-",
    "STATE": state,
}


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def source_of(tap: Tap) -> Source | None:
    """Where the configuration that steers a tap comes from."""
    return tap.steering.source if tap.steering else None


def engine(tap: Tap) -> str | None:
    """What steers; None where that cannot be seen."""
    if not tap.queues:
        return None
    return tap.steering.engine if tap.steering else "automq"


def _engine_cell(tap: Tap) -> str:
    """With what in-kernel hashing is like on this host, and whether it reports."""
    steers = engine(tap) or "?"
    generation = tap.hashing.generation if steers == Engine.KERNEL else None
    report = "+report" if tap.vnet_hash and tap.vnet_hash.report else ""
    return f"{steers} {generation}{report}" if generation else f"{steers}{report}"


def status_text(inventory: Inventory) -> str:
    """One line per tap, and per NIC that cannot be steered."""
    taps = inventory.taps
    if not taps and not inventory.unsteerable:
        return "no process holds a tap"
    shown = dict(_COLUMNS)
    if not any(tap.netns_name for tap in taps):
        del shown["NETNS"]
    if not any(tap.used for tap in taps):
        del shown["USED"]
    rows = [[printable(cell(tap)) for cell in shown.values()] for tap in taps]
    rows += [_unsteerable_row(nic, tuple(shown)) for nic in inventory.unsteerable]
    return columns([tuple(shown), *rows])


def _unsteerable_row(other: Unsteerable, names: Sequence[str]) -> list[str]:
    nic = other.nic.id or other.nic.netdev or other.nic.mac or "a NIC"
    cells = {"VM": vm_name(other), "STATE": f"{nic}: {other.backend}, whose packets do not pass a tap"}
    return [printable(cells.get(name, "-")) for name in names]


def vm_name(other: Unsteerable) -> str:
    """The VM of a NIC that cannot be steered, as ``Tap.vm_name`` with a pid where it has no name."""
    if other.domain:
        return other.domain.name
    args = other.vm.args
    return (args and (args.name or args.uuid)) or f"({other.vm.comm} {other.vm.pid})"


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
        "netns_name": tap.netns_name,
        "ifindex": tap.ifindex,
        "nic": _nic_json(tap),
        "queues": {"active": tap.active, "attached": tap.attached, "used": list(tap.used) if tap.used else None},
        "program": program_json(tap),
        "engine": engine(tap),
        "in_kernel": _in_kernel_json(tap),
        "source": source_of(tap),
        "agrees": agrees(tap),
        "state": state(tap),
        "software_steering": tap.steered_in_software,
        "holder": _process_json(tap.holder),
        "libvirt": tap.domain is not None,
        "persistent": tap.persistent,
        "held": tap.hold,
        "revision": revision(tap),
        "guest": _reading_json(tap),
        "unread": list(tap.unread),
    }


def _in_kernel_json(tap: Tap) -> Json | None:
    """What tun hashes by itself; ``steers`` is false where a program goes before it, or automq chooses."""
    rss = tap.vnet_hash
    if not rss:
        return None
    return {
        "generation": tap.hashing.generation,
        "steers": engine(tap) == Engine.KERNEL,
        "rss": rss.rss,
        "report": rss.report,
        "types": list(format_hash_types(rss.types)),
        "by_qsteer": rss.source is not None,
        "displaced": rss.displaced or None,
    }


def _nic_json(tap: Tap) -> Json | None:
    nic = tap.nic
    if not nic:
        return None
    return {"id": nic.id, "netdev": nic.netdev, "mac": nic.mac, "rss": nic.rss, "vhost": nic.vhost}


def _process_json(process: Process | None) -> Json | None:
    return {"pid": process.pid, "uid": process.uid, "comm": process.comm} if process else None


def _reading_json(tap: Tap) -> Json | None:
    reading = tap.reading
    if not reading:
        return None
    return {
        "source": reading.source,
        "rss": config_json(reading.config) if reading.config else None,
        "exact_types": reading.exact_types,
        "paused_ms": reading.paused_ms,
    }


def status_json(inventory: Inventory) -> Json:
    """``qsteer.status/1``."""
    return {
        "schema": "qsteer.status/1",
        "taps": [tap_json(tap) for tap in inventory.taps],
        "unsteerable": [
            {"vm": vm_name(one), "pid": one.vm.pid, "nic": one.nic.id, "mac": one.nic.mac, "backend": one.backend}
            for one in inventory.unsteerable
        ],
        "notes": list(inventory.notes),
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
    """A tap's RSS configuration as ``ethtool -x`` prints it; what qsteer adds is in lines that begin with #.

    With a reading it is the guest's own, else that of the attached program.
    """
    name, program = printable(tap.name), tap.program
    if tap.reading:
        return _reading_text(tap, tap.reading)
    if not tap.queues:
        return f"# {name}: {state(tap)}"
    if not tap.steering:
        return f"# {name}: no steering program is attached, the kernel's automq chooses the queue ({state(tap)})"
    if tap.steering.engine is Engine.KERNEL:
        return _in_kernel_text(tap)
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
        lines.append("# its maps hold no RSS configuration" if program.has_config else "# it has no RSS maps")
        return "\n".join(lines)
    return "\n".join((*lines, *_table_lines(tap, config)))


def _in_kernel_text(tap: Tap) -> str:
    whose = f"source {tap.steering.source}" if tap.steering and tap.steering.source else "set by somebody else"
    about = ["in-kernel RSS", tap.hashing.generation or "of a kind unknown here", whose]
    if tap.vnet_hash and tap.vnet_hash.report:
        about.append("the guest is told the hash")
    lines = [f"# {printable(tap.name)}: {', '.join(about)}"]
    config = tap.steering.config if tap.steering else None
    if not config:
        return f"{lines[0]}\n# its table is none that virtio allows"
    return "\n".join((*lines, *_table_lines(tap, config)))


def _table_lines(tap: Tap, config: RssConfig) -> tuple[str, ...]:
    table = ethtool.format_table(config, device=printable(tap.name), rings=tap.active).rstrip("\n")
    if max(config.table) >= tap.active:
        return (table, f"# the kernel folds what is beyond the {tap.active} active queues (modulo)")
    return (table,)


def _reading_text(tap: Tap, reading: Reading) -> str:
    name = printable(tap.name)
    paused = "" if reading.paused_ms is None else f", the VM stood still for {reading.paused_ms:.1f} ms"
    lines = [f"# {name}: what the guest asks for, source {reading.source}{paused}"]
    if not reading.config:
        return f"{lines[0]}\n# the guest has not asked for RSS"
    if not reading.exact_types:
        lines.append("# its hash types could not be read: Linux's default")
    lines.append(ethtool.format_table(reading.config, device=name, rings=tap.active).rstrip("\n"))
    return "\n".join(lines)


def show_json(tap: Tap) -> Json:
    """One tap of ``qsteer.show/1``."""
    return {
        "tap": tap.name,
        "vm": tap.vm_name,
        "program": program_json(tap),
        "engine": engine(tap),
        "in_kernel": _in_kernel_json(tap),
        "source": source_of(tap),
        "rss": _rss_json(tap),
        "guest": _reading_json(tap),
    }


def _rss_json(tap: Tap) -> Json | None:
    if tap.steering and tap.steering.engine is Engine.KERNEL:
        return {"enabled": True, **config_json(tap.steering.config)} if tap.steering.config else None
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
    head = f"{printable(plan.tap.name)} (revision {revision(plan.tap)}):"
    return "\n".join([head, *steps, *(f"  note: {printable(note)}" for note in plan.notes)])


def done_text(plan: Plan, program_id: int) -> str:
    """What ``apply`` and ``off`` print for one tap."""
    parts = [printable(plan.tap.name), plan.result]
    if program_id:
        parts.append(f"program {program_id}")
    if plan.engine is Engine.KERNEL:
        parts.append(f"in-kernel RSS {plan.tap.hashing.generation or ''}".rstrip())
    if plan.source:
        parts.append(f"source {plan.source}")
    return "  ".join(parts) + "".join(f"\n  {printable(note)}" for note in plan.notes)


def plan_json(plan: Plan, program_id: int | None) -> Json:
    """One tap of ``qsteer.apply/1`` and ``qsteer.off/1``; ``program_id`` is None in a dry run."""
    return {
        "tap": plan.tap.name,
        "vm": plan.tap.vm_name,
        "revision": revision(plan.tap),
        "result": plan.result,
        "dry_run": program_id is None,
        "source": plan.source,
        "engine": plan.engine,
        "program": program_id or None,
        "steps": [str(step) for step in plan.steps],
        "notes": list(plan.notes),
    }


def clean_json(removed: "Sequence[Item]", kept: "Sequence[Item]", *, dry_run: bool) -> Json:
    """``qsteer.clean/1``."""
    return {
        "schema": "qsteer.clean/1",
        "dry_run": dry_run,
        "removed": [_item_json(item) for item in removed],
        "kept": [_item_json(item) for item in kept],
    }


def _item_json(item: "Item") -> Json:
    return {"path": str(item.path), "what": item.what, "why": item.why}


def saved_text(file: "File", *, dry_run: bool) -> str:
    """What ``apply --save`` adds for one tap; in a dry run the file itself."""
    if not dry_run:
        return f"  saved to {printable(str(file.path))}"
    return f"  save to {printable(str(file.path))}:\n" + "\n".join(f"    {line}" for line in file.content.splitlines())


def checked_text(files: "Sequence[Checked]") -> str:
    """What ``config check`` prints of the files that are without a mistake."""
    return "\n".join(f"{printable(one.file)}: ok, {_entries(one)}" for one in files if not one.mistakes)


def _entries(one: "Checked") -> str:
    counts = ((one.entries, "entry of NICs", "entries of NICs"), (one.rules, "rule of serve", "rules of serve"))
    told = [f"{count} {single if count == 1 else plural}" for count, single, plural in counts if count]
    return ", ".join(told) or "no entries"


def checked_json(files: "Sequence[Checked]") -> Json:
    """``qsteer.config/1``."""
    return {
        "schema": "qsteer.config/1",
        "files": [
            {
                "file": one.file,
                "ok": not one.mistakes,
                "nic": one.entries,
                "serve_allow": one.rules,
                "mistakes": [{"line": it.line, "message": it.message, "hint": it.hint} for it in one.mistakes],
            }
            for one in files
        ],
    }


def domain_text(shown: "Shown") -> str:
    """A line for each NIC of a libvirt domain: what is wanted of it."""
    rows = [("NIC", "MAC", "QUEUES", "RSS", "WANTED")]
    for nic in shown.nics:
        one = nic.interface
        rss = "-" if one.rss is None else "on" if one.rss else "off"
        rows.append((one.alias or "-", one.mac or "-", str(one.queues or 1), rss, "; ".join(_wanted(nic))))
    return columns([tuple(map(printable, row)) for row in rows])


def _wanted(nic: "NicPolicy") -> tuple[str, ...]:
    from qsteer import saved

    wanted = nic.wanted
    required = ("required",) if wanted.required else ()
    return (f"source {wanted.source or 'auto'}", *saved.lines_of(wanted), *required)


def domain_json(shown: "Shown") -> Json:
    """The same, with what does not count."""
    domain = shown.domain
    return {
        "schema": "qsteer.libvirt/1",
        "name": domain.name,
        "uuid": domain.uuid,
        "emulator": domain.emulator,
        "policy": domain.policy is not None,
        "mistakes": list(shown.mistakes),
        "interfaces": [
            {
                "alias": nic.interface.alias,
                "mac": nic.interface.mac,
                "target": nic.interface.target,
                "queues": nic.interface.queues,
                "rss": nic.interface.rss,
                "source": str(nic.wanted.source or "auto"),
                "engine": str(nic.wanted.engine or "auto"),
                "hash_report": bool(nic.wanted.hash_report),
                "types": None if nic.wanted.static.types is None else list(format_hash_types(nic.wanted.static.types)),
                "key": None if nic.wanted.static.key is None else format_key(nic.wanted.static.key),
                "table": None if nic.wanted.static.table is None else list(nic.wanted.static.table),
                "unclassified_queue": nic.wanted.static.unclassified_queue,
                "allow": list(nic.wanted.allow or ()),
                "required": bool(nic.wanted.required),
                "refused": list(nic.refused),
            }
            for nic in shown.nics
        ],
    }


def written_text(written: "Sequence[Written]") -> str:
    """What ``libvirt set`` writes, or has written."""
    from qsteer.domainpolicy import NAMESPACE

    def text(xml: str | None) -> str:
        return xml.replace("<steering", f'<steering xmlns="{NAMESPACE}"', 1) if xml else "no policy"

    return "\n".join(f"{text(one.xml)}\nin {_where(one)}" for one in written)


def _where(written: "Written") -> str:
    return " and ".join(("the domain that runs",) * written.live + ("its configuration",) * written.config)


def written_json(domain: str, written: "Sequence[Written]") -> Json:
    """The same."""
    places = [{"xml": one.xml, "live": one.live, "config": one.config} for one in written]
    return {"schema": "qsteer.libvirt-set/1", "name": domain, "written": places}


def document(schema: str, taps: Sequence[Json], *, pretty: bool) -> str:
    """A JSON document about taps, which names its schema."""
    return json_text({"schema": schema, "taps": taps}, pretty=pretty)


def json_text(value: Json, *, pretty: bool) -> str:
    """JSON on one line, or indented."""
    return json.dumps(value, indent=2 if pretty else None)
