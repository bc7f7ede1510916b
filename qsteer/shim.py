# SPDX-License-Identifier: BSD-2-Clause
"""Calls into the C shim, checked: a negative errno becomes an exception.  Privileges of this process, too."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qsteer._shim import ffi, lib
from qsteer.errors import PermissionDeniedError, UnsupportedError, from_errno
from qsteer.rss import RssConfig

log = logging.getLogger(__name__)

OBJECTS = Path(__file__).parent / "bpf"
"""Where the compiled BPF objects are."""


def check(result: int, message: str, hint: str = "") -> None:
    """Raise what fits a negative errno; ``message`` says what failed on what."""
    if result < 0:
        raise from_errno(result, message, hint=hint)


def check_bpf(result: int, message: str, hint: str = "") -> None:
    """As check, for what libbpf does: its and the verifier's words go to the log."""
    said = ffi.string(lib.qs_log_take()).decode(errors="replace").strip()
    for line in said.splitlines():
        log.debug("libbpf: %s", line)
    if result >= 0:
        return
    if result == -errno.EPERM or (result == -errno.EACCES and not has_capability(lib.CAP_PERFMON)):
        raise PermissionDeniedError(message, errno=-result, hint=_missing_capabilities())
    if "failed to find valid kernel BTF" in said:
        raise UnsupportedError(message, errno=errno.EOPNOTSUPP, hint="it takes a kernel with BTF, and sysfs")
    if "not found in kernel or module BTFs" in said:
        raise UnsupportedError(message, errno=errno.EOPNOTSUPP, hint="this kernel lacks what the program calls: -vv")
    if (result == -errno.EACCES and said) or "BEGIN PROG LOAD LOG" in said:
        hint = "Linux 6.1 and later take it; -vv shows why this kernel does not"
        raise UnsupportedError(f"{message}: the kernel's verifier refuses it", hint=hint)
    check(result, message, hint)


def has_capability(number: int) -> bool:
    """Whether a capability is in the effective set."""
    return bool(effective_capabilities() >> number & 1)


def _missing_capabilities() -> str:
    wanted = {"CAP_BPF": lib.CAP_BPF, "CAP_PERFMON": lib.CAP_PERFMON}
    missing = [name for name, number in wanted.items() if not has_capability(number)]
    if missing:
        return f"this process lacks {' and '.join(missing)}; try sudo"
    if not has_capability(lib.CAP_SYS_ADMIN):
        return "this process lacks CAP_SYS_ADMIN, which it takes where tun is a module; try sudo"
    return "a security module or a container withholds the right"


def string(chars: object) -> str:
    """A char array of C's as text."""
    return bytes(ffi.string(chars)).decode(errors="replace")


def raw_config(config: RssConfig) -> tuple[Any, bytes, Any]:
    """Configuration, key and table as the C side wants them."""
    raw = ffi.new(
        "struct qs_rss_config *",
        {
            "redirect": 1,
            "hash_types": int(config.types),
            "indirections_len": len(config.table),
            "default_queue": config.unclassified_queue,
        },
    )
    return raw, config.key, ffi.new(f"uint16_t[{lib.QS_TABLE_ENTRIES}]", config.table)


def out_fd(call: Callable[[object], int], message: str, hint: str = "") -> int:
    """The fd that a call of the shim gives through its last argument."""
    out = ffi.new("int *")
    check(call(out), message, hint)
    return int(out[0])


def out_fd_bpf(call: Callable[[object], int], message: str) -> int:
    """As out_fd, for what libbpf does."""
    out = ffi.new("int *")
    check_bpf(call(out), message)
    return int(out[0])


def effective_capabilities() -> int:
    """The effective capability set, bit n for capability n."""
    out = ffi.new("uint64_t *")
    check(lib.qs_capabilities_effective(out), "cannot read this process's capabilities")
    return int(out[0])


def drop_capabilities() -> None:
    """Empty the ambient, inheritable, permitted and effective sets.  Raises QsteerError."""
    check(lib.qs_capabilities_drop(), "cannot give up capabilities")


def limit_capabilities(*keep: int) -> None:
    """Give up all capabilities but these, for good: no program that is executed gets one back.  Raises QsteerError."""
    check(lib.qs_capabilities_limit(sum(1 << number for number in keep)), "cannot give up capabilities")
