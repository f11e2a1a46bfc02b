"""How plots look."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

mpl.use("svg")
COLOURS = {
    "rootstockd": "#0b6e4f",
    "wire": "#3fa37c",
    "Rootstock": "#b3541e",
    "ASE SocketIO": "#5b4b8a",
    "MACECalculator": "#a23b72",
    "same backend": "#5b4b8a",
    "rootstockd, no batches": "#7cb518",
    "MACECalculator, OMP_NUM_THREADS=1": "#d68fb2",
    "MACECalculator, OMP_WAIT_POLICY=PASSIVE": "#e8a33d",
    "echo": "#777777",
    "echo server": "#777777",
    "noop in process": "#b0a060",
    "client": "#1f77b4",
    "daemon": "#d62728",
    "worker": "#ff7f0e",
}


def figure(title: str, panels: int = 1) -> tuple[Any, Any]:
    """A figure with a title and panels side by side."""
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "rootstockd", "font.size": 10})
    made, axes = plt.subplots(1, panels, figsize=(5.2 * panels, 4.0), layout="constrained", facecolor="white")
    made.suptitle(title, fontsize=11)
    return made, axes


def lines(
    axes: Any,
    results: dict[str, Any],
    quantity: str,
    over: str,
    arms: Sequence[str],
    **of: Any,
) -> None:
    """One line an arm: medians, with a band between the quartiles."""
    for arm in arms:
        found = [
            sample
            for sample in results["samples"]
            if sample["arm"] == arm
            and sample["quantity"] == quantity
            and over in sample["of"]
            and all(sample["of"].get(key) == value for key, value in of.items())
        ]
        if not found:
            continue
        found.sort(key=lambda sample: sample["of"][over])
        x = [sample["of"][over] for sample in found]
        colour = COLOURS.get(arm)
        (line,) = axes.plot(x, [sample["median"] for sample in found], "o-", ms=4, lw=1.5, label=arm, color=colour)
        low, high = [sample["q1"] for sample in found], [sample["q3"] for sample in found]
        axes.fill_between(x, low, high, color=line.get_color(), alpha=0.2, lw=0)


def bars(axes: Any, results: dict[str, Any], quantity: str, group: str) -> None:
    """One group of horizontal bars for each value of `group`, with the quartiles."""
    found = [sample for sample in results["samples"] if sample["quantity"] == quantity]
    names = []
    for row, sample in enumerate(reversed(found)):
        middle = sample["median"]
        error = [[max(0.0, middle - sample["q1"])], [max(0.0, sample["q3"] - middle)]]
        axes.barh(row, middle, xerr=error, color=COLOURS.get(sample["arm"], "#999999"), height=0.7, capsize=2)
        names.append(f"{sample['arm']}\n{sample['of'].get(group, '')}")
    axes.set_yticks(range(len(names)), names, fontsize=8)


def label(axes: Any, x: str, y: str, log: str = "", title: str = "") -> None:
    """Axes with their units."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, which="major", color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8, frameon=True, facecolor="white", framealpha=0.9)


def save(made: Any, path: Path) -> None:
    """Write it."""
    made.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(made)
