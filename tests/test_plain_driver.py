"""The protocol spoken over a plain socket, written out by hand: no code of ours on the driver's side."""

from __future__ import annotations

import json
import socket
import struct

import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon
from plain_driver import PlainDriver


@pytest.fixture
def atoms():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.set_cell(atoms.cell.array @ [[1, 0.02, 0], [0, 1, 0], [0.05, 0, 1]], scale_atoms=True)
    return atoms


def check(atoms, result) -> None:
    reference = atoms.copy()
    reference.calc = EMT()
    energy, forces, virial, extras = result
    assert energy == pytest.approx(reference.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(forces, reference.get_forces(), atol=1e-9)
    np.testing.assert_allclose(virial, -reference.get_stress(voigt=False) * atoms.get_volume(), atol=1e-9)
    assert json.loads(extras)["backend"] == "EMT"


def test_status_at_every_step(daemon: RunningDaemon, atoms) -> None:
    with PlainDriver(daemon, atoms) as driver:
        for step in range(3):
            atoms.rattle(0.02, seed=step)
            assert driver.status() == "READY"
            driver.positions()
            assert driver.status() == "HAVEDATA"
            check(atoms, driver.forces())


def test_consolidated_messages(daemon: RunningDaemon, atoms) -> None:
    """i-PI's default: POSDATA and GETFORCE at once, no STATUS between."""
    with PlainDriver(daemon, atoms) as driver:
        for step in range(3):
            atoms.rattle(0.02, seed=step)
            driver.positions()
            check(atoms, driver.forces())
            assert driver.status() == "READY"


def test_batch_size(daemon: RunningDaemon, atoms) -> None:
    """Of B: one natoms, B cells and inverses, B sets of positions; B results back."""
    frames = []
    for seed in range(3):
        frames.append(atoms.copy())
        frames[-1].rattle(0.1, seed=seed)
        frames[-1].set_cell(atoms.cell.array * (1 + 0.01 * seed), scale_atoms=True)
    with PlainDriver(daemon, atoms, batch_size=3) as driver:
        assert driver.status() == "READY"
        driver.send(b"POSDATA     ", struct.pack("<i", len(atoms)))
        for frame in frames:
            cell = frame.cell.array / units.Bohr
            driver.send(cell.T.tobytes(), np.linalg.inv(cell).T.tobytes())
        for frame in frames:
            driver.send((frame.positions / units.Bohr).tobytes())
        driver.send(b"GETFORCE    ")
        assert driver.receive(12) == b"FORCEREADY  "
        energies = struct.unpack("<3d", driver.receive(24))
        assert struct.unpack("<i", driver.receive(4)) == (len(atoms),)
        forces = np.frombuffer(driver.receive(3 * 24 * len(atoms))).reshape(3, -1, 3)
        virials = np.frombuffer(driver.receive(3 * 72)).reshape(3, 3, 3)
        for frame, energy, force, virial in zip(frames, energies, forces, virials, strict=True):
            extras = driver.receive(struct.unpack("<i", driver.receive(4))[0])
            result = (energy * units.Hartree, force * units.Hartree / units.Bohr, virial.T * units.Hartree, extras)
            check(frame, result)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_dribbled(daemon: RunningDaemon, atoms, size: int) -> None:
    """The same bytes, `size` at a time."""
    with PlainDriver(daemon, atoms) as driver:
        sendall = driver.sock.sendall

        def send(*parts: bytes) -> None:
            whole = b"".join(parts)
            for start in range(0, len(whole), size):
                sendall(whole[start : start + size])

        driver.send = send
        driver.positions()
        check(atoms, driver.forces())


def test_a_failure_is_the_answer_to_getforce(daemon: RunningDaemon, atoms) -> None:
    with PlainDriver(daemon, atoms) as driver:
        places = atoms.positions.copy()
        atoms.positions[1, 2] = np.nan
        driver.positions()
        assert driver.status() == "HAVEDATA"
        driver.send(b"GETFORCE    ")
        error = driver.error()
        assert error["code"] == "invalid-structure"
        assert "position of atom 1 is" in error["message"]
        atoms.positions = places
        driver.positions()
        check(atoms, driver.forces())


def test_an_init_that_says_nothing(daemon: RunningDaemon) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(str(daemon.socket))
        sock.sendall(b"STATUS      ")
        assert sock.recv(100) == b"NEEDINIT    "
        sock.sendall(b"INIT        " + struct.pack("<ii", 0, 1) + b" " + b"STATUS      ")
        assert sock.recv(100) == b""
