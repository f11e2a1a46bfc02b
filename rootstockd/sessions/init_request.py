"""What an INIT asks for."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, ValidationInfo, field_validator

from rootstock_client.errors import InvalidInitError, InvalidStructureError, LimitError
from rootstock_client.ipi import PROTOCOL_VERSION
from rootstock_client.units import BOHR
from rootstockd.sessions.functionals import functional
from rootstockd.settings.validation import describe

LAST_ELEMENT = 118
MAX_BATCH_SIZE = 1024
MAX_CUTOFF = 100.0
"""Å; the work grows with the third power of a cutoff."""
_FORTY_BOHR = 40 * BOHR
_LONGEST_NUMBER = 20
MAX_PARTS = 1000
"""Strings, lists and objects in an INIT, about: only its numbers may be many. A million keys to refuse take seconds."""

Property = Literal["energy", "forces", "stress", "energies"]


class Dispersion(BaseModel):
    """A D3 correction. By default that of mace-torch's `mace_mp(dispersion=True)`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    damping: Literal["bj", "zero", "bjm", "zerom"] = "bj"
    xc: str = Field(default="pbe", max_length=50)
    """The functional whose parameters it has, by the names of s-dftd3."""
    cutoff: Annotated[float, Field(gt=0, le=MAX_CUTOFF)] = _FORTY_BOHR
    """In Å: pairs that are farther apart do not count."""
    cnthr: Annotated[float, Field(gt=0, le=MAX_CUTOFF)] = _FORTY_BOHR
    """In Å: the same, for coordination numbers; no more than `cutoff` has an effect."""

    @field_validator("xc")
    @classmethod
    def _known(cls, xc: str, info: ValidationInfo) -> str:
        return functional(xc, info.data["damping"]) if "damping" in info.data else xc


class InitRequest(BaseModel):
    """The system that a session is about, and what it wants to know of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    rootstock: int
    """Version of this protocol."""
    model: str = Field(max_length=200)
    """Catalogue name."""
    numbers: Annotated[list[Annotated[int, Field(ge=1, le=LAST_ELEMENT)]], FailFast()]
    """Atomic number of each atom."""
    pbc: tuple[bool, bool, bool]
    charge: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Total charge in e."""
    spin: Annotated[float, Field(allow_inf_nan=False)] | None = None
    """Spin multiplicity; 0, which there is none of, is as good as nothing."""
    head: str | None = Field(default=None, max_length=200)
    """Which of the model's heads."""
    dtype: Literal["float32", "float64"] | None = None
    """What to compute in; the catalogue's choice where the session has none."""
    dispersion: Dispersion | None = None
    """The D3 correction to add, if any; `true` stands for the usual one, `false` for none."""
    exact: bool = False
    """Same structure, same bits: the reference alone, one structure a pass, nothing kept from earlier steps."""
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """How far forces may differ from the reference's, in eV/Å; by default what the dtype allows (docs/protocol.md)."""
    want: Annotated[frozenset[Property], Field(fail_fast=True)] | None = None
    """What to compute beside energy and forces. By default what i-PI expects: stress where pbc is set."""
    batch_size: int = Field(default=1, ge=1, le=MAX_BATCH_SIZE)
    """Structures in each POSDATA."""

    @field_validator("dispersion", mode="before")
    @classmethod
    def _yes_or_no(cls, given: Any) -> Any:
        return ({} if given else None) if isinstance(given, bool) else given

    @field_validator("spin")
    @classmethod
    def _zero_says_nothing(cls, spin: float | None) -> float | None:
        return spin or None

    @property
    def options(self) -> str:
        """What changes numbers beside model and dtype and is a worker's own, as canonical JSON; empty if nothing."""
        if self.dispersion is None:
            return ""
        return json.dumps({"dispersion": self.dispersion.model_dump()}, sort_keys=True)

    @property
    def stress(self) -> bool:
        """Whether to compute the virial."""
        return any(self.pbc) if self.want is None else "stress" in self.want

    @property
    def energies(self) -> bool:
        """Whether to compute per-atom energies."""
        return self.want is not None and "energies" in self.want

    def check_size(self, most: int) -> None:
        """Whether a message may have so many atoms.

        Raises:
            LimitError: it may have `most`.
        """
        several = self.batch_size > 1
        if len(self.numbers) * self.batch_size > most:
            what = f"{len(self.numbers)} atoms{f' x {self.batch_size} structures' if several else ''}"
            raise LimitError(
                f"{what} in one message; this daemon takes {most} atoms.",
                f"{'Send fewer structures at once' if several else 'Use a smaller structure'}, or have whoever "
                "runs the daemon raise `max_atoms`.",
            )


def _shown(number: int) -> str:
    """A number as it is said to people: one that is too long for that can't pass for another."""
    text = str(number)
    return text if len(text) <= _LONGEST_NUMBER else f"{text[:_LONGEST_NUMBER]}... ({len(text)} characters)"


def _no_request(error: ValidationError) -> InvalidInitError:
    """What is said of the first thing that is wrong in an INIT."""
    problem = error.errors(include_url=False)[0]
    hint = ""
    if problem["loc"][:1] == ("numbers",):
        hint = f"The elements have the atomic numbers 1 to {LAST_ELEMENT}; 0, ASE's X, is a placeholder for none."
        if problem["type"] in ("greater_than_equal", "less_than_equal"):
            number = _shown(problem["input"])
            name = ' ("X")' if number == "0" else ""
            return InvalidInitError(f"atom {problem['loc'][1]} has the atomic number {number}{name}.", hint)
    what = describe(error)
    wrong = "INIT can't be read" if problem["type"] == "json_invalid" else "the session's request is invalid"
    return InvalidInitError(f"{wrong}: {what}{'' if what.endswith('?') else '.'}", hint)


def is_announced(text: bytes) -> bool:
    """Whether the driver behind this INIT is one of rootstockd's own, which says JSON."""
    return text.lstrip()[:1] == b"{"


def parse_init(text: bytes) -> InitRequest:
    """Read an INIT's text.

    Raises:
        InvalidInitError: it makes no sense, or says too little.
        InvalidStructureError: it has no atoms.
    """
    if not is_announced(text):
        raise InvalidInitError(
            f"INIT {text[:60]!r} names no model and no species.",
            "Drivers that speak i-PI alone are served by `rootstockd attach`.",
        )
    if max(map(text.count, (b'"', b"[", b"{"))) > MAX_PARTS:
        raise InvalidInitError("INIT can't be read: Invalid JSON: far more strings, lists or objects than it can have.")
    try:
        request = InitRequest.model_validate_json(text)
    except ValidationError as error:
        raise _no_request(error) from error
    if request.rootstock != PROTOCOL_VERSION:
        said = _shown(request.rootstock)
        raise InvalidInitError(
            f"the client speaks protocol version {said}, this daemon version {PROTOCOL_VERSION}.",
            "Upgrade the older of the two; the daemon's takes `rootstockd restart` after that.",
        )
    if not request.numbers:
        raise InvalidStructureError("a structure of zero atoms.", "There is nothing to evaluate.")
    return request
