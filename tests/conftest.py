"""Real daemons for the tests, each in a folder of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from rootstock_client import RootstockClient
from rootstockd.devices import gpu_names

# Test processes and their workers share few cores: threads that wait for each other would take most of the time.
os.environ["OMP_NUM_THREADS"] = "1"

EMBEDDED_MODEL = Path(str(resources.files("rootstockd.models").joinpath("embedded/mace-emt-small.model")))


def rootstockd(*arguments: str | Path, timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, without raising for its exit status."""
    command = [sys.executable, "-m", "rootstockd", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout, **options)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU are skipped where there is none."""
    needing = [item for item in items if item.get_closest_marker("gpu")]
    if needing and not gpu_names():
        for item in needing:
            item.add_marker(pytest.mark.skip(reason="there is no NVIDIA GPU here"))


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
        return rootstockd(command, "--socket", self.socket, *arguments, **options)

    def client(self) -> RootstockClient:
        return RootstockClient(self.socket)

    def model(self, name: str) -> dict[str, Any]:
        return next(model for model in self.client().status()["models"] if model["name"] == name)

    def stop(self) -> None:
        self.run("stop", "--force")


@pytest.fixture(scope="session")
def runtime_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="rootstockd-") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def start_daemon(runtime_folder: Path) -> Iterator[Callable[..., RunningDaemon]]:
    """Start a daemon with more options than the common one; it is stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(*options: str, device: tuple[str, ...] = ("--device", "cpu")) -> RunningDaemon:
            folder = Path(tempfile.mkdtemp(dir=runtime_folder))
            daemon = RunningDaemon(folder, options, device)
            stack.callback(daemon.stop)
            return daemon.start()

        yield start


@pytest.fixture(scope="session")
def daemon(start_daemon: Callable[..., RunningDaemon]) -> RunningDaemon:
    """The daemon that tests share: MACE and EMT, warm."""
    return start_daemon("--model", "mace-emt-small", "--model", "emt")


@pytest.fixture
def own_daemon(start_daemon: Callable[..., RunningDaemon]) -> Generator[RunningDaemon, None, None]:
    """A daemon that a test may harm, with EMT warm."""
    running = start_daemon("--model", "emt")
    yield running
    running.stop()


def open_descriptors(pid: int) -> int:
    """How many file descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))
