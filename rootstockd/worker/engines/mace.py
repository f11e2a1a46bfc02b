"""MACE through mace-torch, unchanged: the reference that everything else is checked against.

The graph is built by mace-torch's own code, so that results equal its MACECalculator's. A batch is one forward pass
over the union of its graphs.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols

with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    # on import, e3nn and mace-torch say things that in a log would pass for the cause of whatever went wrong
    warnings.simplefilter("ignore")
    import mace
    from mace import data as mace_data
    from mace.tools import AtomicNumberTable, torch_geometric

from rootstockd.worker.engines import EngineError, EngineInfo, ModelSpec, Result, System, Task


class MaceEngine:
    """A MACE model on one device.

    Args:
        model: the model, on its device and in its dtype.
        name: catalogue name, for messages.
        device: torch's name of the device.
        dtype: torch's default dtype in this process from now on.
    """

    def __init__(self, model: Any, name: str, device: str, dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)
        for parameter in model.parameters():
            parameter.requires_grad = False
        self._model, self._name, self._device = model, name, device
        self._elements = AtomicNumberTable([int(z) for z in model.atomic_numbers])
        self._heads: list[str] = list(getattr(model, "heads", None) or ["Default"])
        self._cutoff = float(model.r_max)
        self.info = EngineInfo(
            properties=("energy", "free_energy", "forces", "stress", "energies"),
            elements=tuple(self._elements.zs),
            backend=f"mace-torch {mace.__version__}, torch {torch.__version__}, {device}",
        )

    def prepare(self, system: System) -> dict[str, Any]:
        """The part of mace-torch's Configuration that stays the same."""
        unknown = sorted(set(system.numbers.tolist()) - set(self._elements.zs))
        if unknown:
            symbols = ", ".join(chemical_symbols[z] if z < len(chemical_symbols) else str(z) for z in unknown)
            raise EngineError("unknown-element", f"model {self._name!r} does not know {symbols}")
        return {
            "atomic_numbers": system.numbers,
            "pbc": system.pbc,
            "head": self._head(system.head),
            # mace-torch's own defaults for what a structure does not say: no charge, a singlet
            "properties": {"total_charge": system.charge or 0.0, "total_spin": system.spin or 1.0},
        }

    def _head(self, wanted: str | None) -> str:
        """The head to use; without a choice the only one, or the one called default, as MACECalculator picks it."""
        if wanted is not None:
            if wanted in self._heads:
                return wanted
        elif len(self._heads) == 1:
            return self._heads[0]
        else:
            for head in self._heads:
                if head.lower() == "default":
                    return head
        raise EngineError(
            "unsupported",
            f"model {self._name!r} has no head {wanted!r}" if wanted else f"model {self._name!r} has several heads",
            f"Name one of its heads: {', '.join(self._heads)}.",
        )

    def _graph(self, task: Task) -> Any:
        configuration = mace_data.Configuration(
            positions=task.positions, cell=task.cell, property_weights={}, **task.system
        )
        return mace_data.AtomicData.from_config(
            configuration, z_table=self._elements, cutoff=self._cutoff, heads=self._heads
        )

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
                )
            )
        return results


def load(spec: ModelSpec) -> MaceEngine:
    """Load a MACE model file.

    Raises:
        EngineError: the file is missing or is no MACE model, or the device is not there.
    """
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: torch {torch.__version__} sees no CUDA device",
            "Install a CUDA build of torch beside the daemon, or start it with `--device cpu`.",
        )
    path = Path(spec.weights)
    if not path.is_file():
        raise EngineError("model-load", f"model {spec.name!r}: its weights {path} are missing")
    dtype = {"float32": torch.float32, "float64": torch.float64}[spec.dtype]
    try:
        # weights are code: the catalogue, which is the operator's, says which files are ever opened
        model = torch.load(path, map_location=spec.device, weights_only=False)
        model = model.to(device=spec.device, dtype=dtype)
        return MaceEngine(model, spec.name, spec.device, dtype)
    except Exception as error:
        text = f"model {spec.name!r}: {path} is not a MACE model that mace-torch {mace.__version__} can read: {error}"
        raise EngineError("model-load", text) from error
