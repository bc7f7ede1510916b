# SPDX-License-Identifier: BSD-2-Clause
"""A tun.ko that hashes as virtio has it, for a stock kernel: Debian's own source of tun with tun/ applied.

Theory of operation
-------------------
The kernel stays what its package has; only the module is another.  Its source comes from the package of the kernel's
sources, of which one file is wanted, and is compiled with the packages of the headers, which are there for just that:
they have kbuild's programs, and a vmlinux that is nothing but the kernel's BTF, on which pahole builds the module's.
All of it is unpacked under build/kernels once for each kernel (``_tree``), and a module is made once for each
generation of the interface and each state of tun/ (``module``).  Nothing has its name before it is complete.
"""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from integration import apt
from integration.apt import ProvisionError, run, say
from integration.kernels import boot
from integration.kernels.boot import Image
from integration.kernels.table import Kernel
from integration.provision import BUILD

SOURCES = Path(__file__).resolve().parent / "tun"
GENERATIONS: Mapping[str, int] = {"4": 4, "8": 8, "11": 11, "12": 12, "decoy": 0}
"""What tun/ is told.  8 is what 5 to 9 are; the decoy has something else behind the same numbers."""
HEADERS_PACKAGE = "linux-headers-amd64"
PACKAGES = ("binutils", "make", "pahole", "patch", "xz-utils")
_TUN = "drivers/net/tun.c"


def module(kernel: Kernel, generation: str) -> Path:
    """The module for ``kernel`` with a generation of GENERATIONS, made if it is not there yet.  Raises ProvisionError.

    ``boot.run`` takes it.  Calls may run beside each other.
    """
    image = boot.unpacked(kernel)
    home = BUILD / "kernels" / f"{kernel.name}-tun"
    made = home / f"{generation}-{_digest(image.version)}"
    if not made.exists():
        home.mkdir(parents=True, exist_ok=True)
        tree = _tree(kernel, image, home)
        apt.install_packages((*PACKAGES, _compiler(tree)))
        say(f"making tun.ko, generation {generation}, for Linux {image.release}")
        with tempfile.TemporaryDirectory(dir=home, prefix="make-") as name:
            partial = Path(name) / "made"
            partial.mkdir()
            shutil.move(_made(tree, Path(name), GENERATIONS[generation]), partial)
            _give_name(partial, made)
    return made / "tun.ko"


def _digest(version: str) -> str:
    digest = hashlib.sha256(version.encode())
    for path in (Path(__file__), *sorted(SOURCES.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _give_name(partial: Path, final: Path) -> None:
    """Of several that made the same the first one wins."""
    try:
        partial.rename(final)
    except OSError:
        if not final.exists():
            raise


def _tree(kernel: Kernel, image: Image, home: Path) -> Path:
    """Headers, kbuild and tun's source, of the very package that the kernel is of.  Raises ProvisionError."""
    tree = home / f"tree-{image.version}"
    if tree.exists():
        return tree
    say(f"downloading headers and sources of Linux {image.release}")
    apt.install_packages(("xz-utils",))
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
        private = apt.PrivateApt(Path(name), suite="" if kernel.suite == apt.codename() else kernel.suite)
        headers = private.dependencies(HEADERS_PACKAGE, r"linux-headers-\d\S*")
        if headers != (f"linux-headers-{image.release}",):
            raise _too_old(kernel, image, " ".join(headers).removeprefix("linux-headers-"))
        parts = private.dependencies(*headers, r"linux-(?:headers|kbuild)-\d\S*")
        source = "linux-source-" + ".".join(image.release.split(".")[:2])
        archives = private.fetch_only(*headers, *parts, source)
        for archive in archives:
            if (version := boot.version_of(archive)) != image.version:
                raise _too_old(kernel, image, f"{archive.name.partition('_')[0]} {version}")
        partial = Path(name) / "tree"
        apt.unpack([archive for archive in archives if not archive.name.startswith(source)], partial)
        _as_kbuild_finds_it(partial)
        _extract(archives, source, partial)
        _give_name(partial, tree)
    return tree


def _too_old(kernel: Kernel, image: Image, there: str) -> ProvisionError:
    unpacked = BUILD / "kernels" / kernel.name
    return ProvisionError(f"Linux {image.version} is unpacked, {kernel.suite} has {there} by now: remove {unpacked}")


def _as_kbuild_finds_it(tree: Path) -> None:
    """The headers' Makefile includes another one by an absolute path; make runs beside it."""
    for path in tree.glob("usr/src/linux-headers-*/Makefile"):
        text = path.read_text()
        if text.startswith("include /usr/src/"):
            path.write_text(text.replace("/usr/src/", "../", 1))


def _extract(archives: Sequence[Path], source: str, tree: Path) -> None:
    """Out of the archive of all sources the one file, and no more of it is read than that takes."""
    (archive,) = (archive for archive in archives if archive.name.startswith(source))
    inner, outer = f"./usr/src/{source}.tar.xz", f"{source}/{_TUN}"
    steps = (
        f"dpkg --fsys-tarfile '{archive}'",
        f"tar --extract --to-stdout --occurrence '{inner}'",
        f"tar --extract --xz --occurrence --strip-components=3 --directory '{tree}' '{outer}'",
    )
    run("sh", "-c", " | ".join(steps))


def _headers(tree: Path) -> Path:
    """Where make runs: the headers that have a configuration."""
    return next(tree.glob("usr/src/linux-headers-*/.config")).parent


def _compiler(tree: Path) -> str:
    """The package of the compiler that the kernel was made with: ``gcc-12``."""
    text = (_headers(tree) / ".kernelvariables").read_text()
    found = re.search(r"\bgcc-\d+\b", text)
    if not found:
        raise ProvisionError(f"{_headers(tree)} names no compiler")
    return found[0]


def _made(tree: Path, folder: Path, generation: int) -> Path:
    """Compile in ``folder``.  Raises ProvisionError."""
    for path in (tree / Path(_TUN).name, *SOURCES.iterdir()):
        shutil.copy(path, folder)
    run("patch", "--quiet", "--strip=3", "--input=tun.patch", cwd=folder)
    # Not with what a make, or a user's shell, has in its environment for other programs.
    clean = ("env", "-i", f"PATH={os.environ['PATH']}:/usr/sbin:/sbin", "LC_ALL=C.UTF-8", "make", "--silent")
    run(*clean, "-C", _headers(tree), f"M={folder}", f"TUN_HASH_GENERATION={generation}", "modules")
    made = folder / "tun.ko"
    if ".BTF" not in run("readelf", "--sections", "--wide", made):
        raise ProvisionError(f"the tun.ko made for {_headers(tree).name} has no BTF")
    return made
