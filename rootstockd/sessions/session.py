"""One driver's connection: bytes from the socket into the slot, and from the slot to the socket."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from typing import cast

from rootstock_client import engine_side, ipi
from rootstock_client.errors import (
    DrainingError,
    LimitError,
    RootstockError,
    error_from_code,
)
from rootstockd.host.log_rate import LogRate
from rootstockd.host.peers import Peer, hung_up
from rootstockd.sessions.accounts import Account
from rootstockd.sessions.init_request import is_announced, parse_init
from rootstockd.sessions.intake import Intake
from rootstockd.sessions.model_client import ModelClient
from rootstockd.sessions.roles import Host
from rootstockd.supervision.roles import State

log = logging.getLogger(__name__)
log.addFilter(LogRate(log))

_session_numbers = itertools.count(1)
_AT_ONCE = range(8)
"""Messages that are answered before others have their turn. A step has fewer."""
LINGER = 2.0
"""Seconds that a connection we end is still read: i-PI hangs when a socket closes on what it has just sent."""


class Session(asyncio.BufferedProtocol):
    """A session: an i-PI engine towards its driver, a client towards its model's supervisor.

    Args:
        host: the daemon.
        peer: who is at the other end.

    Raises:
        RootstockError: it is not let in, and there is no room to stay until it has been told why.
    """

    def __init__(self, host: Host, peer: Peer) -> None:
        self.id = next(_session_numbers)
        self.pid, self.uid, _ = peer
        self.account: Account | None = None
        self.since = time.time()
        self.evaluations = 0
        self.client: ModelClient
        """Of whoever is let in."""
        self._host = host
        self._ipi = engine_side.EngineSide(self._place, host.limits, self._stage)
        self.get_buffer = self._ipi.get_buffer  # type: ignore[method-assign]  # one call less for each read
        self._transport: asyncio.Transport
        self._init: bytes | None = None
        """The text of an INIT that waits for its turn."""
        self._owes = False
        """No step came yet of its last turn."""
        self._writing_paused = self._closing = False
        self._intake = Intake()
        self._staged = 0
        self._refusal: RootstockError | None = None
        try:
            self.account = host.accounts.open_session(peer)
            self.client = ModelClient(self.id, host, self.account, self._evaluated)
        except RootstockError as error:
            about = f"refused sessions of {self.user}"
            log.warning(
                "a session of %s (pid %d) is refused: %s", self.user, self.pid, error.message, extra={"about": about}
            )
            if not host.sessions.turn_away(self):
                self._count(error)
                raise
            self._refusal = error

    @property
    def user(self) -> str:
        """Login name of whoever opened the connection, as the kernel says."""
        return self.account.name if self.account else self._host.accounts.name_of(self.uid)

    @property
    def state(self) -> str:
        """In a word, for status."""
        if self.client.evaluation is not None:
            return "busy"
        return "idle" if self.client.request is not None else "new"

    @property
    def under_way(self) -> bool:
        """Whether there is an evaluation that a stopping daemon waits for.

        That is any but one whose model is yet to load: its driver is told so and can ask the next daemon.
        """
        if self.client.evaluation is None or self.client.model is None:
            return False
        return self.client.model.state is State.READY

    @property
    def unfetched(self) -> bool:
        """Whether the driver has yet to fetch a result, or the rest of it."""
        return (self._ipi.unfetched or self._writing_paused) and not self._closing

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._intake.begin(self._transport)
        # a buffer that isn't empty pauses us: the slot must not change while it is being sent
        self._transport.set_write_buffer_limits(high=0)
        if self._refusal is None:
            self._host.sessions.add(self)
        else:
            self._count(self._refusal)
            self._transport.write(ipi.error_frame(self._refusal))
            self.end(None)

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing:
            self._intake.came(nbytes, placing=False)
            return
        self._ipi.received(nbytes)
        if not self._advance() and not self._closing and not self._waits:
            placing = self._ipi.placing
            if (owed := self._intake.came(nbytes, placing=placing)) is not None:
                self._ask_for_turn(owed, goes_on=placing)
        if self._ipi.full and not self._closing:  # a driver that runs ahead of its results waits
            self._intake.pause()

    def pause_writing(self) -> None:
        self._writing_paused = True

    def resume_writing(self) -> None:
        self._writing_paused = False
        self._go_on()

    def eof_received(self) -> None:
        return None  # the transport closes itself

    def connection_lost(self, _exc: Exception | None) -> None:
        self._ipi.close()
        if self.account is not None:
            self.client.unbind()
            self._unstage()
            self._init = None
            self.account.turns.leave(self)
            self._host.accounts.close_session(self.account, self.evaluations)
            self.account = None
        self._host.sessions.discard(self)

    # --- the protocol's side

    def _advance(self) -> bool:
        """Do what can be done with what has come, where that is much a little of it; whether a step has begun."""
        begun = False
        answers: list[bytes] = []  # sent together: each write wakes the driver, which may have our CPU for it
        try:
            for _ in _AT_ONCE:
                # a driver that does not read its answers gets no more of them, and nothing evaluated meanwhile
                if self._closing or self._writing_paused or (event := self._ipi.next_event()) is None:
                    break
                if isinstance(event, engine_side.Evaluate):  # not `match`: it takes its time, and this is a step's way
                    if self._evaluate(event.cells):
                        begun = True
                        self._intake.step_came()
                elif isinstance(event, engine_side.SendResult):
                    self._say(answers)
                    self._transport.write(self.client.system.slot.reply)
                elif isinstance(event, engine_side.Send):
                    answers.append(event.data)
                else:
                    self._say(answers)
                    self._do(event)
            else:
                self._intake.pause()
                self._ask_for_turn()
            self._say(answers)
        except RootstockError as error:
            self._say(answers)
            self._count(error)
            # whoever said no INIT of ours may not know what an ERROR is; one that is too long is of ours
            if self._ipi.announced or isinstance(error, LimitError):
                self._transport.write(ipi.error_frame(error))
            self.end(error)
        if self._intake.paused and not self._closing and not self._ipi.full and not self._waits:
            self._intake.go_on()
        return begun

    @property
    def _waits(self) -> bool:
        """Whether the session has asked for a turn, and yet to have it."""
        return self.account is not None and self.account.turns.waits(self)

    def _ask_for_turn(self, owed: float = 0.0, *, goes_on: bool = False) -> None:
        assert self.account is not None
        self.account.turns.ask(self, owed, goes_on=goes_on)

    def _earn(self) -> None:
        assert self.account is not None
        self._owes = False
        self.account.turns.earned(self)

    def take_turn(self) -> None:
        """Go on with what is no step: the INIT that waits, or more of what the driver has said at once."""
        if self._closing or self._transport.is_closing():
            return
        if hung_up(self._transport.get_extra_info("socket").fileno()):  # what it said may last for minutes
            self._closing = True
            self._transport.abort()
            return
        self._owes = True
        if self._init is not None:
            text, self._init = self._init, None
            try:
                self._initialise(text)
            except Exception as error:
                self._cut_off(error)
            del text
            self._unstage()
        self._go_on()
        if self._intake.in_turns and not self._closing and not self._waits:
            self._read_on()

    def _read_on(self) -> None:
        """Read in this turn, which that counts for."""
        try:
            if self._ipi.full:  # it goes on when there is room
                self._intake.in_turns = False
            elif nbytes := self._intake.read(self._ipi.get_buffer(-1)):
                self.buffer_updated(nbytes)
        except Exception as error:
            self._cut_off(error)

    def _go_on(self) -> None:
        """Do what can be done, where no transport would close the connection for a defect in that."""
        try:
            self._advance()
        except Exception as error:
            self._cut_off(error)

    def _cut_off(self, defect: Exception) -> None:
        """The daemon's own code has failed."""
        log.error("session %d of %s (pid %d) is cut off", self.id, self.user, self.pid, exc_info=defect)
        self._closing = True
        self._transport.close()

    def _do(self, event: engine_side.Event) -> None:
        """What is not on the path of a step."""
        match event:
            case ipi.Init():
                self._init = event.text
                self._ask_for_turn()
            case engine_side.Close():
                self._count(event.error)
                self.end(event.error)

    def _say(self, messages: list[bytes]) -> None:
        """Send them, which are none afterwards."""
        if not messages:
            return
        self._transport.write(b"".join(messages))
        for message in messages:
            if message.startswith(ipi.ERROR):
                self._count(RootstockError.from_json(message[ipi.HEADER_SIZE + ipi.INT.size :]))
        messages.clear()

    def _count(self, error: RootstockError | None) -> None:
        """The driver has been told of an error, or its connection ends for it."""
        if error is not None:
            self._host.errors[error.code] += 1

    def _stage(self, size: int) -> None:
        """A long INIT of so many bytes is about to come."""
        assert self.account is not None
        self.account.stage(size)
        self._staged = size

    def _unstage(self) -> None:
        """A long INIT has come, or will not."""
        if self._staged and self.account is not None:
            self.account.staged -= self._staged
            self._staged = 0

    def _initialise(self, text: bytes) -> None:
        request = None
        try:
            request = parse_init(text)
            request.check_size(self._host.limits.atoms)
            self.client.bind(request)
        except RootstockError as error:
            self.client.unbind()
            batch_size = request.batch_size if request else 1
            # as new: its traceback holds the text of the INIT
            error = error_from_code(error.code, error.message, error.hint)
            self._ipi.refuse(error, batch_size, announced=is_announced(text) or self._ipi.announced)
            return
        self._ipi.accept(request.batch_size, announced=True)

    def _place(self, natoms: int) -> memoryview:
        return self.client.system.place(natoms)

    def _evaluate(self, cells: bytes) -> bool:
        """Whether a step has begun: what is refused here costs this loop's time, and no worker's turn paces it."""
        try:
            self._host.check_open()
            self.client.evaluate(cells)
        except RootstockError as error:
            self._ipi.fail(error)
            return False
        return True

    def _evaluated(self, error: RootstockError | None) -> None:
        """The result lies in the slot, or there is none."""
        try:
            if error is None:
                self.evaluations += 1
                if self._owes:
                    self._earn()
                self._ipi.finish()
            else:
                self._ipi.fail(error)
            self._advance()
        except Exception as defect:  # others in the batch are yet to be told
            self._cut_off(defect)

    def end(self, error: RootstockError | None) -> None:
        """Say no more; let the driver read what was said, and read what it still says, before closing."""
        if self._closing:
            return
        if error is not None and self.client.evaluation is not None:
            self.client.give_up(error)
        self._closing = True
        if error is not None:
            about = f"closed sessions of {self.user}"
            log.warning(
                "session %d of %s (pid %d) is closed: %s",
                *(self.id, self.user, self.pid, error.message),
                extra={"about": about},
            )
        self._ipi.close()
        self._transport.write_eof()
        # a driver of ours repeats the step that it may just be sending; others would choke on a socket closed at once
        linger = 0.0 if self._ipi.announced and isinstance(error, DrainingError) else LINGER
        asyncio.get_running_loop().call_later(linger, self._transport.close)


def stopping_error() -> DrainingError:
    """What is said to whoever wants something of a daemon on its way down."""
    return DrainingError("the daemon is stopping.", "Start it again with `rootstockd start`.")
