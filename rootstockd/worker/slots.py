"""The slot: a piece of shared memory that carries one session's structures to a worker and the results back.

This is the one file that both ends read. The daemon makes a slot (a memfd) for each INIT, receives positions straight
into it, and sends the reply straight from it; the worker computes in place. A slot outlives its worker: after a crash
the same one is handed to the next.

Layout, little-endian, every array but the reply's energies aligned to 8 bytes:

========== ==================== ======================================================================
part       shape, type          meaning
========== ==================== ======================================================================
head       8 x int64            magic, natoms, frames, bytes of the reply, 4 unused
numbers    (natoms,) int32      atomic numbers, the same for all frames
cells      (frames, 3, 3) f8    Bohr, rows are lattice vectors
positions  (frames, natoms, 3)  f8, Bohr
reply      bytes                a whole FORCEREADY message: header, energies (frames,) f8 in Hartree,
                                int32 natoms, forces (frames, natoms, 3) f8 in Hartree/Bohr, virials
                                (frames, 3, 3) f8 in Hartree, then for each frame int32 n and n bytes of JSON
========== ==================== ======================================================================

A frame is one structure; i-PI's `batch_size` puts several into one slot.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Any

import numpy as np

from rootstockd.worker.version import SLOT_LAYOUT

MAGIC = 0x524F4F5453_00 | SLOT_LAYOUT
"""'ROOTS', and the layout's version."""

FORCEREADY = b"FORCEREADY  "
_HEAD = 64
_ENERGY_BASE64 = 11
"""The most bytes that a float64 takes in base64."""
_EXTRAS_SPARE = 512


def _aligned(size: int) -> int:
    return (size + 7) // 8 * 8


class Slot:
    """One slot, mapped into memory. All arrays are views of it.

    Args:
        fd: a file descriptor of the memory; the slot owns it from now on.
        natoms: atoms in each frame.
        frames: structures.
        fresh: lay it out, rather than expect it to be laid out already.

    Raises:
        ValueError: the memory is not a slot of these dimensions.
    """

    def __init__(self, fd: int, natoms: int, frames: int, *, fresh: bool = False) -> None:
        self.fd, self.natoms, self.frames = fd, natoms, frames
        numbers = _HEAD
        cells = numbers + _aligned(4 * natoms)
        positions = cells + 72 * frames
        reply = positions + 24 * natoms * frames
        energies = reply + len(FORCEREADY)
        forces = energies + 8 * frames + 4
        virials = forces + 24 * natoms * frames
        self._extras = virials + 72 * frames
        size = self._extras + frames * (4 + _EXTRAS_SPARE + _ENERGY_BASE64 * natoms)
        if fresh:
            os.ftruncate(fd, size)
            # neither end can pull the memory from under the other
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        elif os.fstat(fd).st_size != size:
            raise ValueError(f"a slot of {os.fstat(fd).st_size} bytes where {size} are right")
        self._map = mmap.mmap(fd, size)
        self._reply = reply

        def view(shape: tuple[int, ...], dtype: str, offset: int) -> np.ndarray[Any, Any]:
            return np.ndarray(shape, dtype, self._map, offset)

        self._head = view((8,), "<i8", 0)
        self.numbers = view((natoms,), "<i4", numbers)
        self.cells = view((frames, 3, 3), "<f8", cells)
        self.positions = view((frames, natoms, 3), "<f8", positions)
        self.energies = view((frames,), "<f8", energies)
        self.forces = view((frames, natoms, 3), "<f8", forces)
        self.virials = view((frames, 3, 3), "<f8", virials)
        self.results = view((3 * (natoms + 3) * frames,), "<f8", forces)
        """Forces and virials, flat."""
        whole = memoryview(self._map)
        self.cells_bytes = whole[cells:positions]
        self.positions_bytes = whole[positions:reply]
        self._bytes = whole
        self._sizes = whole[:_HEAD].cast("q")
        self._last_reply = whole[:0]
        if fresh:
            self._head[:3] = MAGIC, natoms, frames
            whole[reply:energies] = FORCEREADY
            view((1,), "<i4", forces - 4)[0] = natoms
            self.set_extras([b""] * frames)
        elif tuple(self._head[:3]) != (MAGIC, natoms, frames):
            raise ValueError("not a slot of this version")

    @classmethod
    def create(cls, natoms: int, frames: int = 1) -> Slot:
        """A new slot in memory of its own."""
        fd = os.memfd_create("rootstockd-slot", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            return cls(fd, natoms, frames, fresh=True)
        except BaseException:
            os.close(fd)
            raise

    def set_extras(self, extras: list[bytes]) -> None:
        """Write the end of the reply: one JSON text a frame.

        Raises:
            ValueError: they don't fit.
        """
        if len(extras) != self.frames:
            raise ValueError(f"extras for {len(extras)} frames where there are {self.frames}")
        tail = b"".join(len(text).to_bytes(4, "little") + text for text in extras)
        end = self._extras + len(tail)
        if end > len(self._bytes):
            raise ValueError(f"extras of {len(tail)} bytes do not fit into the slot")
        self._bytes[self._extras : end] = tail
        self._head[3] = end - self._reply

    @property
    def reply(self) -> memoryview:
        """The FORCEREADY message, ready to be sent."""
        size = self._sizes[3]
        if size != len(self._last_reply):  # else it is the one that was sent last
            self._last_reply = self._bytes[self._reply : self._reply + size]
        return self._last_reply

    def close(self) -> None:
        """Give the descriptor back; the memory goes when the last view of it does."""
        os.close(self.fd)
