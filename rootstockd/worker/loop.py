"""The worker's life: load the model, then take all that is waiting, evaluate, answer.

It talks to the daemon over one SOCK_SEQPACKET socket; the structures themselves lie in slots. The first byte of a
message says what it is:

=== ================================================ ===========================================================
to the worker
----------------------------------------------------------------------------------------------------------------
A   JSON: slot, natoms, frames, pbc, charge, ...      a new slot; M follows
M   -                                                its descriptor is beside this message
D   int32 slot                                       forget the slot
E   int32 slots                                      evaluate these, as one batch
=== ================================================ ===========================================================

=== ================================================ ===========================================================
to the daemon
----------------------------------------------------------------------------------------------------------------
V   JSON: protocol, slots                            the versions that it knows, before all else
C   JSON: missing                                    it has given its rights away, but for what these texts say
P   JSON: stage, backend                             loading has come so far (`stages`), and tries this
R   JSON: EngineInfo                                 the model is loaded
X   JSON: code, message, hint                        the model can't be loaded; the worker ends
F   JSON: slot, code, message, hint                  this slot's evaluation failed
O                                                    the batch did not fit the device's memory; it is done in parts
E   int32 slots                                      the batch is done; results lie in the slots
I   JSON: EngineInfo                                 something in it has changed
G   JSON: bytes                                      what it has of a GPU's memory, where that has changed
=== ================================================ ===========================================================
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import json
import socket
import struct
import time
from typing import Any

from rootstockd.worker import stages
from rootstockd.worker.attached import A_DEFECT, Attached
from rootstockd.worker.engines import Engine, EngineBrokenError, EngineError, ModelSpec, Task
from rootstockd.worker.engines.loading import load_engine
from rootstockd.worker.failures import DoesNotFitError, describe, out_of_memory, print_error, shortage
from rootstockd.worker.memory import Bound, GpuCache, memory_limit, trim
from rootstockd.worker.slots import Slot
from rootstockd.worker.sources import import_from_source
from rootstockd.worker.version import DISORDER, MESSAGE_SIZE

_BETWEEN = 1.0
"""Seconds, at least, from one message about memory to the next; and without work, until it is looked what a GPU's
allocator keeps."""
_WINDOW = 10.0
"""Seconds of work, after which that is looked at, too."""


class Loop:
    """Serves one loaded engine over one socket until the daemon hangs up.

    Args:
        channel: the socket to the daemon.
        engine: the engine.
        fingerprint: the model's, which results say.
        bound: keeps it within the machine's memory, where that is what it computes in.
    """

    def __init__(
        self, channel: socket.socket, engine: Engine, fingerprint: str = "", bound: Bound | None = None
    ) -> None:
        self._channel, self._engine, self._fingerprint, self._bound = channel, engine, fingerprint, bound
        self._info = engine.info
        self._slots: dict[int, Attached] = {}
        self._held = engine.memory()
        """Bytes of a GPU's memory that the daemon knows of; None on a CPU."""
        self._tell_at = 0.0
        self._cache, self._trim_at = GpuCache(), time.monotonic() + _WINDOW

    def run(self) -> None:
        """Take messages until the daemon hangs up."""
        channel, slots = self._channel, self._slots
        if self._held is not None:
            send(channel, b"G", {"bytes": self._held})
            self._look_up()
        while True:
            try:
                message = channel.recv(MESSAGE_SIZE)  # not recvmsg, which costs more and is needed for M alone
            except BlockingIOError:  # nothing to do
                self._cache.trim()
                continue
            if not message:
                return
            kind, body = message[:1], message[1:]
            if kind == b"E":
                self._evaluate([slots[number] for number in array.array("i", body)])
                channel.send(message)
                self._tell_info()
                self._tell_memory()
            elif kind == b"A":
                fields = json.loads(body)
                descriptors = self._descriptors()
                if not descriptors:  # the kernel passes no more of them; the session is told so
                    continue
                slot = Slot(descriptors[0], fields["natoms"], fields["frames"])
                slots[fields["slot"]] = Attached(slot, fields, self._engine, self._fingerprint)
                del slot
            elif kind == b"D":
                slots.pop(int.from_bytes(body, "little")).slot.close()
                self._tell_info()

    def _tell_info(self) -> None:
        """What the engine says of itself, where it says something else than before."""
        if (info := self._engine.info) is not self._info:
            self._info = info
            send(self._channel, b"I", dataclasses.asdict(info))

    def _tell_memory(self) -> None:
        """Tell what the worker has of the GPU now: the driver may not tell the daemon, as in a container."""
        if (now := time.monotonic()) < self._tell_at:
            return
        self._tell_at = now + _BETWEEN
        if (held := self._engine.memory()) != self._held:
            if self._held is None:
                self._look_up()
            self._held = held
            send(self._channel, b"G", {"bytes": held or 0})
        if held is not None and now >= self._trim_at:
            self._trim_at = now + _WINDOW
            self._cache.trim()

    def _look_up(self) -> None:
        """Wait no longer for a message, from now on, than until it is time to see what the GPU's allocator keeps."""
        timeout = struct.pack("ll", int(_BETWEEN), 0)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeout)

    def _descriptors(self) -> list[int]:
        """Of a slot, which comes right behind its announcement; none if the kernel does not pass it on."""
        while True:
            with contextlib.suppress(BlockingIOError):
                return list(socket.recv_fds(self._channel, 1, 1)[1])

    def _evaluate(self, batch: list[Attached], *, again: bool = False) -> None:
        """One pass for all; if that fails, one each, so that nobody suffers for a mate; halves if memory lacks.

        One alone for which it lacks is tried `again`, once: what engines keep for others is given back by then.
        """
        try:
            self._pass(batch)
            return
        except BaseException as error:  # an engine that calls sys.exit() has failed like any other
            broken = isinstance(error, EngineBrokenError)
            cause = (error.__cause__ or error) if broken else error
            memory_lacked, parts = out_of_memory(cause), []
            if len(batch) == 1 and memory_lacked and not broken and not again:
                parts = [batch]
            elif len(batch) == 1 and (memory_lacked or not broken):
                self._report(batch[0], too_large(batch[0].slot, cause) if memory_lacked else cause)
            if broken:  # the daemon has those it heard nothing of repeated, by a fresh worker
                raise
            if len(batch) > 1 and memory_lacked:
                self._channel.send(b"O")
                parts = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            elif len(batch) > 1:
                parts = [[attached] for attached in batch]
            del cause  # it has this frame, and the slots in it, in its traceback
        if memory_lacked:  # only now is what the failed pass had in its hands free
            trim()
            self._cache.empty()
        for part in parts:
            self._evaluate(part, again=part is batch)

    def _pass(self, batch: list[Attached]) -> None:
        if self._bound is not None:
            self._bound.renew()
        tasks: list[Task] = []
        for attached in batch:
            attached.add_tasks(tasks)
        results = self._engine.evaluate(tasks)
        if len(results) != len(tasks):
            what = f"the engine gave {len(results)} results for {len(tasks)} structures"
            raise EngineError("evaluation", what, A_DEFECT)
        start = 0
        for attached in batch:
            end = start + attached.slot.frames
            attached.store(results[start:end])
            start = end

    def _report(self, attached: Attached, error: BaseException) -> None:
        if not isinstance(error, EngineError):
            print_error(error)
            what = f"the engine failed: {describe(error)}"
            error = EngineError("evaluation", what, "`rootstockd logs` has where. Look at the structure first.")
        send(self._channel, b"F", {"slot": attached.number, **error_fields(error)})


def too_large(slot: Slot, error: BaseException) -> EngineError:
    """What a driver is told whose structure does not fit the device's memory."""
    structures = f" x {slot.frames} structures" if slot.frames > 1 else ""
    limit = memory_limit()
    reason = f": {text}" if (text := shortage(error)) else ""
    allowed = f" (a worker may use {limit / 2**30:.2f} GiB here)" if limit else ""
    fits = error.atoms if isinstance(error, DoesNotFitError) else 0
    smaller = f" As dense as this, a structure of {fits} atoms would fit, and perhaps a larger one." if fits else ""
    return EngineError(
        "limit",
        f"{slot.natoms} atoms{structures} do not fit the device's memory{allowed}{reason}.{smaller}",
        "Use a smaller structure, float32 where it is float64, or wait until others leave more memory free.",
    )


def error_fields(error: EngineError) -> dict[str, str]:
    """An EngineError as JSON fields, short enough for one message."""
    return {"code": error.code, "message": error.message[:2000], "hint": error.hint[:2000]}


def send(channel: socket.socket, kind: bytes, fields: dict[str, Any]) -> None:
    """Send one JSON message."""
    # what is no text, such as a file name that is no UTF-8, must not keep the rest from being understood
    channel.send(kind + json.dumps(fields, ensure_ascii=False).encode("utf-8", "replace"))


def main(channel: socket.socket, spec: ModelSpec) -> int:
    """Load and serve; the process's exit status."""
    bound = Bound() if spec.device == "cpu" else None  # CUDA has its own, and maps more of the host's than it uses
    if bound is not None:
        bound.renew()
    stages.tell(lambda stage, backend: send(channel, b"P", {"stage": stage, "backend": backend}))
    import_from_source(spec.own_modules)
    try:
        engine = load_engine(spec)
    except BaseException as error:  # it may be somebody's code that calls sys.exit()
        if not isinstance(error, EngineError) or (error.__cause__ and error.code in ("model-load", "device")):
            print_error(error)  # others say all that there is to say
        cause = (error.__cause__ or error) if isinstance(error, EngineError) else error
        if out_of_memory(cause):
            text = shortage(cause) or describe(cause)
            error = EngineError(
                "limit",
                f"model {spec.name!r} does not fit the device's memory: {text}.",
                "See in `rootstockd status` what else is there, and `rootstockd unload` what is not needed.",
            )
        elif not isinstance(error, EngineError):
            error = EngineError(
                "model-load",
                f"model {spec.name!r} can't be loaded: {describe(error)}",
                "`rootstockd logs` has the traceback.",
            )
        send(channel, b"X", error_fields(error))
        return 1
    send(channel, b"R", dataclasses.asdict(engine.info))
    with contextlib.suppress(ConnectionResetError, BrokenPipeError):  # the daemon has died; so shall we, by PDEATHSIG
        try:
            Loop(channel, engine, spec.fingerprint, bound).run()
        except EngineBrokenError as error:
            print_error(error)
            return DISORDER
    return 0
