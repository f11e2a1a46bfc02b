"""An engine that answers zero at once: what remains is what rootstockd itself costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from rootstockd.worker.engines import EngineInfo, ModelSpec, Result, System, Task, check_system, choose_head


class NoopEngine:
    """Zero energy, forces and stress for everything.

    Args:
        name: catalogue name, for messages.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.info = EngineInfo(properties=("energy", "free_energy", "forces", "stress", "energies"), backend="noop")

    def prepare(self, system: System) -> Any:
        """The zeros that every evaluation of this system gives."""
        check_system(self._name, self.info, system)
        choose_head(self._name, (), system.head)
        natoms = len(system.numbers)
        return Result(0.0, np.zeros((natoms, 3)), np.zeros((3, 3)), np.zeros(natoms))

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """The zeros."""
        return [task.system for task in tasks]

    def memory(self) -> None:
        """It needs none."""


def load(spec: ModelSpec) -> NoopEngine:
    """Nothing to load."""
    return NoopEngine(spec.name)
