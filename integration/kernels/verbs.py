# SPDX-License-Identifier: BSD-2-Clause
"""Each verb, tried on the taps of a real QEMU: what comes of it, by the kernel's word.

All is in namespaces of this process's own, where /dev/net/tun, /sys/fs/bpf and /run/qsteer have the modes of a stock
host.  The QEMU is an ordinary user's; ``nobody`` is another one.
"""

import contextlib
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from integration import provision
from qsteer import kernel, procs, programs, qmp
from qsteer.errors import QsteerError
from qsteer.model import Source
from qsteer.reference import queue_of
from qsteer.rss import BASE_TYPES, RssConfig
from tests.kernel import private, standin, support

STEERED, ASKED = "qskr0", "qskr1"
VM_UID = 65533
CONFIG = RssConfig(types=BASE_TYPES, key=bytes(range(40)), table=(0, 1, 2, 3, 3, 2, 1, 0), unclassified_queue=1)
_WAIT_S = 300.0
"""For one command: the kernel may run in a QEMU without KVM."""
_SETTLED_S = 4.0
_EXIT_CODES = (0, 1, 2, 3, 4, 5, 6, 8)
_VOLATILE = re.compile(
    r"\d+(\.\d+)? ms|(?<=process )\d+(, \d+)*( and \d+ more)?|(?<=pid )\d+|(?<=program )\d+|(?<=-> )\d+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one command.  ``result`` is what it did, by the kernel's word where it changes something."""

    exit: int
    says: str
    result: str

    def is_as(self, other: "Outcome") -> bool:
        return (self.exit, self.result) == (other.exit, other.result)

    @property
    def is_in_order(self) -> bool:
        """A documented exit code; a failure is one line, and a hint at most."""
        lines = [line for line in self.says.split(" / ") if not line.startswith("hint: ")]
        return self.exit in _EXIT_CODES and "Traceback" not in self.says and (not self.exit or len(lines) == 1)


def _outcome(code: int, stdout: str, stderr: str, result: str) -> Outcome:
    said = stderr.strip().splitlines() or stdout.strip().splitlines()[-1:]
    return Outcome(exit=code, says=_VOLATILE.sub("N", " / ".join(said)), result=_VOLATILE.sub("N", result.strip()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Vm:
    """A QEMU that holds two taps: STEERED, and ASKED, whose guest is offered RSS."""

    pid: int
    queue_fd: int
    program_fd: int
    qemu: Path

    def prepare(self, *, steered: bool) -> None:
        """STEERED as wanted, and no holds; a shared body that is pinned stays."""
        private.forget_holds()
        if steered:
            kernel.attach(self.queue_fd, self.program_fd)
        else:
            kernel.detach(self.queue_fd)

    def program(self) -> int:
        return next(queue.program_id for queue in kernel.open_queues(self.pid) if queue.tap == STEERED)

    def attached(self) -> str:
        """The build that is attached, and whether packets go where the reference says."""
        if not (number := self.program()):
            return "no program"
        info = programs.program_info(number)
        config = programs.read_maps(info).config
        assert info.ident and config
        with programs.program_by_id(number) as fd:
            right = sum(programs.run_program(fd, one).queue == queue_of(one, config) for one in standin.PACKETS)
        return f"{info.ident.build}, {right} of {len(standin.PACKETS)} packets right"


Prefix = Sequence[str]
Verb = Callable[[Vm, Prefix], Outcome]


def _qsteer(prefix: Prefix, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*prefix, sys.executable, "-m", "qsteer", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_WAIT_S, check=False)


def _looks(*arguments: str) -> Verb:
    def verb(vm: Vm, prefix: Prefix) -> Outcome:
        vm.prepare(steered=True)
        done = _qsteer(prefix, *arguments)
        return _outcome(done.returncode, done.stdout, done.stderr, done.stdout + done.stderr)

    return verb


def _changes(name: str, *, before: bool) -> Verb:
    def verb(vm: Vm, prefix: Prefix) -> Outcome:
        vm.prepare(steered=before)
        done = _qsteer(prefix, name, "--dev", STEERED)
        held = ", held" * any(file.startswith("holds/") for file in private.files())
        return _outcome(done.returncode, done.stdout, done.stderr, vm.attached() + held)

    return verb


def _keeps(vm: Vm, prefix: Prefix) -> Outcome:
    """It steers the tap, and puts back the program that is taken off; or says once why not, and goes on trying."""
    vm.prepare(steered=False)
    command = [*prefix, sys.executable, "-m", "qsteer", "keep", "--dev", STEERED]
    results = []
    with tempfile.NamedTemporaryFile("w+") as file, subprocess.Popen(command, stderr=file) as keep:
        said, gives_up = Path(file.name).read_text, re.compile("left alone|waiting for")
        for what in ("steered", "put back"):
            support.wait_until(
                what, lambda: keep.poll() is not None or vm.program() or gives_up.search(said()), _WAIT_S
            )
            results.append(f"{what}: {vm.attached()}")
            if vm.program():
                with contextlib.suppress(subprocess.TimeoutExpired):  # it looks at what it did
                    keep.wait(_SETTLED_S)
            if not vm.program() or gives_up.search(said()):
                break
            vm.prepare(steered=False)
        keep.terminate()
        keep.wait(_WAIT_S)
        complaints = [line for line in said().splitlines() if not re.search(": (steered, source|put back,)", line)]
    return _outcome(keep.returncode, "", "\n".join(complaints), "; ".join((*results, *complaints)))


def _runs(*options: str, pinned: bool = True) -> Verb:
    def verb(vm: Vm, prefix: Prefix) -> Outcome:
        for path in () if pinned else [path for path in private.PINS.rglob("*") if path.is_file()]:
            path.unlink()
        user = () if any(word.startswith("--reuid") for word in prefix) else ("--user", "nobody")
        words = ("run", "--vm", "qskr-run", "--tap", "id=n0,queues=4,ifname=qskr-run", *user, *options)
        qemu = (str(vm.qemu), "-machine", "pc", "-m", "16", "-nodefaults", "-display", "none", "-S")
        command = [*prefix, sys.executable, "-m", "qsteer", *words, "--", *qemu]
        with tempfile.TemporaryFile("w+") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
            support.wait_until("run", lambda: process.poll() is not None or _is_qemu(process.pid), _WAIT_S)
            code = process.returncode or 0
            held = procs.held_programs(process.pid) if process.returncode is None else {}
            process.kill()
            file.seek(0)
            said = file.read()
        build = re.search(r"qsteer \d+ \((.+?)\)", said)
        # Addresses and numbers differ from one run to the next.
        return _outcome(code, "", said, f"QEMU holds a program, {build[1]}" if build and held else said)

    return verb


def _is_qemu(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return "qemu-system" in str(Path(f"/proc/{pid}/exe").readlink())
    return False


@contextlib.contextmanager
def vm() -> Iterator[Vm]:
    """A QEMU, in namespaces of this process's own.  Raises QsteerError, OSError or ProvisionError."""
    qemu = provision.provision().qemu
    with contextlib.ExitStack() as stack:
        stack.enter_context(private.memory())
        _as_on_a_stock_host()
        stack.enter_context(support.network_namespace())  # one that only CAP_SYS_ADMIN looks into
        stack.enter_context(support.network_namespace())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        os.chown(folder, VM_UID, VM_UID)
        with contextlib.suppress(QsteerError):  # the shared body stays, whoever removes its pin
            stack.callback(os.close, programs.shared_bodies())
        program = programs.load_program(tap=STEERED, source=Source.STATIC, config=CONFIG)
        stack.callback(program.close)
        words = [str(qemu), "-name", "qskr", "-machine", "pc", "-m", "16", "-nodefaults", "-display", "none"]
        words += ["-qmp", f"unix:{folder}/qmp,server=on,wait=off"]
        fds: list[int] = []
        for name, rss in ((STEERED, "off"), (ASKED, "on")):
            tap = kernel.open_tap(name, 4)
            for fd in tap.fds:
                stack.callback(os.close, fd)
            fds += tap.fds
            words += ["-netdev", f"tap,id={name},vhost=off,fds={':'.join(map(str, tap.fds))}"]
            words += ["-device", f"virtio-net-pci,netdev={name},mq=on,rss={rss},romfile="]
        user = ("setpriv", f"--reuid={VM_UID}", f"--regid={VM_UID}", "--clear-groups", "--inh-caps=-all", "--")
        process = stack.enter_context(subprocess.Popen([*user, *words], pass_fds=fds))
        stack.callback(process.kill)
        support.wait_until("QEMU", lambda: process.poll() is not None or (folder / "qmp").exists(), _WAIT_S)
        qmp.execute(str(folder / "qmp"), "query-status", timeout_s=_WAIT_S)
        yield Vm(pid=process.pid, queue_fd=fds[0], program_fd=program.prog_fd, qemu=qemu)


def _as_on_a_stock_host() -> None:
    private.PINS.parent.chmod(0o700)
    private.RUNTIME.chmod(0o755)
    for place in ("/dev/net", "/run/netns"):
        private.mount("-t", "tmpfs", "-o", "mode=755", "none", place)
    os.mknod("/dev/net/tun", stat.S_IFCHR, os.makedev(10, 200))
    Path("/dev/net/tun").chmod(0o666)


_LOOK, _ASK = ("--dev", STEERED), ("--dev", ASKED, "--allow", "pause")
_REACH = ("bpf", "perfmon", "sys_admin", "sys_ptrace", "dac_override", "dac_read_search")
_START = ("bpf", "perfmon", "net_admin", "setuid", "setgid")
VERBS: dict[str, tuple[Verb, Sequence[str]]] = {
    "status": (_looks("status", *_LOOK), _REACH),
    "status --check": (_looks("status", "--check", *_ASK), _REACH),
    "show": (_looks("show", *_LOOK), _REACH),
    "show --source device-state": (_looks("show", "--source", "device-state", *_ASK), _REACH),
    "apply": (_changes("apply", before=False), _REACH),
    "off": (_changes("off", before=True), _REACH),
    "keep": (_keeps, _REACH),
    "run -n": (_runs("-n"), _START),
    "run": (_runs(), _START),
    "run, the first on a host": (_runs(pinned=False), _START),
}
"""Each with the capabilities that are tried before all of them, which saves time."""
