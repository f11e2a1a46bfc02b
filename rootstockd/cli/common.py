"""What several commands share: a daemon's status and settings, where its log is, what is said while one waits."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar

import click
import platformdirs
from pydantic import BaseModel, ValidationError
from rich.console import Console

import rootstockd
from rootstock_client.control import request
from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import (
    JOB_VARIABLE,
    SOCKET_NAME,
    SYSTEM_DIR,
    job_runtime_dir,
    user_runtime_dir,
)
from rootstockd.cli.clients import OptionPath
from rootstockd.control.schema import DaemonStatus
from rootstockd.settings.config import Config

console = Console(highlight=False)


def watched() -> bool:
    """Whether what is printed may change again: FORCE_COLOR has rich take a file or a pipe for a terminal, too."""
    return console.is_terminal and sys.stdout.isatty()


if not watched() and not os.environ.get("COLUMNS", "").lstrip("0").isdecimal():
    console.width = 10_000  # a file or a pipe has room for whole lines

QUIET = 2.0
"""Seconds until the first line about what a command waits for; one that takes no longer says nothing of it."""

catalogue_option = click.option(
    "--catalogue",
    "catalogues",
    multiple=True,
    type=OptionPath(path_type=Path, resolve_path=True),
    help="A TOML file of further models; may be given repeatedly.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="For programs.")

Answer = TypeVar("Answer", bound=BaseModel)

SYSTEM_LOG = Path("/var/log/rootstockd/rootstockd.log")
"""Of the machine's daemon, where systemd does not have it."""


def default_socket() -> Path:
    """Where a new daemon puts its session socket: the job's or the user's runtime directory (root: the system's)."""
    return (SYSTEM_DIR if os.geteuid() == 0 else job_runtime_dir() or user_runtime_dir()) / SOCKET_NAME


def default_log_file(socket: Path) -> Path:
    """Where a background daemon on `socket` writes its log unless it was told otherwise."""
    if socket == SYSTEM_DIR / SOCKET_NAME and os.geteuid() == 0:
        return SYSTEM_LOG
    folder = platformdirs.user_log_path("rootstockd")
    if socket.parent == job_runtime_dir():  # homes are the same on all nodes
        return folder / f"job-{os.environ[JOB_VARIABLE]}.{os.environ.get('SLURMD_NODENAME') or gethostname()}.log"
    standard = socket.name == SOCKET_NAME and socket.parent in (SYSTEM_DIR, user_runtime_dir())
    return folder / ("rootstockd.log" if standard else "-".join(socket.with_suffix("").parts[1:]) + ".log")


def fetch_status(socket: Path, *, timeout: float = 10.0) -> DaemonStatus:
    """Ask a daemon how it is, which may say nothing for `timeout` seconds; raises as `ask` does."""
    return ask(socket, DaemonStatus, "GET", "/v1/status", timeout=timeout)


def ask(
    socket: Path,
    kind: type[Answer],
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout: float = 10.0,
) -> Answer:
    """Ask a daemon's control API for an answer of a kind; the other arguments are those of `request`.

    Raises:
        RootstockError: it does not answer, or refuses, or does not answer as this version does.
    """
    answer = request(socket, method, path, body, timeout=timeout)
    try:
        return kind.model_validate(answer)
    except ValidationError as error:
        raise _unreadable(socket, answer) from error


def _unreadable(socket: Path, answer: object) -> RootstockError:
    theirs = f"version {answer['version']}" if isinstance(answer, dict) and "version" in answer else "another version"
    return RootstockError(
        f"rootstockd at {socket} is {theirs}, this command {rootstockd.__version__}, and its answer can't be read.",
        "`rootstockd restart` starts a daemon of this version; jobs wait for it.",
    )


def fetch_config(socket: Path) -> Config | None:
    """What a daemon, of this version or another, was started with; None for those who don't administer it.

    Raises:
        RootstockError: it does not answer, or its settings mean nothing to this version.
    """
    answer = request(socket, "GET", "/v1/status")
    if not isinstance(answer, dict) or "config" not in answer:
        raise _unreadable(socket, answer)
    if (told := answer["config"]) is None:
        return None
    try:
        _remove_unknown(told)
        return Config.model_validate(told)
    except ValidationError as error:
        raise RootstockError(f"rootstockd at {socket} has settings that this version can't take: {error}") from error


def _remove_unknown(told: Any) -> None:
    """Remove the settings that a newer version has, in tables and lists, too."""
    try:
        Config.model_validate(told)
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["type"] == "extra_forbidden":
                *place, name = problem["loc"]
                table = told
                for step in place:
                    table = table[step]
                del table[name]


def print_warnings(warnings: list[str]) -> None:
    """Print what a configuration has that can't be meant so."""
    for warning in warnings:
        console.print(warning, style="yellow", markup=False, soft_wrap=True)


@contextlib.contextmanager
def saying(text: str) -> Iterator[Callable[[str], None]]:
    """What a command waits for: as a spinner, or without a terminal as lines of standard error, more and more rarely.

    Args:
        text: what it waits for at first.

    Yields:
        What to call, again and again, with what it waits for now.
    """
    if watched():
        with console.status(text) as spinner:
            yield spinner.update
        return
    said, then, quiet = "", time.monotonic(), QUIET

    def update(now: str) -> None:
        nonlocal said, then, quiet
        if now != said and time.monotonic() - then >= quiet:
            said, then, quiet = now, time.monotonic(), 2 * quiet
            click.echo(now, err=True)

    yield update
