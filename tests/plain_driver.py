"""A driver written out by hand, with no code of ours."""

from __future__ import annotations

import json
import socket
import struct

import numpy as np
from ase import units

from conftest import RunningDaemon


class PlainDriver:
    """A driver as the i-PI manual describes one, which says in its INIT what docs/protocol.md wants."""

    def __init__(self, daemon: RunningDaemon, atoms, **more) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(30)
        self.sock.connect(str(daemon.socket))
        self.atoms = atoms
        system = {"rootstock": 1, "model": "emt", "numbers": atoms.numbers.tolist(), "pbc": atoms.pbc.tolist()}
        self.init(json.dumps(system | more).encode())

    def __enter__(self) -> PlainDriver:
        return self

    def __exit__(self, *error) -> None:
        self.sock.close()

    def send(self, *parts: bytes) -> None:
        self.sock.sendall(b"".join(parts))

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.sock.recv(size - len(data))
            assert part, "the daemon closed the connection"
            data += part
        return data

    def init(self, text: bytes) -> None:
        self.send(b"INIT        ", struct.pack("<ii", 0, len(text)), text)

    def status(self) -> str:
        self.send(b"STATUS      ")
        return self.receive(12).decode().strip()

    def positions(self) -> None:
        cell = self.atoms.cell.array / units.Bohr
        self.send(b"POSDATA     ", cell.T.tobytes(), np.linalg.inv(cell).T.tobytes())
        self.send(struct.pack("<i", len(self.atoms)), (self.atoms.positions / units.Bohr).tobytes())

    def error(self) -> dict[str, str]:
        assert self.receive(12) == b"ERROR       "
        (size,) = struct.unpack("<i", self.receive(4))
        error: dict[str, str] = json.loads(self.receive(size))
        return error

    def forces(self) -> tuple[float, np.ndarray, np.ndarray, bytes]:
        self.send(b"GETFORCE    ")
        return self.result()

    def result(self) -> tuple[float, np.ndarray, np.ndarray, bytes]:
        assert self.receive(12) == b"FORCEREADY  "
        energy, natoms = struct.unpack("<di", self.receive(12))
        forces = np.frombuffer(self.receive(24 * natoms)).reshape(-1, 3)
        virial = np.frombuffer(self.receive(72)).reshape(3, 3).T
        (size,) = struct.unpack("<i", self.receive(4))
        return energy * units.Hartree, forces * units.Hartree / units.Bohr, virial * units.Hartree, self.receive(size)
