"""`rootstockd env …`: Python environments for workers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
from rich.markup import escape
from rich.table import Table

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.clients import OptionPath, Refused, socket_option
from rootstockd.cli.common import catalogue_option, console, fetch_status, json_option, saying
from rootstockd.cli.completion import environments
from rootstockd.cli.env_plans import again, among, changed, named, planned, specification_for
from rootstockd.cli.quantities import plural
from rootstockd.environment_builds import archive
from rootstockd.environment_builds.building import Plan, build
from rootstockd.environments.builds import (
    Build,
    EnvironmentBuildError,
    broken,
    built_environments,
    find_build,
    finished_builds,
    in_use,
    problems_of,
    remove_environment,
    size_of,
)
from rootstockd.environments.specification import (
    SpecificationError,
    check_name,
    find_specification,
    read_specification,
    specification_files,
)
from rootstockd.models.catalogue import CatalogueError
from rootstockd.settings.state_dir import StateError

_TORCH = "[auto|index|cpu|cu126|cu130|...]"


class _Group(click.Group):
    """Commands whose errors end them with a message."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (EnvironmentBuildError, SpecificationError, StateError, CatalogueError, RootstockError) as error:
            raise Refused(error) from error


@click.group(cls=_Group)
def env() -> None:
    """Python environments that workers run in.

    They lie in a state directory: root's, /var/lib/rootstockd, can be read by everybody; other users write to their
    own. ROOTSTOCKD_STATE names another, such as a cluster's shared one.
    """


def building_options(command: Callable[..., None]) -> Callable[..., None]:
    """How to build."""
    for option in (
        click.option("--torch", metavar=_TORCH, help="PyTorch's build; auto takes the one for this node's driver."),
        click.option("--python", metavar="VERSION|PATH", help="The Python to use instead of the specification's."),
        click.option("--offline", is_flag=True, help="Take everything from uv's cache."),
        click.option(
            "--spec",
            type=OptionPath(path_type=Path, resolve_path=True),
            help="A TOML file to use instead of the specification of that name.",
        ),
    ):
        command = option(command)
    return command


@env.command()
@click.argument("name", shell_complete=environments)
@building_options
def create(name: str, spec: Path | None, offline: bool, python: str | None, torch: str | None) -> None:
    """Build an environment, unless it is already there as requested.

    One that is broken is built again from its lock.
    """
    check_name(name)
    there, wrong = _state_of(name)
    for problem in wrong:
        console.print(f"{name}: {problem}", style="yellow", markup=False)
    if there is None:
        _build(planned(name, *named(name, spec), offline, python, torch))
        return
    asked = bool(spec or python or torch)
    if wrong and not asked:
        _build(again(there, offline=offline))
        return
    plan, changes = changed(there, spec, offline, python, torch) if asked else (None, [])
    if not wrong and not changes:
        as_asked = ", as requested" if asked else ""
        words = f"{name} is there{as_asked}, built {there.day}. `rootstockd env update {name}` builds it anew."
        console.print(words, markup=False)
        return
    assert plan is not None
    for change in changes:
        console.print(f"{name}: {change}", markup=False, soft_wrap=True)
    words = f"{name}: versions are kept where possible; the build of {there.day} is used until the new one is complete"
    console.print(words, markup=False, soft_wrap=True)
    _build(plan)


@env.command()
@click.argument("name", shell_complete=environments)
@click.option("--locked", is_flag=True, help="Install the same versions again.")
@building_options
def update(name: str, locked: bool, spec: Path | None, offline: bool, python: str | None, torch: str | None) -> None:
    """Build an environment anew, with newer versions.

    They are as new as its specification allows. The old build is used meanwhile.
    """
    check_name(name)
    if locked and (spec or torch):
        raise click.UsageError("--locked takes the versions as they are; --spec and --torch choose others.")
    if not built_environments().get(name):
        raise EnvironmentBuildError(f"environment {name!r} was not built yet: `rootstockd env create {name}`.")
    there = find_build(name) if locked else _state_of(name)[0]
    if locked:
        assert there is not None
        _build(again(there, offline=offline, python=python))
    elif spec or there is None:
        _build(planned(name, *named(name, spec), offline, python, torch))
    else:
        manifest = there.manifest
        _build(
            planned(
                name, *specification_for(there), offline, python or manifest.python_request, torch or manifest.torch
            )
        )


@env.command("list")
@json_option
def list_(as_json: bool) -> None:
    """Show all environments, built or specified."""
    built = built_environments()
    specified = specification_files()
    if as_json:
        click.echo(json.dumps([_for_programs(name, specified) for name in sorted({*built, *specified})], indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("environment", "built", "python", "in"):
        table.add_column(heading, no_wrap=True)
    table.add_column("description")
    for name in sorted({*built, *specified}):
        if name in built:
            there, wrong = _state_of(name)
            state = f"[red]broken[/], env show {name} says why" if wrong else there.day if there else ""
            python = there.manifest.python if there else ""
            words = there.manifest.specification.description if there else ""
            table.add_row(name, state, python, escape(str(built[name].parent)), escape(words))
        else:
            table.add_row(name, "-", "", "", escape(read_specification(specified[name]).description))
    console.print(table)


def _for_programs(name: str, specified: Mapping[str, Path]) -> dict[str, object]:
    """An environment's state: built, broken or specified."""
    there, wrong = _state_of(name)
    if there is not None:
        words, state = there.manifest.specification.description, "broken" if wrong else "built"
        known = {"built": there.day, "python": there.manifest.python, "path": str(there.path)}
        return {"name": name, "state": state, "description": words, **known, "problems": wrong}
    words = read_specification(specified[name]).description if name in specified else ""
    return {"name": name, "state": "broken" if wrong else "specified", "description": words, "problems": wrong}


@env.command()
@click.argument("name", shell_complete=environments)
def show(name: str) -> None:
    """Show what is in an environment, and what it lacks."""
    there = find_build(name)
    if there is None:
        specification = find_specification(name)
        if specification is None:
            known = sorted({*specification_files(), *built_environments()})
            raise EnvironmentBuildError(f"there is no environment {name!r}, built or specified.\n{among(name, known)}")
        console.print(f"{name} was not built: `rootstockd env create {name}`", markup=False)
        console.print(f"python {specification.python}; {', '.join(specification.requirements)}", markup=False)
        return
    manifest = there.manifest
    console.print(
        f"{name}: {manifest.specification.description}\n"
        f"built     {there.day} by rootstockd {manifest.rootstockd}, specification: {_origin(there)}\n"
        f"python    {manifest.python} on {manifest.platform}, torch: {manifest.torch}\n"
        f"path      {there.path}\n"
        f"size      {size_of(there.path) / 1e6:.0f} MB\n"
        f"packages  {', '.join(f'{package} {version}' for package, version in manifest.versions.items())}",
        markup=False,
        soft_wrap=True,
    )
    for path in finished_builds(there.path.parent.parent):
        if path != there.path:
            console.print(
                f"kept      {path}{', in use by a worker' if in_use(path) else ''}", markup=False, soft_wrap=True
            )
    if wrong := problems_of(there):
        raise EnvironmentBuildError(broken(name, wrong))


@env.command()
@click.argument("name", shell_complete=environments)
@click.option("--device", type=click.Choice(["cpu", "auto"]), default="auto", help="cpu, or a GPU if there is one.")
@catalogue_option
def verify(name: str, device: str, catalogues: tuple[Path, ...]) -> None:
    """Compare what a model computes in an environment with known numbers."""
    from rootstockd.environment_builds.verifying import verify as verified  # slow to import  # noqa: PLC0415
    from rootstockd.host.devices import choose_devices  # noqa: PLC0415

    there = _must_exist(name)
    if wrong := problems_of(there, digests=True):
        raise EnvironmentBuildError(broken(name, wrong))
    try:
        check = specification_for(there)[0].verify
    except SpecificationError:  # it has gone, or is being written
        check = there.manifest.specification.verify
    if check is None:
        words = f"{name}: all files are as they were installed; its specification has no numbers to compare"
        console.print(words, markup=False)
        return
    chosen, *_ = choose_devices(names=("cpu",) if device == "cpu" else ())
    console.print(f"{name}: {verified(there, check, catalogues, chosen)}", markup=False, soft_wrap=True)


@env.command()
@click.argument("name", shell_complete=environments)
@click.option("--force", is_flag=True, help="Even if sessions have a model in it.")
@socket_option
def remove(name: str, force: bool, socket: Path | None) -> None:
    """Remove an environment with all its builds."""
    if not force:
        _must_be_unused(name, socket)
    finished = remove_environment(name)
    words = f"removed {name}" if finished else f"{name} was never built to the end; what was left of that is removed"
    console.print(words, markup=False)


def _must_be_unused(name: str, socket: Path | None) -> None:
    """See that no session of the daemon that answers has a model in an environment; it may be without a worker now."""
    try:
        there = [model for model in fetch_status(find_socket(socket)).models if model.environment_name == name]
    except RootstockError:
        return  # there is no daemon
    if sessions := sum(model.sessions for model in there):
        models = ", ".join(dict.fromkeys(model.name for model in there if model.sessions))
        raise Refused(
            f"the daemon has {models} in environment {name!r} for {plural(sessions, 'session')}, and could not load it "
            "again. `rootstockd status` says whose they are: wait until they have ended, or --force."
        )


@env.command()
@click.argument("name", shell_complete=environments)
@click.argument("file", type=click.Path(path_type=Path, resolve_path=True, dir_okay=False))
def export(name: str, file: Path) -> None:
    """Write an environment with its wheels into FILE.

    For machines without a network: `rootstockd env import` builds it there.
    """
    there = _must_exist(name)
    with saying("gathering wheels") as say:
        digest = archive.export(there, file, say)
    size = file.stat().st_size / 1e6
    console.print(
        f"{file}, {size:.0f} MB. On the other machine:\n\n  rootstockd env import {file.name} --sha256 {digest}",
        markup=False,
        soft_wrap=True,
    )


@env.command("import")
@click.argument("file", type=click.Path(path_type=Path, resolve_path=True, dir_okay=False))
@click.option("--sha256", default="", help="The SHA-256 that the file must have, as `env export` printed it.")
@click.option(
    "--python", default="", metavar="VERSION|PATH", help="The Python to use instead of the exported one's version."
)
def import_(file: Path, sha256: str, python: str) -> None:
    """Build an environment from an exported FILE, without a network."""
    _built(archive.import_archive(file, sha256, python, _say))


# --- what these have in common


def _say(step: str) -> None:
    console.print(step, markup=False, soft_wrap=True)


def _build(plan: Plan) -> None:
    _built(build(plan, _say))


def _built(made: Build) -> None:
    console.print(
        f"built {made.manifest.name} in {made.path}; workers that start from now on use it",
        markup=False,
        soft_wrap=True,
    )


def _origin(there: Build) -> str:
    return "the one of its name" if there.manifest.origin == "named" else there.manifest.origin


def _state_of(name: str) -> tuple[Build | None, list[str]]:
    """The build in use, and what is wrong with it; neither where there is none."""
    try:
        there = find_build(name)
    except EnvironmentBuildError as error:
        return None, [str(error)]
    return there, problems_of(there) if there else []


def _must_exist(name: str) -> Build:
    there = find_build(check_name(name))
    if there is None:
        raise EnvironmentBuildError(f"environment {name!r} was not built: `rootstockd env create {name}`.")
    return there
