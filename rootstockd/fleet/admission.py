"""Which model gets which device, and who goes for it."""

from __future__ import annotations

import asyncio
import logging
import time

from rootstock_client.errors import LimitError
from rootstockd.fleet import placement
from rootstockd.fleet.device_manager import DeviceManager
from rootstockd.fleet.placement import DeviceSpace
from rootstockd.fleet.registry import ModelRegistry
from rootstockd.settings.config import Config
from rootstockd.supervision.meter import Totals
from rootstockd.supervision.roles import State
from rootstockd.supervision.supervisor import STOP_PATIENCE, Supervisor

log = logging.getLogger(__name__)

POLL = 0.1
"""Seconds between looks whether there is room, while somebody waits for it."""
NO_ROOM = (
    "Try again when others have less to do; an administrator can `rootstockd unload` a model, or raise device_memory."
)


class Admission:
    """Gives all supervisors a place on a device.

    Args:
        config: the daemon's settings.
        registry: the models.
        devices: what is in the devices' memory.
    """

    def __init__(self, config: Config, registry: ModelRegistry, devices: DeviceManager) -> None:
        self._config, self._registry, self._devices = config, registry, devices
        self._totals: dict[tuple[str, str, str], Totals] = {}
        """By model, dtype and device."""

    def apply(self, config: Config) -> None:
        """Take over changed settings."""
        self._config = config

    def spaces(self) -> list[DeviceSpace]:
        """The devices as they are."""
        return self._devices.now(self._registry.supervisors(), self._registry.kept)

    def _spaces_for(self, supervisor: Supervisor) -> list[DeviceSpace]:
        """The devices as they are for a model that is to load: what was to be kept does not go for what is, too."""
        owner = self._registry.owner(supervisor)
        spaces = self._devices.for_model(self.spaces(), supervisor.spec)
        return [placement.stays(space) for space in spaces] if owner is not None and owner.kept else spaces

    def unload(self, supervisor: Supervisor, why: str) -> None:
        """Have a worker leave memory."""
        name, dtype = supervisor.spec.name, supervisor.spec.dtype
        log.info("model %s in %s leaves %s: %s", name, dtype, supervisor.device or "the queue", why)
        self._devices.remember(supervisor)
        supervisor.unload()

    def counted(self) -> dict[tuple[str, str, str], Totals]:
        """What was done since the daemon began, by model, dtype and device, to the last evaluation."""
        for supervisor in self._registry.supervisors():
            supervisor.meter.count()
        return self._totals

    # --- what supervisors need

    async def admit(self, model: Supervisor) -> dict[str, str] | None:
        began = time.monotonic()
        while model.wanted:
            if model.barred:
                model.obstacle = ""  # that is none
                await asyncio.sleep(POLL)
                began = time.monotonic()
                continue
            spaces = self._spaces_for(model)
            need, least = self._devices.need(model, spaces)
            owner = self._registry.owner(model)
            if owner is not None and model is not owner.first:
                taken = {supervisor.device for supervisor in owner.supervisors}
                spaces = [space for space in spaces if self._devices.devices[space.number] not in taken]
                plan = placement.place_replica(need, spaces)
                if plan is None:  # it is not needed so much that anybody should go or wait for it
                    self._registry.drop(owner, [model])
                    return None
            else:
                plan = placement.place(need, spaces)
                waited = time.monotonic() - began
                if plan is None and waited >= self._config.room_timeout:
                    need, plan = least, placement.place(least, spaces)  # what it grew to may have been one large batch
            if plan is not None:
                model.device, model.memory.set_aside = self._devices.devices[plan.space], need
                await self._evict(model, [resident.number for resident in plan.evicted])
                if model.barred:  # since then
                    model.device = None
                    continue
                return self._config.worker_environment(self._devices.devices[plan.space]) if model.wanted else None
            there = self._devices.describe(spaces, self._registry.supervisors())
            model.obstacle = f"{model.spec.name} needs {need / 1e6:.0f} MB; {there}"
            kept = owner is not None and owner.kept
            hopeless = all(least > space.left(kept=kept) for space in spaces)  # even if all had gone that ever do
            if hopeless or waited >= self._config.room_timeout:
                raise self._refusal(model, waited)
            await asyncio.sleep(POLL)
        return None

    def totals(self, model: Supervisor) -> Totals:
        key = model.spec.name, model.spec.dtype, str(model.device)
        return self._totals.setdefault(key, Totals())

    async def lost_device(self, model: Supervisor, *, failed: bool) -> bool:
        if model.device is None or model.device.kind == "cpu":
            return False
        if failed:
            self._devices.avoid(model.device, model.spec)
        await self._devices.measure(self._registry.supervisors())
        return self._space_of(model) is None

    def other_worker(self, model: Supervisor) -> Supervisor | None:
        owner = self._registry.owner(model)
        others = [other for other in owner.supervisors if other is not model] if owner else []
        there = [other for state in (State.READY, State.LOADING) for other in others if other.state is state]
        return there[0] if there else None

    async def make_room(self, model: Supervisor) -> bool:
        assert model.device is not None
        if self._config.worker_memory is not None and model.device.kind == "cpu":
            return False  # its own limit, which nobody else's end raises
        space = self._space_of(model)
        first = space and placement.first_to_go(space.residents)  # it is loading and does not itself
        if first is None:
            return False
        await self._evict(model, [first.number])
        return True

    def _space_of(self, model: Supervisor) -> DeviceSpace | None:
        """Where a model is; None if that GPU does not answer, and others do."""
        spaces = self._spaces_for(model)
        return next((space for space in spaces if self._devices.devices[space.number] == model.device), None)

    async def _evict(self, model: Supervisor, evicted: list[int]) -> None:
        """Have others go for a model, and wait until all that leave its device have left."""
        for supervisor in self._registry.supervisors():
            if id(supervisor) in evicted:
                self.unload(supervisor, f"{model.spec.name} needs its memory")
        others = [supervisor for supervisor in self._registry.supervisors() if supervisor is not model]
        leaving = [other for other in others if other.device == model.device and not other.present]
        if leaving:
            waiting = [asyncio.create_task(other.vacated()) for other in leaving]
            await asyncio.wait(waiting, timeout=STOP_PATIENCE)
            for task in waiting:
                task.cancel()
            await self._devices.measure(self._registry.supervisors())

    def _refusal(self, model: Supervisor, waited: float) -> LimitError:
        return LimitError(
            f"model {model.spec.name!r}: no device has room for it"
            f"{f', for {waited:.0f} s' if waited >= 1 else ''}: {model.obstacle}.",
            NO_ROOM,
        )
