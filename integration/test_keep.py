# SPDX-License-Identifier: BSD-2-Clause
"""keep with real guests: for how long a tap goes unsteered when QEMU takes its program off.

The table that the tests print has for each event the longest time that the tap had no program, as a sampler saw it, and
how long it took from the event's end until the tap had what it is to have.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from integration.guest import BOOT_TIMEOUT_S, Guest, as_user
from integration.keeping import keep
from integration.provision import Provisioned
from integration.timeline import Sampler
from integration.traffic import follow, verify
from qsteer import kernel, programs, qmp
from qsteer.errors import QsteerError
from qsteer.render import columns
from qsteer.rss import RssConfig
from tests.kernel import hardened, support

pytestmark = [pytest.mark.root, pytest.mark.guest]

QUEUES = 4
WITHIN_MS = 2000
"""More than keep needs: a slow core that a guest's instructions are emulated on is no place to be strict."""
_ROWS: list[tuple[str, str, str, str, str]] = []


@pytest.fixture(scope="module", autouse=True)
def table() -> Iterator[None]:
    """What was measured, at the end."""
    yield
    heading = ("SET-UP", "EVENT", "UNSTEERED ms", "AS WANTED AFTER ms", "")
    print("\n" + columns([heading, *_ROWS]))


class MovingGuest(Guest):
    """A guest that reboots, or that comes from another QEMU (``incoming``)."""

    incoming = False

    def _standard(self) -> tuple[str, ...]:
        return (*super()._standard(), *(("-incoming", f"unix:{self.folder}/incoming") if self.incoming else ()))

    def reboot(self) -> None:
        """As its own user does; until it takes commands again."""
        qmp.execute(str(self.qmp), "set-action", {"reboot": "reset"})
        self.start("reboot -f")
        self._number = 0
        self._collect(BOOT_TIMEOUT_S)

    def wait_started(self) -> None:
        """Until QEMU runs, whatever the guest does."""
        self._listener.settimeout(30)
        self._socket, _ = self._listener.accept()
        self._open.enter_context(self._socket)
        support.wait_until("QEMU's QMP socket", self.qmp.exists)

    def take_over(self, source: "MovingGuest") -> None:
        """Migrate the guest of another QEMU, which does not run it any more then."""
        support.wait_until("QEMU listens", (self.folder / "incoming").exists)
        qmp.execute(str(source.qmp), "migrate", {"uri": f"unix:{self.folder}/incoming"})

        def done() -> bool:
            status: Any = qmp.execute(str(source.qmp), "query-migrate")
            assert status.get("status") != "failed", status
            return bool(status.get("status") == "completed")

        support.wait_until("the migration is done", done, 60)
        support.wait_until("the guest runs", self._runs, 30)
        self._number = source._number

    def _runs(self) -> bool:
        status: Any = qmp.execute(str(self.qmp), "query-status")
        return bool(status["running"])


@contextlib.contextmanager
def unprivileged(
    files: Provisioned, user: str, name: str, *, rss: str, incoming: bool = False
) -> Iterator[MovingGuest]:
    """A guest as libvirt starts one: the tap, named like the VM, is opened by somebody else."""
    tap = kernel.open_tap(name, QUEUES)
    netdev = f"tap,id=net0,vhost=off,fds={':'.join(map(str, tap.fds))}"
    device = f"virtio-net-pci,id=nic0,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss={rss}"
    guest = MovingGuest(
        files,
        name=name,
        user=user,
        prefix=as_user(user),
        arguments=("-netdev", netdev, "-device", device),
        pass_fds=tap.fds,
    )
    guest.incoming = incoming
    with guest:
        tap.close()
        yield guest


def config_of(sampler: Sampler) -> RssConfig | None:
    """What is attached now, None for nothing."""
    try:
        content = programs.read_maps(programs.program_info(sampler.now.program)) if sampler.now.program else None
    except QsteerError:
        return None
    return content.config if content and content.enabled else None


@contextlib.contextmanager
def measured(set_up: str, event: str, sampler: Sampler, wanted: Callable[[], object], note: str = "") -> Iterator[None]:
    """What happens inside, and for how long the tap has no program and is not as wanted; ``note`` is why it may."""
    began = time.monotonic()
    yield
    happened = time.monotonic()
    support.wait_until(f"{event}: the tap is as wanted", wanted, 60)
    after_ms = (time.monotonic() - happened) * 1000
    gap_ms = sampler.longest_gap_ms(began)
    _ROWS.append((set_up, event, f"{gap_ms:.0f}", f"{after_ms:.0f}", note))
    assert note or gap_ms < WITHIN_MS


def test_without_rss(files: Provisioned, user: str) -> None:
    """A table of the operator's for a guest without RSS, which the incoming migration takes off, and nothing else."""
    here, there = "qske-off", "qske-off2"
    with unprivileged(files, user, here, rss="off") as guest, keep(here) as kept:
        kept.wait_for("steered", here)
        guest.wait_ready()
        with Sampler(guest.pid, here) as sampler:
            config = config_of(sampler)
            assert config
            for event, act in (
                ("guest reboot", guest.reboot),
                ("system_reset", guest.reset),
                ("ethtool -L eth0 combined 2", lambda: guest.run("ethtool -L eth0 combined 2")),
                ("ethtool -L eth0 combined 4", lambda: guest.run("ethtool -L eth0 combined 4")),
            ):
                with measured("rss=off, static", event, sampler, lambda: config_of(sampler) == config):
                    act()
        with unprivileged(files, user, there, rss="off", incoming=True) as target, keep(there) as kept_there:
            target.wait_started()
            kept_there.wait_for("steered", there)
            with Sampler(target.pid, there) as sampler:
                config = config_of(sampler)
                assert config
                with measured("rss=off, static", "incoming migration", sampler, lambda: config_of(sampler) == config):
                    target.take_over(guest)
                assert "QEMU took it off" in kept_there.wait_for("put-back", there)["detail"]
                verdict = verify(follow(target, there, files.flowrx, queues=QUEUES), config, queues=QUEUES)
                assert (verdict.mismatches, verdict.lost) == (0, 0)


def test_a_nic_that_is_plugged_in(files: Provisioned) -> None:
    name, plugged = "qske-plug", "qske-plug1"
    with MovingGuest(files, name=name, arguments=("-S",)) as guest, keep(name) as kept:
        guest.wait_started()
        netdev = {"type": "tap", "id": "net1", "ifname": plugged, "queues": QUEUES, "script": "no", "downscript": "no"}
        began = time.monotonic()
        qmp.execute(str(guest.qmp), "netdev_add", netdev)
        with Sampler(guest.pid, plugged) as sampler:
            device = {"driver": "virtio-net-pci", "id": "nic1", "netdev": "net1", "mq": True, "vectors": 10}
            qmp.execute(str(guest.qmp), "device_add", device)
            support.wait_until("it is steered", lambda: sampler.now.program)
            steered = next(moment.at for moment in sampler.moments if moment.program)
            _ROWS.append(("rss=off, static", "NIC plugged in", f"{(steered - began) * 1000:.0f}", "", ""))
            kept.wait_for("steered", plugged)


def test_maps_that_qemu_writes(files: Provisioned, user: str) -> None:
    """QEMU attaches the program itself; keep looks on."""
    name = "qske-run"
    run = ("run", "--vm", name, "--tap", f"id=net0,queues={QUEUES},ifname={name}", "--user", user, "--")
    prefix = (sys.executable, "-m", "qsteer", *run)
    with MovingGuest(files, name=name, user=user, prefix=prefix) as guest, keep(name) as kept:
        guest.wait_ready()
        set_up = "rss=on, qsteer run"
        with Sampler(guest.pid, name) as sampler:

            def as_asked() -> bool:
                return config_of(sampler) == guest.rss()

            guest.run("ethtool -X eth0 equal 3")
            with measured(set_up, "ethtool -X equal 2", sampler, as_asked):
                guest.run("ethtool -X eth0 equal 2")
            for event, act in (
                ("ethtool -L combined 2", lambda: guest.run("ethtool -L eth0 combined 2")),
                ("guest reboot", guest.reboot),
                ("system_reset", guest.reset),
            ):
                with measured(set_up, event, sampler, as_asked, "the guest turns RSS off, and on by ethtool -X"):
                    act()
                    guest.run("ethtool -X eth0 equal 2")
            told = {one["event"] for one in kept.read()}
            assert told & {"attached", "configuration"} and not told & {"put-back", "steered", "fight"}


def test_device_state(files: Provisioned, user: str) -> None:
    """QEMU may load no program, steers in software, and takes off what is attached whenever the guest sets RSS.

    keep has only the rights that its unit file leaves it.
    """
    here, there = "qske-on", "qske-on2"
    options, prefix = ("--allow", "pause", "--reread", "2"), hardened.prefix()
    set_up = "rss=on, device-state"
    with unprivileged(files, user, here, rss="on") as guest, keep(here, *options, prefix=prefix) as kept:
        guest.wait_ready()
        with Sampler(guest.pid, here) as sampler:

            def as_asked() -> bool:
                return config_of(sampler) == guest.rss()

            with measured(
                set_up, "ethtool -X equal 3, the first", sampler, as_asked, "no signal: read again every 2 s"
            ):
                guest.run("ethtool -X eth0 equal 3")
            with measured(set_up, "ethtool -X equal 2", sampler, as_asked):
                guest.run("ethtool -X eth0 equal 2")
            for event, act in (
                ("ethtool -L combined 2", lambda: guest.run("ethtool -L eth0 combined 2")),
                ("guest reboot", guest.reboot),
                ("system_reset", guest.reset),
            ):
                note = "the guest turns RSS off, and on by ethtool -X"
                with measured(set_up, event, sampler, as_asked, note):
                    act()
                    guest.run("ethtool -X eth0 equal 2")
            told = [one for one in kept.read() if "stood still" in one["detail"]]
            assert told
        with (
            unprivileged(files, user, there, rss="on", incoming=True) as target,
            keep(there, *options, prefix=prefix) as kept_there,
        ):
            target.wait_started()
            with Sampler(target.pid, there) as sampler:
                config = guest.rss()
                # Nothing is attached before the guest runs: so long nobody can be asked.
                target.take_over(guest)
                with measured(set_up, "incoming migration", sampler, lambda: config_of(sampler) == config):
                    pass
                assert target.rss() == config
                assert "device-state" in kept_there.wait_for("steered", there)["detail"]
