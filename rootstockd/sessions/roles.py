"""Who a session has to do with: its host, the daemon."""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from rootstock_client import ipi
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.sessions.accounts import Account, Accounts
from rootstockd.sessions.init_request import InitRequest
from rootstockd.sessions.registry import SessionRegistry
from rootstockd.supervision.supervisor import Supervisor


class Host(Protocol):
    """What a session needs of the daemon."""

    limits: ipi.Limits
    accounts: Accounts
    sessions: SessionRegistry
    errors: Counter[str]
    """How many drivers were told of, or lost their connection for, by code."""

    def check_open(self) -> None:
        """Whether new work is taken.

        Raises:
            DrainingError: it is not.
        """

    def open_model(self, request: InitRequest, account: Account, leaving: WorkerKey | None) -> Supervisor:
        """The model a session asks for, which has another until then, or none.

        Raises:
            RootstockError: there is none, or it can't do what is asked for.
        """
