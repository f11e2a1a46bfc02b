"""Loading a model: the module of its family, in this package or from elsewhere, and a correction where one is added."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata
from typing import Any

from rootstockd.worker import stages
from rootstockd.worker.engines import ENGINE_API, Engine, EngineError, ModelSpec

ENTRY_POINTS = "rootstockd.engines"
"""Group of the entry points of engines from elsewhere: the name is a family's, the object a module like those here."""
FAMILIES = ("ase", "ipi", "mace", "noop")
"""Families whose modules are in this package."""


def load_engine(spec: ModelSpec) -> Engine:
    """Load a model. Slow: imports the family's packages and reads its weights.

    Raises:
        EngineError: it can't be loaded.
    """
    if spec.dispersion is None:
        return load_family(spec)
    try:
        from rootstockd.worker.engines.dispersion import with_dispersion  # needs a package more  # noqa: PLC0415
    except ImportError as error:
        raise EngineError(
            "unsupported",
            f"model {spec.name!r} can't be corrected for dispersion: {error}",
            f"Whoever runs the daemon can install the package dftd3 into the environment {sys.prefix}.",
        ) from error
    return with_dispersion(spec)


def load_family(spec: ModelSpec) -> Engine:
    """Load a model by its family's own code.

    Raises:
        EngineError: it can't be loaded.
    """
    stages.begin(stages.IMPORTS)
    if spec.family not in FAMILIES:
        module = _from_elsewhere(spec)
    else:
        try:
            module = importlib.import_module(f"{__package__}.{spec.family}")
        except ImportError as error:
            hint = (
                f"Build an environment for it, `rootstockd env create {spec.environment}`; or install what the family "
                f"{spec.family!r} needs beside the daemon."
            )
            raise EngineError("model-load", f"model {spec.name!r}: {error}", hint) from error
    stages.begin(stages.WEIGHTS)
    engine: Engine = module.load(spec)
    return engine


def _from_elsewhere(spec: ModelSpec) -> Any:
    """The module of a family that some installed package has.

    Raises:
        EngineError: there is none, there are several, or it is for another version of this interface.
    """
    found: Any = metadata.entry_points()
    found = found.select(group=ENTRY_POINTS) if hasattr(found, "select") else found.get(ENTRY_POINTS, ())  # Python 3.9
    points = {point.value: point for point in found if point.name == spec.family}
    where = f"the environment {sys.prefix}"
    if not points:
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: nothing in {where} evaluates models of the family {spec.family!r}",
            f"Install the package that has it as an entry point of {ENTRY_POINTS!r}.",
        )
    if len(points) > 1:
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: several packages in {where} claim the family {spec.family!r}: {', '.join(points)}",
            "Remove all but one of them.",
        )
    (point,) = points.values()
    try:
        module = point.load()
    except ImportError as error:
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: the family {spec.family!r} is {point.value} in {where}, which can't be imported: "
            f"{error}",
            "Install what it lacks there, or ask whoever wrote it.",
        ) from error
    version = getattr(module, "ENGINE_API", None)
    if version != ENGINE_API:
        raise EngineError(
            "model-load",
            f"model {spec.name!r}: the family {spec.family!r} is {point.value} in {where}, which has ENGINE_API "
            f"{version} where this rootstockd has {ENGINE_API}",
            "Install a version of it that goes with this rootstockd.",
        )
    return module
