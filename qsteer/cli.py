# SPDX-License-Identifier: BSD-2-Clause
"""The command line's grammar.  What a verb needs is imported when it runs (``verbs``)."""

import argparse
import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from qsteer import __version__
from qsteer.errors import UsageError

_EXIT_CODES = """exit codes: 0 done, 1 failed, 2 usage, 3 no such VM, tap or bridge, 4 permission, 5 unsupported here,
6 conflict with a foreign program, 7 difference found (status --check only), 8 busy, try again"""


SERVICE_HELP = "qsteer serve's socket, which makes the taps (without CAP_NET_ADMIN: /run/qsteer/serve.sock)"
SOURCES = ("auto", "shared-maps", "qemu-maps", "device-state", "guest-agent", "static")


ENGINES = ("auto", "ebpf", "kernel")
ENGINE_HELP = "what steers: a program, or tun itself, where the kernel can; auto is what is best"


class _Parser(argparse.ArgumentParser):
    """argparse with qsteer's way of failing, and without abbreviations, which later options would break."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def command(argv: Sequence[str]) -> int:
    """Run one command line; gives the exit code.  Raises QsteerError."""
    options = parser().parse_args(argv)
    if "json" in options:
        options.json = options.json or options.pretty
    _set_up_logging(options.verbose)
    from qsteer import verbs

    return int(getattr(verbs, options.verb)(options))


def _set_up_logging(verbose: int) -> None:
    """qsteer's own loggers only: what its libraries have to say is about themselves."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("qsteer: %(message)s"))
    logger = logging.getLogger("qsteer")
    logger.addHandler(handler)
    logger.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])


def parser() -> argparse.ArgumentParser:
    """The whole grammar."""
    common = _Parser(add_help=False)
    common.add_argument("-v", "--verbose", action="count", default=0, help="say more (repeatable)")
    common.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    output = _Parser(add_help=False)
    output.add_argument("-j", "--json", action="store_true", help="print JSON")
    output.add_argument("-p", "--pretty", action="store_true", help="print indented JSON")
    change = _Parser(add_help=False)
    change.add_argument("-n", "--dry-run", action="store_true", help="print what would be done, change nothing")

    top = _Parser(
        prog="qsteer",
        description="Decides which queue of a virtual machine's NIC every packet lands on.",
        epilog=_EXIT_CODES,
    )
    top.add_argument("--version", action="version", version=f"qsteer {__version__}")
    verbs = top.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str, *parents: _Parser) -> _Parser:
        added: _Parser = verbs.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            parents=[common, *parents],
            epilog=_EXIT_CODES,
        )
        added.set_defaults(verb=name)
        return added

    select = _Parser(add_help=False)
    group = select.add_argument_group("selectors (kinds AND, repeats OR)")
    group.add_argument("--vm", action="append", default=[], metavar="NAME|UUID", help="a VM's name or UUID")
    group.add_argument("--pid", action="append", default=[], type=_pid, metavar="PID", help="a QEMU's process id")
    group.add_argument("--dev", action="append", default=[], metavar="TAP", help="a tap's name")
    group.add_argument("--nic", action="append", default=[], metavar="ID|ALIAS", help="a NIC's or netdev's id")
    group.add_argument("--mac", action="append", default=[], metavar="MAC", help="the guest's address of a NIC")
    group.add_argument("--netns", action="append", default=[], metavar="NS", help="a network namespace's name or path")
    group.add_argument("--all", action="store_true", help="every tap of a VM that has several queues")
    group.add_argument("--qmp", metavar="PATH", help="the VM that serves this QMP socket, reached through it")

    allow = _Parser(add_help=False)
    text = "what qsteer may do to a VM: pause (device-state stops it for a moment)"
    allow.add_argument("--allow", type=_allowed, metavar="pause", help=text)
    desired = _Parser(add_help=False)
    # None is what the configuration says.
    text = "default: what the configuration says, else auto, the best that works"
    desired.add_argument("--source", choices=SOURCES, help=text)
    desired.add_argument("--engine", choices=ENGINES, help=ENGINE_HELP)
    text = "tell the guest the hash of each packet (engine kernel, where the guest has negotiated it)"
    desired.add_argument("--hash-report", action=argparse.BooleanOptionalAction, help=text)
    text = "take a foreign program, or QEMU's own, off"
    desired.add_argument("--replace", action="store_true", default=None, help=text)
    text = "attach even where QEMU undoes it in software"
    desired.add_argument("--force", action="store_true", default=None, help=text)
    patience = _Parser(add_help=False)
    text = "wait so long for another qsteer, and for what a VM answers (5 s)"
    patience.add_argument("--timeout", type=_seconds, default=5.0, metavar="S", help=text)
    expect = _Parser(add_help=False)
    expect.add_argument("--expect", metavar="REV", help="only if the tap is still at this revision (status -j)")

    added = verb("status", "show every tap, and what the kernel says steers it", select, allow, patience, output)
    added.add_argument("--check", action="store_true", help="ask the guests, too; exit code 7 on a difference")
    added = verb("show", "show types, key and table, read back from the kernel's maps", select, allow, patience, output)
    added.add_argument("--source", choices=("device-state", "guest-agent"), help="the guest's own, read by this source")

    added = verb("apply", "steer the taps of a VM that runs", select, desired, allow, expect, patience, change, output)
    _add_static(added)
    added.add_argument("--if-absent", action="store_true", help="only where no program is attached")
    added.add_argument(
        "--refresh", action="store_true", help="swap a program of another version of qsteer for this one's"
    )

    text = "store these options for the VM and NIC in /etc/qsteer/conf.d"
    added.add_argument("--save", action="store_true", help=text)

    text = "stop steering (QEMU may attach a program that it was given again)"
    off = verb("off", text, select, expect, patience, change, output)
    off.add_argument("--replace", action="store_true", help="take even a foreign program, or QEMU's own, off")

    added = verb(
        "keep", "keep taps steered, whatever QEMU and guests do (a daemon)", select, desired, allow, patience, output
    )
    added.set_defaults(if_absent=False, expect=None, refresh=False, save=False)
    _add_static(added)
    added.add_argument(
        "--reread", type=_seconds, default=60.0, metavar="S", help="ask guests again this often; 0: never (60 s)"
    )
    verb("monitor", "print what happens to taps, change nothing", select, output)
    serve = verb("serve", "hand out taps and programs to users without root, as configured (a daemon)")
    serve.add_argument("--socket", metavar="PATH", help="listen here (/run/qsteer/serve.sock; or systemd's socket)")
    verb("clean", "remove what no tap uses any more from the host", patience, change, output)

    run = verb("run", "start QEMU with taps that are steered as the guest asks", change, output)
    run.usage = (
        "qsteer run [--vm NAME] --tap id=ID,queues=N[,...] [--user USER] [--service PATH] -- QEMU [ARGUMENT ...]"
    )
    run.add_argument("--vm", metavar="NAME", help="the VM's name; default: QEMU's -name")
    run.add_argument(
        "--tap",
        action="append",
        default=[],
        required=True,
        metavar="id=ID,queues=N[,ifname=][,bridge=][,mac=][,mtu=][,vhost=auto|on|off][,rss=auto|on|off]",
        help="a NIC and its tap (repeatable)",
    )
    run.add_argument("--user", metavar="USER", help="who QEMU runs as (as root: must be given)")
    text = f"{ENGINE_HELP}; kernel steers by a table of the host's, and offers the guest no RSS"
    run.add_argument("--engine", choices=ENGINES, help=text)
    run.add_argument("--service", metavar="PATH", help=SERVICE_HELP)
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- QEMU ARGUMENT", help="QEMU's command line")

    one_vm = _Parser(add_help=False)
    which = one_vm.add_mutually_exclusive_group(required=True)
    which.add_argument("--vm", metavar="NAME|UUID", help="a VM's name or UUID")
    which.add_argument("--pid", type=_pid, metavar="PID", help="a QEMU's process id")
    which.add_argument("--qmp", metavar="PATH", help="the VM that serves this QMP socket")
    added = verb("plug", "plug a NIC that is steered as the guest asks into a VM that runs", one_vm, change, output)
    added.add_argument(
        "--tap",
        action="append",
        required=True,
        metavar="id=ID,queues=N[,...]",
        help="the NIC and its tap, as for run",
    )
    text = "QEMU's bus to plug it into; default: the first that is free"
    added.add_argument("--bus", type=_bus, metavar="ID", help=text)
    added.add_argument("--service", metavar="PATH", help=SERVICE_HELP)
    added = verb("unplug", "take a NIC off a VM that runs, with its tap", one_vm, change, output)
    added.add_argument("--nic", required=True, metavar="ID|ALIAS", help="the id of the NIC or of its netdev")
    text = "how long the guest may take to let it go (30 s)"
    added.add_argument("--timeout", type=_seconds, default=30.0, metavar="S", help=text)
    config = verbs.add_parser("config", help="check the configuration", description="Check the configuration.")
    nouns = config.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)
    text = "find every mistake in the configuration, or in files"
    check = nouns.add_parser(
        "check", help=text, description=f"{text.capitalize()}.", parents=[common, output], epilog=_EXIT_CODES
    )
    check.add_argument("file", nargs="*", metavar="FILE", help="default: those of /etc/qsteer (QSTEER_CONFIG)")
    check.set_defaults(verb="config_check")
    _add_libvirt(verbs, common, change, output)
    return top


def _add_libvirt(verbs: Any, common: _Parser, change: _Parser, output: _Parser) -> None:
    noun = verbs.add_parser(
        "libvirt", help="libvirt's hook, and the policies in its domains", description="For hosts with libvirt."
    )
    nouns = noun.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, text: str, *parents: _Parser) -> _Parser:
        added: _Parser = nouns.add_parser(
            name, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[common, *parents], epilog=_EXIT_CODES
        )
        added.set_defaults(verb=f"libvirt_{name}")
        return added

    added = verb("install", "have libvirt call qsteer when domains start (hooks/qemu.d)", change)
    added.add_argument("--uninstall", action="store_true", help="take the hook away again")
    verb("uninstall", "take the hook away again", change)

    domain = _Parser(add_help=False)
    domain.add_argument("domain", metavar="DOMAIN", help="its name or UUID")
    domain.add_argument("--connect", metavar="URI", help="as for virsh")
    verb("show", "show what a domain's policy, and the configuration, want of its NICs", domain, output)

    added = verb("set", "change the policy in a domain's metadata", domain, change, output)
    which = added.add_mutually_exclusive_group()
    which.add_argument("--nic", metavar="ALIAS", help="of this NIC; default: of every NIC")
    which.add_argument("--mac", type=_mac, metavar="MAC", help="of the NIC with this address")
    added.add_argument("--source", choices=SOURCES, help="where the configuration comes from")
    added.add_argument("--engine", choices=ENGINES, help=ENGINE_HELP)
    _add_static(added)
    text = "what qsteer may do to the VM, if the configuration lets policies ask for it"
    added.add_argument("--allow", type=_allowed, metavar="pause", help=text)
    need = added.add_mutually_exclusive_group()
    text = "no steering, no start"
    need.add_argument("--required", action="store_true", default=None, help=text)
    need.add_argument("--best-effort", dest="required", action="store_false", help="start without it, too")
    added.add_argument("--clear", action="store_true", help="take what it says away")
    added.set_defaults(replace=None, force=None, hash_report=None)


def _add_static(parser: _Parser) -> None:
    static = parser.add_argument_group("a configuration of yours (implies --source static)")
    static.add_argument("--key", metavar="HEX|random", help="40 bytes, 6d:5a:...; the attached one stays by default")
    static.add_argument("--types", metavar="TYPE,...", help="tcp4,udp4,ip4,tcp6,udp6,ip6,tcp-ex,udp-ex,ip-ex")
    table = static.add_mutually_exclusive_group()
    table.add_argument("--table", metavar="Q,Q,...", help="the table itself, a power of two of entries, at most 128")
    table.add_argument("--equal", metavar="N", help="spread over the first N queues")
    table.add_argument("--weight", metavar="W,W,...", help="spread over the first queues, by weight")
    table.add_argument("--from", dest="from_file", metavar="FILE|-", help="what ethtool -x or qsteer show printed")
    static.add_argument("--unclassified-queue", metavar="N", help="for packets that no hash type matches")


def _pid(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 22:
        raise argparse.ArgumentTypeError(f'"{text}" is not a process id')
    return int(text)


def _mac(text: str) -> str:
    from qsteer.selection import Selection

    try:
        return Selection(macs=(text,)).macs[0]
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _bus(text: str) -> str:
    if not 0 < len(text) <= 255 or not text.isprintable():
        raise argparse.ArgumentTypeError(f'"{text}" is not the id of a bus')
    return text


def _allowed(text: str) -> tuple[str, ...]:
    allowed = tuple(text.split(","))
    if any(what != "pause" for what in allowed):
        raise argparse.ArgumentTypeError(f'"{text}" is not "pause"')
    return allowed


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds between 0 and 3600')
    return seconds
