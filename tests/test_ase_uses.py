"""What people do with ASE's calculators, through a daemon and with EMT in the job: the same numbers.

Forces of the two differ by rounding in the last digit, for they cross the wire in Hartree and Bohr. What is done with
them is kept so short that they stay alike.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ase
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.calculators.checkpoint import CheckpointCalculator
from ase.calculators.emt import EMT
from ase.calculators.fd import FiniteDifferenceCalculator
from ase.calculators.loggingcalc import LoggingCalculator
from ase.calculators.mixing import AverageCalculator, LinearCombinationCalculator, MixedCalculator, SumCalculator
from ase.calculators.qmmm import SimpleQMMM
from ase.constraints import FixAtoms, FixBondLength, FixedPlane, FixSymmetry, Hookean
from ase.db import connect
from ase.eos import EquationOfState, calculate_eos
from ase.filters import FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.io import Trajectory, read, write
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.nptberendsen import NPTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB, DimerControl, MinModeAtoms, MinModeTranslate
from ase.optimize import BFGS, FIRE, LBFGS, BFGSLineSearch, QuasiNewton
from ase.optimize.basin import BasinHopping
from ase.phonons import Phonons
from ase.vibrations import Vibrations

from conftest import RunningDaemon

Make = Callable[[], Calculator]
Numbers = dict[str, Any]


def copper(repeat: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True) * repeat
    atoms.rattle(0.05, seed=3)
    return atoms


def slab() -> Atoms:
    atoms = fcc111("Al", (2, 2, 2), vacuum=6.0)
    add_adsorbate(atoms, "Cu", 1.7, "hcp")
    atoms.set_constraint(FixAtoms(mask=atoms.get_tags() > 1))
    return atoms


def numbers(atoms: Atoms) -> Numbers:
    """What a run has come to."""
    found = {"positions": atoms.positions, "cell": atoms.cell.array, "momenta": atoms.get_momenta()}
    return {**found, "energy": atoms.get_potential_energy(), "forces": atoms.get_forces(apply_constraint=False)}


@pytest.fixture(scope="module")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """One that need not load MACE."""
    return start_shared_daemon("--model", "emt")


# --- what is done, given a way to make calculators


def relaxing(optimizer: type, steps: int = 12) -> Callable[[Make], Numbers]:
    def run(make: Make) -> Numbers:
        atoms = slab()
        atoms.calc = make()
        optimizer(atoms, logfile=None).run(fmax=1e-4, steps=steps)
        return numbers(atoms)

    return run


def relaxing_the_cell(choose: type, optimizer: type = BFGS) -> Callable[[Make], Numbers]:
    def run(make: Make) -> Numbers:
        atoms = copper()
        atoms.set_cell(atoms.cell * [1.02, 0.99, 1.0], scale_atoms=True)
        atoms.calc = make()
        optimizer(choose(atoms), logfile=None).run(fmax=1e-4, steps=12)
        return {**numbers(atoms), "stress": atoms.get_stress()}

    return run


def with_constraints(make: Make) -> Numbers:
    atoms = copper()
    constraints = [FixBondLength(0, 1), FixedPlane(2, (0, 0, 1)), Hookean(a1=2, a2=3, rt=2.5, k=5.0)]
    atoms.set_constraint(constraints)
    atoms.calc = make()
    BFGS(atoms, logfile=None).run(fmax=1e-3, steps=8)
    return numbers(atoms)


def with_symmetry(make: Make) -> Numbers:
    atoms = bulk("Cu", a=3.7)
    atoms.set_constraint(FixSymmetry(atoms))
    atoms.calc = make()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-3, steps=8)
    return {**numbers(atoms), "stress": atoms.get_stress()}


def dynamics(integrator: type, **options: Any) -> Callable[[Make], Numbers]:
    def run(make: Make) -> Numbers:
        atoms = copper(2)
        rng = {"rng": np.random.default_rng(5)} if integrator in {Langevin, Bussi} else {}
        widths = np.sqrt(atoms.get_masses() * units.kB * 300)[:, None]
        atoms.set_momenta(np.random.default_rng(4).normal(size=(len(atoms), 3)) * widths)
        atoms.calc = make()
        integrator(atoms, timestep=2 * units.fs, **options, **rng).run(15)
        return numbers(atoms)

    return run


def band(*, shared: bool, **options: Any) -> Callable[[Make], Numbers]:
    def run(make: Make) -> Numbers:
        first = slab()
        last = first.copy()
        last.positions[-1] += [1.4, 0.8, 0.0]
        images = [first, *(first.copy() for _ in range(3)), last]
        one = make()
        for image in images:
            image.calc = one if shared else make()
        neb = NEB(images, allow_shared_calculator=shared, **options)
        neb.interpolate()
        FIRE(neb, logfile=None).run(fmax=0.01, steps=5)
        return {"positions": np.array([image.positions for image in images]), "forces": neb.get_forces()}

    return run


def saddle(make: Make) -> Numbers:
    atoms = slab()
    atoms.calc = make()
    with DimerControl(initial_eigenmode_method="displacement", displacement_method="vector", logfile=None) as how:
        how.parameters["mask"] = [True] * len(atoms)
        dimer = MinModeAtoms(atoms, how)
        displacement = np.zeros((len(atoms), 3))
        displacement[-1] = 0.1, 0.05, 0.0
        dimer.displace(displacement_vector=displacement)
        with MinModeTranslate(dimer, logfile=None) as search:
            search.run(fmax=0.01, steps=4)
        return numbers(atoms)


def hopping(make: Make) -> Numbers:
    atoms = Atoms("Cu4", [[0, 0, 0], [2.4, 0, 0], [0, 2.4, 0], [0, 0, 2.4]])
    atoms.calc = make()
    np.random.seed(6)  # noqa: NPY002 - where BasinHopping takes its numbers from
    with BasinHopping(atoms, temperature=0.05, fmax=0.2, logfile=None, optimizer_logfile=None) as search:
        search.run(2)
    return numbers(atoms)


def vibrating(make: Make) -> Numbers:
    atoms = molecule("H2O")
    atoms.calc = make()
    QuasiNewton(atoms, logfile=None).run(fmax=1e-3, steps=30)
    vibrations = Vibrations(atoms, name=f"vib-{type(atoms.calc).__name__}")
    vibrations.run()
    return {**numbers(atoms), "hessian": vibrations.get_vibrations().get_hessian_2d()}


def phonons(make: Make) -> Numbers:
    calculator = make()
    found = Phonons(bulk("Al"), calculator, (3, 3, 3), name=f"phonons-{type(calculator).__name__}")
    found.run()
    found.read(acoustic=True)
    return {"frequencies": found.band_structure(np.array([[0.5, 0.0, 0.5], [0.5, 0.5, 0.5], [0.1, 0.0, 0.0]]))}


def equation_of_state(make: Make) -> Numbers:
    atoms = bulk("Cu")
    atoms.calc = make()
    points = calculate_eos(atoms, npoints=7, eps=0.03)
    volume, energy, modulus = EquationOfState(points.v, points.e).fit()
    return {"volume": volume, "energy": energy, "modulus": modulus}


def mixing(of: Callable[[Make], Calculator]) -> Callable[[Make], Numbers]:
    def run(make: Make) -> Numbers:
        atoms = copper()
        atoms.calc = of(make)
        found = numbers(atoms)
        atoms.rattle(0.02, seed=7)
        return {**found, "stress": atoms.get_stress(), "later": atoms.get_forces()}

    return run


USES: dict[str, Callable[[Make], Numbers]] = {
    "BFGS, Cu on Al(111)": relaxing(BFGS),
    "FIRE, Cu on Al(111)": relaxing(FIRE),
    "LBFGS, Cu on Al(111)": relaxing(LBFGS),
    "BFGSLineSearch, Cu on Al(111)": relaxing(BFGSLineSearch, steps=5),
    "BFGS with FrechetCellFilter, 4 Cu": relaxing_the_cell(FrechetCellFilter),
    "LBFGS with UnitCellFilter, 4 Cu": relaxing_the_cell(UnitCellFilter, LBFGS),
    "BFGS with StrainFilter, 4 Cu": relaxing_the_cell(StrainFilter),
    "FixBondLength, FixedPlane, Hookean, 4 Cu": with_constraints,
    "FixSymmetry and FrechetCellFilter, Cu": with_symmetry,
    "NVE, VelocityVerlet, 32 Cu, 15 steps": dynamics(VelocityVerlet),
    "NVT, Langevin, 32 Cu, 15 steps": dynamics(Langevin, temperature_K=300, friction=0.01 / units.fs, fixcm=False),
    "NVT, Bussi, 32 Cu, 15 steps": dynamics(Bussi, temperature_K=300, taut=20 * units.fs),
    "NVT, Nosé-Hoover chain, 32 Cu, 15 steps": dynamics(NoseHooverChainNVT, temperature_K=300, tdamp=50 * units.fs),
    "NPT, Berendsen, 32 Cu, 15 steps": dynamics(
        NPTBerendsen, temperature_K=300, pressure_au=0.0, compressibility_au=4.57e-5 / units.bar
    ),
    "NPT, isotropic MTK, 32 Cu, 15 steps": dynamics(
        IsotropicMTKNPT, temperature_K=300, pressure_au=0.0, tdamp=50 * units.fs, pdamp=500 * units.fs
    ),
    "NEB, a calculator for each image": band(shared=False, method="improvedtangent"),
    "NEB, one calculator for all images": band(shared=True, climb=True, method="aseneb"),
    "NEB, string method": band(shared=False, method="string"),
    "dimer, Cu on Al(111)": saddle,
    "basin hopping, Cu4": hopping,
    "vibrations, H2O": vibrating,
    "phonons, Al, 27 atoms": phonons,
    "equation of state, Cu": equation_of_state,
    "SumCalculator": mixing(lambda make: SumCalculator([make(), make()])),
    "LinearCombinationCalculator": mixing(lambda make: LinearCombinationCalculator([make(), EMT()], [2.0, -0.5])),
    "MixedCalculator": mixing(lambda make: MixedCalculator(make(), EMT(), 0.3, 0.7)),
    "AverageCalculator": mixing(lambda make: AverageCalculator([make(), EMT()])),
    "LoggingCalculator": mixing(lambda make: LoggingCalculator(make())),
    "FiniteDifferenceCalculator": mixing(lambda make: FiniteDifferenceCalculator(make())),
}


@pytest.mark.parametrize("use", USES)
def test_use(use: str, daemon: RunningDaemon, compatible, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    client = daemon.client()
    ours, theirs = USES[use](lambda: client.calculator("emt")), USES[use](EMT)
    # differences of energies by 1e-2 Å and less, of forces by the same, and squares of frequencies near zero
    loose = {"FiniteDifferenceCalculator": 1e-7, "vibrations, H2O": 1e-7, "phonons, Al, 27 atoms": 1e-7}.get(use, 1e-8)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-9, atol=loose, err_msg=name)
    agreement = np.abs(ours["forces"] - theirs["forces"]).max() if "forces" in ours else None
    compatible(
        code="ASE",
        version=ase.__version__,
        role="driver",
        transport="Unix socket",
        ran=use,
        against="the same with EMT in the job",
        agreement=agreement,
    )


def test_checkpoints_and_partial_quantum_mechanics(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Calculators around others, which fill and read results in ways of their own."""
    client, atoms, reference = daemon.client(), copper(), copper()
    reference.calc = EMT()
    atoms.calc = CheckpointCalculator(client.calculator("emt"), db=str(tmp_path / "checkpoints.db"))
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-10)
    atoms.calc = SimpleQMMM([0, 1], *(client.calculator("emt") for _ in range(3)))
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-10)


@pytest.mark.parametrize("extension", ["traj", "extxyz", "json", "db"])
def test_results_are_read_again(extension: str, daemon: RunningDaemon, compatible, tmp_path: Path) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    path = tmp_path / f"run.{extension}"
    expected = numbers(atoms)
    stress = atoms.get_stress()
    write(path, atoms)
    again = read(path)
    atoms.calc.close()
    assert again.calc.results.keys() >= {"energy", "free_energy", "forces", "stress"}
    assert again.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-12)
    np.testing.assert_allclose(again.get_forces(), expected["forces"], atol=1e-8)  # as many digits as a text has
    np.testing.assert_allclose(again.get_stress(), stress, atol=1e-8)
    if extension != "extxyz":
        assert again.calc.name == "rootstockd"
    compatible(
        code="ASE",
        version=ase.__version__,
        role="driver",
        transport="Unix socket",
        ran=f"results written to .{extension} and read again",
        agreement=np.abs(again.get_forces() - expected["forces"]).max(),
    )


def test_a_trajectory_shows_what_it_has(daemon: RunningDaemon, compatible, tmp_path: Path) -> None:
    atoms = slab()
    atoms.calc = daemon.client().calculator("emt")
    path = tmp_path / "relaxing.traj"
    with Trajectory(path, "w", atoms) as trajectory:
        optimizer = BFGS(atoms, logfile=None)
        optimizer.attach(trajectory)
        optimizer.run(fmax=0.01, steps=4)
    command = [sys.executable, "-m", "ase", "gui", "--terminal", "--graph", "i,e,fmax", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    index, energy, _ = np.loadtxt(done.stdout.splitlines()).T[:3]
    assert index.tolist() == [0, 1, 2, 3, 4]
    assert energy[-1] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
    compatible(
        code="ASE", version=ase.__version__, role="driver", transport="Unix socket", ran="a trajectory in `ase gui`"
    )


def test_a_database_says_what_computed_a_row(daemon: RunningDaemon, compatible, tmp_path: Path) -> None:
    client, atoms = daemon.client(), copper()
    atoms.calc = client.calculator("emt", exact=True)
    atoms.get_forces()
    with connect(tmp_path / "results.db") as database:
        row = database.get(id=database.write(atoms, relaxed=False))
        (found,) = database.select(calculator="rootstockd")
    assert found.energy == atoms.get_potential_energy()
    assert row.calculator_parameters == {"model": "emt", "exact": True, "fingerprint": atoms.calc.fingerprint}
    again = row.toatoms()
    again.calc = client.calculator(**row.calculator_parameters)
    np.testing.assert_array_equal(again.get_forces(), row.forces)
    compatible(
        code="ASE", version=ase.__version__, role="driver", transport="Unix socket", ran="a database: written, selected"
    )


def energy(atoms: Atoms) -> float:
    """For other processes."""
    return float(atoms.get_potential_energy())


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("way", ["fork", "spawn", "threads"])
def test_a_pool(way: str, daemon: RunningDaemon, compatible) -> None:
    """Atoms with their calculator go to other processes, before and after it has a session."""
    many = [copper() for _ in range(4)]
    calculator = daemon.client().calculator("emt")
    for seed, atoms in enumerate(many):
        atoms.rattle(0.01, seed=seed)
        atoms.calc = calculator
    expected = [energy(atoms) for atoms in many]
    pool = (
        ThreadPoolExecutor(2)
        if way == "threads"
        else ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(way))
    )
    with pool:
        assert list(pool.map(energy, many)) == expected
    assert energy(many[0]) == expected[0]
    compatible(
        code="ASE",
        version=ase.__version__,
        role="driver",
        transport="Unix socket",
        ran=f"atoms with their calculator in a pool: {way}",
    )


def test_what_asks_without_computing(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    assert atoms.calc.get_property("energy", atoms, allow_calculation=False) is None
    assert atoms.calc.calculation_required(atoms, ["energy"])
    atoms.get_forces()
    assert not atoms.calc.calculation_required(atoms, ["energy", "free_energy", "forces"])
    assert atoms.calc.calculation_required(atoms, ["stress"])
    atoms.rattle(0.01, seed=8)
    assert atoms.calc.get_property("forces", atoms, allow_calculation=False) is None
    assert set(atoms.get_properties(["energy", "forces", "stress"])) >= {"energy", "forces", "stress"}
    atoms.calc.reset()
    assert (atoms.calc.results, atoms.calc.atoms) == ({}, None)
    single = molecule("H2O")
    single.calc = atoms.calc
    with pytest.raises(PropertyNotImplementedError, match="set cell and pbc"):
        single.get_stress()
    for ask in (single.get_charges, single.get_magnetic_moments, single.get_dipole_moment):
        with pytest.raises(PropertyNotImplementedError, match="not among what rootstockd computes"):
            ask()
