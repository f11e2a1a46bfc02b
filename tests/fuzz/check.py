"""One input of the fuzzing: a stream must mean the same read in one go, and by either side however it is cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

import streams
from rootstock_client import ipi
from sides import LIMITS, LONG, Outcome, play_driver, play_engine, read_driver, read_engine

ONE_LONG_IN = 100
"""One of so many inputs has messages that are longer than the staging buffer."""


def check_driver(stream: bytes, cuts: Sequence[int], *, late: bool, limits: ipi.Limits = LIMITS) -> Outcome:
    """A driver's stream."""
    with np.errstate(all="ignore"):  # cells whose volume is no double
        meaning = read_driver(stream, limits)
        assert play_driver(stream, (), limits) == meaning
        assert play_driver(stream, (), limits, fast=False) == meaning
        assert play_driver(stream, cuts, limits, late=late) == meaning
    # each answer has its question: a STATUS or a GETFORCE, and one more ERROR where the stream ends with one
    asked = stream.count(b"STATUS      ") + stream.count(b"GETFORCE    ")
    assert len(meaning.answers) <= asked + (meaning.ends not in ("open", "exit"))
    return meaning


def check_engine(
    stream: bytes, cuts: Sequence[int], asked: list[str], natoms: int, batch: int, limits: ipi.Limits = LIMITS
) -> Outcome:
    """An engine's stream."""
    how = {"asked": asked, "natoms": natoms, "batch": batch}
    meaning = read_engine(stream, limits, **how)
    assert play_engine(stream, (), limits, **how) == meaning
    assert play_engine(stream, (), limits, fast=False, **how) == meaning
    assert play_engine(stream, cuts, limits, **how) == meaning
    assert len(meaning.answers) <= len(asked)
    return meaning


def random_input(rng: random.Random, seeds: Sequence[bytes]) -> tuple[str, Outcome]:
    """Make an input, check it, and say what came of it; an AssertionError carries the input."""
    other = rng.choice(seeds)
    long = streams.chance(rng, ONE_LONG_IN)
    limits = LONG if long else LIMITS
    if rng.randrange(3):
        stream = other if streams.chance(rng, 6) else streams.driver_stream(rng, long=long)
        stream = streams.mutate(rng, stream, other)
        cuts, late = streams.cuts(rng, len(stream)), streams.chance(rng, 2)
        try:
            return "driver", check_driver(stream, cuts, late=late, limits=limits)
        except Exception as error:
            raise AssertionError(f"driver {stream!r} cut at {cuts}, late={late}") from error
    asked = rng.choices(["STATUS", "GETFORCE"], k=rng.randrange(5))
    natoms, batch = rng.choice((2731, 3000) if long else (0, 1, 2, 3)), rng.choice((1, 1, 1, 2, 3))
    stream = streams.mutate(rng, streams.engine_stream(rng, asked, natoms, batch, long=long), other)
    cuts = streams.cuts(rng, len(stream))
    try:
        return "engine", check_engine(stream, cuts, asked, natoms, batch, limits)
    except Exception as error:
        raise AssertionError(f"engine {stream!r} cut at {cuts}, asked {asked}, {natoms} atoms x {batch}") from error
