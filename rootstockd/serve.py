"""Being the daemon: in front of a terminal, or as the process that `rootstockd start` leaves behind.

`python -m rootstockd.serve [STARTER | PIDFD named|unnamed SOCKET]` takes the whole Config as JSON from standard input,
so that nothing gets lost between the two. All users can read arguments, and these may not be as long as a Config can
be. It ends with the process STARTER, the command that waits for it, until it can be found. With a PIDFD it takes the
place of that process, its predecessor: it asks it to stop, as soon as it has imported everything and knows that there
is room for its own socket, and begins when it is gone. What it says before that is for whoever started it, on standard
error, and no line of the log. A predecessor that was stopped meanwhile has taken its address with it, and the restart
is off. By SOCKET, their address, `stop` finds it before it listens there.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import sys

import uvloop

from rootstock_client.control import fetch
from rootstock_client.errors import ConnectionLostError, DaemonNotFoundError, NotAnsweringError, RootstockError
from rootstock_client.runtime_dir import control_socket
from rootstock_client.sockets import connect
from rootstockd import address
from rootstockd.daemon import Daemon
from rootstockd.host.devices import DeviceError
from rootstockd.host.log_file import LogFormatter
from rootstockd.host.log_output import LogHandler
from rootstockd.host.sockets import AddressError
from rootstockd.host.starter import end_with_it
from rootstockd.models.catalogue import CatalogueError
from rootstockd.settings.config import Config
from rootstockd.systemd import JournalFormatter, Manager, in_journal
from rootstockd.words import GOES_ON

log = logging.getLogger("rootstockd.serve")

CONNECT_TIMEOUT = 5.0
"""Seconds that a predecessor has to accept a connection."""


class StartError(Exception):
    """Why the daemon can't start."""


def start_logging() -> None:
    """To standard error, which is the log file of a daemon in the background."""
    handler = LogHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if in_journal():
        handler.setFormatter(JournalFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    faulthandler.enable()  # what a daemon was at whose watchdog ended it
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # it warns of each request that is none


def serve(config: Config, *, in_background: bool = False) -> None:
    """Run a daemon until it is told to stop.

    Args:
        config: its settings.
        in_background: what it prints goes into `config.log_file`.

    Raises:
        StartError: it can't start.
    """
    try:
        uvloop.run(Daemon(config, Manager(), config.log_file if in_background else None).run())
    except (AddressError, CatalogueError, DeviceError, RootstockError) as error:
        raise StartError(str(error)) from error


def succeed(config: Config, predecessor: int, *, named: bool) -> None:
    """Have the daemon at our address stop, and wait until its process is gone.

    Args:
        config: our settings.
        predecessor: a pidfd of it.
        named: its socket was there. Then, if it is gone with it, `stop` has called the restart off.

    Raises:
        StartError: it goes on, as there is no room for another or it refuses; or the restart is off.
    """
    try:
        with address.room_for_successor(config):
            _ask_to_stop(config, predecessor)
            os.dup2(sys.stdout.fileno(), sys.stderr.fileno())  # the log, which is ours from here on
            select.select([predecessor], [], [])
    except AddressError as error:
        raise StartError(f"{error}\n{GOES_ON}") from error
    except RootstockError as error:
        raise StartError(str(error)) from error
    if named and not config.socket.exists():  # `stop` removes it
        raise StartError("the daemon was stopped while it was being restarted, and stays so.")


def _ask_to_stop(config: Config, predecessor: int) -> None:
    """Tell the predecessor, unless it is gone, and nobody who has its address by now.

    Raises:
        RootstockError: it refuses, or can't be told.
    """
    try:
        with connect(control_socket(config.socket), CONNECT_TIMEOUT) as sock:
            if not _has_ended(predecessor):  # so it is to this one that we are connected
                sock.settimeout(None)  # once told it may stop at any time, so nobody gives up
                fetch(config.socket, "POST", "/v1/stop", {"replaced": True}, over=sock)
    except ConnectionLostError:
        pass  # it was on its way down already
    except TimeoutError as error:
        raise NotAnsweringError(f"rootstockd at {config.socket} accepts no connections.") from error
    except DaemonNotFoundError:
        if not _has_ended(predecessor):
            raise


def _has_ended(process: int) -> bool:
    return bool(select.select([process], [], [], 0)[0])


if __name__ == "__main__":
    start_logging()
    settings = Config.model_validate_json(sys.stdin.buffer.read())
    try:
        match sys.argv[1:]:
            case [starter]:
                end_with_it(int(starter))
            case [predecessor, named, _]:  # a restart goes on without its command
                succeed(settings, int(predecessor), named=named == "named")
                os.close(int(predecessor))
        serve(settings, in_background=True)
    except StartError as error:
        log.critical("Error: %s", error)
        sys.exit(1)
