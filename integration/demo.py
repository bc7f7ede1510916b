# SPDX-License-Identifier: BSD-2-Clause
"""``make demo``: the main job on real guests, every flow checked.

Three guests, each with a NIC of four queues:

- ``qsdemo``, started by ``qsteer run`` as an ordinary user: the guest sets its RSS table, changes it, and each flow
  must arrive on the queue that the guest's own key and table give it.  Then the same flows with steering off (automq);
- ``qsdemo-software``, as the same user, without qsteer: QEMU may not load BPF, and moves the packets itself;
- ``qsdemo-plain``, QEMU on its own, without RSS: ``qsteer apply`` and ``off`` from outside.

Exit status 0 if every phase holds.  Figures go to build/demo.json.
"""

import contextlib
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script: the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from integration import provision, traffic
from integration.apt import ProvisionError
from integration.guest import Guest, GuestError, as_user, ordinary_user
from integration.provision import BUILD, CHECKOUT, Provisioned
from integration.traffic import Sighting, Verdict
from qsteer import kernel
from qsteer.errors import QsteerError
from qsteer.rss import BASE_TYPES, KEY_BYTES, RssConfig, format_hash_types, format_key, weighted_table

QUEUES = 4
GUEST_WEIGHTS = "1 2 3 2"
APPLIED_WEIGHTS = (3, 2, 2, 1)
REPORT = BUILD / "demo.json"


class DemoError(Exception):
    """A phase could not be carried out; ``str()`` is one line for the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One row of the result.  It holds if every flow arrived and, where ``must_match``, on its queue.

    The others stand beside for comparison: there the kernel must *not* have found the guest's queues, or steering was
    not off.
    """

    name: str
    steered_by: str
    must_match: bool
    verdict: Verdict
    took_s: float

    @property
    def holds(self) -> bool:
        if self.verdict.lost:
            return False
        if self.must_match:
            return not self.verdict.mismatches and not self.verdict.host_mismatches
        return bool(self.verdict.host_mismatches)

    @property
    def right_on_host(self) -> int:
        """Flows that the host's kernel put on the queue that they belong on."""
        return self.verdict.flows - self.verdict.host_mismatches


class Demo:
    """The run: its phases so far, and the files that it works with."""

    def __init__(self, files: Provisioned) -> None:
        self.files = files
        self.phases: list[Phase] = []
        self.qemu: dict[str, Any] = {"version": files.qemu_version}
        self._started = time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self._started:5.1f} s] {line}", flush=True)

    def qsteer(self, *arguments: str) -> str:
        """Run a qsteer command as a user would; its output."""
        self.say(f"$ qsteer {' '.join(arguments)}")
        done = subprocess.run([sys.executable, "-m", "qsteer", *arguments], capture_output=True, text=True, timeout=60)
        if done.returncode:
            reason = " / ".join(done.stderr.strip().splitlines()) or f"exit status {done.returncode}"
            raise DemoError(f"qsteer {arguments[0]}: {reason}")
        return done.stdout

    def ethtool(self, guest: Guest, arguments: str) -> None:
        """Run ethtool in a guest."""
        self.say(f"{guest.name}# ethtool {arguments}")
        guest.run(f"ethtool {arguments}")

    def measure(
        self, name: str, guest: Guest, tap: str, config: RssConfig, *, steered_by: str, must_match: bool = True
    ) -> Sighting:
        """Follow all flows through ``tap`` and compare them with ``config``."""
        began = time.monotonic()
        sighting = traffic.follow(guest, tap, self.files.flowrx, queues=QUEUES)
        verdict = traffic.verify(sighting, config, queues=QUEUES)
        took_s = time.monotonic() - began
        phase = Phase(name=name, steered_by=steered_by, must_match=must_match, verdict=verdict, took_s=took_s)
        self.phases.append(phase)
        self.say(
            f"{name}: {verdict.flows} flows, {verdict.mismatches} on another queue than asked for, "
            f"{phase.right_on_host} put right by the host's kernel{'' if phase.holds else '  <-- does not hold'}"
        )
        return sighting

    def program(self, tap: str) -> dict[str, Any] | None:
        """What ``qsteer status`` says is attached to a tap."""
        taps = json.loads(self.qsteer("status", "--dev", tap, "--json"))["taps"]
        if len(taps) != 1:
            raise DemoError(f"qsteer status --dev {tap} tells of {len(taps)} taps")
        program: dict[str, Any] | None = taps[0]["program"]
        return program

    def expect_program(self, tap: str, kind: str | None) -> dict[str, Any] | None:
        """Raise DemoError unless a program of ``kind`` (None: none at all) is attached."""
        program = self.program(tap)
        found = program["kind"] if program else None
        if found != kind:
            raise DemoError(f"{tap}: {found or 'no'} program is attached, where {kind or 'none'} should be")
        return program


def main_guest(demo: Demo, guest: Guest, tap: str) -> None:
    """The guest that ``qsteer run`` started."""
    uid, cap_eff = guest.credentials()
    demo.ethtool(guest, f"-X eth0 weight {GUEST_WEIGHTS}")
    demo.measure("rss", guest, tap, guest.rss(), steered_by="qsteer")
    demo.qemu |= {"uid": uid, "cap_eff": cap_eff, "program": demo.expect_program(tap, "qsteer")}
    demo.say(f"QEMU {demo.files.qemu_version}, pid {guest.pid}: uid {uid}, CapEff {cap_eff}, qsteer's program attached")
    if uid == 0 or int(cap_eff, 16):
        raise DemoError(f"QEMU is not unprivileged: uid {uid}, CapEff {cap_eff}")

    demo.ethtool(guest, "-X eth0 equal 3")
    config = guest.rss()
    demo.measure("equal 3", guest, tap, config, steered_by="qsteer")

    demo.qsteer("off", "--vm", guest.name)
    demo.expect_program(tap, None)
    demo.measure("automq", guest, tap, config, steered_by="the kernel", must_match=False)
    demo.qsteer("apply", "--vm", guest.name)
    demo.measure("rss again", guest, tap, config, steered_by="qsteer")


def software_guest(demo: Demo, guest: Guest, tap: str) -> None:
    """QEMU as an ordinary user without qsteer: right queues, at the price of moving the packets in QEMU."""
    demo.ethtool(guest, "-X eth0 equal 3")
    demo.measure("software", guest, tap, guest.rss(), steered_by="QEMU", must_match=False)


def plain_guest(demo: Demo, guest: Guest, tap: str) -> None:
    """A QEMU that qsteer did not start, whose guest knows nothing of RSS."""
    config = RssConfig(types=BASE_TYPES, key=secrets.token_bytes(KEY_BYTES), table=weighted_table(APPLIED_WEIGHTS))
    before = demo.measure("before apply", guest, tap, config, steered_by="the kernel", must_match=False)
    demo.qsteer(
        *("apply", "--vm", guest.name, "--source", "static", "--types", ",".join(format_hash_types(config.types))),
        *("--key", format_key(config.key), "--weight", ",".join(str(weight) for weight in APPLIED_WEIGHTS)),
    )
    demo.measure("apply", guest, tap, config, steered_by="qsteer")
    demo.expect_program(tap, "qsteer")
    demo.qsteer("off", "--vm", guest.name)
    demo.expect_program(tap, None)
    after = demo.measure("off", guest, tap, config, steered_by="the kernel", must_match=False)
    if after != before:
        raise DemoError("off: the kernel does not steer as it did before apply")


def run(demo: Demo) -> None:
    """Boot the guests side by side, then phase after phase.  Raises DemoError, GuestError, QsteerError."""
    user = ordinary_user()
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(provision.readable_by(user, demo.files))
        demo.say(f"booting three guests with QEMU {files.qemu_version}, two of them as {user}")
        qsteer_run = ("run", "--vm", "qsdemo", "--tap", f"id=net0,queues={QUEUES},ifname=qsdemo0", "--user", user, "--")
        demo.say(f"$ qsteer {' '.join(qsteer_run)} qemu-system-x86_64 ...")
        main = Guest(files, name="qsdemo", user=user, prefix=(sys.executable, "-m", "qsteer", *qsteer_run))

        tap = kernel.open_tap("qsdemo1", QUEUES)
        netdev = f"tap,id=net0,vhost=off,fds={':'.join(str(fd) for fd in tap.fds)}"
        software = Guest(
            files,
            name="qsdemo-software",
            user=user,
            prefix=as_user(user),
            arguments=_nic(netdev, rss="on"),
            pass_fds=tap.fds,
        )
        netdev = f"tap,id=net0,vhost=off,ifname=qsdemo2,queues={QUEUES},script=no,downscript=no"
        plain = Guest(files, name="qsdemo-plain", arguments=_nic(netdev, rss="off"))

        try:
            for guest in (main, software, plain):
                stack.enter_context(guest)
        finally:
            tap.close()  # QEMU has its own copies
        for guest, phases, name in (
            (main, main_guest, "qsdemo0"),
            (software, software_guest, "qsdemo1"),
            (plain, plain_guest, "qsdemo2"),
        ):
            guest.wait_ready()
            demo.say(f"{guest.name}: ready, Linux {guest.run('uname -r')}")
            phases(demo, guest, name)


def _nic(netdev: str, *, rss: str) -> tuple[str, ...]:
    device = f"virtio-net-pci,netdev=net0,mq=on,vectors={2 * QUEUES + 2},rss={rss}"
    return "-netdev", netdev, "-device", device


def show(demo: Demo) -> None:
    """The table at the end: flows per queue are expected/counted."""
    queues = (f"QUEUE {queue}" for queue in range(QUEUES))
    columns = ("PHASE", "STEERED BY", "FLOWS", "MISMATCHES", "RIGHT BY HOST", *queues, "RESULT")
    rows = [
        (
            *(phase.name, phase.steered_by, str(phase.verdict.flows), str(phase.verdict.mismatches)),
            f"{phase.right_on_host} ({100 * phase.right_on_host // phase.verdict.flows} %)",
            *(f"{queue.expected}/{queue.counted}" for queue in phase.verdict.queues),
            ("ok" if phase.must_match else "for comparison") if phase.holds else f"FAILED, {phase.verdict.lost} lost",
        )
        for phase in demo.phases
    ]
    widths = [max(len(row[column]) for row in (columns, *rows)) for column in range(len(columns))]
    print()
    for row in (columns, *rows):
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    print("QUEUE: flows expected/counted.  RIGHT BY HOST: flows that needed no second move inside QEMU.\n", flush=True)


def write_report(demo: Demo) -> None:
    """build/demo.json."""
    phases = [
        {
            "name": phase.name,
            "steered_by": phase.steered_by,
            "holds": phase.holds,
            "right_on_host": phase.right_on_host,
            "seconds": round(phase.took_s, 3),
            **dataclasses.asdict(phase.verdict),
        }
        for phase in demo.phases
    ]
    REPORT.write_text(json.dumps({"phases": phases, "qemu": demo.qemu}, indent=2) + "\n")


def main() -> int:
    if os.geteuid() != 0:
        print("demo: only root may make taps and load BPF programs: sudo make demo", file=sys.stderr)
        return 1
    try:
        demo = Demo(provision.provision())
    except ProvisionError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    failure = ""
    try:
        run(demo)
    except (DemoError, GuestError, QsteerError, subprocess.TimeoutExpired) as error:
        failure = str(error)
    except KeyboardInterrupt:
        failure = "interrupted"
    show(demo)
    write_report(demo)
    if not failure and not all(phase.holds for phase in demo.phases):
        failure = f"does not hold: {', '.join(phase.name for phase in demo.phases if not phase.holds)}"
    if failure:
        print(f"demo: {failure}", file=sys.stderr)
        return 1
    demo.say(f"every phase holds; figures in {REPORT.relative_to(CHECKOUT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
