"""The models of these benchmarks: the embedded one, and real architectures with random weights.

The weights of MACE-MP-0 are a download. So the same architectures are made here, with seeded random weights, and called
random wherever they appear. What mace-torch takes for a step does not depend on what weights say. What rootstockd takes
does: its fast backend computes only where it agrees with mace-torch to 1e-4 eV/Å, with the weights at hand. That is
checked whenever a model loads; with MACE-MP-0's own it was not measured here.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.metadata
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import platformdirs

from benchmarks.common import PATIENCE, Settings

EMBEDDED = "mace-emt-small"
SEED = 20_231_203
RECIPE = 1
"""Raised when `make` makes something else."""
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


def cached(name: str) -> Path:
    """Where the file is kept: the same bytes in every run, for whatever knows models by their hash."""
    recipe = f"{RECIPE} {HIDDEN[name]} {SEED} {ELEMENTS} mace-torch {importlib.metadata.version('mace-torch')}"
    digest = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    return Path(platformdirs.user_cache_dir("rootstockd-benchmarks")) / f"{name}-v{RECIPE}-{digest}.model"


def random(settings: Settings, name: str) -> Model:
    """A real architecture with random weights, made when first asked for on this machine."""
    weights = cached(name)
    if not weights.exists():
        # in a process of its own: torch is not for the process that measures
        making = [sys.executable, "-m", "benchmarks.models", HIDDEN[name], str(weights)]
        done = subprocess.run(making, check=False, capture_output=True, text=True, timeout=PATIENCE)
        if done.returncode != 0:
            raise RuntimeError(f"{name} could not be made: {done.stderr[-2000:]}")
    catalogue = settings.folder / f"{name}.toml"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    catalogue.write_text(f'[{name}]\nfamily = "mace"\nweights = "{weights}"\nsha256 = "{digest}"\ndtype = "float32"\n')
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
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    # Random weights give forces of 1e-3 eV/Å, beside which no error would be seen. Few digits, so that the sums of
    # another machine give the same bytes.
    model.scale_shift.scale.fill_(float(f"{1 / root_mean_square_force(model):.2g}"))
    file = io.BytesIO()  # torch writes a path's name into the file
    torch.save(model, file)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_bytes(file.getvalue())
    beside.replace(path)


def root_mean_square_force(model: Any) -> float:
    """The RMS force of 32 rattled copper atoms, in eV/Å."""
    import numpy as np  # noqa: PLC0415
    from ase.build import bulk  # noqa: PLC0415
    from mace.calculators import MACECalculator  # noqa: PLC0415

    atoms = bulk("Cu", cubic=True) * 2
    atoms.rattle(0.1, seed=SEED)
    # a copy: the calculator changes what it is given
    atoms.calc = MACECalculator(models=[copy.deepcopy(model)], device="cpu", default_dtype="float64")
    return float(np.sqrt((atoms.get_forces() ** 2).mean()))


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
