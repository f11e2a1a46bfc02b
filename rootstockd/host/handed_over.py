"""What a process that we start is told, and no other user: arguments can be read by all, and have at most 128 KiB."""

from __future__ import annotations

import contextlib
import os
from typing import BinaryIO


def handed_over(text: str) -> BinaryIO:
    """Text as a file in memory, at its beginning: to be standard input of a process, or another descriptor of it.

    Raises:
        OSError: it can't be written; a limit on the size of files (`ulimit -f`) holds for it, too.
    """
    file = os.fdopen(os.memfd_create("rootstockd-handed-over"), "w+b")
    try:
        file.write(text.encode())
        file.seek(0)
    except OSError:
        with contextlib.suppress(OSError):  # what is left in its buffer
            file.close()
        raise
    return file
