"""Reading a TOML file such that no file, whatever it is, keeps or stops the daemon that reads it."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path, check: Callable[[os.stat_result], None] = lambda _: None) -> dict[str, Any]:
    """What a file says; `/dev/null` says nothing.

    Args:
        path: the file.
        check: told what is known of the file that was opened, to raise what it has against it.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, or no TOML, or nested too deeply.
    """
    # opening a named pipe would wait for whoever writes into it
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) and not _is_null(status):
            raise ValueError("it is no regular file.")
        check(status)
        try:
            return tomllib.load(file)
        except RecursionError:
            raise ValueError("its tables or lists are nested too deeply.") from None


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev
