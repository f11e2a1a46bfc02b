"""A MACE model in a form that is not code: its tensors and its configuration, as safetensors.

The model is rebuilt by mace-torch's own classes, so only what they make can be kept so: a ScaleShiftMACE, or a MACE as
one, whose configuration says all that its state does not. Whether it does is not believed but compared: `convert`
writes what a model computes, in one process for that of the original, in another for the one that was rebuilt. In which
basis its contractions are is up to the state (`basis`): what mace-torch makes of a configuration depends on what is
installed.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from pathlib import Path
from typing import Any, List

import numpy as np
import torch

from rootstockd.worker.engines import EngineError, EngineInfo, ModelSpec, Result, Task
from rootstockd.worker.engines.mace import basis, checks
from rootstockd.worker.engines.mace.reference import ReferenceBackend, heads_of

FORM = "mace-1"
"""Version of this form."""
SUFFIX = ".safetensors"
FILE_NAME, NUMBERS = f"model{SUFFIX}", "numbers.json"
"""What `convert` writes in the worker's scratch folder: the model in this form, and what it computes."""
REPEATS = 3
"""Evaluations until torch has compiled what it compiles, after which its rounding stays the same."""
_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def to_safe(model: Any) -> bytes:
    """A model in this form.

    Raises:
        ValueError: it can't be kept so.
    """
    from mace.tools.scripts_utils import extract_config_mace_model  # noqa: PLC0415 - imports much
    from safetensors.torch import save  # noqa: PLC0415 - not in every environment

    kind = type(model).__name__
    if kind == "MACE":
        model, kind = _scaled_by_one(model), "ScaleShiftMACE"
    if kind != "ScaleShiftMACE":
        raise ValueError(f"a {kind} can't be described")
    config = {key: _plain(key, value) for key, value in extract_config_mace_model(model).items()}
    state = {key: value.detach().cpu().clone().contiguous() for key, value in model.state_dict().items()}
    config["use_reduced_cg"] = basis.is_reduced(state)
    if config["use_reduced_cg"] is None:
        raise ValueError("its contractions are not mace-torch's own, as where it was saved for cuEquivariance")
    dtype = str(next(model.parameters()).dtype).rpartition(".")[2]
    neighbours = [float(interaction.avg_num_neighbors) for interaction in model.interactions]
    described = {"form": FORM, "class": kind, "dtype": dtype, "avg_num_neighbors": neighbours, "config": config}
    return bytes(save(state, metadata={"rootstockd": json.dumps(described)}))


def _scaled_by_one(model: Any) -> Any:
    """A MACE as the ScaleShiftMACE of the same parts that scales by one and shifts by nothing.

    It is what mace-torch can describe, and has kernels for on GPUs.
    """
    from mace import modules  # noqa: PLC0415

    heads = len(heads_of(model))
    block = modules.ScaleShiftBlock([1.0] * heads, [0.0] * heads).to(next(model.parameters()).dtype)
    scaled = modules.ScaleShiftMACE.__new__(modules.ScaleShiftMACE)
    scaled.__dict__.update(model.__dict__, _modules={**model._modules, "scale_shift": block})  # noqa: SLF001
    return scaled


def from_safe(data: bytes, device: str) -> Any:
    """The model of a file.

    Raises:
        ValueError: it is not of this form, or mace-torch makes another model of it.
    """
    from mace import modules  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    described = json.loads(header["__metadata__"]["rootstockd"])
    if described["form"] != FORM:
        raise ValueError(f"its form is {described['form']!r}, and this version reads {FORM!r}")
    config = {key: _made(key, value) for key, value in described["config"].items()}
    state = load(data)
    config["use_reduced_cg"] = basis.is_reduced(state)  # older files have what the model said of itself
    before = torch.get_default_dtype()
    torch.set_default_dtype(_DTYPES[described["dtype"]])
    try:
        with warnings.catch_warnings(), basis.made_with(state):
            warnings.simplefilter("ignore")  # TorchScript's, about mace-torch's own code
            model = modules.ScaleShiftMACE(**config)
    finally:
        torch.set_default_dtype(before)
    made = model.state_dict()
    for key in sorted(set(state) & set(made)):
        if state[key].dtype != made[key].dtype:
            raise ValueError(f"{key} is {state[key].dtype}, and mace-torch makes it {made[key].dtype}")
    model.load_state_dict(state)
    for interaction, neighbours in zip(model.interactions, described["avg_num_neighbors"]):
        interaction.avg_num_neighbors = neighbours
    return model.to(device)


def _plain(key: str, value: Any) -> Any:
    """A setting as JSON has it."""
    if key == "cueq_config" and value is not None:
        raise ValueError("it was made for cuEquivariance")
    if key == "gate":
        return None if value is None else _name_of_gate(value)
    if isinstance(value, type):
        if value.__module__ != "mace.modules.blocks":
            raise ValueError(f"{key} is {value.__module__}.{value.__name__}, which is not mace-torch's")
        return value.__name__
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if type(value).__name__ == "Irreps":
        return str(value)
    json.dumps(value)  # or it is something else
    return value


def _name_of_gate(function: Any) -> str:
    from mace.modules import gate_dict  # noqa: PLC0415

    for name, known in gate_dict.items():
        if known is function:
            return str(name)
    raise ValueError(f"its gate is {function}, which is not mace-torch's")


def _made(key: str, value: Any) -> Any:
    """A setting as mace-torch wants it."""
    from e3nn import o3  # noqa: PLC0415
    from mace.modules import blocks, gate_dict  # noqa: PLC0415

    if key == "gate":
        return None if value is None else gate_dict[value]
    if key.endswith(("_irreps", "_cls", "_cls_first")) and value is not None:
        if key.endswith("_irreps"):
            return o3.Irreps(value)
        made = getattr(blocks, value)
        if not (isinstance(made, type) and issubclass(made, torch.nn.Module) and made.__module__ == blocks.__name__):
            raise ValueError(f"{key} can't be {value!r}")
        return made
    if key in {"atomic_energies", "atomic_inter_scale", "atomic_inter_shift"}:
        return np.array(value)
    return value


class Conversion:
    """Not to compute with: a model was written in this form."""

    info = EngineInfo(properties=())

    def prepare(self, _system: Any) -> Any:
        """Nothing is computed here."""
        raise EngineError("unsupported", "this worker converts a model and evaluates nothing")

    def evaluate(self, _tasks: List[Task]) -> List[Result]:
        """Nothing is computed here."""
        raise EngineError("unsupported", "this worker converts a model and evaluates nothing")

    def memory(self) -> None:
        """Nothing of a GPU: the model has been written, and nobody keeps it."""


def convert(model: Any, spec: ModelSpec) -> Conversion:
    """Write a model in this form, and what it computes, for whoever compares it with the same of another worker.

    Args:
        model: as it was read, in its own dtype.
        spec: what it was read for.

    Raises:
        EngineError: it can't be kept in this form, it can't be evaluated, or there is no room for it.
    """
    numbers = {}
    try:
        data = to_safe(model)
        for dtype in dict.fromkeys(("float64", spec.dtype)):  # in this order nothing is lost
            torch.set_default_dtype(_DTYPES[dtype])
            numbers[dtype] = _numbers(model.to(_DTYPES[dtype]), spec)
    except Exception as error:
        text = f"model {spec.name!r} stays a pickle: {type(error).__name__}: {error}"
        raise EngineError("unsupported", text) from error
    scratch = Path(os.environ["TMPDIR"])
    try:
        (scratch / FILE_NAME).write_bytes(data)
        (scratch / NUMBERS).write_text(json.dumps(numbers))
    except OSError as error:
        text = f"model {spec.name!r} can't be written to {scratch}: {error.strerror}"
        raise EngineError("unsupported", text) from error
    return Conversion()


def _numbers(model: Any, spec: ModelSpec) -> List[Any]:
    """What mace-torch computes for structures of the model's elements: eV, eV/Å."""
    backend = ReferenceBackend(model, spec.device)
    found = []
    for tasks in checks.structures([int(z) for z in model.atomic_numbers], heads_of(model)):
        for task in tasks:
            for _ in range(REPEATS):
                (result,) = backend.evaluate([task])
            assert result.virial is not None  # it was asked for
            found.append({"energy": result.energy, "forces": result.forces.tolist(), "virial": result.virial.tolist()})
    return found
