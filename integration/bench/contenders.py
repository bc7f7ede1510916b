# SPDX-License-Identifier: BSD-2-Clause
"""What is compared, and how each of them is loaded for a tap.

``load`` gives a program fd that is the caller's, and the seconds that loading took, without what the caller does with
it.  The complete build comes from a process that has CAP_BPF and no CAP_PERFMON: the verifier then adds barriers
against speculation that root would never see.
"""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from integration.bench.native import checked, ffi, lib
from integration.provision import CHECKOUT
from qsteer import kernel, programs
from qsteer import shim as qsteer_shim
from qsteer._shim import lib as shim
from qsteer.model import Build, Source
from qsteer.rss import KEY_BYTES, TABLE_MAX, HashType, RssConfig, equal_table

ALL_TYPES = HashType(sum(HashType))

FLOOR = "floor"
AUTOMQ = "automq"
QEMU = "qemu"
STATIC = "static"
PERIODIC = "periodic"
SHARED_MAPS = "shared_maps"
CAPBPF = "capbpf"
SPREAD = "spread"
KERNEL = "kernel"

LABELS: Mapping[str, str] = {
    FLOOR: "return 0",
    AUTOMQ: "no program (automq)",
    QEMU: "QEMU's program",
    STATIC: "qsteer static",
    PERIODIC: "qsteer static, periodic table",
    SHARED_MAPS: "qsteer shared-maps",
    CAPBPF: "qsteer complete, CAP_BPF alone",
    SPREAD: "qsteer static, over all queues",
    KERNEL: "in-kernel RSS",
}


class ContenderError(Exception):
    """A program could not be had; ``str()`` is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A program fd, which is the caller's to close, and how long it took to get."""

    prog_fd: int
    took_s: float


Load = Callable[[str, RssConfig], Loaded]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """``load`` takes the name of a tap and a configuration; with ``periodic`` the table wants to be an equal one."""

    name: str
    load: Load
    periodic: bool = False

    @property
    def label(self) -> str:
        return LABELS[self.name]

    @property
    def answers(self) -> bool:
        """Whether its answer is a queue of the configuration's."""
        return self.name != FLOOR

    def config(self, draw: random.Random, queues: Sequence[int]) -> RssConfig:
        """A configuration with a random key: every queue of a periodic table in turn, else in no order at all.

        A periodic table of 4 queues needs 2 bits of the hash, one without order all 7.
        """
        if self.periodic:
            table = tuple(queues[index] for index in equal_table(4))
        elif len(queues) >= TABLE_MAX:
            table = tuple(draw.sample(queues, TABLE_MAX))
        else:
            table = tuple(draw.choices(queues, k=TABLE_MAX))
        unclassified = queues[-1] if queues[-1] not in table else queues[0]
        return RssConfig(types=ALL_TYPES, key=draw.randbytes(KEY_BYTES), table=table, unclassified_queue=unclassified)


@contextlib.contextmanager
def contenders(qemu_object: bytes) -> Iterator[Mapping[str, Contender]]:
    """All that have a program, by name, in the order of the tables."""
    with _with_cap_bpf_alone() as load_complete:
        every = (
            Contender(name=FLOOR, load=lambda _tap, _config: load_floor()),
            Contender(name=QEMU, load=lambda _tap, config: _load_qemu(qemu_object, config)),
            Contender(name=STATIC, load=_own(Source.STATIC)),
            Contender(name=PERIODIC, load=_own(Source.STATIC), periodic=True),
            Contender(name=SHARED_MAPS, load=_own(Source.SHARED_MAPS)),
            Contender(name=CAPBPF, load=load_complete),
        )
        yield {contender.name: contender for contender in every}


def load_floor() -> Loaded:
    began = time.perf_counter()
    fd = checked(lib().qb_floor_load(), "cannot load the program that returns 0")
    return Loaded(prog_fd=fd, took_s=time.perf_counter() - began)


def _own(source: Source, build: Build = Build.SHARED_BODY) -> Load:
    def load(tap: str, config: RssConfig) -> Loaded:
        began = time.perf_counter()
        program = programs.load_program(tap=tap, source=source, config=config, build=build)
        took = time.perf_counter() - began
        fd = os.dup(program.prog_fd)
        program.close()
        return Loaded(prog_fd=fd, took_s=took)

    return load


def _load_qemu(elf: bytes, config: RssConfig) -> Loaded:
    """As QEMU does it: load the object, then write the three maps."""
    fds = ffi().new("int[4]")
    began = time.perf_counter()
    checked(lib().qb_qemu_load(elf, len(elf), fds), "cannot load QEMU's program")
    try:
        _write_config(fds[1], fds[2], fds[3], config)
    finally:
        for index in range(1, 4):
            os.close(fds[index])
    return Loaded(prog_fd=fds[0], took_s=time.perf_counter() - began)


def _write_config(config_fd: int, key_fd: int, table_fd: int, config: RssConfig) -> None:
    """The maps' layout is qsteer's, too."""
    from qsteer._shim import ffi as shim_ffi

    fields = {
        "redirect": 1,
        "hash_types": int(config.types),
        "indirections_len": len(config.table),
        "default_queue": config.unclassified_queue,
    }
    raw = shim_ffi.new("struct qs_rss_config *", fields)
    table = shim_ffi.new(f"uint16_t[{TABLE_MAX}]", config.table)
    checked(shim.qs_config_write(config_fd, key_fd, table_fd, raw, config.key, table), "cannot write QEMU's maps")


# The process with CAP_BPF alone

_RIGHTS = "-all,+bpf,+dac_read_search"
"""The second one is for a checkout in a closed home; the verifier does not look at it."""


@contextlib.contextmanager
def _with_cap_bpf_alone() -> Iterator[Load]:
    """Loads complete builds in a child process, which goes when the socket to it is closed."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = ("setpriv", "--securebits=+noroot", f"--inh-caps={_RIGHTS}", f"--ambient-caps={_RIGHTS}")
    with ours:
        with theirs:
            child = subprocess.Popen(
                (*command, sys.executable, "-m", "integration.bench.contenders", str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                cwd=CHECKOUT,
                start_new_session=True,  # it is not for it to act on ^C
            )

        def load(tap: str, config: RssConfig) -> Loaded:
            wanted = {
                "tap": tap,
                "types": int(config.types),
                "key": config.key.hex(),
                "table": config.table,
                "unclassified": config.unclassified_queue,
            }
            ours.send(json.dumps(wanted).encode())
            answer = json.loads(ours.recv(4096) or '{"error": "it has ended"}')
            if "error" in answer:
                raise ContenderError(f"a process with CAP_BPF alone cannot load the complete build: {answer['error']}")
            (fd,) = kernel.receive_fds(ours.fileno(), 1)
            return Loaded(prog_fd=fd, took_s=answer["took_s"])

        try:
            yield load
        finally:
            ours.close()
            child.wait(10)


def _serve(sock: socket.socket) -> None:
    load = _own(Source.STATIC, Build.COMPLETE)
    while request := sock.recv(1 << 16):
        wanted = json.loads(request)
        try:
            if qsteer_shim.effective_capabilities() >> shim.CAP_PERFMON & 1:
                raise ContenderError("it has CAP_PERFMON as well")
            config = RssConfig(
                types=HashType(wanted["types"]),
                key=bytes.fromhex(wanted["key"]),
                table=tuple(wanted["table"]),
                unclassified_queue=wanted["unclassified"],
            )
            loaded = load(wanted["tap"], config)
        except Exception as error:
            sock.send(json.dumps({"error": str(error)}).encode())
            continue
        sock.send(json.dumps({"took_s": loaded.took_s}).encode())
        kernel.send_fds(sock.fileno(), (loaded.prog_fd,))
        os.close(loaded.prog_fd)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        _serve(socket.socket(fileno=int(sys.argv[1])))
