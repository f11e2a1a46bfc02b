"""`python -m rootstockd.worker FD SPEC [CONFINEMENT]`: a worker, started by the daemon and by nobody else.

FD is the descriptor of its end of the socket, SPEC a ModelSpec as JSON, CONFINEMENT what `confine` takes as JSON;
without it the worker keeps its rights.
"""

import contextlib
import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import traceback

from rootstockd.worker.confine import confine, die_with_parent
from rootstockd.worker.memory import limit_memory

if __name__ == "__main__":
    # a terminal's Ctrl-C is for the daemon, which then drains its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # the daemon reads what is printed, and has the time and the worker's name before each line of its log
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    faulthandler.enable()
    channel = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(channel)
    limit_memory()
    missing = confine(**json.loads(sys.argv[3])) if len(sys.argv) > 3 else None  # noqa: PLR2004

    # only now: numpy starts threads when it is imported
    from rootstockd.worker.engines import ModelSpec
    from rootstockd.worker.loop import main, send

    status = 1
    try:
        if missing is not None:
            send(channel, b"C", {"missing": missing})
        status = main(channel, ModelSpec(**json.loads(sys.argv[2])))
    except BaseException:  # whatever it is, the process must end, and threads that an engine left must not keep it
        with contextlib.suppress(Exception):
            traceback.print_exc()
    with contextlib.suppress(Exception):  # the log may be full
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)  # torch's own teardown takes long and has nothing left to do
