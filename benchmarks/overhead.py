"""A step with a real model: through the daemon, and by MACECalculator in the job's own process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import models
from benchmarks.common import Child, Daemon, Results, Settings, contestants, interleave, ratio

SIZES = (4, 32, 108, 256, 500, 864, 1_372)
QUICK = (4, 32, 108)
OURS, OWN = "rootstockd", "MACECalculator"


def run(settings: Settings) -> Results:
    """The benchmark."""
    results = Results("overhead")
    sizes = QUICK if settings.quick else SIZES
    longest, budget = (1.0, 10.0) if settings.quick else (15.0, 60.0)
    results.parameters = {"atoms": sizes, "longest step / s": longest, "seconds for a size": budget}
    chosen = [models.embedded(), models.random(settings, "mp0-small-random")]
    if not settings.quick:
        chosen.append(models.random(settings, "mp0-medium-random"))
    for model in chosen:
        with Daemon(settings, "--model", model.name, *model.options) as daemon:
            own: dict[str, Any] = {"weights": model.weights, "dtype": model.dtype, "device": settings.device}
            through: dict[str, Any] = {"socket": daemon.socket, "model": model.name}
            with contestants([Child(settings, OURS, **through), Child(settings, OWN, **own)]) as children:
                for natoms in sizes:
                    if not _measure(results, children, model, natoms, longest, budget):
                        break
        _goals(results, model, sizes)
    return results


def _measure(
    results: Results,
    children: dict[str, Child],
    model: models.Model,
    natoms: int,
    longest: float,
    budget: float,
) -> bool:
    """Measure one size; False where larger ones would take too long."""
    first = sum(child.system(natoms, warm_up=2)[-1] for child in children.values())
    steps = 1 if first > 0.5 else 3
    blocks = max(2, min(20, int(budget / (first * steps))))
    seconds = interleave(list(children.values()), blocks, steps)
    for arm, values in seconds.items():
        results.add(arm, "step", "ms", [1_000 * value for value in values], model=model.name, natoms=natoms)
    if first / 2 > longest:
        results.note(f"{model.name}: systems of more than {natoms} atoms left out, a step takes {first / 2:.1f} s")
        return False
    return True


def _goals(results: Results, model: models.Model, sizes: tuple[int, ...]) -> None:
    ratios = {
        natoms: value
        for natoms in sizes
        if (value := ratio(*(results.find(arm, "step", model=model.name, natoms=natoms) for arm in (OURS, OWN))))
    }
    for natoms, value in ratios.items():
        if model.name == models.EMBEDDED:
            results.goal(f"{model.name}, {natoms} atoms: step over MACECalculator's", value, 0.7)
        elif natoms >= 32:
            results.goal(f"{model.name}, {natoms} atoms: step over MACECalculator's", value, 0.25)
    results.goal(
        f"{model.name}, any size: step over MACECalculator's, the worst", max(ratios.values(), default=None), 1
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Step time over atoms, a panel a model."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    names = list(dict.fromkeys(sample["of"]["model"] for sample in results["samples"]))
    figure, axes = plots.figure("A step through the daemon and in the job's own process", panels=len(names))
    for axis, name in zip(axes if len(names) > 1 else [axes], names, strict=True):
        plots.lines(axis, results, "step", "natoms", (OURS, OWN), model=name)
        plots.label(axis, "atoms", "time of a step / ms", log="xy", title=name)
    plots.save(figure, path)
