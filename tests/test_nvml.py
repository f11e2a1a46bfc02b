"""What daemons do with what a driver says of GPUs: a library that stands in for NVML has a folder say it.

The workers are real ones, of a model that computes on the CPU wherever it is told to be; `test_gpu.py` has the others.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

from conftest import RunningDaemon, rootstockd, wait_for
from rootstock_client.control import fetch
from rootstock_client.errors import EvaluationError, LimitError
from rootstockd.host.sockets import claim_gpu

GB = 10**9
TESTS = Path(__file__).parent
FAULTS = TESTS / "faults"
SOURCE = TESTS / "nvml.c"
GPUS = 2


@dataclass(frozen=True)
class Driver:
    """What it says of the GPUs of this machine."""

    folder: Path

    def add(self, gpu: int | str, kind: str, total: int) -> None:
        """A GPU, or a MIG instance of one, that nobody uses."""
        (self.folder / str(gpu)).mkdir(parents=True)
        self.say(gpu, name=f"Test {kind}", total=total, used=0, uuid=f"{kind}-{uuid.uuid4()}")  # one has one daemon

    def say(self, gpu: int | str, **words: object) -> None:
        """Of this GPU or instance from now on."""
        for name, word in words.items():
            new = self.folder / "new"
            new.write_text(f"{word}\n")
            new.rename(self.folder / str(gpu) / name)

    def lose(self, gpu: int) -> None:
        """It does not answer any more."""
        self.say(gpu, lost="")

    def uuid(self, gpu: int | str) -> str:
        return (self.folder / str(gpu) / "uuid").read_text().strip()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler here")
    folder = tmp_path_factory.mktemp("library")
    options = ("-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    subprocess.run([compiler, *options, "-o", folder / "libnvidia-ml.so.1", SOURCE], check=True)
    return folder


@pytest.fixture
def driver(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """One with two GPUs of 8 GB that nobody uses."""
    driver = Driver(tmp_path / "gpus")
    for gpu in range(GPUS):
        driver.add(gpu, "GPU", total=8 * GB)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(library))
    monkeypatch.setenv("TEST_GPUS", str(driver.folder))
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return driver


class Job:
    """One that asks for forces all the time, and compares them."""

    def __init__(self, daemon: RunningDaemon, model: str = "emt") -> None:
        self.steps = 0
        self._daemon, self._model = daemon, model
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Job:
        self._thread.start()
        wait_for(lambda: self.steps > 3 or self._error)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def goes_on(self, timeout: float = 20.0) -> None:
        """Until it has made more steps."""
        before = self.steps
        wait_for(lambda: self.steps > before + 3 or self._error, timeout)

    def _run(self) -> None:
        try:
            with self._daemon.client().calculator(self._model) as calculator:
                while not self._over.wait(0.01):
                    atoms, other = bulk("Cu", cubic=True), bulk("Cu", cubic=True)
                    for each in (atoms, other):
                        each.rattle(0.1, seed=self.steps)
                    atoms.calc, other.calc = calculator, EMT()
                    forces = atoms.get_forces()
                    if self._model == "emt":
                        np.testing.assert_allclose(forces, other.get_forces(), rtol=0, atol=1e-9)
                    self.steps += 1
        except BaseException as error:
            self._error = error


def kill_worker(daemon: RunningDaemon) -> None:
    os.kill(daemon.model("emt")["pid"], signal.SIGKILL)


def where(daemon: RunningDaemon) -> object:
    """The device of the model, and whether it is ready there."""
    return daemon.model("emt")["device"], daemon.model("emt")["state"]


def visible(daemon: RunningDaemon) -> str:
    """The UUID of what the model's worker computes on."""
    variables = Path(f"/proc/{daemon.model('emt')['pid']}/environ").read_text().split("\0")
    (value,) = (line.partition("=")[2] for line in variables if line.startswith("CUDA_VISIBLE_DEVICES="))
    return value


def used(daemon: RunningDaemon, device: str) -> int:
    """Bytes of a device's memory that are in use, as far as the daemon has seen."""
    (size,) = (it["memory_used"] for it in daemon.client().status()["device_states"] if it["name"] == device)
    return size


def use(daemon: RunningDaemon, driver: Driver, gpu: int, size: int) -> None:
    """Have another program use so much of a GPU, until the daemon has seen it and has done what it does about that."""
    for step in (size - 1, size):  # it looks again when it has done what follows from the look before
        driver.say(gpu, used=step)
        wait_for(lambda step=step: used(daemon, f"cuda:{gpu}") == step)


@pytest.fixture
def start(driver: Driver, start_daemon: Callable[..., RunningDaemon]) -> Iterator[Callable[..., RunningDaemon]]:
    """Start a daemon on GPUs, with a model."""
    return lambda gpus, *options: start_daemon("--model", "emt", *options, device=("--gpu", gpus) if gpus else ())


def test_a_model_on_a_gpu_that_is_lost_goes_to_another_and_its_job_goes_on(driver: Driver, start) -> None:
    daemon = start("0,1")
    with Job(daemon) as job:
        assert where(daemon) == ("cuda:0", "ready")
        kill_worker(daemon)
        job.goes_on()
        assert where(daemon) == ("cuda:0", "ready"), "a worker's end is no reason to leave"
        driver.lose(0)
        wait_for(lambda: "cuda:0 does not answer the driver any more" in daemon.log.read_text())
        use(daemon, driver, 1, GB)
        assert where(daemon) == ("cuda:0", "ready"), "nor is a driver that says nothing"
        job.goes_on()
        kill_worker(daemon)
        job.goes_on()
        assert where(daemon) == ("cuda:1", "ready")
    log = daemon.log.read_text()
    assert log.count("cuda:0 does not answer the driver any more") == 1
    assert "model emt: cuda:0 can't be used, and it goes to another" in log
    assert daemon.model("emt")["restarts"] == 2


@pytest.fixture
def catalogue(driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Options for models that GPU 0 does not bear, `one` from the start and `late` in evaluations, and one that fails
    once to load."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")]))
    counter = tmp_path / "n"
    options = {
        "one": f'calculator = "hostile:OnGpu", options = {{ broken = "{driver.uuid(0)}" }}',
        "late": f'calculator = "hostile:OnGpu", options = {{ broken = "{driver.uuid(0)}", late = true }}',
        "once": f'calculator = "hostile:AtLoading", options = {{ what = "raise", times = 1, counter = "{counter}" }}',
    }
    entries = [
        f'[{name}]\nfamily = "ase"\nconfine = false\narguments = {{ {said} }}\n' for name, said in options.items()
    ]
    (tmp_path / "models.toml").write_text("".join(entries))
    return "--catalogue", str(tmp_path / "models.toml")


def test_a_gpu_that_a_model_can_not_use_is_avoided(driver: Driver, start_daemon, catalogue) -> None:
    daemon = start_daemon(*catalogue, "--model", "one", device=("--gpu", "0,1"))
    assert (daemon.model("one")["device"], daemon.model("one")["restarts"]) == ("cuda:1", 1)
    said = fetch(daemon.socket, "GET", "/metrics").decode()
    assert 'rootstockd_device_up{device="cuda:0"} 0.0' in said
    assert 'rootstockd_device_up{device="cuda:1"} 1.0' in said
    driver.lose(1)
    wait_for(lambda: "cuda:1 does not answer the driver" in daemon.log.read_text())
    assert daemon.run("load", "emt").returncode == 0
    assert where(daemon) == ("cuda:0", "ready"), "others may use it"
    daemon.stop()
    alone = start_daemon(*catalogue, device=("--gpu", "0"))  # there is nowhere to go
    done = alone.run("load", "one")
    assert done.returncode != 0
    assert "uncorrectable ECC error" in done.stderr


def test_an_evaluation_that_a_gpu_does_not_bear_is_repeated_on_another(start_daemon, catalogue) -> None:
    daemon = start_daemon(*catalogue, "--model", "late", device=("--gpu", "0,1"))
    assert daemon.model("late")["device"] == "cuda:0"
    atoms = bulk("Cu")
    with daemon.client().calculator("late") as calculator:
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy_of_emt(bulk("Cu")), abs=1e-9)
    assert (daemon.model("late")["device"], daemon.model("late")["restarts"]) == ("cuda:1", 1)
    daemon.stop()
    alone = start_daemon(*catalogue, "--model", "late", device=("--gpu", "0"))
    with alone.client().calculator("late") as calculator:
        atoms = bulk("Cu")
        atoms.calc = calculator
        with pytest.raises(EvaluationError, match="2 workers ended over this structure: its device was in disorder"):
            atoms.get_potential_energy()


def test_what_was_wrong_when_a_model_left_is_not_held_against_it(
    driver: Driver, start_daemon, catalogue, tmp_path
) -> None:
    """It leaves, and is wanted again, while it is still being found out why its worker has ended."""
    daemon = start_daemon(*catalogue, "--model", "emt", device=("--gpu", "0,1"))
    slow = driver.folder / "slow"
    slow.touch()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(daemon.run, "load", "once")
        try:
            wait_for(lambda: (tmp_path / "n").exists() and daemon.model("once")["pid"] is None)
            assert daemon.model("once")["state"] == "loading"
            for what in ("unload", "load"):
                fetch(daemon.socket, "POST", f"/v1/{what}", {"model": "once"})
        finally:
            slow.unlink()
        assert first.result().returncode == 0, first.result().stderr
    assert (tmp_path / "n").read_text() == "xx"
    atoms = bulk("Cu")
    with daemon.client().calculator("once") as calculator:
        atoms.calc = calculator
        assert atoms.get_potential_energy() == pytest.approx(energy_of_emt(bulk("Cu")), abs=1e-9)


def test_a_driver_that_says_nothing_keeps_no_model_away(driver: Driver, start) -> None:
    """Its calls do not come back, as where `nvidia-smi` hangs; nothing else waits for them without end."""
    daemon = start("0,1")
    slow = driver.folder / "slow"
    with Job(daemon) as job:
        slow.touch()
        try:
            kill_worker(daemon)
            job.goes_on(timeout=60.0)  # it waits for an answer, once
            wait_for(lambda: "cuda:0 does not answer the driver any more" in daemon.log.read_text())
            threads = psutil.Process(daemon.pid).num_threads()
            job.goes_on()
            time.sleep(3)
            assert psutil.Process(daemon.pid).num_threads() <= threads, "it is not asked again meanwhile"
        finally:
            slow.unlink()
        wait_for(lambda: "cuda:0 answers the driver again" in daemon.log.read_text())
        kill_worker(daemon)
        job.goes_on()


def energy_of_emt(atoms: Atoms) -> float:
    atoms.calc = EMT()
    return float(atoms.get_potential_energy())


def test_where_no_gpu_answers_models_stay(driver: Driver, start) -> None:
    daemon = start("0")
    with Job(daemon) as job:
        driver.lose(0)
        wait_for(lambda: "does not answer the driver" in daemon.log.read_text())
        kill_worker(daemon)
        job.goes_on()
        assert where(daemon) == ("cuda:0", "ready")


def test_a_lost_gpu_can_be_had_by_nobody_and_leaves_others_their_numbers(driver: Driver, start, tmp_path: Path) -> None:
    driver.lose(0)
    for gpu in ("0", "0,1"):
        done = rootstockd("start", "--gpu", gpu)
        assert done.returncode != 0
        assert "the GPU cuda:0 does not answer: GPU is lost. `rootstockd doctor`" in done.stderr
    daemon = start("all")
    assert where(daemon) == ("cuda:1", "ready")
    assert "GPU 0 of this machine does not answer: GPU is lost" in daemon.log.read_text()
    daemon.stop()
    config = tmp_path / "config.toml"
    config.write_text('devices = ["cuda:1"]\n')  # nobody asks for cuda:0
    daemon = start(None, "--config", str(config))
    assert where(daemon) == ("cuda:1", "ready")
    found = rootstockd("doctor").stdout
    assert "problem  driver          GPU 0 does not answer: GPU is lost" in found


def test_a_restart_on_a_gpu_that_another_daemon_has_stops_nothing(driver: Driver, start, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('devices = ["cuda:0"]\n')
    daemon = start(None, "--config", str(config))
    pid = daemon.pid
    config.write_text('devices = ["cuda:0", "cuda:1"]\n')
    with claim_gpu(driver.uuid(1)):
        done = daemon.run("restart")
        assert done.returncode == 1 and f"a daemon already uses the GPU {driver.uuid(1)}" in done.stderr, done.stderr
        assert daemon.pid == pid
    assert daemon.run("restart").returncode == 0 and daemon.pid != pid


def test_a_gpu_that_is_kept_from_this_process_has_no_number(driver: Driver, start) -> None:
    """As in a job that was given another of the machine's."""
    driver.say(0, closed="")
    daemon = start("0")
    assert (where(daemon), visible(daemon)) == (("cuda:0", "ready"), driver.uuid(1))
    driver.say(1, used=GB)
    wait_for(lambda: used(daemon, "cuda:0") == GB)
    assert "this machine has no GPU 1" in rootstockd("start", "--gpu", "1").stderr
    found = rootstockd("doctor").stdout
    assert "GPU 0           Test GPU" in found and "GPU 1" not in found and "does not answer" not in found


def test_an_instance_of_a_gpu_that_is_split_is_a_device(driver: Driver, start) -> None:
    """What is measured is its own memory; also while NVML finds none by its UUID."""
    for instance in ("0/0", "0/1"):
        driver.add(instance, "MIG", total=2 * GB)
    (driver.folder / "strict").touch()
    daemon = start("1")
    assert (where(daemon), visible(daemon)) == (("cuda:1", "ready"), driver.uuid("0/1"))
    driver.lose(1)
    driver.say("0/1", processes=f"{daemon.model('emt')['pid']} {GB}", used=GB)
    wait_for(lambda: daemon.model("emt")["memory"] == used(daemon, "cuda:1") == GB)
    (device,) = daemon.client().status()["device_states"]
    assert device["memory_total"] == 2 * GB


def test_a_lost_gpu_takes_no_other_with_it(driver: Driver, start) -> None:
    """NVML may find none by its UUID while another is lost."""
    (driver.folder / "strict").touch()
    daemon = start("1")
    driver.lose(0)
    driver.say(1, processes=f"{daemon.model('emt')['pid']} {GB}", used=GB)
    wait_for(lambda: daemon.model("emt")["memory"] == GB)
    up = b'rootstockd_device_up{device="cuda:1"} 1.0'
    assert up in fetch(daemon.socket, "GET", "/metrics")
    assert where(daemon) == ("cuda:1", "ready")
    found = rootstockd("doctor").stdout
    assert "problem  driver          GPU 0 does not answer: GPU is lost" in found
    assert "GPU 1           Test GPU" in found


def test_a_gpu_that_does_not_tell_of_its_memory_is_told_of_alone(driver: Driver) -> None:
    driver.say(1, mute="")
    found = rootstockd("doctor").stdout
    assert "problem  driver          GPU 1 does not answer: GPU is lost" in found
    assert "GPU 0           Test GPU" in found


def test_a_gpu_has_one_daemon_whatever_it_is_called(driver: Driver, start, monkeypatch: pytest.MonkeyPatch) -> None:
    first = start("0")
    second = RunningDaemon(first.folder.with_name("second"))
    second.folder.mkdir()
    told = f"a daemon already uses the GPU {driver.uuid(0)}: pid {first.pid} "
    for name, visible in (
        ("0", None),
        ("1,0", None),
        (driver.uuid(0), None),
        (driver.uuid(0), "1"),
        ("0", "0"),
        ("1", "1,0"),
    ):
        with monkeypatch.context() as patch:
            if visible is not None:
                patch.setenv("CUDA_VISIBLE_DEVICES", visible)
            done = second.run("start", "--gpu", name, "--log-file", second.log)
        assert done.returncode != 0
        assert told in done.stderr + done.stdout
        assert not second.processes()
    with Job(first) as job, Job(start("1")) as beside:  # another GPU is another's
        job.goes_on()
        beside.goes_on()
    os.kill(first.pid, signal.SIGKILL)
    wait_for(lambda: not first.processes(), timeout=5)
    assert where(start("0")) == ("cuda:0", "ready")


def test_what_another_program_has_is_waited_for(driver: Driver, start) -> None:
    daemon = start("0")
    driver.say(0, processes=f"{daemon.model('emt')['pid']} {GB}", used=GB)
    wait_for(lambda: daemon.model("emt")["memory"] == GB)
    with Job(daemon) as job:
        use(daemon, driver, 0, 8 * GB)
        assert where(daemon) == ("cuda:0", "ready"), "who has work stays"
        job.goes_on()
    wait_for(lambda: daemon.model("emt")["state"] == "cold")
    driver.say(0, processes="")
    use(daemon, driver, 0, 7 * GB)
    done: list[float] = []
    asking = threading.Thread(target=lambda: done.append(energy(daemon)))
    asking.start()
    wait_for(lambda: daemon.model("emt")["state"] == "waiting")
    wait_for(lambda: "emt needs 1000 MB; cuda:0 has 600 MB beside other programs" in daemon.run("status").stdout)
    assert not done
    driver.say(0, used=0)
    asking.join(timeout=20)
    assert done


def test_who_does_not_wait_is_told_what_is_there(driver: Driver, start, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("room_timeout = 0\n")
    driver.say(0, used=8 * GB)
    daemon = RunningDaemon(tmp_path / "d", device=("--gpu", "0"))
    daemon.folder.mkdir()
    done = daemon.run("start", "--gpu", "0", "--config", config, "--model", "emt", "--log-file", daemon.log)
    daemon.stop()
    assert "cuda:0 has 0 MB beside other programs" in done.stderr + done.stdout + daemon.log.read_text()


def test_a_model_that_once_had_much_comes_with_less_when_that_was_waited_for(
    driver: Driver, start, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text("room_timeout = 3\n")
    daemon = start("0", "--config", str(config), "--model", "noop")

    def have(**gigabytes: float) -> None:
        """What the models have."""
        pids = {name: daemon.model(name)["pid"] for name in gigabytes}
        lines = [f"{pids[name]} {round(size * GB)}" for name, size in gigabytes.items()]
        driver.say(0, processes="\n".join(lines), used=round(sum(gigabytes.values()) * GB))
        wait_for(lambda: all(daemon.model(name)["memory"] == size * GB for name, size in gigabytes.items()))

    have(emt=1, noop=1)
    have(emt=6, noop=1)
    assert daemon.run("unload", "emt").returncode == 0
    have(noop=5)
    with Job(daemon, "noop"):  # it has work, and stays
        begin = time.monotonic()
        assert energy(daemon)
        assert time.monotonic() - begin > 2
        assert where(daemon) == ("cuda:0", "ready")
        assert daemon.run("unload", "emt").returncode == 0
        have(noop=7)
        with pytest.raises(LimitError, match=r"no device has room for it: emt needs 6000 MB"):
            energy(daemon)


def test_what_rounds_numbers_is_not_inherited(start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "1")
    daemon = start("0")
    assert b"TF32" in Path(f"/proc/{daemon.pid}/environ").read_bytes()
    assert b"TF32" not in Path(f"/proc/{daemon.model('emt')['pid']}/environ").read_bytes()


def energy(daemon: RunningDaemon) -> float:
    atoms = bulk("Cu")
    with daemon.client().calculator("emt") as calculator:
        atoms.calc = calculator
        return float(atoms.get_potential_energy())


@pytest.mark.parametrize(("visible", "said"), [(None, "1 passed"), ("", "1 skipped")])
def test_tests_on_a_machine_whose_gpu_torch_can_not_use(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, said: str
) -> None:
    """They run; those that need a GPU are skipped where none is visible."""
    (tmp_path / "torch.py").write_text(
        "import warnings\nwarnings.warn('the NVIDIA driver on your system is too old')\n"
    )
    (tmp_path / "test_it.py").write_text("from pytest import mark\n\n\n@mark.gpu\ndef test_it():\n    pass\n")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:  # of the process that this one runs in
        monkeypatch.delenv(name)
    settings = ("-c", TESTS.parent / "pyproject.toml", "--rootdir", TESTS, "-p", "conftest", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", *settings, tmp_path / "test_it.py"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, cwd=TESTS)
    assert said in done.stdout, done.stdout + done.stderr
