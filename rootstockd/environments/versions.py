"""Which packages an environment has a module from, and in which versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import PathFinder, all_suffixes
from pathlib import Path

from rootstockd.environments.finding import Environment
from rootstockd.worker.files import digest_of


def versions_of_module(environment: Environment, module: str) -> dict[str, str]:
    """Versions of the packages that a top-level module comes from; nothing where it lies in none."""
    return _versions(_providers(environment, module))


_SUFFIXES = tuple(all_suffixes())
"""Of modules: of sources, of byte code that has none beside it, and of libraries, also for another Python than ours."""


def versions_of_entry_point(environment: Environment, group: str, name: str) -> dict[str, str]:
    """Versions of the packages that have an entry point."""
    return _versions(
        found
        for found in metadata.distributions(path=environment.packages)
        if any(point.group == group and point.name == name for point in found.entry_points)
    )


def _versions(distributions: Iterable[metadata.Distribution]) -> dict[str, str]:
    versions: dict[str, str] = {}
    for found in distributions:  # the first of a name is the one that Python imports
        versions.setdefault(found.name, found.version)
    return versions


def digest_of_module(environment: Environment, module: str) -> str:
    """SHA-256 of a top-level module's file, or of all modules in its folder, compiled ones too; empty without one."""
    folders = [*environment.packages, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    PathFinder.invalidate_caches()  # a folder that was not there when it was looked for
    spec = PathFinder.find_spec(module, folders)
    if spec is None:
        return ""
    files = [
        (Path(folder), file.relative_to(folder))
        for folder in spec.submodule_search_locations or ()
        for file in sorted(Path(folder).rglob("*"))
        if file.name.endswith(_SUFFIXES) and file.parent.name != "__pycache__" and file.is_file()
    ]
    if not files and spec.has_location and spec.origin:
        files = [(Path(spec.origin).parent, Path(Path(spec.origin).name))]
    digest = hashlib.sha256()
    for folder, file in files:
        with contextlib.suppress(OSError):  # one that is being replaced
            digest.update(f"{file}\0{digest_of(folder / file)}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def _providers(environment: Environment, module: str) -> list[metadata.Distribution]:
    """The packages that a module comes from, by the quickest way that tells."""
    if named := list(metadata.distributions(name=module, path=environment.packages)):
        return named
    there = [(found, found.read_text("top_level.txt")) for found in metadata.distributions(path=environment.packages)]
    if declared := [found for found, modules in there if module in (modules or "").split()]:
        return declared
    return [found for found, modules in there if modules is None and _has(found, module)]


def _has(distribution: metadata.Distribution, module: str) -> bool:
    files = "\n" + (distribution.read_text("RECORD") or "")  # as text: `files` takes ten times as long
    return f"\n{module}/" in files or f"\n{module}." in files
