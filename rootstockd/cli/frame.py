"""What `rootstockd top` shows: a daemon's devices, models, users and sessions, in as much room as there is."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Group
from rich.text import Text

from rootstockd.cli.quantities import duration, per_second, plural, seconds, size
from rootstockd.cli.show import STATE_COLOUR
from rootstockd.cli.tables import Column, Table, View, bar, cell
from rootstockd.control.schema import DaemonStatus, DeviceStatus, ModelStatus
from rootstockd.monitoring.history import History
from rootstockd.monitoring.rows import model_rows, session_row, user_rows

HELP = (
    "q        quit",
    "s Tab →  sort by the next column; ← by the one before",
    "r        sort the other way round",
    "↑ ↓      scroll through the sessions; also Page Up and Page Down",
    "p        pause, and go on",
    "?        this help, and back",
    "",
    "Rates are evaluations a second, over five seconds. Latency is the time",
    "from a structure's arrival to its result, in the last ten seconds: p50 is",
    "the median, 99 of 100 take no longer than p99. Batch is how many",
    "structures a model evaluates in one pass, on average. Trends show one",
    "look a column. A model's queue is what waits for its worker; a user's",
    "busy sessions wait or are computed. Part is of the atoms that were",
    "evaluated, where all sessions are shown: administrators see all.",
)


MODELS = (
    Column("MODEL", cell("name"), 0, "name", right=False),
    Column("DTYPE", cell("dtype"), 9, right=False),
    Column("STATE", cell("state"), 2, right=False),
    Column("DEVICE", cell("device"), 8, right=False),
    Column("SESS", cell("sessions"), 5, "sessions"),
    Column("QUEUE", cell("queue"), 4, "queue"),
    Column("EVAL/S", cell("rate", per_second), 1, "rate"),
    Column("TREND", cell("name"), 6, trend="rates", right=False),
    Column("P50", cell("latency", seconds), 3, "latency"),
    Column("P99", cell("p99", seconds), 5),
    Column("TREND", cell("name"), 11, trend="latencies", right=False),
    Column("BATCH", cell("batch", per_second), 4, "batch"),
    Column("TREND", cell("name"), 12, trend="batches", right=False),
    Column("MEMORY", cell("memory", size), 7, "memory"),
    Column("EVALUATIONS", cell("evaluations"), 10, "evaluations"),
)
USERS = (
    Column("USER", cell("name"), 0, "name", right=False),
    Column("SESS", cell("sessions"), 2, "sessions"),
    Column("BUSY", cell("busy"), 4),
    Column("EVAL/S", cell("rate", per_second), 1, "rate"),
    Column("PART", cell("share", lambda share: "-" if share is None else f"{share:.0%}"), 3),
)
SESSIONS = (
    Column("SESSION", cell("name"), 0, "name"),
    Column("USER", cell("user"), 2, right=False),
    Column("PID", cell("pid"), 6),
    Column("MODEL", cell("model"), 3, right=False),
    Column("DTYPE", cell("dtype"), 7, right=False),
    Column("ATOMS", cell("atoms"), 5),
    Column("STATE", cell("state"), 4, right=False),
    Column("EVAL/S", cell("rate", per_second), 1, "rate"),
    Column("EVALUATIONS", cell("evaluations"), 8, "evaluations"),
    Column("AGE", cell("age", duration), 9),
)


def frame(status: DaemonStatus, history: History, view: View, now: float | None = None) -> Group:
    """One look at a daemon, as tables.

    Args:
        status: what the daemon said last.
        history: what it said until then.
        view: how to show it.
        now: Unix time; the clock's if None.
    """
    now = time.time() if now is None else now
    devices = status.device_states if view.height is None else status.device_states[: max(1, view.height // 4)]
    head = [_title(status, history, view, now), *(_device(device, view) for device in devices), Text()]
    foot = [] if view.height is None else [_keys(view)]
    room = None if view.height is None else max(0, view.height - len(head) - len(foot))
    body = [Text(line, no_wrap=True) for line in HELP] if view.help else _tables(status, history, view, room, now)
    if room is not None:
        body = body[:room] + [Text()] * (room - len(body))
    return Group(*[*head, *body, *foot][: view.height])


def _tables(status: DaemonStatus, history: History, view: View, room: int | None, now: float) -> list[Text]:
    """The tables in so many lines; the sessions get what others leave."""
    rows = zip(status.models, model_rows(status.models, history), strict=True)
    models = Table(MODELS, [_model_row(model, row, history) for model, row in rows])
    sessions = Table(SESSIONS, [session_row(session, history, now) for session in status.sessions])
    users = Table(USERS, user_rows(status, sessions.rows))
    body: list[Text] = []
    if not status.models:
        body.append(Text("no model is loaded; the first session that asks for one loads it", no_wrap=True))
    for table, part in ((models, 0.4), (users, 0.4), (sessions, 1.0)):
        if not table.rows:
            continue
        body += [Text()] * bool(body)
        left = None if room is None else room - len(body) - bool(status.other_sessions)
        most = None if left is None else max(1, int(left * part) - 1)
        body += table.lines(view, most, view.scroll if table is sessions else 0)
    if status.other_sessions:
        body.append(Text(f"{plural(status.other_sessions, 'session')} of others", style="dim", no_wrap=True))
    return body


def _title(status: DaemonStatus, history: History, view: View, now: float) -> Text:
    if view.trouble:
        return _line(view, (view.trouble, "bold red"))
    sessions = len(status.sessions) + status.other_sessions
    rate = sum(map(history.model_rate, status.models))
    return _line(
        view,
        (f"rootstockd {status.version} ", "bold"),
        ("paused" if view.paused else status.state, "yellow" if view.paused else STATE_COLOUR[status.state]),
        (f", up {duration(now - status.since)}, {plural(sessions, 'session')}, {per_second(rate)} evaluations/s", ""),
        (f", {status.evaluations} in all, daemon {size(status.memory)}", ""),
    )


def _device(device: DeviceStatus, view: View) -> Text:
    parts = [(f"{device.name:<8} load {bar(device.load, 10, ascii_only=view.ascii_only)} {device.load:4.0%}", "")]
    if device.memory_used is not None and device.memory_total:
        part = device.memory_used / device.memory_total
        meter = bar(part, 10, ascii_only=view.ascii_only)
        parts.append((f"  memory {meter} {size(device.memory_used)} of {size(device.memory_total)}", ""))
    return _line(view, *parts)


def _keys(view: View) -> Text:
    order = " reversed" if view.reverse else ""
    return _line(view, (f"q quit  s sort ({view.sort}{order})  r reverse  p pause  ? help", "reverse"))


def _line(view: View, *parts: tuple[str, str]) -> Text:
    line = Text.assemble(*parts, no_wrap=True)
    line.truncate(view.width, overflow="crop" if view.ascii_only else "ellipsis")
    return line


def _model_row(model: ModelStatus, row: dict[str, Any], history: History) -> dict[str, Any]:
    trend = history.trend(model)
    return {
        **row,
        "rates": trend.rate,
        "latencies": trend.latency,
        "batches": trend.batch,
        "style": "" if model.state == "ready" else STATE_COLOUR[model.state],
    }
