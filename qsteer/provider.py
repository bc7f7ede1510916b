# SPDX-License-Identifier: BSD-2-Clause
"""Who makes taps: this process, if it has the right to, or else ``qsteer serve``."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qsteer import access, ready, shim
from qsteer._shim import lib
from qsteer.ready import ReadyTap
from qsteer.runplan import Order


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """``make`` raises QsteerError, and so does ``check`` where it is known beforehand that ``make`` would be refused.

    ``has_vhost`` says whether it can open /dev/vhost-net; ``name`` is for the user, "" is this process.
    """

    make: Callable[[Order], ReadyTap]
    has_vhost: bool
    check: Callable[[Order], object] = lambda _: None
    name: str = ""


def provider(service_path: str | None) -> Provider:
    """Who makes taps for this process.

    ``service_path`` is the socket of a service that has to, whatever rights there are; None asks the usual one where
    this process has no CAP_NET_ADMIN and such a service is there.  Raises QsteerError if the service does not answer.
    """
    from qsteer import service

    if service_path is None and (shim.has_capability(lib.CAP_NET_ADMIN) or not service.SOCKET.exists()):
        return Provider(make=ready.make, has_vhost=ready.has_vhost())
    path = service.SOCKET if service_path is None else Path(service_path)
    limits = service.limits(path)
    return Provider(
        make=lambda order: service.request_tap(order, path),
        check=lambda order: access.allow_tap(limits.rules, order, uid=os.geteuid(), taps=lambda _: 0),
        has_vhost=limits.vhost,
        name=f"qsteer serve at {path}",
    )
