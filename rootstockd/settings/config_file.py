"""Settings from a TOML file, whose keys are those of `Settings`, and the words for those that are wrong."""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from rootstockd.settings.config import Device, Settings, SettingsFile
from rootstockd.settings.state_dir import StateError, check_links, check_trusted
from rootstockd.settings.toml_file import read_toml
from rootstockd.settings.validation import in_words
from rootstockd.users import group_name, user_name

FILE_NAME = "config.toml"
"""What the settings of a site and of a user are called in their folders."""

RELOADED = {
    "access",
    "limits",
    "users",
    "catalogues",
    "max_sessions",
    "total_atoms",
    "drain_timeout",
    "keep_alive",
    "device_memory",
    "room_timeout",
    "metrics_users",
}
"""Settings that a running daemon takes over when it reads its files again."""
_NOT_RELOADED = "access.socket_group"

_OF_THE_SITES_DAEMONS = ("access", "socket", "log_file", "metrics", "metrics_users")
"""What a site's file says of the site's daemons alone. A user's own is nobody else's to open, whatever it says, and the
port for metrics is taken."""
_DESCRIBED = 50
"""Settings that are wrong, of which each is told."""
_LONGEST = 100
"""Characters of a key that are shown."""
_ANYTHING = {"socket": "/socket", "devices": ["cpu"]}
"""For what has no default, when a part of the settings is checked alone."""


class ConfigError(Exception):
    """Settings that can't be used: where each stands, and what is wrong with it, in a line for each.

    Args:
        words: these lines.
        rest: the settings that are right, for whoever wants to know what else is wrong.
    """

    def __init__(self, words: str, rest: Any = None) -> None:
        super().__init__(words)
        self.rest = rest


def reloadable(name: str) -> bool:
    """Whether a running daemon takes a setting over; `limits.sessions` is one in a table."""
    return name.partition(".")[0] in RELOADED and name != _NOT_RELOADED


def all_settings(model: Any = Settings, parents: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Each setting by its path, tables resolved: `("limits", "sessions")`. `users` is one, whoever is in it."""
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from all_settings(field.annotation, (*parents, name))
        else:
            yield (*parents, name), field


def read_config_file(file: SettingsFile) -> dict[str, Any]:
    """What a file sets, checked; relative paths start where it lies. Nothing if it is not there and need not be.

    Raises:
        ConfigError: it is missing, or a link to what is; it is no TOML, could be written by others, or has keys or
            values that are wrong; `rest` has the others.
    """
    try:
        given = _load(file)
    except FileNotFoundError as error:
        if not file.named:
            return {}
        raise ConfigError(f"configuration {file.path}: {error.strerror}.") from error
    except PermissionError as error:
        if file.others:
            return {}
        raise ConfigError(not_readable(file.path, user_name(os.geteuid()), group_name(os.getegid()))) from error
    except (OSError, ValueError, StateError) as error:
        raise ConfigError(f"configuration {file.path}: {error}") from error
    for name in given.keys() & {"socket", "log_file"}:
        given[name] = _placed(given[name], file)
    if isinstance(given.get("catalogues"), list):
        given["catalogues"] = [_placed(path, file) for path in given["catalogues"]]
    right, problems = checked(given)
    right = {name: value for name, value in right.items() if not (file.others and name in _OF_THE_SITES_DAEMONS)}
    if problems:
        raise ConfigError("\n".join(f"configuration {file.path}: {text}" for text in problems), right)
    return right


def not_readable(path: Path, user: str, group: str) -> str:
    """What is said of a file that the daemon's user, who has this group, may not read."""
    return f"configuration {path}: {user} may not read it: chgrp {group} {path}; chmod 640 {path}"


def _placed(path: Any, file: SettingsFile) -> Any:
    """A path of a file, whole; `~` is a home. What is none is left to be refused."""
    if not path or not isinstance(path, str) or "\0" in path:
        return path
    return file.path.parent / os.path.expanduser(path)  # noqa: PTH111


def _load(file: SettingsFile) -> dict[str, Any]:
    check_links(file.path)
    if not file.named:
        check_trusted(file.path.parent)
        check_trusted(file.path)

    def check(status: os.stat_result) -> None:
        # a file that was named is its user's choice, whoever owns it; but what all may write is nobody's choice
        if stat.S_ISREG(status.st_mode) and status.st_mode & stat.S_IWOTH:
            raise StateError(f"all users may write to it, so it is not used: chmod o-w {file.path}")

    return read_toml(file.path, check)


def checked(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The settings that are right, and what is wrong with the others, a line of words for each."""
    try:
        Settings.model_validate({**_ANYTHING, **given})
    except ValidationError as error:
        right = _copied(given)
        for problem in error.errors(include_url=False):
            _remove(right, problem["loc"])
        return right, describe(error)
    return given, []


def _copied(table: dict[str, Any]) -> dict[str, Any]:
    """A table and those in it, but no lists."""
    return {name: _copied(value) if isinstance(value, dict) else value for name, value in table.items()}


def _remove(table: dict[str, Any], place: tuple[int | str, ...]) -> None:
    """Take out of a table what stands there; of a list the whole."""
    *parents, name = map(str, place)
    for parent in parents:
        if not isinstance(inner := table.get(parent), dict):
            name = parent
            break
        table = inner
    table.pop(name, None)


def _place(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """Where an error of pydantic's stands, without what it says of a union's members."""
    kind: Any = Settings
    for depth, part in enumerate(location):
        if kind is Device:  # which its name stands for
            return tuple(map(str, location[:depth]))
        if fields := getattr(kind, "model_fields", None):
            kind = fields[part].annotation if part in fields else None
        elif get_origin(kind) in (dict, tuple):
            kind = next(argument for argument in reversed(get_args(kind)) if argument is not ...)
        elif kind is not None:
            return tuple(map(str, location[:depth]))
    return tuple(map(str, location))


def describe(error: ValidationError) -> list[str]:
    """An error of pydantic's as a line for each setting, with the nearest right key for a wrong one."""
    lines: dict[tuple[str, ...], str] = {}
    for problem in error.errors(include_url=False):
        place = _place(problem["loc"])
        if len(lines) == _DESCRIBED and place not in lines:
            return [*lines.values(), "more is wrong than is listed here."]
        if problem["type"] == "extra_forbidden":
            lines[place] = _unknown(place)
        elif place in lines and problem["type"] == "literal_error":  # the other member of a union
            lines[place] = f"{lines[place][:-1]}; it can also be {problem['ctx']['expected']}."
        else:
            lines[place] = f"{in_words(problem, '.'.join(place))}."
    return [*lines.values()]


def _unknown(place: tuple[str, ...]) -> str:
    *parents, key = place
    model: Any = Settings
    for parent in parents:
        if parent in model.model_fields:  # else it is a key of our user's own choice, such as a login name
            kind = model.model_fields[parent].annotation
            model = (get_args(kind) or (kind,))[-1]
    elsewhere = [".".join(path) for path, _ in all_settings() if path[-1] == key]
    beside = difflib.get_close_matches(key, model.model_fields, n=1)
    near = elsewhere or [".".join((*parents, name)) for name in beside]
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(model.model_fields)}."
    return f"there is no setting {'.'.join(place)[:_LONGEST]!r}{hint}"
