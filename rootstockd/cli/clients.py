"""What commands that work in a client's installation share: the client and click are all that it takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import SOCKET_VARIABLE, find_socket


class Refused(click.ClickException):
    """An error with its hint, as a command's last words."""

    def __init__(self, error: Exception | str) -> None:
        super().__init__(str(error))


class OptionPath(click.Path):
    """A path behind an option. `~` is a home, which shells leave alone in `--socket=~/...`, and in quotes."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(os.path.expanduser(value), param, ctx)  # noqa: PTH111 - as in `named_path`


def absolute(_context: click.Context, _option: click.Parameter, path: Path | None) -> Path | None:
    """From wherever it is used; a link in it is still one, for whoever opens the file to see."""
    try:
        return None if path is None else path.absolute()
    except FileNotFoundError:
        raise click.BadParameter(f"{path} starts at the working directory, and that was removed.") from None


socket_option = click.option(
    "--socket",
    type=OptionPath(path_type=Path, readable=False),
    callback=absolute,
    envvar=SOCKET_VARIABLE,
    show_envvar=True,
    help="The daemon's session socket.",
)
dtype_option = click.option("--dtype", type=click.Choice(["float32", "float64"]), help="What it computes in.")


def socket_in_use(socket: Path | None) -> Path:
    """The session socket of the daemon to talk to.

    Raises:
        Refused: there is none.
    """
    try:
        return find_socket(socket)
    except RootstockError as error:
        raise Refused(error) from error
