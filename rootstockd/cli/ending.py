"""A running daemon's process, and its end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket as socketlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import ValidationError

from rootstock_client.control import request
from rootstock_client.errors import (
    AccessDeniedError,
    ConnectionLostError,
    DaemonNotFoundError,
    NotAnsweringError,
    RootstockError,
)
from rootstock_client.runtime_dir import SOCKET_VARIABLE, START_HINT, answers, control_socket
from rootstock_client.sockets import connect
from rootstockd.cli.clients import Refused
from rootstockd.cli.common import QUIET, saying
from rootstockd.cli.systemd_units import is_systemd
from rootstockd.control.schema import StopAnswer
from rootstockd.host.lock_holder import lock_holder
from rootstockd.host.peers import peer_of
from rootstockd.host.sockets import name_until_open
from rootstockd.host.successors import successors

PEEK = socketlib.MSG_PEEK | socketlib.MSG_DONTWAIT
FORCE_TIMEOUT = 5.0
"""Seconds that a daemon has to answer `stop --force`, and then to end, before it is killed."""
DRAINING = "waiting for evaluations under way"
POLL = 0.05
"""Seconds between looks at a daemon that starts."""
_SUCCEEDING = "waiting for the daemon that a restart has begun to start"


@contextlib.contextmanager
def daemon_process(socket: Path) -> Iterator[int]:
    """A pidfd of the daemon: of the process that listens on its control socket, as the kernel says.

    Raises:
        DaemonNotFoundError: there is none.
        NotAnsweringError: it accepts no connections.
        RootstockError: it is in another process namespace, and has no number here.
    """
    path = control_socket(socket)
    try:
        sock = connect(path, FORCE_TIMEOUT)
    except TimeoutError as error:
        raise NotAnsweringError(f"rootstockd at {socket} accepts no connections.", "Find it with `ps`.") from error
    with contextlib.ExitStack() as stack:
        with sock:
            pid = peer_of(sock).pid
            if not pid:
                raise RootstockError(
                    f"the daemon at {socket} runs in another process namespace, as it does outside of a container: "
                    "from here it can't be seen to end.",
                    "Stop or restart it where it was started, or outside of all containers.",
                )
            if is_systemd(pid):
                raise NotAnsweringError(f"systemd listens at {path}.", "Have it done with systemctl.")
            process = -1
            with contextlib.suppress(OSError):  # it is gone
                process = os.pidfd_open(pid)
                stack.callback(os.close, process)
            # while the connection stands, so does the process, and nobody else has its number
            if process < 0 or (select.select([sock], [], [], 0)[0] and not sock.recv(1, PEEK)):
                raise DaemonNotFoundError(f"no rootstockd answers at {path}: it has just gone.", START_HINT)
        yield process


def end(socket: Path, *, force: bool = False) -> StopAnswer:
    """Stop a daemon and wait until its process is gone; with `force`, kill one that does not answer or does not end.

    Returns:
        What it has said to that; nothing is in it of one that did not answer.

    Raises:
        RootstockError: there is none, or it does not answer.
    """
    with daemon_process(socket) as process, saying(DRAINING) as say:
        limit = FORCE_TIMEOUT if force else float("inf")
        answer = StopAnswer()
        try:
            told = request(socket, "POST", "/v1/stop", {"force": force}, timeout=FORCE_TIMEOUT)
            with contextlib.suppress(ValidationError):  # another version's
                answer = StopAnswer.model_validate(told)
        except ConnectionLostError:
            pass  # it was on its way down already
        except AccessDeniedError:
            raise
        except RootstockError:  # it does not answer, or has too many others to answer
            if not force:
                raise
            limit = 0.0
        if not _has_ended(process, limit, say):
            _kill(process, socket)
    return answer


def _kill(process: int, socket: Path) -> None:
    """Kill a daemon, or one that is about to be, and wait until it is gone.

    Raises:
        AccessDeniedError: it is another user's.
    """
    try:
        signal.pidfd_send_signal(process, 0)  # may we?
        socket.unlink(missing_ok=True)  # or its successor would begin, where it is being restarted
        signal.pidfd_send_signal(process, signal.SIGKILL)
    except PermissionError as error:
        raise AccessDeniedError(
            "the daemon does not end, and is another user's.", "As root: `rootstockd stop --force`."
        ) from error
    select.select([process], [], [])


def end_unreachable(socket: Path, *, force: bool = False) -> int | None:
    """Stop a daemon of this user's that has the lock of an address, whoever has the address by now.

    Args:
        socket: the address, at which no daemon answers.
        force: kill one that does not end soon.

    Returns:
        The process's id; None where no daemon has the lock.
    """
    with lock_holder(socket.with_suffix(".lock")) as holder, saying(DRAINING) as say:
        if holder is None:
            return None
        pid, process = holder
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not _has_ended(process, FORCE_TIMEOUT if force else float("inf"), say):
            signal.pidfd_send_signal(process, signal.SIGKILL)
            select.select([process], [], [])
        return pid


def call_off_restart(socket: Path, *, force: bool = False) -> bool:
    """End the daemon that a restart has begun to start at an address, whose predecessor is gone.

    It ends by itself where its predecessor's socket is gone; or it is stopped as soon as it listens.

    Args:
        socket: the address, at which no daemon answers.
        force: kill one that does not end soon.

    Returns:
        Whether there was one. It is gone now.

    Raises:
        RootstockError: it does not answer, or may not be stopped.
    """
    until = time.monotonic() + (FORCE_TIMEOUT if force else float("inf"))
    with successors(socket) as processes:
        if processes:
            with contextlib.suppress(OSError):  # of a folder of another user's
                socket.unlink(missing_ok=True)
        for process in processes:
            while not _ends_within(process, 0):
                if answers(control_socket(socket)):
                    with contextlib.suppress(DaemonNotFoundError):
                        end(socket, force=force)
                elif time.monotonic() < until:
                    _await_listening(process, socket, until)
                else:
                    _kill(process, socket)
                    name_until_open(socket).unlink(missing_ok=True)
        return bool(processes)


def _await_listening(process: int, socket: Path, until: float) -> None:
    """Wait until a process has ended, or a daemon listens at its address, or it is so late."""
    with saying(_SUCCEEDING) as say:
        while time.monotonic() < until and not _ends_within(process, POLL) and not answers(control_socket(socket)):
            say(_SUCCEEDING)


def is_being_restarted(socket: Path) -> bool:
    """Whether a restart has begun to start a daemon at an address."""
    with successors(socket) as processes:
        return bool(processes)


def nothing_to_stop(error: DaemonNotFoundError) -> Refused:
    """What `stop` says where it found no daemon: to start one is what nobody wants then."""
    hint = error.hint
    if hint == START_HINT:
        hint = f"If it runs elsewhere, name its socket with --socket, or set {SOCKET_VARIABLE} to it."
    return Refused(DaemonNotFoundError(error.message, hint))


def _has_ended(process: int, limit: float, say: Callable[[str], None]) -> bool:
    """Wait for a process to end, for so many seconds at most."""
    while limit > 0 and not _ends_within(process, min(limit, QUIET)):
        limit -= QUIET
        say(DRAINING)
    return _ends_within(process, 0)


def _ends_within(process: int, seconds: float) -> bool:
    return bool(select.select([process], [], [], seconds)[0])
