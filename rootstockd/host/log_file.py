"""The log of a daemon in the background: its standard output and error."""

from __future__ import annotations

import errno
import logging
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, TextIO


class LogFormatter(logging.Formatter):
    """Has further lines of what is logged begin with spaces: none that a model or a user wrote looks like our own."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n  ")


def open_log(path: Path) -> BinaryIO:
    """Open a log for its daemon to write.

    It is made for nobody else to read; one that is there keeps its mode, by which its owner may let others read it.

    Raises:
        OSError: it can't be, or somebody else could change it.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.fdopen(_open(path, os.O_CREAT), "ab")


def read_log(path: Path) -> TextIO:
    """Open a log to show it: a file, and no link, device or FIFO, of which reading might never end.

    Raises:
        OSError: it can't be, or is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no file")
    return os.fdopen(fd, encoding="utf-8", errors="replace")


def check_log(path: Path) -> None:
    """Whether `open_log` could open it, without making anything.

    Raises:
        OSError: it could not.
    """
    try:
        os.close(_open(path))
    except FileNotFoundError:
        check_folder(path)


def check_folder(path: Path) -> None:
    """Whether a file could be made, perhaps with its folder; nothing is made.

    Raises:
        OSError: it could not.
    """
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    if not os.access(above, os.W_OK | os.X_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def _open(path: Path, flags: int = 0) -> int:
    # no link: in a folder like /tmp somebody may have put one there, to a file of ours
    # nor is a reader of a FIFO waited for
    mode = os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    fd = os.open(path, mode | flags, 0o600)
    os.set_blocking(fd, True)
    info = os.fstat(fd)
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISCHR(info.st_mode)):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is neither a file nor a device")
    if stat.S_ISREG(info.st_mode) and info.st_uid != os.geteuid():
        os.close(fd)
        raise PermissionError(errno.EPERM, f"it belongs to uid {info.st_uid}")
    if stat.S_ISREG(info.st_mode) and info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(fd)
        raise PermissionError(errno.EPERM, "others may write to it; `chmod go-w` it")
    return fd


def reopen_log(path: Path) -> None:
    """Write into `path` from now on, where this process's log was moved away from it, as logrotate does.

    Raises:
        OSError: it can't be opened; all goes on into the old one.
    """
    ours = sys.stderr.fileno()
    if path.exists() and os.path.samestat(path.stat(), os.fstat(ours)):
        return
    with open_log(path) as log:
        for stream in (sys.stdout.fileno(), ours):
            os.dup2(log.fileno(), stream)
