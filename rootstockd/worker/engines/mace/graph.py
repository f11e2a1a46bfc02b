"""The edges of structures, and those of the graph that some of them are together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from rootstockd.worker.engines import Array


class Edges(NamedTuple):
    """One structure's directed edges, sorted by receiver; E of them."""

    atoms: int
    receiver: Array
    """(E,) int64."""
    sender: Array
    """(E,) int64."""
    vectors: Array
    """(E, 3) float64, Å, from sender to receiver."""


@dataclass(frozen=True)
class Graph:
    """The union of some structures' graphs: N atoms, E directed edges, sorted by receiver."""

    receiver: Array
    """(E,) int64."""
    sender: Array
    """(E,) int64."""
    vectors: Array
    """(E, 3) float64, Å, from sender to receiver."""
    first: Array
    """(N + 1,) int64: where each receiver's edges begin."""
    ends: Array
    """(structures,) int64: where each structure's atoms end."""


def union(parts: Sequence[Edges]) -> Graph:
    """One graph of some structures' edges; of one, these arrays are the graph's."""
    ends = list(accumulate(part.atoms for part in parts))
    begins = [0, *ends]
    receiver = _joined([part.receiver + begin if begin else part.receiver for part, begin in zip(parts, begins)])
    sender = _joined([part.sender + begin if begin else part.sender for part, begin in zip(parts, begins)])
    first = np.searchsorted(receiver, np.arange(ends[-1] + 1))
    return Graph(receiver, sender, _joined([part.vectors for part in parts]), first, np.array(ends))


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
