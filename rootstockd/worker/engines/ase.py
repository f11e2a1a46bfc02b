"""Any ASE calculator as an engine, one structure at a time: a family is a catalogue entry, and no code.

The entry's `arguments`:

============= ======================================================================================================
calculator    what makes it: `module:Class`, `module:function` or `module:Class.method`
options       keyword arguments for that. A string that is wholly `{device}`, `{dtype}`, `{weights}` or `{head}`
              becomes that: `cpu` or `cuda`, `float32` or `float64`, the path of a copy of the entry's weights that has
              the right SHA-256, and one of the entry's `heads`, for each of which there is a calculator then. A table
              with `make` (and `options`) becomes what that makes, for calculators that take an object
info          what it reads in `atoms.info`: a table of `charge` and `spin`, each with the key that it looks under
complete_cell give it a vector along directions that have none and are not periodic, if it wants three in any case
energy        which of its energies to take where they differ: `energy` or `free_energy`, whose slope forces are
max_atoms     the most atoms that it takes
============= ======================================================================================================
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import sys
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import ase
import numpy as np
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError, all_changes
from ase.geometry import complete_cell
from ase.stress import voigt_6_to_full_3x3_stress

from rootstockd.worker.engines import (
    Array,
    EngineError,
    EngineInfo,
    ModelSpec,
    Result,
    System,
    Task,
    check_system,
    choose_head,
    guarded,
    raise_if_gpus,
    read_weights,
    refuse_missing,
)
from rootstockd.worker.engines.deterministic import deterministic, fuse_nothing
from rootstockd.worker.failures import describe
from rootstockd.worker.memory import gpu_memory

_CALCULATOR = re.compile(r"\w+(\.\w+)*:\w+(\.\w+)*")
_ARGUMENTS = {"calculator", "options", "info", "complete_cell", "energy", "max_atoms"}
_KNOWN = ("energy", "free_energy", "forces", "stress", "energies")
_SAME_ENERGY = 1e-6
"""Up to this part of it, two energies differ by rounding alone."""


@dataclass(frozen=True)
class _Prepared:
    """A session's system."""

    calculator: Any
    numbers: Array
    pbc: tuple[bool, bool, bool]
    info: dict[str, float]
    exact: bool


class AseEngine:
    """An ASE calculator, or one for each of a model's heads; all systems use it in turn.

    Args:
        spec: what the catalogue says.

    Raises:
        EngineError: the calculator can't be made.
    """

    def __init__(self, spec: ModelSpec) -> None:
        arguments = spec.arguments
        self._spec, self._name = spec, spec.name
        self._info_keys: dict[str, str] = arguments.get("info", {})
        self._complete: bool = arguments.get("complete_cell", False)
        self._energy: str | None = arguments.get("energy")
        self._heads = tuple(spec.heads) if _mentions(spec, "{head}") else ()
        self._calculators: dict[str | None, Any] = {}
        self._given: dict[int, _Prepared] = {}
        """By calculator, by its id: what it was told last that it has."""
        calculator = self._calculator(self._heads[0] if self._heads else None)
        self._backend = type(calculator).__name__
        self.info = EngineInfo(
            properties=tuple(p for p in _KNOWN if p in calculator.implemented_properties),
            elements=tuple(spec.elements),
            heads=self._heads,
            max_atoms=arguments.get("max_atoms"),
            backend=f"{self._backend} ({_versions(calculator)}, {spec.device})",
        )

    def _calculator(self, head: str | None) -> Any:
        """The calculator for a head, made when it is first asked for."""
        if head not in self._calculators:
            self._calculators[head] = make(self._spec, head)
        return self._calculators[head]

    def prepare(self, system: System) -> _Prepared:
        """What its Atoms have beside cell and positions, and who evaluates it."""
        check_system(self._name, self.info, system, tuple(self._info_keys))
        calculator = self._calculator(choose_head(self._name, self._heads, system.head))
        given = {"charge": system.charge, "spin": system.spin}
        info = {key: value for word, key in self._info_keys.items() if (value := given[word]) is not None}
        prepared = _Prepared(calculator, system.numbers, system.pbc, info, system.exact)
        self._give(prepared)
        return prepared

    def _give(self, system: _Prepared) -> None:
        """Tell a calculator which structure it has now, as ASE does when a structure gets its calculator."""
        if hasattr(system.calculator, "set_atoms") and self._given.get(id(system.calculator)) is not system:
            system.calculator.set_atoms(Atoms(system.numbers, pbc=system.pbc, info=dict(system.info)))
            self._given[id(system.calculator)] = system

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Each task in its turn."""
        return guarded(self._each, tasks)

    def memory(self) -> int | None:
        """What torch has of the GPU, if the calculator uses torch."""
        return gpu_memory()

    def _each(self, tasks: list[Task]) -> list[Result]:
        return [self._one(task) for task in tasks]

    def _one(self, task: Task) -> Result:
        system: _Prepared = task.system
        wanted = ["energy", "forces"] + ["stress"] * task.stress + ["energies"] * task.energies
        refuse_missing(self._name, [name for name in wanted if name not in self.info.properties])
        cell, pbc = self._box(task.cell, system.pbc)
        # made anew: calculators change what they are given
        atoms = Atoms(system.numbers, task.positions, cell=cell, pbc=pbc, info=dict(system.info))
        reset(system.calculator)
        self._give(system)
        try:
            # not get_property, for which a structure that differs in `info` alone is the same
            with deterministic() if system.exact else nullcontext():
                system.calculator.calculate(atoms, wanted, all_changes)
        except PropertyNotImplementedError as error:
            raise EngineError("unsupported", f"model {self._name!r}: {describe(error)}") from error
        results = system.calculator.results
        refuse_missing(self._name, [name for name in wanted if results.get(name) is None])
        virial = None
        if task.stress:
            virial = -_full(results["stress"]) * abs(np.linalg.det(cell))
        return Result(
            energy=self._choose_energy(results),
            forces=_copy(results["forces"]),  # some calculators write each result into the same array
            virial=virial,
            energies=_copy(results["energies"]) if task.energies else None,
            backend=self._backend,
        )

    def _box(self, cell: Array, pbc: tuple[bool, bool, bool]) -> tuple[Array, tuple[bool, bool, bool]]:
        """The same lattice as the calculator may see it: some compute a wrong stress in a left-handed cell."""
        if self._complete and not all(pbc):
            cell = complete_cell(cell)
        if np.linalg.det(cell) < 0:
            return cell[[1, 0, 2]], (pbc[1], pbc[0], pbc[2])
        return cell, pbc

    def _choose_energy(self, results: dict[str, Any]) -> Any:
        """The one energy that there is room for."""
        energy = _scalar(results[self._energy or "energy"])
        free = results.get("free_energy")
        if self._energy is None and free is not None and isinstance(energy, float):
            free = _scalar(free)
            if abs(free - energy) > _SAME_ENERGY * max(1.0, abs(energy)):
                raise EngineError(
                    "unsupported",
                    f"model {self._name!r}: its energy ({energy:.9g} eV) and its free energy ({free:.9g} eV) differ, "
                    "and a session has room for one",
                    'Choose in the catalogue: arguments = { energy = "free_energy", ... }, whose slope its forces are, '
                    'or energy = "energy".',
                )
        return energy


def reset(calculator: Any) -> None:
    """Have it forget what it computed for whom, and so its parts, if it is a sum of others."""
    calculator.results = {}
    if hasattr(calculator, "reset"):
        calculator.reset()
    for part in getattr(getattr(calculator, "mixer", None), "calcs", ()):
        reset(part)


def _scalar(value: Any) -> Any:
    """A number, also if it comes in an array of one."""
    array = np.asarray(value)
    return array.item() if array.size == 1 else value


def _copy(values: Any) -> Array:
    """An array of one's own; float64 if it has real numbers."""
    array = np.array(values)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _full(stress: Any) -> Array:
    """(3, 3) of a stress in either of the forms that calculators give; what has another is for the loop to refuse."""
    array = _copy(stress)
    return voigt_6_to_full_3x3_stress(array) if array.shape == (6,) else array


def _versions(calculator: Any) -> str:
    """Its package, ASE, and torch if it is used."""
    package = type(calculator).__module__.partition(".")[0]
    versions = {"ase": ase.__version__}
    try:
        versions = {package: metadata.version(package), **versions}
    except metadata.PackageNotFoundError:  # a module of the site's own
        versions = {package: "", **versions}
    if (torch := sys.modules.get("torch")) is not None:
        versions["torch"] = torch.__version__
    return ", ".join(f"{name} {version}".strip() for name, version in versions.items())


# --- making one


def make(spec: ModelSpec, head: str | None) -> Any:
    """The calculator that the catalogue describes.

    Raises:
        EngineError: it can't be made.
    """
    target = spec.arguments["calculator"]
    words = {"{device}": spec.device, "{dtype}": spec.dtype}
    if head is not None:
        words["{head}"] = head
    with tempfile.TemporaryDirectory(prefix="weights-") as folder:
        if spec.weights:
            copy = Path(folder, Path(spec.weights).name)  # its name may tell a loader what it is
            copy.write_bytes(read_weights(spec))
            words["{weights}"] = str(copy)
        try:
            return _call(target, spec.arguments.get("options", {}), words)
        except Exception as error:
            text = f"model {spec.name!r}: can't make {target}: {describe(error)}"
            raise_if_gpus(spec, error, text)
            raise EngineError("model-load", text, _hint(spec, error)) from error


def _hint(spec: ModelSpec, error: Exception) -> str:
    if not isinstance(error, ModuleNotFoundError):
        return ""
    return (
        f"Install it in the environment {spec.environment!r}; or, for a module of your own, start the daemon anew with "
        "its folder in PYTHONPATH."
    )


def _call(target: str, options: dict[str, Any], words: dict[str, str]) -> Any:
    module, _, names = target.partition(":")
    function: Any = functools.reduce(getattr, names.split("."), importlib.import_module(module))
    return function(**{key: _fill(value, words) for key, value in options.items()})


def _fill(value: Any, words: dict[str, str]) -> Any:
    """An option's value, with words and tables replaced by what they stand for."""
    if isinstance(value, str):
        return words.get(value, value)
    if isinstance(value, list):
        return [_fill(item, words) for item in value]
    if isinstance(value, dict) and "make" in value:
        return _call(value["make"], value.get("options", {}), words)
    if isinstance(value, dict):
        return {key: _fill(item, words) for key, item in value.items()}
    return value


def _mentions(spec: ModelSpec, word: str) -> bool:
    return json.dumps(word) in json.dumps(spec.arguments.get("options", {}))


def load(spec: ModelSpec) -> AseEngine:
    """Make the calculator that the catalogue describes.

    Raises:
        EngineError: it can't be made, or what the catalogue says makes no sense.
    """
    if problem := problem_of(spec):
        raise EngineError("model-load", f"model {spec.name!r}: {problem}")
    engine = AseEngine(spec)
    if spec.device != "cpu":
        fuse_nothing()
    return engine


def problem_of(spec: ModelSpec) -> str:
    """What can be seen to be wrong with an entry without making its calculator; empty if nothing."""
    arguments = spec.arguments
    unknown = sorted(set(arguments) - _ARGUMENTS)
    strange = sorted(set(arguments.get("info", {})) - {"charge", "spin"})
    problems = {
        f"no such arguments: {', '.join(unknown)}. Keyword arguments of the calculator go into `options`": unknown,
        'its arguments need calculator = "module:Class"': (not _CALCULATOR.fullmatch(str(arguments.get("calculator")))),
        f"nobody says a system's {', '.join(strange)}; `info` can have charge and spin": strange,
        '`energy` can be "energy" or "free_energy"': arguments.get("energy") not in (None, "energy", "free_energy"),
        'it needs both weights and an option with the value "{weights}", or neither': (
            bool(spec.weights) != _mentions(spec, "{weights}")
        ),
        'it needs both heads and an option with the value "{head}", or neither': (
            bool(spec.heads) != _mentions(spec, "{head}")
        ),
    }
    return next((text for text, is_so in problems.items() if is_so), "")
