"""Being the daemon: in front of a terminal, or as the process that `rootstockd start` leaves behind.

`python -m rootstockd.serve [PIDFD named|unnamed]` takes the whole Config as JSON from standard input, so that nothing
gets lost between the two. All users can read arguments, and these may not be as long as a Config can be. With a PIDFD
it waits until that process, its predecessor, is gone; it has imported everything by then. A predecessor that was
stopped meanwhile has taken its address with it, and the restart is off.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import select
import sys

import uvloop

from rootstock_client.errors import RootstockError
from rootstockd.daemon import Daemon
from rootstockd.host.devices import DeviceError
from rootstockd.host.log_file import LogFormatter
from rootstockd.host.log_output import LogHandler
from rootstockd.host.sockets import AddressError
from rootstockd.host.starter import end_with_it
from rootstockd.models.catalogue import CatalogueError
from rootstockd.settings.config import Config
from rootstockd.systemd import JournalFormatter, Manager, in_journal

log = logging.getLogger("rootstockd.serve")


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


if __name__ == "__main__":
    start_logging()
    settings = Config.model_validate_json(sys.stdin.buffer.read())
    try:
        if len(sys.argv) > 1:  # the pidfd of the one before it, and whether that one's socket was there
            predecessor = int(sys.argv[1])
            select.select([predecessor], [], [])
            os.close(predecessor)
            if sys.argv[2] == "named" and not settings.socket.exists():  # `stop` removes it
                raise StartError("the daemon was stopped while it was being restarted, and stays so.")
        else:  # a restart goes on without its command
            end_with_it()
        serve(settings, in_background=True)
    except StartError as error:
        log.critical("Error: %s", error)
        sys.exit(1)
