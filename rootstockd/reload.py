"""What a reload reads: the settings and the models, as files have them now."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from rootstock_client.errors import RootstockError
from rootstockd.host.threads import in_thread
from rootstockd.models.availability import not_to_preload
from rootstockd.models.catalogue import Catalogue
from rootstockd.settings.config import Config
from rootstockd.settings.config_file import ConfigError
from rootstockd.settings.config_layers import read_again

PATIENCE = 5.0
"""Seconds within which the files must have come."""


class Files(NamedTuple):
    """What they say."""

    settings: Config
    catalogue: Catalogue
    missing: list[RootstockError]
    """Why models can't be loaded that are to be from the start."""


async def read_files(config: Config) -> Files:
    """Read them in a thread: a file system that does not answer is in nobody's way.

    Args:
        config: the daemon's settings until now.

    Raises:
        ConfigError, CatalogueError: something in them is wrong, or they can't be read in time.
    """

    def read() -> Files:
        settings = read_again(config)
        catalogue = Catalogue.load(settings.catalogues, settings.where("catalogues"))
        return Files(settings, catalogue, [*not_to_preload(settings.models, catalogue)])

    try:
        return await asyncio.wait_for(in_thread(read), PATIENCE)
    except asyncio.TimeoutError as error:
        raise ConfigError(
            f"the files that settings and models come from could not be read within {PATIENCE:g} s: see whether their "
            "file systems answer (`df`), then reload again"
        ) from error
