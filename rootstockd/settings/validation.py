"""What pydantic found wrong with input, in words of the input: which field, what it says, what it may say."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
from collections.abc import Iterable
from typing import Any

from pydantic import AfterValidator, BeforeValidator, ValidationError

_WORDS = {
    "missing": "{where} is missing",
    "extra_forbidden": "there is no field {where}",
    "literal_error": "{at}{given} is not one of {choices}",
    "int_type": "{at}{given} is not an integer",
    "int_from_float": "{at}{given} is not an integer",
    "int_parsing": "{at}{given} is not an integer",
    "float_type": "{at}{given} is not a number",
    "float_parsing": "{at}{given} is not a number",
    "finite_number": "{at}{given} is not a finite number",
    "string_type": "{at}{given} is not a text",
    "bool_type": "{at}{given} is neither true nor false",
    "list_type": "{at}{given} is not a list",
    "tuple_type": "{at}{given} is not a list",
    "frozen_set_type": "{at}{given} is not a list",
    "dict_type": "{at}{given} is not a table of fields",
    "model_type": "{at}{given} is not a table of fields",
    "greater_than": "{at}{given} is not more than {gt}",
    "greater_than_equal": "{at}{given} is less than {ge}",
    "less_than": "{at}{given} is not less than {lt}",
    "less_than_equal": "{at}{given} is more than {le}",
    "string_too_long": "{at}{given} has more than {max_length} characters",
    "too_short": "{at}there are {actual_length} of them, and at least {min_length} is needed",
    "too_long": "{at}there are {actual_length} of them, and {max_length} have a place",
}
"""By pydantic's type of error."""
LONGEST = 300
"""Characters of a description."""
_shortened = reprlib.Repr()
_shortened.maxstring = _shortened.maxother = 60

_BYTES = {
    **{f"{prefix}B": 1000**power for power, prefix in enumerate(("", "k", "M", "G", "T"))},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate(("K", "M", "G", "T"), 1)},
}
_BYTES |= {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SECONDS = {"ms": 1e-3, "s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86400}
_WITH_UNIT = re.compile(r"\s*(\d{1,30}(?:_\d{1,3}){0,9}(?:\.\d{1,9})?)\s*([A-Za-z]+)\s*")


def of_form(pattern: str, form: str) -> AfterValidator:
    """What a field's text has to match as a whole, and how that is said to people: "an address, HOST:PORT"."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"{_shortened.repr(text)} is not {form}")
        return text

    return AfterValidator(check)


def _no_boolean(given: Any) -> Any:
    """To Python, and so to pydantic, true is 1."""
    if isinstance(given, bool):
        raise ValueError(f"{str(given).lower()} is not a number")  # noqa: TRY004 - pydantic says nothing of a TypeError
    return given


NUMBER = BeforeValidator(_no_boolean)
"""Of a field that is a number, of nothing in particular."""


def _check_finite(seconds: float) -> float:
    if not math.isfinite(seconds):
        raise ValueError(f"{seconds} is not a finite number; where there shall be no limit, write a large one: 1e9")
    return seconds


FINITE = AfterValidator(_check_finite)
"""Of a field that is so many seconds, for which `inf` looks like a good value: JSON has no such number."""


def _without_unit(name: str, units: dict[str, float]) -> BeforeValidator:
    """Who gives a number a unit is told what to write; it may be another number than they think."""
    known = {unit.lower(): factor for unit, factor in units.items()}

    def check(given: Any) -> Any:
        found = _WITH_UNIT.fullmatch(given) if isinstance(given, str) else None
        if found and (factor := known.get(found[2].lower())):
            number = float(found[1]) * factor
            plain = f"{round(number):_}" if number == round(number) else f"{number:g}"
            raise ValueError(f"{given!r} has a unit; write it in {name}: {plain}")
        return _no_boolean(given)

    return BeforeValidator(check)


BYTES = _without_unit("bytes", _BYTES)
"""Of a field that is so many bytes."""
SECONDS = _without_unit("seconds", _SECONDS)
"""Of a field that is so many seconds."""


def describe(error: ValidationError, fields: Iterable[str] = ()) -> str:
    """The first thing that is wrong, in a line without a full stop.

    Args:
        error: what pydantic says.
        fields: which there are; one of them may be meant where a field is none.
    """
    problem = error.errors(include_url=False)[0]
    said = in_words(problem, ".".join(map(str, problem["loc"]))[:100])
    if problem["type"] == "extra_forbidden" and len(problem["loc"]) == 1:
        near = difflib.get_close_matches(str(problem["loc"][0]), fields, n=1)
        said += f"; did you mean {near[0]}?" if near else ""
    return said


def in_words(problem: Any, where: str) -> str:
    """One of an error's problems, in a line without a full stop; `where` is the field, or empty."""
    at = f"{where}: " if where else ""
    if (words := _WORDS.get(problem["type"])) is None:
        return f"{at}{problem['msg'].removeprefix('Value error, ')}"[:LONGEST].removesuffix(".")
    context = {
        name: f"{value:g}" if isinstance(value, float) else value for name, value in problem.get("ctx", {}).items()
    }
    given = "null" if problem["input"] is None else _shortened.repr(problem["input"])
    choices = str(context.get("expected", "")).replace(" or ", ", ").replace("'", "")
    return words.format(**context, where=where, at=at, given=given, choices=choices)[:LONGEST]
