"""Keeping weights in a form that is not code, where the family has one.

They are converted once, compared, and kept beside the original. A worker of the family does it, confined like any
other, since it has to run what is in the original.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from rootstock_client.errors import RootstockError
from rootstockd.models import store
from rootstockd.models.catalogue import Entry
from rootstockd.models.download import Say
from rootstockd.models.spec import spec_of
from rootstockd.models.store import Stored, StoredFile, StoreError
from rootstockd.models.trial import try_out

FORMS = {"mace": ("model.safetensors", ".safetensors")}
"""Families that have such a form: the file that their `load` writes with the argument `convert`, and its suffix."""


def with_safe_form(name: str, entry: Entry, stored: Stored, say: Say) -> Stored:
    """What is stored, with its safe form if it can be had; if not, the record says why.

    Raises:
        StoreError: it can't be written.
    """
    if entry.family not in FORMS or stored.record.safe is not None or stored.folder != store.own_folder():
        return stored
    file_name, suffix = FORMS[entry.family]
    original = stored.record.original
    weights = {"weights": stored.folder / original.name, "sha256": original.sha256}
    spec = spec_of(name, entry.model_copy(update={**weights, "arguments": {**entry.arguments, "convert": True}}))
    kept: list[StoredFile] = []

    def harvest(scratch: Path) -> None:
        kept.append(_take(scratch / file_name, stored.folder, stored.folder / f"{name}.copy", suffix, original.size))

    say("converting it into a form that is not code, and comparing")
    try:
        note = try_out(spec, harvest, show_errors=False).note
    except RootstockError as error:
        note = f"not converted, so workers run what is in the file: {error.message}"
    record = stored.record.model_copy(update={"safe": kept[0] if kept else None, "note": note})
    store.write_record(stored.folder, name, record)
    return Stored(stored.folder, record)


def _take(path: Path, folder: Path, part: Path, suffix: str, expected: int) -> StoredFile:
    """Copy what a worker has written: a file of its own and of a plausible size, for it may have been the model's idea.

    Raises:
        StoreError: it is something else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            status = os.fstat(fd)
            limit = 4 * expected + (1 << 24)
            if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
                raise StoreError(f"{path.name}, which the worker wrote, is no file of its own.")
            data = file.read(limit + 1)
        if len(data) > limit:
            raise StoreError(f"{path.name}, which the worker wrote, is larger than the model can be.")
        if data[8:9] != b"{" or int.from_bytes(data[:8], "little") >= len(data):
            raise StoreError(f"{path.name}, which the worker wrote, is not of that form.")
        part.write_bytes(data)
        return store.keep(part, folder, suffix)
    except OSError as error:
        raise StoreError(f"the converted model can't be kept in {folder}: {error.strerror}.") from error
