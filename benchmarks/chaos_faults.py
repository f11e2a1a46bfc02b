"""What `chaos` does to a daemon, its workers and its connections, each as a function of a `Victim`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.common import Daemon
from rootstock_client import ipi

SYSTEM = {"rootstock": 1, "model": "emt", "numbers": [29] * 200, "pbc": [False] * 3}
_POSITIONS = np.random.default_rng(1).uniform(0, 60, (200, 3))
STEP = ipi.posdata_head(np.eye(3), np.eye(3), 200) + _POSITIONS.tobytes() + ipi.GETFORCE
MESSAGE = ipi.init_frame(json.dumps(SYSTEM).encode()) + STEP
_DYING = """
import socket, sys, time
sock = socket.socket(socket.AF_UNIX); sock.connect(sys.argv[1]); message = bytes.fromhex(sys.stdin.readline())
print("connected", flush=True)
while True:
    for start in range(0, len(message), 97):
        sock.sendall(message[start : start + 97]); time.sleep(0.0003)
"""


@dataclass
class Victim:
    """A daemon, and what is held against it."""

    daemon: Daemon
    rng: random.Random
    kill_job: Callable[[], object]
    open: list[tuple[float, socket.socket]] = field(default_factory=list)
    """Sockets to close later, each with its time."""

    def connect(self) -> socket.socket:
        """A connection of our own."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(5)
        try:
            sock.connect(str(self.daemon.socket))
        except OSError:
            sock.close()
            raise
        return sock

    def keep(self, sock: socket.socket, seconds: float) -> None:
        """Leave it open for a while."""
        self.open.append((time.monotonic() + seconds, sock))

    def close(self, *, everything: bool = False) -> None:
        """Close those whose time has come."""
        now = time.monotonic()
        for due in [pair for pair in self.open if everything or pair[0] < now]:
            self.open.remove(due)
            due[1].close()

    def worker(self, *, ready: bool = False) -> int | None:
        """Some worker's process; of a model that is ready, if so."""
        models = [model for model in self.daemon.status["models"] if not ready or model["state"] == "ready"]
        pids = sorted(model["pid"] for model in models if model["pid"])
        return self.rng.choice(pids) if pids else None

    def signal_worker(self, number: signal.Signals, *, ready: bool = False) -> str:
        """Send a worker a signal."""
        pid = self.worker(ready=ready)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return f"pid {pid}"


# --- the daemon


def daemon_killed(victim: Victim) -> str:
    """SIGKILL; its workers must be gone in 5 s. Then another is started."""
    process = psutil.Process(victim.daemon.pid)
    workers = process.children(recursive=True)
    process.kill()
    _, alive = psutil.wait_procs([process, *workers], timeout=5)
    time.sleep(victim.rng.uniform(0, 1))
    victim.daemon.command(*victim.daemon.start_arguments)
    if alive:
        raise AssertionError(f"{len(alive)} processes outlived a killed daemon by 5 s")
    return ""


def daemon_restarted(victim: Victim) -> str:
    """`rootstockd restart`."""
    victim.daemon.command("restart")
    return ""


def daemon_terminated(victim: Victim) -> str:
    """SIGTERM, sometimes twice; another is started when it is gone."""
    process = psutil.Process(victim.daemon.pid)
    process.terminate()
    twice = victim.rng.random() < 0.5
    if twice:
        time.sleep(victim.rng.uniform(0, 0.1))
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs([process], timeout=90)
    if alive:
        raise AssertionError("a daemon did not end within 90 s of SIGTERM")
    victim.daemon.command(*victim.daemon.start_arguments)
    return "twice" if twice else "once"


def daemon_hung_up(victim: Victim) -> str:
    """SIGHUP, if the daemon does anything with it."""
    pid = victim.daemon.pid
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:"))
    if not caught >> (signal.SIGHUP - 1) & 1:
        return "not caught, not sent"
    os.kill(pid, signal.SIGHUP)
    return ""


# --- workers and jobs


def worker_killed(victim: Victim) -> str:
    """SIGKILL."""
    return victim.signal_worker(signal.SIGKILL)


def ready_worker_killed(victim: Victim) -> str:
    """SIGKILL, but not while it loads: it is in the midst of evaluations."""
    return victim.signal_worker(signal.SIGKILL, ready=True)


def worker_crashed(victim: Victim) -> str:
    """SIGSEGV, as from a bug in a kernel."""
    return victim.signal_worker(signal.SIGSEGV)


def worker_aborted(victim: Victim) -> str:
    """SIGABRT, as from an assertion in C++."""
    return victim.signal_worker(signal.SIGABRT)


def worker_stopped(victim: Victim) -> str:
    """SIGSTOP: it hangs until the daemon notices.

    Not in its first moments, before it has asked the kernel to end it with its daemon.
    """
    pid = victim.worker()
    if pid is not None:
        with contextlib.suppress(OSError):
            if "Seccomp:\t2" not in Path(f"/proc/{pid}/status").read_text():
                return f"pid {pid}, which has just begun: left alone"
            os.kill(pid, signal.SIGSTOP)
    return f"pid {pid}"


def job_killed(victim: Victim) -> str:
    """SIGKILL for a whole process of jobs; another takes its place."""
    victim.kill_job()
    return ""


def client_killed(victim: Victim) -> str:
    """SIGKILL somewhere in a message."""
    command = [sys.executable, "-ISc", _DYING, str(victim.daemon.socket)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as client:
        assert client.stdin is not None and client.stdout is not None
        client.stdin.write(MESSAGE.hex().encode() + b"\n")
        client.stdin.flush()
        client.stdout.readline()
        time.sleep(victim.rng.uniform(0, 0.1))
        client.kill()
    return ""


# --- connections


def half_message(victim: Victim) -> str:
    """A part of a step, and then nothing for a while."""
    sock = victim.connect()
    size = victim.rng.randrange(len(MESSAGE))
    sock.sendall(MESSAGE[:size])
    victim.keep(sock, victim.rng.uniform(0, 5))
    return f"{size} of {len(MESSAGE)} bytes"


def slow_reader(victim: Victim) -> str:
    """Steps one after another, of whose answers it reads little."""
    sock = victim.connect()
    sock.settimeout(0.2)
    with contextlib.suppress(OSError):
        sock.sendall(MESSAGE)
        for _ in range(5):
            sock.sendall(STEP)
            sock.recv(100)
    victim.keep(sock, victim.rng.uniform(0, 5))
    return ""


def connect_and_die(victim: Victim) -> str:
    """Connections that are closed at once."""
    for _ in range(20):
        victim.connect().close()
    return ""


def hostile_init(victim: Victim) -> str:
    """INITs that ask for nonsense."""
    texts: list[Any] = [
        b"\xff\xfe{",
        b"[" * 5000,
        json.dumps({**SYSTEM, "model": "../../etc/passwd"}).encode(),
        json.dumps({**SYSTEM, "numbers": [10**30]}).encode(),
        json.dumps({**SYSTEM, "numbers": []}).encode(),
        json.dumps({**SYSTEM, "batch_size": 10**9}).encode(),
        json.dumps({**SYSTEM, "rootstock": 99}).encode(),
        json.dumps({**SYSTEM, "tolerance": -1, "exact": "maybe", "more": {}}).encode(),
    ]
    for text in texts:
        with victim.connect() as sock:
            sock.sendall(ipi.init_frame(text) + STEP)
            with contextlib.suppress(OSError):
                sock.recv(1000)
    with victim.connect() as sock:
        sock.sendall(ipi.INIT + b"\0\0\0\0\xff\xff\xff\xff" + bytes(100))
    return ""


def garbage(victim: Victim) -> str:
    """Random bytes, to both sockets."""
    for path in (victim.daemon.socket, victim.daemon.socket.with_suffix(".control")):
        with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
            sock.settimeout(1)
            sock.connect(str(path))
            sock.sendall(victim.rng.randbytes(victim.rng.randrange(1, 100_000)))
    return ""


def flood(victim: Victim) -> str:
    """Several hundred connections in one moment."""
    for _ in range(300):
        victim.keep(victim.connect(), victim.rng.uniform(0.5, 2))
    return ""


FAULTS: dict[str, tuple[Callable[[Victim], str], int]] = {
    "worker killed": (worker_killed, 3),
    "ready worker killed": (ready_worker_killed, 1),
    "worker crashed": (worker_crashed, 2),
    "worker aborted": (worker_aborted, 2),
    "worker stopped": (worker_stopped, 2),
    "daemon killed": (daemon_killed, 2),
    "daemon restarted": (daemon_restarted, 1),
    "daemon terminated": (daemon_terminated, 1),
    "daemon hung up": (daemon_hung_up, 1),
    "job killed": (job_killed, 1),
    "client killed": (client_killed, 3),
    "half a message": (half_message, 3),
    "slow reader": (slow_reader, 3),
    "connect and die": (connect_and_die, 2),
    "hostile INIT": (hostile_init, 2),
    "garbage": (garbage, 2),
    "flood": (flood, 1),
}
"""Each with how often it happens, in proportion."""
BLAMED = ("worker crashed", "worker aborted", "worker stopped")
"""Two of which may fall on one evaluation, which is then given up; five, or two stops, on a model that loads."""
