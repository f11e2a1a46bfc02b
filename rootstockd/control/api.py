"""The routes of the control API, and the server that answers on the control socket."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Generator
from typing import TYPE_CHECKING

import psutil
import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response

import rootstockd
from rootstock_client.errors import AccessDeniedError, RootstockError
from rootstockd.config_file import ConfigError
from rootstockd.control.limits import MAX_HEAD, REFUSALS, BoundedBody, BoundedProtocol, invalid_request
from rootstockd.control.schema import (
    CatalogueEntry,
    DaemonStatus,
    ModelStatus,
    ReloadReport,
    SessionStatus,
    StopRequest,
)
from rootstockd.models.catalogue import CatalogueError
from rootstockd.peers import user_name

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon
    from rootstockd.sessions import Session
    from rootstockd.supervisor import Supervisor


def make_app(daemon: Daemon) -> FastAPI:
    """The control API of a daemon."""
    app = FastAPI(title="rootstockd", version=rootstockd.__version__, responses=REFUSALS)
    app.add_exception_handler(RequestValidationError, invalid_request)

    @app.exception_handler(RootstockError)
    async def refuse(_request: Request, error: RootstockError) -> Response:
        status = 403 if isinstance(error, AccessDeniedError) else 409
        return Response(error.to_json(), status, media_type="application/json")

    def admin(request: Request) -> None:
        uid = caller(request)
        if not daemon.accounts.is_admin(uid):
            raise AccessDeniedError(
                f"{user_name(uid)} does not administer this daemon.",
                "Only its own user, root, and those in access.admins of its configuration do.",
            )

    @app.get("/v1/status")
    async def status(request: Request) -> DaemonStatus:
        """What the daemon is doing; of others' sessions only their number, unless an administrator asks."""
        uid = caller(request)
        everything = daemon.accounts.is_admin(uid)
        shown = [session for session in daemon.sessions if everything or session.uid == uid]
        return DaemonStatus(
            version=rootstockd.__version__,
            pid=os.getpid(),
            state=daemon.state,
            since=daemon.since,
            device=str(daemon.config.device),
            config=daemon.config if everything else None,
            memory=resident_memory(os.getpid()) or 0,
            evaluations=sum(model.evaluations for model in daemon.fleet.values()),
            models=[
                model_status(model, str(daemon.config.device))
                for model in [*daemon.fleet.values(), *daemon.retired]
                if model.pid or not model.retired
            ],
            sessions=[session_status(session) for session in shown],
            other_sessions=len(daemon.sessions) - len(shown),
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

    @app.post("/v1/stop", status_code=202, dependencies=[Depends(admin)])
    async def stop(request: StopRequest) -> None:
        """Drain and end."""
        daemon.stop(force=request.force, replaced=request.replaced)

    @app.post("/v1/reload", dependencies=[Depends(admin)])
    async def reload() -> ReloadReport:
        """Read the configuration and the catalogues again."""
        try:
            return ReloadReport(restart_needed=daemon.reload())
        except (ConfigError, CatalogueError) as error:
            raise RootstockError(f"nothing was changed: {error}") from error

    return app


def caller(request: Request) -> int:
    """The uid of whoever asks."""
    assert request.client is not None
    return int(request.client.host)


def model_status(model: Supervisor, device: str) -> ModelStatus:
    """A model as status shows it."""
    return ModelStatus(
        name=model.spec.name,
        device=device,
        dtype=model.spec.dtype,
        state=model.state.value,
        error=str(model.error) if model.error else None,
        backend=model.info.backend if model.info else None,
        environment=model.environment.description if model.environment else None,
        note=(model.info.note or None) if model.info else None,
        unconfined=model.unconfined,
        batch_atoms=model.scheduler.budget,
        pid=model.pid,
        memory=resident_memory(model.pid) if model.pid else None,
        sessions=model.clients,
        waiting=model.scheduler.waiting,
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
        config = uvicorn.Config(
            BoundedBody(make_app(daemon)),
            http=BoundedProtocol,
            proxy_headers=False,  # they would change who asks
            ws="none",
            h11_max_incomplete_event_size=MAX_HEAD,
            log_config=None,
            access_log=False,
            lifespan="off",
        )
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
