"""The ways to compute a MACE model that are faster than mace-torch, where they fit model and device."""

from __future__ import annotations

from typing import Any, Protocol

from rootstockd.worker import stages
from rootstockd.worker.engines import ModelSpec, Result, Task
from rootstockd.worker.failures import describe, in_disorder, out_of_memory

BY_EDGES, FUSED, CUEQUIVARIANCE = "mace-torch by edges", "fused", "cuequivariance"


class NotApplicableError(Exception):
    """The model, or a structure, has something that a backend can't do; it says what."""


class Backend(Protocol):
    """One way to evaluate a MACE model."""

    name: str
    note: str
    """What people should know of how it computes just now; as a rule nothing."""

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        """Evaluate a batch; results in the same order.

        Raises:
            NotApplicableError: it can't, for what is in a structure.
        """

    def forget(self) -> None:
        """Give back what is kept of structures for others like them."""


def backends_for(model: Any, spec: ModelSpec) -> tuple[list[Backend], str]:
    """What fits model and device, as a rule the fastest first, and what is in the way of a faster one.

    Raises:
        Exception: memory lacked, or the device failed, in making one.
    """
    found: list[Backend] = []
    notes = []
    for name in (BY_EDGES, FUSED if spec.device == "cpu" else CUEQUIVARIANCE):  # each asks more of the model
        if name in spec.without:
            how = spec.without[name]
            notes.append(f"{name} is switched off until the model is unloaded: a worker that tried it ended ({how})")
            continue
        stages.begin(stages.CHECKS, name)
        try:
            found.insert(0, _made(name, model, spec.device))
        except Exception as error:
            if out_of_memory(error) or in_disorder(error):  # no fault of its own; or the process is lost
                raise
            why = str(error) if isinstance(error, (ImportError, NotApplicableError)) else describe(error)
            notes.append(f"not accelerated{' further' if found else ''}: {why}")
        if not found:
            break
    return found, "; ".join(notes)


def _made(name: str, model: Any, device: str) -> Backend:
    """One of them; its modules are imported here, as not every environment has what they need.

    Raises:
        ImportError: such as this one.
        NotApplicableError: it is not for this model.
    """
    if name == FUSED:
        from rootstockd.worker.engines.mace.fused import FusedBackend  # noqa: PLC0415

        return FusedBackend(model)
    if name == CUEQUIVARIANCE:
        from rootstockd.worker.engines.mace.cueq import converted  # noqa: PLC0415

        model = converted(model, device)
    if device == "cpu":
        from rootstockd.worker.engines.mace.edges import EdgeBackend  # noqa: PLC0415

        return EdgeBackend(model, name)
    from rootstockd.worker.engines.mace.device import DeviceBackend  # noqa: PLC0415

    return DeviceBackend(model, name)
