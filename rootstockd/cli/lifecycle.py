"""`start`, `stop`, `restart` and `reload`."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import click

from rootstock_client.client import request
from rootstock_client.errors import RootstockError
from rootstockd.cli.common import (
    Refused,
    console,
    default_log_file,
    default_socket,
    fetch_status,
    socket_in_use,
    socket_option,
)
from rootstockd.config import Config
from rootstockd.config_file import ConfigError, make_config, read_again
from rootstockd.control.schema import DaemonStatus, ReloadReport
from rootstockd.devices import DeviceError, choose_device

POLL = 0.05


@click.command()
@click.option("--gpu", type=click.IntRange(min=0), help="The GPU to use, as the driver numbers them.")
@click.option("--device", type=click.Choice(["cpu", "auto"]), default="auto", help="cpu, or a GPU if there is one.")
@click.option("--model", "models", multiple=True, metavar="NAME", help="Load this model now; may be given repeatedly.")
@click.option(
    "--catalogue",
    "catalogues",
    multiple=True,
    type=click.Path(path_type=Path, resolve_path=True),
    help="A TOML file of further models; may be given repeatedly.",
)
@socket_option
@click.option("--log-file", type=click.Path(path_type=Path, resolve_path=True), help="Where the log goes.")
@click.option("--max-atoms", type=click.IntRange(min=1), help="The most atoms in one message of one session.")
@click.option("--batch-atoms", type=click.IntRange(min=1), help="The most atoms in one pass over several sessions.")
@click.option(
    "--config",
    "file",
    type=click.Path(path_type=Path, resolve_path=True),
    help="A TOML file of settings; what is given here goes before it.",
)
@click.option("--foreground", is_flag=True, help="Stay in front, log to the terminal, end with Ctrl-C.")
def start(
    gpu: int | None,
    device: str,
    models: tuple[str, ...],
    catalogues: tuple[Path, ...],
    socket: Path | None,
    log_file: Path | None,
    max_atoms: int | None,
    batch_atoms: int | None,
    file: Path | None,
    foreground: bool,
) -> None:
    """Start a daemon; returns when it is ready."""
    if gpu is not None and device == "cpu":
        raise click.UsageError("--gpu and --device cpu exclude each other.")
    try:
        chosen = choose_device(gpu=gpu, cpu=device == "cpu")
    except DeviceError as error:
        raise Refused(error) from error
    flags = {
        "socket": socket.absolute() if socket else None,
        "device": chosen if gpu is not None or device == "cpu" else None,
        "models": models or None,
        "catalogues": catalogues or None,
        "log_file": log_file,
        "max_atoms": max_atoms,
        "batch_atoms": batch_atoms,
    }
    try:
        config = make_config(flags, file, {"socket": default_socket(), "device": chosen})
    except ConfigError as error:
        raise Refused(error) from error
    if config.log_file is None:
        config = config.model_copy(update={"log_file": default_log_file(config.socket)})
    if foreground:
        from rootstockd.serve import StartError, serve  # imports what only a daemon needs  # noqa: PLC0415

        try:
            serve(config)
        except StartError as error:
            raise Refused(error) from error
    else:
        launch(config)


@click.command()
@socket_option
@click.option("--force", is_flag=True, help="Do not wait for evaluations under way.")
def stop(socket: Path | None, force: bool) -> None:
    """Let the daemon finish the evaluations under way, and end it."""
    address = socket_in_use(socket)
    try:
        end(address, force=force)
    except RootstockError as error:
        raise Refused(error) from error
    console.print("stopped")


@click.command()
@socket_option
def restart(socket: Path | None) -> None:
    """Stop the daemon and start it again, with the same options and its configuration file as it is now."""
    address = socket_in_use(socket)
    try:
        running = fetch_status(address).config
        config = read_again(running) if running else None
        end(address)  # which refuses whoever may not
    except (RootstockError, ConfigError) as error:
        raise Refused(error) from error
    assert config is not None
    launch(config)


@click.command()
@socket_option
def reload(socket: Path | None) -> None:
    """Have the daemon read its configuration file and its catalogues again; no job notices."""
    try:
        answer = request(socket_in_use(socket), "POST", "/v1/reload")
    except RootstockError as error:
        raise Refused(error) from error
    report = ReloadReport.model_validate(answer)
    console.print("reloaded")
    if report.restart_needed:
        console.print(
            f"changed, but only a restart takes them over: {', '.join(report.restart_needed)}", style="yellow"
        )


def launch(config: Config) -> None:
    """Start a daemon in the background and wait until it is ready.

    Raises:
        Refused: it can't start, or none of the models it was to load can be loaded.
    """
    assert config.log_file is not None
    try:
        config.log_file.parent.mkdir(parents=True, exist_ok=True)
        log = config.log_file.open("ab")
    except OSError as error:
        raise Refused(f"can't write the log {config.log_file}: {error.strerror}. Choose another --log-file.") from error
    with log:
        position = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "rootstockd.serve", config.model_dump_json()],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    try:
        status = wait_until_ready(process, config, position)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise
    broken = [model for model in status.models if model.error]
    for model in broken:
        console.print(f"{model.name}: {model.error}", style="red", markup=False)
    if broken and len(broken) == len(status.models):
        end(config.socket, force=True)
        process.wait()
        raise Refused("no model could be loaded, so the daemon was stopped again.")
    loaded = [model.name for model in status.models if model.state == "ready"]
    name = loaded[0] if loaded else "mace-emt-small"
    console.print(
        f"ready on {config.device}, models loaded: {', '.join(loaded) or 'none yet'}\n\n"
        f"  from rootstock_client import RootstockClient\n"
        f'  atoms.calc = RootstockClient().calculator("{name}")\n\n'
        f"socket  {config.socket}\nlog     {config.log_file}",
        soft_wrap=True,
        markup=False,
    )


def wait_until_ready(process: subprocess.Popen[bytes], config: Config, log_position: int) -> DaemonStatus:
    """Wait, with a spinner that says for what.

    Raises:
        Refused: the process ended.
    """
    with console.status("starting") as spinner:
        while process.poll() is None:
            try:
                status = fetch_status(config.socket)
            except RootstockError:
                status = None
            if status is not None and status.pid == process.pid:
                if status.state == "ready":
                    return status
                loading = [model.name for model in status.models if model.state == "loading"]
                spinner.update(f"loading {', '.join(loading)}")
            time.sleep(POLL)
    assert config.log_file is not None
    with config.log_file.open("rb") as log:
        log.seek(log_position)
        words = log.read().decode(errors="replace").strip()
    # the command in the background has said why in its last line or lines
    reason = words.rpartition("Error: ")[2] if "Error: " in words else words
    raise Refused(reason or f"the daemon ended with exit status {process.returncode} and said nothing.")


def end(socket: Path, *, force: bool = False) -> None:
    """Stop a daemon and wait until its process is gone.

    Raises:
        RootstockError: there is none.
    """
    with contextlib.ExitStack() as stack:
        process = os.pidfd_open(fetch_status(socket).pid)
        stack.callback(os.close, process)
        request(socket, "POST", "/v1/stop", {"force": force})
        with console.status("waiting for evaluations under way"):
            select.select([process], [], [])
