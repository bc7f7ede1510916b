# SPDX-License-Identifier: BSD-2-Clause
"""Builds what is compiled: the extension module over c/shim.c, and the BPF objects of c/bpf/*.bpf.c.

Everything else about the package is in pyproject.toml.  CC and CLANG name other compilers.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

BPF_SOURCES = Path("c/bpf")
BPF_FLAGS = ("-target", "bpf", "-mcpu=v3", "-O2", "-g", "-Wall", "-Werror", f"-I{BPF_SOURCES}")

CC = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
CLANG = os.environ.get("CLANG") or "clang"

HEADERS = (("stdlib.h", "libc6-dev"), ("linux/bpf.h", "linux-libc-dev"), ("bpf/libbpf.h", "libbpf-dev"))
"""What the C sources include, and the Debian package that has it."""

COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
"""The commands that need a compiler; a source distribution does not."""


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def has_header(compiler: str, header: str) -> bool:
    command = (compiler, "-E", "-x", "c", "-include", header, os.devnull, "-o", os.devnull)
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def missing_tools() -> tuple[str, ...]:
    """What the build needs and this machine lacks, each with the Debian package that has it."""
    missing = [(tool, package) for tool, package in ((CLANG, "clang"), (CC, "gcc")) if not shutil.which(tool)]
    if compiler := shutil.which(CC) or shutil.which(CLANG):
        missing += [(header, package) for header, package in HEADERS if not has_header(compiler, header)]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        missing.append(("Python.h", "python3-dev"))
    return tuple(f"{what} (Debian package {package})" for what, package in missing)


def compile_bpf(source: Path, target: Path) -> None:
    """One BPF object with its BTF; the rest of the debugging information is dropped where llvm-strip is at hand."""
    # asm/ headers are in the directory of the machine's own architecture, where clang does not look for the BPF target.
    machine_headers = Path("/usr/include", sysconfig.get_config_var("MULTIARCH") or f"{platform.machine()}-linux-gnu")
    # BTF keeps the names of the sources: the same object comes out wherever the source tree is.
    reproducible = f"-fdebug-prefix-map={Path.cwd()}=."
    command = (CLANG, *BPF_FLAGS, f"-idirafter{machine_headers}", reproducible, "-c", str(source), "-o", str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    if subprocess.run(command, check=False).returncode:
        raise CompileError(f"{CLANG} failed on {source}")
    if strip := shutil.which(output_of(CLANG, "-print-prog-name=llvm-strip")):
        subprocess.run((strip, "-g", str(target)), check=True)


class BuildCompiled(build_ext):  # type: ignore[misc]
    """The extension module and the BPF objects, in the source tree for an editable install."""

    def run(self) -> None:
        package = Path("qsteer" if self.inplace else f"{self.build_lib}/qsteer")
        for source in sorted(BPF_SOURCES.glob("*.bpf.c")):
            compile_bpf(source, package / "bpf" / source.with_suffix(".o").name)
        self.force = True  # the time stamps that setuptools compares do not include headers
        super().run()


class BuildAfresh(build):  # type: ignore[misc]
    """A module or an object that is gone from the sources must not be packaged out of an earlier build."""

    def run(self) -> None:
        shutil.rmtree(Path(self.build_lib, "qsteer"), ignore_errors=True)
        super().run()


# Before setup(), so that the one line is not lost in the tale of what setuptools did until then.
if COMPILING & set(sys.argv) and (missing := missing_tools()):
    sys.exit(f"error: qsteer cannot be built without {', '.join(missing)}")

setup(
    cffi_modules=["qsteer/shim_build.py:ffi"],
    cmdclass={"build": BuildAfresh, "build_ext": BuildCompiled},
    options={"build": {"build_base": "build/setuptools"}},
)
