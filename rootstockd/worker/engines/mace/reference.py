"""MACE through mace-torch, unchanged: the reference that everything else is checked against.

The graph is built by mace-torch's own code, so that results equal its MACECalculator's; of a structure that reaches far
from the origin, or has a skewed cell, once it is in another form (`gathering`): what mace-torch makes of such takes all
time and memory, or has lost digits. A batch is one forward pass over the union of its graphs.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Tuple

import numpy as np

from rootstockd.worker.engines import Array, Result, Task
from rootstockd.worker.engines.mace.gathering import gathered, is_awkward
from rootstockd.worker.engines.mace.imports import without_training

try:  # before `without_training`: without torch.compile it would go without its own kernels, and say nothing
    import cuequivariance_torch  # noqa: F401
except Exception:  # whatever is wrong with it, MACE goes without
    sys.modules["cuequivariance_torch"] = None  # type: ignore[assignment]  # what Python takes for "not installed"

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), without_training():
    # on import, e3nn and mace-torch say things that in a log would pass for the cause of whatever went wrong
    warnings.simplefilter("ignore")
    import mace
    import mace.modules
    from mace import data as mace_data
    from mace.tools import AtomicNumberTable, torch_geometric

LOCAL = frozenset({"MACE", "ScaleShiftMACE"})
"""Classes of models in which nothing depends on where an atom is but for its neighbours."""

__all__ = ["ReferenceBackend", "System", "mace"]


Check = Tuple[Tuple[int, ...], int, Tuple[bool, bool, bool], str, float]
"""What one comparison is for: elements, session, periodicity, head and tolerance."""


@dataclass(eq=False)
class System:
    """A session's system, as the backends want it."""

    numbers: Array
    """(natoms,) atomic numbers."""
    pbc: tuple[bool, bool, bool]
    head: str
    head_index: int
    properties: dict[str, float]
    """What mace-torch calls total_charge and total_spin."""
    exact: bool
    """Only the reference, alone, will do."""
    tolerance: float
    """How far forces may differ from the reference's, in eV/Å."""
    session: int
    check: Check
    """What stands for it among systems whose first structure was compared."""


def heads_of(model: Any) -> list[str]:
    """Names of a model's heads; models of older versions have one, without a name."""
    return list(getattr(model, "heads", None) or ["Default"])


class ReferenceBackend:
    """A MACE model on one device, as mace-torch evaluates it.

    Args:
        model: the model, on its device and in its dtype.
        device: torch's name of the device.
    """

    def __init__(self, model: Any, device: str) -> None:
        self.name, self.note = "mace-torch", ""
        self._model, self._device = model, device
        self._elements = AtomicNumberTable([int(z) for z in model.atomic_numbers])
        self._heads = heads_of(model)
        self._cutoff = float(model.r_max)
        self._local = type(model).__name__ in LOCAL

    def _graph(self, task: Task) -> Any:
        system: System = task.system
        cell, positions, pbc = task.cell, task.positions, system.pbc
        if self._local and is_awkward(cell, positions, pbc, self._cutoff):
            cell, positions = gathered(cell, positions, pbc, self._cutoff)
            pbc = (True, True, True)
        configuration = mace_data.Configuration(
            atomic_numbers=system.numbers,
            positions=positions,
            cell=cell,
            pbc=pbc,
            head=system.head,
            properties=system.properties,
            property_weights={},
        )
        return mace_data.AtomicData.from_config(
            configuration, z_table=self._elements, cutoff=self._cutoff, heads=self._heads
        )

    def forget(self) -> None:
        """Nothing is kept."""

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """One forward pass over the union of the tasks' graphs."""
        batch = torch_geometric.Batch.from_data_list([self._graph(task) for task in tasks]).to(self._device)
        stress = any(task.stress for task in tasks)
        output = self._model(batch.to_dict(), training=False, compute_force=True, compute_stress=stress)
        energies = output["energy"].detach().cpu().double().numpy()
        forces = output["forces"].detach().cpu().double().numpy()
        virials = output["virials"].detach().cpu().double().numpy() if stress else None
        node_energies = (
            output["node_energy"].detach().cpu().double().numpy() if any(t.energies for t in tasks) else None
        )
        ends = np.cumsum([len(task.positions) for task in tasks])
        results = []
        for index, (task, end) in enumerate(zip(tasks, ends)):
            atoms = slice(end - len(task.positions), end)
            results.append(
                Result(
                    energy=float(energies[index]),
                    forces=forces[atoms],
                    virial=virials[index] if virials is not None and task.stress else None,
                    energies=node_energies[atoms] if node_energies is not None and task.energies else None,
                    backend=self.name,
                )
            )
        return results
