"""Which of a model's backends computes it, decided when it loads: the fastest of those that agree with the reference.

Evaluations that want to be exact are no part of this: they are the reference's, which is none of the candidates. So two
workers of one model, of which each has its own times, give them the same bits, whatever they chose.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from rootstockd.worker import stages
from rootstockd.worker.engines import ModelSpec, Task
from rootstockd.worker.engines.differences import TOLERANCE, compare
from rootstockd.worker.engines.mace import checks
from rootstockd.worker.engines.mace.candidates import Backend, NotApplicableError
from rootstockd.worker.engines.mace.reference import heads_of
from rootstockd.worker.engines.mace.timing import part_of
from rootstockd.worker.failures import describe, in_disorder, out_of_memory

log = logging.getLogger(__name__)

WARM_UP = 3
"""Evaluations until torch has compiled what it compiles, so that no job waits for it."""
RECORDED = 6
"""Evaluations on a GPU until passes are replayed: recording, and so replays, begin later as more has been recorded."""
HOPELESS = 3.0
"""What takes as many times as long as the best one is not warmed up any further: on a CPU that may take seconds. On a
GPU recording a pass is among these evaluations, and takes longer than that."""
WORTHWHILE = 0.9
"""A backend is used in place of one before it in the order if it takes less than this part of its time: noise is less,
and should not have two workers of a model choose differently."""
_STEP = 1e-3
_SLOPE = {"float32": 2e-2, "float64": 1e-4}
"""How far a force may be from a finite difference of the energy: the sanity check of forces, not of rounding."""


def warm(reference: Backend, model: Any) -> None:
    """Have mace-torch evaluate before anything else does: its last digits follow from what torch compiles at first.

    So an exact step has the same bits in the next worker, whatever backends there are.
    """
    tasks = next(checks.structures([int(z) for z in model.atomic_numbers], heads_of(model)))
    try:
        for _ in range(WARM_UP):
            reference.evaluate(tasks)
    except Exception as error:  # what it can't do it says to whoever asks for it
        if out_of_memory(error) or in_disorder(error):
            raise


class Selection:
    """Compares the candidates for one model with the reference, and times them.

    Args:
        spec: what was asked for.
        reference: mace-torch.
        elements: the model's.
        heads: the model's.
    """

    def __init__(self, spec: ModelSpec, reference: Backend, elements: Sequence[int], heads: Sequence[str]) -> None:
        self._name, self._dtype, self._on_gpu = spec.name, spec.dtype, spec.device != "cpu"
        self._reference, self._elements, self._heads = reference, elements, heads

    def best(self, candidates: Sequence[Backend]) -> tuple[Backend | None, list[str]]:
        """The fastest that gives the reference's numbers, if one does; and why those before it are not used.

        The first that agrees is timed against each of those after it. One of these is compared with the reference only
        if it is faster: most are not, and comparing takes longer than that.

        Raises:
            Exception: memory lacked for a candidate and the reference, or the device failed.
        """
        best: Backend | None = None
        notes: list[str] = []
        for backend in candidates:
            part = 0.0 if best is None else self._part(backend, best)
            if not part < WORTHWHILE:
                continue
            try:
                why = self._fault(backend)
            except Exception as error:
                if out_of_memory(error):
                    stages.begin(stages.CHECKS, backend.name)  # alone the reference may have enough
                raise
            backend.forget()
            if why:
                notes.append(f"{backend.name} is switched off: {why}")
                log.warning("model %r: %s", self._name, notes[-1])
                continue
            if best is not None:
                notes.append(f"{best.name} agrees but is slower: {backend.name} took {part:.2f} of its time")
                log.info("model %r: %s", self._name, notes[-1])
            best = backend
        return best, notes

    def _part(self, backend: Backend, best: Backend) -> float:
        """The time that one takes of the best one's, on a crystal; infinite where it can't be told.

        Raises:
            Exception: the device failed.
        """
        cells, evaluations, hopeless = (2, RECORDED, math.inf) if self._on_gpu else (1, WARM_UP, HOPELESS)
        tasks = [checks.crystal(self._elements, self._heads, cells)]
        try:
            most = hopeless * self._warmed(best, tasks, evaluations)
            part = math.inf
            if self._warmed(backend, tasks, evaluations, most) <= most:
                part = part_of(lambda: backend.evaluate(tasks), lambda: best.evaluate(tasks))
        except Exception as error:  # the best one is there
            if in_disorder(error):
                raise
            log.info("model %r: %s is not tried: %s", self._name, backend.name, describe(error))
            part = math.inf
        stages.begin(stages.CHECKS)
        best.forget()
        backend.forget()
        return part

    @staticmethod
    def _warmed(backend: Backend, tasks: list[Task], evaluations: int, most: float = math.inf) -> float:
        """Evaluate so often, until one that is not the first takes more than `most` seconds; those of the last."""
        stages.begin(stages.CHECKS, backend.name)
        for number in range(evaluations):
            start = time.perf_counter()
            backend.evaluate(tasks)
            seconds = time.perf_counter() - start
            if number and seconds > most:
                break
        return seconds

    def _fault(self, backend: Backend) -> str:
        """What is wrong with it on structures that span the model's elements, fewer at once where many are too many."""
        for together in (8, 4):
            try:
                return self._fault_among(backend, together)
            except NotApplicableError as error:
                why = f"{type(error).__name__}: {error}"
        return why

    def _fault_among(self, backend: Backend, together: int) -> str:
        """What is wrong with it on structures of so many elements each, and once with forces as slopes.

        Raises:
            NotApplicableError: it can't, for so many.
        """
        *structures, alone = checks.structures(self._elements, self._heads, together)
        repeats = WARM_UP
        for tasks in (*structures, alone):
            references = self._reference.evaluate(tasks)
            stages.begin(stages.CHECKS, backend.name)
            try:
                for _ in range(repeats):
                    results = backend.evaluate(tasks)
            except Exception as error:  # whatever it is, others are still there
                if out_of_memory(error) or in_disorder(error) or isinstance(error, NotApplicableError):
                    raise  # no fault of its own; or the process is lost; or there are too many elements at once
                return f"{type(error).__name__}: {error}"
            stages.begin(stages.CHECKS)
            repeats = 1
            backend.forget()  # no session has all elements at once
            for result, reference in zip(results, references):
                difference = compare(result, reference)
                if not difference.within(TOLERANCE[self._dtype]):
                    return f"it differs by {difference}"
        task = structures[-1][-1]
        moved = {"up": checks.moved(task, _STEP), "down": checks.moved(task, -_STEP), "here": task}
        stages.begin(stages.CHECKS, backend.name)
        slope = checks.slope_error({key: backend.evaluate([value])[0] for key, value in moved.items()}, _STEP)
        stages.begin(stages.CHECKS)
        return "" if slope <= _SLOPE[self._dtype] else f"its forces are {slope:.1e} off its energies' slope"
