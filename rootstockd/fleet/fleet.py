"""Which models are in memory, on which device, and for how long.

Models come when somebody asks for them, and go when nobody has for their `keep_alive`, when another needs their
memory and they have nothing to do, or when an administrator says so. What they take is measured. A model with more to
do than its device can get done has a second worker, a replica, on another that has little to do.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Collection

from rootstock_client.errors import LimitError, ModelLoadError, RootstockError
from rootstockd.fleet import placement
from rootstockd.fleet.admission import NO_ROOM, Admission
from rootstockd.fleet.device_manager import DeviceManager
from rootstockd.fleet.placement import DeviceSpace
from rootstockd.fleet.registry import ModelRegistry
from rootstockd.fleet.warm_model import WarmModel, WorkerKey
from rootstockd.host.devices import Memory
from rootstockd.models.availability import located
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.models.spec import spec_of
from rootstockd.settings.config import Config, Device
from rootstockd.supervision.meter import Totals
from rootstockd.supervision.roles import State
from rootstockd.supervision.supervisor import Supervisor
from rootstockd.words import so_many
from rootstockd.worker.engines import ModelSpec

log = logging.getLogger(__name__)

TICK = 1.0
"""Seconds between looks at what all models do."""
HOLD = 30.0
"""Seconds that a model stays away which an administrator had leave in spite of its work, unless one loads it."""
REFUSED = 10.0
"""Seconds that status shows a model without sessions that had no room."""
BROKEN = 600.0
"""Seconds that it shows one that failed, unless it was to be kept; less where `keep_alive` says so."""
MAX_VARIANTS = 16
"""Workers of one model with options of their own, such as D3's settings, at a time: twice as many as one user may have
by default."""
REPLICA_IDLE = 60.0
"""Seconds that a replica stays without work; less where `keep_alive` says so."""


class Fleet:
    """All models of a daemon.

    Args:
        config: the daemon's settings.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._devices = DeviceManager(config)
        self._registry = ModelRegistry()
        self._admission = Admission(config, self._registry, self._devices)
        self._models = self._registry.models
        self._watching: asyncio.Task[None] | None = None

    def begin(self, devices: tuple[Device, ...]) -> None:
        """Have an eye on all models from now on, on these devices, which have been found."""
        self._devices.begin(devices)
        self._watching = asyncio.create_task(self._watch(), name="fleet")

    def apply(self, config: Config) -> None:
        """Take over changed settings."""
        self._config = config
        self._devices.apply(config)
        self._admission.apply(config)

    @property
    def devices(self) -> tuple[Device, ...]:
        """Where models may be."""
        return self._devices.devices

    def device_memory(self, device: Device) -> Memory | None:
        """What is in a device's memory, as far as that is known."""
        return self._devices.memory(device)

    def usable(self, device: Device) -> bool:
        """Whether a device can be used, as far as its driver and workers say."""
        return self._devices.usable(device)

    async def stop(self, error: RootstockError) -> None:
        """End all workers; what still waits is told `error`."""
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.gather(*(supervisor.stop(error) for supervisor in self.supervisors()))
        await self._devices.save()

    def tell_verdicts(self) -> None:
        """Whoever is to hear of workers that ended over their structure hears it now, however long others had none."""
        for supervisor in self.supervisors():
            supervisor.tell_verdicts()

    def supervisors(self) -> list[Supervisor]:
        """All supervisors of now, with those that are on their way out."""
        return self._registry.supervisors()

    @property
    def kept(self) -> list[Supervisor]:
        """Supervisors of the models that are to stay."""
        return self._registry.kept

    def keep(self, key: WorkerKey, entry: Entry) -> None:
        """Have a model stay, and loaded if it is not, or could not be."""
        model = self._models.get(key)
        if model is None or not model.kept or model.first.state is State.FAILED:
            self.open(key, entry, keep=True, anew=True)

    def keep_only(self, keys: Collection[WorkerKey]) -> None:
        """Have all other models stay no longer than any that somebody has asked for."""
        for key, model in self._models.items():
            model.kept = model.kept and key in keys

    def counted(self) -> dict[tuple[str, str, str], Totals]:
        """What was done since the daemon began, by model, dtype and device, to the last evaluation."""
        return self._admission.counted()

    @property
    def evaluations(self) -> int:
        """Done since the daemon began."""
        return sum(round(totals.evaluations.sum) for totals in self.counted().values())

    def states(self) -> dict[str, str]:
        """What the models are doing, by catalogue name."""
        return {key.name: model.first.state.value for key, model in self._models.items()}

    def elements(self, key: WorkerKey, entry: Entry) -> set[int]:
        """Atomic numbers that a model knows, as it says or else as its entry does; none where neither does."""
        spec, model = self._spec(key, entry), self._models.get(key)
        info = model.first.workers.info if model is not None and model.spec == spec else None
        return set((info.elements if info is not None else ()) or spec.elements)

    # --- models come and go

    def open(self, key: WorkerKey, entry: Entry, *, keep: bool = False, anew: bool = False) -> Supervisor:
        """The supervisor of a model for one more session; the model is loaded if it is not yet.

        Args:
            key: which model.
            entry: what the catalogue has under its name, with its weights.
            keep: it is to stay.
            anew: if it was found broken, however lately, try again.

        Raises:
            LimitError: sessions have as many workers of it with options of their own as there may be.
        """
        spec = self._spec(key, entry)
        model = self._models.get(key)
        if model is not None and model.spec != spec:  # the catalogue has been changed since
            self._registry.retire(model.supervisors, model.keep_alive)
            keep, model = keep or model.kept, None
        if model is None and key.options:
            self._make_way(key)
        if model is None:
            model = self._models[key] = WarmModel(spec, entry.keep_alive, keep, self._supervisor(spec))
        elif model.first.worth_replacing or (anew and model.first.state is State.FAILED):
            model.first = self._supervisor(spec)
        model.keep_alive, model.kept = entry.keep_alive, keep or model.kept
        supervisor = model.choose()
        supervisor.load()
        return supervisor

    def retire_changed(self, catalogue: Catalogue) -> dict[str, int]:
        """Retire the supervisors of models that the catalogue has otherwise now; what is to be kept is loaded anew.

        Returns:
            Sessions that keep such a supervisor, by model.
        """
        keeping: Counter[str] = Counter()
        for key, model in list(self._models.items()):
            entry = catalogue.get(key.name)
            try:
                entry = entry and located(key.name, entry)
            except ModelLoadError:  # where its weights have gone, it is what it was
                continue
            if entry is not None and self._spec(key, entry) == model.spec:
                continue
            if sessions := sum(len(supervisor.clients) for supervisor in model.supervisors):
                keeping[key.name] += sessions
            if entry is not None and model.kept:
                self.open(key, entry)
            else:
                self._registry.forget(key)
        return dict(keeping)

    def _make_way(self, key: WorkerKey) -> None:
        """Bound the workers with options of their own: any user can think of any number of these."""
        variants = {k: model for k, model in self._models.items() if k.name == key.name and k.options}
        if len(variants) < MAX_VARIANTS:
            return
        unused = [k for k, model in variants.items() if not model.in_use]
        if not unused:
            raise LimitError(
                f"model {key.name!r} is in use with {MAX_VARIANTS} different settings already, each with a worker.",
                "Use settings that are loaded already, or try again when others have gone.",
            )
        self._registry.forget(max(unused, key=lambda k: variants[k].first.idle_seconds))

    def unload(self, name: str, dtype: str | None, who: str, *, force: bool = False) -> int:
        """Have a model leave memory. Sessions keep it, and wait for it to come back when they next ask.

        Backends that it did without, as they ended a worker, are tried again then.

        Args:
            name: the catalogue's name.
            dtype: of which workers; of all if None.
            who: the administrator who said so, for the log.
            force: evaluations under way are to be repeated, when it comes back after HOLD.

        Returns:
            How many evaluations wait for that.

        Raises:
            LimitError: it has evaluations under way.
            RootstockError: it is not there.
        """
        supervisors = [
            supervisor
            for supervisor in self.supervisors()
            if supervisor.spec.name == name
            and dtype in (None, supervisor.spec.dtype)
            and supervisor.wanted
            and supervisor.state is not State.FAILED
        ]
        failed = [
            key
            for key, model in self._models.items()
            if key.name == name and dtype in (None, key.dtype) and model.first.state is State.FAILED
        ]
        what = f"model {name!r}" + (f" in {dtype}" if dtype else "")
        if not supervisors and not failed:
            raise RootstockError(f"{what} is not in memory.")
        under_way = sum(supervisor.queue for supervisor in supervisors)
        if under_way and not force:
            raise LimitError(
                f"{what} has {so_many(under_way, 'evaluation')} under way.",
                f"Wait for them, or use --force: they are repeated when it is loaded again, {HOLD:.0f} s later.",
            )
        for key in failed:
            self._registry.forget(key)
        for supervisor in supervisors:
            if force:
                supervisor.bar(HOLD)
            else:
                supervisor.lift_bar()
            self._admission.unload(supervisor, f"{who} said so")
            supervisor.loading.without = {}  # what ended a worker may be mended, or was none of its doing
        for model in self._models.values():
            if model.first in supervisors:
                self._registry.drop(model, model.replicas)
        return under_way

    def expected_seconds(self, supervisor: Supervisor) -> float | None:
        """How long loading took the last time."""
        known = self._devices.known(supervisor)
        return supervisor.loading.seconds or (known.load_seconds if known else None)

    def keep_alive(self, supervisor: Supervisor) -> float:
        """Seconds that a supervisor may have nothing to do until its worker goes; infinite where that stays."""
        owner = self._registry.owner(supervisor)
        said = self._registry.retired.get(supervisor) if owner is None else owner.keep_alive
        said = self._config.keep_alive if said is None else said
        seconds = math.inf if said == "forever" else said
        if owner is not None and supervisor is not owner.first:
            return min(REPLICA_IDLE, seconds)
        return math.inf if owner is not None and owner.kept else seconds

    def _spec(self, key: WorkerKey, entry: Entry) -> ModelSpec:
        device, confine = self.devices[0].kind, self._config.confine
        return spec_of(key.name, entry, key.dtype, device=device, options=key.options, confine=confine)

    def _supervisor(self, spec: ModelSpec) -> Supervisor:
        config = self._config
        # a program that dials in has one structure at a time: each answer goes off when it is there
        batch_atoms = 1 if spec.family == "ipi" else config.batch_budget
        hang_timeout = max(config.hang_timeout, spec.hang_timeout)
        return Supervisor(spec, self._admission, batch_atoms, hang_timeout, config.load_timeout)

    # --- once a second

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            try:
                await self._devices.measure(self.supervisors())
                self._look_after()
            except Exception:  # the next look may fare better, and models work without
                log.exception("looking after the models failed")

    def _look_after(self) -> None:
        for supervisor in self.supervisors():
            supervisor.sample()
        for model in list(self._models.values()):  # whoever is told that one goes may ask for another
            self._spread(model)
            self._thin_out(model)
            if not model.replicas:
                self._expire(model.first)
        for space in self._admission.spaces():
            self._shrink(space)
        for supervisor in list(self._registry.retired):
            if supervisor.ended:
                del self._registry.retired[supervisor]
            else:
                self._expire(supervisor)
        for key, model in list(self._models.items()):
            first = model.first
            needed = first.clients or first.wanted or model.replicas or model.kept or first.barred
            told = first.refusal is None or first.idle_seconds > REFUSED  # why it did not come
            # of those with options there may be any number
            seen = bool(key.options) or first.idle_seconds > min(BROKEN, self.keep_alive(first))
            broken = first.worth_replacing and not first.clients and not model.kept and seen
            if broken or (first.state is State.COLD and told and not needed):
                self._registry.forget(key)

    def _expire(self, supervisor: Supervisor) -> None:
        """Have a worker go that nobody has used for long enough."""
        if supervisor.state is State.READY and supervisor.idle_seconds > self.keep_alive(supervisor):
            self._admission.unload(supervisor, f"nobody has used it for {supervisor.idle_seconds:.0f} s")

    def _thin_out(self, model: WarmModel) -> None:
        """Have replicas go that nobody has used for long enough."""
        idle = [replica for replica in model.replicas if replica.idle_seconds > self.keep_alive(replica)]
        if idle:
            log.info("model %s has little to do, and one worker less", model.spec.name)
            self._registry.drop(model, idle)

    def _shrink(self, space: DeviceSpace) -> None:
        """Where models have grown to more than a device has for them, have idle ones go.

        If that is not enough, one goes that loads and has more than was set aside for it. The others have work.
        """
        if space.free >= 0:
            return
        device, evicted = self.devices[space.number], placement.to_evict(0, space)
        if evicted is None:
            there = [
                supervisor for supervisor in self.supervisors() if supervisor.present and supervisor.device == device
            ]
            loading = [supervisor for supervisor in there if supervisor.state is State.LOADING]
            growing = [supervisor for supervisor in loading if supervisor.memory.now > supervisor.memory.set_aside]
            if growing:
                self._stop_loading(min(growing, key=lambda supervisor: supervisor.loading.elapsed), space)
                return
            evicted = tuple(resident for resident in space.residents if resident.idle)
        numbers = [resident.number for resident in evicted]
        why = f"models on {device} take {-space.free / 1e6:.0f} MB more than they may"
        for supervisor in self.supervisors():
            if id(supervisor) in numbers:
                self._admission.unload(supervisor, why)

    def _stop_loading(self, supervisor: Supervisor, space: DeviceSpace) -> None:
        memory = supervisor.memory
        self._devices.remember_stopped(supervisor)
        supervisor.refuse(
            LimitError(
                f"model {supervisor.spec.name!r}: loading it was stopped: it has {memory.now / 1e6:.0f} MB, where "
                f"{memory.set_aside / 1e6:.0f} MB were set aside for it, and no more is free: "
                f"{self._devices.describe([space], self.supervisors())}.",
                NO_ROOM,
            )
        )

    def _spread(self, model: WarmModel) -> None:
        """Share the work of a hot model out to the workers it has, or have one more."""
        self._registry.drop(model, model.lost)
        if model.share_out():
            self._replicate(model)

    def _replicate(self, model: WarmModel) -> None:
        taken = {supervisor.device for supervisor in model.supervisors}
        spaces = [space for space in self._admission.spaces() if self.devices[space.number] not in taken]
        need, _ = self._devices.need(model.first, spaces)
        if placement.place_replica(need, spaces) is None:
            return
        log.info("model %s has more to do than %s can: it gets another worker", model.spec.name, model.first.device)
        model.replicas.append(self._supervisor(model.spec))
