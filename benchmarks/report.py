"""`python -m benchmarks.report A.json [B.json]`: one result as Markdown, or two side by side."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]


def load(path: Path) -> dict[str, Any]:
    """A result file.

    Raises:
        ValueError: it is something else, such as a verdict of `benchmarks.chaos`.
    """
    result: dict[str, Any] = json.loads(path.read_text())
    if not isinstance(result, dict) or "benchmarks" not in result:
        raise ValueError(f"{path} is no result of benchmarks.run_local")
    return result


def describe(result: dict[str, Any]) -> str:
    """One line on where a result comes from."""
    hardware, software = result["hardware"], result["software"]
    gpus = ", ".join(hardware["gpus"]) or "no GPU"
    return (
        f"{hardware['cpus used']} of {hardware['cpus']} CPUs ({hardware['cpu']}, {hardware['architecture']}), {gpus}; "
        f"Python {software['python']}, rootstockd {software['rootstockd']} at {result['commit'][:12]}; "
        f"load average at the start {hardware['load average at the start'][0]}; {result['created']}"
        + (", quick" if result["quick"] else "")
    )


def samples(result: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    """All samples by what they are of."""
    found = {}
    for name, benchmark in result["benchmarks"].items():
        for sample in benchmark["samples"]:
            of = ", ".join(f"{key} {value}" for key, value in sample["of"].items())
            found[name, sample["arm"], sample["quantity"], of] = sample
    return found


def number(value: float | None) -> str:
    """A number, short."""
    if value is None:
        return "not measured"
    if abs(value) >= 999.5:  # which three digits would round to 1e+03
        return f"{value:,.0f}"
    return f"{value:.3g}".replace("e-0", "e-")


def table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| " + " | ".join(head) + " |"
    yield "| " + " | ".join("---" for _ in head) + " |"
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def goals(*results: dict[str, Any]) -> Iterator[str]:
    """The goals, missed ones first."""
    found: dict[tuple[str, str], list[dict[str, Any] | None]] = {}
    for index, result in enumerate(results):
        for name, benchmark in result["benchmarks"].items():
            for goal in benchmark["goals"]:
                found.setdefault((name, goal["what"]), [None] * len(results))[index] = goal
    rows = []
    for (name, what), each in found.items():
        cells = [
            "" if goal is None else f"{number(goal['value'])} {'met' if goal['met'] else '**missed**'}" for goal in each
        ]
        wanted = next(goal["goal"] for goal in each if goal is not None)
        missed = any(goal is not None and not goal["met"] for goal in each)
        rows.append((not missed, [name, what, wanted, *cells]))
    rows.sort(key=lambda row: row[0])
    columns = ["measured"] if len(results) == 1 else ["A", "B"]
    yield from table(["benchmark", "what", "goal", *columns], [cells for _, cells in rows])


def one(result: dict[str, Any]) -> Iterator[str]:
    """One result."""
    yield describe(result)
    yield ""
    yield from goals(result)
    for name, benchmark in result["benchmarks"].items():
        yield f"### {name}"
        yield ""
        for note in benchmark["notes"]:
            yield f"- {note}"
        if benchmark["notes"]:
            yield ""
        rows = [
            [
                sample["arm"],
                sample["quantity"],
                ", ".join(f"{key} {value}" for key, value in sample["of"].items()),
                f"{number(sample['median'])} {sample['unit']}",
                f"{number(sample['q1'])} … {number(sample['q3'])}",
                str(sample["count"]),
            ]
            for sample in benchmark["samples"]
        ]
        yield from table(["what", "quantity", "of", "median", "quartiles", "samples"], rows)


def two(a: dict[str, Any], b: dict[str, Any]) -> Iterator[str]:
    """Two results: B over A wherever both have a sample."""
    yield f"A: {describe(a)}"
    yield f"B: {describe(b)}"
    yield ""
    yield from goals(a, b)
    left, right = samples(a), samples(b)
    rows = []
    for key in (key for key in left if key in right):
        one_, other = left[key], right[key]
        shown = f"{other['median'] / one_['median']:.2f}" if one_["median"] else ""
        apart = other["q1"] > one_["q3"] or other["q3"] < one_["q1"]
        values = [f"{number(one_['median'])} {one_['unit']}", f"{number(other['median'])} {other['unit']}"]
        rows.append([*key, *values, shown, "" if apart else "quartiles overlap"])
    yield from table(["benchmark", "what", "quantity", "of", "A", "B", "B / A", ""], rows)
    for name, only in (("A", left.keys() - right.keys()), ("B", right.keys() - left.keys())):
        if only:
            yield f"Only in {name}: {len(only)} sets of samples."


def main() -> None:
    """Read the command line, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT.json", help="one to show, or two to compare")
    paths = parser.parse_args().results
    if len(paths) > 2:
        parser.error("one or two results")
    try:
        loaded = [load(path) for path in paths]
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print("\n".join(one(loaded[0]) if len(loaded) == 1 else two(loaded[0], loaded[1])))


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever reads may stop, as `head` does
    main()
