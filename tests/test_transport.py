"""The transport of streams whose other end may do what it likes, on real sockets and the daemon's event loop."""

from __future__ import annotations

import asyncio
import random
import socket
import time

import uvloop

from rootstockd.sessions.transport import GuardedTransport

uvloop.run(asyncio.sleep(0))  # the first makes a pipe that libuv keeps, and that no test is to be blamed for


class Protocol(asyncio.BufferedProtocol):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.buffer = bytearray(1024)
        self.lost: list[Exception | None] = []
        self.over = asyncio.Event()
        self.resumed = 0

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return memoryview(self.buffer)

    def buffer_updated(self, nbytes: int) -> None:
        raise ValueError(f"a defect at {nbytes} bytes")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)
        self.over.set()

    def pause_writing(self) -> None:
        self.resumed -= 1

    def resume_writing(self) -> None:
        self.resumed += 1


def test_a_protocol_that_fails_loses_its_connection(caplog) -> None:
    """And whoever is at the other end learns of it, as with the loop's own."""

    async def live() -> Protocol:
        ours, theirs = socket.socketpair()
        protocol = Protocol()
        GuardedTransport(ours, protocol).resume_reading()
        with theirs:
            theirs.setblocking(False)
            theirs.send(b"x")
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(theirs, 1), 10) == b""
        await asyncio.wait_for(protocol.over.wait(), 10)
        return protocol

    protocol = uvloop.run(live())
    assert [str(error) for error in protocol.lost] == ["a defect at 1 bytes"]
    assert "ValueError: a defect" in caplog.text


def test_a_long_answer_to_a_slow_reader_is_copied_once() -> None:
    """By parts, each of which left the rest to be copied, 64 MiB took five seconds."""
    answer = random.Random(1).randbytes(2**20) * 64

    async def live() -> tuple[bytes, float, Protocol]:
        ours, theirs = socket.socketpair()
        protocol = Protocol()
        transport = GuardedTransport(ours, protocol)
        with theirs:
            theirs.setblocking(False)
            began = time.thread_time()
            transport.write(answer)
            transport.write(b"more")
            took = bytearray()
            while len(took) < len(answer) + 4:
                took += await asyncio.get_running_loop().sock_recv(theirs, 2**18)
            cost = time.thread_time() - began
        assert transport.get_write_buffer_size() == 0
        transport.close()
        await asyncio.wait_for(protocol.over.wait(), 10)
        return bytes(took), cost, protocol

    took, cost, protocol = uvloop.run(live())
    assert took == answer + b"more"
    assert protocol.resumed == 0
    assert cost < 1.5
