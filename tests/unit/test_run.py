# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer run`` without root: its options, QEMU's new command line, and what happens at the edges, which are faked.

integration/ does the same with a real QEMU, real taps and a real kernel.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qsteer import config, hashing, kernel, links, procs, programs, qemuargs, qmp, ready, run, runplan, shim
from qsteer.errors import (
    NotFoundError,
    PermissionDeniedError,
    QsteerError,
    UnsupportedError,
    UsageError,
)
from qsteer.model import Build, Engine, Generation, Hashing, Process, Source
from qsteer.plan import Static
from qsteer.qmp import QemuProbe
from qsteer.rss import BASE_TYPES, HashType
from qsteer.runplan import NicHandles, Rss, TapSpec, Vhost, make_plan, parse_tap, parse_taps, qemu_argv, stable_mac
from qsteer.settings import Config, Entry, Match, Settings

QEMU = "qemu-system-x86_64"
MAC = "52:54:00:aa:bb:cc"

# From device-list-properties of QEMU 10.0.2.
TYPES = {
    "netdev": "str",
    "mac": "str",
    "mq": "bool",
    "vectors": "uint32",
    "rss": "bool",
    "hash": "bool",
    "host_mtu": "uint16",
    "ebpf-rss-fds": "list",
    "addr": "str",
    "bootindex": "int32",
    "speed": "int32",
    "disable-legacy": "OnOffAuto",
    "x-max-bounce-buffer-size": "size",
    "romfile": "str",
    "tx": "str",
    "guest_tso4": "bool",
}
MMIO_TYPES = {
    name: kind for name, kind in TYPES.items() if name not in ("vectors", "addr", "romfile", "disable-legacy")
}
OLD_TYPES = {name: kind for name, kind in TYPES.items() if name != "ebpf-rss-fds"}


def qemu(version: tuple[int, int, int] = (10, 0, 2), *, libbpf: bool = True, **drivers: dict[str, str]) -> QemuProbe:
    properties = {name.replace("_", "-"): types for name, types in drivers.items()}
    return QemuProbe(version=version, libbpf=libbpf, properties=properties or {"virtio-net-pci": TYPES})


QEMU_10_0 = qemu()
QEMU_11_1 = qemu((11, 1, 3))


def plan_of(
    *taps: str,
    arguments: Sequence[str] = (),
    probe: QemuProbe = QEMU_10_0,
    vm: str | None = None,
    vhost_available: bool = False,
) -> runplan.RunPlan:
    command = (QEMU, *arguments)
    return make_plan(specs=parse_taps(taps), command=command, probe=probe, vm=vm, vhost_available=vhost_available)


def handles_of(plan: runplan.RunPlan) -> tuple[NicHandles, ...]:
    """fds as ``run`` would have them: 10, 20, ... and on for queues, 50 for vhost, 91 for the program and its maps."""
    return tuple(
        NicHandles(
            queue_fds=tuple(str(10 * (index + 1) + queue) for queue in range(nic.spec.queues)),
            vhost_fds=tuple(str(50 + queue) for queue in range(nic.spec.queues)),
            program_fds=("91", "92", "93", "94"),
            mac=nic.mac or MAC,
        )
        for index, nic in enumerate(plan.nics)
    )


def argv_of(*taps: str, **options: object) -> tuple[str, ...]:
    plan = plan_of(*taps, **options)  # type: ignore[arg-type]
    argv = qemu_argv(plan, handles_of(plan))
    assert argv[0] == QEMU
    return argv[1:]


def device_of(tap: str, device: str, **options: object) -> dict[str, object]:
    argv = argv_of(tap, arguments=("-device", device), **options)
    assert argv.count("-device") == 1
    members = json.loads(argv[1])
    assert isinstance(members, dict)
    return members


# --engine


@pytest.mark.parametrize("vhost", ["off", "on"])
def test_tun_itself_steers(vhost: str) -> None:
    """The guest is offered no RSS, QEMU gets no program, and vhost costs nothing."""
    specs = parse_taps((f"id=net0,queues=4,vhost={vhost}",), engine="kernel")
    for probe in (QEMU_10_0, QEMU_11_1):
        plan = make_plan(specs=specs, command=(QEMU,), probe=probe, vm="web1", vhost_available=True)
        (nic,) = plan.nics
        assert (nic.in_kernel, nic.steered, nic.vhost) == (Static(), False, vhost == "on")
        assert nic.gains == ("mac", "mq", "vectors")
        assert plan.notes == ("net0: steered by tun itself, by a table of the host's; the guest is offered no RSS",)
        assert "set in-kernel RSS for the tap of net0" in runplan.tap_steps(nic, bridge_mtu=None)
        assert "ebpf-rss-fds" not in " ".join(qemu_argv(plan, handles_of(plan)))


def test_tun_itself_and_a_guest_that_is_offered_rss() -> None:
    with_vhost = parse_taps(("id=net0,queues=4,rss=on,vhost=on",), engine="kernel")
    plan = make_plan(specs=with_vhost, command=(QEMU,), probe=QEMU_11_1, vm="web1", vhost_available=True)
    assert "rss" in plan.nics[0].gains and "until qsteer keep --allow pause follows" in plan.notes[0]
    for spec, arguments in (
        ("id=net0,queues=4,rss=on,vhost=off", ()),
        ("id=net0,queues=4,vhost=off", ("-device", "virtio-net-pci,netdev=net0,rss=on")),
    ):
        with pytest.raises(UnsupportedError, match="steers in software with rss=on and without vhost"):
            make_plan(
                specs=parse_taps((spec,), engine="kernel"),
                command=(QEMU, *arguments),
                probe=QEMU_10_0,
                vm="web1",
                vhost_available=True,
            )


def test_an_engine_that_is_configured() -> None:
    """With its table; the option goes over it, and one queue has nothing to steer."""
    entry = Entry(match=Match(nic=("net0",)), settings=Settings(engine=Engine.KERNEL, static=Static(table=(1, 2))))
    config = Config(entries=(entry,))
    taps = ("id=net0,queues=4", "id=net1,queues=4")
    assert [one.in_kernel for one in parse_taps(taps, config)] == [Static(table=(1, 2)), None]
    assert [one.in_kernel for one in parse_taps(taps, config, engine="auto")] == [None, None]
    single = parse_taps(("id=net0,queues=1",), config)
    plan = make_plan(specs=single, command=(QEMU,), probe=QEMU_10_0, vm="web1", vhost_available=False)
    assert plan.nics[0].in_kernel is None


def test_mq_off_is_told_of_in_kernel_too() -> None:
    plan = make_plan(
        specs=parse_taps(("id=net0,queues=4",), engine="kernel"),
        command=(QEMU, "-device", "virtio-net-pci,netdev=net0,mq=off"),
        probe=QEMU_10_0,
        vm="web1",
        vhost_available=False,
    )
    assert plan.notes == (
        "net0: steered by tun itself, by a table of the host's; the guest is offered no RSS",
        "net0: mq=off on QEMU's command line: the guest uses one queue only",
    )


# --tap


def test_tap_defaults() -> None:
    assert parse_tap("id=net0,queues=4") == TapSpec(id="net0", queues=4)


def test_tap_with_everything() -> None:
    text = "queues=256,id=n.0_-,ifname=fifteen-letters,bridge=br0,mac=52:54:00:AB:CD:EF,mtu=9000,vhost=off,rss=off"
    assert parse_tap(text) == TapSpec(
        id="n.0_-",
        queues=256,
        ifname="fifteen-letters",
        bridge="br0",
        mac="52:54:00:ab:cd:ef",
        mtu=9000,
        vhost=Vhost.OFF,
        rss=Rss.OFF,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", 'unknown ""'),
        ("net0", 'unknown "net0"'),
        ("id=net0", "queues= is missing"),
        ("queues=4", "id= is missing"),
        ("id=net0,queues=4,", 'unknown ""'),
        ("id=net0,queues=4,queue=4", 'unknown "queue"'),
        ("id=net0,queues=4,ID=a", 'unknown "ID"'),
        ("id=net0,id=net0,queues=4", "id= is given twice"),
        ("id=,queues=4", "id= wants a value"),
        ("id,queues=4", "id= wants a value"),
        ("id=0net,queues=4", "is not an id"),
        ("id=net 0,queues=4", "is not an id"),
        ("id=né,queues=4", "is not an id"),
        ("id=a/b,queues=4", "is not an id"),
        ("id=net0\n,queues=4", "is not an id"),
        ("id=net0,queues=0", "from 1 to 256"),
        ("id=net0,queues=257", "from 1 to 256"),
        ("id=net0,queues=-1", "from 1 to 256"),
        ("id=net0,queues=four", "from 1 to 256"),
        ("id=net0,queues=0x4", "from 1 to 256"),
        ("id=net0,queues=4.0", "from 1 to 256"),
        ("id=net0,queues=٤", "from 1 to 256"),
        ("id=net0,queues=" + "9" * 5000, "from 1 to 256"),
        ("id=net0,queues=4,ifname=sixteen-letters-", "is too long"),
        ("id=net0,queues=4,ifname=ééééééééé", "is too long"),
        ("id=net0,queues=4,ifname=tap%d", "is not a network device name"),
        ("id=net0,queues=4,ifname=a/b", "is not a network device name"),
        ("id=net0,queues=4,ifname=a:b", "is not a network device name"),
        ("id=net0,queues=4,ifname=a b", "is not a network device name"),
        ("id=net0,queues=4,ifname=..", "is not a network device name"),
        ("id=net0,queues=4,ifname=a\x1b", "is not a network device name"),
        ("id=net0,queues=4,ifname=", "ifname= wants a value"),
        ("id=net0,queues=4,bridge=../br0", "is not a network device name"),
        ("id=net0,queues=4,bridge=sixteen-letters-", "is too long"),
        ("id=net0,queues=4,mac=52:54:00:12:34", "is not a MAC address"),
        ("id=net0,queues=4,mac=52:54:00:12:34:5g", "is not a MAC address"),
        ("id=net0,queues=4,mac=52-54-00-12-34-56", "is not a MAC address"),
        ("id=net0,queues=4,mac=52:54:00:12:34:56:78", "is not a MAC address"),
        ("id=net0,queues=4,mac=random", "is not a MAC address"),
        ("id=net0,queues=4,mac=53:54:00:12:34:56", "is not a unicast address"),
        ("id=net0,queues=4,mac=00:00:00:00:00:00", "is not a unicast address"),
        ("id=net0,queues=4,mtu=67", "from 68 to 65521"),
        ("id=net0,queues=4,mtu=65522", "from 68 to 65521"),
        ("id=net0,queues=4,mtu=1500b", "from 68 to 65521"),
        ("id=net0,queues=4,vhost=yes", "none of auto, on, off"),
        ("id=net0,queues=4,vhost=", "vhost= wants a value"),
        ("id=net0,queues=4,rss=maybe", "none of auto, on, off"),
        ("id=net0,queues=4,rss=1", "none of auto, on, off"),
    ],
)
def test_bad_tap(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_tap(text)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"--tap {text}")


def test_unknown_key_names_the_keys() -> None:
    with pytest.raises(UsageError) as caught:
        parse_tap("id=net0,queues=4,speed=9")
    assert caught.value.hint == "it takes id, queues, ifname, bridge, mac, mtu, vhost, rss"


@pytest.mark.parametrize(
    ("same", "what"),
    [("", "id=net0"), (",ifname=t0", "ifname=t0"), (",mac=52:54:00:00:00:01", "mac=52:54:00:00:00:01")],
)
def test_two_taps_alike(same: str, what: str) -> None:
    other = "net0" if not same else "net1"
    with pytest.raises(UsageError, match=f"two --tap with {what}"):
        parse_taps((f"id=net0,queues=4{same}", f"id={other},queues=4{same}"))


# The command line


def test_golden_appended() -> None:
    assert argv_of("id=net0,queues=4", arguments=("-m", "512"), vm="web1") == (
        *("-m", "512", "-name", "guest=web1"),
        *("-netdev", "tap,id=net0,fds=10:11:12:13,vhost=off", "-device"),
        '{"driver":"virtio-net-pci","netdev":"net0","mq":true,"vectors":10,"rss":true,"mac":"52:54:00:aa:bb:cc",'
        '"ebpf-rss-fds":["91","92","93","94"]}',
    )


def test_golden_two_nics_of_which_one_is_the_users_own() -> None:
    device = "virtio-net-pci,netdev=net1,addr=0x5,bootindex=01,mac=52:54:00:00:00:01,mq=off"
    arguments = ("-device", device, "-name", "we,,b1,process=x", "-S")
    assert argv_of("id=net0,queues=2,mtu=9000", "id=net1,queues=3", arguments=arguments) == (
        "-device",
        '{"driver":"virtio-net-pci","netdev":"net1","addr":"0x5","bootindex":1,"mac":"52:54:00:00:00:01","mq":false,'
        '"vectors":8,"rss":true,"ebpf-rss-fds":["91","92","93","94"]}',
        *("-name", "we,,b1,process=x", "-S"),
        *("-netdev", "tap,id=net0,fds=10:11,vhost=off", "-device"),
        '{"driver":"virtio-net-pci","netdev":"net0","mq":true,"vectors":6,"rss":true,"mac":"52:54:00:aa:bb:cc",'
        '"host_mtu":9000,"ebpf-rss-fds":["91","92","93","94"]}',
        *("-netdev", "tap,id=net1,fds=20:21:22,vhost=off"),
    )


def test_golden_one_queue() -> None:
    assert argv_of("id=net0,queues=1") == (
        *("-netdev", "tap,id=net0,fds=10,vhost=off"),
        *("-device", '{"driver":"virtio-net-pci","netdev":"net0","mac":"52:54:00:aa:bb:cc"}'),
    )
    assert plan_of("id=net0,queues=1").notes == ("net0: one queue, nothing to steer",)


def test_golden_vhost() -> None:
    netdev = argv_of("id=net0,queues=2", vhost_available=True)[1]
    assert netdev == "tap,id=net0,fds=10:11,vhost=on,vhostfds=50:51"


def test_rss_off() -> None:
    assert json.loads(argv_of("id=net0,queues=2,rss=off")[3]) == {
        "driver": "virtio-net-pci",
        "netdev": "net0",
        "mq": True,
        "vectors": 6,
        "mac": MAC,
    }


GAINED: dict[str, object] = {
    "mq": True,
    "vectors": 10,
    "rss": True,
    "mac": MAC,
    "ebpf-rss-fds": ["91", "92", "93", "94"],
}


@pytest.mark.parametrize(
    ("device", "members"),
    [
        ("virtio-net-pci,netdev=net0", {}),
        ("virtio-net,netdev=net0", {"driver": "virtio-net"}),
        ("driver=virtio-net-pci,netdev=net0", {}),
        ("virtio-net-pci,netdev=net0,id=x,bus=pci.0,addr=5", {"id": "x", "bus": "pci.0", "addr": "5"}),
        ("virtio-net-pci,netdev=net0,mq", {"mq": True}),
        ("virtio-net-pci,netdev=net0,noguest_tso4", {"guest_tso4": False}),
        ("virtio-net-pci,netdev=net0,mq=yes,vectors=0x20", {"mq": True, "vectors": 32}),
        ("virtio-net-pci,netdev=net0,vectors=0", {"vectors": 0}),
        ("virtio-net-pci,netdev=net0,vectors=010", {"vectors": 8}),
        ("virtio-net-pci,netdev=net0,rss=true", {"rss": True}),
        ("virtio-net-pci,netdev=net0,speed=-1", {"speed": -1}),
        ("virtio-net-pci,netdev=net0,disable-legacy=on", {"disable-legacy": "on"}),
        ("virtio-net-pci,netdev=net0,x-max-bounce-buffer-size=4k", {"x-max-bounce-buffer-size": 4096}),
        ("virtio-net-pci,netdev=net0,romfile=", {"romfile": ""}),
        ("virtio-net-pci,netdev=net0,romfile=a,,b", {"romfile": "a,b"}),
        ("virtio-net-pci,netdev=net0,x-unknown=7", {"x-unknown": "7"}),
        ("virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01", {"mac": "52:54:00:00:00:01"}),
        ('{"driver":"virtio-net-pci","netdev":"net0"}', {}),
        ('{"driver":"virtio-net-pci","netdev":"net0","vectors":4,"id":"é"}', {"vectors": 4, "id": "é"}),
        ("{'driver':'virtio-net-pci','netdev':'net0','mq':false}", {"mq": False}),
    ],
)
def test_a_device_gains_what_it_lacks(device: str, members: dict[str, object]) -> None:
    given = {"driver": "virtio-net-pci", "netdev": "net0"}
    assert device_of("id=net0,queues=4", device) == given | GAINED | members


def test_a_device_that_lacks_nothing_stays_as_it_is() -> None:
    device = "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01"
    assert argv_of("id=net0,queues=1", arguments=("-device", device))[1] == device


def test_a_global_counts_as_given() -> None:
    arguments = ("-global", "virtio-net-pci.vectors=0", "-global", "virtio-net-pci.romfile=", "-global", "e1000.mq=on")
    device = json.loads(argv_of("id=net0,queues=4", arguments=arguments)[-1])
    assert device == {"driver": "virtio-net-pci", "netdev": "net0"} | {
        k: v for k, v in GAINED.items() if k != "vectors"
    }
    plan = plan_of("id=net0,queues=4", arguments=("-global", "virtio-net-pci.rss=off"))
    assert not plan.nics[0].steered


def test_a_driver_gains_only_properties_that_it_has() -> None:
    probe = qemu(virtio_net_pci=TYPES, virtio_net_device=MMIO_TYPES)
    device = device_of("id=net0,queues=4", "virtio-net-device,netdev=net0", probe=probe)
    assert "vectors" not in device
    assert device["ebpf-rss-fds"] == ["91", "92", "93", "94"]


def test_the_alias_is_the_ccw_device_where_there_is_one() -> None:
    probe = qemu(virtio_net_pci=TYPES, virtio_net_ccw=MMIO_TYPES)
    assert "vectors" not in device_of("id=net0,queues=4", "virtio-net,netdev=net0", probe=probe)
    assert device_of("id=net0,queues=4", "virtio-net,netdev=net0")["vectors"] == 10


def test_drivers_to_ask_for() -> None:
    args = qemuargs.parse((QEMU, "-device", "virtio-net,netdev=a", "-device", "virtio-net-device,netdev=b"))
    assert runplan.drivers_of(args) == ("virtio-net-pci", "virtio-net-ccw", "virtio-net-device")


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("-netdev", "user,id=net0"), UsageError, 'has a netdev "net0" already'),
        (("-netdev", '{"type":"tap","id":"net0"}'), UsageError, 'has a netdev "net0" already'),
        (("-nic", "user,id=net0"), UsageError, 'has a netdev "net0" already'),
        (("-device", "e1000,netdev=net0"), UsageError, "is not a virtio-net"),
        (("-device", '{"driver":"rtl8139","netdev":"net0"}'), UsageError, "is not a virtio-net"),
        (("-device", "virtio-net,netdev=net0") * 2, UsageError, 'two -device for netdev "net0"'),
        (
            ("-device", "virtio-net-nosuch,netdev=net0"),
            UnsupportedError,
            'QEMU 10.0.2 has no device "virtio-net-nosuch"',
        ),
        (("-device", "virtio-net-pci,netdev=net0,mq=maybe"), UsageError, 'mq="maybe" is neither on nor off'),
        (("-device", "virtio-net-pci,netdev=net0,vectors=ten"), UsageError, 'vectors="ten" is not a number'),
        (("-device", "virtio-net-pci,netdev=net0,mac=1:2"), UsageError, "is not a MAC address"),
        (("-device", '{"driver":"virtio-net-pci"'), UsageError, "cannot read -device"),
        (("-netdev", '{"type"'), UsageError, "cannot read -netdev"),
        (
            ("-device", '{"driver":"virtio-net-pci","netdev":"net0","ebpf-rss-fds":["3"]}'),
            UsageError,
            "ebpf-rss-fds of its own",
        ),
        (("-name", "other"), UsageError, '--vm says "web1", -name says "other"'),
    ],
)
def test_a_command_line_that_is_in_the_way(arguments: tuple[str, ...], error: type[QsteerError], says: str) -> None:
    with pytest.raises(error) as caught:
        plan_of("id=net0,queues=4", arguments=arguments, vm="web1")
    assert says in str(caught.value)


def test_two_macs() -> None:
    arguments = ("-device", "virtio-net-pci,netdev=net0,mac=52:54:00:00:00:01")
    with pytest.raises(UsageError, match="--tap says mac=52:54:00:00:00:02"):
        plan_of("id=net0,queues=4,mac=52:54:00:00:00:02", arguments=arguments)
    assert plan_of("id=net0,queues=4,mac=52:54:00:00:00:01", arguments=arguments).nics[0].mac == "52:54:00:00:00:01"


@pytest.mark.parametrize("vm", ["", "a\nb", "\x1b[2J", "\udcff"])
def test_bad_vm(vm: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        plan_of("id=net0,queues=4", vm=vm)


@pytest.mark.parametrize(
    ("vm", "arguments", "name", "added"),
    [
        ("web1", (), "web1", ("-name", "guest=web1")),
        ("we,b=1", (), "we,b=1", ("-name", "guest=we,,b=1")),
        ("web1", ("-name", "web1"), "web1", ()),
        (None, ("-name", "web1"), "web1", ()),
        (None, (), None, ()),
    ],
)
def test_vm_name(vm: str | None, arguments: tuple[str, ...], name: str | None, added: tuple[str, ...]) -> None:
    plan = plan_of("id=net0,queues=4", arguments=arguments, vm=vm)
    assert plan.vm == name
    argv = qemu_argv(plan, handles_of(plan))
    assert argv[1 + len(arguments) : argv.index("-netdev")] == added
    assert qemuargs.parse(argv).name == name


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        (qemu((7, 2, 22), libbpf=False, virtio_net_pci=OLD_TYPES), "QEMU 7.2.22 takes no steering program"),
        (qemu((8, 2, 0), libbpf=True, virtio_net_pci=OLD_TYPES), "QEMU 8.2.0 takes no steering program"),
        (qemu(libbpf=False), "QEMU 10.0.2 is built without libbpf"),
    ],
)
def test_a_qemu_that_cannot_steer(probe: QemuProbe, says: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan_of("id=net0,queues=4", probe=probe)
    assert says in str(caught.value)
    assert "rss=off" in caught.value.hint
    for tap in ("id=net0,queues=4,rss=off", "id=net0,queues=1"):
        assert not plan_of(tap, probe=probe).nics[0].steered


NO_SERVICE = "does not use a steering program with vhost"
LOST_VHOST = "vhost=on keeps vhost and gives up RSS"


@pytest.mark.parametrize(
    ("probe", "available", "tap", "vhost", "steered", "note"),
    [
        (QEMU_10_0, True, "", True, True, ""),
        (QEMU_10_0, True, ",vhost=on", True, True, ""),
        (QEMU_10_0, True, ",vhost=off", False, True, ""),
        (QEMU_10_0, True, ",rss=off", True, False, ""),
        (QEMU_10_0, False, "", False, True, ""),
        (QEMU_10_0, False, ",vhost=off", False, True, ""),
        (qemu((9, 0, 0)), True, "", True, True, ""),
        (qemu((10, 0, 99)), True, "", True, True, ""),
        (qemu((10, 1, 0)), True, "", False, True, LOST_VHOST),
        (QEMU_11_1, True, "", False, True, LOST_VHOST),
        (QEMU_11_1, True, ",vhost=on", True, False, NO_SERVICE),
        (QEMU_11_1, True, ",vhost=off", False, True, ""),
        (QEMU_11_1, True, ",rss=off", True, False, ""),
        (QEMU_11_1, True, ",vhost=on,rss=off", True, False, ""),
        (QEMU_11_1, False, "", False, True, ""),
    ],
)
def test_vhost(probe: QemuProbe, available: bool, tap: str, vhost: bool, steered: bool, note: str) -> None:
    plan = plan_of(f"id=net0,queues=4{tap}", probe=probe, vhost_available=available)
    (nic,) = plan.nics
    assert (nic.vhost, nic.steered) == (vhost, steered)
    assert [note in said for said in plan.notes] == ([True] if note else [])
    argv = qemu_argv(plan, handles_of(plan))
    assert f"vhost={'on' if vhost else 'off'}" in argv[2]
    assert ("vhostfds=" in argv[2]) == vhost
    device = json.loads(argv[4])
    assert ("rss" in device, "ebpf-rss-fds" in device) == (steered, steered)


@pytest.mark.parametrize(("tap", "offered"), [(",vhost=on,rss=on", True), (",vhost=on", False), (",rss=on", True)])
def test_rss_that_another_has_to_deliver(tap: str, offered: bool) -> None:
    """QEMU 11.1 with vhost: no program, and RSS only where that is asked for; without vhost both, as always."""
    plan = plan_of(f"id=net0,queues=4{tap}", probe=QEMU_11_1, vhost_available=True)
    argv = qemu_argv(plan, handles_of(plan))
    device = json.loads(argv[4])
    by_qemu = "vhost=off" in argv[2]
    assert ("rss" in device, "ebpf-rss-fds" in device) == (offered, by_qemu)
    assert plan.nics[0].steered == by_qemu


@pytest.mark.parametrize("probe", [QEMU_10_0, QEMU_11_1])
@pytest.mark.parametrize("tap", ["", ",rss=off"])
def test_vhost_that_is_not_there(probe: QemuProbe, tap: str) -> None:
    with pytest.raises(UnsupportedError, match="without /dev/vhost-net") as caught:
        plan_of(f"id=net0,queues=4,vhost=on{tap}", probe=probe)
    assert caught.value.hint == "modprobe vhost_net"


@pytest.mark.parametrize(
    ("tap", "device", "probe", "says"),
    [
        ("", "rss=off", QEMU_10_0, "no program is loaded"),
        (",rss=off", "rss=on", QEMU_10_0, "QEMU steers in software"),
        ("", "hash=on", QEMU_10_0, "asks for hash reports"),
        (",vhost=on", "rss=on", QEMU_11_1, "the guest is offered RSS;"),
        (",vhost=on,rss=on", "tx=timer", QEMU_11_1, "the guest is offered RSS;"),
        (",vhost=on", "tx=timer", QEMU_11_1, "only with rss=on in --tap"),
        (",vhost=on", "tx=timer", QEMU_11_1, "qsteer keep --allow pause"),
    ],
)
def test_notes(tap: str, device: str, probe: QemuProbe, says: str) -> None:
    arguments = ("-device", f"virtio-net-pci,netdev=net0,{device}")
    plan = plan_of(f"id=net0,queues=4{tap}", arguments=arguments, probe=probe, vhost_available=True)
    (note,) = plan.notes
    assert note.startswith("net0: ")
    assert says in note


CONFIGURED = Config(
    entries=(
        Entry(match=Match(), settings=Settings(queues=2, vhost=Vhost.OFF)),
        Entry(match=Match(vm=("web-*",)), settings=Settings(queues=8, bridge="br0", rss=Rss.OFF)),
        Entry(match=Match(bridge=("br0",)), settings=Settings(mtu=9000)),
        Entry(match=Match(nic=("net1",)), settings=Settings(bridge="")),
    )
)


@pytest.mark.parametrize(
    ("text", "vm", "wanted"),
    [
        ("id=net0", None, TapSpec(id="net0", queues=2, vhost=Vhost.OFF)),
        (
            "id=net0",
            "web-1",
            TapSpec(id="net0", queues=8, vhost=Vhost.OFF, bridge="br0", rss=Rss.OFF, mtu=9000),
        ),
        (
            "id=net0,queues=3,vhost=auto,bridge=br1,rss=on",
            "web-1",
            TapSpec(id="net0", queues=3, bridge="br1", rss=Rss.ON),
        ),
        ("id=net0,bridge=,rss=auto", "web-1", TapSpec(id="net0", queues=8, vhost=Vhost.OFF)),
        ("id=net1,rss=auto", "web-1", TapSpec(id="net1", queues=8, vhost=Vhost.OFF)),
        ("id=net0,bridge=br0", None, TapSpec(id="net0", queues=2, vhost=Vhost.OFF, bridge="br0", mtu=9000)),
    ],
)
def test_a_tap_over_what_is_configured(text: str, vm: str | None, wanted: TapSpec) -> None:
    assert parse_tap(text, CONFIGURED, vm) == wanted


def test_stable_mac() -> None:
    mac = stable_mac("web1", "net0", "0123")
    assert mac == "52:83:38:29:5d:80", "a release must not change the MACs of its users' VMs"
    others = {
        stable_mac(*names) for names in (("web2", "net0", "0123"), ("web1", "net1", "0123"), ("web1", "net0", ""))
    }
    assert len({mac, *others}) == 4
    assert stable_mac("a", "bc", "") != stable_mac("ab", "c", "")


# The edges


class BecameQemuError(Exception):
    """Where the process would have become QEMU."""


@dataclass
class Host:
    """What ``run`` did to the host, in order; fds are those of real pipes, so that inheritance can be looked at."""

    calls: list[tuple[object, ...]] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)
    argv: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    inherited: set[int] = field(default_factory=set)

    def take(self, count: int) -> tuple[int, ...]:
        fds = tuple(os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count))
        self.fds += fds
        return fds


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Host]:
    """A host with bridge br0 and device eth0, whose user is not root; its kernel, links, QEMU and exec are faked."""
    state = Host()

    def open_tap(name: str, queues: int) -> kernel.OpenTap:
        state.calls.append(("open_tap", name, queues))
        return kernel.OpenTap(name=name or "tap7", fds=state.take(queues))

    def load_program(*, tap: str, source: Source) -> programs.Program:
        state.calls.append(("load_program", tap, source))
        program, config, key, table = state.take(4)
        return programs.Program(
            id=33, build=Build.COMPLETE, prog_fd=program, config_fd=config, key_fd=key, table_fd=table
        )

    def configure(tap: str, **settings: object) -> None:
        state.calls.append(("configure", tap, settings))

    def find(name: str) -> links.Link | None:
        kinds = {"br0": "bridge", "eth0": ""}
        if name not in kinds:
            return None
        return links.Link(
            index=5, name=name, kind=kinds[name], mtu=1400, mac="52:54:00:00:00:09", up=True, bridge_index=None
        )

    def execve(binary: str, argv: tuple[str, ...], environment: dict[str, str]) -> None:
        assert signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGXFSZ) is signal.SIG_DFL
        state.argv, state.environment = argv, environment
        state.inherited = {fd for fd in state.fds if os.get_inheritable(fd)}
        raise BecameQemuError

    binary = tmp_path / QEMU
    binary.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kernel, "open_tap", open_tap)
    monkeypatch.setattr(programs, "load_program", load_program)
    monkeypatch.setattr(shim, "drop_capabilities", lambda: state.calls.append(("drop_capabilities",)))
    monkeypatch.setattr(links, "configure", configure)
    monkeypatch.setattr(links, "find", find)
    monkeypatch.setattr(qmp, "probe", lambda *_, **__: QEMU_10_0)
    monkeypatch.setattr(procs, "running_qemus", lambda: ())
    monkeypatch.setattr(ready, "VHOST_NET", tmp_path / "vhost-net")
    monkeypatch.setattr(ready, "MACHINE_ID", tmp_path / "machine-id")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for name in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, name, lambda *ids, name=name: state.calls.append((name, *ids)))
    monkeypatch.setattr(os, "execve", execve)
    yield state
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)


def start(
    *taps: str, user: str | None = None, vm: str | None = None, command: Sequence[str] = (QEMU,)
) -> run.Rehearsal:
    return run.run(vm=vm, taps=taps, user=user, dry_run=False, command=command)


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_run(host: Host, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BecameQemuError):
        start("id=net0,queues=2,ifname=t0,bridge=br0,mac=52:54:00:00:00:01", "id=net1,queues=1,mtu=1280", vm="web1")
    port = {"mac": "fe:54:00:00:00:01", "mtu": 1400, "bridge_index": 5}
    assert host.calls == [
        ("open_tap", "t0", 2),
        ("configure", "t0", port),
        ("load_program", "t0", Source.SHARED_MAPS),
        ("open_tap", "", 1),
        ("configure", "tap7", {"mtu": 1280}),
        ("drop_capabilities",),
    ]
    queue0, queue1, *program, other = host.fds
    assert f"tap,id=net0,fds={queue0}:{queue1},vhost=off" in host.argv
    assert f"tap,id=net1,fds={other},vhost=off" in host.argv
    assert json.loads(host.argv[-5])["ebpf-rss-fds"] == [str(fd) for fd in program]
    assert host.inherited == set(host.fds)
    assert not any(map(is_open, host.fds))
    printed = capfd.readouterr()
    assert printed.out == ""
    mac = stable_mac("web1", "net1", "")
    assert printed.err.splitlines() == [
        "NIC   TAP   QUEUES  MAC                VHOST  BRIDGE  PROGRAM",
        "net0  t0    2       52:54:00:00:00:01  off    br0     qsteer 33 (complete)",
        f"net1  tap7  1       {mac}  off    -       -",
        "net1: one queue, nothing to steer",
        "QEMU runs as this user (uid 1000), without capabilities",
    ]


def test_without_a_vms_name_the_taps_counts(host: Host, tmp_path: Path) -> None:
    (tmp_path / "machine-id").write_text("0123\n")
    with pytest.raises(BecameQemuError):
        start("id=net0,queues=2", "id=net1,queues=2,ifname=t1")
    macs = [json.loads(value)["mac"] for value in host.argv if value.startswith("{")]
    assert macs == [stable_mac("tap7", "net0", "0123"), stable_mac("t1", "net1", "0123")]
    assert "-name" not in host.argv


def test_vhost_fds_are_passed(host: Host, tmp_path: Path) -> None:
    (tmp_path / "vhost-net").touch()
    with pytest.raises(BecameQemuError):
        start("id=net0,queues=2")
    netdev = qemuargs.parse(host.argv).netdevs[0]
    assert netdev.vhost
    fds = host.argv[host.argv.index("-netdev") + 1].rpartition("vhostfds=")[2].split(":")
    assert len({*fds, *netdev.fds}) == 4


def test_as_root(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(UsageError, match="run as root needs --user NAME") as caught:
        start("id=net0,queues=2")
    assert "--user root" in caught.value.hint
    with pytest.raises(BecameQemuError):
        start("id=net0,queues=2", user="root")
    assert ("setresuid", 0, 0, 0) in host.calls
    assert ("drop_capabilities",) not in host.calls


def test_as_another_user(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    uid = 0

    def setresuid(*uids: int) -> None:
        nonlocal uid
        uid = uids[0]
        host.calls.append(("setresuid", *uids))

    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.setattr(os, "setresuid", setresuid)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 4242])
    with pytest.raises(BecameQemuError):
        start("id=net0,queues=2", user="nobody")
    assert host.calls[-4:] == [
        ("setgroups", (65534, 4242)),
        ("setresgid", 65534, 65534, 65534),
        ("setresuid", 65534, 65534, 65534),
        ("drop_capabilities",),
    ]
    assert (host.environment["USER"], host.environment["LOGNAME"]) == ("nobody", "nobody")
    assert host.environment["HOME"] not in ("", os.environ.get("HOME"))
    assert host.environment["PATH"] == os.environ["PATH"]


def test_probing_takes_on_the_user_too(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def probe(binary: str, *, drivers: Sequence[str], become: object) -> QemuProbe:
        assert Path(binary).is_absolute()
        assert "virtio-net-pci" in drivers
        assert callable(become)
        become()
        assert host.calls == [("drop_capabilities",)]
        raise UnsupportedError("probed")

    monkeypatch.setattr(qmp, "probe", probe)
    with pytest.raises(UnsupportedError, match="probed"):
        start("id=net0,queues=2")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"taps": ()}, UsageError, "run wants a --tap"),
        ({"command": ()}, UsageError, "run wants QEMU's command line"),
        ({"command": ("qemu-system-nosuch",)}, UsageError, 'there is no program "qemu-system-nosuch"'),
        ({"command": ("",)}, UsageError, "there is no program"),
        ({"user": "nosuchuser"}, UsageError, 'there is no user "nosuchuser"'),
        ({"user": ""}, UsageError, 'there is no user ""'),
        ({"user": "root"}, PermissionDeniedError, "only root can run QEMU as root"),
        ({"taps": ("id=net0,queues=4,bridge=nosuch",)}, NotFoundError, 'unknown bridge "nosuch"'),
        ({"taps": ("id=net0,queues=4,bridge=eth0",)}, UsageError, '"eth0" is not a bridge'),
        ({"taps": ("id=net0,queues=4,ifname=eth0",)}, QsteerError, '"eth0" is in use by another network device'),
        ({"taps": ("id=net0,queues=257",)}, UsageError, "from 1 to 256"),
        ({"vm": "busy"}, QsteerError, 'a VM named "busy" runs already: process 77 of uid 1000'),
        ({"command": (QEMU, "-name", "busy")}, QsteerError, 'a VM named "busy" runs already'),
        ({"command": (QEMU, "-name", "x"), "vm": "y"}, UsageError, "leave one of them out"),
        ({"command": (QEMU, "-netdev", "user,id=net0")}, UsageError, "already"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_refused_before_anything_is_made(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, object],
    error: type[QsteerError],
    says: str,
    dry_run: bool,
) -> None:
    busy = Process(pid=77, started=1, uid=1000, comm="qemu", args=qemuargs.parse((QEMU, "-name", "busy")))
    monkeypatch.setattr(procs, "running_qemus", lambda: (busy,))
    given: dict[str, object] = {"vm": None, "taps": ("id=net0,queues=4",), "user": None, "command": (QEMU,)}
    with pytest.raises(error) as caught:
        run.run(**(given | options), dry_run=dry_run)  # type: ignore[arg-type]
    assert says in f"{caught.value} {caught.value.hint}"
    assert "\n" not in str(caught.value)
    assert host.calls == []


@pytest.mark.parametrize("step", ["open_tap", "configure", "load_program", "vhost", "become", "exec"])
def test_a_failing_step_leaves_no_fd(host: Host, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    def fail(*_: object, **__: object) -> None:
        raise PermissionDeniedError("no")

    def fail_by_errno(*_: object) -> None:
        raise PermissionError(13, "no")

    taps = ("id=net0,queues=2", "id=net1,queues=2")
    match step:
        case "open_tap":
            whole = kernel.open_tap
            monkeypatch.setattr(kernel, "open_tap", lambda name, n: fail() if name else whole(name, n))
            taps = ("id=net0,queues=2", "id=net1,queues=2,ifname=t1")
        case "configure":
            monkeypatch.setattr(links, "configure", fail)
        case "load_program":
            monkeypatch.setattr(programs, "load_program", fail)
        case "vhost":
            monkeypatch.setattr(ready, "VHOST_NET", tmp_path)  # not to be opened for writing
            monkeypatch.setattr(ready, "has_vhost", lambda: True)
        case "become":
            monkeypatch.setattr(shim, "drop_capabilities", fail)
        case "exec":
            monkeypatch.setattr(os, "execve", fail_by_errno)
    with pytest.raises(QsteerError):
        start(*taps)
    assert not any(map(is_open, host.fds))
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_dry_run(host: Host) -> None:
    taps = ("id=net0,queues=2,ifname=t0,bridge=br0,mac=52:54:00:00:00:01", "id=net1,queues=1")
    rehearsal = run.run(vm="web1", taps=taps, user=None, dry_run=True, command=(QEMU, "-append", "a b"))
    assert host.calls == []
    *steps, command, note = str(rehearsal).splitlines()
    assert steps == [
        "open tap t0 with 2 queues",
        "add tap t0 to bridge br0, MTU 1400, and set it up",
        "load a steering program for tap t0",
        "open the tap of net1 with 1 queue",
        "set the tap of net1 up",
        "become this user (uid 1000), without capabilities, and run:",
    ]
    assert note == "net1: one queue, nothing to steer"
    assert command == (
        "  qemu-system-x86_64 -append 'a b' -name guest=web1 "
        "-netdev tap,id=net0,fds=net0-queue0:net0-queue1,vhost=off "
        """-device '{"driver":"virtio-net-pci","netdev":"net0","mq":true,"vectors":6,"rss":true,"""
        """"mac":"52:54:00:00:00:01","ebpf-rss-fds":["net0-program","net0-config","net0-key","net0-table"]}' """
        "-netdev tap,id=net1,fds=net1-queue0,vhost=off "
        f"""-device '{{"driver":"virtio-net-pci","netdev":"net1","mac":"{stable_mac("web1", "net1", "")}"}}'"""
    )


STOCK = Hashing(why_not="this kernel's tun does not hash by itself")
ABLE = Hashing(generation=Generation.V12, types=BASE_TYPES, why_not="")


@pytest.mark.parametrize(
    ("able", "types", "error", "says"),
    [
        (STOCK, None, UnsupportedError, "no in-kernel RSS: this kernel's tun does not hash by itself"),
        (replace(STOCK, denied=True), None, PermissionDeniedError, "no in-kernel RSS"),
        (replace(ABLE, types=HashType.IP4), None, UnsupportedError, "does not hash"),
        (ABLE, HashType.IP4 | HashType.IP_EX, UnsupportedError, "does not hash"),
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_a_kernel_that_cannot_is_found_out_before_anything_is_made(
    host: Host,
    monkeypatch: pytest.MonkeyPatch,
    able: Hashing,
    types: HashType | None,
    error: type[QsteerError],
    says: str,
    dry_run: bool,
) -> None:
    entry = Entry(match=Match(), settings=Settings(static=Static(types=types)))
    monkeypatch.setattr(config, "load", lambda: Config(entries=(entry,)))
    monkeypatch.setattr(hashing, "hashing", lambda: able)
    taps = ("id=net0,queues=4",)
    with pytest.raises(error, match=says):
        run.run(vm=None, taps=taps, user=None, dry_run=dry_run, command=(QEMU,), engine="kernel")
    assert host.calls == []


def test_a_dry_run_on_a_kernel_that_can(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "hashing", lambda: ABLE)
    taps = ("id=net0,queues=4", "id=net1,queues=1")
    rehearsal = run.run(vm="web1", taps=taps, user=None, dry_run=True, command=(QEMU,), engine="kernel")
    assert [step for step in rehearsal.steps if "RSS" in step] == ["set in-kernel RSS for the tap of net0"]
    assert host.calls == []


@pytest.mark.parametrize("engine", [None, "auto", "ebpf"])
def test_what_tun_can_is_looked_at_only_where_it_is_to_steer(
    host: Host, monkeypatch: pytest.MonkeyPatch, engine: str | None
) -> None:
    monkeypatch.setattr(hashing, "hashing", lambda: pytest.fail("looked at"))
    taps = ("id=net0,queues=4",)
    assert run.run(vm="web1", taps=taps, user=None, dry_run=True, command=(QEMU,), engine=engine).steps
    assert host.calls == []


def test_another_users_vm_of_that_name_is_not_in_the_way(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can give a process of their own any name, and must not stop a VM by it."""
    forged = Process(pid=77, started=1, uid=4242, comm="qemu", args=qemuargs.parse((QEMU, "-name", "busy")))
    monkeypatch.setattr(procs, "running_qemus", lambda: (forged,))
    assert run.run(vm="busy", taps=("id=net0,queues=4",), user=None, dry_run=True, command=(QEMU,)).steps
