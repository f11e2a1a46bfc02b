"""How many evaluations of one user are at their models: others are held, and come when one is over. No worker computes.

Sessions, accounts and supervisors are those of the daemon; drivers' bytes, and the ends of evaluations, are said here.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import inspect
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rootstock_client import ipi
from rootstock_client.errors import LimitError, ModelLoadError, RootstockError, UserLimitError
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.host.peers import Peer
from rootstockd.sessions.accounts import Account, Accounts
from rootstockd.sessions.registry import SessionRegistry
from rootstockd.sessions.session import Session, stopping_error
from rootstockd.sessions.turns import Turns
from rootstockd.settings.config import Config, Device, Quota
from rootstockd.supervision.roles import Client, Placer, State
from rootstockd.supervision.supervisor import Supervisor
from rootstockd.worker.engines import ModelSpec

TEXT = b'{"rootstock": 1, "model": "emt", "numbers": [29], "pbc": [false, false, false]%s}'
STEP = ipi.posdata_head(np.eye(3), np.eye(3), 1) + bytes(24) + ipi.GETFORCE


class Holder:
    """What an account sees of a session."""

    def __init__(self) -> None:
        self.state = ""
        """`held`, `let in` or `refused`."""

    def let_in(self) -> None:
        assert self.state == "held"
        self.state = "let in"

    def evaluated(self, error: RootstockError | None) -> None:
        assert isinstance(error, UserLimitError) and self.state == "held"
        self.state = "refused"


@given(st.lists(st.tuples(st.sampled_from(["come", "go", "limit"]), st.integers(0, 5))))
def test_as_many_as_may_be_there_are_in_the_order_in_which_they_came(steps: list[tuple[str, int]]) -> None:
    account = Account(os.getuid(), "alice", Quota(queued=2), Turns())
    there: list[Holder] = []
    held: deque[Holder] = deque()
    for what, number in steps:
        if what == "limit":
            account.quota = Quota(queued=number or None)
        elif what == "come":
            holder = Holder()
            if account.enqueue(holder):
                there.append(holder)
            else:
                holder.state = "held"
                held.append(holder)
        elif both := [*there, *held]:
            gone = both[number % len(both)]
            (there if gone in there else held).remove(gone)
            assert account.dequeue(gone) == bool(held)
        most = account.quota.queued
        account.let_in()
        while held and (most is None or len(there) < most):
            there.append(held.popleft())
            assert what == "limit" or there[-1].state == "let in"
        assert [holder.state for holder in held] == ["held"] * len(held)
        assert (account.queued, account.held) == (len(there), len(held))
        assert all(account.holds(holder) for holder in held) and not any(map(account.holds, there))


def test_none_at_all() -> None:
    account = Account(os.getuid(), "alice", Quota(queued=1), Turns())
    first, second = Holder(), Holder()
    assert account.enqueue(first) and not account.enqueue(second)
    second.state = "held"
    account.quota = Quota(queued=0)
    with pytest.raises(UserLimitError, match=r"may have no evaluations \(limits\.queued is 0\)"):
        account.enqueue(Holder())
    account.let_in()
    assert second.state == "refused"


class Loading:
    """What an account sees of a model."""

    coming = True


def test_a_user_whose_models_load_though_the_sessions_have_gone_is_not_active() -> None:
    accounts = Accounts(Config(socket=Path("/nowhere"), devices=(Device(name="cpu"),)))
    peer, model = Peer(os.getpid(), os.getuid(), frozenset()), Loading()
    account = accounts.open_session(peer)
    assert accounts.active == [account]
    account.ask(WorkerKey("emt", "float64"), model)
    accounts.close_session(account, 0)
    assert accounts.active == []
    assert accounts.open_session(peer) is account and account.models == 1


# --- sessions


class _Placer:
    """Lets no model come into memory."""

    def __init__(self) -> None:
        self.other: Supervisor | None = None

    async def admit(self, _model: Supervisor) -> None:
        await asyncio.Event().wait()

    def other_worker(self, _model: Supervisor) -> Supervisor | None:
        return self.other


_STREAM = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
"""One that nobody hangs up."""
atexit.register(_STREAM.close)


class _Transport:
    """The driver's end: what it has been sent."""

    def __init__(self) -> None:
        self.said = b""
        self.closed = False

    def write(self, data: bytes | memoryview) -> None:
        self.said += bytes(data)

    def set_write_buffer_limits(self, high: int) -> None:
        assert high == 0

    def get_extra_info(self, name: str) -> socket.socket:
        assert name == "socket"
        return _STREAM

    def is_closing(self) -> bool:
        return self.closed

    def write_eof(self) -> None:
        self.closed = True

    abort = close = pause_reading = resume_reading = write_eof


class House:
    """A daemon as sessions know it."""

    limits = ipi.Limits()

    def __init__(self, **limits: Any) -> None:
        self.config = Config(socket=Path("/nowhere"), devices=(Device(name="cpu"),), limits=Quota(**limits))
        self.accounts, self.sessions = Accounts(self.config), SessionRegistry()
        self.errors: Counter[str] = Counter()
        self.draining = False
        self.placer = _Placer()
        self.model, self.replica = self.supervisor(), self.supervisor()
        self.drivers: list[tuple[Session, _Transport]] = []

    def supervisor(self) -> Supervisor:
        spec = ModelSpec(name="emt", family="ase", device="cpu", dtype="float64")
        return Supervisor(spec, cast("Placer", self.placer), 1000, 60, 60)

    def check_open(self) -> None:
        if self.draining:
            raise stopping_error()

    def open_model(self, request: Any, account: Account, _leaving: object) -> Supervisor:
        account.ask(WorkerKey("emt", "float64"), self.model)
        return self.model

    @functools.cached_property
    def account(self) -> Account:
        (account,) = self.accounts.active
        return account

    def drive(self, *, more: bytes = b"", steps: int = 1) -> tuple[Session, _Transport]:
        """A driver that has sent so many steps."""
        session, transport = Session(cast("Any", self), Peer(os.getpid(), os.getuid(), frozenset())), _Transport()
        session.connection_made(cast("asyncio.Transport", transport))
        self.say(session, ipi.init_frame(TEXT % more) + STEP * steps)
        self.account.turns.leave(session)
        session.take_turn()
        self.drivers.append((session, transport))
        return session, transport

    @staticmethod
    def say(session: Session, data: bytes) -> None:
        while data:
            buffer = session.get_buffer(-1)
            part = data[: len(buffer)]
            buffer[: len(part)] = part
            session.buffer_updated(len(part))
            data = data[len(part) :]

    def where(self) -> str:
        """One letter a driver: its evaluation is [h]eld, [q]ueued, [r]unning; or none is under way, `-`."""
        return "".join(
            "h" if s.client.held else "q" if s.client.queued else "r" if s.state == "busy" else "-"
            for s, _ in self.drivers
        )

    def compute(self, model: Supervisor | None = None) -> None:
        """A worker does a batch."""
        model = model or self.model
        assert model.scheduler.next_batch()
        for evaluation in model.scheduler.finished():
            evaluation.owner.evaluated(None)


async def turn() -> None:
    """What was to happen soon happens."""
    for _ in range(3):
        await asyncio.sleep(0)


def in_a_house(story: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A story of drivers at a daemon that lets each user have one evaluation at a time."""

    @functools.wraps(story)
    def test(**arguments: Any) -> None:
        async def live() -> None:
            house = House(queued=1)
            await turn()
            await story(house, **arguments)
            account = house.account
            for session, _ in house.drivers:
                session.connection_lost(None)
            assert not len(house.sessions) and not house.model.clients and not house.replica.clients
            assert (account.queued, account.held) == (0, 0)

        asyncio.run(live())

    whole = inspect.signature(story)
    test.__signature__ = whole.replace(parameters=list(whole.parameters.values())[1:])  # type: ignore[attr-defined]
    return test


def results(transport: _Transport) -> int:
    return transport.said.count(ipi.FORCEREADY)


def error_of(transport: _Transport) -> RootstockError:
    """The first that it was told."""
    begin = transport.said.index(ipi.ERROR) + ipi.HEADER_SIZE
    (size,) = ipi.INT.unpack_from(transport.said, begin)
    return RootstockError.from_json(transport.said[begin + ipi.INT.size :][:size])


@in_a_house
async def test_first_come_first_served(house: House) -> None:
    """Also before whoever has just had one and wants the next at once; and no session is let in halfway."""
    house.drive(steps=2)
    house.drive(more=b', "exact": true')
    house.drive()
    assert house.where() == "qhh" and [s.state for s, _ in house.drivers] == ["busy"] * 3
    assert (house.account.queued, house.account.held) == (1, 2)
    house.compute()
    assert house.where() == "hhh", "another session was let in while the first was at its own"
    await turn()
    assert house.where() == "hqh"
    house.compute()
    await turn()
    assert house.where() == "h-q"
    house.compute()
    await turn()
    house.compute()
    await turn()
    assert house.where() == "---" and [results(t) for _, t in house.drivers] == [2, 1, 1]
    assert (house.account.queued, house.account.held) == (0, 0)


@in_a_house
async def test_a_session_that_goes_while_it_is_held_and_one_while_another_is(house: House) -> None:
    for _ in range(4):
        house.drive()
    house.drivers[1][0].connection_lost(None)
    assert (house.account.queued, house.account.held) == (1, 2)
    house.drivers[0][0].connection_lost(None)  # what was let in is withdrawn
    assert house.model.scheduler.waiting == 0
    del house.drivers[:2]
    await turn()
    assert house.where() == "qh" and house.model.scheduler.waiting == 1
    house.drivers[0][0].end(stopping_error())
    assert error_of(house.drivers[0][1]).code == "draining" and house.where() == "-h"
    house.drivers[1][0].end(stopping_error())  # before it would be let in
    assert error_of(house.drivers[1][1]).code == "draining"
    await turn()
    assert house.where() == "--" and house.model.scheduler.waiting == 0


@in_a_house
async def test_one_that_is_held_goes_over_to_another_worker_without_being_let_in(house: House) -> None:
    house.drive()
    held, model, replica = house.drive()[0].client, house.model, house.replica
    model.hand_over(replica, 2)  # it is not in the queue that is to be shared out
    assert replica.clients == {house.drivers[0][0].client} and house.where() == "qh"
    model.hand_over(replica, 2)
    assert held in model.clients
    assert held.move(replica) and held in replica.clients and not model.clients
    assert house.where() == "qh" and replica.scheduler.waiting == 1
    house.compute(replica)
    await turn()
    assert house.where() == "-q" and replica.scheduler.waiting == 1
    house.compute(replica)
    assert [results(t) for _, t in house.drivers] == [1, 1]


@in_a_house
async def test_a_model_that_fails_or_has_no_room_tells_those_that_are_held_as_well(house: House) -> None:
    for _ in range(3):
        house.drive(steps=2)
    house.model.refuse(LimitError("no room"))
    await turn()
    assert [error_of(t).message for _, t in house.drivers] == ["no room"] * 3
    assert house.where() == "qhh", "the next steps wait anew"
    house.model._fail(ModelLoadError("broken"))
    await turn()
    assert house.where() == "---" and (house.account.queued, house.account.held) == (0, 0)
    assert ["broken" in t.said.decode(errors="replace") for _, t in house.drivers] == [True] * 3
    for session, _ in house.drivers:
        house.say(session, STEP)
    for _ in range(3):
        await turn()
    assert house.where() == "---", "one is told after the other"
    assert [t.said.count(ipi.ERROR) for _, t in house.drivers] == [3, 3, 3]


@in_a_house
async def test_where_another_worker_stands_in_they_are_held_for_that(house: House) -> None:
    house.drive()
    house.drive()
    house.placer.other = house.replica
    house.model._fail(ModelLoadError("broken"))
    assert house.where() == "qh" and len(house.replica.clients) == 2
    house.compute(house.replica)
    await turn()
    house.compute(house.replica)
    assert [results(t) for _, t in house.drivers] == [1, 1]


@in_a_house
async def test_a_model_that_is_unloaded_or_retired_meanwhile_comes_back_for_it(house: House) -> None:
    house.drive()
    held, model = house.drive()[0].client, house.supervisor()
    assert held.move(model)
    model.unload()
    model.retire()
    assert model.state is State.COLD and not model.wanted and model.clients == {held}
    house.compute()
    await turn()
    assert model.wanted and house.where() == "-q"
    house.compute(model)
    assert [results(t) for _, t in house.drivers] == [1, 1]


@in_a_house
async def test_a_stopping_daemon_waits_for_them(house: House) -> None:
    for _ in range(3):
        house.drive(steps=2)
    house.model.state = State.READY
    house.draining = True
    for under_way in (3, 2, 1):
        assert sum(s.under_way for s, _ in house.drivers) == under_way
        house.compute()
        await turn()
    assert [results(t) for _, t in house.drivers] == [1] * 3
    assert {error_of(t).code for _, t in house.drivers} == {"draining"}


@pytest.mark.parametrize(("limit", "after"), [(2, "qqh"), (None, "qqq"), (0, "q--")])
@in_a_house
async def test_a_reload(house: House, limit: int | None, after: str) -> None:
    for _ in range(3):
        house.drive()
    house.accounts.apply(house.config.model_copy(update={"limits": Quota(queued=limit, share=3.0)}))
    assert house.where() == "qhh"
    house.accounts.let_in()
    assert house.where() == after
    queued = [entry[2] for user in house.model.scheduler._users.values() for entry in user.queue]
    assert [evaluation.share for evaluation in queued] == [1.0] + [3.0] * (after.count("q") - 1)
    if limit == 0:
        assert [error_of(t).code for _, t in house.drivers[1:]] == ["user-limit"] * 2


@in_a_house
async def test_the_time_in_which_it_was_held_counts_for_nothing(house: House) -> None:
    """Neither as waiting at the model, nor as a short absence for which others would have to wait."""
    house.drive()
    house.drive(steps=2)
    house.compute()
    await turn()
    house.compute()  # the second's first, whose next comes at once
    assert house.where() == "-q"
    house.say(house.drivers[0][0], STEP)
    assert house.where() == "hq"
    await asyncio.sleep(0.05)
    house.compute()
    await turn()
    (found,) = house.model.scheduler.next_batch()
    client: Client = found.owner
    assert client is house.drivers[0][0].client and found.away > 0.05
    assert found.submitted - house.drivers[1][0].client._answered < 0.05
