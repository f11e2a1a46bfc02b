"""A thousand idle sessions and two hundred at work, next to an echo server that does nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import HERE, Child, Daemon, Results, Settings, contestants, memory, percentile, ratio

NATOMS = 64
LOAD = HERE / "load.py"


def jain(counts: list[int]) -> float:
    """Jain's index of fairness: 1 where all have the same, 1/n where one has all."""
    return sum(counts) ** 2 / (len(counts) * sum(count**2 for count in counts))


def rate(answer: dict[str, Any]) -> float:
    """Steps a second of a run: all that were answered, over the time until the last of them was."""
    return len(answer["latencies"]) / float(answer["elapsed"])


def run(settings: Settings, results: Results) -> None:
    """The benchmark."""
    idle, active = (200, 50) if settings.quick else (1_000, 200)
    rounds, seconds = (3, 1.0) if settings.quick else (8, 2.0)
    results.parameters = {"idle": idle, "active": active, "atoms": NATOMS, "rounds": rounds, "seconds": seconds}
    with ExitStack() as stack:
        daemon = stack.enter_context(Daemon(settings, "--model", "noop"))
        pid, worker = daemon.pid, daemon.worker("noop")
        before = memory([pid]), memory([worker])
        echo = str(daemon.folder / "echo.sock")
        options = {"arm": "echo server", "socket": echo, "natoms": NATOMS}
        server = subprocess.Popen([sys.executable, str(LOAD), json.dumps(options)])
        stack.callback(server.wait)
        stack.callback(server.terminate)
        end = time.monotonic() + 30
        while not Path(echo).exists() and time.monotonic() < end:
            time.sleep(0.05)
        arms = [
            Child(settings, "rootstockd", script=LOAD, socket=daemon.socket, model="noop"),
            Child(settings, "echo server", script=LOAD, socket=echo, model=""),
        ]
        children = stack.enter_context(contestants(arms))
        for arm, child in children.items():
            start = time.perf_counter()
            child.ask(do="connect", idle=idle, active=active, natoms=NATOMS)
            took = 1_000 * (time.perf_counter() - start) / (idle + active)
            results.add(arm, "connect, INIT and first force", "ms", [took])
        latencies: dict[str, list[float]] = {arm: [] for arm in children}
        rates: dict[str, list[float]] = {arm: [] for arm in children}
        counts: dict[str, list[int]] = {arm: [0] * active for arm in children}
        for _ in range(rounds):
            for arm, child in children.items():
                answer = child.ask(do="run", seconds=seconds)
                latencies[arm] += answer["latencies"]
                rates[arm].append(rate(answer))
                counts[arm] = [a + b for a, b in zip(counts[arm], answer["counts"], strict=True)]
        after = memory([pid]), memory([worker])
    tails = {}
    for arm, values in latencies.items():
        middle = results.add(arm, "latency", "ms", [1_000 * value for value in values])
        tails[arm] = 1_000 * percentile(values, 0.99) / middle
        results.add(arm, "latency, 99th percentile", "ms", [1_000 * percentile(values, 0.99)])
        results.add(arm, "requests", "1/s", rates[arm])
        results.add(arm, "Jain's index of fairness over sessions", "", [jain(counts[arm])])
    grown = {}
    for name, one, other in zip(("daemon", "worker"), before, after, strict=True):
        grown[name] = 1_000 * (other["RSS"] - one["RSS"]) / (idle + active)
        results.add(name, "memory of a session (RSS)", "KB", [grown[name]])
    results.goal(f"{idle} + {active} sessions: 99th percentile over median", tails["rootstockd"], 10)
    results.goal("Jain's index of fairness", jain(counts["rootstockd"]), 0.95, at_least=True)
    results.goal("the daemon's memory of a session (RSS), KB", grown["daemon"], 100)
    share = ratio(results.find("rootstockd", "requests"), results.find("echo server", "requests"))
    results.goal("requests/s over the echo server's", share, 0.5, at_least=True)


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars."""
    from benchmarks import plots  # noqa: PLC0415 - matplotlib is slow to import

    of = results["parameters"]
    figure, (left, right) = plots.figure(f"{of['idle']} idle sessions and {of['active']} active ones, noop", panels=2)
    plots.bars(left, results, "requests", "")
    plots.label(left, "requests of all sessions / (1/s)", "")
    plots.bars(right, results, "latency", "")
    plots.label(right, "latency, median and quartiles / ms", "")
    plots.save(figure, path)
