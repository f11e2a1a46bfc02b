"""What was found, and having it found: examinations side by side, none of which can hold up the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

Level: TypeAlias = Literal["ok", "note", "warning", "problem"]
Examination: TypeAlias = Callable[[], Iterable["Finding"]]

IN_VAIN = "Jobs wait for it to come back, 5 s at their first connection and longer later."
"""Why a daemon's socket without a daemon matters."""


class Finding(BaseModel):
    """One thing that was looked at."""

    model_config = ConfigDict(frozen=True)

    level: Level
    """problem: something will not work. warning: it works, slowly, unsafely or not for long. note: good to know."""
    subject: str
    """What was looked at, in a word or two."""
    what: str
    """How it is."""
    why: str = ""
    """Why that matters."""
    mend: str = ""
    """The command that mends it; empty where none does."""
    advice: str = ""
    """What else mends it, in words."""


def ok(subject: str, what: str) -> Finding:
    """It is as it should be."""
    return Finding(level="ok", subject=subject, what=what)


def note(subject: str, what: str, why: str = "", mend: str = "", advice: str = "") -> Finding:
    """It does no harm, and is good to know."""
    return Finding(level="note", subject=subject, what=what, why=why, mend=mend, advice=advice)


def warning(subject: str, what: str, why: str, mend: str = "", advice: str = "") -> Finding:
    """It works, but not as well as it could."""
    return Finding(level="warning", subject=subject, what=what, why=why, mend=mend, advice=advice)


def problem(subject: str, what: str, why: str, mend: str = "", advice: str = "") -> Finding:
    """Something will not work."""
    return Finding(level="problem", subject=subject, what=what, why=why, mend=mend, advice=advice)


def examine(examinations: dict[str, Examination], seconds: float) -> dict[str, list[Finding]]:
    """What was found, by the examinations' names.

    Each has a thread of its own: a file system or a driver that does not answer can't be interrupted. What has not
    ended in time is left behind, and that is a finding, too.

    Args:
        examinations: what to do, by name, in the order of the report.
        seconds: how long all of them may take together.
    """
    found: dict[str, list[Finding]] = {name: [] for name in examinations}

    def run(name: str, examination: Examination) -> None:
        try:
            for finding in examination():
                found[name].append(finding)
        except Exception as error:
            words = f"this check failed: {type(error).__name__}: {error}"
            found[name].append(warning(name, words, "Whether anything is wrong here is not known. Please report this."))

    threads = {
        name: threading.Thread(target=run, args=(name, examination), daemon=True)
        for name, examination in examinations.items()
    }
    deadline = time.monotonic() + seconds
    for thread in threads.values():
        thread.start()
    for thread in threads.values():
        thread.join(max(0.0, deadline - time.monotonic()))
    return {name: [*found[name], *[_unanswered(name, seconds)] * thread.is_alive()] for name, thread in threads.items()}


def _unanswered(name: str, seconds: float) -> Finding:
    return warning(
        name,
        f"no answer within {seconds:g} s",
        "A file system, a driver or a daemon does not answer, or the machine is very busy.",
        "rootstockd doctor --timeout 60",
    )
