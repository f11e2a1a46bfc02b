"""Every engine that is here does right what all engines have to; and an engine that does not is found out."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.calculators.lj import LennardJones

from conftest import EMBEDDED_MODEL, sha256
from rootstock_client.units import BOHR
from rootstockd.worker.conformance import CHECKS, ConformanceError, Skipped, Subject, main
from rootstockd.worker.engines import EngineError, ModelSpec, Result, System, Task
from rootstockd.worker.engines.ase import AseEngine
from rootstockd.worker.engines.loading import load_engine

EMT = {"calculator": "ase.calculators.emt:EMT"}
D3 = {"damping": "bj", "xc": "pbe", "cutoff": 40 * BOHR, "cnthr": 40 * BOHR}
MACE = {"weights": str(EMBEDDED_MODEL), "sha256": sha256(EMBEDDED_MODEL)}
SPECS = {
    "noop": ModelSpec("noop", "noop", "cpu", "float64"),
    "emt": ModelSpec("emt", "ase", "cpu", "float64", arguments=EMT, elements=[13, 28, 29, 46, 47, 78, 79]),
    "lj": ModelSpec("lj", "ase", "cpu", "float64", arguments={"calculator": "ase.calculators.lj:LennardJones"}),
    "limited": ModelSpec("limited", "ase", "cpu", "float64", arguments={**EMT, "max_atoms": 30, "complete_cell": True}),
    "headed": ModelSpec(
        "headed",
        "ase",
        "cpu",
        "float64",
        heads=["soft", "hard"],
        arguments={"calculator": "test_engine_conformance:headed", "options": {"head": "{head}"}},
    ),
    "mace": ModelSpec("mace", "mace", "cpu", "float64", **MACE),
    "mace float32": ModelSpec("mace", "mace", "cpu", "float32", **MACE),
    "mace, two heads": ModelSpec("made", "mace", "cpu", "float64"),
    "mace, charge and spin": ModelSpec("made", "mace", "cpu", "float64"),
    "d3 alone": ModelSpec("d3", "noop", "cpu", "float64", dispersion=D3),
    "emt with d3": ModelSpec("emt", "ase", "cpu", "float64", arguments=EMT, dispersion=D3),
}


def headed(head: str) -> LennardJones:
    return LennardJones(epsilon={"soft": 0.5, "hard": 1.0}[head])


def made(name: str, folder: str) -> dict[str, str]:
    """A MACE that nobody has trained, as weights of a spec."""
    from test_mace_backends import ARCHITECTURES, CHARGED, write_model

    architecture = {"mace, two heads": ARCHITECTURES["two heads"], "mace, charge and spin": CHARGED}[name]
    path = write_model(Path(folder, "made.model"), **architecture)
    return {"weights": str(path), "sha256": sha256(path)}


@cache
def subject(name: str) -> Subject:
    spec = SPECS[name.removesuffix(" exact")]
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # mace-torch uses what torch deprecates
        if spec.name == "made":
            spec = dataclasses.replace(spec, **made(name, folder))
        return Subject(load_engine(spec), spec, exact=name.endswith(" exact"))


@pytest.fixture(scope="module", autouse=True)
def forget_engines() -> Iterator[None]:
    """Before Python itself ends, when libraries can't clean up any more."""
    yield
    subject.cache_clear()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", [*SPECS, "mace exact"])
def test_conforms(name: str, check: str) -> None:
    try:
        CHECKS[check](subject(name))
    except Skipped as reason:
        pytest.skip(str(reason))


def test_as_a_program() -> None:
    """As whoever wrote an engine runs it, in an environment without pytest."""
    spec = json.dumps(dataclasses.asdict(SPECS["noop"]))
    command = [sys.executable, "-m", "rootstockd.worker.conformance", spec]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()[2:]] == list(CHECKS)
    wrong = ["-c", f"import sys, test_engine_conformance as t; sys.exit(t.examine_a_liar({spec!r}))"]
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, *wrong], check=False, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "SPEC is a ModelSpec in JSON"),
        (["{"], "SPEC is a ModelSpec in JSON"),
        (['{"name": "x"}'], "missing 3 required positional arguments"),
        (['{"name": "x", "family": "none", "device": "cpu", "dtype": "float64"}'], "nothing in the environment"),
    ],
)
def test_says_what_is_wrong_with_a_spec(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(arguments) == 2
    assert said in capsys.readouterr().err


def examine_a_liar(spec: str) -> int:
    from rootstockd.worker import conformance

    conformance.load_engine = lambda spec: Wrong(lambda result, task: setattr(result, "energy", result.energy + 1e-3))
    return conformance.main([spec])


# --- engines that are wrong in one respect


class Wrong(AseEngine):
    """EMT, with something done to each result."""

    def __init__(self, deed: Callable[[Result, Task], Any]) -> None:
        super().__init__(SPECS["emt"])
        self.deed = deed

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        results = super().evaluate(tasks)
        for result, task in zip(results, tasks, strict=True):
            self.deed(result, task)
        return results


def scaled(name: str, factor: float) -> Callable[[Result, Task], Any]:
    def deed(result: Result, task: Task) -> None:
        if (value := getattr(result, name)) is not None:
            setattr(result, name, value * factor)

    return deed


def asymmetric(result: Result, task: Task) -> None:
    if result.virial is not None:
        result.virial[0, 1] += 0.1


def absolute(result: Result, task: Task) -> None:
    result.energy += 1e-3 * task.positions[0, 0]


def by_order(result: Result, task: Task) -> None:
    result.energy += 1e-3 * float(task.system.numbers[2])


def by_axis(result: Result, task: Task) -> None:
    result.energy += 1e-3 * abs(float(task.positions[0, 0] - task.positions[1, 0]))


def by_cell(result: Result, task: Task) -> None:
    result.energy += 1e-3 * float(task.cell[2, 2])


def ungiving(result: Result, task: Task) -> None:
    task.positions += 1e-4


shared = np.zeros((4, 3))


def aliased(result: Result, task: Task) -> None:
    if len(result.forces) == len(shared):
        shared[:] = result.forces
        result.forces = shared


remembered: list[float] = [0.0]


def remembering(result: Result, task: Task) -> None:
    result.energy += remembered[0]
    remembered[0] = 1e-3 * len(task.positions)


def fabricated(result: Result, task: Task) -> None:
    result.virial = None


WRONG: dict[str, tuple[Callable[[Result, Task], Any], set[str]]] = {
    "energy in Hartree": (scaled("energy", 1 / 27.2), {"forces_are_slopes", "virial_is_a_slope"}),
    "gradients for forces": (scaled("forces", -1), {"forces_are_slopes"}),
    "stress for the virial": (scaled("virial", -0.02), {"virial_is_a_slope"}),
    "virial of another sign": (scaled("virial", -1), {"virial_is_a_slope"}),
    "virial that is not symmetric": (asymmetric, {"virial_is_a_slope"}),
    "per-atom energies of something else": (scaled("energies", 1.1), {"per_atom_energies_add_up"}),
    "forces in float32": (lambda r, t: setattr(r, "forces", r.forces.astype(np.float32)), {"shapes_and_types"}),
    "forces of one atom more": (
        lambda r, t: setattr(r, "forces", np.zeros((len(r.forces) + 1, 3))),
        {"shapes_and_types"},
    ),
    "no virial": (fabricated, {"shapes_and_types"}),
    "depends on the place": (absolute, {"translation"}),
    "depends on the order": (by_order, {"permutation"}),
    "depends on the direction": (by_axis, {"rotation", "periodic_images"}),
    "depends on a vector without pbc": (by_cell, {"open_directions"}),
    "moves what it is given": (ungiving, {"results_stay"}),
    "one array for all": (aliased, {"results_stay"}),
    "remembers others": (remembering, {"batch_equals_solo", "sessions_do_not_mix", "exact_means_the_same_bits"}),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_results_is_found(how: str) -> None:
    deed, checks = WRONG[how]
    examined = Subject(Wrong(deed), SPECS["emt"])
    for check in checks:
        with pytest.raises(ConformanceError):
            CHECKS[check](examined)


class Careless(AseEngine):
    """EMT that refuses nothing, and says so of what it was asked."""

    def prepare(self, system: System) -> Any:
        numbers = np.where(np.isin(system.numbers, SPECS["emt"].elements), system.numbers, 29)
        return super().prepare(System(numbers, system.pbc))

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        return [dataclasses.replace(result, virial=np.zeros((3, 3))) for result in super().evaluate(tasks)]


@pytest.mark.parametrize("check", ["unknown_elements_are_refused", "charge_and_spin", "heads"])
def test_what_is_not_refused_is_found(check: str) -> None:
    with pytest.raises(ConformanceError, match="refused"):
        CHECKS[check](Subject(Careless(SPECS["emt"]), SPECS["emt"]))


def test_a_limit_that_is_not_kept_is_found() -> None:
    engine = Wrong(lambda result, task: None)
    engine.info = dataclasses.replace(engine.info, max_atoms=5)
    engine.prepare = AseEngine(SPECS["emt"]).prepare  # type: ignore[method-assign]
    with pytest.raises(ConformanceError, match="6 atoms: not refused"):
        CHECKS["too_many_atoms_are_refused"](Subject(engine, SPECS["emt"]))


def test_what_is_missing_and_made_up_is_found() -> None:
    engine = Careless(SPECS["emt"])
    engine.info = dataclasses.replace(engine.info, properties=("energy", "forces"))
    engine.evaluate = AseEngine(SPECS["emt"]).evaluate  # type: ignore[method-assign]
    with pytest.raises(ConformanceError, match="stress: not refused"):
        CHECKS["missing_properties_are_refused"](Subject(engine, SPECS["emt"]))


def test_a_refusal_for_the_wrong_reason_is_found() -> None:
    engine = Wrong(lambda result, task: None)

    def refuse(system: System) -> Any:
        if system.head or 118 in system.numbers:
            raise EngineError("evaluation", "no")
        return AseEngine.prepare(engine, system)

    engine.prepare = refuse  # type: ignore[method-assign]
    with pytest.raises(ConformanceError, match="'evaluation' where 'unsupported' is due"):
        CHECKS["heads"](Subject(engine, SPECS["emt"]))
