"""Importing mace-torch without what it imports for training and plotting alone: 2 s and 130 MB of a worker's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

LEFT_OUT = ("h5py", "lmdb", "mace.cli.visualise_train", "scipy.signal", "torch_ema", "torchmetrics")
"""Modules of which mace-torch and e3nn want nothing but names while they are imported."""


class _LeftOut(type):
    """The class of stand-ins: they may be subclassed and their attributes looked at, and that is all."""

    def __getattr__(cls, name: str) -> Any:
        return _stand_in(name)

    def __call__(cls, *_args: Any, **_options: Any) -> Any:
        """No wrong number comes of something that is not there.

        Raises:
            ImportError: always.
        """
        raise ImportError(f"{cls.__name__} is left out of workers, which do not train")


def _stand_in(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _LeftOut(name, (), {})


class _Module(ModuleType):
    """A module all of whose names are stand-ins."""

    def __getattr__(self, name: str) -> Any:
        return _stand_in(name)


class _Finder(MetaPathFinder, Loader):
    """Finds stand-ins."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        del path, target
        if any(f"{name}.".startswith(f"{one}.") for one in LEFT_OUT):
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


@contextlib.contextmanager
def without_training() -> Iterator[None]:
    """Have mace-torch, imported meanwhile, find stand-ins for what is left out, and no torch.compile: it has a way.

    Afterwards everybody finds the real modules again. Whoever has a stand-in by then gets an ImportError when it is
    called.
    """
    finder = _Finder()
    compiler = "torch._dynamo" not in sys.modules
    if compiler:
        sys.modules["torch._dynamo"] = None  # type: ignore[assignment]  # what Python takes for "not installed"
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if compiler:
            del sys.modules["torch._dynamo"]
        for name in [name for name, module in sys.modules.items() if isinstance(module, _Module)]:
            del sys.modules[name]
            package, _, last = name.rpartition(".")
            if package in sys.modules:
                delattr(sys.modules[package], last)
