# SPDX-License-Identifier: BSD-2-Clause
"""Access lists for bridge helpers, and what comes of each: of qsteer's, and of QEMU's own where that one differs.

Every case is a whole /etc/qemu, asked for some bridges by an ordinary user with CAP_NET_ADMIN.
"""

import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.kernel import bridges

GROUP = 4242
"""A supplementary group of the caller's."""
LINE = 4095
"""The longest line that is read, the newline included."""
BOTH = ("br0", "br1")
LONGEST = "fifteen-letters"


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One entry of /etc/qemu; ``content`` is of a regular file, a link's target, or empty."""

    content: bytes = b""
    kind: int = stat.S_IFREG
    mode: int = 0o644
    user: int = 0
    group: int = 0

    def make(self, path: Path) -> None:
        if self.kind == stat.S_IFREG:
            path.write_bytes(self.content)
        elif self.kind == stat.S_IFLNK:
            path.symlink_to(os.fsdecode(self.content))
            return
        elif self.kind == stat.S_IFDIR:
            path.mkdir()
        else:
            os.mkfifo(path)
        os.chown(path, self.user, self.group)
        path.chmod(self.mode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``allowed`` are those of the bridges ``asked`` for that qsteer's helper gives a tap on.

    ``others`` has the verdict of QEMU's helper where it is another, by bridge, and ``why`` says why; without it both
    have to agree.
    """

    name: str
    files: Mapping[str, File]
    allowed: Sequence[str] = ()
    asked: Sequence[str] = BOTH
    cwd: str = "/"
    others: Mapping[str, str] = field(default_factory=dict)
    why: str = ""

    def __post_init__(self) -> None:
        assert bool(self.others) == bool(self.why), self.name
        assert set(self.allowed) | set(self.others) <= set(self.asked), self.name

    def verdict(self, bridge: str) -> str:
        """What qsteer's helper has to answer."""
        return "yes" if bridge in self.allowed else "no"

    def verdict_of_qemus(self, bridge: str) -> str:
        return self.others.get(bridge, self.verdict(bridge))

    def make(self) -> None:
        """Make /etc/qemu what the case is about, in a namespace of bridges.host()."""
        folder = bridges.ACL.parent
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        for name, file in self.files.items():
            file.make(folder / name)

    def run(self, helper: Path, bridge: str, environment: Mapping[str, str] | None = None) -> bridges.Outcome:
        """Ask a helper, in the user's name."""
        return bridges.run(
            helper,
            bridge,
            prefix=bridges.with_net_admin(bridges.NOBODY, GROUP),
            environment=environment,
            cwd=self.cwd,
            timeout_s=1.0 if "hangs" in self.others.values() else 10.0,
        )


def text(name: str, content: str | bytes, *allowed: str, asked: Sequence[str] = BOTH) -> Case:
    """A list in one file, on which both helpers agree."""
    content = content.encode() if isinstance(content, str) else content
    return Case(name=name, files={"bridge.conf": File(content=content)}, allowed=allowed, asked=asked)


def included(name: str, main: str, included: str | None, *allowed: str) -> Case:
    """A list that includes /etc/qemu/more, on which both helpers agree."""
    return Case(name=name, files=_two(main, included), allowed=allowed)


def _two(main: str, included: str | None, mode: int = 0o644, user: int = 0, group: int = 0) -> dict[str, File]:
    files = {"bridge.conf": File(content=main.encode())}
    if included is not None:
        files["more"] = File(content=included.encode(), mode=mode, user=user, group=group)
    return files


MORE = "include /etc/qemu/more\n"

ONE_FILE = (
    text("one allow", "allow br0\n", "br0"),
    text("two allows", "allow br0\nallow br1\n", "br0", "br1"),
    text("allow all", "allow all\n", "br0", "br1"),
    text("nothing", ""),
    text("one newline", "\n"),
    text("deny alone", "deny br0\n"),
    text("deny all alone", "deny all\n"),
    text("deny before allow", "deny br0\nallow br0\n"),
    text("deny after allow", "allow br0\ndeny br0\n"),
    text("allow all, deny one", "allow all\ndeny br0\n", "br1"),
    text("deny one, allow all", "deny br0\nallow all\n", "br1"),
    text("deny all, allow one", "deny all\nallow br0\n"),
    text("allow one, deny all", "allow br0\ndeny all\n"),
    text("allow all, deny all", "allow all\ndeny all\n"),
    text("the same twice", "allow br0\nallow br0\n", "br0"),
    text("a prefix of the name", "allow br\n"),
    text("a name that goes on", "allow br00\n"),
    text("the name in capitals", "allow BR0\n"),
    text("all in capitals", "allow ALL\n"),
    text("no final newline", "allow br0", "br0"),
    text("no final newline after a deny", "allow all\ndeny br0", "br1"),
    text("CRLF", "allow br0\r\nallow br1\r\n", "br0", "br1"),
    text("CR alone between lines", "allow br0\rallow br1\r"),
    text("CR before a rule", "allow all\n\rdeny br0\n", "br1"),
    text("blank lines", "\n\n   \n\t\nallow br0\n\n", "br0"),
    text("comments", "# one\n  # two\n\t#three\nallow br0\n#allow br1\n", "br0"),
    text("a comment without words", "#\nallow br0\n", "br0"),
    text("a comment after a rule is part of the name", "allow br0 # mine\n"),
    text("spaces before a rule", "   allow br0\n", "br0"),
    text("a tab before a rule", "\tallow br0\n", "br0"),
    text("a form feed before a rule", "\fallow br0\n", "br0"),
    text("a vertical tab before a rule", "\vallow br0\n"),
    text("a tab between", "allow\tbr0\n", "br0"),
    text("tabs between", "allow\t\tbr0\n", "br0"),
    text("a space and a tab between", "allow \tbr0\n", "br0"),
    text("a tab and a space between", "allow\t br0\n"),
    text("a tab between, a space at the end", "allow\tbr0 \n"),
    text("a vertical tab between", "allow\vbr0\n"),
    text("spaces between", "allow    br0\n", "br0"),
    text("spaces at the end", "allow br0   \n", "br0"),
    text("a tab at the end", "allow br0\t\n", "br0"),
    text("a form feed at the end", "allow br0\f\n", "br0"),
    text("a vertical tab at the end", "allow br0\v\n"),
    text("two names in a line", "allow br0 br1\n"),
    text("a rule of its own with blanks in the name", "allow br1\nallow br0 br1\n", "br1"),
    text("no name", "allow\n"),
    text("no name, a space", "allow \n"),
    text("no name, then a rule", "allow br0\nallow\n"),
    text("a word alone", "allow br0\ngarbage\n"),
    text("a word alone before", "garbage\nallow br0\n"),
    text("an unknown command", "allow br0\npermit br1\n"),
    text("a command in capitals", "ALLOW br0\n"),
    text("a command in quotes", '"allow" br0\n'),
    text("a name in quotes", 'allow "br0"\n'),
    text("a command that goes on", "allowed br0\n"),
    text("a pattern", "allow br*\n"),
    text("a byte order mark", b"\xef\xbb\xbfallow br0\n"),
    text("bytes that are no UTF-8", b"allow br0\n# \xff\xfe\n", "br0"),
    text("a non-breaking space at the end", b"allow br0\xc2\xa0\n"),
    text("bytes that are no text", bytes(range(1, 256)) * 8),
    text("the longest name", f"allow {LONGEST}\n", LONGEST, asked=(LONGEST, "br0")),
    text("a name that is too long", f"allow br0\nallow {LONGEST}x\n", asked=(LONGEST, "br0")),
    text("a denied name that is too long", f"allow br0\ndeny {LONGEST}x\n"),
    text("a name of the longest line", f"allow br0\nallow {'x' * (LINE - 7)}\n"),
    text("the longest comment", f"#{'x' * (LINE - 2)}\nallow br0\n", "br0"),
    text("the longest line, and the last", f"allow br1\n#{'x' * (LINE - 1)}", "br1"),
    text("the longest line of blanks", f"allow br0{' ' * (LINE - 10)}\nallow br1\n", "br0", "br1"),
    text("a thousand rules", "".join(f"allow x{i}\n" for i in range(1000)) + "allow br0\n", "br0"),
    text("a large file", f"#{'x' * 200}\n" * 5000 + "allow br0\n", "br0"),
    text("a bridge that is not there", "allow br7\n", asked=("br7",)),
    text("no bridge", "allow veth0\n", asked=("veth0",)),
    text("names that no device has", "allow all\n", asked=(f"{LONGEST}x", "br0/..", "/br0", "..", ".", "", "br\n0")),
)

INCLUDES = (
    included("an include that allows", MORE, "allow br0\n", "br0"),
    included("an include that denies, before", MORE + "allow all\n", "deny br0\n", "br1"),
    included("an include that denies, after", "allow all\n" + MORE, "deny br0\n", "br1"),
    included("a deny against what an include allows", "deny br0\n" + MORE, "allow all\n", "br1"),
    included("an include that is not there", MORE + "allow br0\n", None, "br0"),
    included("an include of nothing", MORE + "allow br0\n", "", "br0"),
    included("an include twice", MORE + MORE, "allow br0\n", "br0"),
    included("an include without a final newline", MORE + "allow br1\n", "allow br0", "br0", "br1"),
    included("a tab before the path", "include\t/etc/qemu/more\n", "allow br0\n", "br0"),
    included("blanks after the path", "include /etc/qemu/more \r\n", "allow br0\n", "br0"),
    included("a path with ..", "include /etc/qemu/../qemu/more\n", "allow br0\n", "br0"),
    included("a path below a file", "include /etc/qemu/more/x\nallow br1\n", "allow br0\n", "br1"),
    included("two paths in a line", "include /etc/qemu/more /etc/qemu/more\nallow br1\n", "allow br0\n", "br1"),
    included("include without a path", "include\nallow br0\n", None),
    Case(
        name="includes in includes",
        files={
            "bridge.conf": File(content=b"include /etc/qemu/a\n"),
            "a": File(content=b"include /etc/qemu/b\nallow br0\n"),
            "b": File(content=b"allow all\ndeny br1\n"),
        },
        allowed=("br0",),
    ),
    Case(
        name="a chain of twelve includes",
        files={
            "bridge.conf": File(content=b"include /etc/qemu/1\n"),
            **{str(i): File(content=f"include /etc/qemu/{i + 1}\n".encode()) for i in range(1, 12)},
            "12": File(content=b"allow br0\n"),
        },
        allowed=("br0",),
    ),
    Case(
        name="an include by a symbolic link",
        files={
            **_two(MORE, None),
            "more": File(kind=stat.S_IFLNK, content=b"real"),
            "real": File(content=b"allow br0"),
        },
        allowed=("br0",),
    ),
    Case(
        name="an include by a link to nowhere",
        files={**_two(MORE + "allow br1\n", None), "more": File(kind=stat.S_IFLNK, content=b"nowhere")},
        allowed=("br1",),
    ),
    Case(
        name="an include that the caller may not read",
        files=_two(MORE + "allow br1\n", "allow br0\n", mode=0o600),
        allowed=("br1",),
    ),
    Case(
        name="an include for a group of the caller's",
        files=_two(MORE + "allow br1\n", "allow br0\n", mode=0o640, group=GROUP),
        allowed=("br0", "br1"),
    ),
    Case(
        name="an include for another group",
        files=_two(MORE + "allow br1\n", "allow br0\n", mode=0o640, group=GROUP + 1),
        allowed=("br1",),
    ),
)

NO_LIST = (
    Case(name="no file", files={}),
    Case(name="a file that the caller may not read", files={"bridge.conf": File(content=b"allow all\n", mode=0o600)}),
    Case(name="a directory", files={"bridge.conf": File(kind=stat.S_IFDIR, mode=0o755)}),
    Case(name="a link to nowhere", files={"bridge.conf": File(kind=stat.S_IFLNK, content=b"nowhere")}),
    Case(
        name="a link to a file",
        files={"bridge.conf": File(kind=stat.S_IFLNK, content=b"more"), "more": File(content=b"allow br0\n")},
        allowed=("br0",),
    ),
    Case(name="a link to /dev/null", files={"bridge.conf": File(kind=stat.S_IFLNK, content=b"/dev/null")}),
)

_GOES_ON = "QEMU's leaves an include at its first error, and never sees the deny behind it"
_SPLITS = "QEMU's takes what is behind byte 4095 of a line for a line of its own"
_CHANGES = "the caller can change the list"

DIFFERENT = (
    Case(
        name="an error in an include, before a deny",
        files=_two(MORE + "allow br0\n", "garbage\ndeny br0\n"),
        others={"br0": "yes"},
        why=_GOES_ON,
    ),
    Case(
        name="an error in an include, after a deny",
        files=_two(MORE + "allow all\n", "deny br0\ngarbage\n"),
        others={"br1": "yes"},
        why=_GOES_ON,
    ),
    Case(
        name="a name that is too long in an include",
        files=_two(MORE + "allow all\n", f"deny {LONGEST}x\ndeny br0\n"),
        others={"br0": "yes", "br1": "yes"},
        why=_GOES_ON,
    ),
    Case(
        name="an include of itself",
        files=_two(MORE + "allow br0\n", MORE + "allow br1\n"),
        others={"br0": "signal 11", "br1": "signal 11"},
        why="QEMU's follows a circle until it has no stack left",
    ),
    Case(
        name="a circle of two includes",
        files={**_two(MORE + "allow br0\n", "include /etc/qemu/again\n"), "again": File(content=MORE.encode())},
        others={"br0": "signal 11", "br1": "signal 11"},
        why="QEMU's follows a circle until it has no stack left",
    ),
    Case(
        name="a chain of thirty includes",
        files={
            "bridge.conf": File(content=b"include /etc/qemu/1\n"),
            **{str(i): File(content=f"include /etc/qemu/{i + 1}\n".encode()) for i in range(1, 30)},
            "30": File(content=b"allow br0\n"),
        },
        others={"br0": "yes"},
        why="includes nest sixteen deep at most",
    ),
    Case(
        name="an include by a relative path, in the caller's directory",
        files=_two("include more\n", "allow br0\n"),
        cwd="/etc/qemu",
        others={"br0": "yes"},
        why="QEMU's looks in the directory that its caller chose to stand in",
    ),
    Case(
        name="an include by a relative path, not in the caller's directory",
        files=_two("include more\nallow all\n", "deny br0\n"),
        others={"br0": "yes", "br1": "yes"},
        why="QEMU's looks in the directory that its caller chose to stand in",
    ),
    Case(
        name="an include without a path, but a space",
        files=_two("include \nallow br0\n", None),
        others={"br0": "yes"},
        why="it is no absolute path",
    ),
    Case(
        name="an include of a directory",
        files=_two("include /etc/qemu\nallow br0\n", None),
        others={"br0": "yes"},
        why="what is no regular file is not taken for an empty one",
    ),
    Case(
        name="an include of /dev/null",
        files=_two("include /dev/null\nallow br0\n", None),
        others={"br0": "yes"},
        why="what is no regular file is not taken for an empty one",
    ),
    Case(
        name="an include of a FIFO",
        files={**_two(MORE + "allow br0\n", None), "more": File(kind=stat.S_IFIFO)},
        asked=("br0",),
        others={"br0": "hangs"},
        why="QEMU's waits for somebody to write",
    ),
    Case(
        name="a FIFO",
        files={"bridge.conf": File(kind=stat.S_IFIFO)},
        asked=("br0",),
        others={"br0": "hangs"},
        why="QEMU's waits for somebody to write",
    ),
    Case(
        name="a comment of two lines' length",
        files=_two(f"#{'x' * (LINE - 1)}allow br0\n", None),
        others={"br0": "yes"},
        why=_SPLITS,
    ),
    Case(
        name="a comment that is a byte too long",
        files=_two(f"#{'x' * (LINE - 1)}\nallow br0\n", None),
        others={"br0": "yes"},
        why=_SPLITS,
    ),
    Case(
        name="more than 100,000 lines",
        files=_two("\n" * 100_000 + "allow br0\n", None),
        others={"br0": "yes"},
        why="there is a limit",
    ),
    Case(
        name="blanks of two lines' length after a rule",
        files=_two(f"allow br0{' ' * (LINE + 5)}\n", None),
        others={"br0": "yes"},
        why=_SPLITS,
    ),
    Case(
        name="a NUL after a name",
        files=_two("allow br0\0deny br0\n", None),
        others={"br0": "yes"},
        why="QEMU's takes a NUL for the end of the line",
    ),
    Case(
        name="a NUL before a deny",
        files=_two("allow all\n\0deny br0\n", None),
        others={"br0": "yes", "br1": "yes"},
        why="QEMU's takes a NUL for the end of the line",
    ),
    Case(
        name="a bridge with a label, around a deny",
        files=_two("allow all\ndeny br0\n", None),
        asked=("br0", "br0:1", "br1"),
        allowed=("br1",),
        others={"br0:1": "yes"},
        why="the kernel cuts a name at a colon, and QEMU's looks for the whole in the list",
    ),
    Case(
        name="a bridge's other name, around a deny",
        files=_two("allow all\ndeny br0\n", None),
        asked=("br0", "br0-other", "br1"),
        allowed=("br1",),
        others={"br0-other": "yes"},
        why="the kernel finds a device by each of its names",
    ),
    Case(
        name="a bridge's other name, allowed",
        files=_two("allow br0-other\n", None),
        asked=("br0", "br0-other"),
        others={"br0-other": "yes"},
        why="the kernel finds a device by each of its names",
    ),
    Case(
        name="a file of the caller's",
        files={"bridge.conf": File(content=b"allow br0\n", user=bridges.NOBODY, mode=0o444)},
        others={"br0": "yes"},
        why=_CHANGES,
    ),
    Case(
        name="a file that everybody can write",
        files={"bridge.conf": File(content=b"allow br0\n", mode=0o666)},
        others={"br0": "yes"},
        why=_CHANGES,
    ),
    Case(
        name="a file that a group of the caller's can write",
        files={"bridge.conf": File(content=b"allow br0\n", group=GROUP, mode=0o664)},
        others={"br0": "yes"},
        why=_CHANGES,
    ),
    Case(
        name="an include of the caller's",
        files=_two(MORE + "allow br1\n", "allow br0\n", user=bridges.NOBODY),
        others={"br0": "yes", "br1": "yes"},
        why=_CHANGES,
    ),
)

CASES = (*ONE_FILE, *INCLUDES, *NO_LIST, *DIFFERENT)
