"""Users and groups by name, for messages."""

from __future__ import annotations

import grp
import pwd


def user_name(uid: int) -> str:
    """Login name, or the number where there is none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def group_name(gid: int) -> str:
    """Name of a group, or its number where it has none."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
