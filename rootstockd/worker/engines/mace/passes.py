"""A pass of the fused MACE: what all of its parts look at, and what they leave for the way back."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace import kernels
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.graph import Graph
from rootstockd.worker.engines.mace.radial import PAIR

NOTHING = 1e-12
"""Coefficients below this are zeros that were computed."""


class Harmonics:
    """Spherical harmonics of a model, as polynomials in the components of an edge's direction.

    Their coefficients are those that reproduce the model's own: homogeneous polynomials of the harmonic's degree are
    independent on a sphere, so there is one set.

    Args:
        module: e3nn's.
    """

    def __init__(self, module: Any) -> None:
        if not getattr(module, "normalize", False):
            raise NotApplicableError("spherical harmonics of vectors that are not normalized")
        degrees = [ir.l for _, ir in module.irreps_out]
        if any(mul != 1 for mul, _ in module.irreps_out):
            raise NotApplicableError("spherical harmonics in several copies")
        exponents = [(0, 0, 0)]
        parents, axes = [0], [0]
        for degree in range(1, max(degrees) + 1):
            for powers in _exponents(degree):
                axis = next(axis for axis in range(3) if powers[axis])
                rest = tuple(power - (one == axis) for one, power in enumerate(powers))
                parents.append(exponents.index(rest))  # type: ignore[arg-type]  # three of them
                axes.append(axis)
                exponents.append(powers)
        directions = np.random.default_rng(0).normal(size=(8 * len(exponents), 3))
        directions /= np.linalg.norm(directions, axis=1)[:, None]
        values = module(torch.from_numpy(directions)).double().numpy()
        begins, monomials, coefficients = [0], [], []
        for degree, part in zip(degrees, module.irreps_out.slices()):
            own = [exponents.index(powers) for powers in _exponents(degree)]
            basis = np.stack([np.prod(directions ** np.array(exponents[m]), axis=1) for m in own], axis=1)
            for column in np.linalg.lstsq(basis, values[:, part], rcond=None)[0].T:
                for m, coefficient in zip(own, column.tolist()):
                    if abs(coefficient) > NOTHING:
                        monomials.append(m)
                        coefficients.append(coefficient)
                begins.append(len(monomials))
        self.count = len(begins) - 1
        self.plan = (
            np.array(parents, np.int64),
            np.array(axes, np.int64),
            np.array(begins, np.int64),
            np.array(monomials, np.int64),
            np.array(coefficients),
        )


def _exponents(degree: int) -> list[tuple[int, int, int]]:
    """Of all monomials of a degree in three components."""
    return [(a, b, degree - a - b) for a in range(degree, -1, -1) for b in range(degree - a, -1, -1)]


class Elements:
    """Which of the model's elements each atom is.

    Args:
        each: (N,).
    """

    def __init__(self, each: Array) -> None:
        self.each, self.count = each, len(each)
        present, self.place = np.unique(each, return_inverse=True)
        self.present: list[int] = present.tolist()
        """The elements that there are; `place` is each atom's place in this list, (N,)."""
        self.counts: list[int] = np.bincount(self.place).tolist()
        """How many atoms of each of these."""

    @cached_property
    def order(self) -> torch.Tensor:
        """(N,) atoms, sorted by element."""
        return torch.from_numpy(np.argsort(self.place, kind="stable"))

    @cached_property
    def back(self) -> torch.Tensor:
        """(N,) where each atom is in that order."""
        return torch.argsort(self.order)


def _places(pairs: Array) -> tuple[Array, Array]:
    """Which of these numbers there are, and the place of each among them."""
    there = np.flatnonzero(np.bincount(pairs, minlength=1))
    places = np.empty(PAIR * PAIR, np.int64)
    places[there] = np.arange(len(there))
    return there, places[pairs]


class Pass:
    """One evaluation under way.

    Args:
        graph: the structures: N atoms, E edges.
        elements: of the atoms.
        harmonics: the model's.
        dtype: the model's.
    """

    def __init__(self, graph: Graph, elements: Elements, harmonics: Harmonics, dtype: Any) -> None:
        self.graph, self.elements = graph, elements
        edges = len(graph.sender)
        self._harmonics = harmonics
        self.lengths = np.empty(edges)
        """(E,) Å."""
        self.y = np.empty((edges, harmonics.count), dtype)
        """(E, S) spherical harmonics."""
        self.by_y = np.zeros_like(self.y)
        self.by_length = np.zeros(edges)
        """The derivatives of the energy by these two; on the way back everybody adds to them."""
        self.kept: dict[object, Any] = {}
        """What each part left for its own way back."""
        kernels.harmonics(graph.vectors, *harmonics.plan, self.lengths, self.y)

    @cached_property
    def pairs(self) -> tuple[Array, Array]:
        """The pairs of elements there are, as numbers (see `radial.PAIR`), and (E,) each edge's place among them."""
        sender, receiver = self._ends
        return _places(PAIR * np.minimum(sender, receiver) + np.maximum(sender, receiver))

    @cached_property
    def ordered_pairs(self) -> tuple[Array, Array]:
        """As `pairs`, where it matters which of the two is the sender: that one is the first."""
        sender, receiver = self._ends
        return _places(PAIR * sender + receiver)

    @property
    def _ends(self) -> tuple[Array, Array]:
        """(E,) elements of senders and of receivers."""
        return self.elements.each[self.graph.sender], self.elements.each[self.graph.receiver]

    @cached_property
    def shortest(self) -> float:
        """The shortest edge's length in Å; infinite where there is none."""
        return float(self.lengths.min(initial=np.inf))

    def by_vectors(self) -> Array:
        """(E, 3) the derivative of the energy by the edges' vectors, when all have added what they had to."""
        by_vectors = np.empty((len(self.lengths), 3))
        plan = self._harmonics.plan
        kernels.harmonics_back(self.graph.vectors, *plan, self.lengths, self.by_y, self.by_length, by_vectors)
        return by_vectors
