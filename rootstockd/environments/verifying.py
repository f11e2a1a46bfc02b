"""Whether an environment computes what it should: a real worker in it, and a structure whose numbers are known."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers

from rootstockd.config import Device
from rootstockd.environments.builds import Build, EnvironmentBuildError
from rootstockd.environments.finding import Environment
from rootstockd.environments.specification import Check
from rootstockd.models.catalogue import Catalogue
from rootstockd.models.spec import spec_of
from rootstockd.models.store import located
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker.slots import Slot
from rootstockd.worker.units import BOHR, HARTREE
from rootstockd.worker_messages import Failure, Versions, parse
from rootstockd.worker_output import Ration
from rootstockd.worker_process import WorkerProcess

PATIENCE = 900.0
"""Seconds for a worker to start, load and evaluate."""


def verify(build: Build, catalogues: Iterable[Path], device: Device) -> str:
    """Load the model of the specification's check in a worker, evaluate, and compare.

    Args:
        build: the environment.
        catalogues: files of further models.
        device: where to compute.

    Returns:
        What was found, in words.

    Raises:
        EnvironmentBuildError: it can't be loaded or evaluated, or the numbers are others.
        CatalogueError, UnknownModelError: there is no such model.
    """
    check, name = build.manifest.specification.verify, build.manifest.name
    assert check is not None
    model, entry = Catalogue.load(catalogues).resolve(check.model)
    spec = dataclasses.replace(spec_of(model, located(model, entry), device=device.kind), environment=name)
    environment = Environment(name, build.python, True, "")  # noqa: FBT003
    try:
        energy, forces, backend = asyncio.run(asyncio.wait_for(_evaluate(spec, environment, device, check), PATIENCE))
    except asyncio.TimeoutError as error:
        raise EnvironmentBuildError(f"environment {name!r}: {model} did not answer within {PATIENCE:.0f} s.") from error
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
    messages: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
    worker = await WorkerProcess.start(
        spec, environment, device.environment, lambda kind, body: messages.put_nowait((kind, body)), Ration()
    )
    ended = asyncio.create_task(worker.wait())
    slot = Slot.create(len(check.symbols))
    try:
        info = await _until(b"R", messages, ended)
        slot.numbers[:] = [atomic_numbers[symbol] for symbol in check.symbols]
        slot.cells[0] = np.array(check.cell) / BOHR
        slot.positions[0] = np.array(check.positions) / BOHR
        worker.attach(1, slot, _settings())
        worker.evaluate([1])
        await _until(b"E", messages, ended)
        assert isinstance(info, EngineInfo)
        return float(slot.energies[0]) * HARTREE, slot.forces[0] * (HARTREE / BOHR), info.backend
    finally:
        worker.hang_up()
        worker.kill()
        await ended
        slot.close()


def _settings() -> dict[str, Any]:
    """As a session's, of somebody who asks for nothing in particular."""
    wanted: dict[str, Any] = {"pbc": (True, True, True), "charge": None, "spin": None, "head": None, "exact": False}
    return {**wanted, "tolerance": None, "session": 0, "stress": False, "energies": False}


async def _until(kind: bytes, messages: asyncio.Queue[tuple[bytes, bytes]], ended: asyncio.Task[Any]) -> Any:
    """What the worker says with a message of this kind.

    Raises:
        EnvironmentBuildError: it says that something failed, or ends.
    """
    while True:
        told = asyncio.create_task(messages.get())
        await asyncio.wait([told, ended], return_when=asyncio.FIRST_COMPLETED)
        if not told.done():
            told.cancel()
            raise EnvironmentBuildError(f"the worker ended: {ended.result().how}. What it printed stands above.")
        got, body = told.result()
        said = None if got in (b"E", b"O") else parse(got, body)
        if isinstance(said, Failure):
            raise EnvironmentBuildError(str(said.error))
        if isinstance(said, Versions):
            said.check()
        if got == kind:
            return said
