"""Getting a catalogue entry's weights into the store, from wherever they are to be had.

The right file is the one that the catalogue's checksum says; where it says none, the one that the user's says; where
neither does, the first one that came, which is recorded, shown, and from then on the only one that is accepted.
"""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from rootstock_client.runtime_dir import named_path
from rootstockd.models import store
from rootstockd.models.catalogue import Entry, builtin_files, read_catalogue
from rootstockd.models.download import Known, Progress, Say, download
from rootstockd.models.store import Record, Stored, StoredFile
from rootstockd.models.whole_files import StoreError, cannot_be_kept, lock
from rootstockd.settings.state_dir import StateError, check_trusted
from rootstockd.users import user_name
from rootstockd.worker.files import digest_of, is_file


@dataclass(frozen=True)
class Wishes:
    """How to pull.

    Args:
        accept: asked whether the licence of this entry is accepted; raises if nobody can be asked.
        say: told what people should know.
        progress: told of bytes as they come.
        mirror: a folder, or the beginning of an address, that has the files by their names; nothing else is asked then.
        sha256: of the right file, where the user knows it.
        pause: seconds until a failed request is repeated for the first time.
    """

    accept: Callable[[Entry], bool]
    say: Say
    progress: Progress
    mirror: str = ""
    sha256: str = ""
    pause: float = 1.0


def pull(name: str, entry: Entry, wishes: Wishes) -> Stored:
    """Have a model's weights in the store; done at once where they are.

    Raises:
        StoreError: it can't be, or may not be.
        DownloadError: the file can't be had.
        StateError: others may write to where it would lie.
    """
    if not entry.url:
        raise StoreError(f"there is nothing to pull for model {name!r}: its weights {_where(entry)}.")
    folder = store.own_folder()
    with lock(folder, name, wishes.say):
        stored = store.weights_of(name, entry)
        right, pinned = _right(name, entry, stored, wishes.sha256)
        if stored is not None and _whole(stored, wishes.say):
            return stored
        accepted = _licence(name, entry, stored, wishes.accept)
        original, source = _get(name, entry, right, folder, wishes)
        record = Record(
            original=original,
            url=entry.url,
            source=source,
            pinned=pinned,
            when=now(),
            licence_accepted=accepted,
        )
        store.write_record(folder, name, record)
        return Stored(folder, record)


def now() -> str:
    """UTC, ISO 8601."""
    return dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")


def _where(entry: Entry) -> str:
    return f"are {entry.weights}" if entry.weights else "come with its environment, or it has none"


def _right(name: str, entry: Entry, stored: Stored | None, given: str) -> tuple[str, str]:
    """The SHA-256 of the right file, empty where nobody knows it, and who says so."""
    sayings = {
        "the catalogue": entry.sha256.lower(),
        "an earlier pull": stored.record.original.sha256 if stored else "",
        "the user": given.lower(),
    }
    known = {who: digest for who, digest in sayings.items() if digest}
    if len(set(known.values())) > 1:
        said = ", ".join(f"{who} says {digest}" for who, digest in known.items())
        hint = f" `rootstockd models remove {name}` makes it forget the earlier one." if stored else ""
        raise StoreError(f"model {name!r}: which file is the right one? {said}.{hint}")
    if stored is not None:
        return stored.record.original.sha256, stored.record.pinned
    return next(((digest, who) for who, digest in known.items()), ("", store.FIRST_USE))


def _whole(stored: Stored, say: Say) -> bool:
    damages = [text for file in stored.record.files if (text := store.damage(stored.folder, file))]
    for text in damages:
        say(f"{text}; it is pulled again")
    return not damages


def _licence(name: str, entry: Entry, stored: Stored | None, accept: Callable[[Entry], bool]) -> str:
    """By whom and when the licence was accepted; empty where it need not be."""
    if not entry.accept_licence:
        return ""
    if stored is not None and stored.record.licence_accepted:
        return stored.record.licence_accepted
    if not accept(entry):
        raise StoreError(f"the licence of {name} was not accepted, so nothing was pulled.")
    return f"{user_name(os.getuid())}, {now()}"


# --- where it may come from


def _get(name: str, entry: Entry, right: str, folder: Path, wishes: Wishes) -> tuple[StoredFile, str]:
    """The file, in the store, and where it came from."""
    part = folder / f"{name}.part"
    if not wishes.mirror:
        for path in _here(entry, right, folder):
            if (file := _copy(path, part, entry, right, folder, wishes.say)) is not None:
                return file, str(path)
        return _download(entry.url, part, entry, right, folder, wishes), entry.url
    if "://" in wishes.mirror:
        url = f"{wishes.mirror.rstrip('/')}/{file_name(entry.url)}"
        return _download(url, part, entry, right, folder, wishes), url
    path = named_path(wishes.mirror) / file_name(entry.url)
    if not is_file(path):
        raise StoreError(f"the mirror has no {path}, which would be its copy of {entry.url}.")
    if (file := _copy(path, part, entry, right, folder, wishes.say)) is None:
        raise StoreError(f"what the mirror has is not the file that is meant, so it was not kept: {path}.")
    return file, str(path)


def file_name(url: str) -> str:
    """What a file is called at its address."""
    return unquote(PurePosixPath(urlsplit(url).path).name)


def mace_cache() -> Path:
    """Where mace-torch keeps what it downloads."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "mace"


def _here(entry: Entry, right: str, folder: Path) -> Iterator[Path]:
    """Files on this machine that may be the right one: of another entry with this address, or mace-torch's."""
    for _, other in store.all_stored():
        if other.record.url == entry.url and not store.damage(other.folder, other.record.original):
            yield other.folder / other.record.original.name
    # by their names alone: many fine-tunes are called as mace_run_train calls them
    if entry.family == "mace" and (right or entry.url in _well_known()):
        name = file_name(entry.url)
        bare = "".join(letter for letter in name if letter.isalnum() or letter == "_")  # as mace-torch calls most
        for path in (mace_cache() / bare, mace_cache() / name):
            if is_file(path) and path.parent != folder:
                yield path


def _well_known() -> set[str]:
    """Addresses of the catalogue's own entries, which are mace-torch's too."""
    return {entry.url for path in builtin_files() for entry in read_catalogue(path).values()}


def _copy(path: Path, part: Path, entry: Entry, right: str, folder: Path, say: Say) -> StoredFile | None:
    """Take a file of this machine, if it is the right one."""
    try:
        check_trusted(path)
        check_trusted(path.parent)
        if (entry.size and path.stat().st_size != entry.size) or (right and digest_of(path) != right):
            say(f"{path} is another file than the one that is meant; it is left alone")
            return None
    except StateError as error:
        say(f"{path} is not used: {error}")
        return None
    except OSError as error:
        raise StoreError(f"{path} can't be read: {error.strerror}.") from error
    say(f"copying {path}")
    # the part file may have what an earlier download left
    file = store.copy_in(path, folder, part.with_suffix(".copy"), suffix(entry.url))
    if right and file.sha256 != right:
        raise StoreError(f"{path} changed while it was copied.")
    return file


def suffix(url: str) -> str:
    """Of the stored file's name."""
    return PurePosixPath(file_name(url)).suffix


def _download(url: str, part: Path, entry: Entry, right: str, folder: Path, wishes: Wishes) -> StoredFile:
    """Fetch it; once more from the beginning if the pieces of several attempts do not make the right file."""
    try:
        while True:
            resumed = part.exists()
            download(
                url,
                part,
                Known(checksum=bool(right), size=entry.size),
                progress=wishes.progress,
                say=wishes.say,
                pause=wishes.pause,
            )
            size, digest = part.stat().st_size, digest_of(part)
            if (not entry.size or size == entry.size) and right in {"", digest}:
                return store.keep(part, folder, suffix(entry.url))
            part.unlink()
            if not resumed:
                break
            wishes.say("the part that was there does not belong to it; it is downloaded anew")
    except OSError as error:
        raise cannot_be_kept(url, folder, error) from error
    if right:
        said = f"it has the SHA-256 {digest}, where {right} was expected"
    else:
        said = f"it has {size} bytes, where {entry.size} were expected"
    raise StoreError(
        f"{url} is not the file that is meant: {said}. It was damaged on the way, or changed where it lies; it was not "
        "kept."
    )
