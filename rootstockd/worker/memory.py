"""How much memory a worker may use, how much a pass took, and giving back what is no longer needed."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Iterator, NamedTuple, Sequence

MEMORY_VARIABLE = "ROOTSTOCKD_WORKER_MEMORY"
"""Has a worker's limit in bytes, if it has one."""

_FRESH = 1.0
"""Seconds for which it is believed how much is free: looking costs up to 100 µs, and batches may be quick."""

_SURPLUS = 2**28
"""Bytes of a GPU that torch's allocator may keep for nobody: asking the driver for them anew takes a millisecond."""

_SHARE = 0.9
"""The part of what is free that a worker may take: the rest is for the daemon and for jobs."""

_ALWAYS = 2**26
"""Bytes that it may have in any case: small allocations that fail end a process."""

_SCORE, _FIRST_TO_GO = Path("/proc/self/oom_score_adj"), 500
"""Where the kernel is told whom to kill where memory lacks, from -1000 to 1000. A worker is replaced, a job is not."""

_GROUPS = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current", "inactive_file "),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
)
"""Of version 2 and of version 1: a limit, what is used, and the line of memory.stat that the kernel could drop."""
_UNLIMITED = 2**60
"""Version 1 says 2**63, less a page."""

_peak: int | None = None
"""The file with which the kernel forgets this process's peak; None where there is no such file."""


def memory_limit() -> int | None:
    """This worker's limit in bytes, if it has one."""
    text = os.environ.get(MEMORY_VARIABLE)
    return int(text) if text else None


def limit_memory() -> None:
    """Have the kernel refuse more, so that one structure fails; and if it must kill, kill this process, not a job."""
    limit = memory_limit()
    if limit is not None:
        # not RLIMIT_AS: libraries reserve far more addresses than they use
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)  # by `ulimit -d`, which nobody but root raises
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    with contextlib.suppress(OSError):
        if int(_SCORE.read_text()) < _FIRST_TO_GO:
            _SCORE.write_text(str(_FIRST_TO_GO))


class Bound:
    """Keeps a worker on a CPU within what the machine has, as far as that can be known a second before."""

    def __init__(self) -> None:
        self._groups = tuple(control_groups())
        self._renew_at = float("-inf")

    def renew(self) -> None:
        """Have the kernel refuse what would take nearly all that is free now; looks once a second."""
        if (now := time.monotonic()) < self._renew_at:
            return
        self._renew_at = now + _FRESH
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        usage = _usage()
        # what the allocator has and gave back to the kernel is used again without asking, and is counted as taken
        soft = usage.resident - usage.shared + int(_SHARE * max(0, _unused(self._groups)))
        soft = max(soft, usage.data + _ALWAYS)
        resource.setrlimit(resource.RLIMIT_DATA, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def open_peak() -> None:
    """Make it possible to measure one pass after another. A confined worker can't open the file any more."""
    global _peak  # noqa: PLW0603 - it is the process's
    with contextlib.suppress(OSError):  # not every kernel has it: peaks are then those since the start
        _peak = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)


def trim() -> None:
    """Give freed memory back to the system: whoever needs it next may be another process."""
    ctypes.CDLL(None).malloc_trim(0)


def _cuda() -> Any:
    """torch.cuda; None where no GPU is in use."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def gpu_memory() -> int | None:
    """Bytes that torch holds of the GPU; None where none is in use. CUDA itself has some hundred MiB more."""
    return None if (cuda := _cuda()) is None else int(cuda.memory_reserved())


class GpuCache:
    """What torch's allocator keeps of a GPU, so that the next pass finds it: other workers can't have it."""

    def __init__(self) -> None:
        self._bound = 0
        """Bytes that it could not give back: pools of CUDA graphs, and parts of blocks that are in use."""

    def empty(self) -> None:
        """Have it give back all that is in no use: a pass that did not fit had nearly all that there is."""
        if (cuda := _cuda()) is not None:
            cuda.empty_cache()

    def trim(self) -> None:
        """Have it give back what no pass has needed since the last time, where that is much."""
        if (cuda := _cuda()) is None:
            return
        self._bound = min(self._bound, cuda.memory_reserved() - cuda.memory_allocated())  # a pool may be gone
        needed = cuda.max_memory_allocated() + self._bound
        cuda.reset_peak_memory_stats()
        if cuda.memory_reserved() - needed > max(_SURPLUS, needed // 2):
            cuda.empty_cache()
            self._bound = cuda.memory_reserved() - cuda.memory_allocated()


class Memory(ABC):
    """A device's, as a worker sees it."""

    def __init__(self) -> None:
        self._free = 0
        self._looked = float("-inf")

    def free(self) -> int:
        """Bytes that a pass could have, as of a second ago; what the allocator keeps for it is among them."""
        if (now := time.monotonic()) > self._looked + _FRESH:
            self._free, self._looked = self._look(), now
        return self._free

    @abstractmethod
    def _look(self) -> int:
        """Bytes that a pass could have now."""

    @abstractmethod
    def begin(self) -> None:
        """What comes now is measured."""

    @abstractmethod
    def taken(self) -> int:
        """Bytes that it took at its worst, beside what was there when it began."""


def memory_of(device: str) -> Memory:
    """The memory of a device, as torch calls it."""
    return CpuMemory() if device == "cpu" else CudaMemory(device)


class CpuMemory(Memory):
    """The machine's memory: what this process may have by its own limit, its control groups' and what there is.

    A peak is what the kernel has seen resident, or more, where a pass got addresses from it that it has not used in
    full: a limit counts those. Before it is measured, memory that the allocator keeps for later is given back: what a
    pass takes of that would not be seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self._groups = tuple(control_groups())
        self._before = _usage()

    def _look(self) -> int:
        usage = _usage()
        heap = _free_heap()
        kept = max(0, usage.resident - self._before.resident)
        kept = kept if heap is None else min(kept, heap)  # some of it is in use: tables, for instance
        free = _unused(self._groups) + kept
        _, limit = resource.getrlimit(resource.RLIMIT_DATA)  # the other one is `Bound`'s, and follows from what is free
        if limit != resource.RLIM_INFINITY:  # counts what the allocator has, be it resident or not
            free = min(free, limit - usage.data + (kept if heap is None else heap))
        return max(0, free)

    def begin(self) -> None:
        trim()
        if _peak is not None:
            os.write(_peak, b"5")
        self._before = _usage()

    def taken(self) -> int:
        """Bytes that it took at its worst; more than that where the kernel has only the peak since the start."""
        return max(_peak_resident() - self._before.resident, _usage().data - self._before.data)


class CudaMemory(Memory):
    """A GPU's memory, as torch's allocator and CUDA see it.

    Args:
        device: as torch calls it.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device
        self._cuda: Any = sys.modules["torch"].cuda
        self._before = 0

    def _look(self) -> int:
        kept = self._cuda.memory_reserved(self._device) - self._cuda.memory_allocated(self._device)
        return int(self._cuda.mem_get_info(self._device)[0] + kept)

    def begin(self) -> None:
        self._cuda.reset_peak_memory_stats(self._device)
        self._before = self._cuda.memory_allocated(self._device)

    def taken(self) -> int:
        return int(self._cuda.max_memory_allocated(self._device) - self._before)


def control_groups() -> Iterator[Path]:
    """The folders of this process's control groups and those above them: of version 2, and of version 1's memory."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        root = _GROUPS
        if controllers:
            if "memory" not in controllers.split(","):
                continue
            root = _GROUPS / "memory"
        folder = root / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(root))


def control_group_memory(group: Path) -> Iterator[tuple[int, int]]:
    """The limit of a control group and what it uses, but for files that the kernel could drop."""
    for limit_file, used_file, dropped in _GROUP_FILES:
        try:
            if (limit := int((group / limit_file).read_text())) >= _UNLIMITED:
                continue
            used = int((group / used_file).read_text())
            lines = (group / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):  # it is of the other version, or the root; "max" is no number
            continue
        yield limit, used - sum(int(line.split()[1]) for line in lines if line.startswith(dropped))


def _unused(groups: Sequence[Path]) -> int:
    """Bytes that neither the machine nor these control groups have given to anybody."""
    return min([_available(), *(limit - used for group in groups for limit, used in control_group_memory(group))])


class _MallocInfo(ctypes.Structure):
    """glibc's `struct mallinfo2`: ten numbers, of which the ninth is `fordblks`."""

    _fields_ = (("numbers", ctypes.c_size_t * 10),)


def _free_heap() -> int | None:
    """Bytes that the allocator has and nobody uses; None before glibc 2.33."""
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo is None:
        return None
    mallinfo.restype = _MallocInfo
    return int(mallinfo().numbers[8])


class _Usage(NamedTuple):
    """What this process has, in bytes."""

    resident: int
    shared: int
    """Resident, but a file's."""
    data: int
    """What RLIMIT_DATA is about, resident or not."""


def _usage() -> _Usage:
    numbers = Path("/proc/self/statm").read_text().split()
    return _Usage(*(int(numbers[field]) * resource.getpagesize() for field in (1, 2, 5)))


def _peak_resident() -> int:
    """The most bytes of this process that were resident at once."""
    peak = _kibibytes("/proc/self/status", "VmHWM:")
    # gVisor has none; not elsewhere: this one is at least what the process had that started this one
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def _available() -> int:
    """Bytes of the machine's memory that are free, or that the kernel could give back at once."""
    available = _kibibytes("/proc/meminfo", "MemAvailable:")
    assert available is not None  # since Linux 3.14
    return available


def _kibibytes(path: str, name: str) -> int | None:
    """What the kernel says of something, in bytes."""
    lines = Path(path).read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
