"""How environments lie in a state directory, and what each says of itself.

    environments/NAME/lock            who builds there holds a lock on it
    environments/NAME/current         a link to the build in use
    environments/NAME/builds/ID/      a virtual environment, made where it lies, with manifest.json and lock.txt

A build without a manifest was never finished. Nothing in a finished one changes. A worker holds a shared lock on the
folder of the build that it runs in.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from rootstockd.environments.packages import damage, installed
from rootstockd.environments.specification import Specification, check_name
from rootstockd.settings.state_dir import check_trusted, make_readable, own_state, state_dirs
from rootstockd.worker.files import digest_of, read_regular

SCHEMA_VERSION = 1
"""Of the manifest; raised when what an older version wrote can't be used as it is."""
_SHOWN = 3
"""Problems of an environment that are told at once."""


class EnvironmentBuildError(Exception):
    """What can't be done with an environment: why, and what to do."""


class Manifest(BaseModel):
    """What a build says of itself."""

    schema_version: int = SCHEMA_VERSION
    name: str
    specification: Specification
    origin: str
    """Where the specification came from: `named` for that of the environment's name, or a file's path."""
    python_request: str
    """Which Python was asked for."""
    python: str
    """Its version."""
    platform: str
    torch: str
    """Which of PyTorch's builds, as a later build from the same lock must ask for it."""
    lock_sha256: str
    versions: dict[str, str]
    """Of what is installed."""
    rootstockd: str
    """The version that built it."""
    built: float
    """Unix time."""


@dataclass(frozen=True)
class Build:
    """A finished build."""

    path: Path
    manifest: Manifest

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.path / "bin/python"

    @property
    def lock(self) -> Path:
        """Its lock, with hashes."""
        return self.path / "lock.txt"

    @property
    def day(self) -> str:
        """When it was built."""
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(self.manifest.built))


def folder_of(name: str, state: Path | None = None) -> Path:
    """Where an environment lies, or would."""
    return (state or own_state()) / "environments" / check_name(name)


def find_build(name: str) -> Build | None:
    """The build in use, in the first state directory that has one.

    Raises:
        EnvironmentBuildError: there is one, and it can't be read.
        StateError: its folder is not to be trusted.
    """
    for state in state_dirs():
        if (folder_of(name, state) / "current").is_symlink():
            return current_build(folder_of(name, state))
    return None


def current_build(folder: Path) -> Build | None:
    """The build in use of the environment in this folder.

    Raises:
        EnvironmentBuildError: it can't be read.
        StateError: it is not to be trusted.
    """
    if not (folder / "current").is_symlink():
        return None
    check_trusted(folder)
    path = (folder / "current").resolve()
    if not path.is_dir():
        raise EnvironmentBuildError(f"environment {folder.name!r}: the build {path} is gone. {_mend(folder)}")
    check_trusted(path)
    return Build(path, read_manifest(path, folder))


def read_manifest(path: Path, folder: Path) -> Manifest:
    """What a build says of itself.

    Raises:
        EnvironmentBuildError: it says nothing, or what this version can't read.
    """
    try:
        text = read_regular(path / "manifest.json")
        fields: Any = json.loads(text)
        version = fields["schema_version"]
        if version > SCHEMA_VERSION:
            raise EnvironmentBuildError(
                f"environment {folder.name!r} was built by rootstockd {fields.get('rootstockd')}, which is newer (it "
                f"writes version {version} of its manifest, this one reads {SCHEMA_VERSION}). {_mend(folder)} "
                "Or upgrade rootstockd."
            )
        return Manifest.model_validate(fields)
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        why = f"version {version} of its manifest" if isinstance(error, ValidationError) else str(error)
        raise EnvironmentBuildError(
            f"environment {folder.name!r}: what {path} says of itself can't be read: {why}. {_mend(folder)}"
        ) from error


def _mend(folder: Path) -> str:
    return f"Build it again: `rootstockd env update {folder.name}`."


def built_environments() -> dict[str, Path]:
    """The folders of all that were built, by name; a name in an earlier state directory goes before."""
    found: dict[str, Path] = {}
    for state in state_dirs():
        for link in sorted((state / "environments").glob("*/current")):
            found.setdefault(link.parent.name, link.parent)
    return found


def finished_builds(folder: Path) -> list[Path]:
    """All finished builds, the oldest first."""
    return sorted((path.parent for path in folder.glob("builds/*/manifest.json")), key=lambda path: path.name)


# --- looking closer


def problems_of(build: Build, *, digests: bool = False) -> list[str]:
    """What is missing of a build, in words; empty where nothing is. `digests` finds as well what kept its size."""
    manifest = build.manifest
    found = []
    if not os.access(build.python, os.X_OK):
        if build.python.is_symlink():
            found.append(f"its Python {manifest.python} is gone from {build.python.readlink().parent}")
        else:
            found.append(f"{build.python} is gone, or can't be run")
    if manifest.platform != sysconfig.get_platform():
        found.append(f"it is for {manifest.platform}, and this machine is {sysconfig.get_platform()}")
    try:
        if digest_of(build.lock) != manifest.lock_sha256:
            found.append("its lock was changed after it was built")
    except OSError:
        found.append("its lock is missing")
    there = installed(build.path)
    versions = {package.name: package.version for package in there}
    for name, version in manifest.versions.items():
        if name not in versions:
            found.append(f"{name} {version} is missing")
        elif versions[name] != version:
            found.append(f"{name} is {versions[name]} where {version} was built")
    return [*found, *damage(there, digests=digests).values()]


def broken(name: str, problems: list[str]) -> str:
    """What to say of an environment with such problems, and what to do."""
    more = [f"and {len(problems) - _SHOWN} more"] * (len(problems) > _SHOWN)
    what = "; ".join([*problems[:_SHOWN], *more])
    return f"environment {name!r} is broken: {what}. `rootstockd env create {name}` builds it again from its lock."


def size_of(path: Path) -> int:
    """Bytes that all files in a folder take; what two builds share, by hard links, is counted in each."""
    return sum(file.lstat().st_blocks * 512 for file in path.rglob("*"))


# --- changing what is there


@contextlib.contextmanager
def building(name: str) -> Iterator[Path]:
    """The environment's folder in one's own state directory, for oneself alone as long as it takes.

    Raises:
        EnvironmentBuildError: somebody else is at it, or it can't be written.
        StateError: others could have put something there.
    """
    folder = folder_of(name)
    try:
        make_readable(folder / "builds")
        for path in (own_state(), folder.parent, folder, folder / "builds"):
            check_trusted(path)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise EnvironmentBuildError(
            f"environments can't be written to {folder}: {error.strerror}. The variable ROOTSTOCKD_STATE names another "
            "state directory."
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.pread(lock, 200, 0).decode(errors="replace").strip()
            raise EnvironmentBuildError(
                f"environment {name!r} is being built already, by {who or 'another process'}. Wait for it."
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        remove_unfinished(folder)
        yield folder
    finally:
        os.close(lock)


def remove_unfinished(folder: Path) -> None:
    """Remove what builds left that failed or were killed. Only for who holds the lock."""
    for path in (folder / "builds").iterdir():
        if not (path / "manifest.json").exists():
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".current-*"):
        path.unlink()


def new_build(folder: Path) -> Path:
    """A folder for a build. Names sort by when they were made."""
    path = folder / "builds" / f"{time.time_ns():x}"
    make_folder(path)
    return path


def make_folder(path: Path) -> None:
    """One that all may read, whatever the umask."""
    path.mkdir()
    path.chmod(0o755)


def take_into_use(folder: Path, path: Path) -> None:
    """Switch to a finished build, at once for everybody, and remove what is older than the last and in nobody's use."""
    before = (folder / "current").resolve() if (folder / "current").is_symlink() else None
    link = folder / f".current-{path.name}"
    link.symlink_to(Path("builds") / path.name)
    link.replace(folder / "current")
    for old in finished_builds(folder):
        if old not in (path, before) and not in_use(old):
            remove_build(old)


def in_use(path: Path) -> bool:
    """Whether a worker runs in a build, as far as locks can tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system that has no such locks
        return False
    finally:
        os.close(descriptor)
    return False


def remove_build(path: Path) -> None:
    """Remove a build; one that is half gone counts as unfinished."""
    (path / "manifest.json").unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def remove_environment(name: str) -> bool:
    """Remove all builds of an environment; whether any was ever finished.

    Raises:
        EnvironmentBuildError: it is not there to remove, or in use.
    """
    folder = folder_of(name)
    if not (folder / "builds").is_dir():
        other = built_environments().get(name)
        where = f"it lies in {other}, which is another's to remove." if other else "there is none."
        raise EnvironmentBuildError(f"environment {name!r} can't be removed: {where}")
    with building(name):
        if used := [path for path in finished_builds(folder) if in_use(path)]:
            raise EnvironmentBuildError(
                f"environment {name!r} is in use by a worker, in {used[0]}. Stop the daemon, or unload its models, "
                "first."
            )
        finished = (folder / "current").is_symlink() or bool(finished_builds(folder))
        (folder / "current").unlink(missing_ok=True)
        for path in (folder / "builds").iterdir():
            remove_build(path)
        shutil.rmtree(folder, ignore_errors=True)
    return finished
