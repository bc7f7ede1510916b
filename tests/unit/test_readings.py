# SPDX-License-Identifier: BSD-2-Clause
"""Who is asked, in which order, and what an answer in vain means; the sources themselves are tested elsewhere."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from qsteer import agent, qemuargs, qmpvm, readings, savestate
from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError
from qsteer.model import Domain, Nic, Process, Reading, Source, Tap
from qsteer.plan import Wanted
from tests.unit.taps import CONFIG, OWN_STATIC, RSS_VHOST_NIC, process, tap

STATE = Reading(source=Source.DEVICE_STATE, config=CONFIG, paused_ms=1.0)
AGENT = Reading(source=Source.GUEST_AGENT, config=CONFIG)
PAUSE = Wanted(allow_pause=True)


TOLD = qmpvm.QmpNic(
    path="/machine/peripheral/nic1",
    driver="virtio-net-pci",
    id="nic1",
    netdev="net1",
    mac="52:54:00:00:00:02",
    rss=True,
    mq=True,
    device=None,
    backend=None,
    vhost=None,
)


def vm(*arguments: str) -> Process:
    return replace(process(), args=qemuargs.parse(("qemu-system-x86_64", "-name", "web1", *arguments)))


def qmp(*paths: str) -> Process:
    return vm(*(word for path in paths for word in ("-qmp", f"unix:{path},server=on,wait=off")))


ASKABLE = tap(nic=replace(RSS_VHOST_NIC, mac="52:54:00:00:00:01"), holder=qmp("/run/a"))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sockets that were tried, in order; nobody answers unless a test says so."""
    tried: list[str] = []

    def in_vain(path: str, *_: object, **__: object) -> Reading:
        tried.append(path)
        raise BusyError(f"{path} is silent")

    monkeypatch.setattr(savestate, "reading", in_vain)
    monkeypatch.setattr(qmpvm, "inspect", in_vain)
    monkeypatch.setattr(agent, "read", in_vain)
    return tried


def answers(reading: Reading) -> Callable[..., Reading]:
    return lambda *_, **__: reading


def test_the_state_comes_first_where_a_pause_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savestate, "reading", answers(STATE))
    assert readings.complete(ASKABLE, PAUSE, readings.Manner()).reading is STATE
    with pytest.raises(UnsupportedError, match="for a moment"):
        readings.read(ASKABLE, Source.DEVICE_STATE, readings.Manner(), allow_pause=False)


def test_patience_reaches_all_who_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, float]] = []

    def ask(*_: object, **how: float) -> Reading:
        given.append(how)
        raise BusyError("not yet")

    for module, name in ((savestate, "reading"), (qmpvm, "inspect"), (qmpvm, "used_buffers"), (agent, "read")):
        monkeypatch.setattr(module, name, ask)
    assert ASKABLE.holder and ASKABLE.holder.args
    args = replace(ASKABLE.holder.args, agent_path="/run/agent")
    asked = replace(ASKABLE, holder=replace(ASKABLE.holder, args=args))
    manner = readings.Manner(turn_s=3, answer_s=40)
    with pytest.raises(BusyError):
        readings.complete(asked, PAUSE, manner)
    assert {"patience_s": 3, "answer_s": 40} in given and given.count({"answer_s": 40}) >= 1
    given.clear()
    readings.check(replace(asked, nic=None), manner, allow_pause=False)
    assert len(given) >= 2 and all(how == {"answer_s": 40} for how in given)


def test_then_the_agent(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    assert ASKABLE.holder
    with_agent = replace(
        ASKABLE,
        domain=Domain(name="web1", uuid="u", pid=100, interfaces=(), monitor="/run/a", agent="/run/agent"),
    )
    monkeypatch.setattr(agent, "read", answers(AGENT))
    found = readings.complete(with_agent, PAUSE, readings.Manner())
    assert found.reading is AGENT
    assert asked == [], "libvirt's own monitor is libvirt's"
    assert "no QMP socket" in found.unread[0]


def test_a_guest_that_is_busy_is_to_be_tried_again(asked: list[str]) -> None:
    with pytest.raises(BusyError, match="silent"):
        readings.complete(ASKABLE, PAUSE, readings.Manner())
    assert asked == ["/run/a"]


def test_why_nobody_could_be_asked() -> None:
    nobody = replace(ASKABLE, holder=vm())
    found = readings.complete(nobody, PAUSE, readings.Manner())
    assert found.reading is None
    assert [why.partition(":")[0] for why in found.unread] == ["device-state", "guest-agent"]
    with pytest.raises(UnsupportedError, match="no guest agent"):
        readings.complete(nobody, Wanted(source=Source.GUEST_AGENT), readings.Manner())


def test_a_thousand_sockets_on_a_command_line(asked: list[str]) -> None:
    """Each takes its time: a few are enough."""
    hostile = replace(ASKABLE, nic=None, holder=qmp(*(f"/run/{number % 500}" for number in range(1000))))
    readings.complete(hostile, Wanted(), readings.Manner())
    assert asked == ["/run/0", "/run/1", "/run/2"]


def test_nobody_is_asked_what_need_not_be_known(asked: list[str]) -> None:
    for known in (tap(), tap(program=OWN_STATIC), tap(nic=RSS_VHOST_NIC, active=1)):
        assert readings.complete(known, PAUSE, readings.Manner()) == known
    assert readings.complete(ASKABLE, Wanted(source=Source.STATIC), readings.Manner()) == ASKABLE
    assert asked == []


def test_a_nic_that_was_plugged_in_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmpvm, "inspect", lambda *_, **__: None)
    monkeypatch.setattr(qmpvm, "nic_of", lambda vm, tap: TOLD)
    found = readings.complete(replace(ASKABLE, nic=None), Wanted(source=Source.SHARED_MAPS), readings.Manner())
    assert found.nic == Nic(id="nic1", netdev="net1", mac="52:54:00:00:00:02", rss=True, vhost=True)
    monkeypatch.setattr(qmpvm, "nic_of", fail)
    found = readings.complete(replace(ASKABLE, nic=None), Wanted(source=Source.SHARED_MAPS), readings.Manner())
    assert found.nic is None and "which of them" in found.unread[0]


def test_where_it_matters_the_nic_is_found_out_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    """What is wanted may be something else then: no pause that the NIC's own settings do not allow."""
    identify = Wanted(source=Source.DEVICE_STATE, allow_pause=True, identify=True)
    unknown = replace(ASKABLE, nic=None)
    monkeypatch.setattr(savestate, "reading", fail)
    with pytest.raises(BusyError):
        readings.complete(unknown, identify, readings.Manner())
    monkeypatch.setattr(qmpvm, "inspect", lambda *_, **__: None)
    monkeypatch.setattr(qmpvm, "nic_of", lambda vm, tap: TOLD)
    for one in (unknown, replace(ASKABLE, nic=replace(RSS_VHOST_NIC, mac=None))):
        found = readings.complete(one, identify, readings.Manner())
        assert found.nic and found.nic.mac == "52:54:00:00:00:02" and found.reading is None
    # Where it stays unknown, what is known has to do.
    monkeypatch.setattr(qmpvm, "nic_of", fail)
    monkeypatch.setattr(savestate, "reading", answers(STATE))
    assert readings.complete(unknown, identify, readings.Manner()).reading is STATE


def fail(*_: object, **__: object) -> None:
    raise NotFoundError("QEMU does not tell which of them")


def test_a_check_asks_only_where_it_is_not_known(monkeypatch: pytest.MonkeyPatch, asked: list[str]) -> None:
    def check(tap: Tap, *, allow_pause: bool = True) -> Tap:
        return readings.check(tap, readings.Manner(), allow_pause=allow_pause)

    monkeypatch.setattr(savestate, "reading", answers(STATE))
    assert check(ASKABLE).reading is STATE
    assert check(tap()).reading is None
    unread = check(ASKABLE, allow_pause=False)
    assert unread.reading is None and "--allow pause" in unread.unread[0]


def test_a_tap_without_a_vm() -> None:
    with pytest.raises(QsteerError, match="not that of a QEMU"):
        readings.read(tap(holder=None), Source.GUEST_AGENT, readings.Manner(), allow_pause=False)
