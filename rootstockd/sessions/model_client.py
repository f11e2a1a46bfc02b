"""A session towards its model: the system that it has, and the evaluation of it that is under way."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from rootstock_client.errors import LimitError, RootstockError
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.sessions.accounts import Account
from rootstockd.sessions.init_request import InitRequest
from rootstockd.sessions.roles import Host
from rootstockd.sessions.system import System
from rootstockd.supervision.evaluation import Evaluation
from rootstockd.supervision.roles import Client
from rootstockd.supervision.supervisor import Supervisor


class ModelClient:
    """A client of the model that the latest INIT asked for (`supervision.roles.Client`), and of its user's account.

    Args:
        session: the session's number, for the log.
        host: the daemon.
        account: its user's.
        answer: called when an evaluation is over, with what went wrong.
    """

    system: System
    """The one that it has; none without a model."""

    def __init__(
        self, session: int, host: Host, account: Account, answer: Callable[[RootstockError | None], None]
    ) -> None:
        self.model: Supervisor | None = None
        self.evaluation: Evaluation[Client] | None = None
        """The one that is under way, be it held."""
        self._session, self._host, self._account, self._answer = session, host, account, answer
        self._answered = 0.0
        """When the last evaluation was over, if there was one."""

    @property
    def request(self) -> InitRequest | None:
        """What the session has asked for and got."""
        return None if self.model is None else self.system.request

    @property
    def key(self) -> WorkerKey | None:
        """The model that it has, with all its replicas."""
        return None if self.model is None else self.system.key

    def bind(self, request: InitRequest) -> None:
        """Have another system, to be filled as its cell and positions come, in place of the last one.

        Raises:
            RootstockError: it can't have that; what it had until then it may have lost.
        """
        model = self._host.open_model(request, self._account, self.key)
        self.unbind()
        try:
            self.system = System(request, model.spec, self._account, self._host.accounts, self._session)
        except (OSError, MemoryError) as error:
            why = (isinstance(error, OSError) and error.strerror) or "out of memory"
            raise LimitError(f"the daemon has no room for another system: {why}.", "Try again later.") from error
        self.model = model
        model.join(self)

    def unbind(self) -> None:
        """Give back what the system holds, if there is one."""
        if self.model is None:
            return
        if self.evaluation is not None:
            self.model.scheduler.withdraw(self.evaluation)
            self._over()
        self.model.workers.detach(self.system.number)
        self.model.leave(self)
        self.model = None
        self.system.close()

    def give_up(self, error: RootstockError) -> None:
        """The evaluation that is under way would outlive its slot."""
        assert self.model is not None and self.evaluation is not None
        self.model.scheduler.withdraw(self.evaluation)
        self.evaluated(error)

    def evaluate(self, cells: bytes) -> None:
        """Have the structures evaluated whose positions are in the slot.

        Raises:
            RootstockError: their cells can't be evaluated, or the user may have no evaluations.
        """
        account, system = self._account, self.system
        system.take_cells(cells)
        now = account.enqueue(self)
        self.evaluation = Evaluation(self, system.atoms, account.uid, alone=system.request.exact)
        if now:
            self.let_in()

    def let_in(self) -> None:
        """The evaluation goes to its model; for how long it was held is not the model's to make good."""
        evaluation = self.evaluation
        assert self.model is not None and evaluation is not None
        evaluation.submitted = now = time.perf_counter()
        evaluation.away = now - self._answered if self._answered else 0.0
        evaluation.share = self._account.quota.share
        self.model.submit(evaluation)

    def evaluated(self, error: RootstockError | None) -> None:
        """The supervisor's word, or the account's: the result lies in the slot, or there is none."""
        if self.evaluation is None:
            return  # the driver has gone, or gone on, meanwhile
        self._over()
        self._answered = time.perf_counter()
        self._answer(error)

    def _over(self) -> None:
        """The evaluation is; others of the user that were held come when this session has done what it is at."""
        self.evaluation = None
        if self._account.dequeue(self):
            asyncio.get_running_loop().call_soon(self._account.let_in)

    @property
    def queued(self) -> bool:
        """Whether there is an evaluation that waits for its turn."""
        here = self.model is not None and self.evaluation not in (None, *self.model.scheduler.running)
        return here and not self.held

    @property
    def held(self) -> bool:
        """Whether there is an evaluation that is over the user's limit, and yet to go to its model."""
        return self._account.holds(self)

    def move(self, model: Supervisor) -> bool:
        """Go over to another worker of the same model; whether that could be: not while an evaluation is under way."""
        old = self.model
        evaluation = None if self.held else self.evaluation
        assert old is not None
        if evaluation is not None:
            if evaluation in old.scheduler.running or evaluation.withdrawn:
                return False
            old.scheduler.withdraw(evaluation)
            evaluation.withdrawn = False
        old.workers.detach(self.system.number)
        model.join(self)
        self.model = model
        old.leave(self)
        if evaluation is not None:
            model.submit(evaluation)
        return True
