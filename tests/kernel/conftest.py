# SPDX-License-Identifier: BSD-2-Clause
from collections.abc import Iterator

import pytest

from qsteer.model import Build
from tests.kernel import support


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is about the shared body alone is no test of a kernel that has none (before 6.2).

    What unloads tun is a test of where tun is a module and the machine there for that (make test-kernels).
    """
    lacks = {"shared_body": Build.SHARED_BODY not in support.BUILDS, "tun_module": not support.TUN_MAY_GO}
    missing = [marker for marker, lacking in lacks.items() if lacking]
    about_it = [item for item in items if any(map(item.get_closest_marker, missing))]
    if about_it:
        config.hook.pytest_deselected(items=about_it)
        items[:] = [item for item in items if item not in about_it]


@pytest.fixture
def namespace(need_root: None) -> Iterator[str]:
    """The test lives in a network namespace of its own."""
    with support.network_namespace() as name:
        yield name


@pytest.fixture
def tap(namespace: str) -> Iterator[support.TapUnderTest]:
    """A tap of four queues in a network namespace of its own."""
    with support.tap("qs-tap", 4) as under_test:
        yield under_test
