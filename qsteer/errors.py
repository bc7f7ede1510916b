# SPDX-License-Identifier: BSD-2-Clause
"""Everything that qsteer raises on purpose.

QsteerError                 1  failed
├── UsageError              2  the command line, or a value on it, is wrong
├── NotFoundError           3  no such VM, tap or bridge
├── PermissionDeniedError   4  a right is missing
├── UnsupportedError        5  this kernel, QEMU or device cannot do it
├── ConflictError           6  a program that is not qsteer's is in the way
└── BusyError               8  try again

The number is the process's exit code.  7 (a difference found by ``status --check``) is a result, not an error.
"""

import errno as errno_names
import os


class QsteerError(Exception):
    """Something failed; ``str()`` is the one line for the user, ``hint`` what to do about it.

    ``errno`` is positive, or 0 where the kernel had no part in it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        if not self.errno:
            return self.message
        return f"{self.message}: {os.strerror(self.errno)}"


class UsageError(QsteerError):
    """The command line, or a value on it, is wrong."""

    exit_code = 2


class NotFoundError(QsteerError):
    """There is no such VM, tap or bridge."""

    exit_code = 3


class PermissionDeniedError(QsteerError):
    """A capability or a file permission is missing."""

    exit_code = 4


class UnsupportedError(QsteerError):
    """This kernel, QEMU or device cannot do it."""

    exit_code = 5


class ConflictError(QsteerError):
    """A program that is not qsteer's is in the way."""

    exit_code = 6


class BusyError(QsteerError):
    """It may work a moment later."""

    exit_code = 8


KINDS: tuple[type[QsteerError], ...] = (
    QsteerError,
    UsageError,
    NotFoundError,
    PermissionDeniedError,
    UnsupportedError,
    ConflictError,
    BusyError,
)
"""One for each exit code."""

_BY_ERRNO: dict[int, type[QsteerError]] = {
    errno_names.EPERM: PermissionDeniedError,
    errno_names.EACCES: PermissionDeniedError,
    errno_names.ENODEV: NotFoundError,
    errno_names.ESRCH: NotFoundError,
    errno_names.EOPNOTSUPP: UnsupportedError,
    errno_names.ENOSYS: UnsupportedError,
    errno_names.EAGAIN: BusyError,
}


def printable(text: str) -> str:
    """Text that may be another process's making, without what a terminal would act on."""
    return "".join(character if character.isprintable() else "?" for character in text)


def from_errno(code: int, message: str, *, hint: str = "") -> QsteerError:
    """The exception for a kernel's answer: an errno of either sign, and what failed on what."""
    code = abs(code)
    return _BY_ERRNO.get(code, QsteerError)(message, hint=hint, errno=code)
