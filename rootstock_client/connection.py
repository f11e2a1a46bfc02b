"""One session with a daemon, over a blocking socket."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import numpy as np

from rootstock_client import ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.errors import (
    ConnectionLostError,
    DrainingError,
    InStepError,
    InvalidStructureError,
    RestartNeededError,
    RootstockError,
    used_in_step,
)
from rootstock_client.loading import LONG, Silence
from rootstock_client.patience import AWAY, Outage, patience_with
from rootstock_client.runtime_dir import MET
from rootstock_client.sockets import connect, dismiss, send_parts

SILENCE = struct.pack("ll", LONG, 0)
"""Seconds and microseconds without a word from the daemon after which a job asks why; the kernel counts them."""

_REFUSED = ipi.StatusReply(ipi.NEEDINIT)


class _Target:
    """Where a step's forces go. Not a method of Connection: that would be a cycle, and sessions would stay open."""

    forces: ipi.FloatArray = np.empty((0, 3))

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size

    def __call__(self, natoms: int) -> memoryview:
        if natoms * self._batch_size != len(self.forces):
            sent = len(self.forces) // self._batch_size
            raise InvalidStructureError(f"forces for {natoms} atoms came back; {sent} were sent.")
        return memoryview(self.forces).cast("B")


class Connection:
    """A session that opens itself when it is first needed, and again after it was lost or after a fork.

    A step is repeated over the new session: results depend on nothing but the structure, and a stream in which anything
    went wrong is never read again. Once a daemon has answered this process, one that has gone, is stopping or has to be
    restarted is waited for; once it has answered this connection, also one that has just come back and has no place.

    Threads may share it: one exchange at a time. What runs inside a step, in its own thread (a signal's handler, a
    finalizer), can't wait for it: it may close the session, and no more.

    Args:
        path: the daemon's session socket.
        patience: how many seconds an outage may last for one step; with 0 it connects again once and waits for nothing.
        met: a daemon has answered there before, as to a process that this one was forked from.
        batch_size: structures in a step, as its INIT says.
    """

    def __init__(self, path: Path, patience: float = 0.0, *, met: bool = False, batch_size: int = 1) -> None:
        self.path, self.patience, self.met = path, patience, met
        self._lock = threading.RLock()
        self._in_step = False
        """Whoever has the lock all the same runs inside the step, in its thread."""
        self._closed = False
        """By somebody who does, since the step began."""
        self._sock: socket.socket | None = None
        self._pid = 0
        self._init = b""
        self._target, self._batch_size = _Target(batch_size), batch_size
        self._side = self._new_side()

    def evaluate(self, init: bytes, head: bytes, positions: ipi.FloatArray, forces: ipi.FloatArray) -> ipi.ForceReady:
        """One step: send a structure, wait for its result.

        Args:
            init: the INIT text that describes its system; sent only when it is not what was sent last.
            head: POSDATA up to the positions.
            positions: (B * natoms, 3), of B structures, Bohr, contiguous.
            forces: (B * natoms, 3), contiguous; filled with the forces in Hartree/Bohr.

        Raises:
            DaemonNotFoundError, ConnectionLostError, DrainingError, RestartNeededError, DaemonFullError,
                UserLimitError: there is no daemon, or none that can do it, or no place, and patience is at its end; a
                process that has met no daemon at this address has none unless somebody answers, and a new session has
                none for a place.
            InStepError: it was asked for inside another step, or the session was closed inside this one.
            RootstockError: what the daemon says is wrong.
        """
        size = len(head) + positions.nbytes + len(ipi.GETFORCE)
        answer = self._ask(init, [head, positions, ipi.GETFORCE], size, ipi.GETFORCE, forces)
        assert isinstance(answer, ipi.ForceReady)
        return answer

    def open(self, init: bytes) -> None:
        """Begin the session before there is anything to evaluate, so that what is wrong with it is told now.

        Args:
            init: as for `evaluate`, which says nothing more of the system then.

        Raises:
            RootstockError: as for `evaluate`.
        """
        self._ask(init, [ipi.STATUS], len(ipi.STATUS), ipi.STATUS)

    def _ask(
        self,
        init: bytes,
        request: list[bytes | ipi.FloatArray],
        size: int,
        asked: bytes,
        forces: ipi.FloatArray | None = None,
    ) -> ipi.EngineMessage:
        """Say something of a system, of so many bytes, and wait for its answer."""
        with self._lock:
            if self._in_step:
                raise used_in_step()
            try:
                self._in_step, self._closed = True, False
                if forces is not None:
                    self._target.forces = forces
                if self._pid != os.getpid():  # after a fork the connection is the parent's
                    self._close()
                if self._sock is not None:
                    try:
                        return self._exchange(self._sock, init, request, size, asked)
                    except (ConnectionLostError, DrainingError, RestartNeededError):
                        self._close()
                return self._open_and_exchange(init, request, size, asked)
            finally:
                self._in_step = False

    def _open_and_exchange(
        self, init: bytes, request: list[bytes | ipi.FloatArray], size: int, asked: bytes
    ) -> ipi.EngineMessage:
        outage, met = Outage(self.path), self.met
        connected = False
        while True:
            if self._closed:  # what was left to do was to wait
                raise self._lost()
            try:
                self._side = self._new_side()
                self._pid = os.getpid()
                self._sock = connect(self.path)
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, SILENCE)
                connected = True
                answer = self._exchange(self._sock, init, request, size, asked)
            except AWAY as error:
                self._close()
                if self._pid != os.getpid():  # a fork meanwhile, and no outage
                    continue
                answered = connected or self.path in MET
                outage.wait(error, patience_with(error, self.patience, met=met, answered=answered))
            except RootstockError:
                outage.over()
                if connected:
                    self.met = True
                    MET.add(self.path)
                raise
            else:
                outage.over()
                self.met = True
                MET.add(self.path)
                return answer

    def _new_side(self) -> DriverSide:
        return DriverSide(self._target, self._batch_size, limits=ipi.ANY_NUMBER)  # `target` says how many are right

    def _exchange(
        self, sock: socket.socket, init: bytes, request: list[bytes | ipi.FloatArray], size: int, asked: bytes
    ) -> ipi.EngineMessage:
        if init is not self._init and init != self._init:
            request = [frame := ipi.init_frame(init), *request]
            size += len(frame)
        try:
            if self._closed:  # before there was a socket to close
                raise self._lost()
            self._init = init
            self._side.expect(asked)
            try:
                send_all(sock, request, size)
            except ConnectionLostError:  # it may have said why, and gone before it had read what we say
                if not isinstance(answer := self._receive(sock), ipi.Failure):
                    raise
            else:
                answer = self._receive(sock)
                if answer == _REFUSED:  # GETFORCE brings the reason
                    self._side.expect(ipi.GETFORCE)
                    send_all(sock, [ipi.GETFORCE], len(ipi.GETFORCE))
                    answer = self._receive(sock)
        except BaseException:  # whatever it was, the next answer would be the wrong one
            self._close()
            raise
        if self._side.unread:  # last words, or more answers than questions: not for the next step
            self._close()
        if isinstance(answer, ipi.Failure):
            self._init = b""  # it may have been refused for a reason that passes: say it again next time
            error = answer.error
            try:
                raise error
            finally:
                del answer, error  # or the two and this frame hold each other, and with them the session
        return answer

    def _receive(self, sock: socket.socket) -> ipi.EngineMessage:
        side, silence = self._side, None
        while True:
            try:
                size = sock.recv_into(side.get_buffer())
            except OSError as error:
                if error.errno is None:  # not the kernel's: a signal's handler has raised it, for a limit of the job's
                    raise
                if not isinstance(error, BlockingIOError):
                    raise self._lost() from error
                silence = silence or Silence(self.path, self._init)  # SILENCE has gone by
                silence.lasts()
                continue
            if size == 0:
                raise self._lost()
            side.received(size)
            if (message := side.next_message()) is not None:
                if silence is not None:
                    silence.over()
                return message

    def _lost(self) -> RootstockError:
        if self._closed:
            return InStepError(
                f"the session with rootstockd at {self.path} was closed in the middle of a step, by a signal's handler "
                "or a finalizer that ran inside it; the step has no result.",
                "Repeat the step, which opens a session anew. A handler that ends the job raises SystemExit after "
                "close().",
            )
        return ConnectionLostError(
            f"rootstockd at {self.path} closed the connection in the middle of a step.",
            "`rootstockd logs` may say why; if it was stopped, start it again and repeat the step.",
        )

    def _close(self) -> None:
        sock, self._sock, self._init = self._sock, None, b""  # first of all: a signal may come between any two lines
        if sock is not None:
            sock.close()

    def end(self) -> None:
        """Close the session, and wait until the daemon has done so: it counts for its user until then."""
        with self._lock:
            sock, self._sock, self._init = self._sock, None, b""
            if sock is not None:
                dismiss(sock)

    def close(self) -> None:
        """Close the session; the next step opens a new one. One that this is called inside of ends with InStepError."""
        with self._lock:
            self._closed = True
            self._close()


def send_all(sock: socket.socket, buffers: list[bytes | ipi.FloatArray], size: int) -> None:
    """Send all buffers, of so many bytes together, in one system call where the socket takes them.

    Raises:
        ConnectionLostError: the other side is gone.
    """
    try:
        send_parts(sock, buffers, size)
    except OSError as error:
        if error.errno is None:  # a signal's handler has raised it
            raise
        raise ConnectionLostError("rootstockd closed the connection.") from error
