"""The weight store: `weights/` in a state directory, with what was pulled and added.

A file is called by its own SHA-256, so what lies there can be told from what should; beside the files a record for
each model, `NAME.json`, says which one is its own. A record is written when its file is whole and on disk, so whoever
finds a record finds the file. Nothing there is believed that others could have written.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from rootstockd.models.catalogue import Entry
from rootstockd.models.whole_files import StoreError, lock, no_room, part_file, replace
from rootstockd.settings.state_dir import check_trusted, make_readable, own_state, state_dirs
from rootstockd.worker.files import digest_of, open_regular, read_regular

FOLDER = "weights"
_CHECKSUM = re.compile("[0-9a-f]{64}")
FIRST_USE = "its first use"
"""Who says which file is the right one, where nobody does."""
LARGEST = 16 << 30
"""Bytes that a file may have where nobody has said how many they are: more than any model, less than a disk."""


class StoredFile(BaseModel):
    """A file of the store."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    suffix: str
    """Of its name, with the dot."""
    size: int

    @property
    def name(self) -> str:
        """What it is called in its folder."""
        return f"{self.sha256}{self.suffix}"


class Record(BaseModel):
    """What is known of a model's stored weights."""

    model_config = ConfigDict(frozen=True)

    original: StoredFile
    """As it was pulled or added."""
    safe: StoredFile | None = None
    """The same model in a form that is not code; workers load this where it is there."""
    url: str = ""
    """What the catalogue said when it was pulled; empty for what was added."""
    source: str
    """Where it came from."""
    pinned: str
    """Who says that this is the right file: the catalogue, the user, or FIRST_USE."""
    when: str
    """UTC, ISO 8601."""
    licence_accepted: str = ""
    """By whom and when, where it had to be."""
    note: str = ""
    """Why there is no safe form, or how far it is from the original."""

    @property
    def loaded(self) -> StoredFile:
        """What workers load."""
        return self.safe or self.original

    @property
    def files(self) -> list[StoredFile]:
        """All that is kept."""
        return [self.original, *([self.safe] if self.safe else [])]


@dataclass(frozen=True)
class Stored:
    """A record, and where it was found."""

    folder: Path
    record: Record

    @property
    def weights(self) -> Path:
        """The file for workers."""
        return self.folder / self.record.loaded.name


def own_folder() -> Path:
    """Where this user's commands put weights; made if it is not there, for others to read and for nobody else to write.

    Raises:
        StoreError: it can't be made.
        StateError: others may write to it.
    """
    folder = own_state() / FOLDER
    try:
        make_readable(folder)
        for path in (folder.parent, folder):
            check_trusted(path)
    except OSError as error:
        raise StoreError(
            f"weights can't be stored in {folder}: {error.strerror}. The variable ROOTSTOCKD_STATE names another state "
            "directory."
        ) from error
    return folder


def find(name: str) -> Stored | None:
    """The record of a model, one's own before the system's.

    Raises:
        StateError: others could have written it.
        StoreError: it can't be read.
    """
    for state in state_dirs():
        if (record := read_record(state / FOLDER, name)) is not None:
            return Stored(state / FOLDER, record)
    return None


def all_stored() -> Iterator[tuple[str, Stored]]:
    """Every record by its model's name; one's own before the system's of the same name."""
    seen = set()
    for state in state_dirs():
        for path in _records_in(state / FOLDER):
            if path.stem not in seen and (record := read_record(path.parent, path.stem)) is not None:
                seen.add(path.stem)
                yield path.stem, Stored(path.parent, record)


def _records_in(folder: Path) -> list[Path]:
    """Files of records; weights are called by their checksum, some of them `*.json`."""
    return sorted(path for path in folder.glob("*.json") if not _CHECKSUM.fullmatch(path.stem))


def read_record(folder: Path, name: str) -> Record | None:
    """A model's record in this folder; None where there is none."""
    path = folder / f"{name}.json"
    try:
        text = read_regular(path)
        check_trusted(folder)
        check_trusted(path)
        return Record.model_validate_json(text)
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise StoreError(f"the record {path} can't be read: {error}") from error


def weights_of(name: str, entry: Entry) -> Stored | None:
    """What is stored of a model, if it is what its entry means.

    Raises:
        StateError, StoreError: it can't be told.
    """
    stored = find(name)
    if stored is None or stored.record.url != entry.url:
        return None
    return stored if entry.sha256.lower() in {"", stored.record.original.sha256} else None


# --- writing


def keep(part: Path, folder: Path, suffix: str) -> StoredFile:
    """Give a file that is whole its name in the store, when all of it is on disk."""
    digest = digest_of(part)
    stored = StoredFile(sha256=digest, suffix=suffix, size=part.stat().st_size)
    replace(part, folder / stored.name)
    return stored


def copy_in(source: Path, folder: Path, part: Path, suffix: str) -> StoredFile:
    """Copy a file into the store.

    Raises:
        StoreError: it can't be read or kept, or is larger than any model.
    """
    try:
        file = open_regular(source)
    except OSError as error:
        raise StoreError(f"{source} can't be read: {error.strerror}.") from error
    with file, part_file(part, str(source)):
        size = os.fstat(file.fileno()).st_size
        if size > shutil.disk_usage(folder).free:
            raise StoreError(f"{source} was not copied: {no_room(folder, size)} Make room and try again.")
        with part.open("wb") as out:
            while block := file.read(1 << 20):
                if out.tell() + len(block) > LARGEST:
                    raise StoreError(f"{source} was not copied: it has more than the {LARGEST >> 30} GiB of a model.")
                out.write(block)
        return keep(part, folder, suffix)


def write_record(folder: Path, name: str, record: Record) -> None:
    """Write a model's record; where that fails, its files go that no record has.

    Raises:
        StoreError: it can't be written, or a file of it is gone.
    """
    part = folder / f"{name}.json.part"
    with _records(folder):
        try:
            for file in record.files:
                if not (folder / file.name).exists():
                    raise StoreError(
                        f"{name} was not kept: another command removed {folder / file.name} meanwhile, which another "
                        "model had as well. Try again."
                    )
            with part_file(part, f"the record of {name}"):
                part.write_text(record.model_dump_json(indent=2))
                replace(part, folder / f"{name}.json")
        except StoreError:
            with contextlib.suppress(StoreError):  # of another's record, which is damaged: then they stay
                _discard(folder, _unneeded(folder, record.files))
            raise


def remove(folder: Path, name: str) -> int:
    """Remove a model's record, and those of its files that no other model has; how many bytes were freed."""
    with _records(folder):
        record = read_record(folder, name)
        if record is None:
            return 0
        files = _unneeded(folder, record.files, but=name)  # before anything is changed
        (folder / f"{name}.json").unlink()
        return _discard(folder, files)


def _records(folder: Path) -> contextlib.AbstractContextManager[None]:
    """For as long as it takes to say who has which files: models may share one, and their commands run side by side."""
    return lock(folder, ".records", lambda _: None)


def _unneeded(folder: Path, files: list[StoredFile], but: str = "") -> list[StoredFile]:
    """Those of these files that no model has, `but` for one, for whoever holds `_records`.

    Raises:
        StoreError: a model's record can't be read.
    """
    others = (read_record(folder, path.stem) for path in _records_in(folder) if path.stem != but)
    kept = {file.name for other in others if other for file in other.files}
    return [file for file in files if file.name not in kept]


def _discard(folder: Path, files: list[StoredFile]) -> int:
    """Remove files; how many bytes were freed."""
    freed = 0
    for file in files:
        with contextlib.suppress(FileNotFoundError):
            (folder / file.name).unlink()
            freed += file.size
    return freed


def damage(folder: Path, file: StoredFile) -> str:
    """What is wrong with a stored file; empty where it is as it should be."""
    return wrong(folder / file.name, file.sha256)


def wrong(path: Path, sha256: str) -> str:
    """What is wrong with a file of which this checksum is known; empty where it is as it should be."""
    try:
        digest = digest_of(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} can't be read: {error.strerror}"
    return "" if digest == sha256 else f"{path} has the SHA-256 {digest}: it was changed or damaged"
