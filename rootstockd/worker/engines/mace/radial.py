"""Radial weights as tables: what a network makes of an edge's length is a smooth function.

Each weight of each path and channel is a polynomial on each of some equal pieces of [0, cutoff], through the network's
own values (in double precision) at the Chebyshev points of the piece. There are as many pieces as it takes to be as
exact as the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace.kernels import DEGREE

if TYPE_CHECKING:
    from rootstockd.worker.engines.mace.passes import Pass

MAX_PIECES = 512
"""Measured: a higher degree, or more pieces than it takes, only adds rounding to the derivative in float64."""
MAX_BYTES = 2 * 2**30
"""Of the tables of one layer, where they depend on the elements."""
PAIR = 128
"""A pair of the model's elements has the number PAIR x the lesser + the greater: there are fewer elements."""
EXACT = {torch.float32: 2e-8, torch.float64: 3e-14}
"""How far a table may be from its network, as part of the largest weight."""

_NONE = np.empty(0, np.int64)


class NotApplicableError(Exception):
    """The model, or a structure, has something that is not folded here; it says what."""


class RadialTables:
    """The weights of one layer.

    Args:
        embedding: the model's radial embedding.
        network: the layer's radial network.
        atomic_numbers: the model's elements.
        cutoff: in Å.
        dtype: the model's.
        shape: paths and channels; how many weights there are.
        finish: what is made of what the network gives.
    """

    def __init__(
        self,
        embedding: Any,
        network: Any,
        atomic_numbers: torch.Tensor,
        cutoff: float,
        dtype: torch.dtype,
        shape: tuple[int, int],
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
    ) -> None:
        self._layers = list(network)
        if not all(hasattr(layer, name) for layer in self._layers for name in ("h_in", "var_in", "var_out", "weight")):
            raise NotApplicableError("a radial network of an unknown kind")
        self._embedding, self._atomic_numbers, self._cutoff, self.dtype = embedding, atomic_numbers, cutoff, dtype
        self._shape, self._finish = shape, finish
        self._by_pair = hasattr(embedding, "distance_transform")
        self._pieces = self._enough()
        self._index: dict[int, int] = {}
        """Which table a pair of elements has; the pair is one number, so that edges can be looked up at once."""
        self._tables: Array = np.empty(0)

    def look_up(self, now: Pass) -> tuple[Array, Array, int, float]:
        """What `kernels.convolve` wants to know of them: tables, begins, pieces and scale."""
        pairs, there = now.pairs if self._by_pair else (_NONE, np.zeros(1, np.int64))
        missing = [pair for pair in there.tolist() if pair not in self._index]
        if missing:
            self._add(missing)
        begins = _NONE
        if self._by_pair:
            table = np.zeros(PAIR * PAIR, np.int64)
            table[there] = [self._index[pair] * self._pieces for pair in there.tolist()]
            begins = table[pairs]
        return self._tables, begins, self._pieces, self._pieces / self._cutoff

    def _add(self, pairs: list[int]) -> None:
        one = self._pieces * (DEGREE + 1) * self._shape[0] * self._shape[1] * self.dtype.itemsize
        if self._by_pair and one * (len(self._index) + len(pairs)) > MAX_BYTES:
            raise NotApplicableError(f"tables for {len(pairs)} more pairs of elements would take too much memory")
        made = [
            self._table(divmod(pair, PAIR), self._pieces).reshape(self._pieces, DEGREE + 1, *self._shape)
            for pair in pairs
        ]
        dtype = np.float64 if self.dtype == torch.float64 else np.float32
        fresh = np.concatenate(made).astype(dtype)
        self._tables = fresh if not self._index else np.concatenate([self._tables, fresh])
        for pair in pairs:
            self._index[pair] = len(self._index)

    def _table(self, pair: tuple[int, int], pieces: int) -> Array:
        """(pieces, degree + 1, weights) coefficients."""
        nodes, coefficients = _chebyshev(DEGREE)
        width = self._cutoff / pieces
        lengths = (np.arange(pieces)[:, None] + 0.5 * (nodes + 1.0)) * width
        values = self._weights(lengths.reshape(-1), pair).reshape(pieces, DEGREE + 1, -1)
        return np.asarray(np.einsum("cn,pnw->pcw", coefficients, values))

    def _enough(self) -> int:
        """Pieces that make the table as exact as the dtype, judged by the pair of the model's first element."""
        between = np.array([-0.97, -0.31, 0.55])
        pieces = 16
        while pieces < MAX_PIECES:
            width = self._cutoff / pieces
            lengths = (np.arange(pieces)[:, None] + 0.5 * (between + 1.0)) * width
            right = self._weights(lengths.reshape(-1), (0, 0)).reshape(pieces, len(between), -1)
            found = np.einsum(
                "xc,pcw->pxw", np.vander(between, DEGREE + 1, increasing=True), self._table((0, 0), pieces)
            )
            if np.abs(found - right).max() <= EXACT[self.dtype] * np.abs(right).max():
                return pieces
            pieces *= 2
        return pieces

    def _weights(self, lengths: Array, pair: tuple[int, int]) -> Array:
        """(lengths, weights): the network itself, in double precision."""
        with torch.no_grad():
            r = torch.from_numpy(lengths)[:, None]
            attributes = torch.nn.functional.one_hot(torch.tensor(pair), len(self._atomic_numbers)).double()
            edges = torch.tensor([[0], [1]]).expand(2, len(lengths))
            x, cutoff = self._embedding(r, attributes, edges, self._atomic_numbers)
            x = x.double()
            for layer in self._layers:
                # e3nn's layer, whose own forward would insist on the model's dtype
                if layer.act is None:
                    x = x @ (layer.weight.double() / (layer.h_in * layer.var_in / layer.var_out) ** 0.5)
                else:
                    x = layer.act(x @ (layer.weight.double() / (layer.h_in * layer.var_in) ** 0.5)) * layer.var_out**0.5
            x = self._finish(x)
            if cutoff is not None:
                x = x * cutoff.double()
        return np.asarray(x.numpy())


def _chebyshev(degree: int) -> tuple[Array, Array]:
    """The Chebyshev points, and the matrix from values there to a polynomial's coefficients, x^0 first."""
    count = degree + 1
    nodes = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    series = 2.0 / count * np.cos(np.outer(np.arange(count), np.arccos(nodes)))
    series[0] /= 2.0
    powers = np.zeros((count, count))
    for order in range(count):
        powers[: order + 1, order] = np.polynomial.chebyshev.cheb2poly([0] * order + [1])
    return nodes, np.asarray(powers @ series)
