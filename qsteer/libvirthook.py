# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer-libvirt-hook``: what libvirt's qemu hook does, ``qsteer apply`` for a domain that starts.

Theory of operation
===================

libvirt runs ``hooks/qemu.d/*`` as root with a domain's XML on stdin, at each turn of its life, and waits without a
limit; a failure ends the start.  So the work (``hookwork``) is a child's, which libvirt does not see: this process
waits for it until DEADLINE_S is over, whatever state the child is in, be it one that no signal ends (a file system that
hangs).  A program is attached in one step, so that a child that is killed leaves nothing half-done.

Nothing that fails here fails the domain, unless its policy, or the administrator's configuration, says that steering is
required: then the exit code is REFUSE, the only one that the script which libvirt calls passes on (``hookfile``).  Only
a start is refused: libvirt would end a domain that runs if its ``reconnect`` failed.  All is said in the system's
journal, since libvirt throws away what a hook says; and on stderr, which libvirt shows where a hook fails.

The child talks over a pipe, in lines: ``required``, ``refused WHY``, ``failed WHY``, ``done``.  After the last it may
go on by itself.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from qsteer.errors import UsageError, printable
from qsteer.hookfile import NAME, OPERATIONS, REFUSE, STARTED
from qsteer.notify import Priority, SystemJournal

DEADLINE_S = 2.0

_REQUIRED, _DONE, _REFUSED, _FAILED = "required", "done", "refused ", "failed "
_DOMAIN_XML_MAX = 4 << 20
"""Bytes of a domain's XML that are read; one is of 5 to 20 thousand."""


def main() -> int:
    """``qsteer-libvirt-hook NAME OPERATION SUBOPERATION EXTRA``, the domain's XML on stdin; gives the exit code."""
    ends = time.monotonic() + DEADLINE_S
    arguments = sys.argv[1:]
    if len(arguments) != 4:
        print(f"{NAME}: this is for libvirt to run: NAME OPERATION SUBOPERATION EXTRA", file=sys.stderr)
        return UsageError.exit_code
    domain, operation = arguments[:2]
    if operation not in OPERATIONS:
        return 0
    heard, said = os.pipe()
    child = os.fork()
    if not child:
        _work(domain, operation, said)
    os.close(said)
    lines = _listen(heard, ends)
    refused = _those(lines, _REFUSED)
    if _DONE not in lines:
        os.kill(child, signal.SIGKILL)
        late = f"not done within {DEADLINE_S:g} s, given up" if time.monotonic() >= ends else "qsteer failed"
        why = f"{operation}: {next(iter(_those(lines, _FAILED)), late)}"
        if operation == STARTED and _REQUIRED in lines:
            refused = (*refused, why)
        told = f"{printable(domain)}: {why}" + ("; steering is required, the start is refused" if refused else "")
        SystemJournal(NAME, QSTEER_DOMAIN=printable(domain)).say(told, Priority.WARNING)
    for why in refused:
        print(f"{NAME}: {why}; steering is required", file=sys.stderr, flush=True)
    return REFUSE if refused else 0


def _those(lines: Sequence[str], which: str) -> tuple[str, ...]:
    return tuple(line.removeprefix(which) for line in lines if line.startswith(which))


def _listen(heard: int, ends: float) -> Sequence[str]:
    """The lines that the child says until it is done, it has ended, or the time is over."""
    poll = select.poll()
    poll.register(heard, select.POLLIN)
    text, lines = b"", [""]
    while _DONE not in lines and poll.poll(max(0.0, ends - time.monotonic()) * 1000):
        piece = os.read(heard, 1 << 16)
        if not piece:
            break
        text += piece
        lines = text.decode(errors="replace").splitlines()
    return lines


def _work(domain: str, operation: str, said: int) -> NoReturn:
    """What the child does.  libvirt waits for whoever has its pipes open: the child lets go of them, one by one."""

    def tell(line: str) -> None:
        os.write(said, f"{line}\n".encode())

    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        with open(0, "rb", closefd=False) as stdin:
            xml = stdin.read(_DOMAIN_XML_MAX + 1)
        os.dup2(null, 0)
        os.setsid()
        os.chdir("/")
        from qsteer import hookwork

        hookwork.run(
            domain,
            operation,
            xml,
            required=lambda: tell(_REQUIRED),
            refuse=lambda why: tell(f"{_REFUSED}{printable(why)}"),
            done=lambda: tell(_DONE),
        )
    except Exception as error:  # half an upgrade, above all
        tell(f"{_FAILED}{type(error).__name__}: {printable(str(error))}")
    finally:
        os._exit(0)
