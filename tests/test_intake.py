"""What reading without steps costs a session, and how it is read in turns."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from rootstockd.sessions.intake import AT_ONCE, CRUMB, READ, Intake
from rootstockd.sessions.transport import GuardedTransport


class Transport(asyncio.Transport):
    """Says whether it reads."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.reads = True

    def pause_reading(self) -> None:
        self.reads = False

    def resume_reading(self) -> None:
        self.reads = True


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def transport(ends: tuple[socket.socket, socket.socket]) -> Transport:
    return Transport(ends[0])


@pytest.fixture
def intake(transport: Transport) -> Intake:
    made = Intake()
    made.begin(transport)
    return made


def test_reads_of_a_step_are_its_own(intake: Intake) -> None:
    for _ in range(100):
        for _ in range(10):  # as a stock driver's POSDATA and STATUS come in parts
            assert intake.came(12, placing=False) is None
        intake.step_came()
    for _ in range(10_000):
        assert intake.came(CRUMB, placing=True) is None


@pytest.mark.parametrize("placing", [True, False])
def test_crumbs_without_a_step_are_owed_and_read_in_turns(intake: Intake, transport: Transport, placing: bool) -> None:
    owed = [intake.came(1, placing=placing) for _ in range(int(AT_ONCE / READ) + 1)]
    assert owed[:-1] == [None] * (len(owed) - 1) and owed[-1] == pytest.approx(len(owed) * READ, rel=1e-3)
    assert intake.in_turns and not transport.reads
    intake.go_on()
    assert not transport.reads
    assert intake.came(1, placing=placing) == 0.0  # turns are timed
    intake.step_came()
    intake.go_on()
    assert transport.reads


def test_positions_in_bulk_are_read_as_they_come_also_behind_an_init_that_was_read_in_turns(
    intake: Intake, transport: Transport
) -> None:
    while intake.came(64, placing=False) is None:
        pass
    assert intake.in_turns and not transport.reads
    assert intake.came(CRUMB, placing=True) is None
    assert not intake.in_turns and transport.reads


def test_a_turn_reads_what_is_there_and_the_loop_has_the_rest(
    intake: Intake, ends: tuple[socket.socket, socket.socket], transport: Transport
) -> None:
    def begin_turns() -> None:
        while intake.came(1, placing=False) is None:
            pass

    begin_turns()
    ends[1].send(b"abc")
    ends[1].send(b"de")
    buffer = bytearray(4)
    assert intake.read(memoryview(buffer)) == 4 and buffer == b"abcd" and intake.in_turns
    assert intake.read(memoryview(buffer)) == 1 and intake.in_turns
    assert intake.read(memoryview(buffer)) == 0 and not intake.in_turns and transport.reads  # nothing is there
    begin_turns()
    ends[1].close()
    assert intake.read(memoryview(buffer)) == 0 and not intake.in_turns  # the loop sees the end, too


def test_a_guarded_stream_is_read_by_its_transport(ends: tuple[socket.socket, socket.socket]) -> None:
    came: list[bytes] = []

    class Protocol(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            came.append(data)

    async def live() -> None:
        intake, guarded = Intake(), GuardedTransport(ends[0], Protocol())
        intake.begin(guarded)
        while intake.came(1, placing=False) is None:
            pass
        ends[1].send(b"abc")
        assert intake.read(memoryview(bytearray())) == 0 and intake.in_turns and came == [b"abc"]
        assert intake.read(memoryview(bytearray())) == 0 and not intake.in_turns
        guarded.abort()
        await asyncio.sleep(0.1)

    asyncio.run(live())
