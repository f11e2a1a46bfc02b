"""The Engine interface, and how an engine is loaded.

An engine computes in ASE's units and conventions: eV, Å, rows of a cell are lattice vectors. Its virial is
-dE/dstrain = -volume x stress, in eV, which is defined whatever volume a slab's empty space is said to have.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import stat
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rootstockd.worker import stages

Array = np.ndarray
"""Any numpy array; a worker may run on a Python and a numpy too old for anything narrower."""


class EngineError(Exception):
    """What an engine can't do; crosses to the driver with `code` (see rootstock_client.errors), message and hint."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.hint = code, message, hint


class EngineBrokenError(Exception):
    """An evaluation failed in a way after which the process can't be trusted; its cause says how. The worker ends."""


@dataclass(frozen=True)
class ModelSpec:
    """What to load: all that makes two workers give different numbers, and where."""

    name: str
    """Catalogue name, for messages."""
    family: str
    """Engine family: the name of a module in this package."""
    device: str
    """`cpu`, or `cuda` for the one GPU that the worker's environment shows it."""
    dtype: str
    """`float32` or `float64`."""
    weights: str = ""
    """Path of the weights."""
    sha256: str = ""
    """What `read_weights` must find there, in hexadecimal."""
    confine: bool = True
    """Whether workers give their rights away; see `rootstockd.worker.confine`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What else the family's `load` takes."""


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    properties: tuple[str, ...]
    """ASE property names it can compute."""
    elements: tuple[int, ...] = ()
    """Atomic numbers it knows; empty where it does not say."""
    backend: str = ""
    """What computes, with versions, for people."""
    note: str = ""
    """What people should know of it, such as why nothing faster computes."""
    heads: tuple[str, ...] = ()
    """Names of its heads, where it has several."""


@dataclass(frozen=True)
class System:
    """What does not change from step to step."""

    numbers: Array
    """(natoms,) atomic numbers."""
    pbc: tuple[bool, bool, bool]
    charge: float | None = None
    """Total charge in e, where the driver gave one."""
    spin: float | None = None
    """Spin multiplicity, where the driver gave one."""
    head: str | None = None
    """Which of the model's heads, where it has several."""
    exact: bool = False
    """Same structure, same bits, whatever came before and whoever else is in the batch."""
    tolerance: float | None = None
    """How far forces may differ from the engine's reference, in eV/Å; None leaves it to the engine."""
    session: int = 0
    """Whose system it is: what was found out about one system of a session may count for its next."""


@dataclass  # not frozen: one is made for each structure and step, and frozen ones take three times as long
class Task:
    """One structure to evaluate, and what is wanted beside energy and forces."""

    system: Any
    """What the engine's `prepare` made of the System."""
    cell: Array
    """(3, 3), Å, rows are lattice vectors; the same object as at the last step where it has not changed."""
    positions: Array
    """(natoms, 3), Å."""
    stress: bool
    energies: bool


@dataclass
class Result:
    """What came of a Task."""

    energy: float
    """eV."""
    forces: Array
    """(natoms, 3), eV/Å."""
    virial: Array | None = None
    """(3, 3), eV; -dE/dstrain. None when it was not computed."""
    energies: Array | None = None
    """(natoms,), eV. None when they were not computed."""
    backend: str = ""
    """Which of the engine's ways to compute answered, where it has several."""


class Engine(Protocol):
    """One loaded model."""

    info: EngineInfo

    def prepare(self, system: System) -> Any:
        """Whatever is worth keeping for a system between its evaluations.

        Raises:
            EngineError: the model can't treat this system.
        """

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Evaluate a batch; results in the same order.

        Raises:
            EngineError: this batch can't be evaluated. Any other exception counts as one without a hint.
            EngineBrokenError: nor can any other.
        """


def read_weights(spec: ModelSpec) -> bytes:
    """The model's file, read once: what was hashed is what gets loaded, whatever becomes of the path meanwhile.

    Raises:
        EngineError: it can't be read, or is not the file that the catalogue means.
    """
    name, path = spec.name, spec.weights
    try:
        # without waiting, or a pipe at this place would hold the worker for ever
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise EngineError("model-load", f"model {name!r}: its weights {path} are no regular file")
            data = file.read()
    except FileNotFoundError as error:
        raise EngineError("model-load", f"model {name!r}: its weights {path} are missing") from error
    except OSError as error:
        raise EngineError(
            "model-load", f"model {name!r}: its weights {path} can't be read: {error.strerror}"
        ) from error
    actual = hashlib.sha256(data).hexdigest()
    if actual != spec.sha256:
        raise EngineError(
            "model-load",
            f"model {name!r}: its weights {path} have the SHA-256 {actual}, where the catalogue says {spec.sha256}: "
            "the file is another, or was changed or damaged. It was not loaded",
            f'Put the right file back; or, if you trust this one, write sha256 = "{actual}" into the catalogue '
            "and `rootstockd reload`.",
        )
    return data


def load_engine(spec: ModelSpec) -> Engine:
    """Load a model. Slow: imports the family's packages and reads its weights.

    Raises:
        EngineError: it can't be loaded.
    """
    stages.begin(stages.IMPORTS)
    try:
        module = importlib.import_module(f"{__name__}.{spec.family}")
    except ImportError as error:
        if spec.family == "mace":
            hint = "Install it beside the daemon: pip install 'rootstockd[mace]'."
        else:
            hint = f"Install what the family {spec.family!r} needs beside the daemon."
        raise EngineError("model-load", f"model {spec.name!r}: {error}", hint) from error
    stages.begin(stages.WEIGHTS)
    engine: Engine = module.load(spec)
    return engine
