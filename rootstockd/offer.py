"""What the daemon's users are offered: the models of its catalogue, as models of its fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

from ase.data import chemical_symbols

from rootstock_client.errors import ModelLoadError, UnknownElementError, UnknownModelError
from rootstockd.fleet.fleet import Fleet
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.models.availability import Locations
from rootstockd.models.catalogue import Catalogue, Entry
from rootstockd.sessions.accounts import Account
from rootstockd.sessions.init_request import InitRequest
from rootstockd.supervision.supervisor import Supervisor


class Offer:
    """The catalogue's models; they are loaded when somebody asks for one.

    Args:
        catalogue: what there is.
        fleet: where they are loaded.
    """

    def __init__(self, catalogue: Catalogue, fleet: Fleet) -> None:
        self.catalogue = catalogue
        self._fleet = fleet
        self._locations = Locations()

    def open(self, request: InitRequest, account: Account, leaving: WorkerKey | None) -> Supervisor:
        """The model that a session asks for; it is loaded if it is not yet.

        Args:
            request: what the session asks for.
            account: its user's.
            leaving: the model that it has until now, if any.

        Raises:
            UnknownModelError, UnknownElementError, UnsupportedError, RestartNeededError, ModelLoadError, LimitError:
                what its name says. Nothing is loaded where the catalogue knows that the model can't do what is asked.
        """
        key, entry = self._resolve(request.model, request.dtype, request.options)
        entry.check_head(key.name, request.head)
        known = self._fleet.elements(key, entry)
        if known and (unknown := set(request.numbers) - known):
            raise UnknownElementError(
                f"model {key.name!r} does not know {_symbols(unknown)}.", f"It knows {_symbols(known)}."
            )
        account.check_models(key, leaving)
        model = self._fleet.open(key, entry)
        account.ask(key, model)
        _raise_error_of(model)
        return model

    def load(self, name: str, dtype: str | None = None) -> WorkerKey:
        """Have a model loaded because an administrator said so, also one that failed; by which name and dtype.

        Raises:
            UnknownModelError, UnsupportedError, RestartNeededError, ModelLoadError: what its name says.
        """
        key, entry = self._resolve(name, dtype)
        model = self._fleet.open(key, entry, anew=True)
        for supervisor in self._fleet.supervisors():  # with those that sessions keep as they were
            if (supervisor.spec.name, supervisor.spec.dtype) == (key.name, key.dtype):
                supervisor.lift_bar()
        _raise_error_of(model)
        return key

    def unload(self, name: str, dtype: str | None, who: str, *, force: bool = False) -> int:
        """Have a model leave memory because an administrator said so; see `Fleet.unload`.

        Raises:
            RootstockError: it is not there, or has evaluations under way.
        """
        name = self.catalogue.name_of(name)  # it may be in no catalogue any more
        return self._fleet.unload(name, dtype, who, force=force)

    def keep(self, names: Iterable[str]) -> None:
        """Have these stay in memory, as the catalogue has them now, and no others; what is not there is left out."""
        kept: set[WorkerKey] = set()
        for wanted in names:
            with contextlib.suppress(UnknownModelError, ModelLoadError):
                name, entry = self.catalogue.resolve(wanted)
                kept.add(key := WorkerKey(name, entry.dtype))
                self._fleet.keep(key, self._locations.located(name, entry))
        self._fleet.keep_only(kept)

    def _resolve(self, name: str, dtype: str | None, options: str = "") -> tuple[WorkerKey, Entry]:
        """Which worker is meant, and what the catalogue has for it, with its weights.

        Raises:
            UnknownModelError, UnsupportedError, ModelLoadError: what its name says.
        """
        name, entry = self.catalogue.resolve(name)
        dtype = dtype or entry.dtype
        entry.check_dtype(name, dtype)
        return WorkerKey(name, dtype, options), self._locations.located(name, entry)


def _raise_error_of(model: Supervisor) -> None:
    if model.error is not None:
        raise model.error.with_traceback(None)  # it is kept: not with the frames of all who were told


def _symbols(numbers: Iterable[int]) -> str:
    return ", ".join(chemical_symbols[z] for z in sorted(numbers))
