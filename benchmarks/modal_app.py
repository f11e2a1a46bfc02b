"""The benchmarks on a GPU at Modal, for whoever has an account there.

`modal run benchmarks/modal_app.py::benchmark_all` runs everything, `::benchmark_ipc_overhead` what a step costs. The
result and its plots come back into benchmarks/results/. The tests run all of this but Modal's own part: no image was
built and nothing was run there yet. The image has no cuEquivariance, whose kernels are under a licence of NVIDIA's own
(docs/environments.md has the command that installs it).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import modal

HERE = Path(__file__).resolve().parent
SOURCE = "/rootstockd"
LABEL = "modal"
PARTS = ("rootstockd", "rootstock_client", "benchmarks", "systemd")
FILES = ("pyproject.toml", "constraints.txt", "README.md", "LICENSE")
CPUS = 8
ALL = ["--cpus", str(CPUS)]
IPC_OVERHEAD = [*ALL, "--only", "ipc", "--only", "overhead"]

image = modal.Image.debian_slim(python_version="3.12")
if modal.is_local():
    for name in PARTS:
        image = image.add_local_dir(HERE.parent / name, f"{SOURCE}/{name}", copy=True, ignore=["**/__pycache__"])
    for name in FILES:
        image = image.add_local_file(HERE.parent / name, f"{SOURCE}/{name}", copy=True)
image = image.run_commands(f"pip install -c {SOURCE}/constraints.txt -e '{SOURCE}[daemon,mace]' matplotlib")
app = modal.App("rootstockd-benchmarks", image=image)


@app.function(gpu="A100", cpu=float(CPUS), memory=131_072, timeout=4 * 3_600)
def benchmark(arguments: list[str], source: str = SOURCE) -> dict[str, bytes]:
    """Run the benchmarks there; the files that came of it, also where some of them failed.

    Args:
        arguments: for `benchmarks.run_local`.
        source: where the checkout lies.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.run_local", "--results", folder, "--label", LABEL, *arguments]
        done = subprocess.run(command, cwd=source, check=False)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    if not files:
        raise RuntimeError(f"the benchmarks ended with status {done.returncode} and left nothing")
    return files


def fetch(arguments: list[str]) -> None:
    """Run, and keep what came of it here."""
    # the image has no checkout to ask
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, check=False, capture_output=True, text=True)
    for name, content in benchmark.remote([*arguments, "--commit", asked.stdout.strip() or "unknown"]).items():
        (HERE / "results" / name).write_bytes(content)


@app.local_entrypoint()
def benchmark_all() -> None:
    """Everything."""
    fetch(ALL)


@app.local_entrypoint()
def benchmark_ipc_overhead() -> None:
    """What a step costs: without a model, and with one."""
    fetch(IPC_OVERHEAD)
