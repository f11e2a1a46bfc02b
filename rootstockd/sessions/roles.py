"""Who a session has to do with: its host, the daemon."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from rootstock_client import ipi
from rootstock_client.errors import RootstockError
from rootstockd.fleet.warm_model import WorkerKey
from rootstockd.sessions.accounts import Account, Accounts
from rootstockd.sessions.init_request import InitRequest
from rootstockd.supervision.supervisor import Supervisor

if TYPE_CHECKING:
    from rootstockd.sessions.session import Session


class Host(Protocol):
    """What a session needs of the daemon."""

    limits: ipi.Limits
    accounts: Accounts
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

    def session_opened(self, session: Session) -> None:
        """A connection came, and is let in."""

    def session_closed(self, session: Session) -> None:
        """It went."""

    def session_turned_away(self, session: Session, error: RootstockError) -> None:
        """A connection came that is not let in; it stays until it has been told why.

        Raises:
            RootstockError: this error: too many stay for that already.
        """
