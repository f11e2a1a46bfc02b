"""Which Python a model's worker runs in."""

from __future__ import annotations

import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from rootstock_client.errors import ModelLoadError
from rootstockd.environments.builds import Build, EnvironmentBuildError, broken, find_build, problems_of
from rootstockd.environments.packages import site_packages
from rootstockd.environments.specification import SpecificationError, find_specification, is_builtin
from rootstockd.settings.state_dir import StateError


@dataclass(frozen=True)
class Environment:
    """A Python for workers."""

    name: str
    python: Path
    built: bool
    """It was built for its engine; otherwise it is the daemon's own."""
    description: str
    """For people."""

    @property
    def packages(self) -> list[str]:
        """Folders that its packages lie in."""
        return [str(site_packages(self.python.parent.parent))] if self.built else sys.path


def beside_the_daemon(name: str) -> Environment:
    """The daemon's own Python."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Environment(name, Path(sys.executable), False, f"beside the daemon, Python {version}")  # noqa: FBT003


def find_environment(name: str, family: str) -> Environment:
    """The environment to start a worker in now; another may have been built when the next one starts.

    Args:
        name: the environment's name.
        family: the model's engine family.

    Raises:
        ModelLoadError: there is none, or it is broken; what to do about it.
    """
    try:
        found = find_build(name)
        if found is not None:
            return _built(found)
        specification = find_specification(name)
    except (EnvironmentBuildError, SpecificationError, StateError) as error:
        raise ModelLoadError(str(error)) from error
    if specification is None:
        if name == family:  # it needs nothing that one could build, or what the site has installed beside the daemon
            return beside_the_daemon(name)
        raise ModelLoadError(
            f"environment {name!r} was not built, and there is no specification for it.",
            f"Write a specification, and `rootstockd env create {name} --spec FILE`.",
        )
    missing = [module for module in specification.imports if not _importable(module)]
    if not missing and (name == family or is_builtin(name)):
        return beside_the_daemon(name)
    lacking = f", and beside the daemon there is no {' and no '.join(missing)}" if missing else ""
    raise ModelLoadError(
        f"environment {name!r} was not built{lacking}.", f"Build it once for all users: `rootstockd env create {name}`."
    )


def has_environment(name: str, family: str) -> bool:
    """Whether `find_environment` finds one."""
    try:
        find_environment(name, family)
    except ModelLoadError:
        return False
    return True


def damage_of(environment: Environment) -> str:
    """What can be seen to be wrong with an environment, and what to do about it; empty where nothing is."""
    try:
        build = find_build(environment.name) if environment.built else None
        problems = problems_of(build) if build else []
    except (EnvironmentBuildError, StateError, OSError):
        return ""
    return broken(environment.name, problems) if problems else ""


def _built(build: Build) -> Environment:
    manifest = build.manifest
    if not os.access(build.python, os.X_OK):
        raise ModelLoadError(
            f"environment {manifest.name!r} is broken: {build.python}, Python {manifest.python}, can't be run.",
            f"`rootstockd env show {manifest.name}` says what is missing, `rootstockd env create {manifest.name}` "
            "builds it again from its lock.",
        )
    words = f"environment {manifest.name}, built {build.day}, Python {manifest.python}"
    return Environment(manifest.name, build.python, True, words)  # noqa: FBT003


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
