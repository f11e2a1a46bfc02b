"""One session with more and more atoms, up to what memory holds: does an atom keep its price?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import Child, Daemon, Results, Settings, contestants, last_line, peak, ratio, reset_peak

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000, 30_000_000)
QUICK = (10_000, 100_000, 1_000_000)
BYTES = 600
"""More than an atom takes in client, daemon and worker together, with the slot that they share (350 to 400 bytes, 500
where each is at its peak at once): sizes that leave no room are left out."""
WARM_UP = 5
"""Steps until all buffers are there, in client, daemon and worker."""
STEPS = 15
"""The least that are measured."""
HUGE, FEW = 10_000_000, 7
"""Of systems with more atoms than this only so many are: in each step the client takes seconds to move its atoms."""
FLAT = 1.5


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    sizes = settings.choose(SIZES, QUICK)
    results.parameters = {"atoms": sizes, "model": "noop"}
    limits = {"ROOTSTOCKD_LIMITS__ATOMS": str(max(sizes))}
    with Daemon(settings, "--model", "noop", "--max-atoms", str(max(sizes)), environment=limits) as daemon:
        pids = {"daemon": daemon.pid, "worker": daemon.worker("noop")}
        for natoms in sizes:
            if BYTES * natoms > psutil.virtual_memory().available:
                results.note(f"{natoms:,} atoms left out: not enough memory is free")
                break
            with contestants([Child(settings, "rootstockd", socket=daemon.socket, model="noop")]) as children:
                child = children["rootstockd"]
                before = {}
                for name, pid in pids.items():
                    reset_peak(pid)
                    before[name] = peak(pid)
                try:
                    first = child.system(natoms)[0]
                except RuntimeError as error:  # smaller ones are still worth having
                    results.note(f"{natoms:,} atoms failed: {last_line(error)}")
                    break
                child.steps(WARM_UP)
                seconds = child.steps(FEW if natoms > HUGE else max(STEPS, min(100, 1_000_000 // natoms)))
                grown = {name: peak(pid) - before[name] for name, pid in pids.items()}
            results.add("rootstockd", "step, for an atom", "ns", [1e9 * one / natoms for one in seconds], natoms=natoms)
            results.add("rootstockd", "INIT and first step, for an atom", "ns", [1e9 * first / natoms], natoms=natoms)
            for name, size in grown.items():
                results.add(name, "peak memory (RSS), for an atom", "bytes", [size / natoms], natoms=natoms)
    _goals(results)


def _goals(results: Results) -> None:
    """Flat: from 100,000 atoms on, no size much dearer an atom than the cheapest."""
    for arm, quantity in (
        ("rootstockd", "step, for an atom"),
        ("daemon", "peak memory (RSS), for an atom"),
        ("worker", "peak memory (RSS), for an atom"),
    ):
        found = [
            float(sample["median"])
            for sample in results.samples
            if sample["arm"] == arm and sample["quantity"] == quantity and sample["of"]["natoms"] >= 100_000
        ]
        spread = ratio(max(found), min(found)) if found else None
        results.goal(f"{arm}: {quantity}, dearest over cheapest size from 100,000 atoms on", spread, FLAT)


def plot(results: dict[str, Any], path: Path) -> None:
    """Time and memory of an atom over atoms."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    figure, (left, right) = plots.figure("One session with more and more atoms, noop", panels=2)
    plots.lines(left, results, "step, for an atom", "natoms", ("rootstockd",))
    plots.label(left, "atoms", "time of a step for an atom / ns", log="x")
    left.set_ylim(bottom=0)
    plots.lines(right, results, "peak memory (RSS), for an atom", "natoms", ("daemon", "worker"))
    plots.label(right, "atoms", "peak memory (RSS) for an atom / bytes", log="x")
    right.set_ylim(bottom=0)
    plots.save(figure, path)
