"""Settings from a TOML file, whose keys are those of `Config`."""

from __future__ import annotations

import difflib
import sys
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from rootstockd.config import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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
"""Settings that a running daemon takes over when it reads its file again."""


class ConfigError(Exception):
    """A setting that can't be used: where it stands, and what is wrong with it."""


def read_config_file(path: Path) -> dict[str, Any]:
    """The settings in a file, unchecked.

    Raises:
        ConfigError: there is no such file, or it is no TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"configuration {path}: {error}") from error


def make_config(flags: dict[str, Any], file: Path | None, defaults: dict[str, Any]) -> Config:
    """A daemon's settings.

    Args:
        flags: what the command line says; goes before the file. None stands for what it does not say.
        file: the file.
        defaults: what holds where neither says anything.

    Raises:
        ConfigError: a key or a value is wrong.
    """
    given = _read(file) if file else {}
    said = {key: value for key, value in flags.items() if value is not None}
    return _validate({**defaults, **given, **said, "file": file, "flags": tuple(said)}, given, file)


def read_again(config: Config) -> Config:
    """A daemon's settings as they would be if it were started again, with the same command and its file as it is now.

    Raises:
        ConfigError: a key or a value is wrong, or the file is gone.
    """
    if config.file is None:
        return config
    given = {key: value for key, value in _read(config.file).items() if key not in config.flags}
    kept = config.model_dump(include={"file", "flags", "socket", "devices", "log_file", *config.flags})
    return _validate({**kept, **given}, given, config.file)


def _read(file: Path) -> dict[str, Any]:
    """The settings in a file; relative paths start where it lies."""
    given = read_config_file(file)
    for name in ("socket", "log_file"):
        if isinstance(given.get(name), str):
            given[name] = file.parent / given[name]
    if isinstance(given.get("catalogues"), list):
        given["catalogues"] = [file.parent / path if isinstance(path, str) else path for path in given["catalogues"]]
    return given


def _validate(fields: dict[str, Any], given: dict[str, Any], file: Path | None) -> Config:
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = f"configuration {file}: " if file and first["loc"][0] in given else ""
        raise ConfigError(f"{place}{describe(first)}") from error


def describe(problem: Any) -> str:
    """A pydantic error in a line, with the nearest right key for a wrong one."""
    *parents, key = problem["loc"]
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return f"{where}: {problem['msg']}."
    model: Any = Config
    for parent in parents:
        if parent in model.model_fields:  # else it is a key of our user's own choice, such as a login name
            kind = model.model_fields[parent].annotation
            model = (get_args(kind) or (kind,))[-1]
    near = difflib.get_close_matches(str(key), model.model_fields, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; there are: {', '.join(model.model_fields)}."
    return f"there is no setting {where!r}{hint}"
