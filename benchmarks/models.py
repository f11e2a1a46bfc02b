"""The models of these benchmarks: the embedded one, and real architectures with random weights.

The weights of MACE-MP-0 are a download; what a step costs does not depend on what they say. So the same architectures
are made here, with seeded random weights, and called random wherever they appear.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from benchmarks.common import Settings

EMBEDDED = "mace-emt-small"
SEED = 20_231_203
# What MACE-MP-0 small and medium are: https://arxiv.org/abs/2401.00096, appendix; the elements that Materials Project
# has, hydrogen to plutonium without the five between bismuth and thorium that it lacks.
HIDDEN = {"mp0-small-random": "128x0e", "mp0-medium-random": "128x0e + 128x1o"}
ELEMENTS = [z for z in range(1, 95) if z not in {84, 85, 86, 87, 88}]


@dataclass(frozen=True)
class Model:
    """One model, for the daemon and for MACECalculator."""

    name: str
    weights: Path
    dtype: str
    options: tuple[str, ...]
    """What `rootstockd start` needs to know of it."""


def embedded() -> Model:
    """The model that comes with rootstockd."""
    weights = Path(str(resources.files("rootstockd.models").joinpath(f"embedded/{EMBEDDED}.model")))
    return Model(EMBEDDED, weights, "float64", ())


def random(settings: Settings, name: str) -> Model:
    """A real architecture with random weights, made in this run's folder when first asked for."""
    weights = settings.folder / f"{name}.model"
    catalogue = settings.folder / f"{name}.toml"
    if not catalogue.exists():
        # in a process of its own: torch is not for the process that measures
        making = [sys.executable, "-m", "benchmarks.models", HIDDEN[name], str(weights)]
        done = subprocess.run(making, check=False, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            raise RuntimeError(f"{name} could not be made: {done.stderr[-2000:]}")
        catalogue.write_text(f'[{name}]\nfamily = "mace"\nweights = "{weights.name}"\ndtype = "float32"\n')
    return Model(name, weights, "float32", ("--catalogue", str(catalogue)))


def make(hidden: str, path: Path) -> None:
    """Write a MACE-MP-0 with random weights."""
    import numpy as np  # noqa: PLC0415
    import torch  # noqa: PLC0415
    from mace import modules  # noqa: PLC0415

    o3 = importlib.import_module("e3nn.o3")  # only after mace, which lets e3nn read its own constants

    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.float32)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=6.0,
        num_bessel=10,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps(hidden),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=61.96,
        atomic_numbers=ELEMENTS,
        correlation=3,
        gate=torch.nn.functional.silu,
        radial_MLP=[64, 64, 64],
        radial_type="bessel",
        atomic_inter_scale=0.8,
        atomic_inter_shift=0.16,
    )
    torch.save(model, path)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
