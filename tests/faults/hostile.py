"""Calculators for a worker that misbehave on purpose, as the structure says."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT

QUIET, SEGFAULT, ABORT, EXIT, LEAVE, SLEEP, LOOP, MEMORY, NAN, SLOW, NO_TEXT, CHATTY, TALK_AND_DIE, FILL = range(14)
"""What an evaluation does; the height of the first atom in 100 Å says which (`behave`)."""
SLOWLY = 1.0
"""Seconds that SLOW takes, with a right result."""
CHATTER = 20_000
"""Lines that CHATTY and TALK_AND_DIE print."""
SLOW_TO_LOAD = 7.0
GROWTH = 0.3
"""Seconds between 16 MB and the next."""
FILLED = 400 * 10**6
"""Bytes that FILL takes, after a while."""
_HEIGHT = 100.0


def _loop() -> None:
    while True:
        pass


def _complain() -> None:
    raise ValueError(f"can't read {os.fsdecode(b'caf' + bytes([0xE9]))}.dat")


def _chatter() -> None:
    print("\x1b[2J" + 10_000 * "x")
    for number in range(CHATTER):
        print(f"chatter {number}")


def _fill() -> None:
    time.sleep(SLOWLY)
    np.ones(FILLED // 8)


def _talk_and_die() -> None:
    _chatter()
    ctypes.string_at(0)


_DEEDS: dict[int, Callable[[], Any]] = {
    SEGFAULT: lambda: ctypes.string_at(0),
    ABORT: os.abort,
    EXIT: lambda: os._exit(3),
    LEAVE: lambda: sys.exit(3),
    SLEEP: lambda: time.sleep(1e6),
    LOOP: _loop,
    MEMORY: lambda: np.empty((2**50, 3)),
    NO_TEXT: _complain,
    CHATTY: _chatter,
    TALK_AND_DIE: _talk_and_die,
    SLOW: lambda: time.sleep(SLOWLY),
    FILL: _fill,
}


def behave(atoms: Any, what: int) -> Any:
    """A copy of a structure in a cell without pbc along z, moved up to where it does `what`."""
    moved = atoms.copy()
    moved.positions[:, 2] += _HEIGHT * what - moved.positions[0, 2]
    return moved


class Hostile(Calculator):
    """EMT without a memory of earlier structures, so that results don't depend on who came before."""

    implemented_properties = ("energy", "free_energy", "forces", "energies")

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        what = round(atoms.positions[0, 2] / _HEIGHT)
        _DEEDS.get(what, int)()
        emt = EMT()
        emt.calculate(atoms, properties, system_changes)
        self.results = dict(emt.results)
        if what == NAN:
            self.results["forces"] = np.full((len(atoms), 3), np.nan)


class OnGpu(EMT):
    """One that a GPU does not bear: what CUDA says of memory that has failed, where NVML has nothing to say.

    Args:
        broken: its UUID.
        late: that is so for evaluations alone.
    """

    def __init__(self, broken: str, *, late: bool = False) -> None:
        super().__init__()
        self._broken = os.environ["CUDA_VISIBLE_DEVICES"] == broken
        if self._broken and not late:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")

    def calculate(self, *arguments: Any, **more: Any) -> None:
        if self._broken:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        super().calculate(*arguments, **more)


class AtLoading(Hostile):
    """Misbehaves when it is made.

    Args:
        what: segfault, kill, exit, hang, slow, memory, grow or raise.
        times: how often, counted in `counter`; after that all is well.
    """

    def __init__(self, what: str, counter: str, times: int = 1_000_000) -> None:
        super().__init__()
        with Path(counter).open("a+") as file:
            file.write("x")
            file.flush()
            file.seek(0)
            if len(file.read()) > times:
                return
        if what == "segfault":
            ctypes.string_at(0)
        elif what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "exit":
            os._exit(3)
        elif what == "hang":
            time.sleep(1e6)
        elif what == "slow":
            time.sleep(SLOW_TO_LOAD)
        elif what == "memory":
            raise MemoryError
        elif what == "grow":
            grown = []
            while True:
                grown.append(np.ones(2_000_000))
                time.sleep(GROWTH)
        else:
            sys.exit("not today")
