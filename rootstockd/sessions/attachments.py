"""Streams of stock drivers that are handed over as descriptors (docs/protocol.md).

i-PI and ASE's SocketIOCalculator listen, where the daemon has no rights and may not even see. So `rootstockd attach`
connects, as the user, and hands the stream over. Whoever does keeps a copy of it, and may do to it what they like at
any time: make it block, let closing it wait. The daemon's one thread must not be held up by that.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import Callable
from typing import Protocol

from rootstock_client import ipi
from rootstock_client.errors import LimitError, ProtocolError, RootstockError
from rootstockd.host.peers import peer_of

_ONE_DESCRIPTOR = socket.CMSG_LEN(4)
"""Not CMSG_SPACE, whose padding has room for a second one."""
_FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}


class Attaching(Protocol):
    """The session that a stream is handed over to."""

    def attached(self, stream: socket.socket) -> None:
        """It is there."""

    def not_attached(self, error: RootstockError) -> None:
        """What came is none."""

    def end(self, error: RootstockError | None) -> None:
        """Whoever handed it over has gone."""


class Line(asyncio.Protocol):
    """The connection over which a stream is handed over: it brings the descriptor, and is told how all ends.

    Args:
        transport: the connection; the line's own as soon as the stream is there, and until then the session's.
        session: what the stream is for.

    Raises:
        LimitError: there is no descriptor left.
    """

    def __init__(self, transport: asyncio.Transport, session: Attaching) -> None:
        self._transport, self._session = transport, session
        self._open = False
        self._loop = asyncio.get_running_loop()
        transport.pause_reading()  # the loop's reads would lose the descriptor
        try:
            self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError as error:
            raise _no_descriptor() from error
        self._loop.add_reader(self._socket, self._receive)
        transport.write(ipi.READY)

    def _receive(self) -> None:
        how = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(ipi.HEADER_SIZE, _ONE_DESCRIPTOR, how)
        except BlockingIOError:
            return
        except OSError:
            data, ancillary, flags = b"", [], 0
        self.stop_waiting()
        if ancillary:
            self._judge(int.from_bytes(ancillary[0][2], "little"), data)
        elif not data:
            self._transport.close()
        elif flags & socket.MSG_CTRUNC:
            self._session.not_attached(_no_descriptor())
        else:
            self._session.not_attached(ProtocolError("ATTACH came without a descriptor"))

    def _judge(self, descriptor: int, data: bytes) -> None:
        try:
            stream = socket.socket(fileno=descriptor)
        except OSError:
            refuse, close = "it is no socket", lambda: os.close(descriptor)
        else:
            refuse, close = _unfit(stream), stream.close
        if data != ipi.ATTACH:
            refuse = f"it came with {data!r}"
        if refuse:
            error = ProtocolError(f"what was handed over can't be a driver's stream: {refuse}")
            _close_aside(close, lambda: self._session.not_attached(error))
            return
        self._open = True
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        self._session.attached(stream)

    def stop_waiting(self) -> None:
        """No descriptor is waited for any more."""
        if self._socket.fileno() != -1:
            self._loop.remove_reader(self._socket)
            self._socket.close()

    def tell_model(self, fingerprint: str) -> None:
        """Say what has computed the first result."""
        if self._open:
            text = fingerprint.encode()
            self._transport.write(ipi.MODEL + ipi.INT.pack(len(text)) + text)

    def end(self, error: RootstockError | None) -> None:
        """Say how it ended: why the daemon ended it, or that the driver did."""
        if self._open:
            self._open = False
            self._transport.write(ipi.EXIT if error is None else ipi.error_frame(error))
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._session.end(ProtocolError(f"{data[:20]!r} where nothing is to be said: the stream was handed over"))

    def connection_lost(self, _exc: Exception | None) -> None:
        self._open = False
        self._session.end(None)


def _no_descriptor() -> LimitError:
    return LimitError("the daemon has no descriptor left for a driver's stream.", "Try again later.")


def _unfit(stream: socket.socket) -> str:
    """Why no driver can be at the other end; empty if one can."""
    if stream.family not in _FAMILIES or stream.type != socket.SOCK_STREAM:
        return "it is no stream socket"
    if stream.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "the socket listens"
    try:
        stream.getpeername()
    except OSError:
        return "the socket is not connected"
    if stream.family == socket.AF_UNIX and peer_of(stream).pid == os.getpid():
        return "it leads to this daemon, which would wait for itself for ever"
    return ""


def _close_aside(close: Callable[[], None], then: Callable[[], None]) -> None:
    """Close what may take its time to close: a file of a FUSE, TCP with SO_LINGER."""
    loop = asyncio.get_running_loop()

    def run() -> None:
        with contextlib.suppress(OSError):
            close()
        with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
            loop.call_soon_threadsafe(then)

    threading.Thread(target=run, name="close", daemon=True).start()


class DriverTransport(asyncio.Transport):
    """A stream that others have, too: no call on it may block, whatever they make of its O_NONBLOCK.

    Args:
        stream: a connected stream socket; closed with the transport.
        protocol: who reads from it. It is told of each write that was not taken at once.
    """

    def __init__(self, stream: socket.socket, protocol: asyncio.BufferedProtocol) -> None:
        super().__init__()
        self._stream, self._protocol = stream, protocol
        self._loop = asyncio.get_running_loop()
        self._unsent = b""
        self._eof = self._closed = False
        self._loop.add_reader(stream, self._read)

    def pause_reading(self) -> None:
        self._loop.remove_reader(self._stream)

    def resume_reading(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._stream, self._read)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._closed or self._eof:
            return
        if not self._unsent:
            if (sent := self._send(data)) == len(data):
                return
            self._loop.add_writer(self._stream, self._write_on)
            self._protocol.pause_writing()
            data = memoryview(data)[sent:]
        self._unsent += bytes(data)  # a copy: the slot may change

    def write_eof(self) -> None:
        self._eof = True
        if not self._unsent and not self._closed:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it; what was not taken yet is lost. The stream ends with it only if nobody else has it."""
        self._lose(None)

    def _read(self) -> None:
        try:
            size = self._stream.recv_into(self._protocol.get_buffer(-1), 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if size:
            self._protocol.buffer_updated(size)
        else:
            self._lose(None)

    def _send(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._stream.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            self._lose(error)
            return len(data)

    def _write_on(self) -> None:
        self._unsent = self._unsent[self._send(self._unsent) :]
        if self._unsent or self._closed:
            return
        self._loop.remove_writer(self._stream)
        if self._eof:
            self.write_eof()
        self._protocol.resume_writing()

    def _lose(self, error: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        # the session is counted until it is closed
        _close_aside(self._stream.close, lambda: self._protocol.connection_lost(error))
