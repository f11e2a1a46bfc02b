"""`models list|show|remove|verify`: the catalogue, and the weights in the store; `fetching.py` has the others."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import click
from rich.markup import escape
from rich.table import Table

from rootstock_client.control import request
from rootstock_client.errors import ModelLoadError, RootstockError, UnknownModelError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.clients import Refused, socket_option
from rootstockd.cli.common import catalogue_option, console, fetch_status, json_option
from rootstockd.cli.completion import catalogue_models
from rootstockd.cli.fetching import add, pull, refused
from rootstockd.cli.quantities import megabytes, plural
from rootstockd.environments.finding import find_environment, has_environment
from rootstockd.models import store
from rootstockd.models.add import own_file, remove_entry
from rootstockd.models.availability import lack, located
from rootstockd.models.catalogue import NAME, Catalogue, Entry
from rootstockd.models.spec import in_environment, spec_of
from rootstockd.models.store import Stored
from rootstockd.models.whole_files import lock
from rootstockd.worker.files import is_file

_LACKS = {"missing": "red", "needs env": "yellow"}


@click.group()
def models() -> None:
    """The models of the catalogue, and their weights on this machine."""


@models.command(name="list")
@catalogue_option
@json_option
def list_(catalogues: tuple[Path, ...], as_json: bool) -> None:
    """List the models of the catalogue, and which of them are here."""
    with refused():
        catalogue = Catalogue.load(catalogues)
        rows = [(name, entry, state_of(name, entry)) for name, entry in catalogue.items() if not entry.hidden]
        sizes = {name: size_of(name, entry) for name, entry, _ in rows}
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "name": name,
                        "aliases": entry.aliases,
                        "family": entry.family,
                        "environment": entry.place[0],
                        "state": state,
                        "size": sizes[name],
                        "licence": entry.licence,
                        "description": entry.description,
                    }
                    for name, entry, state in rows
                ],
                indent=2,
            )
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "environment", "state"):
        table.add_column(heading, no_wrap=True)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("licence", no_wrap=True)
    for name, entry, state in sorted(rows):
        size = sizes[name]
        table.add_row(
            escape(name),
            entry.place[0],
            f"[{colour}]{state}[/]" if (colour := _LACKS.get(state)) else state,
            megabytes(size) if size else "-",
            escape(entry.licence.partition(":")[0]),
        )
    console.print(table)
    places = {entry.place for _, entry, state in rows if state in ("needs env", "to pull")}
    if lacking := sorted(place[0] for place in places if not has_environment(*place)):
        console.print(
            "\nnothing can be loaded from these environments until they are built: "
            + ", ".join(f"rootstockd env create {name}" for name in lacking),
            soft_wrap=True,
        )


@models.command()
@click.argument("name", shell_complete=catalogue_models)
@catalogue_option
@json_option
def show(name: str, catalogues: tuple[Path, ...], as_json: bool) -> None:
    """Show all that is known of a model."""
    with refused():
        catalogue = Catalogue.load(catalogues)
        try:
            name, entry = catalogue.resolve(name)
        except UnknownModelError as error:
            raise Refused(
                f"{error}\nA file that only a daemon was given is to be named here, too: --catalogue."
            ) from error
        stored = store.weights_of(name, entry) if entry.url else store.find(name)
        state, fingerprint = state_of(name, entry), fingerprint_of(name, entry)
    if as_json:
        said = {
            "name": name,
            "from": str(catalogue.origins[name]),
            "state": state,
            "fingerprint": fingerprint or None,
            **entry.model_dump(mode="json"),
            "stored": stored.record.model_dump(mode="json") if stored else None,
        }
        if stored:
            said["weights"] = str(stored.weights)
        click.echo(json.dumps(said, indent=2))
        return
    console.print(f"[bold]{'name':12}[/] {name}")
    for key, value in described(entry, stored).items():
        if value:
            console.print(f"[bold]{key:12}[/] {escape(value)}", soft_wrap=True)
    if fingerprint:
        console.print(f"[bold]{'fingerprint':12}[/] {fingerprint} in {entry.dtype}")
    mended = f": rootstockd env create {entry.place[0]}" if state == "needs env" else ""
    console.print(f"[bold]{'state':12}[/] {state}{mended}")
    console.print(f"[bold]{'entry':12}[/] {escape(str(catalogue.origins[name]))}", soft_wrap=True)


def described(entry: Entry, stored: Stored | None) -> dict[str, str]:
    """An entry for people, line by line."""
    lines = {
        "description": entry.description,
        "aliases": ", ".join(entry.aliases),
        "family": entry.family,
        "environment": entry.place[0],
        "arguments": json.dumps(entry.arguments) if entry.arguments else "",
        "elements": f"{len(entry.elements)}: {' '.join(entry.elements)}" if entry.elements else "",
        "heads": ", ".join(entry.heads),
        "computes": ", ".join(entry.computes),
        "dtype": entry.dtype,
        "licence": entry.licence + (f" ({entry.licence_url})" if entry.licence_url else ""),
        "cite": entry.citation,
        "url": entry.url,
        "weights": str(entry.weights or ""),
        "sha256": entry.sha256,
    }
    if stored is None:
        return lines
    record = stored.record
    return lines | {
        "weights": str(stored.weights),
        "sha256": f"{record.loaded.sha256}",
        "original": f"{record.original.sha256}, {megabytes(record.original.size)}",
        "source": f"{record.source}, {record.when}",
        "pinned by": record.pinned,
        "accepted": record.licence_accepted,
        "form": record.note,
    }


models.add_command(pull)  # here: help names the commands in this order
models.add_command(add)


@models.command()
@click.argument("name", shell_complete=catalogue_models)
@click.option("--force", is_flag=True, help="Even if sessions use it.")
@socket_option
def remove(name: str, force: bool, socket: Path | None) -> None:
    """Remove what was added or pulled."""
    with refused():
        catalogue = Catalogue.load()
        name = catalogue.name_of(name)  # what the catalogue has no longer can be removed all the same
        if not NAME.fullmatch(name):
            catalogue.resolve(name)
        folder = store.own_folder()
        with lock(folder, name, lambda text: console.print(text, markup=False)):
            record = store.read_record(folder, name)
            added = catalogue.origins.get(name) == own_file()
            if record is None and not added:
                raise Refused(nothing_to_remove(name, catalogue))
            if not force:
                let_go(name, socket)
            freed = store.remove(folder, name)  # first: on a full disk there is room for the changed catalogue then
            if added:
                remove_entry(name, folder)
    console.print(f"{name} was removed, {megabytes(freed)} are free again", markup=False)
    if added:
        console.print("a running daemon forgets it with `rootstockd reload`")


def nothing_to_remove(name: str, catalogue: Catalogue) -> str:
    """Why a model can't be removed."""
    if name not in catalogue:
        catalogue.resolve(name)
    if stored := store.find(name):
        return f"{name} is stored in {stored.folder}, which is not yours to change."
    origin = catalogue.origins[name]
    return f"there is nothing to remove: {name} was neither added nor pulled. Its entry is in {origin}."


def let_go(name: str, socket: Path | None) -> None:
    """Have the daemon that answers give up a model that nobody uses; a worker that is gone could not be replaced.

    Raises:
        Refused: it is used.
        RootstockError: the daemon does not do so.
    """
    try:
        address = find_socket(socket)
        using = [model for model in fetch_status(address).models if model.name == name]
    except RootstockError:
        return  # there is none
    if sessions := sum(model.sessions for model in using):
        raise Refused(
            f"the daemon has {name} for {plural(sessions, 'session')}, and could not load it again. `rootstockd "
            "status` says whose they are: wait until they have ended, or --force."
        )
    if any(model.state != "cold" for model in using):
        request(address, "POST", "/v1/unload", {"model": name, "dtype": None, "force": False})
        console.print(f"{name} is unloaded", markup=False)


@models.command()
@click.argument("names", nargs=-1, shell_complete=catalogue_models)
@catalogue_option
def verify(names: tuple[str, ...], catalogues: tuple[Path, ...]) -> None:
    """Compare stored weights with their checksums.

    Those of all models, unless some are named.
    """
    bad = 0
    with refused():
        catalogue = Catalogue.load(catalogues)
        chosen = {name for name, _ in map(catalogue.resolve, names)} if names else None
        owners: dict[tuple[Path, str], list[str]] = {}
        for name, stored in store.all_stored():
            for file in stored.record.files:
                owners.setdefault((stored.folder / file.name, file.sha256), []).append(name)
        for name, entry in catalogue.items():
            if entry.weights is not None and store.find(name) is None:
                owners.setdefault((entry.weights, entry.sha256.lower()), []).append(name)
        done: set[str] = set()
        for (path, sha256), owning in owners.items():
            if chosen is None or chosen.intersection(owning):
                done.update(owning)
                bad += tell_verified(", ".join(owning), path, store.wrong(path, sha256))
        if missing := sorted((chosen or set()) - done):
            raise Refused(
                f"no weights are stored for {', '.join(missing)}. `rootstockd models list` says which are to be pulled."
            )
    if bad:
        raise Refused("`rootstockd models pull NAME` mends what was pulled; what was added is removed and added again.")


def tell_verified(name: str, path: Path, damage: str) -> bool:
    """Say what was found; whether it is bad."""
    text = f"{name}: {damage}" if damage else f"{name}: {path} is as it should be"
    console.print(text, style="red" if damage else None, soft_wrap=True, markup=False)
    return bool(damage)


def state_of(name: str, entry: Entry) -> str:
    """Whether a model can be loaded: "here", or "built in" where it has no weights of its own, or what it lacks."""
    return lack(name, entry) or ("here" if entry.weights or entry.url else "built in")


def fingerprint_of(name: str, entry: Entry) -> str:
    """A model's fingerprint in its usual dtype; empty where that depends on weights or packages that are not here."""
    with contextlib.suppress(ModelLoadError):
        entry = located(name, entry)
    if entry.url and not entry.sha256:  # they may be any
        return ""
    spec = spec_of(name, entry)
    try:
        found = in_environment(spec, find_environment(*entry.place))
    except ModelLoadError:
        return ""
    return "" if entry.family == "ase" and found is spec else found.fingerprint  # its module is not here


def size_of(name: str, entry: Entry) -> int | None:
    """Of a model's weights in bytes, if it is known."""
    if entry.weights is not None and is_file(entry.weights):
        return entry.weights.stat().st_size
    stored = store.weights_of(name, entry) if entry.url else None
    return stored.record.loaded.size if stored else entry.size
