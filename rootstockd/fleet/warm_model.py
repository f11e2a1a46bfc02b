"""One model of the fleet: its supervisors, and how sessions and their work are shared out among these."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from rootstockd.fleet import placement
from rootstockd.settings.config import KeepAlive
from rootstockd.supervision.roles import State
from rootstockd.supervision.supervisor import Supervisor
from rootstockd.worker.engines import ModelSpec

LONG = 3.0
"""Evaluations of a worker, waiting and under way, that make its queue a long one."""
LONG_FOR = 5
"""Looks in a row at which a queue was long: then the model gets a replica, if there is room."""
PAUSE = 60
"""Looks until the next try after a replica could not be loaded."""


@dataclass(frozen=True)
class WorkerKey:
    """What makes a worker one's own: two sessions with different keys never share one."""

    name: str
    """The catalogue's."""
    dtype: str
    """What it computes in."""
    options: str = ""
    """What else changes its numbers, as canonical JSON."""


@dataclass
class WarmModel:
    """All supervisors of one key."""

    spec: ModelSpec
    keep_alive: KeepAlive | None
    kept: bool
    """It was loaded at the start."""
    first: Supervisor
    replicas: list[Supervisor] = field(default_factory=list)
    _hot_for: int = 0
    """Looks in a row at which all of its workers were ready and one had a long queue; negative where it gets no replica
    for so many."""

    @property
    def supervisors(self) -> list[Supervisor]:
        """The first, and the replicas."""
        return [self.first, *self.replicas]

    @property
    def in_use(self) -> bool:
        """Sessions have it."""
        return any(supervisor.clients or supervisor.busy for supervisor in self.supervisors)

    @property
    def ready(self) -> list[Supervisor]:
        """The supervisors whose workers compute."""
        return [supervisor for supervisor in self.supervisors if supervisor.state is State.READY]

    @property
    def lost(self) -> list[Supervisor]:
        """Replicas that are none any more: they could not be loaded, or had to leave memory."""
        return [supervisor for supervisor in self.replicas if supervisor.state is State.FAILED or not supervisor.wanted]

    def choose(self) -> Supervisor:
        """The supervisor for one more session: the one with the least to do."""
        return min(
            self.ready,
            key=lambda supervisor: (round(supervisor.pace.queue), len(supervisor.clients)),
            default=self.first,
        )

    def drop(self, replicas: Iterable[Supervisor]) -> None:
        """Have the sessions of some replicas go back to the first supervisor."""
        replicas = list(replicas)
        if any(replica.state is State.FAILED for replica in replicas):
            self._hot_for = -PAUSE
        self.replicas = [replica for replica in self.replicas if replica not in replicas]
        for replica in replicas:
            for client in list(replica.clients):
                client.move(self.first)
            replica.hand_over(self.first, len(replica.clients))

    def share_out(self) -> bool:
        """Where a queue is long, share the work out to the workers that there are; to be called once a second.

        Returns:
            Whether it has been long for some time, and there is nobody to share it with.
        """
        long = max(supervisor.pace.queue for supervisor in self.supervisors) >= LONG
        ready = self.ready
        whole = len(ready) == len(self.supervisors)  # else more waits than does as a rule
        self._hot_for = self._hot_for + 1 if self._hot_for < 0 or (long and whole) else 0
        if self._hot_for < 0 or not long:
            return False
        moved = placement.shift([round(supervisor.pace.queue) for supervisor in ready]) if len(ready) > 1 else None
        if moved is None:
            return self._hot_for >= LONG_FOR
        source, target, count = moved
        ready[source].hand_over(ready[target], count)
        ready[source].pace.queue -= count
        ready[target].pace.queue += count
        return False
