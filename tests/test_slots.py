"""The shared memory between the daemon and a worker."""

import base64
import contextlib
import errno
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

from rootstock_client import ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.stream import STAGING_SIZE
from rootstockd.worker.slots import Slot

DIMENSIONS = [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (4, 5), (0, 3), (5000, 2)]


@contextlib.contextmanager
def slot_of(natoms: int, frames: int = 1) -> Iterator[Slot]:
    slot = Slot.create(natoms, frames)
    try:
        yield slot
    finally:
        slot.close()


def fill(slot: Slot) -> None:
    rng = np.random.default_rng(slot.natoms)
    for array in (slot.cells, slot.positions, slot.energies, slot.forces, slot.virials):
        array[...] = rng.normal(size=array.shape)
    slot.numbers[:] = rng.integers(1, 118, size=slot.natoms)


def as_a_driver_reads_it(slot: Slot) -> tuple[ipi.ForceReady, np.ndarray]:
    """The reply, and its forces, from bytes alone."""
    forces = np.empty((slot.frames, slot.natoms, 3))
    memory = bytearray(forces.nbytes)

    def place(natoms: int) -> memoryview:
        assert natoms == slot.natoms
        return memoryview(memory)

    side = DriverSide(place, slot.frames)
    side.expect(ipi.GETFORCE)
    reply = bytes(slot.reply)
    at = 0
    while (message := side.next_message()) is None:
        assert at < len(reply)
        buffer = side.get_buffer()
        piece = reply[at : at + min(len(buffer), STAGING_SIZE)]
        buffer[: len(piece)] = piece
        side.received(len(piece))
        at += len(piece)
    assert at == len(reply)
    assert isinstance(message, ipi.ForceReady)
    forces[...] = np.frombuffer(memory).reshape(forces.shape)
    return message, forces


@pytest.mark.parametrize(("natoms", "frames"), DIMENSIONS)
def test_the_reply_is_what_a_driver_reads(natoms, frames):
    with slot_of(natoms, frames) as slot:
        fill(slot)
        extras = [json.dumps({"frame": frame}).encode() * (frame % 2) for frame in range(frames)]
        slot.set_extras(extras)
        message, forces = as_a_driver_reads_it(slot)
        assert message.natoms == natoms
        assert np.array_equal(message.energies, slot.energies)
        assert np.array_equal(forces, slot.forces)
        assert np.array_equal(message.virials, slot.virials.transpose(0, 2, 1))
        assert message.extras == extras


@pytest.mark.parametrize(("natoms", "frames"), DIMENSIONS)
def test_a_new_slot_has_a_reply_of_zeros(natoms, frames):
    with slot_of(natoms, frames) as slot:
        message, forces = as_a_driver_reads_it(slot)
        assert not message.energies.any() and not forces.any() and not message.virials.any()
        assert message.extras == [b""] * frames


@pytest.mark.parametrize(("natoms", "frames"), DIMENSIONS)
def test_arrays_do_not_overlap_and_are_aligned(natoms, frames):
    """The reply's energies follow its 12-byte header, and are the one exception."""
    with slot_of(natoms, frames) as slot:
        arrays = [slot.numbers, slot.cells, slot.positions, slot.energies, slot.forces, slot.virials]
        for value, array in enumerate(arrays, 1):
            array[...] = value
        assert [set(array.ravel().tolist()) for array in arrays] == [
            {value} if array.size else set() for value, array in enumerate(arrays, 1)
        ]
        for array in arrays:
            aligned = array is not slot.energies
            assert array.ctypes.data % (array.itemsize if aligned else 4) == 0
        as_a_driver_reads_it(slot)
        with contextlib.closing(mapped_again(slot)):
            pass  # the head is whole


@pytest.mark.parametrize(("natoms", "frames"), DIMENSIONS)
def test_positions_bytes_are_the_positions(natoms, frames):
    with slot_of(natoms, frames) as slot:
        positions = np.random.default_rng(1).normal(size=(frames, natoms, 3))
        slot.positions_bytes[:] = positions.tobytes()
        assert np.array_equal(slot.positions, positions)


def mapped_again(slot: Slot, natoms: int | None = None, frames: int | None = None) -> Slot:
    """As the other end maps it."""
    fd = os.dup(slot.fd)
    try:
        return Slot(fd, slot.natoms if natoms is None else natoms, slot.frames if frames is None else frames)
    except BaseException:
        os.close(fd)
        raise


def test_both_ends_see_the_same_memory():
    with slot_of(3, 2) as slot, contextlib.closing(mapped_again(slot)) as other:
        fill(slot)
        for name in ("numbers", "cells", "positions", "energies", "forces", "virials"):
            assert np.array_equal(getattr(slot, name), getattr(other, name))
        other.forces[...] = 7
        other.set_extras([b"from", b"there"])
        message, forces = as_a_driver_reads_it(slot)
        assert (forces == 7).all()
        assert message.extras == [b"from", b"there"]


def test_a_worker_process_answers_in_place():
    """And what it wrote outlives it."""
    worker = (
        "import sys\n"
        "from rootstockd.worker.slots import Slot\n"
        "slot = Slot(int(sys.argv[1]), 2, 1)\n"
        "assert slot.numbers.tolist() == [29, 47]\n"
        "slot.forces[:] = -slot.positions\n"
        "slot.energies[:] = slot.cells.sum()\n"
        "slot.set_extras([b'{}'])\n"
    )
    with slot_of(2) as slot:
        fill(slot)
        slot.numbers[:] = 29, 47
        subprocess.run([sys.executable, "-c", worker, str(slot.fd)], check=True, pass_fds=[slot.fd], timeout=60)
        assert np.array_equal(slot.forces, -slot.positions)
        assert slot.energies[0] == pytest.approx(slot.cells.sum())
        assert as_a_driver_reads_it(slot)[0].extras == [b"{}"]


def test_a_slot_outlives_its_descriptor():
    slot = Slot.create(2)
    other = mapped_again(slot)
    slot.close()
    other.positions[:] = 3
    assert (slot.positions == 3).all()
    other.close()


@pytest.mark.parametrize(("natoms", "frames"), [(4, 2), (2, 2), (3, 1), (3, 3), (0, 2)])
def test_other_dimensions_are_refused(natoms, frames):
    with slot_of(3, 2) as slot, pytest.raises(ValueError, match=r"a slot of .* bytes where .* are right"):
        mapped_again(slot, natoms, frames)


@pytest.mark.parametrize(("at", "value"), [(0, 1), (1, 4), (2, 1)])
def test_memory_that_does_not_say_that_it_is_this_slot_is_refused(at, value):
    """A right size is not enough: the head's magic, natoms and frames count too."""
    with slot_of(3, 2) as slot:
        with mmap.mmap(slot.fd, 64) as head:
            head[8 * at : 8 * at + 8] = value.to_bytes(8, "little")
        with pytest.raises(ValueError, match="not a slot of this version"):
            mapped_again(slot)


def test_memory_of_zeros_is_refused():
    with slot_of(3, 2) as slot:
        size = os.fstat(slot.fd).st_size
    fd = os.memfd_create("empty")
    try:
        os.ftruncate(fd, size)
        with pytest.raises(ValueError, match="not a slot"):
            Slot(fd, 3, 2)
    finally:
        os.close(fd)


@pytest.mark.parametrize("change", [-1, 1])
def test_neither_end_can_change_its_size(change):
    with slot_of(3) as slot:
        size = os.fstat(slot.fd).st_size
        other = os.dup(slot.fd)
        try:
            with pytest.raises(PermissionError) as caught:
                os.ftruncate(other, size + change)
            assert caught.value.errno == errno.EPERM
        finally:
            os.close(other)
        assert os.fstat(slot.fd).st_size == size


@pytest.mark.parametrize("natoms", [0, 1, 100, 3000])
def test_there_is_room_for_the_longest_energies(natoms):
    """Per-atom energies as a worker writes them."""
    with slot_of(natoms, 2) as slot:
        text = json.dumps({"energies": base64.b64encode(bytes(8 * natoms)).decode(), "backend": 300 * "x"}).encode()
        slot.set_extras([text, text])
        assert as_a_driver_reads_it(slot)[0].extras == [text, text]


def test_extras_that_do_not_fit_are_refused_and_nothing_is_written():
    with slot_of(2) as slot:
        slot.set_extras([b"before"])
        before = bytes(slot.reply)
        for too_long in (100_000, 5_000):
            with pytest.raises(ValueError, match="do not fit"):
                slot.set_extras([b"x" * too_long])
        assert bytes(slot.reply) == before


def test_extras_fit_to_the_last_byte():
    with slot_of(2) as slot:
        longest = next(n for n in range(10_000, 0, -1) if fits(slot, n))
        slot.set_extras([b"x" * longest])
        assert as_a_driver_reads_it(slot)[0].extras == [b"x" * longest]
        assert not fits(slot, longest + 1)
        assert os.pread(slot.fd, 2, os.fstat(slot.fd).st_size - 1) == b"x"


def fits(slot: Slot, size: int) -> bool:
    try:
        slot.set_extras([b"x" * size])
    except ValueError:
        return False
    return True


def test_shorter_extras_leave_nothing_of_longer_ones():
    with slot_of(2, 2) as slot:
        slot.set_extras([b"a long one", b"another"])
        slot.set_extras([b"", b"b"])
        assert as_a_driver_reads_it(slot)[0].extras == [b"", b"b"]
