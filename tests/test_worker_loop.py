"""The worker's loop with an engine of our own: what goes into the slot, and what is kept from a driver."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rootstock_client.errors import ProtocolError
from rootstock_client.extras import read_extras
from rootstockd.worker import loop, memory
from rootstockd.worker.attached import is_finite, is_within
from rootstockd.worker.engines import EngineError, EngineInfo, Result, System, Task
from rootstockd.worker.loop import Loop
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

    def memory(self) -> int | None:
        return None

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
        socket.send_fds(self.channel, [b"M"], [slot.fd])
        return slot

    def evaluate(self, *numbers: int) -> dict[int, str]:
        """The messages of those that failed."""
        self.channel.send(b"E" + b"".join(number.to_bytes(4, "little") for number in numbers))
        failures = {}
        while (message := self.channel.recv(65536))[:1] in {b"F", b"O"}:
            if message == b"O":
                continue
            fields = json.loads(message[1:])
            failures[fields["slot"]] = fields["message"]
        assert message[:1] == b"E"
        return failures


@contextlib.contextmanager
def worker(engine: Engine, fingerprint: str = "") -> Iterator[Daemon]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    running = Loop(theirs, engine, fingerprint)
    thread = threading.Thread(target=running.run)
    thread.start()
    daemon = Daemon(ours)
    try:
        yield daemon
    finally:
        ours.close()
        thread.join()
        theirs.close()
        for slot in [*daemon.slots, *(attached.slot for attached in running._slots.values())]:
            slot.close()  # a worker's go with its process


def plain(tasks: list[Task], **more: Any) -> list[Result]:
    """Energy: the number of atoms, in Hartree; forces: the positions."""
    return [Result(HARTREE * len(task.positions), task.positions, **more) for task in tasks]


def slot_end(slot: Slot) -> int:
    """Where the first frame's extras begin in the reply."""
    return 12 + 8 * slot.frames + 4 + slot.forces.nbytes + slot.virials.nbytes + 4


def test_units_and_what_is_in_a_task():
    """Each frame has its own."""

    def answer(tasks: list[Task]) -> list[Result]:
        return [Result(HARTREE * n, task.positions, n * task.cell) for n, task in enumerate(tasks, 1)]

    with worker(engine := Engine(answer)) as daemon:
        slot = daemon.attach(frames=2, stress=True, charge=-1.0, spin=3.0)
        slot.positions[1] *= -2
        slot.cells[1] += np.arange(9).reshape(3, 3)
        assert daemon.evaluate(1) == {}
        for frame, task in enumerate(engine.asked[0]):
            assert (task.system.charge, task.system.spin) == (-1.0, 3.0)
            assert np.allclose(task.positions, slot.positions[frame] * BOHR)
            assert np.allclose(task.cell, slot.cells[frame] * BOHR)
            assert np.allclose(slot.virials[frame], (frame + 1) * slot.cells[frame] * BOHR / HARTREE)
        assert np.allclose(slot.forces, slot.positions * BOHR * BOHR / HARTREE)
        assert np.allclose(slot.energies, [1, 2])


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


def test_extras_say_the_fingerprint():
    with worker(Engine(lambda tasks: plain(tasks, backend="a")), fingerprint="f") as daemon:
        slot = daemon.attach()
        assert daemon.evaluate(1) == {}
        assert bytes(slot.reply[slot_end(slot) :]) == b'{"backend": "a", "fingerprint": "f"}'


def test_extras_of_an_earlier_worker_are_replaced():
    with worker(Engine(plain)) as daemon:
        slot = daemon.attach()
        slot.set_extras([b'{"backend": "another"}'])
        daemon.evaluate(1)
        assert bytes(slot.reply[slot_end(slot) :]) == b""


def test_energies_of_atoms_are_told_of_each_frame_at_each_step():
    numbers = iter([1.0, 2.0, 3.0, 4.0])

    def answer(tasks: list[Task]) -> list[Result]:
        return [result(energies=np.full(2, HARTREE * next(numbers))) for _ in tasks]

    with worker(Engine(answer)) as daemon:
        slot = daemon.attach(frames=2, energies=True)
        for values in ([1.0, 2.0], [3.0, 4.0]):
            assert daemon.evaluate(1) == {}
            said, texts = bytes(slot.reply[slot_end(slot) - 4 :]), []
            while said:
                size = int.from_bytes(said[:4], "little")
                texts.append(json.loads(said[4 : 4 + size]))
                said = said[4 + size :]
            packed = [base64.b64encode(np.full(2, value).tobytes()).decode() for value in values]
            assert texts == [{"energies": energies} for energies in packed]


def test_energies_of_atoms_are_read_as_they_were_told():
    values = np.array([1 / 3, -1e-300])
    with worker(Engine(lambda _tasks: [result(energies=HARTREE * values)])) as daemon:
        slot = daemon.attach(energies=True)
        assert daemon.evaluate(1) == {}
        text = bytes(slot.reply[slot_end(slot) :])
    assert read_extras(text, 2)[2].tobytes() == (HARTREE * values / HARTREE).tobytes()
    for natoms in (1, 3):
        with pytest.raises(ProtocolError, match=f"without {natoms} per-atom energies"):
            read_extras(text, natoms)
    for wrong in (b'{"energies": [1.0, 2.0]}', b'{"energies": "AA"}', b'{"energies": "?"}', b"{}", b"[]"):
        with pytest.raises(ProtocolError, match="extras"):
            read_extras(wrong, 2)


def test_what_it_has_of_a_gpu_is_told_where_it_has_changed(monkeypatch) -> None:
    """Not more often than once a second."""
    has, now, looked, tell = [0], [0.0], threading.Event(), Loop._tell_memory
    monkeypatch.setattr(Engine, "memory", lambda _engine: has[0])
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Loop, "_tell_memory", lambda running: (tell(running), looked.set()))
    with worker(Engine(plain)) as daemon:
        told = [daemon.channel.recv(65536)]
        daemon.attach()
        for clock, holds in ((1.0, 0), (2.5, 7), (3.0, 9), (4.0, 9), (9.0, 9)):
            now[0], has[0] = clock, holds
            assert daemon.evaluate(1) == {}
            assert looked.wait(20)
            looked.clear()
            with contextlib.suppress(BlockingIOError):
                told.append(daemon.channel.recv(65536, socket.MSG_DONTWAIT))
    assert told == [b'G{"bytes": 0}', b'G{"bytes": 7}', b'G{"bytes": 9}']


class Cuda:
    """What torch's allocator says, as `torch.cuda`: bytes that are in use, at most, and that it has of the GPU."""

    def __init__(self, bound: int = 0) -> None:
        self.used, self.peak, self.has, self.bound, self.emptied = 0, 0, 0, bound, 0

    def evaluate(self, size: int) -> None:
        self.peak = max(self.peak, self.used + size)
        self.has = max(self.has, self.bound + self.used + size)

    is_initialized = staticmethod(lambda: True)

    def memory_reserved(self) -> int:
        return self.has

    def memory_allocated(self) -> int:
        return self.used

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.used

    def empty_cache(self) -> None:
        self.emptied += 1
        self.has = self.used + self.bound


def test_a_gpus_memory_that_no_pass_needs_any_more_is_given_back(monkeypatch) -> None:
    cuda, cache = Cuda(bound=2**30), memory.GpuCache()
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    cuda.used = 2**30
    for _ in range(3):
        cuda.evaluate(2**30)
        cache.trim()
    assert cuda.emptied <= 1, "what passes need stays"
    cuda.evaluate(2**35)
    cache.trim()
    assert cuda.has > 2**35, "one has just needed it"
    for _ in range(5):
        cuda.evaluate(2**30)
        cache.trim()
    assert cuda.emptied <= 2, "what it can't give back is no reason to ask for it again"
    assert cuda.has == 2**30 + 2**30 + 2**30


def test_a_worker_without_work_looks_what_its_gpu_keeps_and_hears_all_the_same(monkeypatch) -> None:
    trimmed = threading.Event()
    monkeypatch.setattr(memory.GpuCache, "trim", lambda _self: trimmed.set())
    monkeypatch.setattr(Engine, "memory", lambda _engine: 5)
    monkeypatch.setattr(loop, "_BETWEEN", 1)
    with worker(Engine(plain)) as daemon:
        assert daemon.channel.recv(65536) == b'G{"bytes": 5}'
        assert trimmed.wait(20)
        # its descriptor may be late
        slot = Slot.create(2, 1)
        slot.numbers[:], slot.cells[:], slot.positions[:] = 29, 10 * np.eye(3), np.arange(6).reshape(2, 3)
        daemon.slots.append(slot)
        fields = {"slot": len(daemon.slots), "natoms": 2, "frames": 1, **FIELDS}
        daemon.channel.send(b"A" + json.dumps(fields).encode())
        time.sleep(1.5)
        socket.send_fds(daemon.channel, [b"M"], [slot.fd])
        assert daemon.evaluate(1) == {}


class Unspeakable(RuntimeError):
    def __str__(self) -> str:
        raise ValueError


def result(
    energy: Any = 1.0, forces: Any = None, virial: Any = None, energies: Any = None, backend: Any = ""
) -> Result:
    """A right one, but for what is given."""
    return Result(
        energy,
        np.zeros((2, 3)) if forces is None else forces,
        np.zeros((3, 3)) if virial is None else virial,
        np.zeros(2) if energies is None else energies,
        backend,
    )


def raising(error: BaseException) -> Callable[[], Any]:
    def answer() -> None:
        raise copy.copy(error)  # one that is kept would keep its traceback, and the slots in it

    return answer


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "energy NaN": (lambda: result(energy=float("nan")), "NaN"),
    "energy infinite": (lambda: result(energy=np.float32(1e38) * np.float32(1e38)), "NaN"),
    "energy of several": (lambda: result(energy=np.zeros(2)), "energy of shape (2,)"),
    "energy complex": (lambda: result(energy=1 + 1j), "energy of shape () and type complex128"),
    "energy a text": (lambda: result(energy="1.0"), "energy"),
    "energy None": (lambda: Result(None, np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(2)), "energy"),  # type: ignore[arg-type]
    "energy a truth": (lambda: result(energy=True), "energy of shape () and type bool"),
    "forces infinite": (lambda: result(forces=np.full((2, 3), np.inf)), "NaN"),
    "forces NaN in one place": (lambda: result(forces=np.array([[0, 0, 0], [0, np.nan, 0]])), "NaN"),
    "forces of one atom": (lambda: result(forces=np.zeros((1, 3))), "forces of shape (1, 3)"),
    "forces that would broadcast": (lambda: result(forces=np.zeros(3)), "forces of shape (3,)"),
    "forces transposed": (lambda: result(forces=np.zeros((3, 2))), "forces of shape (3, 2)"),
    "forces complex": (lambda: result(forces=np.zeros((2, 3), complex)), "type complex128"),
    "forces objects": (lambda: result(forces=np.full((2, 3), None)), "type object"),
    "forces texts": (lambda: result(forces=np.full((2, 3), "1.0")), "forces of shape (2, 3) and type <U3"),
    "forces ragged": (lambda: result(forces=[[0, 0, 0], [0]]), "ValueError"),
    "forces masked": (lambda: result(forces=np.ma.masked_equal(np.ones((2, 3)), 1.0)), "NaN"),
    "forces too large for float64": (lambda: result(forces=np.full((2, 3), np.longdouble("1e400"))), "NaN"),
    "forces too large for float32": (lambda: result(forces=np.full((2, 3), 1e38, np.float32) * np.float32(9)), "NaN"),
    "virial NaN": (lambda: result(virial=np.full((3, 3), np.nan)), "NaN"),
    "virial that would broadcast": (lambda: result(virial=np.zeros(3)), "virial of shape (3,)"),
    "virial of Voigt": (lambda: result(virial=np.zeros(6)), "virial of shape (6,)"),
    "virial a number": (lambda: result(virial=0.0), "virial of shape ()"),
    "virial complex": (lambda: result(virial=np.zeros((3, 3), complex)), "virial"),
    "no virial": (lambda: Result(0.0, np.zeros((2, 3))), "no stress"),
    "energies NaN": (lambda: result(energies=np.array([0, np.nan])), "NaN"),
    "energies too few": (lambda: result(energies=np.zeros(1)), "per-atom energies of shape (1,)"),
    "energies too many": (lambda: result(energies=np.zeros(3)), "per-atom energies of shape (3,)"),
    "energies one number": (lambda: result(energies=0.0), "per-atom energies of shape ()"),
    "no energies": (lambda: Result(0.0, np.zeros((2, 3)), np.zeros((3, 3))), "no per-atom energies"),
    "a backend without end": (lambda: result(backend="x" * 10_000), "do not fit"),
    "a backend that is none": (lambda: result(backend=np.zeros(2)), "engine failed"),
    "None": (lambda: None, "engine failed"),
    "a text": (lambda: "1.0", "engine failed"),
    "SystemExit": (raising(SystemExit(0)), "SystemExit: 0"),
    "KeyboardInterrupt": (raising(KeyboardInterrupt()), "KeyboardInterrupt"),
    "GeneratorExit": (raising(GeneratorExit()), "GeneratorExit"),
    "an error that can't be said": (raising(Unspeakable()), "engine failed: Unspeakable"),
    "an error that says too much": (raising(ValueError("\N{SKULL}" * 100_000)), "ValueError: "),
    "memory": (raising(MemoryError()), "2 atoms do not fit the device's memory."),
    "memory of numpy": (lambda: np.empty((2**50, 3)), "device's memory: Unable to allocate"),
    "memory of torch": (
        raising(RuntimeError("[enforce fail at x.cpp:1] . DefaultCPUAllocator: can't allocate memory: 9 bytes. Error")),
        "2 atoms do not fit the device's memory: DefaultCPUAllocator: can't allocate memory: 9 bytes",
    ),
}


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_result_never_counts_as_one(name: str) -> None:
    """Nor does it harm batch mates, or the next evaluation."""
    answer, message = HOSTILE[name]

    def evaluate(tasks: list[Task]) -> list[Any]:
        return [answer() if task.system.numbers[0] == 13 else result(energy=HARTREE) for task in tasks]

    with worker(Engine(evaluate)) as daemon:
        wanted = {"stress": True, "energies": True}
        mates = [daemon.attach(**wanted), daemon.attach(number=13, **wanted), daemon.attach(**wanted)]
        failures = daemon.evaluate(1, 2, 3)
        assert list(failures) == [2]
        assert message in failures[2]
        assert daemon.evaluate(2) == failures
        assert [mates[0].energies[0], mates[2].energies[0]] == [1.0, 1.0]
        mates[0].energies[:] = 0
        assert daemon.evaluate(1) == {}
        assert mates[0].energies[0] == 1.0


def test_whole_numbers_and_float32_are_numbers():
    forces = np.arange(6).reshape(2, 3)
    given = iter([forces, forces.astype(np.float32), forces.tolist(), forces.astype(">f8"), np.asfortranarray(forces)])
    with worker(Engine(lambda _: [result(np.int64(1), next(given), np.eye(3, dtype=int))])) as daemon:
        slot = daemon.attach(stress=True)
        for _ in range(5):
            slot.forces[:] = 0
            assert daemon.evaluate(1) == {}
            assert np.allclose(slot.forces, forces * BOHR / HARTREE)
            assert np.allclose(slot.virials, np.eye(3) / HARTREE)


def test_a_system_that_can_not_be_prepared_is_one_failure(monkeypatch):
    """Whatever an engine raises there; and it is tried again, at once where memory lacked: it may be there now."""
    engine = Engine(plain)
    errors = iter([ValueError("no"), MemoryError(), MemoryError(), SystemExit(1), MemoryError()])

    def prepare(system: System) -> Any:
        if system.numbers[0] == 13 and (error := next(errors, None)) is not None:
            raise error
        return system

    monkeypatch.setattr(engine, "prepare", prepare)
    with worker(engine) as daemon:
        good, _ = daemon.attach(), daemon.attach(number=13)
        assert "ValueError: no" in daemon.evaluate(2)[2]
        assert "memory" in daemon.evaluate(2)[2]
        assert "SystemExit" in daemon.evaluate(2)[2]
        assert daemon.evaluate(1, 2) == {}
        assert np.allclose(good.energies, 2)


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


@pytest.mark.parametrize("size", [3, 30_000])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 5.0, -5.0, 1e300])
def test_one_number_that_is_too_far_is_found(size, value):
    numbers = np.ones((size, 3))
    assert is_within(numbers, 5.0)
    numbers[-1, 1] = value
    assert not is_within(numbers, 5.0)
    assert is_within(np.full((3, 3), -4.9), 5.0), "though not the sum of their squares"


def test_enormous_is_finite():
    assert is_finite(np.full((2, 3), 1e200))
