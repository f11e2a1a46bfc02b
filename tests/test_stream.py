"""The buffer under both protocol roles, with a grammar of its own: items that are wanted in each of the three ways."""

import itertools
import tracemalloc
from collections.abc import Generator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rootstock_client.stream import STAGING_SIZE, MessageReader, Skip


def grammar() -> Generator[Any, memoryview, None]:
    """A kind (one byte) and a length (four), then that many bytes: I in one piece, M into memory, S thrown away."""
    while True:
        head = bytes((yield 5))
        kind, size = head[:1], int.from_bytes(head[1:], "little")
        if kind == b"I":
            yield (kind, bytes((yield size)))
        elif kind == b"M":
            memory = bytearray(size)
            yield memoryview(memory)
            yield (kind, bytes(memory))
        else:
            yield Skip(size)
            yield (kind, size)


def item(kind: bytes, body: bytes) -> bytes:
    return kind + len(body).to_bytes(4, "little") + body


def pattern(size: int, seed: int) -> bytes:
    """Bytes that show when they are moved: the period is a prime."""
    period = bytes((seed + i * i) % 256 for i in range(251))
    return (period * (size // 251 + 1))[:size]


def expected(items: list[tuple[bytes, bytes]]) -> list[Any]:
    return [(kind, len(body) if kind == b"S" else body) for kind, body in items]


def take_all(reader: MessageReader[Any]) -> list[Any]:
    return list(iter(reader.next_message, None))


def feed(reader: MessageReader[Any], data: bytes) -> int:
    """Write as much of `data` as there is room for, and say how much that was."""
    room = reader.get_buffer()
    size = min(len(room), len(data))
    room[:size] = data[:size]
    reader.received(size)
    return size


def deliver(reader: MessageReader[Any], stream: bytes, cuts: Sequence[int], taken: Sequence[bool]) -> list[Any]:
    """Write `stream` as a socket would, cut at `cuts`; messages are taken after a piece where `taken` says so."""
    messages = []
    edges = [0, *sorted(cuts), len(stream)]
    for number, (start, end) in enumerate(itertools.pairwise(edges)):
        piece = stream[start:end]
        while piece:
            if not reader.get_buffer(-1):
                assert reader.full
                messages += take_all(reader)
                assert not reader.full
                continue
            piece = piece[feed(reader, piece) :]
        if taken[number % len(taken)]:
            messages += take_all(reader)
            assert not reader.full  # or nobody would read on
    return messages + take_all(reader)


sizes = st.one_of(
    st.integers(0, 40),
    st.sampled_from([STAGING_SIZE - 6, STAGING_SIZE - 5, STAGING_SIZE, STAGING_SIZE + 1, 3 * STAGING_SIZE]),
)
kinds = st.sampled_from([b"I", b"M", b"S"])


@settings(max_examples=120)
@given(
    plan=st.lists(st.tuples(kinds, sizes, st.integers(0, 255)), max_size=6),
    cuts=st.lists(st.floats(0, 1), max_size=20),
    taken=st.lists(st.booleans(), min_size=1, max_size=5),
)
def test_cuts_and_merges_change_nothing(plan, cuts, taken):
    items = [(kind, pattern(size, seed)) for kind, size, seed in plan]
    stream = b"".join(item(*one) for one in items)
    edges = [round(cut * len(stream)) for cut in cuts]
    assert deliver(MessageReader(grammar()), stream, edges, taken) == expected(items)


def test_byte_by_byte():
    items = [(b"I", b""), (b"M", b"abc"), (b"S", b"abc"), (b"I", b"abcdef"), (b"M", b""), (b"S", b"")]
    stream = b"".join(item(*one) for one in items)
    assert deliver(MessageReader(grammar()), stream, range(len(stream)), [True]) == expected(items)


@pytest.mark.parametrize("step", [1, 7, 4096])
def test_what_the_owner_does_not_take_is_kept(step):
    """Without its owner's attention a reader takes one staging buffer, says that it is full, and loses nothing."""
    items = [(b"I", pattern(500, seed)) for seed in range(300)]
    stream = b"".join(item(*one) for one in items)
    reader = MessageReader(grammar())
    fed = 0
    while not reader.full:
        fed += (size := feed(reader, stream[fed : fed + step]))
        assert size > 0
    assert fed == STAGING_SIZE
    assert len(reader.get_buffer()) == 0
    assert feed(reader, b"more") == 0
    messages = take_all(reader)
    assert not reader.full
    while fed < len(stream):
        fed += feed(reader, stream[fed:])
        messages += take_all(reader)
    assert messages == expected(items)


def test_full_again_while_messages_wait():
    """A reader that has begun is full when the staging buffer is, whatever it had waited for."""
    reader = MessageReader(grammar())
    assert reader.next_message() is None
    stream = item(b"I", b"x" * 95) * 1000
    fed = 0
    while size := feed(reader, stream[fed:]):
        fed += size
    assert reader.full
    assert fed == STAGING_SIZE
    assert len(take_all(reader)) == STAGING_SIZE // 100


def test_a_long_item_that_is_all_there_leaves_no_room():
    """And one that lacks a byte is not full, or that byte would never be read."""
    reader = MessageReader(grammar())
    feed(reader, item(b"I", bytes(STAGING_SIZE))[:5])
    assert reader.next_message() is None
    feed(reader, bytes(STAGING_SIZE - 5))
    feed(reader, bytes(4))
    assert not reader.full
    assert feed(reader, bytes(1)) == 1
    assert reader.full
    assert len(reader.get_buffer()) == 0
    assert take_all(reader) == [(b"I", bytes(STAGING_SIZE))]


def test_a_buffer_that_lacks_bytes_of_a_long_item_is_not_full():
    reader = MessageReader(grammar())
    long = item(b"I", bytes(2 * STAGING_SIZE))
    feed(reader, long[:5])
    assert reader.next_message() is None
    fed = 5
    while fed < len(long):
        assert not reader.full
        fed += (size := feed(reader, long[fed : fed + STAGING_SIZE]))
        assert size > 0
    assert take_all(reader) == [(b"I", bytes(2 * STAGING_SIZE))]


def test_large_memory_is_filled_without_staging():
    """Once its head is read, memory of the grammar's is what the socket writes to."""
    memory = bytearray(10 * STAGING_SIZE)

    def into_memory() -> Generator[Any, memoryview, None]:
        yield 5
        yield memoryview(memory)
        yield "done"

    reader = MessageReader(into_memory())
    feed(reader, b"12345ab")
    assert reader.next_message() is None
    assert memory[:3] == b"ab\0"
    buffer = reader.get_buffer()
    assert len(buffer) == len(memory) - 2
    assert buffer.obj is memory
    buffer[:2] = b"cd"
    reader.received(2)
    assert memory[:5] == b"abcd\0"
    assert reader.next_message() is None
    assert len(reader.get_buffer()) == len(memory) - 4


def test_the_buffer_is_empty_only_when_full():
    """Also when the memory being filled is full and the owner has not yet asked for the message."""
    reader = MessageReader(grammar())
    feed(reader, item(b"M", b"abcd")[:5])
    assert reader.next_message() is None
    assert feed(reader, b"abcd") == 4
    assert not reader.full
    assert len(reader.get_buffer()) > 0
    assert feed(reader, item(b"I", b"xy")) == 7
    assert take_all(reader) == [(b"M", b"abcd"), (b"I", b"xy")]


def test_a_long_item_takes_memory_only_as_it_arrives():
    reader = MessageReader(grammar())
    size = 512 * 2**20
    tracemalloc.start()
    try:
        feed(reader, b"I" + size.to_bytes(4, "little"))
        assert reader.next_message() is None
        assert len(reader.get_buffer()) <= STAGING_SIZE
        sent = 0
        while sent < 2**20:
            sent += feed(reader, bytes(STAGING_SIZE))
            assert reader.next_message() is None
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


def test_what_is_skipped_takes_no_memory():
    reader = MessageReader(grammar())
    size = 64 * 2**20
    feed(reader, b"S" + size.to_bytes(4, "little"))
    chunk = bytes(STAGING_SIZE)
    left = size
    tracemalloc.start()
    try:
        while left:
            assert reader.next_message() is None
            left -= feed(reader, chunk[:left])
        assert tracemalloc.get_traced_memory()[1] < STAGING_SIZE
    finally:
        tracemalloc.stop()
    assert reader.next_message() == (b"S", size)


def test_memory_is_given_back_after_a_long_item():
    """Thousands of sessions shall not each keep what their longest message ever took."""
    reader = MessageReader(grammar())
    stream = item(b"I", pattern(20 * STAGING_SIZE, 1))
    fed = 0
    messages = []
    while fed < len(stream):
        fed += feed(reader, stream[fed:])
        messages += take_all(reader)
    assert messages == [(b"I", pattern(20 * STAGING_SIZE, 1))]
    assert len(reader.get_buffer()) == STAGING_SIZE
    feed(reader, item(b"I", b"next"))
    assert take_all(reader) == [(b"I", b"next")]


def test_a_long_item_takes_no_more_memory_than_its_size_and_gives_it_back_at_once():
    """Not only when more is read: an owner that says nothing further must not keep it."""
    reader = MessageReader(grammar())
    size = 5 * STAGING_SIZE + 1
    stream = item(b"I", pattern(size, 1))
    fed = 0
    while fed < len(stream):
        fed += feed(reader, stream[fed:])
        assert len(reader.staging) <= size
        if fed < len(stream):
            assert reader.next_message() is None
    assert reader.next_message() == (b"I", pattern(size, 1))
    assert len(reader.staging) == STAGING_SIZE
