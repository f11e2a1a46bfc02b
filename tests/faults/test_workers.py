"""Workers that crash, hang, lie or run out of memory, and what their sessions see of it: next to nothing."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, fcc111
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet

import hostile
from conftest import RunningDaemon
from hostile import behave
from rootstock_client import ipi
from rootstock_client.errors import EvaluationError, LimitError, ModelLoadError, RootstockError
from rootstockd.supervision.scheduler import MAX_ATTEMPTS, MAX_STARVED
from rootstockd.supervision.workers import ABANDONED

HANG_TIMEOUT = 2.0
LOAD_TIMEOUT = 20.0
DRAIN_TIMEOUT = 60.0
CUDA = 530_000_000 if torch.version.cuda else 0
"""Bytes that a torch takes which was built for it, also where there is no GPU."""
PATIENCE = 60.0


@pytest.fixture(scope="module")
def start_hostile(start_shared_daemon, tmp_path_factory) -> Iterator[Callable[..., RunningDaemon]]:
    """Start a daemon whose catalogue has calculators of `hostile`; models at loading as `name="what times"`."""
    folder = tmp_path_factory.mktemp("hostile")
    with pytest.MonkeyPatch.context() as patch:
        path = [str(Path(hostile.__file__).parent), os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scratch")))

        def start(
            load: str = "hostile",
            hang_timeout: float = HANG_TIMEOUT,
            drain_timeout: float = DRAIN_TIMEOUT,
            load_timeout: float = LOAD_TIMEOUT,
            **at_loading: tuple[str, int],
        ) -> RunningDaemon:
            number = len(list(folder.iterdir()))
            entries = ['[hostile]\nfamily = "ase"\narguments = { calculator = "hostile:Hostile" }\n']
            for name, (what, times) in at_loading.items():
                options = f'{{ what = "{what}", times = {times}, counter = "{folder}/{number}-{name}" }}'
                arguments = f'{{ calculator = "hostile:AtLoading", options = {options} }}'
                # it keeps count in a file
                entries.append(f'[{name}]\nfamily = "ase"\nconfine = false\narguments = {arguments}\n')
            catalogue, config = folder / f"{number}-catalogue.toml", folder / f"{number}-config.toml"
            catalogue.write_text("\n".join(entries))
            config.write_text(
                f"hang_timeout = {hang_timeout}\nload_timeout = {load_timeout}\ndrain_timeout = {drain_timeout}\n"
            )
            options = ["--model", load] if load else []
            return start_shared_daemon("--config", str(config), "--catalogue", str(catalogue), *options)

        yield start


@pytest.fixture(scope="module")
def daemon(start_hostile) -> RunningDaemon:
    """With a hostile model, warm."""
    return start_hostile()


@pytest.fixture(scope="module")
def troubled(start_hostile) -> RunningDaemon:
    """With models that don't load, or not at once."""
    never = {what: (what, 1_000_000) for what in ("segfault", "exit", "hang", "raise")}
    return start_hostile(load_timeout=6.0, shaky=("segfault", 4), killed=("kill", 5), **never)


@pytest.fixture
def fresh(start_hostile) -> Iterator[RunningDaemon]:
    """The same, and all it has seen was quick: a batch may take HANG_TIMEOUT, no more."""
    running = start_hostile()
    evaluate(running, slab())
    yield running
    running.stop()


def slab(seed: int = 1) -> Atoms:
    atoms = fcc111("Cu", (2, 2, 2), vacuum=5.0)
    atoms.rattle(0.1, seed=seed)
    return atoms


def expected(atoms: Atoms) -> Any:
    reference = atoms.copy()
    reference.calc = EMT()
    return reference.get_forces()


def wait_for(condition: Callable[[], Any], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def evaluate(daemon: RunningDaemon, atoms: Atoms, model: str = "hostile") -> Any:
    """Forces, or the error."""
    atoms = atoms.copy()
    with daemon.client().calculator(model) as atoms.calc:
        try:
            return atoms.get_forces()
        except RootstockError as error:
            return error


@contextlib.contextmanager
def mates(daemon: RunningDaemon, count: int = 3) -> Iterator[None]:
    """Other sessions step meanwhile, get every number right and no error, and get on afterwards."""
    over = threading.Event()
    steps = [0] * count

    def job(number: int) -> None:
        atoms = slab(number)
        with daemon.client().calculator("hostile") as calculator:
            while not over.is_set():
                atoms.rattle(0.01, seed=steps[number])
                atoms.calc = calculator
                np.testing.assert_allclose(atoms.get_forces(), expected(atoms), atol=1e-9)
                steps[number] += 1

    with ThreadPoolExecutor(count) as pool:
        jobs = [pool.submit(job, number) for number in range(count)]

        def get_on() -> None:
            seen = list(steps)
            wait_for(
                lambda: all(job.done() or now > then + 3 for job, now, then in zip(jobs, steps, seen, strict=True))
            )

        try:
            get_on()
            yield
            get_on()
        finally:
            over.set()
        for done in jobs:
            done.result()


@contextlib.contextmanager
def under_way(daemon: RunningDaemon, atoms: Atoms) -> Iterator[Future[Any]]:
    """An evaluation that the worker is at."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(evaluate, daemon, atoms)
        wait_for(lambda: busy(daemon))
        yield future


def busy(daemon: RunningDaemon) -> bool:
    """Whether a worker is well into the evaluation of the one session."""
    status = daemon.client().status()
    (model,) = status["models"]
    return bool(
        model["state"] == "ready" and model["waiting"] == 0 and [s["state"] for s in status["sessions"]] == ["busy"]
    )


# --- crashes


@pytest.mark.parametrize(
    ("deed", "end"),
    [
        (hostile.SEGFAULT, r"signal 11 \(SIGSEGV\), 2 times"),
        (hostile.ABORT, r"signal 6 \(SIGABRT\), 2 times"),
        (hostile.EXIT, "exit status 3, 2 times"),
    ],
)
def test_a_structure_that_kills_its_worker_is_given_up_after_two(daemon: RunningDaemon, deed: int, end: str) -> None:
    before = daemon.model("hostile")
    with mates(daemon):
        bad = behave(slab(), deed)
        bad.calc = daemon.client().calculator("hostile")
        with pytest.raises(EvaluationError, match=f"'hostile': 2 workers ended over this structure: {end}"):
            bad.get_forces()
        bad.positions[:] = slab().positions  # the same session goes on
        np.testing.assert_allclose(bad.get_forces(), expected(slab()), atol=1e-9)
        bad.calc.close()
    after = daemon.model("hostile")
    assert after["restarts"] == before["restarts"] + 2
    assert after["state"] == "ready"


@pytest.mark.parametrize(
    ("deed", "error", "words"),
    [
        (hostile.LEAVE, EvaluationError, "the engine failed: SystemExit: 3"),
        (hostile.NAN, EvaluationError, "NaN or infinite"),
        (hostile.NO_TEXT, EvaluationError, r"the engine failed: ValueError: can't read caf\?\.dat"),
        (hostile.MEMORY, LimitError, "8 atoms do not fit the device's memory: Unable to allocate.* had 8 atoms"),
    ],
)
def test_a_structure_that_fails_costs_no_worker(daemon: RunningDaemon, deed: int, error: type, words: str) -> None:
    before = daemon.model("hostile")["pid"]
    with mates(daemon), pytest.raises(error, match=words):
        raise evaluate(daemon, behave(slab(), deed))
    assert daemon.model("hostile")["pid"] == before


def test_whoever_ends_workers_hears_of_it_when_others_have_had_one_again(daemon: RunningDaemon) -> None:
    """Else a job that tries the same again and again would have all of it."""
    with mates(daemon):
        for _ in range(3):
            assert isinstance(evaluate(daemon, behave(slab(), hostile.SEGFAULT)), EvaluationError)
            assert daemon.model("hostile")["state"] == "ready"


def test_many_who_end_workers_leave_others_a_good_part_of_the_time(daemon: RunningDaemon) -> None:
    """They hear of it one after another, and only while there is a worker: test_delayed_verdicts.py says when."""
    over, verdicts = threading.Event(), itertools.count()

    def try_again_and_again() -> None:
        while not over.is_set():
            assert isinstance(evaluate(daemon, behave(slab(), hostile.SEGFAULT)), EvaluationError)
            next(verdicts)

    with daemon.client().calculator("hostile") as calculator, ThreadPoolExecutor(6) as pool:
        bad = [pool.submit(try_again_and_again) for _ in range(6)]
        try:
            atoms = slab()
            atoms.calc = calculator
            atoms.get_potential_energy()  # after those that came before
            deadline = time.monotonic() + 15
            for step in itertools.count():
                atoms.rattle(0.001, seed=step)
                atoms.get_potential_energy()
                if time.monotonic() > deadline:
                    break
            told = next(verdicts) + 1
        finally:
            over.set()
        for one in bad:
            one.result()
    assert step > 30 * told  # 400 each where nothing else runs, and few if they were told at once


@pytest.mark.parametrize("how", [(), ("--force",)])
def test_a_daemon_that_stops_lets_nobody_wait_for_that(start_hostile, how: tuple[str, ...]) -> None:
    daemon = start_hostile(hang_timeout=5.0, drain_timeout=2.0)
    evaluate(daemon, slab())  # all it has seen was quick

    def step_on() -> Any:
        while not isinstance(outcome := evaluate(daemon, slab()), RootstockError):
            pass
        return outcome

    with ThreadPoolExecutor(2) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ROOTSTOCKD_PATIENCE", "0")
        bad = pool.submit(evaluate, daemon, behave(slab(), hostile.SLEEP))
        wait_for(lambda: busy(daemon))
        mate = pool.submit(step_on)
        wait_for(lambda: "2 workers ended over this structure" in daemon.log.read_text())
        daemon.run("stop", *how)  # others had none for ten seconds, and would be granted as many
        assert isinstance(bad.result(), EvaluationError)
        assert isinstance(mate.result(), RootstockError)


def test_several_bad_ones_at_once(daemon: RunningDaemon) -> None:
    deeds = [hostile.SEGFAULT, hostile.EXIT, hostile.ABORT, hostile.NAN, hostile.MEMORY, hostile.LEAVE, hostile.NO_TEXT]
    with mates(daemon), ThreadPoolExecutor(len(deeds)) as pool:
        outcomes = list(pool.map(lambda deed: evaluate(daemon, behave(slab(), deed)), deeds))
    assert [type(outcome) for outcome in outcomes] == [EvaluationError] * 4 + [LimitError] + [EvaluationError] * 2


# --- failures of the daemon's own

FAILING = """
import os, sys
from {module} import {name}

def failing(call):
    def made(*arguments, **more):
        frame = sys._getframe()
        while frame is not None and frame.f_code.co_name != {inside!r}:
            frame = frame.f_back
        if frame is not None and os.path.exists({file!r}):
            if {once}:
                os.unlink({file!r})
            raise KeyError("of its own")
        return call(*arguments, **more)
    return made

{name}.{method} = failing({name}.{method})
"""
"""For a daemon that fails in a method, called by way of another function, while there is a file, which may go by it."""


@pytest.mark.parametrize(
    ("module", "name", "method", "inside"),
    [
        ("supervision.scheduler", "Scheduler", "finished", "_done"),
        ("processes.worker_process", "WorkerProcess", "evaluate", "_done"),  # the next batch
        ("supervision.meter", "Meter", "done", "_done"),
        ("supervision.dispatcher", "Dispatcher", "failed", "hear"),
    ],
)
def test_a_daemon_that_fails_at_what_a_worker_says_loses_no_evaluation(
    start_hostile, tmp_path: Path, monkeypatch, module: str, name: str, method: str, inside: str
) -> None:
    """Another worker repeats what was under way; what was done is told."""
    file = tmp_path / "now"
    fault = {"module": f"rootstockd.{module}", "name": name, "method": method, "inside": inside}
    (tmp_path / "sitecustomize.py").write_text(FAILING.format(**fault, file=str(file), once=True))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    running = start_hostile()
    with mates(running):
        file.touch()
        assert isinstance(evaluate(running, behave(slab(), hostile.NAN)), EvaluationError)
        wait_for(lambda: running.model("hostile")["restarts"] == 1 and running.model("hostile")["state"] == "ready")
    log = running.log.read_text()
    assert "the daemon itself failed at what its worker said" in log and "KeyError: 'of its own'" in log
    assert "the worker of hostile ended: the daemon itself failed: KeyError" in log
    running.stop()


def test_a_daemon_that_fails_whatever_worker_there_is_tells_so(start_hostile, tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "now"
    file.touch()
    fault = {"module": "rootstockd.supervision.scheduler", "name": "Scheduler", "method": "next_batch"}
    (tmp_path / "sitecustomize.py").write_text(FAILING.format(**fault, inside="_loaded", file=str(file), once=False))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    running = start_hostile(load="")
    error = evaluate(running, slab())
    assert isinstance(error, ModelLoadError) and "the daemon itself failed: KeyError: 'of its own', 5 times" in str(
        error
    )
    file.unlink()
    running.run("load", "hostile")
    np.testing.assert_allclose(evaluate(running, slab()), expected(slab()), atol=1e-9)
    running.stop()


# --- signals from somewhere else


def test_whoever_kills_workers_is_not_the_structures_fault(daemon: RunningDaemon) -> None:
    """Not for a while; but not for ever."""
    atoms = behave(slab(), hostile.SLOW)
    with under_way(daemon, atoms) as outcome:
        pid = at_it_anew(daemon, None)
        for _ in range(7):
            os.kill(pid, signal.SIGKILL)
            pid = at_it_anew(daemon, pid)
        np.testing.assert_allclose(outcome.result(), expected(atoms), atol=1e-9)
    with under_way(daemon, atoms) as outcome:
        pid = at_it_anew(daemon, None)
        for _ in range(MAX_ATTEMPTS - 1):
            os.kill(pid, signal.SIGKILL)
            pid = at_it_anew(daemon, pid)
        os.kill(pid, signal.SIGKILL)
        error = outcome.result()
    assert isinstance(error, EvaluationError)
    assert f"{MAX_ATTEMPTS} workers ended over this structure: signal 9 (SIGKILL)" in error.message
    assert "People or programs end" in error.hint
    np.testing.assert_allclose(evaluate(daemon, slab()), expected(slab()), atol=1e-9)


def at_it_anew(daemon: RunningDaemon, before: int | None) -> int:
    """The process of the worker after that one, once it is at the evaluation."""
    wait_for(lambda: daemon.model("hostile")["pid"] not in {before, None} and busy(daemon))
    return daemon.model("hostile")["pid"]


@contextlib.contextmanager
def scarce_memory(limit: int) -> Iterator[Path]:
    """A control group with so many bytes; the file that takes processes in."""
    root = Path("/sys/fs/cgroup")
    old = root / "memory"
    group = (old if old.is_dir() else root) / f"rootstockd-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")).write_text(str(limit))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group / "cgroup.procs"
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_structure_for_which_the_kernel_ends_worker_after_worker_is_given_up(daemon: RunningDaemon) -> None:
    """Memory is taken for as many tries as it may be somebody else who has it, and no more."""
    with scarce_memory(hostile.FILLED // 2) as group, under_way(daemon, behave(slab(), hostile.FILL)) as outcome:
        pid = None
        for _ in range(MAX_STARVED):
            pid = at_it_anew(daemon, pid)
            group.write_text(str(pid))
        error = outcome.result()
    assert isinstance(error, EvaluationError)
    how = "signal 9 (SIGKILL), as the kernel killed for want of memory"
    assert f"{MAX_STARVED} workers ended over this structure: {how}, {MAX_STARVED} times" in error.message
    assert "a smaller structure" in error.hint
    np.testing.assert_allclose(evaluate(daemon, slab()), expected(slab()), atol=1e-9)


def test_what_is_sent_to_all_processes_of_a_job_is_not_for_workers(daemon: RunningDaemon) -> None:
    """Slurm does so with SIGTERM when a job is to end, and the daemon wants its workers until it has drained."""
    atoms = behave(slab(), hostile.SLOW)
    with under_way(daemon, atoms) as outcome:
        pid = daemon.model("hostile")["pid"]
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(pid, number)
        np.testing.assert_allclose(outcome.result(), expected(atoms), atol=1e-9)
    assert daemon.model("hostile")["pid"] == pid


def trajectory(daemon: RunningDaemon, seed: int, steps: int) -> list[Any]:
    """Positions and forces of a few steps of dynamics."""
    atoms = slab(seed)
    with daemon.client().calculator("hostile") as atoms.calc:
        dynamics = VelocityVerlet(atoms, 5 * units.fs)
        seen = []
        for _ in range(steps):
            dynamics.run(1)
            seen.append((atoms.positions.copy(), atoms.get_forces()))
    return seen


def test_dynamics_under_random_kills_are_the_same_to_the_bit(daemon: RunningDaemon) -> None:
    sessions, kills, steps = 4, 40, 150
    undisturbed = [trajectory(daemon, seed, steps) for seed in range(sessions)]
    chance = random.Random(1)
    killed = 0
    with ThreadPoolExecutor(sessions) as pool:
        while killed < kills:
            runs = [pool.submit(trajectory, daemon, seed, steps) for seed in range(sessions)]
            while not all(run.done() for run in runs):
                time.sleep(chance.uniform(0.0, 0.3))
                # now and then while it loads, but not all the time
                pid = daemon.model("hostile")["pid"]
                if pid is not None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                        killed += 1
                if chance.random() < 0.8:
                    wait_for(lambda: daemon.model("hostile")["state"] == "ready")
            for run, same in zip(runs, undisturbed, strict=True):
                np.testing.assert_array_equal(run.result(), same)


# --- workers that hang


@pytest.mark.parametrize("deed", [hostile.SLEEP, hostile.LOOP])
def test_a_structure_that_never_ends_is_given_up_after_two_workers(fresh: RunningDaemon, deed: int) -> None:
    before = fresh.model("hostile")["restarts"]
    with mates(fresh):
        error = evaluate(fresh, behave(slab(), deed))
    assert isinstance(error, EvaluationError)
    assert "2 workers ended over this structure" in error.message
    assert re.search("it hung: an evaluation took .*(it hung: an evaluation took |, 2 times)", error.message)
    assert f"where {HANG_TIMEOUT:.3g} s is the limit" in error.message
    assert fresh.model("hostile")["restarts"] == before + 2
    assert "is killed, it hung" in fresh.log.read_text()


def test_a_stopped_worker_is_replaced(fresh: RunningDaemon) -> None:
    """In the middle of an evaluation, or while it has nothing to do."""
    atoms = behave(slab(), hostile.SLOW)
    idle = fresh.model("hostile")["pid"]
    os.kill(idle, signal.SIGSTOP)
    np.testing.assert_allclose(evaluate(fresh, slab()), expected(slab()), atol=1e-9)
    with under_way(fresh, atoms) as outcome:
        stopped = fresh.model("hostile")["pid"]
        os.kill(stopped, signal.SIGSTOP)
        np.testing.assert_allclose(outcome.result(), expected(atoms), atol=1e-9)
    assert fresh.model("hostile")["restarts"] == 2
    assert not psutil.pid_exists(idle)
    assert not psutil.pid_exists(stopped)


def test_a_worker_that_is_stopped_for_a_moment_goes_on(start_hostile) -> None:
    """A moment by far shorter than what a batch may take, on a machine with much to do as well."""
    daemon = start_hostile(hang_timeout=30 * HANG_TIMEOUT)
    pid = daemon.model("hostile")["pid"]
    atoms = behave(slab(), hostile.SLOW)
    with under_way(daemon, atoms) as outcome:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(HANG_TIMEOUT / 4)
        os.kill(pid, signal.SIGCONT)
        np.testing.assert_allclose(outcome.result(), expected(atoms), atol=1e-9)
    assert daemon.model("hostile")["pid"] == pid
    daemon.stop()


def test_what_a_model_takes_says_how_long_it_may(start_hostile) -> None:
    """Ten times the longest before, where that is more than the configured least: none of these hung."""
    daemon = start_hostile(hang_timeout=hostile.SLOWLY / 2)
    slow = behave(slab(), hostile.SLOW)
    for _ in range(3):
        np.testing.assert_allclose(evaluate(daemon, slow), expected(slow), atol=1e-9)
    assert daemon.model("hostile")["restarts"] == 0
    daemon.stop()


def test_nor_do_later_steps_of_a_slow_session(start_hostile) -> None:
    """Its second may take as long as its first did, from which on there is something to go by."""
    daemon = start_hostile(hang_timeout=hostile.SLOWLY / 2)
    quick = slab()
    del quick[-4:]
    assert not isinstance(evaluate(daemon, quick), RootstockError)
    slow = behave(slab(), hostile.SLOW)
    with daemon.client().calculator("hostile") as slow.calc:
        for step in range(4):
            slow.positions[1:] += 0.001 * step
            np.testing.assert_allclose(slow.get_forces(), expected(slow), atol=1e-9)
    assert daemon.model("hostile")["restarts"] == 0
    daemon.stop()


@pytest.mark.parametrize("worker_too", [False, True])
def test_a_daemon_that_was_stopped_kills_nobody(fresh: RunningDaemon, worker_too: bool) -> None:
    """For longer than a batch may take, be the worker done meanwhile or stopped as well."""
    status = fresh.client().status()
    worker = status["models"][0]["pid"]
    processes = [status["pid"], worker] if worker_too else [status["pid"]]
    atoms = behave(slab(), hostile.SLOW)
    with under_way(fresh, atoms) as outcome:
        time.sleep(hostile.SLOWLY / 2)
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        time.sleep(2 * HANG_TIMEOUT)
        for process in processes:
            os.kill(process, signal.SIGCONT)
            time.sleep(HANG_TIMEOUT / 4)  # the worker comes back a little later
        np.testing.assert_allclose(outcome.result(), expected(atoms), atol=1e-9)
    assert fresh.model("hostile")["pid"] == worker


def leave_under_way(daemon: RunningDaemon, deed: int) -> None:
    """Somebody has something done, and is killed."""
    code = (
        "import sys, hostile, test_workers; from rootstock_client import RootstockClient\n"
        "atoms = hostile.behave(test_workers.slab(), int(sys.argv[2]))\n"
        "atoms.calc = RootstockClient(sys.argv[1]).calculator('hostile')\n"
        "atoms.get_forces()"
    )
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code, str(daemon.socket), str(deed)]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}) as process:
        wait_for(lambda: busy(daemon))
        process.kill()


def test_the_client_of_an_evaluation_that_hangs_goes_away(fresh: RunningDaemon) -> None:
    """Its worker is replaced all the same, but nobody repeats what nobody wants."""
    leave_under_way(fresh, hostile.SLEEP)
    np.testing.assert_allclose(evaluate(fresh, slab()), expected(slab()), atol=1e-9)
    assert fresh.model("hostile")["restarts"] == 1


def test_an_evaluation_whose_session_has_gone_holds_nobody_up_for_long(start_hostile, caplog) -> None:
    """It may be right, and take long: others are told what they wait for, and get a fresh worker all the same."""
    patient = start_hostile(hang_timeout=300.0)
    leave_under_way(patient, hostile.SLEEP)
    begin = time.monotonic()
    time.sleep(0.6 * ABANDONED)
    assert patient.model("hostile")["restarts"] == 0, "as long as nobody waits there is no hurry"
    np.testing.assert_allclose(evaluate(patient, slab()), expected(slab()), atol=1e-9)
    assert 1.5 * ABANDONED < time.monotonic() - begin < 100
    assert patient.model("hostile")["restarts"] == 1
    assert "an evaluation that nobody waits for any more took" in patient.log.read_text()
    assert re.search(r"model 'hostile' has been at a batch of 8 atoms for \d+ s; this job waits", caplog.text)
    patient.stop()


# --- loading


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("segfault", "5 workers ended before they were ready: signal 11 .*, 5 times"),
        ("exit", "5 workers ended before they were ready: exit status 3, 5 times"),
        ("hang", "2 workers ended before they were ready: it hung: loading took 6.* s where 6 s is the limit"),
        ("raise", "model 'raise' can't be loaded: SystemExit: not today"),
    ],
)
def test_a_model_that_never_loads_says_so(troubled: RunningDaemon, what: str, words: str) -> None:
    began = time.monotonic()
    daemon = psutil.Process(troubled.client().status()["pid"])
    workers, scratch = len(daemon.children()), Path(os.environ["TMPDIR"])
    before = {path.name for path in scratch.iterdir()}  # of this and of others' workers
    assert {name.rpartition("-")[0] for name in before} == {f"rootstockd-worker-{os.getuid()}"}
    with pytest.raises(ModelLoadError, match=words):
        raise evaluate(troubled, slab(), what)
    assert time.monotonic() < began + PATIENCE
    assert troubled.model(what)["state"] == "failed"
    assert len(daemon.children()) == workers  # none of its own is left
    assert {path.name for path in scratch.iterdir()} <= before
    np.testing.assert_allclose(evaluate(troubled, slab()), expected(slab()), atol=1e-9)


def test_whoever_asks_again_and_again_for_a_model_that_failed(troubled: RunningDaemon) -> None:
    """Its error is kept, and nothing of those who were told."""
    daemon = psutil.Process(troubled.pid)

    def ask(times: int) -> int:
        for _ in range(times):
            assert isinstance(evaluate(troubled, slab(), "raise"), ModelLoadError)
        return daemon.memory_info().rss

    before = ask(500)
    assert ask(2500) < before + 4 * 2**20


@pytest.mark.parametrize(("name", "times"), [("shaky", 4), ("killed", 5)])
def test_a_model_that_loads_at_last_is_as_good_as_any(troubled: RunningDaemon, name: str, times: int) -> None:
    """The fifth time where it may be its own doing; where it is not, as it is killed from outside, also later."""
    np.testing.assert_allclose(evaluate(troubled, slab(), name), expected(slab()), atol=1e-9)
    assert troubled.model(name)["restarts"] == times


def test_a_broken_model_is_tried_again_at_once_where_somebody_loads_it(start_hostile) -> None:
    daemon = start_hostile(load="", mended=("raise", 1))
    for _ in range(2):  # for whoever asks it is not, or a worker would be started for each
        assert isinstance(evaluate(daemon, slab(), "mended"), ModelLoadError)
    assert daemon.run("load", "mended").returncode == 0
    np.testing.assert_allclose(evaluate(daemon, slab(), "mended"), expected(slab()), atol=1e-9)
    daemon.stop()


@pytest.mark.parametrize("how", ["while it loads", "when it has failed"])
@pytest.mark.parametrize("fetched", [True, False])
def test_whoever_runs_far_ahead_of_a_model_that_fails(start_hostile, how: str, fetched: bool) -> None:
    """All steps that a driver has sent in advance fail, and that is no trouble to anybody else."""
    daemon = start_hostile(load="", broken=("raise", 1_000_000))
    if how == "when it has failed":
        assert isinstance(evaluate(daemon, slab(), "broken"), ModelLoadError)
    init = {"rootstock": ipi.PROTOCOL_VERSION, "model": "broken", "numbers": [29], "pbc": [False] * 3}
    step = ipi.posdata_head(np.eye(3), np.eye(3), 1) + bytes(24) + (ipi.GETFORCE if fetched else b"")
    with ThreadPoolExecutor(3) as pool, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(daemon.socket))
        sock.settimeout(PATIENCE)
        sock.sendall(ipi.init_frame(json.dumps(init).encode()) + 330 * step)
        others = [pool.submit(evaluate, daemon, slab(), "broken") for _ in range(3)]
        said = b""
        awaited = (330 if how == "while it loads" else 1) if fetched else 0
        while (frames := said.count(ipi.ERROR)) < awaited:
            said += (data := sock.recv(1 << 20))
            assert data, f"it was cut off after {frames} answers"
        assert [type(other.result()) for other in others] == [ModelLoadError] * 3
    assert daemon.model("broken")["state"] == "failed"
    assert "RecursionError" not in daemon.log.read_text()
    daemon.run("load", "hostile")  # the daemon is well
    np.testing.assert_allclose(evaluate(daemon, slab()), expected(slab()), atol=1e-9)
    daemon.stop()


def test_workers_killed_while_they_load(daemon: RunningDaemon) -> None:
    def kill() -> None:
        pid = daemon.model("hostile")["pid"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: daemon.model("hostile")["pid"] not in {pid, None})

    atoms = slab()
    with daemon.client().calculator("hostile") as atoms.calc:
        atoms.get_forces()
        for _ in range(3):  # the first is ready, the others are not
            kill()
        np.testing.assert_allclose(atoms.get_forces(), expected(slab()), atol=1e-9)


# --- the end


def test_a_backend_that_ends_the_worker_is_done_without(start_daemon, tmp_path: Path, monkeypatch) -> None:
    # such as a library built for another CPU
    library = tmp_path / "numba.py"
    library.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    daemon = start_daemon("--model", "mace-emt-small")
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    with daemon.client().calculator("mace-emt-small") as atoms.calc:
        for _ in range(2):
            atoms.get_forces()
            assert atoms.calc.backend == "mace-torch"
            atoms.rattle(0.01)
        model = daemon.model("mace-emt-small")
        assert model["restarts"] == 2
        for name in ("mace-torch by edges", "fused"):
            assert (
                f"{name} is switched off until the model is unloaded: a worker that tried it ended (signal 4 (SIGILL))"
                in model["note"]
            )
            assert f"does without {name}, which ended a worker" in daemon.log.read_text()
        library.unlink()
        daemon.run("unload", "mace-emt-small")
        for backend in ("mace-torch", "fused"):  # of a structure that is compared the answer is mace-torch's
            atoms.get_forces()
            assert atoms.calc.backend == backend
            atoms.rattle(0.01)
        assert "switched off" not in str(daemon.model("mace-emt-small")["note"])


@pytest.mark.parametrize("at", ["an evaluation", "loading"])
def test_a_daemon_stops_while_its_worker_hangs(start_hostile, monkeypatch, at: str) -> None:
    monkeypatch.setenv("ROOTSTOCKD_PATIENCE", "0")
    daemon = start_hostile(load="", broken=("hang", 1_000_000))
    model, deed = ("hostile", hostile.SLEEP) if at == "an evaluation" else ("broken", hostile.QUIET)
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(evaluate, daemon, behave(slab(), deed), model)
        wait_for(lambda: any(s["state"] == "busy" for s in daemon.client().status()["sessions"]))
        process = psutil.Process(daemon.client().status()["pid"])
        # not one that is being forked: stopped then, it would keep the daemon's sockets
        wait_for(lambda: any("__main__.py" in " ".join(child.cmdline()) for child in process.children()))
        (worker,) = process.children()
        if at == "an evaluation":
            worker.suspend()
        daemon.stop()
        assert isinstance(outcome.result(), RootstockError)
    assert not psutil.wait_procs([process, worker], timeout=10)[1]
    assert "Traceback" not in daemon.log.read_text()


def test_a_worker_whose_daemon_dies_while_it_starts_ends_too(start_hostile, monkeypatch) -> None:
    """Before it has asked the kernel to kill it then."""
    monkeypatch.setenv("ROOTSTOCKD_PATIENCE", "0")
    daemon = start_hostile(load="", broken=("hang", 1_000_000))
    process = psutil.Process(daemon.client().status()["pid"])
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(evaluate, daemon, slab(), "broken")
        wait_for(process.children)
        (worker,) = process.children()
        process.kill()
        assert isinstance(outcome.result(), RootstockError)
    assert not psutil.wait_procs([worker], timeout=20)[1]


@pytest.mark.parametrize("at", [hostile.SLEEP, hostile.LOOP, "stopped"])
def test_a_worker_in_the_middle_of_an_evaluation_goes_with_its_daemon(start_hostile, monkeypatch, at: Any) -> None:
    """It looks at nothing then, and nobody is left who would end it: the kernel does."""
    monkeypatch.setenv("ROOTSTOCKD_PATIENCE", "0")
    daemon = start_hostile(hang_timeout=300.0)
    process = psutil.Process(daemon.pid)
    (worker,) = process.children()
    with ThreadPoolExecutor(1) as pool:
        outcome = pool.submit(evaluate, daemon, behave(slab(), hostile.SLEEP if at == "stopped" else at))
        wait_for(lambda: busy(daemon))
        if at == "stopped":
            worker.suspend()
        process.kill()
        assert isinstance(outcome.result(), RootstockError)
    alive = psutil.wait_procs([worker], timeout=5)[1]
    for one in alive:
        one.kill()
    assert not alive


# --- memory, for real


def test_a_worker_goes_before_the_machine_does(start_daemon) -> None:
    """It is kept within what is free, and is the first that the kernel kills."""
    daemon = start_daemon("--model", "mace-emt-small")
    with daemon.client().calculator("mace-emt-small") as calculator:
        calculator.get_forces(bulk("Cu", cubic=True))
    pid = daemon.model("mace-emt-small")["pid"]
    soft, hard = psutil.Process(pid).rlimit(psutil.RLIMIT_DATA)
    assert hard == psutil.RLIM_INFINITY
    assert 0 < soft < psutil.virtual_memory().total + psutil.Process(pid).memory_info().vms
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) >= 500
    assert (
        Path(f"/proc/{daemon.client().status()['pid']}/oom_score_adj").read_text()
        == Path("/proc/self/oom_score_adj").read_text()
    )
    daemon.stop()


def test_what_exhausts_the_memory_of_mace_is_told_so(start_daemon, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("worker_memory = 2_000_000_000\n")
    daemon = start_daemon("--config", str(config), "--model", "mace-emt-small")

    def forces(atoms: Atoms, times: int = 1) -> Any:
        atoms = atoms.copy()
        with daemon.client().calculator("mace-emt-small") as calculator:
            for _ in range(times):
                calculator.results.clear()
                atoms.calc = calculator
                result = atoms.get_forces()
        return result

    small = [bulk("Cu", cubic=True) * (2, 1, 1), bulk("Ag", cubic=True)]
    for atoms in small:
        atoms.rattle(0.1, seed=1)
    before = [forces(atoms) for atoms in small]
    worker = daemon.model("mace-emt-small")["pid"]
    # for the first two memory lacks when their neighbours are known; for the last already where they are listed: nobody
    # knows how dense it is, then, and what of it would fit
    largest = 8
    for cells, known in ((34, True), (40, True), (50, False)):
        huge = bulk("Cu", cubic=True) * (cells, cells, cells)
        fits = (
            r"\. As dense as this, a structure of ([0-9]+) atoms would fit, and perhaps a larger one\." if known else ""
        )
        said = (
            rf"^model 'mace-emt-small': {len(huge)} atoms do not fit the device's memory "
            rf"\(a worker may use 1\.86 GiB here\): Unable to allocate [^:]*?[0-9a-z]{fits}"
            rf"{'' if known else '[.]'} The largest of yours that this model has evaluated had {largest} atoms\."
        )
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(forces, atoms, 50) for atoms in small]
            with pytest.raises(LimitError, match=said) as caught:
                forces(huge)
            for job, right in zip(jobs, before, strict=True):
                np.testing.assert_allclose(job.result(), right, atol=1e-9)
        if known:
            found = re.search(said, str(caught.value))
            assert found is not None and 4 * 5**3 <= int(found[1]) < len(huge)
            edge = int((int(found[1]) / 4) ** (1 / 3))
            forces(bulk("Cu", cubic=True) * (edge, edge, edge))
            largest = max(largest, 4 * edge**3)
        for atoms, right in zip(small, before, strict=True):
            np.testing.assert_allclose(forces(atoms), right, atol=1e-9)
        assert daemon.model("mace-emt-small")["pid"] == worker  # or everybody would wait for another one to load
    daemon.stop()


IN_LITTLE = """
import importlib, os, resource, sys
(data,) = [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")]
resource.setrlimit(resource.RLIMIT_DATA, (data * 1024 + 2**20, resource.getrlimit(resource.RLIMIT_DATA)[1]))
sys.path = [path for path in sys.path if path != os.path.dirname(__file__)]
del sys.modules["numba"]
importlib.import_module("numba")
"""
"""A numba that has no memory to be imported: others took it a moment ago."""
IN_TRYING = re.compile(r"a worker that tried it ended \(model 'mace-emt-small' does not fit the device's memory: ")


@pytest.fixture
def little_memory(tmp_path: Path, monkeypatch) -> Path:
    """As long as there is this file, workers have none for what accelerates MACE."""
    library = tmp_path / "numba.py"
    library.write_text(IN_LITTLE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    return library


def served_by(daemon: RunningDaemon) -> str:
    """Of a session's second structure: the first is compared, and the answer is mace-torch's."""
    atoms = bulk("Cu", cubic=True)
    with daemon.client().calculator("mace-emt-small") as atoms.calc:
        for _ in range(2):
            atoms.rattle(0.1, seed=1)
            atoms.get_forces()
        return str(atoms.calc.backend)


def test_memory_that_lacks_for_a_moment_takes_no_backend_away(start_daemon, little_memory: Path) -> None:
    daemon = start_daemon()
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(served_by, daemon)
        wait_for(lambda: "does not fit the device's memory" in daemon.log.read_text(), timeout=60)
        little_memory.unlink()
        assert served.result() == "fused"
    model = daemon.model("mace-emt-small")
    assert (model["note"], model["restarts"]) == (None, 1)


def test_a_model_without_memory_to_be_accelerated_is_served_until_there_is_some(
    start_daemon, little_memory: Path
) -> None:
    daemon = start_daemon("--model", "mace-emt-small")
    assert served_by(daemon) == "mace-torch"
    model = daemon.model("mace-emt-small")
    assert len(IN_TRYING.findall(model["note"])) == 2, model["note"]
    assert model["restarts"] == 3, "once more the same, without the one, without the other"
    little_memory.unlink()
    os.kill(model["pid"], signal.SIGKILL)
    assert served_by(daemon) == "fused"
    assert not daemon.model("mace-emt-small")["note"]


WITH_SLOW_LOOPS = """
import os, sys, importlib, time
from rootstockd.worker.engines.mace import candidates
def made(name, *others, usual=candidates._made):
    backend = usual(name, *others)
    evaluate = backend.evaluate
    backend.evaluate = lambda tasks: (time.sleep(0.5 if name == "fused" else 0.0), evaluate(tasks))[1]
    return backend
candidates._made = made
sys.path = [path for path in sys.path if path != os.path.dirname(__file__)]
del sys.modules["numba"]
importlib.import_module("numba")
"""
"""A numba with which the fused backend is slow."""


def test_exact_numbers_keep_their_bits_where_the_next_worker_finds_another_backend_faster(
    start_daemon, tmp_path: Path, monkeypatch
) -> None:
    library = tmp_path / "numba.py"
    library.write_text(WITH_SLOW_LOOPS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]).rstrip(":"))
    daemon = start_daemon("--model", "mace-emt-small")
    atoms = bulk("Cu", cubic=True) * (2, 2, 1)
    atoms.rattle(0.1, seed=2)

    def bits() -> tuple[bytes, ...]:
        atoms.calc.results.clear()
        return atoms.get_forces().tobytes(), atoms.get_stress().tobytes(), atoms.get_potential_energies().tobytes()

    with daemon.client().calculator("mace-emt-small", exact=True) as atoms.calc:
        before = bits()
        assert served_by(daemon) == "mace-torch by edges"
        model = daemon.model("mace-emt-small")
        assert model["backend"].startswith("mace-torch by edges ("), model["backend"]
        assert "fused agrees but is slower: mace-torch by edges took 0." in model["note"]
        assert bits() == before
        library.unlink()
        os.kill(model["pid"], signal.SIGKILL)
        assert served_by(daemon) == "fused"
        assert daemon.model("mace-emt-small")["backend"].startswith("fused (")
        assert bits() == before


def test_exact_steps_keep_their_bits_on_fewer_processors(start_daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    daemon = start_daemon("--model", "mace-emt-small")
    atoms = bulk("Cu", cubic=True) * (5, 5, 5)
    atoms.rattle(0.1, seed=5)
    with daemon.client().calculator("mace-emt-small", dtype="float32", exact=True) as atoms.calc:
        before = atoms.get_forces()
        # as a control group whose processors change, or a start elsewhere
        os.sched_setaffinity(daemon.pid, {min(os.sched_getaffinity(0))})
        for model in daemon.client().status()["models"]:
            os.kill(model["pid"], signal.SIGKILL)
        atoms.calc.results.clear()
        assert (atoms.get_forces() == before).all()


@contextlib.contextmanager
def in_batches(daemon: RunningDaemon, jobs: list[Atoms], rounds: int) -> Iterator[tuple[Any, Any]]:
    """Jobs evaluated together, so often, get what they get alone; the model's status before and after that."""
    calculators = [daemon.client().calculator("mace-emt-small") for _ in jobs]

    def forces(number: int) -> Any:
        calculators[number].results.clear()
        return calculators[number].get_forces(jobs[number])

    for number, atoms in enumerate(jobs):
        # a session's first structure is in no batch, and mace-torch takes far more memory for it
        calculators[number].get_forces(bulk("Cu", cubic=True))
        atoms.rattle(0.1, seed=number)
    alone = [forces(number) for number in range(len(jobs))]
    before = daemon.model("mace-emt-small")
    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(rounds):
            for found, right in zip(pool.map(forces, range(len(jobs))), alone, strict=True):
                np.testing.assert_allclose(found, right, atol=1e-9)
    after = daemon.model("mace-emt-small")
    assert (after["pid"], after["restarts"]) == (before["pid"], 0)
    yield before, after
    for calculator in calculators:
        calculator.close()
    daemon.stop()


def test_a_batch_that_does_not_fit_memory_is_done_in_parts(start_daemon, tmp_path: Path, monkeypatch) -> None:
    """With mace-torch, which foresees nothing, and memory that is really used up: nobody hears of it."""
    (tmp_path / "numba.py").write_text("raise ImportError('there is none here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    config = tmp_path / "config.toml"
    config.write_text(f"worker_memory = {1_000_000_000 + CUDA}\nbatch_atoms = 1_000_000\n")
    daemon = start_daemon("--config", str(config), "--model", "mace-emt-small")
    with in_batches(daemon, [bulk("Cu", cubic=True) * (3, 3, 3) for _ in range(16)], rounds=1) as (before, after):
        assert "no memory for a batch" in daemon.log.read_text()
        assert after["batch_atoms"] < before["batch_atoms"]


def test_a_batch_that_would_not_fit_memory_is_done_in_several_passes(start_daemon, tmp_path: Path) -> None:
    """Which is known before one is tried: memory never lacks, though the structures are denser than usual."""
    config = tmp_path / "config.toml"
    config.write_text(f"worker_memory = {900_000_000 + CUDA}\nbatch_atoms = 1_000_000\n")
    daemon = start_daemon("--config", str(config), "--model", "mace-emt-small")
    dense = bulk("Cu", a=3.2, cubic=True) * (9, 9, 9)
    with in_batches(daemon, [dense.copy() for _ in range(8)], rounds=2) as (before, after):
        assert "no memory" not in daemon.log.read_text()
        # all that waited were one batch, to the daemon
        assert after["evaluations"] - before["evaluations"] == 16
        assert after["batches"] - before["batches"] < 8
        with daemon.client().calculator("mace-emt-small") as calculator:
            calculator.get_forces(bulk("Cu", cubic=True))
            with pytest.raises(LimitError, match="do not fit"):  # nor would that batch in one pass
                calculator.get_forces(dense * (1, 1, 7))
