"""MACE models that are written where cuEquivariance is and read where it is not, and the other way round.

    python across_cuequivariance.py write|read FOLDER [PACKAGES]

PACKAGES is the folder where cuequivariance-torch lies; without it this process has none. Of each model FOLDER gets a
pickle, and the safe form as older versions wrote it, beside what the model computes.

To read prints a line of JSON for each model and form: how far numbers are off (eV, eV/Å), mace-torch's and, where
cuEquivariance is, those of its modules. A pickle is converted, too.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

packages = sys.argv[3:]
sys.path += packages
if not packages:
    sys.modules["cuequivariance"] = sys.modules["cuequivariance_torch"] = None  # type: ignore[assignment]
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from test_mace_backends import STRUCTURES, engine, make_model, task  # noqa: E402
from test_safe_form import changed  # noqa: E402

from rootstockd.worker.engines import Result  # noqa: E402
from rootstockd.worker.engines.mace import basis, safe  # noqa: E402
from rootstockd.worker.engines.mace.device import DeviceBackend  # noqa: E402
from rootstockd.worker.engines.mace.reference import ReferenceBackend  # noqa: E402

LOW: dict[str, Any] = {"hidden": "4x0e + 4x1o", "max_ell": 2, "correlation": 2}
MODELS: dict[str, dict[str, Any]] = {
    "reduced": {**LOW, "use_reduced_cg": True},
    "whole": {**LOW, "use_reduced_cg": False},
    "correlation 3": {**LOW, "max_ell": 1, "correlation": 3},
    "scalars": {**LOW, "hidden": "4x0e"},  # of which both bases are the same
}
"""What is to be made of each is for mace-torch to say."""


def computed(backend: type[ReferenceBackend | DeviceBackend], model: Any) -> Result:
    """What comes of a structure."""
    return backend(model, "cpu").evaluate([task(engine(model), STRUCTURES["alloy"])])[0]


def write(folder: Path) -> None:
    """Models as this process has them made."""
    for name, options in MODELS.items():
        model = make_model(**options)
        torch.save(model, folder / f"{name}.model")
        wished = options.get("use_reduced_cg", True)
        (folder / f"{name}.safetensors").write_bytes(changed(safe.to_safe(model), use_reduced_cg=wished))
        result = computed(ReferenceBackend, model)
        reduced = basis.is_reduced(model.state_dict())
        numbers = {"energy": result.energy, "forces": result.forces.tolist(), "reduced": reduced}
        (folder / f"{name}.json").write_text(json.dumps(numbers))


def forms(path: Path) -> Iterator[tuple[str, Any]]:
    """A model as it was written, each by its name."""
    pickled = torch.load(path.with_suffix(".model"), weights_only=False)
    yield "pickle", pickled
    yield "safe form", safe.from_safe(path.with_suffix(".safetensors").read_bytes(), "cpu")
    if not packages:
        yield "pickle, converted", safe.from_safe(safe.to_safe(pickled), "cpu")


def read(folder: Path) -> None:
    """All of a folder."""
    for path in sorted(folder.glob("*.json")):
        right = json.loads(path.read_text())
        for form, model in forms(path):
            results = {"mace-torch": computed(ReferenceBackend, model)}
            if packages:
                from rootstockd.worker.engines.mace.cueq import converted

                results["cuequivariance"] = computed(DeviceBackend, converted(model, "cpu"))
            for backend, result in results.items():
                off = max(abs(result.energy - right["energy"]), float(np.abs(result.forces - right["forces"]).max()))
                said = {"model": path.stem, "form": form, "backend": backend, "off": off}
                same = basis.is_reduced(model.state_dict()) is right["reduced"]
                print(json.dumps({**said, "reduced": right["reduced"], "same basis": same}), flush=True)


torch.set_default_dtype(torch.float64)
{"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
