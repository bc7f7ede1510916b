# SPDX-License-Identifier: BSD-2-Clause
"""The script that libvirt calls: what it says, and how ``qsteer libvirt install`` puts it into its place.

Theory of operation
===================

A virtual machine must start whatever has become of qsteer: removed, half upgraded, a Python that does not start.  So
libvirt is given a script of a few lines, which knows where the hook is, and passes on no failure but the one that means
"steering is required"; any other is told in the journal.  It starts nothing for the operations that the hook has no use
for.

The hook is read by the Python that it was installed for, and not executed: where AppArmor confines libvirt's daemon, as
on Debian and Ubuntu, that may execute what is in /usr/bin, which the Python is mostly, and nothing of /usr/local.
"""

import contextlib
import os
import stat
import sys
from pathlib import Path

from qsteer.errors import NotFoundError, QsteerError, from_errno

NAME = "qsteer-libvirt-hook"
STARTED = "started"
OPERATIONS = (STARTED, "reconnect", "migrate", "release")
"""Those that the hook does something for."""
REFUSE = 10
"""Its exit code where the domain must not start."""
HOOKS = Path("/etc/libvirt/hooks")
SCRIPT = HOOKS / "qemu.d" / "50-qsteer"
MARK = '# Written by "qsteer libvirt install"; "qsteer libvirt uninstall" takes it away.'


def text(hook: Path, python: str = sys.executable) -> str:
    """The script, for a hook that is at ``hook``, and its Python."""
    import shlex

    return f"""#!/bin/sh
{MARK}
# SPDX-License-Identifier: BSD-2-Clause
# Steers the NICs of domains that start.  Without qsteer they start as without this file.
case "$2" in {"|".join(OPERATIONS)}) ;; *) exit 0 ;; esac
{shlex.quote(python)} -I {shlex.quote(str(hook))} "$@"
status=$?
case $status in
0) ;;
{REFUSE}) exit 1 ;;
*)
	set -- -t {NAME} -p daemon.warning -- "$1: $2: {NAME} does not run: exit status $status"
	timeout 1 logger "$@" </dev/null >/dev/null 2>&1 &
	;;
esac
exit 0
"""


def hook() -> Path:
    """Where the hook is, beside the qsteer that runs.  Raises NotFoundError if it is missing."""
    import sysconfig

    path = Path(sysconfig.get_path("scripts")) / NAME
    if not os.access(path, os.X_OK):
        raise NotFoundError(f"{path} is missing", hint="make install puts it there")
    return path


def not_roots() -> Path | None:
    """What libvirt would run or read as root, and somebody else can write; None if there is nothing of that."""
    import qsteer

    code = Path(qsteer.__file__).parent
    for path in (hook(), hook().parent, Path(sys.executable), code, code / "hookwork.py"):
        about = path.stat()
        if about.st_uid or about.st_mode & stat.S_IWOTH or (about.st_gid and about.st_mode & stat.S_IWGRP):
            return path
    return None


def install() -> bool:
    """Put the script into its place; whether that changed anything.

    Raises NotFoundError where libvirt or the hook is not there, QsteerError where another file has that name.
    """
    if not HOOKS.parent.is_dir():
        raise NotFoundError(f"there is no {HOOKS.parent}: is libvirt on this host?")
    wanted = text(hook())
    if _installed() == wanted and os.access(SCRIPT, os.X_OK):
        return False
    new = HOOKS / f".{SCRIPT.name}.new"  # what is in qemu.d is run
    try:
        for made in (HOOKS, SCRIPT.parent):
            made.mkdir(mode=0o755, exist_ok=True)
        try:
            new.unlink(missing_ok=True)  # what a qsteer that was killed has left
            new.write_text(wanted)
            new.chmod(0o755)
            new.replace(SCRIPT)
        except BaseException:
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot write {SCRIPT}") from None
    return True


def uninstall() -> bool:
    """Take the script away; whether there was one.  Raises QsteerError where the file is not qsteer's."""
    if not is_installed():
        return False
    try:
        SCRIPT.unlink()
        with contextlib.suppress(OSError):
            SCRIPT.parent.rmdir()  # unless there is something else in it
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot remove {SCRIPT}") from None
    return True


def is_installed() -> bool:
    """Whether qsteer's script is there.  Raises QsteerError where the file is not qsteer's, or cannot be read."""
    return _installed() is not None


def _installed() -> str | None:
    """The script that is there.  Raises QsteerError where the file is not qsteer's, or cannot be read."""
    try:
        found = SCRIPT.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise from_errno(error.errno or 0, f"cannot read {SCRIPT}") from None
    if MARK not in found.splitlines()[:2]:
        raise QsteerError(f"{SCRIPT} is there, and was not written by qsteer", hint="move it away")
    return found
