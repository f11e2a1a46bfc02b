"""What the control API says, as pydantic models; also what `rootstockd status --json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, computed_field

from rootstockd.settings.config import Config
from rootstockd.words import so_many
from rootstockd.worker.stages import CHECKS

SCHEMA_VERSION = 3
"""Raised when a field changes its meaning or goes; new fields alone don't."""


LONG = 4.0
"""Seconds after which a batch under way is worth a word: jobs ask when they have waited for 5."""


def at_a_batch(atoms: int, seconds: float) -> str:
    """What is said of a model that has been at a batch for so long; of others' batches the size is not told."""
    what = f"a batch of {so_many(atoms, 'atom')}" if atoms else "a batch with others' structures"
    return f"has been at {what} for {seconds:.0f} s"


class Loading(BaseModel):
    """What jobs wait for: a model that is not there yet, or one that is at a batch that takes long."""

    name: str
    dtype: str
    state: str
    """waiting, loading or ready."""
    stage: str = ""
    """starting, imports, weights or checks, or that and why it is to be started again; empty unless it is loading."""
    elapsed: float
    """Seconds since it began to load, or to wait, or the batch."""
    expected: float | None = None
    """Seconds that loading took the last time, where that is known."""
    obstacle: str = ""
    """What is in its way while it waits."""
    atoms: int = 0
    """Of the batch that it is at; 0 where it is not there, or others' structures are in the batch."""
    held: float = 0.0
    """Seconds until it is loaded again that an administrator had leave memory in spite of its work."""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def text(self) -> str:
        """The same in words."""
        if self.state == "ready":
            return at_a_batch(self.atoms, self.elapsed)
        if self.held:
            return f"was unloaded by an administrator, and is loaded again in {self.held:.0f} s"
        if self.obstacle:
            return f"waits for memory: {self.obstacle}"
        if self.state == "waiting":
            return "is about to be loaded"
        last = f", the last time it took {self.expected:.0f} s" if self.expected else ""
        stage = f"{self.stage} (what computes it is compiled if it never was)" if self.stage == CHECKS else self.stage
        return f"is loading: {stage}, for {self.elapsed:.0f} s{last}"


class ModelStatus(BaseModel):
    """One worker of a model that is loaded, or that sessions have."""

    name: str
    device: str | None
    """None while it is not in memory."""
    dtype: str
    dispersion: dict[str, JsonValue] | None = None
    """Settings of the D3 correction that is added, if one is."""
    fingerprint: str = ""
    """Of all that determines its numbers; empty until a worker was started."""
    state: str
    """cold (loaded when somebody next asks), waiting (for room), loading, ready or failed."""
    error: str | None
    """Why it is not there, though it was wanted."""
    loading: Loading | None
    backend: str | None
    """What computes, with versions."""
    retired: bool = False
    """Sessions have it still, and no other gets it: the catalogue has another model of this name now, or it was a
    replica."""
    kept: bool = False
    """It is to be loaded at the start, and to stay."""
    environment: str | None = None
    """Where its worker runs: an environment with when it was built, or beside the daemon. None while none is found."""
    environment_name: str | None = None
    """The environment's name, if it has one that was built."""
    note: str | None
    """What people should know of it, such as why nothing faster computes, or why each worker compiles anew."""
    unconfined: list[str]
    """Why its workers have more rights than they need; empty where they have not."""
    batch_atoms: int
    """The most atoms in one forward pass, as learnt so far."""
    pid: int | None
    memory: int | None
    """What the worker has of its device's memory in bytes; on a CPU its resident memory, and that of its programs."""
    sessions: int
    waiting: int
    """Evaluations in the queue."""
    batch_under_way: int = 0
    """Atoms of the batch that the worker is at; 0 where it is at none, and where others' structures are in it, unless
    an administrator asks."""
    batch_seconds: float = 0.0
    """Since that began; 0 where it is at none."""
    evaluations: int
    batches: int
    restarts: int
    rate: float
    """Evaluations a second, in the last ten seconds."""
    latency_p50: float | None = None
    latency_p99: float | None = None
    """Seconds that half, and all but a hundredth, of the evaluations in the last ten seconds took from submission to
    result, at most; None if there were none."""
    batch_size: float | None = None
    """Evaluations in a batch, on average, in that time."""
    load: float
    """The part of that time in which it computed."""
    idle: float
    """Seconds since it last had something to do."""
    keep_alive: float | None
    """Seconds that it may be idle until it goes; None where that has no end."""


class SessionStatus(BaseModel):
    """One driver's connection."""

    id: int
    user: str
    pid: int
    model: str | None
    dtype: str | None = None
    """What is computed in; None, as the others, until it has asked for a model."""
    dispersion: bool = False
    """D3 is added."""
    exact: bool = False
    """Nothing is done that could change bits between runs."""
    natoms: int | None
    state: str
    """new, idle or busy."""
    evaluations: int
    since: float
    """Unix time of its beginning."""


class DeviceStatus(BaseModel):
    """A device, and what is in its memory."""

    name: str
    memory_used: int | None
    """Bytes in use, by anybody; of a CPU the machine's. None where the driver does not say."""
    memory_total: int | None
    load: float
    """The part of the last ten seconds in which each of its workers computed, added up."""


class DaemonStatus(BaseModel):
    """The whole daemon."""

    schema_version: int = SCHEMA_VERSION
    version: str
    pid: int
    state: str
    """starting, ready or draining."""
    since: float
    devices: list[str]
    device_states: list[DeviceStatus] = Field(default_factory=list)
    metrics: str | None = None
    """The URL of metrics over TCP, if they are served."""
    config: Config | None
    """Its settings, and where they come from; administrators alone see them."""
    memory: int
    """Resident memory of the daemon itself in bytes."""
    evaluations: int
    models: list[ModelStatus]
    sessions: list[SessionStatus]
    """One's own; an administrator's answer has all."""
    other_sessions: int
    """How many more there are."""
    warnings: list[str] = Field(default_factory=list)
    """What its configuration has that can't be meant so; administrators alone see it."""


class CatalogueEntry(BaseModel):
    """A model that the daemon could load."""

    name: str
    aliases: list[str]
    family: str
    description: str
    elements: list[str]
    dtype: str
    licence: str
    state: str
    """The state of its worker; without one cold, or "to pull" where its weights are not on the machine, "missing" where
    their file is gone, "needs env" where it has no environment."""


class StopRequest(BaseModel):
    """How to stop."""

    model_config = ConfigDict(strict=True, extra="forbid")

    force: bool = False
    """Do not wait for evaluations under way."""
    replaced: bool = False
    """Another daemon takes its place at once: leave the sockets, so that whoever comes in between knows to wait."""


class StopAnswer(BaseModel):
    """Whose work it ends."""

    sessions: list[SessionStatus] = Field(default_factory=list)
    """Those that were there, and wait for the next daemon."""


class LoadRequest(BaseModel):
    """A model to load."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(max_length=200)
    dtype: Literal["float32", "float64"] | None = None
    """The catalogue's choice if None."""


class LoadAnswer(BaseModel):
    """What is being loaded."""

    model: str
    """The catalogue's name."""
    dtype: str


class UnloadRequest(BaseModel):
    """A model that shall leave memory."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = Field(max_length=200)
    dtype: Literal["float32", "float64"] | None = None
    """Whichever are there if None."""
    force: bool = False
    """Evaluations under way are repeated when it comes back; else the model stays if there are any."""


class UnloadAnswer(BaseModel):
    """What came of it."""

    waiting: int = 0
    """Evaluations that wait for the model to come back."""
    held: float = 0.0
    """Seconds until it does, if nobody loads it before."""


class ReloadReport(BaseModel):
    """What came of reading the configuration again."""

    restart_needed: list[str]
    """Settings that have changed in the files and take effect with the next restart."""
    models_kept: dict[str, int] = Field(default_factory=dict)
    """Models whose entries have changed, and how many sessions keep the old one until they reconnect."""
    warnings: list[str] = Field(default_factory=list)
    """As in status, but for what no reload can change."""
