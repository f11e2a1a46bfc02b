"""`python -m benchmarks.run_local`: run the benchmarks on this machine."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine, peers, report
from benchmarks.common import HERE, REPOSITORY, Results, Settings, last_line, use_cpus

BENCHMARKS = ("ipc", "scale", "fairness", "bad_company", "size", "first_force", "backends", "overhead", "throughput")
"""Short ones first: a run that is cut has more of them."""
WITHOUT_MODELS = ("ipc", "scale", "fairness", "bad_company", "size")
SCHEMA = 1
CPUS = 2
"""How many CPUs all contestants together have, where they compute on CPUs."""
GPU_TESTS = (
    *("test_budget.py", "test_gpu.py", "test_gpu_families.py", "test_mace_cuequivariance.py", "test_mace_device.py"),
    "test_mace_device_lists.py",
)
"""Where the tests that need a GPU are; others need more packages."""


def run(options: argparse.Namespace, save: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """Run the benchmarks that were asked for; what goes into the file. Saved after each: a long run may be cut."""
    names = chosen(options)
    gpus = machine.gpus()
    device = ("cuda" if gpus else "cpu") if options.device == "auto" else options.device
    used = use_cpus(options.cpus or (CPUS if device == "cpu" else len(os.sched_getaffinity(0))))
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "device": device,
        "hardware": machine.hardware(used),
        "software": machine.software(),
        "commit": options.commit or machine.commit(),
    }
    root, rootstock = peers.rootstock(make=not options.no_install) if "ipc" in names else (None, "not needed")
    result["peers"] = {"Rootstock": rootstock, "ASE SocketIO": result["software"].get("ase", "")}
    result["peers"]["MACECalculator"] = result["software"].get("mace-torch", "not installed")
    result["benchmarks"] = {}
    with tempfile.TemporaryDirectory(prefix="rsd-bench-") as folder:
        settings = Settings(options.quick, device, Path(folder), root, options.sizes, options.jobs)
        for name in names:
            benchmark = importlib.import_module(f"benchmarks.{name}")
            print(f"{name}: {(benchmark.__doc__ or '').strip()}", flush=True)
            results = Results(name)
            start = time.perf_counter()
            try:
                benchmark.run(settings, results)
            except Exception as error:  # what it found before, and the others, are still worth having
                print(error, file=sys.stderr)
                results.note(f"failed: {type(error).__name__}: {last_line(error)}")
                results.goal("runs to its end", None, 1)
            result["benchmarks"][name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "parameters": results.parameters,
                "goals": results.goals,
                "notes": results.notes,
                "samples": results.samples,
            }
            save(result)
    return result


def chosen(options: argparse.Namespace) -> list[str]:
    """Which benchmarks the command line asks for."""
    names = [name for name in BENCHMARKS if not options.only or name in options.only]
    return [name for name in names if name in WITHOUT_MODELS] if options.ipc_only else names


def write(result: dict[str, Any], folder: Path, label: str) -> Path:
    """The file and its plots, beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        print("no matplotlib: there are no plots", file=sys.stderr)
        return path
    for name, benchmark in result["benchmarks"].items():
        if benchmark["samples"]:
            importlib.import_module(f"benchmarks.{name}").plot(benchmark, folder / f"{label}-{name}.svg")
    return path


def failed(result: dict[str, Any]) -> list[str]:
    """The benchmarks that did not come to their end."""
    found = result["benchmarks"].items()
    return [name for name, benchmark in found if any(note.startswith("failed: ") for note in benchmark["notes"])]


def gpu_tests() -> int:
    """The tests that need a GPU; pytest's exit status."""
    files = [f"tests/{name}" for name in GPU_TESTS]
    return subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *files], cwd=REPOSITORY, check=False).returncode


def sizes(text: str) -> tuple[int, ...]:
    """`10,100`."""
    return tuple(sorted({int(part) for part in text.split(",")}))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.run_local", description=__doc__)
    made.add_argument("--quick", action="store_true", help="a few minutes in all, less to be relied on")
    made.add_argument("--ipc-only", action="store_true", help=f"what needs no ML package: {', '.join(WITHOUT_MODELS)}")
    made.add_argument("--only", action="append", choices=BENCHMARKS, help="this one; may be given repeatedly")
    made.add_argument(
        "--sizes", type=sizes, default=(), metavar="N,N", help="atoms, in the benchmarks over systems of many sizes"
    )
    made.add_argument("--jobs", type=sizes, default=(), metavar="N,N", help="how many jobs at once, in throughput")
    made.add_argument(
        "--gpu-checks", action="store_true", help="the tests that need a GPU, then the benchmarks; fails without one"
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--cpus", type=int, help=f"how many CPUs all processes together may use (default {CPUS}; with a GPU all)"
    )
    made.add_argument("--no-install", action="store_true", help="make no environment for peers that have none yet")
    made.add_argument("--commit", help="what to say is measured, where there is no git checkout to ask")
    made.add_argument("--results", type=Path, default=HERE / "results", help="the folder for what comes of it")
    made.add_argument("--label", help="name of the result (by default the time)")
    return made


def prepare() -> None:
    """Make of this process, and so of all it starts, one that measures."""
    for name in [name for name in os.environ if name.startswith(("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_"))]:
        del os.environ[name]  # peers are measured as users start them, whatever this shell has
    os.environ["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # so that cuda:0 of the peers is the daemon's
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that daemons are stopped


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, run, write, report; 1 where something was not measured or checked, or failed on a GPU."""
    options = parser().parse_args(arguments)
    status = 0
    if options.gpu_checks:
        gpus = machine.gpus()
        if not gpus:
            print("There is no NVIDIA GPU here: nothing was checked.", file=sys.stderr)
            return 1
        print("\n".join(gpus), flush=True)
        status = gpu_tests()
        options.device = "cuda"
    if shutil.which("git") is None and not options.commit:
        print("no git: the result will not say which commit it is of", file=sys.stderr)
    label = options.label or dt.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M")
    result = run(options, lambda so_far: write(so_far, options.results, label))
    path = write(result, options.results, label)
    print()
    print("\n".join(report.goals(result)))
    print(f"written: {path}")
    if status:
        print(f"the tests that need a GPU did not pass: pytest ended with status {status}", file=sys.stderr)
    if failures := failed(result):
        print(f"not measured to the end: {', '.join(failures)}", file=sys.stderr)
    return int(bool(status or failures))


if __name__ == "__main__":
    prepare()
    sys.exit(main())
