# SPDX-License-Identifier: BSD-2-Clause
"""Debian packages: the machine's own, and some that are only unpacked under build/.

Theory of operation of the private apt
--------------------------------------
What the distribution lacks (QEMU 9 or later on Debian 12) comes from a suite that the machine's apt does not know,
such as bookworm-backports.  Adding that suite to the system's apt is not ours to do.  So apt-get runs with a
configuration of its own, read after the system's (``-c``), which moves everything that apt writes, and the sources that
it reads, into one directory:

- the sources are the machine's own Debian entries, one of which is repeated with the other suite's name.  Mirror,
  signing key and options are therefore those that the administrator chose, whatever they are;
- the package status is a *copy* of dpkg's, so that apt fetches only what the machine does not have, and locks nothing;
- apt only downloads; ``dpkg -x`` unpacks, which needs no database and runs no maintainer script.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path


class ProvisionError(Exception):
    """Something that the integration floor needs could not be had; ``str()`` is one line for the user."""


def say(line: str) -> None:
    """One line of progress."""
    print(f"provision: {line}", flush=True)


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    """Output of a command.  Raises ProvisionError with the last line that it complained with."""
    words = [str(arg) for arg in argv]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    nothing = subprocess.DEVNULL
    try:
        done = subprocess.run(words, cwd=cwd, env=environment, stdin=nothing, capture_output=True, text=True)
    except FileNotFoundError:
        raise ProvisionError(f"{words[0]} is not on this machine (is it a Debian?)") from None
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ProvisionError(f"{' '.join(words[:3])}: {reason}")
    return done.stdout


def missing_packages(names: Sequence[str]) -> tuple[str, ...]:
    """Those of ``names`` that are not installed."""
    query = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *names]
    try:
        known = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError:
        raise ProvisionError("dpkg-query is not on this machine (is it a Debian?)") from None
    return tuple(name for name in names if f"{name} installed" not in known)


def install_packages(names: Sequence[str]) -> None:
    """Install what is missing of ``names``.  Raises ProvisionError without root, or with apt's reason."""
    missing = missing_packages(names)
    if not missing:
        return
    if os.geteuid() != 0:
        raise ProvisionError(f"missing packages, and only root can install them: apt-get install {' '.join(missing)}")
    refresh_lists(missing[0])
    say(f"installing {', '.join(missing)}")
    run("apt-get", "install", "-y", "--no-install-recommends", *missing)


def candidate(package: str) -> str:
    """The version that the machine's apt would install; "" when it knows none."""
    found = re.search(r"Candidate: (\S+)", run("apt-cache", "policy", package))
    return "" if not found or found[1] == "(none)" else found[1]


def refresh_lists(package: str) -> None:
    """Update the machine's package lists if ``package`` is not in them (a fresh image comes without lists)."""
    if not candidate(package):
        say("updating the package lists")
        run("apt-get", "update")


def unpack(archives: Sequence[Path], into: Path) -> None:
    """Unpack .debs side by side under ``into``."""
    into.mkdir(parents=True, exist_ok=True)
    for archive in archives:
        run("dpkg", "-x", archive, into)


def codename() -> str:
    """``bookworm``, ``trixie``, ...  Raises ProvisionError where there is none (Debian unstable, or no Debian)."""
    found = re.search(r"^VERSION_CODENAME=(\S+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    if not found:
        raise ProvisionError("/etc/os-release names no Debian release")
    return found[1].strip('"')


class PrivateApt:
    """An apt of our own in ``home``, over the machine's Debian mirror.

    ``suite`` is one more suite of it, preferred to the machine's own; "" is none.  With ``alone`` nothing counts as
    installed: for a suite older than the machine's, whose packages do not go together with newer ones.
    """

    def __init__(self, home: Path, *, suite: str = "", alone: bool = False) -> None:
        config = home / "apt.conf"
        self._suite = suite
        self._options = ("-c", str(config), *(("-t", suite) if suite else ()))
        self._archives = home / "cache" / "archives"
        for folder in ("state/lists/partial", "cache/archives/partial", "sources.d", "none"):
            (home / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy("/dev/null" if alone else "/var/lib/dpkg/status", home / "status")
        (home / "state" / "extended_states").touch()
        entries = list(_debian_entries())
        if suite:
            entries.append(_with_suite(entries, suite))
        for number, (suffix, text) in enumerate(entries):
            (home / "sources.d" / f"{number}{suffix}").write_text(text)
        # The cloud images' hooks (#clear) would clean the system's cache; _apt may not be able to enter the checkout.
        config.write_text(
            f'Dir::State "{home}/state";\nDir::State::status "{home}/status";\nDir::Cache "{home}/cache";\n'
            f'Dir::Cache::archives "{self._archives}";\n'
            f'Dir::Etc::sourcelist "/dev/null";\nDir::Etc::sourceparts "{home}/sources.d";\n'
            f'Dir::Etc::preferences "/dev/null";\nDir::Etc::preferencesparts "{home}/none";\n'
            'APT::Sandbox::User "root";\n'
            "#clear APT::Update;\n#clear DPkg::Post-Invoke;\n#clear DPkg::Pre-Install-Pkgs;\n"
        )
        run("apt-get", *self._options, "update")

    def fetch(self, *packages: str) -> tuple[Path, ...]:
        """Download ``packages`` and what they need that the machine does not have; the .debs."""
        run("apt-get", *self._options, "install", "-y", "--download-only", "--no-install-recommends", *packages)
        return tuple(sorted(self._archives.glob("*.deb")))

    def fetch_only(self, *packages: str) -> tuple[Path, ...]:
        """Download just these, of the suite even if the machine has newer ones installed; the .debs."""
        names = [f"{package}/{self._suite}" if self._suite else package for package in packages]
        run("apt-get", *self._options, "download", *names, cwd=self._archives)
        return tuple(sorted(self._archives.glob("*.deb")))

    def dependencies(self, package: str, pattern: str) -> tuple[str, ...]:
        """The names of those dependencies of ``package`` that match ``pattern``."""
        return tuple(re.findall(rf"Depends: ({pattern})", run("apt-cache", *self._options, "depends", package)))


def _debian_entries() -> Iterator[tuple[str, str]]:
    """(file suffix, text) of each of the machine's own entries for Debian itself, in either of apt's two formats."""
    mirrors = _debian_mirrors()
    if not mirrors:
        run("apt-get", "update")
        mirrors = _debian_mirrors()
    for path in (Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))):
        if path.suffix == ".sources":
            for stanza in re.split(r"\n[ \t]*\n", path.read_text()):
                if any(uri.rstrip("/") in mirrors for uri in _field(stanza, "URIs").split()):
                    yield ".sources", stanza.strip() + "\n"
        elif path.suffix == ".list" and path.exists():
            for line in path.read_text().splitlines():
                if (entry := _ONE_LINE.match(line)) and entry["uri"].rstrip("/") in mirrors:
                    yield ".list", line.strip() + "\n"


def _debian_mirrors() -> frozenset[str]:
    """Where the machine's lists of Debian itself, not of third parties, came from."""
    lines = run("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)").splitlines()
    targets = (line.partition(" ") for line in lines)
    return frozenset(uri.rstrip("/") for origin, _, uri in targets if origin == "Debian")


_ONE_LINE = re.compile(r"^\s*deb\s+(?P<options>\[[^]]*\]\s+)?(?P<uri>\S+)\s+(?P<suite>\S+)\s+(?P<components>.*)$")


def _field(stanza: str, name: str) -> str:
    """A deb822 field's value; "" when there is none."""
    found = re.search(rf"^{name}:[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""


def _with_suite(entries: Sequence[tuple[str, str]], suite: str) -> tuple[str, str]:
    """The entry of the release itself, for another suite of the same mirror."""
    release = codename()
    for suffix, text in entries:
        if suffix == ".list" and (entry := _ONE_LINE.match(text)) and entry["suite"] == release:
            return suffix, f"deb {entry['options'] or ''}{entry['uri']} {suite} main\n"
        if suffix == ".sources" and release in _field(text, "Suites").split():
            return suffix, text.replace(_field(text, "Suites"), suite)
    raise ProvisionError(f"apt's sources name no Debian mirror for {release}")
