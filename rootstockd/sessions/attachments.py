"""Streams of stock drivers that are handed over as descriptors (docs/protocol.md).

i-PI and ASE's SocketIOCalculator listen, where the daemon has no rights and may not even see. So `rootstockd attach`
connects, as the user, and hands the stream over. Whoever does keeps a copy of it, and may do to it what they like at
any time: make it block, let closing it wait. The daemon's one thread must not be held up by that.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Iterable
from typing import Protocol

from rootstock_client import ipi
from rootstock_client.errors import LimitError, ProtocolError, RootstockError
from rootstockd.host import passed
from rootstockd.host.peers import peer_of

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
        self._open, self._waits = False, True
        self._loop = asyncio.get_running_loop()
        transport.pause_reading()  # the loop's reads would lose the descriptor
        try:
            self._socket = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        except OSError as error:
            raise _no_descriptor() from error
        passed.refuse(self._socket, allow=True)
        self._loop.add_reader(self._socket, self._receive)
        transport.write(ipi.READY)

    def _receive(self) -> None:
        try:
            data, descriptors, cut = self._read()
        except BlockingIOError:
            return
        passed.refuse(self._socket)
        if not data:
            self.stop_waiting()
            self._transport.close()
        elif len(descriptors) == 1 and not self._has_more():
            self._leave_to_loop()
            self._judge(descriptors[0], data)
        else:
            error: RootstockError = ProtocolError("ATTACH came without a descriptor.")
            if descriptors:
                error = ProtocolError("more came with the descriptor than ATTACH.")
            elif cut:
                error = _no_descriptor()
            self.stop_waiting(descriptors, lambda: self._session.not_attached(error))

    def _read(self) -> tuple[bytes, list[int], bool]:
        """What is next, the descriptors with it, and whether there was no room for some.

        Raises:
            BlockingIOError: nothing is.
        """
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(
                ipi.HEADER_SIZE, passed.MOST, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise
        except OSError:
            return b"", [], False
        return data, passed.descriptors_in(ancillary), bool(flags & socket.MSG_CTRUNC)

    def _judge(self, descriptor: int, data: bytes) -> None:
        unfit: int | socket.socket
        try:
            stream = socket.socket(fileno=descriptor)
        except OSError:
            refuse, unfit = "it is no socket", descriptor
        else:
            refuse, unfit = _unfit(stream), stream
        if data != ipi.ATTACH:
            refuse = f"it came with {data!r}"
        if refuse:
            error = ProtocolError(f"what was handed over can't be a driver's stream: {refuse}.")
            passed.close_aside([unfit], lambda: self._session.not_attached(error))
            return
        self._open = True
        self._transport.set_protocol(self)
        self._transport.resume_reading()
        self._session.attached(stream)

    def _has_more(self) -> bool:
        """Whether something lies behind, which is left there: it may go on for ever."""
        try:
            return bool(self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def _leave_to_loop(self) -> None:
        """Have the transport read the connection again: no descriptor lies there, and none can come."""
        self._waits = False
        self._loop.remove_reader(self._socket)
        self._socket.close()

    def stop_waiting(self, surplus: Iterable[int] = (), then: Callable[[], object] = lambda: None) -> None:
        """No descriptor is waited for any more, nor anything read that comes over the connection.

        Args:
            surplus: descriptors that are nobody's.
            then: called when these are closed, and all that lay behind.
        """
        if self._waits:
            self._waits = False
            self._loop.remove_reader(self._socket)
            passed.close_aside([*surplus, self._socket], then, unread=True)

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
        self._session.end(ProtocolError(f"{data[:20]!r} where nothing is to be said: the stream was handed over."))

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
