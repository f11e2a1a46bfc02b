"""What a step costs when the model costs nothing, next to others that pass structures between processes."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.common import Child, Daemon, Results, Settings, contestants, cpu_seconds, interleave, ratio, sleeps

SIZES = (10, 32, 100, 320, 1_000, 3_200, 10_000, 32_000, 100_000)
QUICK = (10, 100, 1_000, 10_000)
MICRO = 1e6
PEERS = ("ASE SocketIO", "Rootstock")


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    sizes = settings.choose(SIZES, QUICK)
    results.parameters = {"atoms": sizes, "model": "noop"}
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "noop"))
        options: dict[str, Any] = {"socket": daemon.socket, "model": "noop"}
        arms = [Child(settings, "echo"), Child(settings, "wire", **options), Child(settings, "rootstockd", **options)]
        arms += [Child(settings, "worker"), Child(settings, "ASE SocketIO"), Child(settings, "noop in process")]
        if settings.rootstock is not None:
            python = peers.python_of(settings.rootstock)
            named: dict[str, Any] = {"root": settings.rootstock, "checkpoint": peers.CHECKPOINT}
            arms.append(Child(settings, "Rootstock", python=python, **named))
        children = stack.enter_context(contestants(arms))
        for natoms in sizes:
            _measure(results, children, natoms, settings)
        _cpu(results, children["wire"], daemon, sizes, settings)
    _goals(results, sizes)


def _measure(results: Results, children: dict[str, Child], natoms: int, settings: Settings) -> None:
    for child in children.values():
        child.system(natoms, warm_up=20 if natoms <= 10_000 else 3)
    if natoms <= 1_000:
        blocks, steps = (10, 10) if settings.quick else (60, 10)
    elif natoms <= 10_000:
        blocks, steps = (6, 5) if settings.quick else (40, 5)
    else:
        blocks, steps = 20, 3
    seconds = interleave(list(children.values()), blocks, steps)
    for arm, values in seconds.items():
        results.add(arm, "step", "µs", [MICRO * value for value in values], natoms=natoms)
    # differences of arms that were measured side by side, block for block
    layers = {"client": ("rootstockd", "wire", None), "daemon": ("wire", "echo", "worker")}
    for layer, (whole, part, other) in layers.items():
        left = [
            MICRO * (a - b - (c if other else 0.0))
            for a, b, c in zip(
                _block_medians(seconds[whole], steps),
                _block_medians(seconds[part], steps),
                _block_medians(seconds[other or part], steps),
                strict=True,
            )
        ]
        results.add(layer, "share of a step", "µs", left, natoms=natoms)


def _block_medians(values: list[float], steps: int) -> list[float]:
    return [sorted(values[start : start + steps])[steps // 2] for start in range(0, len(values), steps)]


def _cpu(results: Results, wire: Child, daemon: Daemon, sizes: tuple[int, ...], settings: Settings) -> None:
    """CPU time a step in daemon and worker, in ticks of 10 ms, so over many steps; and how often they go to sleep."""
    pids = {"daemon": daemon.pid, "worker": daemon.worker("noop")}
    for natoms in (size for size in sizes if size in {100, 1_000, 10_000}):
        wire.system(natoms, warm_up=20)
        steps = 2_000 if settings.quick else 10_000
        if natoms > 1_000:
            steps //= 5
        before = {name: (cpu_seconds(pid), sleeps(pid)) for name, pid in pids.items()}
        wire.steps(steps)
        for name, pid in pids.items():
            used, slept = MICRO * (cpu_seconds(pid) - before[name][0]) / steps, (sleeps(pid) - before[name][1]) / steps
            results.add(name, "CPU time of a step", "µs", [used], natoms=natoms)
            results.add(name, "voluntary context switches of a step", "", [slept], natoms=natoms)


def _goals(results: Results, sizes: tuple[int, ...]) -> None:
    def step(arm: str, natoms: int) -> float | None:
        return results.find(arm, "step", natoms=natoms)

    ours = step("rootstockd", 1_000)
    results.goal("1,000 atoms: step over Rootstock's", ratio(ours, step("Rootstock", 1_000)), 0.1)
    results.goal("1,000 atoms: step over ASE SocketIO's", ratio(ours, step("ASE SocketIO", 1_000)), 0.25)
    results.goal("1,000 atoms: wire alone over the echo", ratio(step("wire", 1_000), step("echo", 1_000)), 4)
    worst = [
        value
        for natoms in sizes
        for peer in PEERS
        if (value := ratio(step("rootstockd", natoms), step(peer, natoms))) is not None
    ]
    results.goal("any size: step over the better peer's, the worst", max(worst, default=None), 1)


def plot(results: dict[str, Any], path: Path) -> None:
    """Step time over atoms, and the layers of our own step."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    figure, (left, right) = plots.figure("Passing a structure to another process and forces back", panels=2)
    order = ("Rootstock", "ASE SocketIO", "rootstockd", "wire", "noop in process", "echo")
    plots.lines(left, results, "step", "natoms", order)
    plots.label(left, "atoms", "time of a step / µs", log="xy")
    plots.lines(right, results, "share of a step", "natoms", ("client", "daemon"))
    plots.lines(right, results, "step", "natoms", ("worker", "echo"))
    plots.label(right, "atoms", "share of rootstockd's step / µs", log="xy")
    plots.save(figure, path)
