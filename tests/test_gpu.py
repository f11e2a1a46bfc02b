"""A daemon on a GPU against mace-torch's own calculator on the CPU, in float64."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from conftest import EMBEDDED_MODEL, RunningDaemon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
MODEL = "mace-emt-small"


@pytest.fixture(scope="module")
def gpu_daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    return start_shared_daemon("--model", MODEL, device=("--gpu", "0"))


@pytest.fixture(scope="module")
def reference() -> Any:
    calculators = pytest.importorskip("mace.calculators")
    return calculators.MACECalculator(model_paths=str(EMBEDDED_MODEL), device="cpu", default_dtype="float64")


def copper(seed: int, size: int = 2) -> Atoms:
    atoms = bulk("Cu", cubic=True) * size
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_the_worker_computes_on_the_gpu(gpu_daemon: RunningDaemon) -> None:
    assert gpu_daemon.model(MODEL)["device"].startswith("cuda")
    assert "cuda" in gpu_daemon.model(MODEL)["backend"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3)])
def test_numbers_are_those_of_the_cpu(gpu_daemon: RunningDaemon, reference: Any, dtype: Any, tolerance: float) -> None:
    atoms, other = copper(1), copper(1)
    atoms.calc, other.calc = gpu_daemon.client().calculator(MODEL, dtype=dtype), reference
    assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=tolerance * len(atoms))
    np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(atoms.get_stress(), other.get_stress(), rtol=0, atol=tolerance)


def test_many_sessions_share_passes_and_keep_their_own_numbers(gpu_daemon: RunningDaemon, reference: Any) -> None:
    jobs = [copper(seed, 1 + seed % 3) for seed in range(16)]

    def forces(atoms: Atoms) -> np.ndarray:
        with gpu_daemon.client().calculator(MODEL) as calculator:
            atoms.calc = calculator
            for seed in range(5):
                atoms.rattle(0.01, seed=seed)
                atoms.get_forces()
            return atoms.get_forces()

    before = gpu_daemon.model(MODEL)
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(forces, jobs))
    after = gpu_daemon.model(MODEL)
    assert after["evaluations"] - before["evaluations"] == 5 * len(jobs)
    assert after["batches"] - before["batches"] < 5 * len(jobs)
    for atoms, each in zip(jobs, found, strict=True):
        atoms.calc = reference
        np.testing.assert_allclose(each, atoms.get_forces(), rtol=0, atol=1e-9)
