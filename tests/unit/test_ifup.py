# SPDX-License-Identifier: BSD-2-Clause
"""What qsteer-ifup makes of a QEMU's command line, and its own."""

import argparse
import re
import tomllib
from pathlib import Path

import pytest

from qsteer import ifup, qemuargs
from qsteer.errors import UsageError
from qsteer.ifupplan import Behind, behind, decide, needs_version, warning

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
