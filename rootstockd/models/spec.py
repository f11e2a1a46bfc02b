"""From an entry of the catalogue to what a worker is told, and what tells one potential from another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from ase.data import atomic_numbers

from rootstock_client.ipi import FINGERPRINT_DIGITS
from rootstockd.environments.finding import Environment
from rootstockd.environments.versions import digest_of_module, versions_of_entry_point, versions_of_module
from rootstockd.models.catalogue import Entry
from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.engines.ipi.recipe import NOT_OF_NUMBERS
from rootstockd.worker.engines.loading import ENTRY_POINTS, FAMILIES


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
    spec = ModelSpec(
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
        hang_timeout=entry.hang_timeout or 0.0,
        **json.loads(options or "{}"),
    )
    return dataclasses.replace(spec, fingerprint=_fingerprint(spec, _published(entry)))


def in_environment(spec: ModelSpec, environment: Environment) -> ModelSpec:
    """What a worker is to load there: the fingerprint is also of the versions of the packages that compute.

    Those are the engine's or calculator's own, and D3's. What these are made of, such as torch, makes a difference of
    rounding, as another device does. Modules that lie in no package count by what is in them.
    """
    versions: dict[str, str] = {}
    own: dict[str, str] = {}
    if spec.family not in FAMILIES:
        versions = versions_of_entry_point(environment, ENTRY_POINTS, spec.family)
    for module in _computing(spec):
        if of_packages := versions_of_module(environment, module):
            versions |= of_packages
        elif digest := digest_of_module(environment, module):
            own[module] = digest
    if not (versions or own):
        return spec
    return dataclasses.replace(spec, fingerprint=_digest([spec.fingerprint, versions | own]), own_modules=list(own))


def _computing(spec: ModelSpec) -> list[str]:
    """Top-level modules that say what a model computes."""
    calculator = str(spec.arguments.get("calculator", "")).partition(":")[0].partition(".")[0]
    modules = [{"mace": "mace", "ase": calculator}.get(spec.family, ""), "dftd3" if spec.dispersion is not None else ""]
    return [module for module in modules if module]


def _published(entry: Entry) -> str:
    """SHA-256 of the weights as they were published, whatever form of them is loaded."""
    converted = entry.original_sha256 and entry.converted_sha256.lower() == entry.sha256.lower()
    return entry.original_sha256 if converted else entry.sha256


def _fingerprint(spec: ModelSpec, original: str) -> str:
    """All of an entry that determines the numbers, and nothing of what does not: its name, where it runs, how fast.

    Args:
        spec: the model.
        original: SHA-256 of its weights as they were published; another form of them is the same model. Empty where
            they come with a package: then its arguments say which they are.
    """
    arguments = spec.arguments
    if spec.family == "ipi":
        arguments = {name: value for name, value in arguments.items() if name not in NOT_OF_NUMBERS}
    what = {
        "family": spec.family,
        "environment": spec.environment,
        "weights": original.lower(),
        "arguments": arguments,
        "dtype": spec.dtype,
        # whoever names none gets one by them; but a MACE has its own in its weights
        "heads": spec.heads if spec.family != "mace" else [],
        "dispersion": spec.dispersion,
    }
    # without what is empty, so that a key that is new here changes nothing for those who don't have it: jobs that run
    # over an upgrade would take the model for another
    return _digest({key: _plain(value) for key, value in what.items() if value})


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:FINGERPRINT_DIGITS]


def _plain(value: Any) -> Any:
    """Arguments with 1 for 1.0: they are written alike, and mean the same number."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
