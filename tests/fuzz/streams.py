"""Streams for fuzzing: sequences of messages with a field wrong here and there, and then bytes changed by chance."""

from __future__ import annotations

import json
import random
import struct

from rootstock_client import ipi

INTERESTING = [0, 1, -1, 2, 3, 4, 59, 60, 61, 127, 128, 255, 1024, 2999, 3000, 3001, 65535, 65536, 2**31 - 1, -(2**31)]
DOUBLES = [0.0, -0.0, 1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf"), 5e-324]
TEXTS = [
    b"",
    b"{",
    b"{}",
    b" \n{",
    b"\xff\xfe",
    b"nbeads:1,batch_size:2",
    b"batch_size : 3",
    b"batch_size:0",
    b"batch_size:99999",
    b"[" * 300,
    b'{"a":' * 300,
    b'{"rootstock":1e999}',
    b"ipi",
]
VALUES = [None, True, 0, -1, 1.5, 2**70, "", "x" * 300, [], [1] * 61, {}, [[]], float("nan"), "\ud800", "\0"]


def chance(rng: random.Random, one_in: int) -> bool:
    return rng.randrange(one_in) == 0


def size_field(rng: random.Random, right: int) -> bytes:
    """An int32 that is mostly right."""
    wrong = rng.choice([*INTERESTING, right + 1, right - 1, rng.getrandbits(31)])
    return struct.pack("<i", wrong if chance(rng, 30) else right)


def doubles(rng: random.Random, count: int) -> bytes:
    """Numbers, now and then one that is none."""
    values = [rng.choice((0.5, 3.0, 7.25)) for _ in range(count)]
    if count and chance(rng, 8):
        values[rng.randrange(count)] = rng.choice(DOUBLES)
    return struct.pack(f"<{count}d", *values)


def cell(rng: random.Random) -> bytes:
    if chance(rng, 10):
        return doubles(rng, 9)
    return struct.pack("<9d", 9, 0, 0, 0, 9, 0, 0, 0, 9)


def init_text(rng: random.Random, natoms: int, batch: int, *, long: bool) -> bytes:
    if chance(rng, 6):
        return rng.choice(TEXTS)
    fields = {"rootstock": 1, "model": "noop", "numbers": [29] * natoms, "pbc": [chance(rng, 2)] * 3}
    if batch > 1 or chance(rng, 4):
        fields["batch_size"] = batch
    if chance(rng, 6):
        key = rng.choice([*fields, "charge", "spin", "head", "dtype", "exact", "tolerance", "want", "unknown"])
        fields[key] = rng.choice(VALUES)
    if chance(rng, 20):
        del fields[rng.choice(list(fields))]
    text = json.dumps(fields).encode()
    if long:
        text += b" " * rng.choice((0, 60_000, 65_536 - len(text), 150_000))
    return text[: rng.randrange(len(text))] if chance(rng, 40) else text


def driver_stream(rng: random.Random, *, long: bool = False) -> bytes:
    """What a driver might say; with `long`, in messages that do not fit the staging buffer."""
    sizes = (2, 2729, 2731, 2995) if long else (1, 2, 3)
    natoms, batch = rng.choice(sizes), 1
    parts = []
    for _ in range(rng.randrange(1, 9)):
        what = rng.randrange(12) if parts else rng.choice((0, 1, 1, 1, 1, 2))
        if what == 0:
            parts.append(ipi.STATUS)
        elif what in (1, 2):
            batch = rng.choice((1, 1, 1, 2, 3))
            natoms = 60 // batch + chance(rng, 2) if chance(rng, 25) else rng.choice(sizes)
            text = init_text(rng, natoms, batch, long=long)
            parts += [ipi.INIT, size_field(rng, 0), size_field(rng, len(text)), text]
        elif what < 9:
            count = size_field(rng, natoms)
            pairs = [cell(rng) + cell(rng) for _ in range(batch)]
            head = pairs[0] + count if batch == 1 else count + b"".join(pairs)
            parts += [ipi.POSDATA, head, doubles(rng, 3 * natoms * batch)]
            if not chance(rng, 5):
                parts.append(ipi.GETFORCE)
        elif what == 9 and chance(rng, 3):
            parts.append(ipi.GETFORCE)
        elif what == 10 and chance(rng, 3):
            parts.append(ipi.EXIT)
        else:
            wrong = rng.choice([b"status      ", b"FORCEREADY  ", b"GET / HTTP/1", ipi.STATUS[:7]])
            parts.append(wrong if chance(rng, 5) else ipi.STATUS)
    return b"".join(parts)


def engine_stream(rng: random.Random, asked: list[str], natoms: int, batch: int, *, long: bool = False) -> bytes:
    """What an engine might answer."""
    parts = []
    for request in asked:
        if chance(rng, 15):
            parts.append(
                rng.choice([b"READY       ", b"EXIT        ", b"ready       ", b"\0" * 12, ipi.FORCEREADY[:5]])
            )
        if (request == "STATUS") != chance(rng, 40):
            parts.append(rng.choice([ipi.NEEDINIT, ipi.READY, ipi.HAVEDATA]))
        elif chance(rng, 3):
            fields = {"code": rng.choice(["limit", "protocol", "new"]), "message": "no", "hint": ""}
            if chance(rng, 3):
                fields[rng.choice(["code", "message", "hint", "more"])] = rng.choice(VALUES)
            body = rng.choice(TEXTS) if chance(rng, 6) else json.dumps(fields).encode()
            parts += [ipi.ERROR, size_field(rng, len(body)), body]
        else:
            count = size_field(rng, natoms)
            parts += [ipi.FORCEREADY, doubles(rng, batch), count, doubles(rng, 3 * natoms * batch)]
            parts.append(doubles(rng, 9 * batch))
            for _ in range(batch):
                extras = b'{"backend":"x"}'[: rng.choice((0, 0, 5, 15))] * rng.choice((1, 1, 10_000 if long else 20))
                parts += [size_field(rng, len(extras)), extras]
    return b"".join(parts)


def mutate(rng: random.Random, stream: bytes, other: bytes) -> bytes:
    """Change a few bytes, or many."""
    data = bytearray(stream)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        if not data:
            break
        at = rng.randrange(len(data))
        how = rng.randrange(7)
        if how == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            data[at] = rng.randrange(256)
        elif how == 2:
            data[at : at + 4] = struct.pack("<i", rng.choice(INTERESTING))
        elif how == 3:
            del data[at : at + rng.choice((1, 4, 12, 24, 100))]
        elif how == 4:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 12)))
        elif how == 5:
            data[at:at] = other[: rng.randrange(len(other) + 1)]
        else:
            del data[at:]
    return bytes(data)


def cuts(rng: random.Random, size: int) -> list[int]:
    """Where a stream is cut: anywhere, or everywhere."""
    if size < 400 and chance(rng, 20):
        return list(range(1, size))
    return [rng.randrange(size + 1) for _ in range(rng.choice((1, 2, 5)))]
