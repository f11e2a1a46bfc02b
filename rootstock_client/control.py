"""The control API of a daemon, as clients and commands ask it: without numpy, which takes long to import."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from pathlib import Path
from typing import Any

from rootstock_client.errors import ConnectionLostError, NotAnsweringError, RootstockError
from rootstock_client.runtime_dir import control_socket
from rootstock_client.sockets import connect


class _UnixHTTPConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float, over: socket.socket | None) -> None:
        super().__init__("localhost")
        self._path, self._timeout, self.sock = path, timeout, over

    def connect(self) -> None:
        self.sock = connect(self._path, self._timeout)


def request(
    session_socket: Path, method: str, path: str, body: dict[str, Any] | None = None, *, timeout: float = 10.0
) -> object:
    """Ask a daemon's control API for JSON; arguments and errors are those of `fetch`."""
    return json.loads(fetch(session_socket, method, path, body, timeout=timeout))


def fetch(
    session_socket: Path,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    timeout: float = 10.0,
    over: socket.socket | None = None,
) -> bytes:
    """Ask a daemon's control API.

    Args:
        session_socket: the daemon's session socket; its control socket lies beside it.
        method: GET or POST.
        path: such as `/v1/status`.
        body: sent as JSON.
        timeout: seconds that the daemon may say nothing.
        over: a connection to its control socket, with a timeout of its own, in place of a new one; it is closed.

    Returns:
        The answer's body.

    Raises:
        DaemonNotFoundError: nobody answers there.
        ConnectionLostError: the daemon went away before it answered.
        NotAnsweringError: it is there, and does not answer.
        RootstockError: the daemon refuses.
    """
    connection = _UnixHTTPConnection(control_socket(session_socket), timeout, over)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may have refused before it was asked
            connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except (http.client.HTTPException, ConnectionResetError, BrokenPipeError) as error:
        raise ConnectionLostError(f"rootstockd at {session_socket} went away.") from error
    except TimeoutError as error:
        raise NotAnsweringError(
            f"rootstockd at {session_socket} does not answer; waited {timeout:g} s.",
            "It may be suspended, or the machine may be out of memory or overloaded. See its log (`rootstockd logs`); "
            "`rootstockd stop --force` ends it in any case.",
        ) from error
    finally:
        connection.close()
    if response.status in (http.client.FORBIDDEN, http.client.CONFLICT):
        raise RootstockError.from_json(answer)
    if response.status >= http.client.BAD_REQUEST:
        text = answer[:500].decode(errors="replace")
        raise RootstockError(f"rootstockd refused {method} {path}: {response.status} {response.reason} {text}")
    return answer
