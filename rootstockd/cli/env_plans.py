"""What `rootstockd env` is to build: by a specification as it is now, and in what that differs from what is there."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import click

from rootstockd.cli.common import console
from rootstockd.environment_builds.building import Plan, without_torchs_builds
from rootstockd.environments.builds import Build
from rootstockd.environments.specification import (
    Specification,
    SpecificationError,
    find_specification,
    read_specification,
    specification_files,
)
from rootstockd.settings.state_dir import StateError, check_trusted
from rootstockd.worker.files import is_file, read_regular


def planned(
    name: str, specification: Specification, origin: str, offline: bool, python: str | None, torch: str | None
) -> Plan:
    """How to build by a specification, but for what the command line says otherwise.

    Raises:
        click.UsageError: there is no such build of torch.
    """
    if torch is not None:  # checked as in a file
        specification_fields = {**specification.model_dump(), "torch": torch}
        try:
            Specification.model_validate(specification_fields)
        except ValueError as error:
            raise click.UsageError(
                f"--torch {torch}: there are auto, index, cpu, cu126, cu130 and their like."
            ) from error
    return Plan(
        name,
        specification,
        origin,
        python or specification.python,
        (torch or specification.torch) if specification.has_torch else "index",
        offline=offline,
    )


def changed(
    there: Build, spec: Path | None, offline: bool, python: str | None, torch: str | None
) -> tuple[Plan, list[str]]:
    """How to build what is there as it is asked for now, and in words what that changes."""
    was = there.manifest
    specification, origin = specification_for(there) if spec is None else named(was.name, spec)
    if specification.python == was.specification.python:
        python = python or was.python_request
    if specification.torch == was.specification.torch:
        torch = torch or was.torch
    plan = planned(was.name, specification, origin, offline, python, torch)
    lock = read_regular(there.lock).decode() if there.lock.is_file() else ""
    changes = []
    if plan.python != was.python_request and not f"{was.python}.".startswith(f"{plan.python}."):
        changes.append(f"Python {plan.python}, where it has {was.python}")
    if plan.torch != was.torch:
        changes.append(f"torch: {plan.torch}, where it has {was.torch}")
        lock = without_torchs_builds(lock)
    before, after = was.specification.model_dump(), specification.model_dump()
    changes += [
        f"other {field}: {_difference(before[field], after[field])}"
        for field in after
        if after[field] != before[field] and field not in ("python", "torch")  # which come into the two above
    ]
    return dataclasses.replace(plan, preferred=lock), changes


def _difference(before: Any, after: Any) -> str:
    if not isinstance(after, tuple):
        return "see its specification"
    gone, new = (", ".join(sorted({*some} - {*others})) for some, others in ((before, after), (after, before)))
    return " and ".join(filter(None, (new, gone and f"no longer {gone}"))) or "in another order"


def again(there: Build, *, offline: bool, python: str | None = None) -> Plan:
    """The same versions as in a build."""
    manifest = there.manifest
    return Plan(
        manifest.name,
        manifest.specification,
        manifest.origin,
        python or manifest.python_request,
        manifest.torch,
        lock=read_regular(there.lock).decode(),
        offline=offline,
    )


def named(name: str, spec: Path | None) -> tuple[Specification, str]:
    """The specification of a name, or in a file, and where it came from.

    Raises:
        SpecificationError: there is none, or it can't be used.
    """
    if spec is not None:
        return read_specification(spec), str(spec)
    specification = find_specification(name)
    if specification is None:
        raise SpecificationError(
            f"there is no specification for an environment {name!r}.\n{among(name, sorted(specification_files()))} "
            "`--spec FILE` names a file that is one."
        )
    return specification, "named"


def among(name: str, known: list[str]) -> str:
    """Which there are, and which of them may have been meant."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"{f'Did you mean {near[0]}? ' if near else ''}There are: {', '.join(known)}."


def specification_for(there: Build) -> tuple[Specification, str]:
    """What a build was made from, as it is now; as it was where that is gone, or anybody else's by now."""
    manifest = there.manifest
    if manifest.origin == "named":
        return named(manifest.name, None)
    path = Path(manifest.origin)
    if not is_file(path):
        return manifest.specification, manifest.origin
    try:
        check_trusted(path.parent)
        check_trusted(path)
    except StateError as error:
        console.print(
            f"{path} is not looked at, and what it said when {manifest.name} was built counts: {error}",
            style="yellow",
            markup=False,
            soft_wrap=True,
        )
        return manifest.specification, manifest.origin
    return read_specification(path), manifest.origin
