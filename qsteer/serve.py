# SPDX-License-Identifier: BSD-2-Clause
"""``qsteer serve``: gives ready taps and programs, as fds over a unix socket, to users without root.

Theory of operation
===================

One process and one loop (``server``), in which nothing is stored: what was handed out lives on without the service, and
how many taps a user has is counted among the host's devices.  The socket is the service manager's, or one that the
service makes itself.

Privileges: CAP_NET_ADMIN makes taps and sets them up, CAP_BPF and CAP_PERFMON load programs.  All others are given up
before the first client is heard; uid 0 without them still owns /dev/net/tun, /dev/vhost-net and what qsteer has pinned.
systemd/qsteer-serve.service.in leaves it no more.
"""

import contextlib
import errno
import grp
import os
import pwd
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

from qsteer import programs, shim
from qsteer._shim import lib
from qsteer.access import Grant, Rule
from qsteer.errors import BusyError, PermissionDeniedError, QsteerError, UsageError, from_errno, printable
from qsteer.notify import Journal, Priority, Service
from qsteer.server import Host, Policy, Say, Server
from qsteer.service import SOCKET
from qsteer.settings import Config

BACKLOG = 128
IDLE_S = 3600.0
_FIRST_PASSED_FD = 3


def main(*, path: Path | None, load: Callable[[], Config], quiet: bool = False) -> int:
    """Serve until SIGTERM or SIGINT; SIGHUP loads the configuration anew.  Gives the exit code.

    ``path`` is where to listen if no service manager passes a socket; None is the usual place.  Raises QsteerError: the
    configuration is wrong, somebody listens there already, a right is missing.
    """
    if not shim.has_capability(lib.CAP_NET_ADMIN):
        raise PermissionDeniedError("qsteer serve makes taps for others: it takes CAP_NET_ADMIN", hint="try sudo")
    service = Service()
    journal = Journal("serve", least=Priority.WARNING if quiet else Priority.INFO)
    policy = _policy(load(), journal.say)
    with listening(path) as listener, _signals() as (woken, arrived):
        _prepare(journal.say)
        server = Server(listener, policy, Host(), journal.say)
        server.watch(woken, lambda: None)
        try:
            service.ready(_status(policy))
            return _loop(server, service, journal, load, woken, arrived)
        finally:
            server.close()


def _loop(
    server: Server,
    service: Service,
    journal: Journal,
    load: Callable[[], Config],
    woken: socket.socket,
    arrived: set[signal.Signals],
) -> int:
    alive_at = 0.0
    while not arrived & {signal.SIGTERM, signal.SIGINT}:
        if signal.SIGHUP in arrived:
            arrived.discard(signal.SIGHUP)
            service.reloading()
            try:
                server.policy = _policy(load(), journal.say)
                journal.say(f"loaded anew: {_status(server.policy)}")
            except QsteerError as error:
                journal.say(f"the configuration stays as it was: {printable(str(error))}", Priority.WARNING)
            service.ready(_status(server.policy))
        if service.alive_every_s and time.monotonic() >= alive_at:
            service.alive()
            alive_at = time.monotonic() + service.alive_every_s
        server.turn(service.alive_every_s or IDLE_S)
        with contextlib.suppress(BlockingIOError):
            woken.recv(64)
    service.stopping()
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[tuple[socket.socket, set[signal.Signals]]]:
    """A socket that is readable when a signal has arrived, and the set that it is in then."""
    arrived: set[signal.Signals] = set()
    woken, waker = socket.socketpair()
    with woken, waker:
        for end in (woken, waker):
            end.setblocking(False)
        signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda number, _: arrived.add(signal.Signals(number)))
        try:
            yield woken, arrived
        finally:
            signal.set_wakeup_fd(-1)


def _status(policy: Policy) -> str:
    return f"{len(policy.grants)} rule{'s' * (len(policy.grants) != 1)}"


def _policy(config: Config, say: Say) -> Policy:
    """The configuration, with the numbers of its users and groups as they are now."""
    grants = []
    for rule in config.rules:
        grant = _grant(rule)
        if grant:
            grants.append(grant)
        else:
            whom = f'user "{rule.user}"' if rule.user is not None else f'group "{rule.group}"'
            say(f"there is no {printable(whom)}: its rule is for nobody", Priority.WARNING)
    return Policy(serve=config.serve, grants=tuple(grants))


def _grant(rule: Rule) -> Grant | None:
    with contextlib.suppress(KeyError):
        if rule.user is not None:
            uid = int(rule.user) if rule.user.isdecimal() else pwd.getpwnam(rule.user).pw_uid
            return Grant(rule=rule, uid=uid)
        if rule.group is not None:
            gid = int(rule.group) if rule.group.isdecimal() else grp.getgrnam(rule.group).gr_gid
            return Grant(rule=rule, gid=gid)
    return None


def _prepare(say: Say) -> None:
    """What takes rights that are not needed later, and time that no client should wait; then those rights are gone."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        os.close(programs.shared_bodies())
    except QsteerError as error:
        say(f"every tap will have a complete program: {printable(str(error))}", Priority.NOTICE)
    shim.limit_capabilities(lib.CAP_NET_ADMIN, lib.CAP_BPF, lib.CAP_PERFMON)


@contextlib.contextmanager
def listening(path: Path | None, environment: MutableMapping[str, str] | None = None) -> Iterator[socket.socket]:
    """The socket that the service manager passes (sd_listen_fds(3)), or one at a path, which is removed in the end.

    Raises QsteerError.
    """
    passed = _passed(os.environ if environment is None else environment)
    if passed:
        with passed:
            yield passed
        return
    path = path or SOCKET
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        try:
            _bind(listener, path)
            ours = path.stat()
        except OSError as error:
            raise from_errno(error.errno or 0, f"cannot listen at {path}") from None
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):
                if os.path.samestat(path.stat(), ours):
                    path.unlink()


def _passed(environment: MutableMapping[str, str]) -> socket.socket | None:
    """Takes the variables out of the environment.  Raises UsageError on anything but one listening socket."""
    pid, count, _ = (environment.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()):
        return None
    wrong = UsageError("the service manager passes something else than one listening unix stream socket")
    if count != "1":
        raise wrong
    try:
        passed = socket.socket(fileno=_FIRST_PASSED_FD)
        listens = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:
        raise wrong from None
    if (passed.family, passed.type, listens) != (socket.AF_UNIX, socket.SOCK_STREAM, 1):
        passed.close()
        raise wrong
    passed.set_inheritable(False)
    return passed


def _bind(listener: socket.socket, path: Path) -> None:
    """Listen at a path, for everybody; in the place of a socket that nobody listens at any more.

    Raises OSError or BusyError.
    """
    if path == SOCKET:
        path.parent.mkdir(mode=0o755, exist_ok=True)
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.setblocking(False)  # who has a full backlog listens, too
            if other.connect_ex(os.fspath(path)) == errno.ECONNREFUSED:
                path.unlink()
        if path.exists():
            raise BusyError(f"somebody listens at {path} already")
    umask = os.umask(0o111)
    try:
        listener.bind(os.fspath(path))
    finally:
        os.umask(umask)
    listener.listen(BACKLOG)
