"""Which Python an environment is built on: one that all who read the environment can read too."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rootstockd.environment_builds.running_uv import run_uv
from rootstockd.environments.builds import EnvironmentBuildError

OLDEST = (3, 9)
_ASK = "import json, sys; print(json.dumps([sys.version_info[:3], sys.base_prefix]))"


@dataclass(frozen=True)
class Python:
    """An interpreter."""

    path: Path
    version: tuple[int, int, int]


def find_python(request: str, state: Path, *, offline: bool) -> Python:
    """A Python for an environment in a state directory.

    Where other users can read that directory, a Python in somebody's home will not do. If there is none, uv downloads
    one into the state directory.

    Args:
        request: a version, a range of versions, or a path.
        state: the state directory.
        offline: download nothing.

    Raises:
        EnvironmentBuildError: there is none.
    """
    if "/" in request:
        return _ask(Path(request).absolute())
    shared = readable_by_all(state)
    # that of this process, which may be in no PATH, as in a service's
    ours = {"PATH": os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.base_prefix) / "bin")])}
    own = {"UV_PYTHON_INSTALL_DIR": str(state / "pythons")}
    unreadable = []
    for variables in ({}, ours, own):
        for path in _installed(request, variables):
            try:
                python = _ask(path)
            except EnvironmentBuildError:
                continue
            if not shared or readable_by_all(python.path):
                return python
            unreadable.append(str(python.path))
    try:
        if offline:
            raise EnvironmentBuildError("none can be downloaded without a network.")
        run_uv(["python", "install", request], f"downloading a Python {request}", variables=own)
        return _ask(_installed(request, own)[0])
    except (EnvironmentBuildError, IndexError) as error:
        reason = f" that all users can read (not: {', '.join(unreadable)})" if unreadable else ""
        raise EnvironmentBuildError(
            f"there is no Python {request} on this machine{reason}: {error}\nInstall one, or choose one with --python."
        ) from error


def _installed(request: str, variables: dict[str, str]) -> list[Path]:
    arguments = ["python", "list", "--only-installed", "--no-python-downloads", "--output-format", "json", request]
    found: Any = json.loads(run_uv(arguments, f"looking for a Python {request}", variables=variables, loud=False))
    return [Path(python["path"]) for python in found if python["implementation"] == "cpython"]


def _ask(path: Path) -> Python:
    """What it says of itself; a name in PATH may be a script that starts another.

    Raises:
        EnvironmentBuildError: it does not answer, or is too old.
    """
    try:
        done = subprocess.run([path, "-I", "-c", _ASK], capture_output=True, text=True, check=True, timeout=60)
        (major, minor, micro), prefix = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise EnvironmentBuildError(f"{path} is no Python that runs: {error}.") from error
    if (major, minor) < OLDEST:
        raise EnvironmentBuildError(f"{path} is Python {major}.{minor}; workers need 3.9 or newer.")
    base = Path(prefix) / f"bin/python{major}.{minor}"
    return Python(base.resolve() if base.exists() else path, (major, minor, micro))


def readable_by_all(path: Path) -> bool:
    """Whether users with no special rights reach it; for what is not there yet, whether they reach where it will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    path = path.resolve()
    if not path.is_dir() and not os.stat(path).st_mode & stat.S_IROTH:
        return False
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in (path, *path.parents))
