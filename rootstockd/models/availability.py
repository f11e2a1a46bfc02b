"""Whether a model can be loaded here, and what it lacks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from importlib import metadata

from rootstock_client.errors import ModelLoadError, UnknownModelError
from rootstockd.environments.finding import Environment, find_environment
from rootstockd.host.threads import within
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.models.spec import spec_of
from rootstockd.models.store import weights_of
from rootstockd.models.whole_files import StoreError
from rootstockd.settings.state_dir import StateError
from rootstockd.worker.engines import ase
from rootstockd.worker.engines.loading import ENTRY_POINTS, FAMILIES
from rootstockd.worker.files import is_file

DISK_PATIENCE, FIRST_PATIENCE = 0.3, 3.0
"""Seconds for which a daemon's loop waits for a disk, where it knows what was there before, and where it does not."""


def _is_pulled(entry: Entry) -> bool:
    return entry.weights is None and bool(entry.url)


def located(name: str, entry: Entry) -> Entry:
    """The entry with the weights that workers load, where they are to be pulled.

    Raises:
        ModelLoadError: they have not been.
    """
    if not _is_pulled(entry):
        return entry
    try:
        stored = weights_of(name, entry)
    except (StateError, StoreError) as error:
        raise ModelLoadError(f"model {name!r}: {error}") from error
    if stored is None:
        raise ModelLoadError(
            f"the weights of model {name!r} are not on this machine.",
            f"Whoever runs the daemon gets them with `rootstockd models pull {name}`; a running daemon finds "
            "them without a restart.",
        )
    record = stored.record
    loaded = record.loaded.sha256
    sums = {"sha256": loaded, "original_sha256": record.original.sha256, "converted_sha256": loaded}
    return entry.model_copy(update={"weights": stored.weights, **sums})


class Locations:
    """Where weights are that were pulled, for an event loop: INITs wait for a disk that does not answer but once.

    While it does not, what was there before counts.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Entry, Entry]] = {}
        """By the model's name: the entry, and the same with its weights."""
        self._looking = False
        """A look has not come back."""

    def located(self, name: str, entry: Entry) -> Entry:
        """As the function of this name does.

        Raises:
            ModelLoadError: weights have not been pulled, or no disk says where they are.
        """
        if not _is_pulled(entry):
            return entry
        before, known = self._known.get(name, (None, entry))
        if not self._looking:
            self._looking = True
            try:
                patience = DISK_PATIENCE if before is entry else FIRST_PATIENCE
                if (there := within(patience, lambda: self._find(name, entry))) is not None:
                    return there
            except RuntimeError:  # there are as many threads as there may be
                self._looking = False
                return located(name, entry)
        if before is entry:
            return known
        raise ModelLoadError(
            f"model {name!r}: no disk says where its weights are.",
            "See whether the file systems of the state directories answer (`df`), then try again.",
        )

    def _find(self, name: str, entry: Entry) -> Entry:
        """Look, for whoever waits, and for those who ask later."""
        try:
            there = located(name, entry)
            self._known[name] = entry, there
        except ModelLoadError:
            self._known.pop(name, None)
            raise
        except OSError as error:
            self._known.pop(name, None)
            raise ModelLoadError(f"model {name!r}: no disk says where its weights are: {error}.") from error
        finally:
            self._looking = False
        return there


def not_to_preload(names: Iterable[str], catalogue: Catalogue) -> list[UnknownModelError | ModelLoadError]:
    """Why a daemon can't load some of the models that it is to load at its start.

    There is no such model, without which it does not start; or the weights are not here, and it starts if others' are.
    """
    return _refused(names, catalogue, located)


def not_loadable(names: Iterable[str], catalogue: Catalogue) -> list[UnknownModelError | ModelLoadError]:
    """As `not_to_preload`, with all else that can be seen without a worker and would keep one from loading them."""
    return _refused(names, catalogue, _check_loadable)


def _refused(
    names: Iterable[str], catalogue: Catalogue, check: Callable[[str, Entry], object]
) -> list[UnknownModelError | ModelLoadError]:
    refused: list[UnknownModelError | ModelLoadError] = []
    for name in names:
        try:
            check(*catalogue.resolve(name))
        except (UnknownModelError, ModelLoadError) as error:
            refused.append(error)
    return refused


def _check_loadable(name: str, entry: Entry) -> None:
    entry = located(name, entry)
    if _no_file(entry):
        raise ModelLoadError(f"model {name!r}: there is no file {entry.weights}.")
    if wrong := _wrong(name, entry, find_environment(*entry.place)):
        raise ModelLoadError(f"model {name!r}: {wrong}{'' if wrong.endswith('?') else '.'}")


def _no_file(entry: Entry) -> bool:
    return entry.weights is not None and not is_file(entry.weights)


def _wrong(name: str, entry: Entry, environment: Environment) -> str:
    """What is wrong with an entry itself; which families an environment has that was built, only that can say."""
    if entry.family == "ase":
        return ase.problem_of(spec_of(name, entry))
    if environment.built or entry.family in FAMILIES:
        return ""
    if entry.family in families():
        return ""
    near, offered = alike(entry.family)
    meant = f"did you mean {near}?" if near else f"there are {', '.join(offered)}"
    return f"there is no family {entry.family}; {meant}"


def families() -> list[str]:
    """The families that this installation has an engine for."""
    return [*FAMILIES, *(point.name for point in metadata.entry_points(group=ENTRY_POINTS))]


def alike(family: str) -> tuple[str, list[str]]:
    """The one that may be meant by a family that there is none of, or nothing; and all that people may use.

    `noop` is not among them: it computes nothing.
    """
    offered = sorted({*families()} - {"noop"})
    return next(iter(difflib.get_close_matches(family.lower(), offered, n=1)), ""), offered


def lack(name: str, entry: Entry) -> str:
    """What keeps workers from loading a model, in a word or two; empty if nothing."""
    try:
        entry = located(name, entry)
    except ModelLoadError:
        return "to pull"
    if _no_file(entry):
        return "missing"
    try:
        environment = find_environment(*entry.place)
    except ModelLoadError:
        return "needs env"
    return "wrong entry" if _wrong(name, entry, environment) else ""
