"""MACE fused: the algebra of a mace-torch model in another order, for CPUs.

Three things of the model are replaced; all else stays mace-torch's own code:

- the tensor product of an edge and the sum over neighbours become one loop (`kernels.convolve`), whose derivatives are
  formed directly, with the radial networks in tables (`radial`);
- the symmetric contraction of U tensors, weights and one-hot elements is folded, once for each element, into the
  coefficients of a polynomial (`kernels.contract`);
- the tensor product with one-hot elements becomes a matrix for each element.

Forces and virial come from the derivative by the edges' vectors, so that a virial costs nothing. The same sums in
another order: results differ from mace-torch's by rounding, and `checks` compares them before they are believed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from rootstockd.worker.engines import Result, Task
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.folding import ByElement, Contraction, Convolution, Now, Shared, Unused
from rootstockd.worker.engines.mace.graph import Graph, Neighbours
from rootstockd.worker.engines.mace.radial import NotApplicableError, RadialTables
from rootstockd.worker.engines.mace.reference import System

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


class FusedBackend:
    """A MACE model, fused.

    Args:
        model: mace-torch's model, on the CPU; it stays as it is, and its weights are shared.

    Raises:
        NotApplicableError: the model has something that is not folded here.
    """

    name = "fused"

    def __init__(self, model: Any) -> None:
        if type(model).__name__ not in {"MACE", "ScaleShiftMACE"} or hasattr(model, "joint_embedding"):
            raise NotApplicableError(
                f"a model of class {type(model).__name__} with inputs beside elements and positions"
            )
        dtype = next(model.parameters()).dtype
        self._model = _twin(model)
        self._model.interactions = _twin(model.interactions, deep=True)
        self._model.products = _twin(model.products, deep=True)
        self._shared = Shared()
        self._threads = torch.get_num_threads()  # which follows OMP_NUM_THREADS, until numba starts its own
        for layer, (interaction, product) in enumerate(zip(self._model.interactions, self._model.products)):
            if not all(hasattr(interaction, name) for name in ("conv_tp", "conv_tp_weights", "skip_tp", "linear_up")):
                raise NotApplicableError(f"an interaction of class {type(interaction).__name__}")
            radial = RadialTables(
                model.radial_embedding, interaction.conv_tp_weights, model.atomic_numbers, float(model.r_max), dtype
            )
            interaction.conv_tp = Convolution(interaction.conv_tp, radial, self._shared, constant=layer == 0)
            interaction.conv_tp_weights = Unused()
            interaction.conv_fusion = True
            interaction.skip_tp = ByElement(interaction.skip_tp, self._shared)
            product.symmetric_contractions = Contraction(product.symmetric_contractions, self._shared)
        self._elements = np.array(model.atomic_numbers.tolist())
        self._dtype = dtype
        self._needs_radial = any(hasattr(interaction, "density_fn") for interaction in model.interactions)
        self._neighbours = Neighbours(float(model.r_max))

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """One pass over the union of the tasks' graphs."""
        systems: list[System] = [task.system for task in tasks]
        graph = self._neighbours.graph(tasks, [system.pbc for system in systems])
        elements = np.searchsorted(self._elements, np.concatenate([system.numbers for system in systems]))
        heads = np.concatenate([np.full(len(system.numbers), system.head_index) for system in systems])
        vectors = torch.from_numpy(graph.vectors).to(self._dtype).requires_grad_()
        self._shared.now = Now(graph, elements, torch.linalg.vector_norm(vectors, dim=1, keepdim=True))
        with self._threads_for(len(graph.sender)):
            per_atom, interaction = self._energies(graph, vectors, torch.from_numpy(elements), torch.from_numpy(heads))
            if len(graph.sender):
                (slope,) = torch.autograd.grad(interaction.sum(), vectors)
            else:
                slope = torch.zeros((0, 3))
        by_edge = slope.double().numpy()
        count = len(elements)
        forces = np.empty((count, 3))
        for axis in range(3):
            out = np.bincount(graph.sender, by_edge[:, axis], count)
            np.subtract(out, np.bincount(graph.receiver, by_edge[:, axis], count), out=forces[:, axis])
        energies = per_atom.detach().double().numpy()
        results, begin = [], 0
        for task, end in zip(tasks, graph.ends.tolist()):
            edges = slice(int(graph.first[begin]), int(graph.first[end]))
            virial = None
            if task.stress:
                whole = -by_edge[edges].T @ graph.vectors[edges]
                virial = 0.5 * (whole + whole.T)
            own = energies[begin:end]
            results.append(
                Result(float(own.sum()), forces[begin:end], virial, own if task.energies else None, self.name)
            )
            begin = end
        return results

    @contextmanager
    def _threads_for(self, edges: int) -> Iterator[None]:
        """As many threads as a pass over so many edges has work for."""
        kernels.use_threads(min(self._threads, edges // _EDGES_OF_A_THREAD))
        torch.set_num_threads(1 if edges < _EDGES_FOR_TORCH else self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(self._threads)

    def _energies(
        self, graph: Graph, vectors: torch.Tensor, elements: torch.Tensor, heads: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each atom: its energy, and the part of it that depends on positions."""
        model = self._model
        every = torch.arange(len(elements))
        attributes = torch.nn.functional.one_hot(elements, len(self._elements)).to(self._dtype)
        edges = torch.from_numpy(np.stack([graph.sender, graph.receiver]))
        lengths = self._shared.now.lengths
        alone = model.atomic_energies_fn(attributes)[every, heads]
        features = model.node_embedding(attributes)
        harmonics = model.spherical_harmonics(vectors)
        radial, cutoff = lengths, None
        if self._needs_radial:
            radial, cutoff = model.radial_embedding(lengths, attributes, edges, model.atomic_numbers)
        parts, layers = [], []
        if hasattr(model, "pair_repulsion"):
            parts.append(model.pair_repulsion_fn(lengths, attributes, edges, model.atomic_numbers))
        for layer, (interaction, product) in enumerate(zip(model.interactions, model.products)):
            features, skipped = interaction(
                node_attrs=attributes,
                node_feats=features,
                edge_attrs=harmonics,
                edge_feats=radial,
                edge_index=edges,
                cutoff=cutoff,
                first_layer=layer == 0,
            )
            features = product(node_feats=features, sc=skipped, node_attrs=attributes)
            layers.append(features)
        for number, readout in enumerate(model.readouts):
            read = readout(layers[-1 if len(model.readouts) == 1 else number], heads)
            parts.append(read[every, heads])
        interaction_energy = torch.stack(parts).sum(0)
        if hasattr(model, "scale_shift"):
            interaction_energy = model.scale_shift(interaction_energy, heads)
        return alone.double() + interaction_energy.double(), interaction_energy
