"""Many sessions from one process, and the echo server they are compared with: `python load.py JSON`.

It obeys commands like child.py:

====================================================== ===========================================================
command                                                answer
====================================================== ===========================================================
{"do": "connect", "idle": M, "active": K, "natoms": N} {"reply": bytes}: all connected, each has had one evaluation
{"do": "run", "seconds": T}                            {"latencies": [...], "counts": [...], "elapsed": t}: the active
                                                       ones at it, t until the last has its answer
{"do": "quit"}                                         {}
====================================================== ===========================================================
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.random  # here and now: another user may not be able to read it
import uvloop

from rootstock_client import ipi
from rootstock_client.connection import Connection
from rootstock_client.units import BOHR

NOTHING_EXTRA = 12 + 8 + 4 + 72 + 4
"""A FORCEREADY message without its forces, where nothing extra was asked for."""


def messages(natoms: int, model: str) -> tuple[bytes, bytes, int]:
    """INIT, one step's request, and the size of its answer."""
    rng = np.random.default_rng(1)
    side = 3.6 * np.ceil((natoms / 4) ** (1 / 3)) / BOHR
    cell = np.eye(3) * side
    edge = int(np.ceil(natoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(edge)] * 3), axis=-1).reshape(-1, 3)[:natoms]
    positions = (grid + rng.uniform(-0.1, 0.1, (natoms, 3))) * side / edge  # no two on top of each other
    fields = {"rootstock": 1, "model": model, "numbers": [29] * natoms, "pbc": [True] * 3, "want": ["energy", "forces"]}
    request = ipi.posdata_head(cell, np.linalg.inv(cell), natoms) + positions.tobytes() + ipi.GETFORCE
    return ipi.init_frame(json.dumps(fields).encode()), request, NOTHING_EXTRA + 24 * natoms


class Job(asyncio.BufferedProtocol):
    """One session: asks again as soon as it has its answer, while it is meant to."""

    def __init__(self, request: bytes, reply: int, buffer: bytearray) -> None:
        self._request, self._reply, self._buffer = request, reply, buffer
        self._have = 0
        self._sent = 0.0
        self.until = 0.0
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, until: float, first: bytes = b"") -> None:
        """Begin."""
        self.until, self.latencies = until, []
        self.done = asyncio.get_running_loop().create_future()
        self._sent = time.perf_counter()
        self.transport.write(first + self._request)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return memoryview(self._buffer)[: self._reply - self._have]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        if self._have < self._reply:
            return
        self._have = 0
        now = time.perf_counter()
        self.latencies.append(now - self._sent)
        if now < self.until:
            self._sent = now
            self.transport.write(self._request)
        elif not self.done.done():
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("a session was closed"))


class EchoServer(asyncio.BufferedProtocol):
    """As many bytes back as an answer has, for as many as a request has."""

    def __init__(self, request: int, reply: bytes) -> None:
        self._request, self._reply = request, reply
        self._buffer = memoryview(bytearray(request))
        self._have = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._buffer[self._have :]

    def buffer_updated(self, nbytes: int) -> None:
        self._have += nbytes
        if self._have == self._request:
            self._have = 0
            self._transport.write(self._reply)


class Load:
    """The sessions. Options: socket, model (empty for the echo server), uid and gid of another user to be.

    The model must say nothing extra.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        self._path, self._model = options["socket"], options["model"]
        self._jobs: list[Job] = []
        self._active: list[Job] = []

    async def obey(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do one command; its answer."""
        if command["do"] == "connect":
            return await self._connect(command["idle"], command["active"], command["natoms"])
        if command["do"] == "run":
            start = time.perf_counter()
            for job in self._active:
                job.ask(start + command["seconds"])
            await asyncio.gather(*(job.done for job in self._active))
            elapsed = time.perf_counter() - start
            latencies = [value for job in self._active for value in job.latencies]
            counts = [len(job.latencies) for job in self._active]
            return {"latencies": latencies, "counts": counts, "elapsed": elapsed}
        return {}

    async def _connect(self, idle: int, active: int, natoms: int) -> dict[str, Any]:
        init, request, reply = messages(natoms, self._model)
        if self._model:
            reply += self._extras(init, request, natoms)
        buffer = bytearray(reply)
        for _ in range(idle + active):
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(self._path)  # blocking: asyncio takes a full backlog for a connection
            sock.setblocking(False)  # noqa: FBT003
            loop = asyncio.get_running_loop()
            _, job = await loop.create_unix_connection(lambda: Job(request, reply, buffer), sock=sock)
            job.ask(0.0, init if self._model else b"")
            await job.done
            self._jobs.append(job)
        self._active = self._jobs[-active:]
        return {"reply": reply}

    def _extras(self, init: bytes, request: bytes, natoms: int) -> int:
        """How many bytes of extras each answer has."""
        connection = Connection(Path(self._path))
        head = len(request) - len(ipi.GETFORCE) - 24 * natoms
        positions = np.frombuffer(request, "<f8", 3 * natoms, head).reshape(natoms, 3)
        answer = connection.evaluate(init[20:], request[:head], positions, np.zeros((natoms, 3)))
        connection.close()
        return len(answer.extras[0])


async def serve_echo(options: dict[str, Any]) -> None:
    """Be the echo server."""
    _, request, reply = messages(options["natoms"], "")
    loop = asyncio.get_running_loop()
    server = await loop.create_unix_server(
        lambda: EchoServer(len(request), bytes(reply)), options["socket"], backlog=4096
    )
    await server.serve_forever()


async def drive(options: dict[str, Any]) -> None:
    """Obey commands."""
    out = os.fdopen(os.dup(1), "w")
    load = Load(options)
    while line := await asyncio.to_thread(sys.stdin.readline):
        command = json.loads(line)
        print(json.dumps(await load.obey(command)), file=out, flush=True)
        if command["do"] == "quit":
            return


if __name__ == "__main__":
    chosen = json.loads(sys.argv[1])
    if "uid" in chosen:
        os.setgroups([])
        os.setgid(chosen["gid"])
        os.setuid(chosen["uid"])
    # only the server is told the size in advance
    uvloop.run(serve_echo(chosen) if "natoms" in chosen else drive(chosen))
