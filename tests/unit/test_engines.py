# SPDX-License-Identifier: BSD-2-Clause
"""Which engine steers, and how plans go from one to the other, on every generation and without a kernel."""

from dataclasses import replace

import pytest

from qsteer import cli, configtext, engines, hookplan, marks, render, saved, settings, upkeep, watch
from qsteer import options as command_options
from qsteer.errors import ConflictError, PermissionDeniedError, QsteerError, UnsupportedError, UsageError
from qsteer.model import Engine, Generation, Hashing, Inventory, Reading, Source, Tap, VnetHash
from qsteer.plan import Plan, SetRss, Static, Wanted, plan_apply, plan_off, readings_wanted, revision
from qsteer.rss import BASE_TYPES, NO_TYPES, HashType, RssConfig, key_bytes_used
from qsteer.settings import AUTO
from qsteer.state import Agrees, agrees, broken, state
from tests.unit.taps import (
    CONFIG,
    FOREIGN,
    OWN_SHARED,
    OWN_STATIC,
    QEMUS,
    RSS_NIC,
    RSS_VHOST_NIC,
    STATIC,
    held,
    tap,
)

STOCK = Hashing(why_not="this kernel's tun does not hash by itself")
DENIED = Hashing(why_not="that takes CAP_NET_RAW", denied=True)
OURS = VnetHash(rss=True, report=False, types=CONFIG.types, config=CONFIG, source=Source.STATIC)
THEIRS = replace(OURS, source=None)
REPORTS = VnetHash(rss=False, report=True, types=BASE_TYPES, config=None)
ASKED = replace(OURS, source=Source.DEVICE_STATE)
KERNEL, EBPF = Wanted(engine=Engine.KERNEL), Wanted(engine=Engine.EBPF)


def hashes(generation: Generation = Generation.V12, *, reports: bool = True) -> Hashing:
    return Hashing(generation=generation, types=BASE_TYPES, reports=reports, why_not="")


def patched(generation: Generation = Generation.V12, **more: object) -> Tap:
    """A tap on a kernel that has it."""
    return replace(tap(**more), hashing=hashes(generation))


def steps(plan: Plan) -> list[str]:
    return [type(step).__name__ for step in plan.steps]


# --- The choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", Generation)
def test_auto_takes_the_kernel_where_it_can(generation: Generation) -> None:
    made = plan_apply(patched(generation), Wanted())
    assert (steps(made), made.engine, made.program_id, made.result) == (["SetRss"], Engine.KERNEL, 0, "attached")
    assert not any("QEMU may remove it" in note for note in made.notes)
    assert steps(plan_apply(patched(generation), EBPF)) == ["Attach"]


@pytest.mark.parametrize("host", [STOCK, DENIED])
def test_without_it_a_program_steers(host: Hashing) -> None:
    made = plan_apply(replace(tap(), hashing=host), Wanted())
    assert (steps(made), made.engine) == (["Attach"], Engine.EBPF)
    assert any(host.why_not in note for note in made.notes) == host.denied
    kind = PermissionDeniedError if host.denied else UnsupportedError
    with pytest.raises(kind, match=f"no in-kernel RSS: {host.why_not}"):
        plan_apply(replace(tap(), hashing=host), KERNEL)


@pytest.mark.parametrize(
    ("types", "able"),
    [
        (BASE_TYPES, tuple(Generation)),
        (NO_TYPES, tuple(Generation)),
        (HashType.TCP4, tuple(Generation)),
        (HashType.TCP6 | HashType.IP6, ()),
        (BASE_TYPES | HashType.TCP_EX, ()),
    ],
)
def test_hash_types_that_it_knows(types: HashType, able: tuple[Generation, ...]) -> None:
    wanted = Wanted(static=Static(types=types))
    for generation in Generation:
        seen = patched(generation)
        assert plan_apply(seen, wanted).engine is (Engine.KERNEL if generation in able else Engine.EBPF)
        if generation not in able:
            with pytest.raises(UnsupportedError, match=r"does not hash tcp-ex|takes the key wrongly"):
                plan_apply(seen, replace(wanted, engine=Engine.KERNEL))


def test_where_qemu_writes_maps_a_program_steers() -> None:
    for attached, source in ((QEMUS, Source.QEMU_MAPS), (OWN_SHARED, Source.SHARED_MAPS)):
        seen = patched(program=attached, nic=RSS_NIC, held=held(attached))
        made = plan_apply(seen, Wanted())
        assert (made.result, made.source, made.engine) == ("unchanged", source, Engine.EBPF)
        for wanted in (KERNEL, Wanted(report=True)):
            with pytest.raises(UnsupportedError, match=r"tun reads none: no --(engine kernel|hash-report)"):
                plan_apply(seen, wanted)


def test_what_a_guest_was_read_to_ask_for() -> None:
    seen = patched(nic=RSS_VHOST_NIC, reading=Reading(source=Source.DEVICE_STATE, config=CONFIG))
    made = plan_apply(seen, Wanted())
    assert (steps(made), made.engine, made.source) == (["SetRss"], Engine.KERNEL, Source.DEVICE_STATE)
    assert any("the guest may set another table" in note for note in made.notes)
    again = replace(seen, vnet_hash=ASKED)
    assert plan_apply(again, Wanted()).result == "unchanged"
    gone = replace(again, reading=Reading(source=Source.DEVICE_STATE, config=None))
    assert steps(plan_apply(gone, Wanted())) == ["ClearRss"]


def test_what_qemu_undoes_in_software_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="steers in software"):
        plan_apply(patched(nic=RSS_NIC), Wanted(source=Source.STATIC, engine=Engine.KERNEL))


@pytest.mark.parametrize(
    ("header", "little", "reports", "says"),
    [
        (12, True, True, "has 12 bytes, it takes 20"),
        (0, True, True, "has 0 bytes, it takes 20"),
        (20, False, True, "big-endian"),
        (20, True, False, "does not report hashes"),
        (20, True, True, ""),
        (24, True, True, ""),
    ],
)
def test_hash_reports(header: int, little: bool, reports: bool, says: str) -> None:
    seen = patched()
    queues = tuple(replace(queue, header=header, header_little_endian=little) for queue in seen.queues)
    seen = replace(seen, queues=queues, hashing=hashes(reports=reports))
    for engine in (None, Engine.KERNEL):
        wanted = Wanted(engine=engine, report=True)
        if says:
            with pytest.raises(UnsupportedError, match=says):
                plan_apply(seen, wanted)
        else:
            made = plan_apply(seen, wanted)
            assert steps(made) == ["SetRss"] and "report the hash" in str(made.steps[0])
    assert plan_apply(seen, Wanted()).engine is Engine.KERNEL


def test_a_report_that_is_wanted_later() -> None:
    seen = patched(vnet_hash=OURS)
    seen = replace(seen, queues=tuple(replace(queue, header=20) for queue in seen.queues))
    assert plan_apply(seen, Wanted(source=Source.STATIC)).result == "unchanged"
    assert steps(plan_apply(seen, Wanted(source=Source.STATIC, report=True))) == ["SetRss"]
    told = replace(seen, vnet_hash=replace(OURS, report=True))
    assert plan_apply(told, Wanted(source=Source.STATIC, report=True)).result == "unchanged"


# --- From one to the other --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", Generation)
def test_from_one_engine_to_the_other(generation: Generation) -> None:
    """One below the other; or one after the other, which is said."""
    there = plan_apply(patched(generation, program=OWN_STATIC), KERNEL)
    back = plan_apply(patched(generation, vnet_hash=OURS), EBPF)
    assert steps(there) == (["Detach", "SetRss"] if generation.exclusive else ["SetRss", "Detach"])
    assert steps(back) == (["ClearRss", "Attach"] if generation.exclusive else ["Attach", "ClearRss"])
    for made in (there, back):
        assert made.result == "replaced" and made.source is Source.STATIC
        assert any("automq chooses between the two" in note for note in made.notes) == generation.exclusive


def test_what_is_as_wanted_stays_whatever_steers() -> None:
    for seen in (patched(program=OWN_STATIC), patched(vnet_hash=OURS)):
        for wanted in (Wanted(), STATIC, Wanted(source=Source.STATIC)):
            assert (plan_apply(seen, wanted).result, plan_apply(seen, wanted).steps) == ("unchanged", ())
    # With another table it is a choice again.
    other = Wanted(static=Static(table=(0, 1)))
    assert steps(plan_apply(patched(program=OWN_STATIC), other)) == ["SetRss", "Detach"]


def test_rss_of_somebody_else_stays() -> None:
    seen = patched(vnet_hash=THEIRS)
    for wanted in (Wanted(), KERNEL, EBPF, STATIC):
        with pytest.raises(ConflictError, match="in-kernel RSS that somebody else has set"):
            plan_apply(seen, wanted)
        assert plan_apply(seen, replace(wanted, replace=True)).result == "replaced"
    with pytest.raises(ConflictError):
        plan_off(seen)
    assert steps(plan_off(seen, replace_foreign=True)) == ["PutHold", "ClearRss"]
    # Below a program of qsteer's it counts for nothing, and stays.
    below = patched(program=OWN_STATIC, vnet_hash=THEIRS)
    assert steps(plan_apply(below, Wanted(engine=Engine.EBPF, static=Static(table=(1,))))) == ["Attach"]
    assert steps(plan_off(below)) == ["PutHold", "Detach"]
    # A report over automq steers nothing, and is nobody's to take off.
    assert plan_apply(patched(vnet_hash=REPORTS), EBPF).engine is Engine.EBPF
    assert "ClearRss" not in steps(plan_apply(patched(vnet_hash=REPORTS), EBPF))


def test_a_foreign_program_stays() -> None:
    with pytest.raises(ConflictError, match="foreign"):
        plan_apply(patched(program=FOREIGN), KERNEL)
    made = plan_apply(patched(program=FOREIGN), replace(KERNEL, replace=True))
    assert steps(made) == ["SetRss", "Detach"] and "in place of" in made.notes[0]


def test_off() -> None:
    assert steps(plan_off(patched(vnet_hash=OURS))) == ["PutHold", "ClearRss"]
    both = patched(program=OWN_STATIC, vnet_hash=OURS)
    assert steps(plan_off(both)) == ["PutHold", "ClearRss", "Detach"]
    displaced = patched(vnet_hash=replace(OURS, displaced=QEMUS.id), held=held(QEMUS), nic=RSS_VHOST_NIC)
    made = plan_off(displaced)
    assert (made.result, steps(made)) == ("put back", ["PutHold", "AttachHeld", "ClearRss"])


def test_if_absent_and_revision() -> None:
    seen = patched(vnet_hash=THEIRS)
    made = plan_apply(seen, Wanted(if_absent=True))
    assert (made.steps, made.result) == ((), "unchanged") and "in-kernel RSS is set" in made.notes[0]
    assert len({revision(one) for one in (seen, patched(), patched(vnet_hash=REPORTS))}) == 3
    assert not readings_wanted(replace(seen, nic=RSS_VHOST_NIC), Wanted(if_absent=True))


def test_what_has_to_be_asked() -> None:
    seen = patched(nic=RSS_VHOST_NIC)
    for rss, sources in ((ASKED, (Source.GUEST_AGENT,)), (OURS, ()), (THEIRS, ()), (None, (Source.GUEST_AGENT,))):
        assert readings_wanted(replace(seen, vnet_hash=rss), Wanted()) == sources


# --- What is told -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "told", "works"),
    [
        (patched(vnet_hash=OURS), "ok", True),
        (patched(vnet_hash=OURS, hold=True), "ok, but on hold: keep leaves it alone", True),
        (patched(vnet_hash=OURS, nic=RSS_NIC), "undone: QEMU steers in software", False),
        (patched(vnet_hash=THEIRS), "in-kernel RSS that somebody else has set", True),
        (patched(vnet_hash=REPORTS), "not steered", True),
        (patched(program=OWN_STATIC, vnet_hash=OURS), "ok; in-kernel RSS waits below it", True),
    ],
)
def test_state(seen: Tap, told: str, works: bool) -> None:
    assert (state(seen), broken(seen)) == (told, not works)


def test_status() -> None:
    taps = (
        patched(vnet_hash=OURS),
        patched(vnet_hash=replace(OURS, report=True)),
        patched(Generation.V9, program=OWN_STATIC),
        patched(vnet_hash=REPORTS),
        replace(tap(), hashing=STOCK),
    )
    rows = render.status_text(Inventory(taps=taps)).splitlines()
    at = rows[0].index("ENGINE")
    end = rows[0].index("SOURCE")
    assert [row[at:end].strip() for row in rows[1:]] == [
        "kernel v12",
        "kernel v12+report",
        "ebpf",
        "automq+report",
        "automq",
    ]
    document = render.tap_json(taps[1])
    assert (document["engine"], document["source"], document["program"]) == ("kernel", "static", None)
    assert document["in_kernel"] == {
        "generation": "v12",
        "steers": True,
        "rss": True,
        "report": True,
        "types": ["ip4", "tcp4", "udp4", "ip6", "tcp6", "udp6"],
        "by_qsteer": True,
        "displaced": None,
    }
    assert render.tap_json(taps[4])["in_kernel"] is None


def test_show() -> None:
    told = render.show_text(patched(vnet_hash=replace(OURS, report=True)))
    assert told.startswith("# vnet0: in-kernel RSS, v12, source static, the guest is told the hash\n")
    assert "RSS hash key" in told
    assert render.show_text(patched(vnet_hash=replace(THEIRS, config=None))).endswith("none that virtio allows")
    rss = render.show_json(patched(vnet_hash=OURS))["rss"]
    assert isinstance(rss, dict) and rss["enabled"] and rss["table"] == list(CONFIG.table)


def test_agrees() -> None:
    asked = Reading(source=Source.DEVICE_STATE, config=CONFIG)
    seen = patched(vnet_hash=ASKED, nic=RSS_VHOST_NIC, reading=asked)
    assert agrees(seen) is Agrees.YES
    assert agrees(replace(seen, reading=replace(asked, config=replace(CONFIG, table=(1,))))) is Agrees.NO
    assert agrees(replace(seen, vnet_hash=None)) is Agrees.NO


def test_events() -> None:
    def told(was: Tap, now: Tap) -> list[str]:
        happened = watch.events(Inventory(taps=(was,)), Inventory(taps=(now,)))
        return [watch.text(one).partition("vnet0: ")[2] for one in happened.get(watch.key_of(now), ())]

    bare, ours, theirs = patched(), patched(vnet_hash=OURS), patched(vnet_hash=THEIRS)
    assert told(bare, ours) == ["nothing -> in-kernel RSS"]
    assert told(ours, bare) == ["in-kernel RSS -> nothing"]
    assert told(ours, theirs) == ["configuration: somebody set RSS anew"]
    assert told(ours, patched(vnet_hash=replace(OURS, config=replace(CONFIG, table=(1,))))) == ["configuration: table"]
    assert told(patched(program=OWN_STATIC), ours) == [f"program {OWN_STATIC.id} -> in-kernel RSS"]
    assert told(bare, patched(vnet_hash=REPORTS)) == []
    assert told(ours, ours) == []


# --- What keep remembers ----------------------------------------------------------------------------------------------


def test_keep_puts_back_what_was_there() -> None:
    ours = patched(vnet_hash=OURS)
    memory = upkeep.remember(upkeep.Memory(), ours, Wanted())
    assert (memory.static, memory.engine) == (CONFIG, Engine.KERNEL)
    assert upkeep.decide(memory, ours, Wanted()).plan is None
    decision = upkeep.decide(memory, patched(), Wanted())
    assert decision.plan
    made = plan_apply(*decision.plan)
    assert steps(made) == ["SetRss"] and made.engine is Engine.KERNEL
    # On a kernel where auto takes tun, what a program did is a program's again.
    by_program = upkeep.remember(upkeep.Memory(), patched(program=OWN_STATIC), Wanted())
    decision = upkeep.decide(by_program, patched(), Wanted())
    assert decision.plan and steps(plan_apply(*decision.plan)) == ["Attach"]


def test_keep_and_a_guest_that_is_asked() -> None:
    seen = patched(vnet_hash=ASKED, nic=RSS_VHOST_NIC)
    memory = upkeep.remember(upkeep.Memory(asked=True), seen, Wanted())
    assert memory.reading == Reading(source=Source.DEVICE_STATE, config=CONFIG)
    other = Reading(source=Source.DEVICE_STATE, config=replace(CONFIG, table=(1, 0)))
    memory = upkeep.answered(memory, replace(seen, reading=other))
    memory = upkeep.remember(memory, seen, Wanted())
    decision = upkeep.decide(memory, seen, Wanted(source=Source.DEVICE_STATE, allow_pause=True))
    assert decision.plan
    made = plan_apply(*decision.plan)
    assert steps(made) == ["SetRss"]
    after = upkeep.done(memory, made, 0)
    (step,) = made.steps
    assert isinstance(step, SetRss)
    now = replace(seen, vnet_hash=step.rss)
    assert upkeep.remember(after, now, Wanted()) == after


def test_keep_changes_the_engine_where_that_is_wanted() -> None:
    seen = patched(program=OWN_STATIC)
    memory = upkeep.remember(upkeep.Memory(), seen, KERNEL)
    decision = upkeep.decide(memory, seen, KERNEL)
    assert decision.plan and steps(plan_apply(*decision.plan)) == ["SetRss", "Detach"]
    # Somebody applied it meanwhile.
    assert upkeep.decide(replace(memory, settled=True), seen, KERNEL).plan is None


# --- What is asked for ------------------------------------------------------------------------------------------------


def test_what_is_configured_and_saved() -> None:
    text = '[[nic]]\nengine = "kernel"\nhash-report = true\n[[nic]]\nengine = "auto"\n'
    entries = configtext.parse(text, "x.toml").entries
    first, second = (entry.settings for entry in entries)
    assert (first.engine, first.hash_report, second.engine) == (Engine.KERNEL, True, AUTO)
    assert settings.wanted(first) == Wanted(engine=Engine.KERNEL, report=True)
    assert settings.wanted(settings.fold((first, second))) == Wanted(report=True)
    assert saved.lines_of(first) == ['engine = "kernel"', "hash-report = true"]
    (mistake,) = configtext.parse('[[nic]]\nengine = "tc"\n', "x.toml").mistakes
    assert str(mistake).endswith('2: engine: "tc" is none of auto, ebpf, kernel')


def asked(*options: str) -> Wanted:
    given = cli.parser().parse_args(["apply", "--vm", "web1", *options])
    return settings.wanted(command_options.settings(given))


def test_options() -> None:
    assert asked() == asked("--engine", "auto") == Wanted()
    assert asked("--engine", "kernel", "--hash-report") == Wanted(engine=Engine.KERNEL, report=True)
    assert asked("--engine", "ebpf") == Wanted(engine=Engine.EBPF)
    with pytest.raises(UsageError, match="a program cannot report a hash"):
        asked("--engine", "ebpf", "--hash-report")
    with pytest.raises(UsageError, match="invalid choice: 'tc'"):
        asked("--engine", "tc")
    given = cli.parser().parse_args(["apply", "--vm", "web1", "--refresh", "--engine", "kernel"])
    with pytest.raises(UsageError, match="no engine"):
        command_options.intent(given, command_options.settings(given))


def test_libvirts_hook() -> None:
    """What no QEMU takes off lasts on old ones, too."""
    for seen, fine in ((patched(), True), (replace(tap(), hashing=STOCK), False)):
        decision = hookplan.decide(seen, Wanted(), version=(7, 2), keep_pid=None, incoming=False)
        assert (decision.fine, bool(decision.plan)) == (fine, True)
    left = hookplan.decide(patched(vnet_hash=THEIRS), Wanted(if_absent=True), version=None, keep_pid=1, incoming=False)
    assert left.plan and left.plan.steps == ()


# --- Marks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runtime(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qsteer.holds.RUNTIME", tmp_path)


@pytest.mark.usefixtures("runtime")
def test_marks() -> None:
    """Whose it is; not of another configuration, another tap, or with nonsense in the file."""
    place, other = {"netns": 1, "ifindex": 4}, replace(CONFIG, table=(1,))
    assert marks.marked(THEIRS, **place) == THEIRS
    marks.file(**place).restore(marks.of(tap(), (replace(OURS, config=other), replace(OURS, displaced=7))))
    assert marks.marked(THEIRS, **place) == replace(OURS, displaced=7)
    assert marks.marked(replace(THEIRS, report=True), **place).source is None
    assert marks.marked(THEIRS, netns=1, ifindex=5).source is None
    for nonsense in (
        b"",
        b"[]",
        b"{}",
        b"\xff",
        b'{"digest": 1}',
        marks.of(tap(), (OURS,)).replace(b"static", b"nobody"),
    ):
        marks.file(**place).restore(nonsense)
        assert marks.marked(THEIRS, **place) == THEIRS


@pytest.mark.usefixtures("runtime")
def test_a_key_that_the_kernel_has_in_part() -> None:
    """Of v12 with types that need no more; the whole of it is in the mark."""
    config = RssConfig(types=HashType.TCP4, key=bytes(range(40)), table=(0, 1))
    ours = replace(OURS, types=config.types, config=config)
    seen = replace(ours, source=None, config=replace(config, key=bytes(range(16)) + bytes(24)))
    marks.file(netns=1, ifindex=4).restore(marks.of(tap(), (ours,)))
    assert marks.marked(seen, netns=1, ifindex=4) == ours
    other = replace(seen, config=replace(config, key=bytes(40)))
    assert marks.marked(other, netns=1, ifindex=4) == other


@pytest.mark.parametrize(
    ("types", "length"),
    [
        (NO_TYPES, 0),
        (HashType.IP4, 12),
        (HashType.UDP4, 16),
        (HashType.IP6, 36),
        (HashType.IP_EX, 36),
        (HashType.TCP4 | HashType.IP6, 36),
        (BASE_TYPES, 40),
        (HashType.UDP_EX, 40),
    ],
)
def test_key_bytes_that_count(types: HashType, length: int) -> None:
    assert key_bytes_used(types) == length


def test_a_reason_is_no_traceback() -> None:
    with pytest.raises(QsteerError) as caught:
        engines.choose(replace(tap(), hashing=DENIED), Engine.KERNEL, CONFIG, report=False)
    assert caught.value.exit_code == 4 and caught.value.hint
