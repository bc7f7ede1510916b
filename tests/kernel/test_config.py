# SPDX-License-Identifier: BSD-2-Clause
"""The configuration on real taps that stand-ins for VMs hold: what a plain apply and keep make of it, and --save."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsteer import config, kernel
from qsteer.rss import equal_table
from tests.kernel import private, standin, support
from tests.kernel.daemons import config_of, daemon, program_of
from tests.kernel.support import qsteer

pytestmark = pytest.mark.root

KEY = ":".join(f"{byte:02x}" for byte in range(40))
OTHER_KEY = ":".join(f"{byte:02x}" for byte in range(100, 140))


@pytest.fixture(autouse=True)
def own_host(need_root: None) -> Iterator[None]:
    """Holds, the lock and pins of this test's own, and a network namespace."""
    with private.memory(), support.network_namespace():
        yield


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration's directory, for all commands."""
    monkeypatch.setenv(config.VARIABLE, str(tmp_path))
    return tmp_path


def put(folder: Path, text: str, name: str = config.MAIN) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.parent.chmod(0o755)
    path.write_text(text)
    path.chmod(0o644)


def apply(*options: str, vm: str = "qscf0") -> str:
    done = qsteer("apply", "--vm", vm, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_plain_apply_does_what_the_files_say_and_options_go_over_it(folder: Path) -> None:
    put(folder, f'[[nic]]\nmatch.vm = "qscf*"\nkey = "{KEY}"\nequal = 3\n')
    with standin.vm("qscf0") as vm:
        assert "source static" in apply()
        first = config_of(vm)
        assert (first.key.hex(":"), first.table) == (KEY, equal_table(3))
        vm.check_packets(first)
        assert "unchanged" in apply()

        put(folder, '[[nic]]\nmatch.nic = "n0"\ntable = [2, 1]\n', "conf.d/20.toml")
        put(folder, '[[nic]]\nmatch.nic = "n1"\ntable = [0, 0]\n', "conf.d/30.toml")
        put(folder, "[[nic]]\ntable = [3, 3]\n", "conf.d/10.toml")
        apply()
        assert (config_of(vm).key.hex(":"), config_of(vm).table) == (KEY, (2, 1))

        apply("--table", "1,3", "--key", OTHER_KEY)
        assert (config_of(vm).key.hex(":"), config_of(vm).table) == (OTHER_KEY, (1, 3))
        vm.check_packets(config_of(vm))
        assert "unchanged" in apply("--source", "auto")
        assert config_of(vm).table == (1, 3)


def test_by_the_bridge_that_a_tap_is_in(folder: Path) -> None:
    put(folder, '[[nic]]\nequal = 2\n[[nic]]\nmatch.bridge = "qscfb*"\nequal = 3\n')
    support.add_bridge("qscfbr")
    with standin.vm("qscf0") as vm, standin.vm("qscf1") as other:
        support.links_up("qscf0", master="qscfbr")
        apply()
        apply(vm="qscf1")
        assert config_of(vm).table == equal_table(3)
        assert config_of(other).table == equal_table(2)


def test_a_bridge_is_seen_in_sysfs_over_rtnetlink_and_in_other_namespaces() -> None:
    """sysfs shows this namespace's devices once it is mounted anew."""
    script = (
        "from qsteer import bridges, inventory; known = bridges.Bridges(); "
        "print(known._in_sysfs, {tap.name: known.of(tap) for tap in inventory.fetch().taps if tap.name[:4] == 'qscf'})"
    )
    with contextlib.ExitStack() as stack:
        for number in range(2):
            if number:
                stack.enter_context(support.network_namespace())
            bridge = f"qscfbr{number}"
            support.add_bridge(bridge)
            for name in (f"qscfin{number}", f"qscfout{number}"):
                stack.enter_context(support.tap(name))
            support.links_up(f"qscfin{number}", master=bridge)
        python = (sys.executable, "-c", script)
        seen = "{'qscfin0': 'qscfbr0', 'qscfout0': None, 'qscfin1': 'qscfbr1', 'qscfout1': None}"
        for command, in_sysfs in (
            (python, False),
            (("unshare", "-m", "sh", "-c", 'mount -t sysfs none /sys; exec "$@"', "sh", *python), True),
        ):
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
            assert told == f"{in_sysfs} {seen}"


def test_what_else_the_files_say(folder: Path) -> None:
    with standin.vm("qscf0") as vm:
        foreign = support.foreign_program(1)
        kernel.attach(vm.tap.open.fds[0], foreign)
        assert qsteer("apply", "--vm", "qscf0").returncode == 6
        put(folder, "[[nic]]\nreplace = true\n")
        assert "replaced" in apply()
        os.close(foreign)
        put(folder, '[[nic]]\nsource = "guest-agent"\n')
        done = qsteer("apply", "--vm", "qscf0")
        assert done.returncode == 5 and "no guest agent" in done.stderr
        assert "unchanged" in apply("--source", "auto")


def test_keep_obeys_and_reads_again(folder: Path) -> None:
    put(folder, '[[nic]]\nmatch.vm = "qscf0"\ntable = [3, 1]\n')
    with standin.vm("qscf0") as vm, standin.vm("qscf1") as other, daemon("keep", "qscf0", "qscf1") as keep:
        key = config_of(vm).key
        assert config_of(vm).table == (3, 1) and len(config_of(other).table) == 128
        applied = program_of(other)

        put(folder, '[[nic]]\nmatch.vm = "qscf0"\ntable = [2, 0]\n')
        keep.process.send_signal(signal.SIGHUP)
        keep.wait_told("READY=1")
        assert (config_of(vm).key, config_of(vm).table) == (key, (2, 0))
        assert program_of(other) == applied

        put(folder, '[[nic]]\nmatch.vm = "qscf0"\ntable = [1, 0\n')
        keep.process.send_signal(signal.SIGHUP)
        keep.wait_told("READY=1")
        assert config_of(vm).table == (2, 0)
        (line,) = [line for line in support.lines(keep.said()) if "stays as it was" in line]
        assert f"{folder}/qsteer.toml:" in line

        # A reload without news leaves what somebody has applied meanwhile.
        put(folder, '[[nic]]\nmatch.vm = "qscf0"\ntable = [2, 0]\n')
        apply("--table", "1,1")
        keep.process.send_signal(signal.SIGHUP)
        keep.wait_told("READY=1")
        assert config_of(vm).table == (1, 1)


def test_off_goes_over_the_files_for_keep(folder: Path) -> None:
    put(folder, "[[nic]]\nequal = 2\n")
    with standin.vm("qscf0") as vm:
        assert qsteer("off", "--vm", "qscf0").returncode == 0
        with daemon("keep", "qscf0") as keep:
            assert program_of(vm) == 0
            apply()
            keep.wait_for("hold-lifted")
            assert config_of(vm).table == equal_table(2)


def test_saved_and_found_again(folder: Path) -> None:
    with standin.vm("qscf0") as vm:
        tried = qsteer("apply", "--vm", "qscf0", "--key", "random", "--equal", "2", "--save", "-n")
        assert tried.returncode == 0 and "[[nic]]" in tried.stdout and "90-saved-qscf0@n0.toml" in tried.stdout
        assert not (folder / "conf.d").exists() and program_of(vm) == 0

        text = apply("--key", "random", "--equal", "2", "--types", "tcp4", "--save")
        file = folder / "conf.d" / "90-saved-qscf0@n0.toml"
        assert f"saved to {file}" in text
        assert (file.stat().st_mode & 0o777, file.stat().st_uid) == (0o644, 0)
        assert [path.name for path in file.parent.iterdir()] == [file.name]
        before = config_of(vm)
    with standin.vm("qscf0") as vm:
        assert program_of(vm) == 0
        apply()
        assert config_of(vm) == before
        vm.check_packets(before)
        # Once more with something else: that goes over what is saved.
        done = qsteer("apply", "--vm", "qscf0", "--unclassified-queue", "3", "--save", "--json")
        (saved,) = (tap["save"] for tap in json.loads(done.stdout)["taps"])
        assert saved == {"file": str(file), "content": file.read_text()}
    with standin.vm("qscf0") as vm:
        apply()
        now = config_of(vm)
        assert (now.key, now.table, now.types, now.unclassified_queue) == (before.key, before.table, before.types, 3)
        apply("--source", "auto", "--save")
        assert 'source = "auto"' in file.read_text() and "table" not in file.read_text()


def test_a_file_that_is_somebody_elses_is_not_overwritten(folder: Path) -> None:
    mine = "# mine\n[[nic]]\nequal = 2\n"
    put(folder, mine, "conf.d/90-saved-qscf0@n0.toml")
    with standin.vm("qscf0") as vm:
        done = qsteer("apply", "--vm", "qscf0", "--equal", "3", "--save")
        assert done.returncode == 1 and "was not written by qsteer" in done.stderr
        assert program_of(vm) == 0
    assert (folder / "conf.d" / "90-saved-qscf0@n0.toml").read_text() == mine


def test_where_nothing_can_be_saved_the_tap_is_steered(folder: Path) -> None:
    private.mount("-t", "tmpfs", "-o", "ro,mode=755", "none", str(folder))
    with standin.vm("qscf0") as vm:
        done = qsteer("apply", "--vm", "qscf0", "--equal", "3", "--save")
        assert done.returncode == 1 and "is steered, but cannot save" in done.stderr
        assert "attached" in done.stdout and "saved to" not in done.stdout
        assert config_of(vm).table == equal_table(3)
    private.unmount(str(folder))


def test_nothing_is_saved_for_a_name_that_several_claim(folder: Path) -> None:
    with standin.vm("qscf0") as vm, standin.vm("qscf1", called="qscf0"):
        done = qsteer("apply", "--dev", "qscf1", "--equal", "3", "--save")
        assert done.returncode == 2 and "the name of several VMs" in done.stderr
        assert not (folder / "conf.d").exists() and program_of(vm) == 0


def test_a_file_that_goes_over_what_is_saved_is_told(folder: Path) -> None:
    put(folder, "[[nic]]\ntable = [1, 2]\n", "conf.d/99.toml")
    with standin.vm("qscf0"):
        done = qsteer("apply", "--vm", "qscf0", "--equal", "3", "--save")
        assert done.returncode == 0 and "does not count" in done.stderr


def test_a_broken_configuration(folder: Path) -> None:
    """What changes something by it is refused; all else goes on."""
    put(folder, "[[nic]]\nequall = 3\n")
    message = f'qsteer: {folder}/qsteer.toml:2: unknown key "equall" in nic\nhint: did you mean "equal"?\n'
    with standin.vm("qscf0") as vm:
        for verb in ("apply", "keep"):
            done = qsteer(verb, "--vm", "qscf0")
            assert (done.returncode, done.stdout, done.stderr) == (2, "", message)
        assert program_of(vm) == 0 and not private.files()
        for command in (("status",), ("status", "--check"), ("show",), ("off", "--vm", "qscf0"), ("clean",)):
            assert qsteer(*command).returncode == 0, command
        with daemon("monitor", "qscf0") as monitor:
            assert monitor.stop() == 0
        checked = qsteer("config", "check")
        assert (checked.returncode, checked.stdout) == (2, "")


def test_a_file_that_others_may_write_is_refused(folder: Path) -> None:
    put(folder, "[[nic]]\nequal = 3\n")
    file = folder / config.MAIN
    file.chmod(0o664)
    refused("chmod go-w")
    file.chmod(0o644)
    os.chown(file, 1000, 0)
    refused("chown root")
    assert qsteer("config", "check", str(file)).returncode == 0
    os.chown(file, 0, 0)
    folder.chmod(0o777)
    refused("chmod go-w")
    folder.chmod(0o755)
    assert qsteer("config", "check").returncode == 0


def refused(hint: str) -> None:
    done = qsteer("config", "check")
    assert done.returncode == 2 and f"(hint: {hint})" in done.stderr
