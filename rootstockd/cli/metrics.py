"""`metrics`: what Prometheus would see, and what Prometheus and Grafana are told."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import click

from rootstock_client.control import fetch
from rootstock_client.errors import RootstockError
from rootstockd.cli.clients import Refused, socket_in_use, socket_option


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
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@socket_option
def write(file: Path, socket: Path | None) -> None:
    """Write the metrics to a file, for node_exporter to read.

    For its textfile collector; written at once, so that nobody reads a half. Each has the daemon's socket as a
    label, as a machine may have several; those that node_exporter has of itself (process_...) are left out. All may
    read the file, so it says what each user does only where the setting metrics_users has it so. It stays as it is
    where no daemon answers.

    \b
    rootstockd metrics write /var/lib/prometheus/node-exporter/rootstockd.prom
    """  # noqa: D301 - click wants the character \\b itself
    # imports what only this command needs
    from rootstockd.models import whole_files  # noqa: PLC0415
    from rootstockd.monitoring.textfile import for_textfile  # noqa: PLC0415

    try:
        path = socket_in_use(socket)
        text = for_textfile(fetch(path, "GET", "/metrics?public=true").decode(), path)
    except RootstockError as error:
        raise Refused(error) from error
    try:
        whole_files.write(file, text)
    except whole_files.StoreError as error:
        raise Refused(str(error)) from error


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
