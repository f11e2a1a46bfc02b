"""MACE fused: the algebra of a mace-torch model in another order, for CPUs.

Three things of the model are replaced; all else stays mace-torch's own code:

- the tensor product of an edge and the sum over neighbours become one loop (`kernels.convolve`), whose derivatives are
  formed directly, with the radial networks in tables (`radial`);
- the symmetric contraction of U tensors, weights and one-hot elements is folded, once for each element, into the
  coefficients of a polynomial (`kernels.contract`);
- the tensor product with one-hot elements becomes a matrix for each element.

The same sums in another order: results differ from mace-torch's by rounding, and `checks` compares them before they are
believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.edges import EdgeBackend
from rootstockd.worker.engines.mace.folding import ByElement, Contraction, Convolution, Now, Shared, Unused
from rootstockd.worker.engines.mace.graph import Graph
from rootstockd.worker.engines.mace.radial import NotApplicableError, RadialTables

_EDGES_OF_A_THREAD = 2_000
"""With fewer for each, waking threads takes longer than they save."""

_EDGES_FOR_TORCH = 50_000
"""With fewer, torch works with one: it would wake all for each of some 200 small operations, 30 to 100 µs each time."""


def _twin(module: Any, *, deep: bool = False) -> Any:
    """A module whose children can be replaced without the original's noticing; `deep`: its children are twins too."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    children = module._modules.items()  # noqa: SLF001 - copy.copy would serialise e3nn's compiled code
    twin.__dict__["_modules"] = {name: _twin(child) if deep else child for name, child in children}
    return twin


class FusedBackend(EdgeBackend):
    """A MACE model, fused.

    Args:
        model: mace-torch's model, on the CPU; it stays as it is, and its weights are shared.

    Raises:
        NotApplicableError: the model has something that is not folded here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(_twin(model), "fused")
        self._model.interactions = _twin(model.interactions, deep=True)
        self._model.products = _twin(model.products, deep=True)
        self._shared = Shared()
        self._threads = torch.get_num_threads()  # which follows OMP_NUM_THREADS, until numba starts its own
        for layer, (interaction, product) in enumerate(zip(self._model.interactions, self._model.products)):
            if not all(hasattr(interaction, name) for name in ("conv_tp", "conv_tp_weights", "skip_tp", "linear_up")):
                raise NotApplicableError(f"an interaction of class {type(interaction).__name__}")
            radial = RadialTables(
                model.radial_embedding,
                interaction.conv_tp_weights,
                model.atomic_numbers,
                float(model.r_max),
                self._dtype,
            )
            interaction.conv_tp = Convolution(interaction.conv_tp, radial, self._shared, constant=layer == 0)
            interaction.conv_tp_weights = Unused()
            interaction.conv_fusion = True
            interaction.skip_tp = ByElement(interaction.skip_tp, self._shared)
            product.symmetric_contractions = Contraction(product.symmetric_contractions, self._shared)
        self._needs_radial = any(hasattr(interaction, "density_fn") for interaction in model.interactions)

    @contextmanager
    def _around(self, graph: Graph, elements: Array, lengths: torch.Tensor) -> Iterator[None]:
        """What the replaced modules look at, and as many threads as there is work for."""
        self._shared.now = Now(graph, elements, lengths)
        edges = len(graph.sender)
        kernels.use_threads(min(self._threads, edges // _EDGES_OF_A_THREAD))
        torch.set_num_threads(1 if edges < _EDGES_FOR_TORCH else self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)
