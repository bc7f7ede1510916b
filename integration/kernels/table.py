# SPDX-License-Identifier: BSD-2-Clause
"""The kernels that qsteer is proven on: the harness boots them, docs/support.md tells what came of it."""

from dataclasses import dataclass

from qsteer.model import Build


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A stock kernel of a Debian suite.

    ``builds`` are those of the steering program that load there: a build that is missing is a result, which is
    checked like one that is there.
    """

    name: str
    suite: str
    builds: tuple[Build, ...] = (Build.SHARED_BODY, Build.COMPLETE)


KERNELS = (
    Kernel(name="6.1", suite="bookworm", builds=(Build.COMPLETE,)),
    Kernel(name="6.12", suite="bookworm-backports"),
    Kernel(name="sid", suite="sid"),
)
