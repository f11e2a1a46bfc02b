"""Landlock: files may be read as before, and written only where it is said.

It is the kernel's since Linux 5.13, where it is among its security modules, and learnt more with each ABI. Beside
writing, it refuses TCP (ABI 4), abstract Unix sockets and signals outside (6), and from the first ABI on ptrace of
processes outside, and with it their /proc/PID/mem.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import struct
from typing import Iterable

_libc = ctypes.CDLL(None, use_errno=True)
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION = 1
_PATH_BENEATH = 1

_WRITE_FILE = 1 << 1
_CHANGE_FOLDER = sum(1 << bit for bit in range(4, 13))  # REMOVE_DIR, REMOVE_FILE and seven times MAKE_...
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_TRUNCATE_SINCE = 3
_RIGHTS = ((1, _WRITE_FILE), (1, _CHANGE_FOLDER), (2, _REFER), (_TRUNCATE_SINCE, _TRUNCATE), (5, _IOCTL_DEV))
"""What to take, and the ABI that has it."""
_TCP, _SCOPES, _SIGNALS = 0b11, 0b11, 0b10
"""To bind and to connect; abstract sockets and signals."""
NONE = "this kernel has no Landlock: workers can write wherever the daemon's user can"
SCOPES_SINCE = 6
_SIZES = ((1, 8), (4, 16), (SCOPES_SINCE, 24))
"""Of the attributes above: files, then TCP, then scopes."""


def _call(number: int, *arguments: object) -> int:
    result = int(_libc.syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def abi() -> int:
    """The kernel's Landlock ABI, 0 for none."""
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION)
    except OSError:
        return 0


def restrict(writable: Iterable[str]) -> str:
    """Take the right to write away but in `writable` (folders with all that is in them, files, devices).

    It holds for this thread and what comes of it: there must be no other yet. Privileges that exec gives must be off
    already. A path that is not there or can't be opened is passed over: it can't be written to.

    Returns:
        What is not restricted for want of a newer kernel, or nothing.
    """
    version = abi()
    if not version:
        return NONE
    handled = sum(right for since, right in _RIGHTS if version >= since)
    attributes = struct.pack("=QQQ", handled, _TCP, _SCOPES)
    size = max(size for since, size in _SIZES if version >= since)
    try:
        ruleset = _call(_CREATE_RULESET, attributes, ctypes.c_size_t(size), 0)
        try:
            for path in writable:
                with contextlib.suppress(OSError):
                    _allow(ruleset, path, handled)
            _call(_RESTRICT_SELF, ruleset, 0)
        finally:
            os.close(ruleset)
    except OSError as error:
        return f"{NONE} ({error})"
    if version < _TRUNCATE_SINCE:
        return f"Landlock of this kernel (ABI {version}) does not keep workers from emptying files of the daemon's user"
    return ""


def signals_stay() -> int | None:
    """A descriptor to give to `landlock_restrict_self`: after that, a process can signal itself and what it starts.

    None where the kernel has no such thing.
    """
    if abi() < SCOPES_SINCE:
        return None
    attributes = struct.pack("=QQQ", 0, 0, _SIGNALS)
    return _call(_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)


def _allow(ruleset: int, path: str, rights: int) -> None:
    folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        if not stat.S_ISDIR(os.fstat(folder).st_mode):
            rights &= _WRITE_FILE | _TRUNCATE | _IOCTL_DEV
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, folder), 0)
    finally:
        os.close(folder)
