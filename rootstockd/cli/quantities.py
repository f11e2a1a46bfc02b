"""How commands write times, bytes and numbers for people."""

from __future__ import annotations

from rootstockd.words import noun


def duration(seconds: float) -> str:
    """A time span, in its two largest units; none where a clock that is behind makes it negative."""
    seconds = max(0.0, seconds)
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {int(seconds) % 60} s" if minutes else f"{int(seconds)} s"


def span(seconds: float) -> str:
    """A time span in its largest unit."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s" if seconds >= 1 else "-"


def seconds(value: float) -> str:
    """A latency, with three digits; "-" for 0."""
    if not value:
        return "-"
    unit, scaled = ("s", value) if value >= 1 else ("ms", value * 1e3) if value >= 1e-3 else ("µs", value * 1e6)  # noqa: PLR2004
    digits = 2 if scaled < 10 else 1 if scaled < 100 else 0  # noqa: PLR2004
    return f"{scaled:.{digits}f} {unit}"


def per_second(value: float) -> str:
    """A rate; "-" for 0."""
    return f"{value:.1f}" if 0 < value < 100 else f"{value:.0f}" if value else "-"  # noqa: PLR2004 - three digits


def size(value: int | None) -> str:
    """Bytes, in MB or GB; "-" for 0 and for what is not known."""
    if not value:
        return "-"
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"  # noqa: PLR2004 - a GB


def megabytes(value: int) -> str:
    """Bytes, in MB: files of a few kB are to be seen beside those of many MB."""
    return f"{value / 1e6:.1f} MB"


def count(number: int) -> str:
    """A number; large ones in thousands or millions, with three digits."""
    if number >= 10_000:  # noqa: PLR2004 - up to there all digits
        for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
            if number >= size:
                return f"{number / size:.{0 if number >= 100 * size else 1}f} {unit}"
    return str(number)


def plural(number: int, word: str) -> str:
    """So many of something."""
    return f"{count(number)} {noun(number, word)}"
