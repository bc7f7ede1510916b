# SPDX-License-Identifier: BSD-2-Clause
"""Boot a stock kernel in QEMU and run a command under it, with the running system's user land (virtme-ng).

Theory of operation
-------------------
The kernel's package is unpacked under build/kernels, nothing is installed.  virtme-ng boots it with the machine's own
root directory, read-only over 9p, so that this checkout, its virtual environment and the unpacked QEMUs are there at
the same paths; what is written in the guest stays in its memory, but for one folder that it shares with us.
``inside.py`` runs there first, and leaves the command's output and exit status in that folder: virtme-ng's own console
can lose bytes, and its exit status says little.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from integration import apt, provision
from integration.apt import ProvisionError, say
from integration.guest import Guest, GuestError
from integration.kernels import disk, inside
from integration.kernels.table import Kernel
from integration.provision import BUILD, CHECKOUT, Provisioned

KERNEL_PACKAGE = "linux-image-amd64"
PACKAGES = ("busybox-static", "e2fsprogs", "kmod")
"""virtme-ng makes an initramfs of two of them."""
CPUS = 2
MEMORY = "4G"
KVM_TIMEOUT_S = 12.0
"""A guest under KVM is ready in one or two; where KVM does not work it may hang."""
_GOES_WITH_US = ("setpriv", "--pdeathsig", "KILL", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
"""All that virtme-ng starts is in a pid namespace that ends when we do, however we do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Image:
    """A kernel that is unpacked; ``release`` is what ``uname -r`` says under it, ``version`` the package's."""

    image: Path
    release: str
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a command under another kernel came to: its exit status (None: it did not end), and all that it printed."""

    status: int | None
    output: str


def unpacked(kernel: Kernel) -> Image:
    """The kernel under build/kernels, downloaded if it is not there yet.  Raises ProvisionError."""
    root = BUILD / "kernels" / kernel.name
    if not root.exists():
        say(f"downloading the kernel of {kernel.suite}")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
            private = apt.PrivateApt(Path(name), suite="" if kernel.suite == apt.codename() else kernel.suite)
            (package,) = private.dependencies(KERNEL_PACKAGE, r"linux-image-\d\S*")
            # Since Linux 7 the package has the image and the modules in two others.
            parts = private.dependencies(package, r"linux-(?:binary|modules)-\d\S*") or (package,)
            archives = private.fetch_only(*parts)
            partial = Path(name) / "kernel"
            apt.unpack(archives, partial)
            _as_virtme_ng_wants_it(partial)
            (partial / "version").write_text(version_of(archives[0]))
            partial.rename(root)
    image = next(root.glob("boot/vmlinuz-*"))
    return Image(
        image=image, release=image.name.removeprefix("vmlinuz-"), version=(root / "version").read_text().strip()
    )


def version_of(archive: Path) -> str:
    """The version of a package, out of the name that apt gave its file."""
    return archive.name.split("_")[1].replace("%3a", ":")


def _as_virtme_ng_wants_it(root: Path) -> None:
    """boot/vmlinuz-RELEASE and lib/modules/RELEASE, wherever the package has them."""
    for image in root.glob("usr/lib/modules/*/vmlinuz"):
        (root / "boot").mkdir(exist_ok=True)
        image.rename(root / "boot" / f"vmlinuz-{image.parent.name}")
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")


@functools.cache
def accelerator(files: Provisioned) -> str:
    """KVM where it works, else TCG; QSTEER_ACCEL says it without a try."""
    if chosen := os.environ.get("QSTEER_ACCEL"):
        return chosen
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    with Guest(files, name="qskvm", accel="kvm") as guest:
        try:
            guest.wait_ready(KVM_TIMEOUT_S)
        except GuestError:
            return "tcg"
    return "kvm"


def run(kernel: Kernel, command: Sequence[str], *, shared: Path, timeout_s: float, tun: Path | None = None) -> Outcome:
    """Run ``command`` as root in the checkout under ``kernel``; it may write to the folder ``shared``.

    ``tun`` is a module that is loaded in place of the kernel's own (``patched.module``).  What is printed is shown as
    it comes.  A virtual machine that does not end in time is killed.  Raises ProvisionError.
    """
    apt.install_packages(PACKAGES)
    files = provision.provision()
    image = unpacked(kernel)
    shared.mkdir(parents=True, exist_ok=True)
    output, status = shared / "output", shared / "status"
    output.write_bytes(b"")
    status.unlink(missing_ok=True)
    vng = Path(sys.executable).parent / "vng"
    if not vng.exists():
        raise ProvisionError(f"{vng} is missing (pip install virtme-ng)")
    files_image = BUILD / "kernels" / f"{kernel.name}.img"
    disk.make(files_image, empty=shared)
    if tun:  # the disk has nothing of build/kernels
        shutil.copy(tun, shared / inside.TUN)
    # Not on the kernel's command line, which ends after 2048 bytes.
    orders = inside.Orders(command=tuple(command), tun=bool(tun))
    (shared / inside.ORDERS).write_text(json.dumps(dataclasses.asdict(orders)))
    first = (sys.executable, "-m", "integration.kernels.inside", str(shared))
    argv = (
        *_GOES_WITH_US,
        *(str(vng), "--run", str(image.image), "--qemu", str(files.qemu)),
        *("--disable-microvm", "--force-9p", "--cpus", str(CPUS), "--memory", MEMORY, "--user", "root"),
        *("--rwdir", str(shared), "--cwd", str(CHECKOUT), f"--qemu-opts={disk.qemu_options(files_image)}"),
        *(() if accelerator(files) == "kvm" else ("--disable-kvm",)),
        *("--exec", shlex.join(first)),
    )
    path = f"{vng.parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
    with (
        (shared / "virtme-ng.log").open("wb") as log,
        subprocess.Popen(
            argv, env=os.environ | {"PATH": path}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            _follow(process, output, timeout_s)
        finally:
            process.kill()
            files_image.unlink(missing_ok=True)
    text = output.read_text(errors="replace")
    if not text and not status.exists():
        words = (shared / "virtme-ng.log").read_text(errors="replace").strip().splitlines()
        raise ProvisionError(f"Linux {image.release} does not boot: {' / '.join(words[-3:]) or 'it says nothing'}")
    return Outcome(status=int(status.read_text()) if status.exists() else None, output=text)


def _follow(process: subprocess.Popen[bytes], output: Path, timeout_s: float) -> None:
    """Show what is written into ``output`` until the process ends, or time is up."""
    deadline = time.monotonic() + timeout_s
    with output.open("rb") as written:
        while True:
            ended = process.poll() is not None or time.monotonic() > deadline
            if more := written.read():
                sys.stdout.buffer.write(more)
                sys.stdout.flush()
            if ended:
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
