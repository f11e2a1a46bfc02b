"""How far loading a model has come, for whoever waits for it."""

from __future__ import annotations

from typing import Callable

IMPORTS, WEIGHTS, CHECKS = "imports", "weights", "checks"
"""The engine's packages are imported; the model is read and built; what computes it is compiled and compared."""
_tell: list[Callable[[str, str], None]] = []


def tell(listener: Callable[[str, str], None]) -> None:
    """Have somebody told of each stage, and of what is tried in it."""
    _tell.append(listener)


def begin(stage: str, backend: str = "") -> None:
    """Loading has come to this stage; should the process end now, it is the doing of `backend`, if one is named."""
    for listener in _tell:
        listener(stage, backend)
