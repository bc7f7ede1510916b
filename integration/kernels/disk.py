# SPDX-License-Identifier: BSD-2-Clause
"""What a run reads much of, as a disk image: checkout, virtual environment, Python's library.

Over 9p nothing is cached, and each page of a QEMU that is loaded takes milliseconds where all is emulated.  The image
lies over the same paths in the guest (``cover``), so nothing there knows of it.
"""

import compileall
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from integration.apt import run
from integration.provision import CHECKOUT, link_or_copy

_MOUNT, _SHARED, _MODULES = Path("/run/qsteer-disk"), Path("/run/qsteer-shared"), Path("/run/qsteer-modules")
_DEVICE = "/dev/vda"
_PATHS = "paths.json"
_NOT_OF_THE_CHECKOUT = (".git", "build/ci", "build/kernels", "build/bench.json")
_NOT_OF_THE_LIBRARY = ("test", "site-packages", "dist-packages", "idlelib", "ensurepip", "tkinter", "turtledemo")
_ROOM = 64 << 20


def make(image: Path, *, empty: Path) -> None:
    """Write the image anew.  ``empty`` is a folder that has to be there in the guest.  Raises ProvisionError."""
    covered: dict[Path, Sequence[str]] = {CHECKOUT: _NOT_OF_THE_CHECKOUT}
    if not Path(sys.prefix).is_relative_to(CHECKOUT):
        covered[Path(sys.prefix)] = ()
    covered[Path(sysconfig.get_path("stdlib"))] = _NOT_OF_THE_LIBRARY
    image.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=image.parent, prefix="disk-") as name:
        stage = Path(name)
        for number, (path, without) in enumerate(covered.items()):
            kept_out = frozenset(path / part for part in without)
            shutil.copytree(
                path, stage / str(number), symlinks=True, ignore=_ignoring(kept_out), copy_function=link_or_copy
            )
        if empty.is_relative_to(CHECKOUT):
            (stage / "0" / empty.relative_to(CHECKOUT)).mkdir(parents=True)
        compileall.compile_dir(stage / "0" / "qsteer", quiet=1)
        compileall.compile_dir(stage / "0" / "tests", quiet=1)
        (stage / _PATHS).write_text(json.dumps([str(path) for path in covered]))
        size = sum(entry.lstat().st_size + 4096 for entry in stage.rglob("*"))
        image.unlink(missing_ok=True)
        features = ("-O", "^has_journal", "-E", "root_owner=0:0", "-m", "0")
        run("mke2fs", "-q", "-t", "ext4", *features, "-d", stage, image, f"{(size + _ROOM) * 11 // 10 >> 10}k")


def _ignoring(paths: Iterable[Path]) -> Callable[[str, list[str]], set[str]]:
    left_out = frozenset(paths)
    return lambda folder, names: {name for name in names if Path(folder, name) in left_out}


def qemu_options(image: Path) -> str:
    """What gives the guest the disk."""
    return f"-drive if=none,id=qsteer,format=raw,readonly=on,file={image} -device virtio-blk-pci,drive=qsteer"


def cover(shared: Path) -> None:
    """In the guest: put the disk over the paths that it has; ``shared`` and the kernel's modules stay what they are."""
    subprocess.run(("modprobe", "--all", "virtio_blk", "ext4"), check=True)
    modules = Path("/lib/modules", os.uname().release)  # virtme-ng's link, to where the kernel is unpacked
    _mount("-o", "ro", _DEVICE, _made(_MOUNT))
    _mount("--bind", shared, _made(_SHARED))
    _mount("--bind", modules.resolve(), _made(_MODULES))
    for number, path in enumerate(json.loads((_MOUNT / _PATHS).read_text())):
        _mount("--bind", _MOUNT / str(number), path)
    _mount("--bind", _SHARED, shared)
    modules.unlink()
    modules.symlink_to(_MODULES)
    os.chdir(CHECKOUT)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _mount(*arguments: str | Path) -> None:
    subprocess.run(("mount", *arguments), check=True)
