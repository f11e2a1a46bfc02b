"""The control API: its server on the control socket, and its routes."""

from __future__ import annotations

import functools
import logging
import math
import os
import socket
from typing import TYPE_CHECKING

import psutil
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.types import Scope

import rootstockd
from rootstock_client.errors import AccessDeniedError, RootstockError
from rootstockd.control.limits import AT_FIRST, REFUSALS, BoundedBody, ControlProtocol, Paced, json_response
from rootstockd.control.metrics import exposition
from rootstockd.control.schema import (
    LONG,
    CatalogueEntry,
    DaemonStatus,
    DeviceStatus,
    LoadAnswer,
    Loading,
    LoadRequest,
    ModelStatus,
    ReloadReport,
    SessionStatus,
    StopAnswer,
    StopRequest,
    UnloadAnswer,
    UnloadRequest,
)
from rootstockd.control.server import Server
from rootstockd.fleet.fleet import HOLD
from rootstockd.host.devices import process_memory
from rootstockd.host.log_rate import LogRate
from rootstockd.host.threads import in_thread
from rootstockd.models.availability import lack
from rootstockd.models.catalogue import CatalogueError
from rootstockd.sessions.turns import Allowance
from rootstockd.settings.config import Device
from rootstockd.settings.config_file import ConfigError
from rootstockd.supervision.roles import State

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon
    from rootstockd.fleet.fleet import Fleet
    from rootstockd.sessions.session import Session
    from rootstockd.supervision.supervisor import Supervisor


log = logging.getLogger(__name__)
log.addFilter(LogRate(log))


def control_server(daemon: Daemon, sock: socket.socket) -> Server:
    """The server on a daemon's control socket."""
    paces: dict[tuple[int, bool], Allowance] = {}

    def whose(scope: Scope) -> Allowance:
        uid = int(scope["client"][0])
        is_admin = daemon.accounts.is_admin(uid)
        return paces.setdefault((uid, is_admin), Allowance(AT_FIRST if is_admin else 0.0))

    app = Paced(BoundedBody(make_app(daemon)), whose)
    return Server(app, sock, functools.partial(ControlProtocol, daemon.accounts), daemon.look_up)


def make_app(daemon: Daemon) -> FastAPI:
    """The control API of a daemon."""
    app = FastAPI(title="rootstockd", version=rootstockd.__version__, responses=REFUSALS)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        """What is wrong with a request, without what came: that may be nothing that JSON can say."""
        problems = error.errors()[:10]
        return json_response(422, [{"loc": p["loc"], "msg": p["msg"], "type": p["type"]} for p in problems])

    @app.exception_handler(RootstockError)
    async def refuse(_request: Request, error: RootstockError) -> Response:
        status = 403 if isinstance(error, AccessDeniedError) else 409
        return Response(error.to_json(), status, media_type="application/json")

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
            devices=[str(device) for device in daemon.fleet.devices],
            device_states=[device_status(device, daemon.fleet) for device in daemon.fleet.devices],
            metrics=daemon.metrics_url,
            config=daemon.config if everything else None,
            memory=psutil.Process().memory_info().rss,
            evaluations=daemon.fleet.evaluations,
            models=[
                model_status(model, daemon.fleet, None if everything else uid)
                for model in daemon.fleet.supervisors()
                if model.pid or model.clients or not model.retired
            ],
            sessions=[session_status(session) for session in shown],
            other_sessions=len(daemon.sessions) - len(shown),
            warnings=daemon.notices.all if everything else [],
        )

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics(request: Request, *, public: bool = False) -> Response:
        """Metrics for Prometheus; what each user does is for administrators.

        Those that are `public`, for whoever is to read them, are as on the port: `metrics_users` decides.
        """
        users = daemon.config.metrics_users if public else daemon.accounts.is_admin(caller(request))
        return await exposition(daemon, request.headers.get("accept", ""), users=users)

    @app.get("/v1/models")
    async def models() -> list[CatalogueEntry]:
        """What the daemon could load."""
        states = daemon.fleet.states()
        entries = dict(daemon.offer.catalogue.items())
        lacks = await in_thread(lambda: {name: lack(name, entry) for name, entry in entries.items()})
        return [
            CatalogueEntry(
                name=name,
                aliases=list(entry.aliases),
                family=entry.family,
                description=entry.description,
                elements=list(entry.elements),
                dtype=entry.dtype,
                licence=entry.licence,
                state=states.get(name) or lacks[name] or "cold",
            )
            for name, entry in entries.items()
            if not entry.hidden
        ]

    @app.get("/v1/loading")
    async def loading(request: Request, model: str | None = None) -> list[Loading]:
        """Models that are not there yet or at a long batch, or the one of that name or alias, for whoever waits."""
        entry = None if model is None else daemon.offer.catalogue.name_of(model)
        supervisors, uid = daemon.fleet.supervisors(), caller(request)
        who = None if daemon.accounts.is_admin(uid) else uid
        states = [long_batch(supervisor, who) or loading_status(supervisor, daemon.fleet) for supervisor in supervisors]
        return [state for state in states if state is not None and entry in (None, state.name)]

    _take_orders(app, daemon)
    return app


def _take_orders(app: FastAPI, daemon: Daemon) -> None:
    """What administrators alone may ask for."""

    def who(request: Request) -> str:
        """Whoever asks, in words."""
        assert request.client is not None
        return f"{daemon.accounts.name_of(caller(request))} (pid {request.client.port})"

    async def admin(request: Request) -> None:
        uid = caller(request)
        if not daemon.accounts.is_admin(uid):
            what = request.url.path.rpartition("/")[2]
            name = daemon.accounts.name_of(uid)
            log.warning("%s may not ask to %s", who(request), what, extra={"about": f"requests of {name}"})
            raise AccessDeniedError(
                f"{name} does not administer this daemon.",
                "Only its own user, root, and those in access.admins of its configuration do.",
            )

    @app.post("/v1/load", status_code=202, dependencies=[Depends(admin)])
    async def load(request: LoadRequest) -> LoadAnswer:
        """Begin to load a model; status says when it is there."""
        daemon.check_open()
        loading = daemon.offer.load(request.model, request.dtype)
        return LoadAnswer(model=loading.name, dtype=loading.dtype)

    @app.post("/v1/unload", status_code=202, dependencies=[Depends(admin)])
    async def unload(asked: UnloadRequest, request: Request) -> UnloadAnswer:
        """Have a model leave memory."""
        daemon.check_open()
        waiting = daemon.offer.unload(asked.model, asked.dtype, who(request), force=asked.force)
        return UnloadAnswer(waiting=waiting, held=HOLD if asked.force else 0.0)

    @app.post("/v1/stop", status_code=202, dependencies=[Depends(admin)])
    async def stop(asked: StopRequest, request: Request) -> StopAnswer:
        """Drain and end."""
        how = " at once" if asked.force else " for a restart" if asked.replaced else ""
        log.info("asked to stop%s by %s", how, who(request))
        answer = StopAnswer(sessions=[session_status(session) for session in daemon.sessions])
        daemon.stop(force=asked.force, replaced=asked.replaced)
        return answer

    @app.post("/v1/reload", dependencies=[Depends(admin)])
    async def reload(request: Request) -> ReloadReport:
        """Read the configuration and the catalogues again."""
        log.info("asked to reload by %s", who(request))
        try:
            return await daemon.reload()
        except (ConfigError, CatalogueError) as error:
            raise RootstockError(f"nothing was changed: {error}") from error


def caller(request: Request) -> int:
    """The uid of whoever asks."""
    assert request.client is not None
    return int(request.client.host)


def loading_status(model: Supervisor, fleet: Fleet) -> Loading | None:
    """How far a model has come that is not there yet; None for others."""
    if model.state not in (State.WAITING, State.LOADING):
        return None
    return Loading(
        name=model.spec.name,
        dtype=model.spec.dtype,
        state=model.state.value,
        stage=model.loading.stage if model.state is State.LOADING else "",
        elapsed=model.loading.elapsed,
        expected=fleet.expected_seconds(model),
        obstacle=model.obstacle,
        held=model.barred,
    )


def long_batch(model: Supervisor, user: int | None) -> Loading | None:
    """The batch that a model is at, where it has been for so long that whoever waits may wonder; else None.

    Args:
        model: the model.
        user: who asks; None for an administrator, who may know how large others' structures are.
    """
    atoms, seconds = model.under_way(user)
    if seconds < LONG:
        return None
    return Loading(name=model.spec.name, dtype=model.spec.dtype, state="ready", elapsed=seconds, atoms=atoms)


def device_status(device: Device, fleet: Fleet) -> DeviceStatus:
    """A device as status shows it."""
    memory = fleet.device_memory(device)
    return DeviceStatus(
        name=str(device),
        memory_used=memory.total - memory.free if memory else None,
        memory_total=memory.total if memory else None,
        load=sum(supervisor.pace.load for supervisor in fleet.supervisors() if supervisor.device == device),
    )


def model_status(model: Supervisor, fleet: Fleet, user: int | None) -> ModelStatus:
    """A model as status shows it to a user, or to an administrator (None)."""
    why = model.error or model.refusal
    keep_alive = fleet.keep_alive(model)
    latencies = model.meter.latencies(0.5, 0.99)
    batch, seconds = model.under_way(user)
    workers, info = model.workers, model.workers.info
    return ModelStatus(
        name=model.spec.name,
        device=str(model.device) if model.device else None,
        dtype=model.spec.dtype,
        dispersion=model.spec.dispersion,
        fingerprint=workers.fingerprint,
        state=model.state.value,
        error=str(why) if why else None,
        loading=loading_status(model, fleet),
        backend=info.backend if info else None,
        retired=model.retired,
        kept=model in fleet.kept,
        environment=workers.environment.description if workers.environment else None,
        environment_name=workers.environment.name if workers.environment and workers.environment.built else None,
        note="; ".join(filter(None, (info.note if info else "", workers.unkept))) or None,
        unconfined=workers.unconfined,
        batch_atoms=model.scheduler.budget,
        pid=model.pid,
        memory=model.memory.now or (process_memory(model.pid) if model.pid and model.spec.device == "cpu" else None),
        sessions=len(model.clients),
        waiting=model.scheduler.waiting,
        batch_under_way=batch,
        batch_seconds=seconds,
        evaluations=model.evaluations,
        batches=model.batches,
        restarts=model.restarts,
        rate=model.pace.rate,
        latency_p50=latencies[0] if latencies else None,
        latency_p99=latencies[1] if latencies else None,
        batch_size=model.meter.batch_size,
        load=model.pace.load,
        idle=model.idle_seconds,
        keep_alive=None if keep_alive == math.inf else keep_alive,
    )


def session_status(session: Session) -> SessionStatus:
    """A session as status shows it."""
    request, key = session.client.request, session.client.key
    return SessionStatus(
        id=session.id,
        user=session.user,
        pid=session.pid,
        model=request.model if request else None,
        dtype=key.dtype if key else None,
        dispersion=bool(request and request.options),
        exact=bool(request and request.exact),
        natoms=len(request.numbers) if request else None,
        state=session.state,
        evaluations=session.evaluations,
        since=session.since,
    )
