"""Opening files that may be anything by now."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str], flags: int = 0) -> BinaryIO:
    """Open a file to read, if it is one: to open a named pipe would be to wait for whoever writes into it.

    Args:
        path: the file.
        flags: further flags of `open(2)`.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", os.fspath(path))
    return os.fdopen(fd, "rb")
