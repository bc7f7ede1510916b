# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer clean``: removes what qsteer left on the host and nothing uses any more.

Theory of operation
-------------------
There are shared bodies, pinned below /sys/fs/bpf/qsteer, which stubs call into; holds and stamps of pauses below
/run/qsteer, which mean something for as long as their process lives; and marks there, for as long as the kernel has the
RSS that they are about.  ``fetch`` looks at them, ``plan`` decides,
``execute`` removes; all three belong inside of execute's lock, but for a dry run.

Who loads a stub need not have the lock (``run``).  So a pin is first moved aside, where no new stub finds it; then the
programs are looked through once more; and only then it is removed, or moved back.  The body stays pinned until then:
death at any point breaks nothing.  ``programs`` has the other half of it.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from qsteer import holds, inventory, marks, namespaces, procs, programs, tapfiles
from qsteer._shim import ffi, lib
from qsteer.errors import NotFoundError, PermissionDeniedError, UnsupportedError, from_errno, printable
from qsteer.model import Tap
from qsteer.shim import check

_VERSION_DIRECTORY = re.compile(r"v[0-9]+")
_PIN = re.compile(r"bodies-[0-9a-z-]+|removing-[0-9]+")
_RECORD = re.compile(r"[0-9]+-[0-9]+")
_MARK = "mark"
_DIRECTORIES = {"holds": "hold", "pauses": "stamp", marks.FOLDER: _MARK}
_NOT_QSTEERS = "not qsteer's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Body:
    """A pinned prog_array with a shared body, of any version of qsteer; ``users`` are the ids of programs over it."""

    path: Path
    map_id: int
    users: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A file about a process, a hold or the stamp of when a VM was last paused; or the mark of a tap's in-kernel RSS.

    ``goes`` says why it means nothing any more, ``stays`` why it does; one of them is empty.
    """

    path: Path
    what: str
    goes: str = ""
    stays: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What is there.  ``directories`` are qsteer's, each before those that are in it; ``others`` is not qsteer's."""

    bodies: tuple[Body, ...] = ()
    records: tuple[Record, ...] = ()
    directories: tuple[Path, ...] = ()
    others: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that goes or stays, what it is, and why."""

    path: Path
    what: str
    why: str

    def __str__(self) -> str:
        return f"{printable(str(self.path))}: {self.what}, {self.why}"


@dataclass(frozen=True, slots=True, kw_only=True)
class CleanPlan:
    """What ``execute`` removes, in this order, and what stays."""

    bodies: tuple[Body, ...]
    files: tuple[Item, ...]
    directories: tuple[Path, ...]
    kept: tuple[Item, ...]

    @property
    def remove(self) -> tuple[Item, ...]:
        """Everything that goes."""
        return (
            *(_unused(body) for body in self.bodies),
            *self.files,
            *(_empty(directory) for directory in self.directories),
        )

    def __str__(self) -> str:
        return _text("would remove", self.remove, self.kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleaned:
    """What is gone, and what stayed."""

    removed: tuple[Item, ...]
    kept: tuple[Item, ...]

    def __str__(self) -> str:
        return _text("removed", self.removed, self.kept)


def _text(verb: str, gone: tuple[Item, ...], kept: tuple[Item, ...]) -> str:
    lines = [f"{verb}  {item}" for item in gone] or ["nothing to clean"]
    return "\n".join((*lines, *(f"kept  {item}" for item in kept)))


def _unused(body: Body) -> Item:
    return Item(path=body.path, what="shared body", why="used by no program")


def _in_use(body: Body) -> Item:
    count = len(body.users)
    return Item(path=body.path, what="shared body", why=f"used by {count} program{'s' * (count > 1)}")


def _empty(directory: Path) -> Item:
    return Item(path=directory, what="directory", why="empty")


def plan(found: Found) -> CleanPlan:
    """What goes and what stays.  Pure."""
    files = tuple(Item(path=record.path, what=record.what, why=record.goes) for record in found.records if record.goes)
    unused = tuple(body for body in found.bodies if not body.users)
    gone = {body.path for body in unused} | {item.path for item in files}
    there = {body.path for body in found.bodies} | {record.path for record in found.records} | set(found.others)
    directories: list[Path] = []
    for directory in reversed(found.directories):
        inside = [path for path in (*there, *found.directories) if path.parent == directory]
        if gone.issuperset(inside):
            directories.append(directory)
            gone.add(directory)
    return CleanPlan(
        bodies=unused,
        files=files,
        directories=tuple(directories),
        kept=(
            *(_in_use(body) for body in found.bodies if body.users),
            *(Item(path=record.path, what=record.what, why=record.stays) for record in found.records if record.stays),
            *(Item(path=path, what=_NOT_QSTEERS, why="left alone") for path in found.others),
        ),
    )


def fetch() -> Found:
    """Look at everything that may be qsteer's.  Raises QsteerError: a right is missing."""
    directories: list[Path] = []
    others: list[Path] = []
    pins: dict[Path, int] = {}
    for version in _inside(programs.PIN_DIRECTORY, directories):
        if not (_VERSION_DIRECTORY.fullmatch(version.name) and version.is_dir(follow_symlinks=False)):
            others.append(Path(version.path))
            continue
        for pin in _inside(Path(version.path), directories):
            path = Path(pin.path)
            map_id = _bodies_at(path) if _PIN.fullmatch(pin.name) and pin.is_file(follow_symlinks=False) else None
            if map_id is None:
                others.append(path)
            else:
                pins[path] = map_id
    users = users_of_maps() if pins else {}
    records: list[Record] = []
    for name, what in _DIRECTORIES.items():
        for entry in _inside(holds.RUNTIME / name, directories):
            record = _record(entry, what)
            if record:
                records.append(record)
            else:
                others.append(Path(entry.path))
    if any(record.what == _MARK for record in records):
        taps, seen = inventory.fetch().taps, {namespaces.own(), *namespaces.named()}
        records = [_mark(record.path, taps, seen) if record.what == _MARK else record for record in records]
    return Found(
        bodies=tuple(Body(path=path, map_id=map_id, users=users.get(map_id, ())) for path, map_id in pins.items()),
        records=tuple(records),
        directories=tuple(directories),
        others=tuple(others),
    )


def _inside(directory: Path, seen: list[Path]) -> Iterator[os.DirEntry[str]]:
    """What is in a directory of qsteer's, by name; a directory that is there is added to ``seen``."""
    try:
        with os.scandir(directory) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot look into {directory}", hint="it takes root; try sudo") from None
    seen.append(directory)
    yield from found


def _bodies_at(pin: Path) -> int | None:
    try:
        return programs.pinned_bodies(pin)
    except UnsupportedError:
        return None


def _record(entry: os.DirEntry[str], what: str) -> Record | None:
    """A hold or a stamp; a mark that is yet to be looked at; None for a file that is none of them."""
    path = Path(entry.path)
    if not entry.is_file(follow_symlinks=False) or not _RECORD.fullmatch(path.stem):
        return None
    if path.suffix == tapfiles.NEW:
        return Record(path=path, what=f"{what}, half written", goes="its process has ended")
    if what == _MARK and not path.suffix:
        return Record(path=path, what=what)
    process = None if path.suffix else _RECORDS[what](path)
    if not process:
        return None
    pid, started = process
    found = procs.read(pid)
    if found and found.started == started:
        return Record(path=path, what=what, stays=f"process {pid} runs")
    return Record(path=path, what=what, goes="its process has ended")


def _mark(path: Path, taps: Iterable[Tap], seen: Collection[int]) -> Record:
    """It counts where the kernel has the RSS that it is about.

    ``seen`` are the network namespaces that were looked into for taps that nobody has open.
    """
    netns, ifindex = map(int, path.name.split("-"))
    mark = marks.read(path)
    for tap in taps:
        if (tap.netns, tap.ifindex) == (netns, ifindex):
            if tap.unheld:
                return Record(
                    path=path, what=_MARK, stays="no process has its tap open, so that its RSS cannot be seen"
                )
            if tap.vnet_hash and tap.vnet_hash.source:
                return Record(path=path, what=_MARK, stays="its RSS is set")
    if mark and mark.lasts and netns not in seen:
        return Record(path=path, what=_MARK, stays="its network namespace cannot be looked into")
    return Record(path=path, what=_MARK, goes="its RSS is gone")


def _of_hold(path: Path) -> tuple[int, int] | None:
    """The process that a hold names, by pid and start."""
    try:
        content = json.loads(path.read_text())
        return int(content["pid"]), int(content["started"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _of_stamp(path: Path) -> tuple[int, int] | None:
    """The VM that a stamp is called after (qsteer.pauses)."""
    pid, started = map(int, path.name.split("-"))
    return pid, started


_RECORDS = {"hold": _of_hold, "stamp": _of_stamp}


def users_of_maps() -> dict[int, tuple[int, ...]]:
    """Map id to the ids of the loaded programs that use it, of the whole host.

    Raises PermissionDeniedError without CAP_SYS_ADMIN.
    """
    users: dict[int, tuple[int, ...]] = {}
    maps, count = ffi.new(f"uint32_t[{lib.QS_PROGRAM_MAPS}]"), ffi.new("uint32_t *")
    for program_id in _program_ids():
        try:
            with programs.program_by_id(program_id) as prog_fd:
                check(lib.qs_program_maps(prog_fd, maps, count), f"cannot look at program {program_id}")
        except NotFoundError:
            continue  # unloaded meanwhile
        for map_id in set(maps[0 : count[0]]):
            users[map_id] = (*users.get(map_id, ()), program_id)
    return users


def _program_ids() -> Iterator[int]:
    found = ffi.new("uint32_t *")
    while True:
        result = lib.qs_program_next_id(found[0], found)
        if result == -errno.ENOENT:
            return
        if result == -errno.EPERM:
            raise PermissionDeniedError("cannot see which programs are loaded", hint="it takes CAP_SYS_ADMIN; try sudo")
        check(result, "cannot list the loaded programs")
        yield found[0]


def execute(wanted: CleanPlan) -> Cleaned:
    """Remove what the plan says, but for a body that a program has come to use meanwhile.

    Raises QsteerError at the first thing that cannot be removed; what was removed before is gone.
    """
    removed: list[Item] = []
    kept: list[Item] = []
    aside = {body: _move_aside(body) for body in wanted.bodies}
    users: Mapping[int, tuple[int, ...]] = users_of_maps() if aside else {}
    for body, path in aside.items():
        if body.map_id in users:
            kept.append(_move_back(body, path, users[body.map_id]))
        else:
            _remove(path)
            removed.append(_unused(body))
    for item in wanted.files:
        _remove(item.path)
        removed.append(item)
    for directory in wanted.directories:
        with contextlib.suppress(OSError):  # somebody has put something in
            directory.rmdir()
            removed.append(_empty(directory))
    return Cleaned(removed=tuple(removed), kept=(*kept, *wanted.kept))


def _move_aside(body: Body) -> Path:
    """Where no new stub looks for it.  Raises QsteerError."""
    path = body.path.with_name(f"removing-{body.map_id}")
    try:
        body.path.rename(path)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot remove {body.path}") from None
    return path


def _move_back(body: Body, aside: Path, users: tuple[int, ...]) -> Item:
    """Under its own name again, unless another body has that by now."""
    try:
        body.path.hardlink_to(aside)
    except FileExistsError:
        return _in_use(Body(path=aside, map_id=body.map_id, users=users))
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot move {aside} back to {body.path}") from None
    if aside != body.path:
        _remove(aside)
    return _in_use(Body(path=body.path, map_id=body.map_id, users=users))


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot remove {path}") from None
