"""MACE, SevenNet and CHGNet, each in an environment that uv built for it, served by one daemon at the same time."""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from conftest import EMBEDDED_MODEL, RunningDaemon, rootstockd
from own_numbers import STEPS, copper, lattice_constant
from rootstockd.environments.builds import find_build
from rootstockd.models.catalogue import Catalogue
from rootstockd.models.spec import spec_of

TREE = Path(__file__).parent.parent
FAMILIES = {
    "mace": ("mace-emt-small", ("Cu",)),
    "sevennet": ("sevennet-0", ("Cu", "Si", "NaCl")),
    "chgnet": ("chgnet", ("Cu", "Si", "NaCl")),
}
"""A model of each, and crystals of elements that it knows."""
CODES = {"mace": ("MACE", "mace-torch"), "sevennet": ("SevenNet", "sevenn"), "chgnet": ("CHGNet", "chgnet")}
"""What each is called, and its package."""
pytestmark = [
    pytest.mark.timeout(1800),  # a machine that has none of it downloads three environments
    pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the environments are specified for Python 3.11"),
]


def find_links():
    """Where pip looks beside its index: uv is to look there, too."""
    users = {name: value for name, value in os.environ.items() if name != "XDG_CONFIG_HOME"}  # which is the tests' own
    command = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    told = subprocess.run(command, env=users, capture_output=True, text=True, check=False)
    return ",".join(told.stdout.split())


@pytest.fixture(scope="module")
def pythons():
    """The interpreters of the three environments, built."""
    before = os.environ["ROOTSTOCKD_STATE"]
    with tempfile.TemporaryDirectory(prefix="rootstockd-families-") as folder:
        os.environ["ROOTSTOCKD_STATE"] = folder
        try:
            places = os.environ.get("UV_FIND_LINKS") or find_links()
            variables = {**os.environ, "UV_FIND_LINKS": places}
            torch = "index" if places else "cpu"  # who names a place for wheels has torch there
            for family in FAMILIES:
                done = rootstockd("env", "create", family, "--torch", torch, env=variables, timeout=1500)
                assert done.returncode == 0, done.stderr[-5000:]
            yield {family: find_build(family).python for family in FAMILIES}
        finally:
            os.environ["ROOTSTOCKD_STATE"] = before


@pytest.fixture(scope="module")
def daemon(pythons):
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        daemon = RunningDaemon(Path(folder))
        try:
            yield daemon.start()
        finally:
            daemon.stop()


@pytest.fixture(scope="module")
def own(pythons):
    """What each family's own calculator gives: `constants`, Å, and `forces`, eV/Å."""
    numbers = {}
    for family, (_, crystals) in FAMILIES.items():
        script = [pythons[family], TREE / "tests/own_numbers.py", family, EMBEDDED_MODEL, *crystals]
        said = subprocess.run(script, capture_output=True, text=True, check=True).stdout
        numbers[family] = json.loads(said.splitlines()[-1])
    return numbers


def versions(python, *packages):
    code = f"from importlib.metadata import version; print(*[version(name) for name in {packages}])"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def tolerance(family):
    """In eV/Å and in Å: float32, and a fit through five energies in it, has no more."""
    return 1e-8 if family == "mace" else 1e-4


def test_one_program_has_all_three_at_once(pythons, daemon, own):
    with daemon.client() as client:
        calculators = {family: client.calculator(model) for family, (model, _) in FAMILIES.items()}
        for step in range(STEPS):  # in turns, all loaded
            for family, calculator in calculators.items():
                found = calculator.get_forces(copper(step))
                np.testing.assert_allclose(found, own[family]["forces"][step], rtol=0, atol=tolerance(family))
        status = {model["name"]: model for model in client.status()["models"]}
    environments = {family: status[model]["environment"] for family, (model, _) in FAMILIES.items()}
    assert all(environments[family].startswith(f"environment {family}, built ") for family in FAMILIES), environments
    assert len({model["pid"] for model in status.values()}) == 3
    # what can't be installed together
    (of_mace,), (of_sevennet,) = versions(pythons["mace"], "e3nn"), versions(pythons["sevennet"], "e3nn")
    assert of_mace == "0.4.4"
    assert tuple(map(int, of_sevennet.split(".")[:2])) >= (0, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_lattice_constants_are_those_of_the_familys_own_calculator(pythons, daemon, own, family, compatible):
    model, crystals = FAMILIES[family]
    with daemon.client().calculator(model) as calculator:
        through = {name: lattice_constant(calculator, name) for name in crystals}
    assert through == pytest.approx(own[family]["constants"], rel=0, abs=tolerance(family))
    code, package = CODES[family]
    compatible(
        code=code,
        version=versions(pythons[family], package)[0],
        role="engine",
        transport="in a worker, an environment of its own",
        ran=f"{model}: lattice constants of {', '.join(crystals)}",
        against=f"its own ASE calculator, to {tolerance(family):g} Å",
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_known_numbers(pythons, family):
    done = rootstockd("env", "verify", family, "--device", "cpu", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the energy differs by" in done.stdout


@pytest.mark.parametrize("family", ["sevennet", "chgnet"])
def test_the_engine_conforms(pythons, family):
    model = FAMILIES[family][0]
    spec = json.dumps(asdict(spec_of(model, Catalogue.load()[model])))
    command = [pythons[family], "-m", "rootstockd.worker.conformance", spec]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(TREE)}, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
