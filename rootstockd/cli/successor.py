"""What a daemon's successor has of its environment: else it would be that of the shell which happens to restart it."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_KEPT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "NUMBA_"),  # how it computes
    *("CUDA_", "CUBLAS_", "NVIDIA_", "PYTORCH_", "TORCH_", "TORCHINDUCTOR_"),
    *("ROOTSTOCKD_", "XDG_", "SLURM_"),  # where things lie
)
_PYTHONPATH = "PYTHONPATH"


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


def _environment_of(process: int) -> dict[str, str] | None:
    """With what a process was started; None where that can't be read."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/self/fdinfo/{process}").read_text().splitlines():
            if line.startswith("Pid:") and int(line.split()[1]) > 0:
                block = Path(f"/proc/{int(line.split()[1])}/environ").read_bytes()
                pairs = (os.fsdecode(entry).partition("=") for entry in block.split(b"\0") if b"=" in entry)
                return {name: value for name, _, value in pairs}
    return None
