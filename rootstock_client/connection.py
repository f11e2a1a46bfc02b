"""One session with a daemon, over a blocking socket."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from pathlib import Path

import numpy as np

from rootstock_client import ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.errors import AccessDeniedError, ConnectionLostError, DaemonNotFoundError, InvalidStructureError
from rootstock_client.runtime_dir import START_HINT


def connect(path: Path) -> socket.socket:
    """Connect to a Unix socket of a daemon.

    Raises:
        DaemonNotFoundError: nobody answers there.
        AccessDeniedError: the socket is not open to this user.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(os.fspath(path))
    except PermissionError as error:
        sock.close()
        raise AccessDeniedError(
            f"the socket {path} is not open to you.",
            "Use a daemon of your own, or ask whoever runs this one to put you into its access.socket_group.",
        ) from error
    except OSError as error:
        sock.close()
        raise DaemonNotFoundError(
            f"no rootstockd answers at {path}: {(error.strerror or str(error)).lower()}.", START_HINT
        ) from error
    return sock


_AS_SENT = ipi.Limits(atoms=2**31 - 1)
"""How many atoms are right is for the daemon to say, and for _Target: just as many as were sent."""


class _Target:
    """Where a step's forces go. Not a method of Connection: that would be a cycle, and sessions would stay open."""

    forces: ipi.FloatArray = np.empty((0, 3))

    def __call__(self, natoms: int) -> memoryview:
        if natoms != len(self.forces):
            raise InvalidStructureError(f"forces for {natoms} atoms came back; {len(self.forces)} were sent")
        return memoryview(self.forces).cast("B")


class Connection:
    """A session that opens itself when it is first needed, and again after it was lost or after a fork.

    Threads may share it: one exchange at a time.

    Args:
        path: the daemon's session socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._sock: socket.socket | None = None
        self._pid = 0
        self._init = b""
        self._target = _Target()
        self._side = DriverSide(self._target, limits=_AS_SENT)

    def evaluate(self, init: bytes, head: bytes, positions: ipi.FloatArray, forces: ipi.FloatArray) -> ipi.ForceReady:
        """One step: send a structure, wait for its result.

        Args:
            init: the INIT text that describes its system; sent only when it is not the object that was sent last.
            head: POSDATA up to the positions.
            positions: (natoms, 3), Bohr, contiguous.
            forces: (natoms, 3), contiguous; filled with the forces in Hartree/Bohr.

        Raises:
            DaemonNotFoundError: there is no daemon.
            ConnectionLostError: it went away, twice.
            RootstockError: what the daemon says is wrong.
        """
        with self._lock:
            self._target.forces = forces
            if self._pid != os.getpid():  # after a fork the connection is the parent's
                self._close()
            if self._sock is not None:
                try:
                    return self._exchange(self._sock, init, head, positions)
                except ConnectionLostError:
                    pass  # the daemon was restarted since: an evaluation can be asked for again
            self._side = DriverSide(self._target, limits=_AS_SENT)
            self._pid = os.getpid()
            self._sock = connect(self.path)
            return self._exchange(self._sock, init, head, positions)

    def _exchange(self, sock: socket.socket, init: bytes, head: bytes, positions: ipi.FloatArray) -> ipi.ForceReady:
        buffers: list[bytes | ipi.FloatArray] = [head, positions, ipi.GETFORCE]
        size = len(head) + positions.nbytes + len(ipi.GETFORCE)
        if init is not self._init:
            buffers.insert(0, frame := ipi.init_frame(init))
            size += len(frame)
        try:
            self._init = init
            send_all(sock, buffers, size)
            self._side.expect(ipi.GETFORCE)
            answer = self._receive(sock)
        except BaseException:  # whatever it was, the next answer would be the wrong one
            self._close()
            raise
        if isinstance(answer, ipi.Failure):
            self._init = b""  # it may have been refused for a reason that passes: say it again next time
            raise answer.error
        assert isinstance(answer, ipi.ForceReady)
        return answer

    def _receive(self, sock: socket.socket) -> ipi.EngineMessage:
        side = self._side
        while True:
            try:
                size = sock.recv_into(side.get_buffer())
            except OSError as error:
                raise self._lost() from error
            if size == 0:
                raise self._lost()
            side.received(size)
            if (message := side.next_message()) is not None:
                return message

    def _lost(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"rootstockd at {self.path} closed the connection in the middle of a step.",
            "`rootstockd logs` may say why; if it was stopped, start it again and repeat the step.",
        )

    def _close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock, self._init = None, b""

    def close(self) -> None:
        """Close the session; the next step opens a new one."""
        with self._lock:
            self._close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # a constructor that failed
            self._close()


def send_all(sock: socket.socket, buffers: list[bytes | ipi.FloatArray], size: int) -> None:
    """Send all buffers, of so many bytes together, in one system call where the socket takes them.

    Raises:
        ConnectionLostError: the other side is gone.
    """
    try:
        if (sent := sock.sendmsg(buffers)) < size:
            sock.sendall(memoryview(b"".join(buffers))[sent:])
    except (BrokenPipeError, ConnectionResetError) as error:
        raise ConnectionLostError("rootstockd closed the connection.") from error
