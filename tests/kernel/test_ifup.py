# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-ifup and qsteer-ifdown as a stand-in for a QEMU runs them: with the fd of a tap's first queue inherited."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from qsteer import holds, inventory, kernel, procs
from qsteer.model import Source, Tap
from qsteer.rss import RssConfig
from tests.kernel import private, standin, support

pytestmark = pytest.mark.root

TAP = "qsif0"
BRIDGE = "qsifbr0"
NETDEV = f"tap,id=net0,ifname={TAP},queues=4"
PLAIN, OFFERS_RSS = "rss=off", "rss=on"

_STAND_IN = """
import json, os, subprocess, sys
sys.exit(subprocess.run(json.loads(os.environ["RUN"]), close_fds=False).returncode)
"""
_CODE = "import sys; from qsteer import ifup; {before}; sys.exit(ifup.main_{what}())"


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    with private.memory():
        yield


@pytest.fixture(autouse=True)
def nothing_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A configuration of the test's own, and no hold afterwards."""
    monkeypatch.setenv("QSTEER_CONFIG", str(tmp_path))
    yield tmp_path
    private.forget_holds()


@pytest.fixture
def tap(namespace: str) -> Iterator[support.TapUnderTest]:
    """As QEMU has it when it runs the script, but for the other three queues, which the test reads, too."""
    with support.tap(TAP, 4) as under_test:
        yield under_test


@pytest.fixture
def bridge(namespace: str) -> str:
    support.add_bridge(BRIDGE)
    ip("link", "set", BRIDGE, "mtu", "1400")
    return BRIDGE


def ip(*arguments: str) -> None:
    subprocess.run(("ip", *arguments), check=True)


def call(
    what: str,
    *options: str,
    fds: Sequence[int],
    name: str = TAP,
    netdev: str = NETDEV,
    nic: str = PLAIN,
    argv0: str = "qemu-system-x86_64",
    prefix: Sequence[str] = (),
    between: Sequence[str] = (),
    before: str = "pass",
    version: str = "(10, 0)",
) -> subprocess.CompletedProcess[str]:
    """Run the script as the child of a QEMU of that version; ``before`` is Python that is run first."""
    first = f"ifup.others.version = lambda asked: {version}; {before}" if version else before
    command = [*between, *prefix, sys.executable, "-c", _CODE.format(what=what, before=first), *options, name]
    done = subprocess.run(
        [argv0, "-c", _STAND_IN, "-name", "qsifvm", "-netdev", netdev, "-device", f"virtio-net-pci,netdev=net0,{nic}"],
        executable=sys.executable,
        env={**os.environ, "RUN": json.dumps(command)},
        pass_fds=fds,
        capture_output=True,
        text=True,
        timeout=support.patience(30),
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert done.stdout == "", "stdout is QEMU's, maybe its console"
    return done


def ifup(tap: support.TapUnderTest, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return call("up", *options, fds=tap.open.fds[:1], **how)


def ifdown(tap: support.TapUnderTest, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return call("down", *options, fds=tap.open.fds[:1], **how)


def seen(name: str = TAP) -> Tap:
    return next(tap for tap in inventory.fetch().taps if tap.name == name and not tap.unheld)


def config_of(tap: Tap) -> RssConfig:
    assert tap.content and tap.content.config
    return tap.content.config


def link(key: str) -> str:
    """What the kernel says of the tap, in this network namespace."""
    done = subprocess.run(("ip", "-j", "link", "show", TAP), check=True, capture_output=True, text=True)
    return str(json.loads(done.stdout)[0].get(key, ""))


def check_packets(tap: support.TapUnderTest, config: RssConfig) -> None:
    tap.drain()
    standin.Vm(name="qsifvm", pid=0, tap=tap).check_packets(config)


def check_one_line(done: subprocess.CompletedProcess[str], *words: str, hint: bool = False) -> None:
    said = done.stderr.splitlines()
    assert len(said) == 1 + hint, done.stderr
    assert said[0].startswith("qsteer-if") and all(word in said[0] for word in words), said
    assert not hint or said[1].startswith("hint: ")


def test_what_is_attached_is_what_apply_knows(tap: support.TapUnderTest) -> None:
    done = ifup(tap)
    assert (done.returncode, done.stderr) == (0, "")
    after = seen()
    assert after.program and after.program.ident and after.program.ident.source is Source.STATIC
    config = config_of(after)
    assert config.table == tuple(range(128))
    check_packets(tap, config)
    (status,) = json.loads(support.qsteer("status", "--dev", TAP, "--json").stdout)["taps"]
    assert (status["source"], status["state"]) == ("static", "ok")
    apply = support.qsteer("apply", "--dev", TAP)
    assert apply.returncode == 0 and "unchanged" in apply.stdout
    assert config_of(seen()) == config
    assert support.qsteer("off", "--dev", TAP).returncode == 0
    assert seen().program_id == 0


def test_a_bridge(tap: support.TapUnderTest, bridge: str) -> None:
    ip("link", "set", TAP, "down")
    own = link("address")
    done = ifup(tap, "--bridge", bridge, "-v")
    assert done.returncode == 0 and f"in bridge {bridge}, MTU 1400" in done.stderr, done.stderr
    assert (link("master"), link("mtu")) == (bridge, "1400") and "UP" in link("flags")
    assert link("address") == f"fe{own[2:]}"
    assert ifup(tap, "--bridge", bridge).returncode == 0
    assert link("address") == f"fe{own[2:]}"
    assert seen().program_id


def test_the_guests_address_makes_the_ports(tap: support.TapUnderTest, bridge: str) -> None:
    assert ifup(tap, "--bridge", bridge, nic="rss=off,mac=52:54:00:aa:bb:cc").returncode == 0
    assert link("address") == "fe:54:00:aa:bb:cc"


def test_the_configuration(tap: support.TapUnderTest, bridge: str, nothing_said: Path) -> None:
    """One entry says which bridge, another one is about what is in it."""
    entries = (
        f'[[nic]]\nmatch.vm = "qsif*"\nbridge = "{bridge}"\nmtu = 1300\n',
        f'[[nic]]\nmatch.bridge = "{bridge}"\ntable = [3, 1]\n',
    )
    (nothing_said / "qsteer.toml").write_text("".join(entries))
    assert ifup(tap).returncode == 0
    assert config_of(seen()).table == (3, 1)
    check_packets(tap, config_of(seen()))
    assert (link("master"), link("mtu")) == (bridge, "1300")


def test_no_bridge_in_spite_of_the_configuration(tap: support.TapUnderTest, nothing_said: Path) -> None:
    (nothing_said / "qsteer.toml").write_text('[[nic]]\nbridge = "qs-nowhere"\n')
    done = ifup(tap, "--required")
    assert done.returncode == 3
    check_one_line(done, "qs-nowhere", hint=True)
    assert seen().program_id == 0
    done = ifup(tap)
    assert done.returncode == 0
    check_one_line(done, f"{TAP} is not set up", "qs-nowhere", hint=True)
    assert seen().program_id
    done = ifup(tap, "--bridge", "")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_configuration_with_a_mistake(tap: support.TapUnderTest, bridge: str, nothing_said: Path) -> None:
    (nothing_said / "qsteer.toml").write_text("[[nic]]\nbridge = 7\n")
    done = ifup(tap, "--bridge", bridge, "--required")
    assert done.returncode == 2
    assert "qsteer.toml:2" in done.stderr.splitlines()[0]
    assert seen().program_id == 0 and link("master") == ""
    done = ifup(tap, "--bridge", bridge)
    assert done.returncode == 0 and "qsteer.toml:2" in done.stderr
    assert seen().program_id and link("master") == bridge


def test_a_guest_that_is_offered_rss(tap: support.TapUnderTest, bridge: str) -> None:
    """Nothing is attached that QEMU would take off a moment later; the rest is done."""
    done = ifup(tap, "--bridge", bridge, nic=OFFERS_RSS)
    assert done.returncode == 0
    check_one_line(done, TAP, "rss=on", "qsteer keep", "qsteer run")
    assert (seen().program_id, link("master")) == (0, bridge)
    done = ifup(tap, "--required", nic=OFFERS_RSS)
    assert done.returncode == 5
    check_one_line(done, TAP, "rss=on", "qsteer keep")


@contextlib.contextmanager
def keep() -> Iterator[int]:
    """A process that looks like qsteer keep: what keep does is another test's."""
    code = "import time; print(flush=True); time.sleep(3600)"
    process = subprocess.Popen((sys.executable, "-c", code, "qsteer", "keep", "--all"), stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def test_keep_takes_over(tap: support.TapUnderTest) -> None:
    with keep() as pid:
        done = ifup(tap, "--required", nic=OFFERS_RSS)
    assert done.returncode == 0
    check_one_line(done, TAP, "rss=on", f"left to qsteer keep (process {pid})")


def test_a_qemu_that_takes_it_off_again(tap: support.TapUnderTest) -> None:
    done = ifup(tap, version="(7, 2)")
    assert done.returncode == 0
    check_one_line(done, "nothing attached", "7.2", "it takes qsteer keep")
    assert seen().program_id == 0


def test_a_qemu_that_does_not_tell_its_version(tap: support.TapUnderTest) -> None:
    """As this stand-in does not: it is a Python."""
    done = ifup(tap, version="")
    assert done.returncode == 0
    check_one_line(done, "attached, but", "version is not known")
    assert seen().program_id


def test_one_queue(tap: support.TapUnderTest) -> None:
    done = ifup(tap, netdev=f"tap,id=net0,ifname={TAP}")
    assert (done.returncode, done.stderr) == (0, "")
    done = ifup(tap, "-v", netdev=f"tap,id=net0,ifname={TAP}")
    assert "one queue" in done.stderr.splitlines()[0]
    assert seen().program_id == 0


def test_before_the_other_queues_are_there(namespace: str) -> None:
    """As it is when QEMU runs the script."""
    with support.tap(TAP, 1) as tap:
        assert ifup(tap).returncode == 0
        assert seen().program_id
    with support.tap(TAP, 1) as tap:
        assert ifup(tap, netdev="user,id=net0").returncode == 0
        assert seen().program_id


def test_a_nic_that_is_plugged_in_later(tap: support.TapUnderTest) -> None:
    """QEMU's command line does not have it: what is attached may stay."""
    done = ifup(tap, netdev="user,id=net0")
    assert done.returncode == 0
    check_one_line(done, "attached, but", "command line")
    assert seen().program_id


def test_a_script_of_the_users_own(tap: support.TapUnderTest, tmp_path: Path) -> None:
    """Between QEMU and qsteer-ifup, which it gives options."""
    script = tmp_path / "ifup"
    script.write_text('#!/bin/sh\nunset nothing\n"$@"\n')
    script.chmod(0o755)
    assert ifup(tap, between=(str(script),)).returncode == 0
    assert seen().program_id


@pytest.mark.parametrize("required", [False, True])
def test_no_right_to_load_bpf(tap: support.TapUnderTest, bridge: str, required: bool) -> None:
    rights = "-all,+net_admin,+dac_override"
    some = ("setpriv", "--securebits=+noroot", f"--inh-caps={rights}", f"--ambient-caps={rights}")
    before = link("address")
    done = ifup(tap, "--bridge", bridge, *["--required"] * required, prefix=some)
    check_one_line(done, "not permitted", hint=True)
    assert "CAP_BPF" in done.stderr
    assert done.returncode == (4 if required else 0)
    assert (link("master"), link("address") == before) == (("", True) if required else (bridge, False))
    assert seen().program_id == 0


def test_no_right_to_set_the_tap_up(tap: support.TapUnderTest, bridge: str) -> None:
    """It is said, and if it is required the VM does not start; the tap is as it was."""
    rights = "-all,+bpf,+perfmon,+sys_admin,+dac_override"
    some = ("setpriv", "--securebits=+noroot", f"--inh-caps={rights}", f"--ambient-caps={rights}")
    done = ifup(tap, "--bridge", bridge, "--required", prefix=some)
    assert done.returncode == 4
    check_one_line(done, "cannot set the MAC")
    assert (seen().program_id, link("master")) == (0, "")
    done = ifup(tap, "--bridge", bridge, prefix=some)
    assert done.returncode == 0
    check_one_line(done, "is not set up: cannot set the MAC")
    assert seen().program_id and link("master") == ""


@pytest.fixture
def staying(namespace: str) -> Iterator[support.TapUnderTest]:
    """A persistent tap."""
    set_persist = 0x400454CB
    with support.tap(TAP, 4) as under_test:
        fcntl.ioctl(under_test.open.fds[0], set_persist, 1)
        try:
            yield under_test
        finally:
            fcntl.ioctl(under_test.open.fds[0], set_persist, 0)


def test_a_foreign_program_stays(staying: support.TapUnderTest, bridge: str) -> None:
    foreign = support.foreign_program(1)
    kernel.attach(staying.open.fds[0], foreign)
    there = seen().program_id
    for options, code, master in ((("--required",), 6, ""), ((), 0, bridge)):
        done = ifup(staying, "--bridge", bridge, *options)
        assert done.returncode == code
        assert "lb_steer" in done.stderr.splitlines()[0]
        assert (seen().program_id, link("master")) == (there, master)
    done = ifdown(staying, "--bridge", bridge)
    assert done.returncode == 0
    check_one_line(done, "lb_steer", "stays")
    assert (seen().program_id, link("master")) == (there, "")
    os.close(foreign)


def test_a_hold_of_this_vm_is_obeyed(staying: support.TapUnderTest) -> None:
    """The same VM plugs the tap out and in again."""
    there = seen()
    place = f"netns={there.netns}, ifindex={there.ifindex}"
    before = (
        "import os; from qsteer import holds, procs; q = procs.read(os.getppid()); "
        f"holds.put(holds.Hold(tap='{TAP}', pid=q.pid, started=q.started), {place})"
    )
    done = ifup(staying, before=before)
    assert done.returncode == 0
    check_one_line(done, "holds it off")
    assert seen().program_id == 0
    # Of a VM that has ended it counts for nothing.
    assert ifup(staying).returncode == 0
    assert seen().program_id


@pytest.mark.parametrize("steered_before", [False, True])
def test_a_failure_is_undone(
    staying: support.TapUnderTest, bridge: str, nothing_said: Path, steered_before: bool
) -> None:
    """Up to the last step, on a tap that outlives QEMU."""
    (nothing_said / "qsteer.toml").write_text("[[nic]]\ntable = [3, 1]\n")
    if steered_before:
        assert support.qsteer("apply", "--dev", TAP, "--table", "1,0").returncode == 0
    before = seen()
    state = {key: link(key) for key in ("address", "mtu", "master", "flags")}
    broken = (
        "from qsteer import links; from qsteer.errors import QsteerError; do = links.configure; calls = []; "
        "fail = lambda: (_ for _ in ()).throw(QsteerError('made to fail')); "
        "links.configure = lambda *a, **k: (do(*a, **k), calls.append(1), len(calls) > 1 or fail())"
    )
    done = ifup(staying, "--bridge", bridge, "--required", before=broken)
    assert done.returncode == 1
    check_one_line(done, "made to fail")
    assert (seen().program_id, seen().content) == (before.program_id, before.content)
    assert {key: link(key) for key in state} == state


def test_another_bridges_port_is_not_taken(staying: support.TapUnderTest, bridge: str) -> None:
    support.add_bridge("qsifbr1")
    ip("link", "set", TAP, "master", "qsifbr1")
    done = ifup(staying, "--bridge", bridge, "--required")
    assert done.returncode == 1
    check_one_line(done, "another", hint=True)
    assert (link("master"), seen().program_id) == ("qsifbr1", 0)
    assert ifdown(staying, "--bridge", bridge).returncode == 0
    assert link("master") == "qsifbr1"


def test_ifdown_on_a_persistent_tap(staying: support.TapUnderTest, bridge: str) -> None:
    assert ifup(staying, "--bridge", bridge).returncode == 0
    there = seen()
    held = procs.read(os.getpid())
    assert there.program_id and held
    holds.put(holds.Hold(tap=TAP, pid=held.pid, started=held.started), netns=there.netns, ifindex=there.ifindex)
    done = ifdown(staying, "--bridge", bridge)
    assert (done.returncode, done.stderr) == (0, "")
    assert (seen().program_id, seen().hold, link("master")) == (0, False, "")


def test_ifdown_leaves_what_goes_anyhow(tap: support.TapUnderTest, bridge: str) -> None:
    assert ifup(tap, "--bridge", bridge).returncode == 0
    there = seen().program_id
    done = ifdown(tap, "-v")
    assert done.returncode == 0
    check_one_line(done, "goes with QEMU")
    assert (seen().program_id, link("master")) == (there, bridge)


def test_another_qsteer_that_does_not_finish(tap: support.TapUnderTest) -> None:
    from qsteer import execute

    with execute.lock(1):
        done = ifup(tap, before="ifup.LOCK_S = 0.1")
        assert done.returncode == 0
        check_one_line(done, "another qsteer", hint=True)
        assert "UP" in link("flags")
        assert ifup(tap, "--required", before="ifup.LOCK_S = 0.1").returncode == 8


@pytest.mark.parametrize("what", ["up", "down"])
def test_a_hostile_name(namespace: str, what: str) -> None:
    done = call(what, fds=(), name="../x\x1b[31m" + "x" * 300)
    assert done.returncode == 2
    assert "device name" in done.stderr and "\x1b" not in done.stderr


def test_by_hand(tap: support.TapUnderTest) -> None:
    """Without the fd, with that of another tap, and not from a QEMU."""
    done = call("up", fds=())
    assert done.returncode == 3
    check_one_line(done, "was inherited", hint=True)
    check_one_line(call("up", fds=tap.open.fds, name="qsif1"), '"qsif1" was inherited', hint=True)
    done = ifup(tap, argv0="python")
    assert done.returncode == 2
    check_one_line(done, "not run by a QEMU", hint=True)
    assert seen().program_id == 0
    assert call("down", fds=()).returncode == 3
    assert call("up", "-rf", fds=()).returncode == 2


def test_a_name_that_lies_about_its_vm(tap: support.TapUnderTest) -> None:
    """A command line that says anything at all changes what is done to the tap it has, and nothing else."""
    lies = f"tap,id=net0,ifname={TAP},queues=65535"
    assert ifup(tap, netdev=lies, argv0="/x/qemu-system-\udcff\x1b").returncode == 0
    check_packets(tap, config_of(seen()))


def test_programs_go_with_their_taps(namespace: str) -> None:
    with support.tap(TAP, 4) as tap:
        assert ifup(tap).returncode == 0
        assert len(support.programs_of(TAP)) == 1
    support.wait_until("the program's end", lambda: not support.programs_of(TAP))
