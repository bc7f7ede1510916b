# SPDX-License-Identifier: BSD-2-Clause
"""Reading QEMU's command line: its syntax, its options, and what nobody would call a command line."""

import random
import time

import pytest

from qsteer import qemuargs
from qsteer.errors import UsageError
from qsteer.qemuargs import Device, Global, Netdev, parse, parse_keyval, typed

QEMU = "qemu-system-x86_64"


@pytest.mark.parametrize(
    ("text", "implied", "pairs"),
    [
        ("", "", ()),
        ("a=b", "", (("a", "b"),)),
        ("a=b,c=d", "", (("a", "b"), ("c", "d"))),
        ("a=b,", "", (("a", "b"),)),
        ("a=,c=d", "", (("a", ""), ("c", "d"))),
        ("a=x,,y,b=,,", "", (("a", "x,y"), ("b", ","))),
        ("a=,,,b=c", "", (("a", ","), ("b", "c"))),
        ("a=b=c", "", (("a", "b=c"),)),
        ("tap,id=n", "type", (("type", "tap"), ("id", "n"))),
        ("type=tap,id=n", "type", (("type", "tap"), ("id", "n"))),
        ("we,,b,x=1", "guest", (("guest", "we,b"), ("x", "1"))),
        ("server", "", (("server", "on"),)),
        ("path=p,server,nowait", "", (("path", "p"), ("server", "on"), ("wait", "off"))),
        ("a=1,a=2", "", (("a", "1"), ("a", "2"))),
        ("=x", "", (("", "x"),)),
        (",,", "", (("", "on"), ("", "on"))),
    ],
)
def test_keyval(text: str, implied: str, pairs: tuple[tuple[str, str], ...]) -> None:
    assert parse_keyval(text, implied=implied) == pairs


@pytest.mark.parametrize("value", ["web1", "a,b", ",", ",,", "a=b", "", "x,y=z,"])
def test_escape_is_undone(value: str) -> None:
    assert dict(parse_keyval(f"guest={qemuargs.escape(value)},x=1")) == {"guest": value, "x": "1"}


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((), None),
        (("-name", "web1"), "web1"),
        (("--name", "web1"), "web1"),
        (("-name", "guest=web1,debug-threads=on"), "web1"),
        (("-name", "we,,b1,process=p"), "we,b1"),
        (("-name", "process=p"), None),
        (("-name", "a", "-name", "b"), "b"),
        (("-name", ""), None),
        (("-append", "x -name y", "-name", "z"), "z"),
        (("-name",), None),
        (("---name", "a"), None),
        (("name", "a"), None),
    ],
)
def test_name(arguments: tuple[str, ...], name: str | None) -> None:
    assert parse((QEMU, *arguments)).name == name


def test_uuid_and_machine() -> None:
    args = parse((QEMU, "-uuid", "6f0e", "-machine", "none"))
    assert (args.uuid, args.machine) == ("6f0e", "none")
    assert parse((QEMU, "-M", "type=q35,accel=tcg")).machine == "q35"


@pytest.mark.parametrize(
    ("arguments", "netdev"),
    [
        (("-netdev", "tap,id=n,ifname=t0,queues=4,vhost=on"), {"id": "n", "ifname": "t0", "queues": 4, "vhost": True}),
        (("-netdev", "type=tap,id=n,vhost=off"), {"id": "n", "vhost": False}),
        (("-netdev", "tap,id=n,fds=3:4:5"), {"id": "n", "fds": ("3", "4", "5")}),
        (("-netdev", "tap,id=n,fd=charnet0"), {"id": "n", "fds": ("charnet0",)}),
        (("-netdev", "tap,id=n,script=/s,,x,br=br0"), {"id": "n", "bridge": "br0"}),
        (("-netdev", '{"type":"tap","id":"n","queues":2,"vhost":true}'), {"id": "n", "queues": 2, "vhost": True}),
        (("-netdev", "{'type':'tap','id':'n','fds':'3:4'}"), {"id": "n", "fds": ("3", "4")}),
        (("-netdev", "tap,queues=99999999999"), {}),
        (("-netdev", '{"type":"tap","queues":true,"ifname":7,"id":"\\ud800"}'), {}),
        (
            ("-nic", "tap,id=n,model=virtio-net-pci,mac=52:54:00:00:00:01"),
            {"option": "nic", "id": "n", "model": "virtio-net-pci", "mac": "52:54:00:00:00:01"},
        ),
        (("-netdev", "stream,id=n,addr.type=unix,addr.path=/p"), {"kind": "stream", "id": "n", "path": "/p"}),
        (("-netdev", '{"type":"dgram","addr":{"type":"unix","path":"/p"}}'), {"kind": "dgram", "path": "/p"}),
        (("-netdev", '{"type":"dgram","addr":{"path":["/p"]},"addr.path":"/q"}'), {"kind": "dgram"}),
        (("-net", "nic", "-net", "tap,ifname=t1"), {"option": "net", "ifname": "t1"}),
    ],
)
def test_netdev(arguments: tuple[str, ...], netdev: dict[str, object]) -> None:
    (found,) = parse((QEMU, *arguments)).netdevs
    assert found == Netdev(**{"option": "netdev", "kind": "tap", **netdev})  # type: ignore[arg-type]


def test_device() -> None:
    argv = (QEMU, "-S", "-device", "virtio-net-pci,netdev=n,id=d,mq,noguest_csum,mac=1:2", "-device", "ide-hd,drive=x")
    device = Device(
        position=3,
        driver="virtio-net-pci",
        json=False,
        id="d",
        netdev="n",
        properties=(("netdev", "n"), ("id", "d"), ("mq", "on"), ("guest_csum", "off"), ("mac", "1:2")),
    )
    assert parse(argv).devices == (device,)


@pytest.mark.parametrize("quote", ['"', "'"])
def test_json_device(quote: str) -> None:
    text = '{"driver":"virtio-net-pci","netdev":"n","mq":true,"vectors":10,"ebpf-rss-fds":["3","4"]}'.replace(
        '"', quote
    )
    (device,) = parse((QEMU, "--device", text)).devices
    assert device.json
    assert (device.driver, device.netdev, device.id) == ("virtio-net-pci", "n", None)
    assert device.properties == (("netdev", "n"), ("mq", True), ("vectors", 10), ("ebpf-rss-fds", ["3", "4"]))


def test_single_quotes_hold_double_ones() -> None:
    (device,) = parse((QEMU, "-device", """{'driver':'virtio-net','x':'a"b\\'c\\\\d',"y":"it's"}""")).devices
    assert device.properties == (("x", "a\"b'c\\d"), ("y", "it's"))


def test_other_device_that_names_a_netdev() -> None:
    assert [device.driver for device in parse((QEMU, "-device", "e1000,netdev=n")).devices] == ["e1000"]


@pytest.mark.parametrize(
    "text",
    [
        "virtio-net-pci.rss=on",
        "driver=virtio-net-pci,property=rss,value=on",
        "driver=virtio-net-pci,value=on,property=rss",
    ],
)
def test_global(text: str) -> None:
    assert parse((QEMU, "-global", text)).globals == (Global(driver="virtio-net-pci", property="rss", value="on"),)


@pytest.mark.parametrize("text", ["", "rss=on", "driver=virtio-net-pci", "a.b", "."])
def test_global_that_is_none(text: str) -> None:
    assert parse((QEMU, "-global", text)).globals == ()


@pytest.mark.parametrize(
    ("arguments", "paths"),
    [
        (("-qmp", "unix:/q,server=on,wait=off"), ("/q",)),
        (("-qmp", "unix:/q,server,nowait"), ("/q",)),
        (("-qmp-pretty", "unix:path=/q,server=on"), ("/q",)),
        (("-qmp", "unix:/a,,b,server=on"), ("/a,b",)),
        (("-qmp", "unix:/client"), ()),
        (("-qmp", "tcp:localhost:1,server=on"), ()),
        (("-qmp", "stdio"), ()),
        (("-chardev", "socket,id=m,path=/q,server=on,wait=off", "-mon", "chardev=m,mode=control"), ("/q",)),
        (("-mon", "m,mode=control", "-chardev", "socket,id=m,path=/q,server"), ("/q",)),
        (("-mon", "m,mode=readline", "-chardev", "socket,id=m,path=/q,server"), ()),
        (("-mon", "m,mode=control", "-chardev", "socket,id=m,fd=3,server=on"), ()),
        (("-mon", "m,mode=control", "-chardev", "socket,id=m,path=/q,server=on,abstract=on"), ()),
        (("-qmp", "chardev:m", "-chardev", "socket,id=m,path=/q,server=on"), ("/q",)),
        (("-object", "monitor-qmp,id=q,chardev=m", "-chardev", "socket,id=m,path=/q,server=on"), ("/q",)),
        (("-object", "qom-type=monitor-qmp,chardev=m,id=q", "-chardev", "socket,id=m,path=/q,server"), ("/q",)),
        (
            (
                "-object",
                '{"qom-type":"monitor-qmp","id":"q","chardev":"m"}',
                "-chardev",
                "socket,id=m,path=/q,server=on",
            ),
            ("/q",),
        ),
        (("-object", "monitor-hmp,id=q,chardev=m", "-chardev", "socket,id=m,path=/q,server=on"), ()),
        (("-object", "monitor-qmp,id=q", "-chardev", "socket,id=m,path=/q,server=on"), ()),
        (("-object", '{"qom-type":"monitor-qmp","chardev":["m"]}', "-chardev", "socket,id=m,path=/q,server=on"), ()),
        (("-object", '{"qom-type":', "-qmp", "unix:/q,server=on"), ("/q",)),
        (("-mon", "other,mode=control", "-chardev", "socket,id=m,path=/q,server=on"), ()),
        (("-qmp", "unix:/a,server=on", "-qmp", "unix:/b,server=on"), ("/a", "/b")),
    ],
)
def test_qmp_paths(arguments: tuple[str, ...], paths: tuple[str, ...]) -> None:
    assert parse((QEMU, *arguments)).qmp_paths == paths


AGENT_PORT = "virtserialport,bus=s.0,chardev=a,id=channel0,name=org.qemu.guest_agent.0"
AGENT_SOCKET = "socket,path=/a,,b,server=on,wait=off,id=a"


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        (("-device", AGENT_PORT, "-chardev", AGENT_SOCKET), "/a,b"),
        (("-chardev", AGENT_SOCKET, "-device", AGENT_PORT), "/a,b"),
        (
            (
                *("-chardev", AGENT_SOCKET),
                *("-device", '{"driver":"virtserialport","chardev":"a","name":"org.qemu.guest_agent.0"}'),
            ),
            "/a,b",
        ),
        (("-chardev", AGENT_SOCKET, "-device", AGENT_PORT.replace("guest_agent", "other")), None),
        (("-chardev", AGENT_SOCKET, "-device", AGENT_PORT.replace("chardev=a", "chardev=b")), None),
        (("-chardev", "socket,fd=27,server=on,id=a", "-device", AGENT_PORT), None),
        (("-chardev", "socket,path=/client,id=a", "-device", AGENT_PORT), None),
        (("-chardev", AGENT_SOCKET, "-device", '{"name":"org.qemu.guest_agent.0","chardev":7}'), None),
        (("-device", AGENT_PORT), None),
    ],
)
def test_agent_path(arguments: tuple[str, ...], path: str | None) -> None:
    assert parse((QEMU, *arguments)).agent_path == path


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ((), None),
        (("virtio-net-pci.rss=on",), "on"),
        (("virtio-net.rss=on",), "on"),
        (("virtio-net-pci.rss=on", "virtio-net.rss=off"), "off"),
        (("virtio-net.rss=off", "virtio-net-pci.rss=on"), "on"),
        (("virtio-net-pci.rss=on", "virtio-net-pci.rss=off"), "off"),
        (("e1000.rss=on", "virtio-net-pci.mq=on"), None),
    ],
)
def test_defaults(settings: tuple[str, ...], value: str | None) -> None:
    args = parse((QEMU, *(word for setting in settings for word in ("-global", setting))))
    assert qemuargs.Defaults(args.globals).get("virtio-net-pci", "rss") == value
    assert qemuargs.defaults_of(args, "virtio-net-pci").get("rss") == value


@pytest.mark.parametrize(
    "loader",
    [
        ("/lib64/ld-linux-x86-64.so.2",),
        ("/lib/ld-musl-x86_64.so.1", "--library-path", "/l"),
        ("/lib64/ld64.so.2", "--argv0", "web1", "--inhibit-cache", "--preload", "-name"),
        ("ld.so", "--glibc-hwcaps-mask", "x"),
        ("/lib/ld-2.31.so",),
    ],
)
def test_a_qemu_behind_the_dynamic_loader(loader: tuple[str, ...]) -> None:
    argv = (*loader, "/opt/qemu/bin/qemu-system-x86_64", "-name", "web1", "-device", "virtio-net,netdev=n")
    assert qemuargs.is_qemu(argv)
    args = parse(argv)
    assert args.name == "web1"
    assert argv[args.devices[0].position] == "virtio-net,netdev=n"


@pytest.mark.parametrize(
    "argv",
    [
        ("/lib64/ld-linux-x86-64.so.2",),
        ("/lib64/ld-linux-x86-64.so.2", "--library-path"),
        ("/lib64/ld-linux-x86-64.so.2", "--library-path", "qemu-system-x86_64"),
        ("/lib64/ld-linux-x86-64.so.2", "--list", "qemu-system-x86_64"),
        ("/lib64/ld-linux-x86-64.so.2", "/bin/sleep", "qemu-system-x86_64"),
        ("/bin/old", "qemu-system-x86_64"),
        ("ldd.so.sh", "qemu-system-x86_64"),
    ],
)
def test_what_is_no_qemu_behind_the_loader(argv: tuple[str, ...]) -> None:
    assert not qemuargs.is_qemu(argv)
    parse(argv)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (QEMU, True),
        ("/usr/bin/qemu-system-aarch64", True),
        ("/usr/libexec/qemu-kvm", True),
        ("kvm", True),
        ("/nix/store/x/bin/.qemu-system-x86_64-wrapped", True),
        ("/usr/bin/python3", False),
        ("qemu-img", False),
        ("/qemu-system-x86_64/sh", False),
        ("", False),
    ],
)
def test_is_qemu(program: str, expected: bool) -> None:
    assert qemuargs.is_qemu((program, QEMU)) is expected
    assert not qemuargs.is_qemu(())


@pytest.mark.parametrize(
    ("data", "argv"),
    [
        (b"", ()),
        (b"a\0", ("a",)),
        (b"a\0b", ("a", "b")),
        (b"a\0\0c\0", ("a", "", "c")),
        (b"\xff\0", ("�",)),
        (b"x" * (qemuargs.CMDLINE_MAX + 1), ("x" * qemuargs.CMDLINE_MAX,)),
    ],
)
def test_split_cmdline(data: bytes, argv: tuple[str, ...]) -> None:
    assert qemuargs.split_cmdline(data) == argv


@pytest.mark.parametrize(
    "value",
    [
        '{"driver":"virtio-net-pci"',
        '{"driver":"virtio-net-pci",}',
        "{'driver':'virtio-net-pci\\",
        "{" * 100_000,
        '{"a":' * 100_000,
        '{"a":' + "[" * 100_000,
        '{"queues":' + "9" * 10_000 + "}",
        "{'a\"\n",
    ],
)
@pytest.mark.parametrize("option", ["-device", "-netdev"])
def test_unreadable_json_is_kept_aside(option: str, value: str) -> None:
    args = parse((QEMU, option, value, "-name", "web1"))
    assert args.unreadable == (f"{option} {value}",)
    assert (args.devices, args.netdevs, args.name) == ((), (), "web1")


@pytest.mark.parametrize(
    "value", ['{"netdev":"n"}', '{"driver":7}', '{"driver":""}', '{"driver":null,"netdev":[]}', "", "=", "netdev=n"]
)
def test_device_without_a_driver_is_none(value: str) -> None:
    assert parse((QEMU, "-device", value)).devices == ()


def test_names_that_cannot_be_shown_are_none() -> None:
    (device,) = parse((QEMU, "-device", '{"driver":"virtio-net-pci","netdev":"\\u001b[2J","id":"\\ud800"}')).devices
    assert (device.netdev, device.id) == (None, None)


@pytest.mark.parametrize(
    "piece", ["a,", "a=", ",,", "=", '"', "'", "\\'", '{"', "['", "-device\0", "-netdev\0{'\0", "no,"]
)
def test_a_hostile_command_line_costs_little(piece: str) -> None:
    size = qemuargs.CMDLINE_MAX // len(piece)
    for option in ("-device\0{", "-device\0", "-chardev\0", "-name\0", "-global\0", ""):
        started = time.monotonic()
        parse(qemuargs.split_cmdline(f"qemu-system-x86_64\0{option}{piece * size}".encode()))
        assert time.monotonic() - started < 10


def test_noise_never_raises() -> None:
    generator = random.Random(2)
    words = [
        "-device",
        "-netdev",
        "-name",
        "-global",
        "-mon",
        "-qmp",
        "-chardev",
        "{",
        "}",
        "'",
        '"',
        ":",
        ",",
        "=",
        "\\",
    ]
    words += ["driver", "virtio-net-pci", "netdev", "tap", "unix:", "\0", "[", "]", "1", "true", "\x1b", "\udfff", "é"]
    for _ in range(3000):
        text = "".join(generator.choices(words, k=generator.randrange(40)))
        parse(qemuargs.split_cmdline(b"kvm\0" + text.encode("utf-8", "surrogatepass")))
        parse(("kvm", *text.split("\0")))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("on", "bool", True),
        ("yes", "bool", True),
        ("true", "bool", True),
        ("y", "bool", True),
        ("off", "bool", False),
        ("no", "bool", False),
        ("false", "bool", False),
        ("n", "bool", False),
        ("10", "uint32", 10),
        ("0x1F", "uint16", 31),
        ("010", "uint32", 8),
        ("0", "uint8", 0),
        ("-1", "int32", -1),
        ("+3", "int64", 3),
        ("4096", "size", 4096),
        ("4k", "size", 4096),
        ("2M", "size", 2 << 20),
        ("1B", "size", 1),
        ("0x10", "size", 16),
        ("3G", "size", 3 << 30),
        ("auto", "OnOffAuto", "auto"),
        ("on", "OnOffAuto", "on"),
        ("52:54:00:12:34:56", "str", "52:54:00:12:34:56"),
        ("7", "str", "7"),
        ("x", "list", "x"),
        ("", "str", ""),
    ],
)
def test_typed(text: str, kind: str, value: object) -> None:
    result = typed("property", text, kind)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize("kind", ["int32", "str"])
def test_a_pci_address_stays_text(kind: str) -> None:
    assert typed("addr", "5", kind) == "5"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("maybe", "bool"),
        ("On", "bool"),
        ("1", "bool"),
        ("", "bool"),
        ("", "uint32"),
        ("ten", "uint32"),
        ("09", "uint32"),
        ("1_000", "uint32"),
        ("٣", "uint32"),
        ("0x", "uint32"),
        ("1.5", "int32"),
        ("4k", "uint32"),
        ("k", "size"),
        ("1kk", "size"),
        ("9" * 5000, "uint64"),
        (" 1", "int32"),
    ],
)
def test_typed_refuses(text: str, kind: str) -> None:
    with pytest.raises(UsageError, match="property="):
        typed("property", text, kind)
