"""One input of the fuzzing: a stream must mean the same read in one go, and by either side however it is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import streams
from sides import Outcome, play_driver, play_engine, read_driver, read_engine


def check_driver(stream: bytes, cuts: Sequence[int], *, late: bool) -> Outcome:
    """A driver's stream."""
    with np.errstate(all="ignore"):
        return _check_driver(stream, cuts, late=late)


def _check_driver(stream: bytes, cuts: Sequence[int], *, late: bool) -> Outcome:
    meaning = read_driver(stream)
    assert play_driver(stream) == meaning
    assert play_driver(stream, fast=False) == meaning
    assert play_driver(stream, cuts, late=late) == meaning
    # each answer has its question: a STATUS or a GETFORCE, and one more ERROR where the stream ends with one
    asked = stream.count(b"STATUS      ") + stream.count(b"GETFORCE    ")
    assert len(meaning.answers) <= asked + (meaning.ends not in ("open", "exit"))
    return meaning


def check_engine(stream: bytes, cuts: Sequence[int], asked: list[str], natoms: int, batch: int) -> Outcome:
    """An engine's stream."""
    how = {"asked": asked, "natoms": natoms, "batch": batch}
    meaning = read_engine(stream, **how)
    assert play_engine(stream, **how) == meaning
    assert play_engine(stream, fast=False, **how) == meaning
    assert play_engine(stream, cuts, **how) == meaning
    assert len(meaning.answers) <= len(asked)
    return meaning


def random_input(rng: random.Random, seeds: Sequence[bytes]) -> tuple[str, Outcome]:
    """Make an input, check it, and say what came of it; an AssertionError carries the input."""
    other = rng.choice(seeds)
    if rng.randrange(3):
        stream = other if streams.chance(rng, 6) else streams.driver_stream(rng)
        stream = streams.mutate(rng, stream, other)
        cuts, late = streams.cuts(rng, len(stream)), streams.chance(rng, 2)
        try:
            return "driver", check_driver(stream, cuts, late=late)
        except Exception as error:
            raise AssertionError(f"driver {stream!r} cut at {cuts}, late={late}") from error
    asked = rng.choices(["STATUS", "GETFORCE"], k=rng.randrange(5))
    natoms, batch = rng.choice((0, 1, 2, 3)), rng.choice((1, 1, 1, 2, 3))
    stream = streams.mutate(rng, streams.engine_stream(rng, asked, natoms, batch), other)
    cuts = streams.cuts(rng, len(stream))
    try:
        return "engine", check_engine(stream, cuts, asked, natoms, batch)
    except Exception as error:
        raise AssertionError(f"engine {stream!r} cut at {cuts}, asked {asked}, {natoms} atoms x {batch}") from error
