"""Files that say what a daemon shall do: its settings, the catalogue, and the weights that this names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from rootstockd.doctor.findings import Finding, ok, problem, warning
from rootstockd.models.catalogue import Catalogue, CatalogueError
from rootstockd.settings.config import SettingsFile
from rootstockd.settings.config_layers import unknown_variables


def check_settings(
    files: tuple[SettingsFile, ...], problems: list[str], doubts: list[str], command: str
) -> Iterator[Finding]:
    """Whether a daemon could start with the settings that it would find.

    Args:
        files: where it looks for them.
        problems: what would keep it from starting.
        doubts: what it would warn of.
        command: what says the same again.
    """
    for text in unknown_variables(os.environ):
        yield warning("settings", text, "The setting that it was meant for is unchanged.", "rootstockd config show")
    for text in doubts:
        yield warning("settings", text, "A daemon starts without it.", command)
    for text in problems:
        yield problem("settings", text, "No daemon starts with it, or reloads it.", command)
    if not problems:
        yield from (ok("settings", str(file.path)) for file in files if os.access(file.path, os.R_OK))


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
