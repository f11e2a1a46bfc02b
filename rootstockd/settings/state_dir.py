"""Where weights and environments lie: one operator builds them, every user of the machine reads them.

A state directory has `weights/`, `environments/`, `models.toml` (what `rootstockd models add` registered) and
`measured.json`. What is written goes to one's own; what is read is looked for in one's own, then in the system's.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import stat
import time
from pathlib import Path

import platformdirs

from rootstock_client.runtime_dir import named_path
from rootstockd.users import group_name, user_name

VARIABLE = "ROOTSTOCKD_STATE"
"""An environment variable: the one state directory to use, for reading and writing, such as a cluster's shared one."""
SYSTEM_STATE = Path("/var/lib/rootstockd")
"""Root's own, which all others read too."""

SITE_VARIABLE = "ROOTSTOCKD_SITE"
"""An environment variable: the site's folder of settings in place of `/etc/rootstockd`."""
MIRROR_VARIABLE = "ROOTSTOCKD_MIRROR"
"""An environment variable: a folder or an address that weights are pulled from, in place of their own."""
_REMEMBERED = 30
"""Seconds that the list of users is believed to be as it was."""


class StateError(Exception):
    """A state directory that can't be used: which, and why."""


def site_folder() -> Path:
    """Where a site describes its models and environments."""
    return named_path(os.environ.get(SITE_VARIABLE) or "/etc/rootstockd")


def own_state() -> Path:
    """Where this user's commands write: what the variable says, root's, or `~/.local/share/rootstockd`."""
    if said := os.environ.get(VARIABLE):
        return named_path(said)
    return SYSTEM_STATE if os.geteuid() == 0 else platformdirs.user_data_path("rootstockd")


def make_readable(folder: Path) -> None:
    """Make a folder, with those above it, that all may look into, whatever the umask."""
    if not folder.is_dir():
        make_readable(folder.parent)
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)


def state_dirs() -> list[Path]:
    """Where to look, in this order; those that are there. One that root keeps to itself is as if it were not there.

    Raises:
        StateError: others could have put something there; environments and weights are code.
    """
    places = [own_state()] if os.environ.get(VARIABLE) else [own_state(), SYSTEM_STATE]
    # os.path.isdir says no where one may not look
    there = [place for place in dict.fromkeys(places) if os.path.isdir(place)]  # noqa: PTH112
    if (
        SYSTEM_STATE in there
        and own_state() != SYSTEM_STATE
        and not os.access(SYSTEM_STATE, os.R_OK | os.X_OK, effective_ids=True)
    ):
        there.remove(SYSTEM_STATE)
    for place in there:
        check_trusted(place)
    return there


def check_trusted(path: Path, status: os.stat_result | None = None) -> None:
    """Whether nobody else could have written a file, or into a folder: what is in it becomes code.

    Its owner must be oneself or root; in the state directory that the environment variable names it may be that
    directory's owner, too, whom the user chose by naming it. Nobody but the owner may write to it. The owner's private
    group may, which has no other members: many systems give each user one, and a umask of 002. Debian's sshd does so.

    Args:
        path: the file or folder.
        status: of what was opened there, where that is what is to be used.

    Raises:
        StateError: it is not so; what mends it, but for `/dev/null` and the like, whose modes are to stay.
    """
    status = status or path.stat()
    uid, mode = status.st_uid, status.st_mode
    if uid not in {0, os.geteuid(), _owner_of_named_state(path)}:
        raise StateError(
            f"{path} belongs to another user ({user_name(uid)}), so what is in it is not used: have it given to "
            f"{user_name(os.geteuid())} or to root, `chown {user_name(os.geteuid())} {path}`."
        )
    if mode & (stat.S_IWGRP | stat.S_IWOTH) and not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise StateError(f"{path} is neither a file nor a folder, so nothing is read from it: name another.")
    if mode & stat.S_IWOTH:
        raise StateError(f"all users may write to {path}, so what is in it is not to be trusted: chmod o-w {path}")
    if mode & stat.S_IWGRP and not _is_owners_alone(path, uid, status.st_gid):
        raise StateError(
            f"the group {group_name(status.st_gid)} may write to {path}, so what is in it is not to be trusted: "
            f"chmod g-w {path}"
        )


def check_links(path: Path) -> None:
    """Whether a file or its folder is no link to what is not there: such as a share that is not mounted.

    Raises:
        StateError: it is. Without settings a daemon might be open to all, and without a catalogue it has no models.
    """
    for part in (path.parent, path):
        try:
            part.stat()
        except FileNotFoundError as error:
            if part.is_symlink():
                raise StateError(
                    f"{part} is a link to {part.readlink()}, and that is not there: bring it back, or remove the link."
                ) from error
        except OSError:  # whoever reads the file will say why not
            return


def _owner_of_named_state(path: Path) -> int:
    """Whoever owns the state directory that the variable names, if the path lies in it; otherwise root."""
    if not os.environ.get(VARIABLE):
        return 0
    state = own_state().resolve()
    return state.stat().st_uid if path.resolve().is_relative_to(state) else 0


def _is_owners_alone(path: Path, uid: int, gid: int) -> bool:
    """Whether a group is a user's private one: named as the user, theirs by default, and without other members.

    Whose primary group it is only the list of users says, as for Debian's sshd. Where a directory service gives out no
    list, such members are not seen.
    """
    with contextlib.suppress(OSError):
        os.getxattr(path, "system.posix_acl_access")
        return False  # what looks like the group's rights are the most that an access control list gives to anybody
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    if user.pw_gid != gid or group.gr_name != user.pw_name or not set(group.gr_mem) <= {user.pw_name}:
        return False
    return _others_of(gid, int(time.monotonic() / _REMEMBERED)) <= {uid}


@functools.lru_cache(maxsize=16)
def _others_of(gid: int, _now: int) -> set[int]:
    """Whose primary group it is. A directory service may take seconds to say, and sessions would be asking."""
    return {user.pw_uid for user in pwd.getpwall() if user.pw_gid == gid}
