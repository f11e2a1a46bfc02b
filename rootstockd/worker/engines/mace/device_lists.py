"""Neighbour lists made on the device: by cells of about the cutoff's width, in plain torch. The same on a CPU.

A list that is made on the host is most of what goes to a device: some 3 kB an atom, where positions are 24 bytes. Which
of the two is faster depends on the device and on the structure's size, so it is measured, and what the device made is
compared with what the host made.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable

import numpy as np
import torch

from rootstockd.worker.engines import Array, Task
from rootstockd.worker.engines.mace.gathering import manageable
from rootstockd.worker.engines.mace.neighbours import Neighbours, bins
from rootstockd.worker.failures import describe, out_of_memory

log = logging.getLogger(__name__)

CANDIDATES = 2**20
"""Pairs that are looked at together, of some 190 bytes each at the worst."""
SAME = 1e-6
"""Å²; what pairs of two lists may differ by: one that is missing so close to the cutoff contributes nothing."""

Edges = tuple[torch.Tensor, torch.Tensor]
"""(E, 2) int64, sender and receiver, sorted by receiver; and (E, 3) float64, Å, the lattice vector to be added to
receiver's less sender's position for the vector from sender to receiver."""


class DeviceNeighbours:
    """Lists edges on a device.

    Args:
        cutoff: in Å; a pair at exactly this distance may or may not be there.
        device: where lists are made, and stay.
    """

    def __init__(self, cutoff: float, device: torch.device) -> None:
        self._cutoff, self._device = cutoff, device

    def lasting(self, cell: Array, positions: Array) -> Edges:
        """The edges of a structure that is `manageable`.

        Args:
            cell: (3, 3), Å, vectors in rows.
            positions: (N, 3), Å; N > 0.
        """
        found = bins(cell, positions, self._cutoff)
        there, vectors = self._tensor(positions), self._tensor(cell)
        count, places, wraps = self._tensor(found.counts), self._tensor(found.places), self._tensor(found.wraps)
        offsets = self._tensor(np.array(list(itertools.product(*(range(-n, n + 1) for n in found.reach)))))
        in_order, order = self._flat(places, count).sort()
        limits = torch.searchsorted(in_order, torch.arange(int(found.counts.prod()) + 1, device=self._device))
        first, population = limits[:-1], limits.diff()

        def near(begin: int, end: int) -> Edges:
            """Edges whose receivers are these."""
            targets = places[begin:end, None] + offsets
            images = torch.div(targets, count, rounding_mode="floor")
            flat = self._flat(targets - images * count, count)
            numbers = population[flat].flatten()
            which = torch.repeat_interleave(numbers)
            within = torch.arange(len(which), device=self._device) - (numbers.cumsum(0) - numbers)[which]
            sender = order[first[flat.flatten()[which]] + within]
            receiver = begin + torch.div(which, len(offsets), rounding_mode="floor")
            cells = images.flatten(0, 1)[which].double() - wraps[sender] + wraps[receiver]
            shifts = -(cells @ vectors)
            distances = (there[receiver] - there[sender] + shifts).square().sum(1)
            itself = (sender == receiver) & (cells == 0).all(1)
            kept = ((distances <= self._cutoff**2) & ~itself).nonzero().squeeze(1)
            return torch.stack([sender[kept], receiver[kept]], 1), shifts[kept]

        together = max(1, CANDIDATES // (len(offsets) * int(population.max())))
        parts = [near(at, min(at + together, len(positions))) for at in range(0, len(positions), together)]
        if len(parts) == 1:
            return parts[0]
        edges, shifts = zip(*parts)
        return torch.cat(edges), torch.cat(shifts)

    def _tensor(self, array: Array) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)

    @staticmethod
    def _flat(bins: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """(...) the number of a bin, of its place (..., 3)."""
        return (bins[..., 0] * count[1] + bins[..., 1]) * count[2] + bins[..., 2]


class Lists:
    """Makes lists for a device, on the host or there, whichever is faster for structures of that size.

    The first list of each size is made by both and compared: where the device's is another, the host makes them all.

    Args:
        cutoff: in Å.
        device: where lists are to be.
    """

    def __init__(self, cutoff: float, device: torch.device) -> None:
        self._cutoff, self._device = cutoff, device
        self._host = Neighbours(cutoff)
        self._own: DeviceNeighbours | None = DeviceNeighbours(cutoff, device)
        """None once a list of its was another than the host's."""
        self._faster: dict[int, bool] = {}
        """Whether the device is, by powers of two of the atoms."""

    def edges(self, task: Task) -> Edges:
        """A structure's edges, on the device."""
        cell, positions = manageable(task.cell, task.positions, task.system.pbc, self._cutoff)
        size = len(positions).bit_length()
        if self._own is not None and size not in self._faster:
            return self._race(self._own, size, cell, positions)
        if self._own is not None and self._faster[size]:
            try:
                return self._own.lasting(cell, positions)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise  # the host needs none of the device's
        return self._by_host(cell, positions)

    def _by_host(self, cell: Array, positions: Array) -> Edges:
        receiver, sender, shifts = self._host.lasting(cell, positions)
        edges = torch.from_numpy(np.stack([sender, receiver], 1))
        return edges.to(self._device), torch.from_numpy(shifts).to(self._device)

    def _race(self, own: DeviceNeighbours, size: int, cell: Array, positions: Array) -> Edges:
        """By both; the second time is what counts: at the first kernels are loaded, and memory is found."""
        self._by_host(cell, positions)
        usual, seconds = self._timed(lambda: self._by_host(cell, positions))
        why = ""
        try:
            own.lasting(cell, positions)
            found, own_seconds = self._timed(lambda: own.lasting(cell, positions))
            if (off := self._difference(found, usual, positions)) > SAME:
                why = f"the sums over an atom's edges are off by {off:.1e} Å²"
            self._faster[size] = own_seconds < seconds
        except Exception as error:  # there is a list
            if out_of_memory(error):
                return usual  # another time there may be more
            why, self._faster[size] = describe(error), False
        if why:
            self._own = None
            log.warning("neighbour lists are made on the host, not on %s: %s", self._device, why)
        return usual

    def _timed(self, make: Callable[[], Edges]) -> tuple[Edges, float]:
        start = time.perf_counter()
        edges = make()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return edges, time.perf_counter() - start

    def _difference(self, one: Edges, other: Edges, positions: Array) -> float:
        """How far two lists are apart, in Å²: sums over each atom's edges, which count for less the longer they are."""
        here = torch.from_numpy(positions).to(self._device)
        return float((self._sums(one, here) - self._sums(other, here)).abs().max())

    def _sums(self, edges: Edges, positions: torch.Tensor) -> torch.Tensor:
        (sender, receiver), shifts = edges[0].unbind(1), edges[1]
        vectors = positions[receiver] - positions[sender] + shifts
        weights = (self._cutoff**2 - vectors.square().sum(1, keepdim=True)).clamp(min=0.0)
        scale = sender[:, None].double() / len(positions)
        each = torch.cat([weights, weights * vectors / self._cutoff, weights * scale], 1)
        return each.new_zeros((len(positions), 5)).index_add_(0, receiver, each)
