"""The page of what it works with is what its data say, and each row has a test."""

from __future__ import annotations

import json

import pytest

import compatibility

ROW = compatibility.said(
    "tests/test_x.py::test_x", code="X", version="1", role="driver", transport="Unix socket", ran="NVE", agreement=2e-11
)


def data() -> dict[str, list[compatibility.Row]]:
    return json.loads(compatibility.DATA.read_text())


def test_the_page_is_what_the_data_say() -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(data())
    assert data() == compatibility.merged(data(), [])  # in order


def test_each_row_has_a_test_or_a_reason() -> None:
    assert all(row["why"] for row in data()["not run"])
    assert [row["test"] for row in data()["run"] if not compatibility.has_test(row)] == []
    assert not compatibility.has_test(ROW)
    assert not compatibility.has_test({"test": f"{__name__}.py::test_each_row_has_a_test_or_a_reason"})


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, ""),
        ({"agreement": 9e-11}, ""),
        ({"version": "2"}, ""),
        ({"agreement": 2e-10}, "differ by 2.0e-10 eV/Å, and it says 1e-10"),
        ({"agreement": float("nan")}, "differ"),
        ({"agreement": None}, "has none"),
        ({"ran": "NVT"}, "no row"),
    ],
)
def test_what_a_test_shows_is_held_against_the_page(changed: dict[str, object], wrong: str) -> None:
    (stated,) = [row for row in compatibility.merged(data(), [ROW])["run"] if row["test"] == ROW["test"]]
    found = compatibility.difference({**ROW, **changed}, [stated])
    assert bool(found) == bool(wrong)
    assert wrong in found


def test_a_run_replaces_its_own_rows_and_keeps_others() -> None:
    before = compatibility.merged(data(), [ROW])
    after = compatibility.merged(before, [])
    assert after == data()  # a test that is gone
    assert len(before["run"]) == len(data()["run"]) + 1
    assert [row["agreement"] for row in before["run"] if row["test"] == ROW["test"]] == [1e-10]
    assert compatibility.bound(0.0) == compatibility.NOISE
