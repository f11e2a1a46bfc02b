"""The same bits each time, on GPUs too: what `exact` asks of torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

THREADS = 4
"""How many share a sum, if the machine has as many processors. It says where the sum is split, and so its last bits,
which are not to follow from `OMP_NUM_THREADS` where the daemon was started, or the processors that it may use now."""


def fuse_nothing() -> None:
    """Have TorchScript, where it is in use, not fuse kernels on GPUs for shapes that it has seen before.

    The first evaluations of a shape would have other last bits than those after.
    """
    if (torch := sys.modules.get("torch")) is not None:
        torch._C._jit_override_can_fuse_on_gpu(False)  # noqa: SLF001, FBT003 - there is no public way


@contextmanager
def deterministic() -> Iterator[None]:
    """Have torch, where it is in use, add in an order that is the same each time.

    Else a GPU's threads add as they come, and a processor's where their number splits a sum. Torch warns of operations
    that have no such order. cuBLAS has its own by a variable (`worker_process.TUNING`).

    `torch.use_deterministic_algorithms` does the same, and imports torch.compile's compiler: 0.7 s of a session's first
    step.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, os.sysconf("SC_NPROCESSORS_ONLN")))
    own_wish = torch.are_deterministic_algorithms_enabled()  # the model's
    torch.utils.deterministic.fill_uninitialized_memory = False  # is for finding mistakes, and takes time
    if not own_wish:
        _set(torch, on=True)
    try:
        yield
    finally:
        if not own_wish:
            _set(torch, on=False)
        torch.set_num_threads(threads)


def _set(torch: Any, *, on: bool) -> None:
    torch._C._set_deterministic_algorithms(on, warn_only=on)  # noqa: SLF001
    compiler: Any = sys.modules.get("torch._inductor.config")
    if hasattr(compiler, "deterministic"):  # older ones have no such thing
        compiler.deterministic = on
