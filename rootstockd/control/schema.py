"""What the control API says, as pydantic models; also what `rootstockd status --json` prints."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from rootstockd.config import Config

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or goes; new fields alone don't."""


class ModelStatus(BaseModel):
    """A model that is loaded, or was tried."""

    name: str
    device: str
    dtype: str
    state: str
    """loading, ready or failed."""
    error: str | None
    backend: str | None
    """What computes, with versions."""
    environment: str | None = None
    """Where its worker runs: an environment with when it was built, or beside the daemon. None while none is found."""
    note: str | None
    """What people should know of it, such as why nothing faster computes."""
    unconfined: list[str]
    """Why its workers have more rights than they need; empty where they have not."""
    batch_atoms: int
    """The most atoms in one forward pass, as learnt so far."""
    pid: int | None
    memory: int | None
    """Resident memory of the worker in bytes."""
    sessions: int
    waiting: int
    """Evaluations in the queue."""
    evaluations: int
    batches: int
    restarts: int


class SessionStatus(BaseModel):
    """One driver's connection."""

    id: int
    user: str
    pid: int
    model: str | None
    natoms: int | None
    state: str
    """new, idle or busy."""
    evaluations: int
    since: float
    """Unix time of its beginning."""


class DaemonStatus(BaseModel):
    """The whole daemon."""

    schema_version: int = SCHEMA_VERSION
    version: str
    pid: int
    state: str
    """starting, ready or draining."""
    since: float
    device: str
    config: Config | None
    """Its settings; administrators alone see them."""
    memory: int
    """Resident memory of the daemon itself in bytes."""
    evaluations: int
    models: list[ModelStatus]
    sessions: list[SessionStatus]
    """One's own; an administrator's answer has all."""
    other_sessions: int
    """How many more there are."""


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
    """cold, or the state of its worker."""


class StopRequest(BaseModel):
    """How to stop."""

    model_config = ConfigDict(strict=True, extra="forbid")

    force: bool = False
    """Do not wait for evaluations under way."""
    replaced: bool = False
    """Another daemon takes its place at once: leave the sockets, so that whoever comes in between knows to wait."""


class ReloadReport(BaseModel):
    """What came of reading the configuration again."""

    restart_needed: list[str]
    """Settings that have changed in the file and take effect with the next restart."""
