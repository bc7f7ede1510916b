# SPDX-License-Identifier: BSD-2-Clause
"""What qsteer-ifup makes of a QEMU's command line, and its own."""

import argparse
import contextlib
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from qsteer import execute, hashing, holds, ifup, kernel, marks, others, programs, qemuargs
from qsteer.errors import UnsupportedError, UsageError
from qsteer.ifupplan import Behind, Decision, behind, decide, needs_version, warning
from qsteer.model import Engine, Generation, Hashing, Kind, Source, Tap, VnetHash
from qsteer.plan import ClearRss, Plan, SetRss, Static
from qsteer.rss import BASE_TYPES, NO_TYPES, HashType
from qsteer.settings import AUTO, Settings
from tests.unit.taps import CONFIG, KEY, OWN_STATIC, process, program, queue, tap

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "qsteer.8").read_text()


def args(text: str) -> qemuargs.QemuArgs:
    return qemuargs.parse(("qemu-system-x86_64", *text.split()))


OFF = "-device virtio-net-pci,id=nic0,netdev=net0,mq=on,rss=off,mac=52:54:00:00:00:01"
TAP = "-netdev tap,id=net0,ifname=tap7,queues=4,script=/x"
PLAIN = Behind(queues=4, vhost=False, rss=False, ids=("nic0", "net0"), mac="52:54:00:00:00:01")

COMMAND_LINES = {
    "by its name": (f"{TAP} {OFF}", PLAIN),
    "rss": (f"{TAP} {OFF.replace('rss=off', 'rss=on')}", "rss"),
    "rss by -global": (f"{TAP} -global virtio-net-pci.rss=on -device virtio-net-pci,netdev=net0", "rss"),
    "vhost": (f"{TAP},vhost=on {OFF}", "vhost"),
    "one queue by default": (f"-netdev tap,id=net0,ifname=tap7 {OFF}", "one queue"),
    "JSON": (
        """-netdev {"type":"tap","id":"net0","ifname":"tap7","queues":4} """
        """-device {"driver":"virtio-net-pci","netdev":"net0","rss":true}""",
        "rss",
    ),
    "no device": (TAP, Behind(queues=4, vhost=False, rss=None, ids=("net0",))),
    "two devices": (f"{TAP} {OFF} {OFF}", Behind(queues=4, vhost=False, rss=None, ids=("net0",))),
    "the only one without a name": (f"-netdev tap,id=net0,queues=4 {OFF}", PLAIN),
    "a name that the kernel completes": (f"-netdev tap,id=net0,ifname=tap%d,queues=4 {OFF}", PLAIN),
    "named, among those without": (f"-netdev tap,id=net1,queues=2 {TAP} {OFF}", PLAIN),
    "without a name, among named": (f"-netdev tap,id=n1,ifname=a,queues=2 -netdev tap,id=net0,queues=4 {OFF}", PLAIN),
    "not what fds stand for": (f"-netdev tap,id=n1,fds=3:4 -netdev tap,id=net0,queues=4 {OFF}", PLAIN),
    "two alike": (
        f"-netdev tap,id=net0,queues=4 {OFF} -netdev tap,id=net1,queues=4 -device virtio-net-pci,netdev=net1",
        Behind(queues=4, vhost=False, rss=False),
    ),
    "two that differ": (
        f"-netdev tap,id=net0,queues=4 {OFF} -netdev tap,id=net1,queues=4 -device virtio-net-pci,netdev=net1,rss=on",
        None,
    ),
    "-nic": ("-nic tap,ifname=tap7,mac=52:54:00:00:00:01", Behind(queues=1, vhost=False, rss=False, mac=PLAIN.mac)),
    "another's": (f"-netdev tap,id=net0,ifname=tap8,queues=4 {OFF}", None),
    "no netdev": ("", None),
    "not a tap": (f"-netdev user,id=net0 {OFF}", None),
    "nonsense": ("-netdev -netdev {,}=%% -device", None),
}


@pytest.mark.parametrize("case", COMMAND_LINES, ids=COMMAND_LINES)
def test_what_is_behind_a_tap(case: str) -> None:
    text, expected = COMMAND_LINES[case]
    found = behind(args(text), "tap7")
    if isinstance(expected, str):
        assert found is not None
        told = {"rss": found.rss is True, "vhost": found.vhost, "one queue": found.queues == 1}
        assert [what for what, holds in told.items() if holds] == [expected]
    else:
        assert found == expected


def nic(*, queues: int = 4, vhost: bool = False, rss: bool | None = False) -> Behind:
    return Behind(queues=queues, vhost=vhost, rss=rss)


DECISIONS = {
    # what is behind, QEMU's version: attach, why it is lost
    "10.0": (nic(), (10, 0), True, ""),
    "11.1": (nic(), (11, 1), True, ""),
    "9.1": (nic(), (9, 1), True, ""),
    "9.0": (nic(), (9, 0), False, "9.0"),
    "7.2": (nic(), (7, 2), False, "7.2 would take it off again when the guest's driver starts"),
    "unknown": (nic(), None, True, "before 9.1"),
    "one queue": (nic(queues=1, rss=True, vhost=True), None, False, ""),
    "rss=on": (nic(rss=True), None, False, "rss=on"),
    "rss=on, vhost=on, 10.0": (nic(rss=True, vhost=True), (10, 0), False, "rss=on"),
    "vhost=on, 10.0": (nic(vhost=True), (10, 0), True, ""),
    "vhost=on, 9.2": (nic(vhost=True), (9, 2), True, ""),
    "vhost=on, 8.2": (nic(vhost=True), (8, 2), False, "8.2"),
    "vhost=on, 10.1": (nic(vhost=True), (10, 1), False, "10.1 would take it off again (vhost=on)"),
    "vhost=on, 11.0": (nic(vhost=True), (11, 0), False, "11.0"),
    "vhost=on, unknown": (nic(vhost=True), None, True, "vhost=on"),
    "no -device": (nic(rss=None), (10, 0), True, "no -device"),
    "no -device, vhost=on, 11.1": (nic(rss=None, vhost=True), (11, 1), False, "11.1"),
    "nothing known": (None, None, True, "this NIC"),
}


@pytest.mark.parametrize("case", DECISIONS, ids=DECISIONS)
def test_what_to_do(case: str) -> None:
    known, version, attach, lost = DECISIONS[case]
    decision = decide(known, version)
    assert (decision.attach, bool(decision.lost)) == (attach, bool(lost))
    assert lost in decision.lost


def test_the_version_is_asked_for_only_where_it_matters() -> None:
    needless = {case for case, (known, *_) in DECISIONS.items() if not needs_version(known)}
    assert needless == {"one queue", "rss=on", "rss=on, vhost=on, 10.0", "nothing known"}


IN_KERNEL = {
    # what is behind: whether there is a reason why it may not last
    "rss=off": (nic(), False),
    "vhost=on": (nic(vhost=True), False),
    "no -device": (nic(rss=None), True),
    "no -device, vhost=on": (nic(rss=None, vhost=True), True),
    "nothing known": (None, True),
}


@pytest.mark.parametrize("version", [None, (7, 2), (9, 0), (10, 0), (10, 1), (11, 1)])
@pytest.mark.parametrize("case", IN_KERNEL, ids=IN_KERNEL)
def test_no_qemu_takes_in_kernel_rss_off(case: str, version: tuple[int, int] | None) -> None:
    known, may_be_lost = IN_KERNEL[case]
    decision = decide(known, version, in_kernel=True)
    assert (decision.attach, bool(decision.lost)) == (True, may_be_lost)
    assert "takes it off" not in decision.lost


@pytest.mark.parametrize("case", ["one queue", "rss=on", "rss=on, vhost=on, 10.0"])
def test_what_does_not_depend_on_the_engine(case: str) -> None:
    known, version, *_ = DECISIONS[case]
    assert decide(known, version, in_kernel=True) == decide(known, version)


STOCK = Hashing(why_not="this kernel's tun does not hash by itself")
ABLE = Hashing(generation=Generation.V12, types=BASE_TYPES, why_not="")
KERNEL, EBPF = Settings(engine=Engine.KERNEL), Settings(engine=Engine.EBPF)
EX = Settings(static=Static(types=BASE_TYPES | HashType.IP_EX))
FOREIGN_RSS = VnetHash(rss=True, report=False, types=CONFIG.types, config=CONFIG)

ENGINES = {
    # what is set, the tap: whether tun itself is going to steer
    "a kernel that can": (Settings(), tap(hashing=ABLE), True),
    "auto": (Settings(engine=AUTO), tap(hashing=ABLE), True),
    "a kernel that cannot": (Settings(), tap(hashing=STOCK), False),
    "told to, on one that cannot": (KERNEL, tap(hashing=STOCK), True),
    "told to": (KERNEL, tap(hashing=ABLE), True),
    "told not to": (EBPF, tap(hashing=ABLE), False),
    "types that it does not know": (EX, tap(hashing=ABLE), False),
    "types that it knows": (EX, tap(hashing=replace(ABLE, types=BASE_TYPES | HashType.IP_EX)), True),
    "no type over IPv4": (Settings(static=Static(types=HashType.TCP6)), tap(hashing=ABLE), False),
    "a program that stays": (Settings(), tap(hashing=ABLE, program=OWN_STATIC), False),
    "what stays is somebody else's": (Settings(), tap(hashing=ABLE, vnet_hash=FOREIGN_RSS), False),
    "what stays is in the kernel": (
        Settings(),
        tap(hashing=ABLE, vnet_hash=replace(FOREIGN_RSS, source=Source.STATIC)),
        True,
    ),
    "one queue": (Settings(), tap(hashing=ABLE, multi_queue=False), False),
}


def call(known: Behind | None) -> ifup._Call:
    return ifup._Call(tap="vnet0", fd=9, qemu=process(), behind=known)


def start(
    monkeypatch: pytest.MonkeyPatch, known: Behind | None, settings: Settings, found: Tap
) -> tuple[bool, Decision]:
    """Whether QEMU was asked for its version (it is 11.1 then), and what was decided."""
    asked: list[int] = []
    decided: list[Decision] = []

    def ask(pid: int) -> contextlib.AbstractContextManager[None]:
        asked.append(pid)
        return contextlib.nullcontext()

    monkeypatch.setattr(ifup, "_call", lambda _: call(known))
    monkeypatch.setattr(ifup, "_settings", lambda *_: settings)
    monkeypatch.setattr(ifup, "_queue", lambda _: queue())
    monkeypatch.setattr(ifup, "_tap", lambda *_: found)
    monkeypatch.setattr(others, "asked_for_version", ask)
    monkeypatch.setattr(others, "version", lambda _: (11, 1) if asked else None)
    monkeypatch.setattr(ifup, "_steer", lambda _, decision, *__, **___: decided.append(decision))
    monkeypatch.setattr(ifup, "_set_up", lambda *_: None)
    ifup._up(argparse.Namespace(tap="vnet0", bridge=None, required=False))
    (decision,) = decided
    return bool(asked), decision


@pytest.mark.parametrize("case", ENGINES, ids=ENGINES)
def test_where_tun_itself_steers_qemus_version_is_not_asked_for(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, found, in_kernel = ENGINES[case]
    asked, decision = start(monkeypatch, nic(vhost=True), settings, found)
    assert asked is not in_kernel
    assert decision == decide(nic(vhost=True), (11, 1), in_kernel=in_kernel)
    assert decision.attach is in_kernel
    asked, decision = start(monkeypatch, None, settings, found)
    assert not asked and decision == decide(None, in_kernel=in_kernel)


@pytest.mark.parametrize("known", [nic(rss=True), nic(rss=True, vhost=True), nic(queues=1)])
def test_the_engine_is_not_looked_for_where_it_does_not_matter(known: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ifup, "_in_kernel", lambda *_: pytest.fail("looked for"))
    assert start(monkeypatch, known, Settings(), tap()) == (False, decide(known))


def test_a_tap_that_cannot_be_looked_at_is_told_of_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UnsupportedError("in another network namespace")

    monkeypatch.setattr(ifup, "_queue", fail)
    assert not ifup._in_kernel(call(nic()), Settings())
    assert ifup._in_kernel(call(nic()), KERNEL)


RSS = VnetHash(
    rss=True,
    report=False,
    types=CONFIG.types,
    config=replace(CONFIG, table=(3, 1)),
    source=Source.STATIC,
)
REPORTS = VnetHash(rss=False, report=True, types=HashType.TCP4, config=None)
TABLE = Static(key=KEY, table=(1, 0))


class Kernel:
    """What undo does to a tap, in order, and what tun hashes by."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, found: Tap) -> None:
        self.did: list[tuple[object, ...]] = []
        self.rss = found.vnet_hash
        self.mark = marks.file(netns=found.netns, ifindex=found.ifindex)
        monkeypatch.setattr(execute, "lock", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(execute, "execute", self._execute)
        monkeypatch.setattr(ifup, "_queue", lambda _: replace(queue(), program_id=found.program_id))
        monkeypatch.setattr(ifup, "_tap", lambda *_: found)
        monkeypatch.setattr(kernel, "queue_of", lambda _: queue())
        monkeypatch.setattr(kernel, "attach", lambda *what: self.did.append(("attach", *what)))
        monkeypatch.setattr(kernel, "detach", lambda *what: self.did.append(("detach", *what)))
        monkeypatch.setattr(programs, "program_by_id", self._program_by_id)
        monkeypatch.setattr(hashing, "of_taps", lambda _: {(found.netns, found.ifindex): self.rss} if self.rss else {})
        monkeypatch.setattr(hashing, "set_rss", lambda *what, report: self.did.append(("set_rss", *what, report)))
        monkeypatch.setattr(hashing, "set_automq", lambda *what: self.did.append(("set_automq", *what)))

    def _execute(self, plan: Plan) -> int:
        for step in plan.steps:
            if isinstance(step, SetRss | ClearRss):
                self.rss = step.rss if isinstance(step, SetRss) else None
                self.mark.restore(b"of the plan" if self.rss else None)
        return plan.program_id or 0

    @contextlib.contextmanager
    def _program_by_id(self, program_id: int) -> Iterator[int]:
        yield 100 + program_id

    def attach_and_undo(self, settings: Settings, meanwhile: Callable[[], None] = lambda: None) -> None:
        with contextlib.ExitStack() as undo:
            assert ifup._attach(call(nic()), settings, undo)
            meanwhile()


V9 = Hashing(generation=Generation.V9, types=BASE_TYPES, why_not="")
AUTOMQ = ("set_automq", 9, Generation.V12, NO_TYPES)
PUT_BACK = ("set_rss", 9, Generation.V12, RSS.config, False)
UNDONE: dict[str, tuple[Settings, Tap, list[tuple[object, ...]]]] = {
    "nothing to do": (Settings(engine=Engine.KERNEL, static=Static()), tap(hashing=ABLE, vnet_hash=RSS), []),
    "nothing before": (Settings(engine=Engine.KERNEL, static=TABLE), tap(hashing=ABLE), [AUTOMQ]),
    "RSS before": (Settings(static=TABLE), tap(hashing=ABLE, vnet_hash=RSS), [PUT_BACK]),
    "RSS that reports": (
        Settings(static=TABLE),
        tap(hashing=ABLE, vnet_hash=replace(RSS, report=True)),
        [(*PUT_BACK[:-1], True)],
    ),
    "reports alone": (
        Settings(static=TABLE),
        tap(hashing=ABLE, vnet_hash=replace(REPORTS, source=Source.STATIC)),
        [("set_automq", 9, Generation.V12, HashType.TCP4)],
    ),
    "a program": (Settings(engine=Engine.EBPF), tap(hashing=ABLE), [("detach", 9)]),
    "a program in place of RSS": (
        Settings(engine=Engine.EBPF),
        tap(hashing=ABLE, vnet_hash=RSS),
        [PUT_BACK, ("detach", 9)],
    ),
    "a program in place of RSS, which refuses it": (
        Settings(engine=Engine.EBPF),
        tap(hashing=V9, vnet_hash=RSS),
        [("detach", 9), ("set_rss", 9, Generation.V9, RSS.config, False)],
    ),
    "RSS in place of a program": (
        Settings(engine=Engine.KERNEL),
        tap(hashing=ABLE, program=program(Kind.QSTEER, id=7)),
        [("attach", 9, 107), AUTOMQ],
    ),
    "RSS in place of a program, which refuses it": (
        Settings(engine=Engine.KERNEL),
        tap(hashing=V9, program=program(Kind.QSTEER, id=7)),
        [("set_automq", 9, Generation.V9, NO_TYPES), ("attach", 9, 107)],
    ),
}


@pytest.mark.parametrize("case", UNDONE, ids=UNDONE)
def test_an_undo_puts_back_what_was_there(case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the mark that says whose it is."""
    monkeypatch.setattr(holds, "RUNTIME", tmp_path)
    settings, found, undone = UNDONE[case]
    before = b"of before" if found.vnet_hash else None
    fake = Kernel(monkeypatch, found)
    fake.mark.restore(before)
    fake.attach_and_undo(settings)
    assert fake.did == undone
    assert fake.mark.stored() == before


def test_an_undo_leaves_what_somebody_else_has_set_since(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(holds, "RUNTIME", tmp_path)
    fake = Kernel(monkeypatch, tap(hashing=ABLE))

    def meanwhile() -> None:
        fake.rss = FOREIGN_RSS

    fake.attach_and_undo(Settings(engine=Engine.KERNEL, static=TABLE), meanwhile)
    assert fake.did == [] and fake.mark.stored() == b"of the plan"


def test_the_line_names_who_steers_instead() -> None:
    rss, vhost = decide(nic(rss=True)), decide(nic(vhost=True), (11, 1))
    for decision in (rss, vhost):
        assert "\n" not in warning(decision, None)
        assert "left to qsteer keep (process 12)" in warning(decision, 12)
    assert "qsteer run" in warning(rss, None)
    assert "it takes qsteer keep" in warning(vhost, None) and "qsteer run" not in warning(vhost, None)
    assert warning(decide(None), None).startswith("attached, but")


@pytest.mark.parametrize("name", ["../x", "x" * 300, "", "a b", "a:b", ".", "..", "tap%d", "a\x1b[31m", "\udcff" * 16])
def test_a_hostile_name_is_refused_before_anything_else(name: str) -> None:
    with pytest.raises(UsageError, match=r"network device name|too long"):
        ifup._call(name)


def options_of(program: str) -> argparse.ArgumentParser:
    return ifup.parser(program, "")


@pytest.mark.parametrize("given", [(), ("tap0", "tap1"), ("-rf",), ("--requi", "tap0"), ("tap0", "--bridge")])
def test_a_wrong_call_is_one_line(given: tuple[str, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        options_of("qsteer-ifup").parse_args(given)
    assert "\n" not in str(caught.value) and "--help" in caught.value.hint


@pytest.mark.parametrize("program", ["qsteer-ifup", "qsteer-ifdown"])
def test_the_manual_page_has_every_option_and_no_other(program: str) -> None:
    """In its synopsis."""
    (line,) = re.findall(rf"^\.Nm {program}\n((?:\.(?:Op|Ar).*\n)+)", PAGE, re.MULTILINE)
    described = {f"-{flag}" for flag in re.findall(r"Fl (-?[a-z]+)", line)}
    options = [set(action.option_strings) - {"-h", "--help"} for action in options_of(program)._actions]
    assert all(option & described for option in options if option)
    assert described <= set().union(*options)


def test_make_install_makes_every_command_of_the_package() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", "")
    (line,) = re.findall(r"^COMMANDS := (.*)$", makefile, re.MULTILINE)
    made = dict(command.split(":", 1) for command in line.split())
    assert made == scripts
    links = re.findall(
        r"^\tbin/([a-z-]+)=\.\./lib/qsteer/bin/([a-z-]+) ", (ROOT / "Makefile").read_text(), re.MULTILINE
    )
    # libvirt's hook is called by its path.
    assert {link for link, target in links if link == target} == scripts.keys() - {"qsteer-libvirt-hook"}
    assert callable(ifup.main_up) and callable(ifup.main_down)


def test_what_decides_is_pure() -> None:
    source = Path(ifup.__file__).with_name("ifupplan.py").read_text()
    assert not re.search(r"^(import|from) (os|subprocess|socket|qsteer\._shim|qsteer\.kernel)\b", source, re.MULTILINE)
