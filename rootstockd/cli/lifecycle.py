"""`start`, `stop`, `restart` and `reload`."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket as socketlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from rootstock_client.control import request
from rootstock_client.errors import (
    AccessDeniedError,
    ConnectionLostError,
    DaemonNotFoundError,
    NotAnsweringError,
    RootstockError,
)
from rootstock_client.runtime_dir import START_HINT, control_socket, find_socket
from rootstock_client.sockets import connect
from rootstockd.cli.common import (
    QUIET,
    Refused,
    ask,
    console,
    default_log_file,
    fetch_config,
    fetch_status,
    print_warnings,
    saying,
    socket_in_use,
    socket_option,
)
from rootstockd.cli.options import settings_again, settings_options, settings_said
from rootstockd.cli.successor import take_environment
from rootstockd.cli.units import is_systemd, unit_at
from rootstockd.control.schema import DaemonStatus, ReloadReport
from rootstockd.host.devices import DeviceError, found_devices
from rootstockd.host.log_file import open_log
from rootstockd.host.peers import peer_of
from rootstockd.host.sockets import already_runs
from rootstockd.monitoring.rows import told_apart
from rootstockd.settings.config import COMMAND_LINE, Config
from rootstockd.settings.config_file import ConfigError
from rootstockd.settings.config_layers import unknown_variables
from rootstockd.users import user_name

POLL = 0.05
PEEK = socketlib.MSG_PEEK | socketlib.MSG_DONTWAIT
FORCE_TIMEOUT = 5.0
"""Seconds that a daemon has to answer `stop --force`, and then to end, before it is killed."""
SUCCESSION = 3.0
"""Seconds that `stop` waits for somebody to listen where there is a socket: the second daemon of a restart may."""
DRAINING = "waiting for evaluations under way"


@click.command()
@settings_options
@click.option("--foreground", is_flag=True, help="Stay in the foreground, log to the terminal, end with Ctrl-C.")
@click.option("--wait", is_flag=True, help="When it is ready, wait until it ends; ending this command ends the daemon.")
def start(foreground: bool, wait: bool, **said: Any) -> None:
    """Start a daemon; returns when it is ready."""
    try:
        config = settings_said(**said)
        found_devices(config.devices)
    except (ConfigError, DeviceError) as error:
        raise Refused(error) from error
    print_warnings(unknown_variables(os.environ))
    if os.environ.get("LISTEN_PID") != str(os.getpid()) and (unit := unit_at(config.socket)):
        raise Refused(
            f"systemd listens at {config.socket}, and starts {unit.service} for whoever comes; use that. For one of "
            f"your own, `{' '.join(unit.systemctl)} stop {unit.socket}` first, or choose another --socket."
        )
    if foreground:
        serve_in_front(config)
    elif wait:
        stay_with(config)
    else:
        launch(config)


@click.command()
@socket_option
@click.option("--force", is_flag=True, help="Do not wait for evaluations under way.")
def stop(socket: Path | None, force: bool) -> None:
    """Let the daemon finish the evaluations under way, and end it."""
    address = socket_in_use(socket)
    if unit := unit_at(address):
        unit.stop(force=force)
        console.print(f"stopped; `{' '.join(unit.systemctl)} start {unit.socket}` starts it again")
        return
    deadline = time.monotonic() + SUCCESSION
    while True:
        try:
            end(address, force=force)
            break
        except DaemonNotFoundError as error:
            if not address.exists() or time.monotonic() > deadline:
                raise Refused(error) from error
            time.sleep(POLL)
        except RootstockError as error:
            raise Refused(error) from error
    if address.exists():
        raise Refused("it has ended, but it was being restarted: stop its successor, too.")
    console.print("stopped")


@click.command()
@socket_option
def restart(socket: Path | None) -> None:
    """Stop the daemon and start it again.

    With the same options, and its configuration as it is now.
    """
    address = socket_in_use(socket)
    if unit := unit_at(address):
        unit.ask("restart", unit.service)
        return
    try:
        config = None
        if running := fetch_config(address):  # while there is still a daemon
            check_own(address)
            with daemon_process(address) as process:
                take_environment(process)
            try:
                config = settings_again(in_background(running))
            except ConfigError as error:
                raise Refused(f"{error}\nA new daemon could not start, so the old one goes on.") from error
            check_startable(config, running.socket)
        with daemon_process(address) as process:
            named = address.exists()  # whoever removed it did not mean to stop the daemon
            with contextlib.suppress(ConnectionLostError):  # it was on its way down already
                request(address, "POST", "/v1/stop", {"replaced": True})  # which refuses whoever may not
            assert config is not None
            launch(config, after=process, named=named)
    except (RootstockError, ConfigError) as error:
        raise Refused(error) from error


@click.command()
@socket_option
def reload(socket: Path | None) -> None:
    """Have the daemon read its configuration and catalogues again.

    Running jobs are not affected.
    """
    try:
        report = ask(socket_in_use(socket), ReloadReport, "POST", "/v1/reload")
    except RootstockError as error:
        raise Refused(error) from error
    console.print("reloaded")
    for name, sessions in report.models_kept.items():
        keep = "1 session keeps" if sessions == 1 else f"{sessions} sessions keep"
        until = "it reconnects" if sessions == 1 else "they reconnect"
        console.print(f"{name} has changed: {keep} the old one until {until}", markup=False)
    print_warnings(report.warnings)
    if report.restart_needed:
        console.print(
            f"changed, but take effect only with a restart: {', '.join(report.restart_needed)}"
            + " (of socket: with `stop` and `start`)" * ("socket" in report.restart_needed),
            style="yellow",
        )


def refuse_second(address: Path) -> None:
    """Say that a daemon runs there already, and not in a log, which would pass for that daemon's.

    Raises:
        Refused: one does.
    """
    with contextlib.suppress(RootstockError):
        running = fetch_status(address)
        raise Refused(already_runs(address, str(running.pid)))


def check_own(address: Path) -> None:
    """Whether a daemon's successor would be the same user's.

    Raises:
        Refused: it would not.
        RootstockError: it does not answer.
    """
    with connect(control_socket(address), FORCE_TIMEOUT) as sock:
        uid = peer_of(sock).uid
    if uid != os.geteuid():
        owner = user_name(uid)
        raise Refused(
            f"the daemon runs as {owner}, and what you start would not. Restart it as {owner}; `rootstockd stop` and "
            "`reload` are yours to use."
        )


def in_background(config: Config) -> Config:
    """A daemon's settings for its successor, which is in the background whatever the daemon is."""
    if config.log_file is not None:
        return config
    origins = {name: origin for name, origin in config.origins.items() if name != "log_file"}
    return config.model_copy(update={"log_file": default_log_file(config.socket), "origins": origins})


def check_startable(config: Config, address: Path) -> None:
    """Whether a new daemon could take the place of the one at an address.

    Raises:
        Refused: it could not start, or would be elsewhere.
    """
    # imports what only `restart` needs
    from rootstockd.cli.config import look_over  # noqa: PLC0415

    if config.socket != address:
        raise Refused(
            f"by {config.where('socket')} the socket is {config.socket} now. The daemon goes on at {address}, where "
            "its jobs wait for it during a restart: `rootstockd stop` it and `start` one, or set `socket` back."
        )
    problems, _ = look_over(config)
    if problems:
        raise Refused("\n".join(["a new daemon could not start, so the old one goes on:", *problems]))


def serve_in_front(config: Config) -> None:
    """Be the daemon. What it prints is standard error's, and goes into no file of the settings.

    Raises:
        Refused: it can't start.
    """
    # imports what only a daemon needs
    from rootstockd.serve import StartError, serve, start_logging  # noqa: PLC0415

    start_logging()
    origins = {**config.origins, "log_file": COMMAND_LINE}
    try:
        serve(config.model_copy(update={"log_file": None, "origins": origins}))
    except StartError as error:
        raise Refused(error) from error


def stay_with(config: Config) -> None:
    """Start a daemon in the background and be there as long as it is; exits as it does.

    Raises:
        Refused: as `launch` says.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(number, signal.default_int_handler)
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # the daemon ignores them, too
        signal.signal(number, signal.SIG_IGN)
    process = None
    while True:
        try:
            process = process or launch(config)
            raise SystemExit(process.wait())
        except KeyboardInterrupt:
            if process is None:  # `launch` has ended it
                raise
            process.terminate()


def launch(config: Config, *, after: int | None = None, named: bool = True) -> subprocess.Popen[bytes]:
    """Start a daemon in the background and wait until it is ready; its process.

    Args:
        config: its settings.
        after: the pidfd of its predecessor. It gets ready while that one drains, and begins when it is gone.
        named: the predecessor's socket was there. Then, if it is gone with it, `stop` has called the restart off.

    Raises:
        Refused: it can't start, or none of the models it was to load can be loaded.
    """
    assert config.log_file is not None
    if after is None:
        refuse_second(config.socket)
    log = prepare_log(config.log_file)
    predecessor = () if after is None else (after,)
    arguments = [] if after is None else [str(after), "named" if named else "unnamed"]
    with log, handed_over(config) as settings:
        position = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "rootstockd.serve", *arguments],
            pass_fds=predecessor,
            stdin=settings,
            stdout=log,
            stderr=log,
            cwd="/",
            start_new_session=True,
        )
    try:
        introduce(process, config, wait_until_ready(process, config, position))
    except KeyboardInterrupt:
        if after is None:
            process.terminate()
            process.wait()
        else:  # the one before it is on its way down
            console.print("the restart goes on without this command; `rootstockd stop` calls it off")
        raise
    return process


def introduce(process: subprocess.Popen[bytes], config: Config, status: DaemonStatus) -> None:
    """Say of a daemon that is ready what it has, and how it is used.

    Raises:
        Refused: none of the models it was to load can be loaded; it has been stopped.
    """
    broken = [model for model in status.models if model.error]
    for name, model in zip(told_apart(status.models), status.models, strict=True):
        if model.error:
            console.print(f"{name}: {model.error}", style="red", markup=False)
    if broken and len(broken) == len(status.models):
        end(config.socket, force=True)
        process.wait()
        raise Refused("no model could be loaded, so the daemon was stopped again.")
    print_warnings(status.warnings)
    loaded = list(dict.fromkeys(model.name for model in status.models if model.state == "ready"))
    name = loaded[0] if loaded else "mace-emt-small"
    where = repr(str(config.socket))
    with contextlib.suppress(DaemonNotFoundError):
        where = "" if find_socket() == config.socket else where
    console.print(
        f"ready on {', '.join(map(str, config.devices))}, models loaded: {', '.join(loaded) or 'none yet'}\n\n"
        f"  from rootstock_client import RootstockClient\n"
        f'  atoms.calc = RootstockClient({where}).calculator("{name}")\n\n'
        f"socket  {config.socket}\nlog     {config.log_file}"
        + (f"\nmetrics {status.metrics}" if status.metrics else ""),
        soft_wrap=True,
        markup=False,
    )


def handed_over(config: Config) -> BinaryIO:
    """Settings as the standard input of a daemon: a file in memory, at its beginning."""
    file = os.fdopen(os.memfd_create("rootstockd-settings"), "w+b")
    file.write(config.model_dump_json().encode())
    file.seek(0)
    return file


def prepare_log(path: Path) -> BinaryIO:
    """Open a log, or say why it can't be.

    Raises:
        Refused: it can't.
    """
    try:
        return open_log(path)
    except OSError as error:
        raise Refused(f"can't write the log {path}: {error.strerror}. Choose another --log-file.") from error


def wait_until_ready(process: subprocess.Popen[bytes], config: Config, log_position: int) -> DaemonStatus:
    """Wait, saying for what.

    Raises:
        Refused: the process ended.
    """
    with saying(text := "starting") as say:
        while process.poll() is None:
            try:
                status = fetch_status(config.socket)
            except RootstockError:
                status = None
            if status is not None and status.pid != process.pid:
                text = DRAINING if status.state == "draining" else text
            elif status is not None:
                if status.state == "ready":
                    return status
                models = zip(told_apart(status.models), status.models, strict=True)
                loading = [f"{name} {model.loading.text}" for name, model in models if model.loading]
                text = "; ".join(loading) or "starting"
            say(text)
            time.sleep(POLL)
    assert config.log_file is not None
    with config.log_file.open("rb") as log:
        log.seek(log_position)
        words = log.read().decode(errors="replace").strip()
    if process.returncode == 0:
        raise Refused("the daemon was stopped before it was ready.")
    # the command in the background has said why in its last line or lines
    reason = words.rpartition("Error: ")[2] if "Error: " in words else words
    raise Refused(reason or f"the daemon ended with exit status {process.returncode} and said nothing.")


@contextlib.contextmanager
def daemon_process(socket: Path) -> Iterator[int]:
    """A pidfd of the daemon: of the process that listens on its control socket, as the kernel says.

    Raises:
        DaemonNotFoundError: there is none.
        NotAnsweringError: it accepts no connections.
    """
    path = control_socket(socket)
    try:
        sock = connect(path, FORCE_TIMEOUT)
    except TimeoutError as error:
        raise NotAnsweringError(f"rootstockd at {socket} accepts no connections.", "Find it with `ps`.") from error
    with contextlib.ExitStack() as stack:
        with sock:
            pid = peer_of(sock).pid
            if is_systemd(pid):
                raise NotAnsweringError(f"systemd listens at {path}.", "Have it done with systemctl.")
            process = -1
            with contextlib.suppress(OSError):  # it is gone, or pid is 0: in another namespace
                process = os.pidfd_open(pid)
                stack.callback(os.close, process)
            # while the connection stands, so does the process, and nobody else has its number
            if process < 0 or (select.select([sock], [], [], 0)[0] and not sock.recv(1, PEEK)):
                raise DaemonNotFoundError(f"no rootstockd answers at {path}: it has just gone.", START_HINT)
        yield process


def end(socket: Path, *, force: bool = False) -> None:
    """Stop a daemon and wait until its process is gone; with `force`, kill one that does not answer or does not end.

    Raises:
        RootstockError: there is none, or it does not answer.
    """
    with daemon_process(socket) as process, saying(DRAINING) as say:
        limit = FORCE_TIMEOUT if force else float("inf")
        try:
            request(socket, "POST", "/v1/stop", {"force": force}, timeout=FORCE_TIMEOUT)
        except ConnectionLostError:
            pass  # it was on its way down already
        except AccessDeniedError:
            raise
        except RootstockError:  # it does not answer, or has too many others to answer
            if not force:
                raise
            limit = 0.0
        while limit > 0 and not select.select([process], [], [], min(limit, QUIET))[0]:
            limit -= QUIET
            say(DRAINING)
        if not select.select([process], [], [], 0)[0]:
            try:
                signal.pidfd_send_signal(process, 0)  # may we?
                socket.unlink(missing_ok=True)  # or its successor would begin, where it is being restarted
                signal.pidfd_send_signal(process, signal.SIGKILL)
            except PermissionError as error:
                raise AccessDeniedError(
                    "the daemon does not end, and is another user's.", "As root: `rootstockd stop --force`."
                ) from error
            select.select([process], [], [])
