# SPDX-License-Identifier: BSD-2-Clause
"""bench.c, compiled into build/ when it is first needed; cffi lets go of the interpreter's lock during a call."""

import functools
import hashlib
import os
from pathlib import Path
from typing import Any

from integration.apt import run
from integration.provision import BUILD

SOURCE = Path(__file__).with_name("bench.c")

_DECLARATIONS = """
int qb_floor_load(void);
int qb_qemu_load(const void *elf, size_t size, int *fds);
int qb_test_run(int prog, const void *packet, uint32_t size, uint32_t repeat, uint32_t *answer, uint64_t *elapsed_ns);
int qb_verification(const void *elf, size_t size, uint64_t *verified_us, uint64_t *loaded_ns);
int qb_private_network(void);
int qb_sender_open(int direct);
struct qb_step { uint16_t packet; uint16_t device; };
int qb_send(int sock, const void *packets, uint32_t size, uint32_t packet_count, const int32_t *devices,
            uint32_t device_count, const struct qb_step *order, uint32_t length, uint64_t total, uint64_t *dropped,
            uint64_t *elapsed_ns);
int qb_drain(const int *queues, int count, const volatile int *stop);
"""


class NativeError(Exception):
    """A call failed; ``str()`` is one line for the user."""


@functools.cache
def ffi() -> Any:
    from cffi import FFI

    made = FFI()
    made.cdef(_DECLARATIONS)
    return made


@functools.cache
def lib() -> Any:
    """The functions of bench.c.  Raises ProvisionError if it does not compile."""
    library = BUILD / f"bench-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}.so"
    if not library.exists():
        BUILD.mkdir(exist_ok=True)
        partial = library.with_suffix(".partial")
        flags = ("-std=gnu11", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
        run("gcc", *flags, "-o", partial, SOURCE, "-lbpf")
        for old in BUILD.glob("bench-*.so"):
            old.unlink()
        partial.rename(library)
    return ffi().dlopen(str(library))


def checked(result: int, what: str) -> int:
    """Raise NativeError on a negative errno."""
    if result < 0:
        raise NativeError(f"{what}: {os.strerror(-result)}")
    return result
