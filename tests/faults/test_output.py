"""What workers print: in the daemon's log, with their name before each line, and not without end."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

import hostile
from conftest import RunningDaemon, wait_for
from rootstock_client.errors import EvaluationError, ModelLoadError
from rootstockd.processes.messages import Stage, parse
from rootstockd.processes.output import BURST, LONGEST
from rootstockd.supervision import worker_messages
from rootstockd.worker.engines import EngineInfo

LINE = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO worker "


@pytest.fixture
def hostile_daemon(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[RunningDaemon]:
    catalogue = tmp_path / "more.toml"
    catalogue.write_text('[hostile]\nfamily = "ase"\narguments = { calculator = "hostile:Hostile" }\n')
    monkeypatch.setenv("PYTHONPATH", str(Path(hostile.__file__).parent), prepend=os.pathsep)
    return start_daemon("--catalogue", str(catalogue), "--model", "hostile")


def copper() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.pbc[2] = False
    return atoms


FORGED = "2026-01-01 00:00:00,000 INFO rootstockd.control.api: asked to stop by root (pid 1)"


def test_what_a_worker_says_of_itself_does_not_look_like_the_daemons_words() -> None:
    said = {"properties": ["energy"], "backend": f"fast\n{FORGED}", "note": "\x1b[2J", "heads": ["one\x07"]}
    info = parse(b"R", json.dumps(said).encode())
    assert isinstance(info, EngineInfo)
    assert (info.backend, info.note, info.heads) == (f"fast {FORGED}", "\ufffd[2J", ("one\ufffd",))
    stage = parse(b"P", json.dumps({"stage": "\x1bc\n"}).encode())
    assert isinstance(stage, Stage) and stage.stage == "\ufffdc "


def test_an_error_of_a_model_is_no_line_of_the_daemons(
    start_daemon: Callable[..., RunningDaemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forger.py").write_text(f"def forge():\n    raise ValueError('no\\n{FORGED}')\n")
    catalogue = tmp_path / "more.toml"
    catalogue.write_text('[forger]\nfamily = "ase"\narguments = { calculator = "forger:forge" }\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    daemon = start_daemon("--catalogue", str(catalogue))
    with pytest.raises(ModelLoadError), daemon.client().calculator("forger") as calculator:
        calculator.get_property("energy", copper())
    lines = daemon.log.read_text().splitlines()
    assert f"  {FORGED}" in [line.rstrip(".") for line in lines]
    assert not any(line.startswith(FORGED) for line in lines)


def test_warnings_about_the_machine_have_an_end(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(worker_messages, "_warned", set())
    for number in range(2 * worker_messages.MOST_WARNINGS):
        worker_messages.warn_once(f"no {number}")
    assert len(caplog.records) == worker_messages.MOST_WARNINGS


def do(daemon: RunningDaemon, deed: int) -> None:
    atoms = hostile.behave(copper(), deed)
    with daemon.client().calculator("hostile") as atoms.calc:
        atoms.get_forces()


def dropped(log: str) -> int:
    return sum(map(int, re.findall(r"worker hostile \d+: (\d+) lines of it were dropped", log)))


def test_the_last_words_of_a_worker_have_its_name_before_each_line(hostile_daemon: RunningDaemon) -> None:
    pid = hostile_daemon.model("hostile")["pid"]
    with pytest.raises(EvaluationError):
        do(hostile_daemon, hostile.NO_TEXT)
    wait_for(lambda: "can't read caf" in hostile_daemon.log.read_text())  # the answer may be quicker than the pipe
    log = hostile_daemon.log.read_text()
    assert re.search(LINE + rf"hostile {pid}: Traceback \(most recent call last\):$", log, re.MULTILINE)
    assert re.search(LINE + rf"hostile {pid}: ValueError: can't read caf", log, re.MULTILINE)
    with pytest.raises(EvaluationError):
        do(hostile_daemon, hostile.SEGFAULT)
    wait_for(lambda: "the worker of hostile ended" in hostile_daemon.log.read_text())
    log = hostile_daemon.log.read_text()
    assert re.search(LINE + rf"hostile {pid}: Fatal Python error: Segmentation fault$", log, re.MULTILINE)
    assert re.search(LINE + rf'hostile {pid}:   File ".*hostile.py", line \d+ in calculate$', log, re.MULTILINE)
    assert log.index("Fatal Python error") < log.index("the worker of hostile ended")
    assert dropped(log) == 0


def test_a_model_that_prints_without_end_does_not_fill_the_log(hostile_daemon: RunningDaemon) -> None:
    pid = hostile_daemon.model("hostile")["pid"]
    size = hostile_daemon.log.stat().st_size
    for _ in range(3):
        do(hostile_daemon, hostile.CHATTY)
    quiet = copper()
    with hostile_daemon.client().calculator("hostile") as quiet.calc:
        forces = quiet.get_forces()
    quiet.calc = EMT()
    np.testing.assert_allclose(forces, quiet.get_forces(), atol=1e-9)
    assert hostile_daemon.model("hostile")["pid"] == pid
    hostile_daemon.stop()
    log = hostile_daemon.log.read_text()
    assert len(log) - size < 2 * BURST
    assert log.count(f"worker hostile {pid} prints too much") == 1
    assert f"hostile {pid}: \ufffd[2J" + (LONGEST - 4) * "x" + " [...]\n" in log
    shown = len(re.findall(LINE + rf"hostile {pid}: chatter \d+$", log, re.MULTILINE))
    assert 100 < shown < hostile.CHATTER / 10
    assert shown + dropped(log) == pytest.approx(3 * hostile.CHATTER, abs=5)  # long lines were cut or dropped as well


def test_what_a_chatty_worker_dies_of_is_logged_all_the_same(hostile_daemon: RunningDaemon) -> None:
    with pytest.raises(EvaluationError):
        do(hostile_daemon, hostile.TALK_AND_DIE)
    wait_for(lambda: hostile_daemon.model("hostile")["state"] == "ready")
    log = hostile_daemon.log.read_text()
    fatal = re.findall(LINE + r"hostile (\d+): Fatal Python error: Segmentation fault$", log, re.MULTILINE)
    assert fatal
    assert f"hostile {fatal[0]}: chatter {hostile.CHATTER - 1}\n" in log
    assert dropped(log) > hostile.CHATTER / 2
