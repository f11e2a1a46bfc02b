"""A transport for connections over which descriptors may come: where the kernel is older than Linux 6.16."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import cast

from rootstockd.host.log_rate import LogRate
from rootstockd.host.passed import MOST, close_aside, descriptors_in

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

_SIZE = 65_536
_NOTHING = memoryview(b"")


class GuardedTransport(asyncio.Transport):
    """A connection over which whoever connects may send what they like.

    It takes the place of the loop's own where the kernel can't refuse descriptors, whose end the loop's reads would
    have to wait for. Who sends some loses the connection; `connection_lost` comes when they are closed, so that what is
    counted until then is bounded.

    Args:
        stream: a connected Unix socket, which nobody else has; closed with the transport.
        protocol: who reads from it, as soon as `resume_reading` is called. It is told of each write that was not taken
            at once.
    """

    def __init__(self, stream: socket.socket, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"socket": stream})
        self._stream = stream
        self.set_protocol(protocol)
        self._loop = asyncio.get_running_loop()
        self._unsent = _NOTHING
        self._eof = self._closing = self._closed = False

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Another reads from it from now on."""
        self._protocol = protocol
        self._reader = protocol if isinstance(protocol, asyncio.BufferedProtocol) else _Whole(protocol)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing to do: they are zero."""

    def get_write_buffer_size(self) -> int:
        return len(self._unsent)

    def is_closing(self) -> bool:
        return self._closing or self._closed

    def pause_reading(self) -> None:
        if not self.is_closing():
            self._loop.remove_reader(self._stream)

    def resume_reading(self) -> None:
        if not self.is_closing():
            self._loop.add_reader(self._stream, self._read)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.is_closing() or self._eof:
            return
        if not self._unsent:
            if (sent := self._send(data)) == len(data):
                return
            self._loop.add_writer(self._stream, self._write_on)
            self._protocol.pause_writing()
            data = memoryview(data)[sent:]
        self._unsent = memoryview(b"".join((self._unsent, data)))  # a copy: the slot may change

    def write_eof(self) -> None:
        self._eof = True
        if not self._unsent and not self._closed:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close it when all is sent."""
        if self._unsent and not self._closed:
            self._closing = True
            self._loop.remove_reader(self._stream)
        else:
            self._lose(None)

    def abort(self) -> None:
        """Close it; what was not taken yet is lost."""
        self._lose(None)

    def read_now(self) -> bool:
        """Read once, though reading is paused, what is there; whether anything was, or the connection is lost."""
        return self._closed or self._read()

    def _read(self) -> bool:
        try:
            return self._take_in()
        except Exception as error:  # as the loop's own does
            log.exception("a connection is closed, as what it said could not be dealt with")
            self._lose(error)
            return True

    def _take_in(self) -> bool:
        how = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            size, ancillary, flags, _ = self._stream.recvmsg_into([self._reader.get_buffer(-1)], MOST, how)
        except BlockingIOError:
            return False
        except OSError as error:
            self._lose(error)
            return True
        descriptors = descriptors_in(ancillary) if ancillary else None
        # cut off are those for which there was no number left
        if descriptors or flags & socket.MSG_CTRUNC:
            self._lose(None, descriptors)
        elif size:
            self._reader.buffer_updated(size)
        else:
            self._lose(None)
        return True

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
        self._unsent = _NOTHING  # and not the end of what was sent, all of which it would keep
        self._loop.remove_writer(self._stream)
        if self._closing:
            self._lose(None)
            return
        if self._eof:
            self.write_eof()
        self._protocol.resume_writing()

    def _lose(self, error: Exception | None, descriptors: list[int] | None = None) -> None:
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._stream)
        self._loop.remove_writer(self._stream)
        # aside, as what came and was not read may have descriptors, too
        what = [self._stream, *(descriptors or ())]
        close_aside(what, lambda: self._protocol.connection_lost(error))


class _Whole(asyncio.BufferedProtocol):
    """What a protocol gets that has no buffer of its own."""

    def __init__(self, protocol: asyncio.BaseProtocol) -> None:
        self._protocol = cast("asyncio.Protocol", protocol)
        self._buffer = memoryview(bytearray(_SIZE))

    def get_buffer(self, sizehint: int) -> memoryview:
        del sizehint
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._protocol.data_received(bytes(self._buffer[:nbytes]))
