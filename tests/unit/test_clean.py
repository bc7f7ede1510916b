# SPDX-License-Identifier: BSD-2-Clause
"""What ``qsteer clean`` decides; that it does it is tested on the kernel."""

from pathlib import Path

from qsteer import clean
from qsteer.clean import Body, Cleaned, Found, Item, Record

TOP = Path("/pins")
UNUSED = Body(path=TOP / "v1/bodies-a", map_id=1, users=())
USED = Body(path=TOP / "v2/bodies-b", map_id=2, users=(7, 8))
HALF = Record(path=Path("/run/holds/1-1.new"), what="hold, half written", goes="its process has ended")
DIRECTORIES = (TOP, TOP / "v1", TOP / "v2", Path("/run/holds"))


def removed(found: Found) -> list[str]:
    return [str(item.path) for item in clean.plan(found).remove]


def test_directories() -> None:
    """Directories go after all that is in them, and only then."""
    found = Found(bodies=(UNUSED, USED), records=(HALF,), directories=DIRECTORIES)
    wanted = clean.plan(found)
    assert removed(found) == [
        "/pins/v1/bodies-a",
        "/run/holds/1-1.new",
        "/run/holds",
        "/pins/v1",
    ]
    assert [str(item) for item in wanted.kept] == ["/pins/v2/bodies-b: shared body, used by 2 programs"]


def test_a_directory_with_somebody_elses_file_stays() -> None:
    found = Found(bodies=(UNUSED,), directories=DIRECTORIES, others=(TOP / "v1/notes",))
    assert removed(found) == ["/pins/v1/bodies-a", "/run/holds", "/pins/v2"]
    assert [str(item) for item in clean.plan(found).kept] == ["/pins/v1/notes: not qsteer's, left alone"]


def test_what_is_said() -> None:
    wanted = clean.plan(Found(bodies=(UNUSED, USED)))
    assert str(wanted).splitlines() == [
        "would remove  /pins/v1/bodies-a: shared body, used by no program",
        "kept  /pins/v2/bodies-b: shared body, used by 2 programs",
    ]
    assert str(Cleaned(removed=wanted.remove, kept=())) == "removed  /pins/v1/bodies-a: shared body, used by no program"
    assert str(Cleaned(removed=(), kept=wanted.kept)).splitlines() == ["nothing to clean", str(wanted).splitlines()[1]]


def test_names_of_others_are_printable() -> None:
    item = Item(path=TOP / "a\x1b[2Jb", what="not qsteer's", why="left alone")
    assert str(item) == "/pins/a?[2Jb: not qsteer's, left alone"
