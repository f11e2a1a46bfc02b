"""A process that has a stream, too, and ends it in good order where the one that serves it is killed.

Without, the kernel would reset the stream where something of the driver's is unread, over which i-PI hangs.
"""

from __future__ import annotations

import logging
import socket
import subprocess
import sys

from rootstock_client.sockets import LINGER

log = logging.getLogger("rootstock_client")

_CODE = """
import socket, sys
sys.stdin.read()
try:
    stream = socket.socket(fileno=int(sys.argv[1]))
    stream.shutdown(socket.SHUT_WR)
    stream.settimeout(float(sys.argv[2]))
    while stream.recv(65536):
        pass
except OSError:
    pass
"""


class Keeper:
    """Has a stream until `end`.

    Args:
        stream: the driver's.
    """

    def __init__(self, stream: socket.socket) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-E", "-c", _CODE, str(stream.fileno()), str(LINGER)],
                stdin=subprocess.PIPE,
                pass_fds=[stream.fileno()],
                start_new_session=True,  # what a terminal sends is not for it
            )
        except OSError as error:  # no more processes, say: it is missed only by who is killed
            log.info("a driver's stream will not be ended in good order if this process is killed: %s", error)

    def end(self) -> None:
        """The stream has been ended."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
