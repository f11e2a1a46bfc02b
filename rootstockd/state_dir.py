"""Where weights and environments lie: one operator builds them, every user of the machine reads them.

A state directory has `weights/`, `environments/`, `models.toml` (what `rootstockd models add` registered) and
`measured.json`. What is written goes to one's own; what is read is looked for in one's own, then in the system's.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import platformdirs

VARIABLE = "ROOTSTOCKD_STATE"
"""An environment variable: the one state directory to use, for reading and writing, such as a cluster's shared one."""
SYSTEM_STATE = Path("/var/lib/rootstockd")
"""Root's own, which all others read too."""

SITE_VARIABLE = "ROOTSTOCKD_SITE"
"""An environment variable: the site's folder of settings in place of `/etc/rootstockd`."""
MIRROR_VARIABLE = "ROOTSTOCKD_MIRROR"
"""An environment variable: a folder or an address that weights are pulled from, in place of their own."""


class StateError(Exception):
    """A state directory that can't be used: which, and why."""


def site_folder() -> Path:
    """Where a site describes its models and environments."""
    return Path(os.environ.get(SITE_VARIABLE) or "/etc/rootstockd")


def own_state() -> Path:
    """Where this user's commands write: what the variable says, root's, or `~/.local/share/rootstockd`."""
    if said := os.environ.get(VARIABLE):
        return Path(said).absolute()
    return SYSTEM_STATE if os.geteuid() == 0 else platformdirs.user_data_path("rootstockd")


def state_dirs() -> list[Path]:
    """Where to look, in this order; those that are there.

    Raises:
        StateError: others could have put something there; environments and weights are code.
    """
    places = [own_state()] if os.environ.get(VARIABLE) else [own_state(), SYSTEM_STATE]
    # os.path.isdir says no where one may not look
    there = [place for place in dict.fromkeys(places) if os.path.isdir(place)]  # noqa: PTH112
    for place in there:
        check_trusted(place)
    return there


def check_trusted(folder: Path) -> None:
    """Whether nobody but its owner could have written to a folder, and its owner is one to trust.

    That is oneself, root, or whoever owns what the environment variable names: saying so was the user's choice.

    Raises:
        StateError: it is not so.
    """
    status = folder.stat()
    if status.st_mode & stat.S_IWOTH:
        raise StateError(f"all users may write to {folder}, so what is in it is not to be trusted: chmod o-w {folder}")
    if status.st_uid not in (0, os.geteuid()) and not os.environ.get(VARIABLE):
        raise StateError(f"{folder} belongs to another user (uid {status.st_uid}), so what is in it is not used.")
