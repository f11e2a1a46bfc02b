"""A stock driver that listens (i-PI, ASE's SocketIOCalculator), and its stream in a daemon's hands.

The user's side opens the stream, answers up to the driver's INIT, and hands it over to the daemon; then it waits on the
line. It keeps a copy of the stream: when the daemon dies, the driver shall find an end of file and not a reset, over
which i-PI hangs, and when the daemon is replaced, the next one goes on with the stream.
"""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from rootstock_client import ipi
from rootstock_client.errors import (
    ConnectionLostError,
    DaemonNotFoundError,
    DrainingError,
    DriverNotFoundError,
    ProtocolError,
    RootstockError,
    model_changed,
)
from rootstock_client.patience import AWAY, Outage, patience_with
from rootstock_client.runtime_dir import MET
from rootstock_client.shared_memory import Translation
from rootstock_client.sockets import connect, dismiss, establish, receive

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
                stream = socket.create_connection(address.where, timeout=max(patience, 1.0))
                stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
            return stream


def greet(stream: socket.socket) -> bytes | None:
    """Answer a driver as far as its INIT, and return that text; None if it has gone.

    Raises:
        ProtocolError: it does not speak i-PI's protocol.
    """
    try:
        return _greet(stream)
    except ConnectionError:
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


class PotentialSoFar:
    """What has computed for a driver, which has no notion of it: no other shall go on with its trajectory."""

    def __init__(self) -> None:
        self._model = self._fingerprint = ""

    def computed(self, fingerprint: str) -> None:
        """A connection has had its first result, by what has this fingerprint.

        Raises:
            ModelChangedError: another one has had another's.
        """
        self._fingerprint = self._fingerprint or fingerprint
        if fingerprint != self._fingerprint:
            raise model_changed(self._model, self._fingerprint, fingerprint, "attach anew")

    def in_init(self, init: bytes) -> bytes:
        """An INIT that asks for no other."""
        fields = json.loads(init)
        self._model = fields["model"]
        return json.dumps({**fields, "fingerprint": self._fingerprint}).encode() if self._fingerprint else init


class Attachment:
    """One of a driver's connections, served by a daemon until the driver ends.

    Args:
        daemon: the daemon's session socket.
        address: where the driver listens.
        describe: the INIT for the daemon, as JSON with `attach` set, from the text of the driver's own.
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
        potential: PotentialSoFar,
    ) -> None:
        self._potential = potential
        self._daemon, self._address, self._describe = daemon, address, describe
        self._patience, self._wait = patience, wait
        self._shared_memory = shared_memory
        self._translation: Translation | None = None
        self._stream: socket.socket | None = None
        self._init = b""
        self.attached = False
        """A daemon has the stream."""

    def run(self) -> None:
        """Serve the driver until it ends.

        Raises:
            DriverNotFoundError: it never listened.
            RootstockError: the daemon refused, or failed at a step; or it is gone, and patience is at its end.
        """
        met, outage = False, Outage(self._daemon)
        cut_off: RootstockError | None = None
        while True:
            if self._stream is None and not self._dial(first=not met, cut_off=cut_off):
                return
            assert self._stream is not None
            line = offer_when_there(
                self._daemon, lambda: self._potential.in_init(self._init), self._patience, outage, met=met
            )
            outage = Outage(self._daemon)
            if not is_connected(self._stream):  # the driver has gone meanwhile
                line.close()
                return
            met = self.attached = True
            try:
                with line:
                    hand_over(line, self._stream, self._potential.computed)
                if self._translation is not None and self._translation.error is not None:
                    raise self._translation.error
                return
            except AWAY as error:
                if not isinstance(error, DrainingError):  # which leaves it at rest
                    cut_off = None if has_ended(self._stream) else error
                    self.leave()  # nobody knows what the daemon had read of it; i-PI asks another connection again
                outage.wait(error, self._patience)
            finally:
                self.attached = False

    def _dial(self, *, first: bool, cut_off: RootstockError | None) -> bool:
        """Connect to the driver; whether it is there. One that was cut off, and listens no more, has failed."""
        try:
            self._stream = dial(self._address, self._wait if first else 0.0)
        except DriverNotFoundError:
            if first:
                raise
            if cut_off is not None:
                raise cut_off from None
            return False
        text = greet(self._stream)
        if text is None:
            return False
        self._init = self._describe(text)
        if self._shared_memory:
            self._translation = Translation(self._stream, json.loads(self._init).get("batch_size", 1))
            self._stream = self._translation.engine_end
        return True

    def leave(self) -> None:
        """End the stream, as far as it is ours."""
        stream, self._stream = self._stream, None
        if stream is not None:
            dismiss(stream)


def offer_when_there(
    daemon: Path, init: Callable[[], bytes], patience: float, outage: Outage | None = None, *, met: bool = False
) -> socket.socket:
    """The same as `offer`, also while the daemon is restarted.

    Args:
        daemon: its session socket.
        init: gives the INIT of each try.
        patience: seconds to wait for it.
        outage: what has begun already.
        met: it has served this driver before.

    Raises:
        RootstockError: it refuses, or is not there and patience is at its end.
    """
    outage, answered = outage or Outage(daemon), daemon in MET
    while True:
        try:
            line = offer(daemon, init())
        except AWAY as error:
            answered = answered or not isinstance(error, DaemonNotFoundError)
            outage.wait(error, patience_with(error, patience, met=met, answered=answered))
        else:
            outage.over()
            MET.add(daemon)
            return line


def has_ended(stream: socket.socket) -> bool:
    """Whether the other end of a stream has been closed, as far as nothing lies before that."""
    try:
        return not stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def is_connected(stream: socket.socket) -> bool:
    """Whether a stream still leads to somebody: TCP knows it when the other end was reset."""
    try:
        stream.getpeername()
    except OSError:
        return False
    return True


def offer(daemon: Path, init: bytes) -> socket.socket:
    """Open a line to a daemon that is ready to take a driver's stream over.

    Args:
        daemon: its session socket.
        init: JSON with `attach` set.

    Raises:
        RootstockError: it refuses, or is not there.
    """
    line = connect(daemon)
    try:
        line.sendall(ipi.init_frame(init) + ipi.STATUS)
        answer = receive(line, ipi.HEADER_SIZE)
        if answer == ipi.NEEDINIT:  # it was refused; GETFORCE brings the reason
            line.sendall(ipi.GETFORCE)
            answer = receive(line, ipi.HEADER_SIZE)
        if answer == ipi.READY:
            return line
        raise _error(line, answer)
    except BaseException as error:
        line.close()
        if isinstance(error, OSError) and not isinstance(error, RootstockError):
            raise ConnectionLostError(f"rootstockd at {daemon} closed the connection.") from error
        raise


def hand_over(line: socket.socket, stream: socket.socket, computed: Callable[[str], object]) -> None:
    """Hand a stream over to the daemon, and wait until its driver ends.

    Args:
        line: to the daemon.
        stream: the driver's.
        computed: told the fingerprint of what has computed its first result.

    Raises:
        RootstockError: why the daemon has ended it.
        ConnectionLostError: the daemon has gone.
    """
    try:
        socket.send_fds(line, [ipi.ATTACH], [stream.fileno()])
        while (answer := receive(line, ipi.HEADER_SIZE)) == ipi.MODEL and (said := _text(line)) is not None:
            computed(said.decode())
    except OSError:
        answer = b""
    if answer != ipi.EXIT:
        raise _error(line, answer)


def _error(line: socket.socket, answer: bytes) -> RootstockError:
    if answer == ipi.ERROR and (said := _text(line)) is not None:
        return RootstockError.from_json(said)
    return ConnectionLostError("rootstockd closed the connection.", "`rootstockd logs` may say why.")


def _text(line: socket.socket) -> bytes | None:
    """What is behind a header, its size before it; None if the stream ends before that does."""
    try:
        if len(size := receive(line, ipi.INT.size)) < ipi.INT.size:
            return None
        (length,) = ipi.INT.unpack(size)
        said = receive(line, length)
    except OSError:
        return None
    return said if len(said) == length else None
