"""What was run with which code, and how well it agreed: the fixture `compatible`, and the page its calls add up to.

A test that has shown that a code works with the daemon says so at its end. `pytest --compatibility` writes what was
said into `compatibility.json` and `docs/compatibility.md`; rows of tests that were not in this run stay. Any other run
holds against them what a test says, so that the page is what the tests show.
"""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
DATA = Path(__file__).with_suffix(".json")
PAGE = ROOT / "docs" / "compatibility.md"
OPTION = "--compatibility"
PROPERTY = "compatible"
"""Of pytest's reports: a row that a test has said."""
SAID = ("code", "role", "transport", "ran", "against")
"""What of a row must be the same each time. The version is that of the run that has written the row."""
HEADROOM, NOISE = 3, 1e-10
"""Forces that differ by rounding differ by another amount each time: stated is the power of ten above `HEADROOM` times
what was found, and at least `NOISE`, in eV/Å."""
INTRODUCTION = f"""# What it works with

Each row is a test: the code named was run against a daemon, and its numbers were compared with the same run without
one. *Agreement* bounds the largest difference of a force component. A row without one is about whether something
works, or is compared by other numbers than forces; what that is, the test says. `make test` and `make test-engines`
fail where a row is no longer true; versions are those of the run that wrote the row (`pytest {OPTION}`).

A *driver* moves the atoms and takes forces from the daemon; an *engine* computes them, in a worker.
"""

OTHERS = """A code that is not named has not been tried, and may well work: most calculators of ASE do as entries of the
catalogue ([engines.md](engines.md)), and so does what dials in ([programs.md](programs.md)) or takes a calculator."""

Row = dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(OPTION, action="store_true", help="write docs/compatibility.md from what this run shows")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption(OPTION) and not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to us
        config.pluginmanager.register(Writer())


@pytest.fixture
def compatible(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Say at a test's end which code it has shown to work: see `said`."""

    def say(**row: Any) -> None:
        request.node.user_properties.append((PROPERTY, said(request.node.nodeid, **row)))

    return say


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Hold what a test that has passed says against the page."""
    yield
    if compatible.__name__ in getattr(item, "fixturenames", ()):
        now = [row for name, row in item.user_properties if name == PROPERTY]
        before = [row for row in json.loads(DATA.read_text())["run"] if row["test"] == item.nodeid]
        if wrong := contradiction(now, now if item.config.getoption(OPTION) else before):
            pytest.fail(f"{PAGE.name} and this test: {wrong} Write it: `pytest {OPTION} {item.nodeid}`.")


def said(
    test: str,
    *,
    code: str,
    version: str,
    role: str,
    transport: str,
    ran: str,
    against: str | None = None,
    agreement: float | None = None,
) -> Row:
    """A row.

    Args:
        test: pytest's id of the test.
        code: its name as its authors write it.
        version: which one was run.
        role: "driver" or "engine".
        transport: how it and the daemon talk, such as "Unix socket" or "in Python".
        ran: what was run, such as "NVE, 108 Cu, 200 steps".
        against: what it was compared with, such as "ASE's own NVE".
        agreement: the largest difference of a force component, in eV/Å.

    Raises:
        ValueError: it is no difference.
    """
    if agreement is not None and not 0 <= agreement < math.inf:
        raise ValueError(f"an agreement of {agreement} eV/Å")
    columns = {"code": code, "version": version, "role": role, "transport": transport, "ran": ran, "against": against}
    return {"test": test, **columns, "agreement": None if agreement is None else float(agreement)}


def contradiction(now: list[Row], before: list[Row]) -> str:
    """What is wrong with what a test says, held against what was written of it; empty if nothing is."""
    if not now:
        return "it has the fixture, and says nothing."
    if len({tuple(row[key] for key in SAID) for row in now}) < len(now):
        return "it says the same twice."
    if len(now) < len(before):
        return f"there are {len(before)} rows of it, and it has shown {len(now)}."
    return next(filter(None, (difference(row, before) for row in now)), "")


def difference(row: Row, before: Iterable[Row]) -> str:
    """What `row` says that none of those written before says; empty if there is one that does."""
    alike = [one for one in before if all(one[key] == row[key] for key in SAID)]
    if not alike:
        return f"there is no row of {', '.join(str(row[key]) for key in SAID)}."
    bound = alike[0]["agreement"]
    if (bound is None) != (row["agreement"] is None):
        return "one of the two has an agreement, and the other has none."
    if bound is not None and not row["agreement"] <= bound:
        return f"forces differ by {row['agreement']:.1e} eV/Å, and the page says {bound:.0e}."
    return ""


def stated(row: Row) -> Row:
    """A row as it is written: with a bound in the place of the difference found."""
    if (found := row["agreement"]) is None:
        return row
    return {**row, "agreement": float(f"1e{math.ceil(math.log10(max(HEADROOM * found, NOISE)))}")}


def merged(data: dict[str, list[Row]], rows: list[Row]) -> dict[str, list[Row]]:
    """Rows of a run in the place of those that its tests had before; rows whose test is gone are gone."""
    tests = {row["test"] for row in rows}
    kept = [row for row in with_a_test(data["run"]) if row["test"] not in tests]
    return {"run": sorted([*kept, *map(stated, rows)], key=_place), "not run": sorted(data["not run"], key=_place)}


def with_a_test(rows: list[Row], there: Collection[str] = ()) -> list[Row]:
    """Those whose test is still there, and still shows something.

    Args:
        rows: of any tests.
        there: tests that were found; whether others are there, pytest is asked.
    """
    found = _collected({row["test"].partition("::")[0] for row in rows if row["test"] not in there})
    return [row for row in rows if _uses_the_fixture(row["test"]) and (row["test"] in there or found(row["test"]))]


def _collected(paths: set[str]) -> Callable[[str], bool]:
    """Whether pytest finds a test, parameters and all; yes in files that skip themselves for want of a package."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    there = sorted(path for path in paths if (ROOT / path).is_file())
    if not there:
        return lambda _: False
    done = subprocess.run([*command, *there], cwd=ROOT, capture_output=True, text=True, check=False)
    tests = {line for line in done.stdout.splitlines() if "::" in line}
    skipped = set(there) - {test.partition("::")[0] for test in tests}
    return lambda test: test in tests or test.partition("::")[0] in skipped


def _uses_the_fixture(test: str) -> bool:
    path, _, name = test.partition("::")
    name = name.partition("[")[0].rpartition("::")[2]
    source = ROOT / path
    return source.is_file() and any(
        isinstance(node, ast.FunctionDef) and node.name == name and "compatible" in [one.arg for one in node.args.args]
        for node in ast.walk(ast.parse(source.read_text()))
    )


def page(data: dict[str, list[Row]]) -> str:
    """The page."""
    codes = {
        role: ", ".join(sorted({row["code"] for row in data["run"] if row["role"] == role}, key=str.lower))
        for role in ("driver", "engine")
    }
    names = f"**Drivers**: {codes['driver']}.\n\n**Engines**: {codes['engine']}.\n\n{OTHERS}\n"
    header = ("Code", "Version", "Role", "Transport", "What was run", "Compared with", "Agreement, eV/Å", "Status")
    lines = [header, ("---",) * len(header)]
    for row in data["run"]:
        agreement = "" if row["agreement"] is None else f"{row['agreement']:.0e}".replace("e-0", "e-")
        *most, against = (row[key] for key in ("code", "version", "role", "transport", "ran", "against"))
        lines.append((*most, against or "", agreement, f"[passes](../{row['test'].partition('::')[0]})"))
    lines.extend(
        (row["code"], "", row["role"], row["transport"], "", "", "", f"not run: {row['why']}")
        for row in data["not run"]
    )
    return f"{INTRODUCTION}\n{names}\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(data: dict[str, list[Row]]) -> None:
    """The data and the page."""
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(data))


class Writer:
    """Gathers what tests have said, from all processes of pytest-xdist, and writes it at the end."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._rows.extend(row for name, row in report.user_properties if name == PROPERTY)

    def pytest_sessionfinish(self) -> None:
        write(merged(json.loads(DATA.read_text()), self._rows))


def _place(row: Row) -> tuple[str, ...]:
    return row["role"], row["code"].lower(), row.get("test", ""), row["transport"], row.get("ran", "")
