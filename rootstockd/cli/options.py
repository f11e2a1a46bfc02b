"""The options of `start` that are settings, for all commands that ask what they would come to."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from rootstock_client.runtime_dir import SOCKET_VARIABLE, named_path
from rootstockd.cli.clients import OptionPath, Refused, absolute, socket_option
from rootstockd.cli.common import catalogue_option, default_log_file, default_socket
from rootstockd.cli.completion import catalogue_models, devices, gpus
from rootstockd.host.devices import DeviceError, choose_devices
from rootstockd.settings.config import Config, Device, SettingsFile
from rootstockd.settings.config_layers import FILE_VARIABLE, find_files, make_config, read_again

Command = TypeVar("Command", bound=Callable[..., Any])

_CPU = (Device(name="cpu"),)
"""For settings to be whole before the devices are chosen, which takes a look at the machine."""


_OPTIONS = (
    click.option(
        "--gpu",
        metavar="0,1,...",
        shell_complete=gpus,
        help="The GPUs to use: numbers, UUIDs of GPUs or MIG instances, or `all`.",
    ),
    click.option(
        "--device",
        "names",
        multiple=True,
        metavar="NAME",
        shell_complete=devices,
        help="cpu, auto (a GPU if there is one), or the name of a device; may be given repeatedly.",
    ),
    click.option(
        "--model",
        "models",
        multiple=True,
        metavar="NAME",
        shell_complete=catalogue_models,
        help="Load this model now; may be given repeatedly.",
    ),
    catalogue_option,
    socket_option,
    click.option("--log-file", type=OptionPath(path_type=Path), callback=absolute, help="Where the log goes."),
    click.option("--max-atoms", type=click.IntRange(min=1), help="The most atoms in one message of one session."),
    click.option("--batch-atoms", type=click.IntRange(min=1), help="The most atoms in one pass over several sessions."),
    click.option(
        "--drain-timeout",
        type=click.FloatRange(min=0),
        help="Seconds that evaluations under way may take when it is stopped.",
    ),
    click.option(
        "--metrics",
        metavar="HOST:PORT",
        help="Address at which to serve metrics for Prometheus, such as 127.0.0.1:9746.",
    ),
    click.option(
        "--config",
        "file",
        type=OptionPath(path_type=Path, resolve_path=True),
        envvar=FILE_VARIABLE,
        show_envvar=True,
        help="A TOML file of settings, in place of the site's and the user's; options given here override it.",
    ),
    click.option(
        "--instance", metavar="NAME", help="The devices, as instances of systemd's units are named: 0, 0:1, cpu."
    ),
)


def settings_options(command: Command) -> Command:
    """Give a command the options; what they say is for `settings_said`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def settings_said(
    *,
    gpu: str | None,
    names: tuple[str, ...],
    models: tuple[str, ...],
    catalogues: tuple[Path, ...],
    socket: Path | None,
    file: Path | None,
    instance: str | None,
    **others: Any,
) -> Config:
    """What a daemon would be started with, by the command that is run, the environment and the files.

    Raises:
        ConfigError: keys or values are wrong.
        Refused, UsageError: there is no such device.
    """
    if instance is not None:
        gpu, names = devices_of(instance)
    if gpu is not None and names:
        raise click.UsageError("--gpu and --device can't be combined.")
    chosen = _choose(gpu, tuple(name for name in names if name != "auto")) if gpu is not None or names else None
    address = (socket or default_socket()).absolute()
    if click.get_current_context().get_parameter_source("socket") is ParameterSource.ENVIRONMENT:
        socket = None  # it is a setting's variable as well
    flags = {
        "socket": address if socket else None,
        "devices": chosen,
        "models": models or None,
        "catalogues": catalogues or None,
        **others,
    }
    files = find_files(file, address, instance)
    config = make_config(files, os.environ, flags, {"socket": default_socket(), "devices": _CPU})
    if "devices" not in config.origins:
        config = config.model_copy(update={"devices": _choose(None, ())})
    if config.log_file is None:
        config = config.model_copy(update={"log_file": default_log_file(config.socket)})
    return config


def settings_again(running: Config) -> Config:
    """What a running daemon would be started with again: as it was told, and by its files as they are now.

    Raises:
        ConfigError: keys or values are wrong, or a file that settings come from is gone.
        Refused: the devices that it would choose are not to be had.
    """
    config = read_again(running, {"socket": default_socket(), "devices": _CPU, "log_file": None})
    if "devices" in running.origins.keys() - config.origins.keys():
        config = config.model_copy(update={"devices": _choose(None, ())})
    if running.log_file is not None and config.log_file is None:
        config = config.model_copy(update={"log_file": default_log_file(config.socket)})
    return config


def _choose(gpus: str | None, names: tuple[str, ...]) -> tuple[Device, ...]:
    """The devices that were asked for, or else those of whoever names none."""
    try:
        return choose_devices(gpus=gpus, names=names)
    except DeviceError as error:
        raise Refused(error) from error
    except ValueError as error:
        raise click.UsageError(
            f"{gpus or ', '.join(names)!r} names no device; names are auto, cpu, cpu:1, "
            "cuda:1, and UUIDs (GPU-..., MIG-...)."
        ) from error


def files_to_read(
    named: Path | None = None, instance: str | None = None, socket: Path | None = None
) -> tuple[SettingsFile, ...]:
    """Where a daemon looks for settings that is started with no option but these."""
    if named is None and (said := os.environ.get(FILE_VARIABLE)):
        named = named_path(said)
    address = named_path(socket or os.environ.get(SOCKET_VARIABLE) or default_socket())
    return find_files(named, address, instance)


def devices_of(instance: str) -> tuple[str | None, tuple[str, ...]]:
    """The devices that an instance of systemd's units is named after, as --gpu and --device have them."""
    if instance in {"cpu", "auto"}:
        return None, (instance,)
    gpus = instance.split(":")
    if not all(gpu.isdecimal() or gpu.startswith(("GPU-", "MIG-")) for gpu in gpus):
        raise click.UsageError(f"the instance {instance!r} is neither GPUs (0, or 0:1, or a UUID) nor cpu nor auto.")
    return ",".join(gpus), ()
