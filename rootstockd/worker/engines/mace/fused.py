"""MACE fused: the algebra of a mace-torch model in another order, for CPUs.

All but the readouts, which stay mace-torch's own code, is evaluated by the parts of `folding`, forwards and backwards:

- the tensor product of an edge and the sum over neighbours are one loop (`kernels.convolve`), with the radial networks
  in tables (`radial`), and the spherical harmonics polynomials (`passes.Harmonics`);
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

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.edges import EdgeBackend
from rootstockd.worker.engines.mace.folding import Contraction, channels, from_e3nn, linear, to_e3nn
from rootstockd.worker.engines.mace.graph import Edges, Graph
from rootstockd.worker.engines.mace.host_lists import HostLists
from rootstockd.worker.engines.mace.interactions import interaction_of
from rootstockd.worker.engines.mace.passes import Elements, Harmonics, Pass
from rootstockd.worker.engines.mace.radial import numpy_type

_EDGES_OF_A_THREAD = 2_000
"""With fewer for each, waking threads takes longer than they save."""

_EDGES_FOR_TORCH = 50_000
"""With fewer, torch works with one: waking all for each of many small operations takes 30 to 100 µs each time."""


class FusedBackend(EdgeBackend):
    """A MACE model, fused.

    Args:
        model: mace-torch's model, on the CPU; its weights are shared where they are not folded.

    Raises:
        NotApplicableError: the model has something that is not folded here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model, "fused")
        self._threads = torch.get_num_threads()  # which follows OMP_NUM_THREADS, until numba starts its own
        self._host_lists = HostLists(float(model.r_max))
        self._harmonics = Harmonics(model.spherical_harmonics)
        self._numpy_type = numpy_type(self._dtype)
        with torch.no_grad():
            self._layers = [
                _Layer(model, interaction, product, self._dtype, first=number == 0)
                for number, (interaction, product) in enumerate(zip(model.interactions, model.products))
            ]

    def _lists(self, tasks: list[Task]) -> list[Edges]:
        return self._host_lists.edges(tasks)

    def forget(self) -> None:
        """Keep no lists, and nothing that was made for the elements of structures."""
        self._host_lists.forget()
        for layer in self._layers:
            layer.forget()

    def _derive(self, graph: Graph, elements: Array, heads: Array) -> tuple[Array, Array]:
        with self._threads_for(len(graph.sender)):
            now = Pass(graph, Elements(elements), self._harmonics, self._numpy_type)
            outputs, h = [], torch.empty(0)
            with torch.no_grad():
                for layer in self._layers:
                    h = layer.forward(h, now)
                    outputs.append(to_e3nn(h, layer.irreps).requires_grad_())
            attributes, parts, leaves = self._attributes(elements), [], outputs
            if self._repels:
                lengths = torch.from_numpy(now.lengths).to(self._dtype)[:, None].requires_grad_()
                numbers = self._model.atomic_numbers
                parts = [self._model.pair_repulsion_fn(lengths, attributes, self._edges(graph), numbers)]
                leaves = [*outputs, lengths]
            per_atom, interaction = self._read(attributes, torch.from_numpy(heads), outputs, parts)
            slopes = torch.autograd.grad(interaction.sum(), leaves, allow_unused=True)
            with torch.no_grad():
                grad: torch.Tensor | None = None
                for layer, read in zip(reversed(self._layers), reversed(slopes[: len(outputs)])):
                    if read is not None:
                        own = from_e3nn(read, layer.irreps)
                        grad = own if grad is None else grad.add_(own)
                    assert grad is not None  # the last is always read
                    grad = layer.backward(grad, now)
                if self._repels:
                    now.by_length += slopes[-1][:, 0].double().numpy()
            return per_atom.detach().numpy(), now.by_vectors()

    @contextmanager
    def _threads_for(self, edges: int) -> Iterator[None]:
        """As many threads as there is work for."""
        kernels.use_threads(min(self._threads, edges // _EDGES_OF_A_THREAD))
        torch.set_num_threads(1 if edges < _EDGES_FOR_TORCH else self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)


class _Layer:
    """An interaction and the product behind it.

    Args:
        model: whose layer it is.
        interaction: mace-torch's.
        product: mace-torch's.
        dtype: the model's.
        first: its features are those of elements, and don't depend on positions.
    """

    def __init__(self, model: Any, interaction: Any, product: Any, dtype: torch.dtype, *, first: bool) -> None:
        if type(product).__name__ != "EquivariantProductBasisBlock":
            raise NotApplicableError(f"a product of class {type(product).__name__}")
        self.irreps = product.linear.irreps_out
        channels(interaction.irreps_out, self.irreps)
        self._interaction = interaction_of(model, interaction, dtype, first=first, use_skip=product.use_sc)
        self._contraction = Contraction(product.symmetric_contractions)
        self._update = linear(product.linear)

    def forget(self) -> None:
        """Keep nothing that was made for the elements of structures."""
        self._interaction.forget()
        self._contraction.forget()

    def forward(self, h: torch.Tensor, now: Pass) -> torch.Tensor:
        """From features of the layer before to its own; (N, rows, channels)."""
        messages, skipped = self._interaction.forward(h, now)
        features = self._update.forward(self._contraction.forward(messages, now), now.elements)
        return features if skipped is None else features.add_(skipped)

    def backward(self, grad: torch.Tensor, now: Pass) -> torch.Tensor | None:
        """The derivative by the features of the layer before, if there is one."""
        by_messages = self._contraction.backward(self._update.backward(grad, now.elements), now)
        return self._interaction.backward(by_messages, grad, now)
