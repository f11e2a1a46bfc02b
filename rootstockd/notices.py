"""What whoever runs the daemon is to know for as long as it holds."""

from __future__ import annotations

import logging
from collections.abc import Iterable

log = logging.getLogger(__name__)


class Notices:
    """Warnings by what they are about, which `status` shows until others take their place; each is logged once."""

    def __init__(self) -> None:
        self._about: dict[str, list[str]] = {}

    def put(self, about: str, warnings: Iterable[str], level: int = logging.WARNING) -> None:
        """These hold of it now, in place of those before; none, where all is well."""
        self._about[about] = [*warnings]
        for warning in self._about[about]:
            log.log(level, "%s", warning)

    def about(self, *about: str) -> list[str]:
        """Those of so much that hold."""
        return [warning for one in about for warning in self._about.get(one, ())]

    @property
    def all(self) -> list[str]:
        """All that hold."""
        return self.about(*self._about)
