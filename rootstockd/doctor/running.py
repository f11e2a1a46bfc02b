"""The daemon that runs, by what it says of itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import rootstockd
from rootstock_client.errors import AccessDeniedError, DaemonNotFoundError, RootstockError
from rootstockd.control.schema import DaemonStatus, ModelStatus
from rootstockd.doctor.findings import IN_VAIN, Finding, note, ok, problem, warning
from rootstockd.doctor.gpus import Driver

_WRONG_FILE = "have the SHA-256"
"""In what is said of weights that are others than the catalogue's."""
_BRINGS = re.compile(r"`(rootstockd (?:env create|models pull) [\w.+-]+(?: --spec FILE)?)`")
"""Commands that are to be copied; errors may have a worker's words in them."""
_RESTART = "rootstockd restart"
_FOR_ALL = "rootstockd status"
"""It takes no administrator."""


def check_absence(error: RootstockError, *, left: bool) -> Iterator[Finding]:
    """No status was to be had.

    Args:
        error: why.
        left: one that has died has left its socket, of which is said what that means.
    """
    if left:
        yield note("daemon", "none runs, and the socket of one is there still", IN_VAIN)
    elif isinstance(error, DaemonNotFoundError):
        yield note("daemon", "none runs", "Jobs here find none.", "rootstockd start")
    elif isinstance(error, AccessDeniedError):
        yield problem("daemon", error.message, "Jobs of this user are refused at once.", advice=error.hint)
    else:
        yield problem("daemon", error.message, "Jobs may wait for it in vain.", advice=error.hint)


def check_reachable(address: Path, holder: int, listening: int | None) -> Iterator[Finding]:
    """Whether the daemon that has an address's lock is the one whom clients find there.

    Args:
        address: its session socket's.
        holder: its process.
        listening: the process that listens there; None where none does, and 0 of another namespace.
    """
    if holder != listening:
        yield problem(
            "daemon",
            f"pid {holder} is a daemon for {address}, to which nobody can connect any more",
            "Its socket was removed or replaced, as by systemd. It still has its memory and its GPU.",
            "rootstockd stop" if listening is None else f"kill {holder}",
        )


def check_running(daemon: DaemonStatus, driver: Driver) -> Iterator[Finding]:
    """What is wrong with one that answers, and with its models; who can't mend that is told who can."""
    for finding in (*check_daemon(daemon, driver), *check_models(daemon)):
        if daemon.config is not None or finding.mend in ("", _FOR_ALL):
            yield finding
        else:
            yield finding.model_copy(update={"mend": "", "advice": "Tell whoever runs this daemon."})


def check_daemon(daemon: DaemonStatus, driver: Driver) -> Iterator[Finding]:
    """What is wrong with one that answers."""
    if daemon.version != rootstockd.__version__:
        yield warning(
            "daemon",
            f"it is version {daemon.version}, and this is {rootstockd.__version__}",
            "Workers that start from now on have this version's code, which may not go with it.",
            _RESTART,
        )
    if daemon.state != "ready":
        why = "Jobs wait until it is ready, or for the next one."
        yield note("daemon", f"it is {daemon.state}", why, _FOR_ALL)
    else:
        yield ok("daemon", f"{daemon.version}, ready on {', '.join(daemon.devices)}, pid {daemon.pid}")
    if driver.gpus and driver.visible[1] and all(device.startswith("cpu") for device in daemon.devices):
        yield note(
            "daemon",
            "it computes on the CPU, on a node with a GPU",
            "Most models are far faster on a GPU.",
            "rootstockd stop; rootstockd start --gpu 0",
        )
    for text in daemon.warnings:
        yield warning(
            "daemon",
            text,
            "This is probably not what its configuration is meant to say.",
            "rootstockd reload",
            "Once that is fixed.",
        )


def _needs_restart(model: ModelStatus) -> bool:
    """It failed as the daemon's code was upgraded under it."""
    return f"`{_RESTART}`" in (model.error or "")


def _mend(model: ModelStatus) -> str:
    """What brings a failed model what it lacks, as its error says, or has it tried again."""
    if _needs_restart(model):
        return _RESTART
    if _WRONG_FILE in (model.error or ""):  # whoever has the right one puts it there
        return ""
    named = _BRINGS.search(model.error or "")
    return named[1] if named else f"rootstockd load {model.name}"


def check_models(daemon: DaemonStatus) -> Iterator[Finding]:
    """What is wrong with its models."""
    for model in daemon.models:
        name = f"model {model.name}"
        if model.state == "failed":
            slip = _BRINGS.search(model.error or "")  # what somebody asked for was never there
            yield (warning if slip else problem)(
                name,
                model.error or "failed",
                "Its jobs wait for that." if _needs_restart(model) else "Sessions that ask for it get this error.",
                _mend(model),
            )
        elif model.loading and model.loading.obstacle:
            yield warning(
                name, model.loading.text, "Its sessions wait.", "rootstockd unload NAME", "Of one that is idle."
            )
        elif model.restarts:
            times = "once" if model.restarts == 1 else f"{model.restarts} times"
            yield warning(name, f"its worker was replaced {times}", "Each time, its jobs waited.", "rootstockd logs")
        if model.note:
            yield note(name, model.note)
    for why in sorted({why for model in daemon.models for why in model.unconfined}):
        names = ", ".join(model.name for model in daemon.models if why in model.unconfined)
        yield warning(
            "confinement", f"{names}: {why}", "A malicious model could do what the daemon's user can (SECURITY.md)."
        )
