"""How much memory a worker may use on a CPU, and giving back what it no longer needs; what it has of a GPU's."""

from __future__ import annotations

import ctypes
import os
import resource
import sys

MEMORY_VARIABLE = "ROOTSTOCKD_WORKER_MEMORY"
"""Has a worker's limit in bytes, if it has one."""


def memory_limit() -> int | None:
    """This worker's limit in bytes, if it has one."""
    text = os.environ.get(MEMORY_VARIABLE)
    return int(text) if text else None


def limit_memory() -> None:
    """Have the kernel refuse more: then one structure fails, before the kernel kills whom it likes."""
    limit = memory_limit()
    if limit is not None:
        # not RLIMIT_AS: libraries reserve far more addresses than they use
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def trim() -> None:
    """Give freed memory back to the system: whoever needs it next may be another process."""
    ctypes.CDLL(None).malloc_trim(0)


def gpu_memory() -> int | None:
    """Bytes that torch holds of the GPU; None where none is in use. CUDA itself has some hundred MiB more."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_reserved())
