"""The same streams at a daemon that runs, while a well-behaved session works beside them."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from ase.build import bulk
from ase.calculators.emt import EMT

import streams
from rootstock_client import RootstockClient
from rootstock_client.runtime_dir import control_socket
from rootstockd.host.sockets import name_until_open


class GoodSession:
    """Evaluates without a pause, and compares each result with what it must be.

    Args:
        socket_path: the daemon's session socket.
    """

    def __init__(self, socket_path: Path) -> None:
        self.latencies: list[float] = []
        self.errors: list[str] = []
        self._client = RootstockClient(socket_path)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        atoms, reference = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
        atoms.calc, reference.calc = self._client.calculator("emt"), EMT()
        structures = [reference.positions + np.random.default_rng(seed).normal(0, 0.05, (4, 3)) for seed in range(8)]
        right = []
        for positions in structures:
            reference.positions[:] = positions
            right.append(reference.get_forces())
        count = 0
        while not self._stop.is_set():
            atoms.positions[:] = structures[count % 8]
            start = time.perf_counter()
            try:
                forces = atoms.get_forces()
            except Exception as error:
                self.errors.append(repr(error))
                return
            self.latencies.append(time.perf_counter() - start)
            if not np.allclose(forces, right[count % 8], rtol=0, atol=1e-9):
                self.errors.append(f"step {count}: forces are wrong")
                return
            count += 1
            self._stop.wait(0.002)

    @property
    def p99(self) -> float:
        """Of the steps so far, in ms."""
        return float(np.percentile(self.latencies, 99)) * 1e3

    def __enter__(self) -> GoodSession:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._client.close()


def throw(socket_path: Path, stream: bytes, cuts: Sequence[int], *, wait: bool) -> None:
    """One connection: the stream in pieces, and then gone, after its answers or at once."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(os.fspath(socket_path))
        sock.settimeout(0.05)
        with contextlib.suppress(OSError):
            for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(stream)], strict=True):
                sock.sendall(stream[start:end])
            if wait:
                while sock.recv(65536):
                    pass


def descriptors(pid: int, control: Path) -> int:
    """How many a process has, but for control connections, which come and go with whoever asks."""
    # of an accepted connection the kernel tells the name that its listener was bound to, which is no longer its own
    lines = Path("/proc/net/unix").read_text().splitlines()
    bound = f" {name_until_open(control)}"
    of_control = {f"socket:[{line.split()[6]}]" for line in lines if line.endswith(bound)}
    count = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it has just been closed
            count += str(entry.readlink()) not in of_control
    return count


def footprint(client: RootstockClient) -> dict[str, Any]:
    """Descriptors, memory in MB and restarts of the daemon and its workers."""
    status = client.status()
    told: dict[str, Any] = {"restarts": sum(model["restarts"] for model in status["models"])}
    processes = {"daemon": status["pid"], **{m["name"]: m["pid"] for m in status["models"] if m["pid"]}}
    for name, pid in processes.items():
        process = psutil.Process(pid)
        told[f"{name} descriptors"] = descriptors(pid, control_socket(client.socket))
        told[f"{name} maps"] = len(Path(f"/proc/{pid}/maps").read_text().splitlines())
        told[f"{name} memory / MB"] = round(process.memory_info().rss / 1e6, 1)
    return told


def settled(client: RootstockClient, sessions: int = 0, timeout: float = 30) -> None:
    """Until the daemon has no more sessions than these."""
    deadline = time.monotonic() + timeout
    while len(client.status()["sessions"]) > sessions:
        assert time.monotonic() < deadline, "sessions stay that should be gone"
        time.sleep(0.05)


def inputs(rng: random.Random, seeds: Sequence[bytes], count: int) -> Iterator[tuple[bytes, list[int]]]:
    """Streams and their cuts."""
    for _ in range(count):
        other = rng.choice(seeds)
        stream = other if streams.chance(rng, 10) else streams.driver_stream(rng)
        stream = streams.mutate(rng, stream, other)
        yield stream, sorted(rng.randrange(len(stream) + 1) for _ in range(rng.choice((0, 0, 1, 3))))


def storm(socket_path: Path, seeds: Sequence[bytes], count: int, seed: int = 0) -> dict[str, Any]:
    """Throw `count` streams at a daemon with EMT and `noop` warm; what that did to it and to a good session."""
    client, rng = RootstockClient(socket_path), random.Random(seed)
    for stream, cuts in inputs(rng, seeds, count // 20):  # what is grown once is not a leak
        throw(socket_path, stream, cuts, wait=False)
    settled(client)
    with GoodSession(socket_path) as good:
        time.sleep(1)
        alone = good.p99
        before = footprint(client)
        good.latencies.clear()
        for stream, cuts in inputs(rng, seeds, count):
            throw(socket_path, stream, cuts, wait=streams.chance(rng, 20))
        beside = good.p99
        settled(client, 1)
        after = footprint(client)
    settled(client)
    assert not good.errors, good.errors
    return {
        "connections": count,
        "good session: steps": len(good.latencies),
        "good session: p99 / ms, alone": round(alone, 3),
        "good session: p99 / ms, beside": round(beside, 3),
        "before": before,
        "after": after,
    }
