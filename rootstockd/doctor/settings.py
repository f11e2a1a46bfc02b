"""Files that say what a daemon shall do: its settings, the catalogue, and the weights that this names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from rootstockd.config_file import ConfigError, make_config
from rootstockd.doctor.findings import Finding, ok, problem, warning
from rootstockd.models.catalogue import Catalogue, CatalogueError


def check_settings(files: Iterable[Path], socket: Path) -> Iterator[Finding]:
    """Whether a daemon could start with each of the files that are there.

    Args:
        files: in TOML.
        socket: an address for a file that names none.
    """
    for path in files:
        if not path.exists():
            continue
        try:
            make_config({}, path, {"socket": socket, "devices": ("cpu",)})
        except ConfigError as error:
            yield problem("settings", str(error), "No daemon starts with it, or reloads it.", f"editor {path}")
        else:
            yield ok("settings", str(path))


def check_catalogue() -> Iterator[Finding]:
    """Whether the catalogue can be read, and its files are there."""
    try:
        catalogue = Catalogue.load()
    except CatalogueError as error:
        yield problem("catalogue", str(error), "No daemon starts, and no model is found.", "Mend the file as it says.")
        return
    wrong = catalogue.warnings()
    for text in wrong:
        yield warning("catalogue", text, "That model can't be loaded.", "rootstockd models verify")
    if not wrong:
        yield ok("catalogue", f"{sum(not entry.hidden for entry in catalogue.values())} models")
