"""The control API and those who use it badly: what it can't read it refuses, and who is slow or many is cut off."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests
import schemathesis
import urllib3
from ase.build import bulk
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from starlette.types import Receive, Scope, Send

from conftest import RunningDaemon, open_descriptors, wait_for
from rootstock_client.control import fetch
from rootstock_client.errors import RootstockError
from rootstock_client.runtime_dir import control_socket
from rootstockd.control.api import make_app
from rootstockd.control.limits import DEADLINE, MAX_BODY, MAX_CONNECTIONS, MAX_HEAD, MAX_PIECES, BoundedBody
from rootstockd.daemon import Daemon
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.settings.config import Config, Device


@pytest.mark.may_leak("schemathesis keeps the loop in which it asked last")
def test_answers_are_what_the_schema_says() -> None:
    """Whatever schemathesis asks the app, of a daemon that does not run and can't be stopped."""

    async def make() -> Daemon:
        return Daemon(Config(socket=Path("/nowhere/rootstockd.sock"), devices=(Device(name="cpu"),)))

    daemon = asyncio.run(make())
    stopped: list[bool] = []
    daemon.stop = lambda *, force=False, replaced=False: stopped.append(force)  # type: ignore[method-assign]
    daemon.offer.load = (  # type: ignore[method-assign]
        lambda name, dtype=None: WorkerKey(name, dtype or "float64")
    )
    app = BoundedBody(make_app(daemon))
    uid = [0]

    async def from_user(scope: Scope, receive: Receive, send: Send) -> None:
        """The app, asked by a user whom the kernel would have told of."""
        await app({**scope, "client": (str(uid[0]), 1)}, receive, send)

    schema = schemathesis.openapi.from_asgi("/openapi.json", from_user)
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 3
    statuses: set[int] = set()
    for operation in operations:
        for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):

            @settings(max_examples=60, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                statuses.add(case.call_and_validate().status_code)

            for uid[0] in (0, 12_345):
                with contextlib.suppress(Unsatisfiable):  # a request without a body can't be wrong
                    ask()
    assert statuses >= {200, 202, 403, 422}
    assert set(stopped) == {True, False}


class OverItsSocket(requests.adapters.HTTPAdapter):
    """HTTP to a daemon, whatever the host's name."""

    def __init__(self, daemon: RunningDaemon) -> None:
        super().__init__()
        path = os.fspath(control_socket(daemon.socket))

        class Connection(urllib3.connection.HTTPConnection):
            def _new_conn(self) -> socket.socket:
                sock = socket.socket(socket.AF_UNIX)
                sock.settimeout(30)
                sock.connect(path)
                return sock

        self._pool = urllib3.HTTPConnectionPool("localhost")
        self._pool.ConnectionCls = Connection

    def get_connection_with_tls_context(self, *_: object, **__: object) -> urllib3.HTTPConnectionPool:
        return self._pool

    def close(self) -> None:
        self._pool.close()
        super().close()


def test_a_daemon_that_runs_answers_so(own_daemon: RunningDaemon) -> None:
    """The same over its socket; it is stopped last, by what the schema says of that."""
    client, pid = own_daemon.client(), own_daemon.pid
    atoms = bulk("Cu", cubic=True)
    atoms.calc = client.calculator("emt")
    before = atoms.get_potential_energy()
    statuses: dict[str, set[int]] = {}
    both = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    with requests.Session() as session:
        session.mount("http://", OverItsSocket(own_daemon))
        schema = schemathesis.openapi.from_dict(session.get("http://localhost/openapi.json").json())
        operations = {operation.ok().path: operation.ok() for operation in schema.get_all_operations()}
        stop = operations.pop("/v1/stop")

        def ask(operation: schemathesis.schemas.APIOperation, mode: schemathesis.GenerationMode, times: int) -> None:
            @settings(max_examples=times, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: schemathesis.Case) -> None:
                answer = case.call_and_validate(base_url="http://localhost", session=session)
                statuses.setdefault(operation.path, set()).add(answer.status_code)

            with contextlib.suppress(Unsatisfiable):  # a request without a body can't be wrong
                ask()

        for operation in operations.values():
            for mode in both:
                ask(operation, mode, 40)
        ask(stop, schemathesis.GenerationMode.NEGATIVE, 40)
        assert own_daemon.pid == pid and client.status()["state"] == "ready"
        atoms.calc.results.clear()
        assert atoms.get_potential_energy() == before
        atoms.calc.close()
        assert "Traceback" not in own_daemon.log.read_text()
        ask(stop, schemathesis.GenerationMode.POSITIVE, 1)
        assert 202 in statuses["/v1/stop"]
    assert set().union(*statuses.values()) >= {200, 202, 409, 422}
    wait_for(lambda: not own_daemon.processes())


def talk(daemon: RunningDaemon, data: bytes, *, end: bool = False) -> bytes:
    """Say something to the control socket, and hear all until it hangs up."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(os.fspath(control_socket(daemon.socket)))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while data := sock.recv(65536):
                answer += data
        return answer


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/stop HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close", *headers]
    if not any("length" in header.lower() or "encoding" in header.lower() for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def chunked(size: int) -> bytes:
    return post(b"%x\r\n" % size + b" " * size + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (post(b""), 422),
        (post(b"{"), 422),
        (post(b"\xff\xfe"), 422),
        (post(b"[" * 60_000), 400),
        (post(b'{"force": "\\ud800"}'), 422),
        (post(b'{"force": NaN}'), 422),
        (post(b'{"force": 1e999}'), 422),
        (post(b'{"force": ' + b"9" * 5000 + b"}"), 400),
        (post(b" " * (MAX_BODY + 1)), 413),
        (post(b" " * (16 * MAX_BODY)), 413),
        (post(b"x" * (MAX_BODY + 1), "Content-Length: 1000000000000"), 413),
        (post(b"", "Content-Length: -1"), 400),
        (chunked(MAX_BODY + 1), 413),
        (chunked(10), 422),
        (post(b"1\r\n \r\n" * 4 * MAX_PIECES, "Transfer-Encoding: chunked"), 413),
        (post(b"zz\r\n", "Transfer-Encoding: chunked"), 400),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 64 * MAX_HEAD + b"\r\n\r\n", 400),
        (b"GET /" + b"x" * 2 * MAX_HEAD, 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"GET /v1/status HTTP/1.1\r\n\r\n", 400),
        (b"DELETE /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 405),
        (b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET /v1/status HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade, close\r\n\r\n", 200),
    ],
)
def test_what_can_not_be_read_is_refused(daemon: RunningDaemon, request_: bytes, status: int) -> None:
    answer = talk(daemon, request_)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert daemon.client().status()["state"] == "ready"
    assert "Traceback" not in daemon.log.read_text()


def head(size: int, *, in_target: bool = False) -> bytes:
    """A request for status whose line and headers have so many bytes."""
    target, name = (b"/v1/status?x=", b"") if in_target else (b"/v1/status", b"X: ")
    parts = b"GET " + target, b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + name, b"\r\n" * bool(name) + b"\r\n"
    filling = b"x" * (size - sum(map(len, parts)))
    return parts[0] + filling * in_target + parts[1] + filling * (not in_target) + parts[2]


@pytest.mark.parametrize("in_target", [False, True])
@pytest.mark.parametrize("before", [b"", b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"])
@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD, 200), (MAX_HEAD + 1, 400), (100_000, 400)])
def test_a_head_has_its_limit_however_it_comes(
    daemon: RunningDaemon, size: int, status: int, before: bytes, *, in_target: bool
) -> None:
    """In one read, as the daemon may have it, and behind another request in the same."""
    answer = talk(daemon, before + head(size, in_target=in_target))
    assert answer.startswith(b"HTTP/1.1 404 " if before else f"HTTP/1.1 {status} ".encode()), answer[:300]
    assert answer.count(f"HTTP/1.1 {status} ".encode()) == 1, answer[:300]


@pytest.mark.parametrize(("size", "status"), [(MAX_HEAD // 2, 422), (100_000, 400)])
def test_so_have_headers_behind_a_body(daemon: RunningDaemon, size: int, status: int) -> None:
    answer = talk(daemon, post(b"0\r\n" + b"a:b\r\n" * (size // 5) + b"\r\n", "Transfer-Encoding: chunked"))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:300]


def test_what_can_not_be_read_fills_no_log(daemon: RunningDaemon) -> None:
    before = daemon.log.stat().st_size
    for _ in range(100):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(control_socket(daemon.socket)))
            sock.sendall(b"\0\r\n\r\n")
            assert sock.recv(100).startswith(b"HTTP/1.1 400")
    assert daemon.log.stat().st_size < before + 2_000


def test_a_body_is_not_taken_beyond_its_limit(daemon: RunningDaemon) -> None:
    """However much is sent, no more than the limit lies in memory."""
    pid = daemon.client().status()["pid"]
    before = psutil.Process(pid).memory_info().rss
    assert talk(daemon, post(b" " * (64 * 2**20))).startswith(b"HTTP/1.1 413")
    assert psutil.Process(pid).memory_info().rss < before + 16 * 2**20


@pytest.fixture
def control_connections(own_daemon: RunningDaemon) -> Iterator[list[socket.socket]]:
    """As many connections as may be open, and twice as many beside."""
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(3 * MAX_CONNECTIONS)]
        for sock in opened:
            sock.settimeout(30)
            sock.connect(os.fspath(control_socket(own_daemon.socket)))
        yield opened


def test_what_was_refused_before_it_was_said_counts_as_refused(own_daemon: RunningDaemon, control_connections) -> None:
    """`stop` would take it for the daemon's end, and wait for that."""
    late = control_connections[-1]
    hung_up = select.poll()
    hung_up.register(late, 0)
    assert hung_up.poll(30_000)
    with pytest.raises(RootstockError, match="refused POST /v1/stop: 503 .*try again"):
        fetch(own_daemon.socket, "POST", "/v1/stop", {}, over=late)


def test_connections_that_are_slow_or_many_are_cut_off(own_daemon: RunningDaemon, control_connections) -> None:
    """Half a request, a request without an end, answers that nobody reads: none of it stays."""
    client = own_daemon.client()
    kept, refused = control_connections[:MAX_CONNECTIONS], control_connections[MAX_CONNECTIONS:]
    for sock in refused:
        assert b"503" in sock.recv(65536)
    half = [
        b"",
        b"GET /v1/sta",
        b"INIT        \0\0\0\0\0\0\0\0",
        b"GET /v1/status HTTP/1.1\r\nHost: x\r\n",
        post(b"{", "Content-Length: 100"),
        post(b"5\r\n{", "Transfer-Encoding: chunked"),
    ]
    for number, sock in enumerate(kept):
        sock.sendall(half[number % len(half)])
    there, over = set(kept), time.monotonic() + 6 * DEADLINE
    while there:
        assert time.monotonic() < over, "some stay for as long as they send a byte now and then"
        for sock in select.select(there, [], [], DEADLINE / 4)[0]:
            with contextlib.suppress(ConnectionResetError):
                if sock.recv(65536):
                    continue
            there.remove(sock)
        for sock in there.intersection(kept[::3]):
            with contextlib.suppress(OSError):
                sock.sendall(b"x")
    assert open_descriptors(client.status()["pid"]) < 40
