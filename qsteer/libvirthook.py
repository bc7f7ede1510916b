# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer-libvirt-hook``: what libvirt's qemu hook does, ``qsteer apply`` for a domain that starts.

Theory of operation
===================

libvirt runs ``hooks/qemu.d/*`` as root with a domain's XML on stdin, at each turn of its life, and waits without a
limit; a failure ends the start.  So the work (``hookwork``) is a child's, which libvirt does not see: this process
waits for it until DEADLINE_S is over, whatever state the child is in, be it one that no signal ends (a file system that
hangs).  A program is attached in one step, so that a child that is killed leaves nothing half-done.

Nothing that fails here fails the domain, unless its policy, or the administrator's configuration, says that steering is
required: then the exit code is REFUSE, the only one that the script which libvirt calls passes on (``hookfile``).  All
is said in the system's journal, since libvirt throws away what a hook says; and on stderr, which libvirt shows where a
hook fails.

The child talks over a pipe, in lines: ``required``, ``refused WHY``, ``done``.  After the last it may go on by itself.
"""

import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from qsteer.errors import UsageError, printable
from qsteer.hookfile import NAME, OPERATIONS, REFUSE
from qsteer.notify import Priority, SystemJournal

DEADLINE_S = 2.0

_REQUIRED, _DONE, _REFUSED = "required", "done", "refused "


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
    refused = [line.removeprefix(_REFUSED) for line in lines if line.startswith(_REFUSED)]
    if _DONE not in lines:
        os.kill(child, signal.SIGKILL)
        late = time.monotonic() >= ends
        why = f"{operation}: not done within {DEADLINE_S:g} s, given up" if late else f"{operation}: qsteer failed"
        refused += [why] if _REQUIRED in lines else []
        told = f"{printable(domain)}: {why}" + ("; steering is required, the start is refused" if refused else "")
        SystemJournal(NAME, QSTEER_DOMAIN=printable(domain)).say(told, Priority.WARNING)
    for why in refused:
        print(f"{NAME}: {why}; steering is required", file=sys.stderr, flush=True)
    return REFUSE if refused else 0


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
    """What the child does.  libvirt waits for whoever has its pipes open: the child lets go of them."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.setsid()
        from qsteer import hookwork

        def tell(line: str) -> None:
            os.write(said, f"{line}\n".encode())

        hookwork.run(
            domain,
            operation,
            required=lambda: tell(_REQUIRED),
            refuse=lambda why: tell(f"{_REFUSED}{printable(why)}"),
            done=lambda: tell(_DONE),
        )
    finally:
        os._exit(0)
