"""Byte streams of both sides in files, good ones and bad ones, each with what must come of it (`../corpus/index.json`).

What fuzzing finds goes there too. `what` says what a file is about; `answers` are the headers that the driver is sent,
with the code of an ERROR, or that the engine's stream has (`of a daemon`, where its engine refuses what the protocol
allows); `structures` how many were evaluated, or came back; `ends`
is `open`, `exit`, or the code of the error that ends the stream.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import select
import socket
from pathlib import Path

import pytest

from conftest import RunningDaemon
from rootstock_client import ipi
from sides import Outcome, play_driver, play_engine, read_driver, read_engine

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
INDEX = json.loads((CORPUS / "index.json").read_text())
ATOMS = 200_000
LIMITS = ipi.Limits(atoms=ATOMS, init=64 * 1024 + 5 * ATOMS, extras=100_000)
"""A daemon's with `--max-atoms`, and extras that make no long files."""
ALL_CUTS = 3000
"""Longer files are cut in bytes only at their ends: each byte is a call, and most are the same."""

drivers = pytest.mark.parametrize("name", [name for name in INDEX if name.startswith("driver/")])
engines = pytest.mark.parametrize("name", [name for name in INDEX if name.startswith("engine/")])


def ways_to_cut(name: str, size: int) -> list[list[int]]:
    """Whole, byte by byte, in pieces of the staging buffer's size, and by chance."""
    rng = random.Random(name)
    each = [cut for cut in range(size) if cut < ALL_CUTS or size - cut < ALL_CUTS]
    pieces = list(range(0, size, 65536))
    return [[], each, pieces, *(sorted(rng.choices(range(size + 1), k=rng.randrange(1, 9))) for _ in range(8))]


def check(name: str, outcome: Outcome) -> None:
    expected = INDEX[name]
    told = {"answers": outcome.answers, "structures": len(outcome.structures), "ends": outcome.ends}
    assert told == {key: expected[key] for key in told}, expected["what"]


def test_every_file_is_in_the_index() -> None:
    assert {str(file.relative_to(CORPUS)) for file in CORPUS.glob("*/*")} == set(INDEX)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # cells whose volume is no double
@drivers
def test_drivers_file(name: str) -> None:
    stream = (CORPUS / name).read_bytes()
    meaning = read_driver(stream, LIMITS)
    check(name, meaning)
    for cuts in ways_to_cut(name, len(stream)):
        for how in ({}, {"fast": False}, {"late": True}):
            assert play_driver(stream, cuts, LIMITS, **how) == meaning


@engines
def test_engines_file(name: str) -> None:
    stream = (CORPUS / name).read_bytes()
    how = {"asked": INDEX[name]["asked"], "natoms": INDEX[name].get("natoms", 2), "batch": INDEX[name].get("batch", 1)}
    meaning = read_engine(stream, LIMITS, **how)
    check(name, meaning)
    for cuts in ways_to_cut(name, len(stream)):
        for fast in (True, False):
            assert play_engine(stream, cuts, LIMITS, fast=fast, **how) == meaning


@pytest.fixture(scope="module")
def corpus_daemon(older_kernel, start_shared_daemon) -> RunningDaemon:
    return start_shared_daemon("--model", "noop", "--max-atoms", str(ATOMS))


def take_answer(data: bytes, results: list[tuple[int, int]]) -> tuple[str, bytes] | None:
    """The next answer of the daemon and what is behind it; None while it has not come in full."""
    word = data[:12].decode().strip()
    size = 12
    if word == "ERROR" and len(data) >= 16:
        size = 16 + int.from_bytes(data[12:16], "little")
        if len(data) >= size:
            return f"ERROR {json.loads(data[16:size])['code']}", data[size:]
    elif word == "FORCEREADY":
        natoms, frames = results[0]
        size += 8 * frames + 4 + 24 * natoms * frames + 72 * frames
        for _ in range(frames):  # extras of each
            size += 4 + int.from_bytes(data[size : size + 4], "little")
        if len(data) >= size:
            results.pop(0)
            return word, data[size:]
    elif len(data) >= 12:
        return word, data[12:]
    return None


def answers_of(sock: socket.socket, expected: Outcome) -> tuple[list[str], bool]:
    """What a daemon answers, and whether it has closed the connection then."""
    answers: list[str] = []
    data, ended, results = b"", False, list(expected.results)
    while not ended:
        all_there = len(answers) >= len(expected.answers) and expected.ends == "open"
        if not select.select([sock], [], [], 0.02 if all_there else 30)[0]:
            break
        try:
            piece = sock.recv(1 << 20)
        except ConnectionResetError:
            piece = b""
        ended, data = not piece, data + piece
        while data and (taken := take_answer(data, results)) is not None:
            answers.append(taken[0])
            data = taken[1]
    assert not data
    return answers, ended


def send(sock: socket.socket, data: bytes) -> None:
    """Send it all; a daemon that has heard enough hangs up."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@drivers
def test_drivers_file_at_a_daemon(corpus_daemon: RunningDaemon, name: str) -> None:
    stream = (CORPUS / name).read_bytes()
    expected = play_driver(stream, limits=LIMITS)
    rng = random.Random(name)
    cuts = sorted(rng.choices(range(len(stream) + 1), k=4))
    for pieces in ([stream], [stream[a:b] for a, b in itertools.pairwise([0, *cuts, len(stream)])]):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(os.fspath(corpus_daemon.socket))
            for piece in pieces:
                send(sock, piece)
            answers, ended = answers_of(sock, expected)
        assert answers == INDEX[name].get("of a daemon", INDEX[name]["answers"])
        assert ended == (INDEX[name]["ends"] != "open")


def test_the_daemon_is_none_the_worse(corpus_daemon: RunningDaemon) -> None:
    """After all files: the same processes, nothing in the queue, no traceback in the log."""
    status = corpus_daemon.client().status()
    assert status["models"][0]["restarts"] == status["models"][0]["waiting"] == 0
    assert "Traceback" not in corpus_daemon.log.read_text()
