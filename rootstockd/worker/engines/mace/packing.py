"""Packing: a batch is evaluated in as few passes as fit the memory (`budget`), and some of them are measured."""

from __future__ import annotations

import logging
from typing import Callable, Sequence, TypeVar

from rootstockd.worker.engines import Result
from rootstockd.worker.engines.mace.budget import Budget, Size, total
from rootstockd.worker.failures import DoesNotFitError, out_of_memory
from rootstockd.worker.memory import memory_of

log = logging.getLogger(__name__)

KEPT = 0.25
"""The part of the free memory that may be taken for good, by what spares a pass its launches: large structures and
other models need the rest."""

Rows = TypeVar("Rows")


class Packing:
    """One backend's, whose budget is its own: another takes other amounts for the same structures.

    Args:
        device: where it computes, as torch calls it.
        held: how many bytes of what is free no pass can have.
    """

    def __init__(self, device: str, held: Callable[[], int] = lambda: 0) -> None:
        self._budget = Budget()
        self._memory, self._held = memory_of(device), held
        self._told = 1
        """Passes of a batch of which the log tells."""

    def measured(self, size: Size, compute: Callable[[], Rows]) -> Rows:
        """What a pass computes. It is measured if it is much larger than those before: that costs milliseconds.

        Args:
            size: of the pass.
            compute: does it, in memory that it takes and gives back.
        """
        if not self._budget.is_new(size):
            return compute()
        self._memory.begin()
        rows = compute()
        self._budget.learn(size, self._memory.taken())
        return rows

    def may_keep(self, size: Size) -> bool:
        """Whether there is so much memory that what a pass takes may stay taken."""
        return self._budget.need(size) <= KEPT * self._free()

    def evaluate(self, sizes: Sequence[Size], evaluate: Callable[[slice], list[Result]]) -> list[Result]:
        """Evaluate a batch.

        Args:
            sizes: of its structures.
            evaluate: does some of them in one pass, which it has `measured`.

        Returns:
            Results in the same order.

        Raises:
            DoesNotFitError: memory lacked for one structure alone.
        """
        if len(sizes) == 1:
            return self._one(sizes, slice(0, 1), evaluate)
        results: list[Result] = []
        passes = 0
        while rest := sizes[len(results) :]:  # looked at anew after each pass, which may have taught something
            count = self._budget.count(rest, self._free())
            results += self._one(rest[:count], slice(len(results), len(results) + count), evaluate)
            passes += 1
        if passes >= 2 * self._told:
            self._told = passes
            atoms = total(sizes).atoms
            log.warning("%d structures of %d atoms took %d passes: memory allows no fewer", len(sizes), atoms, passes)
        return results

    def _one(self, sizes: Sequence[Size], pack: slice, evaluate: Callable[[slice], list[Result]]) -> list[Result]:
        size = sizes[0] if len(sizes) == 1 else total(sizes)
        free = self._free() if self._budget.is_new(size) else 0  # before the pass has its hands full
        try:
            results = evaluate(pack)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(sizes) == 1:
                raise DoesNotFitError(error, self._budget.would_fit(size, free)) from error
            self._budget.back_off(size)
            raise
        self._budget.went_well()
        return results

    def _free(self) -> int:
        """Bytes that a pass can have."""
        return max(0, self._memory.free() - self._held())
