"""Tables for `rootstockd top`, whose columns give way where there is no room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

SORTS = ("rate", "latency", "queue", "batch", "memory", "sessions", "evaluations", "name")
"""What tables can be sorted by. One that lacks it is sorted by rate."""
BARS = "▁▂▃▄▅▆▇█"
ASCII_BARS = ".:-=+*%@"
GAP = 2
SPARK = (6, 30)
"""Columns of a trend, at least and at most."""


@dataclass
class View:
    """How a frame is to look.

    Args:
        width: columns.
        height: lines; None for as many as it takes.
        ascii_only: the terminal shows nothing else.
    """

    width: int
    height: int | None = None
    ascii_only: bool = False
    sort: str = SORTS[0]
    reverse: bool = False
    scroll: int = 0
    """Sessions above the first that is shown."""
    paused: bool = False
    trouble: str = ""
    """Why there is nothing new."""
    help: bool = False


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        heading: its heading.
        text: what is in it for a row.
        rank: of the columns that don't fit those with the highest go first.
        sort: what of `SORTS` it has.
        right: whether its texts end at its right side.
        trend: what of a row is shown as a sparkline instead of a text.
    """

    heading: str
    text: Callable[[dict[str, Any]], str]
    rank: int
    sort: str = ""
    right: bool = True
    trend: str = ""


@dataclass
class Table:
    """Rows of one kind, the columns of which give way where there is no room.

    Args:
        columns: from left to right.
        rows: what columns make their texts of; the keys of `SORTS` are there to sort by.
    """

    columns: Sequence[Column]
    rows: list[dict[str, Any]]

    def lines(self, view: View, most: int | None = None, scroll: int = 0) -> list[Text]:
        """The heading and the rows.

        Args:
            view: how the frame is to look.
            most: rows, at most.
            scroll: rows to leave out above.
        """
        rows = self._sorted(view)
        scroll = max(0, min(scroll, len(rows) - (most or len(rows))))
        shown = rows[scroll : None if most is None else scroll + most]
        texts = {column: [column.text(row) for row in shown] for column in self.columns}
        columns = list(self.columns)
        while (needed := self._width(columns, texts)) > view.width and len(columns) > 1:
            columns.remove(max(columns, key=lambda column: column.rank))
        trends = sum(bool(column.trend) for column in columns)
        spare = (view.width - needed) // trends if trends else 0
        lines = [Text(style="bold")]
        lines += [Text(style=row.get("style", "")) for row in shown]
        marks = "^v" if view.ascii_only else "▲▼"
        for number, column in enumerate(columns):
            sorts = column.sort == view.sort or (column.sort == "rate" and not self._has(view.sort))
            heading = column.heading + (marks[(column.sort != "name") is not view.reverse] if sorts else "")
            cells = texts[column]
            if column.trend:
                width = min(SPARK[1], SPARK[0] + spare)
                cells = [sparkline(row[column.trend], width, ascii_only=view.ascii_only) for row in shown]
            else:
                width = max(map(cell_len, (column.heading + "^", *cells)))
            for line, cell in zip(lines, (heading, *cells), strict=True):
                padding = " " * max(0, width - cell_len(cell))
                text = padding + cell if column.right else cell + padding
                line.append(set_cell_size(text, width) + " " * GAP * (number < len(columns) - 1))
        if len(rows) > len(shown):
            lines[0].append(f"  {scroll + 1} to {scroll + len(shown)} of {len(rows)}", style="dim")
        for line in lines:
            line.no_wrap = True
            line.truncate(view.width)
        return lines

    def _has(self, sort: str) -> bool:
        return any(column.sort == sort for column in self.columns)

    def _sorted(self, view: View) -> list[dict[str, Any]]:
        key = view.sort if self._has(view.sort) else "rate"
        by_name = sorted(self.rows, key=lambda row: row["name"])
        if key == "name":
            return by_name[::-1] if view.reverse else by_name
        return sorted(by_name, key=lambda row: row[key], reverse=not view.reverse)

    def _width(self, columns: Sequence[Column], texts: dict[Column, list[str]]) -> int:
        widths = [
            SPARK[0] if column.trend else max(map(cell_len, (column.heading + "^", *texts[column])))
            for column in columns
        ]
        return sum(widths) + GAP * (len(columns) - 1)


def cell(key: str, form: Callable[[Any], str] = str) -> Callable[[dict[str, Any]], str]:
    """What a column has where its rows have a value of that key."""
    return lambda row: form(row[key])


def sparkline(values: Iterable[float], width: int, *, ascii_only: bool = False) -> str:
    """The last values, from nothing to their highest, one a column."""
    bars = ASCII_BARS if ascii_only else BARS
    last = list(values)[-width:]
    top = max(last, default=0.0)
    return "".join(
        bars[min(len(bars) - 1, int(value / top * len(bars)))] if value > 0 else " " for value in last
    ).rjust(width)


def bar(part: float, width: int, *, ascii_only: bool = False) -> str:
    """So much of a whole, from 0 to 1."""
    full = round(width * min(1.0, max(0.0, part)))
    return ("#" * full).ljust(width, ".") if ascii_only else ("█" * full).ljust(width, "░")
