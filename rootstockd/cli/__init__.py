"""The command `rootstockd`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

import click

import rootstockd

_MODULES = {
    **dict.fromkeys(("start", "stop", "restart", "reload"), "lifecycle"),
    **dict.fromkeys(("load", "unload"), "fleet"),
    "attach": "attach",
    "status": "show",
    "top": "top",
    "dashboard": "dashboard",
    "logs": "show",
    "doctor": "doctor",
    **{name: name for name in ("metrics", "models", "env", "config", "systemd", "slurm", "completion")},
}
"""Where each command is; it is called there as it is here."""


class _Commands(Mapping[str, click.Command]):
    """The commands by name. Each is imported when it is asked for: all together they take half a second."""

    def __getitem__(self, name: str) -> click.Command:
        command: click.Command = getattr(import_module(f"rootstockd.cli.{_MODULES[name]}"), name)
        return command

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)

    def __contains__(self, name: object) -> bool:
        return name in _MODULES


@click.group(commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rootstockd.__version__, prog_name="rootstockd")
def main() -> None:
    """Warm machine-learned interatomic potentials behind one daemon a node.

    \b
    rootstockd start --gpu 0        start a daemon (or --device cpu)
    rootstockd status               what it is doing
    rootstockd top                  the same, live
    rootstockd dashboard            the same in a browser, with plots
    rootstockd stop                 let it finish its work and end
    rootstockd doctor               what is wrong here, and how to fix it
    rootstockd attach NAME ...      serve i-PI, or another driver that listens
    rootstockd models list          which models there are, and which are here
    rootstockd env create mace      build a Python environment for workers
    rootstockd config show          the settings, and where each comes from

    \b
    In a job:
        from rootstock_client import RootstockClient
        atoms.calc = RootstockClient().calculator("mace-emt-small")
    """  # noqa: D301 - click wants the character \\b itself
