# SPDX-License-Identifier: BSD-2-Clause
"""How long a guest runs unsteered when another QEMU takes it over: a restore, a migration.

Looked at every few milliseconds: what is attached to the new QEMU's tap, by the kernel's word, and whether the guest
runs, by libvirt's status file.
"""

import time
from pathlib import Path

from integration.timeline import Looking
from qsteer import kernel
from tests.kernel import support


class Handover(Looking):
    """``tap`` begins the name of the new QEMU's tap, ``old`` is the pid of the one before, ``status`` the new file."""

    def __init__(self, tap: str, old: int, status: Path) -> None:
        super().__init__(self._sample)
        self._tap, self._old, self._status = tap, old, status
        self._before = time.monotonic()
        self.ran_at: float | None = None
        self.steered_at: float | None = None
        self.unsteered_s = 0.0

    def wait_steered(self) -> float:
        """Until the guest runs and is steered; for how many milliseconds it ran and was not."""
        support.wait_until("the guest runs, and is steered", lambda: self.ran_at and self.steered_at, 60)
        return self.unsteered_s * 1000

    def _sample(self) -> None:
        queues = [one for one in kernel.open_queues() if one.tap.startswith(self._tap) and one.pid != self._old]
        now = time.monotonic()
        if queues:
            program = queues[0].program_id
            self.ran_at = self.ran_at or (now if self._runs() else None)
            self.steered_at = (self.steered_at or now) if program else None
            if self.ran_at and not program:
                self.unsteered_s += now - max(self._before, self.ran_at)
        self._before = now

    def _runs(self) -> bool:
        try:
            return "<domstatus state='running'" in self._status.read_text()
        except OSError:
            return False
