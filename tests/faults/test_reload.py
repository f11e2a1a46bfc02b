"""SIGHUP and `reload` under load: rules change, and no evaluation is dropped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, rootstockd, wait_for
from rootstock_client import RootstockClient
from rootstock_client.errors import LimitError, UnknownModelError, UserLimitError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def configured(folder: Path, start_daemon: Callable[..., RunningDaemon]) -> Iterator[RunningDaemon]:
    """A daemon with a configuration file and a catalogue of its own, both to be changed."""
    (folder / "models.toml").write_text(entry("Cu EMT", asap_cutoff=False))
    (folder / "config.toml").write_text(f'catalogues = ["{folder / "models.toml"}"]\n')
    running = start_daemon("--model", "emt", "--config", str(folder / "config.toml"))
    yield running
    running.stop()


def entry(description: str, *, asap_cutoff: bool) -> str:
    arguments = (
        f'{{ calculator = "ase.calculators.emt:EMT", options = {{ asap_cutoff = {str(asap_cutoff).lower()} }} }}'
    )
    return f'[mine]\nfamily = "ase"\ndescription = "{description}"\narguments = {arguments}\n'


def crystal(seed: int) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def pid(daemon: RunningDaemon) -> int:
    return int(daemon.client().status()["pid"])


def retired_that_goes_and_comes(daemon: RunningDaemon, folder: Path, old: Atoms) -> int:
    """The model of a session whose entry was changed goes as any other does, and comes again; its pid at last."""

    def retired() -> dict[str, Any]:
        (found,) = [model for model in daemon.client().status()["models"] if model["retired"]]
        return found

    assert "ready, retired" in daemon.run("status").stdout
    config = folder / "config.toml"
    before = config.read_text()
    config.write_text(f"keep_alive = 0.1\n{before}")
    assert daemon.run("reload").returncode == 0
    wait_for(lambda: retired()["state"] == "cold")
    config.write_text(before)
    assert daemon.run("reload").returncode == 0
    for _ in range(2):
        old.rattle(0.01)
        reference = old.copy()
        reference.calc = EMT()
        assert old.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-12)
        assert daemon.run("unload", "mine").returncode == 0
        wait_for(lambda: retired()["state"] == "cold" and not retired()["pid"] and retired()["memory"] is None)
    assert daemon.run("load", "mine").returncode == 0  # the new one
    assert retired()["state"] == "cold"
    old.rattle(0.01)
    old.get_potential_energy()
    return int(retired()["pid"])


def test_no_evaluation_is_dropped(configured, folder):
    """Each is done once, in the session that asked for it: jobs have no patience that would hide another."""
    daemon = configured
    process = pid(daemon)
    wrong: list[str] = []
    done = [0, 0, 0]
    end = threading.Event()

    def job(number: int) -> None:
        try:
            atoms = crystal(number)
            expected = {}
            with RootstockClient(daemon.socket, patience=0) as client:
                atoms.calc = client.calculator("emt")
                while not end.is_set():
                    shift = done[number] % 7
                    moved = atoms.copy()
                    moved.positions[0, 0] += 0.01 * shift
                    moved.calc = EMT()
                    if shift not in expected:
                        expected[shift] = moved.get_forces()
                    moved.calc = atoms.calc
                    np.testing.assert_allclose(moved.get_forces(), expected[shift], rtol=0, atol=1e-9)
                    done[number] += 1
        except BaseException as error:
            wrong.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=job, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    config = folder / "config.toml"
    good = config.read_text()
    for turn in range(30):
        config.write_text(good + ("max_sessions = 50\n" if turn % 2 else "max_session = 50\n"))
        os.kill(process, signal.SIGHUP)
        time.sleep(0.05)
    before = list(done)
    deadline = time.monotonic() + 60
    while not all(now > then for now, then in zip(done, before, strict=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    end.set()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads), "an evaluation was dropped"
    assert not wrong
    assert all(now > then for now, then in zip(done, before, strict=True))
    assert pid(daemon) == process
    model = daemon.model("emt")
    assert (model["restarts"], model["evaluations"]) == (0, sum(done))
    words = daemon.log.read_text()
    assert "reloaded" in words and "there is no setting 'max_session'; did you mean 'max_sessions'?" in words


HOLDING = """
import os, time
from ase.calculators.emt import EMT
while os.path.exists({hold!r}):
    time.sleep(0.01)
"""


@pytest.mark.parametrize("what", ["changed", "removed"])
def test_a_model_of_the_start_while_it_is_loading(
    folder: Path, runtime_folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The daemon gets ready with what there is instead; and what is there again is there to stay."""
    hold, models = folder / "hold", folder / "models.toml"
    hold.touch()
    (folder / "holding.py").write_text(HOLDING.format(hold=str(hold)))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    before = '[mine]\nfamily = "ase"\nconfine = false\narguments = { calculator = "holding:EMT" }\n'
    models.write_text(before)
    (folder / "config.toml").write_text('catalogues = ["models.toml"]\nmodels = ["mine"]\nkeep_alive = 0.1\n')
    daemon = RunningDaemon(runtime_folder / what, ("--config", str(folder / "config.toml")))
    starting = threading.Thread(target=daemon.start)
    starting.start()
    try:
        wait_for(lambda: daemon.socket.exists() and daemon.model("mine")["pid"])
        models.write_text(entry("another", asap_cutoff=False) if what == "changed" else "")
        assert daemon.run("reload").returncode == 0
        starting.join(60)
        assert not starting.is_alive()
        status = daemon.client().status()
        assert status["state"] == "ready"
        assert [model["state"] for model in status["models"]] == ["ready"] * (what == "changed")
        hold.unlink()
        models.write_text(before)
        assert daemon.run("reload").returncode == 0
        wait_for(lambda: [model["state"] for model in daemon.client().status()["models"]] == ["ready"])
        time.sleep(2)  # twenty times its keep_alive, and two looks
        assert daemon.model("mine")["state"] == "ready"
    finally:
        daemon.stop()
        starting.join()


def test_a_wrong_file_changes_nothing_and_says_why(configured, folder):
    good = (folder / "config.toml").read_text()
    for text, words in (
        ("max_sessions = 0\n" + good, "max_sessions"),
        ('catalogues = ["/nowhere.toml"]\n', "/nowhere.toml"),
        ("= 3", "config.toml"),
        ('[access]\nusers = ["a\\u0000b"]\n', "access.users.0: 'a\\x00b' is no name"),
    ):
        (folder / "config.toml").write_text(text)
        done = configured.run("reload")
        assert done.returncode == 1 and "nothing was changed" in done.stderr and words in done.stderr
    assert json.loads(configured.run("status", "--json").stdout)["config"]["max_sessions"] == 10_000
    (folder / "config.toml").write_text(good + "batch_atoms = 7\n[limits]\natoms = 3\n")
    done = configured.run("reload")
    assert done.returncode == 0 and "batch_atoms" in done.stdout
    atoms = crystal(1)
    atoms.calc = configured.client().calculator("emt")
    with pytest.raises(
        LimitError, match=r"a system of 4 atoms; .* may have 3 atoms in all sessions together \(limits\.atoms\)\."
    ):
        atoms.get_potential_energy()
    (folder / "config.toml").write_text(good + "[limits]\nqueued = 0\n")
    assert configured.run("reload").returncode == 0
    with pytest.raises(UserLimitError, match=r"may have no evaluations \(limits\.queued is 0\)"):
        atoms.get_potential_energy()


BROKEN = """
import os, pwd
from rootstockd.fleet.fleet import Fleet

def failing(call, when):
    def made(*arguments):
        if os.path.exists(os.path.join({folder!r}, when)):
            raise OSError(5, "Input/output error")
        return call(*arguments)
    return made

pwd.getpwnam = failing(pwd.getpwnam, "before")
Fleet.retire_changed = failing(Fleet.retire_changed, "after")
"""
"""For a daemon that fails itself, before the new settings hold or after it, while a file of that name is there."""


def test_a_daemon_that_fails_itself_says_what_holds(folder, start_daemon, monkeypatch) -> None:
    """To whoever asked, by HTTP or by a signal."""
    (folder / "sitecustomize.py").write_text(BROKEN.format(folder=str(folder)))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    config, rules = folder / "config.toml", '[access]\nusers = ["root"]\n'
    config.write_text(rules)
    daemon = start_daemon("--config", str(config))
    why = "the daemon itself failed: OSError: [Errno 5] Input/output error"
    for when, told, logged, holds in (
        ("before", f"nothing was changed: {why}", f"not reloaded, all stays as it is: {why}", 10_000),
        ("after", f"follows from them: {why}", f"follows from them: {why}", 50),
    ):
        config.write_text(f"max_sessions = 50\n{rules}")
        (folder / when).touch()
        done = daemon.run("reload")
        assert done.returncode == 1 and told in " ".join(done.stderr.split()), done.stderr
        assert when == "after" or f": {logged}" in daemon.log.read_text()
        os.kill(pid(daemon), signal.SIGHUP)
        wait_for(lambda logged=logged: re.search(f"ERROR .*{re.escape(logged)}", daemon.log.read_text()))
        assert logged in " ".join(daemon.client().status()["warnings"])
        assert daemon.client().status()["config"]["max_sessions"] == holds
        (folder / when).unlink()
    assert daemon.run("reload").returncode == 0
    assert why not in str(daemon.client().status()["warnings"])


def test_a_log_that_can_not_be_opened_again(configured, folder) -> None:
    """What is logged can't tell: the file it goes on in may be gone. Nor does it matter if settings have an error."""
    log, config = configured.log, folder / "config.toml"
    log.rename(configured.folder / "log.1")
    log.mkdir()
    good = config.read_text()
    warning = f"can't open the log {log}: Is a directory; it goes on in the old file, which may be gone"
    config.write_text("= 3")
    assert configured.run("reload").returncode == 1
    assert warning in str(configured.client().status()["warnings"])
    config.write_text(good)
    for _ in range(2):
        done = configured.run("reload")
        assert done.returncode == 0 and warning in done.stdout
        assert warning in configured.run("status").stdout.replace("\n", " ")
    log.rmdir()
    assert configured.run("reload").stdout == "reloaded\n"
    assert str(log) not in str(configured.client().status()["warnings"])
    assert log.read_text().endswith("reloaded\n")


MD = """
import sys
import numpy as np
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.md.verlet import VelocityVerlet
from rootstock_client import RootstockClient
number, model, socket = int(sys.argv[1]), sys.argv[2], sys.argv[3]
atoms = bulk("Cu", cubic=True)
atoms.rattle(0.05, seed=number)
atoms.calc = EMT(asap_cutoff=False) if model == "itself" else RootstockClient(socket).calculator(model)
print("begun", flush=True)
VelocityVerlet(atoms, 2 * units.fs).run(200)
print(float(atoms.get_potential_energy()), *atoms.positions.ravel().tolist(), flush=True)
"""


def md(daemon: RunningDaemon, number: int, model: str = "emt") -> subprocess.Popen[str]:
    """A job of the user's, in a process of its own."""
    command = [sys.executable, "-c", MD, str(number), model, str(daemon.socket)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def numbers_of(job: subprocess.Popen[str]) -> np.ndarray:
    """The energy at its end, and where its atoms are."""
    said = job.communicate(timeout=120)[0]
    assert job.returncode == 0
    return np.array(said.split("\n")[-2].split(), dtype=float)


def metric(daemon: RunningDaemon, begin: str) -> float:
    """The sum of a metric's values, of those that begin like this."""
    lines = rootstockd("metrics", "show", "--socket", daemon.socket).stdout.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(begin))


def at_models(daemon: RunningDaemon) -> int:
    """Evaluations of four atoms that wait or run at any model."""
    models = daemon.client().status()["models"]
    return sum(model["waiting"] + model["batch_under_way"] // 4 for model in models)


def busy(daemon: RunningDaemon) -> int:
    return [session["state"] for session in daemon.client().status()["sessions"]].count("busy")


def signal_all(pids: list[int], number: signal.Signals) -> None:
    for process in pids:
        os.kill(process, number)


def test_evaluations_over_the_limit_wait(configured, folder):
    """Jobs of one user, on two models: none fails, whatever happens to another, and never are more at the workers."""

    def limit(queued: int) -> None:
        (folder / "config.toml").write_text(f"{good}[limits]\nqueued = {queued}\n")
        assert configured.run("reload").returncode == 0

    good = (folder / "config.toml").read_text()
    assert configured.run("load", "mine").returncode == 0
    workers = [configured.model(model)["pid"] for model in ("emt", "mine")]
    limit(1)
    with contextlib.ExitStack() as stack:
        jobs = {
            number: stack.enter_context(md(configured, number, model))
            for number, model in enumerate(("emt", "mine", "emt", "mine", "emt"))
        }
        for job in jobs.values():
            stack.callback(job.kill)
            assert job.stdout is not None and job.stdout.readline() == "begun\n"
        wait_for(lambda: len(configured.client().status()["sessions"]) == 5)
        signal_all(workers, signal.SIGSTOP)
        stack.callback(signal_all, workers, signal.SIGCONT)
        wait_for(lambda: busy(configured) == 5)
        assert at_models(configured) == 1 and metric(configured, "rootstockd_user_queue_length") == 5
        jobs.pop(1 if configured.model("emt")["batch_under_way"] else 0).kill()  # one that is held
        wait_for(lambda: busy(configured) == 4)
        signal_all(workers, signal.SIGCONT)
        assert max(at_models(configured) for _ in range(10)) == 1
        signal_all(workers, signal.SIGSTOP)
        wait_for(lambda: busy(configured) == 4)
        assert at_models(configured) == 1
        batches = metric(configured, "rootstockd_batch_evaluations_count")
        assert 0 < batches == metric(configured, "rootstockd_batch_evaluations_sum")
        limit(3)
        assert at_models(configured) == 3 and busy(configured) == 4
        signal_all(workers, signal.SIGCONT)
        alone = [stack.enter_context(md(configured, number, "itself")) for number in jobs]
        references = [numbers_of(job) for job in alone]
        np.testing.assert_allclose([numbers_of(job) for job in jobs.values()], references, rtol=0, atol=1e-6)
    wait_for(lambda: metric(configured, "rootstockd_user_queue_length") == 0)


def test_a_changed_model_is_a_new_worker_and_sessions_keep_the_old(configured, folder):
    old, new = crystal(1), crystal(1)
    expected = []
    for asap_cutoff in (False, True):
        old.calc = EMT(asap_cutoff=asap_cutoff)
        expected.append(old.get_potential_energy())
    assert expected[0] != expected[1]
    old.calc = configured.client().calculator("mine")
    assert old.get_potential_energy() == pytest.approx(expected[0], abs=1e-12)
    first = configured.model("mine")["pid"]
    (folder / "models.toml").write_text(entry("only the description is another", asap_cutoff=False))
    assert configured.run("reload").stdout == "reloaded\n"
    (folder / "models.toml").write_text(entry("the same with another cutoff", asap_cutoff=True))
    assert "mine has changed: 1 session keeps the old one until it reconnects" in configured.run("reload").stdout
    assert configured.model("mine")["retired"] and configured.model("mine")["pid"] == first
    new.calc = configured.client().calculator("mine")
    assert new.get_potential_energy() == pytest.approx(expected[1], abs=1e-12)
    old.rattle(0.01)
    reference = old.copy()
    reference.calc = EMT()
    assert old.get_potential_energy() == pytest.approx(reference.get_potential_energy(), abs=1e-12)
    running = {model["pid"] for model in configured.client().status()["models"] if model["name"] == "mine"}
    assert len(running) == 2 and first in running
    first = retired_that_goes_and_comes(configured, folder, old)
    old.calc.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{first}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{first}").exists()
    new.rattle(0.01)
    new.get_potential_energy()
    (folder / "models.toml").write_text("")
    assert configured.run("reload").returncode == 0
    new.rattle(0.01)
    new.get_potential_energy()  # the session has it still
    other = crystal(2)
    other.calc = configured.client().calculator("mine")
    with pytest.raises(UnknownModelError):
        other.get_potential_energy()
