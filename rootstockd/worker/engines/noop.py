"""An engine that answers zero at once: what remains is what rootstockd itself costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rootstockd.worker.engines import EngineInfo, ModelSpec, Result, System, Task


class NoopEngine:
    """Zero energy, forces and stress for everything."""

    info = EngineInfo(properties=("energy", "free_energy", "forces", "stress", "energies"), backend="noop")

    def prepare(self, system: System) -> Any:
        """The zeros that every evaluation of this system gives."""
        natoms = len(system.numbers)
        return Result(0.0, np.zeros((natoms, 3)), np.zeros((3, 3)), np.zeros(natoms))

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """The zeros."""
        return [task.system for task in tasks]


def load(_spec: ModelSpec) -> NoopEngine:
    """Nothing to load."""
    return NoopEngine()
