# SPDX-License-Identifier: BSD-2-Clause
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration import provision
from integration.guest import ordinary_user
from integration.provision import Provisioned


@pytest.fixture(scope="session")
def user() -> str:
    """Who QEMU runs as."""
    return ordinary_user()


@pytest.fixture(scope="session")
def files(user: str) -> Iterator[Provisioned]:
    """Guest kernel, initramfs and a QEMU of 9.0 or later, where the ordinary user can read them."""
    with provision.readable_by(user, provision.provision()) as readable:
        yield readable


@pytest.fixture(scope="session")
def old_qemu() -> Path:
    """A QEMU older than 9.0."""
    return provision.provision_old_qemu()
