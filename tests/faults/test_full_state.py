"""The disk is full on which the daemon keeps what it learns, models' records, and what workers have compiled."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from disks import fill, small_disk

from conftest import RunningDaemon, rootstockd, wait_for
from rootstockd.fleet.fleet import TICK
from rootstockd.worker.compiled import FILES, remove_broken, why_not_kept

ROOM_FOR_FILES = 1000


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """It has the state directory and the cache, and nothing else of a daemon's."""
    with small_disk(tmp_path, f"40m,nr_inodes={ROOM_FOR_FILES},mode=700") as mounted:
        monkeypatch.setenv("ROOTSTOCKD_STATE", str(mounted / "state"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(mounted / "cache"))
        yield mounted


def take_all(disk: Path, what: str) -> Path:
    """All bytes, or all files that the disk has room for; the folder that has them."""
    fillers = disk / "fillers"
    fillers.mkdir()
    if what == "bytes":
        fill(fillers / "one")
    else:
        with contextlib.suppress(OSError):
            for number in range(ROOM_FOR_FILES):
                (fillers / str(number)).touch()
    with pytest.raises(OSError, match="No space left"):
        (disk / "more").write_bytes(bytes(4096))
    (disk / "more").unlink(missing_ok=True)
    return fillers


def make_room(fillers: Path) -> None:
    for file in fillers.iterdir():
        file.unlink()


def with_model(daemon: RunningDaemon, name: str) -> Atoms:
    """A structure with a session of its own, once evaluated."""
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = daemon.client().calculator(name)
    atoms.get_forces()
    return atoms


def again(*structures: Atoms) -> None:
    """The same step gives the same."""
    for atoms in structures:
        before = atoms.get_forces()
        atoms.calc.results.clear()
        np.testing.assert_array_equal(atoms.get_forces(), before)


def known(state: Path) -> set[str]:
    """Models of which it was written down what they take; each is whole, or this fails."""
    file = state / "measured.json"
    models: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    assert all(entry.keys() == {"loaded", "memory", "load_seconds"} for entry in models.values())
    return {json.loads(key)["name"] for key in models}


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["bytes", "files"])
def test_what_is_remembered(disk: Path, start_daemon: Callable[..., RunningDaemon], what: str) -> None:
    """Jobs go on and models load; what can't be written is written when there is room, and until then nothing is."""
    state = disk / "state"
    daemon = start_daemon("--model", "emt")
    first = with_model(daemon, "emt")
    wait_for(lambda: known(state) == {"emt"})
    before, fillers = files(state), take_all(disk, what)
    assert daemon.run("restart").returncode == 0, daemon.log.read_text()
    assert daemon.run("load", "lj").returncode == 0
    second = with_model(daemon, "lj")
    os.kill(daemon.model("emt")["pid"], signal.SIGKILL)
    again(first, second)
    assert "its compiled code can't be kept" in daemon.model("lj")["note"]
    wait_for(lambda: "how much memory models take can't be saved: " in daemon.log.read_text())
    assert f"{state}/measured.json was not kept: there is no room in {state}" in daemon.log.read_text()
    time.sleep(3 * TICK)  # until there is nothing new to be written
    assert files(state) == before, "what was there is as it was, and nothing half-written lies beside it"

    make_room(fillers)
    wait_for(lambda: known(state) == {"emt", "lj"})  # by itself
    assert [path.name for path in files(state)] == ["measured.json"]
    again(first, second)
    said = daemon.log.read_text()
    assert daemon.run("restart").returncode == 0
    again(first, second)
    assert "compiled code" not in (daemon.model("emt")["note"] or "")
    assert "ignored" not in daemon.log.read_text()
    assert "can't be saved" not in daemon.log.read_text()[len(said) :]


def test_the_record_of_a_model(disk: Path, start_daemon: Callable[..., RunningDaemon], tmp_path: Path) -> None:
    """None is added, and those that were are still there; with room it is, and the daemon takes it up."""
    (weights := tmp_path / "weights").write_bytes(bytes(1000))
    add = ("models", "add", "--family", "noop")
    assert rootstockd(*add, "old", weights).returncode == 0
    daemon = start_daemon("--model", "emt")
    atoms, state = with_model(daemon, "emt"), disk / "state"
    wait_for(lambda: known(state) == {"emt"})
    before, fillers = files(state), take_all(disk, "bytes")
    weights.write_bytes(bytes(8192))
    done = rootstockd(*add, "new", weights)
    assert done.returncode == 1 and "there is no room in" in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert files(state) == before
    assert daemon.run("load", "old").returncode == 0
    assert daemon.run("load", "new").returncode == 1
    again(atoms)

    make_room(fillers)
    assert rootstockd(*add, "new", weights).returncode == 0
    assert daemon.run("reload").returncode == 0
    assert daemon.run("load", "new").returncode == 0
    again(atoms)


def test_compiled_code_needs_room_for_its_files(tmp_path: Path) -> None:
    with small_disk(tmp_path, f"40m,nr_inodes={FILES + 5}") as mounted:
        assert why_not_kept(mounted / "numba") == ""
        for number in range(5):
            (mounted / str(number)).touch()
        assert why_not_kept(mounted / "numba") == f"{FILES - 2} more files can be made there where it has to be {FILES}"


def test_compiled_code(
    disk: Path, start_daemon: Callable[..., RunningDaemon], caplog: pytest.LogCaptureFixture
) -> None:
    """The disk is full when a part of it was kept: the model computes all the same, and what was kept is whole."""
    cache, over = disk / "cache", threading.Event()

    def fill_in_between() -> None:
        while not any(cache.rglob("*.nbi")) and not over.wait(0.01):
            pass
        take_all(disk, "bytes")

    filling = threading.Thread(target=fill_in_between)
    filling.start()
    try:
        daemon = start_daemon("--model", "mace-emt-small")
    finally:
        over.set()
        filling.join()
    atoms, reference = with_model(daemon, "mace-emt-small"), bulk("Cu", cubic=True)
    reference.positions[:] = atoms.positions
    with daemon.client().calculator("mace-emt-small", exact=True) as reference.calc:
        np.testing.assert_allclose(atoms.get_forces(), reference.get_forces(), rtol=0, atol=1e-9)
    assert "No space left on device" in daemon.model("mace-emt-small")["note"]
    (numba,) = cache.rglob("numba")
    assert {path.suffix for path in files(numba)} <= {".nbi", ".nbc"}, "nothing is left of what had no room"
    remove_broken(numba)
    assert "broken" not in caplog.text
