"""What pydantic found wrong with input, in words of the input: which field, what it says, what it may say."""

from __future__ import annotations

import reprlib
from typing import Any

from pydantic import ValidationError

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
    "string_pattern_mismatch": "{at}{given} is not of the form {pattern}",
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


def describe(error: ValidationError) -> str:
    """The first thing that is wrong, in a line without a full stop."""
    problem = error.errors(include_url=False)[0]
    return in_words(problem, ".".join(map(str, problem["loc"]))[:100])


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
