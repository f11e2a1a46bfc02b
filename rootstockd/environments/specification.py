"""What an environment shall be: a TOML file that says which Python, which packages, and what to check it with.

The package brings some (`builtin/`); files of the same name in `/etc/rootstockd/environments/` and in the user's own
configuration go before them.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Annotated

import platformdirs
from ase.data import atomic_numbers
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rootstockd.settings.state_dir import check_trusted, site_folder
from rootstockd.settings.toml_file import read_toml
from rootstockd.settings.validation import describe, of_form

_BUILTIN = Path(str(resources.files("rootstockd.environments").joinpath("builtin")))
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
Vector = tuple[float, float, float]


class SpecificationError(Exception):
    """A specification that can't be used: which, and what is wrong with it."""


class Check(BaseModel):
    """A structure whose numbers are known."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    """A name in the catalogue."""
    symbols: tuple[str, ...] = Field(min_length=1)
    cell: tuple[Vector, Vector, Vector]
    """Å, rows are lattice vectors; periodic in all three."""
    positions: tuple[Vector, ...]
    """Å."""
    energy: float
    """eV."""
    forces: tuple[Vector, ...]
    """eV/Å."""
    energy_tolerance: float = Field(default=1e-4, gt=0)
    """eV, for the whole structure."""
    forces_tolerance: float = Field(default=1e-3, gt=0)
    """eV/Å, for each component."""

    @model_validator(mode="after")
    def _sizes(self) -> Check:
        if not len(self.symbols) == len(self.positions) == len(self.forces):
            raise ValueError("there must be as many symbols as positions and forces")
        if unknown := [symbol for symbol in self.symbols if symbol not in atomic_numbers]:
            raise ValueError(f"there is no element {', '.join(unknown)}")
        return self


class Specification(BaseModel):
    """One environment."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = ""
    python: str = ">=3.9"
    """Which Python, as uv takes it: a version or a range. The worker's own code needs 3.9."""
    requirements: tuple[str, ...] = Field(min_length=1)
    """As pip takes them. numpy must come of them."""
    imports: tuple[str, ...] = ()
    """Modules that must be importable for the environment to be of use."""
    torch: Annotated[
        str,
        of_form(r"auto|index|cpu|cu\d+|rocm[\d.]+|xpu", "a build: auto, index, cpu, cu126 and the like, rocm6.3, xpu"),
    ] = "auto"
    """Which of PyTorch's builds: as the node's driver wants it, from where the other packages come from, or a given
    one."""
    verify: Check | None = None

    @field_validator("requirements")
    @classmethod
    def _one_line_each(cls, requirements: tuple[str, ...]) -> tuple[str, ...]:
        for requirement in requirements:
            if requirement.startswith("-") or len(requirement.splitlines()) != 1:
                raise ValueError(f"{requirement!r} is no requirement")
        return requirements

    @field_validator("imports")
    @classmethod
    def _modules(cls, imports: tuple[str, ...]) -> tuple[str, ...]:
        for module in imports:
            if not all(part.isidentifier() for part in module.split(".")):
                raise ValueError(f"{module!r} is no module's name")
        return imports

    @property
    def has_torch(self) -> bool:
        """Whether there is a build of PyTorch to choose."""
        return any(re.match(r"torch\b(?!-)", requirement) for requirement in self.requirements) or (
            "torch" in self.imports
        )


def check_name(name: str) -> str:
    """The name, which becomes a folder's.

    Raises:
        SpecificationError: it can't.
    """
    if not _NAME.fullmatch(name):
        raise SpecificationError(
            f"{name[:100]!r} can't be an environment's name: small letters, digits, '.', '_' and '-' can."
        )
    return name


def specification_files() -> dict[str, Path]:
    """All there are, by the environment's name. Folders that one may not look into are as if they were not there."""
    found = {}
    for folder in (
        _BUILTIN,
        site_folder() / "environments",
        platformdirs.user_config_path("rootstockd") / "environments",
    ):
        if os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
            found.update({path.stem: path for path in sorted(folder.glob("*.toml")) if _NAME.fullmatch(path.stem)})
    return found


def is_builtin(name: str) -> bool:
    """Whether the package itself specifies it."""
    return (_BUILTIN / f"{name}.toml").is_file()


def find_specification(name: str) -> Specification | None:
    """The specification of an environment, if there is one.

    Raises:
        SpecificationError: there is, and it can't be used.
        StateError: others could have written it.
    """
    path = specification_files().get(name)
    if path is None:
        return None
    if path.parent != _BUILTIN:
        try:
            check_trusted(path.parent)
            check_trusted(path)
        except OSError as error:  # a link that leads nowhere
            raise SpecificationError(f"specification {path}: {error.strerror}.") from error
    return read_specification(path)


def read_specification(path: Path) -> Specification:
    """Read a file.

    Raises:
        SpecificationError: it can't be read, or says what can't be.
    """
    try:
        return Specification.model_validate(read_toml(path))
    except ValidationError as error:
        raise SpecificationError(f"specification {path}: {describe(error)}.") from error
    except OSError as error:
        raise SpecificationError(f"specification {path}: {error.strerror}; name another with --spec.") from error
    except ValueError as error:
        raise SpecificationError(f"specification {path}: {error}.") from error
