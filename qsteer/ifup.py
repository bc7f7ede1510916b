# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer-ifup`` and ``qsteer-ifdown``: for QEMU's ``-netdev tap,script=...,downscript=...``.

Theory of operation
===================

QEMU runs ``qsteer-ifup TAP`` as its child, with its own rights, when the tap has its first queue, and waits for it
without a limit.  The queue's fd is inherited, so that nobody else's process has to be reached.  The tap is steered
before it is set up; what can be attached at this moment is told in ``ifupplan``.

What fails is said on stderr, which is QEMU's, and fails the start only where it is ``required``: a VM may be of use
without its steering, or to who adds its tap to the bridge by hand.  A step that fails is undone, and the one before it,
too, if the start fails; that matters on a tap that is persistent, any other goes with QEMU.  A configuration with a
mistake is left out, as if there were none.

No step waits for long: LOCK_S for another qsteer, ``others.VERSION_S`` for ``QEMU --version``, and the kernel.

``qsteer-ifdown TAP`` is run when the netdev goes, with the first queue still open.  A tap that is persistent loses what
qsteer attached, and leaves the bridge that qsteer-ifup put it into.  It fails nothing: QEMU does not listen any more.

There is no privilege here to be misled about: who lies about a tap or about a QEMU has the rights of this process.
"""

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from qsteer import execute, hashing, holds, kernel, marks, namespaces, others, procs, programs, runplan
from qsteer.attached import tap_of
from qsteer.errors import ConflictError, NotFoundError, QsteerError, UnsupportedError, UsageError, printable
from qsteer.ifupplan import Behind, Decision, behind, decide, needs_version, warning
from qsteer.model import Engine, Kind, Nic, OpenQueue, Process, Source, Tap, VnetHash
from qsteer.plan import ClearRss, Plan, SetRss, Wanted, describe, plan_apply, take_off
from qsteer.rss import NO_TYPES
from qsteer.settings import Settings

if TYPE_CHECKING:
    from qsteer.links import Link

LOCK_S = 5.0

_ANCESTORS_MAX = 5
"""Between QEMU and this there may be a user's own script."""
_QUEUES_LEAST = 2
"""What a multi-queue tap is going to have at least, where QEMU's command line does not tell."""

log = logging.getLogger(__name__)


def main_up() -> int:
    """``qsteer-ifup``; gives the exit code: QEMU starts with 0 only."""
    return _main("qsteer-ifup", "Steers the tap of a QEMU that starts, and sets it up (-netdev tap,script=...).", _up)


def main_down() -> int:
    """``qsteer-ifdown``; gives the exit code, 0 but for wrong calls."""
    return _main(
        "qsteer-ifdown", "Undoes on a persistent tap what qsteer-ifup did (-netdev tap,downscript=...).", _down
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def _main(program: str, text: str, act: Callable[[argparse.Namespace], None]) -> int:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(f"{program}: %(message)s"))
    logger = logging.getLogger("qsteer")
    logger.addHandler(handler)
    try:
        options = parser(program, text).parse_args()
        logger.setLevel(logging.ERROR if options.quiet else logging.INFO if options.verbose else logging.WARNING)
        act(options)
    except QsteerError as error:
        _say(error)
        return error.exit_code
    except OSError as error:
        log.error("%s", error.strerror or error)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parser(program: str, text: str) -> argparse.ArgumentParser:
    """The options of both."""
    made = _Parser(prog=program, description=text, allow_abbrev=False)
    made.add_argument("tap", metavar="IFNAME", help="the tap's name, as QEMU gives it")
    made.add_argument("--bridge", metavar="BR", help="the bridge; default: that of the configuration, or none")
    if program == "qsteer-ifup":
        made.add_argument(
            "--required", action="store_true", help="fail, and with it QEMU's start, if it is not steered"
        )
    made.add_argument("-v", "--verbose", action="store_true", help="say what is done")
    made.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    return made


def _say(error: QsteerError, what: str = "") -> None:
    """One line, and a hint."""
    log.error("%s", printable(f"{what}{error}"))
    if error.hint and sys.stderr:
        with contextlib.suppress(OSError):
            print(f"hint: {printable(error.hint)}", file=sys.stderr, flush=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """What a call is about: a tap, the fd of its queue, and the QEMU that runs the script."""

    tap: str
    fd: int
    qemu: Process
    behind: Behind | None


def _call(tap: str) -> _Call:
    """Raises UsageError on a name that is none and outside of a QEMU, NotFoundError without an inherited queue."""
    if not tap:
        raise UsageError("an empty name is not a network device name")
    runplan.device_name("IFNAME", tap)
    fd = _inherited(tap)
    qemu = _qemu_above()
    assert qemu.args
    return _Call(tap=tap, fd=fd, qemu=qemu, behind=behind(qemu.args, tap))


def _inherited(tap: str) -> int:
    for fd in sorted(procs.open_files(os.getpid()).queues):
        with contextlib.suppress(QsteerError):
            if kernel.tap_name(fd) == tap:
                return fd
    raise NotFoundError(
        f'no open queue of tap "{tap}" was inherited: this is for QEMU to run',
        hint="-netdev tap,script=...; qsteer apply steers a VM that runs",
    )


def _qemu_above() -> Process:
    """The QEMU that runs this, or that runs the script which does."""
    pid = os.getppid()
    for _ in range(_ANCESTORS_MAX):
        process = procs.read(pid)
        if process and process.args:
            return process
        pid = _parent_of(pid)
    raise UsageError("this is not run by a QEMU", hint="-netdev tap,script=...")


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(b"PPid:"):
                return int(line.split()[1])
    return 0


def _settings(call: _Call, bridge: str | None) -> Settings:
    """What is configured for this NIC; ``bridge`` is that of --bridge, None without one.  Raises QsteerError."""
    from qsteer import config

    configured = config.load()
    known = call.behind

    def settings(joined: str | None) -> Settings:
        return configured.settings(
            vm=_vm_name(call.qemu),
            nics=known.ids if known else (),
            mac=known.mac if known else None,
            dev=call.tap,
            bridge=joined,
        )

    # Which bridge it joins may be configured, too.
    joins = settings(None).bridge if bridge is None else bridge
    return replace(settings(joins or None), bridge=joins)


def _vm_name(qemu: Process) -> str | None:
    return (qemu.args.name or qemu.args.uuid) if qemu.args else None


def _up(options: argparse.Namespace) -> None:
    call = _call(options.tap)
    try:
        settings = _settings(call, options.bridge)
    except QsteerError as error:
        if options.required:
            raise
        _say(error, "the configuration is left out: ")
        settings = Settings(bridge=options.bridge)
    required = options.required or bool(settings.required)
    asks = needs_version(call.behind)
    in_kernel = (asks or call.behind is None) and _in_kernel(call, settings)
    asks = asks and not in_kernel
    asking = others.asked_for_version(call.qemu.pid) if asks else contextlib.nullcontext()
    with asking as asked, contextlib.ExitStack() as undo:
        with _may_fail(f"{call.tap} is not steered: ", undo, required=required) as step:
            decision = decide(call.behind, others.version(asked), in_kernel=in_kernel)
            _steer(call, decision, settings, step, required=required)
        with _may_fail(f"{call.tap} is not set up: ", undo, required=required) as step:
            _set_up(call, settings.bridge or "", settings.mtu, step)
        undo.pop_all()


def _wanted(settings: Settings) -> Wanted:
    engine = settings.engine if isinstance(settings.engine, Engine) else None
    return Wanted(source=Source.STATIC, engine=engine, static=settings.static)


def _in_kernel(call: _Call, settings: Settings) -> bool:
    """Whether tun itself is going to steer.  What fails here fails in ``_attach``, too, and is told there."""
    if isinstance(settings.engine, Engine):
        return settings.engine is Engine.KERNEL
    try:
        return plan_apply(_tap(call, _queue(call)), _wanted(settings)).engine is Engine.KERNEL
    except QsteerError:
        return False


@contextlib.contextmanager
def _may_fail(what: str, undo: contextlib.ExitStack, *, required: bool) -> Iterator[contextlib.ExitStack]:
    """A step that is undone where it fails, which is said, and raised if it is required; and by ``undo`` later on."""
    with contextlib.ExitStack() as step:
        try:
            yield step
        except QsteerError as error:
            if required:
                raise
            _say(error, what)
            return
        undo.push(step.pop_all())


def _steer(
    call: _Call,
    decision: Decision,
    settings: Settings,
    undo: contextlib.ExitStack,
    *,
    required: bool,
) -> None:
    """Attach what stays attached, and say what does not.  Raises QsteerError."""
    if not decision.attach and not decision.lost:
        log.info("%s: one queue, there is nothing to steer", printable(call.tap))
    if decision.attach and not _attach(call, settings, undo):
        return
    if decision.lost:
        vm = _vm_name(call.qemu)
        keep_pid = others.keep_of((vm,) if vm else ())
        told = f"{call.tap}: {warning(decision, keep_pid)}"
        if required and not decision.attach and not keep_pid:
            raise UnsupportedError(f"{told}; steering is required")
        log.warning("%s", printable(told))


def _attach(call: _Call, settings: Settings, undo: contextlib.ExitStack) -> bool:
    """Whether it is steered now: not where there is one queue, or a hold.  Raises QsteerError."""
    name = printable(call.tap)
    with execute.lock(LOCK_S):
        queue = _queue(call)
        if not queue.multi_queue:
            log.info("%s: one queue, there is nothing to steer", name)
            return False
        hold = holds.find(netns=queue.netns, ifindex=queue.ifindex)
        if hold and hold.is_of(call.qemu.pid):
            log.warning("%s: nothing attached: qsteer off holds it off, until qsteer apply", name)
            return False
        plan = plan_apply(_tap(call, queue), _wanted(settings))
        before = undo.enter_context(programs.program_by_id(queue.program_id)) if queue.program_id else None
        mark = marks.file(netns=queue.netns, ifindex=queue.ifindex).stored()
        program_id = execute.execute(plan)
        for step in plan.steps:  # to be undone the other way round: either may refuse the other
            if isinstance(step, SetRss | ClearRss):
                undo.callback(_put_rss_back, call.fd, plan.tap, step.rss if isinstance(step, SetRss) else None, mark)
            else:
                undo.callback(_put_program_back, call.fd, before)
    by = "in-kernel RSS" if plan.engine is Engine.KERNEL else f"program {program_id}"
    for told in (f"{plan.result}, {by}", *plan.notes):
        log.info("%s: %s", name, printable(told))
    return True


def _put_program_back(queue_fd: int, before: int | None) -> None:
    with contextlib.suppress(QsteerError):  # why the start fails has been said
        if before is None:
            kernel.detach(queue_fd)
        else:
            kernel.attach(queue_fd, before)


def _put_rss_back(queue_fd: int, tap: Tap, rss: VnetHash | None, mark: bytes | None) -> None:
    """From ``rss`` back to what tun hashed by, and whose that was, unless something else has been set since."""
    before, generation = tap.vnet_hash, tap.hashing.generation
    with contextlib.suppress(QsteerError):
        found = hashing.of_taps((kernel.queue_of(queue_fd),)).get((tap.netns, tap.ifindex))
        if not generation or marks.digest(found) != marks.digest(rss):
            return
        if before and before.config:
            hashing.set_rss(queue_fd, generation, before.config, report=before.report)
        else:
            types = before.types if before and before.report else NO_TYPES
            hashing.set_automq(queue_fd, generation, types)
        marks.file(netns=tap.netns, ifindex=tap.ifindex).restore(mark)


def _queue(call: _Call) -> OpenQueue:
    """The kernel's word on the inherited queue.  Raises QsteerError."""
    queue = kernel.queue_of(call.fd)
    if queue.netns != namespaces.own():
        raise UnsupportedError(f'tap "{call.tap}" is in another network namespace than this process')
    return queue


def _tap(call: _Call, queue: OpenQueue) -> Tap:
    """The tap with all queues that it is going to have."""
    known = call.behind
    nic = Nic(id=None, netdev=None, mac=known.mac, rss=bool(known.rss), vhost=known.vhost) if known else None
    active = max(queue.active, known.queues if known else _QUEUES_LEAST)
    return replace(tap_of(queue), active=active, holder=call.qemu, nic=nic)


def _look_at_link(tap: str, bridge: str) -> "tuple[Link, Link | None]":
    """The tap, and the bridge that it is to join.  Raises QsteerError."""
    from qsteer import links

    port_of = links.bridge(bridge) if bridge else None
    link = links.find(tap)
    if link is None or link.kind != "tun":
        raise NotFoundError(f'there is no tap "{tap}" in this network namespace')
    if port_of and link.bridge_index not in (None, port_of.index):
        raise QsteerError(
            f'cannot add {tap} to bridge "{bridge}": it is in another one', hint=f"ip link set {tap} nomaster"
        )
    return link, port_of


def _set_up(call: _Call, bridge: str, mtu: int | None, undo: contextlib.ExitStack) -> None:
    """MTU, the bridge, and up.  Raises QsteerError."""
    from qsteer import links

    link, port_of = _look_at_link(call.tap, bridge)
    mac = None
    if port_of:
        guests = call.behind.mac if call.behind else None
        # The tap's own one differs from the guest's already, and only has to be high.
        mac = links.bridge_port_mac(guests) if guests else f"fe{link.mac[2:]}"
        mtu = mtu or port_of.mtu
    undo.callback(_put_link_back, link)
    links.configure(call.tap, mac=mac, mtu=mtu, bridge_index=port_of.index if port_of else None)
    where = f"bridge {port_of.name}" if port_of else "no bridge"
    log.info("%s", printable(f"{call.tap}: up, in {where}, MTU {mtu or link.mtu}"))


def _put_link_back(link: "Link") -> None:
    """What a failed step leaves of a tap that outlives QEMU."""
    from qsteer import links

    with contextlib.suppress(QsteerError):
        links.configure(link.name, mac=link.mac, mtu=link.mtu, bridge_index=link.bridge_index or 0, up=link.up)


def _down(options: argparse.Namespace) -> None:
    call = _call(options.tap)
    try:
        if not _queue(call).persistent:
            log.info("%s: not persistent, it goes with QEMU", printable(call.tap))
            return
    except QsteerError as error:
        _say(error, f"{call.tap}: ")
    for undo in (_take_off, lambda call: _leave_bridge(call, options.bridge)):
        try:
            undo(call)
        except QsteerError as error:
            _say(error, f"{call.tap}: ")


def _take_off(call: _Call) -> None:
    """Take qsteer's program off, and forget the hold.  Raises QsteerError."""
    with execute.lock(LOCK_S):
        queue = _queue(call)
        holds.remove(netns=queue.netns, ifindex=queue.ifindex)
        tap = _tap(call, queue)
        if tap.steering and tap.steering.kind is not Kind.QSTEER:
            program = f"program {tap.program_id}" if tap.program_id else "in-kernel RSS"
            told = describe(tap.program) if tap.program else program
            raise ConflictError(f"{told} is not known to be qsteer's, and stays")
        if steps := take_off(tap):
            execute.execute(Plan(tap=tap, steps=steps, result="off", source=None, program_id=0))
            log.info("%s: %s", printable(call.tap), "; ".join(map(str, steps)))


def _leave_bridge(call: _Call, bridge: str | None) -> None:
    """Raises QsteerError."""
    from qsteer import links

    name = _settings(call, bridge).bridge if bridge is None else bridge
    link, port_of = links.find(call.tap), links.find(name) if name else None
    if link and port_of and link.bridge_index == port_of.index:
        links.configure(call.tap, bridge_index=0)
        log.info("%s", printable(f"{call.tap}: out of bridge {port_of.name}"))
