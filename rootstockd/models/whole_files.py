"""Files written whole or not at all, by one command at a time.

A file is written under another name, has all its bytes on disk before it gets its own, and is gone again where that
fails: whoever finds a name finds the whole file, after a loss of power, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Generator
from pathlib import Path

from rootstockd.worker.failures import disk_full


class StoreError(Exception):
    """What can't be done with stored weights: which, why, and what to do now."""


@contextlib.contextmanager
def lock(folder: Path, name: str, say: Callable[[str], None]) -> Generator[None, None, None]:
    """Be the only one who changes what is stored of a model, or whatever else has that name.

    Args:
        folder: the store.
        name: the model.
        say: told of another command that is at it, which is waited for.

    Raises:
        StoreError: the lock can't be had.
    """
    path = folder / f"{name}.lock"
    try:
        fd = _locked(path, lambda: say(f"another command is working on {name}; waiting for it"))
    except OSError as error:
        raise cannot_be_kept("weights", folder, error) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it sees then that it has to make another
        os.close(fd)


def _locked(path: Path, on_wait: Callable[[], None]) -> int:
    """The descriptor of a locked file that lies at this path."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(fd, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), path.stat()):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


@contextlib.contextmanager
def part_file(part: Path, what: str) -> Generator[None, None, None]:
    """While `part` is written anew and given its name; where that fails nothing of it is left.

    Args:
        part: the file.
        what: it will be, for people.

    Raises:
        StoreError: it can't be written.
    """
    try:
        part.unlink(missing_ok=True)  # it may be anything that was put there, such as a pipe that nobody reads
        yield
    except OSError as error:
        raise cannot_be_kept(what, part.parent, error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def cannot_be_kept(what: str, folder: Path, error: OSError) -> StoreError:
    """What is said of a file that can't be written."""
    if disk_full(error):
        return StoreError(f"{what} was not kept: {no_room(folder)} Make room and try again.")
    return StoreError(f"{what} can't be kept in {folder}: {error.strerror}.")


def no_room(folder: Path, needed: int | None = None) -> str:
    """What is said of a full disk; `needed` are bytes, where it is known how many."""
    free = shutil.disk_usage(folder).free
    want = f", and {needed / 1e6:.1f} MB are needed" if needed else ""
    return f"there is no room in {folder}: {free / 1e6:.1f} MB are free{want}."


def write(path: Path, text: str) -> None:
    """Write a file that whoever else does may be writing, too, for all to read.

    Raises:
        StoreError: it can't be written.
    """
    part = path.with_name(f".{path.name}-{os.urandom(4).hex()}")
    with part_file(part, str(path)):
        part.write_text(text, encoding="utf-8")
        replace(part, path)


def replace(part: Path, path: Path) -> None:
    """Give a written file its name, such that after a loss of power there is the old file or the new one."""
    fd = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(fd, 0o644)
        os.fsync(fd)
    finally:
        os.close(fd)
    part.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
