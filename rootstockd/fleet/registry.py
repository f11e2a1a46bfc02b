"""Which models are there, and which of their supervisors end with their last session."""

from __future__ import annotations

from collections.abc import Iterable

from rootstockd.fleet.warm_model import WarmModel, WorkerKey
from rootstockd.settings.config import KeepAlive
from rootstockd.supervision.supervisor import Supervisor


class ModelRegistry:
    """All models of a daemon."""

    def __init__(self) -> None:
        self.models: dict[WorkerKey, WarmModel] = {}
        self.retired: dict[Supervisor, KeepAlive | None] = {}
        """What ends with its last session, as the catalogue has something else under its name, or as it was a replica;
        and how long its model was to stay."""

    def supervisors(self) -> list[Supervisor]:
        """All supervisors of now, with those that are on their way out: what is done with them may bring more."""
        return [*(supervisor for model in self.models.values() for supervisor in model.supervisors), *self.retired]

    @property
    def kept(self) -> list[Supervisor]:
        """Supervisors of the models that are to stay."""
        return [supervisor for model in self.models.values() if model.kept for supervisor in model.supervisors]

    def owner(self, supervisor: Supervisor) -> WarmModel | None:
        """The model that a supervisor is of; None if it is retired."""
        return next((model for model in self.models.values() if supervisor in model.supervisors), None)

    def retire(self, supervisors: Iterable[Supervisor], keep_alive: KeepAlive | None) -> None:
        """Have supervisors end with their last session."""
        for supervisor in supervisors:
            supervisor.retire()
            self.retired[supervisor] = keep_alive

    def forget(self, key: WorkerKey) -> None:
        """Have all of a model end with its last session; whoever asks for it next gets a new one."""
        model = self.models.pop(key)
        self.retire(model.supervisors, model.keep_alive)

    def drop(self, model: WarmModel, replicas: list[Supervisor]) -> None:
        """Have the sessions of some of a model's replicas go back to its first supervisor, and the replicas end."""
        model.drop(replicas)
        self.retire(replicas, model.keep_alive)
