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


OLD = pytest.param("old", marks=pytest.mark.compat)
NEW = pytest.param("new", marks=pytest.mark.compat)


@pytest.fixture(scope="module", params=["provisioned", OLD, NEW])
def with_qemu(request: pytest.FixtureRequest, files: Provisioned, user: str) -> Iterator[Provisioned]:
    """The guest's files with one QEMU after the other."""
    if request.param == "provisioned":
        yield files
        return
    qemu = provision.provision_old_qemu() if request.param == "old" else provision.provision_new_qemu()
    with provision.readable_by(user, provision.with_qemu(provision.provision(), qemu)) as readable:
        yield readable
