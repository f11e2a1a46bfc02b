"""Folders, sockets and files: whether they are there, whose they are, and who could change them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rootstock_client.runtime_dir import MAX_SOCKET_PATH, SOCKET_NAME, SOCKET_VARIABLE, SYSTEM_DIR, probe
from rootstockd.doctor.findings import IN_VAIN, Finding, note, ok, problem, warning
from rootstockd.host.peers import peer_of
from rootstockd.users import user_name

FULL = 1_000_000
"""Bytes free below which a disk is full."""
LITTLE = 10**9
"""Bytes free below which weights and environments may not fit."""


@dataclass(frozen=True)
class Folder:
    """A folder, or where one would be made."""

    path: Path
    exists: bool = True
    is_folder: bool = True
    is_device: bool = False
    """Such as `/dev/null`, which the machine needs where it is and as it is."""
    owner: int = 0
    mode: int = 0o700
    writable: bool = True
    """By this process; where there is no folder, the one in which it would be made."""
    free: int = 10**12
    """Bytes, for this user."""
    above: Path = Path("/")
    """The nearest folder that is there."""

    @property
    def open_to_others(self) -> bool:
        """Whether others than its owner may write to it."""
        return bool(self.mode & (stat.S_IWGRP | stat.S_IWOTH))


def look_at_folder(path: Path, *, follow: bool = False) -> Folder:
    """As it is, or what is no folder, and in its way. Where `follow`, it may be a link, as to another disk."""
    try:
        info = path.stat() if follow else path.lstat()
    except OSError:
        above = path
        while not os.path.isdir(above):  # noqa: PTH112 - no where one may not look
            if os.path.lexists(above):
                return Folder(above, is_folder=False, is_device=_is_device(above), writable=False)
            above = above.parent
        return Folder(path, exists=False, writable=os.access(above, os.W_OK | os.X_OK), free=_free(above), above=above)
    return Folder(
        path,
        True,  # noqa: FBT003
        stat.S_ISDIR(info.st_mode),
        _is_device(path),
        info.st_uid,
        stat.S_IMODE(info.st_mode),
        os.access(path, os.W_OK | os.X_OK),
        _free(path),
        path,
    )


def _is_device(path: Path) -> bool:
    return path.is_char_device() or path.is_block_device()


def _free(path: Path) -> int:
    try:
        space = os.statvfs(path)
    except OSError:
        return 0
    return space.f_bavail * space.f_frsize


@dataclass(frozen=True)
class Address:
    """What is at a socket's path."""

    path: Path
    state: str = "absent"
    """absent, live, stale (nobody listens), closed (no right to connect), busy (does not take connections) or foreign
    (no socket)."""
    owner: int = 0
    listener: str = ""
    """Who listens, as the kernel says."""


def look_at_address(path: Path) -> Address:
    """Who is there. To connect is no session."""
    try:
        info = path.stat()  # systemd's may be a link
    except OSError:
        return Address(path, "absent")
    if not stat.S_ISSOCK(info.st_mode):
        return Address(path, "foreign", info.st_uid)
    try:
        with probe(path) as sock:
            peer = peer_of(sock)
    except ConnectionRefusedError:
        return Address(path, "stale", info.st_uid)
    except PermissionError:
        return Address(path, "closed", info.st_uid)
    except OSError:
        return Address(path, "busy", info.st_uid)
    return Address(path, "live", info.st_uid, f"pid {peer.pid} of {user_name(peer.uid)}")


def listener(path: Path) -> int | None:
    """The process that listens at an address, as the kernel says, 0 of another namespace; None if it can't be told."""
    try:
        with probe(path, 0.0) as sock:
            return peer_of(sock).pid
    except OSError:
        return None


@dataclass(frozen=True)
class Login:
    """What a user's session has of its node."""

    uid: int
    name: str = ""
    runtime: str = ""
    """XDG_RUNTIME_DIR."""
    named: str = ""
    """ROOTSTOCKD_SOCKET, or --socket."""
    lingers: bool = True
    """The user's own systemd goes on when they log out; true as well where there is none."""
    slurm: bool = False
    own_tmp: bool = False
    """The folder for temporary files is a file system of its own; Slurm's job_container/tmpfs makes one a job."""


def look_at_login(variables: Mapping[str, str], named: Path | None) -> Login:
    """This process's."""
    uid = os.getuid()
    name = user_name(uid)
    systemd = Path("/run/systemd/system").is_dir()
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text(errors="replace").split("\n")[:-1]]
    return Login(
        uid,
        name,
        variables.get("XDG_RUNTIME_DIR", ""),
        str(named or variables.get(SOCKET_VARIABLE, "")),
        uid == 0 or not systemd or Path("/var/lib/systemd/linger", name).exists(),
        "SLURM_JOB_ID" in variables,
        "/tmp" in mounts,  # noqa: S108 - it is looked at
    )


# --- judging


def check_runtime_folder(folder: Folder, login: Login, address: Address) -> Iterator[Finding]:
    """Where a daemon puts its sockets, and clients look for them.

    Args:
        folder: it.
        login: who looks.
        address: the socket that would be in it.
    """
    where = "runtime folder"
    believe = "Clients do not believe a socket there, and no daemon starts: others could impersonate it."
    if folder.exists and not folder.is_folder:
        mend = f"export {SOCKET_VARIABLE}={_elsewhere(login)}" if folder.is_device else f"rm {folder.path}"
        yield problem(where, f"{folder.path} is no folder", believe, mend)
    elif folder.exists and folder.owner not in (login.uid, 0):
        whose = f"{folder.path} belongs to {user_name(folder.owner)}"
        yield problem(where, whose, believe, f"export {SOCKET_VARIABLE}={_elsewhere(login)}")
    elif folder.exists and folder.open_to_others:
        yield problem(where, f"others may write to {folder.path}", believe, f"chmod go-w {folder.path}")
    elif not folder.writable and address.state == "live":
        yield ok(where, f"{folder.path}, for the daemon of {user_name(address.owner)}")
    elif not folder.writable:
        what = folder.path if folder.exists else f"{folder.path}, for which {folder.above} would have to be written"
        xdg = bool(login.runtime) and folder.path.is_relative_to(login.runtime)
        yield problem(
            where,
            f"no permission to write to {what}",
            "No daemon can be started there."
            + (" Slurm and sudo pass XDG_RUNTIME_DIR on to where there is no such folder." if xdg else ""),
            "unset XDG_RUNTIME_DIR" if xdg else f"rootstockd start --socket {_elsewhere(login)}",
        )
    elif folder.free < FULL:
        yield problem(where, f"{folder.path} is full", "No socket can be made there.", f"df -h {folder.above}")
    else:
        yield ok(where, f"{folder.path}{'' if folder.exists else ' (made by `rootstockd start`)'}")
    if folder.path.is_relative_to("/run/user") and not login.lingers:
        yield note(
            where,
            f"{login.runtime} goes when {login.name} logs out for the last time",
            "A daemon that was started by hand may be ended then, and its socket is gone.",
            "loginctl enable-linger",
        )
    if login.slurm and login.own_tmp and folder.path.is_relative_to("/tmp"):  # noqa: S108 - it is looked at
        yield note(
            where,
            "in /tmp, of which each Slurm job may have its own",
            "Other jobs on this node would not see a daemon started here.",
            f"export {SOCKET_VARIABLE}={_elsewhere(login)}",
            "In all of them.",
        )


def check_address(address: Address, login: Login) -> Iterator[Finding]:
    """One of the places where clients look for a daemon."""
    path = address.path
    size = len(os.fsencode(path))
    if size > MAX_SOCKET_PATH:
        yield problem(
            "socket",
            f"{path} has {size} bytes",
            f"A Unix socket's path has at most {MAX_SOCKET_PATH}.",
            f"export {SOCKET_VARIABLE}={_elsewhere(login)}",
        )
    elif address.state == "foreign":
        yield problem(
            "socket", f"{path} is no socket", "It is left alone, and no daemon starts there.", f"mv {path} {path}.old"
        )
    elif address.state == "stale":
        owner = user_name(address.owner)
        yield warning(
            "socket",
            f"{path} was left by a daemon that has died; nobody listens",
            IN_VAIN,
            "rootstockd start" if address.owner == login.uid else "",
            "" if address.owner == login.uid else f"Have {owner} start it again.",
        )
    elif address.state == "closed":
        yield problem(
            "socket",
            f"no permission to connect to {path}",
            "Its daemon is for others (access.users, access.groups).",
            "rootstockd start",
            f"It starts one of your own; or ask {user_name(address.owner)}.",
        )
    elif address.state == "busy":
        yield problem(
            "socket",
            f"{path} accepts no connections",
            "Its daemon hangs, or was suspended.",
            "rootstockd stop --force; rootstockd start",
            "First see what it says last: rootstockd logs",
        )
    elif address.state == "live":
        yield ok("socket", f"{path}: {address.listener} listens")
    elif login.named:
        yield problem(
            "socket",
            f"there is nothing at {path}",
            f"{SOCKET_VARIABLE} or --socket names it, so no other is looked for.",
            "rootstockd start",
            f"Or unset {SOCKET_VARIABLE}.",
        )


def check_trust(folder: Folder) -> Iterator[Finding]:
    """A state directory: whether only its owner could have put something there."""
    if folder.exists and folder.is_folder and folder.mode & stat.S_IWOTH:
        yield problem(
            "state",
            f"all users may write to {folder.path}",
            "Weights and environments are code, so nothing in it is used.",
            f"chmod o-w {folder.path}",
        )


def check_storage(name: str, folder: Folder, mend: str, *, needed: bool = False) -> Iterator[Finding]:
    """A folder that is written to.

    Args:
        name: what it is.
        folder: as it is.
        mend: what names another, where this one can't be written.
        needed: no daemon starts without it. Others may be somebody else's to write, such as a cluster's shared state.
    """
    if folder.exists and not folder.is_folder:
        away = mend if folder.is_device else f"mv {folder.path} {folder.path}.old"
        yield problem(name, f"{folder.path} is no folder", "Nothing can be kept there.", away)
    elif not folder.writable:
        tell = problem if needed else warning
        yield tell(name, f"no permission to write to {folder.above}", "Nothing new can be kept there.", mend)
    elif folder.free < FULL:
        yield problem(name, f"no space for {folder.path}", "Nothing can be kept.", f"df -h {folder.above}")
    elif folder.free < LITTLE:
        yield warning(
            name,
            f"{folder.free / 1e6:.0f} MB of space for {folder.path}",
            "Weights take up to 1 GB, an environment with torch several.",
            f"du -sh {folder.path}/*",
        )
    else:
        yield ok(name, f"{folder.path}, {folder.free / 1e9:.0f} GB free")


def _elsewhere(login: Login) -> str:
    """A place for a socket, for a shell: the user's own, and this node's where many have the same home."""
    folder = "$HOME/.rootstockd-$(hostname -s)" if login.uid else str(SYSTEM_DIR)
    return f"{folder}/{SOCKET_NAME}"
