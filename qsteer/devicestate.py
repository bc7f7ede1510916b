# SPDX-License-Identifier: BSD-2-Clause
"""The RSS configuration of one NIC, out of a QEMU's device state.  Pure.

Theory of operation
===================

QEMU writes the state of its devices (``xen-save-devices-state``) as sections, one after the other::

    0x04, be32 section id, u8 length and text of a name, be32 instance, be32 version, the device's bytes
    0x7e, be32 section id

A name is the device's path and its kind: ``0000:00:01.0/virtio-net``.  No section says how long it is, and what is in
one is not marked either: it has to be known.  Much of it is the guest's own making, so it may hold anything, whole
sections and subsections included: its PCI configuration space, a filter of 64 MAC addresses, one of 4096 VLANs, and,
behind what is sought here, the addresses of 1024 queues.  The memory of other devices may hold what somebody in the
network sent.  Hence two rules.

Where the section begins is found by its header.  The guest can make a second one, but not take the true one away.  So
there must be exactly one; two are refused, since nothing tells which is which.

Inside the section nothing is searched for.  The device's fields are gone through from the first to the last, each with
the length that QEMU gives it (virtio_save() in hw/virtio/virtio.c, virtio_pci_save_config() in virtio-pci.c,
vmstate_virtio_net_device in hw/net/virtio-net.c; the same from 7.2 to 11.1).  The few lengths that vary are the
device's (the size of its configuration space and of its MSI-X table, which the guest cannot write, the number of
queues), or bounded (addresses in the filter).  Right behind the last field the RSS subsection begins, if the guest has
enabled RSS::

    0x05, u8 length and "virtio-net-device/rss", be32 version (1, or 2 from QEMU 10.1), u8 enabled, u8 redirect,
    u8 populate_hash, be32 hash types, (version 2: be32 supported hash types,) be16 length of the table,
    be16 default queue, key[40], be16 table[]

If not, another subsection of virtio begins there, or the section ends.  Anything else is a layout that is not known,
and is refused; so a field that a later QEMU adds is an error and never a wrong reading.

One thing the bytes do not say: whether the NIC may have several queue pairs, and so the two fields for them.  Both
readings are tried, the one without them first.  It cannot pass where they are there: what it takes for the first byte
of a subsection or a footer is then one of a number of queues, a flag or a set of offloads that is never 5 or 126.
"""

import itertools
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from qsteer.errors import NotFoundError, QsteerError, UnsupportedError, UsageError, printable
from qsteer.rss import KEY_BYTES, TABLE_MAX, HashType, RssConfig

_SECTION = 0x04
_SUBSECTION = b"\x05"
_FOOTER = b"\x7e"
_KIND = b"/virtio-net"
_NAME_MAX = 255
_PCI_HEADER = re.compile(
    rb"(?=\x04.{4}(.)([0-9a-f]{4}:[0-9a-f]{2}(?::[0-9a-f]{2}\.[0-7]){1,32}+)/virtio-net\0{4})", re.DOTALL
)
_VERSION = 11
_RSS = b"virtio-net-device/rss"
_VIRTIO = b"virtio/"

_PCI_VERSION = 2
_PCI_CONFIG = 256
_PCIE_CONFIG = 4096
_PCI_CAPABILITIES = 0x34
_PCI_CAPABILITIES_MAX = 48
_CAP_EXPRESS = 0x10
_CAP_MSIX = 0x11
_IRQ_STATE = 16

_QUEUES_MAX = 1024
_DEVICE_CONFIG_MAX = 256
_MACS_MAX = 64
_VLAN_BYTES = 4096 // 8
_CTRL_GUEST_OFFLOADS = 1 << 2


@dataclass(slots=True, kw_only=True)
class _Reader:
    """Takes one field after the other, big-endian.  Raises QsteerError rather than to read past the end."""

    data: bytes
    position: int

    def take(self, length: int) -> bytes:
        field = self.data[self.position : self.position + length]
        if len(field) != length:
            raise _early_end()
        self.position += length
        return field

    def number(self, length: int, *, most: int | None = None, what: str = "") -> int:
        number = int.from_bytes(self.take(length))
        if most is not None and number > most:
            raise _unknown(f"{what} is {number}")
        return number


def devices(data: bytes) -> tuple[str, ...]:
    """The PCI NICs that are named in a device state, as ``parse`` wants them: ``0000:00:01.0``, in its order.

    A guest can add to them.  Raises nothing.
    """
    headers = _PCI_HEADER.finditer(data)
    return tuple(found[2].decode() for found in headers if found[1][0] == len(found[2]) + len(_KIND))


def parse(data: bytes, device: str) -> RssConfig | None:
    """What the guest asks of the NIC ``device`` (as in ``devices``), None if it asks for no RSS.

    ``data`` is what ``xen-save-devices-state`` wrote.  A NIC on which the guest can only have hashes reported does not
    steer, and is None too; one on which it may do both, but asked for reports, has a table of one entry, by which QEMU
    steers.  Hash types that the specification does not know are left out, as QEMU leaves them out.  Raises
    NotFoundError if the NIC is not in it, UnsupportedError on a layout that is not known, QsteerError on anything else.
    """
    reader, footer = _section(data, device)
    has_msix = _skip_pci(reader)
    features = _skip_virtio(reader, has_msix)
    _skip_filters(reader)
    fields_end = reader.position
    for several_pairs in (False, True):
        reader.position = fields_end
        _skip_last_fields(reader, several_pairs, features)
        if (part := _next_part(reader, footer)) is not None:
            return _rss(reader, footer) if part == _RSS else None
    raise _unknown("other fields follow those of the NIC")


def _section(data: bytes, device: str) -> tuple[_Reader, bytes]:
    """A reader at the first of the device's bytes, and the footer that ends its section."""
    name = device.encode("ascii", "replace") + _KIND
    if len(name) > _NAME_MAX:
        raise NotFoundError(f'"{printable(device[:80])}" is the place of no NIC')
    header = bytes((len(name),)) + name + bytes(4)
    starts = list(itertools.islice(_headers(data, header), 2))
    if not starts:
        raise NotFoundError(f"the device state has no NIC at {printable(device)}")
    if len(starts) > 1:
        raise QsteerError(
            f"the device state has more than one NIC at {printable(device)}",
            hint="something in the guest writes what looks like one",
        )
    footer = _FOOTER + data[starts[0] - 4 : starts[0]]
    reader = _Reader(data=data, position=starts[0] + len(header))
    if reader.number(4) != _VERSION:
        raise _unknown("another version of virtio-net")
    if data.find(footer, reader.position) < 0:
        raise _early_end()
    return reader, footer


def _headers(data: bytes, header: bytes) -> Iterator[int]:
    """Where ``header`` stands behind the beginning of a section."""
    found = data.find(header)
    while found >= 0:
        if found >= 5 and data[found - 5] == _SECTION:
            yield found
        found = data.find(header, found + 1)


def _skip_pci(reader: _Reader) -> bool:
    """The PCI device; whether it has MSI-X."""
    if reader.number(4) != _PCI_VERSION:
        raise _unknown("no PCI device")
    config = reader.take(_PCI_CONFIG)
    capabilities = _capabilities(config)
    if _CAP_EXPRESS in capabilities:
        reader.take(_PCIE_CONFIG - _PCI_CONFIG)
    reader.take(_IRQ_STATE)
    if _CAP_MSIX not in capabilities:
        return False
    control = capabilities[_CAP_MSIX] + 2
    vectors = (int.from_bytes(config[control : control + 2], "little") & 0x7FF) + 1
    reader.take(16 * vectors + (vectors + 7) // 8)
    reader.take(2)
    return True


def _capabilities(config: bytes) -> dict[int, int]:
    """Where each kind of PCI capability begins.  The guest can write neither the list nor the MSI-X table's size."""
    found: dict[int, int] = {}
    position = config[_PCI_CAPABILITIES]
    for _ in range(_PCI_CAPABILITIES_MAX):
        if not 0x40 <= position <= _PCI_CONFIG - 4:
            break
        found.setdefault(config[position], position)
        position = config[position + 1]
    return found


def _skip_virtio(reader: _Reader, has_msix: bool) -> int:
    """The virtio device and its queues; the lower 32 bits of the features that the guest has accepted."""
    reader.take(1 + 1 + 2)
    features = reader.number(4)
    reader.take(reader.number(4, most=_DEVICE_CONFIG_MAX, what="the size of its configuration"))
    for _ in range(reader.number(4, most=_QUEUES_MAX, what="the number of its queues")):
        reader.take(4 + 8 + 2 + (2 if has_msix else 0))
    return features


def _skip_filters(reader: _Reader) -> None:
    """The NIC's own fields, up to those of its queue pairs."""
    reader.take(6 + 4 + 4 + 2 + 1 + 1)
    reader.take(6 * reader.number(4, most=_MACS_MAX, what="the number of its addresses"))
    reader.take(_VLAN_BYTES + 4 + 6 + 1)


def _skip_last_fields(reader: _Reader, several_pairs: bool, features: int) -> None:
    if several_pairs:
        reader.take(2)
        pairs = reader.number(2, most=_QUEUES_MAX // 2, what="the number of its queue pairs")
        reader.take(4 * max(pairs - 1, 0))
    if features & _CTRL_GUEST_OFFLOADS:
        reader.take(8)


def _next_part(reader: _Reader, footer: bytes) -> bytes | None:
    """The name of the subsection that begins here, b"" if the section ends here, None if neither is so."""
    data, position = reader.data, reader.position
    if data.startswith(footer, position):
        return b""
    if data[position : position + 1] != _SUBSECTION:
        return None
    name = data[position + 2 : position + 2 + int.from_bytes(data[position + 1 : position + 2])]
    return name if name == _RSS or name.startswith(_VIRTIO) else None


def _rss(reader: _Reader, footer: bytes) -> RssConfig | None:
    reader.take(1 + 1 + len(_RSS))
    version = reader.number(4)
    if version not in (1, 2):
        raise _unknown(f"version {version} of the RSS subsection")
    enabled, redirect, _ = (reader.number(1, most=1, what="a switch") for _ in range(3))
    types = reader.number(4)
    if version == 2:
        reader.take(4)  # what the device supports
    length = reader.number(2)
    unclassified_queue = reader.number(2)
    key = reader.take(KEY_BYTES)
    if not enabled or not 1 <= length <= TABLE_MAX:
        raise _unknown(f"RSS is not enabled, or has a table of {length}")
    table = struct.unpack(f"!{length}H", reader.take(2 * length))
    if _next_part(reader, footer) is None:
        raise _unknown("nothing known follows the RSS subsection")
    if not redirect:
        return None
    try:
        return RssConfig(
            types=HashType(types & sum(HashType)), key=key, table=table, unclassified_queue=unclassified_queue
        )
    except UsageError as error:
        raise _unknown(error.message) from None


def _early_end() -> QsteerError:
    return QsteerError("the device state ends too early")


def _unknown(what: str) -> UnsupportedError:
    return UnsupportedError(f"the device state is not one of QEMU 7.2 to 11.1: {what}")
