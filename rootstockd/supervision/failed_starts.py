"""When a model whose workers end before they are ready is tried again, and when it counts as broken. Pure."""

from __future__ import annotations

from rootstock_client.errors import ModelLoadError
from rootstockd.processes.ends import End
from rootstockd.words import counted

MAX_BLAMED = 5
"""Workers in a row that died of what they did before they were ready, until the model counts as broken."""
MAX_HUNG = 2
"""The same, of those that took longer to load than they may."""
MAX_KILLED = 60
"""The same, of those that signals from outside ended: some ten minutes of them say nothing good of the machine, and
nothing at all of the model."""
PAUSES = (0.0, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0)
"""Seconds before the next start, by failed starts in a row; the last for all further ones."""
FROM_OUTSIDE = "These signals come from outside: from the kernel when memory runs out (see `dmesg`), or from people."


class FailedStarts:
    """Starts in a row that failed.

    Args:
        name: the model's.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._ends: list[End] = []

    def add(self, end: End) -> None:
        """One more has ended before it was ready."""
        self._ends.append(end)

    def forget(self) -> None:
        """The row is over."""
        self._ends.clear()

    @property
    def pause(self) -> float:
        """Seconds before the next start."""
        return PAUSES[min(len(self._ends), len(PAUSES) - 1)]

    def verdict(self) -> ModelLoadError | None:
        """Why the model counts as broken, if it does."""
        blamed = [end for end in self._ends if end.blamed]
        if len(blamed) >= MAX_BLAMED or sum(end.hung for end in blamed) >= MAX_HUNG:
            hint = "`rootstockd logs` has what they printed."
            if blamed[-1].changed:
                hint = "Ask again when the package that computes, or the module, stays as it is."
        elif len(self._ends) - len(blamed) >= MAX_KILLED:
            blamed, hint = self._ends, "The model is tried again when somebody next asks for it."
            if any(end.signalled for end in self._ends):
                hint = f"{FROM_OUTSIDE} {hint}"
        else:
            return None
        ends = counted(end.how for end in blamed)
        return ModelLoadError(
            f"model {self._name!r}: {len(blamed)} workers ended before they were ready: {ends}.", hint
        )
