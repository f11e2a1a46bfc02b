"""Metrics for Prometheus: what the daemon knows, as families of samples, made when somebody asks.

docs/monitoring.md lists them. Counters begin with the daemon and never go back.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import rootstockd
from rootstock_client.errors import ConnectionLostError, DaemonNotFoundError, NotAnsweringError, RootstockError
from rootstockd.control.limits import BoundedProtocol, Paced
from rootstockd.control.server import Server
from rootstockd.sessions.turns import Allowance
from rootstockd.supervision.meter import Histogram
from rootstockd.supervision.roles import State

if TYPE_CHECKING:
    from rootstockd.daemon import Daemon
    from rootstockd.supervision.supervisor import Supervisor

FRESH = 1.0
"""Seconds for which the port gives the same answer: asking more often costs the daemon nothing."""
WORKER = ("model", "dtype", "device")
"""Labels of what is counted of workers."""
CLIENTS = (ConnectionLostError, DaemonNotFoundError, NotAnsweringError)
"""Errors that no daemon tells."""


class _Format(NamedTuple):
    generate: Callable[[Collector], bytes]
    end: bytes
    content_type: str


_OPENMETRICS = "application/openmetrics-text"
_FORMATS = {
    False: _Format(generate_latest, b"", CONTENT_TYPE_PLAIN_0_0_4),
    True: _Format(openmetrics.generate_latest, b"# EOF\n", openmetrics.CONTENT_TYPE_LATEST),
}


class _Family(Collector):
    """One family, for those who want a registry."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> list[Metric]:
        return [self._family]


async def exposition(daemon: Daemon, accept: str, *, users: bool) -> Response:
    """All metrics as they are now. Steps go first: there may be a millisecond of work for each model.

    Args:
        daemon: whose.
        accept: the formats that the client reads: OpenMetrics, or Prometheus' own.
        users: whether to say what each user does.
    """
    form = _FORMATS[_OPENMETRICS in accept]
    text = b""
    for collector in (DaemonCollector(daemon, users=users), ProcessCollector(registry=None)):
        for family in collector.collect():
            text += form.generate(_Family(family)).removesuffix(form.end)
            await asyncio.sleep(0)
    return Response(text + form.end, media_type=form.content_type)


def metrics_server(daemon: Daemon, sock: socket.socket) -> Server:
    """The server on the port where a daemon has its metrics, for whoever asks."""
    made: dict[bool, tuple[float, Response]] = {}
    making = asyncio.Lock()

    async def metrics(request: Request) -> Response:
        accept = request.headers.get("accept", "")
        form = _OPENMETRICS in accept
        async with making:
            if form not in made or time.monotonic() - made[form][0] > FRESH:
                made[form] = time.monotonic(), await exposition(daemon, accept, users=daemon.config.metrics_users)
            return made[form][1]

    app = Starlette(routes=[Route("/metrics", metrics)])
    pace = Allowance()
    return Server(Paced(app, lambda _: pace), sock, BoundedProtocol)  # the app reads no bodies


class DaemonCollector(Collector):
    """A daemon's metrics.

    Args:
        daemon: the daemon.
        users: whether to say what each user does.
    """

    def __init__(self, daemon: Daemon, *, users: bool) -> None:
        self._daemon, self._users = daemon, users

    def collect(self) -> Iterator[Metric]:
        """All families, in the order in which they are shown."""
        yield from self._state()
        yield from self._counts()
        yield from self._workers()
        yield from self._devices()
        if self._users:
            yield from self._by_user()

    def _state(self) -> Iterator[Metric]:
        daemon = self._daemon
        yield InfoMetricFamily("rootstockd_build", "The version that runs.", value={"version": rootstockd.__version__})
        yield GaugeMetricFamily(
            "rootstockd_ready", "1 while the daemon takes work, 0 while it starts or drains.", daemon.state == "ready"
        )
        sessions = GaugeMetricFamily("rootstockd_sessions", "Open sessions, by what they do.", labels=["state"])
        states = Counter(session.state for session in daemon.sessions)
        for state in ("new", "idle", "busy"):
            sessions.add_metric([state], states[state])
        yield sessions
        models = GaugeMetricFamily(
            "rootstockd_models", "Workers that models have or are to have, by state.", labels=["state"]
        )
        of_models = Counter(supervisor.state for supervisor in daemon.fleet.supervisors() if _counts(supervisor))
        for of_model in State:
            models.add_metric([of_model.value], of_models[of_model])
        yield models
        errors = CounterMetricFamily(
            "rootstockd_errors", "Errors that drivers were told of, by code (docs/protocol.md).", labels=["code"]
        )
        for code, kind in RootstockError.by_code.items():
            if kind not in CLIENTS:
                errors.add_metric([code], daemon.errors[code])
        yield errors

    def _counts(self) -> Iterator[Metric]:
        """What was done since the daemon began."""
        evaluations = CounterMetricFamily("rootstockd_evaluations", "Evaluations that workers did.", labels=WORKER)
        atoms = CounterMetricFamily("rootstockd_atoms", "Atoms in these evaluations.", labels=WORKER)
        busy = CounterMetricFamily(
            "rootstockd_worker_busy_seconds", "Time in which a worker had a batch to do.", labels=WORKER
        )
        restarts = CounterMetricFamily(
            "rootstockd_worker_restarts", "Workers that were started for one that ended by itself.", labels=WORKER
        )
        stages = HistogramMetricFamily(
            "rootstockd_evaluation_seconds",
            "Time of an evaluation in a stage: queue, until it goes to the worker; worker, until its batch is done.",
            labels=[*WORKER, "stage"],
        )
        sizes = HistogramMetricFamily("rootstockd_batch_evaluations", "Evaluations in a batch.", labels=WORKER)
        of_batches = HistogramMetricFamily("rootstockd_batch_atoms", "Atoms in a batch.", labels=WORKER)
        loading = HistogramMetricFamily("rootstockd_model_load_seconds", "Time to load a model.", labels=WORKER)
        for labels, totals in self._daemon.fleet.counted().items():
            evaluations.add_metric(labels, totals.evaluations.sum)
            atoms.add_metric(labels, totals.atoms.sum)
            busy.add_metric(labels, totals.busy)
            restarts.add_metric(labels, totals.restarts)
            _add(stages, (*labels, "queue"), totals.queue)
            _add(stages, (*labels, "worker"), totals.worker)
            _add(sizes, labels, totals.evaluations)
            _add(of_batches, labels, totals.atoms)
            _add(loading, labels, totals.loading)
        yield from (evaluations, atoms, busy, stages, sizes, of_batches, restarts, loading)

    def _workers(self) -> Iterator[Metric]:
        """What models have now. Several workers with one set of labels differ in options, such as D3, and are added."""
        queue: Counter[tuple[str, str, str]] = Counter()
        memory: Counter[tuple[str, str, str]] = Counter()
        for supervisor in self._daemon.fleet.supervisors():
            labels = supervisor.spec.name, supervisor.spec.dtype, str(supervisor.device or "")
            if not supervisor.ended:
                queue[labels] += supervisor.scheduler.waiting
            if supervisor.pid is not None:
                memory[labels] += supervisor.memory.now
        for name, what, values in (
            ("rootstockd_queue_length", "Evaluations that wait for a worker; without a device, for room.", queue),
            ("rootstockd_model_memory_bytes", "Memory of a model's worker on its device.", memory),
        ):
            family = GaugeMetricFamily(name, what, labels=WORKER)
            for labels, value in values.items():
                family.add_metric(labels, value)
            yield family

    def _devices(self) -> Iterator[Metric]:
        used = GaugeMetricFamily(
            "rootstockd_device_memory_used_bytes", "Memory of a device that is in use, by anybody.", labels=["device"]
        )
        total = GaugeMetricFamily("rootstockd_device_memory_total_bytes", "Memory of a device.", labels=["device"])
        up = GaugeMetricFamily(
            "rootstockd_device_up",
            "1 if a device can be used, 0 if its driver or a worker says not.",
            labels=["device"],
        )
        for device in self._daemon.fleet.devices:
            memory = self._daemon.fleet.device_memory(device)
            up.add_metric([str(device)], self._daemon.fleet.usable(device))
            if memory is not None:
                used.add_metric([str(device)], memory.total - memory.free)
                total.add_metric([str(device)], memory.total)
        yield from (used, total, up)

    def _by_user(self) -> Iterator[Metric]:
        accounts = self._daemon.accounts
        sessions = GaugeMetricFamily("rootstockd_user_sessions", "Open sessions of a user.", labels=["user"])
        queue = GaugeMetricFamily(
            "rootstockd_user_queue_length", "Evaluations of a user that wait, are held, or run.", labels=["user"]
        )
        for account in accounts.active:
            sessions.add_metric([account.name], account.sessions)
            queue.add_metric([account.name], account.queued + account.held)
        evaluations = CounterMetricFamily(
            "rootstockd_user_evaluations", "Evaluations that a user got results of.", labels=["user"]
        )
        ever = accounts.evaluations((session.user, session.evaluations) for session in self._daemon.sessions)
        for user, number in ever.items():
            evaluations.add_metric([user], number)
        yield from (sessions, queue, evaluations)


def _counts(supervisor: Supervisor) -> bool:
    """Whether status shows it; a model that failed has ended, and is there until it is tried again or forgotten."""
    return not supervisor.ended or (supervisor.state is State.FAILED and not supervisor.retired)


def _add(family: HistogramMetricFamily, labels: tuple[str, ...], histogram: Histogram) -> None:
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, histogram.counts.cumsum().tolist(), strict=True)), histogram.sum)
