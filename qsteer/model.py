# SPDX-License-Identifier: BSD-2-Clause
"""What qsteer knows of a host, as plain values: programs, queues, processes, NICs and taps.  Pure.

The edges (``kernel``, ``procs``, ``inventory``) make them; ``plan`` and ``render`` read them.
"""

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qsteer.qemuargs import QemuArgs
from qsteer.rss import NO_TYPES, HashType, RssConfig

if TYPE_CHECKING:
    from qsteer.domainpolicy import Policy


class Build(enum.StrEnum):
    """How a tap's program is put together."""

    SHARED_BODY = "shared-body"
    COMPLETE = "complete"


class Source(enum.StrEnum):
    """Where a tap's RSS configuration comes from."""

    SHARED_MAPS = "shared-maps"
    QEMU_MAPS = "qemu-maps"
    DEVICE_STATE = "device-state"
    GUEST_AGENT = "guest-agent"
    STATIC = "static"

    @property
    def is_asked(self) -> bool:
        """Whether a guest has to be asked, since nothing tells when it changes something."""
        return self in (Source.DEVICE_STATE, Source.GUEST_AGENT)


class Engine(enum.StrEnum):
    """What steers: a program (TUNSETSTEERINGEBPF), or tun itself, where a kernel can (TUNSETVNETRSS and its like)."""

    EBPF = "ebpf"
    KERNEL = "kernel"


class Generation(enum.StrEnum):
    """What in-kernel hashing is like on a kernel, by versions of the series that brings it.

    They differ in the ioctls (v12 from all others), and in what RSS and a program are to each other: up to v9 either
    refuses the other (EBUSY), later on a program goes before RSS.  v4 refuses to report where a header has no room.
    """

    V4 = "v4"
    V9 = "v5-v9"
    V11 = "v11"
    V12 = "v12"

    @property
    def exclusive(self) -> bool:
        """Whether RSS and a program refuse each other."""
        return self in (Generation.V4, Generation.V9)


class Kind(enum.StrEnum):
    """Whose program it is."""

    QSTEER = "qsteer"
    QEMU = "qemu"
    FOREIGN = "foreign"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ident:
    """What one of qsteer's programs says about itself in its frozen rodata.

    ``displaced`` is the id of the QEMU program that it took off, 0 for none; ``outdated`` that another version of
    qsteer loaded it, which is not an error.
    """

    abi: int
    build: Build | None
    source: Source | None
    displaced: int
    version: str
    tap: str
    outdated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramInfo:
    """A loaded program as the kernel describes it.  Map ids are 0 where it has no such map."""

    id: int
    kind: Kind
    name: str
    tag: str
    loaded_ns: int
    uid: int
    config_id: int
    key_id: int
    table_id: int
    frozen_id: int
    bodies_id: int
    verified_instructions: int
    ident: Ident | None

    @property
    def has_maps(self) -> bool:
        """Whether it has the three maps of QEMU's layout."""
        return bool(self.config_id and self.key_id and self.table_id)

    @property
    def has_config(self) -> bool:
        """Whether it has an RSS configuration: in those maps, or frozen into it."""
        return bool(self.frozen_id or self.has_maps)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenQueue:
    """One open queue of a tun device.  ``netns`` is its network namespace's inode number, ``file`` its identity.

    ``attachment`` tells one attachment of a program from the next, be it of the same program: another number if the
    next one replaced it, but mostly the same once it was off for an RCU grace period (10 to 20 ms); 0 for no program.
    ``vnet_hash`` is a number that changes with what tun hashes by itself, 0 for nothing.  ``header`` are the bytes of
    the virtio-net header, 0 for none.
    """

    file: int
    pid: int
    fd: int
    comm: str
    tap: str
    ifindex: int
    netns: int
    index: int
    detached: bool
    active: int
    disabled: int
    program_id: int
    attachment: int
    is_tap: bool
    multi_queue: bool
    persistent: bool
    vnet_hash: int = 0
    header: int = 0
    header_little_endian: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class MapsContent:
    """What a program's maps hold.  ``config`` is None where they hold nothing that the specification allows."""

    enabled: bool
    config: RssConfig | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Hashing:
    """What in-kernel hashing this host's tun can do, as seen on a tap of qsteer's own.

    ``generation`` is None where there is none, and ``why_not`` says why; ``denied``: for want of a right to look.
    ``types`` are the hash types that it knows, ``reports`` whether it tells guests the hash.
    """

    generation: Generation | None = None
    types: HashType = NO_TYPES
    reports: bool = False
    why_not: str = "it was not looked for"
    denied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VnetHash:
    """What tun hashes by itself on one tap.

    ``rss`` says whether it steers by it, ``report`` whether guests are told the hash; without ``rss`` that is the
    kernel's own, of ``types``.  ``config`` is None without ``rss``, and for a table that virtio does not allow.
    ``source`` is None where somebody else set it; ``displaced`` is the id of QEMU's program that it took the place of.
    """

    rss: bool
    report: bool
    types: HashType
    config: RssConfig | None
    source: Source | None = None
    displaced: int = 0

    @property
    def content(self) -> tuple[bool, bool, HashType, RssConfig | None]:
        """What the kernel has of it."""
        return self.rss, self.report, self.types, self.config


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What steers a tap: QEMU's or somebody's program, or RSS of the kernel's own.

    ``kind`` is None where looking at it takes a right that is missing, ``source`` where it is not qsteer's or QEMU's.
    ``config`` is None where it has none, or that is not enabled; ``works`` is False for a stub without its body.
    """

    engine: Engine
    kind: Kind | None
    source: Source | None
    config: RssConfig | None
    works: bool = True
    displaced: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """A running process.  ``started`` (clock ticks after boot) tells it from a later one with the same pid.

    ``args`` is None where the command line is not that of a QEMU.
    """

    pid: int
    started: int
    uid: int
    comm: str
    args: QemuArgs | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A NIC of a libvirt domain, from libvirt's own status file.

    ``kind`` is libvirt's (``bridge``, ``network``, ``ethernet``, ``direct``, ``vhostuser``, ``vdpa``, ``user``, ...);
    ``target`` the host's device, ``bridge`` the one that it is in.  ``rss`` and ``vhost`` are None where the file does
    not say.
    """

    kind: str
    alias: str | None
    mac: str | None
    model: str | None
    target: str | None
    queues: int | None
    rss: bool | None
    vhost: bool | None
    bridge: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A running libvirt domain.  ``monitor`` is the QMP socket that libvirt itself holds on to.

    ``policy`` is what it says about its steering, None where it says nothing.  ``incoming``: it waits for the state of
    a guest, from another host or from a file.
    """

    name: str
    uuid: str
    pid: int
    interfaces: tuple[Interface, ...]
    monitor: str | None
    agent: str | None
    policy: "Policy | None" = None
    incoming: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A virtio-net device and its netdev, from QEMU's command line, libvirt's status file or QMP; None is unknown.

    ``id`` is the device's id, which libvirt calls its alias.
    """

    id: str | None
    netdev: str | None
    mac: str | None
    rss: bool
    vhost: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a guest asks of its NIC, read out of a QEMU's device state or through an agent in the guest.

    ``config`` is None where the guest has not enabled RSS.  ``exact_types`` says whether the hash types were read, too.
    ``paused_ms`` is how long the VM stood still for it; None where it did not.
    """

    source: Source
    config: RssConfig | None
    exact_types: bool = True
    paused_ms: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsteerable:
    """A NIC of a VM whose packets do not pass a tap: macvtap, vhost-user, vhost-vdpa, passt, user, ..."""

    vm: Process
    domain: Domain | None
    nic: Nic
    backend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A steering program that a QEMU has open, attached or not; ``fd`` is the QEMU's."""

    fd: int
    info: ProgramInfo
    content: MapsContent | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """A tap, and all that decides how it is steered.

    ``program_id`` is the kernel's word (0: none); ``program`` is None too where looking at it takes a right that is
    missing.  ``program_holders`` are the pids that have a foreign program open.  ``nic`` is None where the command line
    does not tell (a NIC plugged in later).  ``held`` are the programs of this tap's VM with QEMU's maps, and only those
    which may be meant for this tap.  ``netns_name`` is the name of its network namespace, None for qsteer's own and for
    one without a name.  ``unheld`` is a persistent tap that no process has open: what steers it cannot be seen.
    ``unread`` says why the guest could not be asked.  ``used`` are the buffers that QEMU's device has used of each
    receive queue, modulo 65536.  ``vnet_hash`` is what tun hashes by itself, and ``hashing`` what it could.
    """

    name: str
    ifindex: int
    netns: int
    active: int
    disabled: int
    multi_queue: bool
    persistent: bool
    queues: tuple[OpenQueue, ...] = ()
    program_id: int = 0
    program: ProgramInfo | None = None
    content: MapsContent | None = None
    body_present: bool = True
    program_holders: tuple[int, ...] = ()
    holder: Process | None = None
    domain: Domain | None = None
    nic: Nic | None = None
    held: tuple[Held, ...] = ()
    hold: bool = False
    netns_name: str | None = None
    unheld: bool = False
    reading: Reading | None = None
    unread: tuple[str, ...] = ()
    used: tuple[int | None, ...] | None = None
    vnet_hash: VnetHash | None = None
    hashing: Hashing = Hashing()

    @property
    def attached(self) -> int:
        """Queues that some process has, those that the guest does not use included."""
        return self.active + self.disabled

    @property
    def steerable(self) -> bool:
        """Whether there is a choice of queues."""
        return self.multi_queue and self.attached > 1

    @property
    def steering(self) -> Steering | None:
        """What steers it; None is automq.  A program goes before RSS of the kernel's own."""
        if self.program_id:
            return self._steering_program()
        rss = self.vnet_hash
        if not rss or not rss.rss:
            return None
        kind = Kind.QSTEER if rss.source else Kind.FOREIGN
        return Steering(engine=Engine.KERNEL, kind=kind, source=rss.source, config=rss.config, displaced=rss.displaced)

    def _steering_program(self) -> Steering:
        program, content = self.program, self.content
        ident = program.ident if program else None
        source = Source.QEMU_MAPS if program and program.kind is Kind.QEMU else ident.source if ident else None
        return Steering(
            engine=Engine.EBPF,
            kind=program.kind if program else None,
            source=source,
            config=content.config if content and content.enabled else None,
            works=self.body_present,
            displaced=ident.displaced if ident else 0,
        )

    @property
    def given(self) -> Held | None:
        """qsteer's program that QEMU was started with for this tap, and into whose maps it writes."""
        idents = ((held, held.info.ident) for held in self.held)
        return next((held for held, ident in idents if ident and ident.source is Source.SHARED_MAPS), None)

    @property
    def loaded_by_qemu(self) -> Held | None:
        """A program that QEMU loaded itself."""
        return next((held for held in self.held if held.info.kind is Kind.QEMU), None)

    @property
    def steered_in_software(self) -> bool:
        """Whether QEMU itself moves packets to the guest's queues, or will once the guest asks for RSS."""
        return bool(self.nic and self.nic.rss and not self.nic.vhost and not self.held)

    @property
    def vm(self) -> Process | None:
        """The QEMU that holds the tap."""
        return self.holder if self.holder and self.holder.args else None

    @property
    def vm_name(self) -> str | None:
        """libvirt's word before that of QEMU's command line, which can be forged."""
        if self.domain:
            return self.domain.name
        return self.vm.args.name or self.vm.args.uuid if self.vm and self.vm.args else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """What ``fetch`` saw.  ``notes`` say what it could not see, and why."""

    taps: tuple[Tap, ...]
    unsteerable: tuple[Unsteerable, ...] = ()
    notes: tuple[str, ...] = ()
