# SPDX-License-Identifier: BSD-2-Clause
"""The computing part of ``qsteer run``: from what is asked for and what this QEMU can do to QEMU's command line.

Theory of operation
===================

Pure.  ``make_plan`` decides everything that can be decided before anything is opened, and refuses what cannot work.
``qemu_argv`` then puts fds into the plan: numbers when QEMU is about to run, placeholders in a dry run.

Two rules.  A -device of the user's own, or a -global for its driver, is never contradicted: the device gains only what
it lacks.  And a guest is not offered RSS that it would not get: with vhost, QEMU 10.1 and later silently ignores a
program that it is passed, so there qsteer neither loads one nor, unless told, sets ``rss``; without vhost it does
both.
"""

import enum
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qsteer import qemuargs
from qsteer.errors import UnsupportedError, UsageError
from qsteer.model import Engine
from qsteer.plan import Static
from qsteer.qemuargs import Device, QemuArgs
from qsteer.settings import Config, Settings

if TYPE_CHECKING:
    from qsteer.qmp import QemuProbe

QUEUES_MAX = 256
"""Queues that the kernel's tun gives one tap, and that QEMU takes for one netdev."""
MTU_MIN = 68
"""The least that IPv4 allows, and that the virtio specification does."""
MTU_MAX = 65521
"""Linux's limit for a tap: 65535 less an Ethernet header."""

PCI_DRIVER = "virtio-net-pci"
CCW_DRIVER = "virtio-net-ccw"

_DRIVER_ALIAS = "virtio-net"
_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
NOTHING_SET = Config()

_TAP_KEYS = ("id", "queues", "ifname", "bridge", "mac", "mtu", "vhost", "rss")
# QEMU 10.1 stopped loading a steering program where vhost is on, and attaches none that it is passed there.
_VHOST_IGNORES_PROGRAM = (10, 1)


class Vhost(enum.StrEnum):
    """``auto`` is vhost wherever it does not cost RSS."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


class Rss(enum.StrEnum):
    """``auto`` offers the guest RSS where QEMU delivers it; ``on`` also where somebody else has to."""

    AUTO = "auto"
    ON = "on"
    OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class TapSpec:
    """One ``--tap``.  An empty ``ifname`` lets the kernel choose, an empty ``bridge`` joins none.

    ``in_kernel`` is what tun itself is to steer by, None where a program steers.
    """

    id: str
    queues: int
    ifname: str = ""
    bridge: str = ""
    mac: str | None = None
    mtu: int | None = None
    vhost: Vhost = Vhost.AUTO
    rss: Rss = Rss.AUTO
    in_kernel: Static | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """One NIC of the plan.

    ``device`` is the user's own -device for it, if there is one, ``types`` the types of its driver's properties,
    ``gains`` the properties that qsteer gives it.  ``steered`` says whether a program is loaded and passed to QEMU,
    ``in_kernel`` by what tun itself steers, None where it does not.  ``mac`` is None where qsteer makes it.
    """

    spec: TapSpec
    device: Device | None
    types: Mapping[str, str]
    vhost: bool
    steered: bool
    mac: str | None
    gains: tuple[str, ...]
    in_kernel: Static | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What ``run`` is going to do.  ``vm`` is None without --vm and without -name; ``notes`` are for the user."""

    command: tuple[str, ...]
    vm: str | None
    adds_name: bool
    nics: tuple[Nic, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is wanted for one NIC.

    An empty ``ifname`` lets the kernel choose, as does a ``%d`` in it; an empty ``bridge`` joins none.  Without a
    ``mac`` one is made of the VM's name, or of the tap's where the VM has none, and the NIC's ``id``.  ``mtu`` None is
    the bridge's.
    """

    id: str
    queues: int
    ifname: str = ""
    bridge: str = ""
    mac: str | None = None
    mtu: int | None = None
    vhost: bool = False
    steered: bool = True
    vm: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NicHandles:
    """What QEMU is given for one NIC, as it is to stand on the command line: fds in text, and the NIC's MAC."""

    queue_fds: tuple[str, ...]
    vhost_fds: tuple[str, ...]
    program_fds: tuple[str, ...]
    mac: str


def parse_taps(
    texts: Sequence[str], config: Config = NOTHING_SET, vm: str | None = None, engine: str | None = None
) -> tuple[TapSpec, ...]:
    """The --tap options of a VM together, over what is configured for it; ``engine`` is --engine's.

    Raises UsageError.
    """
    specs = tuple(_with_engine(parse_tap(text, config, vm), config, vm, engine) for text in texts)
    for what in ("id", "ifname", "mac"):
        values = [value for spec in specs if (value := getattr(spec, what))]
        for value in values:
            if values.count(value) > 1:
                raise UsageError(f"two --tap with {what}={value}")
    return specs


def _with_engine(spec: TapSpec, config: Config, vm: str | None, engine: str | None) -> TapSpec:
    said = config.settings(vm=vm, nics=[spec.id], mac=spec.mac, dev=spec.ifname or None, bridge=spec.bridge or None)
    in_kernel = (engine or said.engine) == Engine.KERNEL
    return replace(spec, in_kernel=said.static) if in_kernel else spec


def parse_tap(text: str, config: Config = NOTHING_SET, vm: str | None = None) -> TapSpec:
    """``id=net0,queues=4[,...]``.  Raises UsageError, which names the option and what it may be."""
    given: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if key not in _TAP_KEYS:
            raise UsageError(f'--tap {text}: unknown "{key}"', hint=f"it takes {', '.join(_TAP_KEYS)}")
        # No bridge, whatever is configured.
        if not equals or not (value or key == "bridge"):
            raise UsageError(f"--tap {text}: {key}= wants a value")
        if key in given:
            raise UsageError(f"--tap {text}: {key}= is given twice")
        given[key] = value
    given = _configured(given, config, vm) | given
    for key in ("id", "queues"):
        if key not in given:
            raise UsageError(f"--tap {text}: {key}= is missing", hint="such as --tap id=net0,queues=4")
    try:
        return TapSpec(
            id=_identifier(given["id"]),
            queues=_number("queues", given["queues"], 1, QUEUES_MAX),
            ifname=device_name("ifname", given["ifname"]) if "ifname" in given else "",
            bridge=device_name("bridge", given["bridge"]) if given.get("bridge") else "",
            mac=_mac(given["mac"]) if "mac" in given else None,
            mtu=_number("mtu", given["mtu"], MTU_MIN, MTU_MAX) if "mtu" in given else None,
            vhost=Vhost(_choice("vhost", given.get("vhost", "auto"), tuple(Vhost))),
            rss=Rss(_choice("rss", given.get("rss", "auto"), tuple(Rss))),
        )
    except UsageError as error:
        raise UsageError(f"--tap {text}: {error.message}", hint=error.hint) from None


def _configured(given: Mapping[str, str], config: Config, vm: str | None) -> dict[str, str]:
    """What is configured for a tap, as --tap would say it.  Which bridge it joins may be configured, too."""

    def settings(bridge: str | None) -> Settings:
        nics = [given["id"]] if "id" in given else []
        return config.settings(vm=vm, nics=nics, mac=given.get("mac"), dev=given.get("ifname"), bridge=bridge)

    bridge = given.get("bridge", settings(None).bridge)
    said = settings(bridge or None)
    values = {"queues": said.queues, "bridge": bridge, "mtu": said.mtu, "vhost": said.vhost, "rss": said.rss}
    return {key: str(value) for key, value in values.items() if value is not None}


def drivers_of(args: QemuArgs) -> tuple[str, ...]:
    """The drivers whose properties a plan for this command line may need."""
    named = (device.driver for device in args.devices if device.driver != _DRIVER_ALIAS)
    return tuple(dict.fromkeys((PCI_DRIVER, CCW_DRIVER, *named)))


def make_plan(
    *, specs: Sequence[TapSpec], command: Sequence[str], probe: "QemuProbe", vm: str | None, vhost_available: bool
) -> RunPlan:
    """Decide what to do for ``command``, QEMU's argv.

    ``vhost_available`` says whether the host has /dev/vhost-net.  Raises UsageError on a command line that is in the
    way, UnsupportedError on what this QEMU or host cannot do.
    """
    args = qemuargs.parse(command)
    if args.unreadable:
        raise UsageError(f"cannot read {args.unreadable[0]}")
    if vm is not None and not (vm and vm.isprintable()):
        raise UsageError(f"--vm {vm!r} is not a name")
    if vm is not None and args.name is not None and vm != args.name:
        raise UsageError(f'--vm says "{vm}", -name says "{args.name}"', hint="leave one of them out")
    planned = [plan_nic(spec, args, probe, vhost_available=vhost_available) for spec in specs]
    return RunPlan(
        command=tuple(command),
        vm=vm if vm is not None else args.name,
        adds_name=vm is not None and args.name is None,
        nics=tuple(nic for nic, _ in planned),
        notes=tuple(note for _, notes in planned for note in notes),
    )


def qemu_argv(plan: RunPlan, handles: Sequence[NicHandles]) -> tuple[str, ...]:
    """QEMU's command line; ``handles`` has one entry per NIC of the plan."""
    argv = list(plan.command)
    if plan.adds_name and plan.vm:
        argv += ("-name", f"guest={qemuargs.escape(plan.vm)}")
    for nic, given in zip(plan.nics, handles, strict=True):
        vhost = f"on,vhostfds={':'.join(given.vhost_fds)}" if nic.vhost else "off"
        argv += ("-netdev", f"tap,id={nic.spec.id},fds={':'.join(given.queue_fds)},vhost={vhost}")
        if nic.device is None:
            argv += ("-device", _json({"driver": PCI_DRIVER, "netdev": nic.spec.id} | properties(nic, given)))
        elif gained := properties(nic, given):
            argv[nic.device.position] = _json(_as_json(nic.device, nic.types) | gained)
    return tuple(argv)


def orders(plan: RunPlan) -> tuple[Order, ...]:
    """The taps that a plan takes."""
    return tuple(order_of(nic, plan.vm) for nic in plan.nics)


def order_of(nic: Nic, vm: str | None) -> Order:
    """The tap that a NIC of a VM takes."""
    spec = nic.spec
    return Order(
        id=spec.id,
        queues=spec.queues,
        ifname=spec.ifname,
        bridge=spec.bridge,
        mac=nic.mac,
        mtu=spec.mtu,
        vhost=nic.vhost,
        steered=nic.steered,
        vm=vm,
    )


def stable_mac(vm: str, nic_id: str, machine_id: str) -> str:
    """The MAC of a NIC that was given none: the same at every start, another for every VM, NIC and host."""
    digest = hashlib.sha256("\0".join((vm, nic_id, machine_id)).encode("utf-8", "surrogateescape")).digest()
    # Locally administered, unicast; all of the rest is hash, so that a thousand NICs hardly ever collide.
    return f"52:{digest[:5].hex(':')}"


def tap_steps(nic: Nic, *, bridge_mtu: int | None) -> tuple[str, ...]:
    """What making a NIC's tap ready takes, in words; ``bridge_mtu`` is that of its bridge, if it joins one."""
    spec = nic.spec
    tap = f"tap {spec.ifname}" if spec.ifname else f"the tap of {spec.id}"
    steps = [f"open {tap} with {spec.queues} queue{'s' * (spec.queues > 1)}"]
    if spec.bridge:
        steps.append(f"add {tap} to bridge {spec.bridge}, MTU {spec.mtu or bridge_mtu}, and set it up")
    else:
        steps.append(f"set {tap} up" + (f", MTU {spec.mtu}" if spec.mtu else ""))
    if nic.steered:
        steps.append(f"load a steering program for {tap}")
    if nic.in_kernel is not None:
        steps.append(f"set in-kernel RSS for {tap}")
    if nic.vhost:
        steps.append(f"open /dev/vhost-net {spec.queues} times")
    return tuple(steps)


def plan_nic(
    spec: TapSpec, args: QemuArgs, probe: "QemuProbe", *, vhost_available: bool
) -> tuple[Nic, tuple[str, ...]]:
    """Decide about one NIC, and what the user should know of it.

    ``args`` is QEMU's command line: a -device that names the NIC's netdev is the user's own for it, and -global holds
    for the one that is added, too.  Raises what ``make_plan`` raises.
    """
    device = _device_of(spec, args)
    driver = device.driver if device else PCI_DRIVER
    if driver == _DRIVER_ALIAS:
        driver = CCW_DRIVER if CCW_DRIVER in probe.properties else PCI_DRIVER
    types = probe.properties.get(driver)
    if types is None:
        raise UnsupportedError(f'QEMU {probe.version_text} has no device "{driver}"')
    if device:
        _as_json(device, types)

    own = qemuargs.defaults_of(args, driver) | (dict(device.properties) if device else {})
    own_rss = qemuargs.parse_bool(own.get("rss"))
    in_kernel = spec.in_kernel if spec.queues > 1 else None
    wants_rss = spec.queues > 1 and spec.rss is not Rss.OFF and own_rss is not False
    ignores_program = probe.version[:2] >= _VHOST_IGNORES_PROGRAM
    vhost = _vhost(spec, vhost_available, in_kernel is None and wants_rss and ignores_program)
    steered = in_kernel is None and wants_rss and not (vhost and ignores_program)
    if steered:
        _check_steerable(spec, own, types, probe)
    if in_kernel is None:
        lost_vhost = spec.vhost is Vhost.AUTO and vhost_available and not vhost
        notes = _notes(spec, own, version=probe.version_text, steered=steered, lost_vhost=lost_vhost)
    else:
        offered = spec.rss is Rss.ON if own_rss is None else own_rss
        notes = (_check_in_kernel(spec, offered=offered, vhost=vhost), *_one_queue_only(own))
    wanted = ["mac"]
    if spec.queues > 1:
        wanted += ("mq", "vectors")
    if steered or (wants_rss and spec.rss is Rss.ON):
        wanted.append("rss")
    if steered:
        wanted.append("ebpf-rss-fds")
    if spec.mtu is not None:
        wanted.append("host_mtu")
    nic = Nic(
        spec=spec,
        device=device,
        types=types,
        vhost=vhost,
        steered=steered,
        in_kernel=in_kernel,
        mac=_given_mac(spec, own),
        gains=tuple(key for key in wanted if key in types and key not in own),
    )
    return nic, tuple(f"{spec.id}: {note}" for note in notes)


def _device_of(spec: TapSpec, args: QemuArgs) -> Device | None:
    """The user's own -device for a tap, if any."""
    if any(netdev.id == spec.id for netdev in args.netdevs):
        raise UsageError(f'QEMU\'s command line has a netdev "{spec.id}" already', hint="choose another id= for --tap")
    devices = [device for device in args.devices if device.netdev == spec.id]
    if len(devices) > 1:
        raise UsageError(f'two -device for netdev "{spec.id}"')
    for device in devices:
        if not device.driver.startswith("virtio-net"):
            raise UsageError(
                f'-device {device.driver} for netdev "{spec.id}" is not a virtio-net', hint="only virtio-net has queues"
            )
        return device
    return None


def _vhost(spec: TapSpec, available: bool, costs_rss: bool) -> bool:
    if spec.vhost is Vhost.ON and not available:
        raise UnsupportedError(f"{spec.id}: vhost=on without /dev/vhost-net", hint="modprobe vhost_net")
    if spec.vhost is Vhost.AUTO:
        return available and not costs_rss
    return spec.vhost is Vhost.ON


def _check_steerable(spec: TapSpec, own: Mapping[str, object], types: Mapping[str, str], probe: "QemuProbe") -> None:
    hint = "use a QEMU that can, or give up RSS with rss=off in --tap"
    if "ebpf-rss-fds" not in types:
        raise UnsupportedError(f"QEMU {probe.version_text} takes no steering program, 9.0 and later does", hint=hint)
    if not probe.libbpf:
        raise UnsupportedError(f"QEMU {probe.version_text} is built without libbpf and cannot steer", hint=hint)
    if "ebpf-rss-fds" in own:
        raise UsageError(
            f'-device for netdev "{spec.id}" has ebpf-rss-fds of its own',
            hint="leave them out, or say rss=off in --tap",
        )


def _check_in_kernel(spec: TapSpec, *, offered: bool, vhost: bool) -> str:
    """What to know of a NIC that tun itself steers.  Raises UnsupportedError where QEMU would undo that."""
    if not offered:
        return "steered by tun itself, by a table of the host's; the guest is offered no RSS"
    if not vhost:
        raise UnsupportedError(
            f"{spec.id}: QEMU steers in software with rss=on and without vhost, and undoes in-kernel RSS",
            hint="rss=off, or --engine ebpf",
        )
    return "steered by tun itself, by a table of the host's, until qsteer keep --allow pause follows the guest's"


def _notes(
    spec: TapSpec, own: Mapping[str, object], *, version: str, steered: bool, lost_vhost: bool
) -> tuple[str, ...]:
    """What the user should know about one NIC."""
    own_rss = qemuargs.parse_bool(own.get("rss"))
    if spec.queues == 1:
        return ("one queue, nothing to steer",)
    if own_rss is False:
        return ("rss=off on QEMU's command line: the guest is not offered RSS, no program is loaded",)
    if spec.rss is Rss.OFF and own_rss:
        return ("rss=off, but rss=on on QEMU's command line: no program is loaded, QEMU steers in software",)
    if spec.rss is Rss.OFF:
        return ()
    if not steered:
        offered = own_rss or spec.rss is Rss.ON
        goes_on = "the guest is offered RSS" if offered else "the guest is offered RSS only with rss=on in --tap"
        ignored = (
            f"vhost=on: QEMU {version} (10.1 and later) does not use a steering program with vhost: none is loaded"
        )
        return (f"{ignored}, {goes_on}; what steers it then: qsteer keep --allow pause",)
    notes = []
    if lost_vhost:
        notes.append(
            "vhost=off: QEMU 10.1 and later ignores the steering program with vhost; "
            "vhost=on keeps vhost and gives up RSS"
        )
    notes += _one_queue_only(own)
    if qemuargs.parse_bool(own.get("hash")):
        notes.append("hash=on: QEMU steers in software once the guest asks for hash reports")
    return tuple(notes)


def _one_queue_only(own: Mapping[str, object]) -> tuple[str, ...]:
    off = qemuargs.parse_bool(own.get("mq")) is False
    return ("mq=off on QEMU's command line: the guest uses one queue only",) if off else ()


def _given_mac(spec: TapSpec, own: Mapping[str, object]) -> str | None:
    mac = own.get("mac")
    if not isinstance(mac, str):
        return spec.mac
    mac = _mac(mac.replace("-", ":"))
    if spec.mac not in (None, mac):
        raise UsageError(f"--tap says mac={spec.mac}, QEMU's command line says mac={mac}", hint="leave one of them out")
    return mac


def properties(nic: Nic, given: NicHandles) -> dict[str, object]:
    """The properties of a NIC's device that it does not have yet, as QEMU takes them in JSON."""
    values: dict[str, object] = {
        "mq": True,
        "vectors": 2 * nic.spec.queues + 2,
        "rss": True,
        "mac": given.mac,
        "host_mtu": nic.spec.mtu,
        "ebpf-rss-fds": list(given.program_fds),
    }
    return {key: value for key, value in values.items() if key in nic.gains}


def _as_json(device: Device, types: Mapping[str, str]) -> dict[str, object]:
    """The members of a -device's JSON form.  Raises UsageError on a value that is not of its property's type."""
    members: dict[str, object] = {"driver": device.driver}
    for key, value in device.properties:
        members[key] = value
        if not device.json:
            try:
                members[key] = qemuargs.typed(key, str(value), types.get(key, "str"))
            except UsageError as error:
                raise UsageError(f'-device for netdev "{device.netdev}": {error.message}') from None
    return members


def _json(members: Mapping[str, object]) -> str:
    return json.dumps(members, separators=(",", ":"), ensure_ascii=False)


def _identifier(text: str) -> str:
    if not _ID.fullmatch(text):
        raise UsageError(f'id="{text}" is not an id', hint="a letter, then letters, digits, and any of - . _")
    return text


def device_name(key: str, text: str) -> str:
    """A network device's name by the kernel's rule; a % would make the kernel number it.  Raises UsageError."""
    if text in (".", "..") or not text.isprintable() or any(character in "/:% " for character in text):
        raise UsageError(f'{key}="{text}" is not a network device name')
    if len(text.encode("utf-8")) > 15:
        raise UsageError(f'{key}="{text}" is too long', hint="a network device name has 15 bytes at most")
    return text


def _number(key: str, text: str, least: int, most: int) -> int:
    # The length first: int() of thousands of digits is refused with words of Python's own.
    if not (text.isascii() and text.isdigit() and len(text) <= 9) or not least <= int(text) <= most:
        raise UsageError(f'{key}="{text}" is not a number from {least} to {most}')
    return int(text)


def _mac(text: str) -> str:
    mac = text.lower()
    if not _MAC.fullmatch(mac):
        raise UsageError(f'mac="{text}" is not a MAC address', hint="such as mac=52:54:00:12:34:56")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise UsageError(f'mac="{text}" is not a unicast address')
    return mac


def _choice(key: str, text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise UsageError(f'{key}="{text}" is none of {", ".join(choices)}')
    return text
