"""One worker without a daemon: a model is loaded as a daemon would load it, to see what comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rootstock_client.errors import ModelLoadError, RootstockError
from rootstockd.environments.finding import Environment
from rootstockd.processes import output
from rootstockd.processes.ends import End
from rootstockd.processes.messages import Failure, Versions, parse
from rootstockd.processes.output import Ration
from rootstockd.processes.worker_process import WorkerProcess
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker.slots import Slot
from rootstockd.worker.units import BOHR, HARTREE

TIMEOUT = 900.0
"""Seconds that loading a model may take, or evaluating a structure."""
_LIKE_A_SESSIONS: dict[str, Any] = {
    "pbc": (True, True, True),
    "charge": None,
    "spin": None,
    "head": None,
    "exact": False,
    "tolerance": None,
    "session": 0,
    "stress": False,
    "energies": False,
}
"""What a slot comes with: nothing in particular is asked for."""


class OneWorker:
    """A worker whose model is loaded."""

    info: EngineInfo
    """What the model says of itself."""

    def __init__(self, model: str, process: WorkerProcess, told: asyncio.Queue[tuple[bytes, bytes] | End]) -> None:
        self._model, self._process, self._told = model, process, told

    @property
    def scratch(self) -> Path:
        """Its folder for temporary files."""
        return self._process.scratch

    async def evaluate(self, numbers: Sequence[int], cell: Any, positions: Any) -> tuple[float, np.ndarray]:
        """Energy and forces of a structure, periodic in all three directions.

        Args:
            numbers: (natoms,), atomic numbers.
            cell: (3, 3), Å, rows are lattice vectors.
            positions: (natoms, 3), Å.

        Returns:
            eV; (natoms, 3), eV/Å.

        Raises:
            RootstockError: it can't be evaluated.
        """
        slot = Slot.create(len(numbers))
        try:
            slot.numbers[:] = numbers
            slot.cells[0] = np.array(cell) / BOHR
            slot.positions[0] = np.array(positions) / BOHR
            self._process.attach(1, slot, _LIKE_A_SESSIONS)
            self._process.evaluate([1])
            await self._in_time(b"E")
            return float(slot.energies[0]) * HARTREE, slot.forces[0] * (HARTREE / BOHR)
        finally:
            slot.close()

    async def loaded(self) -> None:
        """Until its model is.

        Raises:
            RootstockError: it can't be loaded.
        """
        self.info = await self._in_time(b"R")

    async def _in_time(self, kind: bytes) -> Any:
        try:
            return await asyncio.wait_for(self._until(kind), TIMEOUT)
        except asyncio.TimeoutError as error:
            raise self._broken(f"did not answer within {TIMEOUT:.0f} s") from error

    async def _until(self, kind: bytes) -> Any:
        """What it says with the next message of this kind.

        Raises:
            RootstockError: it says that something failed, or nothing sensible, or ends.
        """
        while True:
            told = await self._told.get()
            if isinstance(told, End):
                raise self._broken(f"ended: {told.how}")
            if told[0] == kind == b"E":
                return None
            try:
                said = parse(*told)
            except ValueError as error:
                raise self._broken(f"sent an invalid message: {error}") from error
            if isinstance(said, Versions):
                said.check()
            if isinstance(said, Failure):
                raise said.error
            if told[0] == kind:
                return said

    def _broken(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"model {self._model!r} can't be used: its worker {what}.")


@contextlib.asynccontextmanager
async def one_worker(
    spec: ModelSpec, environment: Environment, variables: dict[str, str], *, show_output: bool = True
) -> AsyncIterator[OneWorker]:
    """A worker for as long as it is needed.

    Args:
        spec: the model.
        environment: where.
        variables: more for its environment.
        show_output: if something fails, write what the worker has printed, such as a traceback, to standard error.

    Raises:
        RootstockError: the model can't be loaded.
    """
    told: asyncio.Queue[tuple[bytes, bytes] | End] = asyncio.Queue()

    async def follow() -> None:
        told.put_nowait(await process.wait())  # behind all that it has said

    with _printed() as printed:
        process = await WorkerProcess.start(
            spec, environment, variables, lambda kind, body: told.put_nowait((kind, body)), Ration()
        )
        following = asyncio.create_task(follow())
        try:
            worker = OneWorker(spec.name, process, told)
            await worker.loaded()
            yield worker
        except RootstockError:
            if show_output:
                sys.stderr.write(printed.getvalue())
            raise
        finally:
            process.hang_up()
            process.kill()
            await following


@contextlib.contextmanager
def _printed() -> Iterator[io.StringIO]:
    """What workers print meanwhile."""
    words = io.StringIO()
    handler = logging.StreamHandler(words)
    logger = logging.getLogger(output.__name__)
    logger.addHandler(handler)
    try:
        yield words
    finally:
        logger.removeHandler(handler)
