# SPDX-License-Identifier: BSD-2-Clause
from collections.abc import Iterator

import pytest

from tests.kernel import support


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
