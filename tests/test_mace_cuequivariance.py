"""MACE through cuEquivariance, whose place is on GPUs: on a CPU what is not its kernels' business."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomlkit

pytest.importorskip("mace")

PACKAGES = ("cuequivariance==0.13.0", "cuequivariance-torch==0.13.0")
ROOT = Path(__file__).parent.parent
SCRIPT = Path(__file__).parent / "by_cuequivariance.py"
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("cuequivariance_ops_torch") is None,
        reason="cuEquivariance's kernels are not installed: cuequivariance-ops-torch-cu13, or -cu12",
    ),
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with cuEquivariance: in the tests' environment it would be a part of every worker with MACE."""
    folder = tmp_path_factory.mktemp("cuequivariance")
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", folder, *PACKAGES]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize(("device", "forms"), [("cpu", 2), pytest.param("cuda", 1, marks=ON_GPU)])
def test_it_computes_what_mace_torch_does(packages: Path, device: str, forms: int) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, packages, device],
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == 4 * forms * 5 * 2
    assert not [each for each in found if not each["within"]]
    assert all(each["recorded"] for each in found)


def test_the_documented_specification_is_the_packages_own_and_cuequivariance() -> None:
    text = (ROOT / "docs/environments.md").read_text().split("### cuEquivariance")[1]
    documented = tomlkit.parse(text.split("```toml")[1].split("```")[0])
    builtin = tomlkit.parse((ROOT / "rootstockd/environments/builtin/mace.toml").read_text())
    version = PACKAGES[1].partition("==")[2]
    more = [PACKAGES[1], f"cuequivariance-ops-torch-cu13=={version}"]
    assert documented["requirements"] == [*builtin["requirements"], *more]
    assert documented["imports"] == [*builtin["imports"], "cuequivariance_torch"]
    assert documented["python"] == builtin["python"]
