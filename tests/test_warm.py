"""Which models are in memory, where and for how long, in daemons with several pretend devices on the CPU."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, wait_for
from plain_driver import PlainDriver
from rootstock_client import RootstockClient, ipi
from rootstock_client.control import request
from rootstock_client.errors import DrainingError, LimitError, UserLimitError
from rootstockd.fleet.warm_model import LONG_FOR
from rootstockd.users import user_name

FAULTS = Path(__file__).parent / "faults"
MB = 10**6
FITS_TWO = 190 * MB
"""Bytes that two workers of an ASE calculator fit into, and three do not."""
FITS_ONE = 110 * MB
PAIRS = ("lj", "morse", "born")
CATALOGUE = """
[morse]
family = "ase"
arguments = { calculator = "ase.calculators.morse:MorsePotential" }
[born]
family = "ase"
arguments = { calculator = "ase.calculators.lj:LennardJones", options = { epsilon = 0.5 } }
"""


@pytest.fixture
def start(
    tmp_path: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RunningDaemon]:
    """Start a daemon with settings and more models, and nothing remembered of what they take."""
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]))

    def start(settings: str = "", *options: str, devices: int = 1, catalogue: str = "") -> RunningDaemon:
        (tmp_path / "models.toml").write_text(CATALOGUE + catalogue)
        (tmp_path / "config.toml").write_text('catalogues = ["models.toml"]\n' + settings)
        names = [word for number in range(devices) for word in ("--device", f"cpu:{number}")]
        return start_daemon("--config", str(tmp_path / "config.toml"), *options, device=tuple(names))

    return start


def copper(size: int = 1, seed: int = 1) -> Atoms:
    atoms = bulk("Cu", cubic=True) * size
    atoms.rattle(0.05, seed=seed)
    return atoms


def expected(atoms: Atoms) -> np.ndarray:
    reference = atoms.copy()
    reference.calc = EMT()
    return np.array(reference.get_forces())


def with_model(daemon: RunningDaemon, name: str, size: int = 1) -> Atoms:
    """Copper with a session that has asked for its forces."""
    atoms = copper(size)
    atoms.calc = daemon.client().calculator(name)
    atoms.get_forces()
    return atoms


def ask_again(atoms: Atoms) -> None:
    atoms.positions[0, 0] += 0.01
    atoms.get_forces()


def workers(daemon: RunningDaemon, name: str) -> list[dict[str, Any]]:
    return [model for model in daemon.client().status()["models"] if model["name"] == name]


def measured(folder: Path) -> int:
    """How many models are known to take so much memory, which is written down once they were looked at while ready."""
    file = folder / "state" / "measured.json"
    return len(json.loads(file.read_text())) if file.exists() else 0


def in_memory(daemon: RunningDaemon) -> set[str]:
    return {model["name"] for model in daemon.client().status()["models"] if model["pid"]}


def at(pid: int) -> set[str]:
    """Which sessions are at a worker, each by the inode of its slot."""
    maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split()[4] for line in maps if "rootstockd-slot" in line}


class Jobs:
    """Threads that ask for forces all the time, and look whether they are right."""

    def __init__(self, daemon: RunningDaemon, name: str, count: int, size: int) -> None:
        self.steps = [0] * count
        self.wrong: list[str] = []
        self._end = threading.Event()
        self._daemon, self._name, self._size = daemon, name, size
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def _run(self, number: int) -> None:
        try:
            structures = [copper(self._size, seed=seed) for seed in (number, number + 100)]
            right = [expected(atoms) for atoms in structures]
            with RootstockClient(self._daemon.socket) as client:
                calculator = client.calculator(self._name)
                while not self._end.is_set():
                    which = self.steps[number] % 2
                    structures[which].calc = calculator
                    calculator.reset()
                    np.testing.assert_allclose(structures[which].get_forces(), right[which], rtol=0, atol=1e-9)
                    self.steps[number] += 1
        except BaseException as error:
            self.wrong.append(f"{type(error).__name__}: {error}")

    def __enter__(self) -> Jobs:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()
        assert not self.wrong


# --- loading


def test_models_spread_over_devices_and_status_says_where(start: Callable[..., RunningDaemon]) -> None:
    daemon = start(devices=4)
    for name in ("emt", *PAIRS):
        done = daemon.run("load", name)
        assert done.returncode == 0 and f"{name} float64 is ready on cpu:" in done.stdout, done.stderr
    devices = {model["name"]: model["device"] for model in daemon.client().status()["models"]}
    assert sorted(devices.values()) == ["cpu:0", "cpu:1", "cpu:2", "cpu:3"]
    assert daemon.run("load", "emt").returncode == 0  # it is there
    assert len(workers(daemon, "emt")) == 1
    assert daemon.run("load", "noop", "--dtype", "float32").returncode == 0
    assert daemon.run("load", "noop").returncode == 0
    assert {model["dtype"] for model in workers(daemon, "noop")} == {"float32", "float64"}
    refused = daemon.run("load", "emt", "--dtype", "float32")
    assert refused.returncode == 1 and "computes in float64 and in nothing else" in refused.stderr
    shown = daemon.run("status").stdout
    assert "on cpu:0, cpu:1, cpu:2, cpu:3" in shown and devices["lj"] in shown and "idle" in shown
    refused = daemon.run("load", "morze")
    assert refused.returncode == 1 and "Did you mean morse" in refused.stderr


def test_devices_that_are_none(start_daemon: Callable[..., RunningDaemon], runtime_folder: Path) -> None:
    daemon = RunningDaemon(runtime_folder / "none")
    for arguments, words in (
        (("--device", "tpu"), "names no device; names are auto, cpu, cpu:1, cuda:1"),
        (("--gpu", "0", "--device", "cpu"), "can't be combined"),
        (("--gpu", "x"), "names no device"),
    ):
        done = daemon.run("start", *arguments)
        assert done.returncode == 2 and words in done.stderr


def test_whoever_waits_is_told_how_far_loading_has_come(
    start: Callable[..., RunningDaemon], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By status, and by the client's logger once a step has taken some seconds."""
    options = f'options = {{ what = "slow", counter = "{tmp_path}/count" }}'
    slow = f'[slow]\nfamily = "ase"\nconfine = false\narguments = {{ calculator = "hostile:AtLoading", {options} }}\n'
    daemon = start(catalogue=slow)
    job = threading.Thread(target=with_model, args=(daemon, "slow"))
    with caplog.at_level(logging.WARNING, logger="rootstock_client"):
        job.start()
        wait_for(lambda: workers(daemon, "slow") and workers(daemon, "slow")[0]["loading"]["stage"] == "weights")
        loading = workers(daemon, "slow")[0]["loading"]
        assert loading["elapsed"] > 0 and loading["expected"] is None and not loading["obstacle"]
        assert "slow is loading: weights, for " in daemon.run("status").stdout
        assert request(daemon.socket, "GET", "/v1/loading?model=emt") == []
        job.join()
    assert "model 'slow' is loading: weights, for" in caplog.text
    assert request(daemon.socket, "GET", "/v1/loading") == []
    wait_for(lambda: measured(tmp_path))
    known = json.loads((tmp_path / "state" / "measured.json").read_text())
    assert [model["load_seconds"] > 7 for model in known.values()] == [True]
    daemon.run("restart")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(daemon.run, "load", "slow")
        wait_for(lambda: workers(daemon, "slow") and workers(daemon, "slow")[0]["loading"])
        assert workers(daemon, "slow")[0]["loading"]["expected"] > 7
        assert "the last time it took" in daemon.run("status").stdout
    # without a terminal as well
    assert "slow is loading: weights, for" in asked.result().stderr


def test_a_reloaded_model_gives_the_same_bits(start: Callable[..., RunningDaemon]) -> None:
    """The session waits while its model is loaded again, and has nothing to tell of it."""
    daemon = start(devices=2)
    stages = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            stages.update(state["stage"] for state in request(daemon.socket, "GET", "/v1/loading"))  # type: ignore[attr-defined]
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    atoms = copper()
    atoms.calc = daemon.client().calculator("mace-emt-small", exact=True)
    before = atoms.get_forces()
    done.set()
    watcher.join()
    assert stages >= {"imports", "checks"}
    session = daemon.client().status()["sessions"][0]["id"]
    assert daemon.run("unload", "mace-emt-small").returncode == 0
    wait_for(lambda: "mace-emt-small" not in in_memory(daemon))
    assert daemon.model("mace-emt-small")["state"] == "cold" and daemon.model("mace-emt-small")["sessions"] == 1
    assert daemon.run("load", "emt").returncode == 0  # so that the other device is the better one now
    ask_again(atoms)
    atoms.positions[0, 0] -= 0.01
    atoms.positions[:] = copper().positions
    np.testing.assert_array_equal(atoms.get_forces(), before)
    again = daemon.model("mace-emt-small")
    assert again["restarts"] == 0 and again["device"] == "cpu:1"
    assert daemon.client().status()["sessions"][0]["id"] == session


def test_a_request_that_must_fail_loads_nothing(start: Callable[..., RunningDaemon]) -> None:
    entry = '[headed]\nfamily = "ase"\nheads = ["soft", "hard"]\n'
    arguments = 'arguments = { calculator = "ase.calculators.lj:LennardJones" }\n'
    daemon = start(catalogue=entry + arguments)
    iron = bulk("Fe", cubic=True)
    for name, options, words in (
        ("emt", {}, "does not know Fe"),
        ("headed", {"head": "medium"}, "no head 'medium'"),
        ("headed", {}, "has several heads"),
        ("lj", {"dispersion": {"xc": "pbbe"}}, "Near it are pbe"),
    ):
        iron.calc = daemon.client().calculator(name, **options)
        with pytest.raises(Exception, match=words):
            iron.get_potential_energy()
        assert daemon.client().status()["models"] == []


def test_a_user_has_so_many_models_and_no_more(start: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """Those that load count, though nobody waits for them any more."""
    options = f'options = {{ what = "hang", counter = "{tmp_path}/count" }}'
    entry = f'[hang]\nfamily = "ase"\nconfine = false\narguments = {{ calculator = "hostile:AtLoading", {options} }}\n'
    daemon = start("[limits]\nmodels = 2\n", catalogue=entry)
    first, second = with_model(daemon, "emt"), with_model(daemon, "lj")
    with_model(daemon, "lj")  # the same again
    for name, more in (("morse", {}), ("lj", {"dispersion": True})):
        third = copper()
        third.calc = daemon.client().calculator(name, **more)
        with pytest.raises(UserLimitError, match=r"has 2 models in use already.*limits\.models"):
            third.get_forces()
    assert {model["name"] for model in daemon.client().status()["models"]} == {"emt", "lj"}
    first.calc.close()
    wait_for(lambda: not daemon.model("emt")["sessions"])
    client = daemon.client()
    text = {"rootstock": 1, "model": "hang", "numbers": [29], "pbc": [False] * 3}
    with socket.socket(socket.AF_UNIX) as driver:  # who asks, and does not wait
        driver.connect(str(daemon.socket))
        driver.sendall(ipi.init_frame(json.dumps(text).encode()))
        wait_for(lambda: any(model["name"] == "hang" and model["sessions"] for model in client.status()["models"]))
    wait_for(lambda: not daemon.model("hang")["sessions"])
    third = copper()
    third.calc = client.calculator("morse")
    with pytest.raises(UserLimitError):
        third.get_forces()
    request(daemon.socket, "POST", "/v1/unload", {"model": "hang", "force": False})
    third.get_forces()
    ask_again(second)


# --- going


def test_models_go_when_nobody_uses_them(start: Callable[..., RunningDaemon]) -> None:
    """After `keep_alive`, a model's own first; not those that were loaded at the start; with sessions or without."""
    entry = '[mayfly]\nfamily = "ase"\nkeep_alive = 0.5\narguments = { calculator = "ase.calculators.emt:EMT" }\n'
    daemon = start("keep_alive = 600\n", "--model", "emt", catalogue=entry)
    atoms, other = with_model(daemon, "mayfly"), with_model(daemon, "lj")
    wait_for(lambda: "mayfly" not in in_memory(daemon))
    assert in_memory(daemon) == {"emt", "lj"}
    assert [daemon.model(name)["keep_alive"] for name in ("mayfly", "lj", "emt")] == [0.5, 600, None]
    ask_again(atoms)
    np.testing.assert_allclose(atoms.get_forces(), expected(atoms), rtol=0, atol=1e-9)
    config = daemon.client().status()["config"]["files"][0]["path"]
    Path(config).write_text(Path(config).read_text().replace("600", "0.5"))
    assert daemon.run("reload").stdout == "reloaded\n"
    wait_for(lambda: in_memory(daemon) == {"emt"})
    evaluations = daemon.client().status()["evaluations"]
    assert evaluations >= 3
    other.calc.close()
    wait_for(lambda: not workers(daemon, "lj"))  # nobody has it any more
    assert daemon.client().status()["evaluations"] == evaluations


def test_the_least_recently_used_goes_and_its_session_does_not_notice(start: Callable[..., RunningDaemon]) -> None:
    daemon = start(f"device_memory = {FITS_TWO}\n")
    atoms = with_model(daemon, "emt")
    assert daemon.run("load", "lj").returncode == 0
    ask_again(atoms)
    assert daemon.run("load", "morse").returncode == 0  # what it takes is not known yet
    wait_for(lambda: len(in_memory(daemon)) == 2)
    assert in_memory(daemon) == {"emt", "morse"}
    ask_again(atoms)
    before = atoms.get_forces()
    assert daemon.run("load", "lj").returncode == 0  # now all is known: at no time are there three
    assert in_memory(daemon) == {"emt", "lj"}
    wait_for(lambda: daemon.model("emt")["idle"] > 5)
    assert daemon.run("load", "lj").returncode == 0  # which makes it the last used
    assert daemon.run("load", "morse").returncode == 0
    assert in_memory(daemon) == {"lj", "morse"}
    ask_again(atoms)
    assert in_memory(daemon) == {"morse", "emt"}
    atoms.positions[0, 0] -= 0.01
    np.testing.assert_allclose(atoms.get_forces(), before, rtol=0, atol=1e-12)


def test_a_model_with_work_never_goes_and_others_wait_for_it(start: Callable[..., RunningDaemon]) -> None:
    """Up to `room_timeout`; then they are told what is in the way."""
    daemon = start(f"device_memory = {FITS_ONE}\nroom_timeout = 3\n")
    assert daemon.run("load", "lj").returncode == 0
    with Jobs(daemon, "emt", 2, 2) as jobs:
        wait_for(lambda: min(jobs.steps) > 3)
        refused = daemon.run("load", "lj")
        assert refused.returncode == 1
        assert "'lj': no device has room for it, for 3 s: lj needs" in refused.stderr.replace("\n", " ")
        assert "emt (" in refused.stderr and "has work" in refused.stderr
        atoms = copper()
        atoms.calc = daemon.client().calculator("lj")
        with pytest.raises(LimitError, match="no device has room for it"):
            atoms.get_forces()
        failed: list[Exception] = []

        def insist() -> None:
            try:
                ask_again(atoms)
            except Exception as error:
                failed.append(error)

        waiting = threading.Thread(target=insist)
        waiting.start()
        wait_for(lambda: daemon.model("lj")["state"] == "waiting")
        assert "lj waits for memory: lj needs" in daemon.run("status").stdout
        waiting.join()
        assert len(failed) == 1
        assert in_memory(daemon) == {"emt"} and daemon.model("emt")["restarts"] == 0
    ask_again(atoms)  # the very same session, now that there is room
    assert in_memory(daemon) == {"lj"}


def test_what_was_to_be_loaded_at_the_start_and_has_no_room(
    start: Callable[..., RunningDaemon], tmp_path: Path
) -> None:
    daemon = start()
    for name in ("emt", "lj"):
        assert daemon.run("load", name).returncode == 0
    wait_for(lambda: measured(tmp_path) == 2)
    daemon.stop()
    daemon = start(f"device_memory = {FITS_ONE}\n", "--model", "emt", "--model", "lj")
    assert in_memory(daemon) == {"emt"}
    assert "no device has room" in daemon.model("lj")["error"]
    ask = copper()
    ask.calc = daemon.client().calculator("morse")
    ask.get_forces()  # but what a job needs goes before


def test_no_memory_while_loading(start: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """An idle model goes, and it is tried again; with nobody left to go, it is an error."""
    options = 'options = {{ what = "memory", times = {times}, counter = "{folder}/{name}" }}'
    entry = (
        '[{name}]\nfamily = "ase"\nconfine = false\narguments = {{ calculator = "hostile:AtLoading", '
        + options
        + " }}\n"
    )
    entries = [entry.format(name=name, times=times, folder=tmp_path) for name, times in (("once", 1), ("ever", 1000))]
    daemon = start("", "--model", "emt", catalogue="".join(entries))
    assert daemon.run("load", "lj").returncode == 0
    assert daemon.run("load", "once").returncode == 0
    assert in_memory(daemon) == {"emt", "once"}
    refused = daemon.run("load", "ever")
    assert refused.returncode == 1 and "'ever' does not fit the device's memory" in refused.stderr
    assert in_memory(daemon) == set()


def test_a_model_that_grows_while_it_loads(start: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """An idle one goes for it; with nobody left to go, its loading is stopped, and it asks for more the next time."""
    options = f'options = {{ what = "grow", counter = "{tmp_path}/count" }}'
    entry = f'[grow]\nfamily = "ase"\nconfine = false\narguments = {{ calculator = "hostile:AtLoading", {options} }}\n'
    daemon = start(f"device_memory = {FITS_TWO}\n", catalogue=entry)
    assert daemon.run("load", "lj").returncode == 0
    wait_for(lambda: measured(tmp_path))
    atoms = copper()
    atoms.calc = daemon.client().calculator("grow")
    with pytest.raises(LimitError, match="'grow': loading it was stopped: it has .* MB, where .* MB were set aside"):
        atoms.get_forces()
    wait_for(lambda: not in_memory(daemon))
    log = daemon.log.read_text()
    assert "lj in float64 leaves cpu:0: models on cpu:0 take" in log
    with pytest.raises(LimitError, match="no device has room for it: grow needs"):
        atoms.get_forces()
    assert (tmp_path / "count").read_text() == "x"  # it was not loaded for that
    shown = daemon.model("grow")
    assert shown["state"] == "cold" and shown["memory"] is None and shown["sessions"] == 1
    ask_again(with_model(daemon, "lj"))


def write_catalogue(folder: Path, text: str) -> None:
    """Anew, as `start` wrote it, with other entries."""
    (folder / "models.toml").write_text(text)


LENNARD_JONES = '[v{}]\nfamily = "ase"\n{}arguments = {{ calculator = "ase.calculators.lj:LennardJones" }}\n'


def kept(daemon: RunningDaemon) -> set[tuple[str, str]]:
    """Names and dtypes of models that stay for ever."""
    models = daemon.client().status()["models"]
    return {(model["name"], model["dtype"]) for model in models if model["keep_alive"] is None and not model["retired"]}


def test_what_is_to_stay_is_what_the_catalogue_says_now(start: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """An alias moves, a dtype changes: with the next reload the other one stays, and this one does no longer."""

    def entries(alias_of: int, dtype: str = "") -> str:
        lines = ["".join(['aliases = ["prod"]\n'] * (number == alias_of) + [dtype]) for number in (1, 2)]
        return "".join(LENNARD_JONES.format(number, line) for number, line in zip((1, 2), lines, strict=True))

    daemon = start('models = ["prod"]\nkeep_alive = 1000\n', catalogue=entries(1))
    assert kept(daemon) == {("v1", "float64")}
    for catalogue, right in (
        (entries(2), {("v2", "float64")}),
        (entries(1), {("v1", "float64")}),
    ):
        write_catalogue(tmp_path, CATALOGUE + catalogue)
        assert daemon.run("reload").returncode == 0
        assert kept(daemon) == right
        wait_for(lambda right=right: {name for name, _ in right} <= in_memory(daemon))
    write_catalogue(tmp_path, CATALOGUE)
    done = daemon.run("reload")
    assert done.returncode == 0 and "to be loaded at the start, and can't be: there is no model 'prod'" in done.stdout
    assert kept(daemon) == set()


def test_what_is_to_stay_and_has_failed_is_tried_again_by_a_reload(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    entry = '[mine]\nfamily = "ase"\narguments = { calculator = "mine:Mine" }\n'
    daemon = start('models = ["mine", "lj"]\n', catalogue=entry)
    assert daemon.model("mine")["state"] == "failed"
    (tmp_path / "mine.py").write_text("from ase.calculators.emt import EMT as Mine\n")
    assert daemon.run("reload").returncode == 0
    wait_for(lambda: daemon.model("mine")["state"] == "ready")


def test_a_forced_unload_is_no_reason_to_wait_for_a_stop(start: Callable[..., RunningDaemon]) -> None:
    """What waits for the model is told, and asks the next daemon."""
    daemon = start("drain_timeout = 1000\n", "--model", "lj")
    with PlainDriver(daemon, copper(), model="lj") as job:
        os.kill(daemon.model("lj")["pid"], signal.SIGSTOP)
        job.positions()
        job.send(b"GETFORCE    ")
        wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"])
        assert daemon.run("unload", "lj", "--force").returncode == 0
        assert daemon.run("stop").returncode == 0
        assert job.error()["code"] == "draining"


def test_nothing_is_unloaded_of_a_daemon_that_stops(start: Callable[..., RunningDaemon]) -> None:
    """Or the evaluation that it waits for would begin anew, and be dropped."""
    daemon = start("drain_timeout = 1000\n", "--model", "lj")
    with PlainDriver(daemon, copper(), model="lj") as job:
        assert job.status() == "READY"
        os.kill(worker := daemon.model("lj")["pid"], signal.SIGSTOP)
        job.positions()
        job.send(b"GETFORCE    ")
        wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"])
        with ThreadPoolExecutor(1) as pool:
            stop = pool.submit(daemon.run, "stop")
            wait_for(lambda: daemon.client().status()["state"] == "draining")
            for force in (False, True):
                with pytest.raises(DrainingError):
                    request(daemon.socket, "POST", "/v1/unload", {"model": "lj", "force": force})
            os.kill(worker, signal.SIGCONT)
            job.result()
        assert stop.result().returncode == 0


def test_unloading_while_a_job_runs(start: Callable[..., RunningDaemon]) -> None:
    daemon = start()
    atoms = copper()
    atoms.calc = daemon.client().calculator("emt")
    assert daemon.run("load", "emt").returncode == 0
    os.kill(daemon.model("emt")["pid"], signal.SIGSTOP)  # what it is given is not done
    job = threading.Thread(target=atoms.get_forces)
    job.start()
    wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"])
    with pytest.raises(LimitError, match="has 1 evaluation under way"):
        request(daemon.socket, "POST", "/v1/unload", {"model": "emt"})
    assert request(daemon.socket, "POST", "/v1/unload", {"model": "emt", "force": True}) == {"waiting": 1, "held": 30}
    wait_for(lambda: not in_memory(daemon))
    done = daemon.run("unload", "emt", "--force")  # once more, now that it is not there
    assert "emt is unloaded for 30 s, or until you load it; 1 evaluation waits" in done.stdout.replace("\n", " ")
    assert (daemon.model("emt")["state"], in_memory(daemon)) == ("waiting", set())
    text = daemon.model("emt")["loading"]["text"]
    assert re.fullmatch(r"was unloaded by an administrator, and is loaded again in (30|2\d) s", text), text
    assert f"model emt in float64 leaves cpu:0: {user_name(os.getuid())} (pid " in daemon.log.read_text()
    new = copper(seed=2)
    new.calc = daemon.client().calculator("emt")
    other = threading.Thread(target=new.get_forces)  # not everybody may undo it
    other.start()
    wait_for(lambda: daemon.model("emt")["sessions"] == 2)
    assert daemon.model("emt")["state"] == "waiting" and job.is_alive()
    assert daemon.run("load", "emt").returncode == 0
    job.join()
    other.join()
    for done_one in (atoms, new):
        np.testing.assert_allclose(done_one.calc.results["forces"], expected(done_one), rtol=0, atol=1e-9)
    for arguments, words in ((("--dtype", "float32"), "is not in memory"), ((), "emt is unloaded")):
        done = daemon.run("unload", "emt", *arguments)
        assert words in done.stdout + done.stderr


def slowly(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Have daemons take three seconds for workers' folders, as on a share."""
    (folder / "sitecustomize.py").write_text(
        "import time\nfrom rootstockd.processes.folders import WorkerFolders\n"
        f"quick = WorkerFolders.{method}\n"
        "def slow(*arguments):\n    time.sleep(3)\n    return quick(*arguments)\n"
        f"WorkerFolders.{method} = slow\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)


def test_a_forced_unload_while_another_goes_for_the_model(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stays away, too, and leaves its place to others."""
    slowly(tmp_path, monkeypatch, "remove")
    daemon = start(f"device_memory = {FITS_ONE}\n", "--model", "lj")
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(with_model, daemon, "emt")
        wait_for(lambda: "emt needs its memory" in daemon.log.read_text())
        request(daemon.socket, "POST", "/v1/unload", {"model": "emt", "force": True})
        wait_for(lambda: daemon.model("emt")["loading"]["held"] < 25)
        assert daemon.model("emt")["state"] == "waiting" and not in_memory(daemon)
        assert daemon.run("load", "lj").returncode == 0
        assert daemon.run("unload", "lj").returncode == 0
        assert daemon.run("load", "emt").returncode == 0
        job.result()


def test_slow_disks_keep_nobody_waiting_but_whoever_wants_the_model(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(tmp_path, monkeypatch, "__init__")
    daemon = start("", "--model", "lj")
    atoms, longest = with_model(daemon, "lj"), 0.0
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(with_model, daemon, "emt")
        while not other.done():
            began = time.monotonic()
            ask_again(atoms)
            longest = max(longest, time.monotonic() - began)
        other.result()
    assert longest < 2


def test_who_hears_that_a_model_goes_may_ask_for_another(start: Callable[..., RunningDaemon]) -> None:
    """In the same moment: its structure ended workers, and it is told so when the worker goes that others had since."""
    hostile = '[hostile]\nfamily = "ase"\narguments = { calculator = "hostile:Hostile" }\n'
    daemon = start("keep_alive = 0.5\n", catalogue=hostile)
    bad, good = copper(), copper()
    bad.positions[:, 2] += 300 - bad.positions[0, 2]  # which it exits at
    cell = bad.cell.array / units.Bohr
    text = {"rootstock": 1, "numbers": [29] * len(bad), "pbc": [False] * 3, "want": ["energy", "forces"]}
    first, second = (ipi.init_frame(json.dumps({**text, "model": name}).encode()) for name in ("hostile", "lj"))
    step = ipi.posdata_head(cell, np.linalg.inv(cell), len(bad)) + (bad.positions / units.Bohr).tobytes() + ipi.GETFORCE
    with socket.socket(socket.AF_UNIX) as driver, ThreadPoolExecutor(1) as pool:
        driver.connect(str(daemon.socket))
        driver.sendall(first + step + second)
        wait_for(lambda: workers(daemon, "hostile") and daemon.model("hostile")["restarts"] == 1)
        good.calc = daemon.client().calculator("hostile")
        pool.submit(good.get_forces).result()
        assert daemon.model("hostile")["restarts"] == 2
        wait_for(lambda: workers(daemon, "lj"))
        assert "hostile in float64 leaves cpu:0: nobody has used it" in daemon.log.read_text()
        wait_for(lambda: "lj" in in_memory(daemon) or "model lj is ready" in daemon.log.read_text())
    assert "Traceback" not in daemon.log.read_text()


# --- several devices


@pytest.fixture
def hot(start: Callable[..., RunningDaemon]) -> RunningDaemon:
    """A daemon with two devices whose one model may go after five seconds."""
    return start("keep_alive = 5\n", "--model", "emt", devices=2)


def test_a_hot_model_gets_a_replica_that_goes_again(hot: RunningDaemon) -> None:
    def replicated() -> bool:
        both = workers(hot, "emt")
        return len(both) == 2 and all(worker["sessions"] >= 2 and worker["rate"] > 0 for worker in both)

    with Jobs(hot, "emt", 8, 3) as jobs:
        wait_for(replicated, timeout=60)
        first, second = workers(hot, "emt")
        assert {first["device"], second["device"]} == {"cpu:0", "cpu:1"}
        # who has a worker stays with it
        pids = first["pid"], second["pid"]
        wait_for(lambda: sum(map(len, map(at, pids))) == 8 and min(map(len, map(at, pids))) >= 3)
        before = [at(pid) for pid in pids]
        done = list(jobs.steps)
        wait_for(lambda: all(now > then + 5 for now, then in zip(jobs.steps, done, strict=True)), timeout=60)
        stayed = [then & at(pid) for then, pid in zip(before, pids, strict=True)]
        assert sum(map(len, stayed)) >= 6, "but for two that keep their queues as long as each other"
        # one is killed, whose evaluations are repeated
        os.kill(workers(hot, "emt")[1]["pid"], signal.SIGKILL)
        wait_for(lambda: workers(hot, "emt")[1]["restarts"] == 1 and workers(hot, "emt")[1]["state"] == "ready")
        done = list(jobs.steps)
        wait_for(lambda: all(now > then for now, then in zip(jobs.steps, done, strict=True)), timeout=60)
        evaluations = hot.client().status()["evaluations"]
    wait_for(lambda: len(workers(hot, "emt")) == 1)
    assert workers(hot, "emt")[0]["device"] == first["device"]
    assert hot.client().status()["evaluations"] >= evaluations
    ask_again(with_model(hot, "emt"))


@pytest.mark.parametrize("which", [0, 1])
def test_who_was_with_a_worker_that_fails_goes_on_with_the_other(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """The first or the replica: it ends at a batch, and can't be started again."""
    module = tmp_path / "copper.py"
    module.write_text("from ase.calculators.emt import EMT\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    entry = '[copper]\nfamily = "ase"\narguments = { calculator = "copper:EMT" }\n'
    daemon = start("keep_alive = 60\n", "--model", "copper", devices=2, catalogue=entry)
    with Jobs(daemon, "copper", 8, 3) as jobs:
        wait_for(lambda: [worker["sessions"] >= 2 for worker in workers(daemon, "copper")] == [True, True], timeout=60)
        module.write_text("raise OSError('it can not be imported')\n")
        os.kill(workers(daemon, "copper")[which]["pid"], signal.SIGKILL)
        wait_for(lambda: "it can not be imported" in daemon.log.read_text())
        done = list(jobs.steps)
        wait_for(lambda: all(now > then for now, then in zip(jobs.steps, done, strict=True)), timeout=60)


SLOW = """
import os, time
from ase.calculators.emt import EMT

class Slow(EMT):
    def __init__(self):
        super().__init__()
        time.sleep({loading})

    def calculate(self, *arguments, **more):
        time.sleep({seconds})
        if os.path.exists({end!r}):
            os._exit(3)
        super().calculate(*arguments, **more)
"""
SLOW_ENTRY = '[slow]\nfamily = "ase"\narguments = { calculator = "slow:Slow" }\n'


def test_evaluations_that_waited_for_a_model_to_load_bring_no_replica(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those do that have waited for its worker for some seconds since."""
    (tmp_path / "slow.py").write_text(SLOW.format(loading=7, seconds=0.1, end=""))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    daemon = start(devices=2, catalogue=SLOW_ENTRY)
    with Jobs(daemon, "slow", 8, 1):
        wait_for(lambda: daemon.client().status()["models"] and daemon.model("slow")["state"] == "ready")
        began = time.monotonic()
        wait_for(lambda: len(workers(daemon, "slow")) == 2)
        assert time.monotonic() - began > LONG_FOR - 2  # looks, one a second


def test_evaluations_that_a_worker_ended_over_go_to_a_fresh_one(
    start: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has seen no others yet: all are done there, one by one."""
    (tmp_path / "slow.py").write_text(SLOW.format(loading=3, seconds=0.5, end=str(end := tmp_path / "end")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    daemon = start("", "--model", "slow", devices=2, catalogue=SLOW_ENTRY)
    with Jobs(daemon, "slow", 1, 1) as oldest:
        wait_for(lambda: oldest.steps[0])
        os.kill(pid := daemon.model("slow")["pid"], signal.SIGSTOP)
        with Jobs(daemon, "slow", 7, 1) as jobs:
            wait_for(lambda: [session["state"] for session in daemon.client().status()["sessions"]] == ["busy"] * 8)
            os.kill(pid, signal.SIGCONT)  # from here on these are in one batch, by turns with the oldest
            wait_for(lambda: len(workers(daemon, "slow")) == 2, timeout=60)
            wait_for(lambda: workers(daemon, "slow")[0]["batch_under_way"] == 7 * len(copper()))
            end.touch()
            wait_for(lambda: "ended: exit status 3" in daemon.log.read_text())
            end.unlink()
            done = list(jobs.steps)
            wait_for(lambda: all(now > then for now, then in zip(jobs.steps, done, strict=True)), timeout=60)
            assert all(worker["batches"] for worker in workers(daemon, "slow"))
    assert "Traceback" not in daemon.log.read_text()


def test_sessions_of_a_replica_that_goes_are_those_of_the_first_again(hot: RunningDaemon) -> None:
    client = hot.client()
    with Jobs(hot, "emt", 7, 3):
        wait_for(lambda: [worker["sessions"] >= 2 for worker in workers(hot, "emt")] == [True, True], timeout=60)
        kept = [with_model(hot, "emt") for _ in range(4)]
    wait_for(lambda: len(workers(hot, "emt")) == 1)
    assert workers(hot, "emt")[0]["sessions"] == 4
    for atoms in kept:
        ask_again(atoms)
        np.testing.assert_allclose(atoms.get_forces(), expected(atoms), rtol=0, atol=1e-9)
    assert client.status()["models"][0]["sessions"] == 4
