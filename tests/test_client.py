"""What people do with calculators: pickle, fork, threads, changing structures, several properties."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import multiprocessing
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, fcc111
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from ase.calculators.test import gradient_test
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from ase.optimize import BFGS

from conftest import RunningDaemon, rootstockd, wait_for
from rootstock_client import RootstockClient, sockets
from rootstock_client.calculator import RootstockCalculator
from rootstock_client.connection import Connection
from rootstock_client.errors import InStepError, LimitError
from rootstock_client.snapshot import LARGE, Box, Snapshot
from rootstock_client.units import BOHR


def copper(seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=seed)
    return atoms


def emt(atoms: Atoms) -> Atoms:
    reference = atoms.copy()
    reference.calc = EMT()
    return reference


def same(atoms: Atoms) -> None:
    assert atoms.get_potential_energy() == pytest.approx(emt(atoms).get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), emt(atoms).get_forces(), atol=1e-9)


def evaluations(daemon: RunningDaemon) -> int:
    return daemon.model("emt")["evaluations"]


def sessions(daemon: RunningDaemon) -> int:
    """How many sessions this process has open, as far as the daemon has noticed."""
    return sum(session["pid"] == os.getpid() for session in daemon.client().status()["sessions"])


def test_models_and_status(daemon: RunningDaemon) -> None:
    client = daemon.client()
    models = {model["name"]: model for model in client.models()}
    assert models["mace-emt-small"]["elements"] == ["Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au"]
    assert models["mace-emt-small"]["state"] == "ready"
    assert models["lj"]["state"] == "cold"
    assert client.status()["state"] == "ready"


def test_one_evaluation_serves_all_properties(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    before = evaluations(daemon)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    assert atoms.get_potential_energy(force_consistent=True) == energy
    np.testing.assert_array_equal(atoms.get_forces(), forces)
    assert evaluations(daemon) == before + 1


def test_a_step_of_a_thousand_atoms_is_one_sendmsg_and_one_recv_into(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    class Counting(sockets._Socket):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith(("send", "recv")):
                calls.append(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(sockets, "_Socket", Counting)
    atoms = bulk("Cu", cubic=True) * (5, 5, 10)
    with daemon.client().calculator("emt", properties=["stress", "forces"]) as atoms.calc:
        atoms.get_forces()  # INIT goes with the first
        assert calls == ["sendmsg", "recv_into"]
        for step in range(5):
            calls.clear()
            atoms.rattle(0.01, seed=step)
            atoms.get_forces()
            assert calls == ["sendmsg", "recv_into"]


def test_stress_is_computed_only_when_it_is_asked_for(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    before = evaluations(daemon)
    atoms.get_forces()
    assert "stress" not in atoms.calc.results
    atoms.get_stress()  # a second evaluation
    for step in range(3):  # and now it comes with each new structure, in one evaluation
        atoms.rattle(0.01, seed=step)
        np.testing.assert_allclose(atoms.get_forces(), emt(atoms).get_forces(), atol=1e-9)
        np.testing.assert_allclose(atoms.get_stress(), emt(atoms).get_stress(), atol=1e-9)
    assert evaluations(daemon) == before + 5
    atoms.rattle(0.01, seed=9)
    atoms.get_forces()
    atoms.rattle(0.01, seed=10)
    atoms.get_forces()  # nobody asked for the last one's
    assert "stress" not in atoms.calc.results


def test_what_was_given_out_stays_when_more_is_asked_for(daemon: RunningDaemon) -> None:
    """A session's first answer is mace-torch's, and what answers next differs by some µeV an atom in float32."""
    atoms = bulk("Cu", cubic=True) * (3, 3, 3)
    atoms.rattle(0.1, seed=1)
    atoms.calc = daemon.client().calculator("mace-emt-small", dtype="float32")
    energy, forces, first = atoms.get_potential_energy(), atoms.get_forces(), atoms.calc.backend
    stress = atoms.get_stress()
    energies = atoms.get_potential_energies()
    assert first != atoms.calc.backend
    assert atoms.get_potential_energy() == energy
    np.testing.assert_array_equal(atoms.get_forces(), forces)
    np.testing.assert_array_equal(atoms.get_stress(), stress)
    np.testing.assert_allclose(sum(energies), energy, atol=2e-3)
    atoms.calc.calculate(atoms)  # who says so has it all anew
    assert atoms.get_potential_energy() != energy


def test_properties_that_come_with_each_evaluation(daemon: RunningDaemon, tmp_path: Path) -> None:
    """For workflows that write down what a calculator has."""
    atoms = copper()
    calculator = daemon.client().calculator("emt", properties=["stress", "energies", "forces"])
    atoms.calc = calculator
    before = evaluations(daemon)
    with Trajectory(tmp_path / "md.traj", "w", atoms) as trajectory:
        for step in range(3):
            atoms.rattle(0.01, seed=step)
            atoms.get_potential_energy()
            trajectory.write()
    assert evaluations(daemon) == before + 3
    with Trajectory(tmp_path / "md.traj") as trajectory:
        for frame in trajectory:
            np.testing.assert_allclose(frame.get_stress(), emt(frame).get_stress(), atol=1e-9)
            np.testing.assert_allclose(frame.get_potential_energies(), emt(frame).get_potential_energies(), atol=1e-9)
    atoms.pbc = False
    atoms.get_potential_energy()  # there is none, and nobody has asked for it by name
    assert calculator.results.keys() == {"energy", "free_energy", "forces", "energies"}
    again = daemon.client().calculator(**json.loads(json.dumps(calculator.todict())))
    assert again.parameters == calculator.parameters
    assert "properties" not in daemon.client().calculator("emt").todict()
    calculator.set(properties=())
    atoms.get_potential_energy()
    assert calculator.results.keys() == {"energy", "free_energy", "forces"}
    for wrong in ("stress", ["dipole"], 3):
        with pytest.raises(TypeError):
            daemon.client().calculator("emt", properties=wrong)


def test_what_is_only_written_is_not_asked_for(daemon: RunningDaemon, tmp_path: Path) -> None:
    """ASE's writers take what is there; that must not keep it coming."""
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.get_stress()
    with Trajectory(tmp_path / "md.traj", "w", atoms) as trajectory:
        for step in range(4):
            trajectory.write()
            atoms.rattle(0.01, seed=step)
            atoms.get_forces()
    assert "stress" not in atoms.calc.results
    with Trajectory(tmp_path / "md.traj") as trajectory:
        first, *_, last = trajectory
    assert "stress" in first.calc.results
    assert {"energy", "forces"} <= last.calc.results.keys()
    assert "stress" not in last.calc.results


def test_results_belong_to_the_caller(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.get_forces()[:] = 0
    same(atoms)


@pytest.mark.parametrize("model", ["emt", "mace-emt-small"])
def test_forces_are_the_gradient(daemon: RunningDaemon, model: str) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator(model)
    analytic, numeric = gradient_test(atoms, [0, 3])
    np.testing.assert_allclose(analytic, numeric, atol=1e-5)


def test_everything_that_may_change_does(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    same(atoms)
    atoms.numbers[0] = 79
    same(atoms)
    atoms.set_cell(atoms.cell.array * 1.02, scale_atoms=True)
    same(atoms)
    atoms.pbc = [True, False, True]
    same(atoms)
    atoms.set_cell(atoms.cell.array[[1, 0, 2]])  # left-handed
    same(atoms)
    atoms += Atoms("Cu", [[1.0, 1.0, 6.0]])
    same(atoms)
    del atoms[2]
    same(atoms)
    other = bulk("Al")
    other.calc = atoms.calc
    same(other)
    same(atoms)


def test_what_is_periodic_no_more_has_no_stress(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    for pbc in (True, [True, False, True]):
        atoms.pbc = pbc
        np.testing.assert_allclose(atoms.get_stress(), emt(atoms).get_stress(), atol=1e-9)
        atoms.pbc = False
        with pytest.raises(NotImplementedError, match="stress needs a periodic system"):
            atoms.get_stress()


def test_charge_and_spin_start_a_new_evaluation_and_other_info_does_not(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.get_forces()
    before = evaluations(daemon)
    atoms.info["comment"] = "nothing"
    atoms.get_forces()
    assert evaluations(daemon) == before
    for key, value in (("charge", 0), ("spin", 1), ("spin", 0)):
        atoms.info[key] = value
        atoms.get_forces()
    assert evaluations(daemon) == before + 3
    assert Snapshot(atoms).spin is None and Snapshot(atoms).charge == 0, "no multiplicity is 0"
    for model in ("emt", "mace-emt-small"):
        atoms.calc = daemon.client().calculator(model)
        for key, value in (("charge", 1), ("spin", 2), ("charge", -1)):
            atoms.info = {key: value}
            with pytest.raises(NotImplementedError, match=f"{model}.*has no notion of {key}"):
                atoms.get_forces()


@pytest.mark.parametrize("charge", ["one", np.nan, [1]])
def test_a_charge_that_is_none(daemon: RunningDaemon, charge: object) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    atoms.info["charge"] = charge
    with pytest.raises(ValueError, match="atoms.info\\['charge'\\] is"):
        atoms.get_forces()
    for none in (np.float32(0), np.zeros(1)):
        atoms.info["charge"] = none
        same(atoms)


def test_the_calculator_remembers_its_atoms(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.info["spin"] = 1
    atoms.positions = np.asfortranarray(atoms.positions)
    calculator = atoms.calc = daemon.client().calculator("emt")
    assert calculator.atoms is None
    same(atoms)
    assert calculator.atoms == atoms
    assert calculator.atoms.info == {"spin": 1}
    assert calculator.check_state(atoms) == []
    assert not calculator.calculation_required(atoms, ["energy"])
    atoms.positions[0, 0] += 1e-13
    assert calculator.check_state(atoms) == ["positions"]
    calculator.reset()
    same(atoms)


@pytest.mark.parametrize("natoms", [4, LARGE // 8])
def test_a_snapshot_tells_changes_to_the_last_bit(natoms: int) -> None:
    """Whether it is kept as bytes or, where there are many, as arrays."""
    atoms = Atoms(np.full(natoms, 29), positions=np.zeros((natoms, 3)), cell=[9, 9, 9])
    atoms.positions = np.asfortranarray(atoms.positions)
    before = Snapshot(atoms)
    assert Snapshot(atoms).changes(before) == []
    assert before.atoms() == atoms
    for change in (-0.0, np.nextafter(0, 1)):
        atoms.positions[-1, 2] = change
        assert Snapshot(atoms).changes(before) == ["positions"]
    np.testing.assert_array_equal(before.positions, 0)
    atoms.positions[-1, 2] = 0
    atoms.numbers[-1] = 47
    assert Snapshot(atoms).changes(before) == ["numbers"]
    np.testing.assert_array_equal(before.atomic_numbers, 29)
    assert Snapshot(atoms[:-1]).changes(before) == ["positions", "numbers"]
    assert Snapshot(atoms[:2]).changes(before) == ["positions", "numbers"]


def test_pickled_and_copied(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt", dtype="float64")
    same(atoms)
    clone = pickle.loads(pickle.dumps(atoms.calc))
    assert clone.parameters == atoms.calc.parameters
    for calculator in (clone, copy.deepcopy(atoms.calc)):
        other = copper(seed=5)
        other.calc = calculator
        same(other)
    same(atoms)
    before = evaluations(daemon)
    shallow = atoms.copy()
    shallow.calc = copy.copy(atoms.calc)
    for other in (pickle.loads(pickle.dumps(atoms)), copy.deepcopy(atoms), shallow):
        assert not other.calc.calculation_required(other, ["energy", "forces"])
        np.testing.assert_array_equal(other.get_forces(), atoms.get_forces())
        other.calc.results.clear()
    assert evaluations(daemon) == before
    assert atoms.calc.results
    client = pickle.loads(pickle.dumps(daemon.client()))
    assert client.status()["state"] == "ready"


def in_child(atoms: Atoms) -> np.ndarray:
    atoms.rattle(0.01, seed=3)
    return atoms.get_forces()


def test_spawned_processes(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(in_child, [atoms, atoms])
    in_child(atoms)
    for forces in results:
        np.testing.assert_allclose(forces, emt(atoms).get_forces(), atol=1e-9)


FORKING = """
import os, sys
import numpy as np
from ase.build import bulk
from ase.calculators.calculator import Calculator
from ase.calculators.emt import EMT
from rootstock_client import RootstockClient

atoms = bulk("Cu", cubic=True)
atoms.calc = RootstockClient(sys.argv[1]).calculator("emt")
atoms.get_forces()
child = os.fork()  # the session is open on both sides now
for step in range(50):
    atoms.rattle(0.01, seed=1000 * (child == 0) + step)
    reference = atoms.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_fork_in_the_middle(daemon: RunningDaemon) -> None:
    subprocess.run([sys.executable, "-c", FORKING, str(daemon.socket)], check=True, timeout=60)


FORKING_IN_A_STEP = """
import os, sys, threading
from ase.build import bulk
from rootstock_client import RootstockClient

atoms = bulk("Cu", cubic=True)
calculator = atoms.calc = RootstockClient(sys.argv[1]).calculator("emt")
atoms.get_forces()
with calculator._lock, calculator._connection._lock:  # as another thread in the middle of its step has them
    child = os.fork()
    if child == 0:
        thread = threading.Thread(target=lambda: (atoms.rattle(0.1), eval(sys.argv[2])), daemon=True)
        thread.start()
        thread.join(20)
        os._exit(thread.is_alive())
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.parametrize("what", ["atoms.get_forces()", "calculator.calculate(atoms)", "calculator.close()"])
def test_fork_while_another_thread_is_in_a_step(daemon: RunningDaemon, what: str) -> None:
    subprocess.run([sys.executable, "-c", FORKING_IN_A_STEP, str(daemon.socket), what], check=True, timeout=60)


FORKING_BY_A_SIGNAL = """
import os, signal, sys, threading, time
import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT
from rootstock_client import RootstockClient

calculator = RootstockClient(sys.argv[1], patience=5).calculator("emt")
atoms = bulk("Cu", cubic=True) * (6, 6, 6)
calculator.get_property("energy", atoms)
child, forked_in_a_step = None, False


def fork(*_):
    global child, forked_in_a_step
    if child is None:
        child, forked_in_a_step = os.fork(), calculator._connection._in_step


signal.signal(signal.SIGUSR1, fork)
threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGUSR1)).start()
step = 0
while child is None or step < 10:
    step += child is not None
    atoms.rattle(0.01, seed=1000 * (child == 0) + step)
    reference = atoms.copy()
    forces = calculator.get_property("forces", atoms)
    reference.calc = EMT()
    np.testing.assert_allclose(forces, reference.get_forces(), atol=1e-9)
if child:
    _, status = os.waitpid(child, 0)
    print(forked_in_a_step)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_signal_that_forks_in_a_step(daemon: RunningDaemon) -> None:
    """As programs do that save their state so: both processes go on, and each reads what is for it alone."""
    in_a_step = 0
    for moment in range(10):
        command = [sys.executable, "-c", FORKING_BY_A_SIGNAL, str(daemon.socket), str(0.2 + 0.011 * moment)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
        in_a_step += done.stdout == "True\n"
        if in_a_step == 3:
            return
    assert in_a_step


def test_close_ends_the_session_though_a_child_lives(daemon: RunningDaemon) -> None:
    before, calculator = sessions(daemon), daemon.client().calculator("emt")
    calculator.get_property("energy", copper())
    with contextlib.closing(multiprocessing.get_context("fork").Pool(1)) as pool:
        pool.apply(os.getpid)
        calculator.close()
        wait_for(lambda: sessions(daemon) == before)
    pool.join()


def test_threads_that_share_a_calculator_in_calculate(daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another begins in the middle of a step, and each structure goes off with its own cell all the same."""
    sent, evaluate, fits = [], Connection.evaluate, Box.fits
    shared = daemon.client().calculator("emt")

    def pair(edge: float) -> Atoms:
        return Atoms("Cu2", [[0, 0, 0], [edge / 2, 0, 0]], cell=[edge] * 3, pbc=True)

    def look(self: Connection, init: bytes, head: bytes, positions: Any, forces: Any) -> Any:
        sent.append((np.frombuffer(head, "<f8", 1, 12)[0] * BOHR, positions[1, 0] * BOHR))
        return evaluate(self, init, head, positions, forces)

    def give_way(self: Box, snapshot: Any) -> bool:
        if not other.ident:
            other.start()
            other.join(0.5)
        return fits(self, snapshot)

    monkeypatch.setattr(Connection, "evaluate", look)
    other = threading.Thread(target=shared.calculate, args=(pair(9.0),))
    shared.calculate(pair(5.0))
    monkeypatch.setattr(Box, "fits", give_way)
    shared.calculate(pair(5.0))
    other.join()
    assert [(round(edge, 6), round(x, 6)) for edge, x in sent] == [(5.0, 2.5), (5.0, 2.5), (9.0, 4.5)]


def test_the_backend_is_that_of_the_last_result(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("mace-emt-small")
    said = []
    for step in range(6):
        atoms.rattle(0.01, seed=step)
        atoms.pbc = step < 3
        atoms.get_potential_energies() if step == 2 else atoms.get_forces()
        said.append(atoms.calc.backend)
    assert said == ["mace-torch", "fused", "fused", "mace-torch", "fused", "fused"]


def test_another_model_by_set(daemon: RunningDaemon) -> None:
    atoms = copper()
    atoms.calc = daemon.client().calculator("mace-emt-small")
    before = atoms.get_potential_energy()
    assert atoms.calc.backend == "mace-torch"
    atoms.calc.set(model="emt")
    same(atoms)
    assert atoms.calc.backend == "EMT"
    assert atoms.get_potential_energy() != before


def test_what_is_set_is_what_counts(daemon: RunningDaemon) -> None:
    """Of the calculator itself and not of its copies; as the constructor takes it; whatever becomes of it later."""
    atoms = copper()
    atoms.calc = calculator = daemon.client().calculator("emt")
    other = copy.copy(calculator)
    other.set(model="mace-emt-small", dtype=np.float64, exact=np.True_, tolerance=np.float32(0.5))
    same(atoms)
    assert (calculator.parameters["model"], other.parameters["dtype"]) == ("emt", "float64")
    corrected = {"xc": "pbe"}
    calculator.set(dispersion=corrected)
    first = atoms.get_potential_energy()
    assert first != emt(atoms).get_potential_energy()
    corrected["xc"] = "b3lyp"
    assert atoms.get_potential_energy() == first
    calculator.set(dispersion=corrected)
    assert atoms.get_potential_energy() != first
    for wrong, words in (
        ({"pbc": True}, "no parameter pbc"),
        ({"exact": "no"}, "exact is True or False"),
        ({"model": None}, "model is a name from the catalogue, such as .*, not None"),
    ):
        with pytest.raises(TypeError, match=words):
            calculator.set(**wrong)


@pytest.mark.parametrize("dtype", ["blah", "float16", np.float16, 32])
def test_a_dtype_that_there_is_none_of(daemon: RunningDaemon, dtype: Any) -> None:
    """Said as the calculator is made, whether numpy knows it or not."""
    with pytest.raises(TypeError, match=f"dtype is one of float32, float64, not {re.escape(repr(dtype))}"):
        daemon.client().calculator("emt", dtype=dtype)


def energy(calculator: Calculator) -> float:
    return float(calculator.get_property("energy", copper()))


def test_too_many_files(daemon: RunningDaemon) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    calculators = [daemon.client().calculator("emt") for _ in range(40)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        with pytest.raises(LimitError, match="(?s)as many files open as it may.*share a calculator"):
            list(map(energy, calculators))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for calculator in calculators:
            calculator.close()


def test_threads_share_a_client_and_a_calculator(daemon: RunningDaemon) -> None:
    client = daemon.client()
    shared = client.calculator("emt")
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            atoms = copper(seed=number)
            atoms.calc = shared if number % 2 else client.calculator("emt")
            for step in range(20):
                atoms.rattle(0.02, seed=step)
                np.testing.assert_allclose(atoms.get_forces(), emt(atoms).get_forces(), atol=1e-9)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_sessions_close_with_their_calculators(daemon: RunningDaemon) -> None:
    gc.collect()
    before = sessions(daemon)
    client = daemon.client()
    atoms = copper()
    atoms.calc = client.calculator("emt")
    same(atoms)
    assert sessions(daemon) == before + 1
    gc.disable()
    try:
        atoms.calc = None  # the last reference: at once, not when the garbage collector next runs
        wait_for(lambda: sessions(daemon) == before)
    finally:
        gc.enable()
    with client.calculator("emt") as calculator:
        atoms.calc = calculator
        same(atoms)
    wait_for(lambda: sessions(daemon) == before)
    with client:
        same(atoms)  # a closed calculator opens a new session when it is used
        atoms.rattle(0.01)
        same(atoms)
        assert sessions(daemon) == before + 1
    wait_for(lambda: sessions(daemon) == before)


def test_an_interrupted_step_does_not_leave_its_answer_to_the_next(daemon: RunningDaemon) -> None:
    atoms = copper()
    calculator = atoms.calc = daemon.client().calculator("emt")
    same(atoms)
    receive = calculator._connection._receive

    def interrupted(sock):
        calculator._connection._receive = receive
        raise KeyboardInterrupt

    calculator._connection._receive = interrupted
    atoms.rattle(0.1, seed=4)
    with pytest.raises(KeyboardInterrupt):
        atoms.get_forces()
    atoms.rattle(0.1, seed=5)
    same(atoms)


INSIDE_A_STEP = """
import copy, gc, os, signal, sys, threading
import numpy as np
from ase.build import bulk
from ase.calculators.emt import EMT
from rootstock_client import RootstockClient
from rootstock_client.errors import InStepError

client = RootstockClient(sys.argv[1])
atoms = bulk("Cu", cubic=True)
calculator = atoms.calc = client.calculator("emt")
sharing = client.calculator("emt")
sharing.share_session(calculator)
atoms.get_stress()
worker = next(model["pid"] for model in client.status()["models"] if model["name"] == "emt")
other = atoms.copy()
other.rattle(0.2, seed=3)
called = []

def inside(*_):
    called.append(True)
    try:
        print(eval(sys.argv[2]))
    except InStepError as error:
        print("refused:", error.message)
    finally:
        os.kill(worker, signal.SIGCONT)

def by_a_copy(structure):
    os.kill(worker, signal.SIGCONT)
    structure.calc = copy.copy(calculator)
    check(structure)

class Finalized:
    def __del__(self):
        inside()

def check(structure):
    reference = structure.copy()
    reference.calc = EMT()
    np.testing.assert_allclose(structure.get_forces(), reference.get_forces(), atol=1e-9)

if sys.argv[3] == "signal":
    signal.signal(signal.SIGUSR1, inside)
else:
    def collect(*_):
        cycle = Finalized()
        cycle.itself = cycle
        del cycle
        gc.collect()
    signal.signal(signal.SIGUSR1, collect)
atoms.rattle(0.1, seed=1)
os.kill(worker, signal.SIGSTOP)
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
try:
    check(atoms)
    assert "stress" in calculator.results, "what was asked for at the last step is not forgotten"
    print("went on")
except InStepError as error:
    print("lost:", error.message)
assert called
for seed in (2, 3):
    check(atoms)
    atoms.rattle(0.1, seed=seed)
"""


@pytest.mark.parametrize(
    ("how", "what", "said"),
    [
        ("signal", "atoms.get_potential_energy()", "refused: .*\nwent on\n"),
        ("signal", "calculator.calculate(other)", "refused: .*\nwent on\n"),
        ("signal", "sharing.get_property('energy', other)", "refused: .*\nwent on\n"),
        ("finalizer", "calculator.get_property('energy', other)", "refused: .*\nwent on\n"),
        ("signal", "calculator.get_property('energy', other, allow_calculation=False)", "None\nwent on\n"),
        ("signal", "by_a_copy(other)", "None\nwent on\n"),
        ("signal", "calculator.set(model='noop')", "refused: .*\nwent on\n"),
        ("signal", "calculator.close()", "None\nlost: .* was closed in the middle of a step.*\n"),
        ("finalizer", "client.close()", "None\nlost: .* was closed in the middle of a step.*\n"),
    ],
)
def test_what_runs_inside_a_step(daemon: RunningDaemon, how: str, what: str, said: str) -> None:
    """A signal's handler, or a finalizer: it can't wait for the step, which can't go on meanwhile."""
    command = [sys.executable, "-c", INSIDE_A_STEP, str(daemon.socket), what, how]
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    finally:
        os.kill(daemon.model("emt")["pid"], signal.SIGCONT)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(said, done.stdout), done.stdout


def test_a_step_sends_its_own_system_whatever_runs_inside_it(
    daemon: RunningDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler may come while the system is being described, too."""
    atoms, other = copper(), bulk("Ag", cubic=True)
    calculator = atoms.calc = daemon.client().calculator("emt")
    chosen, refused = RootstockCalculator._chosen, []

    def inside(settings: dict[str, Any]) -> Any:
        monkeypatch.undo()
        with pytest.raises(InStepError, match="in the middle of a step"):
            calculator.get_property("energy", other)
        refused.append(True)
        return chosen(settings)

    monkeypatch.setattr(RootstockCalculator, "_chosen", staticmethod(inside))
    same(atoms)
    assert refused


def test_parameters_that_are_set_again_go_with_the_model_that_is_set(daemon: RunningDaemon) -> None:
    atoms = copper()
    calculator = atoms.calc = daemon.client().calculator("emt")
    same(atoms)
    assert calculator.fingerprint
    calculator.set(model="noop")
    assert calculator.fingerprint is None and "fingerprint" not in calculator.todict()
    calculator.set(**calculator.parameters)
    assert atoms.get_potential_energy() == 0 and calculator.fingerprint


def test_relaxation_with_variable_cell_takes_one_evaluation_a_step(daemon: RunningDaemon, tmp_path: Path) -> None:
    atoms = copper()
    atoms.set_cell(atoms.cell.array * 1.03, scale_atoms=True)
    atoms.calc = daemon.client().calculator("emt")
    before = evaluations(daemon)
    optimizer = BFGS(FrechetCellFilter(atoms), trajectory=str(tmp_path / "relax.traj"), logfile=None)
    optimizer.run(fmax=0.01, steps=100)
    assert optimizer.converged()
    # the first structure is evaluated again when its stress is asked for; a trajectory asks for nothing new
    assert evaluations(daemon) - before <= optimizer.nsteps + 2
    with Trajectory(tmp_path / "relax.traj") as trajectory:
        last = trajectory[-1]
    assert last.get_potential_energy() == pytest.approx(atoms.get_potential_energy())
    np.testing.assert_allclose(last.get_stress(), emt(atoms).get_stress(), atol=1e-6)


def test_slab_stress_uses_the_cell_it_has(daemon: RunningDaemon) -> None:
    atoms = fcc111("Cu", (1, 1, 3), vacuum=6)
    atoms.calc = daemon.client().calculator("emt")
    np.testing.assert_allclose(atoms.get_stress(), emt(atoms).get_stress(), atol=1e-9)


def test_found_by_environment_and_by_runtime_directory(daemon: RunningDaemon, monkeypatch, runtime_folder) -> None:
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", str(daemon.socket))
    assert RootstockClient().socket == daemon.socket
    monkeypatch.delenv("ROOTSTOCKD_SOCKET")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime_folder))
    home = runtime_folder / "rootstockd"
    home.mkdir(mode=0o700)
    (home / "rootstockd.sock").symlink_to(daemon.socket)
    (home / "rootstockd.control").symlink_to(daemon.socket.with_suffix(".control"))
    assert RootstockClient().status()["pid"] == daemon.client().status()["pid"]
    atoms = copper()
    with RootstockCalculator("emt") as atoms.calc:  # as codes make it that know a class and its arguments
        assert np.isfinite(atoms.get_potential_energy())
    assert rootstockd("status").stdout.startswith("rootstockd ")


def test_errors_do_without_ase() -> None:
    """The daemon and commands have them, and ASE takes longer to import than most commands."""
    code = "import sys, rootstock_client.errors, rootstockd.cli.attach, rootstock_client.attachment\n"
    code += "assert 'ase.calculators.calculator' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_the_client_needs_numpy_and_ase_only() -> None:
    """Its modules import nothing of the daemon, and no third package but numpy and ASE with what that needs."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "from rootstock_client import RootstockClient\n"
        "bare = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "import ase.calculators.calculator, ase.stress\n"
        "with_ase = {name.partition('.')[0] for name in sys.modules}\n"
        "import rootstock_client.calculator\n"
        "more = {name.partition('.')[0] for name in sys.modules} - with_ase\n"
        "third = {n for n in bare if n not in sys.stdlib_module_names and not n.startswith('_')}\n"
        "assert third <= {'rootstock_client', 'numpy'}, third\n"
        "assert more <= {'rootstock_client', 'binascii'}, more\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
