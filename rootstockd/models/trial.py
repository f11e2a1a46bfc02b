"""Loading a model once, in a confined worker as a daemon's, to see that it can be and what it says of itself."""

from __future__ import annotations

import asyncio
import contextlib
import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rootstock_client.errors import ModelLoadError, RootstockError
from rootstockd import worker_output
from rootstockd.worker.engines import EngineInfo, ModelSpec
from rootstockd.worker_messages import Failure, parse
from rootstockd.worker_output import Ration
from rootstockd.worker_process import WorkerProcess

TIMEOUT = 600.0
"""Seconds that loading may take."""


def try_out(spec: ModelSpec, harvest: Callable[[Path], None] | None = None, *, show_errors: bool = True) -> EngineInfo:
    """Load a model in a worker and end it.

    Args:
        spec: the model.
        harvest: called with the worker's scratch folder before it goes.
        show_errors: whether what the worker has to say to people comes out if it fails, such as a traceback.

    Raises:
        RootstockError: it can't be loaded.
    """
    words = io.StringIO()
    handler = logging.StreamHandler(words)
    output = logging.getLogger(worker_output.__name__)
    output.addHandler(handler)
    try:
        return asyncio.run(_try_out(spec, harvest))
    except RootstockError:
        if show_errors:
            sys.stderr.write(words.getvalue())
        raise
    finally:
        output.removeHandler(handler)


async def _try_out(spec: ModelSpec, harvest: Callable[[Path], None] | None) -> EngineInfo:
    answer: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()

    def listen(kind: bytes, body: bytes) -> None:
        if answer.done():
            return
        try:
            said = parse(kind, body)
        except ValueError as error:
            answer.set_exception(ModelLoadError(f"model {spec.name!r}: its worker said what makes no sense: {error}"))
            return
        if isinstance(said, EngineInfo):
            answer.set_result(said)
        elif isinstance(said, Failure):
            answer.set_exception(said.error)

    environment = {"CUDA_VISIBLE_DEVICES": ""} if spec.device == "cpu" else {}
    worker = await WorkerProcess.start(spec, Path(sys.executable), environment, listen, Ration())
    ended = asyncio.create_task(worker.wait())
    try:
        waited: list[asyncio.Future[Any]] = [answer, ended]
        await asyncio.wait(waited, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            how = f"its worker ended: {ended.result().how}" if ended.done() else f"that took more than {TIMEOUT:.0f} s"
            raise ModelLoadError(f"model {spec.name!r} can't be loaded: {how}.")
        info = answer.result()
        if harvest is not None and worker.scratch is not None:
            harvest(worker.scratch)
        return info
    finally:
        worker.kill()
        with contextlib.suppress(asyncio.CancelledError):
            await ended
