"""What a result was measured on and with: enough to judge it by, nothing that names the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil
import pynvml

from benchmarks.common import REPOSITORY
from rootstockd.doctor.software import torch_in
from rootstockd.host.devices import gpu_memory, seen_gpus

PACKAGES = ("numpy", "ase", "torch", "mace-torch", "e3nn", "cuequivariance-torch", "uvloop", "psutil", "matplotlib")


def gpus() -> list[str]:
    """The NVIDIA GPUs that programs see here, by model, with the driver's version."""
    seen = seen_gpus()
    if not seen:
        return []
    pynvml.nvmlInit()
    try:
        driver = str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
    memories = [gpu_memory(gpu.uuid) for gpu in seen]
    return [
        f"{gpu.name}, {memory.total / 2**20:.0f} MiB, driver {driver}" if memory else gpu.name
        for gpu, memory in zip(seen, memories, strict=True)
    ]


def free_gpu_memory() -> float | None:
    """Free memory of the first GPU that programs see, in MB; None where there is none."""
    seen = seen_gpus()
    memory = gpu_memory(seen[0].uuid) if seen else None
    return memory.free / 1e6 if memory else None


def hardware(cpus: list[int]) -> dict[str, Any]:
    """CPUs, memory, GPUs."""
    model = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
        "cpus used": len(cpus),
        "memory / GB": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus(),
        "load average at the start": [round(load, 2) for load in os.getloadavg()],
    }


def software() -> dict[str, str]:
    """Versions."""
    found = {"python": platform.python_version(), "kernel": platform.release(), "rootstockd": _version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if "torch" in found:
        _, cuda = torch_in(Path(str(importlib.metadata.distribution("torch").locate_file(""))))
        found["torch's CUDA"] = ".".join(map(str, cuda)) if cuda else "none"
    return found


def _version() -> str:
    import rootstockd  # noqa: PLC0415

    return rootstockd.__version__


def commit() -> str:
    """The commit, and whether the tree has other changes than in the benchmarks and documents."""
    git = shutil.which("git")
    if git is None or not (REPOSITORY / ".git").exists():
        return "unknown"

    def said(*arguments: str) -> str:
        done = subprocess.run([git, *arguments], cwd=REPOSITORY, check=False, capture_output=True, text=True)
        return done.stdout.strip()

    changed = said("status", "--porcelain", "--", "rootstockd", "rootstock_client")
    return said("rev-parse", "HEAD") + (" with changes" if changed else "")
