"""Codes around ASE that take a calculator: what they find through a daemon is what they find with EMT in the job."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.optimize import BFGS

from conftest import EMBEDDED_MODEL, RunningDaemon

pytestmark = pytest.mark.filterwarnings("default")  # theirs

Make = Callable[[], Calculator]
AGAINST = "the same with EMT in the job"


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """One that need not load MACE."""
    return start_shared_daemon("--model", "emt")


@pytest.fixture
def both(daemon: RunningDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run something with calculators of each kind; both results."""
    monkeypatch.chdir(tmp_path)

    def run(what: Callable[[Make], Any]) -> tuple[Any, Any]:
        client = daemon.client()
        return what(lambda: client.calculator("emt")), what(EMT)

    return run


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def frequencies(phonon: Any, point: list[float]) -> np.ndarray:
    """Of a Phonopy, in THz."""
    return phonon.run_qpoints([point]).frequencies[0]


def test_phonopy(both, compatible) -> None:
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    def run(make: Make) -> Phonopy:
        atoms, calculator = bulk("Al"), make()
        cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), cell=atoms.cell.array, positions=atoms.positions)
        phonon = Phonopy(cell, np.diag([3, 3, 3]), log_level=0)
        phonon.generate_displacements(distance=0.01)
        forces = []
        for displaced in phonon.supercells_with_displacements:
            supercell = atoms * (3, 3, 3)
            supercell.positions = displaced.positions
            forces.append(calculator.get_forces(supercell))
        phonon.forces = np.array(forces)
        phonon.produce_force_constants()
        return phonon

    ours, theirs = both(run)
    for point in ([0.5, 0.5, 0.0], [0.5, 0.5, 0.5], [0.1, 0.2, 0.3]):
        np.testing.assert_allclose(frequencies(ours, point), frequencies(theirs, point), atol=1e-6)
    compatible(
        code="phonopy",
        version=version("phonopy"),
        role="driver",
        transport="in Python",
        ran="force constants and frequencies, Al, 27 atoms",
        against=AGAINST,
        agreement=np.abs(ours.forces - theirs.forces).max(),
    )


def test_pymatgen(both, compatible) -> None:
    from pymatgen.io.ase import AseAtomsAdaptor

    structure = AseAtomsAdaptor.get_structure(copper())

    def run(make: Make) -> tuple[Any, Any]:
        relaxed = structure.copy().relax(calculator=make(), optimizer="BFGS", steps=8, fmax=0.001)
        return relaxed, structure.calculate(calculator=make())

    (relaxed, calculated), (reference, expected) = both(run)
    np.testing.assert_allclose(relaxed.lattice.matrix, reference.lattice.matrix, atol=1e-9)
    np.testing.assert_allclose(relaxed.cart_coords, reference.cart_coords, atol=1e-9)
    assert calculated.results["energy"] == pytest.approx(expected.results["energy"], abs=1e-10)
    compatible(
        code="pymatgen",
        version=version("pymatgen"),
        role="driver",
        transport="in Python",
        ran="Structure.relax and Structure.calculate, 4 Cu",
        against=AGAINST,
        agreement=np.abs(relaxed.calc.results["forces"] - reference.calc.results["forces"]).max(),
    )


@pytest.mark.parametrize("what", ["RelaxCalc", "ElasticityCalc", "EOSCalc", "PhononCalc"])
def test_matcalc(what: str, both, compatible) -> None:
    import matcalc

    options: dict[str, dict[str, Any]] = {
        "RelaxCalc": {"optimizer": "BFGS", "fmax": 1e-4},
        "ElasticityCalc": {"fmax": 1e-3},
        "EOSCalc": {"fmax": 1e-3, "n_points": 7, "max_abs_strain": 0.04},
        "PhononCalc": {"fmax": 1e-3, "min_length": None, "supercell_matrix": np.diag([3, 3, 3]), "write_phonon": False},
    }
    found = {
        "RelaxCalc": lambda result: [result["energy"], *result["forces"].ravel(), result["volume"]],
        "ElasticityCalc": lambda result: [result["bulk_modulus_vrh"], result["shear_modulus_vrh"]],
        "EOSCalc": lambda result: [result["bulk_modulus_bm"], *result["eos"]["energies"]],
        "PhononCalc": lambda result: frequencies(result["phonon"], [0.5, 0.5, 0.5]),
    }[what]
    atoms = bulk("Cu")
    if what == "RelaxCalc":
        atoms = copper()
    ours, theirs = both(lambda make: getattr(matcalc, what)(make(), **options[what]).calc(atoms))
    np.testing.assert_allclose(found(ours), found(theirs), rtol=1e-6, atol=1e-8)
    compatible(
        code="matcalc",
        version=version("matcalc"),
        role="driver",
        transport="in Python",
        ran=f"{what}, {len(atoms)} Cu",
        against=AGAINST,
        agreement=np.abs(ours["forces"] - theirs["forces"]).max() if what == "RelaxCalc" else None,
    )


@pytest.fixture
def quacc_here(tmp_path: Path) -> Iterator[None]:
    """QuAcc leaves what it writes in the test's folder."""
    from quacc import change_settings
    from quacc.recipes.mlip._base import pick_calculator

    with change_settings({"RESULTS_DIR": tmp_path, "SCRATCH_DIR": tmp_path}):
        yield
    pick_calculator.__wrapped__.cache_clear()  # it keeps calculators, and their sessions


@pytest.mark.parametrize("recipe", ["static", "relax", "phonon"])
def test_quacc(recipe: str, daemon: RunningDaemon, both, quacc_here, compatible) -> None:
    """Its recipes for potentials hand a calculator to `matcalc.load_fp`, which gives it back."""
    from quacc.recipes.mlip.core import relax_job, static_job
    from quacc.recipes.mlip.phonons import phonon_flow

    atoms = copper()
    recorded: list[dict[str, Any]] = []

    def run(make: Make) -> dict[str, Any]:
        how = {"library": "matcalc", "name": make()}
        if recipe == "static":
            done = static_job(atoms, **how)
            recorded.append({key: value for key, value in done["parameters"].items() if key != "version"})  # QuAcc's
            return done
        if recipe == "relax":
            return relax_job(atoms, relax_cell=True, opt_params={"fmax": 1e-3}, **how)
        return phonon_flow(bulk("Al"), supercell_matrix=np.diag([3, 3, 3]).tolist(), job_params={"static_job": how})

    ours, theirs = both(run)
    if recorded:
        assert recorded[0]["fingerprint"] == daemon.model("emt")["fingerprint"]
        atoms.calc = daemon.client().calculator(**recorded[0])
        assert atoms.get_potential_energy() == ours["results"]["energy"]
    if recipe == "phonon":
        found = [one["results"]["force_constants"] for one in (ours, theirs)]
        np.testing.assert_allclose(*found, atol=1e-6)
    else:
        assert ours["results"]["energy"] == pytest.approx(theirs["results"]["energy"], abs=1e-10)
        np.testing.assert_allclose(ours["atoms"].positions, theirs["atoms"].positions, atol=1e-9)
    compatible(
        code="QuAcc",
        version=version("quacc"),
        role="driver",
        transport="in Python",
        ran={"static": "static_job, 4 Cu", "relax": "relax_job with its cell, 4 Cu", "phonon": "phonon_flow, Al"}[
            recipe
        ],
        against=AGAINST,
        agreement=None
        if recipe == "phonon"
        else np.abs(np.subtract(ours["results"]["forces"], theirs["results"]["forces"])).max(),
    )


def test_a_job_of_ones_own_in_quacc(both, quacc_here, compatible) -> None:
    from quacc import job
    from quacc.runners.ase import Runner
    from quacc.schemas.ase import Summarize

    first = bulk("Cu", cubic=True) * 2
    del first[0]
    last = first.copy()
    last.positions[0] = 0.0  # an atom hops into the vacancy

    def run(make: Make) -> list[Any]:
        @job
        def relax(atoms: Any) -> Any:
            calculator = make()
            dynamics = Runner(atoms, calculator).run_opt(fmax=0.01)
            return Summarize(additional_fields={"name": "rootstockd relax"}).opt(dynamics)

        vibrations = Runner(bulk("Cu"), make()).run_vib()
        return [relax(first)["results"], relax(last)["results"], vibrations.get_energies()]

    ours, theirs = both(run)
    for one, other in zip(ours[:2], theirs[:2], strict=True):
        assert one["energy"] == pytest.approx(other["energy"], abs=1e-9)
    np.testing.assert_allclose(ours[2], theirs[2], atol=1e-6)
    compatible(
        code="QuAcc",
        version=version("quacc"),
        role="driver",
        transport="in Python",
        ran="a job of one's own: Runner.run_opt, Runner.run_vib",
        against=AGAINST,
        agreement=np.abs(np.subtract(ours[0]["forces"], theirs[0]["forces"])).max(),
    )


def test_torch_sim(daemon: RunningDaemon, compatible) -> None:
    """Relaxation, dynamics and stress of alloys of several sizes in skewed cells, against torch-sim's own MACE."""
    import torch
    import torch_sim as ts
    from torch_sim.models.mace import MaceModel

    from rootstock_client.torch_sim import RootstockModel

    systems = [copper() * size for size in ((1, 1, 1), (2, 1, 1), (1, 2, 2))]
    rng = np.random.default_rng(1)
    for atoms in systems:
        atoms.numbers[:] = rng.choice([13, 29, 47, 79], len(atoms))
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.uniform(-0.08, 0.08, (3, 3))), scale_atoms=True)
    options = {"device": torch.device("cpu"), "dtype": torch.float64, "compute_stress": True}
    potential = torch.load(EMBEDDED_MODEL, weights_only=False, map_location="cpu").double()
    calculator = daemon.client().calculator("mace-emt-small", dtype="float64")

    if hasattr(ts, "Integrator"):
        nve = ts.Integrator.nve
        cell_fire = {"optimizer": ts.Optimizer.fire, "init_kwargs": {"cell_filter": ts.CellFilter.unit}}
    else:  # up to torch-sim 0.3, the last for Python 3.11
        nve, cell_fire = ts.integrators.nve, {"optimizer": ts.optimizers.unit_cell_fire}

    def run(model: Any) -> tuple[Any, Any, Any]:
        state = ts.io.atoms_to_state(systems, options["device"], options["dtype"])
        moved = ts.integrate(state, model, integrator=nve, n_steps=5, temperature=300.0, timestep=0.002)
        relaxed = ts.optimize(state, model, max_steps=5, steps_between_swaps=5, **cell_fire)
        return model(state), moved, relaxed

    torch.manual_seed(0)
    theirs = run(MaceModel(potential, **options))
    model = RootstockModel(calculator, sessions=2, **options)  # fewer sessions than systems
    torch.manual_seed(0)
    ours = run(model)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        state = ts.io.atoms_to_state(systems, options["device"], options["dtype"])
        torch.testing.assert_close(again(state)["forces"], ours[0]["forces"], rtol=0, atol=1e-9)
        again.close()
    model.close()
    for name in ("energy", "forces", "stress"):
        torch.testing.assert_close(ours[0][name], theirs[0][name], rtol=0, atol=1e-9)
    for one, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(one.positions, other.positions, rtol=0, atol=1e-8)
        torch.testing.assert_close(one.cell, other.cell, rtol=0, atol=1e-8)
    compatible(
        code="torch-sim",
        version=version("torch-sim-atomistic"),
        role="driver",
        transport="in Python",
        ran="NVE, FIRE with cells, stress; 3 triclinic alloys at once",
        against="torch-sim's own MaceModel",
        agreement=float((ours[0]["forces"] - theirs[0]["forces"]).abs().max()),
    )


def test_torch_sim_after_ctrl_c(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was under way goes on in its threads, with calculators that the next state has nothing of."""
    import torch
    import torch_sim as ts

    from rootstock_client import torch_sim

    model = torch_sim.RootstockModel(daemon.client().calculator("lj"), sessions=2)
    state = ts.io.atoms_to_state([copper()] * 4, torch.device("cpu"), torch.float64)
    right, before = model(state), list(model._calculators)

    def interrupted(_parts: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch_sim, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(state)
    torch.testing.assert_close(model(state)["forces"], right["forces"], rtol=0, atol=0)
    assert not any(calculator in before for calculator in model._calculators)
    model.close()


def test_torch_sims_own_check_of_models(daemon: RunningDaemon) -> None:
    import torch
    import torch_sim as ts
    from torch_sim.models.interface import validate_model_outputs

    from rootstock_client.torch_sim import RootstockModel

    model = RootstockModel(daemon.client().calculator("lj"), compute_stress=True)
    validate_model_outputs(model, model.device, model.dtype)
    state = ts.io.atoms_to_state([copper(), copper()], model.device, model.dtype)
    state.charge = torch.tensor([0.0, 1.0])
    with pytest.raises(NotImplementedError, match="has no notion of charge"):
        model(state)
    molecule = Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]])
    found = model(ts.io.atoms_to_state([molecule], model.device, model.dtype))
    assert found["energy"].isfinite().all() and found["stress"].shape == (1, 3, 3) and found["stress"].isnan().all()
    model.close()


PARSL = """
import json, parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.providers import LocalProvider


@parsl.python_app
def relax(seed):
    from ase.build import bulk
    from ase.optimize import BFGS
    from rootstock_client import RootstockClient

    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    atoms.calc = RootstockClient().calculator("emt")
    BFGS(atoms, logfile=None).run(fmax=0.02)
    return atoms.get_potential_energy()


provider = LocalProvider(max_blocks=1)
executor = HighThroughputExecutor(provider=provider, max_workers_per_node=2, cores_per_worker=0.1, address="127.0.0.1")
with parsl.load(Config(executors=[executor])):
    print(json.dumps([future.result() for future in [relax(seed) for seed in range(8)]]))
"""


def test_parsl(daemon: RunningDaemon, tmp_path: Path, compatible) -> None:
    """In a process of its own: it leaves threads and processes."""
    variables = {**os.environ, "ROOTSTOCKD_SOCKET": str(daemon.socket), "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, "-c", PARSL],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    energies = json.loads(done.stdout.splitlines()[-1])
    own = []
    for seed in range(8):
        atoms = bulk("Cu", cubic=True)
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        BFGS(atoms, logfile=None).run(fmax=0.02)
        own.append(atoms.get_potential_energy())
    assert energies == pytest.approx(own, abs=1e-9)
    compatible(
        code="Parsl",
        version=version("parsl"),
        role="driver",
        transport="in Python",
        ran="8 relaxations on a LocalProvider",
        against="energies of the same with EMT in the job, to 1e-9 eV",
    )
