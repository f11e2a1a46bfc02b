"""MACE on a GPU through cuEquivariance, by mace-torch's own conversion."""

from __future__ import annotations

from typing import Any

import cuequivariance_torch  # noqa: F401 - mace-torch would go on without it
from mace.cli.convert_e3nn_cueq import run as convert


def converted(model: Any, device: str) -> Any:
    """The model with cuEquivariance's kernels in place of e3nn's."""
    twin = convert(input_model=model, device=device, return_model=True)
    for parameter in twin.parameters():
        parameter.requires_grad = False
    return twin
