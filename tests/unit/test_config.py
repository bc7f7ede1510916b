# SPDX-License-Identifier: BSD-2-Clause
"""The configuration's files: what they say, every mistake in them by its line, and what is saved into them."""

import json
import os
import random
import socket
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qsteer import cli, config, configtext, saved, settings, tomlplaces
from qsteer.access import Rule
from qsteer.config import ConfigError
from qsteer.errors import QsteerError, UsageError
from qsteer.intent import Intent
from qsteer.model import Nic, Source, Tap
from qsteer.plan import Static, Wanted
from qsteer.rss import HashType, equal_table, weighted_table
from qsteer.runplan import Rss, Vhost
from qsteer.settings import AUTO, Config, Libvirt, Serve, Settings
from tests.unit.taps import process, tap

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "qsteer.toml"
KEY = bytes(range(40))
HEX = KEY.hex(":")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The configuration's directory, and no more rights for others than files have on most hosts."""
    monkeypatch.setenv(config.VARIABLE, str(tmp_path))
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def put(folder: Path, text: str | bytes, name: str = config.MAIN) -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def one(text: str) -> Settings:
    """What a text with one entry says."""
    parsed = configtext.parse(text, "f")
    assert not parsed.mistakes
    (entry,) = parsed.entries
    return entry.settings


def mistakes(text: str) -> list[str]:
    return [f"{it.line}: {it.message}" + (f" ({it.hint})" if it.hint else "") for it in _parsed(text).mistakes]


def _parsed(text: str) -> configtext.Parsed:
    return configtext.parse(text, "f")


# --- What a text says ------------------------------------------------------------------------------------------------


def test_all_that_can_be_said_of_a_nic() -> None:
    said = one(
        f"""
        [[nic]]
        match.vm = "web-*"
        source = "static"
        types = ["tcp4", "ip-ex"]
        key = "{HEX}"
        table = [1, 0]
        unclassified-queue = 3
        allow = ["pause"]
        replace = true
        force = false
        queues = 4
        vhost = "on"
        rss = "off"
        bridge = "br0"
        mtu = 9000
        required = true
        """
    )
    static = Static(types=HashType.TCP4 | HashType.IP_EX, key=KEY, table=(1, 0), unclassified_queue=3)
    assert said == Settings(
        source=Source.STATIC,
        static=static,
        allow=("pause",),
        replace=True,
        force=False,
        queues=4,
        vhost=Vhost.ON,
        rss=Rss.OFF,
        bridge="br0",
        mtu=9000,
        required=True,
    )


def test_short_forms() -> None:
    assert one("[[nic]]\nequal = 3").static.table == equal_table(3)
    assert one("[[nic]]\nweight = [1, 0, 2]").static.table == weighted_table((1, 0, 2))
    assert one('[[nic]]\nsource = "auto"').source == AUTO
    assert one("[[nic]]\ntypes = []").static.types == HashType(0)
    assert one('nic = [{ match = { vm = "a" }, queues = 2 }]') == Settings(queues=2)


def test_patterns() -> None:
    text = '[[nic]]\nmatch = { vm = ["a", "b*"], nic = "n", mac = "52:54:00:AB:*", dev = "v?", bridge = "[[]x]" }'
    (entry,) = _parsed(text).entries
    match = entry.match
    assert (match.vm, match.nic, match.mac, match.dev) == (("a", "b*"), ("n",), ("52:54:00:ab:*",), ("v?",))
    assert match.bridge == ("[[]x]",)


def test_serve() -> None:
    parsed = _parsed(
        """
        [serve]
        clients-per-user = 2
        timeout = 1
        [[serve.allow]]
        user = "alice"
        bridges = ["br0", ""]
        prefix = "al-"
        queues = 8
        taps = 16
        vhost = true
        [[serve.allow]]
        group = "36"
        programs = true
        """
    )
    assert not parsed.mistakes
    assert parsed.serve == {"clients_per_user": 2, "timeout_s": 1.0}
    assert parsed.rules == (
        Rule(user="alice", bridges=("br0", ""), prefix="al-", queues=8, taps=16, vhost=True),
        Rule(group="36"),
    )


def test_libvirt() -> None:
    parsed = _parsed('[libvirt]\nsteer = "policy"\nmetadata = ["source", "pause"]\n')
    assert not parsed.mistakes
    assert parsed.libvirt == {"steer": "policy", "metadata": ("source", "pause")}
    assert _parsed('libvirt.steer = "all"').libvirt == {"steer": "all"}
    assert _parsed("[libvirt]\nmetadata = []\n").libvirt == {"metadata": ()}
    assert _parsed("[libvirt]\n").libvirt == _parsed("").libvirt == {}
    every = ", ".join(f'"{word}"' for word in settings.METADATA_WORDS)
    assert _parsed(f"[libvirt]\nmetadata = [{every}]\n").libvirt == {"metadata": settings.METADATA_WORDS}


def test_the_example_is_without_mistake_and_says_all_there_is() -> None:
    (checked,) = config.check([str(EXAMPLE)])
    assert (checked.mistakes, checked.entries, checked.rules) == ((), 5, 1)
    text = EXAMPLE.read_text()
    for known in (configtext._NIC, configtext._MATCH, configtext._SERVE, configtext._RULE):
        assert [key for key in known if key not in text] == []


# --- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[[nic]\n", "1: this is not TOML: Expected ']]' at the end of an array declaration"),
        ("[[nic]]\n\nmatch.vm = web\n", '3: this is not TOML: Invalid value (text stands in quotes: vm = "web1")'),
        ("[[nic]]\nqueues = 1\nqueues = 2\n", "3: this is not TOML: Cannot overwrite a value"),
        ("[[nic]]\nkey = 'a\n", "2: this is not TOML"),
        ("[[nic]]\ntable = [1,\n0\n", "3: this is not TOML"),
        ("\n[nics]\n", '2: unknown key "nics" (did you mean "nic"?)'),
        ("[nic]\nqueues = 1\n", "1: nic: an array of tables is wanted, not a table ([[nic]])"),
        ("nic = [1]\n", "1: nic: a table is wanted, not 1 ([[nic]])"),
        ("[[nic]]\n\nquues = 4\n", '3: unknown key "quues" in nic (did you mean "queues"?)'),
        ('[[nic]]\nvm = "a"\n', '2: unknown key "vm" in nic (did you mean "match.vm"?)'),
        ("[[nic]]\nmatch.name = 'a'\n", '2: unknown key "name" in nic.match (known here: vm, nic, mac, dev, bridge)'),
        ("[[nic]]\nmatch = 'a'\n", '2: match: a table is wanted, not "a" (match.vm = "web-*")'),
        ("[[nic]]\nunclassified_queue = 1\n", '2: unknown key "unclassified_queue" in nic (did you mean "uncl'),
        ("[[nic]]\nqueues = true\n", "2: queues: a whole number from 1 to 256 is wanted, not true"),
        ("[[nic]]\nqueues = 257\n", "2: queues: a whole number from 1 to 256 is wanted, not 257"),
        ("[[nic]]\nqueues = 4.0\n", "2: queues: a whole number from 1 to 256 is wanted, not 4.0"),
        ("[[nic]]\nmtu = 67\n", "2: mtu: a whole number from 68 to 65521"),
        ("[[nic]]\nreplace = 'yes'\n", '2: replace: true or false is wanted, not "yes"'),
        ("[[nic]]\nvhost = true\n", "2: vhost: true is none of auto, on, off"),
        ("[[nic]]\nsource = 'guest'\n", '2: source: "guest" is none of auto, shared-maps, qemu-maps, device-state'),
        ("[[nic]]\nallow = 'pause'\n", '2: allow: an array is wanted, not "pause" ([..., ...])'),
        ("[[nic]]\nallow = ['taint']\n", '2: allow: "taint" is none of pause'),
        ("[[nic]]\ntypes = ['tcp']\n", '2: types: "tcp" is none of ip4, tcp4'),
        ("[[nic]]\ntable = [0,1,2]\n", "2: table: an indirection table has 1 to 128 entries, a power of two, not 3"),
        ("[[nic]]\ntable = [0,65536]\n", "2: table: a whole number from 0 to 65535 is wanted, not 65536"),
        ("[[nic]]\ntable = [0,-1]\n", "2: table: a whole number from 0 to 65535 is wanted, not -1"),
        ("[[nic]]\nequal = 0\n", "2: equal: a whole number from 1"),
        ("[[nic]]\nweight = [0, 0]\n", "2: weight: weights are whole numbers, not all of them 0"),
        ("[[nic]]\nkey = 'random'\n", "2: key: random would be another one each time"),
        ("[[nic]]\nkey = '6d:5a'\n", "2: key: a hash key has 40 bytes, not 2"),
        (f"[[nic]]\nkey = '{'6d' * 9999}'\n", "2: key: a hash key has 40 bytes, not 19998 characters"),
        ("[[nic]]\nequal = 2\ntable = [0, 1]\n", '3: "table" besides "equal" (one of table, equal and weight)'),
        ("[[nic]]\ntable = [0]\nsource = 'guest-agent'\n", "3: source guest-agent takes the guest's table"),
        ("[[nic]]\nbridge = 'br/0'\n", '2: bridge: "br/0" is not a network device\'s name'),
        ("[[nic]]\nbridge = 'a-very-long-bridge'\n", "2: bridge: "),
        ("[[nic]]\nmatch.vm = 'a[b'\n", '2: vm: "a[b": "[" without "]" (a bracket itself is "[[]")'),
        ("[[nic]]\nmatch.vm = ''\n", '2: vm: an empty pattern matches nothing ("*" matches all)'),
        ("[[nic]]\nmatch.vm = []\n", "2: vm: an empty pattern"),
        ("[[nic]]\nmatch.vm = 7\n", '2: vm: text is wanted, not 7 ("7")'),
        ("[[nic]]\nmatch.mac = 'net0'\n", '2: mac: "net0" is no pattern of a MAC (52:54:00:*)'),
        (f"[[nic]]\nmatch.vm = '{'a' * 1025}'\n", "2: vm: a pattern of more than 1024 characters"),
        ("[[nic]]\nmtu = 1979-05-27\n", "2: mtu: a whole number from 68 to 65521 is wanted, not a date or time"),
        (f"[[nic]]\nqueues = 0x{'f' * 9999}\n", "2: queues: a whole number from 1 to 256 is wanted, not such a number"),
        (f"[[nic]]\n\nqueues = {'9' * 9999}\n", "3: a number of too many digits"),
        ("serve = 1\n", "1: serve: a table is wanted, not 1 ([serve])"),
        ("[serve]\nclients = 0\n", "2: clients: a whole number from 1 to 1024 is wanted, not 0"),
        ("[serve]\ntimeout = nan\n", "2: timeout: seconds from 0.01 to 3600 are wanted, not such a number"),
        ("[serve]\nclients_per_user = 2\n", '2: unknown key "clients_per_user" in serve (did you mean "clients-'),
        ("[serve.allow]\nuser = 'a'\n", "1: serve.allow: an array of tables is wanted, not a table ([[serve.allow]])"),
        ("[[serve.allow]]\nuser = 'a'\ngroup = 'b'\n", "1: both a user and a group (one entry for each)"),
        ("[[serve.allow]]\nvhost = true\n", "1: neither a user nor a group: whom is it for?"),
        ("[[serve.allow]]\nuser = 1000\n", '2: user: text is wanted, not 1000 ("1000")'),
        ("[[serve.allow]]\nuser = 'a'\ntaps = 1\n", "1: taps without queues: it allows no tap"),
        ("[[serve.allow]]\nuser = 'a'\nqueues = 1\n", "1: queues without taps: it allows no tap"),
        ("[[serve.allow]]\nuser = 'a'\nqueues = 1\ntaps = 1\n", "1: taps without a prefix"),
        ("[[serve.allow]]\nuser = 'a'\nprefix = 'al%'\n", '3: prefix: "al%" is not a network device'),
        ("[[serve.allow]]\nuser = 'a'\nprefix = 'fifteen-letters'\n", "3: prefix: "),
        ("libvirt = 1\n", "1: libvirt: a table is wanted, not 1 ([libvirt])"),
        ("\n[[libvirt]]\nsteer = 'all'\n", "2: libvirt: a table is wanted, not an array ([libvirt])"),
        ("[libvirt]\n\nsteer = 'none'\n", '3: steer: "none" is none of all, policy'),
        ("[libvirt]\nsteer = true\n", "2: steer: true is none of all, policy"),
        ("[libvirt]\nsteer = ['all']\n", "2: steer: an array is none of all, policy"),
        ("[libvirt]\nmetadata = 'source'\n", '2: metadata: an array is wanted, not "source" ([..., ...])'),
        (
            "[libvirt]\nmetadata = ['source',\n'equal']\n",
            '2: metadata: "equal" is none of source, engine, table, key, ty',
        ),
        ("[libvirt]\nmetadata = [1]\n", "2: metadata: 1 is none of source, engine"),
        ("[libvirt]\nmetdata = []\n", '2: unknown key "metdata" in libvirt (did you mean "metadata"?)'),
        ("[libvirt]\nhook = 1\n", '2: unknown key "hook" in libvirt (known here: steer, metadata)'),
        ("[libvrt]\n", '1: unknown key "libvrt" (did you mean "libvirt"?)'),
        ("a = " + "[" * 5000, "1: arrays or tables are nested too deep"),
        ("\n" + ".".join("a" * 5000) + " = 1", "2: a key of 5000 parts"),
    ],
)
def test_a_mistake(text: str, told: str) -> None:
    (found,) = mistakes(text)
    assert found.startswith(told), found
    assert not _parsed(text).entries and not _parsed(text).rules


def test_every_mistake_is_found_in_one_go_and_what_is_right_stays() -> None:
    text = "[[nic]]\nqueues = 0\nmtu = 1\n[[nic]]\nqueues = 2\n[serve]\nclients = 'a'\n[[serve.allow]]\nwho = 1\n"
    assert [int(told.split(":")[0]) for told in mistakes(text)] == [2, 3, 7, 9]
    assert [entry.settings.queues for entry in _parsed(text).entries] == [2]


# --- Where keys stand ------------------------------------------------------------------------------------------------

PIECES = (
    'a."b.c".\'d e\' = """x\n[nic]\n#"""\n',
    "s = '''\n'a' \n'''''\n",
    'x = [1,\n # c ]\n [2, "]"], {k = 1, "l" = [ ]},\n]\n',
    "[ a . b ]\nk = 1979-05-27 07:32:00Z\n",
    '[[serve.allow]]\nuser = "\\u0041\\""\n',
    '"\\u00e9".q = -inf # =\n',
    'nic = [ { match.vm = "a" },\n {match = {vm = "b"}, queues=4} ]\n',
    "[[a.b]]\n[a.b.c]\nd=1\n[[a.b]]\n[a.b.c]\nd=2\n",
    'e = """a\\"""""" \n',
    'm="""q""z"\\\n   """\r\nn = 1\n',
)


def paths(value: Any, at: tomlplaces.Path = ()) -> Iterator[tomlplaces.Path]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*at, key)
        yield from paths(child, (*at, key))


def has(document: Any, path: tomlplaces.Path) -> bool:
    for part in path:
        try:
            document = document[part]
        except (KeyError, IndexError, TypeError):
            return False
    return True


def parsed_or_none(lines: list[str]) -> Any:
    try:
        return tomllib.loads("\n".join(lines))
    except ValueError:
        return None


def check_places(text: str) -> None:
    """By tomllib's word: what comes before a key's line does not have it, what comes up to some line after it has."""
    found, document, lines = tomlplaces.places(text), tomllib.loads(text), text.replace("\r\n", "\n").split("\n")
    for path in paths(document):
        line = found[path]
        before = parsed_or_none(lines[: line - 1])
        assert before is None or not has(before, path), path
        after = (parsed_or_none(lines[:end]) for end in range(line, len(lines) + 1))
        assert has(next(one for one in after if one is not None), path), path


def test_the_line_of_each_key() -> None:
    for piece in (*PIECES, EXAMPLE.read_text()):
        check_places(piece)
    check_places("".join(PIECES[:4]) + PIECES[4])


def test_whatever_is_in_a_file() -> None:
    """No exception, and every mistake within the file; keys of what still is TOML are found where they stand."""
    numbers = random.Random(6)
    lines = EXAMPLE.read_text().splitlines(keepends=True)
    tokens = [
        '"',
        "'",
        '"""',
        "[",
        "]",
        "[[",
        "{",
        "}",
        "=",
        ".",
        ",",
        "#",
        "\n",
        "\\",
        "\x00",
        "\ud800",
        "nic",
        "9" * 30,
    ]
    right = 0
    for number in range(1500):
        chosen = [*numbers.sample(lines, numbers.randrange(2, 20)), *numbers.sample(PIECES, numbers.randrange(2))]
        text = "".join(chosen)
        for _ in range(numbers.choice((0, 1, 1, 2, 4))):
            at = numbers.randrange(len(text) + 1)
            text = text[:at] + numbers.choice(("", *tokens)) + text[at + numbers.choice((0, 0, 1, 4)) :]
        parsed = configtext.parse(text, "f")
        assert all(0 < it.line <= text.count("\n") + 1 and "\n" not in it.message for it in parsed.mistakes)
        found = tomlplaces.places(text)
        try:
            document = tomllib.loads(text)
        except ValueError:
            assert parsed.mistakes
            continue
        right += 1
        assert found.keys() >= set(paths(document))
        if number % 20 == 0:
            check_places(text)
    assert right > 300


# --- Files -----------------------------------------------------------------------------------------------------------


def test_no_file_is_an_empty_configuration(folder: Path) -> None:
    assert config.load() == config.load(folder / "nowhere") == Config()
    assert config.check() == ()


def test_files_in_their_order(folder: Path) -> None:
    put(folder, "[[nic]]\nqueues = 1\n[serve]\nclients = 5\ntimeout = 1.5\n[[serve.allow]]\nuser = 'a'\n")
    put(folder, "[[nic]]\nqueues = 3\n[serve]\nclients = 7\n[[serve.allow]]\nuser = 'b'\n", "conf.d/9.toml")
    put(folder, "[[nic]]\nqueues = 2\n", "conf.d/10.toml")
    for name in ("conf.d/.10.toml", "conf.d/10.toml~", "conf.d/README", "conf.d/.x.toml.new"):
        put(folder, "nonsense", name)
    loaded = config.load()
    assert [entry.settings.queues for entry in loaded.entries] == [1, 2, 3]
    assert loaded.serve == Serve(clients=7, timeout_s=1.5)
    assert [rule.user for rule in loaded.rules] == ["a", "b"]
    assert loaded.libvirt == Libvirt()
    assert [Path(one.file).name for one in config.check()] == ["qsteer.toml", "10.toml", "9.toml"]
    names = [f"{number}.toml" for number in range(40)]
    for name in names:
        put(folder, "", f"conf.d/{name}")
    assert [Path(one.file).name for one in config.check()] == ["qsteer.toml", *sorted(names)]


def test_the_last_file_that_says_something_of_libvirt_counts(folder: Path) -> None:
    put(folder, "[libvirt]\nsteer = 'policy'\nmetadata = ['source']\n")
    put(folder, "[libvirt]\nmetadata = ['key', 'pause']\n", "conf.d/2.toml")
    put(folder, "[libvirt]\n", "conf.d/3.toml")
    assert config.load().libvirt == Libvirt(steer="policy", metadata=("key", "pause"))
    put(folder, "[libvirt]\nsteer = 'some'\n", "conf.d/3.toml")
    assert why(folder) == 'conf.d/3.toml:2: steer: "some" is none of all, policy'


def test_the_first_mistake_is_told_and_how_many_there_are(folder: Path) -> None:
    put(folder, "[[nic]]\nequal = 1\n")
    put(folder, "[[nic]]\nquues = 1\nmtu = 0\n", "conf.d/a.toml")
    put(folder, "[[nic]]\nmtu = 0\n", "conf.d/b.toml")
    with pytest.raises(ConfigError) as caught:
        config.load()
    assert str(caught.value) == f'{folder}/conf.d/a.toml:2: unknown key "quues" in nic'
    assert caught.value.hint == 'did you mean "queues"?; 2 more: qsteer config check'
    assert caught.value.exit_code == 2


def why(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load()
    return str(caught.value).removeprefix(f"{folder}/")


def test_what_is_no_text(folder: Path) -> None:
    put(folder, b"[[nic]]\n# \xff\n")
    assert why(folder) == "qsteer.toml:2: this is not UTF-8"
    put(folder, b"#" * ((1 << 20) + 1))
    assert why(folder) == "qsteer.toml: this is larger than 1 MiB"
    put(folder, b"#" * (1 << 20))
    assert config.load() == Config()


def test_what_is_no_file_does_not_make_it_wait(folder: Path) -> None:
    more = folder / "conf.d"
    more.mkdir()
    (more / "a.toml").mkdir()
    os.mkfifo(more / "b.toml")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(more / "c.toml"))
    (more / "d.toml").symlink_to("/dev/zero")
    (more / "e.toml").symlink_to("e.toml")
    (more / "f.toml").symlink_to("nowhere")
    told = {Path(one.file).name: one.mistakes[0].message for one in config.check()}
    assert set(told.values()) == {
        "this is no ordinary file",
        "Too many levels of symbolic links",
        "No such file or directory",
    }
    assert len(told) == 6
    (folder / "there").write_text("[[nic]]\nqueues = 2\n")
    for path in more.iterdir():
        path.rmdir() if path.is_dir() else path.unlink()
    (more / "f.toml").symlink_to("../there")
    assert len(config.load().entries) == 1


def test_directories_that_are_none(folder: Path) -> None:
    put(folder, "", "conf.d")
    assert why(folder) == "conf.d: this is no directory"
    assert "no directory" in why_in(folder / "conf.d")
    (folder / config.MAIN).mkdir()
    assert "conf.d: " in why(folder)
    (folder / "conf.d").unlink()
    assert why(folder) == "qsteer.toml: this is no ordinary file"


def why_in(folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(folder)
    return str(caught.value)


def test_files_to_check(folder: Path) -> None:
    good, bad = put(folder, "[[nic]]\n", "x"), put(folder, "[nix]\n", "y")
    good.chmod(0o666)
    names = [str(good), str(bad), str(folder / "z"), "a\0b"]
    checked = config.check(names)
    assert [(one.file, one.entries) for one in checked] == [(name, int(name == str(good))) for name in names]
    told = [str(mistake) for one in checked for mistake in one.mistakes]
    assert told == [f'{bad}:1: unknown key "nix"', f"{folder}/z: No such file or directory", "a\0b: this is no path"]


def test_what_config_check_prints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.command(["config", "check"]) == 0
    assert capsys.readouterr().out == f"no configuration in {folder}\n"
    good = put(folder, "[[nic]]\n[[nic]]\n[[serve.allow]]\nuser = 'a'\n")
    assert cli.command(["config", "check"]) == 0
    assert capsys.readouterr().out == f"{good}: ok, 2 entries of NICs, 1 rule of serve\n"
    bad = put(folder, "[[nic]]\nmut = 1\n", "conf.d/\n.toml")
    assert cli.command(["config", "check"]) == 2
    printed = capsys.readouterr()
    assert printed.out.startswith(str(good))
    assert printed.err == f'qsteer: {folder}/conf.d/?.toml:2: unknown key "mut" in nic (hint: did you mean "mtu"?)\n'
    assert cli.command(["config", "check", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == "qsteer.config/1"
    assert [one["ok"] for one in document["files"]] == [True, False]
    mistake = {"line": 2, "message": 'unknown key "mut" in nic', "hint": 'did you mean "mtu"?'}
    assert document["files"][1] == {"file": str(bad), "ok": False, "nic": 0, "serve_allow": 0, "mistakes": [mistake]}


# --- What is wanted of a tap -----------------------------------------------------------------------------------------

NIC = Nic(id="net0", netdev="hostnet0", mac="52:54:00:00:00:01", rss=False, vhost=False)


def named(vm: str = "web1", nic: Nic | None = NIC, name: str = "vnet0") -> Tap:
    return tap(holder=process(name=vm.replace(",", ",,")), nic=nic, name=name)


def test_options_go_over_the_files(folder: Path) -> None:
    put(
        folder,
        "[[nic]]\nmatch.vm = 'web*'\ntable = [0, 1]\nallow = ['pause']\n[[nic]]\nmatch.mac = '*:02'\nequal = 1\n",
    )
    assert Intent(Settings())(named()) == Wanted(source=Source.STATIC, static=Static(table=(0, 1)), allow_pause=True)
    assert Intent(Settings())(named("db")) == Wanted()
    assert Intent(Settings(source=AUTO, allow=()))(named()) == Wanted()
    given = Settings(source=Source.STATIC, static=Static(key=KEY))
    assert Intent(given)(named()).static == Static(key=KEY, table=(0, 1))
    assert Intent(Settings(), refresh=True)(named()) == Wanted(refresh=True, allow_pause=True)


def test_a_nic_has_to_be_known_where_it_matters(folder: Path) -> None:
    without, without_mac = named(nic=None), named(nic=replace(NIC, mac=None))
    assert not Intent(Settings())(without).identify
    assert Intent(Settings(), identify=True)(without).identify
    put(folder, "[[nic]]\nmatch.nic = 'net0'\nequal = 1\n")
    intent = Intent(Settings())
    assert [intent(one).identify for one in (without, without_mac, named())] == [True, False, False]
    assert [bool(intent(one).static) for one in (without, without_mac, named())] == [False, True, True]
    put(folder, "[[nic]]\nmatch.mac = '52*'\nequal = 1\n")
    intent.reload()
    assert [intent(one).identify for one in (without, without_mac, named())] == [True, True, False]
    assert not intent(tap(holder=None, nic=None)).identify


def test_a_broken_file_changes_nothing(folder: Path) -> None:
    put(folder, "[[nic]]\nequal = 1\n")
    intent = Intent(Settings())
    before = intent(named())
    put(folder, "[[nic]]\nequal = 0\n")
    with pytest.raises(ConfigError):
        intent.reload()
    assert intent(named()) == before and before.static
    put(folder, "")
    intent.reload()
    assert intent(named()) == Wanted()


# --- What is saved ---------------------------------------------------------------------------------------------------

NAMES = (
    "web1",
    "*",
    "[a]",
    "a[!b]?*",
    "../../etc/passwd",
    ".hidden",
    "ä ö\u2028\u202e",
    'quote " and \\ back\\u0041',
    "new\nline\r\t\x01\x7f\x85",
    "'''\"\"\"",
    "# [[nic]]",
    "x" * 300,
    "*" * 300,
    "\U0001f600\ufeff\ufffe",
)


def save(one: Tap, given: Settings) -> saved.File:
    file = saved.plan(one, given, Intent(given).settings(one))
    saved.write(file)
    return file


@pytest.mark.parametrize("name", NAMES)
def test_a_name_matches_itself_and_nothing_else(folder: Path, name: str) -> None:
    given = Settings(source=Source.STATIC, static=Static(table=(2, 1)))
    mine = named(name, replace(NIC, id=name))
    assert mine.vm_name == name
    file = save(mine, given)
    assert file.path.parent == folder / "conf.d" and len(file.path.name.encode()) < 200
    assert file.path.name.isascii() and "/" not in file.path.name
    intent = Intent(Settings())
    assert intent(mine) == Intent(given)(mine)
    for other in (*NAMES, "a", name + "x", name[:-1]):
        if other != name:
            assert intent(named(other, replace(NIC, id=name))) == Wanted(), other
            assert intent(named(name, replace(NIC, id=other, netdev=None))) == Wanted(), other


SETTINGS = (
    Settings(),
    Settings(source=AUTO, allow=("pause",)),
    Settings(source=Source.GUEST_AGENT, replace=True),
    Settings(source=Source.STATIC, force=True),
    Settings(source=Source.STATIC, static=Static(types=HashType(0), unclassified_queue=0)),
    Settings(source=Source.STATIC, static=Static(types=HashType.TCP4 | HashType.UDP_EX, key=KEY, table=(3, 2))),
    Settings(source=Source.STATIC, static=Static(table=equal_table(3))),
    Settings(source=Source.STATIC, static=Static(unclassified_queue=7), allow=("pause",), replace=True, force=True),
)
FILES = (
    "",
    "[[nic]]\nsource = 'guest-agent'\n",
    "[[nic]]\ntable = [1, 3]\nreplace = true\n",
    "[[nic]]\nmatch.vm = 'db'\ntable = [1, 3]\n",
)


@pytest.mark.parametrize("text", FILES)
def test_what_is_saved_leads_to_the_same(folder: Path, text: str) -> None:
    """Whatever the files before it say, and whatever was saved before."""
    put(folder, text)
    for before in (None, *SETTINGS):
        for given in SETTINGS:
            for path in (folder / "conf.d").glob("*"):
                path.unlink()
            if before:
                save(named(), before)
            meant = Intent(given)(named())
            file = save(named(), given)
            assert Intent(Settings())(named()) == meant, (before, given, file.content)
            assert [path.name for path in (folder / "conf.d").iterdir()] == ["90-saved-web1@net0.toml"]


def test_a_plain_apply_saves_auto() -> None:
    assert save(named(), Settings()).content == (
        f'{saved.MARK}\n[[nic]]\nmatch.vm = "web1"\nmatch.nic = "net0"\nsource = "auto"\n'
    )


def test_a_spread_is_saved_in_one_word() -> None:
    for table, line in ((equal_table(3), "equal = 3"), ((0, 1), "table = [0, 1]"), ((0,) * 128, "equal = 1")):
        content = saved.plan(named(), Settings(static=Static(table=table)), Settings()).content
        assert content.splitlines()[-1] == line


def test_each_nic_has_a_file_of_its_own(folder: Path) -> None:
    unnamed = Nic(id=None, netdev=None, mac="52:54:00:00:00:02", rss=False, vhost=False)
    taps = (
        named("a", replace(NIC, id="b@c")),
        named("a@b", replace(NIC, id="c")),
        named("a", replace(NIC, id="dev=vnet2")),
        named("a", None, name="vnet2"),
        named("a", unnamed),
        named("a", replace(NIC, id="52:54:00:00:00:02")),
        named("a", replace(unnamed, mac=None), name="vnet1"),
        tap(holder=None, nic=None, name="a"),
        named("x" * 100),
        named("x" * 101),
        named("x" * 80),
    )
    names = [save(one, Settings(static=Static(unclassified_queue=number))).path.name for number, one in enumerate(taps)]
    assert len(set(names)) == len(taps)
    intent = Intent(Settings())
    for number, one in enumerate(taps):
        assert intent(one).static.unclassified_queue == number


def test_what_cannot_be_saved(folder: Path) -> None:
    for name, reason in (("\udcff", "not UTF-8"), ("x" * 1025, "more than 1024"), ("*" * 500, "more than 1024")):
        with pytest.raises(UsageError, match=reason):
            saved.plan(named(name), Settings(), Settings())
    assert not (folder / "conf.d").exists()


def test_somebody_elses_file_stays(folder: Path) -> None:
    for text in ("", "# mine\n", f" {saved.MARK}\n", f"# mine\n{saved.MARK}\n"):
        path = put(folder, text, "conf.d/90-saved-web1@net0.toml")
        with pytest.raises(QsteerError, match="not written by qsteer"):
            saved.plan(named(), Settings(), Settings())
        assert path.read_text() == text
    path.unlink()
    path.mkdir()
    with pytest.raises(QsteerError, match="Is a directory"):
        saved.plan(named(), Settings(), Settings())


def test_how_a_file_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(config.VARIABLE, str(folder / "new"))
    os.umask(0o077)
    file = saved.plan(named(), Settings(), Settings())
    saved.write(file)
    leftover = file.path.with_name(f".{file.path.name}.new")
    leftover.symlink_to(folder / "elsewhere")
    saved.write(file)
    assert not (folder / "elsewhere").exists()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file.path, file.path.parent, file.path.parents[1])]
    assert modes == [0o644, 0o755, 0o755]
    assert list(file.path.parent.iterdir()) == [file.path]


def test_a_write_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = save(named(), Settings())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QsteerError, match="No space left"):
        saved.write(replace(file, content="x"))
    assert [path.read_text() for path in file.path.parent.iterdir()] == [file.content]


def test_options_that_do_not_go_together() -> None:
    for options in (("--refresh", "--save"), ("--refresh", "--equal", "2"), ("--refresh", "--source", "static")):
        with pytest.raises(UsageError, match="--refresh keeps"):
            cli.command(["apply", "--dev", "x", *options])
    with pytest.raises(UsageError, match="not one of yours"):
        cli.command(["apply", "--dev", "x", "--source", "guest-agent", "--equal", "2"])


def test_options_that_are_not_given_say_nothing() -> None:
    from qsteer import options

    for verb in ("apply", "keep"):
        assert options.settings(cli.parser().parse_args([verb])) == Settings()
        given = cli.parser().parse_args([verb, "--source", "auto", "--replace", "--force", "--allow", "pause"])
        assert options.settings(given) == Settings(source=AUTO, replace=True, force=True, allow=("pause",))
    assert settings.wanted(Settings()) == Wanted()
