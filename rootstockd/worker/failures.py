"""What an exception says, whoever raised it."""

from __future__ import annotations

import contextlib
import errno
import traceback

_NO_MEMORY = (
    "allocate memory",
    "failed to allocate",
    "out of memory",
    "alloc_failed",
    "bad_alloc",
    "cublas_status_not_initialized",
    "nvml_success == ",
)
"""What libraries say that have one class of exception for whatever goes wrong: torch, matscipy, C++, cuBLAS, which says
the one before the last where memory lacks for its handle. The last is torch's, too: while it words a lack of memory it
asks NVML what others have, which is forbidden on MIG instances."""
_NOT_MAPPED = ("cannot map zero-fill pages", "failed to map segment", "cannot allocate memory")
"""What the loader of shared libraries says, in an ImportError or an OSError without a number."""
_LOST = ("error return without exception set", "without setting an exception")
"""What Python says in a SystemError where memory lacked for the MemoryError, too."""


def text_of(error: BaseException) -> str:
    """Its text; not every exception can say it."""
    try:
        return str(error)
    except Exception:
        return ""


def describe(error: BaseException) -> str:
    """Its class and its text."""
    text = text_of(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def print_error(error: BaseException) -> None:
    """Into the daemon's log, which may be full."""
    with contextlib.suppress(Exception):
        traceback.print_exception(type(error), error, error.__traceback__)


class DoesNotFitError(MemoryError):
    """Memory lacked for a structure.

    Args:
        cause: what said so.
        atoms: how many atoms one like it may have; 0 where that is not known.
    """

    def __init__(self, cause: BaseException, atoms: int) -> None:
        super().__init__(shortage(cause))
        self.atoms = atoms


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory lacked."""
    return _lack(error) is not None


def _lack(error: BaseException) -> BaseException | None:
    """Who says that memory lacked: it, or what lies beneath a package's own words for a library that is not loaded."""
    if _says_so(error):
        return error
    cause = error.__cause__ or error.__context__
    of_loader = isinstance(error, ImportError) or (isinstance(error, OSError) and error.errno is None)
    return _lack(cause) if of_loader and cause is not None else None


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    text = text_of(error).lower()
    return any(
        isinstance(error, kind) and any(words in text for words in said)
        for kind, said in ((RuntimeError, _NO_MEMORY), ((ImportError, OSError), _NOT_MAPPED), (SystemError, _LOST))
    )


def disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or somebody's part of one, is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def in_disorder(error: BaseException) -> bool:
    """Whether CUDA says that it failed: from here on it answers everything in this process with that error."""
    return isinstance(error, RuntimeError) and "CUDA error" in text_of(error) and not out_of_memory(error)


def shortage(error: BaseException) -> str:
    """What such an exception says of how much there was, and how much was wanted; empty if nothing."""
    text = text_of(_lack(error) or error)
    begin = max(text.find("DefaultCPUAllocator: "), 0)  # torch puts the place in its source before it
    return ". ".join(text[begin:].split(". ")[:3]).strip(". \n")
