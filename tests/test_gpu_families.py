"""Models of other families on a GPU, and dispersion: the numbers of the same model on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk

from conftest import RunningDaemon

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
GPU = ("--gpu", "0")


@pytest.fixture(scope="module")
def by_device(start_shared_daemon: Callable[..., RunningDaemon]) -> Iterator[dict[str, RunningDaemon]]:
    """A daemon on the GPU, and one on the CPU."""
    daemons = {"cuda": start_shared_daemon(device=GPU), "cpu": start_shared_daemon()}
    yield daemons
    for daemon in daemons.values():
        daemon.stop()


def structures() -> list[Atoms]:
    found = []
    for seed, repeat in enumerate(((1, 1, 1), (2, 2, 2), (2, 2, 2), (3, 2, 1))):
        atoms = bulk("Cu", cubic=True) * repeat
        atoms.rattle(0.05, seed=seed)
        found.append(atoms)
    return found


@pytest.mark.parametrize(
    ("model", "packages", "settings", "tolerance"),
    [
        ("sevennet-0", ("sevenn",), {}, 1e-3),
        ("chgnet", ("chgnet",), {}, 1e-3),
        ("mace-emt-small", ("mace", "dftd3"), {"dispersion": True}, 1e-8),
        ("mace-emt-small", ("mace", "dftd3"), {"dispersion": {"damping": "zero"}}, 1e-8),
    ],
    ids=["SevenNet", "CHGNet", "MACE with D3(BJ)", "MACE with D3(zero)"],
)
def test_numbers_are_those_of_the_cpu(
    by_device: dict[str, RunningDaemon],
    model: str,
    packages: tuple[str, ...],
    settings: dict[str, Any],
    tolerance: float,
) -> None:
    """Those in float32 to its rounding."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    found: dict[str, list[Any]] = {}
    for device, daemon in by_device.items():
        with daemon.client().calculator(model, **settings) as calculator:
            found[device] = [
                [calculator.get_property(name, atoms) for name in ("energy", "forces", "stress")]
                for atoms in structures()
            ]
            of = [each for each in daemon.client().status()["models"] if each["name"] == model]
            assert of and all(each["device"].startswith(device) for each in of)
            assert all(device in each["backend"] for each in of), of
    for atoms, on_gpu, on_cpu in zip(structures(), found["cuda"], found["cpu"], strict=True):
        assert on_gpu[0] == pytest.approx(on_cpu[0], rel=0, abs=tolerance * len(atoms))
        for which in (1, 2):
            np.testing.assert_allclose(on_gpu[which], on_cpu[which], rtol=0, atol=tolerance)
