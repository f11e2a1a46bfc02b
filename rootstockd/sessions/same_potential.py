"""That a stock driver, which knows no fingerprints, gets results of one potential alone."""

from __future__ import annotations

from rootstock_client.errors import ModelChangedError, model_changed
from rootstockd.sessions.attachments import Line
from rootstockd.supervision.supervisor import Supervisor


class SamePotential:
    """Compares in the driver's place what computes for it with what did before.

    Args:
        fingerprint: of what has computed for it on another connection, if anything.
    """

    def __init__(self, fingerprint: str | None = None) -> None:
        self._fingerprint = fingerprint or ""

    def compare(self, model: Supervisor, line: Line | None) -> ModelChangedError | None:
        """What is wrong with a result; None if nothing is.

        Args:
            model: what it is of.
            line: over which the driver's stream was handed over, if it was: whoever did is told of the first.
        """
        now = model.workers.fingerprint
        if not self._fingerprint:
            self._fingerprint = now
            if line is not None:
                line.tell_model(now)
        if now == self._fingerprint:
            return None
        anew = "open another connection" if line is None else "attach anew"
        return model_changed(model.spec.name, self._fingerprint, now, anew)
