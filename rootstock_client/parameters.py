"""What a calculator may be told, and what becomes of each value."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from rootstock_client.ipi import FINGERPRINT_DIGITS

ON_REQUEST = frozenset({"stress", "energies"})
"""What costs extra, and is computed only for those who ask."""
ALWAYS = frozenset({"energy", "free_energy", "forces"})
"""What comes with every evaluation."""
_DTYPES = ("float32", "float64")


def _model(name: Any) -> str:
    """A None that a script has for a name would be looked for in the catalogue."""
    if not isinstance(name, str):
        raise TypeError(f"model is a name from the catalogue, such as 'mace-mp-medium', not {name!r}")
    return str(name)


def _dtype(value: Any) -> str | None:
    """Its name: numpy.float32 is as good as "float32"."""
    if value is None:
        return None
    name = ""
    with contextlib.suppress(TypeError, ValueError):  # numpy knows none like it
        name = np.dtype(value).name
    if name not in _DTYPES:
        raise TypeError(f"dtype is one of {', '.join(_DTYPES)}, not {value!r}")
    return name


def _properties(names: Iterable[str]) -> tuple[str, ...]:
    """Those of them that cost extra."""
    if isinstance(names, str) or not (asked := set(names)) <= ON_REQUEST | ALWAYS:
        raise TypeError(f"properties is a list with some of {', '.join(sorted(ON_REQUEST))}, not {names!r}")
    return tuple(sorted(asked - ALWAYS))


def _dispersion(value: Any) -> bool | dict[str, Any]:
    if not isinstance(value, dict):
        return _yes_or_no("dispersion", value)
    return {key: setting if isinstance(setting, str) else float(setting) for key, setting in value.items()}


def _yes_or_no(name: str, value: Any) -> bool:
    """A word such as "zero" or "no" would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        allowed = "True, False or a dict" if name == "dispersion" else "True or False"
        raise TypeError(f"{name} is {allowed}, not {value!r}")
    return bool(value)


def fingerprint_or_none(value: Any) -> str | None:
    """No other text can be one."""
    if value is None or value == "":
        return None
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{FINGERPRINT_DIGITS}}}", value):
        form = f"{FINGERPRINT_DIGITS} hexadecimal digits, as a calculator has it after its first result"
        raise TypeError(f"fingerprint is {form}, not {value!r}")
    return str(value)


SENT: dict[str, Callable[[Any], Any]] = {
    "model": _model,
    "dtype": _dtype,
    "head": lambda value: value,
    "dispersion": _dispersion,
    "exact": lambda value: _yes_or_no("exact", value),
    "tolerance": lambda value: None if value is None else float(value),
}
"""What each may be given as, as INIT has it."""
PARAMETERS: dict[str, Callable[[Any], Any]] = {
    **SENT,
    "properties": _properties,
    "fingerprint": fingerprint_or_none,
}
"""These, what says which properties INIT asks for, and what the answer is compared with."""
