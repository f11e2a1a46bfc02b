"""Whether a model can be loaded here, and what it lacks."""

from __future__ import annotations

import os
from collections.abc import Iterable

from rootstock_client.errors import ModelLoadError, UnknownModelError
from rootstockd.environments.finding import has_environment
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.models.store import weights_of
from rootstockd.models.whole_files import StoreError
from rootstockd.settings.state_dir import StateError


def located(name: str, entry: Entry) -> Entry:
    """The entry with the weights that workers load, where they are to be pulled.

    Raises:
        ModelLoadError: they have not been.
    """
    if entry.weights is not None or not entry.url:
        return entry
    try:
        stored = weights_of(name, entry)
    except (StateError, StoreError) as error:
        raise ModelLoadError(f"model {name!r}: {error}") from error
    if stored is None:
        raise ModelLoadError(
            f"the weights of model {name!r} are not on this machine.",
            f"Whoever runs the daemon gets them with `rootstockd models pull {name}`; it finds them without a restart.",
        )
    record = stored.record
    loaded = record.loaded.sha256
    sums = {"sha256": loaded, "original_sha256": record.original.sha256, "converted_sha256": loaded}
    return entry.model_copy(update={"weights": stored.weights, **sums})


def not_to_preload(names: Iterable[str], catalogue: Catalogue) -> list[UnknownModelError | ModelLoadError]:
    """Why a daemon can't load some of the models that it is to load at its start.

    There is no such model, without which it does not start; or the weights are not here, and it starts if others' are.
    """
    missing: list[UnknownModelError | ModelLoadError] = []
    for name in names:
        try:
            located(*catalogue.resolve(name))
        except (UnknownModelError, ModelLoadError) as error:
            missing.append(error)
    return missing


def lack(name: str, entry: Entry) -> str:
    """What keeps workers from loading a model, in a word or two; empty if nothing."""
    try:
        weights = located(name, entry).weights
    except ModelLoadError:
        return "to pull"
    if weights is not None and not os.path.isfile(weights):  # noqa: PTH113 - says no where one may not look
        return "missing"
    return "" if has_environment(*entry.place) else "needs env"
