"""RootstockClient: from a name to a calculator."""

from __future__ import annotations

import http.client
import json
import os
import weakref
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from rootstock_client.connection import connect
from rootstock_client.errors import ConnectionLostError, NotAnsweringError, RootstockError
from rootstock_client.patience import patience_in_seconds
from rootstock_client.runtime_dir import control_socket, find_socket

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

    def calculator(
        self,
        model: str,
        *,
        dtype: Literal["float32", "float64"] | None = None,
        head: str | None = None,
        dispersion: bool | dict[str, Any] = False,
        exact: bool = False,
        tolerance: float | None = None,
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
            fingerprint: what the model's must be, such as that of the job that this one goes on from; ModelChangedError
                is raised if it is another.
        """
        from rootstock_client.calculator import RootstockCalculator  # the one place that needs ASE  # noqa: PLC0415

        calculator = RootstockCalculator(
            self.socket,
            model,
            dtype=dtype,
            head=head,
            dispersion=dispersion,
            exact=exact,
            tolerance=tolerance,
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


class _UnixHTTPConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost")
        self._path, self._timeout = path, timeout

    def connect(self) -> None:
        self.sock = connect(self._path, self._timeout)


def request(
    session_socket: Path, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 10.0
) -> object:
    """Ask a daemon's control API for JSON; arguments and errors are those of `fetch`."""
    return json.loads(fetch(session_socket, method, path, body, timeout=timeout))


def fetch(
    session_socket: Path, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 10.0
) -> bytes:
    """Ask a daemon's control API.

    Args:
        session_socket: the daemon's session socket; its control socket lies beside it.
        method: GET or POST.
        path: such as `/v1/status`.
        body: sent as JSON.
        timeout: seconds that the daemon may say nothing.

    Returns:
        The answer's body.

    Raises:
        DaemonNotFoundError: nobody answers there.
        ConnectionLostError: the daemon went away before it answered.
        NotAnsweringError: it is there, and does not answer.
        RootstockError: the daemon refuses.
    """
    connection = _UnixHTTPConnection(control_socket(session_socket), timeout)
    try:
        connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
        raise ConnectionLostError(f"rootstockd at {session_socket} went away.") from error
    except TimeoutError as error:
        raise NotAnsweringError(
            f"rootstockd at {session_socket} does not answer; waited {timeout:g} s.",
            "It may be suspended, or the machine has no memory or time for it. See its log (`rootstockd logs`); "
            "`rootstockd stop --force` ends it whatever it does.",
        ) from error
    finally:
        connection.close()
    if response.status in (http.client.FORBIDDEN, http.client.CONFLICT):
        raise RootstockError.from_json(answer)
    if response.status >= http.client.BAD_REQUEST:
        text = answer[:500].decode(errors="replace")
        raise RootstockError(f"rootstockd refused {method} {path}: {response.status} {response.reason} {text}")
    return answer
