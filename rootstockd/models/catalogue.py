"""The catalogue: a name, what is behind it, and nothing that a client could choose beyond the name.

Entries come from the package's own files, from the site's, from state directories, from the user's, and from those that
whoever runs the daemon names; a later file overrides an earlier one, entry by entry. Model files are code, so no client
ever names one, and a file that others could have written is refused.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from ase.data import atomic_numbers, chemical_symbols
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from rootstock_client.errors import UnknownModelError, UnsupportedError
from rootstockd.environments.finding import has_environment
from rootstockd.settings.config import KeepAlive
from rootstockd.settings.state_dir import StateError, check_links, check_trusted, site_folder, state_dirs
from rootstockd.settings.toml_file import read_toml
from rootstockd.settings.validation import BYTES, SECONDS, describe, of_form
from rootstockd.worker.engines import EngineError, choose_head
from rootstockd.worker.engines.ipi.recipe import read_recipe
from rootstockd.worker.files import digest_of, is_file

FILE_NAME = "models.toml"
"""What the catalogue of a site, of a state directory and of a user is called in its folder."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
"""What a model may be called: it is a file's name as well."""


FILES = (".model", ".pt", ".pth", ".ckpt")
"""How files of weights are called, and no model of a catalogue."""
_SUGGESTED = 3
_LOOKED = 2.0
"""Seconds for which what was found on the machine is told without looking again: a thousand jobs may ask for a name
that is none, and each look takes as long as many steps."""


class CatalogueError(Exception):
    """A catalogue file that can't be used: which, and what is wrong with it."""


class Entry(BaseModel):
    """One model.

    A relative `weights` path starts at the file that holds the entry.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: Annotated[str, of_form("[a-z][a-z0-9_]*", "a family: small letters, digits and _")]
    """Engine family: which module of `rootstockd.worker.engines` evaluates it."""
    environment: str = ""
    """Name of the Python environment that its workers run in; empty for the one called as the family."""
    description: str = ""
    weights: Path | None = None
    url: str = ""
    """Where `rootstockd models pull` gets the weights; they then lie in a state directory."""
    sha256: str = ""
    """Of the weights, which are code: no other file is loaded."""
    original_sha256: str = ""
    """Of what the weights were converted from, if they were: another form of a model has the same fingerprint."""
    converted_sha256: str = ""
    """Of what that was converted to. Where it is not the weights' own, these are others by now: no form of it."""
    size: Annotated[int | None, BYTES] = Field(default=None, ge=0)
    """Of the weights in bytes, where it is known."""
    elements: tuple[str, ...] = ()
    """Symbols of the elements it knows, `H-Bi` for all from H to Bi; empty where only the loaded model can say."""
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
    keep_alive: KeepAlive | None = None
    """How long it stays in memory after its last evaluation, in seconds or "forever", where it is not as for others."""
    hang_timeout: Annotated[float | None, SECONDS] = Field(default=None, gt=0)
    """Seconds that any evaluation may take, where that is more than for others: one of density functional theory may
    take an hour."""
    aliases: tuple[str, ...] = ()
    hidden: bool = False
    """Not listed: for measuring and testing."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """What else the family's `load` takes."""
    confine: bool = True
    """Whether its workers give away the rights that they need not (SECURITY.md)."""

    @field_validator("sha256", "original_sha256", "converted_sha256")
    @classmethod
    def _digits(cls, digest: str) -> str:
        if digest and not re.fullmatch("[0-9a-fA-F]{64}", digest):
            raise ValueError(
                f"it has 64 hexadecimal digits, as `sha256sum` says them; this has {len(digest)} characters"
            )
        return digest

    @field_validator("elements")
    @classmethod
    def _known(cls, symbols: tuple[str, ...]) -> tuple[str, ...]:
        found: list[str] = []
        for text in symbols:
            first, _, last = text.partition("-")
            ends = [atomic_numbers.get(symbol) for symbol in (first, last or first)]
            if None in ends:
                raise ValueError(f"there is no element {text}")
            found += chemical_symbols[ends[0] : ends[1] + 1]
        return tuple(found)

    @model_validator(mode="after")
    def _program(self) -> Entry:
        if self.family == "ipi":
            read_recipe(self.arguments, self.elements)
            if self.dtype != "float64":
                raise ValueError("programs that dial in send float64")
        return self

    @property
    def place(self) -> tuple[str, str]:
        """Its environment, and its family: what `find_environment` wants to know."""
        return self.environment or self.family, self.family

    def check_dtype(self, name: str, dtype: str) -> None:
        """Whether a session may ask for this dtype.

        Raises:
            UnsupportedError: it would be ignored.
        """
        fixed = self.family == "ipi" or (self.family == "ase" and '"{dtype}"' not in json.dumps(self.arguments))
        if dtype != self.dtype and fixed:
            raise UnsupportedError(
                f"model {name!r} computes in {self.dtype} and in nothing else.", "Leave dtype out, or name that one."
            )

    def check_head(self, name: str, head: str | None) -> None:
        """Whether a session may ask for this head, where it is known which there are.

        Raises:
            UnsupportedError: there is no such head, or none was chosen of several.
        """
        if self.heads:
            try:
                choose_head(name, self.heads, head)
            except EngineError as error:
                raise UnsupportedError(f"{error.message}.", error.hint) from error


class Catalogue(Mapping[str, Entry]):
    """All models by name.

    Args:
        layers: each file with its entries by name, the weakest first. A name goes before an alias that is spelled the
            same, and an alias of a later file before that of an earlier one.

    Raises:
        CatalogueError: two models of one file have the same alias.
    """

    def __init__(self, layers: Iterable[tuple[Path, Mapping[str, Entry]]]) -> None:
        self._entries: dict[str, Entry] = {}
        self.origins: dict[str, Path] = {}
        """Which file each entry comes from."""
        for path, entries in layers:
            self._entries.update(entries)
            self.origins.update(dict.fromkeys(entries, path))
        self._extra: tuple[Path, ...] = ()
        self._read: dict[Path, int] = {}
        self._looked = -_LOOKED
        self._fresh: Catalogue | None = None
        """What the files say by now, where they have changed since they were read."""
        self._complete: list[str] = []
        self._aliases: dict[str, str] = {}
        places = list(dict.fromkeys(self.origins.values()))
        for name in sorted(self._entries, key=lambda name: places.index(self.origins[name])):
            for alias in set(self._entries[name].aliases) - set(self._entries):
                other = self._aliases.get(alias)
                if other and self.origins[other] == self.origins[name]:
                    raise CatalogueError(
                        f"catalogue {self.origins[name]}: {alias!r} is an alias of both {other!r} and {name!r}"
                    )
                self._aliases[alias] = name

    @classmethod
    def load(cls, extra: Iterable[Path] = (), named_by: str = "--catalogue") -> Catalogue:
        """The catalogue of whoever asks, with the entries of more files over it.

        Args:
            extra: these files.
            named_by: what names them, for whoever has to change it.

        Raises:
            CatalogueError: a file is missing, is no TOML, has an entry that is none, or could be written by others.
        """
        extra = tuple(extra)
        times = _times(extra)  # before they are read: what changes meanwhile has changed since
        files = [*builtin_files(), *_standing_files()]
        for path in extra:
            _check_owners(path, named_by=named_by)
        read = [(path, read_catalogue(path)) for path in files] + [(path, _read_checked(path)) for path in extra]
        catalogue = cls(read)
        catalogue._extra, catalogue._read = extra, times
        return catalogue

    def warnings(self) -> list[str]:
        """Weights that can't be those that are meant, programs that are not there, and aliases that others have.

        Whether files are what they should be is seen when they are loaded: it takes long.
        """
        found = []
        for name, entry in self._entries.items():
            found += [
                f"model {name!r}: its alias {alias!r} leads to model {other!r}"
                for alias in entry.aliases
                if (other := alias if alias in self._entries else self._aliases[alias]) != name
            ]
            if entry.family == "ipi":
                program = read_recipe(entry.arguments, entry.elements).program
                if shutil.which(program) is None:
                    found.append(f"model {name!r}: there is no program {program}")
            if entry.weights is None:
                continue
            if not is_file(entry.weights):
                found.append(f"model {name!r}: there is no file {entry.weights}")
            elif entry.size not in (None, size := entry.weights.stat().st_size):
                found.append(f"model {name!r}: {entry.weights} has {size} bytes, and its entry says {entry.size}")
        return found

    def __getitem__(self, name: str) -> Entry:
        return self._entries[self._aliases.get(name, name)]

    def __iter__(self) -> Any:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def name_of(self, name: str) -> str:
        """The catalogue's own name for `name`, which may be an alias, or no name at all."""
        return self._aliases.get(name, name)

    def resolve(self, name: str) -> tuple[str, Entry]:
        """The catalogue's own name for `name` (which may be an alias), and its entry.

        Raises:
            UnknownModelError: there is none; the hint has the nearest names.
        """
        known = self.name_of(name)
        if known in self._entries:
            return known, self._entries[known]
        shown = self._shown()
        aliases = [alias for alias, meant in self._aliases.items() if meant in shown]
        what = f"there is no model {name[:100]!r}."
        if "/" in name or name.endswith(FILES):
            raise UnknownModelError(
                what, "A client names a model, never a file: `rootstockd models add NAME FILE` gives a file a name."
            )
        self._look()
        if self._fresh is not None and name in self._fresh:
            raise UnknownModelError(what, "It was added since this daemon read its catalogues: `rootstockd reload`.")
        near = _nearest(name, [*shown, *aliases])
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UnknownModelError(
            what,
            f"{hint}There are: {', '.join(self._complete)}. `rootstockd models list` has those as well whose "
            "weights are to be pulled first, or whose environment is to be built.",
        )

    def _shown(self) -> list[str]:
        return [name for name, entry in self._entries.items() if not entry.hidden]

    def _look(self) -> None:
        """Look what the files say by now, and which models have an environment and nothing to pull."""
        if time.monotonic() < self._looked + _LOOKED:
            return
        try:
            self._fresh = Catalogue.load(self._extra) if _times(self._extra) != self._read else None
        except CatalogueError:  # for whoever reloads
            self._fresh = None
        places = {name: self._entries[name].place for name in self._shown() if not self._entries[name].url}
        there = {place for place in set(places.values()) if has_environment(*place)}
        self._complete = sorted(name for name, place in places.items() if place in there)
        self._looked = time.monotonic()


def _nearest(name: str, names: list[str]) -> list[str]:
    """The names that were most likely meant, first those that begin like it."""
    name = name.lower()
    if same := [known for known in names if known.lower() == name]:
        return same
    longer = sorted(known for known in names if len(name) > 1 and known.lower().startswith(name))
    alike = difflib.get_close_matches(name, names, n=_SUGGESTED, cutoff=0.5)
    return list(dict.fromkeys([*longer, *alike]))[:_SUGGESTED]


def builtin_files() -> list[Path]:
    """The package's own, one a family."""
    return sorted(Path(str(resources.files("rootstockd.models"))).glob("catalogue*.toml"))


def user_file() -> Path:
    """The user's own catalogue, which need not be there."""
    return platformdirs.user_config_path("rootstockd") / FILE_NAME


def _standing_files() -> list[Path]:
    """Catalogues that nobody has to name: the site's, those of state directories, the user's; those that are there."""
    site = site_folder() / FILE_NAME
    try:
        found = [site, *(folder / FILE_NAME for folder in reversed(state_dirs())), user_file()]
        for path in found:
            check_links(path)
        there = [path for path in found if os.path.exists(path)]  # False where one may not look
    except (StateError, OSError) as error:
        raise CatalogueError(f"catalogue: {error}") from error
    for path in there:
        _check_owners(path.parent, path)
    return there


def _times(extra: tuple[Path, ...]) -> dict[Path, int]:
    """When the files that can change were last written, those that are there."""
    found = {}
    for path in [*_standing_files(), *extra]:
        with contextlib.suppress(OSError):
            found[path] = path.stat().st_mtime_ns
    return found


def _check_owners(*paths: Path, named_by: str = "") -> None:
    try:
        for path in paths:
            check_trusted(path)
    except StateError as error:
        raise CatalogueError(f"catalogue: {error}") from error
    except OSError as error:
        hint = f" It is named by {named_by}." if named_by else ""
        raise CatalogueError(f"catalogue {path}: {error.strerror}.{hint}") from error


def _read_checked(path: Path) -> dict[str, Entry]:
    """The entries of a file in a folder that others may write to: it may be another by now."""
    try:
        return read_catalogue(path, lambda status: check_trusted(path, status))
    except StateError as error:
        raise CatalogueError(f"catalogue: {error}") from error


def read_catalogue(path: Path, check: Callable[[os.stat_result], None] = lambda _: None) -> dict[str, Entry]:
    """The entries of one file.

    Args:
        path: the file.
        check: told what is known of the file that was opened, to raise what it has against it.

    Raises:
        CatalogueError: it is missing, is no TOML, or has an entry that is none.
    """
    try:
        document = read_toml(path, check)
    except (OSError, ValueError) as error:
        raise CatalogueError(f"catalogue {path}: {error}") from error
    entries = {}
    for name, fields in document.items():
        if not NAME.fullmatch(name):
            raise CatalogueError(
                f"catalogue {path}: model {name[:100]!r}: a name has letters, digits and . _ + - and begins with one "
                "of the first two"
            )
        try:
            entry = Entry.model_validate(fields)
        except ValidationError as error:
            raise CatalogueError(f"catalogue {path}: model {name!r}: {describe(error, Entry.model_fields)}") from error
        if entry.weights is not None and not entry.weights.is_absolute():
            entry = entry.model_copy(update={"weights": path.parent / entry.weights})
        if entry.weights is not None and not entry.sha256:
            missing = f"catalogue {path}: model {name!r}: weights need a sha256"
            raise CatalogueError(f"{missing}; {_pin(entry.weights)}")
        entries[name] = entry
    return entries


def _pin(weights: Path) -> str:
    """What to write, for the file as it is now."""
    if not is_file(weights):
        return f"there is no file {weights} to tell it from."
    try:
        digest = digest_of(weights)
    except OSError as error:
        return f"the file can't be read to tell it: {error}."
    return f'if you trust {weights} as it is now, add this line:\nsha256 = "{digest}"'
