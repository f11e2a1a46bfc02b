"""Models of one's own: a file is copied into the store, tried out, and named in the state directory's `models.toml`."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

import tomlkit
from ase.data import chemical_symbols
from pydantic import ValidationError

from rootstock_client.errors import ModelLoadError, NotAModelError, RootstockError
from rootstockd.environments.finding import find_environment
from rootstockd.models import store
from rootstockd.models.availability import alike, families
from rootstockd.models.catalogue import FILE_NAME, NAME, Catalogue, Entry
from rootstockd.models.convert import converted
from rootstockd.models.download import Say
from rootstockd.models.pull import now
from rootstockd.models.spec import spec_of
from rootstockd.models.store import Record, Stored
from rootstockd.models.trial import try_out
from rootstockd.models.whole_files import StoreError, lock, part_file, replace
from rootstockd.settings.state_dir import own_state
from rootstockd.settings.toml_file import MOST_BYTES
from rootstockd.settings.validation import describe
from rootstockd.worker.files import read_regular


def add(name: str, file: Path, fields: dict[str, Any], sha256: str, say: Say) -> Entry:
    """Register a model file.

    Args:
        name: what to call the model.
        file: its weights.
        fields: of its entry, without weights and checksum.
        sha256: of the file, where the user knows it.
        say: told what people should know.

    Raises:
        CatalogueError: it can't be told which names are taken.
        StoreError: it can't be, or there is a model of this name, or of an alias.
        RootstockError: it can't be loaded.
    """
    if not NAME.fullmatch(name):
        raise StoreError(f"{name!r} can't be a model's name: letters, digits and . _ + - make one.")
    for taken in (name, *fields.get("aliases", ())):
        _check_free(taken)
    _check_family(fields["family"], fields.get("environment", ""))
    folder = store.own_folder()
    with lock(folder, name, say):
        _check_free(name)  # again: another command may have added it while this one waited
        store.remove(folder, name)  # what an `add` that was killed has left
        original = store.copy_in(file, folder, folder / f"{name}.copy", file.suffix)
        record = Record(original=original, source=str(file.absolute()), pinned="the user", when=now())
        store.write_record(folder, name, record)
        try:
            if sha256 and original.sha256 != sha256.lower():
                raise StoreError(f"{file} has the SHA-256 {original.sha256}, not {sha256}. It was not added.")
            entry = _tried(name, _entry(name, folder, record, fields), say)
            record = converted(name, entry, Stored(folder, record), say).record
            if record.note:
                say(record.note)
            entry = _entry(name, folder, record, entry.model_dump())
            _write_entry(name, entry, folder)
        except BaseException as error:
            store.remove(folder, name)
            copy = str(folder / original.name)  # of which nobody is told, as it is gone
            if isinstance(error, NotAModelError):
                raise StoreError(f"{file} was not added: {error.message.replace(copy, 'it')}") from error
            if isinstance(error, RootstockError):
                raise type(error)(error.message.replace(copy, str(file)), error.hint) from error
            raise
    return entry


def _check_free(name: str) -> None:
    """Whether no model has this name, or alias.

    Raises:
        CatalogueError: it can't be told.
        StoreError: one has.
    """
    catalogue = Catalogue.load()
    if name in catalogue:
        real, _ = catalogue.resolve(name)
        raise StoreError(
            f"there is a model {name!r} already, from {catalogue.origins[real]}. Choose another name"
            + (f", or `rootstockd models remove {name}` first." if catalogue.origins[real] == own_file() else ".")
        )


def _check_family(family: str, environment: str) -> None:
    """Whether there is an engine for it. What a built environment has is for its workers to say.

    Raises:
        StoreError: there is none.
    """
    if family in families():
        return
    with contextlib.suppress(ModelLoadError):
        if find_environment(environment or family, family).built:
            return
    near, offered = alike(family)
    raise StoreError(
        f"there is no family {family!r}{f'; did you mean {near!r}?' if near else '.'} There are: "
        f"{', '.join(offered)}. A fine-tune for an ASE calculator, such as SevenNet's or CHGNet's, "
        "is an entry in models.toml (docs/add-a-model.md). More families come with packages that have an engine "
        "(docs/engines.md)."
    )


def own_file() -> Path:
    """The catalogue that `add` writes."""
    return own_state() / FILE_NAME


def _entry(name: str, folder: Path, record: Record, fields: dict[str, Any]) -> Entry:
    try:
        file = record.loaded
        said = {"weights": folder / file.name, "sha256": file.sha256, "size": file.size}
        if record.safe is not None:
            said |= {"original_sha256": record.original.sha256, "converted_sha256": file.sha256}
        return Entry.model_validate({**fields, **said})
    except ValidationError as error:
        raise StoreError(f"model {name!r}: {describe(error)}.") from error


def _tried(name: str, entry: Entry, say: Say) -> Entry:
    """The entry with what the loaded model says of itself where it left that open."""
    say("loading it once, in a worker of its own")
    info = try_out(spec_of(name, entry))
    known = tuple(chemical_symbols[z] for z in info.elements if z < len(chemical_symbols))
    if unknown := [symbol for symbol in entry.elements if known and symbol not in known]:
        raise StoreError(f"model {name!r} does not know {', '.join(unknown)}. It knows {', '.join(known)}.")
    heads = info.heads if len(info.heads) > 1 else ()
    said = {"elements": entry.elements or known, "heads": heads, "computes": info.properties}
    return entry.model_copy(update=said)


# --- the file


def _write_entry(name: str, entry: Entry, folder: Path) -> None:
    fields = entry.model_dump(mode="json", exclude_defaults=True, exclude={"weights"})
    assert entry.weights is not None
    fields["weights"] = f"{folder.name}/{entry.weights.name}"  # relative, so that the state directory may be moved
    with _edited(folder) as document:
        for alias in entry.aliases:
            if alias in document or any(alias in other.get("aliases", ()) for other in document.values()):
                raise StoreError(f"there is a model {alias!r} already, which another command has added meanwhile.")
        document[name] = fields
        if len(tomlkit.dumps(document).encode()) > MOST_BYTES:
            raise StoreError(
                f"{name} was not added: with it {own_file()} would have more than {MOST_BYTES:,} bytes, and could not "
                "be read. `rootstockd models remove` those that nobody uses."
            )


def remove_entry(name: str, folder: Path) -> bool:
    """Take a model out of the file; whether it was there."""
    with _edited(folder) as document:
        return document.pop(name, None) is not None


@contextlib.contextmanager
def _edited(folder: Path) -> Generator[tomlkit.TOMLDocument, None, None]:
    """The state directory's `models.toml`, to be changed; comments in it stay."""
    path, part = folder.parent / FILE_NAME, folder / f"{FILE_NAME}.part"
    with lock(folder, f".{FILE_NAME}", lambda _: None), part_file(part, str(path)):
        document = tomlkit.parse(read_regular(path) if path.exists() else _HEAD)
        yield document
        part.write_text(tomlkit.dumps(document), encoding="utf-8")
        replace(part, path)


_HEAD = "# Models of this state directory, as `rootstockd models add` wrote them.\n\n"
