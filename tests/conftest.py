"""Real daemons for the tests, each in a folder of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from compatibility import compatible, pytest_addoption, pytest_configure, pytest_runtest_call
from leaks import no_leaks, pytest_runtest_makereport
from rootstock_client import RootstockClient, RootstockError, ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.ipi import FloatArray
from rootstockd.cli.ending import end
from rootstockd.host import passed
from rootstockd.host.devices import seen_gpus

# Test processes and their workers share few cores: threads that wait for each other would take most of the time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["ROOTSTOCKD_PATIENCE"] = "60"  # a test that waits for a daemon that nobody starts should say so
settings.register_profile("rootstockd", deadline=None)  # the cores have other processes to work for, too
settings.load_profile("rootstockd")

__all__ = [  # found here by pytest
    "compatible",
    "no_leaks",
    "pytest_addoption",
    "pytest_configure",
    "pytest_runtest_call",
    "pytest_runtest_makereport",
]

MARK = "TEST_OF_ROOTSTOCKD"
"""A variable that a daemon and its workers are started with: the daemon's folder."""
EMBEDDED_MODEL = Path(str(resources.files("rootstockd.models").joinpath("embedded/mace-emt-small.model")))


ALL_OF_RICH = """
import importlib, pkgutil, rich
for module in pkgutil.iter_modules(rich.__path__, "rich."):
    if module.name not in ("rich.__main__", "rich.jupyter", "rich._win32_console", "rich._windows_renderer"):
        importlib.import_module(module.name)
import rich._unicode_data
"""
"""For programs that become another user, who need not be able to read the environment that the tests run in: rich
imports as it needs."""


@pytest.fixture(scope="session", autouse=True)
def no_settings_of_this_machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Neither this machine's catalogues and weights nor those of whoever runs the tests play a part."""
    folder = tmp_path_factory.mktemp("settings")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTSTOCKD_STATE", str(folder / "state"))
        patch.setenv("ROOTSTOCKD_SITE", str(folder / "site"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        for name in ("SLURM_JOB_ID", "COLUMNS", "LINES"):  # readline sets the latter two in pytest-xdist's processes
            patch.delenv(name, raising=False)
        yield


def rootstockd(*arguments: str | Path, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, without raising for its exit status."""
    command = [sys.executable, "-m", "rootstockd", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, **options)


def wait_for(condition: Callable[[], object], timeout: float = 20.0) -> None:
    """Until it is so; an error if it does not come about."""
    deadline, pause = time.monotonic() + timeout, 0.01
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(pause)
        pause = min(1.2 * pause, 0.05)  # most conditions are requests, and others have work for the CPU


@contextlib.contextmanager
def stopped(process: int) -> Iterator[None]:
    """Meanwhile a process does nothing, and what comes waits for it."""
    os.kill(process, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(process, signal.SIGCONT)


LONGEST = (
    *("test_docs", "test_environments", "test_families", "test_chaos", "test_models_cli", "test_workers"),
    *("test_daemon", "test_slurm", "test_dask", "test_systemd", "test_lifecycle", "test_errors_live", "test_warm"),
    "test_mace_cuequivariance",
)
"""Files that take a minute or more, the longest first: one that began late would be waited for by all processes."""
UNTIL = float(os.environ.get("TESTS_UNTIL", "inf"))
"""When no test begins any more, as seconds since 1970: what is cut off says nothing of the others either."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start no daemon come first, then the longest. What needs a GPU is skipped where there is none."""
    rank = {name: number for number, name in enumerate(LONGEST, 1)}
    with_daemons = {item.path for item in items if "runtime_folder" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank) + 1 if item.path in with_daemons else 0))
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if not needing:
        return
    why = ""
    if not seen_gpus():
        why = "there is no NVIDIA GPU here"
    elif "PYTEST_XDIST_WORKER" in os.environ:
        why = "it needs the GPU for itself: `python -m benchmarks.run_local --gpu-checks`, or `pytest -m gpu`"
    for item in needing if why else ():
        item.add_marker(pytest.mark.skip(reason=why))


def pytest_runtest_setup() -> None:
    if time.time() > UNTIL:
        pytest.skip("the time for all tests was over (TESTS_UNTIL)")


@pytest.fixture(scope="session", autouse=True)
def cuda_has_begun() -> None:
    """What CUDA keeps for the whole process is no test's leak; on a machine with a GPU torch begins it some time."""
    if seen_gpus():
        with warnings.catch_warnings(), contextlib.suppress(Exception):  # no torch, or none for this GPU or its driver
            warnings.simplefilter("ignore")
            import torch

            torch.zeros(1, device="cuda")


@dataclass
class RunningDaemon:
    """A daemon that a test may talk to."""

    folder: Path
    options: tuple[str, ...] = ()
    device: tuple[str, ...] = ("--device", "cpu")
    socket: Path = field(init=False)
    log: Path = field(init=False)

    def __post_init__(self) -> None:
        self.socket = self.folder / "rootstockd.sock"

        self.log = self.folder / "log"

    def start(self) -> RunningDaemon:
        done = self.run("start", *self.device, "--log-file", self.log, *self.options)
        assert done.returncode == 0, done.stderr + done.stdout + self.log.read_text()
        return self

    def run(self, command: str, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **options.pop("env", {}), MARK: str(self.folder)}
        return rootstockd(command, "--socket", self.socket, *arguments, env=environment, **options)

    def processes(self) -> list[int]:
        """The daemon and its workers, and those of its predecessors that are still there."""
        mark = f"{MARK}={self.folder}".encode()
        found = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if entry.isdigit() and mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry))
        return found

    def client(self, patience: float | None = None) -> RootstockClient:
        return RootstockClient(self.socket, patience=patience)

    @property
    def pid(self) -> int:
        return int(self.client().status()["pid"])

    def model(self, name: str) -> dict[str, Any]:
        return next(model for model in self.client().status()["models"] if model["name"] == name)

    def batch(self, model: str, numbers: list[int], frames: FloatArray) -> FloatArray:
        """Forces of several structures in one message, as wire units have them: (frames, atoms, 3), Hartree/Bohr.

        Args:
            model: catalogue name.
            numbers: atomic numbers.
            frames: positions, (frames, atoms, 3), Bohr. The cell is a cube of 9 Bohr.
        """
        forces = np.zeros_like(frames)
        side = DriverSide(lambda _: memoryview(forces).cast("B"), batch_size=len(frames))
        system: dict[str, Any] = {"model": model, "numbers": numbers, "pbc": [True] * 3, "batch_size": len(frames)}
        system |= {"rootstock": 1, "want": ["energy", "forces"]}
        cells = np.array([np.eye(3) * 9] * len(frames))
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.socket))
            head = ipi.POSDATA + ipi.INT.pack(len(numbers)) + np.stack([cells, np.linalg.inv(cells)], axis=1).tobytes()
            sock.sendall(ipi.init_frame(json.dumps(system).encode()) + head + frames.tobytes() + ipi.GETFORCE)
            side.expect(ipi.GETFORCE)
            while (message := side.next_message()) is None:
                side.received(sock.recv_into(side.get_buffer()))
        assert isinstance(message, ipi.ForceReady), message
        return forces

    def stop(self) -> None:
        """End it, and see that nothing of it is left."""
        why = None
        if self.processes() or self.socket.exists():  # it may have been started in another way
            try:
                end(self.socket, force=True)  # what `rootstockd stop` does, without a process for it
            except RootstockError as error:  # as a rule, that there is none
                why = error
        try:
            wait_for(lambda: not self.processes(), timeout=10)
        except AssertionError as error:
            raise AssertionError(f"processes {self.processes()} are left: {why}") from error


@pytest.fixture(scope="session", autouse=True)
def state_folder() -> Iterator[Path]:
    """What models take in tests is nothing to remember for whoever runs them."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-state-") as folder:
        os.environ["ROOTSTOCKD_STATE"] = folder
        yield Path(folder)
        del os.environ["ROOTSTOCKD_STATE"]


@pytest.fixture(scope="session")
def runtime_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def daemons(runtime_folder: Path) -> Generator[Callable[..., RunningDaemon], None, None]:
    """A function that starts daemons; they are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, device: tuple[str, ...] = ("--device", "cpu")) -> RunningDaemon:
            folder = Path(tempfile.mkdtemp(dir=runtime_folder))
            daemon = RunningDaemon(folder, options, device)
            stack.callback(daemon.stop)
            return daemon.start()

        yield start


@pytest.fixture
def start_daemon(runtime_folder: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start a daemon with more options than the common one, for one test."""
    with daemons(runtime_folder) as start:
        yield start


@pytest.fixture(scope="session")
def start_shared_daemon(runtime_folder: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start a daemon that several tests use."""
    with daemons(runtime_folder) as start:
        yield start


OLD_KERNEL = """
import errno, socket

def without_passrights(method):
    def call(self, level, option, *rest):
        if (level, option) == (socket.SOL_SOCKET, 83):
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return method(self, level, option, *rest)
    return call

for name in ("setsockopt", "getsockopt"):
    setattr(socket.socket, name, without_passrights(getattr(socket.socket, name)))
"""
"""For a daemon that takes its kernel for one before Linux 6.16, whose sockets can't refuse descriptors: it then reads
and writes all connections by itself (`GuardedTransport`), not by its event loop's transports."""


@pytest.fixture(scope="module", params=["this kernel", "an older kernel"])
def older_kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[bool]:
    """The kernel that daemons are started on is one before Linux 6.16, or seems so; tests are run with both."""
    if request.param == "this kernel":
        with socket.socket(socket.AF_UNIX) as sock:
            passed.refuse(sock)
            if not passed.are_refused(sock):
                pytest.skip("this kernel's sockets can't refuse descriptors (before Linux 6.16)")
        yield False
        return
    folder = tmp_path_factory.mktemp("old")
    (folder / "sitecustomize.py").write_text(OLD_KERNEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield True


@pytest.fixture(scope="session")
def daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """The daemon that tests share: MACE and EMT, warm."""
    return start_shared_daemon("--model", "mace-emt-small", "--model", "emt")


@pytest.fixture
def own_daemon(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon that a test may harm, with EMT warm."""
    return start_daemon("--model", "emt")


def sha256(path: Path) -> str:
    """What a catalogue says of a model's file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def open_descriptors(pid: int) -> int:
    """How many file descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
