"""What of a virtual environment is not for packages to write: what Python reads when it starts, and our own files.

A wheel's `.data` folder may put files anywhere in the prefix. `pyvenv.cfg` says where the standard library is, and a
`._pth` file beside the interpreter does: whoever writes one chooses what runs first, before a worker is confined.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rootstockd.environments.builds import EnvironmentBuildError
from rootstockd.environments.packages import installed, site_packages
from rootstockd.worker.files import digest_of

_READ_AT_START = ("._pth", "pyvenv.cfg", "pybuilddir.txt")
"""How the names of files end that Python looks for beside its interpreter, one folder above or beside its library; see
CPython's Modules/getpath.py, and its getpath.c before 3.11."""
_OURS = ("lock.txt", "manifest.json")


def own_parts(path: Path) -> dict[str, str]:
    """A virtual environment's own parts, by their paths in it, and what is in each; to be asked before it has packages.

    Raises:
        OSError: it can't be read.
    """
    return {part: _content(path / part) for part in _parts(path)}


def check_own_parts(what: str, path: Path, before: dict[str, str]) -> None:
    """Whether packages left an environment's own parts alone. To be asked before anything runs with its Python.

    Args:
        what: the environment, for the error.
        path: the virtual environment.
        before: its own parts before packages were installed.

    Raises:
        EnvironmentBuildError: a package wrote what is not its to write; which one.
        OSError: it can't be read.
    """
    after = set(_parts(path))
    wrong = [part for part, content in before.items() if part not in after or _content(path / part) != content]
    wrong += [part for part in after - set(before) if _is_reserved(Path(part))]
    if wrong:
        first = min(wrong)
        raise EnvironmentBuildError(
            f"{what}: {_owner(path, first)} writes {first!r}, which no package may write: it decides what Python "
            "runs when it starts, or what is known of the environment. Nothing that was installed has been run, and "
            "all of it is removed. Leave that package out, and find out where it came from."
        )


def _parts(path: Path) -> Iterator[str]:
    """All outside site-packages."""
    packages = site_packages(path)
    for folder, folders, files in os.walk(path, onerror=_fail):
        here = Path(folder)
        yield from (str((here / name).relative_to(path)) for name in (*folders, *files))
        folders[:] = [name for name in folders if here / name != packages]


def _is_reserved(part: Path) -> bool:
    """Whether a new file or folder has no business there. Scripts, data, headers and shared libraries do have."""
    *folders, name = part.parts
    if name.lower().endswith(_READ_AT_START):
        return True
    if not folders:
        return name.startswith(_OURS)
    if folders[0] == "bin":  # scripts alone, with nothing below
        return len(folders) > 1
    # a standard library, such as lib/python3.11/os.py or lib/python311.zip
    return folders[0] in {"lib", "lib64"} and re.match(r"python\d", part.parts[1]) is not None


def _content(part: Path) -> str:
    """Where a link leads, or a file's digest."""
    if part.is_symlink():
        return f"link to {part.readlink()}"
    return "folder" if part.is_dir() else digest_of(part)


def _owner(path: Path, part: str) -> str:
    """The package that a file came with, as uv recorded it."""
    wanted = os.path.normpath(path / part)
    for package in installed(path):
        if any(file == wanted or file.startswith(f"{wanted}{os.sep}") for file in package.files()):
            return f"the package {package.label}"
    return "a package"


def _fail(error: OSError) -> None:
    raise error
