"""What workers print: in the daemon's log, with their name before each line, and not without end.

And a log that nobody reads: the daemon does not wait for those who do.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT

import hostile
from conftest import RunningDaemon, wait_for
from rootstock_client import RootstockClient
from rootstock_client.control import request
from rootstock_client.errors import EvaluationError, ModelLoadError
from rootstockd.processes.messages import Stage, parse
from rootstockd.processes.output import BURST, LONGEST
from rootstockd.supervision import worker_messages
from rootstockd.worker.engines import EngineInfo

LOST = r" WARNING rootstockd\.host\.log_output: (\d+) lines were dropped"
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


def reader_and_writer(kind: str) -> tuple[int, int]:
    """Descriptors of something that takes little until somebody reads it; reading does not wait."""
    if kind == "pipe":
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 8192)
    elif kind == "socket":  # as the journal's is
        ours, theirs = socket.socketpair()
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        reader, writer = ours.detach(), theirs.detach()
    else:
        reader, writer = pty.openpty()
    os.set_blocking(reader, False)
    return reader, writer


@pytest.mark.parametrize("kind", ["pipe", "socket", "terminal", "paused terminal"])
def test_nobody_reads_what_the_daemon_says(runtime_folder: Path, kind: str) -> None:
    """Its lines are dropped meanwhile, and it says how many; steps and requests are answered, and it ends when told."""
    address = runtime_folder / f"{kind}.sock"
    reader, writer = reader_and_writer(kind)
    command = [sys.executable, "-m", "rootstockd", "start", "--foreground", "--device", "cpu", "--socket", address]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer)
    os.close(writer)
    said, reloads = b"", 0

    def reload() -> None:
        nonlocal reloads
        request(address, "POST", "/v1/reload", timeout=5)
        reloads += 1

    def heard() -> str:
        nonlocal said
        with contextlib.suppress(OSError):  # there is no more; at the end of what a terminal has it is another error
            while data := os.read(reader, 65536):
                said += data
        return said.decode().replace("\r", "")

    def told_of_it() -> bool:
        reload()
        return bool(re.search(LOST, heard()))

    try:
        wait_for(lambda: process.poll() is None and address.exists())
        atoms = copper()
        with RootstockClient(address).calculator("emt") as atoms.calc, ThreadPoolExecutor(1) as pool:
            atoms.get_forces()
            if kind == "paused terminal":
                os.write(reader, b"\x13")  # Ctrl-S
            for _ in range(240 if kind == "terminal" else 80):  # one that is not paused takes 20 KiB
                reload()
            atoms.rattle(0.01)
            pool.submit(atoms.get_forces).result(5)
            if kind == "paused terminal":
                os.write(reader, b"\x11")  # Ctrl-Q
            heard()
            wait_for(told_of_it)
            lost = sum(int(number) for number in re.findall(LOST, heard()))
            whole = len(re.findall(r"asked to reload by .* \(pid \d+\)$|: reloaded$", heard(), re.MULTILINE))
            assert lost > 50
            assert lost + whole == pytest.approx(2 * reloads, abs=3)  # others may be lost by now
            for _ in range(80):
                reload()
        process.terminate()
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(reader)


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
def test_a_daemon_that_crashes_does_not_wait_for_whoever_reads_why(runtime_folder: Path, kind: str) -> None:
    """It would have its address as long as that, and answer nobody."""
    address = runtime_folder / f"crashing {kind}.sock"
    reader, writer = reader_and_writer(kind)
    command = [sys.executable, "-m", "rootstockd", "start", "--foreground", "--device", "cpu", "--socket", address]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer) as process:
        try:
            wait_for(lambda: process.poll() is None and address.exists())
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x")
            os.set_blocking(writer, True)
            process.send_signal(signal.SIGABRT)  # as systemd's watchdog does
            assert process.wait(10) == -signal.SIGABRT
        finally:
            process.kill()
            os.close(writer)
            os.close(reader)
    for left in (address, address.with_suffix(".control"), address.with_suffix(".lock")):
        left.unlink()
