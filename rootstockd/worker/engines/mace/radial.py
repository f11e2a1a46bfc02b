"""Radial weights as tables: what a network makes of an edge's length is a smooth function.

Each weight of each path and channel is a polynomial on each of some equal pieces up to the cutoff, through the
network's own values (in double precision) at the Chebyshev points of the piece. There are as many pieces as it takes to
be as exact as the model's dtype: each table that is made is compared with the network where such polynomials are worst,
and begins behind the last piece that is not exact. If that is where atoms are, all are made anew of twice as many.

Models that transform lengths by the elements they join have a table for each kind of pair: pairs whose lengths are
transformed alike, such as those with the same sum of covalent radii, share one. Such a transformation has no
derivatives at zero, where atoms never are, so these tables begin at `SHORTEST`. Networks that are told the elements of
sender and receiver have a table for each ordered pair.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rootstockd.worker.engines import Array
from rootstockd.worker.engines.mace.candidates import NotApplicableError
from rootstockd.worker.engines.mace.kernels import DEGREE

if TYPE_CHECKING:
    from rootstockd.worker.engines.mace.passes import Pass

MIN_PIECES, MAX_PIECES = 16, 512
"""Measured: a higher degree, or more pieces than it takes, only adds rounding to the derivative in float64."""
MAX_BYTES = 2**30
"""Of the tables of one layer, where they depend on the elements."""
UNUSED = 100
"""Passes in which a table was not used, until another may have its place."""
SHORTEST = 0.5
"""Å; no table that depends on the elements has shorter lengths."""
CLOSE = 0.65
"""Å; they may begin here: atoms are hardly ever nearer, and functions of length are the hardest there."""
PAIR = 128
"""A pair of the model's elements has the number PAIR x the first + the second: there are fewer elements. The first is
the lesser, or the sender's where the order matters."""
EXACT = {torch.float32: 2e-8, torch.float64: 3e-14}
"""How far a table may be from its network, as part of the largest weight."""
_ROUNDING = 10
"""With the most pieces so many times as far: that may be rounding, which pieces do not help against."""
_WORST = np.cos(np.pi * np.array([7, 3]) / (DEGREE + 1))
"""Where a polynomial through Chebyshev points, from -1 to 1, is farthest from a function: extrema of the next."""

_NONE = np.empty(0, np.int64)


def numpy_type(dtype: torch.dtype) -> Any:
    """Numpy's name of a dtype."""
    return np.float64 if dtype == torch.float64 else np.float32


class RadialTables:
    """The weights of one layer.

    Args:
        model: mace-torch's, whose radial embedding, elements and cutoff these are.
        network: the layer's radial network.
        shape: paths and channels; how many weights there are.
        finish: what is made of what the network gives.
        ends: what the network is told beside the embedding, for each element as a sender, and as a receiver: two of
            (elements, features). None if nothing.
    """

    def __init__(
        self,
        model: Any,
        network: Any,
        shape: tuple[int, int],
        finish: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        ends: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._layers = [_in_double(layer) for layer in getattr(network, "net", network)]
        self._ends = ends
        self._embedding, self._atomic_numbers = model.radial_embedding, model.atomic_numbers
        self.dtype: torch.dtype = next(model.parameters()).dtype
        self._shape, self._finish = shape, finish
        transforms = hasattr(self._embedding, "distance_transform")
        self._by_pair = transforms or ends is not None
        self._begin = SHORTEST if transforms else 0.0
        self._length = float(model.r_max) - self._begin
        self._pieces = MIN_PIECES
        self._kinds: dict[int, bytes] = {} if self._by_pair else {0: b""}
        """What each pair's transformed lengths are; the pair is one number, so that edges can be looked up at once."""
        self._clear()

    def forget(self) -> None:
        """Keep no tables that depend on elements."""
        if self._by_pair:
            self._clear()

    def _clear(self) -> None:
        self._tables: Array = np.empty((0, DEGREE + 1, *self._shape), numpy_type(self.dtype))
        self._places: dict[bytes, int] = {}
        """Where the table of each kind of pair is."""
        self._begins: dict[bytes, float] = {}
        """The length in Å at which it begins."""
        self._used: dict[bytes, int] = {}
        """In which pass each was used last."""
        self._passes = 0

    def look_up(self, now: Pass) -> tuple[Array, Array, int, float, float]:
        """What `kernels.convolve` wants to know of them: tables, begins, pieces, scale and shortest.

        Raises:
            NotApplicableError: a length is too short for them, or they would be too large.
        """
        if not self._by_pair and self._places and now.shortest >= self._begins[b""]:  # the one table that there is
            return self._tables, _NONE, self._pieces, self._pieces / self._length, self._begin
        there, edges = self._pairs(now)
        kinds = [self._kind(pair) for pair in there]
        self._passes += 1
        missing: dict[bytes, tuple[int, int]] = {}
        for kind, pair in zip(kinds, there):
            self._used[kind] = self._passes
            if kind not in self._places:
                missing.setdefault(kind, divmod(pair, PAIR))
        if missing and not self._add(list(missing.items())):
            self._pieces *= 2
            self._clear()
            return self.look_up(now)
        begins = [self._begins[kind] for kind in kinds]
        if now.shortest < max(begins, default=0.0):
            limits = np.broadcast_to(np.array(begins)[edges], now.lengths.shape)
            for edge in np.flatnonzero(now.lengths < limits)[:1]:
                raise NotApplicableError(
                    f"atoms that are {now.lengths[edge]:.2f} Å apart, where tables begin at {limits[edge]:.2f} Å"
                )
        places = np.array([self._places[kind] * self._pieces for kind in kinds], np.int64)
        of_edges = places[edges] if self._by_pair else _NONE
        return self._tables, of_edges, self._pieces, self._pieces / self._length, self._begin

    def _pairs(self, now: Pass) -> tuple[list[int], Any]:
        """The pairs that there are, and each edge's place among them; without pairs one that all edges have."""
        if not self._by_pair:
            return [0], 0
        there, edges = now.pairs if self._ends is None else now.ordered_pairs
        return there.tolist(), edges

    def _kind(self, pair: int) -> bytes:
        """What is the same for pairs that have the same weights at all lengths."""
        kind = self._kinds.get(pair)
        if kind is None and self._ends is not None:
            kind = self._kinds[pair] = pair.to_bytes(4, "little")
        elif kind is None:
            lengths = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
            transformed = self._embedding.distance_transform(lengths, *self._joined(divmod(pair, PAIR), 3))
            kind = self._kinds[pair] = transformed.double().numpy().round(12).tobytes()
        return kind

    def _add(self, kinds: list[tuple[bytes, tuple[int, int]]]) -> bool:
        """Make the tables of some kinds of pairs, in the place of others if there are too many.

        Returns:
            Whether that is all: not if they had to be of more pieces.
        """
        one = self._pieces * (DEGREE + 1) * self._shape[0] * self._shape[1] * self.dtype.itemsize
        free = self._make_room(len(self._places) + len(kinds) - max(1, MAX_BYTES // one))
        more = len(kinds) - len(free)
        if more > 0:
            count = len(self._tables) // self._pieces
            free += range(count, count + more)
            fresh = np.empty((more * self._pieces, *self._tables.shape[1:]), self._tables.dtype)
            self._tables = np.concatenate([self._tables, fresh]) if count else fresh
        for (kind, pair), place in zip(kinds, free):
            made, begin = self._table(pair)
            if begin > (CLOSE if self._by_pair else 0.0) and self._pieces < MAX_PIECES:
                return False
            self._tables[place * self._pieces : (place + 1) * self._pieces] = made.reshape(-1, DEGREE + 1, *self._shape)
            self._places[kind], self._begins[kind] = place, begin
        return True

    def _make_room(self, too_many: int) -> list[int]:
        """The places of so many tables, which nobody has used for long and which are forgotten.

        Raises:
            NotApplicableError: there are not so many.
        """
        if too_many <= 0:
            return []
        old = sorted(self._places, key=self._used.__getitem__)[:too_many]
        if len(old) < too_many or self._used[old[-1]] > self._passes - UNUSED:
            raise NotApplicableError("tables for so many elements at once would take too much memory")
        for kind in old:
            del self._used[kind], self._begins[kind]
        return [self._places.pop(kind) for kind in old]

    def _table(self, pair: tuple[int, int]) -> tuple[Array, float]:
        """(pieces, degree + 1, weights) coefficients, and the length in Å from which on they are exact."""
        nodes, coefficients = _chebyshev(DEGREE)
        lengths = self._lengths(np.concatenate([nodes, _WORST]))
        right = self._weights(lengths.reshape(-1), pair).reshape(*lengths.shape, -1)
        at_nodes, between = np.split(right, [len(nodes)], axis=1)
        table = coefficients @ at_nodes
        off = np.abs(np.vander(_WORST, DEGREE + 1, increasing=True) @ table - between).max(axis=(1, 2))
        tolerable = EXACT[self.dtype] * (_ROUNDING if self._pieces == MAX_PIECES else 1)
        (wrong,) = np.nonzero(off > tolerable * np.abs(right).max())
        exact = (wrong.max(initial=-1) + 1) / self._pieces
        return table, self._begin + float(exact) * self._length

    def _lengths(self, within: Array) -> Array:
        """(pieces, points) of the same points, from -1 to 1, of all pieces."""
        width = self._length / self._pieces
        return np.asarray(self._begin + (np.arange(self._pieces)[:, None] + 0.5 * (within + 1.0)) * width)

    def _joined(self, pair: tuple[int, int], edges: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the embedding wants to know of so many edges between two atoms."""
        attributes = torch.nn.functional.one_hot(torch.tensor(pair), len(self._atomic_numbers)).double()
        return attributes, torch.tensor([[0], [1]]).expand(2, edges), self._atomic_numbers

    def _weights(self, lengths: Array, pair: tuple[int, int]) -> Array:
        """(lengths, weights): the network itself, in double precision."""
        with torch.no_grad():
            r = torch.from_numpy(lengths)[:, None]
            x, cutoff = self._embedding(r, *self._joined(pair, len(lengths)))
            x = x.double()
            if self._ends is not None:
                told = torch.cat([of[element] for of, element in zip(self._ends, pair)])
                x = torch.cat([x, told.double().expand(len(x), -1)], 1)
            for layer in self._layers:
                x = layer(x)
            x = self._finish(x)
            if cutoff is not None:
                x = x * cutoff.double()
        return np.asarray(x.numpy())


def _in_double(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """A layer of a network in double precision, whatever the model's dtype is."""
    if isinstance(layer, (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.SiLU)):
        double: Callable[[torch.Tensor], torch.Tensor] = copy.deepcopy(layer).double()
        return double
    if not all(hasattr(layer, name) for name in ("h_in", "var_in", "var_out", "weight")):
        raise NotApplicableError("a radial network of an unknown kind")
    # e3nn's, whose own forward would insist on the model's dtype
    weight = layer.weight.double() / (layer.h_in * layer.var_in) ** 0.5
    scale = layer.var_out**0.5
    return lambda x: (x @ weight if layer.act is None else layer.act(x @ weight)) * scale


@functools.cache
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
