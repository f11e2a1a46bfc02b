"""A daemon on a GPU: its numbers, against mace-torch's own calculator on the CPU in float64, and its memory.

What its worker computes with is tested in `test_mace_device.py`, on the GPU as well.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.md.velocitydistribution import MaxwellBoltzmannDistribution
from ase.md.verlet import VelocityVerlet

from conftest import EMBEDDED_MODEL, RunningDaemon, wait_for
from rootstock_client.errors import LimitError
from rootstockd.host.devices import VISIBLE, gpu_memory, seen_gpus

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]
MODEL = "mace-emt-small"
MB = 10**6
GPU = ("--gpu", "0")

HOG = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(free - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("full", flush=True)
sys.stdin.read()
"""
"""Another program that takes all of a GPU's memory but so many bytes, until its input ends."""


@pytest.fixture(scope="module")
def gpu_daemon(start_shared_daemon: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    daemon = start_shared_daemon("--model", MODEL, device=GPU)
    yield daemon
    daemon.stop()  # other files' daemons want the GPU, too


@pytest.fixture(scope="module")
def reference() -> Any:
    calculators = pytest.importorskip("mace.calculators")
    return calculators.MACECalculator(model_paths=str(EMBEDDED_MODEL), device="cpu", default_dtype="float64")


def copper(seed: int, size: int = 2) -> Atoms:
    atoms = bulk("Cu", cubic=True) * size
    atoms.rattle(0.1, seed=seed)
    return atoms


def test_the_worker_computes_on_the_gpu(gpu_daemon: RunningDaemon) -> None:
    assert gpu_daemon.model(MODEL)["device"].startswith("cuda")
    assert "cuda" in gpu_daemon.model(MODEL)["backend"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-3)])
def test_numbers_are_those_of_the_cpu(gpu_daemon: RunningDaemon, reference: Any, dtype: Any, tolerance: float) -> None:
    atoms, other = copper(1), copper(1)
    atoms.calc, other.calc = gpu_daemon.client().calculator(MODEL, dtype=dtype), reference
    assert atoms.get_potential_energy() == pytest.approx(other.get_potential_energy(), abs=tolerance * len(atoms))
    np.testing.assert_allclose(atoms.get_forces(), other.get_forces(), rtol=0, atol=tolerance)
    np.testing.assert_allclose(atoms.get_stress(), other.get_stress(), rtol=0, atol=tolerance)


def test_many_sessions_share_passes_and_keep_their_own_numbers(gpu_daemon: RunningDaemon, reference: Any) -> None:
    jobs = [copper(seed, 1 + seed % 3) for seed in range(16)]

    def forces(atoms: Atoms) -> np.ndarray:
        with gpu_daemon.client().calculator(MODEL) as calculator:
            atoms.calc = calculator
            for seed in range(5):
                atoms.rattle(0.01, seed=seed)
                atoms.get_forces()
            return atoms.get_forces()

    before = gpu_daemon.model(MODEL)
    with ThreadPoolExecutor(len(jobs)) as pool:
        found = list(pool.map(forces, jobs))
    after = gpu_daemon.model(MODEL)
    assert after["evaluations"] - before["evaluations"] == 5 * len(jobs)
    assert after["batches"] - before["batches"] < 5 * len(jobs)
    for atoms, each in zip(jobs, found, strict=True):
        atoms.calc = reference
        np.testing.assert_allclose(each, atoms.get_forces(), rtol=0, atol=1e-9)


def test_a_trajectory_ends_where_it_should(gpu_daemon: RunningDaemon, reference: Any) -> None:
    """50 steps with a graph that stays on the device; each force had a part in where the atoms are."""
    ends = []
    with gpu_daemon.client().calculator(MODEL) as calculator:
        for each in (calculator, reference):
            atoms = copper(1)
            atoms.calc = each
            MaxwellBoltzmannDistribution(atoms, temperature_K=600, rng=np.random.default_rng(1))
            VelocityVerlet(atoms, 2 * units.fs).run(50)
            ends.append((atoms.positions.copy(), atoms.get_forces()))
    for found, right in zip(*ends, strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_exact_gives_the_same_bits_each_time(gpu_daemon: RunningDaemon, dtype: Any) -> None:
    first, second = copper(1, 6), copper(2, 6)
    found = []
    with gpu_daemon.client().calculator(MODEL, dtype=dtype, exact=True) as calculator:
        for atoms in (first, second) * 5:
            results = [calculator.get_property(name, atoms) for name in ("energy", "forces", "stress")]
            found.append(b"".join(np.asarray(result).tobytes() for result in results))
    assert len(set(found)) == 2


def test_a_gpu_has_one_daemon(gpu_daemon: RunningDaemon, reference: Any, runtime_folder: Path) -> None:
    second = RunningDaemon(Path(tempfile.mkdtemp(dir=runtime_folder)), device=GPU)
    done = second.run("start", *GPU, "--log-file", second.log)
    assert done.returncode != 0
    assert f"a daemon already uses the GPU {uuid()}: pid {gpu_daemon.pid} " in done.stderr + done.stdout
    assert not second.processes()
    check(gpu_daemon, copper(2), reference)


@pytest.mark.parametrize("how", ["by its number", "by its UUID"])
def test_the_gpu_that_was_asked_for_is_the_one_that_computes(
    start_daemon: Callable[..., RunningDaemon], reference: Any, how: str
) -> None:
    gpus = [gpu.uuid for gpu in seen_gpus()]
    if len(gpus) < 2:
        pytest.skip("there is one GPU here, or one MIG instance: it takes two")
    before = [free_memory(each) for each in gpus]
    daemon = start_daemon("--model", MODEL, device=("--gpu", "1" if how == "by its number" else gpus[1]))
    check(daemon, copper(4), reference)
    model = daemon.model(MODEL)
    assert "cuda" in model["backend"]
    assert psutil.Process(model["pid"]).environ()[VISIBLE] == gpus[1]
    taken = [there - free_memory(each) for there, each in zip(before, gpus, strict=True)]
    assert taken.pop(1) > 100 * MB
    assert max(taken) < 50 * MB, "on another there is something of it, too"


# --- memory


def uuid() -> str:
    """The GPU's, or the MIG instance's."""
    return seen_gpus()[0].uuid


def free_memory(which: str = "") -> int:
    """Bytes of a GPU, by its UUID, or of the first one, as the driver says."""
    memory = gpu_memory(which or uuid())
    assert memory is not None
    return memory.free


def check(daemon: RunningDaemon, atoms: Atoms, reference: Any) -> None:
    """A new session's forces, of its first structure and of one that is no longer the first."""
    with daemon.client().calculator(MODEL) as calculator:
        for seed in range(3):
            atoms.rattle(0.01, seed=seed)
            atoms.calc = calculator
            found = atoms.get_forces()
            atoms.calc = reference
            np.testing.assert_allclose(found, atoms.get_forces(), rtol=0, atol=1e-9)


@contextlib.contextmanager
def hog(leaving: int) -> Iterator[None]:
    """Another program has all of the GPU's memory but `leaving` bytes."""
    environment = {**os.environ, VISIBLE: uuid()}
    command = [sys.executable, "-c", HOG, str(leaving)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "full\n"
        try:
            yield
        finally:
            process.communicate()


@contextlib.contextmanager
def neighbour(daemon: RunningDaemon, reference: Any) -> Iterator[None]:
    """A job that steps all the while, and gets the right forces at each step: an idle model would have to go."""
    over, atoms = threading.Event(), copper(5)
    atoms.calc = reference
    right = atoms.get_forces()

    def step() -> int:
        steps = 0
        with daemon.client().calculator(MODEL) as calculator:
            while not over.is_set():
                calculator.results.clear()
                np.testing.assert_allclose(calculator.get_forces(atoms), right, rtol=0, atol=1e-9)
                steps += 1
        return steps

    with ThreadPoolExecutor(1) as pool:
        steps = pool.submit(step)
        try:
            yield
        finally:
            over.set()
        assert steps.result() > 1


def in_parts(log: str) -> bool:
    """Whether a batch was split: by the worker, which knew what it would take, or as memory lacked for it."""
    return bool(re.search(r"structures of \d+ atoms took \d+ passes|no memory for a batch", log))


def test_another_program_may_fill_the_gpu(gpu_daemon: RunningDaemon, reference: Any) -> None:
    """Batches are done in several passes, what does not fit is told so, and when the other is gone all is as before.

    One structure with fewer atoms than the batch does not fit: so the batch would not have, in one pass.
    """
    jobs = [bulk("Cu", cubic=True) * (6, 6, 6) for _ in range(16)]
    huge = bulk("Cu", cubic=True) * (15, 15, 15)
    assert len(huge) < sum(map(len, jobs))
    with contextlib.ExitStack() as sessions:
        calculators = [sessions.enter_context(gpu_daemon.client().calculator(MODEL)) for _ in jobs]

        def forces(number: int) -> Any:
            calculators[number].results.clear()
            return calculators[number].get_forces(jobs[number])

        for number, atoms in enumerate(jobs):
            forces(number)  # a session's first structure is in no batch
            atoms.rattle(0.1, seed=number)
        alone = [forces(number) for number in range(len(jobs))]
        before = gpu_daemon.model(MODEL)
        with neighbour(gpu_daemon, reference):
            with hog(leaving=2_000 * MB):  # one structure takes some 800
                said = len(gpu_daemon.log.read_text())
                with ThreadPoolExecutor(len(jobs)) as pool:
                    together = list(pool.map(forces, range(len(jobs))))
                wait_for(lambda: in_parts(gpu_daemon.log.read_text()[said:]))  # it is written after the answers
                with (
                    gpu_daemon.client().calculator(MODEL) as calculator,
                    pytest.raises(LimitError, match=f"^{len(huge)} atoms do not fit the device's memory"),
                ):
                    calculator.get_forces(huge)
                check(gpu_daemon, copper(6), reference)
            with ThreadPoolExecutor(len(jobs)) as pool:
                afterwards = list(pool.map(forces, range(len(jobs))))
        check(gpu_daemon, copper(7), reference)
    for right, *others in zip(alone, together, afterwards, strict=True):
        for found in others:
            np.testing.assert_allclose(found, right, rtol=0, atol=1e-9)
    after = gpu_daemon.model(MODEL)
    assert (after["pid"], after["restarts"]) == (before["pid"], before["restarts"])


def test_memory_is_free_soon_after_the_daemon_was_killed(gpu_daemon: RunningDaemon, reference: Any) -> None:
    gpu_daemon.stop()
    before = free_memory()
    gpu_daemon.start()
    check(gpu_daemon, copper(3), reference)
    assert free_memory() < before - 100 * MB, "there is nothing to give back"
    os.kill(gpu_daemon.pid, signal.SIGKILL)
    wait_for(lambda: free_memory() >= before - 50 * MB, timeout=5)
    wait_for(lambda: not gpu_daemon.processes())
    gpu_daemon.start()
    check(gpu_daemon, copper(3), reference)
