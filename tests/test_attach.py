"""`rootstockd attach`: real i-PI and ASE's SocketIOCalculator, as they come, with a daemon's numbers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.socketio import SocketIOCalculator

from conftest import RunningDaemon, wait_for
from rootstock_client import ipi
from rootstock_client.attachment import offer
from rootstock_client.errors import ProtocolError, RootstockError

BIN = Path(sys.executable).parent
STEPS = 12


@pytest.fixture
def folder(runtime_folder: Path) -> Iterator[Path]:
    """A user's, with a structure and a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(dir=runtime_folder) as name:
        structure().write(Path(name) / "init.xyz")
        yield Path(name)


def structure() -> Atoms:
    atoms = bulk("Cu", cubic=True) * (2, 1, 1)
    atoms.rattle(0.1, seed=1)
    return atoms


@contextlib.contextmanager
def attached(daemon: RunningDaemon, address: str | Path, *options: str | Path) -> Iterator[subprocess.Popen[str]]:
    """The command, which ends with the block if not before."""
    command = [sys.executable, "-m", "rootstockd", "attach", address, "--socket", daemon.socket, *options]
    with subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.terminate()


def end_of(process: subprocess.Popen[str]) -> tuple[int, str]:
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def check(atoms: Atoms) -> None:
    reference = atoms.copy()
    reference.calc = EMT()
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
    np.testing.assert_allclose(atoms.get_stress(), reference.get_stress(), atol=1e-9)


# --- i-PI

INPUT = """
<simulation verbosity='quiet' safe_stride='100000' sockets_prefix='{folder}/'>
  <output prefix='out'>
    <properties stride='1' filename='properties'> [potential, kinetic_cv, conserved] </properties>
    <trajectory stride='1' filename='centroid' format='xyz'> x_centroid </trajectory>
  </output>
  <total_steps>{steps}</total_steps>
  <prng><seed>31415</seed></prng>
  <ffsocket name='engine' mode='{mode}' pbc='False'>
    <address>{address}</address> <port>{port}</port> <latency>1e-3</latency>
    <consolidate_messages>{consolidated}</consolidate_messages> <batch_size>{batch}</batch_size>
    <parameters>{parameters}</parameters>
  </ffsocket>
  <system>
    <initialize nbeads='{beads}'>
      <file mode='ase' units='angstrom'>init.xyz</file>
      <velocities mode='thermal' units='kelvin'>300</velocities>
    </initialize>
    <forces><force forcefield='engine'/></forces>
    <ensemble><temperature units='kelvin'>300</temperature></ensemble>
    <motion mode='dynamics'><dynamics mode='nve'><timestep units='femtosecond'>1</timestep></dynamics></motion>
  </system>
</simulation>
"""


@contextlib.contextmanager
def running_ipi(folder: Path, *, beads: int = 1, steps: int = STEPS, **settings: object) -> Iterator[subprocess.Popen]:
    usual = {"mode": "unix", "address": "ipi", "port": 31415, "consolidated": True, "batch": 1, "parameters": "{}"}
    text = INPUT.format(folder=folder, beads=beads, steps=steps, **usual | settings)
    (folder / "input.xml").write_text(text)
    with (
        (folder / "ipi.log").open("w") as log,
        subprocess.Popen([BIN / "i-pi", "input.xml"], cwd=folder, stdout=log, stderr=log) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def trajectory(folder: Path) -> np.ndarray:
    """Energies of each step, as i-PI prints them."""
    return np.loadtxt(folder / "out.properties", ndmin=2)


def positions(folder: Path) -> np.ndarray:
    return np.array([atoms.positions for atoms in ase.io.iread(folder / "out.centroid.xyz", format="xyz")])


@pytest.fixture(scope="module")
def reference(runtime_folder: Path):
    """Trajectories that i-PI makes with its own driver and EMT, each made once."""
    made = {}

    def run(beads: int) -> tuple[np.ndarray, np.ndarray]:
        if beads not in made:
            with tempfile.TemporaryDirectory(dir=runtime_folder) as name:
                folder = Path(name)
                structure().write(folder / "init.xyz")
                with running_ipi(folder, beads=beads) as driver:
                    wait_for((folder / "ipi").exists, timeout=60)
                    command = [sys.executable, BIN / "i-pi-driver-py", "-u", "-S", f"{folder}/", "-a", "ipi"]
                    own = Path(__file__).parent / "emt_for_ipi.py"
                    more = ["-m", "custom", "-P", own, "-o", f"template={folder / 'init.xyz'}"]
                    with subprocess.Popen([*command, *more], stdout=subprocess.DEVNULL) as engine:
                        assert driver.wait(timeout=60) == 0
                        engine.kill()
                made[beads] = trajectory(folder), positions(folder)
        return made[beads]

    return run


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


@pytest.mark.parametrize(
    ("beads", "count", "settings"),
    [
        pytest.param(1, 1, {"consolidated": False}, id="classic order"),
        pytest.param(1, 1, {"mode": "inet", "address": "127.0.0.1"}, id="TCP, system from parameters"),
        pytest.param(8, 8, {}, id="8 beads, 8 sessions"),
        pytest.param(8, 1, {"batch": 8}, id="8 beads, one batch"),
    ],
)
def test_ipi(daemon: RunningDaemon, folder: Path, reference, beads: int, count: int, settings) -> None:
    options: list[str | Path] = ["--model", "emt", "--structure", folder / "init.xyz", "--count", str(count)]
    address = str(folder / "ipi")
    if settings.get("mode") == "inet":
        settings = settings | {"port": free_port(), "parameters": "{model: emt, species: Cu8, pbc: TTT}"}
        address, options = f"127.0.0.1:{settings['port']}", []
    with running_ipi(folder, beads=beads, **settings) as driver, attached(daemon, address, *options) as command:
        assert end_of(command) == (0, command_said(folder, options, address))
        assert driver.wait(timeout=60) == 0
    energies, centroids = reference(beads)
    np.testing.assert_allclose(trajectory(folder), energies, rtol=1e-7, atol=1e-10)  # as many digits as i-PI prints
    np.testing.assert_allclose(positions(folder), centroids, rtol=1e-6)


def command_said(folder: Path, options: list, address: str) -> str:
    first = f"attaching 8 atoms (Cu8, pbc TTT), emt, to {address}\n" if options else ""
    return f"{first}the driver has ended\n"
