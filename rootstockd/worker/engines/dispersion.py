"""Grimme's D3 dispersion correction, added to what any engine computes.

By s-dftd3 (the package `dftd3`), D3's reference implementation: two-body terms, with sharp cutoffs. With the constants
below it agrees with torch-dftd, which mace-torch's `mace_mp(dispersion=True)` adds, to 1e-6 of the correction, and is
about a hundred times as fast on a CPU. From francium on it has newer parameters, with other results; those elements are
refused.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from dftd3 import _libdftd3, interface

from rootstockd.worker.engines import (
    Array,
    Engine,
    EngineError,
    EngineInfo,
    ModelSpec,
    Result,
    System,
    Task,
    symbol,
)
from rootstockd.worker.engines.loading import load_family
from rootstockd.worker.lattice import normals

_BOHR, _HARTREE = 0.52917726, 27.21138505
"""In Å and eV, as in the D3 program of 2010 and in torch-dftd; later values would shift energies by 2e-7 of them."""
_LAST_ELEMENT = 86
_DAMPING = {
    "bj": interface.RationalDampingParam,
    "zero": interface.ZeroDampingParam,
    "bjm": interface.ModifiedRationalDampingParam,
    "zerom": interface.ModifiedZeroDampingParam,
}
_LIBRARY = ctypes.CDLL(_libdftd3.__file__)
"""s-dftd3, and what it is linked with."""


@dataclass(frozen=True)
class _Prepared:
    """A session's system."""

    numbers: Array
    pbc: tuple[bool, bool, bool]
    exact: bool
    inner: Any
    """What the corrected engine prepared."""


class DispersionEngine:
    """An engine whose results have D3 in them.

    Args:
        engine: what is corrected.
        name: catalogue name, for messages.
        correction: the correction.
    """

    def __init__(self, engine: Engine, name: str, correction: D3) -> None:
        self._engine, self._name, self._correction = engine, name, correction
        self._inner_info: EngineInfo | None = None
        self._info: EngineInfo

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself, less what D3 has not; the same object while that is."""
        inner = self._engine.info
        if inner is not self._inner_info:
            self._inner_info = inner
            self._info = replace(
                inner,
                properties=tuple(name for name in inner.properties if name != "energies"),
                backend=f"{inner.backend} + {self._correction}",
            )
        return self._info

    def prepare(self, system: System) -> _Prepared:
        """What both need to know; charge, spin and head are the corrected engine's business."""
        if unknown := sorted({number for number in system.numbers.tolist() if number > _LAST_ELEMENT}):
            raise EngineError(
                "unknown-element",
                f"model {self._name!r}: there is no D3 correction here for {', '.join(map(symbol, unknown))}: from "
                "francium on its parameters were revised, and programs differ",
                "Evaluate without dispersion.",
            )
        return _Prepared(system.numbers, system.pbc, system.exact, self._engine.prepare(system))

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """The engine's results, and the correction on top."""
        if any(task.energies for task in tasks):
            raise EngineError(
                "unsupported",
                f"model {self._name!r} computes no per-atom energies with D3, which has none to give",
                "Ask for them without `dispersion`.",
            )
        results = self._engine.evaluate([replace(task, system=task.system.inner) for task in tasks])
        return [self._corrected(task, result) for task, result in zip(tasks, results)]

    def memory(self) -> int | None:
        """The engine's; the correction takes none."""
        return self._engine.memory()

    def _corrected(self, task: Task, result: Result) -> Result:
        system: _Prepared = task.system
        with _one_thread() if system.exact else nullcontext():
            energy, forces, virial = self._correction.compute(system.numbers, task.positions, task.cell, system.pbc)
        return Result(
            energy=result.energy + energy,
            forces=result.forces + forces,
            virial=None if result.virial is None else result.virial + virial,
            backend=f"{result.backend or self.info.backend.partition(' ')[0]} + D3",
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Have s-dftd3 add in the same order each time, where it is built with OpenMP: its threads add as they come."""
    if not hasattr(_LIBRARY, "omp_set_num_threads"):
        yield
        return
    threads = _LIBRARY.omp_get_max_threads()
    _LIBRARY.omp_set_num_threads(1)
    try:
        yield
    finally:
        _LIBRARY.omp_set_num_threads(threads)


class D3:
    """The correction alone.

    Args:
        damping: `bj`, `zero`, `bjm` or `zerom`.
        xc: the functional whose parameters it has, such as `pbe`.
        cutoff: in Å; pairs that are farther apart do not count.
        cnthr: in Å; the same, for coordination numbers.

    Raises:
        ValueError: there are no parameters for this functional with this damping.
    """

    def __init__(self, damping: str, xc: str, cutoff: float, cnthr: float) -> None:
        self._text = f"D3({damping}) {xc}, {cutoff:.4g} Å"
        self._cutoff, self._cnthr = cutoff / _BOHR, min(cutoff, cnthr) / _BOHR
        try:
            self._parameters = _DAMPING[damping](method=xc, atm=False)
        except RuntimeError as error:
            raise ValueError(f"D3 has no parameters for the functional {xc!r} with damping {damping!r}") from error

    def __str__(self) -> str:
        return self._text

    def compute(
        self, numbers: Array, positions: Array, cell: Array, pbc: tuple[bool, bool, bool]
    ) -> tuple[float, Array, Array]:
        """Energy in eV, forces (natoms, 3) in eV/Å and virial (3, 3) in eV of a structure in Å."""
        lattice = _spread(cell, positions, pbc, self._cutoff * _BOHR) / _BOHR if any(pbc) else None
        model = interface.DispersionModel(numbers, positions / _BOHR, lattice)
        model.set_realspace_cutoff(self._cutoff, 0.0, self._cnthr)
        found = model.get_dispersion(self._parameters, grad=True)
        return (
            float(found["energy"]) * _HARTREE,
            found["gradient"] * (-_HARTREE / _BOHR),
            found["virial"] * -_HARTREE,
        )


def _spread(cell: Array, positions: Array, pbc: tuple[bool, bool, bool], reach: float) -> Array:
    """A cell that is periodic in all directions, with images out of reach in those without pbc.

    s-dftd3 1.7 has another energy for cells that are periodic in some directions only.
    """
    open_axes = [axis for axis in range(3) if not pbc[axis]]
    across = normals(cell[list(pbc)])
    spread = cell.copy()
    spread[open_axes] = across * (np.ptp(positions @ across.T, axis=0) + reach + 1.0)[:, None]
    return spread


def with_dispersion(spec: ModelSpec) -> DispersionEngine:
    """Load a model, with the correction that its spec has.

    Raises:
        EngineError: one of them can't be had.
    """
    assert spec.dispersion is not None
    try:  # first: it says what is wrong before a model takes its time
        correction = D3(**spec.dispersion)
    except ValueError as error:
        raise EngineError(
            "unsupported", f"model {spec.name!r}: {error}", "Its names are those of s-dftd3, such as pbe, rpbe, r2scan."
        ) from error
    return DispersionEngine(load_family(spec), spec.name, correction)
