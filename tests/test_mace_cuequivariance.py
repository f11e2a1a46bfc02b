"""MACE through cuEquivariance, whose place is on GPUs: on a CPU what is not its kernels' business."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomlkit

pytest.importorskip("mace")

VERSION = "0.13.0"
PACKAGES = (f"cuequivariance=={VERSION}", f"cuequivariance-torch=={VERSION}")
ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "by_cuequivariance.py"
ACROSS = Path(__file__).parent / "across_cuequivariance.py"
ROUNDING = 1e-11
"""eV, and eV/Å, for forces of the order of one."""
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("cuequivariance_ops_torch") is None,
        reason=f"its kernels are not installed: pip install cuequivariance-ops-torch-cu13=={VERSION} or -cu12",
    ),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cuEquivariance: in the tests' environment it would be a part of every worker with MACE.

    Where it is there all the same, as beside its kernels on a machine with a GPU, that is taken.
    """
    there = importlib.util.find_spec("cuequivariance_torch")
    if there is not None and there.origin is not None:
        return Path(there.origin).parent.parent
    folder = tmp_path_factory.mktemp("cuequivariance")
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder, *PACKAGES]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode:
        pytest.skip(f"pip can't install cuEquivariance, which needs an index: {done.stderr.strip().splitlines()[-1]}")
    return folder


def run(*command: object) -> list[dict[str, Any]]:
    """What a script of the tests says."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(("device", "forms"), [("cpu", 2), pytest.param("cuda", 1, marks=ON_GPU)])
def test_it_computes_what_mace_torch_does(packages: Path, device: str, forms: int) -> None:
    found = run(SCRIPT, packages, device)
    assert len(found) == 6 * forms * 5 * 2
    assert not [each for each in found if not each["within"]]
    assert all(each["recorded"] for each in found)


@pytest.mark.timeout(900)  # three processes import torch and mace-torch, one after another
@pytest.mark.parametrize("written", ["with", "without"])
def test_models_are_read_whether_it_is_installed_or_not(packages: Path, tmp_path: Path, written: str) -> None:
    """In which basis mace-torch makes their contractions depends on that."""
    run(ACROSS, "write", tmp_path, *([packages] if written == "with" else []))
    plain = run(ACROSS, "read", tmp_path)
    fast = run(ACROSS, "read", tmp_path, packages)
    assert (len(plain), len(fast)) == (4 * 3, 4 * 2 * 2)
    reduced = {"reduced", "correlation 3", "scalars"} if written == "with" else {"scalars"}
    assert {each["model"] for each in plain if each["reduced"]} == reduced
    assert not [each for each in (*plain, *fast) if each["off"] > ROUNDING or not each["same basis"]]


def test_the_documented_specification_is_the_packages_own_and_cuequivariance() -> None:
    text = (ROOT / "docs/environments.md").read_text().split("### cuEquivariance")[1]
    documented = tomlkit.parse(text.split("```toml")[1].split("```")[0])
    builtin = tomlkit.parse((ROOT / "rootstockd/environments/builtin/mace.toml").read_text())
    more = [PACKAGES[1], f"cuequivariance-ops-torch-cu13=={VERSION}"]
    assert documented["requirements"] == [*builtin["requirements"], *more]
    assert documented["imports"] == [*builtin["imports"], "cuequivariance_torch"]
    assert documented["python"] == builtin["python"]
