"""How long a job waits for its first forces: through a daemon with the model warm, and with a model of its own."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.common import PATIENCE, Daemon, Results, Settings, ratio

NATOMS = 64
LATER = 5

JOB = """
import json, sys, time
from ase.build import bulk
atoms = bulk("Cu", cubic=True) * (2, 2, 4)
atoms.rattle(0.03, seed=int(sys.argv[1]))
begin = time.perf_counter()
{calculator}
ready = time.perf_counter()
atoms.get_forces()
first = time.perf_counter()
later = []
for _ in range(int(sys.argv[2])):
    atoms.rattle(0.01, seed=len(later))
    start = time.perf_counter()
    atoms.get_forces()
    later.append(time.perf_counter() - start)
print("answer", json.dumps({{"to the first force": first - begin, "first call": first - ready, "later": later}}))
"""
THROUGH_DAEMON = """from rootstock_client import RootstockClient
atoms.calc = RootstockClient({socket!r}).calculator({model!r})"""
IN_PROCESS = """import mace
from mace.calculators import MACECalculator
atoms.calc = MACECalculator(model_paths={weights!r}, device={device!r}, default_dtype={dtype!r})"""


_seeds = itertools.count(1)


def job(script: str, later: int = 0) -> tuple[float, dict[str, Any]]:
    """Run it in a new process: wall time from its start to its end, and what it measured within.

    No two jobs have the same structure, since a worker may remember those it has seen.

    Args:
        script: the job.
        later: how many more forces it computes after its first.
    """
    command = [sys.executable, "-c", script, str(next(_seeds)), str(later)]
    start = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE)
    wall = time.perf_counter() - start
    answers = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    if done.returncode != 0 or not answers:
        raise RuntimeError(f"a job failed: {done.stderr[-2000:]}")
    return wall, json.loads(answers[-1].removeprefix("answer "))


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    repeats = 3 if settings.quick else 7
    results.parameters = {"atoms": NATOMS, "processes of each": repeats}
    _noop(results, settings, repeats)
    names = [models.EMBEDDED] if settings.quick else [models.EMBEDDED, "mp0-medium-random"]
    for name in names:
        model = models.embedded() if name == models.EMBEDDED else models.random(settings, name)
        _measure(results, settings, model, repeats)
    _goals(results, names)


def _measure(results: Results, settings: Settings, model: models.Model, repeats: int) -> None:
    with Daemon(settings, "--model", model.name, *model.options) as daemon:
        here = THROUGH_DAEMON.format(socket=str(daemon.socket), model=model.name)
        own = IN_PROCESS.format(weights=str(model.weights), device=settings.device, dtype=model.dtype)
        scripts = {"rootstockd": JOB.format(calculator=here), "MACECalculator": JOB.format(calculator=own)}
        for script in scripts.values():
            job(script, LATER)  # files into the page cache, the daemon's model past its first evaluations
        walls: dict[str, list[float]] = {arm: [] for arm in scripts}
        answers: dict[str, list[float]] = {arm: [] for arm in scripts}
        for _ in range(repeats):
            for arm, script in scripts.items():
                wall, answer = job(script)
                walls[arm].append(wall)
                answers[arm].append(answer["to the first force"])
        over = [
            1_000 * (answer["first call"] - statistics.median(answer["later"]))
            for _, answer in (job(scripts["rootstockd"], LATER) for _ in range(repeats))
        ]
    for arm in scripts:
        results.add(arm, "whole process", "s", walls[arm], model=model.name)
        results.add(arm, "to the first force", "s", answers[arm], model=model.name)
    results.add("rootstockd", "first call over a later one", "ms", over, model=model.name)


def _noop(results: Results, settings: Settings, repeats: int) -> None:
    with Daemon(settings, "--model", "noop") as daemon:
        script = JOB.format(calculator=THROUGH_DAEMON.format(socket=str(daemon.socket), model="noop"))
        job(script)
        answers = [job(script)[1] for _ in range(repeats)]
    first = [1_000 * answer["first call"] for answer in answers]
    results.add("rootstockd", "connect, INIT and first force", "ms", first, model="noop")
    whole = [1_000 * answer["to the first force"] for answer in answers]
    results.add("rootstockd", "from import rootstock_client to the first force", "ms", whole, model="noop")


def _goals(results: Results, names: list[str]) -> None:
    for name in names:
        wanted = [("whole process", "whole process, MACECalculator's over rootstockd's", 6)]
        if name == models.EMBEDDED:  # with larger models the evaluation itself is most of it
            wanted += [
                ("to the first force", "from import mace over from import rootstock_client to the first force", 40)
            ]
        for quantity, what, goal in wanted:
            ours = results.find("rootstockd", quantity, model=name)
            theirs = results.find("MACECalculator", quantity, model=name)
            results.goal(f"{name}: {what}", ratio(theirs, ours), goal, at_least=True)
        over = results.find("rootstockd", "first call over a later one", model=name)
        results.goal(f"{name}: connect, INIT and first force over an evaluation, ms", over, 10)
    noop = results.find("rootstockd", "connect, INIT and first force", model="noop")
    results.goal("noop: connect, INIT and first force, ms", noop, 10)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    figure, (left, right) = plots.figure(f"A new process until its first forces, {NATOMS} atoms", panels=2)
    plots.bars(left, results, "whole process", "model")
    plots.label(left, "whole process / s", "")
    plots.bars(right, results, "to the first force", "model")
    plots.label(right, "from import rootstock_client or import mace to forces / s", "", log="x")
    plots.save(figure, path)
