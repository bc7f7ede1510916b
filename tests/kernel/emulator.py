# SPDX-License-Identifier: BSD-2-Clause
"""qsteer-qemu as libvirt runs it, and a QEMU in whose place a small program writes down what it was started with."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kernel import bridges, support

ROOT = Path(__file__).parents[2]
WRAPPER = ROOT / "build" / "qsteer-qemu"
"""What make build makes."""
QEMU = f"qemu-system-{os.uname().machine}"
CHOICES = Path("/etc/qsteer/qemu")
STATUS = 42
"""The stand-in's exit status."""
_STANDIN = ROOT / "tests" / "qemu_standin" / "standin.c"
_KEPT = ("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", "Umask", "Uid", "Gid", "Groups", "CapEff", "CapBnd")


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a process was started with; ``fds`` are numbers and what /proc links them to."""

    argv: tuple[str, ...]
    environ: bytes
    fds: dict[int, str]
    status: dict[str, str]
    limits: str
    others: str
    asked: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """``vm`` is what became of the command line, ``probe`` QEMU when it was asked what it can do."""

    status: int
    stderr: str
    took_s: float
    vm: Seen | None
    probe: Seen | None

    @property
    def lines(self) -> tuple[str, ...]:
        """What was said, without the name of who says it; it says nothing else."""
        said = self.stderr.splitlines()
        assert all(line.startswith("qsteer-qemu: ") and line.isprintable() for line in said), self.stderr
        return tuple(line.removeprefix("qsteer-qemu: ") for line in said)

    @property
    def started(self) -> Seen:
        assert self.status == STATUS and self.vm, self
        return self.vm


def greeting(major: int = 10, minor: int = 0) -> str:
    version = {"qemu": {"micro": 2, "minor": minor, "major": major}, "package": "stand-in"}
    return json.dumps({"QMP": {"version": version, "capabilities": ["oob"]}}) + '\r\n{"return": {}}\r\n'


BUILT_WITH_EBPF = json.dumps({"return": {"object": "f0VMRgIBAQ" * 2700}, "id": "ebpf"}) + "\r\n"
BUILT_WITHOUT = (
    json.dumps({"id": "ebpf", "error": {"class": "CommandNotFound", "desc": "The command ... has not been found"}})
    + "\r\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the stand-in says when it is asked what it can do, and what it does then."""

    text: str = greeting() + BUILT_WITH_EBPF
    then: str = "wait"


def install(folder: Path) -> tuple[Path, Path]:
    """The wrapper and the stand-in, for everybody, in a namespace of bridges.host(); an administrator has chosen it."""
    assert WRAPPER.exists(), "make build makes it"
    wrapper = bridges.copy(WRAPPER, folder / "bin")
    standin = folder / "standin"
    subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", standin, _STANDIN], check=True)
    standin.chmod(0o755)
    CHOICES.mkdir()
    (CHOICES / QEMU).symlink_to(standin)
    return wrapper, standin


def run(
    program: Path,
    words: Sequence[str],
    *,
    pass_fds: Sequence[int] = (),
    answer: Answer | None = None,
    prefix: Sequence[str] = (),
    prepare: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    cwd: str = "/",
) -> Outcome:
    """Start a program with a command line; ``prepare`` runs before exec, in the child."""
    answer = answer or Answer()
    folder = Path(tempfile.mkdtemp(prefix="qsqw-", dir="/dev/shm"))
    try:
        seen = folder / "seen"
        seen.mkdir(mode=0o700)
        seen.chmod(0o777)
        folder.chmod(0o755)
        (folder / "answer").write_text(answer.text)
        told = {"QSQW_FOLDER": str(seen), "QSQW_ANSWER": str(folder / "answer"), "QSQW_THEN": answer.then}
        began = time.monotonic()
        done = subprocess.run(
            [*prefix, program, *words],
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PATH": os.environ["PATH"], **(environment or {}), **told},
            preexec_fn=prepare,
            cwd=cwd,
            timeout=support.patience(30),
            check=False,
        )
        took_s = time.monotonic() - began
        return Outcome(
            status=done.returncode,
            stderr=done.stderr.decode(),
            took_s=took_s,
            vm=_seen(seen, "vm"),
            probe=_seen(seen, "probe"),
        )
    finally:
        shutil.rmtree(folder)


def _seen(folder: Path, part: str) -> Seen | None:
    def text(name: str) -> str:
        path = folder / f"{part}-{name}"
        return os.fsdecode(path.read_bytes()) if path.exists() else ""

    if not (folder / f"{part}-others").exists():
        return None
    status = dict(line.split(":\t", 1) for line in text("status").splitlines() if ":\t" in line)
    fds = (line.split(" ", 1) for line in text("fds").splitlines())
    own = re.escape(os.fsencode(folder.parent))
    return Seen(
        argv=tuple(text("cmdline").split("\0")[:-1]),
        environ=re.sub(own, b"FOLDER", (folder / f"{part}-environ").read_bytes()),
        fds={int(number): re.sub(r"\[\d+\]", "", target) for number, target in fds},
        status={name: status[name] for name in _KEPT},
        limits=text("limits"),
        others=text("others"),
        asked=text("asked"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """One as libvirt describes it; ``device`` and ``netdev`` are members that are changed (None: not there)."""

    number: int = 0
    fds: Sequence[int] = ()
    device: Mapping[str, Any] = field(default_factory=dict)
    netdev: Mapping[str, Any] = field(default_factory=dict)

    @property
    def words(self) -> tuple[str, ...]:
        netdev = {"type": "tap", "fds": ":".join(map(str, self.fds)), "id": f"hostnet{self.number}"}
        device = {
            **{"driver": "virtio-net-pci", "mq": True, "vectors": 10, "rss": True, "hash": False},
            **{"netdev": f"hostnet{self.number}", "id": f"net{self.number}", "mac": f"52:54:00:71:77:0{self.number}"},
            **{"bus": "pci.1", "addr": "0x0"},
        }
        return ("-netdev", _text(netdev, self.netdev), "-device", _text(device, self.device))


def _text(members: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    """As libvirt writes JSON."""
    changed = {key: value for key, value in {**members, **changes}.items() if value is not None}
    return json.dumps(changed, separators=(",", ":"))


STANDARD = (
    *("-name", "guest=web1,debug-threads=on", "-S", "-machine", "pc-q35-10.0,usb=off", "-m", "size=4194304k"),
    *("-object", '{"qom-type":"memory-backend-ram","id":"pc.ram","size":4294967296}', "-uuid", "71737465-6572"),
    *("-device", '{"driver":"pcie-root-port","port":16,"chassis":1,"id":"pci.1","bus":"pcie.0","addr":"0x2"}'),
    *("-append", "console=ttyS0 -device quiet", "", "-sandbox", "on,obsolete=deny"),
)
"""Words of libvirt's that are about something else."""
