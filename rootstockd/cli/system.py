"""What a stock driver's atoms are: from a structure file, from options, and from i-PI's `<parameters>`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers
from ase.symbols import Symbols, string2symbols

from rootstock_client.errors import InvalidInitError, InvalidStructureError
from rootstock_client.ipi import PROTOCOL_VERSION

_IPI_CELL = re.compile(r"\bCELL\s*[({]")
_PBC = re.compile(r"\bpbc\s*=")
"""In the comment of an xyz file, as i-PI writes it, and as extended xyz has it."""


def periodicity(text: str) -> list[bool]:
    """Three booleans, from one or three letters T or F.

    Raises:
        ValueError: it is something else.
    """
    letters = re.sub(r"[\s,]", "", text).upper()
    if not re.fullmatch(r"[TF]|[TF]{3}", letters):
        raise ValueError(f"pbc is {text!r}; it is T or F for each lattice vector, such as TTF, or one letter for all.")
    return [letter == "T" for letter in letters * (3 // len(letters))]


def read_structure(path: Path, pbc: list[bool] | None = None) -> dict[str, Any]:
    """Species, pbc, charge and spin of a file's last structure, as INIT has them.

    Args:
        path: the file.
        pbc: goes before the file's.

    Raises:
        InvalidStructureError: ASE can't read it, or nobody says what is periodic.
    """
    import ase.io  # it takes longer than all other commands  # noqa: PLC0415

    try:
        atoms = ase.io.read(path)
    except Exception as error:  # whatever its many readers raise
        raise InvalidStructureError(f"ASE can't read {path}: {error or type(error).__name__}.") from error
    if pbc is None:
        pbc = _xyz_periodicity(path) if path.suffix == ".xyz" and not any(atoms.pbc) else atoms.pbc.tolist()
    said = {"charge": atoms.info.get("charge"), "spin": atoms.info.get("spin")}
    numbers = {"numbers": atoms.numbers.tolist(), "pbc": pbc}
    return numbers | {name: float(value) for name, value in said.items() if value is not None}


def _xyz_periodicity(path: Path) -> list[bool]:
    """What the comment of an xyz file says that ASE takes for a cluster.

    Raises:
        InvalidStructureError: it says nothing.
    """
    comment = "".join(path.read_text().splitlines()[1:2])
    if _IPI_CELL.search(comment):
        return [True] * 3
    if _PBC.search(comment):
        return [False] * 3
    raise InvalidStructureError(
        f"{path} does not say along which lattice vectors it is periodic.",
        "Give --pbc, such as --pbc TTT for a crystal, or --pbc F for a molecule in empty space.",
    )


def _numbers(formula: str) -> list[int]:
    """Atomic numbers in the order of a formula, such as (OH2)32."""
    return [atomic_numbers[symbol] for symbol in string2symbols(formula)]


_MISSING = {"model": "which model", "numbers": "which elements the atoms are"}
_READ: dict[str, Callable[[str], Any]] = {
    "model": str,
    "species": _numbers,
    "pbc": periodicity,
    "charge": float,
    "spin": float,
    "dtype": str,
    "head": str,
    "batch_size": int,
}
"""What `<parameters>` may say; the batch size is i-PI's own addition."""


def read_parameters(text: bytes) -> dict[str, Any]:
    """What a driver's own INIT says, as INIT in JSON has it; keys that mean nothing here are for others.

    i-PI sends `<parameters>{model: emt, species: Cu32}</parameters>` as ` model : emt , species : Cu32 , `.

    Raises:
        InvalidInitError: a value makes no sense.
    """
    found: dict[str, Any] = {}
    for part in text.decode(errors="replace").strip("\0").split(","):
        name, colon, value = (piece.strip() for piece in part.partition(":"))
        if not colon or name not in _READ:
            continue
        try:
            found[name] = _READ[name](value)
        except (ValueError, KeyError) as error:
            raise InvalidInitError(f"the driver's INIT says {name} : {value}, which can't be read.") from error
    if "species" in found:
        found["numbers"] = found.pop("species")
    return found


@dataclass(frozen=True)
class System:
    """What is known of a system before its driver has said anything.

    Args:
        said: fields of INIT; they go before what the driver says.
    """

    said: dict[str, Any]

    @property
    def complete(self) -> bool:
        """It can do without the driver's word."""
        return {"model", "numbers"} <= self.said.keys()

    def __str__(self) -> str:
        numbers, pbc = self.said["numbers"], self.said.get("pbc", [True] * 3)
        along = "".join("FT"[periodic] for periodic in pbc)
        return f"{len(numbers)} atoms ({Symbols(numbers).get_chemical_formula()}, pbc {along}), {self.said['model']},"

    def init(self, text: bytes) -> bytes:
        """The INIT for the daemon.

        Args:
            text: the driver's own.

        Raises:
            InvalidInitError: it says too little, or what makes no sense.
        """
        fields = {"pbc": [True] * 3, **read_parameters(text), **self.said}
        if missing := {"model", "numbers"} - fields.keys():
            raise InvalidInitError(
                f"nothing says {' or '.join(_MISSING[name] for name in sorted(missing))}.",
                "Give --model and --structure, or <parameters>{model: NAME, species: FORMULA}</parameters> to i-PI.",
            )
        return json.dumps({"rootstock": PROTOCOL_VERSION, **fields}).encode()
