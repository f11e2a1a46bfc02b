"""RootstockClient: from a name to a calculator."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from rootstock_client.patience import patience_in_seconds
from rootstock_client.runtime_dir import find_socket

if TYPE_CHECKING:
    from rootstock_client.calculator import RootstockCalculator


class RootstockClient:
    """A daemon, as jobs see it.

    Args:
        socket: the daemon's session socket. Without one it is looked for: ROOTSTOCKD_SOCKET, the user's runtime
            directory, the system's (see `rootstock_client.runtime_dir`).
        patience: how many seconds a job that had a daemon waits for it to come back, at the same address, when it was
            restarted, upgraded or killed; the step is then repeated. By default ROOTSTOCKD_PATIENCE, or 300; with 0 it
            waits for nothing. A job's first connection fails at once where there is no daemon, unless one is there and
            stopping; where a dead one has left its socket, after 5 s.

    Raises:
        DaemonNotFoundError: no socket was found; the message says how to start a daemon.
        ValueError: the patience is no number of seconds.
    """

    def __init__(self, socket: str | os.PathLike[str] | None = None, *, patience: float | None = None) -> None:
        self.patience = patience_in_seconds(patience)
        self.socket: Path = find_socket(socket)
        self._calculators: weakref.WeakSet[RootstockCalculator] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"RootstockClient({str(self.socket)!r}, patience={self.patience:g})"

    def calculator(  # noqa: PLR0913 - what a session can ask for
        self,
        model: str,
        *,
        dtype: Literal["float32", "float64"] | None = None,
        head: str | None = None,
        dispersion: bool | dict[str, Any] = False,
        exact: bool = False,
        tolerance: float | None = None,
        properties: Sequence[str] = (),
        fingerprint: str | None = None,
    ) -> RootstockCalculator:
        """An ASE calculator that has `model` evaluated by the daemon.

        Args:
            model: a name from `models()`.
            dtype: what the model computes in; the catalogue's choice for this model if None.
            head: which of the model's heads, where it has several.
            dispersion: whether to add a D3 correction, or a dict with its settings; see RootstockCalculator.
            exact: same structure, same bits, whatever came before and whatever other sessions do.
            tolerance: how far a faster implementation may differ from the reference, in eV/Å; see RootstockCalculator.
            properties: what is computed with each evaluation, asked for or not: some of "stress" and "energies".
            fingerprint: what the model's must be, such as that of the job that this one goes on from; ModelChangedError
                is raised if it is another.
        """
        from rootstock_client.calculator import RootstockCalculator  # the one place that needs ASE  # noqa: PLC0415

        calculator = RootstockCalculator(
            model,
            socket=self.socket,
            dtype=dtype,
            head=head,
            dispersion=dispersion,
            exact=exact,
            tolerance=tolerance,
            properties=properties,
            fingerprint=fingerprint,
            patience=self.patience,
        )
        self._calculators.add(calculator)
        return calculator

    def models(self) -> list[dict[str, Any]]:
        """The daemon's catalogue: for each model its name, aliases, family, elements, dtype, licence and state."""
        return cast("list[dict[str, Any]]", self._get("/v1/models"))

    def status(self) -> dict[str, Any]:
        """What the daemon is doing: its models, its sessions, counters. `rootstockd status --json` prints the same."""
        return cast("dict[str, Any]", self._get("/v1/status"))

    def _get(self, path: str) -> object:
        from rootstock_client.control import request  # noqa: PLC0415 - few jobs ask, and HTTP takes 7 ms to import

        return request(self.socket, "GET", path)

    def close(self) -> None:
        """Close the sessions of all calculators made here; one that is used again opens a new one."""
        for calculator in self._calculators:
            calculator.close()

    def __enter__(self) -> RootstockClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"socket": self.socket, "patience": self.patience}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.socket, self.patience = state["socket"], state["patience"]
        self._calculators = weakref.WeakSet()
