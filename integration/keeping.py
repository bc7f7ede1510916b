# SPDX-License-Identifier: BSD-2-Clause
"""A ``qsteer keep`` in a process of its own, and what it says."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.kernel import support


class Keep:
    """``qsteer keep`` of one VM, whose events can be waited for."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: Path) -> None:
        self.process = process
        self._stderr = stderr
        self._pending = b""
        self.events: list[dict[str, Any]] = []

    def read(self) -> list[dict[str, Any]]:
        """All events so far."""
        assert self.process.stdout
        while select.select((self.process.stdout,), (), (), 0)[0]:
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                break
            self._pending += read
        *lines, self._pending = self._pending.split(b"\n")
        self.events += [json.loads(line) for line in lines]
        return self.events

    def wait_for(self, what: str, tap: str, *, after: int = 0, timeout_s: float = 30.0) -> dict[str, Any]:
        """The first event of a kind about a tap among those from number ``after`` on."""

        def found() -> list[dict[str, Any]]:
            assert self.process.poll() is None, self.said()
            return [one for one in self.read()[after:] if one["event"] == what and one["tap"] == tap]

        support.wait_until(f"{what} of {tap}; keep said: {self.said()}", found, timeout_s)
        return found()[0]

    def said(self) -> str:
        return self._stderr.read_text()


@contextlib.contextmanager
def keep(vm: str, *options: str, prefix: Sequence[str] = ()) -> Iterator[Keep]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qske-")))
        stderr = stack.enter_context((folder / "stderr").open("wb"))
        command = [*prefix, sys.executable, "-m", "qsteer", "keep", "--vm", vm, "--json", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr)
        kept = Keep(process, folder / "stderr")
        try:
            yield kept
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.communicate()
            print(kept.said(), file=sys.stderr)
        assert "Traceback" not in kept.said()
