"""What a daemon is told at its start."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from rootstock_client.runtime_dir import SYSTEM_DIR, control_socket
from rootstockd.settings.validation import BYTES, FINITE, NUMBER, SECONDS, of_form
from rootstockd.worker.memory import MEMORY_VARIABLE

COMMAND_LINE = "command line"
"""Where settings come from that flags of `start` have set."""
CPU_BATCH_ATOMS = 2_048
GPU_BATCH_ATOMS = 16_384
_PORT = r"0*([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"
Address: TypeAlias = Annotated[
    str, of_form(rf"([\w.-]+|\[[0-9a-fA-F:.]+\]):{_PORT}", "HOST:PORT, such as 127.0.0.1:9746 (ports end at 65535)")
]
"""A host's name or number and a port; IPv6 has brackets."""

Count: TypeAlias = Annotated[int, Field(le=10**9), NUMBER]
"""Of what there may be; i-PI's protocol counts atoms in 32 bits."""
Bytes: TypeAlias = Annotated[int, Field(le=2**50), BYTES]
"""More than any machine has, and no more than the kernel can be told."""
Share: TypeAlias = Annotated[float, Field(ge=0.001, le=1000, allow_inf_nan=False), NUMBER]
Timeout: TypeAlias = Annotated[float, FINITE, SECONDS]
"""Seconds."""
SHORTEST = 0.1
"""Seconds that a worker is given for anything: it is looked at ten times in its limit, which is to cost nothing."""
Forever: TypeAlias = Literal["forever"]
KeepAlive: TypeAlias = Annotated[Annotated[float, Field(ge=0, allow_inf_nan=False)] | Forever, SECONDS]
"""Seconds that a model stays in memory after its last evaluation, or "forever": until its memory is wanted."""


def _check_name(name: str) -> str:
    if re.search(r"[\x00-\x1f\x7f]", name):
        raise ValueError(f"{name[:60]!a} is no name: it has control characters")
    return name


Name: TypeAlias = Annotated[str, AfterValidator(_check_name)]
"""Of a user, a group or a model: what can be none is refused here, and not where it is looked up."""


def _check_path(path: Path) -> Path:
    """Neither has JSON other paths, and a daemon is handed its settings so, nor has the kernel."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!a} is not UTF-8") from None
    if "\0" in str(path):
        raise ValueError(f"{str(path)!a} is no path: it has a NUL")
    return path


TextPath: TypeAlias = Annotated[Path, AfterValidator(_check_path)]


class Device(BaseModel):
    """Where models compute. In TOML and on the command line it is its name alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[
        str,
        of_form(
            r"cpu(:[0-9]{1,3})?|cuda:[0-9]{1,3}|(GPU|MIG)-[A-Za-z0-9_/-]{1,100}",
            "a device: cpu, cpu:1, cuda:0, or the UUID of a GPU (GPU-..., MIG-...)",
        ),
    ]
    """`cpu`, or `cpu:1` where there are several; `cuda:1`, the second of the GPUs that the daemon sees; or the UUID
    of a GPU or of a MIG instance."""
    uuid: str = ""
    """Of a GPU that was found."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given

    @property
    def kind(self) -> Literal["cpu", "cuda"]:
        """What engines call it."""
        return "cpu" if self.name.startswith("cpu") else "cuda"

    @property
    def index(self) -> int | None:
        """Which of the GPUs that the daemon sees, if that is how it is named."""
        return int(self.name[5:]) if self.name.startswith("cuda:") else None

    def __str__(self) -> str:
        return self.name

    @property
    def environment(self) -> dict[str, str]:
        """Variables that show a worker this device and no other."""
        return {"CUDA_VISIBLE_DEVICES": "" if self.kind == "cpu" else self.uuid or str(self.index)}


class Access(BaseModel):
    """Who may do what, by login and group name. A daemon in a private folder needs none of this."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    users: tuple[Name, ...] = ()
    groups: tuple[Name, ...] = ()
    """Who may have structures evaluated. With neither users nor groups it is whoever can open the socket."""
    admins: tuple[Name, ...] = ()
    """Who, beside root and the daemon's own user, may stop and reload it and see what others do."""
    socket_group: Name | None = None
    """A group that both sockets are given to, with mode 0660. Without one both are open to all users of
    the machine, if others may use the daemon at all."""

    @property
    def restricted(self) -> bool:
        """Whether only some may use the daemon."""
        return bool(self.users or self.groups)


class Quota(BaseModel):
    """What one user may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: Count = Field(default=2_000, ge=0)
    queued: Count | None = Field(default=None, ge=0)
    """Evaluations that wait or run at models at once, others are held; None for one in each session."""
    atoms: Count = Field(default=20_000_000, ge=0)
    """Atoms in all sessions together; each takes about 80 bytes."""
    models: Count = Field(default=8, ge=0)
    """Different models that sessions have, or that are being loaded for them; another dtype, or another dispersion,
    is another model."""
    share: Share = 1.0
    """How much of a model's time the user gets where several want it, relative to others."""


class OwnQuota(BaseModel):
    """What differs for one user from what others may have."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sessions: Count | None = Field(default=None, ge=0)
    queued: Count | None = Field(default=None, ge=0)
    atoms: Count | None = Field(default=None, ge=0)
    models: Count | None = Field(default=None, ge=0)
    share: Share | None = None


class Settings(BaseModel):
    """What can be set, by file, variable or flag; docs/configuration.md has a line for each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    socket: TextPath
    """The session socket; the control socket and the lock lie beside it."""
    devices: tuple[Device, ...]
    """All CPUs, or all GPUs: a model's numbers shall not depend on where there was room."""
    models: tuple[Name, ...] = ()
    """Loaded before the daemon calls itself ready; others are loaded when first asked for."""
    catalogues: tuple[TextPath, ...] = ()
    """Files of further models."""
    keep_alive: KeepAlive = "forever"
    """How long a model stays that nobody uses; an entry of a catalogue may say otherwise for its model, and what is in
    `models` stays."""
    device_memory: Bytes | None = Field(default=None, ge=2**20)
    """Bytes that all models on one device may take together. Without it what a GPU has, but for a reserve, and as much
    as they like on a CPU."""
    metrics: Address | None = None
    """Where Prometheus finds metrics over TCP, such as `127.0.0.1:9746`; whoever reaches it may read them. Port 0 is
    any that is free."""
    metrics_users: bool = False
    """Whether they say there what each user does, by login name."""
    room_timeout: Timeout = Field(default=300.0, ge=0)
    """Seconds that evaluations wait while no device has room for their model."""
    max_atoms: Count = Field(default=1_000_000, ge=1)
    """Atoms in one message of one session."""
    total_atoms: Count = Field(default=50_000_000, ge=1)
    """Atoms in all sessions together; each takes about 80 bytes."""
    max_sessions: Count = Field(default=10_000, ge=1)
    """Sessions at a time; fewer where the limit of open files (`ulimit -n`) does not allow so many."""
    access: Access = Access()
    limits: Quota = Quota()
    """What each user may have."""
    users: dict[str, OwnQuota] = Field(default_factory=dict)
    """Exceptions to `limits`, by login name."""
    batch_atoms: Count | None = Field(default=None, ge=1)
    """Atoms in one forward pass over several sessions' structures."""
    confine: bool = True
    """Whether workers give away the rights that they need not; an entry of a catalogue may say no for its model."""
    log_file: TextPath | None = None
    """Where a daemon in the background writes its log."""
    drain_timeout: Timeout = Field(default=60.0, ge=0)
    """Seconds that a stopping daemon gives evaluations under way."""
    hang_timeout: Timeout = Field(default=60.0, ge=SHORTEST)
    """Seconds that any batch may take; a slow model gets more (`HangLimit`). After that its worker is replaced."""
    load_timeout: Timeout = Field(default=600.0, ge=SHORTEST)
    """Seconds that a worker may take to load its model."""
    worker_memory: Bytes | None = Field(default=None, ge=2**28)
    """Bytes of memory that a worker on a CPU may use (RLIMIT_DATA); without it, as many as the machine has."""

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
        """Whether others than the daemon's own user may reach it: the system's daemon, or one with lists of them."""
        return self.socket.parent == SYSTEM_DIR or self.access.restricted or self.access.socket_group is not None

    @property
    def socket_mode(self) -> int:
        """Of both sockets."""
        if self.access.socket_group is not None:
            return 0o660
        return 0o666 if self.shared else 0o600

    def quota(self, user: str) -> Quota:
        """What a user may have."""
        own = self.users.get(user)
        return self.limits.model_copy(update=own.model_dump(exclude_none=True)) if own else self.limits

    @field_validator("socket", "log_file")
    @classmethod
    def _named(cls, path: Path | None) -> Path | None:
        if path is not None and not path.name:
            raise ValueError("it names no file")
        return path

    @field_validator("socket")
    @classmethod
    def _no_other(cls, socket: Path) -> Path:
        if socket in (control_socket(socket), socket.with_suffix(".lock")):
            raise ValueError(f"{socket.name} is what another file of the daemon is called; call it {socket.stem}.sock")
        return socket

    @field_validator("users")
    @classmethod
    def _called(cls, users: dict[str, OwnQuota]) -> dict[str, OwnQuota]:
        for name in users:  # an error of the keys' type would have them in its place
            _check_name(name)
        return users

    @field_validator("devices")
    @classmethod
    def _alike(cls, devices: tuple[Device, ...]) -> tuple[Device, ...]:
        if not devices:  # min_length would count those alone whose names are right
            raise ValueError("there is none, and at least one is needed")
        if len({device.kind for device in devices}) > 1:
            raise ValueError("a daemon computes on CPUs or on GPUs, not on both")
        if len({device.name for device in devices}) < len(devices):
            raise ValueError("a device is named twice")
        return devices

    def worker_environment(self, device: Device) -> dict[str, str]:
        """Variables for a worker on one of the devices."""
        limited = self.worker_memory is not None and device.kind == "cpu"
        # it is also the variable of the setting, which workers would have from the daemon
        return {**device.environment, MEMORY_VARIABLE: str(self.worker_memory) if limited else ""}

    @property
    def batch_budget(self) -> int:
        """`batch_atoms`, or what suits the devices."""
        return self.batch_atoms or (CPU_BATCH_ATOMS if self.devices[0].kind == "cpu" else GPU_BATCH_ATOMS)


class SettingsFile(BaseModel):
    """A file that settings are looked for in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: Path
    named: bool = False
    """Whoever started the daemon named it: it has to be there."""
    others: bool = False
    """It is the site's, and the daemon is a user's own: only defaults are taken from it, and none if it is not to be
    read by all."""


class Config(Settings):
    """A daemon's settings, and where they come from."""

    files: tuple[SettingsFile, ...] = ()
    """Where they were looked for, the weakest first."""
    origins: dict[str, str] = Field(default_factory=dict)
    """Of each setting that is not at its default: a file, a variable, or the command line."""

    def where(self, name: str) -> str:
        """Where a setting can be changed, in words."""
        origin = self.origins.get(name, "the configuration")
        return f"the {origin}" if origin == COMMAND_LINE else f"`{name}` of {origin}"
