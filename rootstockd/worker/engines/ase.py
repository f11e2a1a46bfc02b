"""Any ASE calculator as an engine, one structure at a time."""

from __future__ import annotations

import importlib
from typing import Any

import ase
import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from rootstockd.worker.engines import EngineError, EngineInfo, ModelSpec, Result, System, Task


class AseEngine:
    """One ASE calculator, used for all systems in turn.

    Args:
        calculator: the calculator.
        name: catalogue name, for messages.
    """

    def __init__(self, calculator: Any, name: str) -> None:
        self._calculator, self._name = calculator, name
        known = ("energy", "free_energy", "forces", "stress", "energies")
        self.info = EngineInfo(
            properties=tuple(p for p in known if p in calculator.implemented_properties),
            backend=f"ase {ase.__version__} {type(calculator).__name__}",
        )

    def prepare(self, system: System) -> Atoms:
        """Atoms without positions."""
        atoms = Atoms(numbers=system.numbers, pbc=system.pbc)
        if system.charge is not None:
            atoms.info["charge"] = system.charge
        if system.spin is not None:
            atoms.info["spin"] = system.spin
        return atoms

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Each task in its turn."""
        return [self._evaluate(task) for task in tasks]

    def _evaluate(self, task: Task) -> Result:
        atoms = task.system
        atoms.cell[:] = task.cell
        atoms.positions[:] = task.positions
        wanted = ["energy", "forces"] + ["stress"] * task.stress + ["energies"] * task.energies
        if missing := [name for name in wanted if name not in self.info.properties]:
            raise EngineError("unsupported", f"model {self._name!r} computes no {' and no '.join(missing)}")
        self._calculator.results = {}  # or what another session asked for would count as computed for this one
        properties = self._calculator.calculate_properties(atoms, wanted)
        virial = None
        if task.stress:
            virial = -voigt_6_to_full_3x3_stress(properties["stress"]) * atoms.get_volume()
        return Result(
            energy=float(properties["energy"]),
            forces=np.array(properties["forces"]),  # a copy: some calculators write each result into the same array
            virial=virial,
            energies=np.array(properties["energies"]) if task.energies else None,
        )


def load(spec: ModelSpec) -> AseEngine:
    """Make the calculator that the catalogue names as `module:Class`, with its keyword arguments.

    Raises:
        EngineError: it can't be made.
    """
    if unknown := sorted(set(spec.arguments) - {"calculator", "options"}):
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: no such arguments: {', '.join(unknown)}",
            "In the catalogue, keyword arguments of the calculator go into `options`.",
        )
    target = str(spec.arguments["calculator"])
    try:
        module, name = target.split(":")
        calculator = getattr(importlib.import_module(module), name)(**spec.arguments.get("options", {}))
    except Exception as error:
        raise EngineError("model-load", f"model {spec.name!r}: can't make {target}: {error}") from error
    return AseEngine(calculator, spec.name)
