"""What a daemon says to systemd, without one: readiness, reload, the watchdog; sockets that it is given."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from conftest import RunningDaemon, wait_for
from rootstock_client import RootstockClient
from rootstockd.cli.options import devices_of
from rootstockd.daemon import Daemon
from rootstockd.host.sockets import AddressError, adopt
from rootstockd.sessions.acceptor import Acceptor
from rootstockd.settings.config import Config, Device
from rootstockd.systemd import Manager, serves

# puts sockets where systemd does, and becomes the daemon, with the process id that LISTEN_PID must have
ACTIVATE = """
import os, sys
fds, names, *command = sys.argv[1:]
for target, fd in enumerate(map(int, fds.split(",")), 3):
    os.dup2(fd, target)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(target - 2), "LISTEN_FDNAMES": names}
os.execv(command[0], command)
"""


class Ear:
    """A socket like systemd's, and what was said to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._sock.bind(str(path))
        self.heard: list[str] = []

    def __contains__(self, line: str) -> bool:
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard += self._sock.recv(4096).decode().split("\n")
        return line in self.heard

    def close(self) -> None:
        self._sock.close()


@pytest.fixture
def ear(runtime_folder: Path) -> Iterator[Ear]:
    ear = Ear(runtime_folder / "notify")
    yield ear
    ear.close()
    ear.path.unlink()


@contextlib.contextmanager
def held(folder: Path) -> Iterator[dict[str, socket.socket]]:
    """Sockets that listen, as systemd makes them."""
    with contextlib.ExitStack() as stack:
        sockets = {}
        for name, end in (("sessions", "sock"), ("control", "control")):
            sockets[name] = stack.enter_context(socket.socket(socket.AF_UNIX))
            path = folder / f"held.{end}"
            sockets[name].bind(str(path))
            stack.callback(path.unlink)
            sockets[name].listen(16)
        yield sockets


@contextlib.contextmanager
def activated(
    folder: Path, sockets: dict[str, socket.socket], *options: str, **environment: str
) -> Iterator[subprocess.Popen[str]]:
    """A daemon that was given these sockets."""
    fds = [sock.fileno() for sock in sockets.values()]
    command = [sys.executable, "-c", ACTIVATE, ",".join(map(str, fds)), ":".join(sockets), sys.executable]
    command += ["-m", "rootstockd", "start", "--foreground", "--device", "cpu", "--socket", str(folder / "held.sock")]
    with subprocess.Popen(
        [*command, *options],
        pass_fds=fds,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as process:
        try:
            yield process
        finally:
            process.kill()
            process.communicate()


def test_it_says_how_it_is(runtime_folder: Path, ear: Ear) -> None:
    settings = runtime_folder / "settings.toml"
    settings.write_text('models = ["emt"]\n')
    said = {"NOTIFY_SOCKET": str(ear.path), "WATCHDOG_USEC": "3000000"}
    with (
        held(runtime_folder) as sockets,
        activated(runtime_folder, sockets, "--config", str(settings), **said) as process,
    ):
        wait_for(lambda: "READY=1" in ear)
        before = ear.heard[: ear.heard.index("READY=1")]
        assert "STATUS=loading emt" in before
        assert "EXTEND_TIMEOUT_USEC=4000000" in before
        wait_for(lambda: ear.heard.count("WATCHDOG=1") >= 2 or "" in ear)
        ear.heard.clear()
        client = RootstockClient(runtime_folder / "held.sock")
        worker = client.status()["models"][0]["pid"]
        environment = Path(f"/proc/{worker}/environ").read_text()
        assert not any(f"{name}=" in environment for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"))
        began = time.monotonic_ns() // 1000
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: "READY=1" in ear)
        told = next(line for line in ear.heard if line.startswith("MONOTONIC_USEC="))
        assert began <= int(told.partition("=")[2]) <= time.monotonic_ns() // 1000
        assert ear.heard.index("RELOADING=1") < ear.heard.index("READY=1")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert "STOPPING=1" in ear
        for sock in sockets.values():  # systemd listens still, at the same addresses
            with socket.socket(socket.AF_UNIX) as probe:
                probe.connect(sock.getsockname())


def test_no_model_that_can_be_loaded_is_a_failure(runtime_folder: Path, ear: Ear) -> None:
    catalogue = runtime_folder / "broken.toml"
    catalogue.write_text('[broken]\nfamily = "ase"\narguments = { calculator = "nowhere:Nothing" }\n')
    options = ("--catalogue", str(catalogue), "--model", "broken")
    with (
        held(runtime_folder) as sockets,
        activated(runtime_folder, sockets, *options, NOTIFY_SOCKET=str(ear.path)) as process,
    ):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        error, _hint = err.splitlines()[-2:]
        assert "nowhere" in error
        assert "READY=1" not in ear


def test_sockets_of_the_wrong_names_or_places(runtime_folder: Path) -> None:
    with held(runtime_folder) as sockets:
        with activated(runtime_folder, {"sessions": sockets["sessions"]}) as process:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 1
            assert "needs 'sessions' and 'control'" in err
        copy = socket.socket(fileno=os.dup(sockets["control"].fileno()))
        where = "systemd listens on .*held.control, but the settings say"
        with pytest.raises(AddressError, match=where), adopt(copy, runtime_folder / "else.control"):
            pass


def test_sockets_of_another_process_are_not_taken() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "sessions", "WATCHDOG_PID": "1"}
    manager = Manager(environment | {"WATCHDOG_USEC": "1"})
    assert (manager.sockets, manager.watchdog, manager.watches) == ({}, None, False)
    manager.notify("READY=1")  # to nobody


def test_a_daemon_that_answers_nobody_is_not_well(runtime_folder: Path, own_daemon: RunningDaemon) -> None:
    """Its loop turns, but nobody is let in, as somebody outside sees it."""
    devices = (Device(name="cpu"),)
    with held(runtime_folder):
        deaf = Daemon(Config(socket=runtime_folder / "held.sock", devices=devices))
        assert not asyncio.run(serves(deaf, 0.2, 0))
    assert not asyncio.run(serves(deaf, 0.2, 0))  # nor one without an address
    well = Daemon(Config(socket=own_daemon.socket, devices=devices))
    assert asyncio.run(serves(well, 20, 0))


def test_a_daemon_whose_queue_is_full_is_well_while_it_takes_somebody(runtime_folder: Path) -> None:
    """Whoever connects without end fills it as fast as it is emptied."""
    with held(runtime_folder) as sockets, contextlib.ExitStack() as stack:
        busy = Daemon(Config(socket=runtime_folder / "held.sock", devices=(Device(name="cpu"),)))
        for name in sockets:
            for _ in range(10_000):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.setblocking(False)
                try:
                    sock.connect(str(runtime_folder / f"held.{'sock' if name == 'sessions' else name}"))
                except BlockingIOError:
                    break
            else:
                pytest.fail("the queue has no end")
        assert asyncio.run(serves(busy, 0.2, Acceptor.taken - 1))
        assert not asyncio.run(serves(busy, 0.2, Acceptor.taken))


def test_a_daemon_out_of_descriptors_is_not_ended_for_it(own_daemon: RunningDaemon) -> None:
    well = Daemon(Config(socket=own_daemon.socket, devices=(Device(name="cpu"),)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asyncio.run(serves(well, 20, 0))  # whatever it imports, it has

    async def ask() -> bool:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            os.open(os.devnull, os.O_RDONLY)
        return await serves(well, 20, 0)

    try:
        assert asyncio.run(ask())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_instances_are_called() -> None:
    assert devices_of("0") == ("0", ())
    assert devices_of("0:1") == ("0,1", ())
    assert devices_of("GPU-5a:3") == ("GPU-5a,3", ())
    assert devices_of("cpu") == (None, ("cpu",))
    assert devices_of("auto") == (None, ("auto",))
    for name in ("", "0:", "gpu0", "0-1"):
        with pytest.raises(click.UsageError, match="neither GPUs"):
            devices_of(name)
