"""Dask clusters on this machine: the plugin's daemon, kept sessions, and workers and daemons that are killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from ase.calculators.emt import EMT
from distributed import Client, as_completed, wait

from conftest import MARK, RunningDaemon, wait_for
from relaxing import decent, evaluated, rattled, relaxed, stubborn, task
from rootstock_client import RootstockError
from rootstock_client.calculator import RootstockCalculator
from rootstock_client.dask import RootstockPlugin, calculator
from rootstock_client.errors import DaemonNotFoundError
from rootstock_client.node_daemon import NodeDaemon

pytestmark = pytest.mark.may_leak("Dask's processes go on between tests; `node` and Cluster.close see to their end")

START = ("--device", "cpu", "--model", "emt")
SEEDS = range(100)
PATH = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
"""With this folder, for the tasks."""


@pytest.fixture(scope="module")
def expected() -> dict[int, float]:
    return {seed: relaxed(seed, EMT())[0] for seed in SEEDS}


class Cluster:
    """A Dask cluster as on real nodes: a scheduler, and `dask worker` processes with their nannies.

    Args:
        folder: for the scheduler's address and what workers write.
        environment: the variables of its processes.
    """

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._address = folder / "scheduler.json"
        self.processes = [self._run("scheduler", "--port", "0", "--host", "127.0.0.1")]
        wait_for(self._address.exists, timeout=60)
        self.client = Client(scheduler_file=str(self._address), timeout=60)

    def _run(self, what: str, *options: str) -> subprocess.Popen[bytes]:
        module = ("-W", "ignore", "-m", f"distributed.cli.dask_{what}", "--no-dashboard", "--scheduler-file")
        with (self._folder / "log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *module, str(self._address), *options],
                env=self._environment,
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def add_workers(self, count: int) -> list[subprocess.Popen[bytes]]:
        """Start workers of two threads each; their nannies. They join when they can."""
        nannies = [self._run("worker", "--nthreads", "2", "--host", "127.0.0.1") for _ in range(count)]
        self.processes += nannies
        return nannies

    def workers(self) -> list[str]:
        """The addresses of those that have joined."""
        return [*self.client.scheduler_info(n_workers=-1)["workers"]]

    def wait_for_workers(self, count: int) -> None:
        wait_for(lambda: len(self.workers()) == count, timeout=60)

    def close(self) -> None:
        """End it as Slurm would. May be done twice."""
        self.client.close()
        for process in reversed(self.processes):
            process.terminate()
            process.wait(60)

    @property
    def log(self) -> str:
        return (self._folder / "log").read_text()


@pytest.fixture(scope="module")
def start_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def start(workers: int, **environment: str) -> Cluster:
            cluster = Cluster(tmp_path_factory.mktemp("dask"), {**os.environ, "PYTHONPATH": PATH, **environment})
            stack.callback(cluster.close)
            cluster.add_workers(workers)
            cluster.wait_for_workers(workers)
            return cluster

        yield start


@pytest.fixture(scope="module")
def node(runtime_folder: Path) -> Iterator[RunningDaemon]:
    """A node without a daemon; in the end nothing may be left of it."""
    node = RunningDaemon(runtime_folder / "dask" / "rootstockd")  # which is for the plugin to make
    yield node
    try:
        assert not node.processes()
        assert not any(node.folder.glob("*"))
    finally:
        node.stop()


def variables_of(node: RunningDaemon) -> dict[str, str]:
    """The variables of processes that are on this node."""
    home = str(node.folder.parent)
    return {"XDG_RUNTIME_DIR": home, "HOME": home, "ROOTSTOCKD_SOCKET": "", MARK: str(node.folder)}


@pytest.fixture(scope="module")
def cluster(node: RunningDaemon, start_cluster: Callable[..., Cluster]) -> Iterator[Cluster]:
    """Two workers with a daemon, on a node that had none."""
    cluster = start_cluster(2, **variables_of(node))
    cluster.client.register_plugin(RootstockPlugin(START))
    yield cluster
    cluster.close()


def test_many_tasks_over_few_sessions(
    cluster: Cluster, node: RunningDaemon, expected: dict[int, float], compatible: Callable[..., None]
) -> None:
    before = node.client().status()["evaluations"]
    results = cluster.client.gather(cluster.client.map(task, SEEDS))
    assert {seed: energy for seed, energy, _ in results} == pytest.approx(expected, abs=1e-9)
    status = node.client().status()
    assert len(status["sessions"]) <= 4
    assert status["evaluations"] - before == sum(evaluations for *_, evaluations in results)
    compatible(
        code="Dask distributed",
        version=version("distributed"),
        role="driver",
        transport="in Python",
        ran=f"{len(SEEDS)} relaxations on a LocalCluster, by RootstockPlugin",
        against="energies of the same with ASE's EMT, to 1e-9 eV",
    )


def test_tasks_leave_nothing_to_those_that_come_after(cluster: Cluster) -> None:
    (before,) = {cluster.client.submit(decent, seed, pure=False).result() for seed in range(8)}
    futures = [cluster.client.submit(stubborn, seed, pure=False) for seed in range(8)]
    assert {future.result() for future in futures} == {"model-changed"}
    assert {cluster.client.submit(decent, seed, pure=False).result() for seed in range(8)} == {before}


def test_what_tasks_return_keeps_its_results(cluster: Cluster) -> None:
    """Dask pickles it when it is fetched, and its thread is at another structure by then."""
    futures = [cluster.client.submit(evaluated, seed, pure=False) for seed in range(12)]
    wait(futures)
    for seed, atoms in enumerate(cluster.client.gather(futures)):
        right = rattled(seed)
        right.calc = EMT()
        assert atoms.calc.results["energy"] == pytest.approx(right.get_potential_energy(), abs=1e-9)
        assert not atoms.calc.calculation_required(atoms, ["energy", "forces"])


def test_a_daemon_has_the_threads_that_it_would_have_without_dask(cluster: Cluster, node: RunningDaemon) -> None:
    """Nannies set OMP_NUM_THREADS=1 for workers."""
    assert b"_NUM_THREADS=" not in Path(f"/proc/{node.pid}/environ").read_bytes()


def after_ten(
    cluster: Cluster, diary: Path, disturb: Callable[[], None], **more: object
) -> tuple[dict[int, float], set[int]]:
    """Run tasks for all seeds, and disturb them when ten have been done; the energies, and which were before."""
    energies: dict[int, float] = {}
    early: set[int] = set()
    tasks = as_completed(cluster.client.map(task, SEEDS, diary=diary, pure=False, **more), with_results=True)
    for future, (seed, energy, _) in tasks:
        future.release()  # or Dask would compute it again if it was the dead node that had it
        energies[seed] = energy
        if len(energies) == 10:
            early = set(energies)
            disturb()
    return energies, early


def test_a_node_that_dies_costs_its_tasks_only(
    cluster: Cluster, node: RunningDaemon, expected: dict[int, float], tmp_path: Path
) -> None:
    """Nanny and worker are killed; the daemon is kept by the other worker, which is on the same machine."""
    daemon, others = node.pid, set(cluster.workers())
    (victim,) = cluster.add_workers(1)
    cluster.wait_for_workers(3)
    (address,) = set(cluster.workers()) - others
    cluster.client.submit(task, 0, workers=[address], pure=False).result()
    held = tmp_path / "held"

    def kill() -> None:
        wait_for(held.exists)
        os.killpg(victim.pid, signal.SIGKILL)

    energies, early = after_ten(cluster, tmp_path / "diary", kill, victim=address, held=held)
    assert energies == pytest.approx(expected, abs=1e-9)
    times = Counter(map(int, (tmp_path / "diary").read_text().split()))
    assert {times[seed] for seed in early} == {1}
    assert sum(times.values()) > len(SEEDS)
    cluster.wait_for_workers(2)
    victim.wait()
    assert node.pid == daemon


def test_a_daemon_that_is_killed_is_started_again_while_tasks_wait(
    cluster: Cluster, node: RunningDaemon, expected: dict[int, float], tmp_path: Path
) -> None:
    daemon = node.pid
    energies, _ = after_ten(cluster, tmp_path / "diary", lambda: os.kill(daemon, signal.SIGKILL))
    assert energies == pytest.approx(expected, abs=1e-9)
    times = Counter(map(int, (tmp_path / "diary").read_text().split()))
    assert set(times.values()) == {1}
    assert node.pid != daemon


def test_two_clusters_of_a_node_share_its_daemon(
    cluster: Cluster, node: RunningDaemon, start_cluster: Callable[..., Cluster]
) -> None:
    daemon = node.pid
    other = start_cluster(1, **variables_of(node))
    other.client.register_plugin(RootstockPlugin(START))
    assert other.client.submit(task, 1).result()[0] == 1
    other.close()
    assert node.pid == daemon


def test_a_daemon_that_was_there_is_left_alone(
    own_daemon: RunningDaemon, start_cluster: Callable[..., Cluster]
) -> None:
    daemon, pid = own_daemon, own_daemon.pid
    cluster = start_cluster(1)
    for start in (START, None):
        cluster.client.register_plugin(RootstockPlugin(start, socket=daemon.socket))
        assert cluster.client.submit(task, 1, pure=False).result()[0] == 1
    cluster.close()
    assert daemon.pid == pid


def test_a_node_that_cannot_have_a_daemon_takes_no_tasks(
    start_cluster: Callable[..., Cluster], runtime_folder: Path, tmp_path: Path
) -> None:
    node = RunningDaemon(runtime_folder / "broken")
    command, broken = tmp_path / "rootstockd", tmp_path / "broken"
    command.write_text(
        f'#!/bin/sh\n[ -e {broken} ] && {{ echo broken >&2; exit 1; }}\nexec {sys.executable} -m rootstockd "$@"\n'
    )
    command.chmod(0o755)
    broken.touch()
    plugin = RootstockPlugin([*START, "--log-file", str(tmp_path / "log")], command=[str(command)], socket=node.socket)

    cluster = start_cluster(1, **{MARK: str(node.folder)})
    with pytest.raises(DaemonNotFoundError, match="rootstockd start"):
        cluster.client.register_plugin(RootstockPlugin(socket=node.socket))
    with pytest.raises(RootstockError, match="no daemon could be started here by .*: broken"):
        cluster.client.register_plugin(plugin)
    (late,) = cluster.add_workers(1)
    assert late.wait(60) == 0
    assert "no rootstockd on this node" in cluster.log
    assert len(cluster.workers()) == 1
    assert not any(node.folder.iterdir())

    broken.unlink()
    cluster.client.register_plugin(plugin)
    broken.touch()
    os.kill(node.pid, signal.SIGKILL)
    cluster.wait_for_workers(0)
    cluster.close()
    node.stop()


def test_calculators_outside_of_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOTSTOCKD_SOCKET", "/nowhere.sock")
    one, other = calculator("emt"), calculator("emt")
    assert isinstance(one, RootstockCalculator)
    assert one is not other


def test_words_are_not_split() -> None:
    with pytest.raises(TypeError, match=r"\['--gpu', '0'\]"):
        RootstockPlugin("--gpu 0")


def test_one_starts_it_and_the_last_one_stops_it(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "rootstockd", "start", *START)
    node = RunningDaemon(tmp_path)

    async def story() -> None:
        three = [NodeDaemon(node.socket, command, {**os.environ, MARK: str(tmp_path)}) for _ in range(3)]
        await asyncio.gather(*(one.join() for one in three))
        assert all(one.shared for one in three)
        await three[0].leave()
        await three[1].leave()
        pid = await asyncio.to_thread(lambda: node.pid)
        # whoever stops it by hand wants it stopped, and whoever starts one by hand wants to keep it
        await asyncio.to_thread(node.run, "stop")
        assert not await three[2].killed()
        await asyncio.to_thread(node.run, "start", *START)
        await three[2].join()
        assert not three[2].shared
        await three[2].leave()
        assert await asyncio.to_thread(lambda: node.pid) != pid

    try:
        asyncio.run(story())
    finally:
        node.stop()


@pytest.mark.parametrize("words", ["precious", "7 precious\n"])
def test_a_file_of_another_program_is_not_shared_by(tmp_path: Path, words: str) -> None:
    (path := tmp_path / "uv.shared").write_text(words)
    with pytest.raises(RootstockError, match=f"{path} is not a file by which a daemon of yours is shared"):
        asyncio.run(NodeDaemon(tmp_path / "uv.sock", ["false"], {}).join())
    assert path.read_text() == words
