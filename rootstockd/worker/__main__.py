"""`python -m rootstockd.worker FD SPEC`: a worker, started by the daemon and by nobody else.

FD is the descriptor of its end of the socket, SPEC a ModelSpec as JSON.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import sys
import traceback

from rootstockd.worker.engines import ModelSpec
from rootstockd.worker.loop import die_with_parent, main
from rootstockd.worker.memory import limit_memory

if __name__ == "__main__":
    # a terminal's Ctrl-C is for the daemon, which then drains its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # into the daemon's log, whose lines look the same
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(channel)
    limit_memory()
    status = 1
    try:
        status = main(channel, ModelSpec(**json.loads(sys.argv[2])))
    except BaseException:  # whatever it is, the process must end, and threads that an engine left must not keep it
        with contextlib.suppress(Exception):
            traceback.print_exc()
    with contextlib.suppress(Exception):  # the log may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # torch's own teardown takes long and has nothing left to do
