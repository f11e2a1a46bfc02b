"""What a daemon is told at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from rootstock_client.runtime_dir import SYSTEM_DIR, control_socket

CPU_BATCH_ATOMS = 2_048
GPU_BATCH_ATOMS = 16_384


class Device(BaseModel):
    """Where a model computes."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["cpu", "cuda"]
    index: int = 0
    """Which GPU, as the driver numbers them."""

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that show a worker this device and no other."""
        return {"CUDA_VISIBLE_DEVICES": "" if self.kind == "cpu" else str(self.index)}


class Config(BaseModel):
    """A daemon's settings."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: Path
    """The session socket; the control socket and the lock lie beside it."""
    device: Device
    models: tuple[str, ...] = ()
    """Loaded before the daemon calls itself ready; others are loaded when first asked for."""
    catalogues: tuple[Path, ...] = ()
    """Files of further models."""
    max_atoms: int = Field(default=1_000_000, ge=1)
    """Atoms in one message of one session."""
    total_atoms: int = Field(default=100_000_000, ge=1)
    """Atoms of all sessions' structures together; each takes about 90 bytes."""
    max_sessions: int = Field(default=10_000, ge=1)
    """Sessions at a time; fewer where the limit of open files (`ulimit -n`) does not allow so many."""
    batch_atoms: int | None = Field(default=None, ge=1)
    """Atoms in one forward pass over several sessions' structures."""
    log_file: Path | None = None
    """Where a daemon in the background writes its log."""
    drain_timeout: float = Field(default=60.0, ge=0)
    """Seconds that a stopping daemon gives evaluations under way."""

    @property
    def control(self) -> Path:
        """The control socket."""
        return control_socket(self.socket)

    @property
    def lock(self) -> Path:
        """The file that the daemon holds a lock on while it lives."""
        return self.socket.with_suffix(".lock")

    @property
    def shared(self) -> bool:
        """Whether this is the system's daemon, which every user of the machine may use."""
        return self.socket.parent == SYSTEM_DIR

    @property
    def batch_budget(self) -> int:
        """`batch_atoms`, or what suits the device."""
        return self.batch_atoms or (CPU_BATCH_ATOMS if self.device.kind == "cpu" else GPU_BATCH_ATOMS)
