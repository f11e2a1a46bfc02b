"""Packing: a batch is evaluated in as few passes as fit the memory (`budget`), and some of them are measured."""

from __future__ import annotations

from typing import Callable, Sequence

from rootstockd.worker.engines import Result
from rootstockd.worker.engines.mace.budget import Budget, Size, total
from rootstockd.worker.failures import DoesNotFitError, out_of_memory
from rootstockd.worker.memory import memory_of


class Packing:
    """One backend's, whose budget is its own: another takes other amounts for the same structures.

    Args:
        device: where it computes, as torch calls it.
        held: how many bytes of what is free no pass can have.
    """

    def __init__(self, device: str, held: Callable[[], int] = lambda: 0) -> None:
        self._budget = Budget()
        self._memory, self._held = memory_of(device), held

    def evaluate(self, sizes: Sequence[Size], evaluate: Callable[[slice], list[Result]]) -> list[Result]:
        """Evaluate a batch.

        Args:
            sizes: of its structures.
            evaluate: does some of them in one pass.

        Returns:
            Results in the same order.

        Raises:
            DoesNotFitError: memory lacked for one structure alone.
        """
        if len(sizes) == 1:
            return self._one(sizes, slice(0, 1), evaluate)
        results: list[Result] = []
        while rest := sizes[len(results) :]:  # looked at anew after each pass, which may have taught something
            count = self._budget.count(rest, self._free())
            results += self._one(rest[:count], slice(len(results), len(results) + count), evaluate)
        return results

    def _one(self, sizes: Sequence[Size], pack: slice, evaluate: Callable[[slice], list[Result]]) -> list[Result]:
        size = sizes[0] if len(sizes) == 1 else total(sizes)
        free = 0
        if new := self._budget.is_new(size):  # only then is there anything to learn, and measuring costs milliseconds
            free = self._free()  # before the pass has its hands full
            self._memory.begin()
        try:
            results = evaluate(pack)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(sizes) == 1:
                raise DoesNotFitError(error, self._budget.would_fit(size, free)) from error
            self._budget.back_off(size)
            raise
        if new:
            self._budget.learn(size, self._memory.taken())
        self._budget.went_well()
        return results

    def _free(self) -> int:
        """Bytes that a pass can have."""
        return max(0, self._memory.free() - self._held())
