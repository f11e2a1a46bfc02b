"""Many small jobs at once on one machine: through one daemon, and each with a model of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import machine, models
from benchmarks.common import Child, Daemon, Results, Settings, contestants, last_line, memory, ratio

OURS, UNBATCHED = "rootstockd", "rootstockd, no batches"
OWN, OWN_ONE, OWN_PASSIVE = (
    "MACECalculator",
    "MACECalculator, OMP_NUM_THREADS=1",
    "MACECalculator, OMP_WAIT_POLICY=PASSIVE",
)
ON_CPUS: Mapping[str, Mapping[str, str]] = {
    OWN_ONE: {"OMP_NUM_THREADS": "1"},
    OWN_PASSIVE: {"OMP_WAIT_POLICY": "PASSIVE"},
}
"""What is done about threads of jobs' own that get in each other's way."""
ARMS = (OURS, UNBATCHED, OWN, OWN_ONE, OWN_PASSIVE)
JOBS = (1, 2, 4, 8, 16, 32)
QUICK = (1, 2, 8)
NATOMS = 32
CPU_KEY, GPU_KEY = 8, 32
"""How many jobs the goals are for."""
ROOM = 1.2
"""How much more memory than foreseen must be free."""


@dataclass
class Group:
    """Jobs that run at once, and the processes that they share."""

    jobs: list[Child]
    shared: list[int]
    seconds: list[float] = field(default_factory=list)
    """Of each step."""
    rates: list[float] = field(default_factory=list)
    """Steps a second of all together, one value a turn."""

    def all(self, **command: Any) -> list[dict[str, Any]]:
        """Give all of them a command at once; their answers."""
        for job in self.jobs:
            job.tell(**command)
        return [job.answer() for job in self.jobs]

    def turn(self, seconds: float) -> None:
        """Let them run."""
        answers = self.all(do="run", seconds=seconds)
        self.rates.append(sum(len(answer["seconds"]) / answer["elapsed"] for answer in answers))
        self.seconds += [value for answer in answers for value in answer["seconds"]]


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    jobs = settings.jobs or (QUICK if settings.quick else JOBS)
    turns, seconds = (2, 1.5) if settings.quick else (3, 3.0)
    results.parameters = {"atoms": NATOMS, "jobs": jobs, "turns": turns, "seconds of each": seconds}
    chosen = [models.embedded()]
    if not settings.quick:
        chosen.append(models.random(settings, "mp0-small-random"))
    for model in chosen:
        for count in jobs:
            for arms in arms_at_once(settings.device):
                with ExitStack() as stack:
                    groups: dict[str, Group] = {}
                    for arm in arms:
                        if _fits(results, model, count, arm):
                            _start(stack, groups, settings, results, model, count, arm, seconds)
                    _measure(results, groups, model, count, turns, seconds)
        _goals(results, settings, model)


def arms_at_once(device: str) -> tuple[tuple[str, ...], ...]:
    """Which arms take turns, and which come after these: a GPU has one daemon."""
    return (ARMS,) if device == "cpu" else ((OURS, OWN), (UNBATCHED,))


def _fits(results: Results, model: models.Model, count: int, arm: str) -> bool:
    """Whether memory suffices for this arm beside those that run already, by what a single job took."""
    if arm in {OURS, UNBATCHED}:
        return True
    free = psutil.virtual_memory().available / 1e6
    for quantity, room in (("memory (RSS)", free), ("memory (GPU)", machine.free_gpu_memory())):
        single = results.find(arm, quantity, model=model.name, jobs=1)
        if single is not None and room is not None and ROOM * single * count > room:
            said = f"they would take about {single * count:,.0f} MB and {room:,.0f} MB are free"
            results.note(f"{model.name}: {count} x {arm} left out: {quantity}: {said}")
            return False
    return True


def _start(  # noqa: PLR0913 - what a group of jobs is
    stack: ExitStack,
    groups: dict[str, Group],
    settings: Settings,
    results: Results,
    model: models.Model,
    count: int,
    arm: str,
    seconds: float,
) -> None:
    """Start the jobs of an arm, let them get warm, and see what memory they take.

    That is seen now, not at the end, because pages of libraries count less in PSS the more processes have them:
    rootstockd, which comes first, is alone, and those after it gain from those before.
    """
    before = machine.free_gpu_memory()
    options: dict[str, Any] = {"weights": model.weights, "dtype": model.dtype, "device": settings.device}
    environment = ON_CPUS.get(arm, {})
    shared: list[int] = []
    child = OWN
    if arm in {OURS, UNBATCHED}:
        extra = ["--batch-atoms", "1"] if arm == UNBATCHED else []
        daemon = stack.enter_context(Daemon(settings, "--model", model.name, *model.options, *extra))
        options, child = {"socket": daemon.socket, "model": model.name}, OURS
        shared = [daemon.pid, daemon.worker(model.name)]
    start = time.perf_counter()
    group = Group([], shared)
    for number in range(count):
        started = Child(settings, child, environment=environment, seed=number, stress=True, **options)
        stack.enter_context(contestants([started]))
        group.jobs.append(started)
    of = {"model": model.name, "jobs": count}
    try:
        group.all(do="system", natoms=NATOMS)
        group.all(do="steps", count=1)
        ready = time.perf_counter() - start
        group.all(do="steps", count=2)
        group.all(do="run", seconds=seconds)
    except RuntimeError as error:  # out of memory, most likely; the other arms are still worth having
        results.note(f"{model.name}: {count} x {arm} failed: {last_line(error)}")
        return
    results.add(arm, "until all are ready", "s", [ready], **of)
    taken = memory([*group.shared, *(pid for job in group.jobs for pid in job.pids)])
    for kind, amount in taken.items():
        results.add(arm, f"memory ({kind})", "MB", [amount], **of)
    if before is not None and (after := machine.free_gpu_memory()) is not None:
        results.add(arm, "memory (GPU)", "MB", [before - after], **of)
    groups[arm] = group


def _measure(
    results: Results, groups: Mapping[str, Group], model: models.Model, count: int, turns: int, seconds: float
) -> None:
    """Let the arms take turns: one computes while the others wait."""
    for turn in range(turns):
        order = list(groups.values())
        for group in (*order[turn % len(order) :], *order[: turn % len(order)]):
            group.turn(seconds)
    of = {"model": model.name, "jobs": count}
    for arm, group in groups.items():
        results.add(arm, "evaluations", "1/s", group.rates, **of)
        results.add(arm, "step", "ms", [1_000 * value for value in group.seconds], **of)


def _goals(results: Results, settings: Settings, model: models.Model) -> None:
    def over(quantity: str, count: int, arm: str) -> float | None:
        return ratio(*(results.find(one, quantity, model=model.name, jobs=count) for one in (OURS, arm)))

    for kind in ("PSS", "RSS"):
        what = f"{model.name}, {CPU_KEY} jobs: memory ({kind}) over that of {CPU_KEY} MACECalculators"
        results.goal(what, over(f"memory ({kind})", CPU_KEY, OWN), 0.25)
    if settings.device == "cpu":
        goals = [(CPU_KEY, arm, 5) for arm in (OWN, *ON_CPUS)]
    else:
        goals = [(GPU_KEY, OWN, 20), (GPU_KEY, UNBATCHED, 8)]
    for count, arm, limit in goals:
        gain = over("evaluations", count, arm)
        results.goal(f"{model.name}, {count} jobs: evaluations/s over {arm}", gain, limit, at_least=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Rates and memory over the number of jobs, a pair of panels for each model."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    names = list(dict.fromkeys(sample["of"]["model"] for sample in results["samples"]))
    figure, axes = plots.figure(f"Jobs of {NATOMS} atoms at once", panels=2 * len(names))
    for index, name in enumerate(names):
        rate, taken = axes[2 * index], axes[2 * index + 1]
        plots.lines(rate, results, "evaluations", "jobs", ARMS, model=name)
        plots.label(rate, "jobs", "evaluations of all together / (1/s)", log="xy", title=name)
        plots.lines(taken, results, "memory (PSS)", "jobs", ARMS, model=name)
        plots.label(taken, "jobs", "memory of all processes (PSS) / MB", log="xy", title=name)
    plots.save(figure, path)
