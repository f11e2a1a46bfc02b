"""What messages of the daemon and of commands share: nouns behind numbers, and a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

GOES_ON = "A new daemon could not start, so the old one goes on."
"""Behind the reason, where a restart ends before it has begun."""


def noun(number: int, word: str) -> str:
    """A word in the form that goes with a number."""
    return word if number == 1 else f"{word}s"


def so_many(number: int, word: str) -> str:
    """A number, all of its digits, and what there are so many of."""
    return f"{number} {noun(number, word)}"


def counted(events: Iterable[str]) -> str:
    """What happened, each once, with how often where that is more."""
    times = Counter(events).items()
    return "; ".join(f"{event}, {count} times" if count > 1 else event for event, count in times)
