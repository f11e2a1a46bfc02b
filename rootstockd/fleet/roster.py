"""Which models are there, and which of their workers end with their last session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from rootstockd.fleet.warm_model import WarmModel, WorkerKey
from rootstockd.settings.config import KeepAlive
from rootstockd.supervision.supervisor import Supervisor


class Roster:
    """All models of a daemon."""

    def __init__(self) -> None:
        self.models: dict[WorkerKey, WarmModel] = {}
        self.retired: dict[Supervisor, KeepAlive | None] = {}
        """What ends with its last session, as the catalogue has something else under its name, or as it was a replica;
        and how long its model was to stay."""

    def workers(self) -> Iterator[Supervisor]:
        """All there are, with those that are on their way out."""
        for model in self.models.values():
            yield from model.workers
        yield from self.retired

    @property
    def kept(self) -> list[Supervisor]:
        """Workers of the models that are to stay."""
        return [worker for model in self.models.values() if model.kept for worker in model.workers]

    def owner(self, worker: Supervisor) -> WarmModel | None:
        """The model that a worker is of; None if it is retired."""
        return next((model for model in self.models.values() if worker in model.workers), None)

    def retire(self, workers: Iterable[Supervisor], keep_alive: KeepAlive | None) -> None:
        """Have workers end with their last session."""
        for worker in workers:
            worker.retire()
            self.retired[worker] = keep_alive

    def forget(self, key: WorkerKey) -> None:
        """Have all of a model end with its last session; whoever asks for it next gets a new one."""
        model = self.models.pop(key)
        self.retire(model.workers, model.keep_alive)

    def drop(self, model: WarmModel, replicas: list[Supervisor]) -> None:
        """Have the sessions of some of a model's replicas go back to its first worker, and the replicas end."""
        model.drop(replicas)
        self.retire(replicas, model.keep_alive)
