"""`start`, `stop`, `restart` and `reload`."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from rootstock_client.errors import DaemonNotFoundError, DrainingError, RootstockError
from rootstock_client.patience import PATIENCE_VARIABLE
from rootstock_client.runtime_dir import answers, control_socket, find_socket
from rootstock_client.sockets import connect
from rootstockd.cli.clients import Refused, socket_in_use, socket_option
from rootstockd.cli.common import (
    ask,
    console,
    default_log_file,
    default_socket,
    fetch_config,
    fetch_status,
    print_warnings,
)
from rootstockd.cli.ending import (
    FORCE_TIMEOUT,
    call_off_restart,
    daemon_process,
    end,
    end_unreachable,
    is_being_restarted,
    nothing_to_stop,
)
from rootstockd.cli.launching import launch, serve_in_front, stay_with
from rootstockd.cli.options import settings_again, settings_options, settings_said
from rootstockd.cli.successor import take_environment, take_limits
from rootstockd.cli.systemd_units import Unit, unit_at
from rootstockd.control.schema import ReloadReport, SessionStatus
from rootstockd.host.devices import DeviceError, found_devices
from rootstockd.host.peers import peer_of
from rootstockd.host.sockets import AddressError, claim_gpu, listen_tcp
from rootstockd.settings.config import Config
from rootstockd.settings.config_file import ConfigError
from rootstockd.settings.config_layers import unknown_variables
from rootstockd.users import user_name
from rootstockd.words import GOES_ON, so_many

_NAMED = 10
"""Processes of a user that are named, of those whose sessions a daemon leaves."""


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
    try:
        address = find_socket(socket)
    except DaemonNotFoundError as error:
        if not _stopped_unanswering(default_socket(), force=force):
            raise nothing_to_stop(error) from error
        return
    if unit := unit_at(address):
        left = _sessions_at(address) if unit.is_there else []
        unit.stop(force=force)
        console.print(f"stopped; `{' '.join(unit.systemctl)} start {unit.socket}` starts it again")
        _tell_left(left)
        return
    try:
        left = end(address, force=force).sessions
        gone = not address.exists() or call_off_restart(address, force=force)
        if not gone and answers(control_socket(address)):
            raise Refused("it has ended, but another has been started meanwhile: stop that one, too.")
    except DaemonNotFoundError as error:
        if not _stopped_unanswering(address, force=force):
            raise nothing_to_stop(error) from error
        return
    except RootstockError as error:
        raise Refused(error) from error
    console.print("stopped")
    _tell_left(left)


def _sessions_at(address: Path) -> list[SessionStatus]:
    """The sessions of a daemon that has yet to be stopped; none of one that does not answer."""
    with contextlib.suppress(RootstockError):
        return fetch_status(address, timeout=FORCE_TIMEOUT).sessions
    return []


def _tell_left(sessions: list[SessionStatus]) -> None:
    """Say whose sessions a daemon had that was stopped, if any."""
    if not sessions:
        return
    whose: dict[str, set[int]] = {}
    for session in sessions:
        whose.setdefault(session.user, set()).add(session.pid)
    users = [
        f"{user} (pid {', '.join(map(str, sorted(pids)[:_NAMED]))}{', ...' * (len(pids) > _NAMED)})"
        for user, pids in whose.items()
    ]
    click.echo(
        f"{so_many(len(sessions), 'session')} had it, of {', '.join(users)}; jobs wait for the next daemon as long as "
        f"their patience lasts ({PATIENCE_VARIABLE})",
        err=True,
    )


def _stopped_unanswering(address: Path, *, force: bool) -> bool:
    """Whether there was a daemon that does not answer at its address, and has been stopped.

    It has lost its socket, as to systemd, or is one that a restart has begun to start.
    """
    pid = end_unreachable(address, force=force)
    if pid is not None:
        console.print(f"stopped (pid {pid}, to which nobody could connect any more)")
        return True
    try:
        called_off = call_off_restart(address, force=force)
    except RootstockError as error:
        raise Refused(error) from error
    if called_off:
        console.print("stopped")
    return called_off


@click.command()
@socket_option
def restart(socket: Path | None) -> None:
    """Stop the daemon and start it again.

    With the same options, and its configuration as it is now. Where a new one could not start, the old one
    goes on.
    """
    address = socket_in_use(socket)
    if unit := unit_at(address):
        _check_unit(unit)
        unit.ask("restart", unit.service)
        return
    try:
        running = fetch_config(address)
        if running is None:
            raise Refused(f"{user_name(os.geteuid())} does not administer this daemon, and can't restart it.")
        check_own(address)
        with daemon_process(address) as process:
            named = address.exists()  # whoever removed it did not mean to stop the daemon
            take_environment(process)
            try:
                config = settings_again(in_background(running))
            except ConfigError as error:
                raise Refused(f"{error}\n{GOES_ON}") from error
            check_startable(config, running, take_limits(process))
            launch(config, after=process, named=named)
    except DaemonNotFoundError as error:
        if not is_being_restarted(address):
            raise Refused(error) from error
        already = DrainingError("the daemon is being restarted already.", "See `rootstockd status` in a moment.")
        raise Refused(already) from error
    except (RootstockError, ConfigError) as error:
        raise Refused(error) from error


def _check_unit(unit: Unit) -> None:
    """Whether a service of systemd's could start anew, as far as this user can see.

    Raises:
        Refused: it could not.
    """
    from rootstockd.cli.config import examined  # looks at all models  # noqa: PLC0415
    from rootstockd.cli.service import service_by  # noqa: PLC0415

    service = service_by(unit)
    if service is None or not service.is_administered or service.instance is None:
        return
    if problems := examined(None, service.instance).problems:
        anyway = f"`{' '.join(unit.systemctl)} restart {unit.service}` restarts it all the same."
        raise Refused("\n".join([*problems, GOES_ON, anyway]))


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


def check_startable(config: Config, running: Config, lacking: list[str]) -> None:
    """Whether a new daemon could take the place of one that runs.

    Args:
        config: the new one's settings.
        running: those of the one that runs.
        lacking: what else that one has, and the new one would not.

    Raises:
        Refused: it could not start, or would be elsewhere.
    """
    # imports what only `restart` needs
    from rootstockd.cli.config import look_over  # noqa: PLC0415

    if config.socket != running.socket:
        raise Refused(
            f"by {config.where('socket')} the socket is {config.socket} now. The daemon goes on at {running.socket}, "
            "where its jobs wait for it during a restart: `rootstockd stop` it and `start` one, or set `socket` back."
        )
    problems, _ = look_over(config)
    if not problems:
        problems = [*lacking, *_claimed(config, running)]
    if problems:
        raise Refused("\n".join(["a new daemon could not start, so the old one goes on:", *problems]))


def _claimed(config: Config, running: Config) -> Iterator[str]:
    """What others have of that which a new daemon takes and the one that runs has not got."""
    theirs: set[str] = set()
    with contextlib.suppress(DeviceError):  # one of them is gone
        theirs = {device.uuid for device in found_devices(running.devices)}
    for device in found_devices(config.devices):
        if device.kind == "cuda" and device.uuid not in theirs:
            try:
                with claim_gpu(device.uuid):
                    pass
            except AddressError as error:
                yield f"devices: {error}"
    ports = {(metrics or "").rpartition(":")[2] for metrics in (config.metrics, running.metrics)}
    if config.metrics is not None and len(ports) > 1:
        try:
            with listen_tcp(config.metrics):
                pass
        except AddressError as error:
            yield f"metrics: {error}"
