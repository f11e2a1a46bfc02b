"""`completion`: the script that has a shell complete commands, and the names that it then asks for.

A shell asks while somebody types, so nothing here waits: a daemon has half a second, and where names can't be had there
are none. All commands have this module, a client's `attach` too, so what only one kind of names needs is imported when
these are asked for.
"""

# ruff: noqa: PLC0415

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.shell_completion import CompletionItem, get_completion_class

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import find_socket

if TYPE_CHECKING:
    from rootstockd.control.schema import DaemonStatus
    from rootstockd.models.catalogue import Entry

_PATIENCE = 0.5
"""Seconds that a daemon has to answer."""
_VARIABLE = "_ROOTSTOCKD_COMPLETE"
"""Set by the scripts; click answers them then."""


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script for completion in bash, zsh or fish.

    \b
    bash   eval "$(rootstockd completion bash)"         in ~/.bashrc
    zsh    eval "$(rootstockd completion zsh)"          in ~/.zshrc, after compinit
    fish   rootstockd completion fish > ~/.config/fish/completions/rootstockd.fish
    """  # noqa: D301 - click wants the character \\b itself
    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(ctx.find_root().command, {}, "rootstockd", _VARIABLE).source())


def catalogue_models(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str, wanted: Callable[[Entry], bool] = lambda _: True
) -> list[CompletionItem]:
    """Models of the catalogue, with that of --catalogue."""
    from rootstockd.models.catalogue import Catalogue, CatalogueError

    try:
        catalogue = Catalogue.load(map(Path, ctx.params.get("catalogues") or ()))
    except CatalogueError:
        return []
    return _beginning(incomplete, {n: e.description for n, e in catalogue.items() if not e.hidden and wanted(e)})


def models_to_pull(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models whose weights can be pulled."""
    return catalogue_models(ctx, parameter, incomplete, lambda entry: bool(entry.url))


def models_in_memory(ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Models that the daemon has loaded."""
    daemon = _daemon(ctx)
    return _beginning(incomplete, {model.name: model.state for model in daemon.models} if daemon else {})


def environments(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Environments that were built or specified."""
    from rootstockd.environments.builds import built_environments
    from rootstockd.environments.specification import specification_files
    from rootstockd.settings.state_dir import StateError

    try:
        built = set(built_environments())
    except StateError:
        built = set()
    return _beginning(
        incomplete, {name: "built" if name in built else "not built" for name in {*built, *specification_files()}}
    )


def gpus(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """GPUs by number, after those that were named already."""
    from rootstockd.host.devices import gpu_names

    before, comma, _ = incomplete.rpartition(",")
    free = {str(i): name for i, name in enumerate(gpu_names()) if str(i) not in before.split(",")}
    words = {f"{before}{comma}{number}": name for number, name in free.items()}
    return _beginning(incomplete, {**words, **({} if comma else {"all": "all GPUs"})})


def devices(_ctx: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What --device takes and --gpu does not."""
    return _beginning(incomplete, {"cpu": "all processors", "auto": "a GPU if there is one"})


def _daemon(ctx: click.Context) -> DaemonStatus | None:
    from rootstockd.cli.common import fetch_status

    try:
        return fetch_status(find_socket(ctx.params.get("socket")), timeout=_PATIENCE)
    except RootstockError:
        return None


def _beginning(incomplete: str, words: dict[str, str]) -> list[CompletionItem]:
    """Those that go on from what was typed, with what to say of them."""
    return [CompletionItem(word, help=words[word] or None) for word in sorted(words) if word.startswith(incomplete)]
