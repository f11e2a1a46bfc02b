"""Bad requests to a real daemon: each is refused with words that help, and only its own session feels it."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import pickle
import re
import shutil
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import (
    CalculationFailed,
    CalculatorSetupError,
    PropertyNotImplementedError,
)
from ase.calculators.emt import EMT
from ase.io.bundletrajectory import BundleTrajectory

from conftest import EMBEDDED_MODEL, RunningDaemon, daemons, sha256, stopped, wait_for
from rootstock_client import RootstockClient, RootstockError, ipi, runtime_dir
from rootstock_client.driver_side import DriverSide
from rootstock_client.errors import (
    DaemonNotFoundError,
    EvaluationError,
    InvalidInitError,
    InvalidStructureError,
    LimitError,
    ModelLoadError,
    UnknownElementError,
    UnknownModelError,
    UnsupportedError,
)
from rootstockd.supervision.supervisor import RETRY_AFTER


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=2)
    return atoms


@pytest.fixture
def bystander(daemon: RunningDaemon) -> Iterator[Atoms]:
    """Another session of the same model, which must not notice anything."""
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    before = atoms.get_forces()
    status = daemon.client().status()
    yield atoms
    atoms.calc.results.clear()
    np.testing.assert_array_equal(atoms.get_forces(), before)
    after = daemon.client().status()
    assert after["pid"] == status["pid"]
    restarts = {model["name"]: model["restarts"] for model in after["models"]}
    assert not any(restarts.values())
    assert not any(model["waiting"] for model in after["models"])


SLOPPY = """
import numpy as np
from ase.calculators.calculator import Calculator


class Sloppy(Calculator):
    implemented_properties = ["energy", "forces", "stress"]
    forces = np.zeros((1, 3))

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        self.forces[:] = -atoms.positions  # the same array for each result
        self.results.update(energy=float((atoms.positions**2).sum() / 2), forces=self.forces)
        if "stress" in properties:
            self.results["stress"] = np.ones(6)
"""


@pytest.fixture(scope="module")
def odd_calculators(runtime_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningDaemon]:
    """A daemon whose catalogue has ASE calculators with something the matter: water, lj and sloppy."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "sloppy.py").write_text(SLOPPY)
    catalogue = folder / "more.toml"
    calculators = {
        "water": "ase.calculators.tip3p:TIP3P",
        "lj": "ase.calculators.lj:LennardJones",
        "sloppy": "sloppy:Sloppy",
    }
    entry = '[{}]\nfamily = "ase"\narguments = {{ calculator = "{}" }}\n'
    catalogue.write_text("".join(entry.format(*item) for item in calculators.items()))
    with daemons(runtime_folder) as start:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
            daemon = start("--catalogue", str(catalogue))
        yield daemon


def failing(atoms: Atoms, client: RootstockClient, model: str = "emt", **options) -> RootstockError:
    atoms.calc = client.calculator(model, **options)
    with pytest.raises(RootstockError) as caught:
        atoms.get_potential_energy()
    return caught.value


def test_unknown_model(daemon: RunningDaemon, bystander) -> None:
    error = failing(copper(), daemon.client(), "mace-emt-smal")
    assert isinstance(error, UnknownModelError)
    assert "Did you mean mace-emt-small" in str(error)


@pytest.mark.parametrize("model", ["mace-emt-small", "emt"])
def test_unknown_element(daemon: RunningDaemon, bystander, model: str) -> None:
    error = failing(Atoms("CuFeU", positions=np.eye(3) * 3), daemon.client(), model)
    assert isinstance(error, UnknownElementError)
    assert "Fe, U" in error.message
    assert "Al, Ni, Cu" in error.hint


def test_a_placeholder_is_no_element(daemon: RunningDaemon, bystander) -> None:
    atoms = copper()
    atoms[2].symbol = "X"
    error = failing(atoms, daemon.client())
    assert error.message == 'atom 2 has the atomic number 0 ("X").'


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_positions_that_are_not_finite(daemon: RunningDaemon, bystander, bad: float) -> None:
    atoms = copper()
    atoms.positions[2, 1] = bad
    error = failing(atoms, daemon.client())
    assert isinstance(error, InvalidStructureError)
    assert "position of atom 2" in error.message
    atoms.positions[2, 1] = 1.8
    assert np.isfinite(atoms.get_potential_energy())  # the same session goes on


@pytest.mark.parametrize(
    ("cell", "pbc"),
    [
        (np.zeros((3, 3)), True),
        ([[1, 0, 0], [2, 0, 0], [0, 0, 1]], True),
        ([[1, 2, 3], [4, 5, 6], [7, 8, 9]], True),
        ([[1, 0, 0], [0, 0, 0], [0, 0, 1]], [True, True, False]),
        ([[np.nan, 0, 0], [0, 1, 0], [0, 0, 1]], True),
    ],
)
def test_cells_that_repeat_nothing(daemon: RunningDaemon, bystander, cell, pbc) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.pbc = pbc
    atoms.cell[:] = cell
    with pytest.raises(InvalidStructureError, match="cell|lattice vectors"):
        atoms.calc.get_property("energy", atoms)


@pytest.mark.parametrize("pbc", [True, [True, True, False], False])
def test_nanometres_taken_for_angstroms(daemon: RunningDaemon, bystander, pbc) -> None:
    """Before anything is allocated: a thousand times as dense, each atom has tens of thousands of neighbours."""
    atoms = copper() * (3, 3, 3)
    atoms.pbc = pbc
    right = atoms.copy()
    atoms.set_cell(atoms.cell / 10, scale_atoms=True)
    error = failing(atoms, daemon.client())
    assert isinstance(error, InvalidStructureError)
    assert "108 atoms have" in error.message and "at most 20" in error.message
    right.calc = daemon.client().calculator("emt")
    assert np.isfinite(right.get_potential_energy())


def test_an_atom_beyond_the_end_of_the_world(daemon: RunningDaemon, bystander) -> None:
    atoms = copper()
    atoms.pbc = False
    atoms.positions[1, 2] = -1.1e8
    assert "the position of atom 1 is" in failing(atoms, daemon.client()).message


def test_no_atoms(daemon: RunningDaemon, bystander) -> None:
    assert isinstance(failing(Atoms(), daemon.client()), InvalidStructureError)


def test_not_the_atoms_of_init(daemon: RunningDaemon, bystander) -> None:
    """POSDATA with another number of atoms: an ERROR, and the session goes on."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(daemon.socket))
        forces = np.zeros((4, 3))
        side = DriverSide(lambda natoms: memoryview(forces).cast("B"))

        def step(natoms: int):
            sock.sendall(ipi.posdata_head(np.eye(3) * 8, np.eye(3) / 8, natoms))
            sock.sendall((np.arange(3.0 * natoms).reshape(-1, 3) * 2).tobytes() + ipi.GETFORCE)
            side.expect(ipi.GETFORCE)
            while (message := side.next_message()) is None:
                side.received(sock.recv_into(side.get_buffer()))
            return message

        system = {"rootstock": 1, "model": "emt", "numbers": [29] * 4, "pbc": [False] * 3}
        sock.sendall(ipi.init_frame(json.dumps(system).encode()))
        for natoms in (5, 3, 0, 100_000):
            answer = step(natoms)
            assert isinstance(answer.error, InvalidStructureError)
            assert f"{natoms} atoms, INIT announced 4" in answer.error.message
        assert step(4).natoms == 4


def test_more_atoms_than_allowed(start_daemon) -> None:
    small = start_daemon("--max-atoms", "10")
    atoms = copper() * (2, 1, 2)
    assert isinstance(failing(atoms, small.client()), LimitError)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(small.socket))
        sock.sendall(ipi.init_frame(b'{"rootstock": 1, "model": "emt", "numbers": [29], "pbc": [false, false, false]}'))
        sock.sendall(ipi.posdata_head(np.eye(3), np.eye(3), 11))
        assert sock.recv(12) == ipi.ERROR
        (size,) = struct.unpack("<i", sock.recv(4))
        assert b"11 atoms" in sock.recv(size)
        assert sock.recv(1) == b""  # what follows can't be told from garbage


@pytest.mark.parametrize("what", ["uranium", "NaN", "gone"])
def test_who_lets_go_of_a_calculator_that_failed_has_ended_its_session(own_daemon: RunningDaemon, what: str) -> None:
    """At once, and not when Python next looks for cycles: a screening that skips what fails would collect sessions."""
    atoms = copper()
    atoms.calc = calculator = own_daemon.client(patience=0).calculator("emt")
    atoms.get_forces()
    if what == "uranium":
        atoms.numbers[0] = 92
    elif what == "NaN":
        atoms.positions[:2] = 0  # the model's own
    else:
        own_daemon.stop()
        atoms.rattle(0.01)
    gc.disable()
    try:
        with contextlib.suppress(RootstockError):
            atoms.get_forces()
            pytest.fail("it was evaluated")
        there = weakref.ref(calculator)
        del atoms, calculator
        assert there() is None
    finally:
        gc.enable()


def test_so_many_more_that_the_list_of_elements_is_too_long(start_daemon) -> None:
    """It is refused before it is read, and all the same the job hears why, at once."""
    small = start_daemon("--max-atoms", "10")
    for repeats in (30, 60):  # 108,000 and 864,000 atoms: what is sent in one go, and what is not
        atoms = copper() * (repeats, repeats, repeats)
        began = time.monotonic()
        error = failing(atoms, small.client(patience=100.0))
        assert isinstance(error, LimitError)
        assert re.search("an INIT of [0-9]+ bytes; this daemon takes 65586, for systems of up to 10 atoms", str(error))
        assert time.monotonic() - began < 30


def test_garbage(daemon: RunningDaemon, bystander) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(daemon.socket))
        sock.sendall(b"GET / HTTP/1.1\r\n\r\n")
        assert sock.recv(100) == b""


def test_an_option_of_another_kind(daemon: RunningDaemon, bystander) -> None:
    error = failing(copper(), daemon.client(), head=3)
    assert isinstance(error, InvalidInitError)
    assert "head" in error.message


def test_a_head_that_the_model_lacks(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("mace-emt-small", head="r2scan")
    with pytest.raises(PropertyNotImplementedError, match="no head 'r2scan'") as caught:
        atoms.get_potential_energy()
    assert isinstance(caught.value, UnsupportedError)


def test_a_property_that_the_model_lacks(odd_calculators: RunningDaemon) -> None:
    """ASE's TIP3P computes no stress: asking for it is an error, never zeros."""
    client = odd_calculators.client()
    water = Atoms("OH2", [[0, 0, 0], [0.9572, 0, 0], [-0.24, 0.9266, 0]], cell=[20, 20, 20], pbc=True)
    water.calc = client.calculator("water")
    energy = water.get_potential_energy()
    with pytest.raises(PropertyNotImplementedError, match="stress"):
        water.get_stress()
    water.positions += 0.1
    assert water.get_potential_energy() == pytest.approx(energy)  # having asked once does no harm


def test_stress_without_a_volume(daemon: RunningDaemon) -> None:
    atoms = Atoms("Cu2", [[0, 0, 0], [0, 0, 2.5]])
    atoms.calc = daemon.client().calculator("emt")
    with pytest.raises(PropertyNotImplementedError, match="periodic"):
        atoms.get_stress()


def test_model_files_that_are_missing_broken_or_something_else(start_daemon, tmp_path) -> None:
    truncated, other = tmp_path / "truncated.model", tmp_path / "other.model"
    truncated.write_bytes(EMBEDDED_MODEL.read_bytes()[:10_000])
    other.write_bytes(pickle.dumps({"not": "a model"}))
    shutil.copy(EMBEDDED_MODEL, tmp_path / "good.model")
    (tmp_path / "changed.model").write_bytes(EMBEDDED_MODEL.read_bytes() + b"!")
    (tmp_path / "more.toml").write_text(
        "\n".join(
            f'[{name}]\nfamily = "mace"\nweights = "{name}.model"\nsha256 = "{sha256(source)}"'
            for name, source in {
                "missing": EMBEDDED_MODEL,
                "truncated": truncated,
                "other": other,
                "good": EMBEDDED_MODEL,
                "changed": EMBEDDED_MODEL,
            }.items()
        )
        + '\n[nothing]\nfamily = "nothing"\n'
    )
    daemon = start_daemon("--catalogue", str(tmp_path / "more.toml"), "--model", "emt", "--model", "missing")
    client = daemon.client()
    for name in ("missing", "truncated", "other", "changed", "nothing"):
        error = failing(copper(), client, name)
        assert isinstance(error, ModelLoadError), error
        assert name in str(error)
        assert daemon.model(name)["state"] == "failed"
    atoms = copper()
    atoms.calc = client.calculator("good")
    assert np.isfinite(atoms.get_potential_energy())
    text = daemon.model("changed")["error"]
    assert text in daemon.run("status").stdout  # in a pipe, where lines may be of any length
    actual, expected = sha256(tmp_path / "changed.model"), sha256(EMBEDDED_MODEL)
    for word in (str(tmp_path / "changed.model"), actual, expected, "not loaded", f'sha256 = "{actual}"'):
        assert word in text


def test_a_refused_init_is_said_again(start_daemon, tmp_path) -> None:
    """What was refused for a reason that passes is taken when it has passed, by the same calculator."""
    pin = f'sha256 = "{sha256(EMBEDDED_MODEL)}"\n'
    (tmp_path / "more.toml").write_text(f'[later]\nfamily = "mace"\nweights = "later.model"\n{pin}')
    daemon = start_daemon("--catalogue", str(tmp_path / "more.toml"))
    atoms = copper()
    assert isinstance(failing(atoms, daemon.client(), "later"), ModelLoadError)
    shutil.copy(EMBEDDED_MODEL, tmp_path / "later.model")

    def taken() -> bool:
        with contextlib.suppress(ModelLoadError):
            return bool(np.isfinite(atoms.get_potential_energy()))
        return False

    wait_for(taken, timeout=3 * RETRY_AFTER)


def test_an_engine_that_gives_nan(odd_calculators: RunningDaemon) -> None:
    """Numbers that are none never reach a driver."""
    client = odd_calculators.client()
    atoms = crashing()
    error = failing(atoms, client, "lj")
    assert isinstance(error, EvaluationError)
    assert "NaN or infinite" in error.message
    atoms.positions[1, 2] = 1.5
    assert atoms.get_potential_energy() < 0


def crashing() -> Atoms:
    """An engine of Lennard-Jones gives NaN for it."""
    return Atoms("He2", [[0, 0, 0], [0, 0, 1e-160]])


def test_ase_knows_which_errors_are_its_own(odd_calculators: RunningDaemon, tmp_path: Path) -> None:
    """Scripts catch these, and so does ASE: a trajectory goes on without the results."""
    client = odd_calculators.client()
    flat = copper()
    flat.set_cell([[1, 0, 0], [2, 0, 0], [0, 0, 3]])
    for atoms, model, kind in (
        (crashing(), "lj", CalculationFailed),
        (flat, "emt", CalculationFailed),
        (Atoms("U"), "emt", CalculatorSetupError),
        (copper(), "no-such-model", CalculatorSetupError),
    ):
        with pytest.raises(kind):
            raise failing(atoms, client, model)
        assert isinstance(failing(atoms, client, model), RuntimeError)
    with client.calculator("lj") as calculator:
        atoms = crashing()
        atoms.calc = calculator
        trajectory = BundleTrajectory(str(tmp_path / "a.bundle"), "w", atoms)
        trajectory.write()
        trajectory.close()
    back = BundleTrajectory(str(tmp_path / "a.bundle"))[0]
    assert back.positions.tolist() == atoms.positions.tolist()


def test_a_daemon_that_is_gone_is_no_error_of_ases(tmp_path: Path) -> None:
    """A script that passes over structures that fail must not pass over all."""
    error = failing(copper(), RootstockClient(tmp_path / "none.sock"))
    assert isinstance(error, DaemonNotFoundError)
    assert not isinstance(error, RuntimeError)


IN_A_POOL = """
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from ase import Atoms
from ase.calculators.calculator import CalculationFailed


def energy(positions):
    from rootstock_client import RootstockClient

    atoms = Atoms("He2", positions)
    atoms.calc = RootstockClient(sys.argv[1]).calculator("lj")
    return atoms.get_potential_energy()


if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            pool.submit(energy, [[0, 0, 0], [0, 0, 1e-160]]).result()
        except CalculationFailed as error:
            print(type(error).__name__, error.code, "rootstock_client" in sys.modules, error.message)
"""


def test_an_error_of_ases_is_one_for_who_gets_it_from_another_process(
    odd_calculators: RunningDaemon, tmp_path: Path
) -> None:
    """Although nothing of ours was imported there."""
    script = tmp_path / "pool.py"
    script.write_text(IN_A_POOL)
    command = [sys.executable, str(script), str(odd_calculators.socket)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.startswith("EvaluationError evaluation True "), done.stderr


def test_no_daemon(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("ROOTSTOCKD_SOCKET", raising=False)
    monkeypatch.setattr(runtime_dir, "SYSTEM_DIR", tmp_path)  # this machine may have a daemon for all
    with pytest.raises(DaemonNotFoundError, match="`rootstockd start`"):
        RootstockClient()
    atoms = copper()
    atoms.calc = RootstockClient(tmp_path / "gone.sock").calculator("emt")
    with pytest.raises(DaemonNotFoundError, match="`rootstockd start`"):
        atoms.get_potential_energy()
    with pytest.raises(DaemonNotFoundError, match="gone"):
        RootstockClient(tmp_path / "gone.sock").status()


def test_a_calculator_that_is_careless_with_its_results(odd_calculators: RunningDaemon) -> None:
    """One array for all its results, and last time's left among this time's: no session sees another's numbers."""
    got = odd_calculators.batch("sloppy", [29], np.array([[[1.0, 0, 0]], [[5.0, 0, 0]]]))
    force = -units.Bohr * units.Bohr / units.Hartree  # of 1 eV/Å² over 1 Bohr, in Hartree/Bohr
    np.testing.assert_allclose(got[:, 0], [[force, 0, 0], [5 * force, 0, 0]], atol=1e-12)
    atoms = Atoms("Cu", [[1, 0, 0]], cell=[5, 5, 5], pbc=True)
    atoms.calc = odd_calculators.client().calculator("sloppy")
    atoms.get_stress()
    atoms.calc = odd_calculators.client().calculator("sloppy")
    atoms.get_forces()
    assert "stress" not in atoms.calc.results


def test_batch_mates_are_unharmed(daemon: RunningDaemon) -> None:
    """One structure that fails inside a batch of several: the others get their numbers."""
    good, bad = copper(), Atoms("Cu2", [[0, 0, 0], [0, 0, 0]])
    reference = copper()
    reference.calc = EMT()
    forces = reference.get_forces()

    def work(atoms: Atoms) -> None:
        atoms.calc = daemon.client().calculator("emt")
        if len(atoms) == len(bad):
            with pytest.raises(EvaluationError):
                atoms.get_forces()
        else:
            np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-9)

    before = daemon.model("emt")
    with ThreadPoolExecutor(6) as pool:
        with stopped(before["pid"]):
            jobs = [pool.submit(work, good.copy())]
            wait_for(lambda: daemon.model("emt")["batch_under_way"] == len(good))
            jobs += [pool.submit(work, atoms.copy()) for atoms in (good, good, bad, good, good)]
            wait_for(lambda: daemon.model("emt")["waiting"] == 5)
        for job in jobs:
            job.result()
    wait_for(lambda: daemon.model("emt")["evaluations"] == before["evaluations"] + len(jobs))
    assert daemon.model("emt")["batches"] == before["batches"] + 2
