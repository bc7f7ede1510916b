# SPDX-License-Identifier: BSD-2-Clause
"""The command line: parses and renders, nothing else.  What a verb needs is imported when it runs."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from qsteer import __version__
from qsteer.errors import PermissionDeniedError, QsteerError, UsageError, printable

if TYPE_CHECKING:
    from qsteer.model import Tap
    from qsteer.plan import Plan, Static, Wanted
    from qsteer.selection import Selection

_EXIT_CODES = """exit codes: 0 done, 1 failed, 2 usage, 3 no such VM or tap, 4 permission, 5 unsupported here,
6 conflict with a foreign program, 8 busy, try again"""


class _Parser(argparse.ArgumentParser):
    """argparse with qsteer's way of failing, and without abbreviations, which later options would break."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def command(argv: Sequence[str]) -> int:
    """Run one command line; gives the exit code.  Raises QsteerError."""
    options = _parser().parse_args(argv)
    if "json" in options:
        options.json = options.json or options.pretty
    _set_up_logging(options.verbose)
    return int(options.verb(options))


def _set_up_logging(verbose: int) -> None:
    """qsteer's own loggers only: what its libraries have to say is about themselves."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("qsteer: %(message)s"))
    logger = logging.getLogger("qsteer")
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="count", default=0, help="say more (repeatable)")
    common.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    output = _Parser(add_help=False)
    output.add_argument("-j", "--json", action="store_true", help="print JSON")
    output.add_argument("-p", "--pretty", action="store_true", help="print indented JSON")
    change = _Parser(add_help=False)
    change.add_argument("-n", "--dry-run", action="store_true", help="print what would be done, change nothing")

    parser = _Parser(
        prog="qsteer",
        description="Decides which queue of a virtual machine's NIC every packet lands on.",
        epilog=_EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"qsteer {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, *parents: _Parser) -> _Parser:
        added: _Parser = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[common, *parents],
            epilog=_EXIT_CODES,
        )
        added.set_defaults(verb=run)
        return added

    select = _Parser(add_help=False)
    group = select.add_argument_group("selectors (kinds AND, repeats OR)")
    group.add_argument("--vm", action="append", default=[], metavar="NAME|UUID", help="a VM's name or UUID")
    group.add_argument("--pid", action="append", default=[], type=_pid, metavar="PID", help="a QEMU's process id")
    group.add_argument("--dev", action="append", default=[], metavar="TAP", help="a tap's name")
    group.add_argument("--all", action="store_true", help="every tap of a VM that has several queues")

    verb("status", _status, "show every tap, and what the kernel says steers it", select, output)
    verb("show", _show, "show types, key and table, read back from the kernel's maps", select, output)

    apply = verb("apply", _apply, "steer the taps of a VM that runs", select, change, output)
    apply.add_argument("--source", choices=("auto", "shared-maps", "static"), default="auto", help="default: auto")
    apply.add_argument("--replace", action="store_true", help="take a foreign program, or QEMU's own, off")
    apply.add_argument("--force", action="store_true", help="attach even where QEMU undoes it in software")
    apply.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help="wait for another qsteer (5 s)")
    static = apply.add_argument_group("a configuration of yours (implies --source static)")
    static.add_argument("--key", metavar="HEX|random", help="40 bytes, 6d:5a:...; the attached one stays by default")
    static.add_argument("--types", metavar="TYPE,...", help="tcp4,udp4,ip4,tcp6,udp6,ip6,tcp-ex,udp-ex,ip-ex")
    table = static.add_mutually_exclusive_group()
    table.add_argument("--table", metavar="Q,Q,...", help="the table itself, a power of two of entries, at most 128")
    table.add_argument("--equal", metavar="N", help="spread over the first N queues")
    table.add_argument("--weight", metavar="W,W,...", help="spread over the first queues, by weight")
    table.add_argument("--from", dest="from_file", metavar="FILE|-", help="what ethtool -x or qsteer show printed")
    static.add_argument("--unclassified-queue", metavar="N", help="for packets that no hash type matches")

    off = verb("off", _off, "stop steering (QEMU may attach a program that it was given again)", select, change, output)
    off.add_argument("--replace", action="store_true", help="take even a foreign program, or QEMU's own, off")
    off.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help="wait for another qsteer (5 s)")

    run = verb("run", _run, "start QEMU with taps that are steered as the guest asks", change, output)
    run.usage = "qsteer run [--vm NAME] --tap id=ID,queues=N[,...] [--user USER] [-n] -- QEMU [ARGUMENT ...]"
    run.add_argument("--vm", metavar="NAME", help="the VM's name; default: QEMU's -name")
    run.add_argument(
        "--tap",
        action="append",
        default=[],
        required=True,
        metavar="id=ID,queues=N[,ifname=][,bridge=][,mac=][,mtu=][,vhost=auto|on|off][,rss=on|off]",
        help="a NIC and its tap (repeatable)",
    )
    run.add_argument("--user", metavar="USER", help="who QEMU runs as (as root: must be given)")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- QEMU ARGUMENT", help="QEMU's command line")
    return parser


def _pid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 22:
        raise argparse.ArgumentTypeError(f'"{text}" is not a process id')
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds between 0 and 3600')
    return seconds


def _numbers(option: str, text: str) -> tuple[int, ...]:
    return tuple(_number(option, part.strip()) for part in text.split(","))


def _number(option: str, text: str) -> int:
    if not text.isdecimal() or not text.isascii() or len(text) > 5 or int(text) > 0xFFFF:
        raise UsageError(f'{option}: "{text}" is not a whole number from 0 to 65535')
    return int(text)


def _selection(options: argparse.Namespace, *, required: bool) -> "Selection":
    from qsteer.selection import Selection

    selection = Selection(
        vms=tuple(options.vm), pids=tuple(options.pid), taps=tuple(options.dev), every=bool(options.all)
    )
    if required and not selection:
        raise UsageError("which taps?", hint="--vm NAME, --pid PID, --dev TAP or --all")
    return selection


def _taps(options: argparse.Namespace, *, required: bool) -> "tuple[Tap, ...]":
    from qsteer import inventory
    from qsteer.selection import select

    selection = _selection(options, required=required)
    taps = inventory.fetch().taps
    return select(taps, selection) if selection else taps


def _print(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text)


def _status(options: argparse.Namespace) -> int:
    from qsteer import render

    taps = _taps(options, required=False)
    if options.json:
        print(render.document("qsteer.status/1", [render.tap_json(tap) for tap in taps], pretty=options.pretty))
    else:
        _print(options, render.status_text(taps))
    return 0


def _show(options: argparse.Namespace) -> int:
    from qsteer import render

    taps = _taps(options, required=False)
    if options.json:
        print(render.document("qsteer.show/1", [render.show_json(tap) for tap in taps], pretty=options.pretty))
    else:
        _print(options, "\n\n".join(render.show_text(tap) for tap in taps) or "no process holds a tap")
    if hidden := [tap for tap in taps if tap.program_id and not tap.program]:
        raise PermissionDeniedError(
            f"cannot look at program {hidden[0].program_id}", hint="it takes CAP_SYS_ADMIN; try sudo"
        )
    return 0


def _apply(options: argparse.Namespace) -> int:
    from qsteer.plan import plan_apply

    wanted = _wanted(options)
    return _change(options, "qsteer.apply/1", lambda tap: plan_apply(tap, wanted))


def _off(options: argparse.Namespace) -> int:
    from qsteer.plan import plan_off

    return _change(options, "qsteer.off/1", lambda tap: plan_off(tap, replace_foreign=options.replace))


def _change(options: argparse.Namespace, schema: str, make_plan: "Callable[[Tap], Plan]") -> int:
    """Fetch, compute, execute.  With several taps one that is refused does not stop the others."""
    import contextlib

    from qsteer import execute, holds, render

    _selection(options, required=True)
    failures: list[QsteerError] = []
    documents = []
    with contextlib.nullcontext() if options.dry_run else execute.lock(options.timeout):
        if not options.dry_run:
            holds.forget_ended()
        taps = _taps(options, required=True)
        for tap in taps:
            try:
                plan = make_plan(tap)
                program_id = None if options.dry_run else execute.execute(plan)
            except QsteerError as error:
                if len(taps) == 1:
                    raise
                failures.append(error)
                hint = f" (hint: {error.hint})" if error.hint else ""
                print(printable(f"qsteer: {error}{hint}"), file=sys.stderr)
                continue
            documents.append(render.plan_json(plan, program_id))
            if not options.json:
                text = render.plan_text(plan) if program_id is None else render.done_text(plan, program_id)
                _print(options, text)
    if options.json:
        print(render.document(schema, documents, pretty=options.pretty))
    return failures[0].exit_code if failures else 0


def _wanted(options: argparse.Namespace) -> "Wanted":
    from qsteer.model import Source
    from qsteer.plan import Wanted

    static = _static(options)
    if static and options.source == "shared-maps":
        raise UsageError("--source shared-maps takes the guest's configuration, not one of yours")
    source = None if options.source == "auto" else Source(options.source)
    return Wanted(
        source=Source.STATIC if static else source, static=static, replace=options.replace, force=options.force
    )


def _static(options: argparse.Namespace) -> "Static":
    from qsteer import rss
    from qsteer.plan import Static

    given = Static() if options.from_file is None else _from_file(options.from_file)
    key, types, table, unclassified = given.key, given.types, given.table, given.unclassified_queue
    if options.key and options.key.lower() == "random":
        import secrets

        key = secrets.token_bytes(rss.KEY_BYTES)
    elif options.key is not None:
        key = rss.parse_key(options.key)
    if options.types is not None:
        types = rss.parse_hash_types(options.types)
    if options.table is not None:
        table = _numbers("--table", options.table)
    elif options.equal is not None:
        table = rss.equal_table(_number("--equal", options.equal))
    elif options.weight is not None:
        table = rss.weighted_table(_numbers("--weight", options.weight))
    if options.unclassified_queue is not None:
        unclassified = _number("--unclassified-queue", options.unclassified_queue)
    # Refuses what no tap can have, before any tap is looked at.
    rss.RssConfig(
        types=types or rss.BASE_TYPES,
        key=key or bytes(rss.KEY_BYTES),
        table=table or (0,),
        unclassified_queue=unclassified or 0,
    )
    return Static(types=types, key=key, table=table, unclassified_queue=unclassified)


def _from_file(name: str) -> "Static":
    from pathlib import Path

    from qsteer import ethtool
    from qsteer.errors import from_errno
    from qsteer.plan import Static

    try:
        # A descriptor of our own: sys.stdin is None where the caller has closed it.
        with open(0, "rb", closefd=False) if name == "-" else Path(name).open("rb") as file:
            text = file.read(ethtool.TEXT_MAX + 1).decode(errors="replace")
    except OSError as error:
        raise from_errno(error.errno or 0, f'cannot read "{name}"') from None
    parsed = ethtool.parse(text)
    return Static(types=parsed.types, key=parsed.key, table=parsed.table, unclassified_queue=parsed.unclassified_queue)


def _run(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from qsteer import render, run

    argv = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not argv:
        raise UsageError("no QEMU command line", hint="qsteer run --tap id=net0,queues=4 -- qemu-system-x86_64 ...")
    if options.json and not options.dry_run:
        raise UsageError("run prints JSON for a dry run only", hint="qsteer run -n -j ...")
    rehearsal = run.run(
        vm=options.vm,
        taps=options.tap,
        user=options.user,
        dry_run=options.dry_run,
        quiet=options.quiet,
        command=argv,
    )
    if options.json:
        print(render.json_text({"schema": "qsteer.run/1", **asdict(rehearsal)}, pretty=options.pretty))
    else:
        _print(options, str(rehearsal))
    return 0
