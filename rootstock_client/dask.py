"""Dask: a plugin that sees to each node's daemon, and calculators for tasks (docs/many-nodes.md).

>>> from distributed import Client, LocalCluster
>>> from rootstock_client.dask import RootstockPlugin, calculator
>>> client = Client(LocalCluster())  # doctest: +SKIP
>>> client.register_plugin(RootstockPlugin(start=["--gpu", "0", "--model", "mace-mp-medium"]))  # doctest: +SKIP
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rootstock_client.client import RootstockClient
from rootstock_client.errors import DaemonNotFoundError
from rootstock_client.node_daemon import NodeDaemon
from rootstock_client.patience import patience_in_seconds
from rootstock_client.runtime_dir import SOCKET_NAME, find_socket, job_runtime_dir, user_runtime_dir

try:
    import dask.config
    from distributed import Worker, WorkerPlugin, get_worker
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error.msg}; pip install 'rootstockd[dask]'", name=error.name) from error

if TYPE_CHECKING:
    from rootstock_client.calculator import RootstockCalculator

log = logging.getLogger("distributed.rootstock")
"""Dask's own name above it, so that it is in the workers' logs."""

PAUSES = (0.0, 1.0, 5.0)
"""Seconds before each try to start a daemon again that was killed."""


class RootstockPlugin(WorkerPlugin):  # type: ignore[misc]  # Dask is not typed
    """Sees that each node of a Dask cluster has its daemon: `client.register_plugin(RootstockPlugin(...))`.

    A worker that joins looks for a daemon as every job does (see `rootstock_client.runtime_dir`). Where there is none,
    it starts one; the workers of a node (in Slurm: of a job on it) share it, whichever cluster of this user they belong
    to. It is started again if it is killed, while tasks wait, and stopped when the last of them leaves. One that was
    there before is used and left alone. A worker that joins later, and whose node can't have a daemon, leaves the
    cluster: its tasks would all fail.

    Args:
        start: the options of `rootstockd start` for a node that has no daemon, such as `["--gpu", "0", "--model",
            "mace-mp-medium"]`. Without them nothing is started.
        command: what starts a daemon, if it is not installed beside the workers: `["/opt/rootstockd/bin/rootstockd"]`.
        socket: the daemon's session socket, the same on all nodes.
        patience: how many seconds tasks wait for a daemon that has gone; see RootstockClient.

    Raises:
        TypeError: options or command are no lists.
        ValueError: the patience is no number of seconds.
    """

    name = "rootstock"

    def __init__(
        self,
        start: Sequence[str] | None = None,
        *,
        command: Sequence[str] | None = None,
        socket: str | os.PathLike[str] | None = None,
        patience: float | None = None,
    ) -> None:
        for given, value in (("start", start), ("command", command)):
            if isinstance(value, str):
                raise TypeError(f"{given} is a list of words, not {value!r}; try {value.split()}")
        if patience is not None:
            patience_in_seconds(patience)
        self._start, self._command = start, command
        self._socket, self._patience = socket, patience
        self.client: RootstockClient | None = None
        """The node's daemon, as tasks see it; None before a worker has it."""
        self._daemon: NodeDaemon | None = None
        self._attending: asyncio.Task[None] | None = None

    async def setup(self, worker: Worker) -> None:
        """Have a daemon; the worker takes no tasks before.

        Raises:
            DaemonNotFoundError: there is none, and none is to be started here.
            RootstockError: none can be started.
        """
        joining = not worker.periodic_callbacks["heartbeat"].is_running()
        try:
            self._daemon = NodeDaemon(self._address(), self._start_command(), _environment())
            await self._daemon.join()
        except Exception as error:
            if joining:  # nobody is there to be told, and it would take one task after the other
                _leave(worker, str(error))
            raise
        self.client = RootstockClient(self._daemon.socket, patience=self._patience)
        if self._daemon.shared:
            self._attending = asyncio.create_task(self._attend(worker, self._daemon))

    async def teardown(self, worker: Worker) -> None:
        """Give up the share in the daemon."""
        del worker
        if self._attending is not None:
            self._attending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._attending
        if self._daemon is not None:
            await self._daemon.leave()

    def _address(self) -> Path:
        """Where the daemon is, or where it would be started."""
        try:
            return find_socket(self._socket)
        except DaemonNotFoundError:
            if self._start is None:
                raise
            return (job_runtime_dir() or user_runtime_dir()) / SOCKET_NAME

    def _start_command(self) -> list[str]:
        """The command that starts a daemon, if one shall be started."""
        if self._start is None:
            return []
        return [*(self._command or (sys.executable, "-m", "rootstockd")), "start", *self._start]

    async def _attend(self, worker: Worker, daemon: NodeDaemon) -> None:
        """Start the daemon again whenever it was killed, as long as it is one that we share."""
        while daemon.shared:
            if not await daemon.killed():
                log.warning("rootstockd at %s was stopped, and is not started again", daemon.socket)
                return
            log.warning("rootstockd at %s was killed; there will be another", daemon.socket)
            for pause in PAUSES:
                await asyncio.sleep(pause)
                try:
                    await daemon.join()
                    break
                except Exception as error:  # whatever it is, the node is without a daemon, and the worker is to know
                    reason = str(error) or type(error).__name__
                    log.warning("%s", reason)
            else:
                _leave(worker, reason)
                return


def calculator(model: str, **options: Any) -> RootstockCalculator:
    """An ASE calculator for a task: that of the node's daemon.

    A thread of a worker keeps a session for each model and options, so that a thousand tasks do not open a thousand;
    each task has a calculator of its own in it, and takes the potential as it finds it. For several calculators at
    work at a time in one task (NEB) use RootstockClient.
    Outside of tasks it is `RootstockClient().calculator(model, **options)`.

    Args:
        model: a name from the daemon's catalogue.
        options: those of `RootstockClient.calculator`.

    Raises:
        DaemonNotFoundError: there is no daemon on this node, and no RootstockPlugin to start one.
    """
    try:
        plugin = get_worker().plugins.get(RootstockPlugin.name)
    except ValueError:
        return RootstockClient().calculator(model, **options)
    client = (plugin and plugin.client) or RootstockClient()
    key = (client.socket, client.patience, model, repr(sorted(options.items())))
    calculator = client.calculator(model, **options)
    calculator.share_session(_kept.calculators.setdefault(key, calculator))
    return calculator


class _Kept(threading.local):
    """A calculator for each session of a thread; the sessions go with it."""

    def __init__(self) -> None:
        self.calculators: dict[tuple[Any, ...], RootstockCalculator] = {}


_kept = _Kept()


def _environment() -> dict[str, str]:
    """The variables for a daemon: without those that Dask's nannies set for workers, one thread for each being one."""
    ours = {name: str(value) for name, value in dask.config.get("distributed.nanny.pre-spawn-environ", {}).items()}
    return {name: value for name, value in os.environ.items() if ours.get(name) != value}


def _leave(worker: Worker, reason: str) -> None:
    """Have a worker leave its cluster for good, when it has time for it."""
    worker.loop.add_callback(worker.close, nanny=True, reason=f"no rootstockd on this node: {reason}")
