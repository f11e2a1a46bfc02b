"""The skin of neighbour lists: how much further than the cutoff they reach, so that they hold while atoms move."""

from __future__ import annotations

WIDTH = 0.5
"""Å. A list holds until an atom has moved by half of it."""
UNUSED = 4
"""As many lists in a row that served for one structure alone, and the next have no skin."""
SMALL = WIDTH / 10
"""Å; a list with a skin would hold for five steps in which no atom moves further than this."""
STEADY = 3
"""After as many small steps in a row lists have a skin again."""


class Skin:
    """The skin of a structure that changes from step to step: none where no list serves twice. Pure.

    It begins wide, as for a molecular dynamics. Lists of different structures, as in a screening, or of a cell that
    changes at every step never serve twice, and their skin would only cost edges.
    """

    def __init__(self) -> None:
        self.width = WIDTH
        self._in_a_row = 0
        """Lists that served once, where it is wide; small steps, where there is none."""

    def reused(self) -> None:
        """A list has served for another structure."""
        if self.width:
            self._in_a_row = 0

    def next(self, moved: float) -> float:
        """The skin, in Å, of the list that is about to be made.

        Args:
            moved: how far an atom is from where it was in the last list, in Å; infinite where they can't be compared.
        """
        if self.width:
            if self._in_a_row == UNUSED:
                self.width, self._in_a_row = 0.0, 0
            else:
                self._in_a_row += 1
        elif moved > SMALL:
            self._in_a_row = 0
        else:
            self._in_a_row += 1
            if self._in_a_row == STEADY:
                self.width, self._in_a_row = WIDTH, 1
        return self.width
