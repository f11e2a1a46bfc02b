"""`config show` and `check`: what a daemon's settings are, where each comes from, and what is wrong with them."""

from __future__ import annotations

import grp
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import tomlkit
from click.core import ParameterSource

from rootstock_client.errors import ModelLoadError, RootstockError
from rootstock_client.runtime_dir import SYSTEM_DIR, is_private, too_long
from rootstockd.cli.clients import Refused, socket_in_use
from rootstockd.cli.common import console, default_socket, fetch_config, json_option, print_warnings
from rootstockd.cli.options import devices_of, files_to_read, settings_again, settings_options, settings_said
from rootstockd.cli.service import service_at, service_of
from rootstockd.cli.systemd_units import unit_at
from rootstockd.host.devices import DeviceError, choose_devices, found_devices
from rootstockd.host.log_file import check_folder, check_log
from rootstockd.host.sockets import AddressError, check_host
from rootstockd.models.availability import not_loadable
from rootstockd.models.catalogue import Catalogue, CatalogueError
from rootstockd.sessions.accounts import Accounts
from rootstockd.settings.config import Config, Device, SettingsFile
from rootstockd.settings.config_file import ConfigError, reloadable
from rootstockd.settings.config_layers import as_table, by_name, changes, make_config, unknown_variables
from rootstockd.users import user_name

_COLUMN = 60
"""Remarks stand below each other, but for settings that are longer than this."""


@click.group()
def config() -> None:
    """A daemon's settings, and where each comes from.

    docs/configuration.md has all of them.
    """


@config.command()
@settings_options
@click.option(
    "--running", is_flag=True, help="The settings of the running daemon, and what has changed in its files since."
)
@click.option("--origins/--no-origins", default=True, help="Say where each comes from.  [default: origins]")
@json_option
def show(running: bool, origins: bool, as_json: bool, socket: Path | None, **said: Any) -> None:
    """Show what `rootstockd start` would use with these options, as TOML."""
    problems = ""
    if running:
        _refuse_others()
        settings = settings_of(socket_in_use(socket))
        try:
            fresh = settings_again(settings)
        except ConfigError as error:
            fresh, problems = settings, str(error)
    else:
        try:
            fresh = settings = settings_said(socket=socket, **said)
        except ConfigError as error:
            raise Refused(error) from error
    changed = {name: _change(name, fresh) for name in changes(settings, fresh)}
    if as_json:
        known = {"settings": as_table(settings), "origins": settings.origins, "files": _files(settings)}
        click.echo(json.dumps({**known, "changed": changed} if running else known, indent=2))
    else:
        click.echo(as_toml(settings, changed, origins=origins), nl=False)
    if problems:
        raise Refused(f"its files can't be read again as they are now:\n{problems}")


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path, resolve_path=True))
@click.option("--instance", metavar="NAME", help="The systemd instance they are for: 0, 0:1, cpu.")
def check(file: Path | None, instance: str | None) -> None:
    """Check whether a daemon could start with its settings.

    They are those of the files that it would read, or of FILE in place of them. Variables are checked as well, and so
    are catalogues, models, devices, users and groups that the settings name, and where the sockets, the log and the
    metrics go.
    """
    print_warnings(unknown_variables(os.environ))
    looked = examined(file, instance)
    print_warnings([*looked.doubts, *looked.closed()])
    if looked.problems:
        raise Refused("\n".join(looked.problems))
    there = [str(place.path) for place in looked.files if os.access(place.path, os.R_OK)]
    good = "a daemon can start with" if looked.doubts else "nothing is wrong with"
    if there:
        console.print(f"{good} {', '.join(there)}")
    elif not looked.closed():
        console.print(f"there is no {' or '.join(str(place.path) for place in looked.files)}, and none is needed")


@dataclass(frozen=True)
class Examined:
    """What is to be said of the settings of a daemon that is not there yet."""

    files: tuple[SettingsFile, ...]
    problems: list[str]
    """What would keep it from starting."""
    doubts: list[str]
    """What it would warn of."""

    def closed(self) -> list[str]:
        """What is said of files that this user may not read, and does without."""
        paths = (place.path for place in self.files if place.others and os.path.exists(place.path))
        return [
            f"{user_name(os.geteuid())} may not read {path}: what is wrong with it is not known, and a daemon of yours "
            "does without it"
            for path in paths
            if not os.access(path, os.R_OK)
        ]


def examined(file: Path | None, instance: str | None) -> Examined:
    """Look at all that a daemon would be started with.

    Args:
        file: in place of the files that it would read.
        instance: which of systemd's instances it is.
    """
    devices, problems = (None, []) if instance is None else _devices_for(instance)
    # where its unit says, whatever the settings say
    socket = None if instance is None else default_socket().with_name(f"{instance}.sock")
    files = files_to_read(file, instance, socket)
    defaults = {"socket": default_socket(), "devices": [Device(name="cpu")]}
    try:
        settings = make_config(files, os.environ, {"socket": socket, "devices": devices}, defaults)
    except ConfigError as error:
        problems += str(error).splitlines()
        if error.rest is None:
            return Examined(files, problems, [])
        settings = error.rest
    found, doubts = look_over(settings)
    service = service_at(settings.socket) if instance is None else service_of(instance)
    if service is not None:
        found += service.problems(settings, given=file)
    return Examined(files, problems + found, [*Accounts(settings).warnings, *doubts])


def _devices_for(instance: str) -> tuple[tuple[Device, ...], list[str]]:
    """The devices that an instance goes before the files with, and what is wrong with them."""
    gpu, names = devices_of(instance)
    try:
        return choose_devices(gpus=gpu, names=() if names == ("auto",) else names), []
    except DeviceError as error:
        return (Device(name="cpu"),), [f"devices: {error}"]  # to look at all else


def settings_of(socket: Path) -> Config:
    """What a daemon that runs has.

    Raises:
        Refused: it does not answer, or not to this user.
    """
    try:
        settings = fetch_config(socket)
    except RootstockError as error:
        raise Refused(error) from error
    if settings is None:
        raise Refused(f"only those who administer rootstockd at {socket} may see its settings.")
    return settings


def look_over(settings: Config) -> tuple[list[str], list[str]]:
    """What would keep a daemon from starting, though its settings are right as such, and what it would warn of.

    But for what changes from moment to moment: whether somebody has its socket, its port or its GPU.
    """
    problems = []
    try:
        found_devices(settings.devices)
    except DeviceError as error:
        problems.append(f"devices: {error}")
    group = settings.access.socket_group
    try:
        if group is not None:
            grp.getgrnam(group)
    except KeyError:
        problems.append(f"access.socket_group: there is no group {group!r} on this machine.")
    problems += _problems_of_places(settings)
    try:
        catalogue = Catalogue.load(settings.catalogues, settings.where("catalogues"))
    except CatalogueError as error:
        return [*problems, str(error)], []
    errors = not_loadable(settings.models, catalogue)
    missing = [f"models: {error}" for error in errors if isinstance(error, ModelLoadError)]
    problems += [f"models: {error}" for error in errors if not isinstance(error, ModelLoadError)]
    if len(errors) < len(settings.models):  # a daemon starts with the others
        return problems, [*catalogue.warnings(), *missing]
    return problems + missing, catalogue.warnings()


def _problems_of_places(settings: Config) -> Iterator[str]:
    """What keeps the sockets, metrics and the log from being where they shall."""
    yield from _problems_of_sockets(settings)
    try:
        if settings.metrics is not None:
            check_host(settings.metrics)
    except AddressError as error:
        yield f"metrics: {error}"
    try:
        if settings.log_file is not None:
            check_log(settings.log_file)
    except OSError as error:
        yield f"log_file: can't write {settings.log_file}: {error.strerror}."


def _problems_of_sockets(settings: Config) -> Iterator[str]:
    address, folder = settings.socket, settings.socket.parent
    # systemd's own may be links to where it listens (Symlinks=)
    for path in (address, settings.control):
        if problem := too_long(path):
            yield f"socket: {problem}"
        elif os.path.lexists(path) and not stat.S_ISSOCK(path.lstat().st_mode) and not unit_at(path):
            yield f"socket: {path} is not a socket, and a daemon leaves it alone."
    try:
        check_folder(address)
    except OSError as error:
        yield f"socket: can't make {address}: {error.strerror}."
    else:  # the system's may be of the user whom systemd starts its daemon as
        if folder != SYSTEM_DIR and os.path.lexists(folder) and not is_private(folder, os.getuid(), 0):
            yield f"socket: the folder {folder} belongs to somebody else, or others may write to it."


def as_toml(settings: Config, changed: dict[str, dict[str, Any]], *, origins: bool) -> str:
    """Settings as a file that would have them so, with what there is to say of each behind it."""
    lines = [f"# {place['path']}{'' if place['there'] else ' (not there)'}" for place in _files(settings) if origins]
    for table, values in _tables(as_table(settings)):
        if table:
            lines += ["", f"[{tomlkit.key(table).as_string()}]"]
        shown = [_assignment(name, value) for name, value in values.items()]
        column = max((len(text) for text in shown if len(text) <= _COLUMN), default=0)
        for name, text in zip(values, shown, strict=True):
            whole = ".".join((*table, name))
            remarks = [settings.origins.get(whole, "default")] if origins else []
            if whole in changed:
                remarks.append(_in_words(changed[whole]))
            lines.append(f"{text:{column}}  # {'; '.join(remarks)}" if remarks else text)
    for name in sorted(changed.keys() - by_name(settings).keys()):  # of users who were not mentioned
        lines.append(f"# {name}: {_in_words(changed[name])}")
    return "\n".join(lines) + "\n"


def _in_words(change: dict[str, Any]) -> str:
    value = "not set" if change["value"] is None else tomlkit.item(change["value"]).as_string()
    return f"{value} ({change['origin']}) after a {change['needs']}"


def _tables(table: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Each table that has values of its own, with them."""
    if values := {name: value for name, value in table.items() if not isinstance(value, dict)}:
        yield path, values
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _tables(value, (*path, name))


def _assignment(name: str, value: Any) -> str:
    key = tomlkit.key(name).as_string()
    return f"# {key} is not set" if value is None else f"{key} = {tomlkit.item(value).as_string()}"


def _change(name: str, fresh: Config) -> dict[str, Any]:
    """What a setting will be."""
    return {
        "value": by_name(fresh).get(name),
        "origin": fresh.origins.get(name, "default"),
        "needs": "reload" if reloadable(name) else "restart",
    }


def _files(settings: Config) -> list[dict[str, Any]]:
    return [{"path": str(file.path), "there": os.path.exists(file.path)} for file in settings.files]


def _refuse_others() -> None:
    """Options that mean nothing for a daemon that runs."""
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if given - {"running", "origins", "as_json", "socket"}:
        raise click.UsageError(
            "--running shows the settings of the running daemon; of the other options it takes only --socket."
        )
