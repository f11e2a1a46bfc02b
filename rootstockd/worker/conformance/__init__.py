"""What every engine has to do right, checked on the engine itself.

`python -m rootstockd.worker.conformance SPEC` does it for a ModelSpec in JSON, in the Python environment of the model,
and needs no more than the worker does. From a test: `Subject(load_engine(spec), spec)`, and then each of CHECKS.
A check raises ConformanceError, or Skipped where the engine has nothing to check.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

from rootstockd.worker.conformance.interface import (
    batch_equals_solo,
    charge_and_spin,
    exact_means_the_same_bits,
    heads,
    missing_properties_are_refused,
    results_stay,
    says_what_it_is,
    sessions_do_not_mix,
    shapes_and_types,
    too_many_atoms_are_refused,
    unknown_elements_are_refused,
)
from rootstockd.worker.conformance.physics import (
    forces_are_slopes,
    open_directions,
    per_atom_energies_add_up,
    periodic_images,
    permutation,
    rotation,
    translation,
    virial_is_a_slope,
)
from rootstockd.worker.conformance.subject import ConformanceError, Skipped, Subject, Tolerance
from rootstockd.worker.engines import EngineError, ModelSpec
from rootstockd.worker.engines.loading import load_engine
from rootstockd.worker.failures import describe

__all__ = ["CHECKS", "ConformanceError", "Skipped", "Subject", "Tolerance", "main"]

CHECKS: dict[str, Callable[[Subject], None]] = {
    check.__name__: check
    for check in (
        says_what_it_is,
        shapes_and_types,
        per_atom_energies_add_up,
        forces_are_slopes,
        virial_is_a_slope,
        translation,
        permutation,
        rotation,
        periodic_images,
        open_directions,
        batch_equals_solo,
        sessions_do_not_mix,
        results_stay,
        missing_properties_are_refused,
        unknown_elements_are_refused,
        too_many_atoms_are_refused,
        charge_and_spin,
        heads,
        exact_means_the_same_bits,
    )
}


def main(arguments: list[str]) -> int:
    """Load and check; the process's exit status: 0, 1 where a check fails, 2 where there is nothing to check."""
    try:
        spec = ModelSpec(**json.loads(arguments[0]))
    except (IndexError, TypeError, ValueError) as error:
        print(f"SPEC is a ModelSpec in JSON, and --exact may follow it: {error}", file=sys.stderr)
        return 2
    try:
        engine = load_engine(spec)
    except EngineError as error:
        print(f"{error.message}. {error.hint}", file=sys.stderr)
        return 2
    print(f"{spec.name}: {engine.info.backend}", flush=True)
    subject, failed = Subject(engine, spec, exact="--exact" in arguments), 0
    print(f"structures: {', '.join(structure.name for structure in subject.structures)}")
    for name, check in CHECKS.items():
        verdict = "ok"
        try:
            check(subject)
        except Skipped as reason:
            verdict = f"skipped: {reason}"
        except Exception as error:
            failed += 1
            verdict = f"FAILED: {error if isinstance(error, ConformanceError) else describe(error)}"
        print(f"{name}: {verdict}", flush=True)
    return 1 if failed else 0
