"""Whether an environment computes what it should: a real worker in it, and a structure whose numbers are known."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from rootstock_client.errors import RootstockError
from rootstockd.environments.builds import Build, EnvironmentBuildError
from rootstockd.environments.finding import Environment
from rootstockd.environments.specification import Check
from rootstockd.models.availability import located
from rootstockd.models.catalogue import Catalogue
from rootstockd.models.spec import spec_of
from rootstockd.processes.one_worker import one_worker
from rootstockd.settings.config import Device
from rootstockd.worker.engines import ModelSpec


def verify(build: Build, check: Check, catalogues: Iterable[Path], device: Device) -> str:
    """Load the model of a specification's check in a worker, evaluate, and compare.

    Args:
        build: the environment.
        check: which model, and its numbers.
        catalogues: files of further models.
        device: where to compute.

    Returns:
        What was found, in words.

    Raises:
        EnvironmentBuildError: it can't be loaded or evaluated, or the numbers are others.
        CatalogueError, UnknownModelError: there is no such model.
    """
    name = build.manifest.name
    model, entry = Catalogue.load(catalogues).resolve(check.model)
    spec = dataclasses.replace(spec_of(model, located(model, entry), device=device.kind), environment=name)
    environment = Environment(name, build.python, True, "")  # noqa: FBT003
    try:
        energy, forces, backend = asyncio.run(_evaluate(spec, environment, device, check))
    except RootstockError as error:
        raise EnvironmentBuildError(f"environment {name!r} can't be verified: {error}") from error
    energy_error = abs(energy - check.energy)
    forces_error = float(np.abs(forces - np.array(check.forces)).max())
    found = (
        f"{model} ({backend}): the energy differs by {energy_error:.1e} eV ({check.energy_tolerance:.0e} is allowed), "
        f"forces by {forces_error:.1e} eV/Å ({check.forces_tolerance:.0e})"
    )
    if energy_error > check.energy_tolerance or forces_error > check.forces_tolerance:
        raise EnvironmentBuildError(
            f"environment {name!r} computes other numbers than it should: {found}. Do not use it; "
            f"`rootstockd env update {name}` builds it anew."
        )
    return found


async def _evaluate(spec: ModelSpec, environment: Environment, device: Device, check: Check) -> tuple[float, Any, str]:
    """Energy (eV), forces ((natoms, 3), eV/Å), and what computed them."""
    numbers = [atomic_numbers[symbol] for symbol in check.symbols]
    async with one_worker(spec, environment, device.environment) as worker:
        return *await worker.evaluate(numbers, check.cell, check.positions), worker.info.backend
