"""Modules imported from what is in their files, and not from byte code that was made of them at some time.

Python takes byte code to be of a source of the same size that was last changed in the same second, which another may
be; and a fingerprint is of the sources.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any, Collection, Mapping, Optional, Sequence


def import_from_source(modules: Collection[str]) -> None:
    """Have these top-level modules, and all that lie below them, imported so from now on."""
    if modules:
        sys.meta_path.insert(0, _Finder(modules))


class _Finder(MetaPathFinder):
    def __init__(self, modules: Collection[str]) -> None:
        self._modules = modules

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]], target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        """Where a module lies, as Python itself would say."""
        if fullname.partition(".")[0] not in self._modules:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _FromSource(spec.loader.name, spec.loader.path)
        return spec


class _FromSource(SourceFileLoader):
    def path_stats(self, path: Any) -> Mapping[str, Any]:
        """Nothing that byte code could be compared with: none is read, and none is written."""
        raise OSError(f"byte code of {path} is not wanted")
