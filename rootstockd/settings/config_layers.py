"""A daemon's settings put together from files, variables and the command line, and where each comes from.

The later goes before the earlier, setting by setting, also within a table; a list is taken whole:

1. defaults;
2. the site's file, `/etc/rootstockd/config.toml`, and for one of several daemons `/etc/rootstockd/INSTANCE.toml`;
3. for a daemon that a user runs for themselves the user's files, of the same names in `~/.config/rootstockd`;
4. or, in place of all of these, the file that `--config` names;
5. variables, `ROOTSTOCKD_LIMITS__SESSIONS`;
6. the command line.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, get_origin

import platformdirs
from pydantic import ValidationError

from rootstock_client.patience import PATIENCE_VARIABLE
from rootstock_client.runtime_dir import SYSTEM_DIR, named_path
from rootstockd.settings import state_dir
from rootstockd.settings.config import COMMAND_LINE, Config, Settings, SettingsFile
from rootstockd.settings.config_file import (
    FILE_NAME,
    ConfigError,
    all_settings,
    checked,
    describe,
    read_config_file,
    reloadable,
)

PREFIX = "ROOTSTOCKD_"
FILE_VARIABLE = "ROOTSTOCKD_CONFIG"
"""An environment variable: the file, as `--config` names it."""
OTHER_VARIABLES = (
    FILE_VARIABLE,
    PATIENCE_VARIABLE,
    state_dir.VARIABLE,
    state_dir.SITE_VARIABLE,
    state_dir.MIRROR_VARIABLE,
)
"""Those that are no settings of a daemon."""

_Paths: TypeAlias = dict[tuple[str, ...], Any]
"""Settings by their paths; a list is one value."""

VARIABLES = {
    PREFIX + "__".join(path).upper(): path
    for path, field in all_settings()
    if get_origin(field.annotation) not in (dict, tuple)
}
"""Variables of the settings that are one value each."""


def find_files(named: Path | None, socket: Path, instance: str | None = None) -> tuple[SettingsFile, ...]:
    """Where a daemon's settings are looked for.

    Args:
        named: the file that was named for it, which is then the only one.
        socket: where it will listen, as far as the command line and variables say.
        instance: which of several daemons it is.
    """
    if named is not None:
        return (SettingsFile(path=named, named=True),)
    names = [FILE_NAME, *([f"{instance}.toml"] if instance else [])]
    if os.geteuid() == 0 or socket.parent == SYSTEM_DIR:
        return tuple(SettingsFile(path=state_dir.site_folder() / name) for name in names)
    own = platformdirs.user_config_path("rootstockd")
    site = SettingsFile(path=state_dir.site_folder() / FILE_NAME, others=True)
    return (site, *(SettingsFile(path=own / name) for name in names))


def make_config(
    files: tuple[SettingsFile, ...],
    variables: Mapping[str, str],
    flags: Mapping[str, Any],
    defaults: Mapping[str, Any],
) -> Config:
    """A daemon's settings.

    Args:
        files: where to look for them, the weakest first.
        variables: the environment.
        flags: what the command line says. None stands for what it does not say.
        defaults: what holds where nobody says anything.

    Raises:
        ConfigError: keys or values are wrong; it has all of them, and in `rest` a Config without them.
    """
    problems: list[str] = []
    said: _Paths = {}
    origins: dict[tuple[str, ...], str] = {}
    for name, path in VARIABLES.items():
        if value := variables.get(name):
            given: Any = named_path(value) if path in {("socket",), ("log_file",)} else value
            right, wrong = checked(_nested({path: given}))
            problems += (f"{name}: {text}" for text in wrong)
            said.update(_paths(right))
            origins[path] = name
    right, wrong = checked({name: value for name, value in flags.items() if value is not None})
    problems += wrong
    flagged = dict(_paths(right))
    said.update(flagged)
    origins.update(dict.fromkeys(flagged, COMMAND_LINE))
    return _combine(files, dict(_paths(defaults)), said, origins, problems)


def read_again(config: Config, defaults: Mapping[str, Any] | None = None) -> Config:
    """A daemon's settings as they would be if it were started again, with its files as they are now.

    Args:
        config: its settings.
        defaults: what holds, of what is found out at the start, where a file said it and says it no more. Without them
            it stays as it is, as for a daemon that can't take it over anyway.

    Raises:
        ConfigError: keys or values are wrong, or a file that settings come from is gone.
    """
    if not config.files:
        return config
    values = dict(_paths(config.model_dump(include=set(Settings.model_fields))))
    places = {str(file.path) for file in config.files}
    used = set(config.origins.values())
    # who may use the daemon may be in it: it had better not be open to all because of a slip
    problems = [
        f"configuration {file.path}: it is gone; if nothing in it shall hold any more, leave an empty file there."
        for file in config.files
        if str(file.path) in used and not file.named and not os.path.lexists(file.path)
    ]
    origins = {
        path: origin
        for name, origin in config.origins.items()
        if origin not in places and (path := tuple(name.split("."))) in values  # a newer version has more
    }
    found_out: _Paths = {(name,): values[name,] for name in ("socket", "devices", "log_file")}
    found_out.update(((name,), value) for name, value in (defaults or {}).items() if config.origins.get(name) in places)
    return _combine(config.files, found_out, {path: values[path] for path in origins}, origins, problems)


def take_over(running: Config, fresh: Config) -> Config:
    """What a running daemon goes on with after a reload: what it can't take over stays as it was."""
    old, new = (config.model_dump(include=set(Settings.model_fields)) for config in (running, fresh))
    values = {path: value for path, value in _paths(old) if not reloadable(_name(path))}
    values.update((path, value) for path, value in _paths(new) if reloadable(_name(path)))
    origins = {name: origin for name, origin in running.origins.items() if not reloadable(name)}
    origins.update((name, origin) for name, origin in fresh.origins.items() if reloadable(name))
    return Config.model_validate({**_nested(values), "files": fresh.files, "origins": origins})


def as_table(config: Config) -> dict[str, Any]:
    """The settings as a file would have them, None for those that are not set."""
    values = config.model_dump(mode="json", include=set(Settings.model_fields))
    users = {name: own.model_dump(exclude_none=True) for name, own in config.users.items()}
    return {**values, "devices": [*map(str, config.devices)], "users": users}


def by_name(config: Config) -> dict[str, Any]:
    """Settings by their names, such as `limits.sessions`."""
    return {_name(path): value for path, value in _paths(as_table(config))}


def changes(running: Config, fresh: Config) -> list[str]:
    """The names of the settings that differ."""
    old, new = by_name(running), by_name(fresh)
    return [name for name in {**old, **new} if old.get(name) != new.get(name)]


def unknown_variables(variables: Iterable[str]) -> list[str]:
    """What there is to say of variables that look like ours, and mean nothing."""
    known = [name.removeprefix(PREFIX) for name in (*VARIABLES, *OTHER_VARIABLES)]
    others = {"__".join(path).upper(): _name(path) for path, _ in all_settings()}
    warnings = []
    for name in sorted(name.removeprefix(PREFIX) for name in variables if name.startswith(PREFIX)):
        if name in known:
            continue
        hint = "."
        if name in others:
            hint = f": {others[name]!r} is more than one value, and set in a file."
        elif near := difflib.get_close_matches(name, known, n=1, cutoff=0.7):
            hint = f"; did you mean {PREFIX}{near[0]}?"
        warnings.append(f"the variable {PREFIX}{name} has no effect{hint}")
    return warnings


def _combine(
    files: tuple[SettingsFile, ...],
    values: _Paths,
    said: _Paths,
    said_by: Mapping[tuple[str, ...], str],
    problems: list[str],
) -> Config:
    """Defaults, with files over them, and what was said over these."""
    origins: dict[tuple[str, ...], str] = {}
    for file in files:
        try:
            read = read_config_file(file)
        except ConfigError as error:
            problems.append(str(error))
            read = error.rest or {}
        given = dict(_paths(read))
        values.update(given)
        origins.update(dict.fromkeys(given, str(file.path)))
    where = {_name(path): origin for path, origin in {**origins, **said_by}.items()}
    try:
        config = Config.model_validate({**_nested({**values, **said}), "files": files, "origins": where})
    except ValidationError as error:
        raise ConfigError("\n".join([*problems, *describe(error)])) from error
    if problems:
        raise ConfigError("\n".join(problems), config)
    return config


def _paths(table: Mapping[str, Any], parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _paths(value, (*parents, name))
        else:
            yield (*parents, name), value


def _nested(values: _Paths) -> dict[str, Any]:
    tables: dict[str, Any] = {}
    for (*parents, name), value in values.items():
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[name] = value
    return tables


def _name(path: tuple[str, ...]) -> str:
    return ".".join(path)
