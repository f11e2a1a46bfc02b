"""In which basis a model's symmetric contractions are: their U matrices tell, not what the model says of itself.

There are two, and weights of one are nothing in the other: of all paths, and the reduced one, whose matrices are
symmetric in the features that they multiply. mace-torch makes the second where `use_reduced_cg` is set, which is its
classes' default, and cuEquivariance is installed; where that is not, the very same settings make the first. The
matrices are part of a model's state, so it can be made again as it was, whatever is installed.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Any, Optional

import torch

_MATRIX = re.compile(r"products\.(\d+)\.symmetric_contractions\.contractions\.(\d+)\.U_matrix_(\d+)")
_SYMMETRIC = 1e-3
"""Entries are of the order of one; those of a path that is not symmetric differ by as much."""


def is_reduced(state: Mapping[str, torch.Tensor]) -> Optional[bool]:
    """Whether a model is in the reduced basis; where both are the same, as for scalars at correlation 2, it is.

    Args:
        state: the model's state.

    Returns:
        None if there are no U matrices: the contractions are not mace-torch's own.
    """
    matrices = _matrices(state)
    if not matrices:
        return None
    return all(_is_symmetric(matrix, degree) for (*_, degree), matrix in matrices)


@contextlib.contextmanager
def made_with(state: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have mace-torch make one model meanwhile with the U matrices of a state, in place of those of its own choice.

    Args:
        state: of such a model.

    Raises:
        ValueError: the model has more of them than the state.
    """
    from mace.modules import symmetric_contraction  # noqa: PLC0415 - imports much

    left = iter(_matrices(state))

    def given(**_asked: Any) -> list[torch.Tensor]:
        for _, matrix in left:
            return [matrix]
        raise ValueError("the state has fewer U matrices than the model")

    own = symmetric_contraction.U_matrix_real
    symmetric_contraction.U_matrix_real = given
    try:
        yield
    finally:
        symmetric_contraction.U_matrix_real = own


def _matrices(state: Mapping[str, torch.Tensor]) -> list[tuple[tuple[int, ...], torch.Tensor]]:
    """All, behind their layer, contraction and degree, in the order in which mace-torch makes them."""
    found = ((_MATRIX.fullmatch(key), matrix) for key, matrix in state.items())
    named = ((tuple(map(int, match.groups())), matrix) for match, matrix in found if match)
    return sorted(named, key=lambda one: one[0])


def _is_symmetric(matrix: torch.Tensor, degree: int) -> bool:
    """Whether a matrix, ([components,] features, ... (`degree` times), paths), stays as its features change places."""
    first = -degree - 1
    turned = (matrix.transpose(first, other) for other in range(first + 1, -1))
    return all(torch.allclose(matrix, each, rtol=0.0, atol=_SYMMETRIC) for each in turned)
