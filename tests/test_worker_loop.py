"""The worker's loop with an engine of our own: what goes into the slot, and what is kept from a driver."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rootstockd.worker.engines import EngineError, EngineInfo, Result, System, Task
from rootstockd.worker.loop import Loop, is_finite
from rootstockd.worker.slots import Slot
from rootstockd.worker.units import BOHR, HARTREE

FIELDS: dict[str, Any] = {"pbc": [True] * 3, "charge": None, "spin": None, "head": None, "exact": False}
FIELDS |= {"tolerance": None, "session": 0, "stress": False, "energies": False}


@dataclass
class Engine:
    """Answers with `answer`, and keeps what it was asked."""

    answer: Callable[[list[Task]], list[Result]]
    info = EngineInfo(properties=())

    def __post_init__(self) -> None:
        self.asked: list[list[Task]] = []

    def prepare(self, system: System) -> Any:
        if system.numbers[0] == 99:
            raise EngineError("unknown-element", "no such element")
        return system

    def evaluate(self, tasks: list[Task]) -> list[Result]:
        self.asked.append(tasks)
        return self.answer(tasks)


class Daemon:
    """What the daemon is to a worker."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.slots: list[Slot] = []

    def attach(self, natoms: int = 2, frames: int = 1, number: int = 29, **more: Any) -> Slot:
        slot = Slot.create(natoms, frames)
        self.slots.append(slot)
        slot.numbers[:] = number
        slot.cells[:] = 10 * np.eye(3)
        slot.positions[:] = np.arange(3 * natoms).reshape(natoms, 3)
        fields = {"slot": len(self.slots), "natoms": natoms, "frames": frames, **FIELDS, **more}
        self.channel.send(b"A" + json.dumps(fields).encode())
        socket.send_fds(self.channel, [b"M"], [os.dup(slot.fd)])
        return slot

    def evaluate(self, *numbers: int) -> dict[int, str]:
        """The messages of those that failed."""
        self.channel.send(b"E" + b"".join(number.to_bytes(4, "little") for number in numbers))
        failures = {}
        while (message := self.channel.recv(65536))[:1] == b"F":
            fields = json.loads(message[1:])
            failures[fields["slot"]] = fields["message"]
        assert message[:1] == b"E"
        return failures


@contextlib.contextmanager
def worker(engine: Engine) -> Iterator[Daemon]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    thread = threading.Thread(target=Loop(theirs, engine).run)
    thread.start()
    daemon = Daemon(ours)
    try:
        yield daemon
    finally:
        ours.close()
        thread.join()
        theirs.close()
        for slot in daemon.slots:
            slot.close()


def plain(tasks: list[Task], **more: Any) -> list[Result]:
    """Energy: the number of atoms, in Hartree; forces: the positions."""
    return [Result(HARTREE * len(task.positions), task.positions, **more) for task in tasks]


def slot_end(slot: Slot) -> int:
    """Where the first frame's extras begin in the reply."""
    return 12 + 8 * slot.frames + 4 + slot.forces.nbytes + slot.virials.nbytes + 4


def test_units_and_what_is_in_a_task():
    with worker(engine := Engine(plain)) as daemon:
        slot = daemon.attach(frames=2)
        assert daemon.evaluate(1) == {}
        first, second = engine.asked[0]
        assert np.allclose(first.positions, slot.positions[0] * BOHR) and np.allclose(
            second.cell, 10 * BOHR * np.eye(3)
        )
        assert np.allclose(slot.forces, slot.positions * BOHR * BOHR / HARTREE)
        assert np.allclose(slot.energies, 2)


def test_an_engine_may_keep_what_it_was_given():
    with worker(engine := Engine(plain)) as daemon:
        slot = daemon.attach()
        daemon.evaluate(1)
        slot.positions[:] += 1
        daemon.evaluate(1)
        slot.cells[:] *= 2
        daemon.evaluate(1)
    (one,), (two,), (three,) = engine.asked
    assert np.allclose(one.positions + BOHR, two.positions)
    assert one.cell is two.cell
    assert np.allclose(2 * one.cell, three.cell)


def test_extras_say_what_computed_last():
    backends = iter(["a", "a", "", "b"])
    with worker(Engine(lambda tasks: plain(tasks, backend=next(backends)))) as daemon:
        slot = daemon.attach()
        said = []
        for _ in range(4):
            daemon.evaluate(1)
            said.append(bytes(slot.reply[slot_end(slot) :]))
    assert said == [b'{"backend": "a"}', b'{"backend": "a"}', b"", b'{"backend": "b"}']


def test_extras_of_an_earlier_worker_are_replaced():
    with worker(Engine(plain)) as daemon:
        slot = daemon.attach()
        slot.set_extras([b'{"backend": "another"}'])
        daemon.evaluate(1)
        assert bytes(slot.reply[slot_end(slot) :]) == b""


def test_energies_of_atoms_are_told_at_each_step():
    numbers = iter([1.0, 2.0])
    with worker(Engine(lambda tasks: plain(tasks, energies=np.full(2, HARTREE * next(numbers))))) as daemon:
        slot = daemon.attach(energies=True)
        for value in (1.0, 2.0):
            daemon.evaluate(1)
            assert json.loads(bytes(slot.reply[slot_end(slot) :])) == {"energies": [value, value]}


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (Result(float("nan"), np.zeros((2, 3)), np.zeros((3, 3))), "NaN"),
        (Result(0.0, np.full((2, 3), np.inf), np.zeros((3, 3))), "NaN"),
        (Result(0.0, np.zeros((2, 3)), np.full((3, 3), np.nan)), "NaN"),
        (Result(0.0, np.zeros((1, 3)), np.zeros((3, 3))), "shape"),
        (Result(0.0, np.zeros((2, 3))), "no stress"),
    ],
)
def test_what_is_no_result_never_counts_as_one(result, message):
    with worker(Engine(lambda tasks: [result] * len(tasks))) as daemon:
        daemon.attach(stress=True)
        assert message in daemon.evaluate(1)[1]


@pytest.mark.parametrize("given", [[], [Result(0.0, np.zeros((2, 3)))] * 2])
def test_too_few_or_too_many_results_are_a_failure(given):
    with worker(Engine(lambda _: given)) as daemon:
        daemon.attach()
        assert "results for 1 structures" in daemon.evaluate(1)[1]


def test_only_those_that_fail_alone_fail():
    with worker(Engine(plain)) as daemon:
        good, bad = daemon.attach(), daemon.attach()
        daemon.attach(number=99)
        bad.positions[0, 1, 2] = np.nan
        failures = daemon.evaluate(1, 2, 3)
        assert failures == {2: failures[2], 3: "no such element"}
        assert "the position of atom 1 is" in failures[2]
        assert np.allclose(good.energies, 2)


@pytest.mark.parametrize("size", [3, 30_000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_number_that_is_not_finite_is_found(size, value):
    numbers = np.ones((size, 3))
    assert is_finite(numbers)
    numbers[-1, 1] = value
    assert not is_finite(numbers)


def test_enormous_is_finite():
    assert is_finite(np.full((2, 3), 1e200))
