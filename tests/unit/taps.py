# SPDX-License-Identifier: BSD-2-Clause
"""Taps, programs and VMs out of thin air, for what is pure."""

from typing import Any

from qsteer import qemuargs
from qsteer.model import (
    Build,
    Held,
    Ident,
    Kind,
    MapsContent,
    Nic,
    OpenQueue,
    Process,
    ProgramInfo,
    Source,
    Tap,
)
from qsteer.plan import Wanted
from qsteer.rss import BASE_TYPES, RssConfig

KEY = bytes(range(40))
CONFIG = RssConfig(types=BASE_TYPES, key=KEY, table=tuple(range(128)))


def program(kind: Kind, *, id: int = 7, source: Source = Source.STATIC, displaced: int = 0) -> ProgramInfo:
    ident = None
    if kind is Kind.QSTEER:
        ident = Ident(
            abi=1,
            build=Build.SHARED_BODY,
            source=source,
            displaced=displaced,
            version="0.1.0",
            tap="vnet0",
            outdated=False,
        )
    maps = (0, 0, 0) if kind is Kind.FOREIGN else (10 * id + 1, 10 * id + 2, 10 * id + 3)
    return ProgramInfo(
        id=id,
        kind=kind,
        name={Kind.QSTEER: "qsteer_tap", Kind.QEMU: "tun_rss_steerin", Kind.FOREIGN: "lb_steer"}[kind],
        tag="0011223344556677",
        loaded_ns=0,
        uid=0,
        config_id=maps[0],
        key_id=maps[1],
        table_id=maps[2],
        frozen_id=0,
        bodies_id=0,
        verified_instructions=0,
        ident=ident,
    )


def content(*, enabled: bool = True, config: RssConfig | None = CONFIG) -> MapsContent:
    return MapsContent(enabled=enabled, config=config)


def process(pid: int = 100, name: str = "web1") -> Process:
    args = qemuargs.parse(("qemu-system-x86_64", "-name", name))
    return Process(pid=pid, started=1, uid=64055, comm="qemu-system-x86", args=args)


def queue(pid: int = 100, tap: str = "vnet0") -> OpenQueue:
    return OpenQueue(
        file=1,
        pid=pid,
        fd=9,
        comm="qemu-system-x86",
        tap=tap,
        ifindex=4,
        netns=1,
        index=0,
        detached=False,
        active=4,
        disabled=0,
        program_id=0,
        attachment=0,
        is_tap=True,
        multi_queue=True,
        persistent=False,
    )


def tap(**changed: Any) -> Tap:
    """A tap of a VM without RSS, with nothing attached."""
    attached = changed.get("program")
    values: dict[str, Any] = {
        "name": "vnet0",
        "ifindex": 4,
        "netns": 1,
        "active": 4,
        "disabled": 0,
        "multi_queue": True,
        "persistent": False,
        "queues": (queue(),),
        "program_id": attached.id if attached else 0,
        "program": None,
        "content": content() if attached and attached.kind is not Kind.FOREIGN else None,
        "body_present": True,
        "program_holders": (),
        "holder": process(),
        "domain": None,
        "nic": Nic(id=None, netdev="net0", mac=None, rss=False, vhost=False),
        "held": (),
        "hold": False,
    }
    return Tap(**values | changed)


RSS_NIC = Nic(id=None, netdev="net0", mac=None, rss=True, vhost=False)
RSS_VHOST_NIC = Nic(id=None, netdev="net0", mac=None, rss=True, vhost=True)
OWN_STATIC = program(Kind.QSTEER)
OWN_SHARED = program(Kind.QSTEER, id=8, source=Source.SHARED_MAPS)
QEMUS = program(Kind.QEMU, id=9)
FOREIGN = program(Kind.FOREIGN, id=10)
STATIC = Wanted(source=Source.STATIC)


def held(info: ProgramInfo, *, enabled: bool = True) -> tuple[Held, ...]:
    return (Held(fd=20, info=info, content=content(enabled=enabled)),)
