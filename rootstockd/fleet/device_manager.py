"""What is in the devices' memory, and how much more fits there: measured while models run, and remembered."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path

from rootstockd.fleet.measured import Measured, Measurements
from rootstockd.fleet.placement import DeviceSpace, Resident
from rootstockd.host.devices import Memory, find_gpus, gpu_memory, machine_memory, process_memory
from rootstockd.host.threads import in_thread
from rootstockd.settings.config import Config, Device
from rootstockd.supervision.memory_use import taken
from rootstockd.supervision.roles import State
from rootstockd.supervision.supervisor import Supervisor
from rootstockd.worker.engines import ModelSpec

log = logging.getLogger(__name__)

QUIET = 5.0
"""Seconds after its last evaluation in which a model with sessions does not go for another: drivers compute, too."""
RESERVE = 0.05
"""The part of a GPU's memory that models leave free, for whatever else its driver needs."""
ANSWER = 10.0
"""Seconds after which a GPU whose driver has said nothing counts as one that does not answer."""
AVOIDED = 600.0
"""Seconds in which a model does not go to a GPU again that it could not use, if there is another."""


class DeviceManager:
    """The devices of a daemon, each a `DeviceSpace` to placement.

    Args:
        config: the daemon's settings.
    """

    def __init__(self, config: Config) -> None:
        self.devices: tuple[Device, ...] = config.devices
        self._limit = config.device_memory
        self._measurements = Measurements()
        self._gpus: dict[str, Memory | None] = {}
        """By the device's name."""
        self._labels: dict[str, str] = {}
        self._avoided: dict[tuple[str, str, str], float] = {}
        """Until when, by `time.monotonic`, by the device's name and the model's, with its dtype."""
        self._asked: dict[str, asyncio.Task[Memory | None]] = {}
        """Which GPUs owe an answer, by name."""

    def begin(self, devices: tuple[Device, ...]) -> None:
        """Take these devices, which have been found."""
        self.devices = devices
        if devices[0].kind == "cuda":
            gpus = find_gpus()
            for number, gpu in enumerate(gpus):
                if not gpu.uuid:
                    log.error("GPU %d of this machine %s; `rootstockd doctor` says what to do", number, gpu.name)
            names = {part.uuid: part.name for gpu in gpus for part in (gpu, *gpu.instances)}
            self._labels = {device.name: names.get(device.uuid, "cuda") for device in devices}
            self._gpus = {device.name: gpu_memory(device.uuid) for device in devices}

    def apply(self, config: Config) -> None:
        """Take over changed settings."""
        self._limit = config.device_memory

    # --- as placement sees them

    def now(self, supervisors: Iterable[Supervisor], kept: Iterable[Supervisor]) -> list[DeviceSpace]:
        """The devices as they are; without GPUs that do not answer, if others do.

        Args:
            supervisors: all there are.
            kept: those that are the last to go.
        """
        present: dict[str, list[Supervisor]] = {device.name: [] for device in self.devices}
        for supervisor in supervisors:
            if supervisor.present and supervisor.device is not None:
                present[supervisor.device.name].append(supervisor)
        last = {id(supervisor) for supervisor in kept}
        spaces = []
        answering = [device for device in self.devices if self._answers(device)]
        for number, device in enumerate(self.devices):
            if answering and device not in answering:
                continue  # else it would have most room, and be everybody's choice
            inside = present[device.name]
            residents = tuple(_resident(supervisor, kept=id(supervisor) in last) for supervisor in inside)
            load = sum(supervisor.pace.load for supervisor in inside)
            spaces.append(DeviceSpace(number, self._budget(device, residents), load, residents, self._most(device)))
        return spaces

    def _answers(self, device: Device) -> bool:
        return device.kind == "cpu" or self._gpus.get(device.name) is not None

    def usable(self, device: Device) -> bool:
        """As far as the driver and workers say."""
        now = time.monotonic()
        return self._answers(device) and not any(
            name == device.name and until > now for (name, _, _), until in self._avoided.items()
        )

    def avoid(self, device: Device, spec: ModelSpec) -> None:
        """A worker of a model found that it can't use a device."""
        self._avoided[device.name, spec.name, spec.dtype] = time.monotonic() + AVOIDED

    def for_model(self, spaces: list[DeviceSpace], spec: ModelSpec) -> list[DeviceSpace]:
        """Those devices that a model does not avoid; all, if it avoids them all."""
        now = time.monotonic()
        names = [(self.devices[space.number].name, spec.name, spec.dtype) for space in spaces]
        usable = [space for space, name in zip(spaces, names, strict=True) if self._avoided.get(name, 0.0) < now]
        return usable or spaces

    def need(self, supervisor: Supervisor, spaces: Iterable[DeviceSpace]) -> tuple[int, int]:
        """Bytes to have free for a model: what it grew to before, or a guess; and what it takes only to be loaded.

        The first is no more than a device has, as long as it has not been seen to need more only to be loaded.
        """
        spec, label = supervisor.spec, self._label(supervisor.device or self.devices[0])
        if (known := self._measurements.get(spec, label)) is not None:
            expected, least = known.memory, known.loaded
        else:
            weights = _file_size(spec.weights)
            least = max(weights, self._measurements.at_least(spec, label))
            expected = max(least, self._measurements.guess(spec, label, weights))
        largest = max((math.inf if space.budget is None else space.budget for space in spaces), default=math.inf)
        whole = expected if expected <= largest else max(least, int(largest))
        return whole, (known.loaded if known else whole)

    def _budget(self, device: Device, residents: tuple[Resident, ...]) -> int | None:
        """Bytes for all models on a device; other programs' on a GPU are not theirs."""
        if (memory := self._gpus.get(device.name)) is None:
            return self._limit
        others = max(0, memory.total - memory.free - sum(resident.memory for resident in residents))
        return self._limited(int(memory.total * (1 - RESERVE)) - others)

    def _most(self, device: Device) -> int | None:
        """A device's room if there were no other programs on it."""
        memory = self._gpus.get(device.name)
        return self._limit if memory is None else self._limited(int(memory.total * (1 - RESERVE)))

    def _limited(self, there: int) -> int:
        return there if self._limit is None else min(self._limit, there)

    def describe(self, spaces: Iterable[DeviceSpace], supervisors: Iterable[Supervisor]) -> str:
        """Who is where, in words."""
        names = {id(supervisor): supervisor.spec.name for supervisor in supervisors}
        texts = []
        for space in spaces:
            there = [
                f"{names[resident.number]} ({resident.memory / 1e6:.0f} MB{'' if resident.idle else ', has work'})"
                for resident in space.residents
            ]
            size = f"{space.budget / 1e6:.0f} MB" if space.budget is not None else "no limit"
            if space.budget is not None and space.most is not None and space.most > space.budget:
                size = f"{max(0, space.budget) / 1e6:.0f} MB beside other programs"
            texts.append(f"{self.devices[space.number]} has {size}, with {', '.join(there) or 'nothing'} there")
        return "; ".join(texts)

    def memory(self, device: Device) -> Memory | None:
        """What is in a device's memory, the machine's for a CPU; None where the driver does not say."""
        return machine_memory() if device.kind == "cpu" else self._gpus.get(device.name)

    # --- what workers take

    def known(self, supervisor: Supervisor) -> Measured | None:
        """What is remembered of a model, on such a device."""
        return self._measurements.get(supervisor.spec, self._label(supervisor.device or self.devices[0]))

    def _label(self, device: Device) -> str:
        """The kind of device."""
        return self._labels.get(device.name, device.kind)

    def remember(self, supervisor: Supervisor) -> None:
        """What a worker has taken until now, for the next that loads its model."""
        if supervisor.device is None or supervisor.loading.seconds is None or not supervisor.memory.loaded:
            return
        seconds = round(supervisor.loading.seconds, 2)
        measured = Measured(loaded=supervisor.memory.loaded, memory=supervisor.memory.peak, load_seconds=seconds)
        self._measurements.put(supervisor.spec, self._label(supervisor.device), measured)

    def remember_stopped(self, supervisor: Supervisor) -> None:
        """A worker that loads is about to be stopped: the next needs what this one has, and more."""
        if supervisor.device is not None:
            self._measurements.put_at_least(supervisor.spec, self._label(supervisor.device), supervisor.memory.now)

    async def measure(self, supervisors: Iterable[Supervisor]) -> None:
        """Look at how much memory workers and devices have."""
        asked = [(supervisor, supervisor.pid) for supervisor in supervisors if supervisor.pid is not None]
        devices = [device for device in self.devices if device.kind == "cuda"]
        self._heard(await self._ask(devices))
        resident = await in_thread(_resident_memory, [pid for _, pid in asked])
        for supervisor, pid in asked:
            if supervisor.pid != pid or supervisor.device is None:
                continue  # it has ended meanwhile
            if supervisor.device.kind == "cpu":
                self._measured(supervisor, resident.get(pid, 0))
            elif (gpu := self._gpus.get(supervisor.device.name)) is not None:
                self._measured(supervisor, taken(gpu, pid, supervisor.memory.told))
        if self._measurements.due:
            await self.save()

    async def _ask(self, devices: list[Device]) -> dict[str, Memory | None]:
        """What is in the memory of GPUs, by name; None of those that do not say, or not within ANSWER.

        Each is asked by itself, and not once more while it owes an answer: calls of a driver may never come back. One
        that said nothing the last time is not waited for.
        """
        asked = {}
        for device in devices:
            if device.name not in self._asked:
                self._asked[device.name] = asyncio.ensure_future(in_thread(gpu_memory, device.uuid))
            asked[device.name] = self._asked[device.name]
        await asyncio.sleep(0)
        if usual := [task for name, task in asked.items() if self._gpus.get(name) is not None]:
            await asyncio.wait(usual, timeout=ANSWER)
        answers: dict[str, Memory | None] = dict.fromkeys(asked)
        for name, task in asked.items():
            if task.done():
                if self._asked.get(name) is task:
                    del self._asked[name]
                answers[name] = task.result()
        return answers

    def _heard(self, gpus: dict[str, Memory | None]) -> None:
        for name, memory in gpus.items():
            if memory is None and self._gpus[name] is not None:
                log.error(
                    "%s does not answer the driver any more. Its models go to other devices, if there are any, when "
                    "their workers end. `nvidia-smi` or `rootstockd doctor` may tell why",
                    name,
                )
            elif memory is not None and self._gpus[name] is None:
                log.warning("%s answers the driver again", name)
        self._gpus.update(gpus)

    def _measured(self, supervisor: Supervisor, now: int) -> None:
        fresh = supervisor.memory.measured(now, ready=supervisor.state is State.READY)
        known = self.known(supervisor)
        if fresh or (known is not None and supervisor.memory.peak > known.memory):
            self.remember(supervisor)

    async def save(self) -> None:
        """Write down what is new."""
        if self._measurements.unsaved:
            await in_thread(self._measurements.save)


def _resident(supervisor: Supervisor, *, kept: bool) -> Resident:
    memory = supervisor.memory.claimed(ready=supervisor.state is State.READY)
    return Resident(id(supervisor), memory, -supervisor.idle_seconds, may_go(supervisor), kept)


def may_go(supervisor: Supervisor) -> bool:
    """Whether a model's memory may be another's."""
    quiet = QUIET if supervisor.clients else 0.0
    return supervisor.state is State.READY and not supervisor.busy and supervisor.idle_seconds >= quiet


def _resident_memory(pids: list[int]) -> dict[int, int]:
    return {pid: process_memory(pid) or 0 for pid in pids}


def _file_size(path: str) -> int:
    try:
        return Path(path).stat().st_size if path else 0
    except OSError:
        return 0
