"""The benchmarks on a GPU at Modal, for whoever has an account there.

`modal run benchmarks/modal_app.py::benchmark_all` runs everything, `::benchmark_ipc_overhead` what a step costs. The
result and its plots come back into benchmarks/results/. This file was import-checked at most; it has not been run.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import modal

HERE = Path(__file__).resolve().parent
SOURCE = "/rootstockd"
LABEL = "modal"
PARTS = ("rootstockd", "rootstock_client", "benchmarks")
FILES = ("pyproject.toml", "README.md", "LICENSE")

image = modal.Image.debian_slim(python_version="3.12").apt_install("git")
if modal.is_local():
    for name in PARTS:
        image = image.add_local_dir(HERE.parent / name, f"{SOURCE}/{name}", copy=True, ignore=["**/__pycache__"])
    for name in FILES:
        image = image.add_local_file(HERE.parent / name, f"{SOURCE}/{name}", copy=True)
image = image.run_commands(f"pip install -e '{SOURCE}[daemon,mace]' matplotlib")
app = modal.App("rootstockd-benchmarks", image=image)


@app.function(gpu="A100", cpu=8.0, memory=65_536, timeout=4 * 3_600)  # type: ignore[untyped-decorator]
def benchmark(arguments: list[str]) -> dict[str, bytes]:
    """Run the benchmarks there; the files that came of it."""
    folder = Path("/tmp/results")
    command = [sys.executable, "-m", "benchmarks.run_local", "--results", str(folder), "--label", LABEL, *arguments]
    subprocess.run(command, cwd=SOURCE, check=True)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fetch(arguments: list[str]) -> None:
    """Run, and keep what came of it here."""
    for name, content in benchmark.remote(arguments).items():
        (HERE / "results" / name).write_bytes(content)


@app.local_entrypoint()  # type: ignore[untyped-decorator]
def benchmark_all() -> None:
    """Everything."""
    fetch([])


@app.local_entrypoint()  # type: ignore[untyped-decorator]
def benchmark_ipc_overhead() -> None:
    """What a step costs: without a model, and with one."""
    fetch(["--only", "ipc", "--only", "overhead"])
