"""What computes a model: the backend that was chosen, the next best, mace-torch; their times and numbers by size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.common import Child, Daemon, Results, Settings, contestants, interleave, last_line, ratio

SIZES = (4, 32, 108, 256)
QUICK = (4, 32)
CHOSEN, PLAIN, NEXT, OWN = "chosen backend", "chosen backend, no stress", "next backend", "MACECalculator"
WARM_UP = 4
"""Steps until torch has compiled what it compiles; a session's first is mace-torch's in any case."""
LONGEST = 3.0
"""Seconds of a step of all together, beyond which larger systems are left out."""
WITHIN = {"float32": 1e-4, "float64": 1e-9}
"""How far a force may be from MACECalculator's, in eV/Å: forces are some eV/Å at most."""
NOISE = 1.1
"""The backend that was chosen at loading may take so many times as long, at some size, as the next one."""


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    sizes = settings.choose(SIZES, QUICK)
    results.parameters = {"atoms": sizes, "backends": {}}
    names = ["mp0-small-random"] if settings.quick else ["mp0-small-random", "mp0-medium-random"]
    for model in (models.embedded(), *(models.random(settings, name) for name in names)):
        for dtype in ("float64", "float32"):
            try:
                _measure(settings, results, model, dtype, sizes)
            except RuntimeError as error:  # others are still worth having
                results.note(f"{model.name}, {dtype} failed: {last_line(error)}")
            _goals(results, model.name, dtype, sizes)


def _measure(settings: Settings, results: Results, model: models.Model, dtype: str, sizes: tuple[int, ...]) -> None:
    with Daemon(settings, "--model", model.name, *model.options) as daemon:
        spec, environment = daemon.worker_arguments(model.name)
    spec = {**spec, "dtype": dtype}
    own = Child(settings, OWN, weights=model.weights, device=settings.device, dtype=dtype, stress=True)
    arms = {CHOSEN: {"stress": True}, PLAIN: {"stress": False}}
    chosen = [Child(settings, arm, environment=environment, spec=spec, **options) for arm, options in arms.items()]
    with contestants([*chosen, own]) as children:
        name = _name(children[CHOSEN], min(sizes))
        spec = {**spec, "without": {name: "a benchmark"}}
        with contestants([Child(settings, NEXT, environment=environment, spec=spec, stress=True)]) as more:
            names = {CHOSEN: name, NEXT: _name(more[NEXT], min(sizes))}
            results.parameters["backends"][f"{model.name}, {dtype}"] = names
            for natoms in sizes:
                if _size(results, {**children, **more}, natoms, model=model.name, dtype=dtype) > LONGEST:
                    break


def _name(child: Child, natoms: int) -> str:
    """What computes there."""
    child.system(natoms, warm_up=WARM_UP)
    return str(child.ask(do="result", step=WARM_UP)["backend"]).partition(" (")[0]


def _size(results: Results, children: Mapping[str, Child], natoms: int, **of: Any) -> float:
    """Measure one size; the seconds of a step of all together."""
    for child in children.values():
        child.system(natoms, warm_up=WARM_UP if natoms < max(SIZES) else 2)
    together = sum(child.steps(1)[0] for child in children.values())
    seconds = interleave(list(children.values()), 3 if together > 1.0 else 9, 1)
    for arm, values in seconds.items():
        results.add(arm, "step", "ms", [1_000 * value for value in values], natoms=natoms, **of)
    found = {arm: child.ask(do="result", step=3) for arm, child in children.items()}
    for arm in (CHOSEN, PLAIN, NEXT):
        energy = abs(found[arm]["energy"] - found[OWN]["energy"]) / natoms
        results.add(arm, "energy of an atom, off MACECalculator", "eV", [energy], natoms=natoms, **of)
        force = float(np.abs(np.subtract(found[arm]["forces"], found[OWN]["forces"])).max())
        results.add(arm, "largest force component, off MACECalculator", "eV/Å", [force], natoms=natoms, **of)
    return sum(statistics.median(values) for values in seconds.values())


def _goals(results: Results, model: str, dtype: str, sizes: tuple[int, ...]) -> None:
    def values(arm: str, quantity: str) -> list[float]:
        found = (results.find(arm, quantity, model=model, dtype=dtype, natoms=natoms) for natoms in sizes)
        return [value for value in found if value is not None]

    over = [ratio(*pair) for pair in zip(values(CHOSEN, "step"), values(NEXT, "step"), strict=True)]
    worst = max((value for value in over if value is not None), default=None)
    results.goal(f"{model}, {dtype}: step of the backend chosen over the next one's, the worst size", worst, NOISE)
    off = max(values(CHOSEN, "largest force component, off MACECalculator"), default=None)
    results.goal(f"{model}, {dtype}: forces off MACECalculator's, eV/Å", off, WITHIN[dtype])


def plot(results: dict[str, Any], path: Path) -> None:
    """Step time over atoms in float32, a panel a model."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    names = list(dict.fromkeys(sample["of"]["model"] for sample in results["samples"]))
    figure, axes = plots.figure("What computes a model, in float32", panels=len(names))
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        plots.lines(axis, results, "step", "natoms", (CHOSEN, PLAIN, NEXT, OWN), model=name, dtype="float32")
        plots.label(axis, "atoms", "time of a step / ms", log="xy", title=name)
    plots.save(figure, path)
