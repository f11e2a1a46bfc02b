"""Both sides of the protocol as fuzzing and the corpus look at them: fed in pieces, and read again in the plainest way.

`play_driver` and `play_engine` run the state machines over a stream as the daemon and the client do; `read_driver`
and `read_engine` say what the same stream means, from beginning to end in one go, in code that shares nothing with
them but the table of messages in `ipi.py`. The two must agree, however the stream is cut.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rootstock_client import engine_side, ipi
from rootstock_client.driver_side import DriverSide
from rootstock_client.errors import (
    InvalidStructureError,
    LimitError,
    ProtocolError,
    RootstockError,
    UnknownModelError,
    error_from_code,
)
from rootstock_client.stream import STAGING_SIZE
from rootstockd.sessions.cells import check_cells
from rootstockd.sessions.init_request import InitRequest, is_announced, parse_init

LIMITS = ipi.Limits(atoms=60, init=3000, extras=2000)
"""Small ones, so that streams which reach them are short."""
LONG = ipi.Limits(atoms=9000, init=300_000, extras=300_000)
"""For streams of messages that are longer than the staging buffer."""


@dataclass
class Outcome:
    """What came of a stream."""

    answers: list[str] = field(default_factory=list)
    """Of the driver's stream what it is told, of the engine's what it says: headers, and for ERROR its code."""
    structures: list[str] = field(default_factory=list)
    """What was evaluated, or the results that came: a digest of each."""
    results: list[tuple[int, int]] = field(default_factory=list, compare=False)
    """Atoms and structures of each result that the engine's side sent."""
    ends: str = "open"
    """open, exit, or the code of the error that ended it."""


def digest(*parts: bytes | memoryview) -> str:
    """A few characters that stand for bytes."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part)
    return state.hexdigest()


def deliver(side: Any, stream: bytes, cuts: Iterable[int], outcome: Outcome, take: Any) -> None:
    """Write a stream as a socket would, cut at `cuts`; `take` takes what has come."""
    edges = [0, *sorted(cuts), len(stream)]
    for start, end in itertools.pairwise(edges):
        position = start
        while position < end:
            if outcome.ends != "open":
                return
            buffer = side.get_buffer()
            assert len(buffer), "a side that takes no bytes and gives no messages: nothing would go on"
            size = min(len(buffer), end - position)
            buffer[:size] = stream[position : position + size]
            side.received(size)
            position += size
            take()


# --- the driver's stream ----------------------------------------------------------------------------------------------


def judge(text: bytes, limits: ipi.Limits) -> tuple[InitRequest | None, Any]:
    """What the daemon says to an INIT: the request if it could be read, and an error if it is refused."""
    request = None
    try:
        request = parse_init(text)
        if len(request.numbers) * request.batch_size > limits.atoms:
            raise LimitError("too many")
        if request.model != "noop":
            raise UnknownModelError("another")
    except RootstockError as error:
        return request, error
    return request, None


def check_structure(cells: bytes, positions: bytes | bytearray, request: InitRequest) -> RootstockError | None:
    """What daemon and worker say to a structure."""
    arrays = np.frombuffer(positions, "<f8").reshape(request.batch_size, -1, 3)
    try:
        check_cells(ipi.read_cells(cells), request.pbc, arrays)
    except InvalidStructureError as error:
        return error
    if not np.isfinite(arrays).all():
        return InvalidStructureError("not finite")
    return None


class EnginePlayer:
    """The daemon's session without a daemon.

    Args:
        limits: what a message may declare.
        fast: use the short way for steps that have come in whole, as the daemon does.
        late: an evaluation ends only when nothing else can go on.
    """

    def __init__(self, limits: ipi.Limits = LIMITS, *, fast: bool = True, late: bool = False) -> None:
        self.outcome = Outcome()
        self.side = engine_side.EngineSide(self._place, limits)
        if not fast:
            self.side._whole = lambda: None  # type: ignore[method-assign]
        self._limits, self._late = limits, late
        self._request: InitRequest | None = None
        self._memory = bytearray()
        self._result: RootstockError | None = None

    def _place(self, natoms: int) -> memoryview:
        assert self._request is not None, "positions before a system"
        if natoms != len(self._request.numbers):
            raise InvalidStructureError("another number of atoms")
        return memoryview(self._memory)

    def take(self) -> None:
        """Do what a session does with what has come."""
        side, outcome = self.side, self.outcome
        try:
            while True:
                while (event := side.next_event()) is not None:
                    self._handle(event)
                if not side.busy:
                    return
                self._end_evaluation()
        except RootstockError as error:
            if side.announced or isinstance(error, LimitError):
                outcome.answers.append(f"ERROR {error.code}")
            outcome.ends = error.code

    def _end_evaluation(self) -> None:
        if self._result is None:
            self.side.finish()
        else:
            self.side.fail(self._result)

    def _handle(self, event: engine_side.Event) -> None:
        outcome = self.outcome
        match event:
            case engine_side.Send(data):
                outcome.answers.append(named(data))
            case engine_side.SendResult():
                assert self._request is not None
                outcome.answers.append("FORCEREADY")
                outcome.results.append((len(self._request.numbers), self._request.batch_size))
            case engine_side.Close(error):
                outcome.ends = error.code if error else "exit"
            case engine_side.Evaluate(cells):
                assert self._request is not None
                outcome.structures.append(digest(cells, self._memory))
                self._result = check_structure(cells, self._memory, self._request)
                self._memory[:] = bytes(len(self._memory))  # whatever is evaluated next must come anew
                if not self._late:
                    self._end_evaluation()
            case ipi.Init():
                self._init(event.text)

    def _init(self, text: bytes) -> None:
        request, error = judge(text, self._limits)
        self._request = None if error else request
        if error:
            batch_size = request.batch_size if request else 1
            self.side.refuse(error, batch_size, announced=is_announced(text) or self.side.announced)
            return
        assert request is not None
        self._memory = bytearray(24 * len(request.numbers) * request.batch_size)
        self.side.accept(request.batch_size, announced=True)


def named(frame: bytes) -> str:
    """An answer as outcomes have it."""
    word = frame[:12].decode().strip()
    if word != "ERROR":
        return word
    (size,) = struct.unpack_from("<i", frame, 12)
    assert len(frame) == 16 + size
    return f"ERROR {json.loads(frame[16:])['code']}"


def play_driver(
    stream: bytes, cuts: Sequence[int] = (), limits: ipi.Limits = LIMITS, *, fast: bool = True, late: bool = False
) -> Outcome:
    """What the engine's side makes of a driver's stream."""
    player = EnginePlayer(limits, fast=fast, late=late)
    deliver(player.side, stream, cuts, player.outcome, player.take)
    room = len(player.side._reader.staging)
    assert room <= max(STAGING_SIZE, limits.init), f"{room} bytes are staged"
    player.side.close()
    return player.outcome


def read_driver(stream: bytes, limits: ipi.Limits = LIMITS) -> Outcome:
    """The same, read from beginning to end."""
    return _DriverStream(stream, limits).outcome


class _CutError(Exception):
    """The stream ends in the middle of a message."""


class _Bytes:
    def __init__(self, stream: bytes) -> None:
        self.stream, self.position = stream, 0

    def take(self, size: int) -> bytes:
        if self.position + size > len(self.stream):
            raise _CutError
        self.position += size
        return self.stream[self.position - size : self.position]

    def int32(self) -> int:
        return int.from_bytes(self.take(4), "little", signed=True)

    def count(self, limit: int) -> int:
        value = self.int32()
        if value < 0 or value > limit:
            raise ProtocolError("a size")
        return value


class _DriverStream:
    def __init__(self, stream: bytes, limits: ipi.Limits) -> None:
        self.data, self.limits, self.outcome = _Bytes(stream), limits, Outcome()
        self.state, self.error, self.announced, self.batch = "NEEDINIT", None, False, 1
        self.request: InitRequest | None = None
        try:
            while self.outcome.ends == "open":
                if self.error is not None and not self.announced:
                    self.outcome.ends = self.error.code
                else:
                    self.message(self.data.take(12))
        except _CutError:
            pass
        except (ProtocolError, LimitError) as error:
            if self.announced or isinstance(error, LimitError):
                self.outcome.answers.append(f"ERROR {error.code}")
            self.outcome.ends = error.code

    def message(self, word: bytes) -> None:
        if word == b"STATUS      ":
            self.outcome.answers.append(self.state)
        elif word == b"EXIT        ":
            self.outcome.ends = "exit"
        elif word == b"GETFORCE    ":
            self.getforce()
        elif word == b"POSDATA     ":
            self.posdata()
        elif word == b"INIT        ":
            self.data.int32()
            size = self.data.count(2**31)
            if size > self.limits.init:
                raise LimitError("a long INIT")
            self.init(self.data.take(size))
        else:
            raise ProtocolError("a word")

    def getforce(self) -> None:
        if self.state != "HAVEDATA" and not (self.state == "NEEDINIT" and self.error):
            raise ProtocolError("no result")
        self.outcome.answers.append(f"ERROR {self.error.code}" if self.error else "FORCEREADY")
        if self.state == "HAVEDATA":
            self.state, self.error = "READY", None

    def posdata(self) -> None:
        data, batch = self.data, self.batch
        refused = self.state == "NEEDINIT" and self.error is not None
        most = 2**31 if self.state == "NEEDINIT" else self.limits.atoms // batch
        if batch == 1:
            cells, natoms = data.take(144), data.count(most)
        else:
            natoms = data.int32()
            cells = data.take(144 * batch)
            if not 0 <= natoms <= most:
                raise ProtocolError("a size")
        if self.state == "NEEDINIT":
            data.take(24 * natoms * batch)
            if not refused:
                raise ProtocolError("no system")
            return
        assert self.request is not None
        positions = data.take(24 * natoms * batch)
        self.state, self.error = "HAVEDATA", None
        if natoms != len(self.request.numbers):
            self.error = InvalidStructureError("another number of atoms")
        else:
            self.outcome.structures.append(digest(cells, positions))
            self.error = check_structure(cells, positions, self.request)

    def init(self, text: bytes) -> None:
        self.announced = self.announced or is_announced(text)
        request, self.error = judge(text, self.limits)
        self.request = None if self.error else request
        self.batch = request.batch_size if request else 1
        self.state = "NEEDINIT" if self.error else "READY"


# --- the engine's stream ----------------------------------------------------------------------------------------------


class DriverPlayer:
    """The client without a connection.

    Args:
        asked: which answers are due, STATUS or GETFORCE.
        natoms: atoms of the structure that was sent.
        batch: structures that were sent.
        limits: what a message may declare.
        fast: use the short way for answers that have come in whole, as the client does.
    """

    def __init__(
        self, asked: Sequence[str], natoms: int, batch: int, limits: ipi.Limits = LIMITS, *, fast: bool = True
    ) -> None:
        self.outcome = Outcome()
        self._memory = bytearray(24 * natoms * batch)
        self._natoms = natoms
        self.side = DriverSide(self._place, batch, limits)
        if not fast:
            self.side._whole = lambda: None  # type: ignore[method-assign]
        for request in asked:
            self.side.expect(ipi.header(request))

    def _place(self, natoms: int) -> memoryview:
        if natoms != self._natoms:
            raise InvalidStructureError("another number of atoms")
        return memoryview(self._memory)

    def take(self) -> None:
        """Take all answers that have come."""
        try:
            while (message := self.side.next_message()) is not None:
                match message:
                    case ipi.StatusReply(state):
                        self.outcome.answers.append(state.decode().strip())
                    case ipi.Failure(error):
                        self.outcome.answers.append(f"ERROR {error.code}")
                    case ipi.ForceReady(energies, _, virials, extras):
                        self.outcome.answers.append("FORCEREADY")
                        parts = [energies.tobytes(), bytes(self._memory), virials.tobytes(), *extras]
                        self.outcome.structures.append(digest(*parts))
                        self._memory[:] = bytes(len(self._memory))
        except ProtocolError as error:
            self.outcome.ends = error.code


def play_engine(
    stream: bytes,
    cuts: Sequence[int] = (),
    limits: ipi.Limits = LIMITS,
    *,
    asked: Sequence[str],
    natoms: int = 2,
    batch: int = 1,
    fast: bool = True,
) -> Outcome:
    """What the driver's side makes of an engine's stream."""
    player = DriverPlayer(asked, natoms, batch, limits, fast=fast)
    deliver(player.side, stream, cuts, player.outcome, player.take)
    room = len(player.side._reader.staging)
    assert room <= max(STAGING_SIZE, limits.extras), f"{room} bytes are staged"
    return player.outcome


def read_engine(
    stream: bytes, limits: ipi.Limits = LIMITS, *, asked: Sequence[str], natoms: int = 2, batch: int = 1
) -> Outcome:
    """The same, read from beginning to end."""
    outcome, data, due = Outcome(), _Bytes(stream), list(asked)
    try:
        while True:
            word = data.take(12).decode("latin-1")
            name = word.rstrip(" ")
            result = ""
            if word in ("NEEDINIT    ", "READY       ", "HAVEDATA    "):
                kind = "STATUS"
            elif word == "ERROR       ":
                kind = "GETFORCE"
                name = f"ERROR {_read_error(data.take(data.count(limits.extras)))}"
            elif word == "FORCEREADY  ":
                kind = "GETFORCE"
                result = _read_result(data, limits, natoms, batch)
            else:
                raise ProtocolError("a word")
            if not due or due.pop(0) != kind:
                raise ProtocolError("not asked for")
            outcome.answers.append(name)
            outcome.structures += [result] * bool(result)
    except _CutError:
        pass
    except ProtocolError as error:
        outcome.ends = error.code
    return outcome


def _read_error(body: bytes) -> str:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ProtocolError("no JSON") from error
    if not isinstance(fields, dict) or not {"code", "message"} <= fields.keys():
        raise ProtocolError("no error")
    return error_from_code(str(fields["code"]), "").code


def _read_result(data: _Bytes, limits: ipi.Limits, natoms: int, batch: int) -> str:
    energies = data.take(8 * batch)
    if data.count(limits.atoms // batch) != natoms:
        raise ProtocolError("another number of atoms")
    forces = data.take(24 * natoms * batch)
    virials = np.frombuffer(data.take(72 * batch), "<f8").reshape(batch, 3, 3).transpose(0, 2, 1)
    extras = [data.take(data.count(limits.extras)) for _ in range(batch)]
    return digest(energies, forces, virials.tobytes(), *extras)
