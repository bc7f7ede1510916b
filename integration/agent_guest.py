# SPDX-License-Identifier: BSD-2-Clause
"""A guest with the real QEMU guest agent in it, which a test starts and stops.

Debian's qemu-guest-agent and its libraries are unpacked under build/guest-agent.  What of them the guest needs is a
second cpio archive behind that of every guest: the kernel unpacks one after the other.  The agent runs with the loader
and the libraries that came with it, whatever the machine has; ``--library-path``, unlike a variable, is not passed on
to what the agent starts.
"""

import hashlib
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from integration import apt
from integration.apt import run, say
from integration.guest import Console
from integration.provision import BUILD, GUEST_SUITE, Provisioned

AGENT_PACKAGE = "qemu-guest-agent"

_LOADER = "lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu")
_AGENT = "/agent/ld.so --library-path /agent /agent/qemu-ga"
_MODULES = ("virtio_console", "llc", "stp", "garp", "mrp", "8021q")
"""The agent's port, and VLANs, whose interfaces have the NIC's address; what a module needs comes before it."""
_PIDFILE = "/tmp/qemu-ga.pid"


def with_agent(files: Provisioned) -> Provisioned:
    """The same with an initramfs that has the agent, too, made if it is not there yet.  Raises ProvisionError."""
    digest = hashlib.sha256(Path(__file__).read_bytes() + files.initramfs.name.encode()).hexdigest()[:12]
    archive = BUILD / f"agent-initramfs-{digest}.cpio"
    if not archive.exists():
        system = _agent_system()
        for old in BUILD.glob("agent-initramfs-*"):
            old.unlink()
        say("making the initramfs of the guest with an agent")
        with tempfile.TemporaryDirectory(dir=BUILD) as name:
            _collect(system, Path(name))
            partial = Path(f"{archive}.partial")
            shutil.copy(files.initramfs, partial)
            run("sh", "-c", f"find . | cpio --quiet -o -H newc -R 0:0 >> '{partial}'", cwd=Path(name))
        partial.rename(archive)
    return replace(files, initramfs=archive)


def _agent_system() -> Path:
    """The agent and all that it needs, unpacked side by side."""
    root = BUILD / "guest-agent"
    if root.exists():
        return root
    say(f"downloading {AGENT_PACKAGE} of {GUEST_SUITE} and what it needs")
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
        private = apt.PrivateApt(Path(name), suite="" if apt.codename() == GUEST_SUITE else GUEST_SUITE, alone=True)
        partial = Path(name) / "system"
        apt.unpack(private.fetch(AGENT_PACKAGE), partial)
        partial.rename(root)
    return root


def _collect(system: Path, root: Path) -> None:
    """What goes into the second archive: the agent and modules, in /agent."""
    agent = system / "usr/sbin/qemu-ga"
    loader = system / _LOADER
    path = ":".join(str(system / folder) for folder in _LIBRARIES)
    libraries = re.findall(r"=> (/\S+) \(0x", run(loader, "--library-path", path, "--list", agent))
    files = {"agent/qemu-ga": agent, "agent/ld.so": loader}
    for name in _MODULES:
        (module,) = (BUILD / "guest").rglob(f"{name}.ko")
        files[f"agent/{module.name}"] = module
    files |= {f"agent/{Path(library).name}": Path(library) for library in libraries}
    for target, source in files.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / target)
        (root / target).chmod(0o755)


def agent_arguments(socket: Path) -> tuple[str, ...]:
    """QEMU's, for an agent's port that is served at ``socket``."""
    return (
        *("-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={socket},server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
    )


def restart_agent(guest: Console, options: str = "") -> None:
    """The agent runs from now on, with these ``options``; not the one that may have run before."""
    stop_agent(guest)
    load = "; ".join(f"insmod /agent/{name}.ko" for name in _MODULES)
    guest.run(f"[ -e /dev/vport*p1 ] || {{ {load}; until [ -e /dev/vport*p1 ]; do usleep 10000; done; }}")
    guest.run(f"{_AGENT} --daemonize --path /dev/vport*p1 --statedir /tmp --pidfile {_PIDFILE} {options}")


def stop_agent(guest: Console) -> None:
    """No agent runs from now on."""
    # SIGKILL: qemu-ga 7.2 can deadlock in its handler of SIGTERM (glib's locks), above all when it has just begun.
    guest.run(f"[ ! -e {_PIDFILE} ] || while kill -9 $(cat {_PIDFILE}); do usleep 10000; done; rm -f {_PIDFILE}")
