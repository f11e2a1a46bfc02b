"""One job of one user beside fifty jobs of another, and beside a large one, on a daemon that all share."""

from __future__ import annotations

import grp
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import Child, Daemon, Results, Settings, contestants, ratio
from benchmarks.scale import LOAD, jain, rate

NATOMS = 32
MANY, LARGE = 50, 1_000
UIDS = {"one job": 61_001, "fifty jobs": 61_002, "large job": 61_003}
"""Users who need not be known to the machine: what counts is what the kernel says."""
NOBODY = 65_534


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    if os.geteuid() != 0:
        results.note("left out: only root can be several users")
        return
    rounds, seconds = (3, 1.0) if settings.quick else (10, 3.0)
    results.parameters = {
        "atoms": NATOMS,
        "jobs": MANY,
        "atoms of the large job": LARGE,
        "rounds": rounds,
        "seconds": seconds,
        "model": "emt",
    }
    group = grp.getgrgid(NOBODY).gr_name
    config = settings.folder / "shared.toml"
    config.write_text(f'[access]\nsocket_group = "{group}"\n')
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "emt", "--config", config))
        for folder in (settings.folder, daemon.folder):
            folder.chmod(0o755)
        arms = [
            Child(settings, arm, script=LOAD, socket=daemon.socket, model="emt", uid=uid, gid=NOBODY)
            for arm, uid in UIDS.items()
        ]
        children = stack.enter_context(contestants(arms))
        one, many, large = children.values()
        one.ask(do="connect", idle=0, active=1, natoms=NATOMS)
        many.ask(do="connect", idle=0, active=MANY, natoms=NATOMS)
        steps: dict[str, list[float]] = {"alone": [], "beside the others": []}
        rates: dict[str, list[float]] = {"alone": [], "beside the others": []}
        counts = [0] * MANY
        paces: dict[tuple[str, str], list[float]] = defaultdict(list)
        large.ask(do="connect", idle=0, active=1, natoms=LARGE)
        for _ in range(rounds):
            steps["alone"] += one.ask(do="run", seconds=seconds)["latencies"]
            rates["alone"].append(rate(many.ask(do="run", seconds=seconds)))
            many.tell(do="run", seconds=seconds)
            one.tell(do="run", seconds=seconds)
            steps["beside the others"] += one.answer()["latencies"]
            answer = many.answer()
            rates["beside the others"].append(rate(answer))
            counts = [a + b for a, b in zip(counts, answer["counts"], strict=True)]
            for child, when, pace in _paces(one, large, 3 * seconds):
                paces[child.arm, when].append(pace)
    for when, values in steps.items():
        results.add("one job", "step", "ms", [1_000 * value for value in values], when=when)
    for when, values in rates.items():
        results.add("fifty jobs", "steps of all", "1/s", values, when=when)
    results.add("fifty jobs", "Jain's index of fairness over sessions", "", [jain(counts)])
    alone = results.find("one job", "step", when="alone")
    beside = results.find("one job", "step", when="beside the others")
    slower = ratio(beside, alone)
    results.goal("the one job's step over a fair one (half of the device)", slower and slower / 2, 2)
    results.goal("Jain's index of fairness over the fifty", jain(counts), 0.95, at_least=True)
    for (arm, when), values in paces.items():
        results.add(arm, "pace beside a large job", "1/s", values, when=when)
    for arm in ("one job", "large job"):
        slower = ratio(*(results.find(arm, "pace beside a large job", when=when) for when in ("together", "alone")))
        what = f"32 atoms beside {LARGE}, of two users: steps/s of the {arm} over half of those alone"
        results.goal(what, slower and 2 * slower, 0.5, at_least=True)


def _paces(one: Child, large: Child, seconds: float) -> Iterator[tuple[Child, str, float]]:
    """Steps a second of both, alone and together."""
    for when, pair in (("alone", [one]), ("alone", [large]), ("together", [one, large])):
        for child in pair:
            child.tell(do="run", seconds=seconds)
        for child in pair:
            yield child, when, rate(child.answer())


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    figure, (left, right) = plots.figure("One job of one user beside fifty of another, EMT, 32 atoms", panels=2)
    for axes, arm, quantity, text in (
        (left, "one job", "step", "step of the one job / ms"),
        (right, "fifty jobs", "steps of all", "steps of the fifty jobs together / (1/s)"),
    ):
        own = [
            {**sample, "arm": sample["of"]["when"], "of": {}}
            for sample in results["samples"]
            if sample["arm"] == arm and sample["quantity"] == quantity
        ]
        plots.bars(axes, {"samples": own}, quantity, "")
        plots.label(axes, text, "")
    plots.save(figure, path)
