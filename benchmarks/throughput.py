"""Many small jobs at once on one machine: through one daemon, and each with a model of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil

from benchmarks import models
from benchmarks.common import Child, Daemon, Results, Settings, contestants, memory, ratio

OURS, OWN, OWN_ONE = "rootstockd", "MACECalculator", "MACECalculator, OMP_NUM_THREADS=1"
JOBS = (1, 2, 4, 8, 16, 32)
QUICK = (1, 2, 4, 8)
NATOMS = 32
KEY = 8
ROOM = 1.3
"""How much more memory than foreseen must be free."""


def run(settings: Settings) -> Results:
    """The benchmark."""
    results = Results("throughput")
    jobs = QUICK if settings.quick else JOBS
    seconds = 3.0 if settings.quick else 12.0
    results.parameters = {"atoms": NATOMS, "jobs": jobs, "seconds of each": seconds}
    chosen = [models.embedded()]
    if not settings.quick:
        chosen.append(models.random(settings, "mp0-small-random"))
    for model in chosen:
        own = {"weights": model.weights, "dtype": model.dtype, "device": settings.device}
        for count in jobs:
            with Daemon(settings, "--model", model.name, *model.options) as daemon:
                through = {"socket": daemon.socket, "model": model.name}
                pids = [daemon.pid, daemon.worker(model.name)]
                _measure(results, settings, model, count, OURS, OURS, through, {}, lambda pids=pids: pids, seconds)  # type: ignore[misc]
            for arm, environment in ((OWN, {}), (OWN_ONE, {"OMP_NUM_THREADS": "1"})):
                if not _fits(results, model, count, arm):
                    continue
                _measure(results, settings, model, count, arm, OWN, own, environment, list, seconds)
        _goals(results, settings, model)
    return results


def _fits(results: Results, model: models.Model, count: int, arm: str) -> bool:
    one = results.find(arm, "memory (RSS)", model=model.name, jobs=1)
    free = psutil.virtual_memory().available / 1e6
    if one is not None and ROOM * one * count > free:
        results.note(f"{model.name}: {count} x {arm} left out, {free:,.0f} MB are free and one takes {one:,.0f}")
        return False
    return True


def _measure(  # noqa: PLR0913
    results: Results,
    settings: Settings,
    model: models.Model,
    count: int,
    arm: str,
    child: str,
    options: dict[str, Any],
    environment: dict[str, str],
    others: Callable[[], list[int]],
    seconds: float,
) -> None:
    of = {"model": model.name, "jobs": count}
    start = time.perf_counter()
    with ExitStack() as stack:
        group = []
        for _ in range(count):
            started = Child(settings, child, environment=environment, **options)
            stack.enter_context(contestants([started]))
            group.append(started)
        for words in ({"do": "system", "natoms": NATOMS}, {"do": "steps", "count": 1}):
            for one in group:
                one.tell(**words)
            for one in group:
                one.answer()
        results.add(arm, "until all are ready", "s", [time.perf_counter() - start], **of)
        for words in ({"do": "steps", "count": 2}, {"do": "run", "seconds": seconds}):
            for one in group:
                one.tell(**words)
            answers = [one.answer() for one in group]
        rate = sum(len(answer["seconds"]) / answer["elapsed"] for answer in answers)
        taken = memory([*others(), *(pid for one in group for pid in one.pids)])
    results.add(arm, "evaluations", "1/s", [rate], **of)
    results.add(arm, "step", "ms", [1_000 * value for answer in answers for value in answer["seconds"]], **of)
    for kind, amount in taken.items():
        results.add(arm, f"memory ({kind})", "MB", [amount], **of)


def _goals(results: Results, settings: Settings, model: models.Model) -> None:
    def at_key(arm: str, quantity: str) -> float | None:
        return results.find(arm, quantity, model=model.name, jobs=KEY)

    share = ratio(at_key(OURS, "memory (PSS)"), at_key(OWN, "memory (PSS)"))
    results.goal(f"{model.name}, {KEY} jobs: memory (PSS) over that of {KEY} processes", share, 0.25)
    for arm in (OWN, OWN_ONE):
        gain = ratio(at_key(OURS, "evaluations"), at_key(arm, "evaluations"))
        limit = 5 if settings.device == "cpu" else 1
        results.goal(f"{model.name}, {KEY} jobs: evaluations/s over {arm}", gain, limit, at_least=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Rates and memory over the number of jobs, a row of panels for each model."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    names = list(dict.fromkeys(sample["of"]["model"] for sample in results["samples"]))
    figure, axes = plots.figure(f"Jobs of {NATOMS} atoms at once", panels=2 * len(names))
    for index, name in enumerate(names):
        rate, taken = axes[2 * index], axes[2 * index + 1]
        plots.lines(rate, results, "evaluations", "jobs", (OURS, OWN, OWN_ONE), model=name)
        plots.label(rate, "jobs", "evaluations of all together / (1/s)", log="xy", title=name)
        plots.lines(taken, results, "memory (PSS)", "jobs", (OURS, OWN, OWN_ONE), model=name)
        plots.label(taken, "jobs", "memory of all processes (PSS) / MB", log="xy", title=name)
    plots.save(figure, path)
