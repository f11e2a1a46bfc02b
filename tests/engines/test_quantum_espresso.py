"""Quantum ESPRESSO behind the daemon, against pw.x run alone."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tomlkit
from ase import units
from ase.build import bulk
from ase.io.espresso import write_espresso_in
from ase.optimize import BFGS

from documented import documented

pytestmark = pytest.mark.skipif(
    shutil.which("pw.x") is None, reason="no Quantum ESPRESSO: apt install quantum-espresso quantum-espresso-data"
)
INPUT = {
    "control": {"pseudo_dir": "/usr/share/espresso/pseudo", "outdir": ".", "tprnfor": True, "tstress": True},
    "system": {"ecutwfc": 16, "nosym": True},
    "electrons": {"conv_thr": 1e-10},
}
THRESHOLD = 1e-5
"""Of energies, eV: what is left where a density is converged from another beginning."""


@pytest.fixture(scope="module")
def daemon(start_shared_daemon, tmp_path_factory):
    catalogue = tmp_path_factory.mktemp("espresso") / "models.toml"
    catalogue.write_text(tomlkit.dumps({"si-lda": documented("si-lda")}))
    return start_shared_daemon("--catalogue", str(catalogue))


@pytest.fixture
def silicon():
    atoms = bulk("Si")
    atoms.positions[1] += (0.1, -0.05, 0.02)
    return atoms


def of_pw_alone(atoms, folder):
    """Energy in eV, forces in eV/Å and stress in eV/Å**3, from what pw.x prints."""
    with Path(folder / "pw.in").open("w") as file:
        write_espresso_in(
            file, atoms, INPUT, pseudopotentials={"Si": "Si.pz-vbc.UPF"}, kpts=(2, 2, 2), koffset=(0, 0, 0)
        )
    done = subprocess.run(
        ["pw.x", "-in", "pw.in"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    (folder / "pw.out").write_text(done.stdout)
    number = r"(-?\d+\.\d+)"
    (energy,) = re.findall(rf"^!\s+total energy\s+=\s+{number} Ry", done.stdout, re.MULTILINE)
    forces = re.findall(rf"atom\s+\d+ type\s+\d+\s+force =\s+{number}\s+{number}\s+{number}", done.stdout)
    (block,) = re.findall(r"total\s+stress.*\n(.*\n.*\n.*)\n", done.stdout)
    stress = [[float(word) for word in line.split()[:3]] for line in block.splitlines()]
    ry = units.Rydberg
    count = len(atoms)
    return (
        float(energy) * ry,
        np.array(forces[:count], float) * ry / units.Bohr,
        -np.array(stress) * ry / units.Bohr**3,
    )


def test_numbers_are_those_of_pw_alone(daemon, silicon, tmp_path, compatible):
    energy, forces, stress = of_pw_alone(silicon, tmp_path)
    with daemon.client().calculator("si-lda") as silicon.calc:
        assert silicon.get_potential_energy() == pytest.approx(energy, abs=THRESHOLD)
        np.testing.assert_allclose(silicon.get_forces(), forces, rtol=0, atol=1e-3)
        np.testing.assert_allclose(silicon.get_stress(voigt=False), stress, rtol=0, atol=2e-6)
        agreement = np.abs(silicon.get_forces() - forces).max()
    (number,) = re.findall(r"Program PWSCF v\.(\S+)", (tmp_path / "pw.out").read_text())
    compatible(
        code="Quantum ESPRESSO",
        version=number,
        role="engine",
        transport="dials in, Unix socket",
        ran="LDA of Si2",
        against="pw.x alone",
        agreement=agreement,
    )


def test_a_structure_relaxes(daemon, silicon):
    with daemon.client().calculator("si-lda") as silicon.calc:
        assert BFGS(silicon, logfile=None).run(fmax=0.01, steps=30)
    assert silicon.get_distance(0, 1, mic=True) == pytest.approx(5.43 * np.sqrt(3) / 4, abs=0.005)


def test_cells_far_apart_have_their_own_plane_waves(daemon, silicon, tmp_path):
    """What a program chose for another session's cell, or long ago, plays no part."""
    with daemon.client().calculator("si-lda") as silicon.calc:
        silicon.get_potential_energy()
        silicon.set_cell(silicon.cell.array * 1.08, scale_atoms=True)
        far = silicon.get_potential_energy()
    energy, _, _ = of_pw_alone(silicon, tmp_path)
    assert far == pytest.approx(energy, abs=THRESHOLD)
