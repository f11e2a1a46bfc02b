"""The page of what it works with is what its data say, and each row has a test."""

from __future__ import annotations

import json

import pytest

import compatibility

ROW = compatibility.said(
    "tests/test_x.py::test_x", code="X", version="1", role="driver", transport="Unix socket", ran="NVE", agreement=2e-9
)


def data() -> dict[str, list[compatibility.Row]]:
    return json.loads(compatibility.DATA.read_text())


def test_the_page_is_what_the_data_say() -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(data())


def test_each_row_has_a_test_or_a_reason(request: pytest.FixtureRequest) -> None:
    assert all(row["why"] for row in data()["not run"])
    gone = [ROW, {"test": "tests/test_ase_uses.py::test_use[Gaussian]"}, {"test": __name__ + ".py::test_the_page"}]
    there = {item.nodeid for item in request.session.items}
    assert compatibility.with_a_test([*data()["run"], *gone], there) == data()["run"]


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, ""),
        ({"agreement": 9e-9}, ""),
        ({"version": "2"}, ""),
        ({"agreement": 2e-8}, "differ by 2.0e-08 eV/Å, and the page says 1e-08"),
        ({"agreement": float("nan")}, "differ"),
        ({"agreement": None}, "has none"),
        ({"ran": "NVT"}, "no row"),
    ],
)
def test_what_a_test_shows_is_held_against_the_page(changed: dict[str, object], wrong: str) -> None:
    found = compatibility.contradiction([{**ROW, **changed}], [compatibility.stated(ROW)])
    assert bool(found) == bool(wrong)
    assert wrong in found


def test_a_test_says_all_that_the_page_has_of_it_and_each_once() -> None:
    other = {**ROW, "ran": "NVT"}
    written = [compatibility.stated(row) for row in (ROW, other)]
    assert compatibility.contradiction([ROW, other], written) == ""
    assert "says nothing" in compatibility.contradiction([], [])
    assert "has shown 1" in compatibility.contradiction([ROW], written)
    assert "twice" in compatibility.contradiction([ROW, ROW], written)


@pytest.mark.parametrize("agreement", [-1e-9, float("nan"), float("inf")])
def test_what_is_no_difference_of_forces_is_no_agreement(agreement: float) -> None:
    with pytest.raises(ValueError, match="an agreement of"):
        compatibility.said(**{**ROW, "agreement": agreement})


def test_a_run_writes_its_own_rows_and_drops_those_whose_test_is_gone() -> None:
    nothing: dict[str, list[compatibility.Row]] = {"run": [], "not run": []}
    exact = {**ROW, "agreement": 0.0, "code": "A"}
    written = compatibility.merged(nothing, [ROW, exact])
    assert [row["agreement"] for row in written["run"]] == [compatibility.NOISE, 1e-8]
    assert compatibility.merged(written, []) == nothing
