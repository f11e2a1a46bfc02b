"""Python, the environments that workers run in, and the build of PyTorch in each."""

from __future__ import annotations

import importlib.util
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

import rootstockd
from rootstock_client.errors import ModelLoadError
from rootstockd.doctor.findings import Finding, note, ok, problem, warning
from rootstockd.doctor.gpus import Driver, check_flavour
from rootstockd.environments.builds import (
    EnvironmentBuildError,
    built_environments,
    find_build,
    problems_of,
)
from rootstockd.environments.finding import find_environment
from rootstockd.environments.packages import site_packages
from rootstockd.environments.specification import is_builtin, specification_files
from rootstockd.models.catalogue import Catalogue, CatalogueError
from rootstockd.settings.state_dir import StateError
from rootstockd.worker.files import read_regular


@dataclass(frozen=True)
class EnvironmentState:
    """An environment as its next worker would find it."""

    name: str
    description: str = ""
    """Where a worker would run; empty where it can't."""
    lacking: str = ""
    """Why it can't."""
    builtin: bool = True
    """The package specifies it; nobody here may ever want it."""
    broken: tuple[str, ...] = ()
    """What a build has lost since it was built."""
    torch: str = ""
    """PyTorch's version; empty where there is none."""
    cuda: tuple[int, int] | None = None
    """What PyTorch was built for."""
    built: bool = True
    """It was built for its engine; otherwise it is the daemon's own Python."""


def look_at_environments() -> Iterator[EnvironmentState]:
    """All that were built or specified. Files are counted, which takes a while for each that was built."""
    try:
        built = built_environments()
    except StateError:  # a finding of its own
        return
    try:
        places = {entry.place for entry in Catalogue.load().values()}
    except CatalogueError:  # a finding of its own
        places = set()
    for name in sorted({*built, *specification_files()}):
        families = {family for environment, family in places if environment == name}
        yield _look_at(name, families or {name if is_builtin(name) else ""})


def _look_at(name: str, families: set[str]) -> EnvironmentState:
    """An environment, for models of these families."""
    try:
        build = find_build(name)
    except (EnvironmentBuildError, StateError) as error:
        return EnvironmentState(name, broken=(str(error),))
    if build is not None and (broken := problems_of(build)):
        return EnvironmentState(name, broken=tuple(broken))
    try:
        for family in families:
            found = find_environment(name, family)
    except ModelLoadError as error:
        return EnvironmentState(name, lacking=error.message, builtin=is_builtin(name))
    packages = site_packages(build.path) if build else _own_packages()
    torch, cuda = torch_in(packages) if packages else ("", None)
    return EnvironmentState(name, found.description, torch=torch, cuda=cuda, built=found.built)


def _own_packages() -> Path | None:
    """Where the daemon's own Python has PyTorch, if it has."""
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent.parent if spec and spec.origin else None


def torch_in(packages: Path) -> tuple[str, tuple[int, int] | None]:
    """PyTorch's version in a folder of packages, and the CUDA that it was built for, without importing it."""
    try:
        text = read_regular(packages / "torch/version.py").decode(errors="replace")
    except OSError:
        return "", None
    version, cuda = (re.search(rf"^{name}\b.*= '([^']*)'", text, re.MULTILINE) for name in ("__version__", "cuda"))
    numbers = [int(part) for part in cuda[1].split(".")[:2]] if cuda else []
    return version[1] if version else "", (numbers[0], numbers[1]) if len(numbers) == 2 else None  # noqa: PLR2004


# --- judging


def check_python() -> Iterator[Finding]:
    """The Python that this command, and a daemon that it starts, runs in."""
    ase = metadata.version("ase")
    yield ok(
        "rootstockd",
        f"{rootstockd.__version__}, Python {platform.python_version()}, numpy {np.__version__}, ase {ase}, "
        f"in {sys.prefix}",
    )


def check_environments(states: list[EnvironmentState], driver: Driver, *, own: bool = True) -> Iterator[Finding]:
    """Whether workers can start, and PyTorch use what there is.

    Args:
        states: the environments that there are for this user's daemons.
        driver: the node's.
        own: jobs here use a daemon for which this user may build some, or none.
    """
    usable = [state for state in states if state.description]
    for state in states:
        where = f"env {state.name}"
        if state.broken:
            yield problem(
                where,
                f"broken: {'; '.join(state.broken)}",
                "Its models fail to load.",
                f"rootstockd env create {state.name}",
            )
        elif state.lacking and not state.builtin:
            yield warning(where, state.lacking, "Its models can't be loaded.", f"rootstockd env create {state.name}")
        elif state.description:
            with_torch = f", torch {state.torch}" if state.torch else ""
            yield ok(where, f"{state.description}{with_torch}")
            if state.torch:
                other = "update" if state.built else "create"
                mend = f"rootstockd env {other} {state.name} --torch auto"
                yield from check_flavour(where, state.torch, state.cuda, driver, mend)
    absent = [state.name for state in states if state.lacking and state.builtin]
    if absent and not own:
        yield note(
            "environments",
            f"not built for daemons of yours: {', '.join(absent)}",
            "The daemon here is somebody else's, and has its own: RootstockClient().models() says what it can load.",
        )
    elif absent and usable:
        yield note(
            "environments",
            f"not built: {', '.join(absent)}",
            "Their models can't be loaded until they are.",
            f"rootstockd env create {absent[0]}",
        )
    elif absent:
        yield warning(
            "environments",
            f"none can be used; not built: {', '.join(absent)}",
            "Only models of ASE's own calculators can be loaded.",
            f"rootstockd env create {absent[0]}",
        )
