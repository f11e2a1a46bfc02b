"""A step with a real model: through the daemon, and in the job's process by MACECalculator and by the same backend."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import models
from benchmarks.common import Child, Daemon, Results, Settings, contestants, interleave, last_line, peak, ratio

SIZES = (4, 32, 64, 108, 256, 500, 864, 1_372)
QUICK = (4, 32, 64, 108)
OURS, OWN, SAME, EXACT = "rootstockd", "MACECalculator", "same backend", "MACECalculator, float64"
TIMED = (OURS, OWN, SAME)
SMALL, LARGE = 64, 864
"""The goals against the same backend: for systems of `SMALL` atoms, and from `LARGE` on."""
OVER_SAME = "step over the same backend's"
AROUND = "of a step, not in the worker"
PAIRS, LONGEST_PAIRS = 9, 200.0
"""Two processes with the same code are some 10 % apart, so it is measured by several pairs of them: so many at most,
and by no more than two once they have taken so many seconds."""
OTHER = (32, 64)
"""Atoms in the systems that are computed in the dtype that is not timed."""
DOUBLE_UP_TO = 256
"""Atoms in the largest system that is computed in float64 as well, which takes several times as long and as much."""
ENOUGH = 20
"""Steps of rootstockd and of the same backend at a size, where there is time for them."""
WARM_UP = 4
"""Steps until torch has compiled what it compiles."""
ROOM = 0.7
"""How much of the free memory one contestant may be expected to take."""


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    sizes = settings.choose(SIZES, QUICK)
    longest, budget = (2.0, 8.0) if settings.quick else (100.0, 15.0)
    results.parameters = {"atoms": sizes, "longest step / s": longest, "seconds for a size": budget, "backends": {}}
    names = ["mp0-small-random"] if settings.quick else ["mp0-small-random", "mp0-medium-random"]
    for model in (models.embedded(), *(models.random(settings, name) for name in names)):
        _model(settings, results, model, sizes, longest, budget)


def _model(
    settings: Settings, results: Results, model: models.Model, sizes: tuple[int, ...], longest: float, budget: float
) -> None:
    with Daemon(settings, "--model", model.name, *model.options) as daemon:
        with contestants(_arms(settings, daemon, model)) as children:
            for arm in TIMED:
                children[arm].system(min(sizes), warm_up=WARM_UP)
            workers = {**{arm: child.pids[0] for arm, child in children.items()}, OURS: daemon.worker(model.name)}
            for natoms in sizes:
                if not _fits(results, model, natoms, workers):
                    break
                try:
                    if not _measure(results, children, model, natoms, longest, budget):
                        break
                except RuntimeError as error:  # smaller ones are still worth having
                    results.note(f"{model.name}, {natoms} atoms failed: {last_line(error)}")
                    break
        for what, measure in (("more pairs of processes", _more_pairs), ("the other dtype", _other_dtype)):
            try:
                measure(settings, results, daemon, model)
            except RuntimeError as error:
                results.note(f"{model.name}, {what} failed: {last_line(error)}")
    _goals(results, model, sizes)


def _judged(natoms: int) -> bool:
    """Whether there is a goal against the same backend."""
    return natoms == SMALL or natoms >= LARGE


def _arms(settings: Settings, daemon: Daemon, model: models.Model) -> list[Child]:
    arms = [*_pair(settings, daemon, model), _mace(settings, OWN, model, model.dtype)]
    if model.dtype != "float64":
        arms.append(_mace(settings, EXACT, model, "float64"))
    return arms


def _pair(settings: Settings, daemon: Daemon, model: models.Model) -> list[Child]:
    """A job of the daemon's, and what its worker computes with in the job's own process."""
    spec, environment = daemon.worker_arguments(model.name)
    return [
        Child(settings, OURS, socket=daemon.socket, model=model.name, stress=True),
        Child(settings, SAME, environment=environment, spec=spec, stress=True),
    ]


def _mace(settings: Settings, arm: str, model: models.Model, dtype: str) -> Child:
    return Child(settings, arm, weights=model.weights, device=settings.device, dtype=dtype, stress=True)


def _fits(results: Results, model: models.Model, natoms: int, workers: Mapping[str, int]) -> bool:
    """Whether memory suffices, going by what the last size took; it is about proportional to the atoms."""
    last = max((s["of"]["natoms"] for s in results.samples if s["of"].get("model") == model.name), default=natoms)
    free = ROOM * psutil.virtual_memory().available
    wanted = natoms / last * max(peak(pid) for pid in workers.values())
    if last < natoms and wanted > free:
        left = f"{wanted / 1e9:.1f} GB would be wanted and {free / 1e9:.1f} GB may be used"
        results.note(f"{model.name}: systems of {natoms} atoms and more left out, {left}")
        return False
    return True


def _measure(
    results: Results,
    children: dict[str, Child],
    model: models.Model,
    natoms: int,
    longest: float,
    budget: float,
) -> bool:
    """Measure one size; False where larger ones would take too long."""
    timed = [children[arm] for arm in TIMED]
    first, done = {child.arm: child.system(natoms)[-1] for child in timed}, 1
    if sum(first.values()) < budget / 4:  # or else there is no time for a better idea of it
        first, done = {child.arm: child.steps(1)[-1] for child in timed}, 2
    together = sum(first.values())
    steps = 1 if together > 0.5 else 3
    least = 3 if together < budget else 1  # steps of a minute must not take the whole run
    seconds = interleave(timed, max(least, min(20, int(budget / (together * steps)))), steps)
    last = done + len(seconds[OURS])
    # MACECalculator's steps are the long ones: the others can have more, to be told apart from one another
    ours = [child for child in timed if child.arm != OWN]
    cost = sum(statistics.median(seconds[child.arm]) for child in ours)
    more = min(ENOUGH - len(seconds[OURS]), int(budget / cost))
    for arm, values in interleave(ours, max(0, more), 1).items():
        seconds[arm] += values
    for arm, values in seconds.items():
        results.add(arm, "step", "ms", [1_000 * value for value in values], model=model.name, natoms=natoms)
    _over_same(results, model, natoms, 1, seconds)
    _accuracy(results, children, model, natoms, last)
    slowest = max(statistics.median(values) for values in seconds.values())
    if slowest > longest:
        results.note(f"{model.name}: systems of more than {natoms} atoms left out, a step takes {slowest:.1f} s")
    return slowest <= longest


def _accuracy(results: Results, children: dict[str, Child], model: models.Model, natoms: int, step: int) -> None:
    """How far apart they are at one structure, and what computed it: at the last step's, which they know."""
    found = {arm: child.ask(do="result", step=step) for arm, child in children.items() if arm != EXACT}
    if EXACT in children and natoms <= DOUBLE_UP_TO:
        children[EXACT].ask(do="system", natoms=natoms)
        found[EXACT] = children[EXACT].ask(do="result", step=step)
    elif model.dtype == "float64":
        found[EXACT] = found[OWN]
    for arm, other, words in ((OURS, OWN, OWN), (OURS, EXACT, "float64"), (OWN, EXACT, "float64")):
        if arm in found and other in found and found[arm] is not found[other]:
            of = {"model": model.name, "natoms": natoms, "dtype": model.dtype}
            _apart(results, arm, words, found[arm], found[other], **of)
    backends = {arm: found[arm]["backend"] for arm in (OURS, SAME)}
    if backends[OURS] != backends[SAME]:
        results.note(f"{model.name}, {natoms} atoms: computed by {backends[OURS]}, but {backends[SAME]} in process")
    results.parameters["backends"].setdefault(model.name, {})[str(natoms)] = backends[OURS]


def _apart(
    results: Results, arm: str, words: str, found: Mapping[str, Any], other: Mapping[str, Any], **of: Any
) -> None:
    """How far an arm's numbers are off others."""
    energy = abs(found["energy"] - other["energy"]) / len(found["forces"])
    results.add(arm, f"energy of an atom, off {words}", "eV", [energy], **of)
    force = float(np.abs(np.subtract(found["forces"], other["forces"])).max())
    results.add(arm, f"largest force component, off {words}", "eV/Å", [force], **of)


def _over_same(
    results: Results, model: models.Model, natoms: int, pair: int, seconds: Mapping[str, Sequence[float]]
) -> None:
    if _judged(natoms):
        over = statistics.median(seconds[OURS]) / statistics.median(seconds[SAME])
        results.add(OURS, OVER_SAME, "", [over], model=model.name, natoms=natoms, pair=pair)


def _more_pairs(settings: Settings, results: Results, daemon: Daemon, model: models.Model) -> None:
    """Again against the same backend where that was measured, all processes but the daemon's own started anew."""
    sizes = [
        sample["of"]["natoms"]
        for sample in results.samples
        if sample["quantity"] == OVER_SAME and sample["of"]["model"] == model.name
    ]
    end = time.monotonic() + LONGEST_PAIRS
    for pair in range(2, (2 if settings.quick else PAIRS) + 1):
        if pair > 2 and time.monotonic() > end:
            break
        daemon.command("unload", model.name)
        daemon.command("load", model.name)
        with contestants(_pair(settings, daemon, model)) as children:
            for natoms in sizes:
                for child in children.values():
                    child.system(natoms, warm_up=WARM_UP)
                before = daemon.evaluated(model.name)
                seconds = interleave(list(children.values()), ENOUGH, 3 if natoms == SMALL else 1)
                taken, count = np.subtract(daemon.evaluated(model.name), before)
                _over_same(results, model, natoms, pair, seconds)
                around = statistics.fmean(seconds[OURS]) - taken / count
                results.add(OURS, AROUND, "ms", [1_000 * around], model=model.name, natoms=natoms, pair=pair)


def _other_dtype(settings: Settings, results: Results, daemon: Daemon, model: models.Model) -> None:
    """How far rootstockd is off MACECalculator in the dtype that was not timed."""
    dtype = "float32" if model.dtype == "float64" else "float64"
    ours = Child(settings, OURS, socket=daemon.socket, model=model.name, dtype=dtype, stress=True)
    with contestants([ours, _mace(settings, OWN, model, dtype)]) as children:
        for natoms in OTHER:
            ours.system(natoms, warm_up=WARM_UP)  # a session's first answer is mace-torch's
            children[OWN].ask(do="system", natoms=natoms)
            found = {arm: child.ask(do="result", step=WARM_UP + 1) for arm, child in children.items()}
            _apart(results, OURS, OWN, found[OURS], found[OWN], model=model.name, natoms=natoms, dtype=dtype)
            backends = results.parameters["backends"].setdefault(model.name, {})
            backends[f"{natoms}, {dtype}"] = found[OURS]["backend"]


def _goals(results: Results, model: models.Model, sizes: tuple[int, ...]) -> None:
    def over(arm: str, natoms: int) -> float | None:
        return ratio(*(results.find(one, "step", model=model.name, natoms=natoms) for one in (OURS, arm)))

    for natoms in sizes:
        what = f"{model.name}, {natoms} atoms: step over"
        limit = 0.7
        if model.name != models.EMBEDDED:
            limit = 1.0 if natoms < 32 else 0.25 if natoms < LARGE else 0.15
        results.goal(f"{what} MACECalculator's", over(OWN, natoms), limit)
        if _judged(natoms):
            _goal_over_same(results, model, natoms, f"{what} the same backend's")
    ratios = [value for natoms in sizes if (value := over(OWN, natoms)) is not None]
    results.goal(f"{model.name}, any size: step over MACECalculator's, the worst", max(ratios, default=None), 1)


def _goal_over_same(results: Results, model: models.Model, natoms: int, what: str) -> None:
    of = {"model": model.name, "natoms": natoms}
    found = [
        value for pair in range(1, PAIRS + 1) if (value := results.find(OURS, OVER_SAME, **of, pair=pair)) is not None
    ]
    results.goal(what, statistics.median(found) if found else None, 1.05 if natoms == SMALL else 1.01)
    if len(found) > 1:
        ratios = ", ".join(f"{value:.3f}" for value in sorted(found))
        results.note(f"{what}, by {len(found)} pairs of processes: {ratios}")
        around = [results.find(OURS, AROUND, **of, pair=pair) for pair in range(2, len(found) + 1)]
        middle = statistics.median(value for value in around if value is not None)
        results.note(f"{model.name}, {natoms} atoms: {middle:.2f} ms of a step pass before and after the worker has it")


def plot(results: dict[str, Any], path: Path) -> None:
    """Step time over atoms, a panel a model."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    names = list(dict.fromkeys(sample["of"]["model"] for sample in results["samples"]))
    figure, axes = plots.figure("A step through the daemon and in the job's own process", panels=len(names))
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        plots.lines(axis, results, "step", "natoms", TIMED, model=name)
        plots.label(axis, "atoms", "time of a step / ms", log="xy", title=name)
    plots.save(figure, path)
