"""That a stock driver, which knows no fingerprints, gets results of one potential alone."""

from __future__ import annotations

from rootstock_client.errors import ModelChangedError, model_changed
from rootstockd.supervision.supervisor import Supervisor


class SamePotential:
    """Compares in the driver's place what computes for it with what did before."""

    def __init__(self) -> None:
        self._fingerprint = ""

    def compare(self, model: Supervisor) -> ModelChangedError | None:
        """What is wrong with a result of this model; None if nothing is."""
        now = model.workers.fingerprint
        self._fingerprint = self._fingerprint or now
        if now == self._fingerprint:
            return None
        return model_changed(model.spec.name, self._fingerprint, now, "open another connection")
