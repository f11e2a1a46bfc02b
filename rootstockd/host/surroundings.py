"""What a daemon finds around it that can't be meant so, in words for whoever started it."""

from __future__ import annotations

import os
from pathlib import Path


def closed_folder(folder: Path) -> list[str]:
    """That those who may use the daemon don't find its sockets in there."""
    try:
        if folder.stat().st_mode & 0o011:
            return []
    except OSError:  # it is yet to be made; or what is in the way of its sockets is said of these
        return []
    return [f"nobody else can look into {folder}, where the sockets are: `chmod go+x {folder}` lets others use them"]


def one_thread() -> list[str]:
    """That workers on the CPU get a variable that was meant for jobs."""
    processors = len(os.sched_getaffinity(0))
    if processors == 1 or os.environ.get("OMP_NUM_THREADS") != "1":
        return []
    what = f"OMP_NUM_THREADS is 1, so that models on the CPU compute with 1 of {processors} processors"
    return [f"{what}: it is meant for jobs. `unset OMP_NUM_THREADS`, and start the daemon anew"]
