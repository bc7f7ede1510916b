# SPDX-License-Identifier: BSD-2-Clause
"""A host with libvirt, for as long as a test takes: a real libvirtd and real guests, beside whatever the machine has.

Theory of operation
-------------------
libvirt's packages are unpacked under build/libvirt, not installed.  A test lives in a mount namespace in which they lie
over /usr, /etc and /var (overlayfs), with an empty /run: its own libvirtd finds all of its files where it looks for
them, and so does a qsteer that the test runs, libvirt's status files among them.  What is written goes into memory, and
is gone with the namespace.  There is no systemd and no journal; a socket in the journal's place keeps what is said.

``another_host`` is a second one beside it, to migrate to: same kernel and network namespace, other files.
"""

import contextlib
import json
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from integration import apt
from integration.apt import run, say
from integration.guest import KERNEL_ARGUMENTS, VCPUS, Console, GuestError
from integration.provision import BUILD, CHECKOUT, QEMU_OLDEST, QEMU_PACKAGE, Provisioned, upstream
from tests.kernel import private, support

USER = "libvirt-qemu"
UID = 64055
"""As Debian's package numbers it."""
PACKAGES = ("libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu")
QEMU = Path("/usr/bin/qemu-system-x86_64")
JOURNAL = Path("/run/systemd/journal/socket")
WAIT_S = support.patience(60)

_QEMU_CONF = f"""
user = "{USER}"
group = "{USER}"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""
_OVERLAID = ("etc", "var/lib", "var/log", "var/cache")
_LEFT_OUT = ("systemd_", "systemd-", "libpam-systemd_", "libnss-systemd_", "udev_")
"""Packages that libvirt's depend on, and that nothing here runs."""


def provision_libvirt() -> Path:
    """libvirt's packages and QEMU's of the same release, unpacked side by side.  Raises ProvisionError."""
    root = BUILD / "libvirt"
    if root.exists():
        return root
    apt.refresh_lists(QEMU_PACKAGE)
    suite = "" if upstream(apt.candidate(QEMU_PACKAGE)) >= QEMU_OLDEST else f"{apt.codename()}-backports"
    say(f"downloading libvirt of {suite or apt.codename()}")
    with tempfile.TemporaryDirectory(dir=BUILD, prefix="apt-") as name:
        packages = apt.PrivateApt(Path(name), suite=suite).fetch(*PACKAGES, QEMU_PACKAGE)
        partial = Path(name) / "root"
        apt.unpack([path for path in packages if not path.name.startswith(_LEFT_OUT)], partial)
        # The machine's /lib and /bin are links into /usr, and what is unpacked has both.
        for folder in ("lib", "lib64", "bin", "sbin"):
            if (partial / folder).exists():
                run("cp", "-a", f"{partial / folder}/.", partial / "usr" / folder)
                shutil.rmtree(partial / folder)
        partial.rename(root)
    return root


@contextlib.contextmanager
def host(root: Path) -> Iterator["Journal"]:
    """Live on a host that has libvirt; children do, too.  Gives what is said to its journal."""
    # The directory outlives the namespace, which its contents are mounted in.
    with tempfile.TemporaryDirectory(prefix="qslv-") as memory, private.memory():
        _lay_over(root, Path(memory))
        with Journal(Path(memory, "journal")) as journal:
            yield journal


@contextlib.contextmanager
def another_host(root: Path) -> Iterator[tuple[int, "Journal"]]:
    """A process that lives on a host of its own, and what is said to that one's journal."""
    command = (sys.executable, "-m", __name__, str(root))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT) as holder:
        try:
            assert holder.stdout
            journal = Path(holder.stdout.readline().strip())
            yield holder.pid, Journal(Path(f"/proc/{holder.pid}/root{journal}"))
        finally:
            holder.communicate(timeout=WAIT_S)


def _lay_over(root: Path, memory: Path) -> None:
    private.mount("-t", "tmpfs", "-o", "mode=755", "qsteer", str(memory))
    private.mount("-t", "overlay", "-o", f"lowerdir={root}/usr:/usr", "overlay", "/usr")
    for number, folder in enumerate(_OVERLAID):
        upper, work = memory / f"upper{number}", memory / f"work{number}"
        upper.mkdir()
        work.mkdir()
        lower = f"{root}/{folder}:/{folder}" if (root / folder).exists() else f"/{folder}"
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        private.mount("-t", "overlay", "-o", options, "overlay", f"/{folder}")
    if Path("/dev/kvm").exists():
        # One that works for root alone has libvirt look at QEMU anew, for seconds, at each start.
        (memory / "no-kvm").touch(mode=0o600)
        private.mount("--bind", str(memory / "no-kvm"), "/dev/kvm")
    private.mount("-t", "tmpfs", "-o", "mode=755", "qsteer", "/run")
    for made in ("libvirt", "lock", "qsteer", "systemd/journal"):
        Path("/run", made).mkdir(parents=True)
    with Path("/etc/libvirt/qemu.conf").open("a") as file:
        file.write(_QEMU_CONF)
    with contextlib.suppress(KeyError):
        pwd.getpwnam(USER)
        return
    with Path("/etc/passwd").open("a") as file:
        file.write(f"{USER}:x:{UID}:{UID}::/var/lib/libvirt:/usr/sbin/nologin\n")
    with Path("/etc/group").open("a") as file:
        file.write(f"{USER}:x:{UID}:\n")


_JOURNAL = """
import json, socket, sys
path, file = sys.argv[1:]
with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken, open(file, "w", buffering=1) as kept:
    taken.bind(path)
    print(flush=True)
    while True:
        lines = taken.recv(1 << 18).decode(errors="replace").splitlines()
        print(json.dumps(dict(line.split("=", 1) for line in lines if "=" in line)), file=kept)
"""


class Journal:
    """What stands in for systemd's journal: it takes datagrams of the native protocol, and keeps them.

    In a process of its own, which reads always: libvirtd logs there, too, and would wait.
    """

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> Self:
        command = (sys.executable, "-c", _JOURNAL, str(JOURNAL), str(self._file))
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout and self._process.stdout.readline()
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.communicate()

    @property
    def file(self) -> Path:
        """Where it keeps all."""
        return self._file

    def entries(self, domain: str) -> list[dict[str, str]]:
        """All about a domain so far, each with its fields."""
        found = map(json.loads, self._file.read_text().splitlines())
        return [entry for entry in found if entry.get("QSTEER_DOMAIN") == domain]

    def text(self, domain: str) -> str:
        """The messages about a domain, a line each."""
        return "\n".join(entry["MESSAGE"] for entry in self.entries(domain))


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """A NIC of a domain.  Without a ``tap`` libvirt names it; ``rss`` None leaves the attribute out."""

    mac: str
    tap: str = ""
    queues: int = 4
    rss: bool | None = False

    def xml(self) -> str:
        """The interface element."""
        rss = "" if self.rss is None else f" rss='{'on' if self.rss else 'off'}'"
        target = f"<target dev='{self.tap}'/>" if self.tap else ""
        return (
            f"<interface type='ethernet'><mac address='{self.mac}'/>{target}<model type='virtio'/>"
            f"<driver name='qemu' queues='{self.queues}'{rss}/><rom enabled='no'/></interface>"
        )


class Libvirtd:
    """A libvirtd; a context manager that starts it, and ends it with its guests.

    ``holder`` is the process in whose mount namespace it lives, None is this one's.
    """

    def __init__(self, holder: int | None = None) -> None:
        self._prefix = () if holder is None else ("nsenter", f"--mount=/proc/{holder}/ns/mnt", "--wd=/", "--")
        self.root = Path("/" if holder is None else f"/proc/{holder}/root")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="qslvd-"))
        self.folder.chmod(0o1777)  # for the sockets of migrations, too
        config = f'unix_sock_dir = "{self.folder}"\nhost_uuid = "{uuid.uuid4()}"\nauth_unix_rw = "none"\n'
        (self.folder / "libvirtd.conf").write_text(config)
        try:
            self.start()
        except BaseException:
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        for path in self.root.glob("run/libvirt/qemu/*.pid"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
                pid = int(path.read_text())
                if b"qemu" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
        if error is None:
            shutil.rmtree(self.folder)
        else:
            print(f"libvirtd: its log is kept in {self.folder}", file=sys.stderr)

    @property
    def uri(self) -> str:
        """Where virsh finds it, from any mount namespace."""
        return f"qemu+unix:///system?socket={self.folder}/libvirt-sock"

    def start(self) -> None:
        """Until it answers."""
        with (self.folder / "log").open("ab") as log:
            command = (*self._prefix, "libvirtd", "--config", str(self.folder / "libvirtd.conf"))
            self._process = process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        support.wait_until("libvirtd", lambda: (self.folder / "libvirt-sock").is_socket() or process.poll())
        self.virsh("list")

    def stop(self) -> None:
        """End it; its guests go on."""
        if self._process:
            self._process.terminate()
            self._process.wait(WAIT_S)
            self._process = None

    def run(self, *command: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command on this host."""
        done = subprocess.run(
            (*self._prefix, *command), input=stdin, capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        if check and done.returncode:
            raise GuestError(f"{shlex.join(command)}: exit status {done.returncode}: {done.stderr.strip()}")
        return done

    def virsh(self, *arguments: str, check: bool = True, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """virsh(1).  Raises GuestError unless it succeeds, or ``check`` is false."""
        return self.run("virsh", "--quiet", "--connect", self.uri, *arguments, check=check, stdin=stdin)

    def file(self, text: str, name: str) -> str:
        """A file for virsh to read."""
        path = self.folder / name
        path.write_text(text)
        return str(path)


class Domain(Console):
    """A guest of libvirt's; a context manager that defines it, and undefines it.  ``boot`` starts it.

    ``metadata`` is XML for the element of that name, ``emulator`` the QEMU, ``extra`` XML for the domain.
    """

    def __init__(
        self,
        libvirtd: Libvirtd,
        files: Provisioned,
        *,
        name: str,
        nics: Sequence[Nic],
        metadata: str = "",
        emulator: Path = QEMU,
        extra: str = "",
    ) -> None:
        super().__init__(name)
        self.libvirtd = libvirtd
        self._files, self._nics, self._metadata = files, nics, metadata
        self._emulator, self._extra = emulator, extra

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as undo:
            self._listen(USER, undo)
            self.libvirtd.virsh("define", self.libvirtd.file(self.xml(), f"{self.name}.xml"))
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            print(self.log()[-3000:], file=sys.stderr)
        self._destroy()
        done = self.libvirtd.virsh("undefine", self.name, "--managed-save", check=False)
        if done.returncode:
            print(f"libvirt keeps {self.name}: {done.stderr.strip()}", file=sys.stderr)
        self._close(error)

    def _destroy(self) -> None:
        """Until it does not run; libvirt gives up on a QEMU that takes its time to end."""
        ends = time.monotonic() + WAIT_S / 2
        while True:
            done = self.libvirtd.virsh("destroy", self.name, check=False)
            state = self.libvirtd.virsh("domstate", self.name, check=False).stdout.strip()
            if state in ("shut off", ""):
                return
            if time.monotonic() > ends:
                print(f"{self.name} does not end: {state}: {done.stderr.strip()}", file=sys.stderr)
                return

    def boot(self) -> None:
        """Start it, and wait until the guest takes commands."""
        self.libvirtd.virsh("start", self.name)
        self.wait_ready()

    def reconnected(self) -> None:
        """Wait for the QEMU that has taken the guest over, after a restore or a migration."""
        self._accept(time.monotonic() + WAIT_S)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return int((self.libvirtd.root / f"run/libvirt/qemu/{self.name}.pid").read_text())

    def live_xml(self) -> str:
        """The domain as it runs, fit to be given to a migration."""
        return self.libvirtd.virsh("dumpxml", "--migratable", self.name).stdout

    def log(self) -> str:
        """What QEMU said."""
        path = self.libvirtd.root / f"var/log/libvirt/qemu/{self.name}.log"
        return path.read_text() if path.exists() else ""

    def _ended(self) -> str:
        done = self.libvirtd.virsh("domstate", self.name, check=False)
        return "" if done.stdout.strip() in ("running", "paused") else f"{done.stdout.strip()} {done.stderr.strip()}"

    def xml(self) -> str:
        return f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{self.name}</name>
  <memory unit='MiB'>256</memory>
  <vcpu>{VCPUS}</vcpu>
  <metadata>{self._metadata}</metadata>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{self._files.kernel}</kernel>
    <initrd>{self._files.initramfs}</initrd>
    <cmdline>{KERNEL_ARGUMENTS}</cmdline>
  </os>
  <features><acpi/></features>
  <on_reboot>restart</on_reboot>
  <devices>
    <emulator>{self._emulator}</emulator>
    {"".join(nic.xml() for nic in self._nics)}
    <serial type='file'><source path='{self.folder}/console.log'/><target port='0'/></serial>
    <serial type='unix'><source mode='connect' path='{self.control}'/><target port='1'/></serial>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
  {self._extra}
</domain>
"""


if __name__ == "__main__":
    with host(Path(sys.argv[1])) as kept:
        print(kept.file, flush=True)
        sys.stdin.read()
