"""Which packages an environment has a module from, and in which versions."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

from rootstockd.environments.finding import Environment


def versions_of_modules(environment: Environment, modules: Iterable[str]) -> dict[str, str]:
    """Versions of the packages that top-level modules come from; of a module that lies in none, what its files are."""
    versions: dict[str, str] = {}
    for module in modules:
        if providers := _providers(environment, module):
            versions.update(_versions(providers))
        elif digest := _digest_of_module(environment, module):
            versions[module] = digest
    return versions


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


def _digest_of_module(environment: Environment, module: str) -> str:
    """SHA-256 of a module's file, or of all modules in its folder; empty where it is not found."""
    folders = [*environment.packages, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    spec = PathFinder.find_spec(module, folders)
    if spec is None:
        return ""
    files = [file for folder in spec.submodule_search_locations or () for file in sorted(Path(folder).rglob("*.py"))]
    if not files and spec.has_location and spec.origin:
        files = [Path(spec.origin)]
    digest = hashlib.sha256()
    for file in files:
        with contextlib.suppress(OSError):  # a link to nowhere, as editors make them
            digest.update(f"{file.name}\0".encode("utf-8", "replace") + file.read_bytes())
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
