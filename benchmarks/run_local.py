"""`python -m benchmarks.run_local`: run the benchmarks on this machine."""

from __future__ import annotations

import argparse
import datetime as dt
import importlib
import json
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, peers, report
from benchmarks.common import HERE, Results, Settings, use_cpus

BENCHMARKS = ("ipc", "first_force", "throughput", "scale", "overhead", "size")
WITHOUT_MODELS = ("ipc", "scale", "size")
SCHEMA = 1


def run(names: list[str], *, quick: bool, cpus: int, device: str) -> dict[str, Any]:
    """Run these benchmarks; what goes into the file. One that fails is noted, and the others go on."""
    used = use_cpus(cpus)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "created": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "quick": quick,
        "device": device,
        "hardware": machine.hardware(used),
        "software": machine.software(),
        "commit": machine.commit(),
    }
    root, rootstock = peers.rootstock() if "ipc" in names else (None, "not needed")
    result["peers"] = {"Rootstock": rootstock, "ASE SocketIO": result["software"].get("ase", "")}
    result["peers"]["MACECalculator"] = result["software"].get("mace-torch", "not installed")
    result["benchmarks"] = {}
    with tempfile.TemporaryDirectory(prefix="rsd-bench-") as folder:
        settings = Settings(quick, device, Path(folder), root)
        for name in names:
            print(f"{name}: {(importlib.import_module(f'benchmarks.{name}').__doc__ or '').strip()}", flush=True)
            start = time.perf_counter()
            try:
                results: Results = importlib.import_module(f"benchmarks.{name}").run(settings)
            except Exception as error:  # the others are still worth having
                print(error, file=sys.stderr)
                results = Results(name)
                last = (str(error).strip().splitlines() or [""])[-1]  # a traceback would name this machine's paths
                results.note(f"failed: {type(error).__name__}: {last}")
            result["benchmarks"][name] = {
                "seconds": round(time.perf_counter() - start, 1),
                "parameters": results.parameters,
                "goals": results.goals,
                "notes": results.notes,
                "samples": results.samples,
            }
    return result


def write(result: dict[str, Any], folder: Path, label: str) -> Path:
    """The file and its plots, beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{label}.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for name, benchmark in result["benchmarks"].items():
        if benchmark["samples"]:
            importlib.import_module(f"benchmarks.{name}").plot(benchmark, folder / f"{label}-{name}.svg")
    return path


def main() -> int:
    """Read the command line, run, write, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few minutes in all, less to be relied on")
    parser.add_argument(
        "--ipc-only", action="store_true", help=f"what needs no ML package: {', '.join(WITHOUT_MODELS)}"
    )
    parser.add_argument("--only", action="append", choices=BENCHMARKS, help="this one; may be given repeatedly")
    parser.add_argument("--gpu-checks", action="store_true", help="say what of a GPU there is to measure, and end")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--cpus", type=int, default=2, help="how many CPUs all processes together may use (default 2)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="the folder for what comes of it")
    parser.add_argument("--label", help="name of the result (by default the time)")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that daemons are stopped
    gpus = machine.gpus()
    if options.gpu_checks:
        print("\n".join(gpus) if gpus else "no NVIDIA GPU here: everything runs on the CPU")
        return 0
    device = ("cuda" if gpus else "cpu") if options.device == "auto" else options.device
    names = [name for name in BENCHMARKS if not options.only or name in options.only]
    if options.ipc_only:
        names = [name for name in names if name in WITHOUT_MODELS]
    if shutil.which("git") is None:
        print("no git: the result will not say which commit it is of", file=sys.stderr)
    label = options.label or dt.datetime.now().astimezone().strftime("%Y-%m-%d-%H%M")
    result = run(names, quick=options.quick, cpus=options.cpus, device=device)
    path = write(result, options.results, label)
    print()
    print("\n".join(report.goals(result)))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
