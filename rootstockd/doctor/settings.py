"""Files that say what a daemon shall do: its settings, the catalogue, and the weights that this names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rootstockd.doctor.findings import Finding, ok, problem, warning
from rootstockd.models.catalogue import Catalogue, CatalogueError
from rootstockd.settings.config import SettingsFile
from rootstockd.settings.config_file import ConfigError
from rootstockd.settings.config_layers import make_config, unknown_variables


def check_settings(files: tuple[SettingsFile, ...], variables: Mapping[str, str], socket: Path) -> Iterator[Finding]:
    """Whether a daemon could start with the settings that it would find.

    Args:
        files: where it would look for them.
        variables: the environment.
        socket: an address where they name none.
    """
    for text in unknown_variables(variables):
        yield warning("settings", text, "The setting that it was meant for is unchanged.", "rootstockd config show")
    try:
        make_config(files, variables, {}, {"socket": socket, "devices": ("cpu",)})
    except ConfigError as error:
        for line in str(error).splitlines():
            yield problem("settings", line, "No daemon starts with it, or reloads it.", "rootstockd config check")
    else:
        yield from (ok("settings", str(file.path)) for file in files if file.path.exists())


def check_catalogue() -> Iterator[Finding]:
    """Whether the catalogue can be read, and its files are there."""
    try:
        catalogue = Catalogue.load()
    except CatalogueError as error:
        yield problem("catalogue", str(error), "No daemon starts, and no model is found, until that is fixed.")
        return
    wrong = catalogue.warnings()
    for text in wrong:
        yield warning("catalogue", text, "That model can't be loaded.", "rootstockd models verify")
    if not wrong:
        yield ok("catalogue", f"{sum(not entry.hidden for entry in catalogue.values())} models")
