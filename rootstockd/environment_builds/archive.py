"""An environment in a file, for machines without a network: its lock, its specification, and wheels.

A tar archive with `environment.json`, `lock.txt` and `wheels/*.whl`, and nothing else. The lock says the SHA-256 of
each wheel, `environment.json` that of the lock; `import --sha256` that of the whole file.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sys
import sysconfig
import tarfile
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from pydantic import BaseModel, Field

from rootstockd.environment_builds.building import Plan, Say, build, torch_backend
from rootstockd.environment_builds.running_uv import run_uv
from rootstockd.environments.builds import Build, EnvironmentBuildError
from rootstockd.environments.specification import Specification
from rootstockd.settings.state_dir import own_state
from rootstockd.worker.files import digest_of, read_regular

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
_WHEEL = re.compile(r"wheels/([A-Za-z0-9_.+!]+(?:-[A-Za-z0-9_.+!]+){4,5}\.whl)")
_SMALL = 16 * 2**20
"""Bytes that a lock or a description may have."""
_MOST = 64 * 2**30
"""Bytes that an environment may have; those with torch for CUDA have a tenth."""
_HASH = re.compile(r"--hash=sha256:([0-9a-f]{64})")
_LOCKED = re.compile(
    r"(?:\w[\w.-]*(?:\[[\w.,-]*\])?==[\w.!+]+(?: *;[^\\#]*?)?)?(?: *--hash=sha256:[0-9a-f]{64})*(?: *\\)?|[ ]*#.*"
)
"""A line of a lock whose packages are all in the archive: no options of uv's, and no addresses of elsewhere."""
_PACKAGE = re.compile(r"^(\w[\w.-]*)(?=[^;\n]*$).*(?:\n[ \t].*)*", re.MULTILINE)
"""A package's lines in a lock, if it is for all machines."""
TIMEOUT = 60.0
"""Seconds that a server may be silent."""


class Description(BaseModel):
    """What the archive says of itself."""

    format: int = FORMAT
    name: str
    specification: Specification
    python: str = Field(pattern=r"^\d+\.\d+\.\d+\w*$")
    """Its version; another of the same minor version will do."""
    platform: str
    torch: str
    lock_sha256: str
    rootstockd: str


def export(source: Build, file: Path, say: Say) -> str:
    """Write an environment into a file.

    Returns:
        The file's SHA-256.

    Raises:
        EnvironmentBuildError: a wheel can't be had, or the file can't be written.
    """
    name = source.manifest.name
    file = file.absolute()
    try:
        with tempfile.TemporaryDirectory(prefix="rootstockd-export-", dir=file.parent) as folder:
            # in there nobody else can have put anything by that name
            whole, wheels = Path(folder) / "whole", Path(folder) / "wheels"
            wheels.mkdir()
            lock = _gather(source, wheels, say)
            manifest = source.manifest
            description = Description(
                name=name,
                specification=manifest.specification,
                python=manifest.python,
                platform=manifest.platform,
                torch=manifest.torch,
                lock_sha256=hashlib.sha256(lock.encode()).hexdigest(),
                rootstockd=manifest.rootstockd,
            )
            with tarfile.open(whole, "w", format=tarfile.PAX_FORMAT) as tar:
                _add(tar, "environment.json", description.model_dump_json(indent=1).encode())
                _add(tar, "lock.txt", lock.encode())
                for wheel in sorted(wheels.iterdir()):
                    with wheel.open("rb") as content:
                        _add_file(tar, f"wheels/{wheel.name}", content, wheel.stat().st_size)
            digest = digest_of(whole)
            whole.replace(file)
    except OSError as error:
        raise EnvironmentBuildError(f"environment {name!r} can't be exported to {file}: {error}.") from error
    return digest


def _gather(source: Build, wheels: Path, say: Say) -> str:
    """Fetch a wheel of each package in the lock; the lock, with the hashes of those that had to be made."""
    lock = read_regular(source.lock).decode()
    # uv knows where each file lies and which fit this Python; it is asked for what is locked, no more
    plan = wheels.parent / "pylock.toml"
    python = source.python.resolve()  # not the environment's, which runs what packages have for its start
    run_uv(
        [
            *("pip", "compile", "--quiet", "--no-deps", "--format", "pylock.toml"),
            "--output-file",
            plan,
            "--python",
            python,
            *torch_backend(source.manifest.torch),
            source.lock,
        ],
        f"environment {source.manifest.name!r}: finding its packages",
    )
    for package in tomllib.loads(plan.read_text())["packages"]:
        name, version = package["name"], package.get("version", "")
        block = _block(lock, name)
        if not (files := package.get("wheels") or [package["sdist"]] * ("sdist" in package)):
            raise EnvironmentBuildError(f"{name} is named by an address, and can't be exported so.")
        for place in files:
            say(f"{name} {version}")
            target = wheels / _file_name(place)
            _fetch(place, wheels.parent, target, set(_HASH.findall(block)))
            if target.suffix != ".whl":
                made = _make_wheel(python, target, wheels)
                digest = digest_of(made)
                lock = lock.replace(block, block.replace("\\\n", f"\\\n    --hash=sha256:{digest} \\\n", 1))
    return lock


def _block(lock: str, name: str) -> str:
    """A package's lines in a lock."""
    spelled = "[-_.]+".join(map(re.escape, name.split("-")))
    pattern = re.compile(rf"^{spelled}(\[[^]]*\])?\s*(==|@).*\n(?:[ \t].*\n?)*", re.MULTILINE | re.IGNORECASE)
    found = pattern.search(lock)
    if found is None:
        raise EnvironmentBuildError(
            f"the lock does not have {name}, which uv found in it. `rootstockd env update` makes a new one."
        )
    return found[0]


def _file_name(place: dict[str, Any]) -> str:
    path = place.get("path") or urllib.parse.unquote(urllib.parse.urlsplit(place["url"]).path)
    return Path(path).name


def _fetch(place: dict[str, Any], base: Path, target: Path, allowed: set[str]) -> None:
    """Get a file, and believe it by its hash.

    Raises:
        EnvironmentBuildError: it can't be had, or is another than the lock says.
    """
    url = place.get("url") or (base / place["path"]).resolve().as_uri()
    partial = target.with_name(target.name + ".part")
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer, partial.open("wb") as out:  # noqa: S310 - uv names it
            digest = _copy(answer, out.write)
    except OSError as error:
        raise EnvironmentBuildError(f"{url} can't be fetched: {error}.") from error
    if digest not in allowed:
        raise EnvironmentBuildError(f"{url} is not what the lock says: its SHA-256 is {digest}.")
    partial.rename(target)


def _make_wheel(python: Path, archive: Path, wheels: Path) -> Path:
    """Build what comes as source alone, where there is a network to build it with."""
    before = set(wheels.iterdir())
    run_uv(
        ["build", "--quiet", "--wheel", "--python", python, "--out-dir", wheels, archive],
        f"making a wheel of {archive.name}",
    )
    archive.unlink()
    (wheels / ".gitignore").unlink(missing_ok=True)
    (made,) = {path for path in wheels.iterdir() if path.suffix == ".whl"} - before
    return made


def import_archive(file: Path, sha256: str, python: str, say: Say) -> Build:
    """Build an environment from a file, with nothing but what is in it.

    Args:
        file: the archive.
        sha256: what the whole file must have; empty where nobody knows.
        python: which Python; empty for one of the version it was exported with.
        say: told of each step.

    Raises:
        EnvironmentBuildError: the file is damaged, was tampered with, or can't be built here.
    """
    with unpacked(file, sha256) as (description, lock, wheels):
        if description.platform != sysconfig.get_platform():
            raise EnvironmentBuildError(
                f"{file} is for {description.platform}, and this machine is {sysconfig.get_platform()}."
            )
        minor = ".".join(description.python.split(".")[:2])
        plan = Plan(
            name=description.name,
            specification=description.specification,
            origin=f"archive {file.name}",
            python=python or minor,
            torch=description.torch,
            lock=lock,
            offline=True,
            wheels=wheels,
        )
        return build(plan, say)


@contextlib.contextmanager
def unpacked(file: Path, sha256: str) -> Iterator[tuple[Description, str, Path]]:
    """Description, lock, and a folder of the wheels: those that the lock means, and no others.

    Nothing is written before it is known how much that will be, here and when the wheels are installed.

    Args:
        file: the archive.
        sha256: what the whole file must have; empty where nobody knows.

    Raises:
        EnvironmentBuildError: the file is damaged, was tampered with, or there is no room for what is in it.
    """
    with contextlib.ExitStack() as stack:
        try:
            archive: IO[bytes] = stack.enter_context(file.open("rb"))
            size = os.fstat(archive.fileno()).st_size
            if sha256:  # what is read is what was hashed, whoever may write to the file
                _check_room(Path(tempfile.gettempdir()), size)
                copy = stack.enter_context(tempfile.TemporaryFile())
                if (digest := _copy(archive, copy.write)) != sha256.lower():
                    raise EnvironmentBuildError(
                        f"{file} is not the file you mean: its SHA-256 is {digest}. Nothing was done."
                    )
                archive = copy
            archive.seek(0)
            with _understood("it"):
                tar = stack.enter_context(tarfile.open(fileobj=archive, mode="r:"))
            wheels = _members(tar, size)
            if not {"environment.json", "lock.txt"} <= wheels.keys():
                raise _refused("it is incomplete")
            description = _describe(_text(tar, wheels.pop("environment.json")))
            lock = _text(tar, wheels.pop("lock.txt"))
            if hashlib.sha256(lock.encode()).hexdigest() != description.lock_sha256:
                raise _refused("its lock was changed")
            for line in lock.split("\n"):
                if not (_LOCKED.fullmatch(line) and line.isprintable()):
                    raise _refused(f"its lock has {line[:200]!r}, which is none of its wheels")
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rootstockd-import-")))
            _check_room(folder, sum(wheel.size for wheel in wheels.values()))
            _check_room(own_state(), sum(_installed_size(tar, wheel) for wheel in wheels.values()))
            _unpack_wheels(tar, wheels, lock, folder)
        except OSError as error:
            raise EnvironmentBuildError(
                f"{file} can't be imported: {error.strerror}. `rootstockd env export` writes such files."
            ) from error
        yield description, lock, folder


def _members(tar: tarfile.TarFile, size: int) -> dict[str, tarfile.TarInfo]:
    """What is in it, by name. None is larger than the archive is, for only sparse members could be.

    Raises:
        EnvironmentBuildError: something does not belong there, or is cut off.
    """
    found: dict[str, tarfile.TarInfo] = {}
    with _understood("it"):
        for member in tar:
            known = member.name in ("environment.json", "lock.txt") or _WHEEL.fullmatch(member.name)
            if not known or not member.isreg() or member.issparse() or member.name in found:
                raise _refused(f"it has {member.name[:200]!r}, which does not belong there")
            if not 0 <= member.size <= size - member.offset_data:
                raise _refused(f"its {member.name} is cut off")
            found[member.name] = member
    return found


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _SMALL:
        raise _refused(f"its {member.name} is far too large")
    with _understood(f"its {member.name}"):
        content: Any = tar.extractfile(member)
        return str(content.read(), "utf-8")


def _installed_size(tar: tarfile.TarFile, wheel: tarfile.TarInfo) -> int:
    """Bytes that a wheel says it has when it is installed."""
    with _understood(f"its {wheel.name}"), zipfile.ZipFile(cast("IO[bytes]", tar.extractfile(wheel))) as packed:
        return sum(member.file_size for member in packed.infolist())


def _unpack_wheels(tar: tarfile.TarFile, wheels: dict[str, tarfile.TarInfo], lock: str, folder: Path) -> None:
    """Write the wheels into a folder: one of each package that the lock has, and no others.

    Raises:
        EnvironmentBuildError: it is otherwise.
    """
    allowed = set(_HASH.findall(lock))
    there: set[str] = set()
    for name, wheel in wheels.items():
        with (folder / Path(name).name).open("xb") as out:
            there.add(digest := _copy(tar.extractfile(wheel), out.write))
        if digest not in allowed:
            raise _refused(f"{name} is not what the lock says")
    for package in _PACKAGE.finditer(lock):
        if there.isdisjoint(_HASH.findall(package[0])):
            raise _refused(f"it has no wheel of {package[1]}")


def _check_room(folder: Path, size: int) -> None:
    """Whether so many bytes may be written there.

    Raises:
        EnvironmentBuildError: they may not.
    """
    if size > _MOST:
        raise _refused(f"what is in it takes {size / 1e9:.0f} GB, and {_MOST / 1e9:.0f} GB is the most")
    while not folder.exists():
        folder = folder.parent
    if size > (free := shutil.disk_usage(folder).free):
        raise EnvironmentBuildError(
            f"what is in the archive takes {size / 1e6:.0f} MB, and there are {free / 1e6:.0f} MB left in {folder}. "
            "Nothing was done. Free some; ROOTSTOCKD_STATE and TMPDIR name other places."
        )


def _describe(text: str) -> Description:
    with _understood("what it says of itself"):
        fields = json.loads(text)
        if fields.get("format", 0) > FORMAT:
            raise _refused(f"it was written by rootstockd {fields.get('rootstockd')}, which is newer; upgrade this one")
        return Description.model_validate(fields)


@contextlib.contextmanager
def _understood(what: str) -> Iterator[None]:
    """Those who parse have many kinds of errors for what is damaged, or made to be.

    Raises:
        EnvironmentBuildError: there was one.
    """
    try:
        yield
    except (EnvironmentBuildError, OSError):
        raise
    except Exception as error:
        raise _refused(f"{what} can't be read: {str(error) or type(error).__name__}") from error


def _refused(why: str) -> EnvironmentBuildError:
    return EnvironmentBuildError(f"this is no archive to build from: {why}. Nothing was done. Export it again.")


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    _add_file(tar, name, io.BytesIO(content), len(content))


def _add_file(tar: tarfile.TarFile, name: str, content: Any, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    tar.addfile(member, content)


def _copy(content: Any, write: Callable[[bytes], Any]) -> str:
    """Copy, and give the SHA-256."""
    digest = hashlib.sha256()
    while block := content.read(2**20):
        digest.update(block)
        write(block)
    return digest.hexdigest()
