"""Where a daemon is found: its folder, its lock and both its sockets, which it makes itself or has from systemd."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping

from rootstock_client.runtime_dir import job_runtime_dir, share_file
from rootstockd.host.sockets import (
    AddressError,
    adopt,
    kept_from_tmpfiles,
    listen,
    lock,
    make_runtime_dir,
    remove,
    remove_if_empty,
    room_beside,
)
from rootstockd.host.threads import in_thread
from rootstockd.settings.config import Config

log = logging.getLogger(__name__)

LOOK = 5.0
"""Seconds between two looks at whether a daemon can still be found."""


def hold(config: Config, ours: contextlib.ExitStack) -> None:
    """Have the folder, as its only daemon.

    Args:
        config: the daemon's settings.
        ours: gives back at its end what was taken.

    Raises:
        AddressError: it can't be had.
    """
    folder = config.socket.parent
    make_runtime_dir(folder, shared=config.shared)
    if folder == job_runtime_dir():
        ours.callback(remove_if_empty, folder)
    ours.enter_context(lock(config.lock))
    ours.enter_context(kept_from_tmpfiles(folder))
    if folder == job_runtime_dir():  # Slurm may have killed those who would have removed it
        ours.callback(remove, share_file(config.socket))


@contextlib.contextmanager
def room_for_successor(config: Config) -> Iterator[None]:
    """Have room in the folder, beside its daemon, for the one that takes its place.

    That is for the session socket: the old one is left there, while the room of all else comes free with its daemon.

    Raises:
        AddressError: there is none.
    """
    try:
        with room_beside(config.socket):
            yield
    finally:
        if config.socket.parent == job_runtime_dir():  # its daemon may have been stopped, and could not remove it
            remove_if_empty(config.socket.parent)


def make_sockets(
    config: Config, ours: contextlib.ExitStack, keep: Callable[[], bool]
) -> tuple[socket.socket, socket.socket]:
    """Listen in the folder, for sessions and for control.

    Args:
        config: the daemon's settings.
        ours: closes and removes them at its end.
        keep: whether that for sessions is to be left there then, for a successor.

    Raises:
        AddressError: they can't be had.
    """
    mode, group = config.socket_mode, config.access.socket_group
    control = ours.enter_context(listen(config.control, mode, group))
    return ours.enter_context(listen(config.socket, mode, group, keep=keep)), control


def adopt_sockets(
    config: Config, ours: contextlib.ExitStack, handed: Mapping[str, socket.socket]
) -> tuple[socket.socket, socket.socket]:
    """Take over those for sessions and for control that systemd has made; arguments and errors as above."""
    if handed.keys() != {"sessions", "control"}:
        raise AddressError(
            f"systemd listens for {', '.join(map(repr, handed))}; the daemon needs 'sessions' and 'control' "
            "(FileDescriptorName= in its .socket units, Sockets= in its .service)."
        )
    if config.access.socket_group is not None:
        log.warning("access.socket_group has no effect: SocketGroup= and SocketMode= of the .socket units have")
    sessions = ours.enter_context(adopt(handed["sessions"], config.socket))
    return sessions, ours.enter_context(adopt(handed["control"], config.control))


async def until_lost(config: Config) -> None:
    """Until none of the files is there any more by which a daemon is found; of those that are there now.

    So it is when somebody empties its folder, or when a logout takes along /run/user/UID and leaves the processes.
    """
    made = [(path, path.lstat()) for path in (config.socket, config.control, config.lock) if path.exists()]

    def any_is_there() -> bool:
        for path, status in made:
            try:
                if os.path.samestat(path.lstat(), status):
                    return True
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError:  # it can't be told
                return True
        return False

    while True:
        await asyncio.sleep(LOOK)
        if not await in_thread(any_is_there):
            return


def open_or_close(config: Config) -> list[str]:
    """Who can open the sockets that were made follows the lists.

    Returns:
        What is in the way.
    """
    failed = []
    for path in (config.control, config.socket):
        try:
            path.chmod(config.socket_mode)
        except OSError as error:
            failed.append(f"who can open {path} stays as it is: {error.strerror}; `rootstockd reload` tries again")
    return failed
