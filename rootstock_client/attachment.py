"""A stock driver that listens (i-PI, ASE's SocketIOCalculator), and a daemon's numbers for it.

What connects to the driver is an engine of the user's own, which has a session with the daemon as any job of the user's
has one. The daemon never touches the driver's stream: whoever opened one may hold up all that is done to it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rootstock_client import ipi
from rootstock_client.connection import Connection
from rootstock_client.engine_side import Close, EngineSide, Evaluate, Event, Send, SendResult
from rootstock_client.errors import (
    DriverNotFoundError,
    InvalidStructureError,
    ProtocolError,
    RootstockError,
    model_changed,
)
from rootstock_client.keeper import Keeper
from rootstock_client.shared_memory import Translation
from rootstock_client.sockets import credentials_of, dismiss, establish, receive, send_parts

IPI_PREFIX = "/tmp/ipi_"  # noqa: S108 - i-PI's and ASE's
LAST_PORT = 65_535
PAUSE = 0.1
"""Seconds between tries while a driver does not listen yet."""


class Address(NamedTuple):
    """Where a driver listens."""

    family: socket.AddressFamily
    where: str | tuple[str, int]

    def __str__(self) -> str:
        return self.where if isinstance(self.where, str) else f"{self.where[0]}:{self.where[1]}"


def parse_address(text: str) -> Address:
    """Read an address: a path, `HOST:PORT` or `:PORT`, or a name as i-PI has them, for `/tmp/ipi_NAME`.

    Raises:
        ValueError: it is none of these.
    """
    if "/" in text:
        return Address(socket.AF_UNIX, text)
    if found := re.fullmatch(r"(?P<host>.*):(?P<port>\d{1,5})", text):
        if (port := int(found["port"])) > LAST_PORT:
            raise ValueError(f"{text!r} is no address: ports end at {LAST_PORT}.")
        return Address(socket.AF_INET, (found["host"].strip("[]") or "localhost", port))
    if not text or ":" in text:
        raise ValueError(f"{text!r} is no address; it is a path, HOST:PORT, or the name of an i-PI socket.")
    return Address(socket.AF_UNIX, IPI_PREFIX + text)


def dial(address: Address, patience: float) -> socket.socket:
    """Connect to a driver, which may take up to `patience` seconds to listen.

    Raises:
        DriverNotFoundError: nobody listens, or not for this user.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            if isinstance(address.where, tuple):
                stream = _dial_tcp(address.where, max(patience, 1.0))
            else:
                stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    establish(stream, address.where)
                except BaseException:
                    stream.close()
                    raise
        except (FileNotFoundError, ConnectionRefusedError, TimeoutError, BlockingIOError) as error:
            if time.monotonic() >= deadline:
                raise DriverNotFoundError(
                    f"no driver listens at {address}: {(error.strerror or str(error)).lower()}.",
                    "Start i-PI, or the script with the SocketIOCalculator, and see that both name the same socket.",
                ) from error
            time.sleep(PAUSE)
        except OSError as error:
            raise DriverNotFoundError(f"can't connect to {address}: {error.strerror or error}.") from error
        else:
            stream.settimeout(None)
            _check_owner(stream, address)
            return stream


def _dial_tcp(where: tuple[str, int], timeout: float) -> socket.socket:
    stream = socket.create_connection(where, timeout=timeout)
    refused = ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    try:
        try:
            peer = stream.getpeername()
        except OSError as error:  # it was reset at once
            raise refused from error
        if stream.getsockname() == peer:  # the kernel gave it the very port that it was to call
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # free for the driver
            raise refused
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # its machine may lose power without a word
        for option, value in (socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 6):
            stream.setsockopt(socket.IPPROTO_TCP, option, value)
    except BaseException:
        stream.close()
        raise
    return stream


def _check_owner(stream: socket.socket, address: Address) -> None:
    """Close the stream if another user has put a socket where the driver's was to be, as anybody may in /tmp.

    Raises:
        DriverNotFoundError: somebody has.
    """
    if stream.family != socket.AF_UNIX:
        return
    _, uid, _ = credentials_of(stream)
    if uid not in (os.getuid(), 0):
        stream.close()
        raise DriverNotFoundError(
            f"what listens at {address} is not yours, but another user's (uid {uid}).",
            "See whether your driver could open its socket, and choose another name for it.",
        )


def greet(stream: socket.socket) -> bytes | None:
    """Answer a driver as far as its INIT, and return that text; None if it has gone.

    Raises:
        ProtocolError: it does not speak i-PI's protocol.
    """
    try:
        return _greet(stream)
    except OSError:
        return None


def _greet(stream: socket.socket) -> bytes | None:
    while True:
        word = receive(stream, ipi.HEADER_SIZE)
        if word in (b"", ipi.EXIT):
            return None
        if word == ipi.STATUS:
            stream.sendall(ipi.NEEDINIT)
        elif word == ipi.INIT:
            if len(numbers := receive(stream, ipi.TWO_INTS.size)) < ipi.TWO_INTS.size:
                return None
            size = ipi.checked_count(ipi.TWO_INTS.unpack(numbers)[1], ipi.Limits().init, "bytes of INIT")
            text = receive(stream, size)
            return text if len(text) == size else None
        else:
            raise ProtocolError(f"the driver began with {word!r}, which is not i-PI's protocol.")


class SamePotential:
    """What has computed for a driver, which has no notion of it: no other shall go on with its trajectory."""

    def __init__(self) -> None:
        self._fingerprint = ""
        """Of the first result that names one; older daemons name none."""
        self._lock = threading.Lock()

    def check(self, extras: bytes, model: str) -> None:
        """Whether what has computed a result is what has computed all others, on any of the driver's connections.

        Args:
            extras: the result's.
            model: the model's name.

        Raises:
            ModelChangedError: it is another.
        """
        now = json.loads(extras).get("fingerprint") if extras else None
        with self._lock:
            self._fingerprint = self._fingerprint or now or ""
            if self._fingerprint and now != self._fingerprint:
                raise model_changed(model, self._fingerprint, now, "attach anew")


class Attachment:
    """One of a driver's connections, for as long as the driver has it.

    Args:
        daemon: the daemon's session socket.
        address: where the driver listens.
        describe: the INIT for the daemon, as JSON, from the text of the driver's own.
        patience: seconds to wait for a daemon that has gone.
        wait: seconds to wait for the driver to listen.
        shared_memory: it is i-PI in ``mode="shm"``.
        potential: what has computed for the driver so far, one for all of its connections.
    """

    def __init__(
        self,
        daemon: Path,
        address: Address,
        describe: Callable[[bytes], bytes],
        *,
        patience: float,
        wait: float,
        shared_memory: bool,
        potential: SamePotential,
    ) -> None:
        self._daemon, self._patience = daemon, patience
        self._address, self._wait, self._shared_memory = address, wait, shared_memory
        self._describe, self._potential = describe, potential
        self._stream: socket.socket | None = None
        self._translation: Translation | None = None
        self._engine = EngineSide(self._place, ipi.ANY_NUMBER)
        self._connection: Connection | None = None
        """With the daemon; None before the driver's INIT."""
        self._init, self._model = b"", ""
        self._positions = self._forces = np.empty((0, 3))
        self._reply: list[bytes | ipi.FloatArray] = []
        self._extras: list[bytes] = []
        self.attached = False
        """The driver is served."""

    def run(self) -> None:
        """Serve the driver until it ends.

        Raises:
            DriverNotFoundError: it never listened.
            ProtocolError: it does not speak i-PI's protocol.
            RootstockError: the daemon refused, or failed at a step; or it is gone, and patience is at its end.
        """
        stream = self._stream = dial(self._address, self._wait)
        keeper = Keeper(stream)
        try:
            if (text := greet(stream)) is None:
                return
            self._begin(text)
            if self._shared_memory:
                self._translation = Translation(stream, self._engine.batch_size)
                stream = self._translation.engine_end
            self._serve(stream)
            if self._translation is not None and self._translation.error is not None:
                raise self._translation.error
        finally:
            self.attached = False
            if self._connection is not None:
                self._connection.close()
            self.leave()
            keeper.end()

    def _serve(self, stream: socket.socket) -> None:
        engine, in_parts = self._engine, stream.family != socket.AF_UNIX
        try:
            while True:
                if (event := engine.next_event()) is not None:
                    if isinstance(event, Close):
                        break
                    self._do(stream, event)
                elif size := stream.recv_into(engine.get_buffer(-1)):
                    if in_parts:
                        # drivers that send a message in parts and leave TCP_NODELAY off, as ASE's does, wait for our
                        # acknowledgement, 40 ms; the kernel forgets that it was told to hurry
                        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                    engine.received(size)
                else:
                    return
        except OSError as error:
            if isinstance(error, RootstockError):  # some of which are TimeoutErrors and the like, too
                raise
            return  # the driver has gone
        if event.error is not None:
            raise event.error

    def _do(self, stream: socket.socket, event: Event) -> None:
        if isinstance(event, Evaluate):
            self._evaluate(event.cells)
            self._engine.finish()
        elif isinstance(event, SendResult):
            send_parts(stream, self._reply, sum(memoryview(part).nbytes for part in self._reply))
        elif isinstance(event, Send):
            stream.sendall(event.data)
        elif isinstance(event, ipi.Init):
            self._begin(event.text)

    def _begin(self, text: bytes) -> None:
        """The driver has said INIT."""
        self._init = self._describe(text)
        fields = json.loads(self._init)
        batch = int(fields.get("batch_size", 1))
        self._model, size = fields["model"], batch * len(fields["numbers"])
        if self._connection is not None:
            self._connection.end()  # what it has must be free for the next
        self._connection = Connection(self._daemon, self._patience, batch_size=batch)
        self._connection.open(self._init)
        self._positions, self._forces = np.empty((size, 3)), np.empty((size, 3))  # not before the sizes were looked at
        self._engine.accept(batch)
        self.attached = True

    def _place(self, natoms: int) -> memoryview:
        announced = len(self._positions) // self._engine.batch_size
        if natoms != announced:
            raise InvalidStructureError(
                f"the driver sends {natoms} atoms, and {announced} were announced.",
                "The structure, or the species, given to `attach` has to have the driver's atoms.",
            )
        return memoryview(self._positions).cast("B")

    def _evaluate(self, cells: bytes) -> None:
        batch = self._engine.batch_size
        count = ipi.INT.pack(len(self._positions) // batch)
        head = ipi.POSDATA + (cells + count if batch == 1 else count + cells)
        assert self._connection is not None
        result = self._connection.evaluate(self._init, head, self._positions, self._forces)
        for extras in result.extras if result.extras != self._extras else ():
            self._potential.check(extras, self._model)
        self._extras = result.extras
        behind = b"".join((result.packed_virials, *(ipi.INT.pack(len(extras)) + extras for extras in result.extras)))
        self._reply = [ipi.FORCEREADY + result.packed_energies + count, self._forces, behind]

    def leave(self) -> None:
        """End the stream, also from another thread."""
        stream, self._stream = self._stream, None
        if self._translation is not None:
            self._translation.end()
        elif stream is not None:
            dismiss(stream)


def ask_whether(daemon: Path, init: bytes, patience: float) -> None:
    """Whether a daemon takes a system; also while it is restarted.

    Raises:
        RootstockError: it refuses, or is not there and patience is at its end.
    """
    connection = Connection(daemon, patience)
    connection.open(init)
    connection.end()
