"""The Engine interface, and what is of use to all who have it. docs/engines.md says how to write one.

An engine computes in ASE's units and conventions: eV, Å, rows of a cell are lattice vectors. Its virial is
-dE/dstrain = -volume x stress, in eV, which is defined whatever volume a slab's empty space is said to have.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rootstockd.worker.failures import describe, in_disorder, out_of_memory
from rootstockd.worker.files import digest_of, open_regular

ENGINE_API = 1
"""Version of all that an engine from elsewhere sees of this module; its own module must name the same."""

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
    """Engine family: the name of a module in this package, or of an entry point."""
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
    environment: str = ""
    """Name of the Python environment that its workers run in."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """What else the family's `load` takes."""
    elements: list[int] = field(default_factory=list)
    """Atomic numbers that it knows, as the catalogue says; empty where that is for the loaded model to say."""
    heads: list[str] = field(default_factory=list)
    """Names of its heads, likewise."""
    dispersion: dict[str, Any] | None = None
    """Settings of the D3 correction that is added, if one is; see `rootstockd.worker.engines.dispersion`."""
    hang_timeout: float = 0.0
    """Seconds that an evaluation may take, where the catalogue says; likewise the daemon's."""
    fingerprint: str = ""
    """Of all that determines its numbers (`rootstockd.models.spec`), in hexadecimal; the daemon's, not the engine's."""
    own_modules: list[str] = field(default_factory=list)
    """Top-level modules that its fingerprint has by what is in their files; see `rootstockd.worker.sources`."""
    without: dict[str, str] = field(default_factory=dict)
    """Ways to compute that are not tried, as they ended a worker that did; and how."""


@dataclass(frozen=True)
class EngineInfo:
    """What a loaded engine says of itself."""

    properties: tuple[str, ...]
    """ASE property names it can compute."""
    elements: tuple[int, ...] = ()
    """Atomic numbers it knows; empty where it does not say."""
    heads: tuple[str, ...] = ()
    """Names of its heads; empty where it has no such thing."""
    max_atoms: int | None = None
    """The most atoms in one structure, where there is a limit other than memory."""
    backend: str = ""
    """What computes, with versions, for people."""
    note: str = ""
    """What people should know of it, such as why nothing faster computes."""


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

    @property
    def info(self) -> EngineInfo:
        """What it says of itself; another object when something in it has changed."""

    def prepare(self, system: System) -> Any:
        """Whatever is worth keeping for a system between its evaluations.

        Raises:
            EngineError: the model can't treat this system, or has no notion of its charge, spin or head.
        """

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Evaluate a batch; results in the same order, in arrays that later evaluations leave alone.

        Raises:
            EngineError: this batch can't be evaluated. Any other exception counts as one without a hint.
            MemoryError: the device has not enough for it, and may have for its parts.
            EngineBrokenError: the device or a library is in disorder; no batch can be evaluated any more.
        """

    def memory(self) -> int | None:
        """Bytes of a GPU's memory that this process has taken; None on a CPU, and where that is not known."""


def check_system(name: str, info: EngineInfo, system: System, understood: tuple[str, ...] = ()) -> None:
    """Refuse what a model does not know, by what its engine says of it.

    Args:
        name: catalogue name, for messages.
        info: what the engine says.
        system: the system.
        understood: which of `charge` and `spin` the model takes into account. For others it must be neutral, a
            singlet, or nothing said.

    Raises:
        EngineError: it does not know this.
    """
    unknown = sorted(set(system.numbers.tolist()) - set(info.elements))
    if info.elements and unknown:
        what = f"model {name!r} does not know {', '.join(map(symbol, unknown))}"
        raise EngineError("unknown-element", what, f"`rootstockd models show {name}` lists what it knows.")
    if info.max_atoms is not None and len(system.numbers) > info.max_atoms:
        what = f"{len(system.numbers)} atoms, and model {name!r} takes {info.max_atoms}"
        raise EngineError("limit", what, "Use a smaller structure or another model.")
    for word, value, usual in (("charge", system.charge, 0), ("spin", system.spin, 1)):
        if value not in (None, usual) and word not in understood:
            raise EngineError(
                "unsupported",
                f"model {name!r} has no notion of {word}, and this system's is {value:g}",
                f'Leave it out (atoms.info["{word}"] in ASE), or use a model that takes it into account.',
            )


def choose_head(name: str, heads: tuple[str, ...], wanted: str | None) -> str | None:
    """The head to use: the one wanted, or the only one, or the one called default; None for a model without heads.

    Raises:
        EngineError: there is no such head, or none was chosen of several.
    """
    if wanted in heads or (wanted is None and not heads):
        return wanted
    if wanted is None:
        usual = [head for head in heads if len(heads) == 1 or head.lower() == "default"]
        if usual:
            return usual[0]
        message = f"model {name!r} has several heads"
    else:
        message = f"model {name!r} has no head {wanted[:100]!r}"
    hint = f"Name one of its heads: {', '.join(heads)}." if heads else "Leave it out: this model has no heads."
    raise EngineError("unsupported", message, hint)


LEAVE_OUT = "Do not ask for it, or use another model."
"""What is said to whoever asks for what a model does not compute."""


def refuse_missing(name: str, missing: Sequence[str]) -> None:
    """Refuse what a model does not compute.

    Raises:
        EngineError: there is something.
    """
    if missing:
        raise EngineError("unsupported", f"model {name!r} computes no {' and no '.join(missing)}", LEAVE_OUT)


def raise_if_gpus(spec: ModelSpec, error: Exception, what: str) -> None:
    """Tell apart what goes wrong in loading because of the GPU: another may do.

    Raises:
        EngineError: it is CUDA that has failed.
    """
    if spec.device != "cpu" and "CUDA" in describe(error):
        raise EngineError("device", what, "`rootstockd doctor` looks at the GPU.") from error


def guarded(evaluate: Callable[[list[Task]], list[Result]], tasks: list[Task]) -> list[Result]:
    """What `evaluate` gives; torch's errors that say more than that it failed become what an Engine raises.

    Raises:
        MemoryError: the device has not enough for these tasks.
        EngineBrokenError: the device is in disorder.
    """
    try:
        return evaluate(tasks)
    except RuntimeError as error:
        if not out_of_memory(error):
            if in_disorder(error):
                raise EngineBrokenError from error
            raise
        text = str(error)
    if (torch := sys.modules.get("torch")) is not None:
        torch.cuda.empty_cache()  # not before here, where what the failed pass had in its hands is free
    raise MemoryError(text)


def symbol(number: int) -> str:
    """An element's symbol, for messages."""
    try:
        from ase.data import chemical_symbols  # an engine's environment may have no ASE  # noqa: PLC0415
    except ImportError:
        return f"element {number}"
    return str(chemical_symbols[number]) if number < len(chemical_symbols) else str(number)


def read_weights(spec: ModelSpec) -> bytes:
    """The model's file, read once: what was hashed is what gets loaded, whatever becomes of the path meanwhile.

    Raises:
        EngineError: it can't be read, or is not the file that the catalogue means.
    """
    name, path = spec.name, spec.weights
    try:
        with open_regular(path) as file:
            try:
                data = file.read()
                actual = hashlib.sha256(data).hexdigest()
            except MemoryError:  # the right file's may be had when other models have gone; another's is not wanted
                if (actual := digest_of(path)) == spec.sha256:
                    raise
    except FileNotFoundError as error:
        hint = f"`rootstockd models pull {name}`, or put the file back."
        raise EngineError("model-load", f"model {name!r}: its weights {path} are missing", hint) from error
    except OSError as error:
        what = f"model {name!r}: its weights {path} can't be read: {error.strerror}"
        raise EngineError("model-load", what, "The user that the daemon runs as must be able to read them.") from error
    if actual != spec.sha256:
        raise EngineError(
            "model-load",
            f"model {name!r}: its weights {path} have the SHA-256 {actual}, where the catalogue says "
            f"{spec.sha256 or 'none'}: the file is another, or was changed or damaged. It was not loaded",
            f'Put the right file back; or, if you trust this one, write sha256 = "{actual}" into the catalogue '
            "and `rootstockd reload`.",
        )
    return data
