"""The fixture `compatible`, by which a test says what it has shown to work, and the page made of what was said.

`pytest --compatibility` writes the rows of the tests that ran into docs/compatibility.json, and the page. Without it a
test that says what the page does not say fails.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parent.parent / "docs"
DATA, PAGE = DOCS / "compatibility.json", DOCS / "compatibility.md"
KEY = "compatible"
VARY = {"version", "agreement"}
"""What need not be the same in every run."""
_collected: list[dict[str, Any]] = []


@pytest.fixture
def compatible(
    request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> Callable[..., None]:
    """To be called at a test's end, with what it has shown; once for each code.

    Args of what it returns:
        code, version: which program or package.
        role: driver or engine.
        transport: how structures and results pass.
        ran: what was done.
        against: what it was compared with.
        agreement: the largest difference of forces in eV/Å, or None where nothing was compared.
    """

    def say(
        *, code: str, version: str, role: str, transport: str, ran: str, against: str = "", agreement: float | None = None
    ) -> None:
        test = f"{request.node.path.relative_to(DOCS.parent)}::{request.node.originalname}"
        row = {"code": code, "version": version, "role": role, "transport": transport, "ran": ran, "against": against}
        row |= {"agreement": None if agreement is None else _rounded_up(agreement), "test": test}
        record_property(KEY, row)
        if not request.config.getoption("--compatibility"):
            _check(row)

    return say


def _rounded_up(value: float) -> float:
    """To a power of ten: what an agreement amounts to, rather than what it was this time."""
    return float(f"1e{math.ceil(math.log10(value))}") if value > 0 else 0.0


def _check(row: dict[str, Any]) -> None:
    fixed = {name: value for name, value in row.items() if name not in VARY}
    same = [said for said in load()["rows"] if fixed.items() <= said.items()]
    assert same, f"docs/compatibility.md does not say {row}; write it by pytest --compatibility {row['test']}"
    allowed, found = same[0]["agreement"], row["agreement"]
    assert (allowed is None) == (found is None), f"docs/compatibility.md says {allowed}, not {found}"
    assert found is None or found <= max(10 * allowed, 1e-12), f"it agrees to {found:.0e} eV/Å, and not to {allowed:.0e}"


def load() -> dict[str, Any]:
    """What the page is made of."""
    data: dict[str, Any] = json.loads(DATA.read_text())
    return data


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that writes."""
    parser.addoption("--compatibility", action="store_true", help="write docs/compatibility.md from what is shown")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what was said; with pytest-xdist this is called where all reports come together."""
    if report.when == "call" and report.passed:
        _collected.extend(value for name, value in report.user_properties if name == KEY and isinstance(value, dict))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write what was said in place of what the same tests said before."""
    if not session.config.getoption("--compatibility") or hasattr(session.config, "workerinput"):
        return
    data = load()
    tests = {row["test"] for row in _collected}
    rows = [row for row in data["rows"] if row["test"] not in tests] + _collected
    data["rows"] = sorted(rows, key=lambda row: (row["role"], row["code"].lower(), row["test"], row["ran"]))
    DATA.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(page(data))


def page(data: dict[str, Any]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Compatibility",
        "",
        "What was run with rootstockd, and how far it agrees with the same thing done without it: the largest difference of",
        "forces, rounded up to a power of ten. The table is written by the tests themselves, and a test fails that shows",
        "anything else. Those of `tests/engines` are run by `make test-engines`, all others by `make test`.",
    ]
    titles = {"driver": "Drivers: they move the atoms", "engine": "Engines: they answer"}
    for role, title in titles.items():
        lines += ["", f"## {title}", "", "| code | by | what was run | compared with | eV/Å | test |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        for row in data["rows"]:
            if row["role"] == role:
                cells = [f"{row['code']} {row['version']}", row["transport"], row["ran"], row["against"] or "–"]
                file, _, name = row["test"].partition("::")
                lines.append(f"| {' | '.join([*cells, _agreement(row), f'`{Path(file).name}` `{name}`'])} |")
    lines += ["", "## Not run", "", "| code | role | why | what there is |", "| --- | --- | --- | --- |"]
    lines += [f"| {row['code']} | {row['role']} | {row['why']} | {row['instead']} |" for row in data["not_run"]]
    return "\n".join(lines) + "\n"


def _agreement(row: dict[str, Any]) -> str:
    if row["agreement"] is None:
        return "–"
    return f"≤ {row['agreement']:.0e}".replace("e-0", "e-") if row["agreement"] else "same bits"
