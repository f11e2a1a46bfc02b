"""The log of a daemon in the background: a file of its own user's, for nobody else to read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from rootstockd.cli.common import Refused


def open_log(path: Path) -> BinaryIO:
    """Open a log for its daemon to write, with folders for it.

    Raises:
        Refused: it can't be, or somebody else could read or change it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.fdopen(_open(path, os.O_CREAT), "ab")
    except OSError as error:
        raise Refused(f"can't write the log {path}: {error.strerror}. Choose another --log-file.") from error


def check_log(path: Path) -> None:
    """Whether `open_log` could open it, without making anything.

    Raises:
        OSError: it could not.
    """
    try:
        os.close(_open(path))
    except FileNotFoundError:
        above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
        if not above.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES)) from None


def _open(path: Path, flags: int = 0) -> int:
    # no link: in a folder like /tmp somebody may have put one there, to a file of ours
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | flags, 0o600)
    info = os.fstat(fd)
    if stat.S_ISREG(info.st_mode) and info.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, f"it belongs to uid {info.st_uid}")
    return fd
