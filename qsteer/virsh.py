# SPDX-License-Identifier: BSD-2-Clause
"""The virsh edge: a domain's XML, and its metadata.  For the command line only, never for a hook."""

import os
import subprocess
from collections.abc import Sequence

from qsteer.errors import BusyError, NotFoundError, QsteerError, UnsupportedError, printable

TIMEOUT_S = 30.0
_NO_DOMAIN = "failed to get domain"
_NO_DAEMON = "failed to connect"


class Virsh:
    """virsh(1) for one domain; ``uri`` None is virsh's own choice."""

    def __init__(self, domain: str, uri: str | None = None) -> None:
        self._domain, self._uri = domain, uri

    def xml(self, *, inactive: bool) -> bytes:
        """The domain as it runs, or with ``inactive`` as it will start.  Raises QsteerError."""
        return self._run("dumpxml", *(("--inactive",) if inactive else ())).encode()

    def is_running(self) -> bool:
        """Raises QsteerError."""
        return self._field("State") != "shut off"

    def is_persistent(self) -> bool:
        """Whether it outlives its QEMU.  Raises QsteerError."""
        return self._field("Persistent") == "yes"

    def set_metadata(self, uri: str, prefix: str, xml: str | None, *, live: bool, config: bool) -> None:
        """Put an element into its metadata, in the place of the one of that namespace; None takes it away.

        ``live`` is for the domain that runs, ``config`` for its next start.  Raises QsteerError.
        """
        what = ("--remove",) if xml is None else ("--key", prefix, "--set", xml)
        where = (*(("--live",) if live else ()), *(("--config",) if config else ()))
        self._run("metadata", "--uri", uri, *what, *where)

    def _field(self, name: str) -> str:
        for line in self._run("dominfo").splitlines():
            field, _, value = line.partition(":")
            if field == name:
                return value.strip()
        raise QsteerError(f'virsh does not tell the {name.lower()} of domain "{self._domain}"')

    def _run(self, command: str, *arguments: str) -> str:
        connect: Sequence[str] = () if self._uri is None else ("--connect", self._uri)
        try:
            done = subprocess.run(
                ("virsh", "--quiet", *connect, command, "--domain", self._domain, *arguments),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=TIMEOUT_S,
                check=False,
                env={**os.environ, "LC_ALL": "C.UTF-8", "LANGUAGE": ""},  # its own words, not the user's
            )
        except FileNotFoundError:
            raise UnsupportedError("there is no virsh", hint="Debian package libvirt-clients") from None
        except subprocess.TimeoutExpired:
            raise BusyError(f"virsh {command} did not answer within {TIMEOUT_S:g} s") from None
        if done.returncode:
            raise _failure(done.stderr.decode(errors="replace"))
        return done.stdout.decode(errors="replace")


def _failure(said: str) -> QsteerError:
    lines = [line.removeprefix("error: ") for line in said.splitlines() if line.strip()]
    told = printable(": ".join(lines[-2:])) or "virsh failed"
    kind = NotFoundError if _NO_DOMAIN in told else QsteerError
    hint = "virsh list --all" if _NO_DOMAIN in told else "see --connect" if _NO_DAEMON in told else ""
    return kind(told, hint=hint)
