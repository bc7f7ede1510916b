# SPDX-License-Identifier: BSD-2-Clause
"""What a parsed command line means: selections, configurations, what ``apply`` is wanted to do."""

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from qsteer import ethtool, rss
from qsteer.errors import UsageError, from_errno
from qsteer.model import Engine, Source
from qsteer.plan import Static
from qsteer.readings import Manner
from qsteer.selection import Selection
from qsteer.settings import AUTO, Settings

if TYPE_CHECKING:
    from qsteer.intent import Intent
    from qsteer.reach import Reach

_REVISION = re.compile("[0-9a-f]{12}")


def selection(options: argparse.Namespace, *, required: bool) -> Selection:
    """The selectors; a socket given with --qmp selects the VM that serves it.  Raises UsageError without any."""
    chosen = Selection(
        vms=tuple(options.vm),
        pids=(*options.pid, *_served_by(options.qmp)),
        taps=tuple(options.dev),
        nics=tuple(options.nic),
        macs=tuple(options.mac),
        namespaces=tuple(options.netns),
        every=bool(options.all),
    )
    if required and not chosen:
        raise UsageError("which taps?", hint="--vm, --pid, --dev, --nic, --mac, --netns, --qmp or --all")
    return chosen


def _served_by(path: str | None) -> tuple[int, ...]:
    from qsteer import peer

    return () if path is None else (peer.server_of(path),)


def one_vm(options: argparse.Namespace) -> "Reach":
    """The VM that ``plug`` and ``unplug`` are about, and how to talk to it.  Raises QsteerError."""
    from qsteer import reach

    if options.qmp is not None:
        return reach.at_socket(options.qmp)
    return reach.of_process(options.pid) if options.pid is not None else reach.of_name(options.vm)


def settings(options: argparse.Namespace) -> Settings:
    """What the options of ``apply`` and ``keep`` say, over any configuration.  Raises UsageError."""
    given = static(options)
    engine: Engine | Literal["auto"] | None = None
    if options.engine is not None:
        engine = AUTO if options.engine == AUTO else Engine(options.engine)
    if options.hash_report and engine is Engine.EBPF:
        raise UsageError("--hash-report takes the kernel engine: a program cannot report a hash")
    source: Source | Literal["auto"] | None = None
    if options.source is not None:
        source = AUTO if options.source == AUTO else Source(options.source)
    if given and source not in (None, AUTO, Source.STATIC):
        raise UsageError(f"--source {source} takes the guest's configuration, not one of yours")
    return Settings(
        source=Source.STATIC if given else source,
        engine=engine,
        hash_report=options.hash_report,
        static=given,
        allow=options.allow,
        replace=options.replace,
        force=options.force,
    )


def intent(options: argparse.Namespace, given: Settings, *, lenient: bool = False) -> "Intent":
    """What ``apply`` and ``keep`` are asked for, by options over the configuration.  Raises UsageError."""
    from qsteer.intent import Intent

    other = given.static or given.source not in (None, AUTO) or given.engine not in (None, AUTO) or given.hash_report
    if options.refresh and (other or options.save):
        raise UsageError(
            "--refresh keeps the configuration: no source, no engine, no configuration and no --save go with it"
        )
    return Intent(
        given,
        if_absent=options.if_absent,
        expect=expected(options),
        refresh=options.refresh,
        identify=options.save,
        lenient=lenient,
    )


def manner(options: argparse.Namespace) -> Manner:
    """How guests are asked."""
    return Manner(qmp=options.qmp, turn_s=options.timeout, answer_s=options.timeout)


def expected(options: argparse.Namespace) -> str | None:
    """The revision of --expect.  Raises UsageError if it is none."""
    expect: str | None = options.expect
    if expect is not None and not _REVISION.fullmatch(expect):
        raise UsageError(f'--expect: "{expect}" is not a revision', hint="twelve digits, from qsteer status -j")
    return expect


def may_pause(options: argparse.Namespace) -> bool:
    """Whether --allow names ``pause``."""
    return "pause" in (options.allow or ())


def static(options: argparse.Namespace) -> Static:
    """The operator's own configuration, of --from and the options that go over it.  Raises UsageError."""
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
        table = rss.parse_numbers("--table", options.table)
    elif options.equal is not None:
        table = rss.equal_table(rss.parse_number("--equal", options.equal))
    elif options.weight is not None:
        table = rss.weighted_table(rss.parse_numbers("--weight", options.weight))
    if options.unclassified_queue is not None:
        unclassified = rss.parse_number("--unclassified-queue", options.unclassified_queue)
    # Refuses what no tap can have, before any tap is looked at.
    rss.RssConfig(
        types=types or rss.BASE_TYPES,
        key=key or bytes(rss.KEY_BYTES),
        table=table or (0,),
        unclassified_queue=unclassified or 0,
    )
    return Static(types=types, key=key, table=table, unclassified_queue=unclassified)


def _from_file(name: str) -> Static:
    try:
        # A descriptor of our own: sys.stdin is None where the caller has closed it.
        with open(0, "rb", closefd=False) if name == "-" else Path(name).open("rb") as file:
            text = file.read(ethtool.TEXT_MAX + 1).decode(errors="replace")
    except OSError as error:
        raise from_errno(error.errno or 0, f'cannot read "{name}"') from None
    parsed = ethtool.parse(text)
    return Static(types=parsed.types, key=parsed.key, table=parsed.table, unclassified_queue=parsed.unclassified_queue)
