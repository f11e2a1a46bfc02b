"""Keeping weights in a form that is not code, where the family has one.

It takes two workers, confined whatever the catalogue says. The first runs what is in the original; it writes the safe
form, and what the model computes for structures of its elements. The second has the safe form alone, and says what that
computes. Whether the two agree is for this process to see: what a pickle's worker says of itself is worth nothing.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rootstock_client.errors import ModelLoadError, NotAModelError, RootstockError
from rootstockd.models import store
from rootstockd.models.catalogue import Entry
from rootstockd.models.download import Say
from rootstockd.models.spec import spec_of
from rootstockd.models.store import Stored, StoredFile
from rootstockd.models.trial import try_out
from rootstockd.models.whole_files import StoreError, lock, part_file
from rootstockd.settings.validation import describe
from rootstockd.worker.engines import Result
from rootstockd.worker.engines.differences import TOLERANCE, compare
from rootstockd.worker.files import digest_of, open_regular

FORMS = {"mace": ("model.safetensors", ".safetensors")}
"""Families that have such a form: the file that their `load` writes with the argument `convert`, and its suffix."""
NUMBERS = "numbers.json"
"""What it writes beside that."""
_MOST_NUMBERS = 1 << 26
"""Bytes of that: a hundred elements, with as many heads, in two dtypes."""


_Row = tuple[float, float, float]


class _Computed(BaseModel):
    """What came of one structure: eV, eV/Å."""

    model_config = ConfigDict(strict=True)

    energy: float
    forces: list[_Row] = Field(min_length=1)
    virial: tuple[_Row, _Row, _Row]

    @property
    def result(self) -> Result:
        """The same as an engine says it."""
        return Result(self.energy, np.array(self.forces), np.array(self.virial))


_Numbers = dict[Literal["float32", "float64"], list[_Computed]]
"""By dtype, structure by structure."""
_NUMBERS = TypeAdapter(_Numbers)


def with_safe_form(name: str, entry: Entry, say: Say) -> Stored:
    """What is stored of a model that was pulled, with its safe form if it can be had; if not, the record says why.

    Raises:
        StoreError: it can't be written; or what was pulled is no model. That is kept only if somebody had said that it
            is the right file.
    """
    folder = store.own_folder()
    with lock(folder, name, say):
        stored = store.weights_of(name, entry)  # as it is now: another command may have removed it
        if stored is None:
            raise StoreError(f"{name} was removed again by another command.")
        try:
            return converted(name, entry, stored, say)
        except NotAModelError as error:
            record = stored.record
            if record.pinned == store.FIRST_USE:
                store.remove(folder, name)
                why = error.message.replace(str(stored.folder / record.original.name), "it")
                raise StoreError(f"{record.source} has no model, and was not kept: {why}") from error
            raise StoreError(
                f"{error.message}\nIt is the file that {record.pinned} means, so it is kept: another version of its "
                f"engine may read it. `rootstockd models remove {name}` removes it."
            ) from error


def converted(name: str, entry: Entry, stored: Stored, say: Say) -> Stored:
    """Convert a model's weights, for whoever holds its lock.

    Raises:
        NotAModelError: the original is none.
        StoreError: it can't be written.
    """
    folder, original = stored.folder, stored.record.original
    if entry.family not in FORMS or stored.record.safe is not None or folder != store.own_folder():
        return stored
    say("converting it into a form that is not code, and comparing")
    suffix = FORMS[entry.family][1]
    part = folder / f"{name}.copy{suffix}"  # workers know the form by its suffix
    limit = 4 * original.size + (1 << 24)
    safe: StoredFile | None = None
    with part_file(part, f"what {name} was converted to"):
        try:
            form, expected = _worked_out(name, entry, folder / original.name, original.sha256, limit)
            part.write_bytes(form)
            note = f"safetensors; the same as the original {_compared(_rebuilt(name, entry, part, limit), expected)}"
            safe = store.keep(part, folder, suffix)
        except NotAModelError:
            raise
        except RootstockError as error:
            note = f"not converted, so workers run what is in the file: {error.message}"
    record = stored.record.model_copy(update={"safe": safe, "note": note})
    store.write_record(folder, name, record)
    return Stored(folder, record)


# --- workers, and what they write


def _rebuilt(name: str, entry: Entry, safe: Path, limit: int) -> _Numbers:
    """What a worker computes that has seen the safe form alone.

    Raises:
        RootstockError: it can't.
    """
    try:
        return _worked_out(name, entry, safe, digest_of(safe), limit)[1]
    except NotAModelError as error:  # the original is one
        raise ModelLoadError(f"it can't be rebuilt from that form: {error.message}") from error


def _worked_out(name: str, entry: Entry, weights: Path, sha256: str, limit: int) -> tuple[bytes, _Numbers]:
    """What a worker makes of weights: their safe form, of so many bytes at most, and what the model computes.

    Raises:
        RootstockError: it can't.
        StoreError: what it has written makes no sense.
    """
    said = {"weights": weights, "sha256": sha256, "arguments": {**entry.arguments, "convert": True}, "confine": True}
    found: list[bytes] = []

    def harvest(scratch: Path) -> None:
        found.extend((_safe_form(scratch / FORMS[entry.family][0], limit), _read(scratch / NUMBERS, _MOST_NUMBERS)))

    try:
        try_out(spec_of(name, entry.model_copy(update=said)), harvest, show_errors=False)
    except OSError as error:  # such as no room for its scratch folder
        raise ModelLoadError(f"no worker can be started: {error}") from error
    form, numbers = found
    try:
        return form, _NUMBERS.validate_json(numbers)
    except ValidationError as error:
        raise StoreError(f"{NUMBERS}, which the worker wrote, makes no sense: {describe(error)}.") from error


def _safe_form(path: Path, limit: int) -> bytes:
    """The safe form that a worker has written, if it looks like one.

    Raises:
        StoreError: it does not.
    """
    data = _read(path, limit)
    if data[8:9] != b"{" or int.from_bytes(data[:8], "little") >= len(data):
        raise StoreError(f"{path.name}, which the worker wrote, is not of that form.")
    return data


def _read(path: Path, limit: int) -> bytes:
    """What a worker has written: a file of its own and of a plausible size, for it may have been the model's idea.

    Raises:
        StoreError: it is something else.
    """
    try:
        with open_regular(path, os.O_NOFOLLOW) as file:
            if os.fstat(file.fileno()).st_nlink != 1:
                raise StoreError(f"{path.name}, which the worker wrote, is no file of its own.")
            data = file.read(limit + 1)
    except OSError as error:
        raise StoreError(f"{path.name}, which the worker wrote, can't be read: {error.strerror}.") from error
    if len(data) > limit:
        raise StoreError(f"{path.name}, which the worker wrote, is larger than it can be.")
    return data


def _compared(rebuilt: _Numbers, original: _Numbers) -> str:
    """How far a rebuilt model is from the original, for people.

    Raises:
        ModelLoadError: farther than rounding accounts for, or the two are not of the same structures.
    """
    if _sizes(rebuilt) != _sizes(original) or not all(rebuilt.values()):
        raise ModelLoadError("rebuilt, it computes other structures.")
    differences, tolerable = [], True
    for dtype, computed in rebuilt.items():
        found = [compare(one.result, other.result) for one, other in zip(computed, original[dtype], strict=True)]
        tolerable = tolerable and all(difference.within(TOLERANCE[dtype]) for difference in found)
        differences += found
    worst = max(differences, key=lambda difference: difference.force)
    if not tolerable:
        raise ModelLoadError(f"rebuilt, it differs by {worst}.")
    exact = all(d.force == d.energy == d.virial == 0 for d in differences)
    return f"{'bit for bit' if exact else f'within rounding ({worst})'}, in {len(differences)} comparisons"


def _sizes(numbers: _Numbers) -> dict[str, list[int]]:
    """Atoms of each structure."""
    return {dtype: [len(one.forces) for one in computed] for dtype, computed in numbers.items()}
