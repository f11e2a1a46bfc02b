"""What a daemon's successor has of it: else environment and limits would be those of the shell that restarts it."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

_KEPT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMBA_"),  # how it computes
    *("ATEN_", "ONEDNN_", "DNNL_", "BLIS_", "MALLOC_"),
    *("CUDA_", "CUBLAS_", "CUEQ", "NVIDIA_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_", "TRITON_"),
    *("ROOTSTOCKD_", "XDG_", "SLURM_"),  # where things lie
)
_PYTHONPATH = "PYTHONPATH"
_LIMITS = {
    "open files": (resource.RLIMIT_NOFILE, "n"),
    "address space": (resource.RLIMIT_AS, "v"),
    "data": (resource.RLIMIT_DATA, "d"),
    "file size": (resource.RLIMIT_FSIZE, "f"),
    "processes": (resource.RLIMIT_NPROC, "u"),
    "seconds of CPU time": (resource.RLIMIT_CPU, "t"),
    "locked memory": (resource.RLIMIT_MEMLOCK, "l"),
}
"""What sessions and workers could lack, and how `ulimit` calls it."""


def take_environment(process: int) -> None:
    """Have this process be in the environment for a daemon that takes the place of another: to check it, and start it.

    It is this process's, as a newer rootstockd may need what its own has; but of variables that say how models are
    computed and where things lie, the running daemon's, and what its PYTHONPATH names is found behind our own.

    Args:
        process: a pidfd of the running daemon.
    """
    theirs = _environment_of(process)
    if theirs is None:
        return
    found = {name: value for name, value in os.environ.items() if not name.startswith(_KEPT)}
    found.update((name, value) for name, value in theirs.items() if name.startswith(_KEPT))
    folders = [*os.environ.get(_PYTHONPATH, "").split(os.pathsep), *theirs.get(_PYTHONPATH, "").split(os.pathsep)]
    if joined := os.pathsep.join(dict.fromkeys(filter(None, folders))):
        found[_PYTHONPATH] = joined
    os.environ.clear()
    os.environ.update(found)


def take_limits(process: int) -> list[str]:
    """Have this process run where, and under limits no lower than, the daemon does whose successor it starts.

    Limits that are higher here stay: a restart may be there to raise them.

    Args:
        process: a pidfd of the running daemon.

    Returns:
        What can't be had, in words.
    """
    pid = _pid_of(process)
    if pid is None:
        return []
    lacking = []
    with contextlib.suppress(OSError):  # it has gone
        processors, niceness = os.sched_getaffinity(pid), os.getpriority(os.PRIO_PROCESS, pid)
        with contextlib.suppress(OSError):  # none of them may be used here
            os.sched_setaffinity(0, processors)
        if missing := len(processors - os.sched_getaffinity(0)):
            lacking.append(f"processors: {missing} of its {len(processors)} may not be used from here")
        try:
            os.setpriority(os.PRIO_PROCESS, 0, niceness)
        except OSError:  # only root lowers it
            lacking.append(
                f"niceness: here it is {os.getpriority(os.PRIO_PROCESS, 0)}, where the one that runs has {niceness}"
            )
    for name, (limit, letter) in _LIMITS.items():
        with contextlib.suppress(OSError):  # it has gone
            theirs, ours = resource.prlimit(pid, limit), resource.getrlimit(limit)
            try:
                resource.setrlimit(limit, (_higher(theirs[0], ours[0]), _higher(theirs[1], ours[1])))
            except ValueError:  # only root raises a hard limit
                lacking.append(
                    f"{name}: here at most {ours[1]} may be had (`ulimit -H{letter}`), where the one that runs has "
                    f"{'no limit' if theirs[1] == resource.RLIM_INFINITY else theirs[1]}"
                )
    return lacking


def _higher(limit: int, other: int) -> int:
    return resource.RLIM_INFINITY if resource.RLIM_INFINITY in (limit, other) else max(limit, other)


def _environment_of(process: int) -> dict[str, str] | None:
    """With what a process was started; None where that can't be read."""
    if (pid := _pid_of(process)) is not None:
        with contextlib.suppress(OSError):
            block = Path(f"/proc/{pid}/environ").read_bytes()
            pairs = (os.fsdecode(entry).partition("=") for entry in block.split(b"\0") if b"=" in entry)
            return {name: value for name, _, value in pairs}
    return None


def _pid_of(process: int) -> int | None:
    """Of a pidfd; None where its process has gone, or that can't be read."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/self/fdinfo/{process}").read_text().splitlines():
            if line.startswith("Pid:") and int(line.split()[1]) > 0:
                return int(line.split()[1])
    return None
