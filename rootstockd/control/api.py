"""The routes of the control API, and the server that answers on the control socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from typing import TYPE_CHECKING

import psutil
import uvicorn
from fastapi import FastAPI

import rootstockd
from rootstockd.control.schema import CatalogueEntry, DaemonStatus, ModelStatus, SessionStatus, StopRequest

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon
    from rootstockd.sessions import Session
    from rootstockd.supervisor import Supervisor


def make_app(daemon: Daemon) -> FastAPI:
    """The control API of a daemon."""
    app = FastAPI(title="rootstockd", version=rootstockd.__version__)

    @app.get("/v1/status")
    async def status() -> DaemonStatus:
        """What the daemon is doing."""
        return DaemonStatus(
            version=rootstockd.__version__,
            pid=os.getpid(),
            state=daemon.state,
            since=daemon.since,
            config=daemon.config,
            memory=resident_memory(os.getpid()) or 0,
            evaluations=sum(model.evaluations for model in daemon.fleet.values()),
            models=[model_status(model, str(daemon.config.device)) for model in daemon.fleet.values()],
            sessions=[session_status(session) for session in daemon.sessions],
        )

    @app.get("/v1/models")
    async def models() -> list[CatalogueEntry]:
        """What the daemon could load."""
        states = {model.spec.name: model.state.value for model in daemon.fleet.values()}
        return [
            CatalogueEntry(
                name=name,
                aliases=list(entry.aliases),
                family=entry.family,
                description=entry.description,
                elements=list(entry.elements),
                dtype=entry.dtype,
                licence=entry.licence,
                state=states.get(name, "cold"),
            )
            for name, entry in daemon.catalogue.items()
            if not entry.hidden
        ]

    @app.post("/v1/stop", status_code=202)
    async def stop(request: StopRequest) -> None:
        """Drain and end."""
        daemon.stop(force=request.force, replaced=request.replaced)

    return app


def model_status(model: Supervisor, device: str) -> ModelStatus:
    """A model as status shows it."""
    return ModelStatus(
        name=model.spec.name,
        device=device,
        dtype=model.spec.dtype,
        state=model.state.value,
        error=str(model.error) if model.error else None,
        backend=model.info.backend if model.info else None,
        note=(model.info.note or None) if model.info else None,
        batch_atoms=model.scheduler.budget,
        pid=model.pid,
        memory=resident_memory(model.pid) if model.pid else None,
        sessions=model.clients,
        waiting=len(model.scheduler.waiting),
        evaluations=model.evaluations,
        batches=model.batches,
        restarts=model.restarts,
    )


def session_status(session: Session) -> SessionStatus:
    """A session as status shows it."""
    request = session.request
    return SessionStatus(
        id=session.id,
        user=session.user,
        pid=session.pid,
        model=request.model if request else None,
        natoms=len(request.numbers) if request else None,
        state=session.state,
        evaluations=session.evaluations,
        since=session.since,
    )


def resident_memory(pid: int) -> int | None:
    """Resident memory of a process in bytes; None when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return None


class ControlServer(uvicorn.Server):
    """uvicorn on the daemon's own loop and socket; signals stay the daemon's."""

    def __init__(self, daemon: Daemon, sock: socket.socket) -> None:
        config = uvicorn.Config(make_app(daemon), log_config=None, access_log=False, lifespan="off")
        config.timeout_graceful_shutdown = 1  # a request that never ends must not keep the daemon from ending
        super().__init__(config)
        self._sock = sock

    async def run_until_stopped(self) -> None:
        """Serve until `should_exit` is set."""
        await self.serve(sockets=[self._sock])

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield
