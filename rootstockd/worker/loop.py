"""The worker's life: load the model, then take all that is waiting, evaluate, answer.

It talks to the daemon over one SOCK_SEQPACKET socket; the structures themselves lie in slots. The first byte of a
message says what it is:

=== ================================================ ===========================================================
to the worker
----------------------------------------------------------------------------------------------------------------
A   JSON: slot, natoms, frames, pbc, charge, ...      a new slot, its descriptor beside the message
D   int32 slot                                       forget the slot
E   int32 slots                                      evaluate these, as one batch
=== ================================================ ===========================================================

=== ================================================ ===========================================================
to the daemon
----------------------------------------------------------------------------------------------------------------
R   JSON: EngineInfo                                 the model is loaded
X   JSON: code, message, hint                        the model can't be loaded; the worker ends
F   JSON: slot, code, message, hint                  this slot's evaluation failed
E   int32 slots                                      the batch is done; results lie in the slots
=== ================================================ ===========================================================
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import signal
import socket
import struct
import sys
import traceback
from typing import Any

import numpy as np

from rootstockd.worker.engines import Engine, EngineError, ModelSpec, Result, System, Task, load_engine
from rootstockd.worker.slots import Slot
from rootstockd.worker.units import BOHR, HARTREE

MESSAGE_SIZE = 64 * 1024
_PR_SET_PDEATHSIG = 1


class _Attached:
    """A slot and what the engine keeps for its system, or why the engine refuses it."""

    def __init__(self, slot: Slot, fields: dict[str, Any], engine: Engine) -> None:
        self.slot = slot
        self.number: int = fields["slot"]
        self.stress: bool = fields["stress"]
        self.energies: bool = fields["energies"]
        pbc = tuple(fields["pbc"])
        system = System(
            slot.numbers.copy(),
            pbc,
            fields["charge"],
            fields["spin"],
            fields["head"],
            fields["exact"],
            fields["tolerance"],
        )
        self.refusal: EngineError | None = None
        try:
            self._system = engine.prepare(system)
        except EngineError as error:
            self.refusal = error

    def tasks(self) -> list[Task]:
        """One task a frame.

        Raises:
            EngineError: the engine knows no such system, or positions are not finite.
        """
        if self.refusal is not None:
            raise self.refusal
        cells, positions = self.slot.cells * BOHR, self.slot.positions * BOHR
        if not is_finite(positions):
            frame, atom = np.argwhere(~np.isfinite(positions))[0][:2]
            where = f" of structure {frame}" if self.slot.frames > 1 else ""
            raise EngineError(
                "invalid-structure", f"the position of atom {atom}{where} is {positions[frame, atom].tolist()} Å."
            )
        return [Task(self._system, c, p, self.stress, self.energies) for c, p in zip(cells, positions)]

    def store(self, results: list[Result]) -> None:
        """Write what the engine gave into the reply, in atomic units, if it is fit to be seen."""
        slot, extras = self.slot, []
        for frame, result in enumerate(results):
            forces = np.asarray(result.forces)
            if forces.shape != (slot.natoms, 3):
                raise EngineError("evaluation", f"the engine gave forces of shape {forces.shape}")
            slot.energies[frame] = result.energy / HARTREE
            np.multiply(forces, BOHR / HARTREE, out=slot.forces[frame])
            if self.stress:
                if result.virial is None:
                    raise EngineError("unsupported", "the engine computed no stress")
                np.multiply(result.virial, 1 / HARTREE, out=slot.virials[frame])
            else:
                slot.virials[frame] = 0.0  # the driver did not want it and knows it
            extra: dict[str, Any] = {"backend": result.backend} if result.backend else {}
            if self.energies:
                if result.energies is None:
                    raise EngineError("unsupported", "the engine computed no per-atom energies")
                extra["energies"] = (np.asarray(result.energies, np.float64) / HARTREE).tolist()
            extras.append(json.dumps(extra).encode() if extra else b"")
        if not (is_finite(slot.energies) and is_finite(slot.forces) and is_finite(slot.virials)):
            raise EngineError(
                "evaluation",
                "the model gave NaN or infinite numbers for this structure",
                "Look for atoms that lie on top of each other or far outside what the model was trained on.",
            )
        slot.set_extras(extras)


def is_finite(array: np.ndarray) -> bool:
    """Whether all of a contiguous array's numbers are finite: only then their sum is."""
    return math.isfinite(np.add.reduce(array.reshape(-1)))


class Loop:
    """Serves one loaded engine over one socket until the daemon hangs up.

    Args:
        channel: the socket to the daemon.
        engine: the engine.
    """

    def __init__(self, channel: socket.socket, engine: Engine) -> None:
        self._channel, self._engine = channel, engine
        self._slots: dict[int, _Attached] = {}

    def run(self) -> None:
        """Take messages until the daemon hangs up."""
        space = socket.CMSG_SPACE(4)
        while True:
            message, ancillary, _, _ = self._channel.recvmsg(MESSAGE_SIZE, space)
            if not message:
                return
            kind, body = message[:1], message[1:]
            if kind == b"E":
                self._evaluate([self._slots[number] for (number,) in struct.iter_unpack("<i", body)])
                self._channel.send(message)
            elif kind == b"A":
                fields = json.loads(body)
                slot = Slot(int.from_bytes(ancillary[0][2][:4], sys.byteorder), fields["natoms"], fields["frames"])
                self._slots[fields["slot"]] = _Attached(slot, fields, self._engine)
                del slot
            elif kind == b"D":
                self._slots.pop(int.from_bytes(body, "little")).slot.close()

    def _evaluate(self, batch: list[_Attached]) -> None:
        """One pass for all; if that fails, one each, so that nobody suffers for a batch mate."""
        try:
            self._pass(batch)
        except Exception as error:
            if len(batch) == 1:
                self._report(batch[0], error)
            else:
                for attached in batch:
                    self._evaluate([attached])

    def _pass(self, batch: list[_Attached]) -> None:
        tasks = [attached.tasks() for attached in batch]
        results = iter(self._engine.evaluate([task for frames in tasks for task in frames]))
        for attached, frames in zip(batch, tasks):
            attached.store([next(results) for _ in frames])

    def _report(self, attached: _Attached, error: Exception) -> None:
        if not isinstance(error, EngineError):
            with contextlib.suppress(OSError):  # into the daemon's log, which may be full
                traceback.print_exception(type(error), error, error.__traceback__)
            error = EngineError("evaluation", f"the engine failed: {type(error).__name__}: {error}")
        send(self._channel, b"F", {"slot": attached.number, **error_fields(error)})


def error_fields(error: EngineError) -> dict[str, str]:
    """An EngineError as JSON fields, short enough for one message."""
    return {"code": error.code, "message": error.message[:4000], "hint": error.hint[:4000]}


def send(channel: socket.socket, kind: bytes, fields: dict[str, Any]) -> None:
    """Send one JSON message."""
    channel.send(kind + json.dumps(fields).encode())


def die_with_parent() -> None:
    """Have the kernel kill this process when the daemon dies, even in the middle of a computation."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died just before
        os._exit(1)


def main(channel: socket.socket, spec: ModelSpec) -> int:
    """Load and serve; the process's exit status."""
    try:
        engine = load_engine(spec)
    except EngineError as error:
        with contextlib.suppress(OSError):
            traceback.print_exc()
        send(channel, b"X", error_fields(error))
        return 1
    send(channel, b"R", dataclasses.asdict(engine.info))
    Loop(channel, engine).run()
    return 0
