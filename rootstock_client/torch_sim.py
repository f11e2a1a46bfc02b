"""torch-sim: a model whose numbers come from a daemon.

>>> import torch_sim as ts
>>> from rootstock_client import RootstockClient
>>> from rootstock_client.torch_sim import RootstockModel
>>> model = RootstockModel(RootstockClient().calculator("mace-mp-medium"))  # doctest: +SKIP
>>> relaxed = ts.optimize(many, model, optimizer=ts.Optimizer.fire)  # doctest: +SKIP
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

try:
    import torch
    import torch_sim as ts
    from torch_sim.models.interface import ModelInterface
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.msg}; pip install 'rootstockd[torch-sim]'", name=error.name) from error

from rootstock_client.snapshot import Box, Snapshot

if TYPE_CHECKING:
    from rootstock_client.calculator import RootstockCalculator

_NO_STRESS = np.full(6, np.nan)


class RootstockModel(ModelInterface):  # type: ignore[misc]  # torch-sim is not typed
    """A model for torch-sim: each system of a state is a session's structure, and the daemon batches them.

    `model(state)` gives `energy` (nsystems,) in eV, `forces` (natoms, 3) in eV/Å and `stress` (nsystems, 3, 3) in eV/Å³
    with ASE's sign. Where the state has `charge` and `spin`, they count.

    The job needs torch for its own arrays, and no package of the potential's. What a device's memory takes is the
    daemon's business, so there is nothing for an autobatcher to measure: give it a `max_memory_scaler`, or go without.

    Args:
        calculator: says which potential; from `RootstockClient.calculator`. Sessions are those of copies.
        device: where the results shall be, and the state is; the CPU by default.
        dtype: of the results; what the potential computes in is the calculator's `dtype`.
        compute_forces: give forces.
        compute_stress: give stress, which is NaN for systems that have none: it takes something periodic and a volume.
        sessions: how many systems may be under way at a time.
    """

    def __init__(
        self,
        calculator: RootstockCalculator,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float64,
        compute_forces: bool = True,
        compute_stress: bool = False,
        sessions: int = 64,
    ) -> None:
        super().__init__()
        self._device, self._dtype = torch.device(device), dtype
        self._compute_forces, self._compute_stress = compute_forces, compute_stress
        self._memory_scales_with = "n_atoms"
        self._calculator, self._sessions = copy.copy(calculator), sessions
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._calculators: list[RootstockCalculator] = []
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(self._sessions, thread_name_prefix="rootstock")

    def forward(self, state: ts.SimState, **_: Any) -> dict[str, torch.Tensor]:
        """Evaluate all systems of a state; see the class.

        Raises:
            ModelChangedError: not all of it, and of what was evaluated before, is of one potential.
            RootstockError: an evaluation failed; the message says why.
        """
        if self._pid != os.getpid():  # after a fork: there are no threads
            self._begin()
        systems = list(_systems(state))
        with self._lock:
            results = self._evaluate_all(systems)
        found = {"energy": self._tensor([one["energy"] for one in results])}
        if self._compute_forces:
            found["forces"] = self._tensor(np.concatenate([one["forces"] for one in results]))
        if self._compute_stress:
            stress = [voigt_6_to_full_3x3_stress(one.get("stress", _NO_STRESS)) for one in results]
            found["stress"] = self._tensor(stress)
        return found

    def _evaluate_all(self, systems: list[Atoms]) -> list[dict[str, Any]]:
        while len(self._calculators) < min(len(systems), self._sessions):
            self._calculators.append(copy.copy(self._calculator))
        count = min(len(systems), len(self._calculators))
        parts = [
            self._threads.submit(self._evaluate, calculator, systems[first::count])
            for first, calculator in enumerate(self._calculators[:count])
        ]
        try:
            wait(parts)  # all of them, also if one fails: none may be at it still when the next state comes
        except BaseException:  # Ctrl-C; those at it keep their calculators, which the next state does without
            for part in parts:
                part.cancel()
            self._calculators = []
            raise
        results: list[dict[str, Any]] = [{}] * len(systems)
        for first, part in enumerate(parts):
            results[first::count] = part.result()
        for calculator in self._calculators[:count]:
            self._calculator.check_potential(calculator.fingerprint)
        return results

    def _evaluate(self, calculator: RootstockCalculator, systems: list[Atoms]) -> list[dict[str, Any]]:
        results = []
        for atoms in systems:
            wants_stress = self._compute_stress and Box(Snapshot(atoms)).has_stress
            calculator.calculate(atoms, ["stress"] if wants_stress else [])
            results.append(calculator.results)
        return results

    def _tensor(self, values: Any) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values), dtype=self._dtype, device=self._device)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_pid", "_calculators", "_lock", "_threads")
        return {key: value for key, value in self.__dict__.items() if key not in ours}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._begin()

    def close(self) -> None:
        """Close all sessions; the next evaluation opens new ones."""
        for calculator in self._calculators:
            calculator.close()


def _systems(state: ts.SimState) -> Iterator[Atoms]:
    """What a state consists of. Its cells have vectors in columns."""
    arrays = {name: _array(getattr(state, name)) for name in ("positions", "atomic_numbers", "cell", "pbc")}
    electrons = {
        name: _array(value) for name in ("charge", "spin") if (value := getattr(state, name, None)) is not None
    }
    ends = np.cumsum(np.bincount(_array(state.system_idx)))
    for system, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        yield Atoms(
            numbers=arrays["atomic_numbers"][start:end],
            positions=arrays["positions"][start:end],
            cell=arrays["cell"][system].T,
            pbc=arrays["pbc"],
            info={name: float(value[system]) for name, value in electrons.items()},
        )


def _array(values: Any) -> np.ndarray[Any, Any]:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
