"""An ASE calculator that talks to the daemon behind the worker's back."""

import contextlib
import os
import socket

import numpy as np
from ase.calculators.calculator import Calculator

LIES = [
    b"E",
    b"E\x01\x00\x00\x00",
    b"F{",
    b"Fnull",
    b'F{"slot": 999, "code": "evaluation", "message": "no", "hint": ""}',
    b'F{"slot": {}}',
    b'F{"slot": [], "code": [], "message": 5, "hint": null}',
    b"X[]",
    b'R{"properties": 1, "more": 2}',
    b"R",
    b"O",
    b'C{"missing": 3}',
    b"C{}",
    b"I[[[[",
    b'G{"bytes": -1}',
    b'G{"bytes": "many"}',
    b"\xff\xfe",
    b"?" * 60_000,
]


def channel() -> socket.socket:
    """The worker's end of its socket."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # a descriptor of something else
            return socket.socket(fileno=os.dup(int(name)))
    raise AssertionError("no socket")


class Liar(Calculator):
    """Sends the lie whose number the first atom's is, if there is one, and answers."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        if (number := atoms.numbers[0] - 1) < len(LIES):
            with channel() as daemon:
                daemon.send(LIES[number])
        self.results = {"energy": 1.0, "forces": np.zeros((len(atoms), 3))}
