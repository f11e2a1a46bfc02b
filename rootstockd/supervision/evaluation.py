"""What goes through a worker's queue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

Owner = TypeVar("Owner")


@dataclass(eq=False, slots=True)
class Evaluation(Generic[Owner]):
    """One session's structures on their way to a result.

    Args:
        owner: whoever is told how it ended: a session.
        atoms: how large it is.
        user: whose it is.
        share: how much of the worker that user gets, relative to others.
        submitted: when it came here, by a clock of the owner's: what its user's limit held comes when that lets it go.
        away: how long after the owner's last answer that was, in seconds; 0 if there was none.
        alone: it gains nothing from company, and is in no batch with others.
    """

    owner: Owner
    atoms: int
    user: int = 0
    share: float = 1.0
    submitted: float = 0.0
    away: float = 0.0
    alone: bool = False
    attempts: int = 0
    """How many workers died under it."""
    blamed: int = 0
    """How many of them it may have killed itself."""
    starved: int = 0
    """How many of them may have been killed for want of memory."""
    lost: float = 0.0
    """Seconds that these took from everybody else, where it may be to blame."""
    charged: float = 0.0
    """Those of them that count as had by its user."""
    ends: tuple[str, ...] = ()
    """How they ended, in words."""
    withdrawn: bool = False
    """Nobody wants its result any more."""
