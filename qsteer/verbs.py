# SPDX-License-Identifier: BSD-2-Clause
"""What the verbs do with a parsed command line: fetch, compute, execute, print.  Each gives the exit code."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from qsteer import inventory, options, readings, render
from qsteer.errors import PermissionDeniedError, QsteerError, UsageError, printable
from qsteer.model import Inventory, Nic, Source, Tap
from qsteer.plan import Plan, plan_apply, plan_off
from qsteer.selection import select
from qsteer.state import Agrees, agrees, broken

if TYPE_CHECKING:
    from qsteer.intent import Intent
    from qsteer.saved import File
    from qsteer.settings import Settings

_Place = tuple[int, int, tuple[int, int] | None]

_PIDS_SHOWN = 16

DIFFERENCE = 7
"""The exit code of ``status --check`` where a guest does not get what it asks for."""


def status(given: argparse.Namespace) -> int:
    """Every tap, or those selected.  With --check guests are asked, and a difference is exit code 7."""
    found = _look(given, strict=given.check)
    if given.check:
        found = replace(found, taps=tuple(_checked(given, tap) for tap in found.taps))
    if given.json:
        print(render.json_text(render.status_json(found), pretty=given.pretty))
    else:
        _print(given, render.status_text(found))
        for note in (*found.notes, *(f"{tap.name}: {why}" for tap in found.taps for why in tap.unread)):
            print(f"qsteer: {printable(note)}", file=sys.stderr)
    return DIFFERENCE if given.check and any(_differs(tap) for tap in found.taps) else 0


def _checked(given: argparse.Namespace, tap: Tap) -> Tap:
    return readings.check(tap, options.manner(given), allow_pause=options.may_pause(given))


def _differs(tap: Tap) -> bool:
    return broken(tap) or agrees(tap) is Agrees.NO


def show(given: argparse.Namespace) -> int:
    """The configuration that is attached, or with a source that of the guest itself."""
    found = _look(given, strict=True)
    taps = found.taps
    if given.source:
        if not options.selection(given, required=False):
            raise UsageError("whose configuration?", hint="--vm NAME, --pid PID or --dev TAP")
        source, manner, allow_pause = Source(given.source), options.manner(given), options.may_pause(given)
        taps = tuple(readings.read(tap, source, manner, allow_pause=allow_pause) for tap in taps)
    if given.json:
        documents = [render.show_json(tap) for tap in taps]
        print(render.document("qsteer.show/1", documents, pretty=given.pretty))
    else:
        _print(given, "\n\n".join(render.show_text(tap) for tap in taps) or "no process holds a tap")
    if hidden := [tap for tap in taps if tap.program_id and not tap.program]:
        raise PermissionDeniedError(
            f"cannot look at program {hidden[0].program_id}", hint="it takes CAP_SYS_ADMIN; try sudo"
        )
    return 0


def apply(given: argparse.Namespace) -> int:
    """Steer what is selected."""
    from qsteer import hashing

    settings = options.settings(given)
    intent = options.intent(given, settings)

    nics = _nics(given)
    answers = _ask(given, intent, nics)
    asked = [answer.domain for answer in answers.values() if isinstance(answer, Tap)]
    told = {domain.name: domain.policy.mistakes for domain in asked if domain and domain.policy}
    _warn(*(f"{name}: the domain's policy is left out: {one}" for name, mistakes in told.items() for one in mistakes))

    def make_plan(tap: Tap) -> Plan:
        answer = answers.get(_place(tap), tap)
        if isinstance(answer, QsteerError):
            raise answer
        told = replace(hashing.looked(tap), nic=answer.nic or tap.nic, reading=answer.reading, unread=answer.unread)
        return plan_apply(told, intent(told))

    return _change(given, "qsteer.apply/1", make_plan, nics, _Saving(settings, intent) if given.save else None)


class _Saving:
    """What ``apply --save`` puts into the configuration."""

    def __init__(self, given: "Settings", intent: "Intent") -> None:
        self._given, self._intent = given, intent
        self._saved: list[Tap] = []

    def refuse_several_claimants(self, taps: Sequence[Tap]) -> None:
        """A name on a command line can be forged, and what is saved goes by it.  Raises UsageError."""
        claims = {(tap.vm_name, tap.vm.pid) for tap in inventory.fetch(strict=True).taps if tap.vm}
        for tap in taps:
            pids = sorted(pid for name, pid in claims if name is not None and name == tap.vm_name)
            if len(pids) > 1:
                told = ", ".join(map(str, pids[:_PIDS_SHOWN]))
                raise UsageError(f'"{tap.vm_name}" is the name of several VMs (pids {told}): nothing is saved for it')

    def plan(self, tap: Tap) -> "File":
        """What would be saved.  Raises QsteerError if that cannot be."""
        from qsteer import saved

        return saved.plan(tap, self._given, self._intent.settings(tap))

    def write(self, tap: Tap, file: "File") -> None:
        """Save it.  Raises QsteerError, which says that the tap is steered all the same."""
        from qsteer import saved

        try:
            saved.write(file)
        except QsteerError as error:
            raise QsteerError(f'tap "{tap.name}" is steered, but {error}', hint=error.hint) from None
        self._saved.append(tap)

    def overridden(self) -> list[str]:
        """The taps for which a file that is read later says otherwise.  Raises QsteerError."""
        from qsteer.intent import Intent
        from qsteer.settings import Settings, wanted

        now = Intent(Settings())
        meant = ((tap, wanted(self._intent.settings(tap))) for tap in self._saved)
        return [tap.name for tap, what in meant if wanted(now.settings(tap)) != what]


def _nics(given: argparse.Namespace) -> dict[_Place, Nic]:
    """What QEMUs say of NICs that their command lines do not have, where a NIC or a MAC is selected."""
    selection = options.selection(given, required=True)
    if not (selection.nics or selection.macs):
        return {}
    others, manner = replace(selection, nics=(), macs=()), options.manner(given)
    taps = [tap for tap in inventory.fetch(strict=True).taps if tap.vm and others.matches(tap)]
    return {_place(tap): nic for tap in taps if not selection.matches(tap) and (nic := readings.nic(tap, manner))}


def _selected(given: argparse.Namespace, nics: Mapping[_Place, Nic]) -> tuple[Tap, ...]:
    found = inventory.fetch(strict=True)
    taps = tuple(replace(tap, nic=nics.get(_place(tap), tap.nic)) for tap in found.taps)
    return select(replace(found, taps=taps), options.selection(given, required=True))


def _ask(given: argparse.Namespace, intent: "Intent", nics: Mapping[_Place, Nic]) -> dict[_Place, Tap | QsteerError]:
    """What the guests say, or why they do not: a guest that takes its time must not keep others from the lock."""
    answers: dict[_Place, Tap | QsteerError] = {}
    for tap in _selected(given, nics):
        try:
            answer = readings.complete(tap, (wanted := intent(tap)), options.manner(given))
            if wanted.identify and answer.nic != tap.nic:
                answer = readings.complete(answer, intent(answer), options.manner(given))
            answers[_place(tap)] = answer
        except QsteerError as error:
            answers[_place(tap)] = error
    return answers


def _place(tap: Tap) -> _Place:
    """A tap of one process."""
    return tap.netns, tap.ifindex, (tap.holder.pid, tap.holder.started) if tap.holder else None


def off(given: argparse.Namespace) -> int:
    """Stop steering what is selected."""
    expect = options.expected(given)
    return _change(
        given,
        "qsteer.off/1",
        lambda tap: plan_off(tap, replace_foreign=given.replace, expect=expect),
        _nics(given),
    )


def _look(given: argparse.Namespace, *, strict: bool) -> Inventory:
    """What there is, and of that what is selected; unless ``strict``, what cannot be seen is left to the notes."""
    selection = options.selection(given, required=False)
    found = inventory.fetch(strict=strict)
    if not selection:
        return found
    return selection.narrow(found)


def _change(
    given: argparse.Namespace,
    schema: str,
    make_plan: Callable[[Tap], Plan],
    nics: Mapping[_Place, Nic],
    saving: _Saving | None = None,
) -> int:
    """Fetch, compute, execute, save.  With several taps one that is refused does not stop the others."""
    from qsteer import execute, holds, marks

    failures: list[QsteerError] = []
    documents = []
    with contextlib.nullcontext() if given.dry_run else execute.lock(given.timeout):
        if not given.dry_run:
            holds.forget_ended()
            marks.forget_ended()
        taps = _selected(given, nics)
        if saving:
            saving.refuse_several_claimants(taps)
        for tap in taps:
            try:
                plan = make_plan(tap)
                file = saving.plan(plan.tap) if saving else None
                program_id = None if given.dry_run else execute.execute(plan)
            except QsteerError as error:
                if len(taps) == 1:
                    raise
                failures.append(_tell(error))
                continue
            document = render.plan_json(plan, program_id)
            text = render.plan_text(plan) if program_id is None else render.done_text(plan, program_id)
            if saving and file:
                try:
                    if not given.dry_run:
                        saving.write(plan.tap, file)
                    document["save"] = {"file": str(file.path), "content": file.content}
                    text += "\n" + render.saved_text(file, dry_run=given.dry_run)
                except QsteerError as error:
                    failures.append(_tell(error))
            documents.append(document)
            if not given.json:
                _print(given, text)
    for name in saving.overridden() if saving else ():
        why = "a file that is read later says otherwise: see qsteer config check"
        print(printable(f'qsteer: tap "{name}": what was saved does not count, {why}'), file=sys.stderr)
    if given.json:
        print(render.document(schema, documents, pretty=given.pretty))
    return failures[0].exit_code if failures else 0


def _tell(error: QsteerError) -> QsteerError:
    hint = f" (hint: {error.hint})" if error.hint else ""
    print(printable(f"qsteer: {error}{hint}"), file=sys.stderr)
    return error


def config_check(given: argparse.Namespace) -> int:
    """Every mistake in the configuration, or in files."""
    from qsteer import config

    checked = config.check(given.file)
    if given.json:
        print(render.json_text(render.checked_json(checked), pretty=given.pretty))
    else:
        none = f"no configuration in {printable(str(config.directory()))}"
        if text := render.checked_text(checked) if checked else none:
            _print(given, text)
    mistakes = [mistake for one in checked for mistake in one.mistakes]
    for mistake in mistakes:
        hint = f" (hint: {mistake.hint})" if mistake.hint else ""
        print(printable(f"qsteer: {mistake}{hint}"), file=sys.stderr)
    return UsageError.exit_code if mistakes else 0


def libvirt_install(given: argparse.Namespace) -> int:
    """Put libvirt's hook into its place, or take it away."""
    from qsteer import hookfile

    if given.uninstall:
        return libvirt_uninstall(given)
    if given.dry_run:
        _print(given, f"{hookfile.SCRIPT}:\n{hookfile.text(hookfile.hook())}")
        return 0
    changed = hookfile.install()
    if path := hookfile.not_roots():
        print(f"qsteer: {path} is not root's alone, and libvirt runs it as root: see make install", file=sys.stderr)
    _print(given, f"{hookfile.SCRIPT}: {'written' if changed else 'unchanged'}")
    _print(given, "libvirt looks for hooks when it starts: systemctl restart libvirtd (or virtqemud); domains go on")
    return 0


def libvirt_uninstall(given: argparse.Namespace) -> int:
    """Take libvirt's hook away; domains stay as they are."""
    from qsteer import hookfile

    removed = hookfile.is_installed() if given.dry_run else hookfile.uninstall()
    told = "to be removed" if given.dry_run else "removed; what is steered stays steered"
    _print(given, f"{hookfile.SCRIPT}: {told if removed else 'is not there'}")
    return 0


def libvirt_show(given: argparse.Namespace) -> int:
    """What a domain's policy and the configuration want of its NICs."""
    from qsteer import domains
    from qsteer.virsh import Virsh

    shown = domains.show(Virsh(given.domain, given.connect))
    if given.json:
        print(render.json_text(render.domain_json(shown), pretty=given.pretty))
    else:
        _print(given, render.domain_text(shown))
    told = [f"the domain's policy is left out: {mistake}" for mistake in shown.mistakes]
    _warn(*told, *shown.doubts)
    return UsageError.exit_code if shown.mistakes else 0


def libvirt_set(given: argparse.Namespace) -> int:
    """Change the policy in a domain."""
    from qsteer import domains
    from qsteer.virsh import Virsh

    virsh = Virsh(given.domain, given.connect)
    said = replace(options.settings(given), required=given.required)
    if bool(given.clear) == (said != type(said)()):
        raise UsageError("say what is wanted, or --clear", hint="qsteer libvirt set DOMAIN --equal 4; see --help")
    written = domains.plan_set(virsh, alias=given.nic, mac=given.mac, said=said, clear=given.clear)
    if not given.dry_run:
        domains.write(virsh, written)
    if given.json:
        print(render.json_text(render.written_json(given.domain, written), pretty=given.pretty))
    else:
        _print(given, render.written_text(written))
        if any(one.live for one in written) and not given.dry_run:
            now = "what is attached stays: see qsteer off" if given.clear else f"now: qsteer apply --vm {given.domain}"
            _print(given, f"it counts for qsteer keep, and from the next start on; {now}")
    if not given.dry_run:
        _warn(*domains.show(virsh).doubts)
    return 0


def _warn(*lines: str) -> None:
    for line in lines:
        print(printable(f"qsteer: {line}"), file=sys.stderr)


def clean(given: argparse.Namespace) -> int:
    """Remove what qsteer left on the host and nothing uses."""
    from qsteer import clean as cleaning
    from qsteer import execute

    with contextlib.nullcontext() if given.dry_run else execute.lock(given.timeout):
        planned = cleaning.plan(cleaning.fetch())
        done = None if given.dry_run else cleaning.execute(planned)
    removed, kept = (done.removed, done.kept) if done else (planned.remove, planned.kept)
    if given.json:
        print(render.json_text(render.clean_json(removed, kept, dry_run=given.dry_run), pretty=given.pretty))
    else:
        _print(given, str(done or planned))
    return 0


def keep(given: argparse.Namespace) -> int:
    """Keep what is selected steered, until a signal ends it."""
    from qsteer import keep as daemon

    return daemon.main_keep(
        options.selection(given, required=True),
        options.intent(given, options.settings(given), lenient=True),
        replace(options.manner(given), turn_s=0.0),
        reread_s=given.reread,
        json=given.json,
        quiet=given.quiet,
    )


def monitor(given: argparse.Namespace) -> int:
    """Print what happens to what is selected, until a signal ends it."""
    from qsteer import keep as daemon

    return daemon.main_monitor(options.selection(given, required=False), json=given.json, quiet=given.quiet)


def run(given: argparse.Namespace) -> int:
    """Start QEMU; does not come back but for a dry run."""
    from dataclasses import asdict

    from qsteer import run as runner

    argv = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not argv:
        raise UsageError("no QEMU command line", hint="qsteer run --tap id=net0,queues=4 -- qemu-system-x86_64 ...")
    if given.json and not given.dry_run:
        raise UsageError("run prints JSON for a dry run only", hint="qsteer run -n -j ...")
    rehearsal = runner.run(
        vm=given.vm,
        taps=given.tap,
        user=given.user,
        dry_run=given.dry_run,
        quiet=given.quiet,
        service=given.service,
        engine=given.engine,
        command=argv,
    )
    if given.json:
        print(render.json_text({"schema": "qsteer.run/1", **asdict(rehearsal)}, pretty=given.pretty))
    else:
        _print(given, str(rehearsal))
    return 0


def plug(given: argparse.Namespace) -> int:
    """Plug a NIC into a VM that runs."""
    from qsteer import plug as plugging

    if len(given.tap) > 1:
        raise UsageError("plug takes one --tap", hint="run it again for another NIC")
    vm = options.one_vm(given)
    done = plugging.plug(vm, given.tap[0], bus=given.bus, dry_run=given.dry_run, service=given.service)
    if given.json:
        print(render.json_text(done.json(), pretty=given.pretty))
    else:
        _print(given, str(done))
    return 0


def unplug(given: argparse.Namespace) -> int:
    """Take a NIC off a VM that runs."""
    from qsteer import unplug as unplugging

    done = unplugging.unplug(options.one_vm(given), given.nic, timeout_s=given.timeout, dry_run=given.dry_run)
    if given.json:
        print(render.json_text(done.json(), pretty=given.pretty))
    else:
        _print(given, str(done))
    return 0


def serve(given: argparse.Namespace) -> int:
    """Hand out taps and programs, until a signal ends it."""
    from qsteer import config
    from qsteer.serve import main

    return main(path=Path(given.socket) if given.socket else None, load=config.load, quiet=given.quiet)


def _print(given: argparse.Namespace, text: str) -> None:
    if not given.quiet:
        print(text)
