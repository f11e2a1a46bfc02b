"""`models pull|add`: weights come into the store, from elsewhere or from a file of one's own."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.clients import Refused
from rootstockd.cli.common import catalogue_option, console
from rootstockd.cli.completion import models_to_pull
from rootstockd.cli.quantities import megabytes
from rootstockd.models import store
from rootstockd.models.add import add as add_file
from rootstockd.models.add import own_file
from rootstockd.models.catalogue import Catalogue, CatalogueError, Entry
from rootstockd.models.convert import with_safe_form
from rootstockd.models.download import DownloadError
from rootstockd.models.pull import Wishes
from rootstockd.models.pull import pull as pull_weights
from rootstockd.models.store import Stored
from rootstockd.models.whole_files import StoreError
from rootstockd.settings.state_dir import MIRROR_VARIABLE, StateError

ERRORS = (CatalogueError, StoreError, StateError, DownloadError, RootstockError)


def _checksum(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if value and not re.fullmatch(r"[0-9a-fA-F]{64}", value):
        raise click.BadParameter("it is 64 hexadecimal digits, as `sha256sum FILE` prints them.")
    return value.lower()


sha256_option = click.option(
    "--sha256", default="", metavar="HEX", callback=_checksum, help="The checksum that the file must have."
)


@contextlib.contextmanager
def refused() -> Generator[None, None, None]:
    """Errors that people can do something about, as the command's last words."""
    try:
        yield
    except ERRORS as error:
        raise Refused(error) from error


@click.command()
@click.argument("names", nargs=-1, required=True, shell_complete=models_to_pull)
@click.option(
    "--mirror",
    default="",
    envvar=MIRROR_VARIABLE,
    show_envvar=True,
    help="A folder, or a URL that file names are appended to, to get the files from; no other source is tried.",
)
@sha256_option
@click.option("--accept-licence", is_flag=True, help="Accept the licence, where the model requires that.")
@catalogue_option
def pull(names: tuple[str, ...], mirror: str, sha256: str, accept_licence: bool, catalogues: tuple[Path, ...]) -> None:
    """Get the weights of models.

    An interrupted pull continues where it stopped. It goes through the proxies that HTTPS_PROXY and NO_PROXY say.
    """
    if sha256 and len(names) > 1:
        raise click.UsageError("--sha256 is for one model.")

    def accept(entry: Entry) -> bool:
        text = f"{entry.licence}{f' ({entry.licence_url})' if entry.licence_url else ''}"
        if accept_licence:
            return True
        if not sys.stdin.isatty():
            raise Refused(f"its licence has to be accepted first: {text}. Read it, then give --accept-licence.")
        return click.confirm(f"The licence of these weights: {text}. Do you accept it?")

    with refused():
        catalogue = Catalogue.load(catalogues)
        for name, entry in [catalogue.resolve(name) for name in names]:
            with progress(name) as (say, bytes_):
                wishes = Wishes(accept, say, bytes_, mirror, sha256)
                pull_weights(name, entry, wishes)
                stored = with_safe_form(name, entry, say)
            tell_pulled(name, stored)


@contextlib.contextmanager
def progress(name: str) -> Generator[tuple[Callable[[str], None], Callable[[int, int | None], None]], None, None]:
    """A line of words and one for a bar, which comes with the first byte."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with contextlib.ExitStack() as stack:
        bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task(name, total=None)

        def report(done: int, total: int | None) -> None:
            if not bar.live.is_started:
                stack.enter_context(bar)
            bar.update(task, completed=done, total=total)

        yield (lambda text: bar.console.print(f"{name}: {text}", soft_wrap=True, markup=False)), report


def tell_pulled(name: str, stored: Stored) -> None:
    """What is there now."""
    record = stored.record
    console.print(f"{name} is here: {stored.weights}", soft_wrap=True, markup=False)
    size = megabytes(record.original.size)
    console.print(f"sha256 {record.original.sha256}, {size}, from {record.source}", soft_wrap=True, markup=False)
    if record.pinned == store.FIRST_USE:
        console.print(
            "No checksum was known for it: from now on it is this one. Compare it with what others have.",
            style="yellow",
        )
    if record.note:
        console.print(record.note, soft_wrap=True, markup=False)


@click.command()
@click.argument("name")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--family", required=True, help="The engine that evaluates it, such as mace.")
@click.option("--environment", default="", help="The Python environment of its workers, if not that of the family.")
@click.option("--dtype", type=click.Choice(["float32", "float64"]), default="float64", show_default=True)
@click.option("--elements", default="", help="Symbols, separated by commas; the model itself says them if it can.")
@click.option("--description", default="")
@click.option("--licence", default="")
@click.option("--citation", default="")
@click.option("--alias", "aliases", multiple=True, help="Another name; may be given repeatedly.")
@sha256_option
def add(name: str, file: Path, sha256: str, elements: str, **fields: Any) -> None:
    """Register a model file of your own, such as a fine-tune.

    The file is copied, and loaded once in a worker that can do no harm.
    """
    said = {key: value for key, value in fields.items() if value}
    if symbols := [symbol.strip() for symbol in elements.split(",") if symbol.strip()]:
        said["elements"] = symbols
    with refused():
        entry = add_file(name, file, said, sha256, lambda text: console.print(text, markup=False))
    console.print(f"{name} is here: {entry.weights}\nsha256 {entry.sha256}", soft_wrap=True, markup=False)
    for key, values in (("elements", entry.elements), ("heads", entry.heads)):
        if values:
            console.print(f"{key} {', '.join(values)}", soft_wrap=True, markup=False)
    where = f"entry {own_file()}"
    if (others := daemon_of_another()) is not None:
        what = "reads none but its own user's and root's: give it to them, or `rootstockd start` one of your own"
        console.print(f"{where}; the daemon at {others} {what}", soft_wrap=True, markup=False)
    else:
        console.print(f"{where}; a running daemon takes it over with `rootstockd reload`", soft_wrap=True, markup=False)


def daemon_of_another() -> Path | None:
    """The socket of the daemon that commands find, if it is another user's, and not root that registers."""
    with contextlib.suppress(RootstockError):
        address = find_socket(None)
        if os.geteuid() != 0 and address.lstat().st_uid != os.geteuid():
            return address
    return None
