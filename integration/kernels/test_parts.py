# SPDX-License-Identifier: BSD-2-Clause
"""The part of these tests that runs under other kernels names tests that there are."""

import pytest

from integration.kernels.parts import PARTS
from integration.provision import CHECKOUT


@pytest.mark.parametrize("test", [test for part in PARTS for test in part.tests])
def test_named_tests_exist(test: str) -> None:
    path, _, name = test.partition("::")
    text = (CHECKOUT / path).read_text()
    assert not name or f"\ndef {name.partition('[')[0]}(" in text


def test_names_are_those_of_one_part() -> None:
    named = [test for part in PARTS for test in part.tests]
    assert len(named) == len(set(named)) and len({part.name for part in PARTS}) == len(PARTS)
    assert any(part.quick for part in PARTS)
