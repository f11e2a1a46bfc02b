"""Options that change numbers: each session gets what it asked for, whoever else is there."""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT

from conftest import EMBEDDED_MODEL, RunningDaemon, sha256, wait_for
from rootstock_client.errors import InvalidInitError, LimitError, UnknownElementError
from rootstock_client.units import BOHR
from rootstockd.worker.engines import ModelSpec, System, Task
from rootstockd.worker.engines.loading import load_engine

MODEL = "mace-emt-small"
D3 = {"damping": "bj", "xc": "pbe", "cutoff": 40 * BOHR, "cnthr": 40 * BOHR}
pytestmark = pytest.mark.filterwarnings("ignore:Creating a tensor from a list of numpy.ndarrays")  # torch-dftd does


@cache
def reference(**settings: Any) -> Any:
    """mace_mp with its own D3, by torch-dftd."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        from mace.calculators import mace_mp

        return mace_mp(str(EMBEDDED_MODEL), device="cpu", default_dtype="float64", **settings)


def close(ours: Atoms, theirs: Atoms) -> None:
    """Up to 1e-6 of a correction of a few eV, in a cluster of some eV/Å: the programs' constants have other digits."""
    np.testing.assert_allclose(ours.get_potential_energy(), theirs.get_potential_energy(), rtol=0, atol=2e-6)
    np.testing.assert_allclose(ours.get_forces(), theirs.get_forces(), rtol=0, atol=1e-6)
    if theirs.pbc.all():
        np.testing.assert_allclose(ours.get_stress(), theirs.get_stress(), rtol=0, atol=1e-7)


def rattled(atoms: Atoms, seed: int = 1) -> Atoms:
    atoms.rattle(0.1, seed=seed)
    return atoms


def cluster() -> Atoms:
    atoms = molecule("CH4")
    atoms.numbers[:] = [29, 47, 47, 78, 28]
    atoms.positions *= 2.3
    return atoms


STRUCTURES = {
    "bulk": lambda: rattled(bulk("Cu", cubic=True)),
    "left-handed": lambda: Atoms("Cu", cell=[[0, 3, 0], [2.6, 0, 0], [0.3, 0.2, 2.7]], pbc=True),
    "slab": lambda: rattled(fcc111("Au", (1, 1, 3), vacuum=8.0)),
    "slab without third vector": lambda: rattled(fcc111("Pt", (1, 2, 2), vacuum=None)),
    "wire": lambda: Atoms("Au2", [[0, 0, 0], [0.2, 0, 2.7]], cell=[9.0, 9.0, 5.4], pbc=[False, False, True]),
    "cluster": cluster,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_dispersion_is_that_of_mace_mp(daemon: RunningDaemon, name: str) -> None:
    ours, theirs = STRUCTURES[name](), STRUCTURES[name]()
    with daemon.client() as client:
        ours.calc = client.calculator(MODEL, dispersion=True)
        theirs.calc = reference(dispersion=True)
        if name == "slab without third vector":  # mace-torch stretches the cell, torch-dftd takes it for singular
            theirs.cell[2] = [0, 0, 40.0]
        close(ours, theirs)
        assert ours.calc.backend in {"mace-torch + D3", "fused + D3"}


def test_settings_of_dispersion(daemon: RunningDaemon) -> None:
    ours, theirs = cluster(), cluster()
    theirs.calc = reference(dispersion=True, damping="zero", dispersion_xc="rpbe", dispersion_cutoff=np.float64(9.0))
    settings = {"damping": "zero", "xc": "rpbe", "cutoff": np.float64(9.0)}
    with daemon.client() as client:
        ours.calc = client.calculator(MODEL, dispersion=settings)
        settings["xc"] = "pbe"
        close(ours, theirs)


def test_sessions_with_other_options_never_get_each_others_numbers(daemon: RunningDaemon) -> None:
    wanted: dict[str, dict[str, Any]] = {
        "plain": {},
        "d3": {"dispersion": True},
        "other d3": {"dispersion": {"xc": "rpbe"}},
        "spelt out": {"dispersion": {"damping": "bj", "xc": "pbe", "cutoff": 40 * units.Bohr}},
        "float32": {"dtype": "float32"},
        "exact": {"exact": True, "dispersion": True},
    }
    energies: dict[str, list[float]] = {name: [] for name in wanted}

    def work(name: str, client: Any) -> None:
        atoms = rattled(bulk("Cu", cubic=True))
        atoms.calc = client.calculator(MODEL, **wanted[name])
        for step in range(12):
            atoms.rattle(0.02, seed=step)
            energies[name].append(atoms.get_potential_energy())

    with daemon.client() as client:
        threads = [threading.Thread(target=work, args=(name, client)) for name in wanted]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        workers = [model for model in client.status()["models"] if model["name"] == MODEL]
    assert len({worker["pid"] for worker in workers}) == len(workers)
    usual = [
        worker
        for worker in workers
        if worker["dtype"] == "float64"
        and {"damping": "bj", "xc": "pbe"}.items() <= (worker["dispersion"] or {}).items()
    ]
    assert len(usual) == 1, "the same options, however spelt, share a worker"
    atoms = rattled(bulk("Cu", cubic=True))
    for step in range(12):
        atoms.rattle(0.02, seed=step)
        for name, settings in {
            "plain": {},
            "d3": {"dispersion": True},
            "other d3": {"dispersion": True, "dispersion_xc": "rpbe"},
        }.items():
            atoms.calc = reference(**settings)
            assert energies[name][step] == pytest.approx(atoms.get_potential_energy(), abs=2e-6)
    np.testing.assert_allclose(energies["spelt out"], energies["d3"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(energies["exact"], energies["d3"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(energies["float32"], energies["plain"], rtol=0, atol=1e-3)
    assert abs(energies["float32"][0] - energies["plain"][0]) > 1e-9


def test_dispersion_with_any_family(daemon: RunningDaemon) -> None:
    with daemon.client() as client:
        ours, plain = rattled(bulk("Cu", cubic=True)), rattled(bulk("Cu", cubic=True))
        ours.calc, plain.calc = client.calculator("emt", dispersion=True), EMT()
        mace, mace_d3 = ours.copy(), ours.copy()
        mace.calc, mace_d3.calc = reference(), reference(dispersion=True)
        correction = mace_d3.get_potential_energy() - mace.get_potential_energy()
        assert ours.get_potential_energy() - plain.get_potential_energy() == pytest.approx(correction, abs=2e-6)
        assert ours.calc.backend == "EMT + D3"


def test_what_can_not_be_done_is_refused(daemon: RunningDaemon) -> None:
    atoms = rattled(bulk("Cu", cubic=True))
    with daemon.client() as client:

        def energy(model: str = "emt", numbers: int = 29, **options: Any) -> float:
            atoms.numbers[:] = numbers
            atoms.calc = client.calculator(model, **options)
            return float(atoms.get_potential_energy())

        with pytest.raises(InvalidInitError, match="no parameters for the functional 'abc'"):
            energy(dispersion={"xc": "abc"})
        with pytest.raises(InvalidInitError, match="dispersion.colour"):
            energy(dispersion={"colour": 1.0})
        with pytest.raises(UnknownElementError, match="no D3 correction here for U"):
            energy("lj", 92, dispersion=True)
        with pytest.raises(PropertyNotImplementedError, match="computes in float64 and in nothing else"):
            energy(dtype="float32")
        with pytest.raises(PropertyNotImplementedError, match="no head 'x'"):
            energy(head="x")
        atoms.numbers[:] = 29
        atoms.calc = client.calculator("emt", dispersion=True)
        with pytest.raises(PropertyNotImplementedError, match="no per-atom energies"):
            atoms.get_potential_energies()
        energy(dtype="float64")


def test_workers_with_settings_of_their_own_are_not_without_number(start_daemon, monkeypatch) -> None:
    """Each has a copy of the model, and anybody can think of any number of settings."""
    monkeypatch.setenv("ROOTSTOCKD_LIMITS__MODELS", "20")
    own_daemon = start_daemon()
    atoms = bulk("Cu")
    with own_daemon.client() as client:

        def sessions_with(cutoff: float) -> list[int]:
            models = client.status()["models"]
            return [model["sessions"] for model in models if (model["dispersion"] or {}).get("cutoff") == cutoff]

        calculators = [client.calculator("noop", dispersion={"cutoff": 10.0 + number}) for number in range(17)]
        for calculator in calculators[:16]:
            atoms.calc = calculator
            atoms.get_forces()
        atoms.calc = calculators[16]
        with pytest.raises(LimitError, match="in use with 16 different settings"):
            atoms.get_forces()
        atoms.calc = client.calculator("noop", dispersion={"cutoff": 10.0})  # which is there
        atoms.get_forces()
        calculators[3].close()
        atoms.calc = calculators[16]
        wait_for(lambda: sessions_with(13.0) == [0])
        atoms.get_forces()
        assert sum(model["name"] == "noop" for model in client.status()["models"]) <= 17


@pytest.mark.parametrize("options", [{"dispersion": "zero"}, {"exact": "no"}, {"exact": 0}])
def test_words_are_no_yes(daemon: RunningDaemon, options: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(options))} is True"):
        daemon.client().calculator("emt", **options)


@pytest.mark.filterwarnings("default")  # torch-sim's own
def test_a_spin_of_zero_is_nothing_said(start_daemon: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """As torch-sim has it of whoever says nothing: no multiplicity is 0. A charge of 0 is the default."""
    import torch
    import torch_sim as ts
    from test_mace_backends import CHARGED, write_model

    from rootstock_client.torch_sim import RootstockModel

    checksum = sha256(write_model(tmp_path / "spin.model", **CHARGED))
    catalogue = tmp_path / "models.toml"
    catalogue.write_text(f'[with-spin]\nfamily = "mace"\nweights = "spin.model"\nsha256 = "{checksum}"\n')
    atoms = rattled(molecule("CH3CH2OH"))
    with start_daemon("--catalogue", str(catalogue)).client() as client:
        atoms.calc = client.calculator("with-spin")

        def energy(**info: float) -> float:
            atoms.info = info
            return float(atoms.get_potential_energy())

        silent = energy()
        for info in ({"spin": 0.0}, {"spin": 1}, {"charge": 0}, {"spin": 0, "charge": 0.0}):
            assert energy(**info) == pytest.approx(silent, abs=1e-9), info
        doublet = energy(spin=2)
        assert min(abs(other - silent) for other in (doublet, energy(spin=3), energy(charge=1))) > 1e-6
        state = ts.io.atoms_to_state([atoms] * 2, "cpu", torch.float64)
        state.charge, state.spin = torch.zeros(2), torch.tensor([0.0, 2.0])
        model = RootstockModel(atoms.calc)
        assert model(state)["energy"].tolist() == pytest.approx([silent, doublet], abs=1e-9)
        model.close()


def test_it_says_what_lacks(start_daemon: Any, tmp_path: Any) -> None:
    """An environment without the package."""
    (tmp_path / "dftd3.py").write_text("raise ModuleNotFoundError(\"No module named 'dftd3'\")\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{tmp_path}", prepend=":")
        own = start_daemon("--model", "emt")
    with own.client() as client:
        atoms = bulk("Cu")
        atoms.calc = client.calculator("emt", dispersion=True)
        with pytest.raises(PropertyNotImplementedError, match="the package dftd3"):
            atoms.get_potential_energy()
        atoms.calc = client.calculator("emt")
        atoms.get_potential_energy()


def test_an_exact_correction_is_added_by_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As threads add up as they come. The s-dftd3 that is here may have none, so another library stands in for it."""
    dispersion = pytest.importorskip("rootstockd.worker.engines.dispersion")
    openmp = ctypes.CDLL("libgomp.so.1")
    engine = load_engine(ModelSpec("d3", "noop", "cpu", "float64", dispersion=D3))
    threads, compute = [], dispersion.D3.compute

    def noted(*arguments: Any) -> Any:
        threads.append(openmp.omp_get_max_threads())
        return compute(*arguments)

    monkeypatch.setattr(dispersion.D3, "compute", noted)
    atoms = cluster()
    before = openmp.omp_get_max_threads()
    openmp.omp_set_num_threads(3)
    try:
        for library in (dispersion._LIBRARY, openmp):
            monkeypatch.setattr(dispersion, "_LIBRARY", library)
            for exact in (True, False):
                system = engine.prepare(System(atoms.numbers, (False, False, False), exact=exact))
                engine.evaluate([Task(system, np.zeros((3, 3)), atoms.positions, stress=False, energies=False)])
    finally:
        openmp.omp_set_num_threads(before)
    assert threads[2:] == [1, 3]
