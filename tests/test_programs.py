"""Programs that dial in (family `ipi`): right ones, fakes of those that can't be had here, and bad ones."""

import contextlib
import hashlib
import os
import re
import signal
import socket
import sys
import threading
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import tomlkit
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT

from conftest import wait_for
from documented import documented
from rootstock_client.errors import EvaluationError, InvalidStructureError, ModelLoadError, RootstockError
from rootstock_client.units import BOHR, HARTREE
from rootstockd.worker.engines.ipi.program import SOCKETS_VARIABLE

STAND_IN = Path(__file__).parent / "programs/stand_in.py"
SPRING = HARTREE / BOHR**2
WAYS = ("right", "tidy", "dies", "garbage", "twice", "mortal", "choosy", "slain")
ANSWERS = ("nan", "infinite", "short", "long", "surplus")


def python(*arguments):
    return [sys.executable, "-S", str(STAND_IN), *arguments]


def stand_in(way, **arguments):
    arguments = {"command": python(way, "{{socket}}"), "pbc": ["TTT", "FFF"], **arguments}
    return {"family": "ipi", "elements": ["H", "O", "Cu"], "arguments": arguments}


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("species")
    species = {symbol: folder / symbol for symbol in ("H", "O", "Si")}
    for symbol, path in species.items():
        path.write_text(f"species {symbol}\n")
    potcars = {symbol: folder / f"POTCAR-{symbol}" for symbol in species}
    for symbol, path in potcars.items():
        path.write_text(f"{symbol}\n")
    return {
        **{way: stand_in(way) for way in (*WAYS, *ANSWERS)},
        "one": stand_in("right", programs=1),
        "electrons": stand_in(
            "electrons", command=python("electrons"), programs=8, files={"input": "{{socket}} {{charge}} {{spin}}"}
        ),
        "meet": stand_in("meet", programs=3, parallel=2),
        "no-virial": stand_in("no virial", stress=True),
        "never": stand_in("never", start_timeout=0.5),
        "ranks": {**stand_in("ranks"), "hang_timeout": 60},
        "hangs": {**stand_in("hangs"), "hang_timeout": 2},
        "denied": stand_in("denied", files={"input": ""}, variables={"VICTIM": str(os.getpid()), "S": "{{socket}}"}),
        "missing": stand_in("right", command=["no-such-program", "{{socket}}"]),
        "other": stand_in("right", sha256="0" * 64),
        "aims": documented(
            "water-pbe",
            command=python("aims"),
            element={symbol: {"species": str(species[symbol])} for symbol in ("H", "O")},
        ),
        "vasp": documented(
            "oxide-pbe",
            command=python("vasp"),
            element={symbol: {"potcar": str(potcars[symbol])} for symbol in ("O", "Si")},
        ),
        "harmonic": documented(
            "harmonic",
            command=[
                sys.executable,
                str(Path(sys.executable).with_name("i-pi-driver-py")),
                *documented("harmonic")["arguments"]["command"][1:],
            ],
        ),
        "emt": documented("emt-elsewhere", command=[sys.executable, "run.py"], cell="triangular"),
    }


@pytest.fixture(scope="module")
def daemon(start_shared_daemon, entries, tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "models.toml").write_text(tomlkit.dumps(entries))
    return start_shared_daemon("--catalogue", str(folder / "models.toml"))


@pytest.fixture
def water():
    return molecule("H2O")


def evaluate(daemon, model, atoms, *, stress=False, **options):
    """Energy and forces, or stress, as a job gets them."""
    with daemon.client().calculator(model, **options) as calculator:
        atoms = atoms.copy()
        atoms.calc = calculator
        return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress() if stress else None


def spring_forces(atoms, stiffness=1.0):
    return -SPRING * np.reshape(stiffness, (-1, 1)) * atoms.positions


def programs(daemon, model):
    """What runs for a model, below its worker: guards, programs, and what these have started."""
    return psutil.Process(daemon.model(model)["pid"]).children(recursive=True)


@pytest.mark.parametrize("cell", ["cubic", "primitive", "turned", "left-handed"])
def test_a_calculator_elsewhere_gives_what_it_gives_here(daemon, cell, compatible):
    atoms = bulk("Cu", cubic=cell == "cubic") * 2
    atoms.rattle(0.05, seed=1)
    if cell == "turned":
        atoms.rotate(40, (1, 2, 3), rotate_cell=True)
    if cell == "left-handed":
        atoms.set_cell(atoms.cell.array[[1, 0, 2]])
    energy, forces, stress = evaluate(daemon, "emt", atoms, stress=True)
    atoms.calc = EMT()
    assert energy == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=0, atol=1e-9)
    np.testing.assert_allclose(stress, atoms.get_stress(), rtol=0, atol=1e-11)
    compatible(
        code="ASE SocketClient",
        version=version("ase"),
        role="engine",
        transport="dials in, Unix socket",
        ran=f"EMT of {len(atoms)} Cu, {cell} cell",
        against="EMT in the job's own process",
        agreement=np.abs(forces - atoms.get_forces()).max(),
    )


def test_one_program_goes_through_all_steps_of_a_job(daemon, water):
    with daemon.client().calculator("right") as calculator:
        water.calc = calculator
        seen = set()
        for seed in range(20):
            water.rattle(0.1, seed=seed)
            np.testing.assert_allclose(water.get_forces(), spring_forces(water), rtol=1e-12)
            seen |= {process.pid for process in programs(daemon, "right")}
    assert len(seen) == 2, "a guard and a program"


def test_several_compute_at_a_time(daemon):
    """Two of a batch have to meet, and no more than two are there; each gets its own numbers."""
    frames = np.random.default_rng(1).normal(size=(6, 3, 3))
    np.testing.assert_allclose(daemon.batch("meet", [8, 1, 1], frames), -frames, rtol=1e-12)
    assert len([process for process in programs(daemon, "meet") if not process.children()]) == 2


def test_what_a_program_takes_is_its_models_and_it_may_tidy_up(daemon, water):
    evaluate(daemon, "tidy", water)
    (program,) = [one for one in programs(daemon, "tidy") if not one.children()]
    segment = Path("/dev/shm", program.cmdline()[-1].replace("/", "-"))
    assert segment.exists()
    wait_for(lambda: daemon.model("tidy")["memory"] > 2**26)
    daemon.run("unload", "tidy")
    wait_for(lambda: gone([program]))
    assert not segment.exists()


def test_drivers_of_ipi(daemon, water, compatible):
    water.set_cell(np.eye(3) * 10)
    water.pbc = True
    energy, forces, _ = evaluate(daemon, "harmonic", water)
    assert energy == pytest.approx(0.05 * SPRING * (water.positions**2).sum(), rel=1e-12)
    np.testing.assert_allclose(forces, spring_forces(water, 0.1), rtol=1e-12)
    compatible(
        code="i-PI's Python driver",
        version=version("ipi"),
        role="engine",
        transport="dials in, Unix socket",
        ran="harmonic, a molecule",
        against="its formula",
        agreement=np.abs(forces - spring_forces(water, 0.1)).max(),
    )


def test_a_fake_of_aims(daemon, water):
    _, forces, _ = evaluate(daemon, "aims", water)
    np.testing.assert_allclose(forces, spring_forces(water, water.numbers), rtol=1e-12)
    with pytest.raises(PropertyNotImplementedError, match="pbc = FFF"):
        evaluate(daemon, "aims", Atoms("H", cell=np.eye(3) * 5, pbc=True))


def test_charge_and_spin_are_the_programs_and_no_two_share_one(daemon):
    atoms = Atoms("OH", positions=[[0, 0, 0], [0, 0, 1]])
    for charge in (0, -1, 0):
        atoms.info = {"charge": charge}
        energy, _, _ = evaluate(daemon, "aims", atoms)
        assert energy == pytest.approx(0.5 * SPRING + charge * HARTREE, rel=1e-12)
    for info in ({}, {"spin": 3}, {}, {"charge": 1, "spin": 2}, {"charge": 1}, {"charge": 2, "spin": 1}, {"spin": 2}):
        atoms.info = info
        energy, _, _ = evaluate(daemon, "electrons", atoms)
        shift = info.get("charge", 0) + info.get("spin", 1) / 8
        assert energy == pytest.approx(0.5 * SPRING + shift * HARTREE, rel=1e-12)


def test_a_fake_of_vasp(daemon):
    quartz = Atoms("OSiOSiO", positions=np.arange(15).reshape(5, 3) / 5, cell=np.eye(3) * 6, pbc=True)
    _, forces, _ = evaluate(daemon, "vasp", quartz)
    np.testing.assert_allclose(forces, spring_forces(quartz, quartz.numbers), rtol=1e-12)


def test_systems_in_turns_share_the_room_that_there_is(daemon):
    structures = [Atoms("H", positions=[[0, 0, 1]]), Atoms("O", positions=[[0, 0, 2]])]
    with daemon.client() as client:
        for _ in range(2):
            for atoms in structures:
                with client.calculator("one") as atoms.calc:
                    np.testing.assert_allclose(atoms.get_forces(), spring_forces(atoms), rtol=1e-12)
                assert len(programs(daemon, "one")) == 2


def test_exact_has_a_program_of_its_own_for_each_structure(daemon, water):
    evaluate(daemon, "right", water)
    before = programs(daemon, "right")
    evaluate(daemon, "right", water, exact=True)
    assert programs(daemon, "right") == before, "the one that there was has not been asked, and the other has ended"


def test_a_program_that_dies_now_and_then_costs_a_job_nothing_but_time(daemon, water):
    with daemon.client().calculator("mortal") as calculator:
        water.calc = calculator
        for seed in range(8):  # it dies over its fourth structure
            water.rattle(0.1, seed=seed)
            np.testing.assert_allclose(water.get_forces(), spring_forces(water), rtol=1e-12)


def test_a_program_that_is_killed_before_it_has_connected_is_started_again(daemon, water):
    _, forces, _ = evaluate(daemon, "slain", water)
    np.testing.assert_allclose(forces, spring_forces(water), rtol=1e-12)


def test_what_nobody_has_asked_for_is_nobodys_answer(daemon, water):
    with daemon.client().calculator("surplus") as calculator:
        water.calc = calculator
        water.get_forces()
        water.rattle(0.1, seed=1)
        with pytest.raises(EvaluationError, match="which nobody had asked for"):
            water.get_forces()


def test_a_program_that_dies_of_a_structure(daemon, water):
    far_off = water.copy()
    far_off.positions += 100
    with pytest.raises(EvaluationError, match="twice: exit status 7") as caught:
        evaluate(daemon, "choosy", far_off)
    assert "no convergence has been achieved" in caught.value.message
    evaluate(daemon, "choosy", water)


@pytest.mark.parametrize(
    ("way", "says"),
    [
        ("dies", "no licence was found"),
        ("never", "did not connect within 0.5 s"),
        ("twice", "nobody was there for the second"),
        ("garbage", "where READY was due|which nobody had asked for"),
        ("nan", "NaN or infinite numbers for forces"),
        ("infinite", "NaN or infinite numbers for energy"),
        ("short", "forces of 2 atoms for a structure of 3"),
        ("long", "forces of 4 atoms for a structure of 3"),
    ],
)
def test_what_is_no_result_is_an_error(daemon, water, way, says):
    with pytest.raises(EvaluationError, match=says) as caught:
        evaluate(daemon, way, water)
    assert f"model {way!r}: {Path(sys.executable).name} " in caught.value.message
    assert not programs(daemon, way), "whoever talks nonsense is not kept"


def test_a_virial_of_zeros_is_no_stress(daemon, water):
    water.set_cell(np.eye(3) * 10)
    water.pbc = True
    evaluate(daemon, "no-virial", water)
    with pytest.raises(PropertyNotImplementedError, match="computes no stress"):
        evaluate(daemon, "right", water, stress=True)
    with pytest.raises(PropertyNotImplementedError, match="it computed no stress"):
        evaluate(daemon, "no-virial", water, stress=True)
    # nor where forces are zero as well, as they are of one atom in a cell: its cell would seem relaxed
    alone = Atoms("H", positions=[[0, 0, 0]], cell=np.eye(3) * 10, pbc=True)
    with pytest.raises(PropertyNotImplementedError, match="it computed no stress"):
        evaluate(daemon, "no-virial", alone, stress=True)


def test_an_atom_that_flew_off_does_not_meet_an_image(daemon):
    """The program's box ends somewhere, also where the structure is open."""
    for distance in (998.0, 1002.5):
        atoms = Atoms("H2", positions=[[0, 0, 0], [0, 0, distance]])
        with pytest.raises(InvalidStructureError, match="spans more than 900 Å"):
            evaluate(daemon, "right", atoms)
    evaluate(daemon, "right", Atoms("H2", positions=[[0, 0, 0], [0, 0, 890]]))


@pytest.mark.parametrize(("model", "says"), [("missing", "no program 'no-such-program'"), ("other", "SHA-256")])
def test_a_program_that_is_not_there_or_is_another(daemon, water, model, says):
    with pytest.raises(ModelLoadError, match=says):
        evaluate(daemon, model, water)


def test_a_program_is_looked_at_each_time_that_it_is_started(start_daemon, water, tmp_path):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -S {STAND_IN} right $1\n")
    program.chmod(0o755)
    digest = hashlib.sha256(program.read_bytes()).hexdigest()
    entry = stand_in("right", command=[str(program), "{{socket}}"], sha256=digest)
    (tmp_path / "models.toml").write_text(tomlkit.dumps({"pinned": entry}))
    daemon = start_daemon("--catalogue", str(tmp_path / "models.toml"))
    with daemon.client().calculator("pinned") as calculator:
        water.calc = calculator
        water.get_forces()
        program.write_text(program.read_text() + "# another\n")
        water.rattle(0.1, seed=1)
        np.testing.assert_allclose(water.get_forces(), spring_forces(water), rtol=1e-12)
    with pytest.raises(ModelLoadError, match="It was not started"):
        evaluate(daemon, "pinned", molecule("OH"))


def test_what_a_program_can_not_do(daemon, water):
    with pytest.raises(EvaluationError, match="that was all") as caught:
        evaluate(daemon, "denied", water)
    assert "could" not in caught.value.message


def test_programs_get_memory_as_they_do_elsewhere(daemon, water):
    """How workers that compute are tuned is nothing for them."""

    def tuned(model):
        return {name for name in psutil.Process(daemon.model(model)["pid"]).environ() if name.startswith("MALLOC_")}

    evaluate(daemon, "right", water)
    assert tuned("right") <= set(os.environ)
    evaluate(daemon, "lj", bulk("Cu"))
    assert tuned("lj") >= {"MALLOC_ARENA_MAX", "MALLOC_TOP_PAD_"}


def test_who_is_no_child_of_the_worker_is_not_let_in(daemon, water):
    """Somebody else of the same user dials the socket before the program does."""
    found, over = [], threading.Event()
    evaluate(daemon, "right", water)
    folder = psutil.Process(daemon.model("right")["pid"]).environ()[SOCKETS_VARIABLE]

    def intrude():
        while not over.wait(0.001):
            for name in os.listdir(folder):
                with socket.socket(socket.AF_UNIX) as intruder, contextlib.suppress(OSError):
                    intruder.connect(f"{folder}/{name}")
                    found.append(intruder.recv(12))

    thread = threading.Thread(target=intrude)
    thread.start()
    try:
        for _ in range(5):
            _, forces, _ = evaluate(daemon, "right", water, exact=True)
            np.testing.assert_allclose(forces, spring_forces(water), rtol=1e-12)
    finally:
        over.set()
        thread.join()
    assert found, "nobody intruded"
    assert set(found) == {b""}


@pytest.fixture(scope="module")
def mortal_daemon(start_shared_daemon, entries, tmp_path_factory):
    """A daemon that takes evaluations of more than half a second for hung, where an entry says nothing else."""
    folder = tmp_path_factory.mktemp("mortal")
    (folder / "models.toml").write_text(tomlkit.dumps({name: entries[name] for name in ("ranks", "hangs")}))
    (folder / "config.toml").write_text("hang_timeout = 0.5\n")
    return start_shared_daemon("--config", str(folder / "config.toml"), "--catalogue", str(folder / "models.toml"))


def gone(processes):
    return all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in processes)


def test_a_program_that_hangs_goes_with_its_worker(mortal_daemon, water):
    evaluate(mortal_daemon, "hangs", water)
    running = programs(mortal_daemon, "hangs")
    water.positions += 100
    with pytest.raises(RootstockError):
        evaluate(mortal_daemon, "hangs", water)
    wait_for(lambda: gone(running))
    assert re.search(r"s where [0-9.]+ s is the limit", mortal_daemon.log.read_text())


@pytest.mark.parametrize("victim", ["worker", "daemon"])  # in this order
def test_nothing_is_left_of_a_worker_or_a_daemon_that_is_killed(mortal_daemon, water, victim):
    evaluate(mortal_daemon, "ranks", water)
    running = programs(mortal_daemon, "ranks")
    assert len(running) == 3, "a guard, a program, and a rank in a session of its own"
    os.kill(mortal_daemon.model("ranks")["pid"] if victim == "worker" else mortal_daemon.pid, signal.SIGKILL)
    wait_for(lambda: gone(running))


def test_surfaces_are_refused_where_the_input_is_for_crystals(daemon):
    with pytest.raises(PropertyNotImplementedError, match="pbc = TTT.*TTF"):
        evaluate(daemon, "emt", fcc111("Cu", (2, 2, 2), vacuum=8))
