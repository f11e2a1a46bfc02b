"""`rootstockd attach`: real i-PI and ASE's SocketIOCalculator, as they come, with a daemon's numbers."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.socketio import SocketIOCalculator

from conftest import RunningDaemon, wait_for
from plain_driver import PlainDriver
from rootstock_client import ipi
from rootstock_client.attachment import Address, SamePotential, dial, parse_address
from rootstock_client.control import fetch
from rootstock_client.errors import DriverNotFoundError, InvalidInitError, InvalidStructureError, ModelChangedError
from rootstock_client.shared_memory import Translation
from rootstockd.cli.system import System, read_parameters, read_structure
from terminal import Terminal

BIN = Path(sys.executable).parent
STEPS = 12
TRANSPORTS = {"unix": "Unix socket", "inet": "TCP", "shm": "shared memory"}


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


def sessions(daemon: RunningDaemon, pid: int) -> list[dict[str, Any]]:
    """Those of a process."""
    return [session for session in daemon.client().status()["sessions"] if session["pid"] == pid]


def check(atoms: Atoms) -> float:
    """Its numbers are EMT's; how far its forces are off."""
    reference = atoms.copy()
    reference.calc = EMT()
    assert atoms.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), atol=1e-9)
    np.testing.assert_allclose(atoms.get_stress(), reference.get_stress(), atol=1e-9)
    return float(np.abs(atoms.get_forces() - reference.get_forces()).max())


# --- i-PI

INPUT = """
<simulation verbosity='quiet' safe_stride='100000' sockets_prefix='{folder}/'>
  <output prefix='out'>
    <properties stride='1' filename='properties'> [potential, kinetic_cv, conserved] </properties>
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


def trajectory(folder: Path) -> tuple[np.ndarray, ...]:
    """Energies of each step, and the last positions and momenta of all beads, as i-PI writes them: nine digits."""
    end = ET.parse(folder / "RESTART")
    arrays = [np.fromstring(end.find(f".//beads/{name}").text.strip(" \n[]"), sep=",") for name in "qp"]
    return np.loadtxt(folder / "out.properties"), *arrays


@pytest.fixture(scope="module")
def reference(runtime_folder: Path):
    """Trajectories that i-PI makes with its own driver and EMT, each made once."""
    made = {}

    def run(beads: int) -> tuple[np.ndarray, ...]:
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
                made[beads] = trajectory(folder)
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
        pytest.param(1, 1, {"mode": "shm", "consolidated": False}, id="classic order, shm"),
        pytest.param(8, 3, {"mode": "shm"}, id="8 beads, 3 sessions, shm"),
        pytest.param(8, 1, {"mode": "shm", "batch": 8}, id="8 beads, one batch, shm"),
    ],
)
def test_ipi(
    daemon: RunningDaemon, folder: Path, reference, beads: int, count: int, settings, compatible, request
) -> None:
    options: list[str | Path] = ["--model", "emt", "--structure", folder / "init.xyz", "--count", str(count)]
    address = str(folder / "ipi")
    if settings.get("mode") == "shm":
        options.append("--shm")
    if settings.get("mode") == "inet":
        settings = settings | {"port": free_port(), "parameters": "{model: emt, species: Cu8, pbc: TTT}"}
        address, options = f"127.0.0.1:{settings['port']}", []
    with running_ipi(folder, beads=beads, **settings) as driver, attached(daemon, address, *options) as command:
        assert end_of(command) == (0, command_said(address))
        assert driver.wait(timeout=60) == 0
    same(trajectory(folder), reference(beads))
    compatible(
        code="i-PI",
        version=version("ipi"),
        role="driver",
        transport="attach, " + TRANSPORTS[settings.get("mode", "unix")],
        ran=f"NVE of 8 Cu, {STEPS} steps: {request.node.callspec.id}",
        against="i-pi-driver-py: trajectories to 8 digits",
    )


def same(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.size == other.size > 0
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-8)


def command_said(address: str) -> str:
    return f"attaching 8 atoms (Cu8, pbc TTT), emt, to {address}\nthe driver has ended\n"


HELD = """
import time
from pathlib import Path
import ase.calculators.emt


class EMT(ase.calculators.emt.EMT):
    count = 0

    def calculate(self, *arguments, **options):
        EMT.count += 1
        if EMT.count == 20 and Path("{hold}").exists():
            Path("{hold}").rename("{held}")
            while Path("{held}").exists():
                time.sleep(0.01)
        super().calculate(*arguments, **options)
"""


@pytest.fixture
def holding(start_daemon: Callable[..., RunningDaemon], folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunningDaemon:
    """A daemon with an EMT, `held`, that stops in the middle of a run, and goes on when the folder's `held` goes."""
    (folder / "hold").touch()
    (folder / "held_emt.py").write_text(HELD.format(hold=folder / "hold", held=folder / "held"))
    catalogue = folder / "models.toml"
    catalogue.write_text('[held]\nfamily = "ase"\nconfine = false\narguments = { calculator = "held_emt:EMT" }\n')
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    return start_daemon("--catalogue", str(catalogue), "--model", "held")


@pytest.mark.parametrize("mode", ["unix", "shm"])
def test_ipi_does_not_notice_that_its_daemon_is_killed(
    holding: RunningDaemon, folder: Path, reference, mode: str
) -> None:
    """In the middle of a step, which takes longer."""
    options = ["--model", "held", "--structure", folder / "init.xyz", *(["--shm"] * (mode == "shm"))]
    with running_ipi(folder, beads=8, mode=mode) as driver, attached(holding, folder / "ipi", *options) as command:
        wait_for((folder / "held").exists, timeout=60)
        os.kill(holding.pid, signal.SIGKILL)
        (folder / "held").unlink()
        holding.start()
        status, said = end_of(command)
        assert status == 0, said
        assert "is away; this job waits" in said
        assert driver.wait(timeout=60) == 0
    same(trajectory(folder), reference(8))


@pytest.mark.parametrize("mode", ["unix", "shm"])
def test_ipi_does_not_notice_that_attach_is_killed(holding: RunningDaemon, folder: Path, reference, mode: str) -> None:
    """It finds an end of file, not a reset, over which it hangs, and goes on with whoever comes next."""
    options = ["--model", "held", "--structure", folder / "init.xyz", *(["--shm"] * (mode == "shm"))]
    with running_ipi(folder, beads=8, mode=mode) as driver:
        with attached(holding, folder / "ipi", *options) as command:
            wait_for((folder / "held").exists, timeout=60)
            command.kill()
            (folder / "held").unlink()
        with attached(holding, folder / "ipi", *options) as command:
            assert end_of(command)[0] == 0
        assert driver.wait(timeout=60) == 0
    same(trajectory(folder), reference(8))


@pytest.mark.parametrize("count", [1, 2])
def test_ipi_never_goes_on_with_another_potential(start_daemon, folder: Path, count: int) -> None:
    """The catalogue's entry is another when the daemon is back: the driver gets no number of it."""
    what = '{{ calculator = "ase.calculators.lj:LennardJones", options = {{ epsilon = {} }} }}'
    entry = f'[mine]\nfamily = "ase"\narguments = {what}\n'
    catalogue = folder / "models.toml"
    catalogue.write_text(entry.format(0.1))
    daemon = start_daemon("--catalogue", str(catalogue))
    options = ["--model", "mine", "--structure", folder / "init.xyz", "--count", str(count)]
    with running_ipi(folder, beads=count, steps=100_000), attached(daemon, folder / "ipi", *options) as command:
        wait_for(lambda: daemon.client().status()["evaluations"] > 8, timeout=60)
        catalogue.write_text(entry.format(0.2))
        assert daemon.run("reload").returncode == 0
        done = daemon.client().status()["evaluations"]  # a session keeps its model
        wait_for(lambda: daemon.client().status()["evaluations"] > done + 8, timeout=60)
        assert daemon.run("restart").returncode == 0
        status, said = end_of(command)
        assert status == 1
        assert "model 'mine' is another than before" in said and "attach anew" in said
    energies = np.loadtxt(folder / "out.properties")[:, -1]
    assert np.ptp(energies) < 1e-3, "the conserved quantity of one potential"


# --- ASE


@contextlib.contextmanager
def socket_calculator(folder: Path, atoms: Atoms) -> Iterator[SocketIOCalculator]:
    with SocketIOCalculator(unixsocket=folder.name) as calculator:
        atoms.calc = calculator
        yield calculator


def test_a_terminal_is_told_how_far_it_has_come(daemon: RunningDaemon, folder: Path) -> None:
    atoms = structure()
    given = ("attach", folder.name, "--model", "emt", "--structure", str(folder / "init.xyz"))
    with Terminal(*given, "--socket", str(daemon.socket)) as terminal:
        said = f"attaching 8 atoms (Cu8, pbc TTT), emt, to /tmp/ipi_{folder.name}"
        terminal.until(lambda text: text.split("\n")[:2] == [said, "waiting for the driver"])
        with socket_calculator(folder, atoms):
            check(atoms)
            terminal.until(lambda text: "1 session, 1 evaluation, " in text.split("\n")[1])
        assert terminal.end() == 0
        assert terminal.text.strip().split("\n") == [said, "the driver has ended"]


def test_ase(daemon: RunningDaemon, folder: Path, compatible) -> None:
    atoms = structure()
    largest = 0.0
    with attached(daemon, folder.name, "--model", "emt", "--structure", folder / "init.xyz") as command:
        with socket_calculator(folder, atoms):
            for seed in range(3):
                atoms.rattle(0.01, seed=seed)
                atoms.set_cell(atoms.cell.array * 1.01, scale_atoms=True)
                largest = max(largest, check(atoms))
            assert [session["natoms"] for session in sessions(daemon, command.pid)] == [8]
        assert end_of(command)[0] == 0
    compatible(
        code="ASE SocketIOCalculator",
        version=version("ase"),
        role="driver",
        transport="attach, Unix socket",
        ran="8 Cu, atoms and cell moved",
        against="ASE's EMT",
        agreement=largest,
    )


@pytest.mark.parametrize("transport", ["unix", "inet"])
def test_ase_does_not_notice_that_its_daemon_is_restarted(
    own_daemon: RunningDaemon, folder: Path, transport: str
) -> None:
    """Over TCP its messages come in parts: most of the time it is in the middle of one."""
    atoms, port = structure(), free_port()
    address = folder.name if transport == "unix" else f":{port}"
    with attached(own_daemon, address, "--model", "emt", "--structure", folder / "init.xyz") as command:
        with SocketIOCalculator(**({"unixsocket": address} if transport == "unix" else {"port": port})) as atoms.calc:
            check(atoms)
            arguments = [sys.executable, "-m", "rootstockd", "restart", "--socket", own_daemon.socket]
            with subprocess.Popen(arguments) as restart:
                while restart.poll() is None:
                    atoms.rattle(0.01, seed=2)
                    check(atoms)
            assert restart.returncode == 0
            check(atoms)
        status, said = end_of(command)
        assert status == 0, said


class Listening(PlainDriver):
    """A driver that listens, and has said its INIT to whoever came."""

    def __init__(self, folder: Path, atoms: Atoms, *command: Any) -> None:
        self.atoms = atoms
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "driver"))
            listening.listen()
            self.attach = contextlib.ExitStack()
            self.command = self.attach.enter_context(attached(command[0], folder / "driver", *command[1:]))
            self.sock, _ = listening.accept()
        self.sock.settimeout(60)
        assert self.status() == "NEEDINIT"
        self.init(b" ")

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self.attach.close()

    def step(self) -> float:
        self.positions()
        return self.forces()[0]


def restarting(daemon: RunningDaemon) -> subprocess.Popen[bytes]:
    """A restart, in whose beginning the daemon drains by now."""
    command = [sys.executable, "-m", "rootstockd", "restart", "--socket", str(daemon.socket)]
    process = subprocess.Popen(command)
    wait_for(lambda: "draining for a restart" in daemon.log.read_text())
    return process


def test_ase_does_not_notice_that_its_daemon_is_killed(holding: RunningDaemon, folder: Path) -> None:
    """In the middle of a step."""
    atoms = structure()
    with attached(holding, folder.name, "--model", "held", "--structure", folder / "init.xyz") as command:
        with socket_calculator(folder, atoms), ThreadPoolExecutor(1) as pool:
            steps = pool.submit(lambda: [(atoms.rattle(0.01, seed=seed), check(atoms)) for seed in range(30)])
            wait_for((folder / "held").exists, timeout=60)
            os.kill(holding.pid, signal.SIGKILL)
            (folder / "held").unlink()
            holding.start()
            steps.result(60)
        status, said = end_of(command)
        assert status == 0, said
        assert "is away; this job waits" in said


def test_a_driver_in_the_middle_of_a_message_does_not_notice_a_restart(own_daemon: RunningDaemon, folder: Path) -> None:
    atoms = structure()
    with Listening(folder, atoms, own_daemon, "--model", "emt", "--structure", folder / "init.xyz") as driver:
        right = driver.step()
        cell = atoms.cell.array / units.Bohr
        driver.send(b"POSDATA     ", cell.T.tobytes())
        wait_for(lambda: own_daemon.client().status()["evaluations"] == 1)
        with restarting(own_daemon) as restart:
            driver.send(np.linalg.inv(cell).T.tobytes(), struct.pack("<i", len(atoms)))
            driver.send((atoms.positions / units.Bohr).tobytes())
            assert driver.forces()[0] == right
            assert driver.step() == right
        assert restart.returncode == 0
        driver.send(b"EXIT        ")
        assert end_of(driver.command)[0] == 0


def test_a_driver_that_runs_ahead_keeps_nobody_waiting(
    start_daemon: Callable[..., RunningDaemon], folder: Path
) -> None:
    """Least of all a daemon that drains, long before its `drain_timeout`."""
    daemon = start_daemon("--model", "emt", "--drain-timeout", "1000")
    with Listening(folder, structure(), daemon, "--model", "emt", "--structure", folder / "init.xyz") as driver:
        driver.step()
        ahead = threading.Thread(target=run_ahead, args=(driver,))
        ahead.start()
        wait_for(lambda: daemon.client().status()["evaluations"] > 10)
        assert daemon.run("restart").returncode == 0
        wait_for(lambda: daemon.client().status()["evaluations"] > 10)
        driver.sock.shutdown(socket.SHUT_RDWR)
        ahead.join()
        assert end_of(driver.command)[0] == 0


def run_ahead(driver: PlainDriver) -> None:
    with contextlib.suppress(OSError, AssertionError):  # until it is cut off
        for _ in range(3):
            driver.positions()
            driver.send(b"GETFORCE    ")
        while True:
            driver.positions()
            driver.send(b"GETFORCE    ")
            driver.result()


def test_an_attach_that_begins_while_the_daemon_is_restarted_waits(
    start_daemon: Callable[..., RunningDaemon], folder: Path
) -> None:
    daemon = start_daemon("--model", "lj", "--model", "emt")
    slow = structure()
    slow.calc = daemon.client().calculator("lj")
    slow.get_forces()
    slow.rattle(0.01)
    os.kill(worker := daemon.model("lj")["pid"], signal.SIGSTOP)
    job = threading.Thread(target=slow.get_forces)
    job.start()  # what the daemon drains for
    wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"])
    with restarting(daemon) as restart, ThreadPoolExecutor(1) as pool:
        options = ("--model", "emt", "--structure", folder / "init.xyz")
        there = pool.submit(Listening, folder, structure(), daemon, *options)
        wait_for(lambda: re.search(rb'_errors_total.code="draining". [1-9]', fetch(daemon.socket, "GET", "/metrics")))
        os.kill(worker, signal.SIGCONT)
        with there.result() as driver:
            driver.step()
            driver.send(b"EXIT        ")
            assert end_of(driver.command)[0] == 0
    job.join()
    assert restart.returncode == 0


def test_a_driver_whose_daemon_stays_away_finds_an_end_of_file(
    own_daemon: RunningDaemon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROOTSTOCKD_PATIENCE", "0.5")
    options = ("--model", "emt", "--structure", folder / "init.xyz")
    with Listening(folder, structure(), own_daemon, *options) as driver:
        driver.step()
        os.kill(own_daemon.pid, signal.SIGKILL)
        driver.positions()
        assert driver.sock.recv(1) == b""
        status, said = end_of(driver.command)
    assert status == 1 and "no rootstockd answers" in said and "has waited 0.5 s" in said


def test_a_driver_that_was_reset_while_the_daemon_was_away_has_ended(own_daemon: RunningDaemon, folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        options = ("--model", "emt", "--structure", folder / "init.xyz")
        with attached(own_daemon, f":{listening.getsockname()[1]}", *options) as command:
            stream, _ = listening.accept()
            stream.sendall(b"INIT        " + struct.pack("<ii", 0, 1) + b" " + b"STATUS      ")
            assert stream.recv(12) == b"READY       "
            with restarting(own_daemon) as restart:
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stream.close()
            assert restart.returncode == 0
            assert end_of(command)[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_driver_whose_attach_is_ended(daemon: RunningDaemon, folder: Path, number: signal.Signals) -> None:
    """The session ends with it, and the driver finds an end of file."""
    atoms = structure()
    with (
        attached(daemon, folder.name, "--model", "emt", "--structure", folder / "init.xyz") as command,
        socket_calculator(folder, atoms),
    ):
        check(atoms)
        command.send_signal(number)
        assert command.wait(timeout=30) == (-number if number == signal.SIGKILL else 128 + number)
        atoms.rattle(0.01)
        with pytest.raises(OSError):  # noqa: PT011 - ASE's own, which has no words
            atoms.get_forces()
    wait_for(lambda: not sessions(daemon, command.pid))


def test_what_is_wrong_with_a_step_ends_the_command(daemon: RunningDaemon, folder: Path) -> None:
    far_away = structure()
    far_away.positions[0] = 1e9, 0, 0
    for atoms, words in (
        (
            structure() * (2, 1, 1),
            "the driver sends 16 atoms, and 8 were announced.\nThe structure, or the species, given",
        ),
        (far_away, "the position of atom 0 is [1000000000.0, 0.0, 0.0] Å.\nLook at the steps before"),
    ):
        with attached(daemon, folder.name, "--model", "emt", "--structure", folder / "init.xyz") as command:
            with socket_calculator(folder, atoms), pytest.raises(OSError):  # noqa: PT011
                atoms.get_forces()
            status, said = end_of(command)
            assert status == 1
            assert words in said


def test_a_driver_without_shared_memory_where_it_is_expected(daemon: RunningDaemon, folder: Path) -> None:
    atoms = structure()
    with attached(daemon, folder.name, "--shm", "--model", "emt", "--structure", folder / "init.xyz") as command:
        with socket_calculator(folder, atoms), pytest.raises(OSError):  # noqa: PT011
            atoms.get_forces()
        status, said = end_of(command)
    assert status == 1
    assert "not that of mode='shm'" in said
    assert "Leave out --shm" in said


def test_a_batch_that_is_none(daemon: RunningDaemon, folder: Path) -> None:
    """The daemon says so, before there is memory for it."""
    for size in (b"0", b"-1", b"1000000000"):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "driver"))
            listening.listen()
            options = ("--model", "emt", "--structure", folder / "init.xyz")
            with attached(daemon, folder / "driver", *options) as command:
                stream, _ = listening.accept()
                with stream:
                    text = b"batch_size : " + size
                    stream.sendall(b"INIT        " + struct.pack("<ii", 0, len(text)) + text)
                    assert stream.recv(1) == b""
                status, said = end_of(command)
        (folder / "driver").unlink()
        assert (status, "batch_size: " in said, "Traceback" in said) == (1, True, False), said


def test_a_model_without_stress(start_daemon: Callable[..., RunningDaemon], folder: Path) -> None:
    """For a driver that uses none it may be left out."""
    catalogue = folder / "more.toml"
    catalogue.write_text('[water]\nfamily = "ase"\narguments = { calculator = "ase.calculators.tip3p:TIP3P" }\n')
    daemon = start_daemon("--catalogue", str(catalogue))
    water = Atoms("OH2", [[0, 0, 0], [0.9572, 0, 0], [-0.24, 0.9266, 0]], cell=[20, 20, 20], pbc=True)
    water.write(folder / "water.xyz")
    for options in ((), ("--no-stress",)):
        command = (folder / "driver", "--model", "water", "--structure", folder / "water.xyz", *options)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(folder / "driver"))
            listening.listen()
            with attached(daemon, *command) as process:
                stream, _ = listening.accept()
                driver = PlainDriver.__new__(PlainDriver)
                driver.sock, driver.atoms = stream, water
                with driver:
                    driver.init(b" ")
                    driver.positions()
                    if options:
                        _, forces, virial, _ = driver.forces()
                        assert forces.shape == (3, 3) and not virial.any()
                        driver.send(b"EXIT        ")
                    else:
                        assert stream.recv(1) == b""
                status, said = end_of(process)
        (folder / "driver").unlink()
        assert (status, "computes no stress" in said) == ((0, False) if options else (1, True)), said


def test_a_port_that_has_called_itself_is_nobodys() -> None:
    """TCP connects a socket to itself whose port the kernel took for the caller's end; the driver needs it."""
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.connect(own.getsockname())
        where = own.getsockname()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(socket, "create_connection", lambda *_, **__: own.dup())
            with pytest.raises(DriverNotFoundError, match="no driver listens"):
                dial(Address(socket.AF_INET, where), 0)
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def test_a_driver_on_another_machine_that_vanishes_is_noticed() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listening,
        dial(parse_address(f":{listening.getsockname()[1]}"), 0) as end,
    ):
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_socket_is_no_driver(folder: Path) -> None:
    """Anybody may put one where i-PI's was to be; with --shm it could name one's own segments."""
    listen = (
        "import os, socket, time; os.setuid(65534); s = socket.socket(fileno=0); s.listen(); print(flush=True); "
        "time.sleep(60)"
    )
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(str(folder / "driver"))
        command = [sys.executable, "-S", "-c", listen]
        with subprocess.Popen(command, stdin=door.fileno(), stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(DriverNotFoundError, match=r"not yours, but another user's \(uid 65534\)"):
                dial(Address(socket.AF_UNIX, str(folder / "driver")), 0)
            other.kill()


def test_one_potential_for_all_of_a_drivers_connections() -> None:
    first, second, none = b'{"fingerprint": "0123456789abcdef"}', b'{"fingerprint": "fedcba9876543210"}', b""
    potential = SamePotential()
    for extras in (none, b"{}", first, first):
        potential.check(extras, "emt")
    for other in (second, none, b"{}"):
        with pytest.raises(ModelChangedError):
            potential.check(other, "emt")
    potential.check(first, "emt")


# --- what no driver hears of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nonsense", "--structure", "init.xyz"], "no model 'nonsense'"),
        (
            ["--model", "emt", "--structure", "init.xyz", "--dtype", "float32"],
            "computes in float64 and in nothing else",
        ),
        (["--model", "emt", "--structure", "init.xyz", "--pbc", "yes"], "it is T or F"),
        (["--model", "emt", "--structure", "input.xml"], "ASE can't read input.xml"),
        (["--model", "emt", "--structure", "plain.xyz"], "plain.xyz does not say along which lattice vectors"),
        (["--model", "emt", "--structure", "init.xyz", "--wait", "0"], "no driver listens at ./ipi"),
    ],
)
def test_refused(daemon: RunningDaemon, folder: Path, options: list[str], words: str, monkeypatch) -> None:
    (folder / "input.xml").write_text("<simulation/>")
    (folder / "plain.xyz").write_text("1\n\nCu 0 0 0\n")
    monkeypatch.chdir(folder)
    with attached(daemon, "./ipi", *options) as command:
        status, said = end_of(command)
    assert status == 1
    assert words in said


# --- shared memory


def test_a_driver_that_wants_shared_memory_is_told(daemon: RunningDaemon, folder: Path) -> None:
    options = ("--model", "emt", "--structure", folder / "init.xyz")
    with Listening(folder, structure(), daemon, *options) as driver:
        names = [f"ipi_shm_4242_7_{kind}".encode() for kind in ("pos", "h", "ih", "pot", "force", "vir")]
        driver.send(ipi.POSDATA + ipi.INT.pack(8) + b"".join(ipi.INT.pack(len(name)) + name for name in names))
        driver.send(ipi.GETFORCE)
        status, said = end_of(driver.command)
        assert status == 1
        assert 'mode="shm"' in said and "Give --shm to attach" in said


@pytest.mark.parametrize(
    ("name", "natoms", "says"),
    [
        ("../../etc/passwd", 1, "not that of mode='shm'"),
        ("no-such-segment", 1, "can't be opened"),
        ("{segment}", 1000, "bytes, where 24000 are needed"),
        ("{segment}", -1, "not that of mode='shm'"),
    ],
)
def test_shared_memory_that_is_none(name: str, natoms: int, says: str) -> None:
    segment = SharedMemory(create=True, size=4096)
    ours, theirs = socket.socketpair()
    with ours, contextlib.closing(segment):
        translation = Translation(theirs, batch=1)
        text = name.format(segment=segment.name).encode()
        with translation.engine_end as engine:
            ours.sendall(ipi.POSDATA + ipi.INT.pack(natoms) + ipi.INT.pack(len(text)) + text)
            ours.shutdown(socket.SHUT_WR)
            assert engine.recv(1) == b""
            assert translation.error is not None
            assert says in translation.error.message
        segment.unlink()


# --- what is said beforehand


def test_ports_have_an_end() -> None:
    with pytest.raises(ValueError, match="ports end at 65535"):
        parse_address("localhost:99999")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("water", "/tmp/ipi_water"),
        ("./water", "./water"),
        ("/scratch/my_water:1", "/scratch/my_water:1"),
        ("node7:31415", ("node7", 31415)),
        (":31415", ("localhost", 31415)),
        ("[::1]:31415", ("::1", 31415)),
    ],
)
def test_addresses(text: str, where: str | tuple[str, int]) -> None:
    assert parse_address(text).where == where


@pytest.mark.parametrize("text", ["", "node7:", "node7:ipi"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(ValueError, match="is no address"):
        parse_address(text)


def test_parameters_of_ipi() -> None:
    """As i-PI sends them; what the command says goes before them, and what is neither's is left alone."""
    text = b" model : emt , species : CuOCu , pbc : TTF , charge : -1 , latency : 3, batch_size:8"
    assert read_parameters(text) == {
        "model": "emt",
        "numbers": [29, 8, 29],
        "pbc": [True, True, False],
        "charge": -1.0,
        "batch_size": 8,
    }
    assert json.loads(System({"model": "other", "pbc": [False] * 3}).init(text)) == {
        "rootstock": 1,
        "model": "other",
        "numbers": [29, 8, 29],
        "pbc": [False] * 3,
        "charge": -1.0,
        "batch_size": 8,
    }
    for nothing in (b"", b" ", b"\0"):
        with pytest.raises(InvalidInitError, match="which model or which elements"):
            System({}).init(nothing)
    with pytest.raises(InvalidInitError, match="species : Xx"):
        read_parameters(b"species : Xx2")


@pytest.mark.parametrize(
    ("name", "text", "pbc"),
    [
        ("cluster.xyz", '1\nProperties=species:S:1:pos:R:3 pbc="F F F"\nCu 0 0 0\n', False),
        ("ipi.xyz", "1\n# CELL(abcABC): 5 5 5 90 90 90 cell{angstrom} positions{angstrom}\nCu 0 0 0\n", True),
        ("extended.xyz", '1\nLattice="5 0 0 0 5 0 0 0 5" charge=2 spin=1\nCu 0 0 0\n', True),
    ],
)
def test_structure_files(folder: Path, name: str, text: str, pbc: bool) -> None:
    (folder / name).write_text(text)
    more = {"charge": 2.0, "spin": 1.0} if "charge" in text else {}
    assert read_structure(folder / name) == {"numbers": [29], "pbc": [pbc] * 3, **more}


def test_a_structure_file_that_says_nothing_of_periodicity(folder: Path) -> None:
    """The driver's cell may be periodic all the same."""
    plain = folder / "plain.xyz"
    plain.write_text("1\n\nCu 0 0 0\n")
    with pytest.raises(InvalidStructureError, match="plain.xyz does not say along which .*\n.*--pbc TTT"):
        read_structure(plain)
    assert read_structure(plain, [True, True, False]) == {"numbers": [29], "pbc": [True, True, False]}
