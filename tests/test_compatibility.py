"""docs/compatibility.md says what tests have shown, all of it and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import compatibility

ROOT = Path(__file__).parent.parent


def test_the_page_is_what_its_data_say() -> None:
    assert compatibility.PAGE.read_text() == compatibility.page(compatibility.load())


def test_each_row_has_a_test_behind_it() -> None:
    rows = compatibility.load()["rows"]
    assert rows
    for row in rows:
        file, _, name = row["test"].partition("::")
        text = (ROOT / file).read_text()
        body = re.search(rf"^def {name}\(.*?(?=^def |^@|\Z)", text, re.MULTILINE | re.DOTALL)
        assert body and "compatible" in body[0], f"{row['test']} is no test that says what it has shown"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ran": "something else"}, "does not say"),
        ({"agreement": 1.0}, "it agrees to 1e\\+00"),
        ({"agreement": None}, "not None"),
        ({"version": "99"}, None),
    ],
)
def test_a_test_that_shows_something_else_fails(change: dict[str, object], words: str | None) -> None:
    row = next(row for row in compatibility.load()["rows"] if row["agreement"] is not None)
    if words is None:
        compatibility._check(row | change)
    else:
        with pytest.raises(AssertionError, match=words):
            compatibility._check(row | change)
