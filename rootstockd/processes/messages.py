"""What a worker says in JSON, checked: a worker runs a model's code, and may say anything."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter

from rootstock_client.errors import RestartNeededError, RootstockError, error_from_code
from rootstockd.worker.engines import EngineInfo
from rootstockd.worker.version import PROTOCOL, SLOT_LAYOUT

LONGEST = 2_000
"""Characters of a text."""


def _printable(text: str) -> str:
    """Without what a terminal would take for orders, and not too long."""
    return "".join(
        char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in text[:LONGEST]
    )


def _sentence(text: str) -> str:
    """A message with a full stop, which engines leave to us: many of their messages end in another's words."""
    text = _printable(text).rstrip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _line(text: str) -> str:
    """A message in one line."""
    return " ".join(_printable(text).split("\n"))


Line: TypeAlias = Annotated[str, AfterValidator(_line)]


class Failure(BaseModel):
    """An evaluation that failed (`F`, with its slot), or a model that can't be loaded (`X`)."""

    model_config = ConfigDict(strict=True)

    code: str
    message: str
    hint: str
    slot: int = 0

    @property
    def error(self) -> RootstockError:
        """As sessions are told of it."""
        return error_from_code(self.code, _sentence(self.message), _printable(self.hint))


class Confined(BaseModel):
    """A worker that has given its rights away (`C`)."""

    model_config = ConfigDict(strict=True)

    missing: Annotated[list[Annotated[Line, Field(max_length=500)]], Field(max_length=20)]
    """All but what these say."""


class Held(BaseModel):
    """What a worker has of a GPU's memory (`G`)."""

    model_config = ConfigDict(strict=True)

    bytes: Annotated[int, Field(ge=0, le=2**50)]


class Stage(BaseModel):
    """How far loading has come (`P`)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    stage: Annotated[Line, Field(max_length=100)]
    backend: Annotated[Line, Field(max_length=100)] = ""
    """Which of several ways to compute is being tried."""


class Versions(BaseModel):
    """What a worker's code, which is read from the disk when it starts, agrees with (`V`)."""

    model_config = ConfigDict(strict=True)

    protocol: int
    slots: int

    def check(self) -> None:
        """Whether this daemon can talk to it.

        Raises:
            RestartNeededError: it can't.
        """
        if (self.protocol, self.slots) != (PROTOCOL, SLOT_LAYOUT):
            raise RestartNeededError(
                "rootstockd was upgraded while its daemon runs: the workers' code on disk speaks version "
                f"{self.protocol}.{self.slots} of what is between the two, this daemon {PROTOCOL}.{SLOT_LAYOUT}.",
                "`rootstockd restart` starts a daemon of the new version; jobs wait for it.",
            )


Said = Failure | Confined | Stage | EngineInfo | Versions | Held
_KINDS: dict[bytes, TypeAdapter[Said]] = {
    b"V": TypeAdapter(Versions),
    b"F": TypeAdapter(Failure),
    b"X": TypeAdapter(Failure),
    b"C": TypeAdapter(Confined),
    b"P": TypeAdapter(Stage),
    b"R": TypeAdapter(EngineInfo),
    b"I": TypeAdapter(EngineInfo),
    b"G": TypeAdapter(Held),
}


def parse(kind: bytes, body: bytes) -> Said:
    """What the message says.

    Raises:
        ValueError: it makes no sense.
    """
    if kind not in _KINDS:
        raise ValueError(f"there is no message {kind!r}")
    said = _KINDS[kind].validate_json(body)
    if isinstance(said, EngineInfo):
        heads, properties = (tuple(map(_line, texts)) for texts in (said.heads, said.properties))
        said = replace(said, properties=properties, heads=heads, backend=_line(said.backend), note=_line(said.note))
    return said
