"""The command `rootstockd`."""

from __future__ import annotations

import click

import rootstockd
from rootstockd.cli.attach import attach
from rootstockd.cli.completion import completion
from rootstockd.cli.config import config
from rootstockd.cli.dashboard import dashboard
from rootstockd.cli.doctor import doctor
from rootstockd.cli.env import env
from rootstockd.cli.fleet import load, unload
from rootstockd.cli.lifecycle import reload, restart, start, stop
from rootstockd.cli.metrics import metrics
from rootstockd.cli.models import models
from rootstockd.cli.show import logs, status
from rootstockd.cli.slurm import slurm
from rootstockd.cli.systemd import systemd
from rootstockd.cli.top import top


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(rootstockd.__version__, prog_name="rootstockd")
def main() -> None:
    """Warm machine-learned interatomic potentials behind one daemon a node.

    \b
    rootstockd start --gpu 0        start a daemon (or --device cpu)
    rootstockd status               what it is doing
    rootstockd top                  the same, live
    rootstockd dashboard            the same in a browser, with plots
    rootstockd stop                 let it finish its work and end
    rootstockd doctor               what is wrong here, and what mends it
    rootstockd attach NAME ...      serve i-PI, or another driver that listens
    rootstockd models list          which models there are, and which are here
    rootstockd env create mace      build a Python environment for workers
    rootstockd config show          the settings, and where each comes from

    \b
    In a job:
        from rootstock_client import RootstockClient
        atoms.calc = RootstockClient().calculator("mace-emt-small")
    """  # noqa: D301 - click wants the character \\b itself


for command in (
    *(start, stop, restart, reload, load, unload, attach, status, top, dashboard, logs, doctor),
    *(metrics, models, env, config, systemd, slurm, completion),
):
    main.add_command(command)
