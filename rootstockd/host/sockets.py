"""Claiming a socket's address: the lock that makes a daemon the only one, and what to do with what lies there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import socket
import stat
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rootstock_client.runtime_dir import SYSTEM_DIR, is_own_note, is_private, probe, too_long
from rootstockd.host import passed
from rootstockd.host.peers import peer_of
from rootstockd.users import user_name

log = logging.getLogger(__name__)

_FLOCK = "hhqqi"
_WHOLE_FILE = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
"""A lock that only somebody who may write to the file can have, unlike flock's: a worker may not. It can have one for
reading, and keep it when its daemon has died."""
_HOLDER = re.compile(rb"(?:\d{1,10}\n)?")
"""What a lock file of ours has in it: a process id, or nothing where the disk was full."""


class AddressError(Exception):
    """A socket address that this daemon can't have: why, and what to do."""


def make_runtime_dir(folder: Path, *, shared: bool) -> None:
    """Make the folder for the sockets, for its owner alone to write to; an existing one must be as safe.

    Args:
        folder: the folder.
        shared: others shall find the sockets in it. Only one that is made here, or the system's, is opened for them.

    Raises:
        AddressError: it can't be made, or somebody else could put sockets of theirs into it.
    """
    try:
        made = not folder.exists()
        for above in reversed([one for one in folder.parents if not one.exists()]):
            above.mkdir(mode=0o755, exist_ok=True)  # nobody else's to put another in its place, whatever the umask
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder == SYSTEM_DIR or (shared and made):
            folder.chmod(0o755)  # whatever the umask
    except OSError as error:
        raise AddressError(
            f"can't make the folder {folder} for the socket: {error.strerror}. Choose another place with --socket."
        ) from error
    if not is_private(folder, os.getuid(), 0):
        raise AddressError(
            f"the folder {folder} belongs to somebody else, or others may write to it: they could impersonate the "
            "daemon. Choose another with --socket, or fix its owner and mode (chmod go-w)."
        )


def remove_if_empty(folder: Path) -> None:
    """Remove a folder, unless somebody has something in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def remove(path: Path, ours: os.stat_result | None = None) -> None:
    """Remove a file at the end: one that can't be removed is a line in the log.

    Args:
        path: where it is.
        ours: which one; another that somebody has put in its place meanwhile is left alone.
    """
    try:
        if ours is None or os.path.samestat(path.lstat(), ours):
            path.unlink()
    except FileNotFoundError:
        pass
    except OSError as error:  # of the folder, say, in whose place a file is by now
        log.warning("can't remove %s: %s", path, error.strerror)


def already_runs(address: Path, pid: str) -> str:
    """What is said where a second daemon is to start."""
    if not address.is_socket():
        return (
            f"a daemon already runs for {address} (pid {pid}), and has no socket there for jobs: it has just begun to "
            "start, or the socket was removed. `rootstockd restart` makes it anew, `rootstockd stop` ends the daemon."
        )
    return (
        f"a daemon already runs at {address} (pid {pid}), and jobs can use it as it is (`rootstockd status`). One of a "
        "job's own needs another --socket; `rootstockd stop` ends this one, for all who use it."
    )


@contextlib.contextmanager
def kept_from_tmpfiles(folder: Path) -> Iterator[None]:
    """Have systemd-tmpfiles leave a folder alone in which nothing changes for days, as one in /tmp."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # of a file system that has no such locks
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock on `path`, with our process id in it; the file goes with the lock.

    A file that a daemon of this user has left is taken over. Anything else is left alone.

    Raises:
        AddressError: another daemon has it, or it is something else.
    """
    while True:
        fd = _open_lock(path)
        try:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _WHOLE_FILE)
        except OSError as error:
            holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
            is_daemon = struct.unpack(_FLOCK, fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _WHOLE_FILE))[0] != fcntl.F_RDLCK
            os.close(fd)
            if is_daemon:
                raise AddressError(already_runs(path.with_suffix(".sock"), holder)) from error
            raise AddressError(
                f"no daemon runs, but something that is none holds a lock on {path}, such as what a worker started: "
                f"find it with `fuser {path}` and end it, or remove the file."
            ) from error
        if os.path.exists(path) and os.path.samestat(os.fstat(fd), os.stat(path)):
            break
        os.close(fd)  # its last holder removed it while we opened it
    os.truncate(fd, 0)
    with contextlib.suppress(OSError):  # of a full disk: who holds it is for others to read, and no more
        os.write(fd, f"{os.getpid()}\n".encode())
    try:
        yield
    finally:
        remove(path, os.fstat(fd))
        os.close(fd)


def _open_lock(path: Path) -> int:
    """Open or make the lock file, unless what lies there is somebody's else: the name is a common one.

    Raises:
        AddressError: it is, or can't be opened.
    """
    try:  # opening a named pipe would wait for whoever writes into it
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    except OSError as error:
        raise AddressError(
            f"can't open the lock file {path}: {error.strerror}. Move it away, or choose another --socket."
        ) from error
    if is_own_note(fd, _HOLDER):
        return fd
    os.close(fd)
    raise AddressError(
        f"{path} is not the lock file of a daemon of yours; it is left alone. Move it away, or choose another --socket."
    )


@contextlib.contextmanager
def listen(
    path: Path, mode: int, group: str | None = None, *, keep: Callable[[], bool] = lambda: False
) -> Iterator[socket.socket]:
    """Listen on a Unix socket at `path`, whose lock must be ours already; the path goes with it unless we `keep` it.

    A socket of ours that nobody listens on is what a daemon that died left behind, and is replaced. Anything else is
    left alone.

    Raises:
        AddressError: the address is too long, or taken.
    """
    if problem := too_long(path):
        raise AddressError(problem)
    unseen = name_until_open(path)  # nobody shall see a socket that is not open yet
    _check_free(path)
    _check_free(unseen)
    unseen.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.bind(os.fspath(unseen))
        except OSError as error:
            raise _no_room(path, error) from error
        ours, at = unseen.lstat(), unseen
        try:
            if group is not None:
                _give_to(unseen, group)
            unseen.chmod(mode)
            passed.refuse(sock)
            sock.listen(1024)
            at = unseen.rename(path)
            yield sock
        finally:
            if at == unseen or not keep():
                remove(at, ours)


def _no_room(path: Path, error: OSError) -> AddressError:
    return AddressError(f"can't listen on {path}: {error.strerror or error}.")


def name_until_open(path: Path) -> Path:
    """What a socket is called until it can be connected to, beside its own name; the kernel goes on calling it so.

    Nobody else has such a name. It is always the same, so that one that was left is found again, and no longer than the
    shortest `NAME.control`.
    """
    return path.with_name(f".rsd{zlib.crc32(os.fsencode(path.name)) & 0xFFFFF:05x}")


@contextlib.contextmanager
def room_beside(path: Path) -> Iterator[None]:
    """Have room for a socket beside the one that another daemon has at `path`, as `listen` needs it after that one.

    One that lies there already, of a process that died or of one that is about to listen, has that room.

    Raises:
        AddressError: there is none.
    """
    unseen = name_until_open(path)
    _check_free(unseen)
    with socket.socket(socket.AF_UNIX) as sock, contextlib.ExitStack() as stack:
        try:
            sock.bind(os.fspath(unseen))
            stack.callback(remove, unseen, unseen.lstat())  # while it is open: until then nothing else has its number
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise _no_room(path, error) from error
        yield


@contextlib.contextmanager
def listen_tcp(address: str) -> Iterator[socket.socket]:
    """Listen on a TCP port.

    Args:
        address: `HOST:PORT`, with brackets around an IPv6 host.

    Raises:
        AddressError: there is no such host here, or somebody has the port.
    """
    host, _, port = address.rpartition(":")
    with contextlib.ExitStack() as stack:
        try:
            sock = stack.enter_context(_bound(host, int(port)))
            sock.listen()
        except OSError as error:
            hint = {
                errno.EADDRINUSE: " Each daemon of a machine needs a port of its own.",
                errno.EAFNOSUPPORT: " Under systemd ports must be allowed: see docs/monitoring.md.",
            }
            raise AddressError(
                f"can't listen on {address} for metrics: {error.strerror}.{hint.get(error.errno or 0, '')} The address "
                "is `metrics` of the configuration, or --metrics."
            ) from error
        yield sock


def check_host(address: str) -> None:
    """Whether this machine has the host of `HOST:PORT`; whether the port is free changes from moment to moment.

    Raises:
        AddressError: it has not.
    """
    host, _, _ = address.rpartition(":")
    try:
        _bound(host, 0).close()
    except OSError as error:
        raise AddressError(f"this machine can't listen at {host}: {error.strerror}.") from error


def _bound(host: str, port: int) -> socket.socket:
    ((family, _, _, _, where), *_) = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # its predecessor's connections may linger
        sock.bind(where)
    except OSError:
        sock.close()
        raise
    return sock


def url_of(sock: socket.socket) -> str:
    """Where the metrics are that are served on a TCP socket."""
    host, port = sock.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/metrics"


@contextlib.contextmanager
def adopt(sock: socket.socket, path: Path) -> Iterator[socket.socket]:
    """Listen on a socket that systemd made and keeps: it outlives us, so nothing is locked, made or removed.

    Raises:
        AddressError: it lies elsewhere than clients will look.
    """
    with sock:
        if sock.getsockname() != os.fspath(path):
            raise AddressError(
                f"systemd listens on {sock.getsockname()}, but the settings say {path}: "
                "ListenStream= of the .socket and --socket of the .service must be the same."
            )
        sock.setblocking(False)  # noqa: FBT003 - the socket module has no other way
        passed.refuse(sock)
        sock.listen(1024)  # again: whom the kernel names as who listens is whoever did this last
        yield sock


def _give_to(path: Path, group: str) -> None:
    try:
        shutil.chown(path, group=group)
    except (OSError, LookupError) as error:
        raise AddressError(f"can't give {path} to the group {group!r} (access.socket_group): {error}.") from error


@contextlib.contextmanager
def claim_gpu(uuid: str) -> Iterator[None]:
    """Be the one daemon of this machine on a GPU.

    The claim is an abstract socket's name, which the kernel gives to one process, and takes back when that ends.

    Raises:
        AddressError: another process has it.
    """
    address = f"\0rootstockd-gpu-{uuid}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as claim:
        try:
            claim.bind(address)
        except OSError as error:
            raise AddressError(
                f"a daemon already uses the GPU {uuid}: {_listener(address)}. Its sockets are elsewhere; use that one, "
                "have it stopped, or choose another device with --gpu."
            ) from error
        claim.listen(1024)  # nobody is ever accepted: to connect is enough to see who listens
        yield


def _listener(address: str) -> str:
    """Who listens at an address, as the kernel says."""
    try:
        with probe(address) as sock:
            peer = peer_of(sock)
    except OSError:
        return "which one, it does not say"
    return f"pid {peer.pid} of {user_name(peer.uid)}"


def _check_free(path: Path) -> None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise AddressError(f"can't look at {path}: {error.strerror}.") from error
    if not stat.S_ISSOCK(info.st_mode):
        raise AddressError(f"{path} is not a socket; it is left alone. Move it away, or choose another --socket.")
    if info.st_uid != os.getuid():
        raise AddressError(f"the socket {path} belongs to uid {info.st_uid}; it is left alone.")
    try:
        probe(path).close()
    except ConnectionRefusedError:
        return
    except OSError as error:
        raise AddressError(f"can't tell whether somebody listens on {path} ({error}); it is left alone.") from error
    raise AddressError(f"another program listens on {path}; it is left alone. Choose another --socket.")
