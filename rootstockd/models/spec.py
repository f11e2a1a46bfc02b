"""From an entry of the catalogue to what a worker is told."""

from __future__ import annotations

import json

from ase.data import atomic_numbers

from rootstockd.models.catalogue import Entry
from rootstockd.worker.engines import ModelSpec


def spec_of(
    name: str, entry: Entry, dtype: str | None = None, *, device: str = "cpu", options: str = "", confine: bool = True
) -> ModelSpec:
    """What a worker is to load.

    Args:
        name: the catalogue's name.
        entry: what it has under that, with its weights.
        dtype: what to compute in; the entry's choice if None.
        device: `cpu` or `cuda`.
        options: what else changes its numbers, as JSON.
        confine: whether workers give their rights away, if the entry has nothing against it.
    """
    return ModelSpec(
        name=name,
        family=entry.family,
        device=device,
        dtype=dtype or entry.dtype,
        weights=str(entry.weights or ""),
        sha256=entry.sha256.lower(),
        confine=confine and entry.confine,
        environment=entry.environment or entry.family,
        arguments=entry.arguments,
        elements=[atomic_numbers[symbol] for symbol in entry.elements],
        heads=list(entry.heads),
        **json.loads(options or "{}"),
    )
