"""i-PI's ``mode="shm"``, translated: its arrays lie in shared memory, and only words and extras go over the socket.

This opens them, and is towards an engine a driver that sends its arrays.

Source: i-PI 3.3.1, ``SHMDriver`` in ``ipi/interfaces/sockets.py``. The first POSDATA names six segments, each for all
structures of a batch, C-contiguous float64, in the units and the order of the wire (`rootstock_client.ipi`):

======= ============ ===================================
pos     (B, natoms, 3) positions
h, ih   (B, 3, 3)    cells and their inverses
pot     (B,)         energies, written before FORCEREADY
force   (B, natoms, 3) forces, likewise
vir     (B, 3, 3)    virials, likewise
======= ============ ===================================
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import select
import socket
import threading

from rootstock_client import ipi
from rootstock_client.errors import LimitError, ProtocolError
from rootstock_client.sockets import LINGER, dismiss, receive

_FOLDER = "/dev/shm/"  # noqa: S108 - where Python's SharedMemory has its segments
_NAME = re.compile(rb"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LONGEST_NAME = 255
_SIZES = {"pos": (0, 24), "h": (72, 0), "ih": (72, 0), "pot": (8, 0), "force": (0, 24), "vir": (72, 0)}
"""Of each kind, in the order of their names: bytes for a structure, and for an atom of it."""


class _GoneError(Exception):
    """One of the two ends has closed."""


class Translation:
    """Goes between a driver and whoever has `engine_end`, until one of them closes.

    Args:
        driver: its stream, behind its INIT; closed at the end.
        batch: structures in a message.

    Raises:
        LimitError: this process, or the machine, has no descriptors left.
    """

    def __init__(self, driver: socket.socket, batch: int) -> None:
        self._driver, self._batch = driver, batch
        try:
            self.engine_end, self._engine = socket.socketpair()
        except OSError as error:
            raise LimitError(f"there can be no socket for the driver's messages: {error.strerror}.") from error
        self.error: ProtocolError | None = None
        """Why it ended, if the driver said what makes no sense."""
        self._segments: dict[str, memoryview] = {}
        self._natoms = 0
        self._thread = threading.Thread(target=self._run, name="shared memory", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._driver, select.POLLIN)
        poll.register(self._engine, select.POLLIN)
        try:
            while [descriptor for descriptor, _ in poll.poll()] == [self._driver.fileno()]:
                self._pass_on(self._receive(self._driver, ipi.HEADER_SIZE))
        except ProtocolError as error:
            self.error = error
        except (_GoneError, OSError):
            pass
        finally:
            dismiss(self._driver)
            self._engine.close()

    def end(self) -> None:
        """Close `engine_end`, and wait until the driver has found the end of its stream."""
        with contextlib.suppress(OSError):
            self.engine_end.shutdown(socket.SHUT_RDWR)
        self._thread.join(LINGER)  # a driver may have stopped in the middle of a message
        self.engine_end.close()

    def _pass_on(self, word: bytes) -> None:
        """A message of the driver's, and the engine's answer to it."""
        if word == ipi.POSDATA:
            self._pass_structures()
            return
        self._engine.sendall(word)
        if word == ipi.INIT:
            numbers = self._receive(self._driver, ipi.TWO_INTS.size)
            size = ipi.checked_count(ipi.TWO_INTS.unpack(numbers)[1], ipi.Limits().init, "bytes of INIT")
            self._engine.sendall(numbers + self._receive(self._driver, size))
        elif word in (ipi.STATUS, ipi.GETFORCE):
            answer = self._receive(self._engine, ipi.HEADER_SIZE)
            if answer == ipi.FORCEREADY:
                answer += self._take_results()
            self._driver.sendall(answer)

    def _pass_structures(self) -> None:
        natoms = self._receive_int(self._driver)
        if not self._segments:
            self._open_segments(natoms)
        elif natoms != self._natoms:
            raise ProtocolError(f"POSDATA has {natoms} atoms, where the driver's shared memory is for {self._natoms}.")
        count = ipi.INT.pack(natoms)
        cells = b"".join(
            self._segments[kind][72 * index : 72 * (index + 1)] for index in range(self._batch) for kind in ("h", "ih")
        )
        self._engine.sendall(ipi.POSDATA + (cells + count if self._batch == 1 else count + cells))
        self._engine.sendall(self._segments["pos"])

    def _take_results(self) -> bytes:
        """Put an engine's results into shared memory; what of them goes over the socket."""
        self._fill("pot")
        if (natoms := self._receive_int(self._engine)) != self._natoms:
            raise ProtocolError(f"there are forces of {natoms} atoms for a structure of {self._natoms}.")
        self._fill("force")
        self._fill("vir")
        extras = b""
        for _ in range(self._batch):
            size = ipi.checked_count(self._receive_int(self._engine), ipi.Limits().extras, "bytes of extras")
            extras += ipi.INT.pack(size) + self._receive(self._engine, size)
        return extras

    def _open_segments(self, natoms: int) -> None:
        most = ipi.ANY_NUMBER.atoms // self._batch
        if not 0 < natoms <= most:
            raise _no_shared_memory(f"{natoms} atoms")
        for kind, (structure, atom) in _SIZES.items():
            length = self._receive_int(self._driver)
            if not 0 < length <= _LONGEST_NAME:
                raise _no_shared_memory(f"a name of {length} bytes")
            name = self._receive(self._driver, length)
            if not _NAME.fullmatch(name):
                raise _no_shared_memory(repr(name))
            self._segments[kind] = _map(name.decode(), self._batch * (structure + atom * natoms))
        self._natoms = natoms

    def _fill(self, kind: str) -> None:
        view = self._segments[kind]
        got = 0
        while got < len(view):
            if not (count := self._engine.recv_into(view[got:])):
                raise _GoneError
            got += count

    def _receive_int(self, end: socket.socket) -> int:
        return int(ipi.INT.unpack(self._receive(end, ipi.INT.size))[0])

    @staticmethod
    def _receive(end: socket.socket, size: int) -> bytes:
        if len(data := receive(end, size)) < size:
            raise _GoneError
        return data


def _map(name: str, size: int) -> memoryview:
    """A segment's bytes.

    Raises:
        ProtocolError: it is not there, not for us, or too small.
    """
    try:
        descriptor = os.open(_FOLDER + name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as error:
        raise ProtocolError(
            f"the driver's shared memory {name} can't be opened: {error.strerror}.",
            "It must be on the same machine, of the same user, and see the same /dev/shm.",
        ) from error
    try:
        if (there := os.fstat(descriptor).st_size) < size:
            raise ProtocolError(f"the driver's shared memory {name} has {there} bytes, where {size} are needed.")
        return memoryview(mmap.mmap(descriptor, size))
    except OSError as error:
        raise ProtocolError(f"the driver's shared memory {name} can't be mapped: {error.strerror}.") from error
    finally:
        os.close(descriptor)


def _no_shared_memory(what: str) -> ProtocolError:
    return ProtocolError(
        f"the driver's POSDATA is not that of mode='shm' ({what}).",
        "Leave out --shm if its <ffsocket> has another mode.",
    )
