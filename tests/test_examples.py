"""The scripts in examples/ run, each as it would be copied, and what they find is right."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.build import bulk

from conftest import RunningDaemon
from rootstock_client.errors import ModelChangedError

EXAMPLES = Path(__file__).parent.parent / "examples"
ASES_OWN = "ignore:Setting the shape on a NumPy array"
"""What ASE 3.29 has numpy 2.5 warn of."""
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(daemon: RunningDaemon, tmp_path: Path) -> Run:
    """Run one in a folder of its own, with warnings as errors."""

    def run(script: str, *options: str) -> dict[str, Any]:
        found = tmp_path / "found.json"
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", ASES_OWN, EXAMPLES / script, "--json", found, *options],
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "ROOTSTOCKD_SOCKET": str(daemon.socket),
            },
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == found.read_text()
        return json.loads(found.read_text())

    return run


def test_every_example_is_run_and_listed():
    """`make demo` runs demo.py; the others that are not here have a cluster or LAMMPS where they are tested."""
    scripts = {path.name for path in EXAMPLES.glob("*.py")} - {"demo.py"}
    assert scripts - {"screening_dask.py", "lammps_md.py"} <= set(Path(__file__).read_text().split('"'))
    listed = re.findall(r"^\| \[`(\w+\.py)`\]", (EXAMPLES.parent / "docs/tutorial.md").read_text(), re.MULTILINE)
    assert set(listed) == scripts


def test_md(run: Run):
    found = run("md_nve.py")
    assert abs(found["drift_mev_per_atom_per_ps"]) < 0.5
    assert 0 < found["worst_deviation_mev_per_atom"] < 1


def test_relaxation(run: Run):
    found = run("relax_alloy.py")
    assert found["lattice_constant_a"] == pytest.approx(found["reference_lattice_constant_a"], rel=5e-3)


def test_equation_of_state(run: Run):
    found = run("equation_of_state.py")
    assert found["lattice_constant_a"] == pytest.approx(found["reference_lattice_constant_a"], rel=5e-3)
    assert found["bulk_modulus_gpa"] == pytest.approx(found["reference_bulk_modulus_gpa"], rel=0.05)


def test_barrier(run: Run):
    exact = run("neb_vacancy.py", "--model", "emt")
    assert exact["barrier_ev"] == pytest.approx(exact["reference_barrier_ev"], abs=1e-4)
    found = run("neb_vacancy.py")
    assert found["barrier_ev"] == pytest.approx(found["reference_barrier_ev"], abs=0.06)
    assert found["reaction_energy_ev"] == pytest.approx(0, abs=1e-4)


def test_a_band_does_not_go_on_without_an_image(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch):
    """As ASE's own does with `parallel=True`, with whatever lay in the array."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example = importlib.import_module("neb_vacancy")
    client = daemon.client()
    images = [bulk("Cu") for _ in range(4)]
    for image in images:
        image.calc = client.calculator("emt")
    band = example.ParallelNEB(images, method="improvedtangent")
    assert band.get_forces().shape == (2, 3)
    images[1].calc.fingerprint = "0" * 16
    band.set_positions(band.get_positions() + 0.01)
    with pytest.raises(ModelChangedError):
        band.get_forces()


def test_phonons(run: Run):
    exact = run("phonons_phonopy.py", "--model", "emt")
    for name in ("transverse_X_thz", "longitudinal_X_thz", "transverse_L_thz", "longitudinal_L_thz"):
        assert exact[name] == pytest.approx(exact[f"reference_{name}"], abs=1e-3)
    found = run("phonons_phonopy.py")
    for name in ("transverse_X_thz", "longitudinal_X_thz", "transverse_L_thz", "longitudinal_L_thz"):
        assert found[name] == pytest.approx(found[f"reference_{name}"], abs=0.3)
    # the harmonic crystal's, which is 3 R where it is hot
    assert 22 < found["heat_capacity_j_per_k_mol"] < 3 * 8.314


def test_path_integral(run: Run):
    found = run("pimd_ipi.py", "--steps", "60", "--beads", "8")
    assert found["drift_mev_per_atom"] < 1
    # copper is far below its Debye temperature
    assert 1.2 < found["kinetic_ev_per_atom"] / found["classical_ev_per_atom"] < 1.8
