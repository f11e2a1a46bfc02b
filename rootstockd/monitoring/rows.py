"""A daemon's status as rows: what `rootstockd top` and the dashboard have in their tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import JsonValue

from rootstockd.control.schema import DaemonStatus, ModelStatus, SessionStatus
from rootstockd.monitoring.history import History


def model_rows(models: Sequence[ModelStatus], history: History) -> list[dict[str, Any]]:
    """The models of the latest status in `history`.

    Latencies are in seconds, memory in bytes, rates in evaluations a second; 0 where there is none.
    """
    named = zip(models, told_apart(models), dtypes(models), strict=True)
    return [_model_row(model, name, dtype, history) for model, name, dtype in named]


def _model_row(model: ModelStatus, name: str, dtype: str, history: History) -> dict[str, Any]:
    return {
        "name": name,
        "dtype": dtype,
        "state": f"{model.state} {model.loading.elapsed:.0f} s" if model.loading else model.state,
        "device": model.device or "-",
        "sessions": model.sessions,
        "queue": model.waiting,
        "rate": history.model_rate(model),
        "latency": model.latency_p50 or 0.0,
        "p99": model.latency_p99 or 0.0,
        "batch": model.batch_size or 0.0,
        "memory": model.memory or 0,
        "evaluations": model.evaluations,
    }


def session_row(session: SessionStatus, history: History, now: float) -> dict[str, Any]:
    """A session of the latest status in `history`, at the Unix time `now`; its age is in seconds."""
    return {
        "name": session.id,
        "user": session.user,
        "pid": session.pid,
        "model": session.model or "-",
        "dtype": session_dtype(session),
        "atoms": session.natoms or "-",
        "state": session.state,
        "rate": history.rate(session),
        "evaluations": session.evaluations,
        "age": max(0.0, now - session.since),
    }


def user_rows(status: DaemonStatus, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The users of a status's sessions, whose rows are given.

    Their share, from 0 to 1, is of the atoms that were evaluated; None where there are sessions that are not shown.
    """
    users: dict[str, dict[str, Any]] = {}
    for session, row in zip(status.sessions, rows, strict=True):
        user = users.setdefault(
            session.user, {"name": session.user, "sessions": 0, "busy": 0, "rate": 0.0, "work": 0.0}
        )
        user["sessions"] += 1
        user["busy"] += session.state == "busy"
        user["rate"] += row["rate"]
        user["work"] += row["rate"] * (session.natoms or 0)
    everything = sum(user["work"] for user in users.values())
    for user in users.values():
        user["share"] = None if status.other_sessions else user["work"] / everything if everything else 0.0
    return list(users.values())


def dtypes(models: Sequence[ModelStatus]) -> list[str]:
    """What each computes in, with D3, and as much of its settings as tells it from others of its name."""
    found = []
    for model in models:
        same = [other.dispersion or {} for other in models if (other.name, other.dtype) == (model.name, model.dtype)]
        settings = {
            key: value
            for key, value in (model.dispersion or {}).items()
            if any(key in other and other[key] != value for other in same)
        }
        which = f" ({settings_in_words(settings)})" if settings else ""
        found.append(f"{model.dtype} +D3{which}" if model.dispersion else model.dtype)
    return found


def session_dtype(session: SessionStatus) -> str:
    """What a session's evaluations are computed in, and what it asked for beside."""
    if session.dtype is None:
        return "-"
    return session.dtype + " +D3" * session.dispersion + " exact" * session.exact


def told_apart(models: Sequence[ModelStatus]) -> list[str]:
    """Names, with dtype and device where it takes these to tell models apart."""
    names, found = [], dtypes(models)
    for model, own in zip(models, found, strict=True):
        same = [(dtype, other.device) for other, dtype in zip(models, found, strict=True) if other.name == model.name]
        dtype = f" {own}" if len({dtype for dtype, _ in same}) > 1 else ""
        alike = {device for dtype, device in same if dtype == own}
        names.append(model.name + dtype + (f" {model.device or '-'}" if len(alike) > 1 else ""))
    return names


def settings_in_words(dispersion: dict[str, JsonValue]) -> str:
    """Settings of D3."""
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in dispersion.items())
