"""File systems that do not answer, as one over a network may: nothing else waits for them, least of all the end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from ase.build import bulk

from conftest import RunningDaemon, wait_for
from rootstock_client.control import request
from rootstock_client.errors import ModelLoadError
from rootstockd.models import store
from rootstockd.models.availability import DISK_PATIENCE, Locations
from rootstockd.models.catalogue import Entry
from rootstockd.models.store import Record, StoredFile
from rootstockd.reload import PATIENCE

FUSE = "/dev/fuse"
DETACH = 2
LIMIT = 4
"""Seconds that loading may take here."""
SETTINGS = f"load_timeout = {LIMIT}\n"
CATALOGUE = """
[{name}]
family = "ase"
arguments = {{ calculator = "{name}:made" }}
"""
MODULE = """
import os, time
from ase.calculators.lj import LennardJones

while not os.path.exists("{folder}/gate"):
    time.sleep(0.01)


def made():
    return LennardJones()
"""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.access(FUSE, os.W_OK), reason=f"only root can mount, and needs {FUSE}"
)


@contextlib.contextmanager
def hanging(folder: Path) -> Iterator[None]:
    """Have a folder be of a file system that answers nothing; in the end those who asked get an error."""
    libc = ctypes.CDLL(None, use_errno=True)
    server = os.open(FUSE, os.O_RDWR | os.O_CLOEXEC)  # of which nobody reads
    try:
        options = f"fd={server},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
        mounted = libc.mount(b"hanging", os.fsencode(folder), b"fuse", 0, options)
        assert mounted == 0, os.strerror(ctypes.get_errno())
        try:
            yield
        finally:
            libc.umount2(os.fsencode(folder), DETACH)
    finally:
        os.close(server)


class Site:
    """A daemon with two models of modules in folders of their own; they load when a file is there, `gate`."""

    def __init__(self, folder: Path, start: Callable[..., RunningDaemon]) -> None:
        self.folder, self.packages = folder, folder / "packages"
        for name in ("first", "second"):
            (self.packages / name).mkdir(parents=True)
            (self.packages / name / "__init__.py").write_text(MODULE.format(folder=folder))
        self.settings = folder / "settings"
        self.settings.mkdir()
        catalogue, settings = self.settings / "models.toml", self.settings / "config.toml"
        catalogue.write_text("".join(CATALOGUE.format(name=name) for name in ("first", "second")))
        settings.write_text(SETTINGS)
        self.daemon = start("--catalogue", str(catalogue), "--config", str(settings))

    def energy(self, model: str) -> float:
        atoms = bulk("Cu", cubic=True)
        atoms.calc = self.daemon.client().calculator(model)
        return float(atoms.get_potential_energy())

    def stages(self) -> list[str]:
        """Of the models that load."""
        loading = request(self.daemon.socket, "GET", "/v1/loading")
        return [state["stage"] for state in loading]  # type: ignore[attr-defined]

    def open_gate(self) -> None:
        (self.folder / "gate").touch()


def test_where_pulled_weights_are_is_waited_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the loop that all sessions share; who had them before has them still."""
    monkeypatch.setenv("ROOTSTOCKD_STATE", str(tmp_path / "state"))
    entry = Entry(family="noop", url="https://nowhere/m.model")
    file = StoredFile(sha256=64 * "a", suffix=".model", size=0)
    folder = store.own_folder()
    for name in ("known", "another"):
        (folder / file.name).touch()
        store.write_record(folder, name, Record(original=file, url=entry.url, source="", pinned="", when=""))
    locations = Locations()
    before = locations.located("known", entry)
    assert before.weights == folder / file.name
    with hanging(folder):
        began = time.monotonic()
        for _ in range(100):
            assert locations.located("known", entry) == before
            with pytest.raises(ModelLoadError, match="no disk says where its weights are"):
                locations.located("another", entry)
        assert time.monotonic() - began < 10 * DISK_PATIENCE
    wait_for(lambda: not locations._looking)
    assert locations.located("another", entry).weights == folder / file.name


@pytest.fixture
def site(tmp_path: Path, start_daemon: Callable[..., RunningDaemon], monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"), prepend=os.pathsep)
    return Site(tmp_path, start_daemon)


def test_what_a_model_computes_with_can_not_be_looked_at_again(site: Site) -> None:
    """Its fingerprint is confirmed when it has loaded: for as long as loading may take, and no longer."""
    with ThreadPoolExecutor() as jobs:
        job = jobs.submit(site.energy, "first")
        wait_for(lambda: site.stages() == ["weights"])
        time.sleep(0.5)  # it waits at the gate
        with hanging(site.packages / "first"):
            site.open_gate()
            site.energy("second")
            with pytest.raises(ModelLoadError, match=f"could not be looked at within {LIMIT} s"):
                job.result(30)
            log = site.daemon.log.read_text()
            assert re.search(
                f"worker .* is killed, it hung: loading took {LIMIT}.* s where {LIMIT} s is the limit", log
            )
            process = psutil.Process(site.daemon.pid)
            began = time.monotonic()
            assert site.daemon.run("stop").returncode == 0
            process.wait(5)
            assert time.monotonic() - began < 10
    site.daemon.start()
    assert site.energy("first") == pytest.approx(site.energy("second"))


def test_settings_that_can_not_be_read_again(site: Site) -> None:
    """All stays as it is, and sessions notice nothing."""
    site.open_gate()
    site.energy("first")
    before = site.daemon.client().status()["models"]
    with ThreadPoolExecutor() as commands:
        with hanging(site.settings):
            reload = commands.submit(site.daemon.run, "reload")
            began, steps = time.monotonic(), 0
            while not reload.done():
                site.energy("first")
                steps += 1
            assert time.monotonic() - began < 2 * PATIENCE
            assert steps > 20  # one was the most if the loop waited
            assert reload.result().returncode == 1
            assert "nothing was changed" in reload.result().stderr
            assert "could not be read within 5 s: see whether their file systems answer" in reload.result().stderr
        assert [model["name"] for model in site.daemon.client().status()["models"]] == [m["name"] for m in before]
    assert site.daemon.run("reload").returncode == 0
