"""Who a supervisor has to do with: sessions, whose evaluations it has done, and the fleet, which has the devices."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any, Protocol

from rootstock_client.errors import RootstockError
from rootstockd.supervision.meter import Totals
from rootstockd.worker.slots import Slot

if TYPE_CHECKING:
    from rootstockd.supervision.supervisor import Supervisor


class State(enum.Enum):
    """What a model is doing."""

    COLD = "cold"
    """It has no worker, and gets one when somebody asks for it."""
    WAITING = "waiting"
    """Somebody has, and no device has room yet."""
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


class System(Protocol):
    """What a worker is told of, and what it answers in."""

    number: int
    """Unique for each that ever was."""
    slot: Slot
    settings: dict[str, Any]


class Client(Protocol):
    """What a supervisor needs of whoever has evaluations done: a session."""

    @property
    def system(self) -> System:
        """The one that it has now, with evaluations under way."""

    def evaluated(self, error: RootstockError | None) -> None:
        """The evaluation is over."""

    @property
    def queued(self) -> bool:
        """Whether there is an evaluation that waits for its turn."""

    @property
    def held(self) -> bool:
        """Whether there is an evaluation that is not here yet, as its user may not have more at a time."""

    def move(self, model: Supervisor) -> bool:
        """Go over to another worker of the same model; whether that could be: not while an evaluation is under way."""


class Placer(Protocol):
    """What a supervisor needs of whoever has the devices: the fleet."""

    async def admit(self, model: Supervisor) -> dict[str, str] | None:
        """Wait for a device to have room for a model, and set its `device`.

        Returns:
            Variables for its workers there; None if it is not wanted any more.

        Raises:
            LimitError: none has, and it was waited for long enough.
        """

    async def lost_device(self, model: Supervisor, *, failed: bool) -> bool:
        """Whether a model's device can't be used any more, and others can.

        Args:
            model: its worker has ended.
            failed: it says that the device could not be used, whatever the driver says.
        """

    def totals(self, model: Supervisor) -> Totals:
        """What was ever done of a model on the device that it has."""

    def other_worker(self, model: Supervisor) -> Supervisor | None:
        """Another worker of the same model that computes, or is about to."""

    async def make_room(self, model: Supervisor) -> bool:
        """A model's device turned out to have no memory for it: whether another model has gone for it."""
