"""What models were seen to take, in memory and in time to load, kept from one daemon to the next."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from rootstockd.models.whole_files import StoreError, write
from rootstockd.settings.state_dir import StateError, make_readable, own_state, state_dirs
from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.files import read_regular

log = logging.getLogger(__name__)

FILE = "measured.json"
CHANGE = 0.05
"""Measurements that differ by less are the same."""
AGAIN = 5.0
"""Seconds after which writing is tried again that has failed."""
LIGHT, HEAVY = 100 * 10**6, 700 * 10**6
"""Bytes of a worker without weights: with ASE alone, and with torch or CUDA."""
LIGHT_ENVIRONMENTS = ("ase", "ipi", "noop")
COPIES = 2
"""How often weights are in memory: in float64 what was written in float32, or as they are and compiled."""


class Measured(BaseModel):
    """Of one model on one kind of device."""

    model_config = ConfigDict(frozen=True)

    loaded: int = Field(ge=0)
    """Bytes of the worker when the model was loaded."""
    memory: int = Field(ge=0)
    """Bytes that it grew to."""
    load_seconds: float = Field(ge=0, allow_inf_nan=False)

    def like(self, other: Measured) -> bool:
        """Whether the two differ by no more than measurements do."""
        pairs = zip(self.model_dump().values(), other.model_dump().values(), strict=True)
        return all(abs(a - b) <= CHANGE * max(a, b) for a, b in pairs)


_File = TypeAdapter(dict[str, Measured])


class Measurements:
    """All that is known, read when it is made. A file that is damaged is as good as none."""

    def __init__(self) -> None:
        self._known: dict[str, Measured] = {}
        self._at_least: dict[str, int] = {}
        """Bytes that workers had that never came to the end of loading."""
        self._fresh: dict[str, Measured] = {}
        """Not on disk yet."""
        self._complained = False
        self._not_before = 0.0
        """By `time.monotonic`."""
        try:
            folders = state_dirs()
        except (StateError, OSError) as error:
            log.warning("how much memory models took before is not known: %s", error)
            folders = []
        for folder in reversed(folders):
            self._known.update(_read(folder / FILE))

    def get(self, spec: ModelSpec, device: str) -> Measured | None:
        """What is known of a model on a kind of device: `cpu`, or a GPU's name."""
        return self._known.get(_key(spec, device))

    def put(self, spec: ModelSpec, device: str, measured: Measured) -> None:
        """Take down what a model was seen to take."""
        key = _key(spec, device)
        if (known := self._known.get(key)) is None or not measured.like(known):
            self._known[key] = self._fresh[key] = measured

    def put_at_least(self, spec: ModelSpec, device: str, memory: int) -> None:
        """A worker had so many bytes when it was stopped before it was ready. Only this daemon remembers it."""
        key = _key(spec, device)
        self._at_least[key] = max(memory, self._at_least.get(key, 0))

    def at_least(self, spec: ModelSpec, device: str) -> int:
        """Bytes below which a model has been seen not to load; 0 where none have."""
        return self._at_least.get(_key(spec, device), 0)

    def guess(self, spec: ModelSpec, device: str, weights: int) -> int:
        """Bytes that a model takes that was never seen: what its packages take, and its weights.

        Of what packages take there is a measurement as soon as any model of the same kind has been loaded.

        Args:
            spec: the model.
            device: the kind of device.
            weights: size of its file in bytes.
        """
        kin = _kin(_key(spec, device))
        seen = [measured.loaded for key, measured in self._known.items() if _kin(key) == kin]
        packages = min(seen) if seen else LIGHT if spec.environment in LIGHT_ENVIRONMENTS else HEAVY
        return packages + COPIES * weights

    @property
    def unsaved(self) -> bool:
        """Whether there is anything to save."""
        return bool(self._fresh)

    @property
    def due(self) -> bool:
        """Whether to save it now: where that has just failed, it is tried again a little later."""
        return self.unsaved and time.monotonic() >= self._not_before

    def save(self) -> None:
        """Write what is new, whole or not at all, beside what others have written meanwhile. It may take its time."""
        fresh, self._fresh = self._fresh, {}
        path = own_state() / FILE
        try:
            make_readable(path.parent)  # weights come there, too, which others read
            write(path, _File.dump_json({**_read(path, quietly=self._complained), **fresh}, indent=1).decode())
            self._complained = False
        except (StoreError, OSError) as error:  # a full disk, or a shared folder that is read alone: this one knows it
            if not self._complained:
                log.warning("how much memory models take can't be saved: %s", error)
            self._complained = True
            self._not_before = time.monotonic() + AGAIN
            for key, measured in fresh.items():  # one by one: what is measured meanwhile is put here, too, and is newer
                self._fresh.setdefault(key, measured)


def _key(spec: ModelSpec, device: str) -> str:
    """All that may make a difference to what a model takes."""
    what = {**dataclasses.asdict(spec), "device": device}
    # where the file lies, whose content is known; and what takes little, of which there may be any number
    for indifferent in ("weights", "confine", "dispersion", "fingerprint", "own_modules"):
        del what[indifferent]
    return json.dumps(what, sort_keys=True)


def _kin(key: str) -> tuple[object, ...] | None:
    """What models have in common that import the same packages."""
    try:
        what = json.loads(key)
        return what["family"], what["environment"], what["device"]
    except (ValueError, TypeError, LookupError):  # a file that others wrote
        return None


def _read(path: Path, *, quietly: bool = False) -> dict[str, Measured]:
    try:
        return _File.validate_json(read_regular(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        level = logging.DEBUG if quietly else logging.WARNING
        log.log(level, "%s can't be read and is ignored: %s", path, str(error).partition("\n")[0])
        return {}
