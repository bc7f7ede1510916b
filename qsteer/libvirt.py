# SPDX-License-Identifier: BSD-2-Clause
"""libvirt's domains, from its status files and from what its hooks are given: libvirt itself is never called.

Theory of operation
===================

libvirt keeps ``NAME.xml`` (what the domain is like now, NICs that were plugged in included) and ``NAME.pid`` for every
running domain: the system's daemon in /run/libvirt/qemu, a user's in /run/user/UID/libvirt/qemu/run.  The first are
root's; the second anybody's, and count for processes of that very user only.

A file may be left over from a QEMU that is gone, and its pid be another process's by now.  But libvirt lets every QEMU
inherit its ``NAME.pid``, open and locked for writing (virCommandSetPidFile), until it ends.  Who has that lock is the
kernel's word (F_GETLK), and only who may write to the file can take it: no name, clock or command line decides.

What a user makes is opened without following symbolic links, and on the file system of that user's directory only: one
of the user's own making (FUSE) could keep the reader waiting for ever.  Nor is a lease waited for, by which a file's
owner may hold up who opens it for /proc/sys/fs/lease-break-time: such a file is left out.  The entries of a directory,
the files and the bytes that are read are bounded, each file is read once whatever its names, and a document type (the
place of entities) is refused.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from qsteer import procs
from qsteer._shim import ffi, lib
from qsteer.errors import BusyError, NotFoundError, from_errno
from qsteer.model import Domain, Interface, Process

if TYPE_CHECKING:
    from qsteer.domainpolicy import Policy

SYSTEM = Path("/run/libvirt/qemu")
SESSIONS = Path("/run/user")
CAPABILITIES = Path("/var/cache/libvirt/qemu/capabilities")
SESSION_STEPS = ("libvirt", "qemu", "run")

FILE_MAX = 4 << 20
"""Bytes of a status file that are read; one of libvirt's is of 10 to 20 thousand, more with many disks."""

_TEXT_MAX = 4096
_VERSION = re.compile(rb"<version>(\d{1,9})</version>")
_BEFORE_VERSION = 1 << 16
"""Bytes of a file of capabilities within which the version is: after the flags, of which there are 7 thousand."""
_ELEMENTS_MAX = 100_000
_AGENT = "org.qemu.guest_agent.0"
_QSTEERS = "{urn:qsteer:"
"""How the tags of qsteer's own elements in a domain's metadata begin."""
_ENTRIES_PER_FILE = 4
"""A domain has a status file and a pid file; there are a few directories, and files that are being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What is read of one directory: the number of status files, and the bytes of them all."""

    files: int
    bytes: int


SYSTEM_LIMITS = Limits(files=4096, bytes=64 << 20)
SESSION_LIMITS = Limits(files=256, bytes=8 << 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The domains by pid, and what could not be read."""

    domains: Mapping[int, Domain]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a domain is like, be it that it does not run; ``emulator`` is the path of its QEMU."""

    name: str
    uuid: str
    emulator: str | None
    interfaces: tuple[Interface, ...]
    policy: "Policy | None"


def domains(processes: Iterable[Process]) -> Found:
    """The libvirt domains among processes.

    The system's come first: what a user's libvirt calls by the name or UUID of one of those is left out.
    """
    by_pid = {process.pid: process for process in processes}
    notes: tuple[str, ...] = ()
    found: dict[int, Domain] = {}
    try:
        with _directory(SYSTEM) as directory:
            found = domains_in(directory, 0, None, by_pid, SYSTEM_LIMITS)
    except FileNotFoundError:
        pass
    except OSError as error:
        notes = (f"what libvirt knows is not shown: {from_errno(error.errno or 0, f'cannot read {SYSTEM}')}",)
    taken = {word for domain in found.values() for word in (domain.name, domain.uuid)}
    for uid in sorted({process.uid for process in by_pid.values()} - {0}):
        with contextlib.suppress(OSError), _session(uid) as (directory, mount):
            of_user = {pid: process for pid, process in by_pid.items() if process.uid == uid and pid not in found}
            for pid, domain in domains_in(directory, uid, mount, of_user, SESSION_LIMITS).items():
                if not taken & {domain.name, domain.uuid}:
                    found[pid] = domain
    return Found(domains=found, notes=notes)


def running(name: str) -> tuple[Process, Domain]:
    """A domain of the system's daemon, by its name, with its QEMU.

    Raises NotFoundError if none of that name runs, BusyError if libvirt has just put something else in its place.
    """
    nothing = NotFoundError(f'libvirt\'s domain "{name}" does not run')
    try:
        with _directory(SYSTEM) as directory, _regular_file(directory, f"{name}.pid", 0, None) as pid_file:
            process = procs.read(_writer_of(pid_file))
            if not process:
                raise nothing
            domain = domains_in(directory, 0, None, {process.pid: process}, SYSTEM_LIMITS, names=(f"{name}.xml",))
    except FileNotFoundError:
        raise nothing from None
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot read what libvirt knows of {name}") from None
    if process.pid not in domain:
        raise BusyError(f'what libvirt knows of domain "{name}" does not fit process {process.pid}')
    return process, domain[process.pid]


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulator:
    """What libvirt remembers of a QEMU: its version, None where that is not there, and when it looked (Unix time)."""

    version: tuple[int, int] | None
    looked_at: float


def emulator(path: str) -> Emulator | None:
    """An emulator, from the cache of the system's daemon (virFileCache: named by the SHA-256 of the path).

    None where libvirt has not looked at it, or keeps that elsewhere.
    """
    import hashlib

    name = hashlib.sha256(path.encode(errors="surrogateescape")).hexdigest()
    try:
        with (CAPABILITIES / f"{name}.xml").open("rb") as file:
            looked_at, start = os.fstat(file.fileno()).st_mtime, file.read(_BEFORE_VERSION)
    except OSError:
        return None
    found = _VERSION.search(start)
    number = int(found[1]) if found else 0
    version = (number // 1_000_000, number // 1000 % 1000) if found else None
    return Emulator(version=version, looked_at=looked_at)


def changed_at() -> int:
    """Another number each time that the system's daemon writes a status file anew; 0 without a daemon."""
    try:
        return SYSTEM.stat().st_mtime_ns
    except OSError:
        return 0


def status_file(name: str) -> tuple[int, int] | None:
    """Another one each time that libvirt writes the status file of a domain anew; None without one."""
    try:
        found = (SYSTEM / f"{name}.xml").lstat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def parse(data: bytes) -> Domain | None:
    """The domain that a status file describes; None if it is none, half-written, or more than is sensible."""
    root = _parsed(data)
    return _domain(root) if root is not None else None


def describe(data: bytes) -> Description | None:
    """The domain that libvirt's XML describes, as hooks get it; None if it is none, or more than is sensible."""
    domain = _parsed(data)
    if domain is None or domain.tag != "domain":
        return None
    name, uuid = _word(domain.findtext("name")), _word(domain.findtext("uuid"))
    if not name or not uuid:
        return None
    return Description(
        name=name,
        uuid=uuid.lower(),
        emulator=_word(domain.findtext("devices/emulator")),
        interfaces=_interfaces(domain),
        policy=_policy(domain),
    )


def _parsed(data: bytes) -> Element | None:
    try:
        text = _without_capabilities(data.decode())
        if len(text) > FILE_MAX or text.count("<") > _ELEMENTS_MAX:
            return None
        return ElementTree.fromstring(text, ElementTree.XMLParser(target=_Builder()))
    except (ValueError, ElementTree.ParseError, RecursionError):
        return None


class _Builder(ElementTree.TreeBuilder):
    """Refuses a document type: no entities, no other files."""

    def doctype(self, name: str, public_id: str | None, system_id: str | None) -> None:
        raise ValueError("a document type")


def _without_capabilities(text: str) -> str:
    """Two thirds of a status file say what this QEMU can do, which nobody here reads."""
    before, start, rest = text.partition("<qemuCaps>")
    _, end, after = rest.partition("</qemuCaps>")
    return before + after if start and end else text


def _domain(root: Element) -> Domain | None:
    domain = root.find("domain")
    if root.tag != "domstatus" or domain is None:
        return None
    name, uuid = _word(domain.findtext("name")), _word(domain.findtext("uuid"))
    pid = _number(root.get("pid"))
    if not name or not uuid or not pid:
        return None
    monitor = root.find("monitor")
    return Domain(
        name=name,
        uuid=uuid.lower(),
        pid=pid,
        interfaces=_interfaces(domain),
        monitor=_word(monitor.get("path")) if monitor is not None and monitor.get("type") == "unix" else None,
        agent=_agent(domain),
        policy=_policy(domain),
        incoming=(root.get("state"), root.get("reason")) == ("paused", "migration"),
    )


def _policy(domain: Element) -> "Policy | None":
    metadata = domain.find("metadata")
    if metadata is None or not any(element.tag.startswith(_QSTEERS) for element in metadata):
        return None
    from qsteer import domainpolicy  # takes a while, which most hosts can do without

    return domainpolicy.find(metadata)


def _interfaces(domain: Element) -> tuple[Interface, ...]:
    return tuple(_interface(element) for element in domain.iterfind("devices/interface"))


def _agent(domain: Element) -> str | None:
    """The socket of the guest agent's channel."""
    for channel in domain.iterfind("devices/channel[@type='unix']"):
        if _attribute(channel, "target", "name") == _AGENT:
            return _attribute(channel, "source", "path")
    return None


def _interface(element: Element) -> Interface:
    """``kind`` is what a network turned out to be where the file says it, and ``passt`` where that is behind it."""
    kind = _attribute(element, "actual", "type") or _word(element.get("type"))
    mac = _attribute(element, "mac", "address")
    return Interface(
        kind="passt" if _attribute(element, "backend", "type") == "passt" else kind or "",
        alias=_attribute(element, "alias", "name"),
        mac=mac.lower() if mac else None,
        model=_attribute(element, "model", "type"),
        target=_attribute(element, "target", "dev"),
        queues=_number(_attribute(element, "driver", "queues")),
        rss={"on": True, "off": False}.get(_attribute(element, "driver", "rss") or ""),
        vhost={"vhost": True, "qemu": False}.get(_attribute(element, "driver", "name") or ""),
        bridge=_attribute(element, "actual/source", "bridge") or _attribute(element, "source", "bridge"),
    )


def _attribute(element: Element, child: str, name: str) -> str | None:
    found = element.find(child)
    return _word(found.get(name)) if found is not None else None


def _word(text: str | None) -> str | None:
    return text if text and len(text) <= _TEXT_MAX else None


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdecimal() and len(text) <= 10 else None


def domains_in(
    directory: int,
    owner: int,
    mount: int | None,
    processes: Mapping[int, Process],
    limits: Limits,
    names: Sequence[str] | None = None,
) -> dict[int, Domain]:
    """By pid, the domains of one directory whose lock one of the processes holds; the first by name for each.

    ``names`` are the status files to look at, None is all of them.

    Raises OSError if the directory cannot be read, or none of the files because of a missing right.
    """
    found: dict[int, Domain] = {}
    refused: PermissionError | None = None
    known: set[tuple[int, int]] = set()
    left = limits.bytes
    if names is None:
        names = _status_files(directory, limits.files) if processes else ()
    for name in names:
        try:
            with _regular_file(directory, f"{name.removesuffix('.xml')}.pid", owner, mount) as pid_file:
                pid = _writer_of(pid_file)
            if pid not in processes or pid in found:
                continue
            with _regular_file(directory, name, owner, mount) as status_file:
                is_now = os.fstat(status_file)
                inode, size = (is_now.st_dev, is_now.st_ino), is_now.st_size
                if inode in known or size > min(FILE_MAX, left):
                    continue
                known.add(inode)
                left -= size
                domain = parse(_read(status_file, size))
            if domain and domain.pid == pid:
                found[pid] = domain
        except PermissionError as error:
            refused = error
        except OSError:
            continue
    if refused and not found:
        raise refused
    return found


def _status_files(directory: int, most: int) -> list[str]:
    """Raises OSError."""
    with os.scandir(directory) as entries:
        names = [entry.name for entry in islice(entries, most * _ENTRIES_PER_FILE)]
    return sorted(name for name in names if name.endswith(".xml"))[:most]


def _writer_of(fd: int) -> int:
    """The process that holds a write lock on a file, 0 for none.  Raises OSError."""
    pid = ffi.new("int *")
    result = lib.qs_lock_writer(fd, pid)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return int(pid[0])


def _read(fd: int, size: int) -> bytes:
    """What was of this size when it was looked at; libvirt puts a new file in the place of one that changes."""
    with open(fd, "rb", closefd=False) as file:
        return file.read(size)


@contextlib.contextmanager
def _directory(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _session(uid: int) -> Iterator[tuple[int, int]]:
    """The directory of a user's libvirt, and the mount that it is on.  Raises OSError."""
    with contextlib.ExitStack() as stack:
        at = os.open(SESSIONS / str(uid), os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, at)
        mount = _mount_of(at)
        if _is_fuse(mount):
            raise OSError(errno.EXDEV, "a user's own file system")
        for name in SESSION_STEPS:
            at = _step(at, name, mount)
            stack.callback(os.close, at)
        with _directory(Path(f"/proc/self/fd/{at}")) as directory:
            yield directory, mount


@contextlib.contextmanager
def _regular_file(directory: int, name: str, owner: int, mount: int | None) -> Iterator[int]:
    """A regular file that belongs to ``owner``, open for reading.

    Raises OSError; BlockingIOError at once where somebody has a lease on the file (fcntl(2), F_SETLEASE).
    """
    at = _step(directory, name, mount)
    try:
        found = os.fstat(at)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != owner:
            raise OSError(errno.EINVAL, "not a file of libvirt's")
        fd = os.open(f"/proc/self/fd/{at}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(at)
    try:
        yield fd
    finally:
        os.close(fd)


def _step(directory: int, name: str, mount: int | None) -> int:
    """An O_PATH fd of what is in a directory; on the same mount, if one is given.  Raises OSError."""
    fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        if mount is not None and _mount_of(fd) != mount:
            raise OSError(errno.EXDEV, "another file system")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _mount_of(fd: int) -> int:
    """The mount that an fd is on; asks the kernel only, never the file system.  Raises OSError."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        if line.startswith("mnt_id:"):
            return int(line.split()[1])
    raise OSError(errno.EIO, "no mount id")


def _is_fuse(mount: int) -> bool:
    """Whether a mount's file system is a process's.  Raises OSError."""
    for line in Path("/proc/self/mountinfo").read_text(errors="replace").splitlines():
        if line.startswith(f"{mount} "):
            return line.partition(" - ")[2].startswith("fuse")
    return False
