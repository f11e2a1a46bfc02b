"""What `rootstockd top` and the dashboard remember of one status after another: rates, and how they went."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, TypeAlias

from rootstockd.control.schema import DaemonStatus, ModelStatus, SessionStatus

SPAN = 5.0
"""Seconds over which rates are averaged."""
KEPT = 120
"""Looks that trends have, at most, unless somebody wants others."""

WorkerName: TypeAlias = tuple[str, str, str, str | None]


class Trend(NamedTuple):
    """How a model went, look by look."""

    time: deque[float]
    """Unix time of the look."""
    rate: deque[float]
    """Evaluations a second since the look before."""
    latency: deque[float]
    """The median, in seconds; 0 where there was none."""
    p99: deque[float]
    """What all but a hundredth took no longer than; likewise."""
    batch: deque[float]
    """Evaluations in a batch, on average; 0 where there was none."""


class _Look(NamedTuple):
    time: float
    sessions: dict[int, int]
    models: dict[WorkerName, int]


class History:
    """Looks at one daemon, and at those that take its place.

    Args:
        kept: looks that trends have, at most.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self.trends: dict[WorkerName, Trend] = {}
        """Of all models that were there in the looks that are kept."""
        self._times: deque[float] = deque(maxlen=kept)
        self._looks: deque[_Look] = deque()
        self._since = 0.0

    def add(self, status: DaemonStatus, now: float) -> None:
        """Remember a status.

        Args:
            status: what a daemon said of itself.
            now: Unix time.
        """
        if status.since != self._since:  # another daemon, which counts from the start
            self.pause()
            self._since = status.since
        look = _Look(
            now,
            {session.id: session.evaluations for session in status.sessions},
            {name_of(model): model.evaluations for model in status.models},
        )
        last = self._looks[-1] if self._looks else None
        for model in status.models:
            name = name_of(model)
            rate = model.rate
            if last is not None and name in last.models and now > last.time:
                rate = max(0, model.evaluations - last.models[name]) / (now - last.time)
            trend = self.trends.setdefault(
                name, Trend(*(deque[float](maxlen=self._times.maxlen) for _ in Trend._fields))
            )
            trend.time.append(now)
            trend.rate.append(rate)
            trend.latency.append(model.latency_p50 or 0.0)
            trend.p99.append(model.latency_p99 or 0.0)
            trend.batch.append(model.batch_size or 0.0)
        self._times.append(now)
        self.trends = {name: trend for name, trend in self.trends.items() if trend.time[-1] >= self._times[0]}
        self._looks.append(look)
        while len(self._looks) > 2 and now - self._looks[1].time >= SPAN:  # noqa: PLR2004 - two make a difference
            self._looks.popleft()

    def pause(self) -> None:
        """Compare what comes next with nothing before: nobody looked for a while."""
        self._looks.clear()

    def trend(self, model: ModelStatus) -> Trend:
        """How a model of the latest status went."""
        return self.trends[name_of(model)]

    def model_rate(self, model: ModelStatus) -> float:
        """Evaluations a second of a model of the latest status; what the daemon says, where no earlier one had it.

        Over the same time as those of sessions: the daemon's own are of a longer one.
        """
        first, last = self._looks[0], self._looks[-1]
        done = first.models.get(name_of(model))
        if done is None or last.time <= first.time:
            return model.rate
        return max(0, model.evaluations - done) / (last.time - first.time)

    def rate(self, session: SessionStatus) -> float:
        """Evaluations a second of a session of the latest status; since it began, where no earlier one had it."""
        first, last = self._looks[0], self._looks[-1]
        begin, done = session.since, 0
        if first is not last and session.id in first.sessions:
            begin, done = first.time, first.sessions[session.id]
        return (session.evaluations - done) / (last.time - begin) if last.time > begin else 0.0


def name_of(model: ModelStatus) -> WorkerName:
    """What tells a worker from others of its daemon."""
    which = f"{model.dispersion or ''}{' retired ' * model.retired}{model.fingerprint}"  # what a reload has replaced
    return model.name, model.dtype, which, model.device
