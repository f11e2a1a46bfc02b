"""`status` and `logs`: what a daemon is doing, and what it said."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import click
from rich.cells import cell_len
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import find_socket
from rootstockd.cli.clients import Refused, socket_in_use, socket_option
from rootstockd.cli.common import console, default_log_file, default_socket, fetch_status
from rootstockd.cli.options import files_to_read
from rootstockd.cli.quantities import count, duration, plural, size, span
from rootstockd.cli.service import service_at
from rootstockd.cli.systemd_units import unit_at
from rootstockd.control.schema import LONG, DaemonStatus, ModelStatus, at_a_batch
from rootstockd.host.log_file import read_log
from rootstockd.monitoring.rows import dtypes, session_dtype, settings_in_words, told_apart
from rootstockd.settings.config import Config
from rootstockd.settings.config_file import ConfigError
from rootstockd.settings.config_layers import make_config

STATE_COLOUR = {
    "ready": "green",
    "cold": "dim",
    **dict.fromkeys(("waiting", "loading", "starting", "draining"), "yellow"),
    "failed": "red",
}
_SHOWN_SESSIONS = 20
_SHOWN_NAMES = 3
_GAP = 2
_LONGEST_LINE = 2**16
"""Characters of a log's line that are kept at once."""


@click.command()
@socket_option
@click.option("--json", "as_json", is_flag=True, help="For programs; the schema has a version.")
def status(socket: Path | None, as_json: bool) -> None:
    """Show what the daemon is doing."""
    address = socket_in_use(socket)
    try:
        daemon = fetch_status(address)
    except RootstockError as error:
        raise Refused(_failing(address) or error) from error
    if as_json:
        click.echo(daemon.model_dump_json(indent=2))
    else:
        show(daemon)
    if daemon.state == "starting" and (failing := _failing(address)):
        raise Refused(failing)


def _failing(address: Path) -> str:
    """That systemd starts the daemon at an address again and again; empty where it does not."""
    service = service_at(address)
    return "" if service is None else service.failing()


def show(daemon: DaemonStatus) -> None:
    """Print a status for people, in as many columns as the terminal has room for."""
    console.print(
        f"rootstockd {daemon.version} [{STATE_COLOUR[daemon.state]}]{daemon.state}[/] on {', '.join(daemon.devices)}, "
        f"up {duration(time.time() - daemon.since)}"
    )
    sessions = len(daemon.sessions) + daemon.other_sessions
    console.print(
        f"{plural(sessions, 'session')}, {plural(daemon.evaluations, 'evaluation')}, pid {daemon.pid}, "
        f"{size(daemon.memory)}",
        style="dim",
    )
    if daemon.metrics:
        console.print(f"metrics at {daemon.metrics}", style="dim", markup=False)
    if daemon.state == "draining":
        console.print("evaluations under way end; jobs wait for the next daemon", style="yellow")
    for text in daemon.warnings:
        console.print(text, style="yellow", markup=False)
    console.print()
    hidden: list[str] = []
    if daemon.models:
        hidden += show_models(daemon.models)
    else:
        console.print("no model is loaded; the first session that asks for one loads it")
    if daemon.sessions:
        console.print()
        hidden += show_sessions(daemon)
    if daemon.other_sessions:
        console.print(f"{plural(daemon.other_sessions, 'session')} of others", style="dim")
    if daemon.config and (shares := _shares(daemon.config, {session.user for session in daemon.sessions})):
        console.print(f"shares of a model's time, where several want it: {shares}", style="dim", markup=False)
    if hidden:
        console.print(f"no room for {', '.join(dict.fromkeys(hidden))}; --json has all", style="dim")


def _shares(config: Config, users: set[str]) -> str:
    """What users have by the configuration; empty where it is the same for all."""
    shares = {user: config.quota(user).share for user in sorted(users)}
    if len(set(shares.values())) <= 1:
        return ""
    return ", ".join(f"{user} {share:g}" for user, share in shares.items())


def show_models(models: list[ModelStatus]) -> list[str]:
    """Print the models, what is wrong with some, and what computes; the columns for which there was no room."""
    names = told_apart(models)
    precisions = dtypes(models)
    alike = len({(model.name, dtype) for model, dtype in zip(models, precisions, strict=True)}) < len(models)
    hidden = print_fitting(
        [
            Column("model", [escape(model.name) for model in models]),
            Column(
                "dtype",
                precisions,
                rank=3 if names == [model.name for model in models] else 0,
            ),
            Column("state", [_state(model) for model in models]),
            Column("device", [model.device or "-" for model in models], rank=0 if alike else 2),
            Column("sessions", [count(model.sessions) for model in models], right=True),
            Column("queue", [count(model.waiting) for model in models], right=True, rank=1),
            Column("eval/s", [f"{model.rate:.1f}" if model.rate else "-" for model in models], right=True),
            Column(
                "busy",
                [f"{model.load:.0%}" if model.rate or model.load else "-" for model in models],
                right=True,
                rank=5,
            ),
            Column("memory", [size(model.memory) for model in models], right=True, rank=4),
            Column("idle", [span(model.idle) for model in models], right=True, rank=6),
            Column("evaluations", [count(model.evaluations) for model in models], right=True, rank=8),
            Column("a batch", [_batch(model) for model in models], right=True, rank=9),
            Column("pid", [str(model.pid or "-") for model in models], right=True, rank=7),
        ]
    )
    for name, model in zip(names, models, strict=True):
        if model.batch_seconds >= LONG:
            text = at_a_batch(model.batch_under_way, model.batch_seconds)
            console.print(f"{name} {text}", style="yellow", markup=False)
        if model.loading:
            console.print(f"{name} {model.loading.text}", style="yellow", markup=False)
        if model.error:
            console.print(f"{name}: {model.error}", style="red", markup=False)
        elif model.restarts:
            text = f"{name}: its worker was replaced {plural(model.restarts, 'time')}"
            console.print(text, style="yellow", markup=False)
    say_for_all(models, lambda model: [f"not wholly confined: {why}" for why in model.unconfined], "yellow")
    say_for_all(models, lambda model: [model.note] if model.note else [], "yellow")
    say_for_all(models, lambda model: [_computing(model)] if model.backend and not model.error else [], "dim")
    return hidden


def say_for_all(models: list[ModelStatus], words: Callable[[ModelStatus], list[str]], style: str) -> None:
    """Print what there is to say of models, once for those of which the same is to be said."""
    of: dict[str, list[str]] = {}
    for name, model in zip(told_apart(models), models, strict=True):
        for text in words(model):
            if name not in of.setdefault(text, []):
                of[text].append(name)
    for text, names in of.items():
        shown = names if len(names) <= _SHOWN_NAMES else [*names[:_SHOWN_NAMES], f"{len(names) - _SHOWN_NAMES} more"]
        console.print(f"{', '.join(shown)}: {text}", style=style, markup=False)


def _state(model: ModelStatus) -> str:
    return f"[{STATE_COLOUR[model.state]}]{model.state}[/]{', retired' * model.retired}"


def _batch(model: ModelStatus) -> str:
    return f"{model.evaluations / model.batches:.1f}" if model.batches else "-"


def _computing(model: ModelStatus) -> str:
    """What computes a model, and where."""
    with_d3 = f" with D3 ({settings_in_words(model.dispersion)})" if model.dispersion else ""
    return f"{model.backend}{with_d3}; {model.environment}"


def show_sessions(daemon: DaemonStatus) -> list[str]:
    """Print the sessions, the oldest first; the columns for which there was no room."""
    shown = sorted(daemon.sessions, key=lambda session: session.id)[:_SHOWN_SESSIONS]
    hidden = print_fitting(
        [
            Column("session", [str(session.id) for session in shown]),
            Column("user", [escape(session.user) for session in shown]),
            Column("pid", [str(session.pid) for session in shown], rank=1),
            Column("model", [escape(session.model or "-") for session in shown]),
            Column("dtype", [session_dtype(session) for session in shown], rank=3),
            Column("state", [session.state for session in shown], rank=2),
            Column("atoms", [str(session.natoms or "-") for session in shown], right=True),
            Column("evaluations", [count(session.evaluations) for session in shown], right=True, rank=4),
        ]
    )
    if len(daemon.sessions) > len(shown):
        console.print(f"and {len(daemon.sessions) - len(shown)} more; --json shows all", style="dim")
    return hidden


@dataclass(frozen=True)
class Column:
    """A column of a table for people."""

    heading: str
    cells: list[str]
    """In rich's markup."""
    right: bool = False
    """Numbers stand so."""
    rank: int = 0
    """0 for what is always shown; of the others the highest go first where there is no room."""

    @property
    def width(self) -> int:
        """What it needs."""
        return max(len(self.heading), *(cell_len(Text.from_markup(cell).plain) for cell in self.cells))


def print_fitting(columns: list[Column]) -> list[str]:
    """Print a table of the columns for which the terminal has room; the headings of the others."""
    shown = list(columns)
    while sum(column.width + _GAP for column in shown) - _GAP > console.width and any(c.rank for c in shown):
        shown.remove(max(shown, key=lambda column: column.rank))
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for column in shown:
        table.add_column(column.heading, justify="right" if column.right else "left", overflow="fold")
    for cells in zip(*(column.cells for column in shown), strict=True):
        table.add_row(*cells)
    console.print(table)
    return [column.heading for column in columns if column not in shown]


@click.command()
@socket_option
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(min=0, max=1_000_000_000),
    default=50,
    show_default=True,
    help="How many lines to show, counted from the end.",
)
@click.option("-f", "--follow", is_flag=True, help="Keep printing new lines as they come.")
def logs(socket: Path | None, lines: int, follow: bool) -> None:
    """Show the log of a daemon, which may have ended."""
    with contextlib.suppress(RootstockError):
        if unit := unit_at(find_socket(socket)):
            done = subprocess.run(unit.journal(f"--lines={lines}", *["--follow"] * follow), check=False)
            if done.returncode and unit.roots:
                raise Refused("its log is in the journal, for root and members of the group systemd-journal to read.")
            raise SystemExit(done.returncode)
    path = log_file(socket)
    with readable(path):
        file = read_log(path)
    with file:
        for line in deque(lines_of(file), maxlen=lines):
            click.echo(line, nl=False)
        for line in new_lines(path, file) if follow else ():
            click.echo(line, nl=False)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """While a log is opened to be read.

    Raises:
        Refused: it can't be.
    """
    try:
        yield
    except PermissionError as error:
        raise Refused(f"the log {path} is for the daemon's own user to read.") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Refused(
            f"no log at {path}: {error.strerror}. One that was started with --log-file wrote there, and only while it "
            "runs it says where that is; one with another socket is found by --socket. `rootstockd doctor` looks for "
            "what is wrong."
        ) from error
    except OSError as error:
        raise Refused(f"can't show the log {path}: {error.strerror}. It has to be a file, and no link.") from error


def lines_of(file: TextIO) -> Iterator[str]:
    """The lines that are left of a log; one of which there is no end in sight, in parts."""
    return iter(lambda: file.readline(_LONGEST_LINE), "")


def new_lines(path: Path, file: TextIO) -> Iterator[str]:
    """What comes in a log from now on, also in those that take its place when it is rotated.

    Args:
        path: where it lies.
        file: it, read to its end; closed when another takes its place.
    """
    while True:
        yield from lines_of(file)
        other = None
        with readable(path), contextlib.suppress(FileNotFoundError):  # there is none yet
            if not os.path.samestat(path.lstat(), os.fstat(file.fileno())):
                other = read_log(path)
        if other is not None:
            yield from lines_of(file)  # what came until then
            file.close()
            file = other
        elif os.fstat(file.fileno()).st_size < os.lseek(file.fileno(), 0, os.SEEK_CUR):  # logrotate's copytruncate
            file.seek(0)
        else:
            time.sleep(0.2)


def log_file(socket: Path | None) -> Path:
    """The log of the daemon that runs, or of the one that ran.

    Raises:
        Refused: it is not for this user, or there is none.
    """
    with contextlib.suppress(RootstockError):
        status = fetch_status(found := find_socket(socket))
        config = status.config
        if config is None:
            raise Refused(f"the log of the daemon at {found} is for its own user to read.")
        if config.log_file is None:
            raise Refused(
                f"the daemon at {found} is in the foreground (pid {status.pid}), and keeps no log: what it says is "
                "where it was started, in that terminal or in the output of its job or container."
            )
        return config.log_file
    defaults = {"socket": default_socket(), "devices": ("cpu",)}
    try:
        config = make_config(
            files_to_read(socket=socket), os.environ, {"socket": socket and socket.absolute()}, defaults
        )
    except ConfigError as error:
        raise Refused(f"can't tell where the daemon's log would be:\n{error}") from error
    return config.log_file or default_log_file(config.socket)
