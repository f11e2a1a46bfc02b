"""Loading a model once, in a confined worker as a daemon's, to see that it can be and what it says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from rootstockd.environments.finding import find_environment
from rootstockd.processes.one_worker import one_worker
from rootstockd.worker.engines import EngineInfo, ModelSpec


def try_out(spec: ModelSpec, harvest: Callable[[Path], None] | None = None, *, show_errors: bool = True) -> EngineInfo:
    """Load a model in a worker and end it.

    Args:
        spec: the model.
        harvest: called with the worker's scratch folder before it goes.
        show_errors: whether what the worker has to say to people comes out if it fails, such as a traceback.

    Raises:
        RootstockError: it can't be loaded.
    """
    return asyncio.run(_try_out(spec, harvest, show_errors=show_errors))


async def _try_out(spec: ModelSpec, harvest: Callable[[Path], None] | None, *, show_errors: bool) -> EngineInfo:
    variables = {"CUDA_VISIBLE_DEVICES": ""} if spec.device == "cpu" else {}
    environment = find_environment(spec.environment, spec.family)
    async with one_worker(spec, environment, variables, show_output=show_errors) as worker:
        if harvest is not None:
            harvest(worker.scratch)
        return worker.info
