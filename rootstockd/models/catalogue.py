"""The catalogue: a name, what is behind it, and nothing that a client could choose beyond the name.

Entries come from the package's own `catalogue.toml` and from files that whoever runs the daemon adds; a later file
overrides an earlier one, entry by entry. Model files are code, so no client ever names one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from ase.data import atomic_numbers
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from rootstock_client.errors import UnknownModelError, UnsupportedError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class CatalogueError(Exception):
    """A catalogue file that can't be used: which, and what is wrong with it."""


class Entry(BaseModel):
    """One model.

    A relative `weights` path starts at the file that holds the entry.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    """Engine family: which module of `rootstockd.worker.engines` evaluates it."""
    environment: str = ""
    """Name of the Python environment that its workers run in; empty for the one called as the family."""
    description: str = ""
    weights: Path | None = None
    url: str = ""
    """Where `rootstockd models pull` gets the weights; they then lie in a state directory."""
    sha256: str = Field(default="", pattern=r"^([0-9a-fA-F]{64})?$")
    """Of the weights, which are code: no other file is loaded."""
    size: int | None = Field(default=None, ge=0)
    """Of the weights in bytes, where it is known."""
    elements: tuple[str, ...] = ()
    """Symbols of the elements it knows; empty where only the loaded model can say."""
    heads: tuple[str, ...] = ()
    """Names of its heads, where it has several and they are known."""
    computes: tuple[str, ...] = ()
    """ASE property names; empty where only the loaded model can say."""
    dtype: Literal["float32", "float64"] = "float64"
    """Used where the session does not ask for one; what an ASE calculator computes in, if it can't be told."""
    licence: str = ""
    """SPDX identifier, or a name."""
    licence_url: str = ""
    accept_licence: bool = False
    """Whether the licence has to be accepted before the weights are pulled."""
    citation: str = ""
    """What to cite: a DOI, or a reference."""
    aliases: tuple[str, ...] = ()
    hidden: bool = False
    """Not listed: for measuring and testing."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """What else the family's `load` takes."""
    confine: bool = True
    """Whether its workers give away the rights that they need not (SECURITY.md)."""

    def check_dtype(self, name: str, dtype: str) -> None:
        """Whether a session may ask for this dtype.

        Raises:
            UnsupportedError: it would be ignored.
        """
        if dtype != self.dtype and self.family == "ase" and '"{dtype}"' not in json.dumps(self.arguments):
            raise UnsupportedError(
                f"model {name!r} computes in {self.dtype} and in nothing else.", "Leave dtype out, or name that one."
            )

    @field_validator("elements")
    @classmethod
    def _known(cls, symbols: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [symbol for symbol in symbols if symbol not in atomic_numbers]:
            raise ValueError(f"there is no element {', '.join(unknown)}")
        return symbols


class Catalogue(Mapping[str, Entry]):
    """All models by name.

    Args:
        entries: the entries by name. A name goes before an alias that is spelled the same.

    Raises:
        CatalogueError: two models have the same alias.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(entries)
        self._aliases: dict[str, str] = {}
        for name, entry in self._entries.items():
            for alias in set(entry.aliases) - set(self._entries):
                if (other := self._aliases.setdefault(alias, name)) != name:
                    raise CatalogueError(f"catalogue: {alias!r} is an alias of both {other!r} and {name!r}")

    @classmethod
    def load(cls, extra: Iterable[Path] = ()) -> Catalogue:
        """The package's catalogue, with the entries of more files over it.

        Raises:
            CatalogueError: a file is missing, is no TOML, or has an entry that is none.
        """
        builtin = Path(str(resources.files("rootstockd.models").joinpath("catalogue.toml")))
        entries: dict[str, Entry] = {}
        for path in (builtin, *extra):
            entries.update(_read(path))
        return cls(entries)

    def __getitem__(self, name: str) -> Entry:
        return self._entries[self._aliases.get(name, name)]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def resolve(self, name: str) -> tuple[str, Entry]:
        """The catalogue's own name for `name` (which may be an alias), and its entry.

        Raises:
            UnknownModelError: there is none; the hint has the nearest names.
        """
        known = self._aliases.get(name, name)
        if known in self._entries:
            return known, self._entries[known]
        near = difflib.get_close_matches(name, [*self._entries, *self._aliases], n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UnknownModelError(
            f"this daemon has no model {name[:100]!r}.",
            f"{hint}It has: {', '.join(sorted(name for name, entry in self._entries.items() if not entry.hidden))}.",
        )


def _read(path: Path) -> dict[str, Entry]:
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except (OSError, ValueError) as error:
        raise CatalogueError(f"catalogue {path}: {error}") from error
    entries = {}
    for name, fields in document.items():
        try:
            entry = Entry.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "it"
            raise CatalogueError(f"catalogue {path}: model {name!r}: {where}: {first['msg']}") from error
        if entry.weights is not None and not entry.weights.is_absolute():
            entry = entry.model_copy(update={"weights": path.parent / entry.weights})
        if entry.weights is not None and not entry.sha256:
            missing = f"catalogue {path}: model {name!r}: weights need a sha256"
            raise CatalogueError(f"{missing}; {_pin(entry.weights)}")
        entries[name] = entry
    return entries


def _pin(weights: Path) -> str:
    """What to write, for the file as it is now."""
    if not weights.is_file():
        return f"there is no file {weights} to tell it from."
    try:
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except OSError as error:
        return f"the file can't be read to tell it: {error}."
    return f'if you trust {weights} as it is now, add this line:\nsha256 = "{digest}"'
