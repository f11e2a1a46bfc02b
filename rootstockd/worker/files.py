"""Opening files that may be anything by now; what tells one file from another."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from typing import BinaryIO


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file; no where one may not look, of which `Path.is_file` makes an error."""
    return os.path.isfile(path)  # noqa: PTH113


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


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """All that is in a file.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    with open_regular(path) as file:
        return file.read()


def digest_of(path: str | os.PathLike[str]) -> str:
    """A file's SHA-256, in hexadecimal digits.

    Raises:
        OSError: it can't be read, or is no regular file.
    """
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
