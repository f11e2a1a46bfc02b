"""The wire protocol: what any stream means to either role, the engine's state machine, and what others make of it."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import struct
import threading
import tracemalloc
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.socketio import IPIProtocol, SocketClient, SocketServer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from rootstock_client import engine_side, ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.errors import EvaluationError, InvalidInitError, InvalidStructureError, LimitError, ProtocolError
from rootstock_client.shared_memory import Translation
from rootstock_client.stream import STAGING_SIZE, MessageReader
from rootstockd.worker.slots import Slot

LIMITS = ipi.Limits(atoms=20_000, init=200_000, extras=200_000)
TROUBLE = EvaluationError("it did not converge", "look at the structure")


# --- i-PI's words, spelt out here by themselves


def word(name: str) -> bytes:
    return name.encode().ljust(12)


def int32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def init(text: bytes, bead: int = 0) -> bytes:
    return word("INIT") + int32(bead, len(text)) + text


def posdata(cells: np.ndarray, inverses: np.ndarray, positions: np.ndarray) -> bytes:
    """POSDATA as i-PI lays it out; all of (B, ...), lattice vectors as rows."""
    pairs = [cell.T.tobytes() + inverse.T.tobytes() for cell, inverse in zip(cells, inverses, strict=True)]
    natoms = int32(positions.shape[1])
    if len(pairs) == 1:
        return word("POSDATA") + pairs[0] + natoms + positions.tobytes()
    return word("POSDATA") + natoms + b"".join(pairs) + positions.tobytes()


def forceready(energies: np.ndarray, forces: np.ndarray, virials: np.ndarray, extras: list[bytes]) -> bytes:
    texts = b"".join(int32(len(text)) + text for text in extras)
    wire_virials = virials.transpose(0, 2, 1).tobytes()
    return word("FORCEREADY") + energies.tobytes() + int32(forces.shape[1]) + forces.tobytes() + wire_virials + texts


def error(body: bytes) -> bytes:
    return word("ERROR") + int32(len(body)) + body


STATUS, GETFORCE, EXIT = word("STATUS"), word("GETFORCE"), word("EXIT")


def structures(batch: int, natoms: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cells, inverses, positions: any bits, so NaN and infinity too."""
    rng = np.random.default_rng(seed)

    def doubles(*shape: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(8 * int(np.prod(shape))), "<f8").reshape(shape)

    return doubles(batch, 3, 3), doubles(batch, 3, 3), doubles(batch, natoms, 3)


ONE = structures(1, 2, seed=1)
POSDATA = posdata(*ONE)


# --- feeding


def deliver(side: Any, stream: bytes, cuts: list[int], take: Callable[[], None]) -> None:
    """Write a stream as a socket would, cut at `cuts`; `take` takes what has come."""
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        piece = stream[start:end]
        while piece:
            buffer = side.get_buffer(-1)
            if not buffer:
                assert side.full
                take()
                assert not side.full
                continue
            size = min(len(buffer), len(piece))
            buffer[:size] = piece[:size]
            side.received(size)
            piece = piece[size:]
            take()


class Owner:
    """What the daemon is to the engine's side, with a record of what it was told.

    `verdicts` has the batch size of each INIT, or an error to refuse it with. With `late` an evaluation ends only when
    nothing else can go on.
    """

    def __init__(self, verdicts: list[Any], *, late: bool = False, limits: ipi.Limits = LIMITS) -> None:
        self.side = engine_side.EngineSide(self.place, limits)
        self.verdicts = list(verdicts)
        self.late = late
        self.events: list[tuple[Any, ...]] = []
        self.memory = bytearray()

    def place(self, natoms: int) -> memoryview:
        self.memory = bytearray(24 * natoms * self.side.batch_size)
        return memoryview(self.memory)

    def take(self) -> None:
        while True:
            while (event := self.side.next_event()) is not None:
                self.handle(event)
            if not (self.late and self.side.busy):
                return
            self.side.finish()

    def handle(self, event: engine_side.Event) -> None:
        match event:
            case ipi.Init(text):
                self.events.append(("init", text))
                verdict = self.verdicts.pop(0)
                if isinstance(verdict, int):
                    self.side.accept(verdict, announced=True)
                else:
                    self.side.refuse(verdict, announced=True)
            case engine_side.Evaluate(cells):
                self.events.append(("evaluate", ipi.read_cells(cells).tobytes(), bytes(self.memory)))
                if not self.late:
                    self.side.finish()
            case engine_side.Send(data):
                self.events.append(("send", data))
            case engine_side.SendResult():
                self.events.append(("result",))
            case engine_side.Close(why):
                self.events.append(("close", why))


# --- any stream, cut anywhere, means the same

natoms_of_any_size = st.one_of(st.integers(0, 4), st.integers(0, 4), st.sampled_from([2729, 2730, 2731, 6000]))
seeds = st.integers(0, 2**32)


@dataclass
class Script:
    """A stream, what its owner says to it, and what it means."""

    plan: list[tuple[Any, ...]]
    """The one thing that is shown when a test fails: the others may be very long."""
    stream: bytes = field(repr=False)
    said: list[Any] = field(repr=False)
    meaning: list[Any] = field(repr=False)
    batch: int = 1


@st.composite
def driver_scripts(draw: st.DrawFn) -> Script:
    """What a driver may say, and the verdicts on its INITs."""
    plan: list[tuple[Any, ...]] = []
    stream = STATUS
    events: list[tuple[Any, ...]] = [("send", word("NEEDINIT"))]
    verdicts: list[Any] = []
    for _ in range(draw(st.integers(1, 3))):
        text, bead = draw(st.binary(max_size=50)), draw(st.integers(-(2**31), 2**31 - 1))
        text *= draw(st.sampled_from([1, 1, 1, 3000]))
        stream += init(text, bead)
        events.append(("init", text))
        refused = draw(st.integers(0, 4)) == 0
        batch = draw(st.sampled_from([1, 1, 2, 3]))
        verdicts.append(TROUBLE if refused else batch)
        batch = 1 if refused else batch
        state = "NEEDINIT" if refused else "READY"
        plan.append(("INIT", len(text), "refused" if refused else batch))
        for what in draw(st.lists(st.sampled_from(["STATUS", "POSDATA", "step", "step"]), max_size=5)):
            if what == "STATUS":
                stream += STATUS
                events.append(("send", word(state)))
                plan.append((what,))
                continue
            natoms, seed = draw(natoms_of_any_size), draw(seeds)
            plan.append((what, natoms, seed))
            cells, inverses, positions = structures(batch, natoms, seed)
            stream += posdata(cells, inverses, positions)
            if not refused:
                events.append(("evaluate", cells.tobytes(), positions.tobytes()))
                state = "HAVEDATA"
            if what == "step":
                stream += GETFORCE
                events.append(("send", error(TROUBLE.to_json())) if refused else ("result",))
                state = state if refused else "READY"
    if draw(st.booleans()):
        stream += EXIT
        events.append(("close", None))
    return Script(plan, stream, verdicts, events)


@settings(max_examples=150)
@given(script=driver_scripts(), cuts=st.lists(st.floats(0, 1), max_size=20), late=st.booleans())
def test_a_driver_means_the_same_wherever_it_is_cut(script, cuts, late):
    owner = Owner(script.said, late=late)
    deliver(owner.side, script.stream, [round(cut * len(script.stream)) for cut in cuts], owner.take)
    assert [event[0] for event in owner.events] == [event[0] for event in script.meaning]
    assert owner.events == script.meaning


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_driver_byte_by_byte(batch, late):
    cells, inverses, positions = structures(batch, 3, seed=7)
    stream = STATUS + init(b"text", 5) + STATUS + posdata(cells, inverses, positions) + STATUS + GETFORCE + EXIT
    owner = Owner([batch], late=late)
    deliver(owner.side, stream, list(range(len(stream))), owner.take)
    assert owner.events == [
        ("send", word("NEEDINIT")),
        ("init", b"text"),
        ("send", word("READY")),
        ("evaluate", cells.tobytes(), positions.tobytes()),
        ("send", word("HAVEDATA")),
        ("result",),
        ("close", None),
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_many_positions_go_straight_from_the_socket_to_their_place(batch):
    """What follows a long POSDATA's head is received where `place` said, with no copy between."""
    cells, inverses, positions = structures(batch, 9000, seed=3)
    owner = Owner([batch])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        stream = init(b"") + posdata(cells, inverses, positions) + GETFORCE
        sender = threading.Thread(target=theirs.sendall, args=(stream,))
        sender.start()
        straight = 0
        while ("result",) not in owner.events:
            buffer = owner.side.get_buffer(-1)
            size = ours.recv_into(buffer)
            straight += size if buffer.obj is owner.memory else 0
            owner.side.received(size)
            owner.take()
        sender.join()
    assert owner.events[1] == ("evaluate", cells.tobytes(), positions.tobytes())
    assert straight >= positions.nbytes - STAGING_SIZE


def test_the_daemon_stops_reading_a_driver_that_runs_ahead():
    """`full` while an evaluation is under way, and all of it in order afterwards."""
    owner = Owner([1])
    steps = 1000
    stream = init(b"") + steps * (POSDATA + GETFORCE)
    fed = 0
    while not owner.side.full:
        buffer = owner.side.get_buffer()
        size = min(len(buffer), len(stream) - fed)
        buffer[:size] = stream[fed : fed + size]
        owner.side.received(size)
        fed += size
        while (event := owner.side.next_event()) is not None:
            if isinstance(event, ipi.Init):
                owner.side.accept()
            else:
                assert isinstance(event, engine_side.Evaluate)
    assert fed < len(stream)
    assert owner.side.busy
    owner.side.finish()
    owner.take()
    deliver(owner.side, stream[fed:], [], owner.take)
    assert [event[0] for event in owner.events] == ["result", *(["evaluate", "result"] * (steps - 1))]


def test_positions_under_evaluation_are_not_overwritten():
    """A driver that sends POSDATA twice does not change what the worker is looking at."""
    place = bytearray(48)
    side = engine_side.EngineSide(lambda _: memoryview(place))
    first, second = structures(1, 2, seed=10), structures(1, 2, seed=11)
    feed(side, init(b""))
    side.next_event()
    side.accept()
    feed(side, posdata(*first) + posdata(*second))
    assert isinstance(side.next_event(), engine_side.Evaluate)
    assert side.next_event() is None
    assert place == first[2].tobytes()
    side.finish()
    event = side.next_event()
    assert isinstance(event, engine_side.Evaluate)
    assert ipi.read_cells(event.cells).tobytes() == second[0].tobytes()
    assert place == second[2].tobytes()


@st.composite
def engine_scripts(draw: st.DrawFn) -> Script:
    """What an engine may say, and what it was asked."""
    batch = draw(st.sampled_from([1, 1, 2, 3]))
    plan: list[tuple[Any, ...]] = []
    stream, asked, meaning = b"", [], []
    for _ in range(draw(st.integers(0, 6))):
        what = draw(st.sampled_from(["STATUS", "FORCEREADY", "FORCEREADY", "ERROR"]))
        asked.append(STATUS if what == "STATUS" else GETFORCE)
        if what == "STATUS":
            answer = word(draw(st.sampled_from(["NEEDINIT", "READY", "HAVEDATA"])))
            meaning.append(("status", answer))
        elif what == "ERROR":
            message, hint = draw(st.text(max_size=20)), draw(st.text(max_size=20))
            why = EvaluationError(message, hint)
            answer = error(why.to_json())
            meaning.append(("failure", EvaluationError, message, hint))
        else:
            natoms, seed = draw(natoms_of_any_size), draw(seeds)
            plan.append((what, natoms, seed))
            virials, _, forces = structures(batch, natoms, seed)
            energies = structures(batch, 1, draw(seeds))[2][:, 0, 0].copy()
            extras = [draw(st.binary(max_size=30)) * draw(st.sampled_from([1, 1, 5000])) for _ in range(batch)]
            answer = forceready(energies, forces, virials, extras)
            meaning.append(("result", energies.tobytes(), forces.shape[1], forces.tobytes(), virials.tobytes(), extras))
        stream += answer
        plan.append((what, len(answer)))
    return Script(plan, stream, asked, meaning, batch)


class Asker:
    """What a client is to the driver's side, with a record of the answers."""

    def __init__(self, batch: int = 1, limits: ipi.Limits = LIMITS) -> None:
        self.side = DriverSide(self.place, batch, limits)
        self.answers: list[Any] = []
        self.memory = bytearray()

    def place(self, natoms: int) -> memoryview:
        self.memory = bytearray(24 * natoms * self.side.batch_size)
        return memoryview(self.memory)

    def take(self) -> None:
        while (message := self.side.next_message()) is not None:
            match message:
                case ipi.StatusReply(state):
                    self.answers.append(("status", state))
                case ipi.Failure(why):
                    self.answers.append(("failure", type(why), why.message, why.hint))
                case ipi.ForceReady(energies, natoms, virials, extras):
                    forces = bytes(self.memory)
                    self.answers.append(("result", energies.tobytes(), natoms, forces, virials.tobytes(), extras))


@settings(max_examples=150)
@given(script=engine_scripts(), cuts=st.lists(st.floats(0, 1), max_size=20))
def test_an_engine_means_the_same_wherever_it_is_cut(script, cuts):
    asker = Asker(script.batch)
    for request in script.said:
        asker.side.expect(request)
    deliver(asker.side, script.stream, [round(cut * len(script.stream)) for cut in cuts], asker.take)
    assert [answer[0] for answer in asker.answers] == [answer[0] for answer in script.meaning]
    assert asker.answers == script.meaning


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_an_engine_byte_by_byte(batch):
    virials, _, forces = structures(batch, 3, seed=5)
    energies = np.arange(float(batch))
    extras = [b"x" * n for n in range(batch)]
    stream = word("READY") + forceready(energies, forces, virials, extras) + error(TROUBLE.to_json())
    asker = Asker(batch)
    for request in (STATUS, GETFORCE, GETFORCE):
        asker.side.expect(request)
    deliver(asker.side, stream, list(range(len(stream))), asker.take)
    assert asker.answers == [
        ("status", word("READY")),
        ("result", energies.tobytes(), 3, forces.tobytes(), virials.tobytes(), extras),
        ("failure", EvaluationError, TROUBLE.message, TROUBLE.hint),
    ]


def test_a_refused_batch_is_read_in_the_layout_it_was_announced_in():
    side = engine_side.EngineSide(lambda _: pytest.fail("positions of a refused system have no place"))
    feed(side, init(b""))
    assert isinstance(side.next_event(), ipi.Init)
    side.refuse(TROUBLE, 2, announced=True)
    feed(side, posdata(*structures(2, 3, seed=1)) + GETFORCE + STATUS)
    assert side.next_event() == DROPPED
    assert side.next_event() == engine_side.Send(error(TROUBLE.to_json()))
    assert side.next_event() == engine_side.Send(word("NEEDINIT"))


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        ([], word("READY")),
        ([], error(TROUBLE.to_json())),
        ([GETFORCE], word("READY")),
        ([STATUS], error(TROUBLE.to_json())),
        ([STATUS], forceready(np.zeros(1), np.zeros((1, 0, 3)), np.zeros((1, 3, 3)), [b""])),
    ],
)
def test_an_answer_to_another_question_is_refused(asked, answer):
    asker = Asker()
    for request in asked:
        asker.side.expect(request)
    with pytest.raises(ProtocolError, match="an answer of"):
        deliver(asker.side, answer, [], asker.take)


def test_forces_that_the_client_has_no_room_for_are_refused():
    def no_room(natoms: int) -> memoryview:
        raise InvalidStructureError(f"{natoms} atoms")

    side = DriverSide(no_room)
    side.expect(GETFORCE)
    feed(side, forceready(np.zeros(1), np.zeros((1, 7, 3)), np.zeros((1, 3, 3)), [b""]))
    with pytest.raises(ProtocolError, match="7 atoms"):
        side.next_message()


# --- what has come whole is read without the grammar, and means what it means with it


@settings(max_examples=100)
@given(script=driver_scripts(), cuts=st.lists(st.floats(0, 1), max_size=6), late=st.booleans())
def test_a_driver_means_the_same_without_the_short_way(script, cuts, late):
    edges = [round(cut * len(script.stream)) for cut in cuts]
    owners = [Owner(script.said, late=late), Owner(script.said, late=late)]
    deliver(owners[0].side, script.stream, edges, owners[0].take)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_side.EngineSide, "_whole", lambda _: None)
        deliver(owners[1].side, script.stream, edges, owners[1].take)
    assert owners[0].events == owners[1].events


@settings(max_examples=100)
@given(script=engine_scripts(), cuts=st.lists(st.floats(0, 1), max_size=6))
def test_an_engine_means_the_same_without_the_short_way(script, cuts):
    edges = [round(cut * len(script.stream)) for cut in cuts]
    askers = [Asker(script.batch), Asker(script.batch)]
    for asker in askers:
        for request in script.said:
            asker.side.expect(request)
    deliver(askers[0].side, script.stream, edges, askers[0].take)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DriverSide, "_whole", lambda _: None)
        deliver(askers[1].side, script.stream, edges, askers[1].take)
    assert askers[0].answers == askers[1].answers


def test_a_step_that_has_come_whole_needs_no_grammar(monkeypatch):
    owner, asker = Owner([1]), Asker()
    deliver(owner.side, init(b""), [], owner.take)
    monkeypatch.setattr(MessageReader, "next_message", lambda _: pytest.fail("the grammar was asked"))
    feed(owner.side, POSDATA + GETFORCE)
    owner.take()
    assert [event[0] for event in owner.events] == ["init", "evaluate", "result"]
    asker.side.expect(GETFORCE)
    feed(asker.side, forceready(np.ones(1), np.ones((1, 2, 3)), np.ones((1, 3, 3)), [b"{}"]))
    assert asker.side.next_message().extras == [b"{}"]


@pytest.mark.parametrize("size", range(12))
def test_what_an_earlier_step_left_in_memory_counts_for_nothing(size):
    """Where the staging buffer is used again, the bytes behind the last that came are those of before."""
    owner = Owner([1])
    deliver(owner.side, init(b""), [], owner.take)
    feed(owner.side, POSDATA + GETFORCE)
    owner.take()
    feed(owner.side, POSDATA + GETFORCE[:size])
    owner.take()
    assert [event[0] for event in owner.events[3:]] == ["evaluate"]
    feed(owner.side, GETFORCE[size:])
    owner.take()
    assert [event[0] for event in owner.events[3:]] == ["evaluate", "result"]


def test_what_comes_for_a_side_that_is_closed_is_lost():
    side = engine_in("ready")
    side.close()
    assert len(side.get_buffer(-1)) > 0
    assert side.next_event() is None
    assert not side.full


# --- what we write is what i-PI writes


def test_our_frames_are_laid_out_as_i_pi_lays_them_out():
    cells, inverses, positions = structures(1, 4, seed=2)
    ours = ipi.posdata_head(cells[0], inverses[0], 4)
    assert ours + positions.tobytes() == posdata(cells, inverses, positions)
    assert ipi.init_frame(b"abc") == init(b"abc")
    assert ipi.error_frame(TROUBLE) == error(TROUBLE.to_json())


# --- no bytes do harm


def swallow(side: Any, stream: bytes, take: Callable[[], None]) -> None:
    """Anything but acceptance and being refused goes through to the test."""
    with contextlib.suppress(ProtocolError, LimitError):
        deliver(side, stream, [], take)


small = ipi.Limits(atoms=50, init=200, extras=200)
snippets = st.sampled_from([STATUS, GETFORCE, EXIT, word("INIT"), word("POSDATA"), init(b"text"), POSDATA])
answers = st.sampled_from(
    [
        *map(word, ("NEEDINIT", "READY", "HAVEDATA", "FORCEREADY", "ERROR")),
        error(TROUBLE.to_json()),
        error(b"{}"),
        error(b'{"code": 1, "message": [], "hint": null}'),
        error(b"\xff\xfe"),
        forceready(np.ones(1), np.ones((1, 2, 3)), np.ones((1, 3, 3)), [b"{}"]),
    ]
)


def mutated(pieces: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """A stream of pieces, some of its bytes replaced, put in or left out."""

    def mutate(parts: list[bytes], changes: list[tuple[float, int, bytes]]) -> bytes:
        stream = b"".join(parts)
        for where, left_out, put_in in changes:
            at = int(where * len(stream))
            stream = stream[:at] + put_in + stream[at + left_out :]
        return stream

    changes = st.tuples(st.floats(0, 1), st.integers(0, 8), st.one_of(st.binary(max_size=8), st.just(b"\xff" * 4)))
    return st.builds(mutate, st.lists(st.one_of(pieces, st.binary(max_size=20)), max_size=8), st.lists(changes))


@settings(max_examples=300)
@given(stream=mutated(snippets), batch=st.sampled_from([1, 2]), refuse=st.booleans(), fussy=st.booleans())
def test_no_driver_does_harm(stream, batch, refuse, fussy):
    owner = Owner([TROUBLE if refuse else batch] * 100, late=True, limits=small)
    if fussy:
        owner.place = only_two_atoms  # type: ignore[method-assign]
        owner.side._place = only_two_atoms
    swallow(owner.side, stream, owner.take)


def only_two_atoms(natoms: int) -> memoryview:
    if natoms != 2:
        raise InvalidStructureError(f"{natoms} atoms", "send 2")
    return memoryview(bytearray(96))[:48]


@settings(max_examples=300)
@given(stream=mutated(answers), batch=st.sampled_from([1, 2]), asked=st.lists(st.sampled_from([STATUS, GETFORCE])))
def test_no_engine_does_harm(stream, batch, asked):
    asker = Asker(batch, small)
    for request in asked:
        asker.side.expect(request)
    swallow(asker.side, stream, asker.take)


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 50_000, b"9" * 10_000, b"\xed\xa0\x80", b"", b"null", b"[]"]
)
def test_an_error_frame_of_nonsense_is_a_protocol_error(body):
    asker = Asker()
    asker.side.expect(GETFORCE)
    with pytest.raises(ProtocolError):
        deliver(asker.side, error(body), [], asker.take)


@pytest.mark.parametrize("wrong", [b"no such word", word("INIT") + int32(0, -1)])
def test_a_side_that_found_an_error_finds_nothing_else(wrong):
    """Whatever the daemon still does with it, it does not come upon the end of the grammar."""
    side = engine_in("busy")
    feed(side, wrong + STATUS)
    assert side.next_event() is None
    side.fail(TROUBLE)
    with pytest.raises(ProtocolError):
        side.next_event()
    side.fail(TROUBLE)
    feed(side, STATUS)
    assert side.next_event() is None
    assert not side.busy


# --- limits

TOO_MANY = [-1, -(2**31), 2**31 - 1]


def feed(side: Any, stream: bytes) -> None:
    """All of a short stream at once."""
    buffer = side.get_buffer(-1)
    buffer[: len(stream)] = stream
    side.received(len(stream))


@pytest.mark.parametrize("size", [*TOO_MANY, LIMITS.init + 1])
def test_an_init_beyond_the_limit_is_refused(size):
    owner = Owner([])
    feed(owner.side, word("INIT") + int32(0, size))
    negative = size < 0
    words = "bytes of INIT; the limit is 200000" if negative else "takes 200000, for systems of up to 20000 atoms"
    with pytest.raises(ProtocolError if negative else LimitError, match=words):
        owner.side.next_event()


@pytest.mark.parametrize(("batch", "atoms"), [(1, 20_000), (3, 6666)])
@pytest.mark.parametrize("too_many", [*TOO_MANY, None])
def test_a_posdata_beyond_the_limit_is_refused_before_there_is_room_for_it(batch, atoms, too_many):
    """`atoms` is the most that passes: the limit holds for the whole batch."""
    natoms = atoms + 1 if too_many is None else too_many
    placed = []

    def place(count: int) -> memoryview:
        placed.append(count)
        return memoryview(bytearray(24 * count * batch))

    def begin() -> engine_side.EngineSide:
        side = engine_side.EngineSide(place, LIMITS)
        feed(side, init(b""))
        side.next_event()
        side.accept(batch)
        return side

    def head(count: int) -> bytes:
        pairs = bytes(144 * batch)
        return word("POSDATA") + (pairs + int32(count) if batch == 1 else int32(count) + pairs)

    side = begin()
    feed(side, head(natoms))
    with pytest.raises(ProtocolError, match=r"atoms.*the limit is"):
        side.next_event()
    assert placed == []
    side = begin()
    feed(side, head(atoms))
    assert side.next_event() is None
    assert placed == [atoms]


@pytest.mark.parametrize("natoms", [*TOO_MANY, LIMITS.atoms + 1])
def test_a_forceready_beyond_the_limit_is_refused_before_there_is_room_for_it(natoms):
    asker = Asker()
    asker.side.place = lambda count: pytest.fail(f"room was taken for {count} atoms")
    asker.side.expect(GETFORCE)
    feed(asker.side, word("FORCEREADY") + bytes(8) + int32(natoms))
    with pytest.raises(ProtocolError, match="atoms; the limit is 20000"):
        asker.side.next_message()


@pytest.mark.parametrize("size", [*TOO_MANY, LIMITS.extras + 1])
@pytest.mark.parametrize("head", [word("ERROR"), forceready(np.ones(1), np.ones((1, 0, 3)), np.ones((1, 3, 3)), [])])
def test_texts_of_an_engine_beyond_the_limit_are_refused(head, size):
    asker = Asker()
    asker.side.expect(GETFORCE)
    feed(asker.side, head + int32(size))
    with pytest.raises(ProtocolError, match="the limit is 200000"):
        asker.side.next_message()


@pytest.mark.parametrize("frame", ["INIT", "ERROR", "extras", "POSDATA"])
def test_a_declared_length_takes_no_memory(frame):
    """Only bytes do. The positions' place is the owner's, and a system that was refused has none."""
    limits = ipi.Limits()
    side: Any = engine_side.EngineSide(only_two_atoms, limits)
    take = side.next_event
    match frame:
        case "INIT":
            stream = word("INIT") + int32(0, limits.init)
        case "POSDATA":
            feed(side, init(b""))
            side.next_event()
            side.accept()
            stream = word("POSDATA") + bytes(144) + int32(limits.atoms)
        case _:
            side = DriverSide(only_two_atoms, limits=limits)
            side.expect(GETFORCE)
            take = side.next_message
            empty = forceready(np.ones(1), np.ones((1, 2, 3)), np.ones((1, 3, 3)), [])
            stream = (word("ERROR") if frame == "ERROR" else empty) + int32(limits.extras)
    tracemalloc.start()
    try:
        feed(side, stream)
        assert take() is None
        feed(side, bytes(1000))
        assert take() is None
        assert tracemalloc.get_traced_memory()[1] < STAGING_SIZE
    finally:
        tracemalloc.stop()


# --- the engine's states


def engine_in(state: str) -> engine_side.EngineSide:
    """An engine whose driver is one of ours, in a state."""
    side = engine_side.EngineSide(only_two_atoms)
    if state == "new":
        return side
    feed(side, init(b"{}"))
    assert isinstance(side.next_event(), ipi.Init)
    if state == "refused":
        side.refuse(TROUBLE, announced=True)
    else:
        side.accept(announced=True)
    if state in ("busy", "havedata", "failed"):
        feed(side, POSDATA)
        assert isinstance(side.next_event(), engine_side.Evaluate)
        assert side.busy
    if state == "havedata":
        side.finish()
    elif state == "failed":
        side.fail(TROUBLE)
    elif state == "misfit":
        feed(side, posdata(*structures(1, 5, seed=1)))
        assert side.next_event() == DROPPED
    elif state == "closed":
        feed(side, EXIT)
        assert side.next_event() == engine_side.Close(None)
    return side


NOTHING, HELD, WRONG, CLOSED = "nothing", "held", "wrong", "closed"
NEEDINIT, READY, HAVEDATA = map(word, ("NEEDINIT", "READY", "HAVEDATA"))
MESSAGES = {"STATUS": STATUS, "INIT": init(b"{}"), "POSDATA": POSDATA, "GETFORCE": GETFORCE, "EXIT": EXIT}
MESSAGES["MISFIT"] = posdata(*structures(1, 3, seed=1))
OPENED, DROPPED = ipi.Init(b"{}"), engine_side.Dropped()

TABLE: dict[str, dict[str, tuple[Any, Any]]] = {
    # state: message: (what the owner is told, what a STATUS is answered afterwards)
    "new": {
        "STATUS": (engine_side.Send(NEEDINIT), NEEDINIT),
        "INIT": (OPENED, READY),
        "POSDATA": (WRONG, None),
        "MISFIT": (WRONG, None),
        "GETFORCE": (WRONG, None),
        "EXIT": (engine_side.Close(None), CLOSED),
    },
    "refused": {
        "STATUS": (engine_side.Send(NEEDINIT), NEEDINIT),
        "INIT": (OPENED, READY),
        "POSDATA": (DROPPED, NEEDINIT),
        "MISFIT": (DROPPED, NEEDINIT),
        "GETFORCE": (engine_side.Send(error(TROUBLE.to_json())), NEEDINIT),
        "EXIT": (engine_side.Close(None), CLOSED),
    },
    "ready": {
        "STATUS": (engine_side.Send(READY), READY),
        "INIT": (OPENED, READY),
        "POSDATA": (engine_side.Evaluate, HAVEDATA),
        "MISFIT": (DROPPED, HAVEDATA),
        "GETFORCE": (WRONG, None),
        "EXIT": (engine_side.Close(None), CLOSED),
    },
    "busy": {
        "STATUS": (HELD, HAVEDATA),
        "INIT": (HELD, READY),
        "POSDATA": (HELD, HAVEDATA),
        "MISFIT": (HELD, HAVEDATA),
        "GETFORCE": (HELD, READY),
        "EXIT": (HELD, CLOSED),
    },
    "havedata": {
        "STATUS": (engine_side.Send(HAVEDATA), HAVEDATA),
        "INIT": (OPENED, READY),
        "POSDATA": (engine_side.Evaluate, HAVEDATA),
        "MISFIT": (DROPPED, HAVEDATA),
        "GETFORCE": (engine_side.SendResult(), READY),
        "EXIT": (engine_side.Close(None), CLOSED),
    },
    "failed": {
        "STATUS": (engine_side.Send(HAVEDATA), HAVEDATA),
        "INIT": (OPENED, READY),
        "POSDATA": (engine_side.Evaluate, HAVEDATA),
        "MISFIT": (DROPPED, HAVEDATA),
        "GETFORCE": (engine_side.Send(error(TROUBLE.to_json())), READY),
        "EXIT": (engine_side.Close(None), CLOSED),
    },
    "closed": dict.fromkeys(MESSAGES, (NOTHING, CLOSED)),
}
TABLE["misfit"] = {
    **TABLE["failed"],
    "GETFORCE": (engine_side.Send(error(InvalidStructureError("5 atoms", "send 2").to_json())), READY),
}


def settle(side: engine_side.EngineSide, event: engine_side.Event | None) -> None:
    """Do as a daemon would."""
    if isinstance(event, ipi.Init):
        side.accept(announced=True)
    elif isinstance(event, engine_side.Evaluate):
        side.finish()


@pytest.mark.parametrize(("state", "message"), [(state, message) for state in TABLE for message in MESSAGES])
def test_every_message_in_every_state(state, message):
    told, afterwards = TABLE[state][message]
    side = engine_in(state)
    feed(side, MESSAGES[message])
    if told == WRONG:
        with pytest.raises(ProtocolError):
            side.next_event()
        return
    event = side.next_event()
    if told == HELD:
        assert event is None
        assert side.busy
        side.finish()
        from_having_data = TABLE["havedata"][message][0]
        event = side.next_event()
        told = from_having_data
    if told is engine_side.Evaluate:
        assert isinstance(event, engine_side.Evaluate)
        assert ipi.read_cells(event.cells).tobytes() == ONE[0].tobytes()
        assert side.busy
    else:
        assert event == (None if told == NOTHING else told)
    settle(side, event)
    assert side.next_event() is None
    feed(side, STATUS)
    assert side.next_event() == (None if afterwards == CLOSED else engine_side.Send(afterwards))
    assert side.next_event() is None


@pytest.mark.parametrize("state", ["new", "refused", "ready", "havedata", "failed", "closed"])
def test_the_end_of_an_evaluation_that_nobody_began_changes_nothing(state):
    for end in (engine_side.EngineSide.finish, lambda side: side.fail(EvaluationError("another"))):
        side = engine_in(state)
        end(side)
        told, _ = TABLE[state]["STATUS"]
        feed(side, STATUS)
        assert side.next_event() == (None if told == NOTHING else told)


def test_a_refused_init_is_answered_once_at_each_getforce():
    """With or without POSDATA before it, and nothing is evaluated, until an INIT is accepted."""
    side = engine_side.EngineSide(only_two_atoms)
    feed(side, init(b"bad") + POSDATA + GETFORCE + GETFORCE + POSDATA + STATUS + init(b"good") + POSDATA + GETFORCE)
    assert side.next_event() == ipi.Init(b"bad")
    side.refuse(TROUBLE, announced=True)
    no = engine_side.Send(error(TROUBLE.to_json()))
    assert [side.next_event() for _ in range(5)] == [DROPPED, no, no, DROPPED, engine_side.Send(NEEDINIT)]
    assert side.next_event() == ipi.Init(b"good")
    side.accept(announced=True)
    assert isinstance(side.next_event(), engine_side.Evaluate)
    side.finish()
    assert [side.next_event(), side.next_event()] == [engine_side.SendResult(), None]


def test_what_comes_behind_an_init_waits_until_it_is_answered():
    """As long as its owner likes: it may have others to look after before."""
    side = engine_in("havedata")
    feed(side, init(b"{}") + STATUS)
    assert side.next_event() == OPENED
    assert [side.next_event() for _ in range(3)] == [None] * 3
    feed(side, GETFORCE)
    assert side.next_event() is None
    side.refuse(TROUBLE, announced=True)
    said = [engine_side.Send(NEEDINIT), engine_side.Send(error(TROUBLE.to_json())), None]
    assert [side.next_event() for _ in range(3)] == said


def test_a_failure_that_nobody_asked_for_is_forgotten():
    side = engine_in("failed")
    feed(side, POSDATA + GETFORCE)
    assert isinstance(side.next_event(), engine_side.Evaluate)
    side.finish()
    assert side.next_event() == engine_side.SendResult()


def test_a_later_refusal_replaces_the_earlier():
    side = engine_in("refused")
    other = InvalidInitError("worse")
    feed(side, init(b"worse") + GETFORCE)
    side.next_event()
    side.refuse(other, announced=True)
    assert side.next_event() == engine_side.Send(error(other.to_json()))


def test_a_system_that_is_refused_ends_the_one_before():
    side = engine_in("havedata")
    feed(side, init(b"bad") + STATUS + GETFORCE)
    side.next_event()
    side.refuse(TROUBLE, announced=True)
    assert [side.next_event(), side.next_event()] == [
        engine_side.Send(NEEDINIT),
        engine_side.Send(error(TROUBLE.to_json())),
    ]


def test_a_stock_driver_whose_init_is_refused_is_hung_up_on():
    side = engine_side.EngineSide(only_two_atoms)
    feed(side, init(b"\0") + STATUS)
    side.next_event()
    side.refuse(TROUBLE)
    assert side.next_event() == engine_side.Close(TROUBLE)
    assert side.next_event() is None


@pytest.mark.parametrize("how", ["fail", "misfit"])
def test_a_stock_driver_whose_evaluation_fails_is_hung_up_on(how):
    side = engine_side.EngineSide(only_two_atoms)
    feed(side, init(b"\0") + (POSDATA if how == "fail" else MESSAGES["MISFIT"]) + GETFORCE)
    side.next_event()
    side.accept()
    if how == "fail":
        assert isinstance(side.next_event(), engine_side.Evaluate)
        side.fail(TROUBLE)
    else:
        assert side.next_event() == DROPPED
    event = side.next_event()
    assert isinstance(event, engine_side.Close)
    assert isinstance(event.error, EvaluationError if how == "fail" else InvalidStructureError)
    assert side.next_event() is None


def test_positions_that_fit_nowhere_are_an_error_and_then_forgotten():
    side = engine_in("ready")
    feed(side, MESSAGES["MISFIT"] + STATUS + GETFORCE + STATUS + POSDATA)
    misfit = engine_side.Send(error(InvalidStructureError("3 atoms", "send 2").to_json()))
    said = [engine_side.Send(HAVEDATA), misfit, engine_side.Send(READY)]
    assert [side.next_event() for _ in range(4)] == [DROPPED, *said]
    assert isinstance(side.next_event(), engine_side.Evaluate)


def test_exit_waits_for_an_evaluation_under_way_and_what_is_behind_it_is_not_read():
    side = engine_in("busy")
    feed(side, EXIT + b"no such word")
    assert side.next_event() is None
    side.finish()
    assert side.next_event() == engine_side.Close(None)
    assert side.next_event() is None


def test_close_reads_no_more():
    side = engine_in("ready")
    feed(side, STATUS)
    side.close()
    assert side.next_event() is None


def test_close_lets_go_of_what_an_errors_traceback_holds():
    """As the slot of a structure that was refused: at once, not when the garbage collector finds the session."""
    side, slot = engine_in("busy"), np.zeros(3)
    held = weakref.ref(slot)

    def refuse(_structure: np.ndarray) -> None:
        raise InvalidStructureError("no")

    try:
        refuse(slot)
    except InvalidStructureError as error:
        side.fail(error)
    del slot
    assert held() is not None
    side.close()
    assert held() is None


class Conversation(RuleBasedStateMachine):
    """A driver that keeps to the protocol and pipelines as it likes: each question has one answer, in its order."""

    def __init__(self) -> None:
        super().__init__()
        self.side = engine_side.EngineSide(only_two_atoms)
        self.asked: list[bytes] = []
        self.verdicts: list[Any] = []
        self.may_get = False
        self.refused = False
        self.closed = False

    def send(self, frame: bytes) -> None:
        if len(self.side.get_buffer()) < len(frame):
            return
        feed(self.side, frame)
        self.take()

    def take(self) -> None:
        while (event := self.side.next_event()) is not None:
            match event:
                case ipi.Init():
                    verdict = self.verdicts.pop(0)
                    if verdict is None:
                        self.side.accept(announced=True)
                    else:
                        self.side.refuse(verdict, announced=True)
                case engine_side.Send(data):
                    assert (data in (NEEDINIT, READY, HAVEDATA)) == (self.asked.pop(0) == STATUS)
                case engine_side.SendResult():
                    assert self.asked.pop(0) == GETFORCE
                case engine_side.Close(why):
                    assert why is None
                    self.closed = True

    @rule()
    def status(self) -> None:
        self.asked.append(STATUS)
        self.send(STATUS)

    @rule(verdict=st.sampled_from([None, None, TROUBLE]))
    def init(self, verdict: Any) -> None:
        self.verdicts.append(verdict)
        self.refused = verdict is not None
        self.may_get = self.refused
        self.begun = True
        self.send(init(b"{}"))

    begun = False

    @precondition(lambda self: self.begun)
    @rule(frame=st.sampled_from([POSDATA, POSDATA, MESSAGES["MISFIT"]]))
    def posdata(self, frame: bytes) -> None:
        self.may_get = True
        self.send(frame)

    @precondition(lambda self: self.may_get)
    @rule()
    def getforce(self) -> None:
        self.may_get = self.refused
        self.asked.append(GETFORCE)
        self.send(GETFORCE)

    @rule()
    def finish(self) -> None:
        self.side.finish()
        self.take()

    @rule()
    def fail(self) -> None:
        self.side.fail(TROUBLE)
        self.take()

    def teardown(self) -> None:
        while self.side.busy:
            self.side.finish()
            self.take()
        assert self.asked == []
        assert self.verdicts == []
        assert not self.closed


Conversation.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestConversation = Conversation.TestCase


# --- the same words in others' mouths


class Springs(threading.Thread):
    """An engine of ours on a socket, evaluating in a real slot; energies and forces follow from the positions."""

    def __init__(self, sock: socket.socket, natoms: int, batch: int = 1, extras: bytes = b"") -> None:
        super().__init__(daemon=True)
        self.sock, self.extras, self.batch = sock, extras, batch
        self.slot = Slot.create(natoms, batch)
        self.side = engine_side.EngineSide(lambda _: self.slot.positions_bytes)
        self.inits: list[ipi.Init] = []
        self.cells: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.closed = False

    def run(self) -> None:
        while not self.closed and (size := self.sock.recv_into(self.side.get_buffer(-1))):
            self.side.received(size)
            while (event := self.side.next_event()) is not None:
                self.handle(event)

    def handle(self, event: engine_side.Event) -> None:
        match event:
            case ipi.Init():
                self.inits.append(event)
                self.side.accept(self.batch)
            case engine_side.Evaluate(cells):
                self.cells.append(ipi.read_cells(cells))
                self.positions.append(self.slot.positions.copy())
                self.slot.energies[:] = (self.slot.positions**2).sum(axis=(1, 2))
                self.slot.forces[:] = -2 * self.slot.positions
                self.slot.virials[:] = np.arange(9.0 * self.batch).reshape(self.batch, 3, 3) + self.slot.energies[0]
                self.slot.set_extras([self.extras] * self.batch)
                self.side.finish()
            case engine_side.Send(data):
                self.sock.sendall(data)
            case engine_side.SendResult():
                self.sock.sendall(self.slot.reply)
            case engine_side.Close():
                self.closed = True


@contextlib.contextmanager
def springs(
    natoms: int, batch: int = 1, extras: bytes = b"", *, shm: bool = False
) -> Iterator[tuple[socket.socket, Springs]]:
    """The driver's end of a connection to an engine; with `shm` of a driver whose arrays lie in shared memory."""
    ours, theirs = socket.socketpair()
    end = Translation(theirs, batch).engine_end if shm else theirs
    with ours, end:
        ours.settimeout(20)
        engine = Springs(end, natoms, batch, extras)
        engine.start()
        yield ours, engine
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_WR)
        engine.join(20)
        assert not engine.is_alive()
        engine.slot.close()


class Request(dict[str, Any]):
    """As in i-PI: a dictionary that can be waited for."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(fields)
        self._event_done = threading.Event()


def request(number: int, natoms: int) -> Request:
    """What i-PI's dispatcher is given for one structure; its cell has lattice vectors as columns."""
    rng = np.random.default_rng(number)
    h = rng.normal(size=(3, 3))
    return Request(
        id=number,
        pars="",
        pos=rng.normal(size=3 * natoms),
        active=np.arange(3 * natoms),
        cell=(h, np.linalg.inv(h)),
        offset=0.0,
        status="Queued",
    )


@pytest.fixture
def i_pi() -> Any:
    return pytest.importorskip("ipi.interfaces.sockets")


def check_i_pi_result(one: Request, engine: Springs, frame: int) -> None:
    assert one["status"] == "Done"
    energy, forces, virial, extra = one["result"]
    assert energy == pytest.approx((one["pos"] ** 2).sum(), rel=1e-14)
    assert np.array_equal(forces, -2 * one["pos"])
    assert np.array_equal(virial, engine.slot.virials[frame])
    assert extra["energies"] == [1.5]
    assert np.array_equal(engine.cells[-1][frame], one["cell"][0].T)
    assert np.array_equal(engine.positions[-1][frame].ravel(), one["pos"])


@pytest.mark.parametrize("kind", ["Driver", "SHMDriver"])
@pytest.mark.parametrize("pipelined", [False, True])
@pytest.mark.parametrize("natoms", [1, 5, 4000])
def test_i_pi_itself_is_understood_and_understands(i_pi, natoms, pipelined, kind):
    with springs(natoms, extras=b'{"energies": [1.5]}', shm=kind == "SHMDriver") as (sock, engine):
        driver = getattr(i_pi, kind)(sock)
        with driver:
            for number in (3, 4):
                one = request(number, natoms)
                if pipelined:
                    assert driver.dispatch_send(one)
                    assert driver.dispatch_recv(one)
                else:
                    driver.dispatch(one)
                check_i_pi_result(one, engine, 0)
                assert driver.status == i_pi.Status.Up | i_pi.Status.Ready
            driver.send_msg("exit")
            engine.join(20)
            assert engine.closed
    assert engine.inits == [ipi.Init(b"")]


@pytest.mark.parametrize("kind", ["Driver", "SHMDriver"])
@pytest.mark.parametrize("real", [1, 3])
def test_i_pi_batches_are_understood_and_understand(i_pi, real, kind):
    with springs(7, batch=3, extras=b'{"energies": [1.5]}', shm=kind == "SHMDriver") as (sock, engine):
        driver = getattr(i_pi, kind)(sock)
        with driver:
            driver.batch_size = 3
            for first in (0, 10):
                several = [request(first + number, 7) for number in range(real)]
                assert driver.dispatch_send_batch(several)
                assert driver.dispatch_recv_batch(several)
                for frame, one in enumerate(several):
                    check_i_pi_result(one, engine, frame)
    assert engine.inits == [ipi.Init(b" batch_size:3")]


def test_ase_as_driver_is_understood_and_understands():
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array + np.arange(9).reshape(3, 3) / 50)
    atoms.rattle(0.1)
    with springs(4, extras=b"{}") as (sock, engine):
        protocol = IPIProtocol(sock)
        for _ in range(2):
            result = protocol.calculate(atoms.positions, atoms.cell)
            positions = atoms.positions / units.Bohr
            assert result["energy"] == pytest.approx((positions**2).sum() * units.Ha, rel=1e-14)
            assert np.allclose(result["forces"], -2 * positions * units.Ha / units.Bohr, rtol=1e-14, atol=0)
            assert np.allclose(result["virial"], units.Ha * engine.slot.virials[0].T, rtol=1e-14, atol=0)
            assert result["morebytes"].tobytes() == b"{}"
            assert np.array_equal(engine.cells[-1][0], atoms.cell.array / units.Bohr)
            atoms.rattle(0.1, seed=1)
        protocol.end()
        engine.join(20)
        assert engine.closed
    assert engine.inits == [ipi.Init(b"\0")]


def test_ases_socket_server_is_understood_and_understands():
    name = f"rootstock_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    atoms = bulk("Cu", cubic=True)
    with SocketServer(unixsocket=name, timeout=20) as server, socket.socket(socket.AF_UNIX) as sock:
        sock.connect(f"/tmp/ipi_{name}")
        engine = Springs(sock, 4)
        engine.start()
        result = server.calculate(atoms)
        assert np.allclose(result["forces"], -2 * atoms.positions / units.Bohr * units.Ha / units.Bohr, rtol=1e-14)
        server.protocol.end()
        engine.join(20)
        assert engine.closed
        engine.slot.close()


def test_ase_as_engine_is_understood_and_understands():
    """Our driver's side against ASE's SocketClient with EMT: what ASE itself computes for the same structure."""
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell(atoms.cell.array + np.arange(9).reshape(3, 3) / 50, scale_atoms=True)
    atoms.rattle(0.1)
    atoms.calc = EMT()
    name = f"rootstock_{os.getpid()}_{uuid.uuid4().hex[:8]}"
    forces = np.empty((4, 3))

    def engine() -> None:
        theirs = bulk("Cu", cubic=True)
        theirs.calc = EMT()
        SocketClient(unixsocket=name, timeout=20).run(theirs, use_stress=True)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/tmp/ipi_{name}")
        try:
            listener.listen()
            thread = threading.Thread(target=engine, daemon=True)
            thread.start()
            sock, _ = listener.accept()
        finally:
            Path(f"/tmp/ipi_{name}").unlink()
    with sock:
        sock.settimeout(20)
        side = DriverSide(lambda natoms: memoryview(forces).cast("B") if natoms == 4 else pytest.fail(str(natoms)))
        cell = atoms.cell.array / units.Bohr
        head = ipi.posdata_head(cell, np.linalg.inv(cell), 4)
        sock.sendall(STATUS + head + (atoms.positions / units.Bohr).tobytes() + STATUS + GETFORCE + STATUS + EXIT)
        for asked in (STATUS, STATUS, GETFORCE, STATUS):
            side.expect(asked)
        answers = []
        while len(answers) < 4:
            if (message := side.next_message()) is None:
                size = sock.recv_into(side.get_buffer(-1))
                assert size
                side.received(size)
            else:
                answers.append(message)
        thread.join(20)
        assert not thread.is_alive()
    first, second, result, last = answers
    assert [first, second, last] == [ipi.StatusReply(word) for word in (READY, HAVEDATA, READY)]
    assert result.natoms == 4
    assert result.energies[0] * units.Ha == pytest.approx(atoms.get_potential_energy(), rel=1e-10)
    assert np.allclose(forces * units.Ha / units.Bohr, atoms.get_forces(), atol=1e-8)
    stress = -result.virials[0] * units.Ha / atoms.get_volume()
    assert np.allclose(stress, atoms.get_stress(voigt=False), atol=1e-8)
