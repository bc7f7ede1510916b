# SPDX-License-Identifier: BSD-2-Clause
"""What the integration tests and the demo need on a Debian 12 or 13, made once and kept under build/.

- Debian packages of a few tools, installed if missing;
- a guest: Debian's cloud kernel and an initramfs of busybox, ethtool, the virtio modules and guest/; all of it is
  unpacked, not installed;
- a QEMU of 9.0 or later that hands out its eBPF program (``request-ebpf``): the installed one if it will do, else one
  unpacked under build/qemu (see apt.py), which replaces nothing;
- for what must hold with every QEMU, one older than that and Debian unstable's, each unpacked likewise.

Standard library only, so that ``python3 integration/provision.py`` works before anything is installed.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the checkout is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from integration import apt
from integration.apt import ProvisionError, run, say

CHECKOUT = Path(__file__).resolve().parent.parent
BUILD = CHECKOUT / "build"
GUEST_SOURCES = Path(__file__).resolve().parent / "guest"

PACKAGES = ("cpio", "gcc", "kmod", "libc6-dev")
GUEST_SUITE = "bookworm"
"""Also on Debian 13: there the guest's kernel (6.12.107) tells ethtool one RSS key and the device another, shifted by a
byte (seen in QEMU's device state)."""
KERNEL_PACKAGE = "linux-image-cloud-amd64"
GUEST_PACKAGES = ("busybox-static", "ethtool")
QEMU_PACKAGE = "qemu-system-x86"
QEMU_COMMAND = "qemu-system-x86_64"
QEMU_OLDEST = (9, 0)
"""The first version with ``ebpf-rss-fds`` and ``request-ebpf``."""
QEMU_NEW = (11, 1)
"""The newest version that qsteer is known to go with; Debian unstable may be ahead of it."""
UNSTABLE = "sid"
GUEST_MODULES = ("virtio_pci", "virtio_net", "af_packet")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provisioned:
    """Files on this machine.  ``flowrx`` is the helper that the guest has too; it watches the host's side of a tap."""

    kernel: Path
    initramfs: Path
    qemu: Path
    qemu_version: str
    flowrx: Path


def provision() -> Provisioned:
    """Make what is not there yet.  Raises ProvisionError."""
    umask = os.umask(0o022)  # an unprivileged QEMU reads what is made here
    try:
        BUILD.mkdir(exist_ok=True)
        apt.install_packages(PACKAGES)
        system = _guest_system()
        flowrx = _flowrx()
        qemu = _qemu()
        return Provisioned(
            kernel=_image(system),
            initramfs=_initramfs(system, flowrx),
            qemu=qemu,
            qemu_version=_identity(qemu).version_text,
            flowrx=flowrx,
        )
    finally:
        os.umask(umask)


def with_qemu(files: Provisioned, qemu: Path) -> Provisioned:
    """The same guest for another QEMU.  Raises ProvisionError."""
    return replace(files, qemu=qemu, qemu_version=_identity(qemu).version_text)


def provision_old_qemu() -> Path:
    """A QEMU older than 9.0, for the refusal of such: the installed one, or Debian 12's.  Raises ProvisionError."""
    installed = _installed_qemu()
    if installed and _identity(installed).version < QEMU_OLDEST:
        return installed
    wrapper = BUILD / "qemu-old" / QEMU_COMMAND
    if _works(wrapper):
        return wrapper
    apt.refresh_lists(QEMU_PACKAGE)
    old_enough = upstream(apt.candidate(QEMU_PACKAGE)) < QEMU_OLDEST
    return _unpack_qemu(wrapper, suite="" if old_enough else GUEST_SUITE)


def provision_new_qemu() -> Path:
    """A QEMU of 11.1 or later: the installed one, or Debian unstable's.  Raises ProvisionError."""
    installed = _installed_qemu()
    if installed and _identity(installed).version >= QEMU_NEW:
        return installed
    wrapper = BUILD / "qemu-new" / QEMU_COMMAND
    if _works(wrapper):
        return wrapper
    apt.refresh_lists(QEMU_PACKAGE)
    return _unpack_qemu(wrapper, suite=UNSTABLE)


@contextlib.contextmanager
def readable_by(user: str, files: Provisioned) -> Iterator[Provisioned]:
    """The same files where ``user`` can read them: as they are, or linked into a folder that goes away at the end.

    A checkout under /root, say, is closed to an ordinary user.
    """

    def closed(path: Path) -> bool:
        return bool(subprocess.run(["setpriv", "--reuid", user, "--clear-groups", "test", "-r", path]).returncode)

    if not any(closed(path) for path in (files.kernel, files.initramfs, files.qemu)):
        yield files
        return
    with tempfile.TemporaryDirectory(prefix="qsteer-", dir="/var/tmp") as name:
        stage = Path(name)
        stage.chmod(0o755)
        qemu = files.qemu
        if qemu.is_relative_to(BUILD):
            shutil.copytree(qemu.parent, stage / "qemu", symlinks=True, copy_function=link_or_copy)
            qemu = stage / "qemu" / qemu.name
        kernel = link_or_copy(files.kernel, stage / "kernel")
        initramfs = link_or_copy(files.initramfs, stage / "initramfs")
        yield replace(files, kernel=kernel, initramfs=initramfs, qemu=qemu)


def link_or_copy(source: str | Path, target: str | Path, *, follow_symlinks: bool = False) -> Path:
    """The same file under another name, or a copy of it on another file system; in ``shutil``'s manner."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # another file system
        shutil.copy2(source, target, follow_symlinks=False)
    return Path(target)


# The guest


def _guest_system() -> Path:
    """The guest's kernel, busybox and ethtool, unpacked side by side."""
    root = BUILD / "guest"
    if root.exists():
        return root
    say(f"downloading the guest: {KERNEL_PACKAGE}, {', '.join(GUEST_PACKAGES)} of {GUEST_SUITE}")
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
        private = apt.PrivateApt(Path(name), suite="" if apt.codename() == GUEST_SUITE else GUEST_SUITE)
        (kernel,) = private.dependencies(KERNEL_PACKAGE, r"linux-image-\d\S*")
        partial = Path(name) / "guest"
        apt.unpack(private.fetch_only(kernel, *GUEST_PACKAGES), partial)
        partial.rename(root)
    return root


def _flowrx() -> Path:
    source = GUEST_SOURCES / "flowrx.c"
    binary = BUILD / f"flowrx-{_digest(source)}"
    if not binary.exists():
        partial = binary.with_suffix(".partial")
        run("gcc", "-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o", partial, source)
        _replace(partial, binary, others="flowrx-*")
    return binary


def _initramfs(system: Path, flowrx: Path) -> Path:
    """Named after what is in it, so that a change makes a new one."""
    kernel = _image(system)
    archive = BUILD / f"initramfs-{_digest(GUEST_SOURCES / 'init', Path(__file__), kernel, flowrx)}.cpio"
    if archive.exists():
        return archive
    say("making the guest's initramfs")
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        root = Path(name)
        for folder in ("bin", "dev", "modules", "proc", "sys", "tmp"):
            (root / folder).mkdir()
        ethtool = next(system.glob("**/sbin/ethtool"))
        files = {"init": GUEST_SOURCES / "init", "bin/busybox": next(system.glob("**/bin/busybox"))}
        files |= {"bin/ethtool": ethtool, "bin/flowrx": flowrx}
        libraries = re.findall(r"(/\S+) \(0x", run("ldd", ethtool))
        files |= {library.lstrip("/"): Path(library) for library in libraries}
        modules = _modules(system)
        files |= {f"modules/{module.name}": module for module in modules}
        for target, source in files.items():
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, root / target)
            (root / target).chmod(0o755)
        (root / "modules" / "order").write_text("".join(f"{module.name}\n" for module in modules))
        run("sh", "-c", f"find . | cpio --quiet -o -H newc -R 0:0 > '{archive}.partial'", cwd=root)
    _replace(Path(f"{archive}.partial"), archive, others="initramfs-*")
    return archive


def _image(system: Path) -> Path:
    return next(system.glob("boot/vmlinuz-*"))


def _replace(partial: Path, final: Path, *, others: str) -> None:
    """Give a file that is complete its name, and take its predecessors away."""
    for old in BUILD.glob(others):
        if old != partial:
            old.unlink()
    partial.rename(final)


def _tool(name: str) -> Path:
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if not path:
        raise ProvisionError(f"{name} is not on this machine, although its package is installed")
    return Path(path)


def _modules(system: Path) -> tuple[Path, ...]:
    """GUEST_MODULES and what they need, in the order of loading; what the kernel has built in is left out."""
    by_name = {path.stem.replace("-", "_"): path for path in system.rglob("*.ko")}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        path = by_name.get(name)
        if path is None or name in ordered:
            return
        for needed in run(_tool("modinfo"), "-F", "depends", path).strip().split(","):
            add(needed)
        ordered[name] = path

    for name in GUEST_MODULES:
        add(name)
    return tuple(ordered.values())


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


# QEMU


@dataclass(frozen=True, slots=True, kw_only=True)
class _Identity:
    version: tuple[int, ...]
    version_text: str
    has_ebpf: bool

    @property
    def suits(self) -> bool:
        return self.version >= QEMU_OLDEST and self.has_ebpf


def _qemu() -> Path:
    installed = _installed_qemu()
    if installed and _identity(installed).suits:
        return installed
    wrapper = BUILD / "qemu" / QEMU_COMMAND
    if _works(wrapper):
        return wrapper
    apt.refresh_lists(QEMU_PACKAGE)
    available = apt.candidate(QEMU_PACKAGE)
    new_enough = upstream(available) >= QEMU_OLDEST
    if not installed and new_enough and os.geteuid() == 0:
        apt.install_packages((QEMU_PACKAGE,))
        return _tool(QEMU_COMMAND)
    has = f"{installed} is {_identity(installed).version_text}" if installed else f"the distribution has {available}"
    suite = "" if new_enough else f"{apt.codename()}-backports"
    say(f"QEMU 9.0 or later is needed, {has}: unpacking one from {suite or apt.codename()} under {wrapper.parent},")
    say("which takes some 100 MB there and changes neither the installed packages nor apt's sources")
    _ask("go on?")
    return _unpack_qemu(wrapper, suite=suite)


def _ask(question: str) -> None:
    """Raise ProvisionError on a no; YES=1 answers, and so does an input that is no terminal."""
    if os.environ.get("YES", "") in ("", "0") and sys.stdin.isatty():
        answer = input(f"provision: {question} [Y/n] ").strip().lower()
        if answer not in ("", "y", "yes"):
            raise ProvisionError("nothing was changed")


def _installed_qemu() -> Path | None:
    found = shutil.which(QEMU_COMMAND)
    return Path(found) if found else None


def _works(wrapper: Path) -> bool:
    """Whether an unpacked QEMU starts: libraries that the system had when it was unpacked may have gone."""
    return wrapper.exists() and not subprocess.run([wrapper, "--version"], capture_output=True).returncode


def upstream(debian_version: str) -> tuple[int, ...]:
    """``1:10.0.2+ds-2`` as (10, 0, 2)."""
    found = re.match(r"(?:\d+:)?(\d+(?:\.\d+)*)", debian_version)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


# exec: the pid that was started is QEMU's.  Debian's QEMU looks for firmware under /usr by absolute path.
_WRAPPER = f"""#!/bin/sh
# SPDX-License-Identifier: BSD-2-Clause
# An unpacked QEMU with the libraries and the firmware that came with it.
root=$(dirname -- "$0")/root
export LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu:$root/lib/x86_64-linux-gnu"
export QEMU_MODULE_DIR="$root/usr/lib/x86_64-linux-gnu/qemu"
exec "$root/usr/bin/{QEMU_COMMAND}" \\
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
"""

# Its loader is the program that runs; -a is for whoever reads the command line.
_WRAPPER_OWN_LIBC = f"""#!/bin/bash
# SPDX-License-Identifier: BSD-2-Clause
# An unpacked QEMU with the libraries, the C library included, and the firmware that came with it.
root=$(dirname -- "$0")/root
libraries=$root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libraries/qemu"
exec -a "$0" "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/bin/{QEMU_COMMAND}" \\
    -L "$root/usr/share/qemu" -L "$root/usr/share/seabios" -L "$root/usr/lib/ipxe/qemu" "$@"
"""


def _unpack_qemu(wrapper: Path, *, suite: str) -> Path:
    home = wrapper.parent
    shutil.rmtree(home, ignore_errors=True)
    # What another release has does not fit the installed packages.  An older one gets along with the machine's C
    # library, which is the loader's; a newer one brings its own.
    foreign = suite in (GUEST_SUITE, UNSTABLE)
    own_libc = suite == UNSTABLE
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
        archives = apt.PrivateApt(Path(name), suite=suite, alone=foreign).fetch(QEMU_PACKAGE)
        apt.unpack([path for path in archives if own_libc or not path.name.startswith("libc6_")], home / "root")
    wrapper.write_text(_WRAPPER_OWN_LIBC if own_libc else _WRAPPER)
    wrapper.chmod(0o755)
    if not _works(wrapper):
        raise ProvisionError(f"the unpacked QEMU does not start: {run(wrapper, '--version')}")
    return wrapper


@functools.cache
def _identity(qemu: Path) -> _Identity:
    """What a QEMU says of itself over QMP; ``request-ebpf`` answers only where it is built with libbpf."""
    orders = (
        {"execute": "qmp_capabilities"},
        {"execute": "request-ebpf", "arguments": {"id": "rss"}},
        {"execute": "quit"},
    )
    argv = [str(qemu), "-machine", "none", "-nodefaults", "-display", "none", "-S", "-qmp", "stdio"]
    text = "\n".join(json.dumps(order) for order in orders)
    try:
        done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        greeting = answers[0]["QMP"]["version"]["qemu"]
    except (OSError, subprocess.TimeoutExpired, ValueError, LookupError) as error:
        raise ProvisionError(f"{qemu} does not answer over QMP: {error}") from None
    version = (greeting["major"], greeting["minor"], greeting["micro"])
    return _Identity(
        version=version,
        version_text=".".join(str(part) for part in version),
        has_ebpf=any("object" in answer.get("return", {}) for answer in answers),
    )


def main() -> int:
    try:
        files = provision()
    except ProvisionError as error:
        print(f"provision: {error}", file=sys.stderr)
        return 1
    say(f"ready: QEMU {files.qemu_version} ({files.qemu}), guest {files.kernel.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
