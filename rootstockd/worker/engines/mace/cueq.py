"""MACE on a GPU through cuEquivariance, by mace-torch's own conversion."""

from __future__ import annotations

from typing import Any

import cuequivariance_torch  # noqa: F401 - mace-torch would go on without it
from mace.cli.convert_e3nn_cueq import run as convert

from rootstockd.worker.engines.mace.reference import ReferenceBackend


def accelerated(model: Any, device: str) -> ReferenceBackend:
    """The model with cuEquivariance's kernels; everything around them stays mace-torch's."""
    converted = convert(input_model=model, device=device, return_model=True)
    for parameter in converted.parameters():
        parameter.requires_grad = False
    return ReferenceBackend(converted, device, name="cuequivariance")
