# SPDX-License-Identifier: BSD-2-Clause
"""Small files about taps, below /run/qsteer: one for each tap, made whole and renamed into its place."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

from qsteer.errors import from_errno

NEW = ".new"
"""What a file is called until it is whole."""


@dataclass(frozen=True, slots=True)
class TapFile:
    """The file in ``folder`` about a tap, by its network namespace and ifindex; ``what`` is what messages call it."""

    folder: Path
    what: str
    netns: int
    ifindex: int

    @property
    def path(self) -> Path:
        """Where it is, or would be."""
        return self.folder / f"{self.netns}-{self.ifindex}"

    def stored(self) -> bytes | None:
        """The file as it is, for ``restore``; None for none.  Raises QsteerError."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot read the {self.what} {self.path}") from None

    def restore(self, content: bytes | None) -> None:
        """Make the file what it was when ``stored`` looked, in one step.  Raises QsteerError."""
        if content is None:
            self.remove()
            return
        new = self.path.with_suffix(NEW)
        try:
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(mode=0o755, exist_ok=True)
            try:
                new.write_bytes(content)
                new.replace(self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    new.unlink(missing_ok=True)
                raise
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot store the {self.what} in {self.path}") from None

    def remove(self) -> None:
        """Forget what it says.  Raises QsteerError."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot remove the {self.what} {self.path}") from None
