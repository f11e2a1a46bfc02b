"""MACE on a GPU through cuEquivariance, by mace-torch's own conversion."""

from __future__ import annotations

from typing import Any

import cuequivariance_torch  # noqa: F401 - mace-torch would go on without it
from mace.cli.convert_e3nn_cueq import run as convert

from rootstockd.worker.engines.mace import basis
from rootstockd.worker.engines.mace.candidates import NotApplicableError


def converted(model: Any, device: str) -> Any:
    """The model with cuEquivariance's kernels in place of e3nn's.

    Raises:
        NotApplicableError: it has other modules than mace-torch's own.
    """
    reduced = basis.is_reduced(model.state_dict())
    if reduced is None:
        raise NotApplicableError("its contractions are not mace-torch's own, as where it was saved for cuEquivariance")
    model.use_reduced_cg = reduced  # which so far says what was wished for, and mace-torch converts by it
    twin = convert(input_model=model, device=device, return_model=True)
    for parameter in twin.parameters():
        parameter.requires_grad = False
    return twin
