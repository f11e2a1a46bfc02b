"""Reading a TOML file such that no file, whatever it is, keeps or stops the daemon that reads it."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MOST_BYTES = 1 << 19
"""Of a file; a thousand models have room in that. What is read is up to a thousand times as large in memory."""
MOST_PARTS = 32
"""Of a key: `a.b.c` has three. What the parser takes of memory and time grows as their square."""

_KEY = re.compile(r"\[{1,2}([^\]]+)\]|([^=#\[]+)=")
"""Of a table, or of a value, at the beginning of a line without its blanks."""
_ESCAPED = re.compile(r"\\[\\\"]")
_NO_CODE = re.compile(
    r"""\"{3}(?:.*?\"{3,5}|.*) | '{3}(?:.*?'{3,5}|.*) | "[^"\n]*"? | '[^'\n]*'? | \#[^\n]*""", re.DOTALL | re.VERBOSE
)
"""Strings of each kind, of which nothing is escaped, to their ends or to that of the text; and comments."""
_LONG_KEY = re.compile(rf"(?:\.[^.,=\[\]{{}}\n]*){{{MOST_PARTS}}}")
"""So many dots of one key, whose quoted parts are left out."""


def read_toml(path: Path, check: Callable[[os.stat_result], None] = lambda _: None) -> dict[str, Any]:
    """What a file says; `/dev/null` says nothing.

    Args:
        path: the file.
        check: told what is known of the file that was opened, to raise what it has against it.

    Raises:
        OSError: it can't be read.
        ValueError: it is no regular file, or too large, or no TOML, or nested too deeply.
    """
    try:
        opened = open(path, "rb", opener=_open)  # noqa: SIM115 - closed below
    except IsADirectoryError:
        raise ValueError("it is a folder, and no file.") from None
    with opened as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) and not _is_null(status):
            raise ValueError("it is no regular file.")
        check(status)
        content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes.")
        text = content.decode()
        if _LONG_KEY.search(_NO_CODE.sub("", _ESCAPED.sub("", text))):
            raise ValueError(f"a key of it has more than {MOST_PARTS} parts.")
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ValueError(_in_words(str(error), text)) from error
        except RecursionError:
            raise ValueError("its tables or lists are nested too deeply.") from None


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a named pipe would wait for whoever writes into it


def _in_words(error: str, text: str) -> str:
    """What the parser says, and of a key that is there twice, which."""
    if not error.startswith(("Cannot overwrite a value", "Cannot declare")):
        return error
    lines = [line.strip() for line in text.splitlines()]
    place = re.search(r"at line (\d+)", error)
    number = int(place[1]) if place else len(lines)
    # the place is that behind the value, which may have several lines
    while number > 1 and not _KEY.match(lines[number - 1]):
        number -= 1
    key = _KEY.match(lines[number - 1])
    return f"{(key[1] or key[2]).strip()[:100]} is set twice, again in line {number}." if key else error


def _is_null(status: os.stat_result) -> bool:
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == os.stat(os.devnull).st_rdev
