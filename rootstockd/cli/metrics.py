"""`metrics`: what Prometheus would see, and what Prometheus and Grafana are told."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from rootstock_client.control import fetch
from rootstock_client.errors import RootstockError
from rootstockd.cli.common import Refused, socket_in_use, socket_option


@click.group()
def metrics() -> None:
    """Metrics for Prometheus, a dashboard and alerts.

    docs/monitoring.md has more.
    """


@metrics.command()
@socket_option
def show(socket: Path | None) -> None:
    """Print the daemon's metrics, in Prometheus' text format."""
    try:
        click.echo(fetch(socket_in_use(socket), "GET", "/metrics"), nl=False)
    except RootstockError as error:
        raise Refused(error) from error


@metrics.command()
def dashboard() -> None:
    """Print a dashboard for Grafana, to be imported there."""
    click.echo(_shipped("grafana-dashboard.json"), nl=False)


@metrics.command()
def alerts() -> None:
    """Print alerts for Prometheus' rule_files."""
    click.echo(_shipped("alerts.yml"), nl=False)


def _shipped(name: str) -> str:
    return resources.files("rootstockd").joinpath("monitoring", name).read_text(encoding="utf-8")
