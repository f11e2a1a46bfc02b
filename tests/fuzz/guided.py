"""The checks of `check.py` for atheris, which changes what runs into new code. Four bytes choose cuts and side."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent.parent)]

with atheris.instrument_imports(include=["rootstock_client"]):
    check = importlib.import_module("check")  # which imports both sides of the protocol

CHOICES = 4


def one_input(data: bytes) -> None:
    """Check one input of atheris's."""
    if len(data) < CHOICES:
        return
    first, second, how, asked = data[:CHOICES]
    stream = data[CHOICES:]
    cuts = [cut % (len(stream) + 1) for cut in (first * 3, second)]
    if how & 1:
        requests = ["GETFORCE" if asked >> bit & 1 else "STATUS" for bit in range(how >> 5)]
        check.check_engine(stream, cuts, requests, natoms=how >> 1 & 3, batch=1 + (how >> 3 & 1))
    else:
        check.check_driver(stream, cuts, late=bool(how & 2))


atheris.Setup(sys.argv, one_input)
atheris.Fuzz()
