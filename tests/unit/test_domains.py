# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer libvirt show`` and ``set``: what is written into a domain, whom for, and what is said where that fails."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qsteer import __main__, cli, config, domainpolicy, domains, ethtool, virsh
from qsteer.domainpolicy import INTERFACES_MAX, NAMESPACE, Entry, Policy
from qsteer.domains import Written, plan_set
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError, UsageError
from qsteer.model import Engine, Source
from qsteer.plan import Static
from qsteer.rss import HashType, RssConfig, equal_table
from qsteer.settings import AUTO, Settings
from qsteer.virsh import Virsh

UUID = "11111111-2222-4333-8444-555555555555"
MAC, OTHER = "52:54:00:aa:00:01", "52:54:00:aa:00:02"
KEY = bytes(range(40))


def nic(mac: str, alias: str | None = None, kind: str = "bridge", more: str = "") -> str:
    named = f"<alias name='{alias}'/>" if alias else ""
    return f"<interface type='{kind}'><mac address='{mac}'/>{named}{more}</interface>"


def xml(*nics: str, policy: Policy | str | None = None) -> str:
    if isinstance(policy, Policy):
        policy = domainpolicy.to_xml(policy).replace("<steering", f'<steering xmlns="{NAMESPACE}"', 1)
    metadata = f"<metadata>{policy}</metadata>" if policy else ""
    return f"<domain><name>web1</name><uuid>{UUID}</uuid>{metadata}<devices>{''.join(nics)}</devices></domain>"


class Fake(Virsh):
    """A libvirt of one domain: as it runs, or None, and as it will start, or None."""

    def __init__(self, live: str | None = None, inactive: str | None = None) -> None:
        super().__init__("web1")
        self.live, self.inactive = live, inactive
        self.written: list[tuple[str | None, bool, bool]] = []

    def xml(self, *, inactive: bool) -> bytes:
        found = self.inactive if inactive or self.live is None else self.live
        assert found is not None
        return found.encode()

    def is_running(self) -> bool:
        return self.live is not None

    def is_persistent(self) -> bool:
        return self.inactive is not None

    def set_metadata(self, uri: str, prefix: str, xml: str | None, *, live: bool, config: bool) -> None:
        assert (uri, prefix) == (NAMESPACE, "qsteer")
        self.written.append((xml, live, config))


def plan(
    fake: Fake,
    said: Settings | None = None,
    *,
    alias: str | None = None,
    mac: str | None = None,
    clear: bool = False,
) -> Written:
    """What is written, where that is the same everywhere."""
    (written,) = plan_set(fake, alias=alias, mac=mac, said=said or Settings(), clear=clear)
    return written


def policy_of(written: Written) -> Policy:
    """What the domain says then."""
    assert written.xml is not None
    element = ElementTree.fromstring(written.xml.replace("<steering", f'<steering xmlns="{NAMESPACE}"', 1))
    policy = domainpolicy.parse(element)
    assert not policy.mistakes
    return policy


def static(**said: object) -> Settings:
    return Settings(source=Source.STATIC, static=Static(**said))  # type: ignore[arg-type]


# --- What is written -------------------------------------------------------------------------------------------------

TWO = xml(nic(MAC), nic(OTHER))
EQUAL = static(table=equal_table(2))
TYPES = static(types=HashType.TCP4)
OF_ALL, OF_NET0 = Entry(settings=TYPES), Entry(alias="net0", settings=EQUAL)
OF_MAC = Entry(mac=OTHER, settings=Settings(source=Source.GUEST_AGENT, engine=Engine.EBPF))

CHANGES: dict[str, tuple[Policy, Entry, bool, Policy]] = {
    # what there is, what is said, --clear: what comes of it
    "the first": (Policy(), OF_NET0, False, Policy(entries=(OF_NET0,))),
    "of another NIC": (Policy(entries=(OF_NET0,)), OF_MAC, False, Policy(entries=(OF_NET0, OF_MAC))),
    "of all NICs comes first": (
        Policy(entries=(OF_NET0, OF_MAC)),
        OF_ALL,
        False,
        Policy(entries=(OF_ALL, OF_NET0, OF_MAC)),
    ),
    "over what it says already": (
        Policy(entries=(OF_NET0, OF_MAC)),
        Entry(alias="net0", settings=TYPES),
        False,
        Policy(
            entries=(OF_MAC, Entry(alias="net0", settings=static(types=HashType.TCP4, table=equal_table(2)))),
        ),
    ),
    "another source takes the table away": (
        Policy(entries=(OF_NET0,)),
        Entry(alias="net0", settings=Settings(source=AUTO)),
        False,
        Policy(entries=(Entry(alias="net0", settings=Settings(source=AUTO)),)),
    ),
    "several of one NIC become one": (
        Policy(entries=(OF_NET0, OF_ALL, Entry(alias="net0", settings=Settings(engine=AUTO, allow=("pause",))))),
        Entry(alias="net0", settings=Settings(required=False)),
        False,
        Policy(
            entries=(
                OF_ALL,
                Entry(
                    alias="net0",
                    settings=replace(EQUAL, engine=AUTO, allow=("pause",), required=False),
                ),
            )
        ),
    ),
    "the engine stays": (
        Policy(entries=(OF_MAC,)),
        Entry(mac=OTHER, settings=Settings(allow=("pause",))),
        False,
        Policy(entries=(Entry(mac=OTHER, settings=replace(OF_MAC.settings, allow=("pause",))),)),
    ),
    "the last engine": (
        Policy(
            entries=(
                Entry(alias="net0", settings=replace(EQUAL, engine=Engine.EBPF)),
                Entry(alias="net0", settings=Settings(engine=AUTO)),
                Entry(alias="net0", settings=Settings()),
            )
        ),
        OF_NET0,
        False,
        Policy(entries=(Entry(alias="net0", settings=replace(EQUAL, engine=AUTO)),)),
    ),
    "another engine": (
        Policy(entries=(OF_MAC,)),
        Entry(mac=OTHER, settings=Settings(engine=Engine.KERNEL)),
        False,
        Policy(entries=(Entry(mac=OTHER, settings=replace(OF_MAC.settings, engine=Engine.KERNEL)),)),
    ),
    "an alias with a MAC is another": (
        Policy(entries=(Entry(alias="net0", mac=MAC, settings=TYPES),)),
        OF_NET0,
        False,
        Policy(entries=(Entry(alias="net0", mac=MAC, settings=TYPES), OF_NET0)),
    ),
    "required of all": (Policy(), Entry(settings=Settings(required=True)), False, Policy(required=True)),
    "no longer required": (
        Policy(required=True, entries=(OF_ALL,)),
        Entry(settings=Settings(required=False)),
        False,
        Policy(required=False, entries=(OF_ALL,)),
    ),
    "required stays": (Policy(required=True), OF_ALL, False, Policy(required=True, entries=(OF_ALL,))),
    "required in an interface of all NICs": (
        Policy(entries=(Entry(settings=Settings(required=True)), OF_NET0)),
        OF_ALL,
        False,
        Policy(required=True, entries=(OF_ALL, OF_NET0)),
    ),
    "required of one": (
        Policy(),
        Entry(alias="net1", settings=Settings(required=True)),
        False,
        Policy(entries=(Entry(alias="net1", settings=Settings(required=True)),)),
    ),
    "clear one": (
        Policy(required=True, entries=(OF_ALL, OF_NET0, OF_MAC)),
        Entry(alias="net0", settings=Settings()),
        True,
        Policy(required=True, entries=(OF_ALL, OF_MAC)),
    ),
    "clear one of which nothing is said": (
        Policy(entries=(OF_ALL,)),
        Entry(alias="net1", settings=Settings()),
        True,
        Policy(entries=(OF_ALL,)),
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_what_is_written(case: str) -> None:
    before, entry, clear, after = CHANGES[case]
    written = plan(
        Fake(inactive=xml(nic(MAC), nic(OTHER), policy=before)),
        entry.settings,
        alias=entry.alias,
        mac=entry.mac,
        clear=clear,
    )
    assert policy_of(written) == after
    assert domains._changed(before, entry, clear=clear) == after


GONE: dict[str, tuple[Policy | str, str | None]] = {
    "all": (Policy(required=True, entries=(OF_ALL, OF_NET0)), None),
    "the last one": (Policy(entries=(OF_NET0,)), "net0"),
    "one with a mistake": (f'<steering xmlns="{NAMESPACE}"><nic/></steering>', None),
    "none": ("", None),
}


@pytest.mark.parametrize("case", GONE)
def test_what_is_taken_away(case: str) -> None:
    policy, alias = GONE[case]
    assert plan(Fake(inactive=xml(nic(MAC), policy=policy)), alias=alias, clear=True).xml is None


PLACES = {
    "runs, and is kept": (Fake(TWO, TWO), (True, True)),
    "is off": (Fake(None, TWO), (False, True)),
    "runs once": (Fake(TWO, None), (True, False)),
}


@pytest.mark.parametrize("case", PLACES)
def test_where_it_is_written(case: str) -> None:
    fake, (live, kept) = PLACES[case]
    written = plan(fake, EQUAL)
    assert (written.live, written.config) == (live, kept)
    domains.write(fake, (written,))
    assert fake.written.pop() == (written.xml, live, kept)
    domains.write(fake, (plan(fake, clear=True),))
    assert fake.written.pop() == (None, live, kept)


def test_what_runs_and_what_is_kept_may_say_different_things() -> None:
    fake = Fake(
        xml(nic(MAC, "net0"), policy=Policy(entries=(OF_ALL,))), xml(nic(MAC), policy=Policy(entries=(OF_NET0,)))
    )
    said = Settings(required=True)
    kept, live = plan_set(fake, alias=None, mac=None, said=said, clear=False)
    assert (kept.live, kept.config, live.live, live.config) == (False, True, True, False)
    assert policy_of(kept) == Policy(required=True, entries=(OF_NET0,))
    assert policy_of(live) == Policy(required=True, entries=(OF_ALL,))
    domains.write(fake, (kept, live))
    assert fake.written == [(kept.xml, False, True), (live.xml, True, False)]


def test_the_same_again_changes_nothing() -> None:
    fake = Fake(inactive=TWO)
    first = plan(fake, EQUAL, alias="net1")
    assert first.xml
    again = Fake(inactive=xml(nic(MAC), nic(OTHER), policy=policy_of(first)))
    assert plan(again, EQUAL, alias="net1") == first


# --- Which NIC -------------------------------------------------------------------------------------------------------

MIXED = xml(nic(MAC, "ua-lan"), nic(OTHER), nic("52:54:00:aa:00:03", kind="hostdev"), nic("52:54:00:aa:00:04"))
RUNS = xml(nic(MAC, "net0"), nic("52:54:00:aa:00:09", "net5"))
KNOWN = {
    "made at the start": (Fake(inactive=TWO), ("net0", "net1")),
    "the user's, and libvirt counts the others": (Fake(inactive=MIXED), ("ua-lan", "net0", "net1")),
    "those that run": (Fake(live=RUNS), ("net0", "net5")),
    "none": (Fake(inactive=xml()), ()),
}


@pytest.mark.parametrize("case", KNOWN)
def test_the_aliases_of_a_domain(case: str) -> None:
    fake, known = KNOWN[case]
    for alias in known:
        (entry,) = policy_of(plan(fake, EQUAL, alias=alias)).entries
        assert entry.alias == alias
    for alias in ("net7", "", "hostnet0", "NET0", "hostdev0"):
        with pytest.raises(UsageError) as caught:
            plan(fake, EQUAL, alias=alias)
        assert str(caught.value) == f'domain "web1" has no NIC "{alias}"'
        assert caught.value.hint == f"it has {', '.join(known) or 'none'}"


def test_the_nics_of_a_domain_that_runs_are_not_all_that_it_is_going_to_have() -> None:
    fake = Fake(RUNS, TWO)
    for alias in ("net0", "net1", "net5"):
        assert plan(fake, EQUAL, alias=alias)
    with pytest.raises(UsageError) as caught:
        plan(fake, EQUAL, alias="net7")
    assert caught.value.hint == "it has net0, net1, net5"


def test_the_macs_of_a_domain() -> None:
    fake = Fake(RUNS, TWO)
    for mac in (MAC, OTHER, "52:54:00:aa:00:09"):
        (entry,) = policy_of(plan(fake, EQUAL, mac=mac)).entries
        assert (entry.alias, entry.mac) == (None, mac)
    with pytest.raises(UsageError) as caught:
        plan(fake, EQUAL, mac="52:54:00:aa:00:0f")
    assert str(caught.value) == 'domain "web1" has no NIC "52:54:00:aa:00:0f"'
    assert caught.value.hint == f"it has {MAC}, {OTHER}, 52:54:00:aa:00:09"


def test_what_is_said_of_a_nic_that_is_gone_can_be_cleared() -> None:
    fake = Fake(inactive=xml(nic(MAC), policy=Policy(entries=(Entry(alias="ua-old", settings=EQUAL), OF_NET0))))
    assert policy_of(plan(fake, alias="ua-old", clear=True)) == Policy(entries=(OF_NET0,))
    with pytest.raises(UsageError, match="no NIC"):
        plan(fake, EQUAL, alias="ua-old")
    with pytest.raises(UsageError, match="no NIC"):
        plan(fake, alias="ua-older", clear=True)


def test_no_more_interfaces_than_are_read() -> None:
    entries = tuple(Entry(alias=f"ua-{number}", settings=EQUAL) for number in range(INTERFACES_MAX))
    fake = Fake(inactive=xml(nic(MAC), policy=Policy(entries=entries[1:])))
    assert len(policy_of(plan(fake, EQUAL, alias="net0")).entries) == INTERFACES_MAX
    fake = Fake(inactive=xml(nic(MAC), policy=Policy(entries=entries)))
    with pytest.raises(UsageError, match="more than 64 interfaces"):
        plan(fake, EQUAL, alias="net0")
    assert len(policy_of(plan(fake, alias="ua-3", clear=True)).entries) == INTERFACES_MAX - 1


def test_a_policy_with_a_mistake_is_not_written_over() -> None:
    fake = Fake(inactive=xml(nic(MAC), policy=f'<steering xmlns="{NAMESPACE}" equal="3"/>'))
    for said in ({"said": EQUAL}, {"alias": "net0", "clear": True}):
        with pytest.raises(UsageError, match="has a mistake: steering: unknown attribute equal") as caught:
            plan(fake, **said)
        assert "--clear" in caught.value.hint


def test_what_is_no_domain() -> None:
    for call in (lambda fake: plan(fake, EQUAL), domains.show):
        with pytest.raises(QsteerError, match="no domain"):
            call(Fake(inactive="<network/>"))


# --- What is shown ---------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration's."""
    before = os.umask(0o022)
    (tmp_path / "etc").mkdir()
    os.umask(before)
    monkeypatch.setenv(config.VARIABLE, str(tmp_path / "etc"))
    return tmp_path / "etc"


def configure(folder: Path, text: str) -> None:
    (folder / config.MAIN).write_text(text)
    (folder / config.MAIN).chmod(0o644)


def test_what_comes_of_policy_and_configuration(folder: Path) -> None:
    configure(
        folder,
        f"""
        [libvirt]
        metadata = ["table", "required"]
        [[nic]]
        match.vm = "web*"
        key = "{KEY.hex(":")}"
        [[nic]]
        match.nic = "hostnet1"
        unclassified-queue = 1
        [[nic]]
        match = {{ dev = "vnet0", bridge = "br0", mac = "52:54:*" }}
        required = false
        """,
    )
    policy = Policy(
        required=True,
        entries=(
            Entry(alias="net0", settings=static(table=(0, 1), types=HashType.TCP4)),
            Entry(alias="net1", settings=Settings(source=AUTO, allow=("pause",))),
        ),
    )
    nics = (nic(MAC, more="<source bridge='br0'/><target dev='vnet0'/>"), nic(OTHER))
    for fake in (Fake(inactive=xml(*nics, policy=policy)), Fake(live=xml(*nics, policy=policy))):
        first, second = domains.show(fake).nics
        assert (first.interface.alias, second.interface.alias) == ("net0", "net1")
        assert first.wanted == Settings(source=Source.STATIC, static=Static(key=KEY, table=(0, 1)), required=True)
        assert first.refused == ("types",)
        assert second.wanted == Settings(
            source=Source.STATIC, static=Static(key=KEY, unclassified_queue=1), required=True
        )
        assert second.refused == ("source", "pause")


def test_the_domain_as_it_runs_is_shown(folder: Path) -> None:
    shown = domains.show(Fake(xml(nic(MAC, "net0"), policy=Policy(required=True)), TWO))
    assert [one.wanted.required for one in shown.nics] == [True]
    assert [one.wanted for one in domains.show(Fake(None, TWO)).nics] == [Settings()] * 2


def test_a_policy_with_mistakes_is_shown_as_one(folder: Path) -> None:
    shown = domains.show(Fake(inactive=xml(nic(MAC), policy=f'<steering xmlns="{NAMESPACE}"><nic/></steering>')))
    assert len(shown.mistakes) == 1 and shown.nics[0].wanted == Settings()
    assert domains.show(Fake(inactive=TWO)).mistakes == ()


# --- virsh -----------------------------------------------------------------------------------------------------------

DOMINFO = "Id:             -\nName:           web1\nState:          {}\nPersistent:     {}\n"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A virsh that tells what is in files, and keeps what it was called with."""
    path = tmp_path / "bin" / "virsh"
    path.parent.mkdir()
    path.write_text(
        f"""#!/bin/sh
cd {shlex.quote(str(tmp_path))} || exit 99
printf '%s\\n' "$@" LC_ALL="$LC_ALL" "" >>called
for word; do
    case "$word" in
        dominfo) cat dominfo ;;
        dumpxml) cat dumpxml ;;
        --inactive) cat inactive ;;
    esac
done
[ ! -e fails ] || . ./fails
"""
    )
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    (tmp_path / "dominfo").write_text(DOMINFO.format("running", "yes"))
    (tmp_path / "dumpxml").write_text(xml(nic(MAC, "net0")))
    (tmp_path / "inactive").write_text("")
    return tmp_path


def called(stand_in: Path) -> list[list[str]]:
    calls = [call.splitlines() for call in (stand_in / "called").read_text().split("\n\n") if call]
    assert all(call[-1] == "LC_ALL=C.UTF-8" and call[0] == "--quiet" for call in calls)
    return [call[1:-1] for call in calls]


def test_how_virsh_is_called(stand_in: Path) -> None:
    plain, there = Virsh("web 1"), Virsh("web 1", "qemu+ssh://host/system")
    assert plain.xml(inactive=False) == (stand_in / "dumpxml").read_bytes()
    there.xml(inactive=True)
    assert plain.is_running() and there.is_persistent()
    plain.set_metadata("urn:x", "x", "<a b='c d'/>", live=True, config=True)
    plain.set_metadata("urn:x", "x", None, live=False, config=True)
    connect = ["--connect", "qemu+ssh://host/system"]
    assert called(stand_in) == [
        ["dumpxml", "--domain", "web 1"],
        [*connect, "dumpxml", "--domain", "web 1", "--inactive"],
        ["dominfo", "--domain", "web 1"],
        [*connect, "dominfo", "--domain", "web 1"],
        [
            "metadata",
            "--domain",
            "web 1",
            "--uri",
            "urn:x",
            "--key",
            "x",
            "--set",
            "<a b='c d'/>",
            "--live",
            "--config",
        ],
        ["metadata", "--domain", "web 1", "--uri", "urn:x", "--remove", "--config"],
    ]


@pytest.mark.parametrize(
    ("state", "persistent", "is_running", "is_persistent"),
    [
        ("running", "yes", True, True),
        ("paused", "no", True, False),
        ("shut off", "yes", False, True),
        ("in shutdown", "yes", True, True),
    ],
)
def test_what_virsh_tells(stand_in: Path, state: str, persistent: str, is_running: bool, is_persistent: bool) -> None:
    (stand_in / "dominfo").write_text(DOMINFO.format(state, persistent))
    assert (Virsh("web1").is_running(), Virsh("web1").is_persistent()) == (is_running, is_persistent)


def test_what_virsh_does_not_tell(stand_in: Path) -> None:
    (stand_in / "dominfo").write_text("Name: web1\n")
    with pytest.raises(QsteerError, match='virsh does not tell the state of domain "web1"'):
        Virsh("web1").is_running()


FAILURES: dict[str, tuple[str, type[QsteerError], str, str]] = {
    "no such domain": (
        "echo \"error: failed to get domain 'web1'\" >&2; exit 1",
        NotFoundError,
        "failed to get domain 'web1'",
        "virsh list --all",
    ),
    "no such domain, and why": (
        "printf \"error: failed to get domain 'web1'\\nerror: Domain not found: no domain\\n\\n\" >&2; exit 1",
        NotFoundError,
        "failed to get domain 'web1': Domain not found: no domain",
        "virsh list --all",
    ),
    "no daemon": (
        "printf 'error: failed to connect to the hypervisor\\nerror: Failed to connect socket to x: No such file\\n'"
        " >&2; exit 1",
        QsteerError,
        "failed to connect to the hypervisor: Failed to connect socket to x: No such file",
        "see --connect",
    ),
    "only the last of many lines": (
        "printf 'warning: a\\nerror: b\\nerror: c\\n' >&2; exit 1",
        QsteerError,
        "b: c",
        "",
    ),
    "no word": ("exit 3", QsteerError, "virsh failed", ""),
    "killed": ("kill -KILL $$", QsteerError, "virsh failed", ""),
    "escapes": ("printf 'error: \\033[31m\\377\\n' >&2; exit 1", QsteerError, "?[31m\ufffd", ""),
}


@pytest.mark.parametrize("case", FAILURES)
def test_what_virsh_fails_with(stand_in: Path, case: str) -> None:
    script, kind, told, hint = FAILURES[case]
    (stand_in / "fails").write_text(script)
    with pytest.raises(QsteerError) as caught:
        Virsh("web1").xml(inactive=False)
    assert (type(caught.value), str(caught.value), caught.value.hint) == (kind, told, hint)


def test_virsh_is_not_waited_for(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (stand_in / "fails").write_text("exec sleep 60 >/dev/null 2>&1")
    monkeypatch.setattr(virsh, "TIMEOUT_S", 0.3)
    with pytest.raises(BusyError, match=r"virsh dominfo did not answer within 0\.3 s"):
        Virsh("web1").is_running()


def test_no_virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnsupportedError) as caught:
        Virsh("web1").is_running()
    assert (str(caught.value), caught.value.hint) == ("there is no virsh", "Debian package libvirt-clients")


# --- The command line ------------------------------------------------------------------------------------------------


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, str, list[str]]:
    """Exit code, stdout and the lines of stderr of ``qsteer libvirt``."""
    monkeypatch.setattr(sys, "argv", ["qsteer", "libvirt", *arguments])
    code = __main__.main()
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


WRONG = {
    "no verb": ((), "the following arguments are required: VERB"),
    "no domain": (("set",), "the following arguments are required: DOMAIN"),
    "nothing to set": (("set", "web1"), "say what is wanted, or --clear"),
    "only whom for": (("set", "web1", "--nic", "net0"), "say what is wanted, or --clear"),
    "both": (("set", "web1", "--clear", "--equal", "2"), "say what is wanted, or --clear"),
    "both, of the engine": (("set", "web1", "--clear", "--engine", "ebpf"), "say what is wanted, or --clear"),
    "both, of what is required": (("set", "web1", "--clear", "--required"), "say what is wanted, or --clear"),
    "NIC and MAC": (("set", "web1", "--nic", "net0", "--mac", MAC, "--equal", "2"), "argument --mac: not allowed with"),
    "no MAC": (("set", "web1", "--mac", "net0", "--equal", "2"), "argument --mac: "),
    "an unknown source": (("set", "web1", "--source", "guest"), "argument --source: invalid choice: 'guest'"),
    "an unknown engine": (("set", "web1", "--engine", "tc"), "argument --engine: invalid choice: 'tc'"),
    "two tables": (("set", "web1", "--equal", "2", "--table", "0,1"), "argument --table: not allowed with"),
    "equal to nothing": (("set", "web1", "--equal", "0"), "equal wants at least 1 queue"),
    "a bad table": (("set", "web1", "--table", "0,1,2"), "an indirection table has 1 to 128 entries, a power of two"),
    "a bad key": (("set", "web1", "--key", "6d"), "a hash key has 40 bytes, not 1"),
    "a bad type": (("set", "web1", "--types", "tcp"), 'unknown hash type "tcp"'),
    "a table, and the guest's": (
        ("set", "web1", "--equal", "2", "--source", "guest-agent"),
        "--source guest-agent takes",
    ),
    "required or not": (("set", "web1", "--required", "--best-effort"), "argument --best-effort: not allowed with"),
    "allow something else": (("set", "web1", "--allow", "kill"), "argument --allow: "),
    "an option of apply's": (("set", "web1", "--equal", "2", "--replace"), "unrecognized arguments: --replace"),
    "a shortened option": (("set", "web1", "--eq", "2"), "unrecognized arguments: --eq"),
    "two domains": (("show", "web1", "web2"), "unrecognized arguments: web2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_call_is_a_line_and_a_hint(
    stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    arguments, told = WRONG[case]
    code, out, err = command(capsys, monkeypatch, *arguments)
    assert (code, out) == (2, "")
    assert err[0].startswith(f"qsteer: {told}"), err
    assert len(err) == 1 or (len(err) == 2 and err[1].startswith("hint: "))
    assert not (stand_in / "called").exists()


def test_set(stand_in: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (stand_in / "dumpxml").write_text(xml(nic(MAC, "net0")))
    monkeypatch.setattr(Virsh, "is_persistent", lambda _: False)
    options = ("set", "web1", "--mac", MAC.upper(), "--equal", "3", "--allow", "pause", "--best-effort")
    written = f'<steering>\n  <interface mac="{MAC}" equal="3" allow="pause" required="no" />\n</steering>'
    for more in (("-n",), ("-n", "-q")):
        code, out, err = command(capsys, monkeypatch, *options, *more)
        shown = written.replace("<steering", f'<steering xmlns="{NAMESPACE}"')
        assert (code, out, err) == (0, "" if "-q" in more else f"{shown}\nin the domain that runs\n", [])
    assert all("metadata" not in call for call in called(stand_in))
    code, out, err = command(capsys, monkeypatch, *options)
    assert (code, err) == (0, []) and out.splitlines()[-1].endswith("now: qsteer apply --vm web1")
    assert "metadata" in (stand_in / "called").read_text() and written in (stand_in / "called").read_text()
    code, out, err = command(capsys, monkeypatch, *options, "--json")
    assert json.loads(out) == {
        "schema": "qsteer.libvirt-set/1",
        "name": "web1",
        "written": [{"xml": written, "live": True, "config": False}],
    }
    code, out, err = command(capsys, monkeypatch, "set", "web1", "--clear")
    assert (code, out.splitlines()[0], err) == (0, "no policy", [])
    assert ["metadata", "--domain", "web1", "--uri", NAMESPACE, "--remove", "--live"] in called(stand_in)


def test_what_was_shown_can_be_set(
    stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hash types, too: ``qsteer show`` prints "none"."""
    saved = stand_in / "saved"
    shown = RssConfig(types=HashType(0), key=KEY, table=(2, 1), unclassified_queue=2)
    saved.write_text(ethtool.format_table(shown, device="tap0", rings=4))
    monkeypatch.setattr(Virsh, "is_persistent", lambda _: False)
    code, out, _ = command(capsys, monkeypatch, "set", "web1", "--from", str(saved), "-n", "--json")
    assert code == 0
    document = json.loads(out)
    written = Written(**document["written"][0])
    (entry,) = policy_of(written).entries
    assert entry.settings == static(types=HashType(0), key=KEY, table=(2, 1), unclassified_queue=2)


def test_show(
    stand_in: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    more = "<driver queues='4' rss='on'/>"
    policy = Policy(entries=(Entry(alias="net0", settings=Settings(source=Source.DEVICE_STATE, allow=("pause",))),))
    (stand_in / "dumpxml").write_text(xml(nic(MAC, "net0", more=more), nic(OTHER, "net1"), policy=policy))
    code, out, err = command(capsys, monkeypatch, "show", "web1")
    assert code == 0
    assert out.splitlines() == [
        "NIC   MAC                QUEUES  RSS  WANTED",
        f"net0  {MAC}  4       on   source device-state",
        f"net1  {OTHER}  1       -    source auto",
    ]
    assert err == ["qsteer: net0: the configuration does not let the policy ask for pause ([libvirt] metadata)"]
    code, out, _ = command(capsys, monkeypatch, "show", "web1", "--json")
    document = json.loads(out)
    assert (document["schema"], document["name"], document["policy"]) == ("qsteer.libvirt/1", "web1", True)
    assert [(one["alias"], one["source"], one["refused"]) for one in document["interfaces"]] == [
        ("net0", "device-state", ["pause"]),
        ("net1", "auto", []),
    ]


def test_show_tells_the_engine(
    stand_in: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash report is the configuration's alone."""
    (folder / "qsteer.toml").write_text('[[nic]]\nmatch = { nic = "net2" }\nengine = "auto"\nhash-report = true\n')
    policy = Policy(entries=(Entry(alias="net0", settings=Settings(engine=Engine.KERNEL)),))
    nics = (nic(MAC, "net0"), nic(OTHER, "net1"), nic("52:54:00:00:00:03", "net2"))
    (stand_in / "dumpxml").write_text(xml(*nics, policy=policy))
    code, out, _ = command(capsys, monkeypatch, "show", "web1", "--json")
    assert code == 0
    assert [(one["alias"], one["engine"], one["hash_report"]) for one in json.loads(out)["interfaces"]] == [
        ("net0", "kernel", False),
        ("net1", "auto", False),
        ("net2", "auto", True),
    ]


def test_show_with_mistakes(
    stand_in: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "dumpxml").write_text(xml(nic(MAC), policy=f'<steering xmlns="{NAMESPACE}"><nic/></steering>'))
    code, out, err = command(capsys, monkeypatch, "show", "web1")
    assert code == 2 and out.splitlines()[1].startswith("net0")
    assert err == [
        "qsteer: the domain's policy is left out: <nic> is not interface of the namespace urn:qsteer:domain:1"
    ]


def test_no_domain_of_that_name(
    stand_in: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (stand_in / "fails").write_text(FAILURES["no such domain"][0])
    for arguments in (("show", "web1"), ("set", "web1", "--equal", "2")):
        code, _, err = command(capsys, monkeypatch, *arguments)
        assert (code, err) == (3, ["qsteer: failed to get domain 'web1'", "hint: virsh list --all"])


def test_options_that_are_not_given_say_nothing() -> None:
    from qsteer import options

    assert options.settings(cli.parser().parse_args(["libvirt", "set", "web1"])) == Settings()
