# SPDX-License-Identifier: BSD-2-Clause
"""kill -9 at random moments, a few times; python -m integration.kills does it 200 times."""

import pytest

from integration import kills

pytestmark = pytest.mark.root

SEED = 3


def test_killed_at_random_moments() -> None:
    done = list(kills.rounds(15, SEED))
    assert not any(one.wrong for one in done), kills.table(done)
    assert sum(one.in_time for one in done) >= 5, kills.table(done)
