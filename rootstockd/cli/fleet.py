"""`load` and `unload`: which models are in memory."""

from __future__ import annotations

import time
from pathlib import Path

import click

from rootstock_client.errors import RootstockError
from rootstockd.cli.clients import Refused, dtype_option, socket_in_use, socket_option
from rootstockd.cli.common import ask, console, fetch_status, saying
from rootstockd.cli.completion import catalogue_models, models_in_memory
from rootstockd.cli.quantities import plural
from rootstockd.control.schema import LoadAnswer, ModelStatus, UnloadAnswer

POLL = 0.1
COLD = 10.0
"""Seconds after which a model that is to be loaded, and is not coming, was unloaded by somebody else."""


@click.command()
@click.argument("name", shell_complete=catalogue_models)
@dtype_option
@socket_option
def load(name: str, dtype: str | None, socket: Path | None) -> None:
    """Load a model into memory; returns when it is there."""
    address = socket_in_use(socket)
    try:
        answer = ask(address, LoadAnswer, "POST", "/v1/load", {"model": name, "dtype": dtype})
        model = _wait(address, answer.model, answer.dtype)
    except RootstockError as error:
        raise Refused(error) from error
    console.print(f"{model.name} {model.dtype} is ready on {model.device}", markup=False)


def _wait(address: Path, name: str, dtype: str) -> ModelStatus:
    """Until a model is there, saying how far it has come.

    Raises:
        Refused: it can't be loaded.
    """
    cold_since: float | None = None
    with saying(text := f"loading {name}") as say:
        while True:
            models = fetch_status(address).models
            found = [m for m in models if (m.name, m.dtype, m.dispersion) == (name, dtype, None) and not m.retired]
            for model in found:
                if model.state == "ready":
                    return model
                if model.error:
                    raise Refused(model.error)
                if model.loading:
                    text = f"{name} {model.loading.text}"
            cold = all(model.state == "cold" for model in found)
            cold_since = (cold_since or time.monotonic()) if cold else None
            if not found or (cold_since is not None and time.monotonic() - cold_since > COLD):
                raise Refused(f"model {name!r} has left memory again.")
            say(text)
            time.sleep(POLL)


@click.command()
@click.argument("name", shell_complete=models_in_memory)
@dtype_option
@click.option("--force", is_flag=True, help="Even if it has work, which waits until it is loaded again.")
@socket_option
def unload(name: str, dtype: str | None, force: bool, socket: Path | None) -> None:
    """Have a model leave memory.

    Sessions that ask for it again wait while it is loaded again.
    """
    address = socket_in_use(socket)
    try:
        order = {"model": name, "dtype": dtype, "force": force}
        answer = ask(address, UnloadAnswer, "POST", "/v1/unload", order)
    except RootstockError as error:
        raise Refused(error) from error
    waiting = f"{plural(answer.waiting, 'evaluation')} {'waits' if answer.waiting == 1 else 'wait'}"
    away = f" for {answer.held:.0f} s, or until you load it; {waiting}" if answer.held else ""
    console.print(f"{name} is unloaded{away}", markup=False)
