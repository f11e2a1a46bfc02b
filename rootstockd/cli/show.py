"""`status` and `logs`: what a daemon is doing, and what it said."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import click
from rich.markup import escape
from rich.table import Table

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.common import (
    Refused,
    console,
    default_log_file,
    default_socket,
    fetch_status,
    socket_in_use,
    socket_option,
)
from rootstockd.cli.units import unit_at
from rootstockd.control.schema import DaemonStatus, ModelStatus

STATE_COLOUR = {
    "ready": "green",
    "cold": "dim",
    **dict.fromkeys(("waiting", "loading", "starting", "draining"), "yellow"),
    "failed": "red",
}
_SHOWN_SESSIONS = 20


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="For programs; the schema has a version.")
def status(socket: Path | None, as_json: bool) -> None:
    """Show what the daemon is doing."""
    try:
        daemon = fetch_status(socket_in_use(socket))
    except RootstockError as error:
        raise Refused(error) from error
    if as_json:
        click.echo(daemon.model_dump_json(indent=2))
    else:
        show(daemon)


def show(daemon: DaemonStatus) -> None:
    """Print a status for people."""
    console.print(
        f"rootstockd {daemon.version} [{STATE_COLOUR[daemon.state]}]{daemon.state}[/] on {', '.join(daemon.devices)}, "
        f"pid {daemon.pid}, up {duration(time.time() - daemon.since)}, {daemon.evaluations} evaluations, "
        f"{megabytes(daemon.memory)}"
    )
    if daemon.models:
        show_models(daemon.models)
    else:
        console.print("no model is loaded; the first session that asks for one loads it")
    for why in sorted({why for model in daemon.models for why in model.unconfined}):
        names = ", ".join(model.name for model in daemon.models if why in model.unconfined)
        console.print(f"{names}: not wholly confined: {why}", style="yellow", markup=False)
    if daemon.sessions:
        show_sessions(daemon)
    if daemon.other_sessions:
        console.print(f"{daemon.other_sessions} sessions of others")


def show_models(models: list[ModelStatus]) -> None:
    """Print the models, and what there is to say of each."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("model", "dtype", "state", "device"):
        table.add_column(heading, no_wrap=True)
    for heading in ("sessions", "queue", "evaluations", "per second", "batch", "pid", "memory", "last use"):
        table.add_column(heading, justify="right", no_wrap=True)
    for model in models:
        restarts = f", {model.restarts} restarts" if model.restarts else ""
        table.add_row(
            escape(model.name),
            f"{model.dtype} +D3" if model.dispersion else model.dtype,
            f"[{STATE_COLOUR[model.state]}]{model.state}[/]{restarts}",
            model.device or "-",
            str(model.sessions),
            str(model.waiting),
            str(model.evaluations),
            f"{model.rate:.1f}" if model.rate else "-",
            f"{model.evaluations / model.batches:.1f}" if model.batches else "-",
            str(model.pid or "-"),
            megabytes(model.memory) if model.memory else "-",
            "now" if model.idle < 1 else f"{duration(model.idle)} ago",
        )
    console.print(table)
    for model in models:
        if model.loading:
            console.print(f"{model.name} {model.loading.text}", style="yellow", markup=False)
        if model.error:
            console.print(f"{model.name}: {model.error}", style="red", markup=False)
        elif model.backend:
            note = f"; {model.note}" if model.note else ""
            settings = ", ".join(f"{key} {value}" for key, value in (model.dispersion or {}).items())
            added = f" with D3 ({settings})" if settings else ""
            console.print(
                f"{model.name} {model.dtype}: {model.backend}{added}; {model.environment}{note}",
                style="yellow" if note else "dim",
                markup=False,
            )


def show_sessions(daemon: DaemonStatus) -> None:
    """Print the sessions, the oldest first."""
    sessions = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("session", "user", "pid", "model", "state"):
        sessions.add_column(heading, no_wrap=True)
    for heading in ("atoms", "evaluations"):
        sessions.add_column(heading, justify="right")
    for session in sorted(daemon.sessions, key=lambda session: session.id)[:_SHOWN_SESSIONS]:
        sessions.add_row(
            str(session.id),
            session.user,
            str(session.pid),
            escape(session.model or "-"),
            session.state,
            str(session.natoms or "-"),
            str(session.evaluations),
        )
    console.print()
    console.print(sessions)
    if len(daemon.sessions) > _SHOWN_SESSIONS:
        console.print(f"and {len(daemon.sessions) - _SHOWN_SESSIONS} more; --json shows all")


@click.command()
@socket_option
@click.option(
    "-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="How many of the last lines."
)
@click.option("-f", "--follow", is_flag=True, help="Go on as new lines come.")
def logs(socket: Path | None, lines: int, follow: bool) -> None:
    """Show the log of a daemon, which may have ended."""
    with contextlib.suppress(RootstockError):
        if unit := unit_at(find_socket(socket)):
            done = subprocess.run(unit.journal(f"--lines={lines}", *["--follow"] * follow), check=False)
            raise SystemExit(done.returncode)
    path = log_file(socket)
    try:
        file = path.open(encoding="utf-8", errors="replace")
    except OSError as error:
        raise Refused(f"no log at {path}: {error.strerror}.") from error
    with file:
        for line in deque(file, maxlen=lines):
            click.echo(line, nl=False)
        for line in new_lines(path, file) if follow else ():
            click.echo(line, nl=False)


def new_lines(path: Path, file: TextIO) -> Iterator[str]:
    """What comes in a log from now on, also in those that take its place when it is rotated.

    Args:
        path: where it lies.
        file: it, read to its end; closed when another takes its place.
    """
    while True:
        yield from file
        replaced = False
        with contextlib.suppress(FileNotFoundError):  # there is no other yet
            replaced = not os.path.samestat(path.stat(), os.fstat(file.fileno()))
        if replaced:
            yield from file  # what came until then
            file.close()
            file = path.open(encoding="utf-8", errors="replace")
        elif os.fstat(file.fileno()).st_size < os.lseek(file.fileno(), 0, os.SEEK_CUR):  # logrotate's copytruncate
            file.seek(0)
        else:
            time.sleep(0.2)


def log_file(socket: Path | None) -> Path:
    """The log of the daemon that runs, or of the one that ran."""
    try:
        config = fetch_status(find_socket(socket)).config
        told = config.log_file if config else None
    except RootstockError:
        told = None
    return told or default_log_file(socket.absolute() if socket else default_socket())


def duration(seconds: float) -> str:
    """A time span, in its two largest units."""
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"


def megabytes(size: int) -> str:
    """Bytes, in MB."""
    return f"{size / 1e6:.0f} MB"
