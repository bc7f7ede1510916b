# SPDX-License-Identifier: BSD-2-Clause
"""What a QEMU command line says about its NICs, its name, its monitors and its guest agent.

Theory of operation
===================

Pure: text in, frozen values out.  One reading serves the command line that a user gives to ``qsteer run`` and the one
that /proc shows of a running process.  The latter may be anything at all, so nothing raises because of what it reads:
what cannot be understood is left out, and a -device or -netdev among it is kept in ``QemuArgs.unreadable`` for a caller
that has to refuse it.

The rules are QEMU's own (10.0): one dash or two begin an option; ``,,`` is a comma in a value; the first value may come
without its key; a key without a value is ``on``, or ``off`` with ``no`` before it; the last of several same keys wins;
-device, -netdev and -object (not -chardev, -mon or -nic) take JSON as well, in which strings may also stand in single
quotes.  A monitor is -qmp, -mon or, where 11.1 deprecates that, ``-object monitor-qmp``.

Only the options named here are known to take a value.  The value of any other option is passed over by not beginning
with a dash, so that no list of all of QEMU's options has to be kept.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qsteer.errors import UsageError

CMDLINE_MAX = 1 << 18
"""Bytes of another process's command line that are read, far more than a real QEMU's."""

_TRUE = ("on", "yes", "true", "y")
_FALSE = ("off", "no", "false", "n")
# The closing quote is optional and the repetition possessive: a string without an end is gone through once, not once
# for each quote in it.
_JSON_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?|\'(?:[^\'\\]|\\.)*+\'?', re.DOTALL)
_KEY_END = re.compile("[=,]")
_INT_KIND = re.compile(r"u?int(?:8|16|32|64)?")
_INT = re.compile(r"([+-]?)(0[xX][0-9a-fA-F]+|[0-9]+)")
_SIZE = re.compile(r"([0-9]+)([bBkKmMgGtTpPeE]?)")
_LOADER = re.compile(r"ld(-linux|-musl|64|32)?[-.\w]*\.so[.\d]*")
_LOADER_FLAGS = ("--inhibit-cache",)
_LOADER_OPTIONS = (
    "--argv0",
    "--audit",
    "--glibc-hwcaps-mask",
    "--glibc-hwcaps-prepend",
    "--inhibit-rpath",
    "--library-path",
    "--preload",
)
_AGENT = "org.qemu.guest_agent.0"
_SIZE_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_GLOBAL = re.compile(r"([^.=]+)\.([^=]+)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Netdev:
    """A network backend.  ``option`` is ``netdev``, ``nic`` or ``net``; ``kind`` is ``tap``, ``user``, and so on.

    ``queues``, ``vhost`` and the names are None where the command line does not give them.  ``fds`` are numbers or
    names, as text; ``path`` is the unix socket of a ``stream`` or ``dgram``.  ``model`` and ``mac`` are those of the
    NIC that -nic makes, too.
    """

    option: str
    kind: str
    id: str | None = None
    ifname: str | None = None
    bridge: str | None = None
    fds: tuple[str, ...] = ()
    queues: int | None = None
    vhost: bool | None = None
    path: str | None = None
    model: str | None = None
    mac: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A -device that is a virtio-net, or that names a netdev.

    ``position`` is the index in argv of the option's value.  ``properties`` are as given, without ``driver``: text
    where ``json`` is False, else what the JSON object holds.
    """

    position: int
    driver: str
    json: bool
    id: str | None
    netdev: str | None
    properties: tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Global:
    """A -global: the default of a driver's property."""

    driver: str
    property: str
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuArgs:
    """A QEMU command line.

    ``qmp_paths`` are the unix sockets that QEMU serves QMP on, ``agent_path`` the one that leads to the guest agent, as
    given (maybe relative).
    """

    name: str | None
    uuid: str | None
    machine: str | None
    netdevs: tuple[Netdev, ...]
    devices: tuple[Device, ...]
    globals: tuple[Global, ...]
    qmp_paths: tuple[str, ...]
    agent_path: str | None
    unreadable: tuple[str, ...]


def defaults_of(args: QemuArgs, driver: str) -> dict[str, object]:
    """What -global says of a driver's properties; ``virtio-net`` is an alias of the machine's own."""
    return {setting.property: setting.value for setting in args.globals if setting.driver in (driver, "virtio-net")}


class Defaults:
    """-global, for many devices: a hostile command line may have thousands of both."""

    def __init__(self, settings: Sequence[Global]) -> None:
        self._last = {(setting.driver, setting.property): (i, setting.value) for i, setting in enumerate(settings)}

    def get(self, driver: str, key: str) -> str | None:
        """As ``defaults_of`` gives it, None where nothing is set."""
        found = [setting for name in (driver, "virtio-net") if (setting := self._last.get((name, key)))]
        return max(found)[1] if found else None


def is_qemu(argv: Sequence[str]) -> bool:
    """Whether a system emulator is run (``qemu-system-x86_64``, ``qemu-kvm``, ``kvm``); it can be forged."""
    return len(argv) > (position := _program_position(argv)) and is_qemu_name(argv[position])


def is_qemu_name(path: str) -> bool:
    """Whether a path or a name is that of a system emulator."""
    program = path.rpartition("/")[2]
    return "qemu-system-" in program or program in ("qemu-kvm", "kvm")


def _program_position(argv: Sequence[str]) -> int:
    """Where the program is: at 0, or behind a dynamic loader that runs it, and that one's options."""
    if not argv or not _LOADER.fullmatch(argv[0].rpartition("/")[2]):
        return 0
    position = 1
    while position < len(argv) and argv[position].startswith("--"):
        if argv[position] not in (*_LOADER_FLAGS, *_LOADER_OPTIONS):
            return 0
        position += 2 if argv[position] in _LOADER_OPTIONS else 1
    return position


def split_cmdline(data: bytes) -> tuple[str, ...]:
    """argv of another process, from /proc/PID/cmdline: CMDLINE_MAX bytes at most, what is not UTF-8 replaced."""
    text = data[:CMDLINE_MAX].decode("utf-8", "replace")
    return tuple(text.removesuffix("\0").split("\0")) if text else ()


def parse(argv: Sequence[str]) -> QemuArgs:
    """Read a command line, argv[0] included.  Raises nothing."""
    name = uuid = machine = None
    netdevs: list[Netdev] = []
    devices: list[Device] = []
    settings: list[Global] = []
    chardevs: dict[str, str] = {}
    monitors: list[str] = []
    agents: list[str] = []
    qmp_paths: list[str] = []
    unreadable: list[str] = []

    position = _program_position(argv) + 1
    while position < len(argv) - 1:
        option, value = _option_name(argv[position]), argv[position + 1]
        position += 2
        match option:
            case "name":
                name = dict(parse_keyval(value, implied="guest")).get("guest", name)
            case "uuid":
                uuid = value
            case "machine" | "M":
                machine = dict(parse_keyval(value, implied="type")).get("type", machine)
            case "netdev" | "nic" | "net":
                netdev = _netdev(option, value)
                if netdev:
                    netdevs.append(netdev)
                elif value.startswith("{"):
                    unreadable.append(f"-{option} {value}")
            case "device":
                fields = _fields(value, implied="driver")
                if fields is None:
                    unreadable.append(f"-{option} {value}")
                elif device := _device(position - 1, value.startswith("{"), fields):
                    devices.append(device)
                elif chardev_id := _agent_chardev(fields):
                    agents.append(chardev_id)
            case "global":
                if setting := _global(value):
                    settings.append(setting)
            case "chardev":
                chardev = dict(parse_keyval(value, implied="backend"))
                if path := _served_path(chardev):
                    chardevs[chardev.get("id", "")] = path
            case "mon":
                monitor = dict(parse_keyval(value, implied="chardev"))
                if monitor.get("mode") == "control":
                    monitors.append(monitor.get("chardev", ""))
            case "object":
                thing = _fields(value, implied="qom-type") or {}
                if thing.get("qom-type") == "monitor-qmp":
                    monitors.append(_word(thing.get("chardev")) or "")
            case "qmp" | "qmp-pretty":
                if value.startswith("unix:"):
                    keyval = dict(parse_keyval(value.removeprefix("unix:"), implied="path"))
                    qmp_paths += filter(None, (_served_path({"backend": "socket"} | keyval),))
                elif value.startswith("chardev:"):
                    monitors.append(value.removeprefix("chardev:"))
            case _:
                position -= 1

    qmp_paths += (chardevs[monitor] for monitor in monitors if monitor in chardevs)
    return QemuArgs(
        name=name or None,
        uuid=uuid,
        machine=machine,
        netdevs=tuple(netdevs),
        devices=tuple(devices),
        globals=tuple(settings),
        qmp_paths=tuple(qmp_paths),
        agent_path=next((chardevs[agent] for agent in agents if agent in chardevs), None),
        unreadable=tuple(unreadable),
    )


def parse_keyval(text: str, *, implied: str = "") -> tuple[tuple[str, str], ...]:
    """QEMU's ``key=value,key=value``; ``implied`` is the key of a first value that has none.  Raises nothing."""
    pairs: list[tuple[str, str]] = []
    start = 0
    while start < len(text):
        found = _KEY_END.search(text, start)
        end = found.start() if found else len(text)
        if text.startswith("=", end):
            value, following = _value(text, end + 1)
            pairs.append((text[start:end], value))
        elif implied and not pairs and not start:
            value, following = _value(text, start)
            pairs.append((implied, value))
        else:
            flag, following = text[start:end], end + 1
            pairs.append((flag[2:], "off") if flag.startswith("no") else (flag, "on"))
        start = following
    return tuple(pairs)


def escape(value: str) -> str:
    """A value as it must stand in ``key=value,...``."""
    return value.replace(",", ",,")


def parse_bool(value: object) -> bool | None:
    """A switch as QEMU reads it, in text or in JSON; None if it is neither on nor off."""
    if isinstance(value, bool):
        return value
    if value in _TRUE:
        return True
    return False if value in _FALSE else None


def typed(key: str, text: str, kind: str) -> bool | int | str:
    """A property's text as the JSON value that -device wants; ``kind`` is its type in device-list-properties.

    A kind that is not known here (an enumeration, say) is text in JSON too.  Raises UsageError on text that is not of
    its kind.
    """
    # A PCI address is "int32" before QEMU 10.0, and text ("3.1") all the same: a number would mean something else.
    if key == "addr":
        return text
    if kind == "bool":
        switch = parse_bool(text)
        if switch is None:
            raise UsageError(f'{key}="{text}" is neither on nor off')
        return switch
    if _INT_KIND.fullmatch(kind) or kind == "size":
        number = _INT.fullmatch(text)
        size = _SIZE.fullmatch(text) if kind == "size" else None
        if size:
            return int(size[1]) << _SIZE_SHIFT[size[2].lower()]
        if not number or len(text) > 24:
            raise UsageError(f'{key}="{text}" is not a number')
        octal = number[2].startswith("0") and number[2].isdigit()
        try:
            return int(number[1] + number[2], 8 if octal else 0)
        except ValueError:
            raise UsageError(f'{key}="{text}" is not a number') from None
    return text


def _option_name(argument: str) -> str:
    return argument.removeprefix("-").removeprefix("-") if argument.startswith("-") else ""


def _value(text: str, start: int) -> tuple[str, int]:
    """The value at ``start``, its ``,,`` undone, and where the next key begins."""
    parts: list[str] = []
    while (comma := text.find(",", start)) >= 0:
        parts.append(text[start:comma])
        if not text.startswith(",,", comma):
            return "".join(parts), comma + 1
        parts.append(",")
        start = comma + 2
    return "".join((*parts, text[start:])), len(text)


def _fields(value: str, *, implied: str) -> Mapping[str, object] | None:
    """The members of an option in either form; None if it is JSON that cannot be read."""
    if not value.startswith("{"):
        return dict(parse_keyval(value, implied=implied))
    try:
        members = json.loads(_JSON_STRING.sub(_double_quoted, value) if "'" in value else value)
    except (ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


def _double_quoted(string: re.Match[str]) -> str:
    text = string[0]
    if text.startswith('"'):
        return text
    inside = re.sub(
        r'\\.|"', lambda found: {"\\'": "'", '"': '\\"'}.get(found[0], found[0]), text[1:-1], flags=re.DOTALL
    )
    return f'"{inside}"'


def _word(value: object) -> str | None:
    """A name, if it is one that can be shown and compared: JSON may hold half surrogates and control characters."""
    return value if isinstance(value, str) and value and value.isprintable() else None


def _netdev(option: str, value: str) -> Netdev | None:
    fields = _fields(value, implied="type")
    if fields is None or not (kind := _word(fields.get("type"))) or (option == "net" and kind in ("nic", "none")):
        return None
    fds = _word(fields.get("fds")) or _word(fields.get("fd"))
    address = fields.get("addr")
    path = address.get("path") if isinstance(address, dict) else fields.get("addr.path")
    queues = fields.get("queues")
    if isinstance(queues, str) and queues.isascii() and queues.isdigit() and len(queues) <= 5:
        queues = int(queues)
    return Netdev(
        option=option,
        kind=kind,
        id=_word(fields.get("id")),
        ifname=_word(fields.get("ifname")),
        bridge=_word(fields.get("br")),
        fds=tuple(fds.split(":")) if fds else (),
        queues=queues if isinstance(queues, int) and not isinstance(queues, bool) else None,
        vhost=parse_bool(fields.get("vhost")),
        path=_word(path),
        model=_word(fields.get("model")) if option == "nic" else None,
        mac=_word(fields.get("mac")) if option == "nic" else None,
    )


def _device(position: int, is_json: bool, fields: Mapping[str, object]) -> Device | None:
    driver, netdev = _word(fields.get("driver")), _word(fields.get("netdev"))
    if not driver or (netdev is None and not driver.startswith("virtio-net")):
        return None
    return Device(
        position=position,
        driver=driver,
        json=is_json,
        id=_word(fields.get("id")),
        netdev=netdev,
        properties=tuple((key, value) for key, value in fields.items() if key != "driver"),
    )


def _agent_chardev(fields: Mapping[str, object]) -> str | None:
    """The character device behind the guest agent's port."""
    return _word(fields.get("chardev")) if fields.get("name") == _AGENT else None


def _global(value: str) -> Global | None:
    if short := _GLOBAL.fullmatch(value):
        return Global(driver=short[1], property=short[2], value=short[3])
    fields = dict(parse_keyval(value))
    if not {"driver", "property", "value"} <= fields.keys():
        return None
    return Global(driver=fields["driver"], property=fields["property"], value=fields["value"])


def _served_path(chardev: Mapping[str, str]) -> str | None:
    """The path of a unix socket that QEMU listens on; None for any other character device."""
    if (
        chardev.get("backend") != "socket"
        or not parse_bool(chardev.get("server"))
        or parse_bool(chardev.get("abstract"))
    ):
        return None
    return chardev.get("path") or None
