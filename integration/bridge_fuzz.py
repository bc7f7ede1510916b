# SPDX-License-Identifier: BSD-2-Clause
"""Hostile input for qsteer-bridge-helper: its parsers in one process (tests/fuzz_bridge), the whole program, its lists.

Everything is drawn from a seed: the same seed makes the same input.
"""

import collections
import contextlib
import ctypes
import os
import random
import resource
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from integration import sanitized
from integration.provision import CHECKOUT
from integration.sanitized import FuzzError
from tests.kernel import bridge_acls, bridges

NAME = "qsteer-bridge-helper"
TIMEOUT_S = 20.0

_C = CHECKOUT / "c"
_PARSERS = tuple(_C / name for name in ("bridge_acl.c", "bridge_args.c", "refusal.c"))
# Leaks are looked for with ptrace(), which the helper forbids.
_SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99", "UBSAN_OPTIONS": "exitcode=99"}

_libc = ctypes.CDLL(None, use_errno=True)


def sanitized_helper() -> Path:
    """The whole program under AddressSanitizer and UndefinedBehaviorSanitizer.  Raises ProvisionError."""
    return sanitized.program("bridge-sanitized", (_C / "bridge_helper.c", *_PARSERS))


def parsers(inputs: int, *, seed: int) -> str:
    """What the in-process fuzzer says of its run.  Raises FuzzError, ProvisionError."""
    fuzzer = sanitized.program("bridge-fuzz", (CHECKOUT / "tests" / "fuzz_bridge" / "fuzz.c", *_PARSERS))
    with tempfile.TemporaryDirectory(prefix="qsbh-", dir="/dev/shm") as folder:
        return sanitized.run_fuzzer(fuzzer, inputs, seed, folder)


# Lists for both helpers


def random_lists(count: int, *, seed: int) -> tuple[bridge_acls.Case, ...]:
    """Lists of one file, of what both helpers take to mean the same: no line too long, no NUL."""
    draw = random.Random(seed)
    return tuple(
        bridge_acls.Case(
            name=f"random list {number}",
            files={"bridge.conf": bridge_acls.File(content=_random_list(draw))},
            asked=(draw.choice(("br0", "br1")),),
        )
        for number in range(count)
    )


def _random_list(draw: random.Random) -> bytes:
    text = b"".join(_random_line(draw) for _ in range(draw.choice((1, 1, 2, 3, 5))))
    if draw.random() < 0.3 and b"include" not in text:  # a path that is spoilt is a relative one, where they differ
        at = draw.randrange(len(text))
        text = text[:at] + draw.choice((b"", b" ", b"\t", b"\n", b"\r", b"\v", b"#", b"x")) + text[at + 1 :]
    return text


def _random_line(draw: random.Random) -> bytes:
    blanks = ("", "", "", " ", "  ", "\t", "\r", "\f", " \t")
    word = draw.choice(("allow",) * 20 + ("deny",) * 3 + ("include", "#", "Allow", "den"))
    name = draw.choice(("br0",) * 5 + ("br1",) * 3 + ("all",) * 4 + ("br", bridge_acls.LONGEST))
    name = "/etc/qemu/missing" if word == "include" else name
    between = draw.choice((" ",) * 8 + ("\t", "\t", "  ", " \t", "\t ", "\f"))
    end = draw.choice(("\n",) * 6 + ("\r\n", "\n\n"))
    return f"{draw.choice(blanks)}{word}{between}{name}{draw.choice(blanks)}{end}".encode()


# The whole program


@dataclass(slots=True)
class Tally:
    """How often it ended with which status, and how many taps came; the kernel starts none under too low a limit."""

    runs: int = 0
    not_started: int = 0
    taps: int = 0
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)

    def __str__(self) -> str:
        ends = ", ".join(f"{count} with {status}" for status, count in sorted(self.statuses.items()))
        ends += f", {self.not_started} not started" if self.not_started else ""
        return (
            f"{self.runs} runs ended: {ends}; {self.taps} gave a tap; none hung, none left a tap or a file descriptor"
        )


def hostile(helper: Path, runs: int, *, seed: int) -> Tally:
    """Start the helper with random words, fds, limits, signals and environments, in a namespace of bridges.host().

    It is run as an ordinary user with CAP_NET_ADMIN.  Raises FuzzError if it crashes, hangs, speaks in more than two
    lines, gives a tap that the list does not allow, or leaves one.
    """
    draw = random.Random(seed)
    sanitized = "sanitized" in helper.name
    tally = Tally()
    before = _open_files()
    for number in range(runs):
        if number % 25 == 0:
            case = draw.choice((*bridge_acls.ONE_FILE[:4] * 20, *bridge_acls.CASES))
            case.make()
        _one(helper, draw, case, tally, sanitized=sanitized)
    if bridges.taps():
        raise FuzzError(f"taps are left: {bridges.taps()}")
    if _open_files() != before:
        raise FuzzError("file descriptors are left in this process")
    return tally


def _open_files() -> int:
    return len(tuple(Path("/proc/self/fd").iterdir()))


def _one(helper: Path, draw: random.Random, case: bridge_acls.Case, tally: Tally, *, sanitized: bool) -> None:
    with contextlib.ExitStack() as stack:
        ours, its = (stack.enter_context(sock) for sock in socket.socketpair())
        words = _words(draw, its.fileno())
        caller = _Caller(draw, its.fileno(), sanitized=sanitized)
        story = f"{case.name}: {words} {caller}"
        try:
            process = subprocess.Popen(
                [str(helper), *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=caller.environment,
                close_fds=False,
                preexec_fn=caller.become,
            )
        except OSError as error:
            if not caller.starved:
                raise FuzzError(f"it does not start: {error}: {story}") from None
            tally.not_started += 1
            return
        with process:
            try:
                stderr = process.communicate(timeout=TIMEOUT_S)[1].decode(errors="replace")
            except subprocess.TimeoutExpired:
                process.kill()
                raise FuzzError(f"it hangs: {story}") from None
        taps = _received(ours)
        tally.runs += 1
        tally.taps += taps
        tally.statuses[process.returncode] += 1
        _judge(process.returncode, stderr, taps, case, words, caller, story)


def _judge(
    status: int, stderr: str, taps: int, case: bridge_acls.Case, words: Sequence[str], caller: "_Caller", story: str
) -> None:
    """Raise FuzzError unless the helper did as it should."""
    story = f"{story}: status {status}: {stderr[-3000:]}"
    if "Sanitizer" in stderr or "runtime error" in stderr:
        raise FuzzError(f"a sanitizer complains: {story}")
    # With too little of something it is the kernel, or the loader, that ends it before its first instruction.
    if status not in (0, 1) and not (caller.starved and status in (127, -signal.SIGSEGV, -signal.SIGKILL)):
        raise FuzzError(f"it crashed: {story}")
    says = {"--help", "--version"} & set(words)
    if taps != (status == 0 and not says):
        raise FuzzError(f"{taps} taps: {story}")
    if taps and any(f"--br={bridge}" in words for bridge in case.asked if bridge not in case.allowed):
        raise FuzzError(f"it gave a tap that is not allowed: {story}")
    lines = stderr.splitlines()
    if status == 1 and lines and (len(lines) > 2 or not lines[0].startswith(f"{NAME}: ")):
        raise FuzzError(f"it says more than it should: {story}")


def _words(draw: random.Random, fd: int) -> list[str]:
    """QEMU's own words, some of them spoilt."""
    words = [f"--br={draw.choice(('br0', 'br0', 'br1', bridge_acls.LONGEST))}", f"--fd={fd}"]
    if draw.random() < 0.4:
        words.append("--use-vnet")
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        option = draw.choice(("--br=", "--fd=", "--queues=", "--use-vnet", "--help", "--version", "-", ""))
        value = draw.choice(("", "br0", "0", "1", "2", "4", "-1", "99", "2147483648", "/", "..", "br0:1", "x" * 70000))
        word = option + value if draw.random() < 0.8 else "".join(chr(draw.randrange(1, 127)) for _ in range(9))
        if draw.random() < 0.5:
            words.insert(draw.randrange(len(words) + 1), word)
        else:
            words[draw.randrange(len(words))] = word
    if draw.random() < 0.1:
        words.pop()
    draw.shuffle(words)
    return words


class _Caller:
    """Who starts the helper, and what the helper inherits.

    ``starved`` callers set limits under which hardly a program starts; not for a sanitized one, which needs much.
    """

    def __init__(self, draw: random.Random, fd: int, *, sanitized: bool) -> None:
        self._fd = fd
        self._closed = draw.sample((0, 1, 2), draw.choice((0, 0, 0, 0, 1, 2, 3)))
        self._copies = draw.choice((0, 0, 1, 5, 40))
        self._blocked = draw.random() < 0.5
        self._ignored = draw.random() < 0.3
        self._timer = draw.random() < 0.3
        self._limits: dict[int, int] = {}
        self.starved = False
        choices = {
            resource.RLIMIT_FSIZE: 0,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: 1,
            resource.RLIMIT_MEMLOCK: 0,
        }
        for limit, value in choices.items():
            if draw.random() < 0.2:
                self._limits[limit] = value
        if not sanitized and draw.random() < 0.4:
            self.starved = True
            self._limits[resource.RLIMIT_NOFILE] = draw.randrange(3, 16)
            self._limits[resource.RLIMIT_AS] = draw.choice((resource.RLIM_INFINITY, 3 << 20, 8 << 20))
            self._limits[resource.RLIMIT_STACK] = draw.choice((8 << 20, 16 << 10, 64 << 10, 256 << 10))
        self.environment = {"PATH": "/usr/bin:/bin", **_SANITIZERS}
        for name in ("LC_ALL", "LANGUAGE", "GCONV_PATH", "TZ", "MALLOC_PERTURB_", "TMPDIR", "IFS", "POSIXLY_CORRECT"):
            if draw.random() < 0.2:
                self.environment[name] = draw.choice(("", "/tmp", "../../x", "255", "%n%s", "x" * 30000))

    def __str__(self) -> str:
        return f"(closed {self._closed}, {self._copies} fds, limits {self._limits}, environment {self.environment})"

    def become(self) -> None:
        """In the child, before exec."""
        os.set_inheritable(self._fd, True)
        for _ in range(self._copies):
            os.set_inheritable(os.dup(self._fd), True)
        for fd in self._closed:
            with contextlib.suppress(OSError):
                os.close(fd)
        if self._ignored:
            for number in (signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
        if self._blocked:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        if self._timer:
            signal.setitimer(signal.ITIMER_REAL, 1000)
        _become_net_admin(bridges.NOBODY)
        for limit, value in self._limits.items():
            resource.setrlimit(limit, (value, value))


def _become_net_admin(user: int) -> None:
    """Another user, with CAP_NET_ADMIN alone, also in the ambient set."""
    keep_caps, ambient, ambient_raise, net_admin, version_3 = 8, 47, 2, 12, 0x20080522
    os.setgroups([bridge_acls.GROUP])
    _libc.prctl(keep_caps, 1, 0, 0, 0)
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    header = struct.pack("=Ii", version_3, 0)
    sets = struct.pack("=6I", *[1 << net_admin] * 3, 0, 0, 0)
    if _libc.capset(header, sets) or _libc.prctl(ambient, ambient_raise, net_admin, 0, 0):
        raise OSError(ctypes.get_errno(), "capset")


def _received(sock: socket.socket) -> int:
    """How many fds came; they are closed."""
    sock.setblocking(False)
    try:
        _, fds, _, _ = socket.recv_fds(sock, 16, 8)
    except BlockingIOError:
        return 0
    for fd in fds:
        os.close(fd)
    return len(fds)
