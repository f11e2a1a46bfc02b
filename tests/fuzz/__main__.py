"""`python tests/fuzz`: fuzz both sides of the protocol, and a daemon that runs; what came of it goes into a file.

The exit status is 1 if anything was found.

The suite has a short run of the same in `test_fuzz.py`. With atheris installed, `--guided SECONDS` lets coverage choose
what to change.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime as dt
import importlib.metadata
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
sys.path[:0] = [str(HERE), str(REPOSITORY)]

import check  # noqa: E402
import live  # noqa: E402
from rootstock_client import driver_side, engine_side, ipi, stream  # noqa: E402
from rootstock_client.client import RootstockClient  # noqa: E402

CORPUS = HERE.parent / "corpus"
LONGEST_SEED = 4096


def seeds() -> list[bytes]:
    """The corpus, but for its long files."""
    files = sorted(CORPUS.glob("*/*.bin"))
    return [data for data in (file.read_bytes() for file in files) if len(data) <= LONGEST_SEED]


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """Check so many inputs."""
    rng, corpus = random.Random(seed), seeds()
    ends: collections.Counter[str] = collections.Counter()
    findings: list[str] = []
    start = time.perf_counter()
    for _ in range(count):
        try:
            kind, outcome = check.random_input(rng, corpus)
        except AssertionError as error:
            findings.append(f"{error}: {error.__cause__!r}"[:4000])
            continue
        ends[f"{kind}: {outcome.ends}{', after results' if outcome.structures else ''}"] += 1
    return {
        "inputs": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - start, 1),
        "ends": dict(sorted(ends.items())),
        "findings": findings,
    }


def lines_of(code: types.CodeType) -> set[int]:
    """The lines that can be run in a module or a function, and in what is in it."""
    lines = {line for _, _, line in code.co_lines() if line}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            lines |= lines_of(constant) - {constant.co_firstlineno}
    return lines


def coverage(count: int, seed: int) -> dict[str, Any]:
    """Which lines of the protocol's functions so many inputs run."""
    run: dict[str, set[int]] = collections.defaultdict(set)
    files = {module.__file__: module for module in (ipi, driver_side, engine_side, stream)}

    def trace(frame: types.FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            run[frame.f_code.co_filename].add(frame.f_lineno)
        return trace

    rng, corpus = random.Random(seed), seeds()
    sys.settrace(trace)
    try:
        for _ in range(count):
            with contextlib.suppress(AssertionError):  # it is among what `fuzz` found
                check.random_input(rng, corpus)
    finally:
        sys.settrace(None)
    told: dict[str, Any] = {"inputs": count}
    for file, module in files.items():
        assert file is not None
        top = compile(Path(file).read_text(), file, "exec")
        at_import = {line for _, _, line in top.co_lines() if line}
        for constant in top.co_consts:  # class bodies run at import too
            if isinstance(constant, types.CodeType) and constant.co_flags & 0x1 == 0:
                at_import |= {line for _, _, line in constant.co_lines() if line}
        functions = lines_of(top) - at_import
        missed = functions - run[file]
        told[module.__name__] = {"lines": len(functions), "run": len(functions) - len(missed), "missed": sorted(missed)}
    return told


def guided(seconds: int) -> dict[str, Any]:
    """A run of atheris, in a process of its own, for it ends with it."""
    command = [
        sys.executable,
        str(HERE / "guided.py"),
        f"-max_total_time={seconds}",
        "-max_len=2000",
        "-print_final_stats=1",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for number, data in enumerate(seeds()):
            (Path(folder) / str(number)).write_bytes(bytes([number % 256]) * 4 + data)
        done = subprocess.run([*command, folder], capture_output=True, text=True, check=False)
    words = done.stderr.split()
    told: dict[str, Any] = {"seconds": seconds, "findings": [] if done.returncode == 0 else [done.stderr[-4000:]]}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        told["atheris"] = importlib.metadata.version("atheris")
    for name in ("cov:", "ft:"):
        told[name[:-1]] = int(words[len(words) - words[::-1].index(name)]) if name in words else None
    executed = [line for line in done.stderr.splitlines() if "number_of_executed_units" in line]
    told["inputs"] = int(executed[0].split()[-1]) if executed else None
    return told


def against_daemon(count: int) -> dict[str, Any]:
    """A daemon of our own, and so many streams."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        address = Path(folder) / "d.sock"
        command = [sys.executable, "-m", "rootstockd"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        options = ["--device", "cpu", "--model", "emt", "--model", "noop", "--max-atoms", "60"]
        options += ["--socket", str(address), "--log-file", f"{folder}/log"]
        subprocess.run([*command, "start", *options], check=True, env=environment, stdout=subprocess.DEVNULL)
        try:
            pid = RootstockClient(address).status()["pid"]
            start = time.perf_counter()
            told = live.storm(address, seeds(), count)
            told["seconds"] = round(time.perf_counter() - start, 1)
            told["the daemon is the same"] = RootstockClient(address).status()["pid"] == pid
            told["tracebacks in the log"] = (Path(folder) / "log").read_text().count("Traceback")
        finally:
            stop = [*command, "stop", "--force", "--socket", str(address)]
            subprocess.run(stop, check=True, env=environment, stdout=subprocess.DEVNULL)
    return told


def found(result: dict[str, Any]) -> bool:
    """Whether anything is as it should not be."""
    daemon = result.get("daemon")
    if daemon and not (
        daemon["the daemon is the same"] and daemon["before"]["restarts"] == daemon["after"]["restarts"]
    ):
        return True
    logged = daemon["tracebacks in the log"] if daemon else 0
    return bool(logged or result["sides"]["findings"] or result.get("guided", {}).get("findings"))


def main() -> None:
    """All of it; exits with 1 if anything was found."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--connections", type=int, default=20_000)
    parser.add_argument("--guided", type=int, default=0, metavar="SECONDS", help="of atheris, if it is installed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="where the result goes; by default into benchmarks/results")
    options = parser.parse_args()
    from benchmarks import machine

    today = dt.datetime.now(dt.timezone.utc)
    result = {
        "schema": 1,
        "created": today.isoformat(timespec="seconds"),
        "commit": machine.commit(),
        "hardware": machine.hardware(sorted(os.sched_getaffinity(0))),
        "software": machine.software(),
        "sides": fuzz(options.inputs, options.seed),
        "coverage": coverage(min(options.inputs, 20_000), options.seed),
    }
    if options.guided:
        result["guided"] = guided(options.guided)
    if options.connections:
        result["daemon"] = against_daemon(options.connections)
    where = options.output or REPOSITORY / "benchmarks" / "results" / f"{today:%Y-%m-%d}-fuzz.json"
    where.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    if found(result):
        sys.exit(f"something was found: see {where}")


if __name__ == "__main__":
    main()
